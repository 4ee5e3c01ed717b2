"""Draw new pictures with a trained model. Every setting below is also an option: --num_images 100."""
import random
import sys
import time
from dataclasses import dataclass, replace
from typing import Literal

import torch
from tqdm import tqdm

from nets import build
from nets.diffusion import check_choice
from nets.samplers import DEFAULT_SPACING, SAMPLERS, SPACINGS, seeded_noise, slerp
from utils import distributed
from utils.checkpoint import find_weights, load_checkpoint, weights_digest
from utils.config import check_values, typed_options
from utils.device import autocast, choose_compile, choose_device, choose_precision, describe_device, memory_format, round_weights
from utils.errors import explain_out_of_memory, run_script
from utils.images import to_uint8
from utils.sampling.batches import advice_for_drawing
from utils.sampling.predict_files import COLUMNS, SHOWN, PredictFiles
from utils.sampling.starting_images import load_mask, load_picture, picture_digest

MAX_ROWS = 10  # classes in the grid
MASKED_STEPS = 250  # with 10 resamplings the setting of the RePaint paper, section 5.1; all 1000 would take four times as long
CALLS_WORTH_COMPILING = 5000  # compiling takes about a minute


@dataclass
class Config:
    # Model
    model_path: str = ""                          # a checkpoint, or a run's folder; "": the newest run in logs/
    input_shape: tuple[int, int] | None = None    # height and width; None: those that the model was trained for
    use_ema: bool = True                          # draw with the averaged weights; False: with the last ones

    # Pictures
    num_images: int = 25                          # how many; the grid shows the first 25 (by class: 5 of each, 10 classes)
    batch_size: int = 25                          # how many are drawn at once: lower it if memory runs out
    seed: int = -1                                # of the first picture, the next has the next; -1 draws one and prints it
    class_name: str = ""                          # draw this class only; "": a row of each
    guidance_scale: float = 1.0                   # above 1: more typical of its class, less varied (with label_dropout > 0)

    # Solver
    sampler: str = "sde-dpm++"                    # sde-dpm++, dpm++, ddpm, ddim or heun; with a mask ddpm
    steps: int = 0                                # of the solver; 0: 25, for ddpm all that the model knows, with a mask 250
    spacing: str = ""                             # uniform, trailing or logsnr; "": what suits the sampler
    eta: float = 0.0                              # ddim's share of fresh noise, 0 to 1
    variance: Literal["beta", "posterior"] = "beta"  # ddpm's variance

    # From pictures
    init_image: str = ""                          # start from this picture instead of noise
    strength: float | None = None                 # how much of it is drawn anew, above 0 to 1; None: 0.6, with a mask 1
    mask: str = ""                                # a picture: white where init_image is drawn anew, black where it stays
    resamplings: int = 10                         # times that each step of a masked drawing is taken
    interpolate: int = 0                          # draw a strip of so many pictures from seed to seed_to instead
    seed_to: int = -1                             # the seed at the strip's other end; -1: the next one

    # Output
    individual_files: bool = False                # one PNG a picture as well, named by its seed; goes on where it stopped
    npz: bool = False                             # all pictures in one .npz as well, as evaluators of the field read it
    trajectory: bool = False                      # show how the pictures form: a strip, and an animation of the grid
    save_dir: str = "results/predict_out"         # where the pictures are written

    # Machine
    device: str = "auto"                          # auto, cuda, mps or cpu
    precision: str = "auto"                       # auto, fp32, bf16 or fp16
    compile: Literal["auto"] | bool = "auto"      # compile the network: pays for thousands of network calls


# Settings that do nothing without another one.
NEEDS = {"strength": "init_image", "mask": "init_image", "resamplings": "mask", "seed_to": "interpolate"}
# Solvers' own options, and whose they are.
OWNERS = {"eta": "ddim", "variance": "ddpm"}


def main():
    typed = typed_options(Config, __doc__)
    config = Config(**typed)
    check(config, typed)
    distributed.start()
    device = choose_device(config.device, distributed.local_rank())
    precision = choose_precision(config.precision, device)
    checkpoint = load(config.model_path)
    diffusion, classes = build.from_checkpoint(checkpoint, config.input_shape)
    config = settle(config, typed, diffusion, classes)
    options = solver_options(config, diffusion, checkpoint["config"])
    announce(config, diffusion, classes, checkpoint, f"{describe_device(device)}, precision {precision}")

    network = diffusion.ema_model if config.use_ema else diffusion.model
    pays = device.type == "cuda" and network_calls(config) >= CALLS_WORTH_COMPILING
    if choose_compile(pays if config.compile == "auto" else config.compile, device):
        network.compile()
    diffusion = diffusion.to(device=device, memory_format=memory_format(device, precision))
    rows = min(len(classes), MAX_ROWS) if by_class(config, classes) else None
    shape = (*diffusion.img_size, diffusion.img_channels)
    with PredictFiles(config, shape, rows, text_of_pictures(config, network, shape, classes, options)) as files:
        round_weights(network, precision)  # only now: the files are named after the exact ones
        with autocast(device, precision), explain_out_of_memory(lambda: advice_for_drawing(config)):
            draw(config, diffusion, classes, options, files, device)
        files.finish()
    distributed.stop()


