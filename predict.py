"""Sample new images from a trained model."""

import utils.terminal  # noqa: F401 (first: Ctrl-C during the other imports is no traceback)

# isort: split
import random
import sys
import time
from dataclasses import replace

import torch
from tqdm import tqdm

from nets import SAMPLERS, SPACINGS, build
from nets.errors import check_choice
from nets.samplers import DEFAULT_RESAMPLINGS, DEFAULT_SPACING, SEEDS, VARIANCES, seeded_noise, slerp
from nets.sampling import SamplingOptions, check_guiding_model, check_interval, interval_predicate, sampling_schedule
from utils import distributed
from utils.checkpoint.runs import open_weights
from utils.cpu_threads import NUM_THREADS
from utils.data.image_format import ImageFormat
from utils.device import DTYPES, autocast, choose_compile, choose_device, choose_precision, memory_format, round_weights
from utils.errors import UserError, explain_out_of_memory, run_script
from utils.images import to_uint8
from utils.sampling.batches import advice_for_sampling, choose_threads, sample_batches
from utils.sampling.init_images import init_options, load_conditions
from utils.sampling.option_rules import SOLVER_OPTIONS, check_rules
from utils.sampling.predict_files import COLUMNS, SHOWN, PredictFiles, image_texts, shared_output_folder
from utils.sampling.summary import print_sampling
from utils.settings import PAIR, choice, defaults, flag, number, pathname, settings, text, typed_options, whole
from utils.terminal import first_few

MAX_ROWS = 10  # classes in the grid
MASKED_STEPS = 250  # with 10 resamplings as in the RePaint paper, section 5.1; all 1000 would take four times as long


# fmt: off
@settings
class Config:
    # Model
    model_path: str = ""                          # a checkpoint, or a run's folder; "": the newest run in logs/
    input_shape: tuple[int, int] | None = None    # height and width; None: as in training
    use_ema: bool = True                          # sample with the EMA weights; False: with the weights without EMA

    # Images
    num_images: int = 25                          # images to sample; the grid shows 25 (by class: 5 each, 10 classes)
    batch_size: int = 25                          # images sampled at once: lower it if memory runs out
    seed: int = -1                                # seed of the first image, the i-th has seed + i; -1: random, printed
    class_name: str = ""                          # sample this class only; "": one row per class
    guidance_scale: float = 1.0                   # guidance; above 1: more typical of the class, less diverse
    guidance_interval: tuple[float, float] | None = None  # range of lambda in which guidance acts; None: all steps
    guiding_path: str = ""                        # autoguidance: a weaker checkpoint; "": classifier-free guidance

    # Solver
    sampler: str = "sde-dpm++"                    # solver; inpainting uses ddpm
    steps: int = 0                                # sampling steps; 0: 25, ddpm all timesteps, inpainting 250
    spacing: str = ""                             # spacing of the timesteps; "": the default of the sampler
    eta: float = 0.0                              # fraction of new noise in ddim; 0: deterministic
    variance: str = "beta"                        # variance of ddpm's noise
    clip: bool = True                             # clip the predicted x_0 to [-1, 1] at each step

    # Input images and interpolation
    init_image: str = ""                          # img2img: start from this image instead of noise (SDEdit)
    strength: float | None = None                 # timestep to start at, as a fraction of T; None: 0.6, inpainting 1
    mask: str = ""                                # inpainting (RePaint): an image, white where pixels are sampled
    resamplings: int = 0                          # resamplings of each step of inpainting (RePaint); 0: 10
    condition_image: str = ""                     # condition of a model that has one: an image, or a folder of images
    interpolate: int = 0                          # frames of an interpolation between two seeds, instead of the grid
    seed_to: int = -1                             # seed at the other end of the interpolation; -1: seed + 1

    # Output
    individual_files: bool = False                # also one PNG per image, named by its seed; resumable
    npz: bool = False                             # also all images in one .npz, in the ADM evaluation's format
    trajectory: bool = False                      # also the sampling trajectory: a strip, and an animation of the grid
    save_dir: str = "results/predict_out"         # where the images are written

    # Machine
    device: str = "auto"                          # auto, cuda, cuda:1, mps or cpu
    precision: str = "auto"                       # mixed-precision dtype
    compile: bool | str = "auto"                  # torch.compile the network: worthwhile for thousands of evaluations
    num_threads: int | str = "auto"               # CPU threads; auto: OMP_NUM_THREADS if set, else the fastest
