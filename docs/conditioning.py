"""The figures and numbers of docs/conditioning.md.

    python -m docs.conditioning --folder results/conditioning
    python -m docs.conditioning --run logs/<run>

The first trains conditions on the bundled emoji and makes their figures. The second measures a
low_res run on the images that its val_split held out, and makes its figure.
"""

import os
import time
from pathlib import Path

import torch

import train
import txt_annotation
from docs.figures import CPU, IMAGES, SIZE, WEIGHTS, panels
from nets import build
from nets.condition import luminance
from utils.checkpoint.file import load_checkpoint
from utils.checkpoint.runs import newest_in, newest_weights
from utils.data.dataset import conditioned, open_dataset, split_validation
from utils.data.image_format import ImageFormat
from utils.errors import run_script
from utils.evaluate.classifier import train_feature_net
from utils.evaluate.distances import frechet_distance
from utils.evaluate.features import Extractor, collect
from utils.images import to_uint8
from utils.settings import parse, settings, text

# The first two start from the bundled checkpoint; a small network learns low_res from scratch.
FINE_TUNED = {"start_from": WEIGHTS, "preset": "small", "init_lr": 5e-4, "ema_decay": 0.97, "ema_start": 20}
FINE_TUNED |= {"input_shape": SIZE, "batch_size": 16, "epochs": 1}
SMALL = {"preset": "quick", "channel": 16, "channel_mults": "1,2,4", "attention_resolutions": "()"}
TRAININGS = {
    "gray": FINE_TUNED,
    "masked": FINE_TUNED,
    "low_res": {**SMALL, "input_shape": "64,64", "batch_size": 8, "epochs": 8},
}
SHARED = {"label_dropout": 0, "val_split": 0.1, "preview_period": 0}
SHOWN, TRIES = 7, 3  # emoji in a figure, samples of each
MEASURED, AVERAGED, MEAN_OF, TRAINED = 500, 100, 8, 10_000  # images of the numbers
STEPS = 10  # of the sampler: a condition leaves little to decide


def load(path):
    """(GaussianDiffusion, training images, held-out images) of a run's checkpoint."""
    checkpoint = load_checkpoint(path)
    image_format = ImageFormat.from_config(checkpoint.config)
    images = open_dataset(checkpoint.config["annotation_path"], image_format)
    return build.from_checkpoint(checkpoint)[0], *split_validation(images, checkpoint.config["val_split"])


def sample(diffusion, cond, first_seed=0, size=100):
    """An image for each condition."""
    parts = []
    for start in range(0, len(cond), size):
        part = cond[start : start + size]
        seeds = range(first_seed + start, first_seed + start + len(part))
        parts.append(diffusion.sample(len(part), CPU, cond=part, sampler="sde-dpm++", steps=STEPS, seeds=seeds))
    return torch.cat(parts)


def show(name, x, cond, samples):
    """docs/figures/conditioning_<name>.png: conditions, samples of each, originals."""
    rows = [cond[:, : x.shape[1]].expand_as(x), *samples, x]
    rows = [row.expand(-1, 3, -1, -1) for row in rows]
    panels(f"conditioning_{name}", rows, ["condition", *["sample"] * TRIES, "original"], [""] * SHOWN, 256)


def figure(kind):
    """Trains a condition on the emoji -> docs/figures/conditioning_<kind>.png and its numbers."""
    began = time.process_time()
    options = {**SHARED, **TRAININGS[kind], "condition": kind}
    train.main([f"--{name}={value}" for name, value in options.items()])
    seconds = time.process_time() - began
    diffusion, _, held_out = load(newest_weights()[0])
    x, cond = conditioned(diffusion, held_out, held_out.shuffled(SHOWN, seed=2))
    samples = [sample(diffusion, cond, 100 * number) for number in range(TRIES)]
    show(kind, x, cond, samples)
    print(f"{kind}: {seconds:.0f} seconds of training (CPU time)")
    if kind == "gray":
        levels = 127.5 * (torch.cat([luminance(each) for each in samples]) - cond.repeat(TRIES, 1, 1, 1)).abs().mean()
        spread = 127.5 * torch.stack(samples).std(0).mean()
        print(f"luminance off by {levels:.2f} levels on average; {spread:.1f} levels between samples")
    if kind == "masked":
        known = cond[:, 3:].expand_as(x) > 0.5
        differing = sum(int((to_uint8(each) != to_uint8(x))[to_uint8(known * 2.0 - 1) > 0].sum()) for each in samples)
        print(f"{differing} known values differ, of {TRIES * int(known.sum()):,}")


def psnr(images, x):
    """Peak signal-to-noise ratio in dB, the mean over the images."""
    return (10 * torch.log10(4 / (images.clamp(-1, 1) - x).square().flatten(1).mean(1))).mean().item()


def measure(run):
    """Prints the Frechet distance of one sample each and the PSNR of their mean, and bicubic's."""
    diffusion, images, held_out = load(newest_in(Path(run)))
    chosen = images.shuffled(TRAINED, seed=0)
    parts = (
        (part.images(numbers), part.labels[numbers]) for part, numbers in ((images, chosen), (held_out, range(1000)))
    )
    net = Extractor(train_feature_net(*parts, len(images.classes), epochs=3), "", CPU)
    x, cond = conditioned(diffusion, held_out, held_out.shuffled(MEASURED, seed=0))
    samples = sample(diffusion, cond)
    known, bicubic, ours = (collect([torch.from_numpy(to_uint8(part))], net).statistics for part in (x, cond, samples))
    show("fashion", x[:SHOWN], cond[:SHOWN], [sample(diffusion, cond[:SHOWN], 100 * number) for number in range(TRIES)])
    print(f"Frechet distance of {MEASURED}: bicubic {frechet_distance(bicubic, known):.2f}, ", end="")
    print(f"samples {frechet_distance(ours, known):.2f}")
    x, cond = x[:AVERAGED], cond[:AVERAGED]
    mean = torch.stack([sample(diffusion, cond, 10_000 * number) for number in range(1, MEAN_OF + 1)]).mean(0)
    print(f"PSNR: bicubic {psnr(cond, x):.2f} dB, one sample {psnr(samples[:AVERAGED], x):.2f} dB, ", end="")
    print(f"mean of {MEAN_OF} samples {psnr(mean, x):.2f} dB ({AVERAGED} images)")


@settings
class Config:
    folder: str = "results/conditioning"  # where the runs on the emoji are written
    kinds: str = "gray,masked"  # their conditions; low_res takes seven times as long
    run: str = ""  # measure this low_res run instead


SETTINGS = dict.fromkeys(("folder", "kinds", "run"), text())


def main(arguments=None):
    config = parse(Config, SETTINGS, __doc__, arguments)
    torch.set_num_threads(1)
    if config.run:
        measure(config.run)
        return
    Path(config.folder).mkdir(parents=True, exist_ok=True)
    os.chdir(config.folder)
    txt_annotation.main(["--datasets_path", str(IMAGES)])
    for kind in config.kinds.split(","):
        figure(kind)


if __name__ == "__main__":
    run_script(main)
