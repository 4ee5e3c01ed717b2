"""How cost grows: with the images in the dataset, their size, the network's width, the
processes. python -m benchmarks.scale

Writes a table, JSON and a plot (with matplotlib) into benchmarks/results/. The dataset is
synthetic: its cache is written directly.
"""

import json
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from benchmarks.timing import (
    CLOCKS,
    interleave,
    machine,
    markdown,
    quiet,
    read_names,
    spread,
    usable_cores,
    with_rows,
    write_page,
)
from nets import GaussianDiffusion, UNet
from utils import distributed
from utils.data import cache
from utils.data.annotation import write_annotation
from utils.data.dataset import epoch_batches, open_dataset
from utils.data.image_format import ImageFormat
from utils.device import autocast, choose_device, choose_precision, memory_format
from utils.errors import run_script
from utils.files import atomic_write
from utils.settings import SEVERAL, choice, flag, parse, settings, text, whole

RESULTS = Path(__file__).resolve().parent / "results"
PROJECT = RESULTS.parent.parent
ALL = "images,resolution,channels,processes"


# fmt: off
@settings
class Config:
    sections: str = ALL                                 # what is measured, with commas between
    images: tuple[int, ...] = (1_000, 10_000, 100_000)  # images of 64x64 in the dataset
    resolutions: tuple[int, ...] = (32, 64, 128, 256)   # heights and widths
    channels: tuple[int, ...] = (32, 64, 96, 128)       # widths of the first level
    processes: tuple[int, ...] = (1, 2)                 # on one machine; on GPUs one per GPU
    channel: int = 32                                   # width where something else changes; 128 for a GPU
    batch_size: int = 4                                 # images per step; 64 or more for a GPU
    rounds: int = 3                                     # measurements of each point
    threads: int = 0                                    # of PyTorch; 0: one per core
    clock: str = "wall"                                 # cpu: this process's own time, threads 1; not for processes
    device: str = "auto"                                # auto, cuda or cpu
    name: str = ""                                      # of the files in benchmarks/results; "": the device's
    worker: bool = False                                # used by the script itself: measure one of several processes
# fmt: on


SETTINGS = {
    "sections": text(),
    "images": whole(1, 10**7, count=SEVERAL),
    "resolutions": whole(8, 2**14, count=SEVERAL),
    "channels": whole(1, 2**16, count=SEVERAL),
    "processes": whole(1, 1024, count=SEVERAL),
    "channel": whole(1, 2**16),
    "batch_size": whole(1),
    "rounds": whole(1),
    "threads": whole(0, 1024),
    "clock": choice(CLOCKS),
    "device": text(),
    "name": text(),
    "worker": flag(),
}


