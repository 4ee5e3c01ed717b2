"""Compares samples of a checkpoint, or of a folder, with real images: FID, KID, copies, bits.

python -m utils.evaluate --samples logs/<run> --features classifier --num_images 10000 --bits True
"""

import json
import time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from nets import GaussianDiffusion, SamplingOptions, build
from nets.samplers import SAMPLERS, SEEDS, SPACINGS
from nets.sampling import check_guiding_model, check_interval, sampling_schedule
from utils.checkpoint.file import Checkpoint
from utils.checkpoint.integrity import weights_digest
from utils.checkpoint.runs import ENDINGS, newest_in, open_weights
from utils.cpu_threads import NUM_THREADS
from utils.data.dataset import conditioned, split_validation
from utils.data.image_format import RESIZE_MODES, ImageFormat
from utils.device import DTYPES, autocast, choose_device, choose_precision, describe_device, memory_format
from utils.errors import UserError, run_script
from utils.evaluate.features import FeatureCache, collect, load_extractor, with_progress
from utils.evaluate.image_sets import different_images, open_images, scan_sizes
from utils.evaluate.measures import NEIGHBORS, measure_bits, measure_distances, measure_nearest, print_line
from utils.files import atomic_write, output_folder
from utils.images import to_uint8
from utils.sampling.batches import choose_threads, last_images, sample_batches
from utils.sampling.option_rules import check_guidance
from utils.sampling.summary import describe_guidance
from utils.settings import PAIR, choice, flag, number, parse, pathname, settings, text, whole
from utils.terminal import plural

ENOUGH = 10_000  # below so many samples FID's upward bias is larger than the differences of interest


# fmt: off
@settings
class Config:
    # Images
    samples: str = ""                             # a folder, annotation file, .npz or checkpoint; "": the newest run
    reference: str = "train_lines.txt"            # a folder, annotation file or .npz: the training images
    held_out: str = ""                            # folder, annotation file or .npz, not trained on; "": from val_split
    num_images: int = 0                           # number of samples; 0: all of them, or 10,000 from a checkpoint
    input_shape: tuple[int, int] | None = None    # height and width to compare at; None: the most frequent of samples
    img_channels: int = 0                         # 3: color, 1: gray, 0: color if any image has color
    resize_mode: str = ""                         # how images of another aspect ratio are fitted; "": as in training
    background: tuple[int, int, int] | None = None  # color of transparent pixels and pad's bars; None: as in training
    icc: bool | None = None                       # convert embedded color profiles to sRGB; None: as in training

    # Measures
    distances: bool = True                        # FID (Frechet distance), KID (kernel distance), precision and recall
    features: str = "inception"                   # inception, classifier (trained on the reference), or its file
    inception_weights: str = ""                   # a file with the Inception weights; "": downloaded once
    max_features: int = 10_000                    # images per set for KID, precision and recall
    nearest: bool = True                          # memorization: find the nearest reference images of the samples
    nearest_images: int = 1000                    # number of samples and held-out images to find neighbors for
    nearest_by: str = "pixels"                    # space of the distances to the nearest images
    bits: bool = False                            # bits per dimension of held-out images (T network evaluations each)
    bits_images: int = 1000                       # number of held-out images for bits per dimension; 0: all

    # Sampling from a checkpoint
    sampler: str = "sde-dpm++"                    # solver
    steps: int = 0                                # sampling steps; 0: 25, ddpm all timesteps
    spacing: str = ""                             # spacing of the timesteps; "": the default of the sampler
    eta: float = 0.0                              # fraction of new noise in ddim; 0: deterministic
    guidance_scale: float = 1.0                   # guidance; above 1: more typical of the class, less diverse
    guidance_interval: tuple[float, float] | None = None  # range of lambda in which guidance acts; None: all steps
    guiding_path: str = ""                        # autoguidance: a weaker checkpoint; "": classifier-free guidance
    seed: int = 0                                 # seed of the first sample, of subsets, and of the noise in the bits
    use_ema: bool = True                          # sample with the EMA weights; False: with the weights without EMA

    # Output and machine
    save_dir: str = "results/evaluate_out"        # folder for the results (JSON) and the image of nearest neighbors
    cache_dir: str = ""                           # folder of caches (images, statistics, ...); "": datasets/.cache
    batch_size: int = 100                         # images per batch: lower it if memory runs out
    device: str = "auto"                          # auto, cuda, cuda:1, mps or cpu
    precision: str = "auto"                       # mixed-precision dtype of the diffusion network; features are fp32
    num_threads: int | str = "auto"               # CPU threads; auto: OMP_NUM_THREADS if set, else the fastest
# fmt: on


