"""What a run is about to do, in a few lines: sizes, steps, memory, and what every "auto" became."""
import torch

from utils import distributed
from utils.device import autocast, describe_device


def print_summary(config, parts):
    """Device, pictures, network and steps. Rank 0 prints, the others are silent."""
    if not distributed.is_main():
        return
    pictures, steps = len(parts.rows), len(parts.rows) // parts.batch_size
    aside = f", {len(parts.val_rows):,} kept aside for validation" if len(parts.val_rows) else ""
    classes = f", {len(parts.dataset.classes)} classes" if parts.dataset.classes else ""
    processes = f", {distributed.world_size()} processes" if distributed.world_size() > 1 else ""
    used = "" if config.class_conditional or not parts.dataset.classes else " (not used: --class_conditional True learns them)"
    count = sum(parameter.numel() for parameter in parts.diffusion.model.parameters())
    height, width = config.input_shape
    print(f"device     {describe_device(parts.device)}, precision {config.precision}, compile {config.compile}{processes}")
    print(f"pictures   {pictures:,} of {height}x{width}, {config.img_channels} channels{aside}{classes}{used}")
    parameters = f"{count / 1e6:.2f} million parameters, {config.num_groups} groups"
    print(f"network    {parameters}; {config.prediction}, {config.schedule} schedule, T = {config.num_timesteps}")
    of_steps = f"{config.epochs} epochs of {steps} steps of {parts.batch_size}"
    print(f"training   {of_steps}, {config.epochs * steps:,} steps in all, rate up to {config.init_lr:g}")


def print_memory(config, parts):
    """An estimate of what training holds in memory at once, from one image's forward pass."""
    size = parts.batch_size // (config.accumulate * distributed.world_size())
    fixed, per_picture = memory_needs(config, parts)
    # Of the five copies two are the weights and their average, one the gradients, two the moments.
    mib = [value / 2**20 for value in (fixed * 2 / 5, fixed / 5, fixed * 2 / 5, per_picture * size)]
    names = ("weights and average", "gradients", "moments", "activations")
    print("memory     " + ", ".join(f"{value:,.0f} MiB {name}" for value, name in zip(mib, names)))
    print(f"           {sum(mib):,.0f} MiB in all for {size} pictures at a time; --accumulate N divides the activations by N")


def memory_needs(config, parts):
    """Bytes that training needs: (whatever the batch, for each picture of it)."""
    weights = sum(p.numel() * p.element_size() for p in parts.diffusion.model.parameters())
    return 5 * weights, activation_bytes(config, parts)


def activation_bytes(config, parts):
    """Bytes that the backward pass of one image keeps, counted by running its forward pass."""
    kept = {}

    def count(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    diffusion, device = parts.diffusion, parts.device
    images = [torch.zeros(number, config.img_channels, *config.input_shape, device=device) for number in (1, 2)]
    totals = []
    for x in images:
        kept.clear()
        y = torch.zeros(len(x), dtype=torch.long, device=device) if config.class_conditional else None
        t = torch.zeros(len(x), dtype=torch.long, device=device)
        with autocast(device, config.precision), torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            loss = diffusion(x, y, t=t, noise=torch.zeros_like(x))
        totals.append(sum(kept.values()))
        del loss
    # Weights are among what is kept, once for any number of images: the difference of two sizes leaves them out.
    return totals[1] - totals[0]
