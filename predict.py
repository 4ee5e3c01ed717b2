"""Draw new pictures with a trained model. Each setting is an option: --num_images 100."""

import utils.terminal  # noqa: F401 (first: Ctrl-C during the other imports is no traceback)

# isort: split
import random
import sys
import time
from dataclasses import replace
from typing import Literal

import torch
from tqdm import tqdm

from nets import build
from nets.errors import check_choice
from nets.samplers import DEFAULT_SPACING, SAMPLERS, SEEDS, SPACINGS, seeded_noise, slerp
from nets.sampling import SamplingOptions, check_guiding_model, check_interval, interval_predicate, sampling_schedule
from utils import distributed
from utils.checkpoint import load_checkpoint
from utils.config import block_settings, check_values, settings, typed_options
from utils.device import DTYPES, autocast, choose_compile, choose_device, choose_precision, memory_format, round_weights
from utils.errors import UserError, explain_out_of_memory, run_script
from utils.images import to_uint8
from utils.run_folders import find_weights
from utils.sampling.batches import advice_for_sampling, sample_batches
from utils.sampling.combinations import OWNERS, check_combinations
from utils.sampling.predict_files import COLUMNS, SHOWN, PredictFiles, image_texts
from utils.sampling.starting_images import starting_settings
from utils.sampling.summary import print_summary

MAX_ROWS = 10  # classes in the grid
MASKED_STEPS = 250  # with 10 resamplings as in the RePaint paper, section 5.1; all 1000 would take four times as long
CALLS_WORTH_COMPILING = 5000  # compiling takes about a minute


# fmt: off
@settings
class Config:
    # Model
    model_path: str = ""                          # a checkpoint, or a run's folder; "": the newest run in logs/
    input_shape: tuple[int, int] | None = None    # height and width; None: as in training
    use_ema: bool = True                          # draw with the EMA weights; False: with the last ones

    # Pictures
    num_images: int = 25                          # the grid shows the first 25 (by class: 5 of each, 10 classes)
    batch_size: int = 25                          # drawn at once: lower it if memory runs out
    seed: int = -1                                # of the first picture, each next has the next; -1: random, printed
    class_name: str = ""                          # draw this class only; "": a row of each
    guidance_scale: float = 1.0                   # above 1: more typical of its class, less varied
    guidance_interval: tuple[float, float] | None = None  # lambdas between which guidance acts; None: at each step
    guiding_path: str = ""                        # a weaker checkpoint to guide away from; "": from no class

    # Solver
    sampler: Literal[tuple(SAMPLERS)] = "sde-dpm++"  # the solver; with a mask ddpm
    steps: int = 0                                # of the solver; 0: 25, for ddpm all timesteps, with a mask 250
    spacing: Literal[("", *SPACINGS)] = ""        # of the timesteps; "": what suits the sampler
    eta: float = 0.0                              # ddim's share of fresh noise, 0 to 1
    variance: Literal["beta", "posterior"] = "beta"  # ddpm's variance
    clip: bool = True                             # keep the predicted image within black and white at each step

    # From pictures
    init_image: str = ""                          # start from this picture instead of noise
    strength: float | None = None                 # how much of it is drawn anew, above 0 to 1; None: 0.6, with a mask 1
    mask: str = ""                                # a picture: white where init_image changes, black where it stays
    resamplings: int = 10                         # times that each step of a masked drawing is taken
    interpolate: int = 0                          # draw a strip of so many pictures from seed to seed_to instead
    seed_to: int = -1                             # the seed at the strip's other end; -1: the next one

    # Output
    individual_files: bool = False                # one PNG a picture as well, named by its seed; resumable
    npz: bool = False                             # all pictures in one .npz as well, as evaluators of the field read it
    trajectory: bool = False                      # how the pictures form: a strip, and an animation of the grid
    save_dir: str = "results/predict_out"         # where the pictures are written

    # Machine
    device: str = "auto"                          # auto, cuda, mps or cpu
    precision: Literal[("auto", *DTYPES)] = "auto"  # numbers that the network computes in
    compile: Literal["auto"] | bool = "auto"      # compile the network: pays for thousands of network calls
