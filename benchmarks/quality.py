"""How good does it get in a stated time? Trains on Fashion-MNIST and on the emoji, and measures.

    python -m benchmarks.quality

Through train.py, predict.py and utils.evaluate, as a user would. Loss curves, Frechet distances
(features of a classifier that is trained on the same data), bits per dimension, sample grids, times
and hardware go to benchmarks/results/. The same command resumes where it was stopped; other data or
variants with otherwise equal settings are added to the table.
"""

import json
import re
import shutil
from dataclasses import asdict, replace

import predict
import train
from benchmarks.runs import (
    DATA,
    RESULTS,
    VAL_SPLIT,
    WORK,
    list_images,
    network_options,
    run_project,
    stop_with_children,
    trained,
    write_json,
)
from benchmarks.timing import machine, markdown, read_names, write_page
from nets.samplers import DEFAULT_STEPS
from utils.device import choose_device, choose_precision
from utils.errors import run_script
from utils.files import atomic_write
from utils.settings import flag, number, parse, settings, text, whole

VARIANTS = {  # train.py's options of each
    "eps": {},
    "v": {"prediction": "v"},
    "eps+min_snr": {"loss_weighting": "min_snr"},
    "v+min_snr": {"prediction": "v", "loss_weighting": "min_snr"},
}
SAMPLER = predict.Config.sampler
EMA_START = train.Config.ema_start
WEIGHTS = {"ema": True, "last": False}  # name in the table -> use_ema
WAYS = ("data", "variants", "weights", "data_root", "name", "device")  # settings that change no row of the table


# fmt: off
@settings
class Config:
    # What is trained
    data: str = ",".join(DATA)        # datasets, with commas between
    variants: str = "eps"             # a training of each: eps, v, eps+min_snr and v+min_snr, with commas between
    weights: str = ",".join(WEIGHTS)  # which are measured: ema, last, with commas between
    minutes: float = 20.0             # time of each training
    epochs: int = 0                   # epochs instead; 0: as many as fit into the minutes
    size: int = 0                     # height and width of the images; 0: 32 on a GPU, 16 elsewhere
    channel: int = 0                  # width of the first level; 0: 128 on a GPU, 32 elsewhere
    class_conditional: bool = False   # learn the classes; samples then have the classes' frequencies
    data_root: str = ""               # a torchvision root with FashionMNIST/raw; "": fetched

    # What is measured
    samples: int = 0                  # for the distances; 0: 10,000 on a GPU, 2,000 elsewhere
    bits_images: int = 0              # held-out images for the bits per dimension; 0: 1,000 on a GPU, 100 elsewhere

    # Machine and output
    device: str = "auto"              # auto, cuda, mps or cpu
    name: str = ""                    # of the files in benchmarks/results; "": the device's
# fmt: on


SETTINGS = {
    "data": text(),
    "variants": text(),
    "weights": text(),
    "minutes": number(0),
    "epochs": whole(0),
    "size": whole(0, 2**14),
    "channel": whole(0, 2**16),
    "class_conditional": flag(),
    "data_root": text(),
    "samples": whole(2, 10**7, 0),
    "bits_images": whole(0),
    "device": text(),
    "name": text(),
}


def main(arguments=None):
    config = parse(Config, SETTINGS, __doc__, arguments)
    for name, known in (("data", DATA), ("variants", VARIANTS), ("weights", WEIGHTS)):
        read_names(name, getattr(config, name), known)
    device = choose_device(config.device)
    gpu = device.type == "cuda"
    config = replace(
        config,
        samples=config.samples or (10_000 if gpu else 2000),
        bits_images=config.bits_images or (1000 if gpu else 100),
        name=config.name or device.type,
    )
    stop_with_children()
    path = RESULTS / f"quality_{config.name}.json"
    report = opened(path, config)
    report["machine"] = machine(device, choose_precision("auto", device), "wall")
    for data in config.data.split(","):
        annotation = list_images(data, WORK, config.data_root)
        for variant in config.variants.split(","):
            key = f"{data}/{variant}"
            report["runs"][key] = measured(config, device, data, variant, annotation, path)
            store(report, path)
    print("\n" + as_text(report))
    print(f"\nwritten: {path}, .md and .png")


def opened(path, config):
    """The report to add to: what another name, or the same settings, measured before.

    A new one where settings differ.
    """
    settings = {name: value for name, value in asdict(config).items() if name not in WAYS}
    try:
        report = json.loads(path.read_text("utf-8"))
        if report["settings"] == settings:
            return report
        print(f"{path} is of other settings: it is replaced")
    except FileNotFoundError:
        pass
    return {"settings": settings, "runs": {}}


def measured(config, device, data, variant, annotation, path):
    """One training and all that is measured of it: {training, grid, weights: {name: {...}}}."""
    options = {
        **network_options(device, config.size, config.channel),
        **VARIANTS[variant],
        "img_channels": DATA[data],
        "val_split": VAL_SPLIT,
        "device": device.type,
        **({"class_conditional": True} if config.class_conditional else {}),
    }
    checkpoint, training = trained(WORK / data / variant, annotation, options, config.minutes, config.epochs)
    grid = path.with_name(f"{path.stem}_{data}_{variant}.png")
    sample_grid(checkpoint, device, grid)
    found = {name: evaluated(config, device, checkpoint, annotation, name) for name in config.weights.split(",")}
    return {"training": training, "grid": grid.name, "weights": found}


