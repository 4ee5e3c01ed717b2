"""How good is it? Compares a checkpoint's pictures, or a folder of them, with real ones. Every setting below is also an option.

python -m utils.evaluate --samples logs/<run> --features classifier --num_images 10000 --bits True
"""

import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from nets import GaussianDiffusion, build
from nets.diffusion import check_choice
from nets.samplers import DEFAULT_STEPS, SAMPLERS, SPACINGS
from utils.checkpoint import epoch_files, find_weights, load_checkpoint, weights_digest
from utils.config import check_values, parse_config
from utils.data.annotation import printable
from utils.data.dataset import normalise, split_validation
from utils.device import autocast, choose_device, choose_precision, describe_device, memory_format
from utils.errors import run_script
from utils.evaluate.distances import kernel_distance, nearest, precision_and_recall, statistics_distance
from utils.evaluate.features import FeatureCache, collect, load_extractor, with_progress
from utils.evaluate.image_sets import natural_shape, open_pictures
from utils.evaluate.likelihood import variational_bound
from utils.files import atomic_write
from utils.images import make_grid, save_png, to_uint8

ENOUGH = 10_000       # samples below which a Frechet distance is biased upwards by more than its differences matter
K = 3                 # neighbours of precision and recall, as in the paper
QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75)
PAIRS, COLUMNS = 20, 5  # of nearest pictures: so many of the closest, and so many spread over the rest


@dataclass
class Config:
    # Pictures
    samples: str = ""                             # a folder, list or .npz of pictures, or a checkpoint to draw from; "": the newest run
    reference: str = "train_lines.txt"            # a folder, list or .npz: the pictures that were to be learned
    held_out: str = ""                            # a folder, list or .npz of pictures not trained on; "": those that val_split kept aside
    num_images: int = 0                           # samples; 0: all there are, of a checkpoint 10,000 (nearest_images without distances)
    input_shape: tuple[int, int] | None = None    # height and width to compare at; None: the samples'
    img_channels: int = 0                         # 3 colour, 1 grey; 0: the samples'
    resize_mode: Literal["", "crop", "stretch", "pad"] = ""  # how other shapes are made to fit; "": as in training
    background: tuple[int, int, int] | None = None  # what shows through where a picture is transparent; None: as in training
    icc: bool | None = None                       # convert embedded colour profiles to sRGB; None: as in training

    # Measures
    distances: bool = True                        # Frechet distance (FID), kernel distance (KID), precision and recall
    features: str = "inception"                   # inception, classifier (trained on the reference's classes) or the file of one
    inception_weights: str = ""                   # a file with the Inception weights; "": downloaded once
    max_features: int = 10_000                    # pictures a side that kernel distance, precision and recall look at
    nearest: bool = True                          # the reference's nearest picture to each sample: is it a copy?
    nearest_images: int = 1000                    # samples, and held-out pictures, that the nearest is sought for
    nearest_by: Literal["pixels", "features"] = "pixels"  # distance between what
    bits: bool = False                            # bits per dimension of held-out pictures (a checkpoint's; T network calls a picture)
    bits_images: int = 1000                       # of so many of them; 0: all

    # Drawing from a checkpoint
    sampler: str = "sde-dpm++"                    # sde-dpm++, dpm++, ddpm, ddim or heun
    steps: int = 0                                # steps of the solver; 0: 25, for ddpm all that the model was trained with
    spacing: str = ""                             # uniform, trailing or logsnr; "": what suits the sampler
    eta: float = 0.0                              # ddim's share of fresh noise, 0 to 1
    guidance_scale: float = 1.0                   # above 1: more typical of its class, less varied
    seed: int = 0                                 # of the first sample, of subsets, and of the noise in the bits
    use_ema: bool = True                          # the averaged weights; False: the last ones

    # Output and machine
    save_dir: str = "results/evaluate_out"        # where the table (JSON) and the picture of pairs are written
    cache_dir: str = ""                           # where decoded pictures, statistics and classifiers are kept; "": datasets/.cache
    batch_size: int = 100                         # samples drawn, or pictures measured, at once: lower it if memory runs out
    device: str = "auto"                          # auto, cuda, mps or cpu
    precision: str = "auto"                       # auto, fp32, bf16 or fp16, of the diffusion network; features are fp32


class Model(NamedTuple):
    """A checkpoint to draw from."""

    diffusion: GaussianDiffusion
    classes: list
    config: dict  # train.py's settings, {} for a bare state dict
    name: str