# fmt: on


def main(arguments=None):
    typed = typed_options(Config, __doc__, arguments)
    config = replace(block_settings(Config), **typed)
    check(config, typed)
    distributed.start()
    device = choose_device(config.device, distributed.local_rank())
    precision = choose_precision(config.precision, device)
    path, remark = distributed.from_main(find_weights(config.model_path) if distributed.is_main() else None)
    if distributed.is_main():
        print(f"weights: {path.resolve()}{remark}")
    checkpoint = load_checkpoint(path, lazily=True)
    diffusion, classes = build.from_checkpoint(checkpoint, config.input_shape)
    guide = load_guide(config, checkpoint, diffusion)
    check_model(config, diffusion, classes, guide)
    config = resolve(config, typed, diffusion, classes)
    options = {name: getattr(config, name) for name in ("sampler", "steps", "spacing", "guidance_scale", "use_ema")}
    options |= {name: getattr(config, name) for name, sampler in OWNERS.items() if sampler == config.sampler}
    options |= {} if config.clip else {"clip": False}
    options |= {"guidance_interval": config.guidance_interval} if config.guidance_interval else {}
    options |= {"guiding_model": guide} if guide else {}
    options |= starting_settings(config, diffusion, checkpoint["config"])
    if distributed.is_main():
        print_summary(config, classes[: grid_rows(config, classes)], classes, device, precision, checkpoint)

    worth_it = device.type == "cuda" and network_calls(config) >= CALLS_WORTH_COMPILING
    compiled = choose_compile(worth_it if config.compile == "auto" else config.compile, device)
    networks = [part.ema_model if config.use_ema else part.model for part in (diffusion, guide) if part]
    for part, network in zip((diffusion, guide), networks):
        part.to(device=device, memory_format=memory_format(device, precision))
        if compiled:
            network.compile()
    shape, labels = (*diffusion.img_size, diffusion.img_channels), class_ids(config, classes)
    texts = image_texts(config, networks, shape, classes, labels, options)
    with PredictFiles(config, shape, grid_rows(config, classes), texts) as files:
        for network in networks:
            round_weights(network, precision)  # only now: the files' texts hold the digest of the exact weights
        with autocast(device, precision), explain_out_of_memory(lambda: advice_for_sampling(config)):
            sample(config, diffusion, labels, options, files)
        files.finish()
    distributed.stop()


def check(config, typed):
    """ValueError for a setting out of range, and for settings that exclude or need each other."""
    check_values(
        config,
        num_images=(1, None),
        batch_size=(1, None),
        seed=(-1, SEEDS - 1),
        seed_to=(-1, SEEDS - 1),
        steps=(0, None),
        eta=(0, 1),
        guidance_scale=(0, 1000),
        resamplings=(1, 10**6),
        interpolate=(0, 10**4),
    )
    interval_predicate(config.guidance_interval)  # before anything is loaded
    check_combinations(config, typed)


def load_guide(config, checkpoint, diffusion):
    """The weaker model of guiding_path; None without. ValueError for one of another kind."""
    if not config.guiding_path:
        return None
    path = distributed.from_main(find_weights(config.guiding_path)[0] if distributed.is_main() else None)
    if distributed.is_main():
        print(f"guided away from: {path.resolve()}")
    return build.guiding_model(load_checkpoint(path, lazily=True), checkpoint, diffusion, config.use_ema)


def check_model(config, diffusion, classes, guide):
    """ValueError for a setting that this model cannot serve."""
    if config.class_name and not classes:
        raise UserError("--class_name: this model was trained without classes; train with --class_conditional True")
    if config.class_name:
        check_choice("class_name", config.class_name, classes)
    check_guiding_model(diffusion, config.guidance_scale, guide)
    if config.interpolate and classes and not config.class_name:
        known = ", ".join(classes)
        raise UserError(f"--interpolate stays within one class: name it with --class_name; known: {known}")


