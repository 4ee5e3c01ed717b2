"""How good is it? Compares a checkpoint's pictures, or a folder of them, with real ones.

Every setting below is also an option:

python -m utils.evaluate --samples logs/<run> --features classifier --num_images 10000 --bits True
"""

import json
import time
from collections.abc import Iterable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from nets import GaussianDiffusion, build
from nets.samplers import SAMPLERS, SEEDS, SPACINGS
from nets.sampling import SamplingOptions, check_guiding_model, check_interval, interval_predicate, sampling_schedule
from utils.checkpoint import load_checkpoint
from utils.checkpoint_contents import weights_digest
from utils.config import check_values, parse_config, settings
from utils.data.dataset import split_validation
from utils.data.decode import RESIZE_MODES
from utils.device import DTYPES, autocast, choose_device, choose_precision, describe_device, memory_format
from utils.errors import UserError, run_script
from utils.evaluate.features import FeatureCache, collect, load_extractor, with_progress
from utils.evaluate.image_sets import open_images, survey
from utils.evaluate.measures import NEIGHBOURS, measure_bits, measure_distances, measure_nearest, print_line
from utils.files import atomic_write
from utils.images import to_uint8
from utils.run_folders import epoch_files, find_weights
from utils.sampling.batches import last_images, sample_batches
from utils.sampling.combinations import check_guidance
from utils.sampling.summary import describe_guidance

ENOUGH = 10_000  # below so many samples FID's upward bias is larger than the differences of interest


# fmt: off
@settings
class Config:
    # Pictures
    samples: str = ""                             # a folder, list, .npz or checkpoint to draw from; "": the newest run
    reference: str = "train_lines.txt"            # a folder, list or .npz: the pictures that were to be learned
    held_out: str = ""                            # a folder, list or .npz, not trained on; "": val_split's share
    num_images: int = 0                           # samples; 0: all, of a checkpoint 10,000
    input_shape: tuple[int, int] | None = None    # height and width to compare at; None: the samples' most frequent
    img_channels: Literal[0, 1, 3] = 0            # 3 colour, 1 grey; 0: colour if any picture has it
    resize_mode: Literal[("", *RESIZE_MODES)] = ""  # how other shapes are made to fit; "": as in training
    background: tuple[int, int, int] | None = None  # behind transparent pixels; None: as in training
    icc: bool | None = None                       # convert embedded colour profiles to sRGB; None: as in training

    # Measures
    distances: bool = True                        # Frechet distance (FID), kernel distance (KID), precision and recall
    features: str = "inception"                   # inception, classifier (of the reference's classes) or its file
    inception_weights: str = ""                   # a file with the Inception weights; "": downloaded once
    max_features: int = 10_000                    # pictures a side that kernel distance, precision and recall look at
    nearest: bool = True                          # the reference's nearest picture to each sample: is it a copy?
    nearest_images: int = 1000                    # samples, and held-out pictures, that the nearest is sought for
    nearest_by: Literal["pixels", "features"] = "pixels"  # distance between what
    bits: bool = False                            # bits per dimension of held-out pictures (T network calls a picture)
    bits_images: int = 1000                       # of so many of them; 0: all

    # Drawing from a checkpoint
    sampler: Literal[tuple(SAMPLERS)] = "sde-dpm++"  # the solver
    steps: int = 0                                # of the solver; 0: 25, for ddpm all timesteps
    spacing: Literal[("", *SPACINGS)] = ""        # of the timesteps; "": what suits the sampler
    eta: float = 0.0                              # ddim's share of fresh noise, 0 to 1
    guidance_scale: float = 1.0                   # above 1: more typical of its class, less varied
    guidance_interval: tuple[float, float] | None = None  # lambdas between which guidance acts; None: at each step
    guiding_path: str = ""                        # a weaker checkpoint to guide away from; "": from no class
    seed: int = 0                                 # of the first sample, of subsets, and of the noise in the bits
    use_ema: bool = True                          # the EMA weights; False: the last ones

    # Output and machine
    save_dir: str = "results/evaluate_out"        # where the table (JSON) and the picture of pairs are written
    cache_dir: str = ""                           # of decoded pictures, statistics, classifiers; "": datasets/.cache
    batch_size: int = 100                         # pictures at once: lower it if memory runs out
    device: str = "auto"                          # auto, cuda, mps or cpu
    precision: Literal[("auto", *DTYPES)] = "auto"  # of the diffusion network; features are fp32