def main():
    config = parse_config(Config, __doc__)
    check(config)
    start = time.time()
    device = choose_device(config.device)
    precision = choose_precision(config.precision, device)
    model = load_model(config, device, precision) if is_checkpoint(config.samples) else None
    print(f"{describe_device(device)}, precision {precision}")
    reference, held_out = open_sides(config, model)
    count, blocks, what = open_samples(config, model, reference, device, precision)
    say("samples", what)
    say("reference", f"{len(reference):,} pictures, {reference.name}")
    say("held out", f"{len(held_out):,} pictures, {held_out.name}" if held_out else "none: name them with --held_out")
    results = {"settings": asdict(config), "weights": digest_of(config, model), "samples": what, "num_samples": count,
               "reference": reference.name, "num_reference": len(reference), "held_out": held_out.name if held_out else None}
    cache, extractor = FeatureCache(config.cache_dir, config.reference), None
    if config.distances or (config.nearest and config.nearest_by == "features"):
        extractor = load_extractor(config.features, reference, cache, device, config.batch_size, config.inception_weights)
        say("features", extractor.name)
    if config.distances or config.nearest:
        sampled = collect(with_progress(blocks, count, "samples"), extractor, config.max_features, config.nearest_images)
    if config.distances:
        results["distances"] = measure_distances(config, sampled, cache.collected(reference, extractor, config.max_features), extractor)
    if config.nearest:
        results["nearest"] = measure_nearest(config, sampled, reference, held_out, extractor)
    if config.bits:
        results["bits"] = measure_bits(config, model, held_out, device, precision)
    results["minutes"] = (time.time() - start) / 60
    path = Path(config.save_dir) / "evaluate_results.json"
    with atomic_write(path, "w", encoding="utf-8") as file:
        json.dump(results, file, indent=1)
    print(path.resolve())


def check(config):
    """Refuse now what would fail later: ValueError for a setting out of range or unknown, or settings that do not go together."""
    check_values(
        config, num_images=(0, None), max_features=(K + 2, None), nearest_images=(1, None), bits_images=(0, None), steps=(0, None),
        eta=(0, 1), seed=(0, 2**62), batch_size=(1, None),
    )  # fmt: skip
    check_choice("img_channels", config.img_channels, (0, 1, 3))
    check_choice("sampler", config.sampler, SAMPLERS)
    if config.eta and config.sampler != "ddim":
        raise ValueError("--eta is an option of ddim: add --sampler ddim, or leave it out")
    if config.spacing:
        check_choice("spacing", config.spacing, SPACINGS)
    if config.bits and not is_checkpoint(config.samples):
        raise ValueError(f"--bits needs the model itself: {config.samples} holds pictures; name a checkpoint with --samples")


def say(name, text):
    print(f"{name:<24}{text}")


# What is compared


def is_checkpoint(path):
    """Whether `path` is a file of weights, a run's folder, or "" (the newest run)."""
    path = Path(path) if path else None
    return path is None or path.suffix in (".pth", ".pt") or (path.is_dir() and bool((path / "last.pth").is_file() or epoch_files(path)))


def load_model(config, device, precision):
    """The Model of config.samples, on the device."""
    path, remark = find_weights(config.samples)
    checkpoint = load_checkpoint(path, lazily=True)
    print(f"weights: {path.resolve()}{remark}")
    overrides = {"input_shape": config.input_shape} if config.input_shape else {}
    if checkpoint["config"]:
        diffusion = build.from_config({**checkpoint["config"], **overrides}, len(checkpoint["classes"]))
        build.load_weights(diffusion, checkpoint["weights"], checkpoint["weights_kind"])
    else:
        diffusion = build.from_weights(checkpoint["weights"], **overrides)
    if config.img_channels not in (0, diffusion.img_channels):
        raise ValueError(f"--img_channels {config.img_channels}: the checkpoint draws pictures of {diffusion.img_channels}")
    if config.guidance_scale != 1 and diffusion.null_class is None:
        raise ValueError("--guidance_scale needs a model with a null class: train with --class_conditional True and label_dropout above 0")
    diffusion = diffusion.eval().to(device=device, memory_format=memory_format(device, precision))
    named = 0 if diffusion.num_classes is None else diffusion.num_classes - (diffusion.null_class is not None)
    classes = (checkpoint["classes"] or [str(number) for number in range(named)]) if named else []
    return Model(diffusion, classes, checkpoint["config"], str(path.resolve()))


def digest_of(config, model):
    """A short digest of the network that is measured; None where there is none."""
    if model is None:
        return None
    return weights_digest((model.diffusion.ema_model if config.use_ema else model.diffusion.model).state_dict())


def open_sides(config, model):
    """(reference, held-out pictures or None), of the size and colours at which all is compared."""
    reference, held_out = opener(config, model)(config.reference), None
    if config.held_out:
        held_out = opener(config, model)(config.held_out)
    elif share := kept_aside(config, model):
        train, aside = split_validation(reference.hashes, share)
        reference, held_out = reference.part(train, f", without val_split {share:g}"), reference.part(aside, f", val_split {share:g}")
    if config.bits and held_out is None:
        raise ValueError("--bits measures pictures that were not trained on: name them with --held_out, or train with --val_split 0.05")
    copies = len(set(held_out.hashes) & set(reference.hashes)) if held_out else 0
    if copies:
        print(f"warning: {copies:,} of the held-out pictures are among the reference's: what is said of them is not about unseen pictures")
    return reference, held_out


