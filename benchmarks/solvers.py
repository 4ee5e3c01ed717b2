"""Which solver, with which timesteps and how many network calls? One trained model, tabled.

    python -m benchmarks.solvers

Every number is a Frechet distance in float64 between features of samples and of real images, from a
classifier that is trained on the same data first. Table, JSON and plot go to benchmarks/results/. A
cell is stored as soon as it is measured; the same command resumes. The first seed of all cells
comes first, the cheap ones before the costly: a table that was broken off is of use.
"""

import json
import math
import statistics
import sys
from dataclasses import asdict, replace
from typing import NamedTuple

import torch
from tqdm import tqdm

from benchmarks.runs import (
    DATA,
    RESULTS,
    VAL_SPLIT,
    WORK,
    list_images,
    network_options,
    stop_with_children,
    trained,
    write_json,
)
from benchmarks.timing import CLOCKS, machine, markdown, read_names, write_page
from nets import sampling
from nets.samplers import LOWEST_LAMBDA, SPACINGS, half_log_snr, solver_steps, timesteps
from utils.checkpoint.integrity import weights_digest
from utils.device import DTYPES, autocast, choose_compile, choose_device, choose_precision
from utils.errors import UserError, run_script
from utils.evaluate import __main__ as evaluate
from utils.evaluate.distances import FeatureStatistics, frechet_distance
from utils.evaluate.features import FeatureCache, load_extractor
from utils.files import atomic_write
from utils.images import to_uint8
from utils.sampling.batches import last_images, sample_batches
from utils.settings import SEVERAL, choice, flag, number, parse, settings, text, whole

SOLVERS = {  # name in the tables -> (sampler, its options)
    "ddpm": ("ddpm", {}),
    "ddpm-posterior": ("ddpm", {"variance": "posterior"}),
    "ddim": ("ddim", {}),
    "dpm++": ("dpm++", {}),
    "sde-dpm++": ("sde-dpm++", {}),
    "heun": ("heun", {}),
}
CALLS = (5, 10, 15, 20, 25, 50, 100, 250, 1000)
EVERY = "every"  # the spacing of as many steps as there are timesteps: all spacings are the same then
# a default takes at most so many calls, and may be so much worse than ddpm with all of its steps
CHEAP, TOLERANCE = 25, 1.05
PLACES = ("model_path", "reference", "data_root")  # settings that mean nothing on another machine
SEED_STRIDE = 10_000_000  # between the seeds of the first images of two rounds


# fmt: off
@settings
class Config:
    # What is measured
    model_path: str = ""                # a checkpoint, or a run's folder; "": trained on Fashion-MNIST first
    reference: str = ""                 # its images: an annotation file or a folder; "": those that it was trained on
    solvers: str = ",".join(SOLVERS)    # rows, with commas between
    spacings: str = ",".join(SPACINGS)  # rows, with commas between
    calls: tuple[int, ...] = CALLS      # columns: network calls per image; all of ddpm's are always there
    samples: int = 10_000               # per cell
    seeds: int = 3                      # cells of each kind, each from other noise
    features: str = "classifier"        # classifier, inception, or the file of a feature network

    # The network that is trained where none is named
    minutes: float = 20.0               # time of its training
    epochs: int = 0                     # epochs instead; 0: as many as fit into the minutes
    size: int = 0                       # height and width of its images; 0: 32 on a GPU, 16 elsewhere
    channel: int = 0                    # width of its first level; 0: 128 on a GPU, 32 elsewhere
    data_root: str = ""                 # a torchvision root with FashionMNIST/raw; "": fetched

    # Machine and output
    batch_size: int = 0                 # images sampled at once; 0: 500 on a GPU, 100 elsewhere
    clock: str = "wall"                 # cpu: this process's own time, for a busy machine; with one thread
    device: str = "auto"                # auto, cuda, mps or cpu
    precision: str = "auto"             # mixed-precision dtype of the diffusion network
    compile: bool | str = "auto"        # compile the diffusion network
    name: str = ""                      # of the files in benchmarks/results; "": the device's
# fmt: on


SETTINGS = {
    "model_path": text(),
    "reference": text(),
    "solvers": text(),
    "spacings": text(),
    "calls": whole(1, count=SEVERAL),
    "samples": whole(2, SEED_STRIDE),
    "seeds": whole(1, 100),
    "features": text(),
    "minutes": number(0),
    "epochs": whole(0),
    "size": whole(0, 2**14),
    "channel": whole(0, 2**16),
    "data_root": text(),
    "batch_size": whole(0),
    "clock": choice(CLOCKS),
    "device": text(),
    "precision": choice(("auto", *DTYPES)),
    "compile": flag(choices=("auto",)),
    "name": text(),
}


