"""Speed and memory compared with other implementations, interleaved in one process.

    python -m benchmarks.speed

Writes a table and JSON into benchmarks/results/. Every row says what a line of it costs; ratios are
of medians.
"""

import json
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.baselines import IMPLEMENTATIONS, Job, Ours, installed
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
from utils.data.annotation import write_annotation
from utils.data.dataset import epoch_batches, open_dataset
from utils.data.image_format import ImageFormat
from utils.data.search import find_images
from utils.device import DTYPES, choose_device, choose_precision, peak_memory
from utils.errors import run_script
from utils.files import atomic_write
from utils.settings import choice, number, parse, settings, text, whole

RESULTS = Path(__file__).resolve().parent / "results"
PROJECT = RESULTS.parent.parent
ALL = "train,denoise,sample,data,cache,start,memory"


# fmt: off
@settings
class Config:
    sections: str = ALL     # what is measured, with commas between
    rounds: int = 7         # rounds of each section, after the warm-up
    channel: int = 0        # width of the first level; 0: 128 on a GPU, 64 on a CPU
    size: int = 32          # height and width of the images
    batch_size: int = 0     # images per step; 0: 128 on a GPU, 16 on a CPU
    memory_batch: int = 64  # images per step where memory is measured
    dropout: float = 0.1    # of all networks
    num_images: int = 512   # images in the training set
    num_jpegs: int = 200    # 640x480 photographs that the cache is built from
    threads: int = 0        # of PyTorch; 0: one per core
    clock: str = "wall"     # cpu: this process's own time, for a busy machine; threads 1
    device: str = "auto"    # auto, cuda or cpu
    name: str = ""          # of the files in benchmarks/results; "": the device's
    memory_of: str = ""     # used by the script itself: print this one's peak memory
# fmt: on


SETTINGS = {
    "sections": text(),
    "rounds": whole(1),
    "channel": whole(0, 2**16),
    "size": whole(1, 2**14),
    "batch_size": whole(0),
    "memory_batch": whole(1),
    "dropout": number(0, 0.99),
    "num_images": whole(1),
    "num_jpegs": whole(1),
    "threads": whole(0, 1024),
    "clock": choice(CLOCKS),
    "device": text(),
    "name": text(),
    "memory_of": choice(("", *IMPLEMENTATIONS)),
}


def main(arguments=None):
    config = parse(Config, SETTINGS, __doc__, arguments)
    chosen = read_names("sections", config.sections, SECTIONS)
    device = choose_device(config.device)
    torch.set_num_threads(config.threads or usable_cores())
    gpu = device.type == "cuda"
    config = replace(
        config, channel=config.channel or (128 if gpu else 64), batch_size=config.batch_size or (128 if gpu else 16)
    )
    if config.memory_of:
        print(json.dumps(measure_memory(config, device)))
        return
    path = RESULTS / f"speed_{config.name or device.type}"
    with TemporaryDirectory() as scratch:
        job = make_job(config, device, Path(scratch))
        implementations = installed(job)
        report = {
            "machine": machine(device, choose_precision("auto", device), config.clock),
            "settings": asdict(config),
        }
        for name in chosen:
            started = time.perf_counter()
            rows = [{"section": name, **row} for row in SECTIONS[name](config, job, implementations)]
            report = with_rows(report, rows, SECTIONS, path.with_suffix(".json"))
            write_page(path, as_text(report))
            plot(report, path.with_suffix(".png"))
            print(f"{name}: {time.perf_counter() - started:.0f} s", flush=True)
    print(f"\n{as_text(report)}")


