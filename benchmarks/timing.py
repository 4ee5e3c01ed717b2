"""Functions timed side by side, and what they ran on."""

import contextlib
import importlib.metadata
import json
import os
import platform
import statistics
import time
from pathlib import Path

import torch

from utils.errors import UserError
from utils.files import atomic_write

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def interleave(functions, rounds, device=None, warm_up=2, clock="wall"):
    """{name: function without arguments} -> {name: [seconds of each round]}.

    Every round calls each function once, in turn, so that whatever slows the machine for a while
    slows all of them. The calls of the warm-up are not counted. clock "cpu" counts the processor
    time of this process instead: on a machine that others use too, with one thread (waiting threads
    of several spin, which would count).
    """
    read = CLOCKS[clock]
    seconds = {name: [] for name in functions}
    for number in range(-warm_up, rounds):
        for name, function in functions.items():
            wait(device)
            start = read()
            function()
            wait(device)
            if number >= 0:
                seconds[name].append(read() - start)
    return seconds


def wait(device):
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)


@contextlib.contextmanager
def quiet():
    """Nothing is printed within: progress bars would cost time and lines."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        yield


def spread(values):
    """{median, low, high}: the quartiles, or with fewer than four values the extremes."""
    low, _, high = (
        statistics.quantiles(values, n=4, method="inclusive") if len(values) >= 4 else (min(values), None, max(values))
    )
    return {"median": statistics.median(values), "low": low, "high": high}


def machine(device, precision, clock):
    """Hardware and versions, for the record."""
    packages = ("torch", "torchvision", "numpy", "pillow", "diffusers", "denoising-diffusion-pytorch", "accelerate")
    return {
        "cpu": cpu_name(),
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "device": device.type,
        "precision": precision,
        "clock": clock,
        "python": platform.python_version(),
        "system": platform.platform(),
        "cuda": torch.version.cuda,
        "versions": {name: version for name in packages if (version := version_of(name))},
    }


def cpu_name():
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def usable_cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def version_of(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def markdown(columns, rows):
    """A table of text cells."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def read_names(option, text, known):
    """The names in a text with commas. UserError for one that is not known."""
    names = text.split(",")
    unknown = [name for name in names if name not in known]
    if unknown:
        raise UserError(f"--{option}: unknown {', '.join(unknown)}; known: {', '.join(known)}")
    return names


def with_rows(report, rows, sections, path):
    """The report with these rows, each of which names its section, written as JSON.

    Rows of other sections stay, of this run and of what is in the file from a run with the same
    settings, hardware and versions: a long measurement can be made in parts.
    """
    measured = {row["section"] for row in rows}
    before = report.get("rows") or rows_of_before(report, path)
    kept = [row for row in before if row["section"] not in measured]
    report = {**report, "rows": sorted(kept + rows, key=lambda row: list(sections).index(row["section"]))}
    write_text(path, json.dumps(report, indent=1))
    return report


def rows_of_before(report, path):
    """The rows in a file whose settings, hardware and versions are this report's."""
    if not path.exists():
        return []
    before = json.loads(path.read_text(encoding="utf-8"))
    same = all(
        before["settings"].get(key) == json_like(value)
        for key, value in report["settings"].items()
        if key != "sections"
    )
    same = same and all(
        before["machine"].get(key) == value for key, value in report["machine"].items() if key != "load"
    )
    return before["rows"] if same else []


def json_like(value):
    return list(value) if isinstance(value, tuple) else value


def write_page(path, text, figure=".png"):
    """The report for people next to its JSON, with the figure of the same name at its end."""
    write_text(path.with_suffix(".md"), f"{text}\n\n![{path.stem}]({path.stem}{figure})")


def write_text(path, text):
    with atomic_write(path, "w", encoding="utf-8") as file:
        file.write(text + "\n")
