"""How good are the samples after so many minutes of training, here and elsewhere?

    python -m benchmarks.time_to_quality

Every method trains in its own loop on the same images, and is told how many steps fit into the
minutes. At each mark the same solver samples with its EMA, and the Frechet distance to the real
images is written down, in the features of a classifier of the same data. The clock counts training
alone. A mark is stored as soon as it is measured; the same command resumes there. Table, JSON
and curves go to benchmarks/results/.
"""

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import train
from benchmarks.baselines import Diffusers, Job, Lucidrains, forever, prepare_training
from benchmarks.runs import DATA, RESULTS, WORK, list_images, write_json
from benchmarks.timing import CLOCKS, machine, markdown, read_names, write_page
from nets import samplers
from nets.errors import check_choice
from nets.sampling import SamplingOptions, make_denoiser, sampling_schedule
from utils.data.dataset import epoch_batches, open_dataset
from utils.data.image_format import ImageFormat
from utils.device import autocast, choose_device, choose_precision
from utils.errors import run_script
from utils.evaluate.distances import FeatureStatistics, frechet_distance
from utils.evaluate.features import FeatureCache, load_extractor
from utils.files import atomic_write
from utils.images import save_png, to_uint8
from utils.sampling.batches import last_images
from utils.settings import SEVERAL, choice, fitted, number, parse, read_literal, settings, text, whole
from utils.training.optimizer import learning_rate
from utils.training.settings_schema import RUN_SETTINGS

SAMPLER, STEPS = "sde-dpm++", 25
MARKS = (0.5, 1.0, 2.0, 3.0, 5.0, 10.0)
MEASURED_STEPS = 12  # after two of warm-up, for the number of steps that fit into the minutes


# fmt: off
@settings
class Config:
    data: str = "fashion_mnist"       # dataset
    methods: str = ""                 # what is trained, with commas between; "": baselines, article, each preset
    extra: str = ""                   # further settings of ours: name=setting:value;setting:value|name=...
    minutes: float = 10.0             # of training, each
    marks: tuple[float, ...] = MARKS  # minutes at which the distance is measured
    size: int = 0                     # height and width; 0: 16 for fashion_mnist, 32 for emoji, 32 on a GPU
    channel: int = 0                  # width unless a preset decides it; 0: 128 on a GPU, 32 elsewhere
    batch_size: int = 64              # unless a preset decides it
    samples: int = 0                  # for each distance; 0: 10,000 on a GPU, 1,000 elsewhere
    seed: int = 0                     # of our trainings, and of the samples
    clock: str = "wall"               # cpu: this process's own time, for a busy machine; with one thread
    data_root: str = ""               # a torchvision root with FashionMNIST/raw; "": fetched
    device: str = "auto"              # auto, cuda or cpu
    name: str = ""                    # of the files in benchmarks/results; "": the device's
# fmt: on


SETTINGS = {
    "data": choice(DATA),
    "methods": text(),
    "extra": text(),
    "minutes": number(0.01),
    "marks": number(0.01, count=SEVERAL),
    "size": whole(0, 2**14),
    "channel": whole(0, 2**16),
    "batch_size": whole(1),
    "samples": whole(2, 10**7, 0),
    "seed": whole(0, 10**9),
    "clock": choice(CLOCKS),
    "data_root": text(),
    "device": text(),
    "name": text(),
}


class OurRun:
    """train.py's step under a set of settings."""

    def __init__(self, job, annotation, channels, seed, overrides):
        shared = {
            "input_shape": (job.size, job.size),
            "channel": job.channel,
            "batch_size": job.batch_size,
            "img_channels": channels,
        }
        config = train.Config(
            annotation_path=str(annotation), device=job.device.type, seed=seed, **{**shared, **overrides}
        )
        self.config, self.context = prepare_training(config)
        self.diffusion, self.step = self.context.diffusion, 0
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
        total = getattr(self, "total_steps", 10_000)
        lr = learning_rate(self.step, total, config.init_lr, config.min_lr, config.warmup, config.lr_decay_type)
        train.train_step(config, self.context, images, labels, epoch, consumed, lr)
        self.step += 1

    def denoiser(self, numbers):
        """(denoise, alpha_bars): the EMA, with the classes in turn where it has them."""
        labels = self.context.dataset.labels
        y = labels[numbers % len(labels)].to(self.context.device) if self.diffusion.num_classes is not None else None
        return make_denoiser(self.diffusion, y, SamplingOptions()), self.diffusion.alpha_bars

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


class InOurPrecision:
    """A baseline that trains in bf16 where ours does."""

    def __init__(self, job):
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(reset_partial_state=True)  # it keeps the first baseline's precision
        self.cpu_precision = choose_precision("auto", job.device)
        super().__init__(job)


class DiffusersRun(InOurPrecision, Diffusers):
    """diffusers' example loop; its EMA samples through our solver."""

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


def main(arguments=None):
    config = parse(Config, SETTINGS, __doc__, arguments)
    known = [*PEERS, *ours(config)]
    names = read_names("methods", config.methods, known) if config.methods else known
    device = choose_device(config.device)
    gpu = device.type == "cuda"
    config = replace(
        config,
        size=config.size or (32 if gpu or config.data == "emoji" else 16),
        channel=config.channel or (128 if gpu else 32),
        samples=config.samples or (10_000 if gpu else 1000),
        name=config.name or device.type,
        marks=tuple(mark for mark in config.marks if mark < config.minutes) + (config.minutes,),
    )
    path = RESULTS / f"time_to_quality_{config.name}_{config.data}"
    report = opened(path.with_suffix(".json"), config)
    report["machine"] = machine(device, choose_precision("auto", device), config.clock)
    evaluator = Evaluator(config, device)
    for name in names:
        measure(config, device, evaluator, name, report, path)
    print("\n" + as_text(report))