def make_job(config, device, scratch):
    """The images on disk, made once for all implementations."""
    images = scratch / "datasets"  # by this name the cache comes to lie in it, not among the user's
    images.mkdir()
    generator = np.random.default_rng(0)
    for index in range(config.num_images):
        coarse = Image.fromarray(generator.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        coarse.resize((config.size, config.size), Image.Resampling.BICUBIC).save(images / f"{index:05d}.png")
    return Job(device, config.channel, config.size, config.batch_size, config.dropout, images, scratch)


def timed(config, job, functions, **options):
    return interleave(functions, config.rounds, job.device, clock=config.clock, **options)


def rows_of(what, unit, seconds, per_call, flops=None):
    """A row for each implementation: items per second, and the ratio. per_call: items per call."""
    rows = []
    ours = spread(seconds[Ours.name])["median"] / per_call[Ours.name] if Ours.name in seconds else None
    for name, values in seconds.items():
        time_of = spread(values)
        row = {
            "what": what,
            "who": name,
            "unit": unit,
            "rate": per_call[name] / time_of["median"],
            "seconds_a_call": time_of,
            "ours_is_faster": time_of["median"] / per_call[name] / ours if ours else None,
        }
        if flops:
            row["flops_a_second"] = flops[name] / time_of["median"]
        rows.append(row)
    return rows


def train_section(config, job, implementations):
    """Images per second of a whole training step: data, network, optimizer, EMA.

    And FLOP/s compared with the machine's peaks.
    """
    seconds = timed(config, job, {name: one.train_step for name, one in implementations.items()})
    flops = {name: count_flops(one.train_step) for name, one in implementations.items()}
    rows = rows_of("training step", "images/s", seconds, dict.fromkeys(seconds, config.batch_size), flops)
    used = {name: one.precision for name, one in implementations.items()}
    peaks = [peak for precision in dict.fromkeys(used.values()) for peak in measure_peaks(config, job, precision)]
    for row in rows:
        same = [peak for peak in peaks if peak["precision"] == used[row["who"]]]
        row["share_of_peaks"] = {peak["who"]: row["flops_a_second"] / peak["flops_a_second"] for peak in same}
    return rows + peaks


def count_flops(step):
    """FLOPs of one call, counted on the uncompiled network: the counter sees no compiled code."""
    with FlopCounterMode(display=False) as counter, torch.compiler.set_stance("force_eager"):
        step()
    return counter.get_total_flops()


def measure_peaks(config, job, precision):
    """FLOP/s of one large matrix product and of one 3x3 convolution in these numbers."""
    dtype, gpu = DTYPES[precision], job.device.type == "cuda"
    n, width, size = (8192, 256, 32) if gpu else (2048, 128, 32)
    batch = 128 if gpu else 16
    a = torch.randn(n, n, device=job.device, dtype=dtype)
    x = torch.randn(batch, width, size, size, device=job.device, dtype=dtype).to(memory_format=torch.channels_last)
    weight = torch.randn(width, width, 3, 3, device=job.device, dtype=dtype).to(memory_format=torch.channels_last)
    flops = {"matrix product": 2 * n**3, "3x3 convolution": 2 * batch * width**2 * 9 * size**2}
    with torch.no_grad():
        functions = {"matrix product": lambda: a @ a, "3x3 convolution": lambda: torch.conv2d(x, weight, padding=1)}
        seconds = timed(config, job, functions, warm_up=3)
    return [
        {
            "what": f"peak, {precision}",
            "who": name,
            "precision": precision,
            "unit": "FLOP/s",
            "seconds_a_call": spread(values),
            "rate": flops[name] / min(values),
            "flops_a_second": flops[name] / min(values),
        }
        for name, values in seconds.items()
    ]


def denoise_section(config, job, implementations):
    """One reverse step of ddpm for a batch, with the EMA where there is one."""
    seconds = timed(config, job, {name: one.denoise_step for name, one in implementations.items()})
    return rows_of("denoising step", "images/s", seconds, dict.fromkeys(seconds, config.batch_size))


def sample_section(config, job, implementations):
    """25 images: ours in 25 network calls, the others a stated fraction of 1000, scaled up."""
    fractions = {}

    def sampling(name):
        def sample():
            fractions[name] = implementations[name].sample(25)

        return sample

    rounds = replace(config, rounds=max(2, config.rounds // 2))
    seconds = timed(rounds, job, {name: sampling(name) for name in implementations}, warm_up=1)
    rows = rows_of("25 images", "images/s", seconds, {name: 25 * done for name, done in fractions.items()})
    for row in rows:
        done = fractions[row["who"]]
        row["note"] = "whole" if done == 1 else f"measured {done:.1%} of its 1000 steps, scaled up"
    return rows


def data_section(config, job, implementations):
    """Batches on the device: ours from its cache, the others' from files as in their loops."""
    count = 20

    def loading(one):
        def load():
            for _ in range(count):
                one.batch()

        return load

    seconds = timed(config, job, {name: loading(one) for name, one in implementations.items()})
    rows = rows_of("batches on the device", "images/s", seconds, dict.fromkeys(seconds, count * config.batch_size))
    ours = implementations[Ours.name].context.dataset

    def gather():
        for _ in ours.batches(epoch_batches(len(ours), 64, seed=0, epoch=0)):
            pass

    alone = timed(config, job, {Ours.name: gather})
    whole = len(ours) // 64 * 64
    return rows + rows_of("batches of 64 from the cache, host only", "images/s", alone, {Ours.name: whole})


def cache_section(config, job, implementations):
    """The uint8 cache of 640x480 JPEGs on all cores, and a plain Pillow loop on one core."""
    folder = job.scratch / "jpegs"
    folder.mkdir()
    coarse = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8))
    photo = coarse.resize((640, 480), Image.Resampling.BICUBIC)
    for index in range(config.num_jpegs):
        photo.rotate(index % 7).save(folder / f"{index:05d}.jpg", quality=90)
    paths = find_images(folder)
    annotation = job.scratch / "jpegs.txt"
    write_annotation(annotation, paths)

    def ours():
        with TemporaryDirectory() as cache, quiet():
            open_dataset(annotation, ImageFormat((config.size, config.size)), cache_path=cache)

    def pillow():
        for path in paths:
            image = Image.open(path).convert("RGB").crop((80, 0, 560, 480))
            np.asarray(image.resize((config.size, config.size), Image.Resampling.BICUBIC))

    seconds = interleave(
        {Ours.name: ours, "a plain Pillow loop": pillow}, max(3, config.rounds // 2), warm_up=1, clock=config.clock
    )
    rows = rows_of("cache build from 640x480 JPEGs", "images/s", seconds, dict.fromkeys(seconds, len(paths)))
    cores = usable_cores() if config.clock == "wall" else 1  # CPU time is the sum over the cores
    rows[0]["note"] = f"{usable_cores()} cores, Pillow's loop has one" if config.clock == "wall" else "a core"
    rows[1]["ours_is_faster_a_core"] = rows[1]["ours_is_faster"] / cores
    return rows


START = """
import os, runpy, sys
from nets import unet
unet.UNet.forward = lambda *arguments: os._exit(0)
sys.argv = ["predict.py", *sys.argv[1:]]
runpy.run_path("predict.py", run_name="__main__")
"""


def start_section(config, job, implementations):
    """Wall time from `python predict.py` to its first network call, and of importing PyTorch."""
    weights, out = job.scratch / "weights.pth", str(job.scratch / "images")
    torch.save(implementations[Ours.name].diffusion.state_dict(), weights)
    options = [
        "--model_path",
        str(weights),
        "--save_dir",
        out,
        "--device",
        job.device.type,
        "--input_shape",
        f"{job.size},{job.size}",
    ]
    commands = {
        "python predict.py": [sys.executable, "-c", START, *options],
        "import torch, torchvision": [sys.executable, "-c", "import torch, torchvision"],
        "import torch": [sys.executable, "-c", "import torch"],
    }
    functions = {name: lambda command=command: run_alone(command) for name, command in commands.items()}
    seconds = {name: spread(values) for name, values in interleave(functions, config.rounds, warm_up=1).items()}
    ours = seconds["python predict.py"]["median"]
    return [
        {
            "what": "start, to the first network call",
            "who": name,
            "unit": "s",
            "rate": values["median"],
            "seconds_a_call": values,
            "predict_takes_of_it": ours / values["median"],
        }
        for name, values in seconds.items()
    ]


def run_alone(command):
    """What a process of its own prints; RuntimeError with its last words where it fails."""
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[:4])} ...: {done.stderr[-2000:]}")
    return done.stdout