class Cell(NamedTuple):
    """One measurement: `calls` is the column it is for, `steps` what the solver takes for it."""

    solver: str
    spacing: str
    calls: int
    steps: int
    seed: int

    @property
    def made(self):
        """Network calls per image."""
        return calls_of(self.solver, self.steps)


def main(arguments=None):
    config = parse(Config, SETTINGS, __doc__, arguments)
    for name, known in (("solvers", SOLVERS), ("spacings", SPACINGS)):
        read_names(name, getattr(config, name), known)
    stop_with_children()
    device = choose_device(config.device)
    config = replace(
        config, batch_size=config.batch_size or (500 if device.type == "cuda" else 100), name=config.name or device.type
    )
    if not config.model_path:
        config = replace(config, model_path=str(train_one(config, device)))
    bench = Bench(config, device)
    path = RESULTS / f"solvers_{config.name}.json"
    report = opened(path, bench.about())
    report["settings"] = {name: value for name, value in asdict(config).items() if name not in PLACES}
    report["machine"] = machine(device, bench.precision, config.clock)
    try:
        fill(report, path, wanted_cells(config, bench.model.diffusion.num_timesteps), bench.measure)
    finally:
        plot(report, path.with_suffix(".png"))
    print("\n" + as_text(report))
    print(f"\nwritten: {path}, .md and .png")


def train_one(config, device):
    """The checkpoint of a network trained on Fashion-MNIST for the stated time."""
    annotation = list_images("fashion_mnist", WORK, config.data_root)
    options = {
        **network_options(device, config.size, config.channel),
        "img_channels": DATA["fashion_mnist"],
        "val_split": VAL_SPLIT,
        "device": device.type,
    }
    return trained(WORK / "fashion_mnist" / "eps", annotation, options, config.minutes, config.epochs)[0]


# Which cells there are


def steps_for(solver, calls):
    """The steps that take at most `calls` network calls: N steps of heun take at most 2N - 1."""
    return (calls + 1) // 2 if solver == "heun" else calls


def calls_of(solver, steps):
    """At most: heun has one fewer in each step that begins below samplers.LOWEST_LAMBDA."""
    return 2 * steps - 1 if solver == "heun" else steps


def wanted_cells(config, T):
    """The cells in the order of their measurement: by seed, then by cost.

    ddpm's T steps, which all are held against, after the cheap.
    """
    kinds = {("ddpm", EVERY, T, T): None}
    for solver in config.solvers.split(","):
        for spacing in config.spacings.split(","):
            for calls in config.calls:
                steps = steps_for(solver, calls)
                if steps <= T:
                    kinds[solver, EVERY if steps == T else spacing, calls, steps] = None
    cells = [Cell(*kind, seed) for seed in range(config.seeds) for kind in kinds]
    return sorted(
        cells, key=lambda cell: (cell.seed, cell.made if not is_yardstick(cell._asdict(), T) else CHEAP + 0.5)
    )


def is_yardstick(cell, T):
    """Whether it is ddpm's walk through all T timesteps."""
    return cell["solver"] == "ddpm" and cell["steps"] == T


# Measuring one


class NetworkClock(torch.nn.Module):
    """A network that counts its calls and their seconds.

    On a GPU between events, which nothing waits for until they are read.
    """

    def __init__(self, network, device, read):
        super().__init__()
        self.network, self.gpu, self.read, self.spans = network, device.type == "cuda", read, []

    def mark(self):
        if not self.gpu:
            return self.read()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def forward(self, *arguments):
        start = self.mark()
        output = self.network(*arguments)
        self.spans.append((start, self.mark()))
        return output

    def take(self):
        """(calls, seconds) since the last time."""
        spans, self.spans = self.spans, []
        return len(spans), sum(start.elapsed_time(end) / 1000 if self.gpu else end - start for start, end in spans)