def opener(config, model):
    """The function that opens pictures, decoded like the training's where a checkpoint says how."""
    trained = model.config if model else {}
    if model:
        shape = (*model.diffusion.img_size, model.diffusion.img_channels)
    else:
        height, width, channels = natural_shape(config.samples)
        shape = (*(config.input_shape or (height, width)), config.img_channels or channels)
    resize_mode = config.resize_mode or trained.get("resize_mode", "crop")
    background = config.background or tuple(trained.get("background", (255, 255, 255)))
    icc = trained.get("icc", True) if config.icc is None else config.icc
    return lambda path: open_pictures(path, shape, resize_mode, background, config.cache_dir or None, icc)


def kept_aside(config, model):
    """The share of the reference that was kept aside in training: 0 where the reference is not what the run was trained on."""
    trained = model.config if model else {}
    same = "annotation_path" in trained and Path(trained["annotation_path"]).resolve() == Path(config.reference).resolve()
    return trained.get("val_split", 0) if same else 0


def open_samples(config, model, reference, device, precision):
    """(count, their blocks (b, H, W, C) uint8, what they are): drawn as they are asked for, or read in random order."""
    if model is None:
        samples = opener(config, model)(config.samples)
        order = samples.shuffled(config.num_images, config.seed)
        count, blocks, what = len(order), samples.blocks(order), f"{len(order):,} pictures, {samples.name}"
    else:
        needed = ENOUGH if config.distances else config.nearest_images if config.nearest else 0
        count, T = config.num_images or needed, model.diffusion.num_timesteps
        labels = labels_like(reference, model, config.seed)
        steps = config.steps or (T if config.sampler == "ddpm" else min(DEFAULT_STEPS, T))
        blocks = drawn(config, model.diffusion, steps, labels, count, device, precision)
        guidance = f", guidance {config.guidance_scale:g}" if labels is not None else ""
        what = f"{count:,} drawn, {config.sampler}, {steps} steps{guidance}, seeds from {config.seed}, {model.name}"
    if count < config.num_images:
        print(f"warning: there are {count:,} samples, fewer than the {config.num_images:,} asked for")
    if config.distances and count < ENOUGH:
        print(f"warning: {count:,} samples are few: below {ENOUGH:,} a Frechet distance is too high, and only compares with one of as many")
    return count, blocks, what


def labels_like(reference, model, seed):
    """Class ids in the shares that the reference has, where its classes are the model's, else all alike; None without classes."""
    if not model.classes:
        return None
    generator = torch.Generator().manual_seed(seed)
    if reference.classes == model.classes:
        return reference.labels[torch.randperm(len(reference), generator=generator)]
    return torch.arange(len(model.classes))


def drawn(config, diffusion, steps, labels, count, device, precision):
    """Samples in batches of one size, as predict.py draws them: sample i is the one of seed + i."""
    options = {"eta": config.eta} if config.sampler == "ddim" else {}
    for first in range(0, count, config.batch_size):
        numbers = torch.arange(first, first + config.batch_size)
        y = None if labels is None else labels[numbers % len(labels)].to(device)
        with autocast(device, precision):
            x = diffusion.sample(
                config.batch_size, device, y, config.use_ema, sampler=config.sampler, steps=steps, spacing=config.spacing or None,
                seeds=(config.seed + numbers).tolist(), guidance_scale=config.guidance_scale, **options,
            )  # fmt: skip
        yield torch.from_numpy(to_uint8(x)[: count - first])


# Measures


def measure_distances(config, sampled, known, extractor):
    """Frechet distance, kernel distance, precision and recall of two Collected, printed and as a dict."""
    frechet = statistics_distance(sampled.statistics, known.statistics)
    kernel, spread = kernel_distance(sampled.features, known.features, seed=config.seed)
    precision, recall = precision_and_recall(sampled.features, known.features, K)
    name = "FID" if config.features == "inception" else "Frechet distance"
    counts = f"{len(sampled.features):,} against {len(known.features):,}"
    say(name, f"{frechet:.4f}   ({sampled.statistics.count:,} against {known.statistics.count:,})")
    say("KID x 1000" if name == "FID" else "kernel distance x 1000", f"{1000 * kernel:.3f} +- {1000 * spread:.3f}   ({counts})")
    say("precision, recall", f"{precision:.3f}, {recall:.3f}   (k = {K}, {counts})")
    return {"features": extractor.name, "features_digest": extractor.key, "frechet_distance": frechet, "kernel_distance": kernel,
            "kernel_distance_std": spread, "precision": precision, "recall": recall, "k": K, "kept_features": len(sampled.features)}