# fmt: on


PATHS = ("model_path", "guiding_path", "init_image", "mask", "condition_image", "save_dir")
SETTINGS = {
    **dict.fromkeys(PATHS, pathname()),
    **dict.fromkeys(("class_name", "device"), text()),
    **dict.fromkeys(("use_ema", "clip", "individual_files", "npz", "trajectory"), flag()),
    "input_shape": whole(1, 2**14, None, count=PAIR),
    "num_images": whole(1, SEEDS),
    "batch_size": whole(1, 2**16),
    "seed": whole(-1, SEEDS - 1),
    "guidance_scale": number(0, 1000),
    "guidance_interval": number(-1000, 1000, None, count=PAIR),
    "sampler": choice(SAMPLERS),
    "steps": whole(0),
    "spacing": choice(("", *SPACINGS)),
    "eta": number(0, 1),
    "variance": choice(VARIANCES),
    "strength": number(0, 1, None),
    "resamplings": whole(0, 10**6),
    "interpolate": whole(2, 10**4, 0),
    "seed_to": whole(-1, SEEDS - 1),
    "precision": choice(("auto", *DTYPES)),
    "compile": flag(choices=("auto",)),
    "num_threads": NUM_THREADS,
}


def main(arguments=None):
    config, given = read_settings(arguments)
    distributed.start(vars(config))
    device = choose_device(config.device, distributed.local_rank())
    precision = choose_precision(config.precision, device)
    checkpoint = open_weights(config.model_path, "weights")
    diffusion, classes = build.from_checkpoint(checkpoint, config.input_shape)
    weaker = open_weights(config.guiding_path, "guided by") if config.guiding_path else None
    guide = weaker and build.guiding_model(weaker, checkpoint, diffusion)
    check_model(config, diffusion, classes, guide)
    size = {"input_shape": diffusion.img_size, "img_channels": diffusion.img_channels}
    image_format = ImageFormat.from_config(checkpoint.config, **size)
    names, cond = load_conditions(config, diffusion.condition, image_format) if config.condition_image else ([], None)
    if names:
        each = 1 if config.num_images == SHOWN and "num_images" not in given else config.num_images
        config = replace(config, num_images=each * len(names), mask="")  # the mask is not RePaint's
    config = resolve(replace(config, device=device.type, precision=precision), given, diffusion, classes)
    options = sampling_options(config, image_format, guide, cond)
    rows, labels = grid_rows(config, classes), class_ids(config, classes)
    networks = move_networks(config, (diffusion, guide), device, precision)
    choose_threads(config, diffusion, device, precision)
    print_sampling(config, classes, rows, device, precision, checkpoint)
    shape = (*diffusion.img_size, diffusion.img_channels)
    text_of = image_texts(config, networks, shape, classes, labels, options)
    for network in networks:
        round_weights(network, precision)  # only now: the files' texts hold the digest of the exact weights
    with shared_output_folder(config.save_dir) as folder:
        files = PredictFiles(folder, config, shape, rows, text_of, names)
        with autocast(device, precision), explain_out_of_memory(lambda: advice_for_sampling(config)):
            sample(config, diffusion, labels, options, files)
        files.finish()
    distributed.stop()


def read_settings(arguments=None):
    """(Config, {name: value} of the command line). UserError: settings exclude each other."""
    options = typed_options(Config, SETTINGS, __doc__, arguments)
    config = Config(**{**defaults(Config, SETTINGS), **options})
    interval_predicate(config.guidance_interval)  # before anything is loaded
    check_rules(config, options)
    return config, options


