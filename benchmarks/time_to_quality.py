"""How good are the samples after so many minutes of training, here and elsewhere?

    python -m benchmarks.time_to_quality

The rows of the table: this project's article settings and presets; other objectives in the same
loop, with `quick`'s network, rate and batch (benchmarks/objectives.py); and other projects' own
loops as documented, with these widths. Each that is not this project's is also trained with every
one of --rates, other projects' without flips and with 8 groups too: all to the first mark, and the
one with the lowest distance there to the end.

Every method is told how many steps fit into the minutes. At each mark its EMA samples with 25
network evaluations, and the Frechet distance to the real images is written down, in the features of
a classifier of the same data. The clock counts training alone. A mark is stored as soon as it is
measured; the same command resumes there. Table, JSON and curves go to benchmarks/results/.
"""

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import train
from benchmarks.baselines import Diffusers, Job, Lucidrains, forever, prepare_training
from benchmarks.objectives import OBJECTIVES
from benchmarks.runs import DATA, RESULTS, WORK, list_images, write_json
from benchmarks.timing import CLOCKS, machine, markdown, read_names, write_page
from nets import samplers
from nets.errors import check_choice
from nets.sampling import SamplingOptions, make_denoiser, sampling_schedule
from utils.data.dataset import epoch_batches, open_dataset
from utils.data.image_format import ImageFormat
from utils.device import autocast, choose_device, choose_precision
from utils.errors import UserError, run_script
from utils.evaluate.distances import FeatureStatistics, frechet_distance
from utils.evaluate.features import FeatureCache, load_extractor
from utils.files import atomic_write
from utils.images import to_uint8
from utils.sampling.batches import last_images
from utils.settings import SEVERAL, choice, fitted, number, parse, read_literal, settings, text, whole
from utils.training.optimizer import learning_rate
from utils.training.settings_schema import RUN_SETTINGS

SAMPLER, STEPS = "sde-dpm++", 25
RATES = (1e-4, 4e-4, 8e-4, 1.6e-3)
MARKS = (0.5, 1.0, 2.0, 3.0, 5.0, 10.0)
MEASURED_STEPS = 12  # after two of warm-up, for the number of steps that fit into the minutes
TUNED = {"groups": 8, "flips": False}  # other projects' as this one has them, at each of the rates


# fmt: off
@settings
class Config:
    data: str = "fashion_mnist"       # dataset: fashion_mnist, emoji, or a folder of class folders
    methods: str = ""                 # what is trained, with commas between; "": all of them
    extra: str = ""                   # further settings of ours: name=setting:value;setting:value|name=...
    rates: tuple[float, ...] = RATES  # learning rates that others are trained with too; (): none
    minutes: float = 10.0             # of training, each
    marks: tuple[float, ...] = MARKS  # minutes at which the distance is measured
    size: int = 0                     # height and width; 0: 16 for fashion_mnist on a CPU, else 32
    channel: int = 0                  # width unless a preset decides it; 0: 128 on a GPU, 32 elsewhere
    batch_size: int = 64              # unless a preset decides it
    samples: int = 0                  # for each distance; 0: 10,000 on a GPU, 1,000 elsewhere
    seed: int = 0                     # of the first training of each, and of its samples; the next adds 1
    seeds: int = 1                    # trainings of each; the rates are compared with the first seed
    clock: str = "wall"               # cpu: this process's own time, for a busy machine; with one thread
    data_root: str = ""               # a torchvision root with FashionMNIST/raw; "": fetched
    device: str = "auto"              # auto, cuda or cpu
    name: str = ""                    # of the files in benchmarks/results; "": the device's
# fmt: on


SETTINGS = {
    "data": text(),
    "methods": text(),
    "extra": text(),
    "rates": number(1e-9, 1, count=range(33)),
    "minutes": number(0.01),
    "marks": number(0.01, count=SEVERAL),
    "size": whole(0, 2**14),
    "channel": whole(0, 2**16),
    "batch_size": whole(1),
    "samples": whole(2, 10**7, 0),
    "seed": whole(0, 10**9),
    "seeds": whole(1, 1000),
    "clock": choice(CLOCKS),
    "data_root": text(),
    "device": text(),
    "name": text(),
}