PATHS = ("samples", "reference", "held_out", "features", "inception_weights", "guiding_path", "save_dir", "cache_dir")
SETTINGS = {
    **dict.fromkeys(PATHS, pathname()),
    "device": text(),
    **dict.fromkeys(("distances", "nearest", "bits", "use_ema"), flag()),
    **dict.fromkeys(("bits_images", "steps"), whole(0)),
    "num_images": whole(0, SEEDS),
    "input_shape": whole(1, 2**14, None, count=PAIR),
    "img_channels": choice((0, 1, 3)),
    "resize_mode": choice(("", *RESIZE_MODES)),
    "background": whole(0, 255, None, count=range(3, 4)),
    "icc": flag(choices=(None,)),
    "max_features": whole(NEIGHBORS + 2),
    "nearest_images": whole(1),
    "nearest_by": choice(("pixels", "features")),
    "sampler": choice(SAMPLERS),
    "spacing": choice(("", *SPACINGS)),
    "eta": number(0, 1),
    "guidance_scale": number(0, 1000),
    "guidance_interval": number(-1000, 1000, None, count=PAIR),
    "seed": whole(0, SEEDS - 1),
    "batch_size": whole(1, 2**16),
    "precision": choice(("auto", *DTYPES)),
    "num_threads": NUM_THREADS,
}


class Model(NamedTuple):  # that samples
    diffusion: GaussianDiffusion
    classes: list[str]
    checkpoint: Checkpoint
    guide: GaussianDiffusion | None = None  # of --guiding_path


def main(arguments=None):
    config = parse(Config, SETTINGS, __doc__, arguments)
    check_guidance(config)
    if config.eta and config.sampler != "ddim":
        raise UserError("--eta is an option of ddim: add --sampler ddim, or leave it out")
    if config.seed + config.num_images > SEEDS:
        raise UserError(f"{config.num_images} samples from seed {config.seed} on: seeds end at {SEEDS - 1}")
    if (config.bits or config.guidance_scale != 1) and not is_checkpoint(config.samples):
        raise UserError(f"--bits and --guidance_scale need a checkpoint, and {config.samples} holds images")
    with output_folder(config.save_dir, "evaluate_*") as folder:
        config = replace(config, save_dir=str(folder))  # the locked one, wherever a link leads meanwhile
        results, path = evaluate(config), folder / "evaluate_results.json"
        with atomic_write(path, "w", encoding="utf-8") as file:
            json.dump(results, file, indent=1)
        print(path)


def evaluate(config):
    """The dict of all that is measured, and of what was compared."""
    start, device = time.time(), choose_device(config.device)
    precision = choose_precision(config.precision, device)
    model = load_model(config, device, precision) if is_checkpoint(config.samples) else None
    choose_threads(config, model and model.diffusion, device, precision)
    print(f"{describe_device(device)}, precision {precision}")
    open_set, results = make_opener(config, model)
    reference, held_out = open_references(config, model, open_set)
    if model:
        count, blocks, name = generate(config, model, reference, device, precision)
    else:
        dataset = open_set(config.samples)
        order = dataset.shuffled(config.num_images, config.seed)
        count, blocks, name = len(order), dataset.blocks(order), described(dataset, len(order))
    print_line("samples", name)
    results |= {"settings": asdict(config), "samples": name, "num_samples": count}
    for name, part in {"weights": model and model.diffusion, "guiding_weights": model and model.guide}.items():
        results[name] = part and weights_digest(part.network(config.use_ema).state_dict())
    results |= {"reference": reference.name, "num_reference": len(reference), "held_out": held_out and held_out.name}
    if config.distances or config.nearest:
        results |= compare(config, with_progress(blocks, count, "samples"), count, reference, held_out, device)
    if config.bits:
        results["bits"] = measure_bits(config, model, held_out, device, precision)
    return results | {"minutes": (time.time() - start) / 60}


def compare(config, blocks, count, reference, held_out, device):
    """A dict of the distances and nearest images of `count` samples, in blocks (b, H, W, C)."""
    results, cache, extract = {}, FeatureCache(config.cache_dir, config.reference), None
    if config.distances and min(count, len(reference)) < NEIGHBORS + 2:
        counts = f"{plural(count, 'sample')}, {plural(len(reference), 'reference image')}"
        raise UserError(f"too few for distances, which need {NEIGHBORS + 2} of each: {counts}")
    different = different_images(reference) if config.nearest else None
    if config.distances and count < ENOUGH:
        print(f"warning: FID is biased upward below {ENOUGH:,} samples; compare only equal sample counts")
    if config.distances or config.nearest_by == "features":
        extract = load_extractor(config.features, reference, cache, device, config.batch_size, config.inception_weights)
        print_line("features", extract.name)
    sampled = collect(blocks, extract, config.max_features, config.nearest_images)
    if config.distances:
        known = cache.collected(reference, extract, config.max_features)
        results["distances"] = measure_distances(config, sampled, known, extract)
    if config.nearest:
        results["nearest"] = measure_nearest(config, sampled.images, different, held_out, extract)
    return results


def is_checkpoint(path):
    """Whether `path` is a file of weights, a run's folder, or "" (the newest run)."""
    return not path or path.lower().endswith(ENDINGS) or newest_in(Path(path)) is not None