def check(config, typed):
    """Refuse now what would fail later: ValueError for a setting out of range or unknown, or settings that do not go together."""
    check_values(
        config, num_images=(1, None), batch_size=(1, None), seed=(-1, 2**62), seed_to=(-1, 2**62), steps=(0, None), eta=(0, 1),
        guidance_scale=(0, 1000), resamplings=(1, None), interpolate=(0, None),
    )  # fmt: skip
    check_choice("sampler", config.sampler, SAMPLERS)
    if config.spacing:
        check_choice("spacing", config.spacing, SPACINGS)
    if config.strength is not None and not 0 < config.strength <= 1:
        raise ValueError(f"strength is {config.strength}: it must be above 0 (hardly anything is drawn anew) and at most 1 (everything)")
    for name, needed in NEEDS.items():
        if name in typed and not getattr(config, needed):
            raise ValueError(f"--{name} does nothing without --{needed}: give both, or leave it out")
    for name, sampler in OWNERS.items():
        if name in typed and config.sampler != sampler and not (sampler == "ddpm" and config.mask):
            raise ValueError(f"--{name} is an option of {sampler}: add --sampler {sampler}, or leave it out")
    if config.mask and typed.get("sampler", "ddpm") != "ddpm":
        raise ValueError(f"--mask is drawn with ddpm's steps: --sampler {config.sampler} cannot do it; leave it out")
    if config.interpolate and config.init_image:
        raise ValueError("--interpolate goes from one seed's noise to another's: leave out --init_image")
    if config.interpolate and "num_images" in typed:
        raise ValueError("--interpolate is the number of pictures: leave out --num_images")
    if config.interpolate == 1:
        raise ValueError("--interpolate 1: a strip has at least 2 pictures, one an end")


def load(model_path):
    """The checkpoint to draw with, the same one in all processes, and a line about which it is."""
    path, remark = distributed.from_main(find_weights(model_path) if distributed.is_main() else None)
    if distributed.is_main():
        print(f"weights: {path.resolve()}{remark}")
    return load_checkpoint(path, lazily=True)


def settle(config, typed, diffusion, classes):
    """The settings with all that they leave open settled for this model. ValueError for what it cannot do."""
    if config.class_name and not classes:
        raise ValueError(f"--class_name {config.class_name}: this model was trained without classes; train with --class_conditional True")
    if config.class_name:
        check_choice("class_name", config.class_name, classes)
    if config.guidance_scale != 1 and diffusion.null_class is None:
        raise ValueError("--guidance_scale needs a model with a null class: train with --class_conditional True and label_dropout above 0")
    if config.interpolate and classes and not config.class_name:
        raise ValueError(f"--interpolate stays within one class: name it with --class_name; known: {', '.join(classes)}")

    seed = distributed.from_main(random.randrange(2**31) if config.seed < 0 else config.seed)
    sampler = "ddpm" if config.mask else config.sampler
    spacing = config.spacing or DEFAULT_SPACING[sampler]
    strength = config.strength or (0.6 if config.init_image and not config.mask else 1.0)
    steps = len(diffusion.plan(sampler, config.steps or None, spacing, strength))
    if config.mask and not config.steps:
        steps = min(steps, MASKED_STEPS)
    num_images = config.interpolate or config.num_images
    if by_class(config, classes) and "num_images" not in typed and num_images == SHOWN:
        num_images = COLUMNS * min(len(classes), MAX_ROWS)
    return replace(
        config, seed=seed, seed_to=config.seed_to if config.seed_to >= 0 else seed + 1, sampler=sampler, spacing=spacing, strength=strength,
        steps=steps, num_images=num_images, input_shape=diffusion.img_size,
    )  # fmt: skip


def by_class(config, classes):
    """Whether the grid has a row for each class."""
    return bool(classes) and not config.class_name


