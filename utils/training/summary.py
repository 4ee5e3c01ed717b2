"""What a run is about to do, in a few lines: sizes, steps, and what every "auto" became."""

import time

from utils import distributed
from utils.data.dataset import epoch_batches
from utils.device import describe_device
from utils.training.memory import print_memory

# How often an image may be seen. The time until a network repeats its images grows in proportion
# to their number (Bonnaire et al. 2025, arXiv 2505.17638). A network of 5.1 million parameters had
# seen 1,296 emoji 375, 543 and 899 times: the samples' median distance to the nearest is 0.84, 0.69
# and 0.42 of that between emoji (logs/emoji.md). Large sets may take longer: Ho et al. 2020 found
# no copies after 2,048 times CIFAR-10.
SEEN_OFTEN = 500


def print_summary(config, parts, preset):
    """Device, pictures, network and steps; rank 0 prints. preset: {name: value}, what it sets."""
    if not distributed.is_main():
        return
    dataset, steps = parts.dataset, len(parts.dataset) // parts.batch_size
    total = config.epochs * steps
    aside = f", {len(parts.validation):,} kept aside for validation" if len(parts.validation) else ""
    classes = f", {len(dataset.classes)} classes" if dataset.classes else ""
    processes = f", {distributed.world_size()} processes" if distributed.world_size() > 1 else ""
    used = "" if config.class_conditional or not classes else " (not used: --class_conditional True learns them)"
    count = sum(parameter.numel() for parameter in parts.diffusion.model.parameters())
    shifted = f" shifted by {config.schedule_shift:g}" if config.schedule_shift else ""
    height, width = config.input_shape
    if preset:
        values = ", ".join(f"{name} {as_option(getattr(config, name))}" for name in preset)
        print(f"preset     {config.preset}: {values}")
    device = describe_device(parts.device)
    print(f"device     {device}, precision {config.precision}, compile {config.compile}{processes}")
    print(f"pictures   {len(dataset):,} of {height}x{width}, {config.img_channels} channels{aside}{classes}{used}")
    print(
        f"network    {count / 1e6:.2f} million parameters, {config.num_groups} groups; {config.prediction}, "
        f"{config.schedule} schedule{shifted}, T = {config.num_timesteps}"
    )
    print(
        f"training   {config.epochs} epochs of {steps} steps of {parts.batch_size}, {total:,} steps in all, "
        f"{config.optimizer_type}, learning rate up to {config.init_lr:g}"
    )
    seen = total * parts.batch_size / len(dataset)
    print(f"           each picture is seen about {seen:,.0f} times")
    if seen > SEEN_OFTEN:
        print(
            "warning: few pictures, seen so often, may be learned by heart (with n pictures that takes n times as "
            "long): keep some aside with --val_split 0.1, and look for copies with `python -m utils.evaluate`"
        )
    print(f"EMA        over about the last {ema_span(config, total):,} of {total:,} steps at the end")


def print_dry_run(config, parts, flops, step):
    """The memory and the time that the run needs. flops: of the forward pass of an image.

    step(images, labels): takes one training step.
    """
    print_memory(config, parts)
    seconds = seconds_per_step(config, parts, step)
    if distributed.is_main():
        steps = config.epochs * (len(parts.dataset) // parts.batch_size)
        slower = " (not compiled: the run is faster)" if config.compile else ""
        print(
            f"time       {seconds:.3g} s a step{slower}, {steps:,} steps: {duration(seconds * steps)}, "
            f"without saves and previews; {flops / 1e9:.3g} billion operations a picture, forward"
        )


def seconds_per_step(config, parts, step):
    """Of the first step, or of the two after it where it is short. Not compiled."""
    batches = epoch_batches(
        len(parts.dataset), parts.batch_size, config.seed, 0, 0, distributed.rank(), distributed.world_size()
    )
    images, labels = next(iter(parts.dataset.batches(batches)))
    ends = [time.perf_counter()]
    while len(ends) < 4 and distributed.from_main(ends[-1] - ends[0] < 5):  # all processes take as many steps
        step(images, labels)
        parts.meter.sums.cpu()  # waits for the device
        ends.append(time.perf_counter())
    return (ends[-1] - ends[1]) / (len(ends) - 2) if len(ends) > 2 else ends[1] - ends[0]


def duration(seconds):
    """Seconds as text, such as 45 s, 12 min or 3 h 20 min."""
    minutes = round(seconds / 60)
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def as_option(value):
    """A value as it is typed on the command line."""
    return ",".join(map(str, value)) + "," * (len(value) == 1) if isinstance(value, tuple) else str(value)


def ema_span(config, steps):
    """Steps that the EMA spans after `steps`: 1 / (1 - decay), with a warm-up at most a ninth."""
    counted = max(0, steps - config.ema_start)
    most = 1 / max(1 - config.ema_decay, 1e-9)
    if config.ema_warmup:
        most = min(most, (10 + counted) / 9)  # the decay is (1 + n) / (10 + n)
    return max(1, round(min(most, counted)))