class Bench:
    """The model, the features and the reference that every cell is measured with."""

    def __init__(self, config, device):
        self.config, self.device, self.precision = config, device, choose_precision(config.precision, device)
        wanted = evaluate.Config(samples=config.model_path, features=config.features)
        self.model = evaluate.load_model(wanted, device, self.precision)
        wanted.reference = config.reference or self.model.checkpoint.config.get("annotation_path", "")
        if not wanted.reference:
            raise UserError(
                f"{config.model_path} does not say what it was trained on: name its images with --reference"
            )
        reference, held_out = evaluate.open_references(wanted, self.model, evaluate.make_opener(wanted, self.model)[0])
        cache = FeatureCache(annotation_path=wanted.reference)
        self.extractor = load_extractor(config.features, reference, cache, device, config.batch_size)
        self.known = cache.collected(reference, self.extractor, 0).statistics
        self.labels, self.reference = evaluate.labels_like(reference, self.model, seed=0), reference
        self.digest = weights_digest(self.model.diffusion.network(wanted.use_ema).state_dict())
        self.held_out = cache.collected(held_out, self.extractor, 0).statistics if held_out else None
        diffusion = self.model.diffusion
        if choose_compile(config.compile, device, math.inf):
            diffusion.ema_model.compile()
        self.read = CLOCKS[config.clock]
        self.clock = diffusion.ema_model = NetworkClock(diffusion.ema_model, device, self.read)
        # compiles, and finds the fastest convolutions
        self.last_images(next(self.batches(Cell("dpm++", "trailing", 2, 2, 0)))[1])

    def about(self):
        """What the cells of one table have in common."""
        real = frechet_distance(self.held_out, self.known) if self.held_out else None
        trained_with = {
            name: self.model.checkpoint.config.get(name)
            for name in (
                "input_shape",
                "img_channels",
                "channel",
                "channel_mults",
                "num_res_blocks",
                "prediction",
                "schedule",
                "epochs",
            )
        }
        return {
            "weights": self.digest,
            "features_digest": self.extractor.key,
            "reference_digest": self.reference.key(),
            "samples": self.config.samples,
            "precision": self.precision,
            "T": self.model.diffusion.num_timesteps,
            "features": self.extractor.name.rsplit(", /", 1)[0],
            "num_reference": len(self.reference),
            "trained_with": trained_with,
            "parameters": sum(p.numel() for p in self.model.diffusion.model.parameters()),
            "held_out_distance": real,
            "num_held_out": self.held_out.count if self.held_out else 0,
        }

    def batches(self, cell):
        """Yields (first, steps) for the cell's batches, as `sample_batches` does."""
        firsts, size = range(0, self.config.samples, self.config.batch_size), self.config.batch_size
        options = sampling.SamplingOptions(
            SOLVERS[cell.solver][0],
            cell.steps,
            None if cell.spacing == EVERY else cell.spacing,
            solver_options=SOLVERS[cell.solver][1],
        )
        first_seed = cell.seed * SEED_STRIDE
        return sample_batches(self.model.diffusion, firsts, size, first_seed, self.labels, options=options)

    def last_images(self, steps):
        """A batch in [-1, 1], in the benchmark's precision."""
        with autocast(self.device, self.precision):
            return last_images(steps)

    def euler_steps(self, cell):
        """How many steps of heun, but the last, have one call: `made` counts two for each."""
        if cell.solver != "heun":
            return 0
        alpha_bars = self.model.diffusion.alpha_bars
        steps = solver_steps(alpha_bars, timesteps(alpha_bars, cell.steps, cell.spacing))[:-1]
        return sum(half_log_snr(step.alpha_bar_t) < LOWEST_LAMBDA for step in steps)

    def measure(self, cell, denoiser=None):
        """The distance of a cell, the time per image, and the network's share of it.

        denoiser: a function of the labels that takes the place of sampling.make_denoiser. It may
        call the network more often.
        """
        found, seconds, batches = FeatureStatistics(), 0.0, 0
        own = sampling.make_denoiser
        if denoiser:
            sampling.make_denoiser = lambda diffusion, y, options: denoiser(y)
        self.clock.take()
        for first, steps in self.batches(cell):
            began = self.read()
            x = self.last_images(steps)
            batches += 1
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            seconds += self.read() - began
            found.add(self.extractor(torch.from_numpy(to_uint8(x)[: self.config.samples - first])))
        calls, network = self.clock.take()
        sampling.make_denoiser = own
        assert denoiser or calls == (cell.made - self.euler_steps(cell)) * batches, (calls, cell)
        per_image = seconds / (batches * self.config.batch_size)
        return {
            "made": calls // batches,
            "distance": frechet_distance(found, self.known),
            "seconds_per_image": per_image,
            "network_share": network / seconds,
        }


# The report


def opened(path, about):
    """The report at `path` to continue, or a new one.

    UserError where it is about something else.
    """
    try:
        report = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return {"about": about, "cells": []}
    keys = ("weights", "features_digest", "reference_digest", "samples", "precision")
    differing = [key for key in keys if report["about"][key] != about[key]]
    if differing:
        raise UserError(
            f"{path} is there already and differs in {', '.join(differing)}: choose another --name, or delete it"
        )
    return report