def solver_options(config, diffusion, trained):
    """The arguments of `diffusion.sample_steps` that are the same for every batch. trained: the settings of the training."""
    options = {name: getattr(config, name) for name in ("sampler", "steps", "spacing", "guidance_scale", "use_ema")}
    options |= {name: getattr(config, name) for name, owner in OWNERS.items() if owner == config.sampler}
    if config.init_image:
        picture = load_picture(config.init_image, diffusion.img_size, diffusion.img_channels, trained)
        picture = picture.expand(config.batch_size, *picture.shape[1:])
        options |= {"init": picture, "strength": config.strength}
        if config.mask:
            mask = load_mask(config.mask, config.init_image, diffusion.img_size, trained)
            options |= {"known": picture, "mask": mask, "resamplings": config.resamplings}
    return options


def announce(config, diffusion, classes, checkpoint, machine):
    """Say what is about to be drawn, with all that was chosen for the user."""
    if not distributed.is_main():
        return
    if not checkpoint["config"]:
        print("these weights do not say their size: drawing {},{}; --input_shape sets another".format(*diffusion.img_size))
    print(f"{machine}; {config.sampler}, {config.steps} steps; {config.num_images} pictures from seed {config.seed} on")
    if by_class(config, classes):
        more = f" (and {len(classes) - MAX_ROWS} more: --class_name draws one)" if len(classes) > MAX_ROWS else ""
        print(f"a row of each class, from the top: {', '.join(classes[:MAX_ROWS])}{more}")


def network_calls(config):
    """How often the network is called in all."""
    per_step = (config.resamplings if config.mask else 1) * (2 if config.sampler == "heun" else 1)
    return config.steps * per_step * -(-config.num_images // config.batch_size)


def class_ids(config, classes, numbers):
    """The class of each picture by its number, both (n,): class_name's, or as many of each class in turn as a row of the grid has."""
    if not classes:
        return None
    return torch.full_like(numbers, classes.index(config.class_name)) if config.class_name else numbers // COLUMNS % len(classes)


def text_of_pictures(config, network, shape, classes, options):
    """The function number -> all that this picture depends on, as text for its file."""
    text = {name: picture_digest(value[:1]) if torch.is_tensor(value) else str(value) for name, value in options.items() if name != "known"}
    text["size"] = "x".join(map(str, shape))
    if config.individual_files:  # reading all weights takes a moment
        text["weights"] = weights_digest(network.state_dict())

    def text_of(number):
        ids = class_ids(config, classes, torch.tensor([number]))
        label = {} if ids is None else {"class": classes[ids[0]]}
        if config.interpolate:
            place = {"seed": str(config.seed), "seed_to": str(config.seed_to), "place": f"{number} of 0 to {config.interpolate - 1}"}
        else:
            place = {"seed": str(config.seed + number)}
        return {**text, **label, **place}

    return text_of


def draw(config, diffusion, classes, options, files, device):
    """Batch by batch, each of the same size whatever the number of pictures, so that it changes none of them."""
    size, rank, processes = config.batch_size, distributed.rank(), distributed.world_size()
    todo = [first for first in range(0, config.num_images, size)[rank::processes] if not files.have(first, size)]
    starts = noise_between(config, diffusion, device) if config.interpolate else lambda numbers: {"seeds": (config.seed + numbers).tolist()}
    drawn, began, pause = 0, time.monotonic(), 0.1 if sys.stderr.isatty() else 10  # seconds between two states of the progress bar
    with tqdm(total=len(todo) * config.steps, unit="step", disable=rank > 0, dynamic_ncols=True, mininterval=pause) as bar:
        for first in todo:
            numbers = torch.arange(first, first + size)
            y = class_ids(config, classes, numbers)
            y = None if y is None else y.to(device)
            for step, (x, x_0) in enumerate(diffusion.sample_steps(size, device, y, **options, **starts(numbers))):
                files.add_moment(first, step, x, x_0)
                bar.update()
            files.add(first, to_uint8(x))
            drawn += min(size, config.num_images - first)
            bar.set_postfix_str(f"{drawn * processes / (time.monotonic() - began):.1f} img/s", refresh=False)


def noise_between(config, diffusion, device):
    """The function numbers (n,) -> the noise of a strip's pictures, all of it on the way from one seed's to the other's."""
    shape = (diffusion.img_channels, *diffusion.img_size)

    def start(numbers):
        share = (numbers / (config.interpolate - 1)).clamp(max=1).to(device).reshape(-1, 1, 1, 1)
        return {"noise": (slerp(a, b, share) for a, b in seeded_noise((config.seed, config.seed_to), shape, device))}

    return start


if __name__ == "__main__":
    run_script(main)