def sample_grid(checkpoint, device, path):
    """predict.py's grid from seed 0, as a file of the results."""
    folder = checkpoint.parent / "predict_out"
    run_project(
        "predict.py",
        {"model_path": str(checkpoint), "seed": 0, "save_dir": str(folder), "device": device.type},
        checkpoint.parent,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(folder / "predict_5x5_results.png", path)


def evaluated(config, device, checkpoint, annotation, name):
    """utils.evaluate's distances, and bits per dimension for the EMA weights."""
    folder = checkpoint.parent / f"evaluate_{name}_{SAMPLER}_{config.samples}_{config.bits_images}"
    found = folder / "evaluate_results.json"
    if not found.is_file():
        options = {
            "samples": str(checkpoint),
            "reference": str(annotation),
            "num_images": config.samples,
            "features": "classifier",
            "nearest": name == "ema",
            "nearest_images": min(config.samples, 1000),
            "bits": name == "ema",
            "bits_images": config.bits_images,
            "use_ema": WEIGHTS[name],
            "save_dir": str(folder),
            "device": device.type,
            "batch_size": 500 if device.type == "cuda" else 100,
            "sampler": SAMPLER,
        }
        run_project("utils.evaluate", options, checkpoint.parent)
    results = json.loads(found.read_text("utf-8"))
    results["distances"]["features"] = re.sub(r", [^,]*\.pth$", "", results["distances"]["features"])
    nearest = {name: value for name, value in results.get("nearest", {}).items() if name != "pairs"}
    kept = ("distances", "bits", "num_samples", "num_reference", "minutes")
    return {**{name: results[name] for name in kept if name in results}, "nearest": nearest}


# The report


def store(report, path):
    """JSON, table and curves."""
    write_json(path, report)
    write_page(path, as_text(report))
    plot(report, path.with_suffix(".png"))


def as_text(report):
    """The report for people, in Markdown."""
    on, settings = report["machine"], report["settings"]
    versions = ", ".join(
        f"{name} {value}" for name, value in on["versions"].items() if name in ("torch", "torchvision")
    )
    given = f"{settings['epochs']} epochs" if settings["epochs"] else f"{settings['minutes']:g} minutes"
    lines = [
        f"{on['gpu'] or on['cpu']}, {on['threads']} of {on['cores']} cores, load {on['load']:.1f}, {on['precision']}; "
        f"{versions}. "
        f"{given} of training each, {settings['samples']:,} samples by predict.py's default solver ({SAMPLER}, "
        f"{DEFAULT_STEPS} steps).",
        table(report),
        "\n".join(notes(report)),
    ]
    return "\n\n".join(lines)


COLUMNS = (
    "data",
    "variant",
    "weights",
    "Frechet distance",
    "kernel distance x 1000",
    "precision",
    "recall",
    "bits/dim",
    "held-out loss",
    "steps",
    "minutes",
)


def table(report):
    """A line for each training and kind of weights."""
    lines = []
    for key, run in report["runs"].items():
        training, (data, variant) = run["training"], key.split("/")
        validation = training["history"][-1]["val_loss"]
        for name, found in run["weights"].items():
            distances, bits = found["distances"], found.get("bits")
            lines.append(
                (
                    data,
                    variant,
                    name,
                    f"{distances['frechet_distance']:.3f}",
                    f"{1000 * distances['kernel_distance']:.2f} ± {1000 * distances['kernel_distance_std']:.2f}",
                    f"{distances['precision']:.3f}",
                    f"{distances['recall']:.3f}",
                    bits_of(bits) if bits else "",
                    f"{validation:.4f}" if name == "ema" else "",
                    f"{training['steps']:,}",
                    f"{training['minutes']:.1f}",
                )
            )
    note = "Losses are comparable only within a variant, as each weights the timesteps differently."
    return markdown(COLUMNS, lines) + "\n\n" + note


def bits_of(bits):
    error = f" ± {bits['standard_error']:.3f}" if bits["standard_error"] else ""
    return f"{bits['bits_per_dimension']:.3f}{error}"


def notes(report):
    """What was learned and how, a line for each training.

    How close the samples are to the training images.
    """
    for key, run in report["runs"].items():
        training, found = run["training"], next(iter(run["weights"].values()))
        yield (
            f"- {key}: {training['epochs']} epochs, {training['images_per_second']:,.0f} images/s; "
            f"{found['num_reference']:,} reference "
            f"images, {found['distances']['features']}. `{training['command']}` ![{key}]({run['grid']})"
        )
        if "copies" in (near := found["nearest"]):  # reports of older versions lack it
            interval, chance = f"{near['copies_low']:.1%} to {near['copies_high']:.1%}", near["other_copies"]
            yield f"  {near['copies']:.1%} of the samples are copies ({interval}), and {chance:.1%} of held-out images."
        if training["steps"] <= EMA_START:
            yield f"  The EMA starts at step {EMA_START:,}, so here it equals the last weights."


def plot(report, path):
    """Training and validation loss over steps, a panel for each dataset and variant."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        print("no plot: pip install matplotlib")
        return
    columns = min(len(report["runs"]), 4)
    rows = -(-len(report["runs"]) // columns)
    figure = Figure(figsize=(4.5 * columns, 3.4 * rows), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    for place, (key, run) in zip(figure.subplots(rows, columns, squeeze=False).flat, report["runs"].items()):
        history = run["training"]["history"]
        for name, label in (("loss", "training, dropout on"), ("val_loss", "held out, EMA")):
            steps, values = [row["step"] for row in history], [row[name] for row in history]
            place.plot(steps, values, label=label, marker="." if len(history) < 20 else "")
        place.set(title=key, xlabel="step", ylabel="loss", yscale="log")
        place.grid(True, which="both", alpha=0.2)
        place.legend(fontsize=8)
    with atomic_write(path) as file:
        figure.savefig(file, format="png")


if __name__ == "__main__":
    run_script(main)