class Run:
    """A training: of a Job, the annotation file of its images, a seed, and settings of its own."""

    sampler = f"{SAMPLER} ({STEPS})"

    def images(self, numbers, noise):
        """The samples with these numbers, from an endless iterator of their noise."""
        denoise, alpha_bars = self.denoiser(numbers)
        schedule = sampling_schedule(alpha_bars, SamplingOptions(SAMPLER, STEPS))
        return last_images(samplers.SAMPLERS[SAMPLER](denoise, next(noise), schedule, noise))


class OurRun(Run):
    """train.py's step. settings: of train.py."""

    def __init__(self, job, annotation, seed, settings):
        shared = {
            "input_shape": (job.size, job.size),
            "channel": job.channel,
            "batch_size": job.batch_size,
            "img_channels": job.img_channels,
        }
        config = train.Config(
            annotation_path=str(annotation), device=job.device.type, seed=seed, **{**shared, **settings}
        )
        self.config, self.context = prepare_training(config)
        self.diffusion, self.step, self.seed = self.context.diffusion, 0, seed
        self.total_steps = 10_000  # until it is told
        self.network = self.diffusion.model
        self.objective = f"{config.prediction}, {config.schedule}, {config.timestep_sampling} t"
        self.batches = forever(self.epoch)

    def epoch(self):
        """An epoch from where the step is."""
        per_epoch = len(self.context.dataset) // self.context.batch_size
        epoch, done = divmod(self.step, per_epoch)
        batches = epoch_batches(
            len(self.context.dataset), self.context.batch_size, self.config.seed, epoch, done * self.context.batch_size
        )
        for position, (images, labels) in enumerate(self.context.dataset.batches(batches), done):
            yield epoch, position * self.context.batch_size, images, labels

    def told(self, total_steps):
        self.total_steps = total_steps

    def train_step(self):
        config = self.config
        epoch, consumed, images, labels = next(self.batches)
        ends = config.init_lr, config.min_lr
        lr = learning_rate(self.step, self.total_steps, *ends, config.warmup, config.lr_decay_type)
        train.train_step(config, self.context, images, labels, epoch, consumed, lr)
        self.step += 1

    def denoiser(self, numbers):
        """(denoise, alpha_bars): the EMA, with the classes in turn where it has them."""
        labels = self.context.dataset.labels
        y = labels[numbers % len(labels)].to(self.context.device) if self.diffusion.num_classes is not None else None
        return make_denoiser(self.diffusion, y, SamplingOptions()), self.diffusion.alpha_bars

    def about(self):
        config = self.config
        return (
            config.init_lr,
            config.optimizer_type,
            config.horizontal_flip,
            config.num_groups,
            config.dropout,
            config.precision,
            self.context.batch_size,
        )

    def state(self):
        diffusion = self.diffusion
        return {
            "weights": diffusion.state_dict(),
            "ema_step": diffusion.ema_step,
            "optimizer": self.context.optimizer.state_dict(),
        }

    def restore(self, state, step):
        self.diffusion.load_state_dict(state["weights"])
        self.diffusion.ema_step, self.step = state["ema_step"], step
        self.context.optimizer.load_state_dict(state["optimizer"])
        self.batches = forever(self.epoch)


class ObjectiveRun(OurRun):
    """The same step with another objective and its sampler. settings: an `objective` among them."""

    sampler = f"heun ({STEPS})"

    def __init__(self, job, annotation, seed, settings):
        own = dict(settings)
        self.chosen = OBJECTIVES[own.pop("objective")]
        super().__init__(job, annotation, seed, own)
        self.objective = self.chosen.name
        self.diffusion.get_losses = self.losses

    def losses(self, x, t, y, *, noise, **_):
        """In the place of GaussianDiffusion.get_losses, whose timesteps nothing is told of."""
        return self.chosen.losses(self.network, x, noise, torch.randn(len(x), device=x.device))

    def images(self, numbers, noise):
        return self.chosen.sample(self.diffusion.ema_model, next(noise))