def resolve(config, typed, diffusion, classes):
    """The settings with a value for each open one. ValueError for too many steps."""
    seed = distributed.from_main(random.randrange(2**31) if config.seed < 0 else config.seed)
    sampler = "ddpm" if config.mask else config.sampler
    spacing = config.spacing or DEFAULT_SPACING[sampler]
    strength = config.strength or (0.6 if config.init_image and not config.mask else 1.0)
    options = SamplingOptions(sampler, config.steps or None, spacing, strength=strength)
    steps = len(sampling_schedule(diffusion.alpha_bars, options))
    if config.mask and not config.steps:
        steps = min(steps, MASKED_STEPS)
    schedule = sampling_schedule(diffusion.alpha_bars, options.override(steps=steps))
    check_interval(config.guidance_interval, schedule)
    num_images = config.interpolate or config.num_images
    if grid_rows(config, classes) and "num_images" not in typed and num_images == SHOWN:
        num_images = COLUMNS * grid_rows(config, classes)
    if not config.interpolate and seed + num_images > SEEDS:
        raise UserError(
            f"seed {seed}: the last of {num_images} pictures would have the seed {seed + num_images - 1}, "
            f"and they end at {SEEDS - 1}: lower --seed or --num_images"
        )
    seed_to = config.seed_to if config.seed_to >= 0 else seed + 1
    return replace(
        config,
        seed=seed,
        seed_to=seed_to,
        sampler=sampler,
        spacing=spacing,
        strength=strength,
        steps=steps,
        num_images=num_images,
        input_shape=diffusion.img_size,
    )


def grid_rows(config, classes):
    """The number of classes that have a row in the grid; 0 for a grid without classes or of one."""
    return 0 if config.class_name else min(len(classes), MAX_ROWS)


def class_ids(config, classes):
    """Class ids (n,) that the images take in turn, a row of the grid each; None: no classes."""
    if not classes:
        return None
    chosen = [classes.index(config.class_name)] if config.class_name else range(len(classes))
    return torch.tensor(chosen).repeat_interleave(COLUMNS)


def network_calls(config):
    """The number of network calls for all batches."""
    per_step = (config.resamplings if config.mask else 1) * (2 if config.sampler == "heun" else 1)
    per_step *= 2 if config.guiding_path else 1
    return config.steps * per_step * -(-config.num_images // config.batch_size)


def sample(config, diffusion, labels, options, files):
    """Samples this process's batches that have no files yet, and hands them to `files`."""
    size, rank, processes = config.batch_size, distributed.rank(), distributed.world_size()
    batches = range(0, config.num_images, size)[rank::processes]
    noise = (lambda numbers: noise_between_seeds(config, diffusion, numbers)) if config.interpolate else None
    pause = 0.1 if sys.stderr.isatty() else 10  # seconds between two states of the progress bar
    with tqdm(
        total=len(batches) * config.steps, unit="step", disable=rank > 0, dynamic_ncols=True, mininterval=pause
    ) as bar:
        firsts = list(unfinished(batches, config, files, bar))  # a file that is not ours ends it before the first step
        done, began = 0, time.monotonic()
        for first, steps in sample_batches(diffusion, firsts, size, config.seed, labels, noise, **options):
            for step, (x, x_0) in enumerate(steps):
                files.add_step(first, step, x, x_0)
                bar.update()
            files.add(first, to_uint8(x))
            done += min(size, config.num_images - first)
            bar.set_postfix_str(f"{done * processes / (time.monotonic() - began):.1f} img/s", refresh=False)


def unfinished(batches, config, files, bar):
    """The batches that have no files yet. The bar moves on for the others."""
    for first in batches:
        if files.reuse(first, config.batch_size):
            bar.update(config.steps)
        else:
            yield first


def noise_between_seeds(config, diffusion, numbers):
    """Endless noise of the images `numbers` (n,), spread evenly from `seed` to `seed_to`."""
    shape, device = (diffusion.img_channels, *diffusion.img_size), diffusion.betas.device
    weight = (numbers / (config.interpolate - 1)).clamp(max=1).to(device).reshape(-1, 1, 1, 1)
    return (slerp(a, b, weight) for a, b in seeded_noise((config.seed, config.seed_to), shape, device))


if __name__ == "__main__":
    run_script(main)