def measure_nearest(config, sampled, reference, held_out, extractor):
    """The nearest reference pictures: distances beside those of pictures that cannot be copies, and the picture of pairs."""
    by_features = config.nearest_by == "features"

    def describe(images):
        return extractor(images) if by_features else images.flatten(1)

    def search(images, k=1):
        distances, found = nearest(describe(images), map(describe, with_progress(reference.blocks(), len(reference), "nearest")), k)
        # Pixels: root mean square in levels of 0 to 255, which does not depend on the size.
        return distances[:, -1] / (1 if by_features else math.sqrt(images[0].numel())), found[:, -1]

    distances, found = search(sampled.pictures)
    if held_out:
        others, _ = search(held_out.take(held_out.shuffled(config.nearest_images, config.seed)))
        whose = "held-out"
    else:  # the second nearest: the nearest is the picture itself
        others, _ = search(reference.take(reference.shuffled(config.nearest_images, config.seed)), 2)
        whose = "reference, to its others"
    quantiles = {name: torch.quantile(values, torch.tensor(QUANTILES).double()).tolist()
                 for name, values in (("samples", distances), (whose, others))}
    closer = (distances < quantiles[whose][0]).double().mean().item()
    say("nearest, in " + ("features" if by_features else "levels"), "  ".join(f"{quantile:>7.0%}" for quantile in QUANTILES))
    for name, values in quantiles.items():
        say("  " + name, "  ".join(f"{value:7.3f}" for value in values))
    say("  very close", f"{closer:.1%} of the samples are closer than the 1 % quantile of the other pictures; chance gives 1 %")
    order = distances.argsort().tolist()
    rest = order[PAIRS:]
    shown = order[:PAIRS] + [rest[i] for i in np.linspace(0, len(rest) - 1, min(PAIRS, len(rest))).astype(int)]
    path = Path(config.save_dir) / "evaluate_nearest_results.png"
    pairs = np.concatenate((sampled.pictures[shown].numpy(), reference.take(found[shown].numpy()).numpy()), axis=2)
    save_png(path, make_grid(pairs, COLUMNS, padding=4))
    print(f"{path.resolve()}: sample and nearest picture; the {min(PAIRS, len(order))} closest pairs first, then ever farther ones")
    pairs = [{"sample": i, "distance": distances[i].item(), "reference": printable(reference.paths[found[i]])} for i in shown]
    return {"by": config.nearest_by, "quantiles": QUANTILES, **quantiles, "share_closer_than_first_quantile": closer, "pairs": pairs,
            "num_samples": len(distances), "num_others": len(others)}


def measure_bits(config, model, held_out, device, precision):
    """Bits per dimension of held-out pictures, term by term, printed and as a dict."""
    diffusion, order = model.diffusion, held_out.shuffled(config.bits_images, config.seed)
    labels = labels_of(held_out, model)
    generator = torch.Generator(device).manual_seed(config.seed)
    terms = []
    for rows in tqdm(torch.from_numpy(order).split(config.batch_size), desc="bits", leave=False):
        y = None if labels is None else labels[rows].to(device)
        with autocast(device, precision):
            denoise = diffusion.denoiser(y, config.use_ema)
            terms.append(variational_bound(denoise, diffusion.alpha_bars, normalise(held_out.take(rows), device), generator))
    terms = torch.cat(terms)
    total, curve = terms.sum(1), terms.mean(0)
    error = (total.std() / math.sqrt(len(total))).item() if len(total) > 1 else float("nan")
    say("bits per dimension", f"{total.mean():.4f} +- {error:.4f}   (at most; {len(total):,} held-out pictures, T = {len(curve) - 1})")
    say("  L_0, L_1..T-1, L_T", f"{curve[0]:.4f}, {curve[1:-1].sum():.4f}, {curve[-1]:.6f}")
    return {"bits_per_dimension": total.mean().item(), "standard_error": None if math.isnan(error) else error, "num_images": len(total),
            "L_0": curve[0].item(), "L_between": curve[1:-1].sum().item(), "L_T": curve[-1].item(), "terms": curve.tolist(),
            "precision": precision}


def labels_of(pictures, model):
    """The class ids of held-out pictures (N,); None for a network without classes, or where its null class must do."""
    if not model.classes:
        return None
    if pictures.classes == model.classes:
        return pictures.labels
    if model.diffusion.null_class is None:
        raise ValueError(f"--bits: the model needs the classes {', '.join(model.classes[:5])} ..., and the held-out pictures are not "
                         "sorted into folders of these names")
    return None


if __name__ == "__main__":
    run_script(main)