class InOurPrecision(Run):
    """A baseline that trains in bf16 where ours does. settings: fields of Job."""

    def __init__(self, job, annotation, seed, settings):
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(reset_partial_state=True)  # it keeps the first baseline's precision
        self.cpu_precision, self.seed = choose_precision("auto", job.device), seed
        torch.manual_seed(seed)
        super().__init__(replace(job, **settings))

    def about(self):
        job = self.job
        groups = {part.num_groups for part in self.network.modules() if isinstance(part, torch.nn.GroupNorm)}
        return (
            job.init_lr or self.init_lr,
            self.optimizer_name,
            job.flips,
            groups.pop() if groups else "RMSNorm",
            job.dropout,
            self.precision,
            job.batch_size,
        )


class DiffusersRun(InOurPrecision, Diffusers):
    """diffusers' example loop; its EMA samples through our solver."""

    objective, optimizer_name = "eps, linear, uniform t", "adamw"

    def told(self, total_steps):
        from diffusers.optimization import get_scheduler

        warmup = min(500, total_steps // 10)  # its 500 would be most of a short training
        rate = get_scheduler(
            "cosine", optimizer=self.optimizer, num_warmup_steps=warmup, num_training_steps=total_steps
        )
        self.rate = self.accelerator.prepare(rate)

    def denoiser(self, numbers):
        alpha_bars = self.scheduler.alphas_cumprod.double().tolist()

        @torch.no_grad()
        def denoise(x, t):
            eps = self.network(x, t).sample.float()
            return ((x - (1 - alpha_bars[t]) ** 0.5 * eps) / alpha_bars[t] ** 0.5).clamp(-1, 1)

        return denoise, alpha_bars

    def sampling(self, on):
        """The EMA takes the place of the weights, and gives it back."""
        if on:
            self.ema.store(self.network.parameters())
            self.ema.copy_to(self.network.parameters())
        else:
            self.ema.restore(self.network.parameters())
        self.network.train(not on)

    def state(self):
        return [part.state_dict() for part in (self.network, self.ema, self.optimizer, self.rate)]

    def restore(self, state, step):
        for part, saved in zip((self.network, self.ema, self.optimizer, self.rate), state):
            part.load_state_dict(saved)


class LucidrainsRun(InOurPrecision, Lucidrains):
    """denoising-diffusion-pytorch's Trainer, with its constant learning rate.

    Its EMA samples through our solver.
    """

    objective, optimizer_name = "v, sigmoid, uniform t", "adam"

    def told(self, total_steps):
        pass

    def denoiser(self, numbers):
        model = self.trainer.ema.ema_model.eval()

        @torch.no_grad()
        def denoise(x, t):
            times = torch.full((len(x),), t, device=x.device)
            return model.model_predictions(x, times, clip_x_start=True).pred_x_start

        return denoise, model.alphas_cumprod.double().tolist()

    def state(self):
        parts = {"model": self.diffusion, "opt": self.trainer.opt, "ema": self.trainer.ema}
        return {"step": self.trainer.step, **{name: part.state_dict() for name, part in parts.items()}}

    def restore(self, state, step):
        self.trainer.step = state["step"]
        self.diffusion.load_state_dict(state["model"])
        self.trainer.opt.load_state_dict(state["opt"])
        self.trainer.ema.load_state_dict(state["ema"])


PEERS = {"diffusers": DiffusersRun, "denoising-diffusion-pytorch": LucidrainsRun}
COLUMNS = ("learning rate", "optimizer", "flips", "groups", "dropout", "precision", "batch")  # of each Run's about()


def main(arguments=None):
    config = parse(Config, SETTINGS, __doc__, arguments)
    known = methods(config)
    names = read_names("methods", config.methods, known) if config.methods else known
    device = choose_device(config.device)
    gpu = device.type == "cuda"
    config = replace(
        config,
        size=config.size or (16 if config.data == "fashion_mnist" and not gpu else 32),
        channel=config.channel or (128 if gpu else 32),
        samples=config.samples or (10_000 if gpu else 1000),
        name=config.name or device.type,
        marks=tuple(mark for mark in config.marks if mark < config.minutes) + (config.minutes,),
    )
    table = Table(config, device)
    for seed in range(config.seed, config.seed + config.seeds):
        for name in names:
            table.fill(name, *known[name], seed)
    print("\n" + as_text(table.report))


def methods(config):
    """{name: (its kind of Run, its settings)}."""
    quick = train.PRESETS["quick"]
    found = {name or "article": (OurRun, train.PRESETS[name]) for name in ("", "quick", "small")}
    found["quick-middle"] = OurRun, {**quick, "timestep_sampling": "middle"}
    for entry in filter(None, config.extra.split("|")):
        name, _, pairs = entry.partition("=")
        found[name] = OurRun, read_settings(pairs)
    for objective in OBJECTIVES:
        for optimizer in ("adam", "muon"):
            settings = {**quick, "objective": objective, "optimizer_type": optimizer}
            found[f"{objective}-{optimizer}"] = ObjectiveRun, settings
    return found | {name: (kind, {}) for name, kind in PEERS.items()}


def sweep(config, name, kind, settings):
    """{row: settings} of a method at each of the rates; none of this project's own."""
    if kind is OurRun:
        return {}
    settings = {**settings, **TUNED} if name in PEERS else settings
    return {f"{name} {rate:g}": {**settings, "init_lr": rate} for rate in config.rates}


def read_settings(pairs, declared=RUN_SETTINGS):
    """{name: value} of `setting:value;setting:value`. UserError for an unknown setting or value."""
    words = [pair.partition(":") for pair in pairs.split(";") if pair]
    for setting, _, _ in words:
        check_choice("setting", setting, declared)
    return {
        setting: fitted(f"--{setting} {value}", read_literal(value), declared[setting], value)
        for setting, _, value in words
    }


def opened(path, config):
    """The report to add to, or a new one where the settings differ."""
    about = {
        name: value
        for name, value in asdict(config).items()
        if name not in ("methods", "extra", "rates", "seed", "seeds", "data_root", "name", "device")
    }
    about["marks"] = list(config.marks)
    if path.is_file():
        report = json.loads(path.read_text("utf-8"))
        if report["settings"] == about:
            return report
        print(f"{path} is of other settings: it is replaced")
    return {"settings": about, "methods": {}}


class Evaluator:
    """The real images, and the features that samples are compared in."""

    def __init__(self, config, device):
        self.config, self.device, self.channels = config, device, DATA.get(config.data, 3)
        self.annotation = list_images(config.data, WORK, config.data_root)
        self.dataset = open_dataset(self.annotation, ImageFormat((config.size, config.size), self.channels))
        cache = FeatureCache("", self.annotation)
        self.extractor = load_extractor("classifier", self.dataset, cache, device)
        self.real = cache.collected(self.dataset, self.extractor, 10_000).statistics

    def files(self):
        """A folder with the same pixels, as other projects' loops read files."""
        folder = Path(self.annotation).parent / f"images_{self.config.size}"
        folder.mkdir(exist_ok=True)
        if not (folder / "whole").is_file():
            for number in tqdm(range(len(self.dataset)), "images", leave=False):
                image = self.dataset.images([number])[0].numpy()
                Image.fromarray(image.squeeze()).save(folder / f"{number:05d}.png")
            (folder / "whole").touch()
        return folder

    def distance(self, run):
        """Frechet distance of the run's samples."""
        statistics, size = FeatureStatistics(), 100
        shape = (self.channels, self.config.size, self.config.size)
        for first in range(0, self.config.samples, size):
            numbers = torch.arange(first, min(first + size, self.config.samples))
            noise = samplers.seeded_noise((run.seed + numbers).tolist(), shape, self.device)
            with torch.no_grad():
                images = run.images(numbers, noise)
            statistics.add(self.extractor(torch.from_numpy(to_uint8(images))))
        return frechet_distance(statistics, self.real)


class Table:
    """The report in its files, and what fills it."""

    def __init__(self, config, device):
        self.path = RESULTS / f"time_to_quality_{config.name}_{Path(config.data).name}"
        self.report = opened(self.path.with_suffix(".json"), config)
        about = machine(device, choose_precision("auto", device), config.clock)
        if self.report["methods"] and any(self.report["machine"][part] != about[part] for part in ("cpu", "gpu")):
            raise UserError(f"{self.path.with_suffix('.json')} is of another machine: choose another --name")
        self.report["machine"] = about
        self.config, self.device, self.evaluator = config, device, Evaluator(config, device)
        identity = (config.name, config.clock, config.size, config.channel, config.batch_size, config.minutes)
        folder = Path(self.evaluator.annotation).parent
        self.folder = WORK / "time_to_quality" / "_".join(map(str, (folder.name, *identity)))
        self.folder.mkdir(parents=True, exist_ok=True)

    def fill(self, name, kind, settings, seed):
        """A method's row, and the rows of its sweep."""
        self.measure(name, kind, settings, seed, self.config.marks)
        points = sweep(self.config, name, kind, settings)
        first = {
            row: self.measure(row, kind, own, self.config.seed, self.config.marks[:1])["marks"][0]["distance"]
            for row, own in points.items()
        }
        if points:
            best = min(first, key=first.get)
            self.measure(best, kind, points[best], seed, self.config.marks)

    def measure(self, name, kind, settings, seed, marks):
        """Trains to the last of the marks and stores each. Returns what the report has of it."""
        config, entries = self.config, self.report["methods"].setdefault(name, {})
        own = {
            "settings": json.loads(json.dumps(settings)),  # as the file has them
            "precision": choose_precision("auto", self.device),
        }
        # A row has one kind of training: those of a preset that has changed go, of all seeds.
        for other in [key for key, entry in entries.items() if {name: entry.get(name) for name in own} != own]:
            del entries[other]
        entry = entries.setdefault(str(seed), {**own, "marks": []})
        if len(entry["marks"]) >= len(marks):
            return entry
        run, state = self.start(kind, settings, seed), self.folder / f"{name}_{seed}.pth"
        steps, saved = torch.load(state, weights_only=False) if entry["marks"] and state.exists() else (0, None)
        if entry["marks"] and steps != entry["marks"][-1]["steps"]:
            entry["marks"].clear()  # the state is not that of the last mark: from the start
        if entry["marks"]:
            run.told(entry["total_steps"])
            run.restore(saved, steps)
        else:
            entry["about"] = describe(run)
            entry["steps_a_minute"] = steps_a_minute(config.clock, run)
            entry["total_steps"] = max(1, round(config.minutes * entry["steps_a_minute"]))
            run = self.start(kind, settings, seed)
            run.told(entry["total_steps"])
        clock = CLOCKS[config.clock]
        for mark in marks[len(entry["marks"]) :]:
            before = entry["marks"][-1] if entry["marks"] else {"steps": 0, "minutes": 0.0}
            steps = round(entry["total_steps"] * mark / config.minutes)
            began = clock()
            for _ in tqdm(range(before["steps"], steps), f"{name} to {mark:g} min", leave=False, mininterval=10):
                run.train_step()
            minutes = before["minutes"] + (clock() - began) / 60
            distance = sampled(self.evaluator, run)
            entry["marks"].append({"mark": mark, "steps": steps, "minutes": minutes, "distance": distance})
            with atomic_write(state) as file:
                torch.save((steps, run.state()), file)
            store(self.report, self.path)
            print(f"{name}, seed {seed}: {mark:g} minutes, {steps} steps, distance {distance:.2f}", flush=True)
        return entry

    def start(self, kind, settings, seed):
        config, evaluator = self.config, self.evaluator
        sizes = config.channel, config.size, config.batch_size
        files = evaluator.files() if kind in PEERS.values() else None
        job = Job(self.device, *sizes, 0.0, files, self.folder, evaluator.channels)
        return kind(job, evaluator.annotation, seed, settings)


def describe(run):
    """{column: value} of what a run trains and samples with."""
    parameters = sum(parameter.numel() for parameter in run.network.parameters())
    about = dict(zip(COLUMNS, run.about()))
    return {**about, "objective": run.objective, "sampler (NFE)": run.sampler, "parameters": f"{parameters:,}"}


def sampled(evaluator, run):
    """The distance, with the peers' EMA in the place of the weights meanwhile."""
    precision = choose_precision("auto", evaluator.device)
    switch = getattr(run, "sampling", lambda on: None)
    switch(True)
    with autocast(evaluator.device, precision if isinstance(run, OurRun) else "fp32"):
        distance = evaluator.distance(run)
    switch(False)
    return distance


def steps_a_minute(clock, run):
    """How many steps fit into a minute, measured on a few. clock: a name from CLOCKS."""
    read, seconds = CLOCKS[clock], []
    for _ in range(2):
        run.train_step()
    for _ in range(MEASURED_STEPS):
        began = read()
        run.train_step()
        seconds.append(read() - began)
    return 60 / float(np.median(seconds))


def store(report, path):
    write_json(path.with_suffix(".json"), report)
    write_page(path, as_text(report))
    plot(report, path.with_suffix(".png"))


def as_text(report):
    """The table: a row per method with its settings, and a column per mark."""
    marks, about, rows = report["settings"]["marks"], report["machine"], []
    for name, entries in report["methods"].items():
        trained = [entry for entry in entries.values() if entry["marks"]]
        if not trained:
            continue
        steps = sum(entry["total_steps"] for entry in trained) / len(trained)
        described = [str(value).replace("True", "yes").replace("False", "no") for value in trained[0]["about"].values()]
        rows.append((name, *described, f"{steps:,.0f}", *(cell(trained, number) for number in range(len(marks)))))
    chosen = report["settings"]
    lines = [
        f"{about['cpu']}, {about['threads']} of {about['cores']} cores; {about['gpu'] or 'no GPU'}; "
        f"{Path(chosen['data']).name}, {chosen['size']}x{chosen['size']}.",
        f"Frechet distance of {chosen['samples']:,} samples of the EMA after minutes of training ({about['clock']} "
        "time); lower is better.",
        "With several seeds: their mean, and each in brackets. A number after a name is a learning rate that was",
        f"tried to the first mark; the lowest distance there went on. Widths are multiples of {chosen['channel']}.",
        "",
    ]
    columns = ("", *COLUMNS, "objective", "sampler (NFE)", "parameters", "steps", *(f"{mark:g} min" for mark in marks))
    return "\n".join(lines) + "\n" + markdown(columns, rows)


def cell(trained, number):
    """The distances at a mark: their mean, and each where there are several."""
    found = [entry["marks"][number]["distance"] for entry in trained if len(entry["marks"]) > number]
    each = f" ({', '.join(f'{distance:.2f}' for distance in found)})" if len(found) > 1 else ""
    return f"{sum(found) / len(found):.2f}{each}" if found else ""


def plot(report, path):
    """Curves of what was trained beyond the first mark, with the first seed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for name, entries in report["methods"].items():
        marks = next(iter(entries.values()))["marks"]
        if len(marks) == 1 < len(report["settings"]["marks"]):
            continue
        minutes, distances = ([mark[key] for mark in marks] for key in ("minutes", "distance"))
        axes.plot(minutes, distances, marker="o", label=name)
    axes.set(xscale="log", yscale="log", xlabel="minutes of training", ylabel="Frechet distance")
    axes.grid(True, which="both", alpha=0.3)
    if axes.lines:
        figure.legend(loc="outside right upper")
    with atomic_write(path) as file:
        figure.savefig(file, format="png")


if __name__ == "__main__":
    run_script(main)