def memory_section(config, job, implementations):
    """Peak memory of training, each in its own process: the GPU's, or the process's."""
    rows = []
    for name in implementations:
        command = [
            sys.executable,
            "-m",
            "benchmarks.speed",
            "--memory_of",
            name,
            "--device",
            job.device.type,
            "--size",
            str(config.size),
            "--channel",
            str(config.channel),
            "--batch_size",
            str(config.memory_batch),
            "--dropout",
            str(config.dropout),
            "--threads",
            str(torch.get_num_threads()),
        ]
        output = run_alone(command)
        rows.append(
            {
                "what": f"peak memory, training, batch {config.memory_batch}",
                "who": name,
                "unit": "MiB",
                **json.loads(output.splitlines()[-1]),
            }
        )
    for row in rows:
        row["ours_takes_of_it"] = rows[0]["rate"] / row["rate"]
    return rows


def measure_memory(config, device):
    """Peak memory of three training steps."""
    with TemporaryDirectory() as scratch, quiet():
        one = IMPLEMENTATIONS[config.memory_of](make_job(config, device, Path(scratch)))
        for _ in range(3):
            one.train_step()
    return {"rate": peak_memory(device)}


SECTIONS = {
    "train": train_section,
    "denoise": denoise_section,
    "sample": sample_section,
    "data": data_section,
    "cache": cache_section,
    "start": start_section,
    "memory": memory_section,
}