def fill(report, path, wanted, measure):
    """Measure the cells that the report has not got yet.

    Each is stored, and the table with it, before the next one begins.
    """
    done = {tuple(cell[name] for name in Cell._fields) for cell in report["cells"]}
    todo = [cell for cell in wanted if tuple(cell) not in done]
    report["wanted"] = len(report["cells"]) + len(todo)
    pause = 0.1 if sys.stderr.isatty() else 60  # seconds between two states of the progress bar
    with tqdm(total=sum(cell.made for cell in todo), unit="call", dynamic_ncols=True, mininterval=pause) as bar:
        for cell in todo:
            bar.set_description(f"seed {cell.seed}, {cell.solver}, {cell.spacing}, {cell.made} calls", refresh=False)
            report["cells"].append({**cell._asdict(), **measure(cell)})
            write_json(path, report)
            write_page(path, as_text(report))
            bar.update(cell.made)


def summaries(report):
    """{(solver, spacing, steps): {cell, calls, {seed: distance}, times, shares}} of all seeds."""
    found = {}
    for cell in report["cells"]:
        key = cell["solver"], cell["spacing"], cell["steps"]
        row = found.setdefault(
            key,
            {
                **dict(zip(("solver", "spacing", "steps"), key)),
                "made": cell["made"],
                "columns": set(),
                "distances": {},
                "seconds": [],
                "shares": [],
            },
        )
        row["columns"].add(cell["calls"])
        row["distances"][cell["seed"]] = cell["distance"]
        row["seconds"].append(cell["seconds_per_image"])
        row["shares"].append(cell["network_share"])
    return list(found.values())


def ratio(row, yardstick):
    """How many times the yardstick's distance a row has, over the seeds that both have.

    None without any.
    """
    common = row["distances"].keys() & yardstick["distances"].keys()
    if not common:
        return None
    return sum(row["distances"][seed] for seed in common) / sum(yardstick["distances"][seed] for seed in common)


def choose_default(rows, T):
    """(row, ratio) of the fewest calls within TOLERANCE of ddpm's T steps; None if unknown."""
    yardstick = next((row for row in rows if is_yardstick(row, T)), None)
    if yardstick is None:
        return None
    rated = [(row, ratio(row, yardstick)) for row in rows]
    good = [(row, value) for row, value in rated if value is not None and value <= TOLERANCE]
    return min(good, key=lambda pair: (pair[0]["made"], pair[1]))


def verdict(rows, T):
    """Which way needs the fewest calls to be as good as ddpm with all of its steps, in words."""
    chosen = choose_default(rows, T)
    if chosen is None:
        return f"What is as good as ddpm with all {T} steps is not known yet: ddpm has not been measured."
    row, value = chosen
    what = (
        f"{row['solver']}, {row['spacing']} spacing, {row['made']} network evaluations ({row['steps']} steps), "
        f"{value:.3f} times "
        "its distance"
    )
    fewest = f"The fewest network evaluations within {TOLERANCE - 1:.0%} of ddpm with all {T} steps: {what}."
    return fewest if row["made"] <= CHEAP else f"{fewest} Nothing with {CHEAP} evaluations or fewer comes so close."


def as_text(report):
    """The report for people, in Markdown."""
    rows, T, columns = summaries(report), report["about"]["T"], sorted({cell["calls"] for cell in report["cells"]})
    tables = (table(rows, columns) for table in (best_of, distance_table, time_table))
    return "\n\n".join((heading(report), verdict(rows, T), *tables))


def heading(report):
    """What was measured, and on what."""
    about, on, seeds = report["about"], report["machine"], len({cell["seed"] for cell in report["cells"]})
    done, wanted = len(report["cells"]), report["wanted"]
    network = ", ".join(f"{name} {value}" for name, value in about["trained_with"].items() if value is not None)
    clock = "wall time" if on["clock"] == "wall" else "this process's CPU time"
    real = about["num_held_out"]
    real = f" {real:,} held-out real images have a distance of {about['held_out_distance']:.3f}." if real else ""
    return ("" if done == wanted else f"UNFINISHED: {done} of {wanted} cells; the same command resumes.\n\n") + (
        f"Frechet distance of {about['samples']:,} images to {about['num_reference']:,} real ones, mean and "
        "standard deviation of up to "
        f"{seeds} seeds. Lower is better.{real}\nFeatures: {about['features']}. Network: {about['parameters']:,} "
        f"parameters; {network}; "
        f"T = {about['T']}, EMA weights, x_0 clipped.\n"
        f"{on['gpu'] or on['cpu']}, {on['threads']} of {on['cores']} cores, load {on['load']:.1f}, {on['precision']}, "
        f"{clock}; "
        f"torch {on['versions'].get('torch')}."
    )