# fmt: on


class Model(NamedTuple):
    """A checkpoint to sample from."""

    diffusion: GaussianDiffusion
    classes: list
    config: dict  # train.py's settings, {} for a bare state dict
    name: str
    guide: GaussianDiffusion | None = None  # of --guiding_path
    guide_name: str = ""


class Samples(NamedTuple):
    """The images to judge."""

    count: int
    blocks: Iterable  # of (b, H, W, C) uint8 tensors, to be read once
    name: str


def main(arguments=None):
    config = parse_config(Config, __doc__, arguments)
    check(config)
    start = time.time()
    device = choose_device(config.device)
    precision = choose_precision(config.precision, device)
    model = load_model(config, device, precision) if is_checkpoint(config.samples) else None
    print(f"{describe_device(device)}, precision {precision}")
    opened, about_sizes = opener(config, model)
    reference, held_out = open_references(config, model, opened)
    samples = open_samples(config, model, opened, reference, device, precision)
    for name, count in (("samples", samples.count), ("reference pictures", len(reference))):
        if config.distances and count < NEIGHBOURS + 2:
            raise UserError(
                f"{count} {name} are too few for distances, which need {NEIGHBOURS + 2}: name more, or "
                "set --distances False"
            )
    print_line("samples", samples.name)
    print_line("reference", f"{len(reference):,} pictures, {reference.name}")
    aside = f"{len(held_out):,} pictures, {held_out.name}" if held_out else "none: name them with --held_out"
    print_line("held out", aside)
    results = {
        "settings": asdict(config),
        "weights": digest_of(config, model and model.diffusion),
        "guiding_weights": digest_of(config, model and model.guide),
        "samples": samples.name,
        "num_samples": samples.count,
        "reference": reference.name,
        "num_reference": len(reference),
        "held_out": held_out.name if held_out else None,
        **about_sizes,
    }
    results |= compare(config, samples, reference, held_out, device)
    if config.bits:
        results["bits"] = measure_bits(config, model, held_out, device, precision)
    results["minutes"] = (time.time() - start) / 60
    path = Path(config.save_dir) / "evaluate_results.json"
    with atomic_write(path, "w", encoding="utf-8") as file:
        json.dump(results, file, indent=1)
    print(path.resolve())


def check(config):
    """ValueError for a setting out of range, and for settings that exclude or need each other."""
    check_values(
        config,
        num_images=(0, None),
        max_features=(NEIGHBOURS + 2, None),
        nearest_images=(1, None),
        bits_images=(0, None),
        steps=(0, None),
        eta=(0, 1),
        seed=(0, SEEDS - 1),
        batch_size=(1, None),
    )
    if config.seed + config.num_images > SEEDS:
        raise UserError(
            f"seed {config.seed} and {config.num_images} samples: the last seed would lie beyond "
            f"{SEEDS - 1}; lower --seed or --num_images"
        )
    if config.eta and config.sampler != "ddim":
        raise UserError("--eta is an option of ddim: add --sampler ddim, or leave it out")
    interval_predicate(config.guidance_interval)  # before anything is loaded
    check_guidance(config)
    if config.bits and not is_checkpoint(config.samples):
        raise UserError(f"--bits needs the model itself, and {config.samples} holds pictures: name a checkpoint")
    if config.guidance_scale != 1 and not is_checkpoint(config.samples):
        raise UserError(f"--guidance_scale is of drawing, and {config.samples} holds pictures: leave it out")