def check_model(config, diffusion, classes, guide):
    """UserError for a setting that this model cannot serve."""
    if config.class_name and not classes:
        raise UserError(
            "--class_name: this model was trained without classes, which logs/emoji.pth has: add --model_path "
            "logs/emoji.pth, or train with --class_conditional True"
        )
    if config.class_name:
        check_choice("class_name", config.class_name, classes)
    check_guiding_model(diffusion, config.guidance_scale, guide)
    kind, asked = diffusion.condition.kind, [bool(config.condition_image), bool(config.mask)]
    if (kind or config.condition_image) and asked != [kind != "", kind == "masked"]:
        needs = {"": "no --condition_image", "masked": "--condition_image and --mask, white where pixels are sampled"}
        raise UserError(f"this model needs {needs.get(kind, f'--condition_image ({kind}) and no --mask')}")
    if config.interpolate and classes and not config.class_name:
        known = first_few(classes)
        raise UserError(f"--interpolate stays within one class: name it with --class_name; known: {known}")


def resolve(config, given, diffusion, classes):
    """The settings with a value for each open one. UserError for too many steps.

    given: the options of the command line, {name: value}.
    """
    seed = distributed.from_main(random.randrange(2**31) if config.seed < 0 else config.seed)
    sampler = "ddpm" if config.mask else config.sampler
    spacing = config.spacing or DEFAULT_SPACING[sampler]
    strength = config.strength or (0.6 if config.init_image and not config.mask else 1.0)
    options = SamplingOptions(sampler, config.steps or None, spacing, strength=strength)
    schedule = sampling_schedule(diffusion.alpha_bars, options)
    if config.mask and not config.steps and len(schedule) > MASKED_STEPS:
        schedule = sampling_schedule(diffusion.alpha_bars, options.override(steps=MASKED_STEPS))
    check_interval(config.guidance_interval, schedule)
    num_images = config.interpolate or config.num_images
    if grid_rows(config, classes) and "num_images" not in given and num_images == SHOWN:
        num_images = COLUMNS * grid_rows(config, classes)
    if not config.interpolate and seed + num_images > SEEDS:
        raise UserError(f"seeds {seed} to {seed + num_images - 1} exceed {SEEDS - 1}; lower --seed or --num_images")
    chosen = {"seed": seed, "sampler": sampler, "spacing": spacing, "strength": strength, "steps": len(schedule)}
    chosen |= {"num_images": num_images, "resamplings": config.resamplings or DEFAULT_RESAMPLINGS}
    chosen["seed_to"] = config.seed_to if config.seed_to >= 0 else seed + 1
    return replace(config, **chosen, input_shape=diffusion.img_size)


def sampling_options(config, image_format, guide, cond):
    """The SamplingOptions of the resolved settings."""
    solver = {name: getattr(config, name) for name, sampler in SOLVER_OPTIONS.items() if sampler == config.sampler}
    solver |= {"resamplings": config.resamplings} if config.mask else {}
    start = init_options(config, image_format)
    names = ("sampler", "steps", "spacing", "use_ema", "clip", "guidance_scale", "guidance_interval")
    own = {name: getattr(config, name) for name in names}
    return SamplingOptions(**own, guiding_model=guide, cond=cond, **start, solver_options=solver)


def move_networks(config, models, device, precision):
    """The networks that sample, one or two, on the device, and compiled where that pays."""
    compiled = choose_compile(config.compile, device, network_calls(config))
    networks = []
    for diffusion in filter(None, models):
        diffusion.to(device=device, memory_format=memory_format(device, precision))
        networks.append(diffusion.network(config.use_ema))
        if compiled:
            networks[-1].compile()
    return networks


def grid_rows(config, classes):
    """The number of classes that have a row in the grid; 0 for a grid without classes or of one."""
    return 0 if config.class_name or config.condition_image else min(len(classes), MAX_ROWS)


def class_ids(config, classes):
    """Class ids (n,) that the images take in turn, a row of the grid each; None: no classes."""
    if not classes or (config.condition_image and not config.class_name):
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
    with tqdm(total=len(batches) * config.steps, unit="step", disable=rank > 0, mininterval=pause) as bar:
        firsts = list(unfinished(batches, config, files, bar))  # a file that is not ours ends it before the first step
        done, began = 0, time.monotonic()
        for first, steps in sample_batches(diffusion, firsts, size, config.seed, labels, noise, options):
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
