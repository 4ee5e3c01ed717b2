"""Which settings learn most from the same images? Loss of v and Frechet distance, by recipe.

    python -m benchmarks.recipes --recipes "base=|fast=init_lr:2e-3;batch_size:8"
    python -m benchmarks.recipes --data FOLDER --size 32 --seconds 100 --seeds 2 --recipes \\
        "uniform=|middle=timestep_sampling:middle|longer=timestep_sampling:middle;seconds:330"

Every recipe sees as many images, in train.py's own step, and takes about as long; or it trains for
so many seconds of CPU time, with which its learning rate ends. The loss is the unweighted squared
error of v on held-out images, by timestep, of the EMA with x_0 clipped, whatever a recipe is
trained on. The distance is that of time_to_quality. A recipe may name a `variant` too: ideas that
are no setting (NOTES.md).
"""

import sys
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from unittest.mock import patch

import torch
import torch.nn.functional as F

import nets.diffusion
import train
from benchmarks.baselines import Job
from benchmarks.time_to_quality import Evaluator, OurRun, read_settings, sampled, steps_a_minute
from benchmarks.timing import CLOCKS, markdown
from nets.diffusion import PREDICTIONS, TIMESTEP_SAMPLINGS, GaussianDiffusion
from nets.errors import check_choice
from utils.data.dataset import normalize
from utils.device import choose_device
from utils.errors import run_script
from utils.settings import parse, settings, text, whole
from utils.training.settings_schema import RUN_SETTINGS
from utils.training.step_rng import derive_seed

EIGHTHS, REPEATS, HELD_OUT, CANDIDATES = 8, 16, 256, 4
MIDDLE = TIMESTEP_SAMPLINGS["middle"]
SECONDS, IMAGES = whole(0, 10**9), whole(1, 10**9)  # how long a recipe trains: CPU time, or images that it sees
BASE = {**train.PRESETS["quick"], "val_split": 0.1, "compile": False}


# fmt: off
@settings
class Config:
    recipes: str = "base="  # name=setting:value;setting:value|name=...
    data: str = "emoji"     # dataset: emoji, fashion_mnist, or a folder of class folders
    data_root: str = ""     # a torchvision root with FashionMNIST/raw; "": fetched
    images: int = 8000      # that each recipe sees; a recipe may have its own number
    seconds: int = 0        # of CPU time that each recipe trains, by a few steps timed before; 0: images decides
    size: int = 16          # height and width
    samples: int = 1000     # for the distance
    seed: int = 0           # of each recipe's first training; each further one adds 1
    seeds: int = 1          # trainings of each recipe
    threads: int = 1        # of PyTorch
# fmt: on


SETTINGS = {
    "recipes": text(),
    "data": text(),
    "data_root": text(),
    "images": IMAGES,
    "seconds": SECONDS,
    "size": whole(1, 2**14),
    "samples": whole(2, 10**7),
    "seed": whole(0, 10**9),
    "seeds": whole(1, 1000),
    "threads": whole(1, 1024),
}


def main(arguments=None):
    config = parse(Config, SETTINGS, __doc__, arguments)
    torch.set_num_threads(config.threads)
    recipes, rows = read_recipes(config), []
    try:
        for seed in range(config.seed, config.seed + config.seeds):
            evaluator = Evaluator(replace(config, seed=seed), choose_device("cpu"))
            for name, recipe in recipes.items():
                rows.append((name, seed, *measure(evaluator, **recipe)))
                print(*rows[-1], file=sys.stderr, flush=True)
    finally:  # what was measured before Ctrl-C
        print(
            markdown(
                (
                    "recipe",
                    "seed",
                    "steps",
                    "CPU seconds",
                    "distance",
                    "loss of v",
                    *(f"{k + 1}/{EIGHTHS} of t" for k in range(EIGHTHS)),
                ),
                rows,
            )
        )


def read_recipes(config):
    """{name: arguments of `measure`}. UserError for an unknown setting, value or variant."""
    declared, found = RUN_SETTINGS | {"variant": text(), "images": IMAGES, "seconds": SECONDS}, {}
    for entry in config.recipes.split("|"):
        name, _, pairs = entry.partition("=")
        own = {"variant": "", "images": config.images, "seconds": config.seconds}
        values = own | read_settings(pairs, declared)
        check_choice("variant", values["variant"], VARIANTS)
        found[name] = {**{key: values.pop(key) for key in own}, "settings": values}
    return found


def measure(evaluator, variant, images, seconds, settings):
    """(steps, CPU seconds, distance, loss, losses by eighth of t) of a recipe."""
    config, values = evaluator.config, BASE | settings
    job = Job(
        evaluator.device, values["channel"], config.size, values["batch_size"], 0.0, None, None, evaluator.channels
    )
    with ExitStack() as changes:
        for change in VARIANTS[variant]:
            changes.enter_context(change())
        run = OurRun(job, evaluator.annotation, config.seed, values)
        steps = images // run.context.batch_size
        if seconds:
            steps = max(1, round(seconds / 60 * steps_a_minute("cpu", run)))
            run = OurRun(job, evaluator.annotation, config.seed, values)
        run.told(steps)
        began = CLOCKS["cpu"]()
        for _ in range(run.total_steps):
            run.train_step()
        seconds = CLOCKS["cpu"]() - began
    losses = held_out_losses(run.context)
    return (
        run.total_steps,
        f"{seconds:.0f}",
        f"{sampled(evaluator, run):.2f}",
        f"{losses.mean():.4f}",
        *(f"{loss:.4f}" for loss in losses.tolist()),
    )