def main(arguments=None):
    config = parse(Config, SETTINGS, __doc__, arguments)
    chosen = read_names("sections", config.sections, SECTIONS)
    distributed.start()
    device = choose_device(config.device, distributed.local_rank())
    torch.set_num_threads(config.threads or max(1, usable_cores() // distributed.world_size()))
    if config.worker:
        measure_worker(config, device)
        distributed.stop()
        return
    path = RESULTS / f"scale_{config.name or device.type}"
    report = {"machine": machine(device, choose_precision("auto", device), config.clock), "settings": asdict(config)}
    for name in chosen:
        rows = [{"section": name, **point} for point in SECTIONS[name](config, device)]
        report = with_rows(report, rows, SECTIONS, path.with_suffix(".json"))
        write_page(path, as_text(report), ".svg")
        plot(report["rows"], path.with_suffix(".svg"))
        print(f"{name}: done", flush=True)
    print("\n" + as_text(report))


def images_section(config, device):
    """Start-up (list, file times, cache) and the batches of an epoch, for each image."""
    rows = []
    with TemporaryDirectory() as folder:
        folder = Path(folder)
        for count in config.images:
            annotation = synthetic_dataset(folder, count)

            def start(annotation=annotation):
                with quiet():
                    return open_dataset(annotation, ImageFormat((64, 64)), cache_path=folder)

            data = start()
            epochs = iter(range(1000))

            def epoch(data=data, epochs=epochs):
                for _ in data.batches(epoch_batches(len(data), 64, seed=0, epoch=next(epochs))):
                    pass

            seconds = interleave(
                {"start-up": start, "epoch of batches": epoch}, config.rounds, warm_up=1, clock=config.clock
            )
            rows += [
                row("images in the dataset", count, what, "us per image", values, count / 1e6)
                for what, values in seconds.items()
            ]
    return rows


def synthetic_dataset(folder, count):
    """A list of `count` files (hard links to empty ones) and a cache of random pixels for them."""
    images = folder / f"images_{count}"
    images.mkdir()
    paths = [str(images / f"{number}.png") for number in range(count)]
    for number, path in enumerate(paths):
        if number % 10_000 == 0:  # file systems allow a file some ten thousand names
            Path(path).touch()
        else:
            Path(path).hardlink_to(paths[number // 10_000 * 10_000])
    annotation = folder / f"{count}.txt"
    write_annotation(annotation, paths)
    decode, generator = cache._decode, np.random.default_rng(0)
    cache._decode = lambda path, image_format: (generator.integers(0, 256, (64, 64, 3), dtype=np.uint8), "00")
    try:
        with quiet():
            open_dataset(annotation, ImageFormat((64, 64)), cache_path=folder, num_workers=1)
    finally:
        cache._decode = decode
    return annotation


def resolution_section(config, device):
    steps = {size: training_step(config.channel, size, config, device) for size in config.resolutions}
    return step_rows("resolution", steps, config, device)


def channels_section(config, device):
    steps = {width: training_step(width, 32, config, device) for width in config.channels}
    return step_rows("channels", steps, config, device)


def training_step(channel, size, config, device):
    """A function that trains one step: network, loss, gradients, fused Adam, EMA."""
    layout, precision = memory_format(device, choose_precision("auto", device)), choose_precision("auto", device)
    diffusion = (
        GaussianDiffusion(UNet(3, base_channels=channel), (size, size), 3).to(device, memory_format=layout).train()
    )
    optimizer = torch.optim.Adam(diffusion.model.parameters(), lr=1e-4, fused=device.type in ("cpu", "cuda"))
    x = torch.randn(config.batch_size, 3, size, size, device=device).to(memory_format=layout)

    def step():
        with autocast(device, precision):
            diffusion(x).backward()
        optimizer.step()
        optimizer.zero_grad()
        diffusion.update_ema()

    return step


def step_rows(axis, steps, config, device):
    seconds = interleave(steps, config.rounds, device, warm_up=1, clock=config.clock)
    return [
        row(axis, value, "training step", "ms per image", values, config.batch_size / 1e3)
        for value, values in seconds.items()
    ]


def processes_section(config, device):
    """Processes that train on their parts of a batch and average gradients, by torchrun."""
    rows = []
    for count in config.processes:
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc_per_node={count}",
            "-m",
            "benchmarks.scale",
            "--worker",
            "True",
            "--channel",
            str(config.channel),
            "--batch_size",
            str(config.batch_size),
            "--device",
            device.type,
            "--rounds",
            str(config.rounds),
            "--threads",
            str(config.threads),
        ]
        done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)
        if done.returncode:
            print(f"processes: {count} left out ({done.stderr.strip().splitlines()[-1]})")
            continue
        values = json.loads([line for line in done.stdout.splitlines() if line.startswith("[")][-1])
        rows.append(row("processes", count, "training step", "ms per image", values, config.batch_size / 1e3))
    return rows


def measure_worker(config, device):
    """One of several processes; the first prints the seconds of each step."""
    layout = memory_format(device, "fp32")
    diffusion = GaussianDiffusion(UNet(3, base_channels=config.channel), (32, 32), 3).train()
    diffusion = diffusion.to(device, memory_format=layout)
    model = distributed.wrap(diffusion)
    optimizer = torch.optim.Adam(diffusion.model.parameters(), lr=1e-4)
    x = torch.randn(config.batch_size // distributed.world_size(), 3, 32, 32, device=device)

    def step():
        model(x).backward()
        optimizer.step()
        optimizer.zero_grad()
        diffusion.update_ema()

    seconds = interleave({"step": step}, config.rounds, device, warm_up=2)["step"]
    if distributed.is_main():
        print(json.dumps(seconds))


def row(axis, value, what, unit, seconds, divisor):
    """A point of a curve: seconds of each round, divided into the unit's."""
    return {
        "axis": axis,
        "value": value,
        "what": what,
        "unit": unit,
        **{name: time / divisor for name, time in spread(seconds).items()},
    }


SECTIONS = {
    "images": images_section,
    "resolution": resolution_section,
    "channels": channels_section,
    "processes": processes_section,
}


def as_text(report):
    """The table, in Markdown."""
    about, settings = report["machine"], report["settings"]
    head = (
        f"{about['cpu']}, {about['threads']} of {about['cores']} cores, load {about['load']:.1f}; "
        f"{about['gpu'] or 'no CUDA GPU here: the same command measures one where there is one'}.\n"
        f"{settings['channel']} channels, batch {settings['batch_size']}, 32x32 unless the row says otherwise; "
        "PyTorch "
        f"{about['versions']['torch']}; medians of {settings['rounds']} rounds, "
        f"{'wall time' if about['clock'] == 'wall' else 'CPU time for one process, wall time for several'}.\n"
    )
    cells = [
        (
            point["axis"],
            f"{point['value']:,}",
            point["what"],
            f"{point['median']:,.4g} {point['unit']}",
            f"{point['low']:,.4g} to {point['high']:,.4g}",
        )
        for point in report["rows"]
    ]
    return head + "\n" + markdown(("axis", "value", "what", "median", "spread"), cells)


def plot(rows, path):
    """A panel for each axis, both scales logarithmic.

    Without matplotlib it says so and plots nothing.
    """
    try:
        import matplotlib
    except ImportError:
        print("no plot: pip install matplotlib")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    axes = list(dict.fromkeys(point["axis"] for point in rows))
    figure, panels = pyplot.subplots(1, len(axes), figsize=(4 * len(axes), 3.5), layout="constrained", squeeze=False)
    for axis, panel in zip(axes, panels[0]):
        for what in dict.fromkeys(point["what"] for point in rows if point["axis"] == axis):
            points = [point for point in rows if (point["axis"], point["what"]) == (axis, what)]
            panel.loglog([point["value"] for point in points], [point["median"] for point in points], "o-", label=what)
        panel.set(xlabel=axis, ylabel=points[0]["unit"])
        panel.set_xticks([point["value"] for point in points], [f"{point['value']:,}" for point in points], minor=False)
        panel.minorticks_off()
        panel.set_ylim(bottom=min(point["median"] for point in rows if point["axis"] == axis) / 2)
        panel.legend()
    with atomic_write(path) as file:
        figure.savefig(file, format="svg")


if __name__ == "__main__":
    started = time.perf_counter()
    run_script(main)
    if distributed.is_main():
        print(f"{time.perf_counter() - started:.0f} s")