def best_of(rows, columns):
    """The best row of each column."""
    lines = []
    for column in columns:
        best = min((row for row in rows if column in row["columns"]), key=mean)
        lines.append((column, best["solver"], best["spacing"], best["made"], f"{mean(best):.3f}"))
    return "The lowest distance of each column:\n\n" + markdown(
        ("column", "solver", "spacing", "network evaluations", "distance"), lines
    )


def mean(row):
    return statistics.fmean(row["distances"].values())


def spread_of(row):
    """Standard deviation over the seeds; 0 for one."""
    values = list(row["distances"].values())
    return statistics.stdev(values) if len(values) > 1 else 0.0


def mean_and_spread(row):
    return f"{mean(row):.3f}" + (f" ± {spread_of(row):.3f}" if len(row["distances"]) > 1 else "")


def distance_table(rows, columns):
    """Solver x spacing x calls."""
    lines = []
    for solver in SOLVERS:
        mine = [row for row in rows if row["solver"] == solver]
        for spacing in dict.fromkeys(row["spacing"] for row in sorted(mine, key=lambda row: row["spacing"] == EVERY)):
            cells = [
                next((row for row in mine if row["spacing"] == spacing and column in row["columns"]), None)
                for column in columns
            ]
            lines.append((solver, spacing, *(mean_and_spread(row) if row else "" for row in cells)))
    head = "By network evaluations per image; heun takes up to 2N - 1 in N steps, fewer than an even column says.\n\n"
    return head + markdown(("solver", "spacing", *map(str, columns)), lines)


def time_table(rows, columns):
    """Milliseconds per image, and how much of them is the network's."""
    lines = []
    for solver in SOLVERS:
        mine = [row for row in rows if row["solver"] == solver]
        if mine:
            times = [
                [second for row in mine if column in row["columns"] for second in row["seconds"]] for column in columns
            ]
            shares = [share for row in mine for share in row["shares"]]
            cells = [f"{1000 * statistics.median(values):.3g}" if values else "" for values in times]
            lines.append((solver, *cells, f"{statistics.median(shares):.1%} ({min(shares):.1%} to {max(shares):.1%})"))
    return "Milliseconds per image by network evaluations, and the fraction of the time in the network:\n\n" + markdown(
        ("solver", *map(str, columns), "in the network"), lines
    )


def plot(report, path):
    """Distance over network calls and over time, a line for each solver and spacing."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        print("no plot: pip install matplotlib")
        return
    rows, T = summaries(report), report["about"]["T"]
    figure = Figure(figsize=(13, 5.5), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2, sharey=True)
    for place, label, x_of in (
        (axes[0], "network calls per image", lambda row: row["made"]),
        (axes[1], "milliseconds per image", lambda row: 1000 * statistics.median(row["seconds"])),
    ):
        plot_lines(place, rows, x_of)
        for row in rows:
            if is_yardstick(row, T):
                place.axhspan(
                    0,
                    mean(row) * TOLERANCE,
                    color="black",
                    alpha=0.07,
                    label=f"within {TOLERANCE - 1:.0%} of ddpm, {T} steps",
                )
        place.set(xlabel=label, xscale="log", yscale="log")
        place.grid(True, which="both", alpha=0.2)
    columns = sorted({cell["calls"] for cell in report["cells"]})
    axes[0].set_xticks(columns, [str(column) for column in columns])
    axes[0].set_xticks([], minor=True)
    axes[0].set_ylabel(f"Frechet distance ({report['about']['samples']:,} images)")
    axes[1].legend(fontsize=7, ncols=2)
    with atomic_write(path) as file:
        figure.savefig(file, format="png")


def plot_lines(place, rows, x_of):
    """One color per solver, one dash per spacing.

    Each line ends in the solver's walk through every timestep, where there is one.
    """
    for index, solver in enumerate(SOLVERS):
        mine = [row for row in rows if row["solver"] == solver]
        last = [row for row in mine if row["spacing"] == EVERY]
        for dash, spacing in zip(("-", "--", ":", "-."), SPACINGS):
            line = sorted([row for row in mine if row["spacing"] == spacing] + last, key=lambda row: row["made"])
            if len(line) > len(last):
                place.errorbar(
                    [x_of(row) for row in line],
                    [mean(row) for row in line],
                    yerr=[spread_of(row) for row in line],
                    color=f"C{index}",
                    linestyle=dash,
                    marker=".",
                    linewidth=1,
                    capsize=2,
                    label=f"{solver}, {spacing}",
                )


if __name__ == "__main__":
    run_script(main)
