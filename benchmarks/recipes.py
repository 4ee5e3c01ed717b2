"""Which settings learn most from the same images? The loss of v on held-out emoji, by timestep.

    python -m benchmarks.recipes --recipes "base=|fast=init_lr:2e-3;batch_size:8"

Every recipe sees as many images, in train.py's own step, and takes about as long. The loss is the
unweighted squared error of v, of the EMA with x_0 clipped, whatever a recipe is trained on.
A recipe may name a `variant` too: ideas that NOTES.md dropped.
"""
import sys
import typing

import torch

import train
from benchmarks.runs import WORK, list_pictures
from benchmarks.timing import CLOCKS, markdown, quiet
from nets.diffusion import PREDICTIONS
from utils.config import check_values, parse_config, parse_value, settings
from utils.data.dataset import epoch_batches, normalise
from utils.errors import run_script
from utils.training.optimizer import learning_rate
from utils.training.randomness import mix

EIGHTHS, REPEATS, CANDIDATES = 8, 16, 4
BASE = {"class_conditional": True, "prediction": "v", "schedule": "cosine", "dropout": 0.0, "num_res_blocks": 1,
        "channel": 32, "batch_size": 16, "init_lr": 1e-3, "ema_start": 20, "val_split": 0.1}  # fmt: skip


@settings
class Config:
    recipes: str = "base="      # name=setting:value;setting:value|name=...
    images: int = 8000          # that each recipe sees
    size: int = 16              # height and width
    seed: int = 0               # of all trainings
    threads: int = 1            # of PyTorch


def main():
    config = parse_config(Config, __doc__)
    check_values(config, images=(1, None), size=(1, None), threads=(1, None))
    torch.set_num_threads(config.threads)
    annotation = list_pictures("emoji", WORK)
    rows = []
    for entry in config.recipes.split("|"):
        name, _, text = entry.partition("=")
        rows.append((name, *measure(config, annotation, dict(pair.split(":") for pair in text.split(";") if pair))))
        print(*rows[-1], file=sys.stderr, flush=True)
    columns = ("recipe", "steps", "CPU seconds", "loss of v", *(f"{k + 1}/{EIGHTHS} of t" for k in range(EIGHTHS)))
    print(markdown(columns, rows))


def measure(config, annotation, recipe):
    """(steps, CPU seconds, loss, losses by eighth of t) of a recipe, a dict of texts."""
    variant, hints = VARIANTS[recipe.pop("variant", "")], typing.get_type_hints(train.Config)
    values = {name: parse_value(name, text, hints[name]) for name, text in recipe.items()}
    shared = {"annotation_path": str(annotation), "input_shape": (config.size,) * 2, "seed": config.seed,
              "device": "cpu", "compile": False}  # fmt: skip
    settings, device = train.resolve(train.Config(**{**BASE, **shared, **values}))
    with quiet():
        parts = train.prepare(settings, device)
    total, began, step = config.images // parts.batch_size, CLOCKS["cpu"](), 0
    while step < total:
        epoch = step // (len(parts.dataset) // parts.batch_size)
        batches = epoch_batches(len(parts.dataset), parts.batch_size, settings.seed, epoch, 0)
        for number, (images, labels) in enumerate(parts.dataset.batches(batches)):
            if step < total:
                lr = learning_rate(step, total, settings.init_lr, settings.min_lr, settings.warmup)
                with variant(settings, parts):
                    train.train_step(settings, parts, images, labels, epoch, number * parts.batch_size, lr)
                step += 1
    seconds, losses = CLOCKS["cpu"]() - began, held_out_losses(parts)
    return total, f"{seconds:.0f}", f"{losses.mean():.4f}", *(f"{loss:.4f}" for loss in losses.tolist())


@torch.no_grad()
def held_out_losses(parts):
    """The EMA's squared error of v, (EIGHTHS,) by timestep, always at the same ones and noise."""
    diffusion, images = parts.diffusion, parts.validation
    x, labels = normalise(images.images(range(len(images))), parts.device), images.labels
    generator, losses = torch.Generator().manual_seed(0), torch.zeros(EIGHTHS, REPEATS)
    for number in range(REPEATS):
        t = ((torch.arange(len(x)) * 37 % len(x) + number / REPEATS) / len(x) * diffusion.num_timesteps).long()
        noise = torch.randn(x.shape, generator=generator)
        a, s = diffusion.signal_and_noise(t, x)
        x_t = diffusion.perturb_x(x, t, noise)
        x_0 = PREDICTIONS[diffusion.prediction].to_x_0(diffusion.ema_model(x_t, t, labels), x_t, a, s).clamp(-1, 1)
        error = ((a * x_t - x_0) / s - (a * noise - s * x)).square().flatten(1).mean(1)
        for eighth in range(EIGHTHS):
            losses[eighth, number] = error[t * EIGHTHS // diffusion.num_timesteps == eighth].mean()
    return losses.mean(1)


# Ideas that were dropped: a function (settings, parts) -> a context in which a step has them


class Patched:
    """train.<name> is another function within the block."""

    def __init__(self, name, function):
        self.name, self.function = name, function

    def __call__(self, config, parts):
        return self

    def __enter__(self):
        self.before = getattr(train, self.name)
        setattr(train, self.name, lambda *arguments: self.function(self.before, *arguments))

    def __exit__(self, *_):
        setattr(train, self.name, self.before)


def stratified(draw_step, generator, seed, shape, num_timesteps, *chances):
    """One timestep in each of B equal parts (Kingma et al. 2021, "VDM")."""
    draws, own = draw_step(generator, seed, shape, num_timesteps, *chances), torch.Generator().manual_seed(seed)
    u = (torch.arange(shape[0]) + torch.rand(shape[0], generator=own)) / shape[0]
    order = torch.randperm(shape[0], generator=own)
    return draws._replace(t=(u * num_timesteps).long().clamp(max=num_timesteps - 1)[order])


def immiscible(make_batch, config, parts, images, labels, epoch, consumed):
    """The nearest of CANDIDATES noises for each image (arXiv 2406.12303, "immiscible")."""
    x, y, draws = make_batch(config, parts, images, labels, epoch, consumed)
    own = torch.Generator().manual_seed(mix(config.seed, epoch, consumed, "candidates"))
    noises = torch.randn(len(x), CANDIDATES, *x.shape[1:], generator=own)
    chosen = (noises - x[:, None]).flatten(2).square().sum(2).argmin(1)
    return x, y, draws._replace(noise=noises[torch.arange(len(x)), chosen])


VARIANTS = {
    "": Patched("draw_step", lambda draw_step, *arguments: draw_step(*arguments)),
    "stratified": Patched("draw_step", stratified),
    "immiscible": Patched("make_batch", immiscible),
}

if __name__ == "__main__":
    run_script(main)