def load_model(config, device, precision):
    """The Model of config.samples, on the device. UserError for settings that it cannot serve."""
    checkpoint = open_weights(config.samples, "weights")
    diffusion, classes = build.from_checkpoint(checkpoint, config.input_shape)
    if config.img_channels not in (0, diffusion.img_channels):
        raise UserError(f"--img_channels {config.img_channels}: the model has images of {diffusion.img_channels}")
    weaker = open_weights(config.guiding_path, "guiding model") if config.guiding_path else None
    guide = weaker and build.guiding_model(weaker, checkpoint, diffusion)
    check_guiding_model(diffusion, config.guidance_scale, guide)
    for part in filter(None, (diffusion, guide)):
        part.to(device=device, memory_format=memory_format(device, precision))
    return Model(diffusion, classes, checkpoint, guide)


def open_references(config, model, open_set):
    """(reference, held-out images), of the samples' size and channels."""
    reference, held_out, trained = open_set(config.reference), None, model.checkpoint.config if model else {}
    listed, share = trained.get("annotation_path"), trained.get("val_split", 0)
    if config.held_out:
        held_out = open_set(config.held_out)
    elif share and listed and Path(listed).resolve() == Path(config.reference).resolve():
        reference, held_out = split_validation(reference, share)  # as the training did
    if config.bits and held_out is None:
        raise UserError("--bits needs images that were not trained on: name some with --held_out")
    print_line("reference", described(reference))
    print_line("held out", described(held_out) if held_out else "none: see --held_out")
    if copies := len(set(held_out.hashes) & set(reference.hashes)) if held_out else 0:
        print(f"warning: held-out results are contaminated: the reference has {plural(copies, 'held-out image')} too")
    return reference, held_out


def described(dataset, count=None):
    """So many images of an ImageDataset, all unless told, and where they are from."""
    return f"{plural(len(dataset) if count is None else count, 'image')}, {dataset.name}"


def make_opener(config, model):
    """(function path -> ImageDataset, decoded as in training; a dict of what the sizes are)."""
    names, condition = None, model.diffusion.condition.kind if model else ""
    if model:
        (height, width), channels = model.diffusion.img_size, model.diffusion.img_channels
    else:  # the most frequent size, and color if any image has it
        sizes, color = scan_sizes(config.samples)
        channels = config.img_channels or (3 if color or scan_sizes(config.reference)[1] else 1)
        height, width = config.input_shape or sizes.most_common(1)[0][0]
        names = {"{}x{}".format(*size): count for size, count in sizes.most_common(5)}
        if len(sizes) > 1:
            print(f"warning: {len(sizes)} sizes of samples, {names}: all are made {height}x{width}")
    print_line("compared at", f"{height}x{width} (height x width), {'color' if channels == 3 else 'gray'}")
    own = {"resize_mode": config.resize_mode or None, "background": config.background, "icc": config.icc}
    own |= {"input_shape": (height, width), "img_channels": channels}
    image_format = ImageFormat.from_config(model.checkpoint.config if model else {}, **own)
    open_set = partial(open_images, image_format=image_format, cache_path=config.cache_dir or None, condition=condition)
    return open_set, {"compared_at": [height, width, channels], "sample_sizes": names}


def labels_like(reference, model, seed):
    """Class ids (n,) as often as in the reference, of other classes each once; None without."""
    if not model.classes or reference.classes != model.classes:
        return torch.arange(len(model.classes)) if model.classes else None
    return reference.labels[torch.randperm(len(reference), generator=torch.Generator().manual_seed(seed))]


def generate(config, model, reference, device, precision):
    """(count, blocks, name) of the samples of predict.py, made on demand: i has `seed` + i."""
    count = config.num_images or (ENOUGH if config.distances else config.nearest_images if config.nearest else 0)
    same = {name: getattr(config, name) for name in ("sampler", "use_ema", "guidance_scale", "guidance_interval")}
    same |= {"steps": config.steps or None, "spacing": config.spacing or None, "guiding_model": model.guide}
    options = SamplingOptions(**same, solver_options={"eta": config.eta} if config.eta else {})
    schedule = sampling_schedule(model.diffusion.alpha_bars, options)
    check_interval(config.guidance_interval, schedule)
    labels = labels_like(reference, model, config.seed)
    order = torch.randperm(len(reference), generator=torch.Generator().manual_seed(config.seed))  # as that of labels

    def blocks():
        for first in range(0, count, config.batch_size):
            numbers = order[torch.arange(first, first + config.batch_size) % len(order)]
            own = options.override(cond=conditioned(model.diffusion, reference, numbers)[1])
            [(_, batch)] = sample_batches(model.diffusion, [first], config.batch_size, config.seed, labels, options=own)
            with autocast(device, precision):
                x = last_images(batch)
            yield torch.from_numpy(to_uint8(x)[: count - first])

    guidance = describe_guidance(config) + (f" by {config.guiding_path}" if model.guide else "")
    how = f"{config.sampler}, {plural(len(schedule), 'step')}{guidance}, seeds from {config.seed}"
    return count, blocks(), f"{count:,} generated, {how}, {model.checkpoint.path.resolve()}"


if __name__ == "__main__":
    run_script(main)