def ours(config):
    """{name: settings of ours}: the article's, those of presets of any size, and the extra ones."""
    presets = {name: values for name, values in train.PRESETS.items() if name and "input_shape" not in values}
    found = {"article": {}, **presets}
    for entry in filter(None, config.extra.split("|")):
        name, _, pairs = entry.partition("=")
        found[name] = read_settings(pairs)
    return found


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
        if name not in ("methods", "extra", "data_root", "name", "device")
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
        self.folder = Path(self.annotation).parent / f"images_{config.size}"
        if not (self.folder / "whole").is_file():  # the other loops read files: the same pixels
            for number in tqdm(range(len(self.dataset)), "images", leave=False):
                save_png(self.folder / f"{number:05d}.png", self.dataset.images([number])[0].numpy())
            (self.folder / "whole").touch()

    def distance(self, run):
        """Frechet distance of the run's samples."""
        statistics, size = FeatureStatistics(), 100
        shape = (self.channels, self.config.size, self.config.size)
        for first in range(0, self.config.samples, size):
            numbers = torch.arange(first, first + size)
            denoise, alpha_bars = run.denoiser(numbers)
            noise = samplers.seeded_noise((self.config.seed + numbers).tolist(), shape, self.device)
            with torch.no_grad():
                schedule = sampling_schedule(alpha_bars, SamplingOptions(SAMPLER, STEPS))
                x = last_images(samplers.SAMPLERS[SAMPLER](denoise, next(noise), schedule, noise))
            statistics.add(self.extractor(torch.from_numpy(to_uint8(x))))
        return frechet_distance(statistics, self.real)


def measure(config, device, evaluator, name, report, path):
    """Trains a method from mark to mark, and stores each."""
    identity = (config.data, config.size, config.channel, config.batch_size, config.minutes, config.seed)
    folder = WORK / "time_to_quality" / "_".join(map(str, identity))
    folder.mkdir(parents=True, exist_ok=True)
    job = Job(device, config.channel, config.size, config.batch_size, 0.1, evaluator.folder, folder, evaluator.channels)
    settings = None if name in PEERS else ours(config)[name]

    def start():
        if name in PEERS:
            return PEERS[name](job)
        return OurRun(job, evaluator.annotation, evaluator.channels, config.seed, settings)

    run = start()
    about = {
        "settings": json.loads(json.dumps(settings)),  # as the file has them
        "precision": choose_precision("auto", device),
    }
    entry = report["methods"].get(name, {})
    if {key: entry.get(key) for key in about} != about:  # a preset that changed, or another machine
        entry = report["methods"][name] = {**about, "marks": []}
    state = folder / f"{name}.pth"
    if entry["marks"]:
        run.told(entry["total_steps"])
        run.restore(torch.load(state, weights_only=False), entry["marks"][-1]["steps"])
    else:
        entry["steps_a_minute"] = steps_a_minute(config.clock, run)
        entry["total_steps"] = max(1, round(config.minutes * entry["steps_a_minute"]))
        del run
        run = start()
        run.told(entry["total_steps"])
    clock = CLOCKS[config.clock]
    for mark in config.marks[len(entry["marks"]) :]:
        before = entry["marks"][-1] if entry["marks"] else {"steps": 0, "minutes": 0.0}
        steps = round(entry["total_steps"] * mark / config.minutes)
        began = clock()
        for _ in tqdm(range(before["steps"], steps), f"{name} to {mark:g} min", leave=False, mininterval=10):
            run.train_step()
        minutes = before["minutes"] + (clock() - began) / 60
        distance = sampled(evaluator, run)
        entry["marks"].append({"mark": mark, "steps": steps, "minutes": minutes, "distance": distance})
        torch.save(run.state(), state)
        store(report, path)
        print(f"{name}: {mark:g} minutes, {steps} steps, distance {distance:.2f}", flush=True)


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
    """The table: a row per method, a column per mark."""
    marks, about = report["settings"]["marks"], report["machine"]
    rows = []
    for name, entry in report["methods"].items():
        found = {mark["mark"]: mark["distance"] for mark in entry["marks"]}
        rows.append(
            (name, f"{entry['total_steps']:,}", *(f"{found[mark]:.2f}" if mark in found else "" for mark in marks))
        )
    chosen = report["settings"]
    size = f"{chosen['size']}x{chosen['size']}"
    lines = [
        f"{about['cpu']}, {about['threads']} of {about['cores']} cores; {about['gpu'] or 'no GPU'}; {chosen['data']}, "
        f"{size},",
        f"all training in {about['precision']} (the others' networks sample in fp32),",
        f"{chosen['channel']} channels and batch {chosen['batch_size']} unless a preset decides otherwise.",
        f"Frechet distance of {chosen['samples']:,} samples ({SAMPLER}, {STEPS} steps, the EMA) after minutes of",
        "training; lower is better.",
        "",
    ]
    return "\n".join(lines) + "\n" + markdown(("", "steps", *(f"{mark:g} min" for mark in marks)), rows)


def plot(report, path):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for name, entry in report["methods"].items():
        axes.plot(
            [mark["minutes"] for mark in entry["marks"]],
            [mark["distance"] for mark in entry["marks"]],
            marker="o",
            label=name,
        )
    axes.set(xscale="log", yscale="log", xlabel="minutes of training", ylabel="Frechet distance")
    axes.grid(True, which="both", alpha=0.3)
    figure.legend(loc="outside upper center", ncols=3)
    with atomic_write(path) as file:
        figure.savefig(file, format="png")


if __name__ == "__main__":
    run_script(main)
