"""What a run is about to do, in a few lines: sizes, steps, and what every "auto" became."""

import platform
import time
from collections.abc import Callable
from datetime import datetime, timedelta

import torch

from utils import distributed
from utils.device import describe_device
from utils.terminal import as_command, plural
from utils.training.memory import try_gradients

# How often an image may be seen before a warning. The onset of memorization grows in proportion to
# the number of images (Bonnaire et al. 2025, arXiv 2505.17638); logs/emoji.md measures it at 1,296.
MEMORIZATION_VIEWS = 500
LONG = 7200  # seconds of a run on a CPU from which the preset that is made for one is named


def origin(arguments) -> str:
    """When, how and with what a run was started. arguments: of the command line."""
    versions = f"Python {platform.python_version()}, PyTorch {torch.__version__}"
    processes = distributed.world_size()
    start = ["torchrun", "--nproc_per_node", str(processes)] if processes > 1 else ["python"]
    command = as_command(*start, "train.py", *arguments)
    return f"date       {datetime.now():%Y-%m-%d %H:%M}, {versions}\ncommand    {command}"


def summarize(config, context, start, preset: dict) -> str:
    """Device, images, network and steps. start: a ResumePoint. preset: {name: value} of it."""
    values = [f"{name} {str(getattr(config, name)).strip('()').replace(' ', '')}" for name in preset]
    lines = [f"preset     {config.preset}: {', '.join(values)}"] if preset else []
    device, processes = describe_device(context.device), plural(distributed.world_size(), "process", "es")
    lines += [f"device     {device}, precision {config.precision}, compile {config.compile}, {processes}"]
    aside, classes = len(context.validation), plural(len(context.dataset.classes), "class", "es")
    kind = "{}x{}, ".format(*config.input_shape) + plural(config.img_channels, "channel")
    used = "used" if config.class_conditional else "not used"
    lines += [f"images     {len(context.dataset):,} of {kind}, {aside:,} held out for validation; {classes}, {used}"]
    if config.img_channels == 3 and context.dataset.is_gray():
        lines += ["           all images are gray: a run with --img_channels 1 learns and samples them without colors"]
    count = sum(parameter.numel() for parameter in context.diffusion.model.parameters())
    noise = f"{config.schedule} schedule shifted by {config.schedule_shift:g}, T = {config.num_timesteps}"
    groups = plural(config.num_groups, "group")
    lines += [f"network    {count / 1e6:.2f} million parameters, {groups}; {config.prediction}, {noise}"]
    total = config.epochs * context.steps_per_epoch
    epochs = f"{plural(config.epochs, 'epoch')} of {plural(context.steps_per_epoch, 'step')} of {context.batch_size}"
    optimizer = f"{config.optimizer_type}, learning rate up to {config.init_lr:g}"
    views = total * context.batch_size / len(context.dataset)
    lines += [
        f"training   {epochs}, {plural(total, 'step')} in all, {optimizer}",
        f"           each image is seen about {plural(round(views), 'time')}",
    ]
    if views > MEMORIZATION_VIEWS:
        lines += [
            "warning: a network may memorize so small a training set (the onset scales with its size): hold some out "
            "with --val_split 0.1, and look for copies with `python -m utils.evaluate`"
        ]
    counter = context.diffusion.ema_step + steps_left(config, context, start)  # at the end; weights may bring one along
    if span := ema_span(config, counter):
        lines += [f"EMA        over about the last {span:,} of {plural(total, 'step')} at the end"]
    else:
        start_step = f"ema_start is {config.ema_start:,}, and the run has {plural(total, 'step')}"
        lines += [f"EMA        never starts: {start_step}; its samples come from the last weights"]
    return "\n".join(lines)


def steps_left(config, context, start) -> int:
    done = start.epoch * context.steps_per_epoch + start.images // context.batch_size
    return max(0, config.epochs * context.steps_per_epoch - done)


def print_time(config, context, start) -> None:
    """On a CPU: about how long the run takes, from a pass of a few images, before it is spent."""
    if context.device.type != "cpu":
        return
    share = context.batch_size // distributed.world_size()
    images = min(share // config.accumulate, 4)
    for _ in range(2):  # the first pass allocates memory
        began = time.perf_counter()
        try_gradients(config, context, images)
    seconds = (time.perf_counter() - began) / images * share * steps_left(config, context, start)
    about = f"{seconds / 60:.0f} minutes" if seconds < LONG else f"{seconds / 3600:.0f} hours"
    quicker = seconds > LONG and not (config.preset or config.resume)
    instead = "; `--preset quick` trains on a thousand images in minutes" if quicker else ""
    print(f"time       about {about} on this CPU{instead}")


def ema_span(config, steps: int) -> int:
    """Steps that the EMA spans when it has counted `steps`: 1 / (1 - decay), 0 before it starts.

    With a warm-up it spans at most a ninth of the steps since its start.
    """
    counted = max(0, steps - config.ema_start)
    warmup = (10 + counted) / 9 if config.ema_warmup else counted  # the decay is (1 + n) / (10 + n)
    return counted and max(1, round(min(1 / max(1 - config.ema_decay, 1e-9), warmup, counted)))


def print_dry_run(config, context, flops: int, step: Callable) -> None:
    """The run's time. flops: of an image's forward pass. step(images, labels) trains."""
    images, labels = context.dataset.batch(range(context.batch_size // distributed.world_size()))
    for _ in range(2):  # the first step allocates memory
        began = time.perf_counter()
        step(images, labels)
        context.meter.sums.cpu()  # waits for the device
    seconds, steps = time.perf_counter() - began, config.epochs * context.steps_per_epoch
    whole = f"{plural(steps, 'step')}: {timedelta(seconds=round(seconds * steps))}, without saves and previews"
    slower = " (not compiled: the run is faster)" if config.compile else ""
    print(
        f"time       {seconds:.3g} s a step{slower}, {whole}; {flops / 1e9:.3g} billion operations per image, forward"
    )
