"""What a run is about to do, in a few lines: sizes, steps, memory, and what every "auto" became."""

from utils import distributed
from utils.device import describe_device


def print_summary(config, parts):
    """Device, pictures, network and steps. Rank 0 prints, the others are silent."""
    if not distributed.is_main():
        return
    pictures, steps = len(parts.dataset), len(parts.dataset) // parts.batch_size
    aside = f", {len(parts.validation):,} kept aside for validation" if len(parts.validation) else ""
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