def compare(config, samples, reference, held_out, device):
    """The measures without a model that the settings ask for: a dict of distances and nearest."""
    results, cache, extractor = {}, FeatureCache(config.cache_dir, config.reference), None
    if config.distances or (config.nearest and config.nearest_by == "features"):
        extractor = load_extractor(
            config.features, reference, cache, device, config.batch_size, config.inception_weights
        )
        print_line("features", extractor.name)
    if config.distances or config.nearest:
        blocks = with_progress(samples.blocks, samples.count, "samples")
        sampled = collect(blocks, extractor, config.max_features, config.nearest_images)
    if config.distances:
        known = cache.collected(reference, extractor, config.max_features)
        results["distances"] = measure_distances(config, sampled, known, extractor)
    if config.nearest:
        results["nearest"] = measure_nearest(config, sampled.images, reference, held_out, extractor)
    return results


def is_checkpoint(path):
    """Whether `path` is a file of weights, a run's folder, or "" (the newest run)."""
    if not path or Path(path).suffix in (".pth", ".pt"):
        return True
    return Path(path).is_dir() and bool((Path(path) / "last.pth").is_file() or epoch_files(Path(path)))


def load_model(config, device, precision):
    """The Model of config.samples, on the device. ValueError for settings that it cannot serve."""
    path, remark = find_weights(config.samples)
    checkpoint = load_checkpoint(path, lazily=True)
    print(f"weights: {path.resolve()}{remark}")
    diffusion, classes = build.from_checkpoint(checkpoint, config.input_shape)
    if config.img_channels not in (0, diffusion.img_channels):
        raise UserError(f"--img_channels {config.img_channels}: the model draws pictures of {diffusion.img_channels}")
    guide, guide_path = None, None
    if config.guiding_path:
        guide_path = find_weights(config.guiding_path)[0].resolve()
        print(f"guided away from: {guide_path}")
        guide = build.guiding_model(load_checkpoint(guide_path, lazily=True), checkpoint, diffusion, config.use_ema)
    check_guiding_model(diffusion, config.guidance_scale, guide)
    for part in (diffusion, guide) if guide else (diffusion,):
        part.to(device=device, memory_format=memory_format(device, precision))
    return Model(diffusion, classes, checkpoint["config"], str(path.resolve()), guide, str(guide_path or ""))


def digest_of(config, diffusion):
    """A short digest of the network that is used; None without one."""
    if diffusion is None:
        return None
    return weights_digest((diffusion.ema_model if config.use_ema else diffusion.model).state_dict())


def open_references(config, model, opened):
    """(reference, held-out images or None), two ImageDatasets of the samples' size and channels."""
    reference, held_out = opened(config.reference), None
    trained = model.config if model else {}
    listed, share = trained.get("annotation_path"), trained.get("val_split", 0)
    if config.held_out:
        held_out = opened(config.held_out)
    elif share and listed and Path(listed).resolve() == Path(config.reference).resolve():
        reference, held_out = split_validation(reference, share)  # as the training did
    if config.bits and held_out is None:
        raise UserError(
            "--bits measures pictures that were not trained on: name them with --held_out, or train with "
            "--val_split 0.05"
        )
    copies = len(set(held_out.hashes) & set(reference.hashes)) if held_out else 0
    if copies:
        print(
            f"warning: {copies:,} of the held-out pictures are among the reference's: "
            "what is said of them is not about unseen pictures"
        )
    return reference, held_out