@torch.no_grad()
def held_out_losses(context):
    """The EMA's squared error of v, (EIGHTHS,) by timestep, always at the same ones and noise."""
    diffusion, images = context.diffusion, context.validation
    numbers = range(min(len(images), HELD_OUT))
    x = normalize(images.images(numbers), context.device)
    labels = images.labels[: len(x)] if diffusion.num_classes else None
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


# Ideas that are no setting. A variant is a list of patches that hold while a recipe is trained.


def patched(owner, name, function):
    """A patch: owner.name becomes `function`, which gets what it was as its first argument."""
    original = getattr(owner, name)
    return lambda: patch.object(owner, name, lambda *args, **options: function(original, *args, **options))


def stratified(sample_timesteps, diffusion, count, generator=None):
    """One timestep in each of `count` equal parts (Kingma et al. 2021, "VDM")."""
    u = (torch.arange(count) + torch.rand(count, generator=generator)) / count
    t, order = (u * diffusion.num_timesteps).long(), torch.randperm(count, generator=generator)
    return t.clamp(max=diffusion.num_timesteps - 1)[order]


def immiscible(make_batch, config, context, images, labels, epoch, consumed):
    """The nearest of CANDIDATES noises for each image (arXiv 2406.12303, "immiscible")."""
    x, *given, step_noise = make_batch(config, context, images, labels, epoch, consumed)
    own = torch.Generator().manual_seed(derive_seed(config.seed, epoch, consumed, "candidates"))
    noises = torch.randn(len(x), CANDIDATES, *x.shape[1:], generator=own)
    chosen = (noises - x[:, None]).flatten(2).square().sum(2).argmin(1)
    return x, *given, step_noise._replace(noise=noises[torch.arange(len(x)), chosen])


def timesteps_by(distribution):
    """Training timesteps of a distribution as in TIMESTEP_SAMPLINGS, whatever the setting says."""
    return [lambda: patch.dict(TIMESTEP_SAMPLINGS, dict.fromkeys(TIMESTEP_SAMPLINGS, distribution))]


def laplace(alpha_bars):
    """The log-SNR has Laplace's distribution: mean 0, b 0.5 (arXiv 2407.03297)."""
    log_snr = torch.logit(alpha_bars)
    tail = torch.exp(-log_snr.abs() / 0.5) / 2
    return torch.where(log_snr > 0, tail, 1 - tail)


def middle_moved(by):
    """The density "middle" with every lambda higher `by`: above 0 is less noise."""
    return lambda alpha_bars: MIDDLE(torch.sigmoid(torch.logit(alpha_bars) - 2 * by))


def input_noise(perturb_x, diffusion, x, t, noise):
    """x_t of the noise and 0.1 of another one (Ning et al. 2023, "input perturbation")."""
    return perturb_x(diffusion, x, t, noise + 0.1 * torch.randn_like(noise))


def twice_the_classes(open_dataset, *arguments, **options):
    dataset = open_dataset(*arguments, **options)
    dataset.classes = [*dataset.classes, *(f"mirrored {name}" for name in dataset.classes)]
    return dataset


def mirroring(resolve, config):
    return resolve(replace(config, class_conditional=True, horizontal_flip=True))


def mirrored(make_batch, config, context, images, labels, epoch, consumed):
    """Half of the images mirrored, in classes of their own: an augmentation that does not leak."""
    x, y, cond, step_noise = make_batch(config, context, images, labels, epoch, consumed)
    null = context.diffusion.num_classes - 1
    return x, torch.where(step_noise.flip & (y != null), y + null // 2, y), cond, step_noise


def half_size_first(train_step, run):
    """Half of the size in the first two thirds of the steps."""
    with patched(train, "train_step", at_half_size)() if 3 * run.step < 2 * run.total_steps else nullcontext():
        train_step(run)


def at_half_size(train_step, config, context, images, *where):
    images = F.avg_pool2d(images.movedim(3, 1).float(), 2).round().to(torch.uint8).movedim(1, 3)
    config = replace(config, input_shape=tuple(side // 2 for side in config.input_shape))
    with patch.object(context.diffusion, "img_size", config.input_shape):
        train_step(config, context, images, *where)


def ema_of(fraction):
    """The EMA spans a fraction of the steps so far (Karras et al. 2024); train.py's a ninth."""

    def weight(ema_weight, n, decay, warmup):
        return torch.where(n < 0, 1.0, 1 / (1 + fraction * (1 + n)))

    return [patched(nets.diffusion, "ema_weight", weight)]


VARIANTS = {
    "": [],
    "stratified": [patched(GaussianDiffusion, "sample_timesteps", stratified)],
    "immiscible": [patched(train, "make_batch", immiscible)],
    "laplace": timesteps_by(laplace),
    **{f"middle {by:+}": timesteps_by(middle_moved(by)) for by in (-1.0, -0.5, 0.5, 1.0)},
    "input noise": [patched(GaussianDiffusion, "perturb_x", input_noise)],
    "mirrored": [
        patched(train, "resolve", mirroring),
        patched(train, "open_dataset", twice_the_classes),
        patched(train, "make_batch", mirrored),
    ],
    "half size": [patched(OurRun, "train_step", half_size_first)],
    "short ema": ema_of(1 / 18),
    "long ema": ema_of(1 / 4),
}

if __name__ == "__main__":
    run_script(main)