# The rows of the plot -> their titles. The last one's samplers differ in their numbers of steps.
SHOWN = {
    "training step": "training step",
    "denoising step": "denoising step",
    "25 images": "25 images,\n25 steps here, 1000 elsewhere",
}


def bars(report):
    """{title: {implementation: speed}}, in multiples of diffusers' in equal precision."""
    theirs, found = "" if report["machine"]["gpu"] else ", fp32", {}
    for what, title in SHOWN.items():
        rates = {row["who"]: row["rate"] for row in report["rows"] if row["what"] == what}
        equal = next((who for who in rates if who.endswith(" bf16")), "diffusers")
        names = {who: who.replace("denoising-diffusion-pytorch", "d.-d.-pytorch") + theirs for who in rates}
        names |= {"this project": f"this project, {report['machine']['precision']}"}
        names |= {equal: "diffusers, bf16"} if equal != "diffusers" else {}
        if equal in rates:
            found[title] = {names[who]: rate / rates[equal] for who, rate in rates.items()}
    return found


def plot(report, path):
    """The bars as a figure, equal work in equal precision first."""
    from matplotlib.figure import Figure

    if not (found := bars(report)):
        return
    figure = Figure(figsize=(8, 2.4), dpi=110, layout="constrained")
    for panel, (title, multiples) in zip(figure.subplots(1, len(found), squeeze=False)[0], found.items()):
        names, times = list(multiples)[::-1], list(multiples.values())[::-1]
        shown = panel.barh(names, times, color=["C7"] * (len(names) - 1) + ["C0"])
        panel.bar_label(shown, [f"{value:.3g}x" for value in times], padding=2)
        panel.set(xlim=(0, 1.4 * max(times)), xticks=[])
        panel.set_title(title, fontsize=10)
        panel.tick_params(labelleft=panel is figure.axes[0], left=False)
    with atomic_write(path) as file:
        figure.savefig(file, format="png")


def as_text(report):
    """The report for people, in Markdown."""
    about, settings = report["machine"], report["settings"]
    gpu = about["gpu"] or "no CUDA GPU here: the same command measures one where there is one"
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    theirs = "" if about["gpu"] else " for a CPU, in fp32 unless the name says otherwise"
    clock = "wall time" if about["clock"] == "wall" else "this process's CPU time"
    lines = [
        f"{about['cpu']}, {about['threads']} of {about['cores']} cores, load {about['load']:.1f}; {gpu}.",
        f"{settings['channel']} channels, {settings['size']}x{settings['size']}, batch {settings['batch_size']}, "
        f"dropout {settings['dropout']}; this project in {about['precision']}, the others as they are "
        f"documented{theirs}; "
        f"medians of {settings['rounds']} interleaved rounds, {clock}.",
        f"Python {about['python']}, {versions}.",
        "",
    ]
    return (
        "\n".join(lines)
        + "\n"
        + markdown(
            ("measurement", "implementation", "rate", "time per call (quartiles)", "ratio", "notes"),
            map(cells, report["rows"]),
        )
    )


def cells(row):
    """A row's cells as text."""
    rate = f"{row['rate'] / 1e9:,.1f} GFLOP/s" if row["unit"] == "FLOP/s" else f"{row['rate']:,.4g} {row['unit']}"
    call = "{median:.4g} s ({low:.4g} to {high:.4g})".format(**row["seconds_a_call"]) if "seconds_a_call" in row else ""
    ratio = next((f"{text} {row[key]:.2f}{ending}" for key, text, ending in RATIOS if row.get(key)), "")
    notes = [row["note"]] if "note" in row else []
    if "share_of_peaks" in row:
        shares = ", ".join(f"{share:.0%} of the {peak}" for peak, share in row["share_of_peaks"].items())
        notes.append(f"{row['flops_a_second'] / 1e9:,.1f} GFLOP/s: {shares} in the same precision")
    notes += [f"per core: {row['ours_is_faster_a_core']:.2f}x"] if row.get("ours_is_faster_a_core") else []
    return row["what"], row["who"], rate, call, ratio, "; ".join(notes)


RATIOS = (
    ("ours_is_faster", "this project is", "x as fast"),
    ("predict_takes_of_it", "predict.py takes", " of this time"),
    ("ours_takes_of_it", "this project takes", " of this memory"),
)


if __name__ == "__main__":
    run_script(main)