def opener(config, model):
    """(function path -> ImageDataset, decoded as in training; a dict of what the sizes are)."""
    trained = model.config if model else {}
    own = model and (*model.diffusion.img_size, model.diffusion.img_channels)
    shape, sizes = (own, None) if own else compared_shape(config)
    height, width, channels = shape
    print_line("compared at", f"{height}x{width} (height x width), {'colour' if channels == 3 else 'grey'}")
    resize_mode = config.resize_mode or trained.get("resize_mode", "crop")
    background = config.background or tuple(trained.get("background", (255, 255, 255)))
    icc = trained.get("icc", True) if config.icc is None else config.icc
    about = {"compared_at": list(shape), "sample_sizes": sizes}
    return partial(
        open_images,
        shape=shape,
        resize_mode=resize_mode,
        background=background,
        cache_path=config.cache_dir or None,
        icc=icc,
    ), about


def compared_shape(config):
    """((H, W, C) to compare at, {"HxW": samples}): the most frequent size, colour if any has it."""
    sizes, colour = survey(config.samples)
    channels = config.img_channels or (3 if colour or survey(config.reference)[1] else 1)
    shape = (*(config.input_shape or sizes.most_common(1)[0][0]), channels)
    names = {f"{height}x{width}": count for (height, width), count in sizes.most_common(5)}
    if len(sizes) > 1:
        some = ", ".join(f"{count} of {name}" for name, count in names.items())
        print(
            f"warning: the samples have {len(sizes)} sizes ({some}): all are made {shape[0]}x{shape[1]}; "
            "--input_shape sets another"
        )
    return shape, names


def open_samples(config, model, opened, reference, device, precision):
    """The Samples: read in random order, or sampled from the model as they are asked for."""
    if model is None:
        dataset = opened(config.samples)
        order = dataset.shuffled(config.num_images, config.seed)
        samples = Samples(len(order), dataset.blocks(order), f"{len(order):,} pictures, {dataset.name}")
    else:
        samples = samples_of(config, model, labels_like(reference, model, config.seed), device, precision)
    if samples.count < config.num_images:
        print(f"warning: there are {samples.count:,} samples, fewer than the {config.num_images:,} asked for")
    if config.distances and samples.count < ENOUGH:
        print(
            f"warning: {samples.count:,} samples are few: below {ENOUGH:,} a Frechet distance is too high, "
            "and only compares with one of as many"
        )
    return samples


def labels_like(reference, model, seed):
    """Class ids (n,) as often as in the reference, of other classes each once; None without."""
    if not model.classes:
        return None
    generator = torch.Generator().manual_seed(seed)
    if reference.classes == model.classes:
        return reference.labels[torch.randperm(len(reference), generator=generator)]
    return torch.arange(len(model.classes))


def samples_of(config, model, labels, device, precision):
    """The Samples of a model, equal to those of predict.py: sample i has the seed `seed` + i."""
    count = config.num_images or (ENOUGH if config.distances else config.nearest_images if config.nearest else 0)
    options = SamplingOptions(config.sampler, config.steps or None, config.spacing or None)
    schedule = sampling_schedule(model.diffusion.alpha_bars, options)
    check_interval(config.guidance_interval, schedule)
    settings = {
        "sampler": config.sampler,
        "steps": len(schedule),
        "spacing": config.spacing or None,
        "guidance_scale": config.guidance_scale,
        "guidance_interval": config.guidance_interval,
        "guiding_model": model.guide,
        "use_ema": config.use_ema,
        **({"eta": config.eta} if config.sampler == "ddim" else {}),
    }

    def blocks():
        firsts = range(0, count, config.batch_size)
        for first, batch in sample_batches(model.diffusion, firsts, config.batch_size, config.seed, labels, **settings):
            with autocast(device, precision):
                x = last_images(batch)
            yield torch.from_numpy(to_uint8(x)[: count - first])

    guidance = describe_guidance(config) + (f" away from {model.guide_name}" if model.guide else "")
    name = f"{count:,} drawn, {config.sampler}, {len(schedule)} steps{guidance}, seeds from {config.seed}, {model.name}"
    return Samples(count, blocks(), name)


if __name__ == "__main__":
    run_script(main)
