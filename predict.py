"""Draw new pictures with a trained model. Every setting below is also an option: --num_images 100."""
import random
from dataclasses import dataclass
from typing import Literal

import torch
from tqdm import tqdm

from nets import build
from nets.diffusion import check_choice
from nets.samplers import DEFAULT_STEPS, SAMPLERS, SPACINGS, seeded_noise
from utils import distributed
from utils.checkpoint import find_weights, load_checkpoint, weights_digest
from utils.config import check_values, run_script, typed_options
from utils.device import autocast, choose_compile, choose_device, choose_precision, describe_device, memory_format
from utils.images import to_uint8
from utils.outputs import COLUMNS, PredictFiles
from utils.starting_pictures import load_mask, load_picture, slerp

MAX_ROWS = 10  # classes in the grid


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
    sampler: str = "dpm++"                        # ddpm, ddim, dpm++ or heun
    steps: int = 0                                # steps of the solver; 0: 25, for ddpm all that the model was trained with
    spacing: str = ""                             # uniform, trailing or logsnr; "": what suits the sampler
    eta: float = 0.0                              # ddim's share of fresh noise, 0 to 1
    variance: Literal["beta", "posterior"] = "beta"  # ddpm's variance

    # From pictures
    init_image: str = ""                          # start from this picture instead of noise
    strength: float = 0.6                         # how much of it is drawn anew: 0 (nothing) to 1 (everything)
    mask: str = ""                                # white where init_image is drawn anew, black where it stays (ddpm only)
    resamplings: int = 10                         # times that each step of a masked drawing is taken
    interpolate: int = 0                          # draw a strip of so many pictures from seed to seed_to instead
    seed_to: int = -1                             # the seed at the strip's other end; -1: the next one

    # Output
    individual_files: bool = False                # one PNG a picture as well, named by its seed; goes on where it was stopped
    npz: bool = False                             # all pictures in one .npz as well, as evaluators of the field read it
    trajectory: bool = False                      # show how the pictures form: a strip, and an animation of the grid
    save_dir: str = "results/predict_out"         # where the pictures are written

    # Machine
    device: str = "auto"                          # auto, cuda, mps or cpu
    precision: str = "auto"                       # auto, fp32, bf16 or fp16
    compile: Literal["auto"] | bool = "auto"      # compile the network: pays for thousands of network calls


def main():
    typed = typed_options(Config, __doc__)
    config = Config(**typed)
    check(config)
    distributed.start()
    device = choose_device(config.device, distributed.local_rank())
    precision = choose_precision(config.precision, device)
    diffusion, classes = load_model(config)
    labels = choose_labels(config, diffusion, classes)
    by_row = bool(classes) and not config.class_name and not config.interpolate
    if by_row and "num_images" not in typed:
        config.num_images = len(labels)
    config.num_images = config.interpolate or config.num_images
    config.seed = distributed.from_main(random.randrange(2**31) if config.seed < 0 else config.seed)
    settings = solver_settings(config, diffusion)
    if distributed.is_main():
        print(f"{describe_device(device)}, precision {precision}; {config.sampler}, {config.steps} steps; seed {config.seed}")
    if choose_compile(pays(config, diffusion) if config.compile == "auto" else config.compile, device):
        (diffusion.ema_model if config.use_ema else diffusion.model).compile()
    diffusion = diffusion.to(device=device, memory_format=memory_format(device, precision))
    shape = (*diffusion.img_size, diffusion.img_channels)
    files = PredictFiles(config, len(labels) // COLUMNS if by_row else None, describe(config, diffusion), shape)
    with autocast(device, precision):
        draw(config, diffusion, labels, settings, files, device)
    files.finish()
    distributed.stop()


def check(config):
    """Refuse now what would fail later: ValueError for a setting out of range or unknown, or settings that do not go together."""
    check_values(
        config, num_images=(1, None), batch_size=(1, None), seed=(-1, 2**62), seed_to=(-1, 2**62), steps=(0, None), eta=(0, 1),
        strength=(0.001, 1), resamplings=(1, None), interpolate=(0, None),
    )  # fmt: skip
    check_choice("sampler", config.sampler, SAMPLERS)
    if config.spacing:
        check_choice("spacing", config.spacing, SPACINGS)
    if config.mask and not config.init_image:
        raise ValueError("--mask says which part of a picture is drawn anew: name the picture with --init_image")
    if config.interpolate and config.init_image:
        raise ValueError("--interpolate goes from one seed's noise to another's: leave out --init_image")
    if config.interpolate == 1:
        raise ValueError("--interpolate 1: a strip has at least 2 pictures, one an end")


def load_model(config):
    """(GaussianDiffusion, class names) from a checkpoint alone. A bare state dict's classes are called by their numbers."""
    path, remark = find_weights(config.model_path)
    checkpoint = load_checkpoint(path, lazily=True)
    if distributed.is_main():
        print(f"weights: {path.resolve()}{remark}")
    overrides = {"input_shape": config.input_shape} if config.input_shape else {}
    if checkpoint["config"]:
        diffusion = build.from_config({**checkpoint["config"], **overrides}, len(checkpoint["classes"]))
        build.load_weights(diffusion, checkpoint["weights"], checkpoint["weights_kind"])
    else:
        diffusion = build.from_weights(checkpoint["weights"], **overrides)
        if distributed.is_main() and not overrides:
            print("a bare state dict does not say its size: drawing {}x{}; --input_shape sets another".format(*diffusion.img_size))
    if diffusion.num_classes is None:
        return diffusion.eval(), []
    named = diffusion.num_classes - (diffusion.null_class is not None)
    return diffusion.eval(), checkpoint["classes"] or [str(number) for number in range(named)]


def choose_labels(config, diffusion, classes):
    """The class of each picture in turn, (n,), to be repeated; None for a network without classes.

    Without a class_name it is a row of COLUMNS pictures for each class, of the first MAX_ROWS.
    """
    if config.class_name and not classes:
        raise ValueError(f"--class_name {config.class_name}: this model was trained without classes; train with --class_conditional True")
    if config.guidance_scale != 1 and diffusion.null_class is None:
        raise ValueError("--guidance_scale needs a model with a null class: train with --class_conditional True and label_dropout above 0")
    if not classes:
        return None
    if config.class_name:
        check_choice("class_name", config.class_name, classes)
        return torch.tensor([classes.index(config.class_name)])
    rows = classes[:MAX_ROWS]
    if distributed.is_main():
        more = f" (and {len(classes) - MAX_ROWS} more: --class_name draws one)" if len(classes) > MAX_ROWS else ""
        print(f"a row of each class, from the top: {', '.join(rows)}{more}")
    return torch.arange(len(rows)).repeat_interleave(COLUMNS)


def solver_settings(config, diffusion):
    """The arguments of `diffusion.sample_steps` that are the same for every batch. Settles `steps` and the batch size too."""
    shape, channels = diffusion.img_size, diffusion.img_channels
    settings = {name: getattr(config, name) for name in ("sampler", "guidance_scale", "use_ema")} | {"spacing": config.spacing or None}
    if config.sampler == "ddpm":
        settings["variance"] = config.variance
    elif config.variance != "beta":
        raise ValueError("--variance is ddpm's: choose --sampler ddpm with it")
    if config.sampler == "ddim" or config.eta:
        settings["eta"] = config.eta
    strength = 1.0
    if config.mask:
        known = load_picture(config.init_image, shape, channels)
        settings |= {"known": known, "mask": load_mask(config.mask, shape), "resamplings": config.resamplings}
    elif config.init_image:
        strength = config.strength
        settings |= {"init": load_picture(config.init_image, shape, channels), "strength": strength}
    available = max(1, int(strength * diffusion.num_timesteps))
    config.steps = config.steps or (available if config.sampler == "ddpm" else min(DEFAULT_STEPS, available))
    diffusion.plan(config.sampler, config.steps, config.spacing or None, strength)
    return {**settings, "steps": config.steps}


def pays(config, diffusion):
    """Whether compiling, which takes about a minute, is worth it for so many network calls."""
    return config.steps * -(-config.num_images // config.batch_size) >= 5000


def draw(config, diffusion, labels, settings, files, device):
    """Batch by batch, each of the same size whatever the number of pictures, so that it changes none of them."""
    size = config.batch_size
    batches = range(0, config.num_images, size)[distributed.rank() :: distributed.world_size()]
    ends = interpolation_ends(config, diffusion, device)
    todo = [first for first in batches if not files.have(first, size)]
    with tqdm(total=len(todo) * config.steps, unit="step", disable=not distributed.is_main(), dynamic_ncols=True) as bar:
        for first in todo:
            numbers = torch.arange(first, first + size)
            y = None if labels is None else labels[numbers % len(labels)].to(device)
            seeds = [config.seed] * size if ends else [config.seed + number for number in numbers.tolist()]
            batch = {name: value.expand(size, *value.shape[1:]) if name in ("init", "known") else value for name, value in settings.items()}
            if ends:
                batch["x_T"] = torch.stack([slerp(*ends, min(number / (config.num_images - 1), 1.0)) for number in numbers.tolist()])
            for step, (x, x_0) in enumerate(diffusion.sample_steps(size, device, y, seeds=seeds, **batch)):
                if config.trajectory and first == 0:
                    files.add_moment(step, x, x_0)
                bar.update()
            files.add(first, to_uint8(x))


def interpolation_ends(config, diffusion, device):
    """The noises at the two ends of a strip, (c, h, w) each; None where none was asked for."""
    if not config.interpolate:
        return None
    seeds = (config.seed, config.seed_to if config.seed_to >= 0 else config.seed + 1)
    return tuple(next(seeded_noise(seeds, (diffusion.img_channels, *diffusion.img_size), device)))


def describe(config, diffusion):
    """What a picture depends on besides its seed and class, as text for its file."""
    names = "sampler steps spacing eta variance guidance_scale class_name use_ema init_image strength mask resamplings interpolate seed_to"
    used = {name: str(getattr(config, name)) for name in names.split()}
    network = diffusion.ema_model if config.use_ema else diffusion.model
    return {"weights": weights_digest(network.state_dict()), "size": "x".join(map(str, diffusion.img_size)), **used}


if __name__ == "__main__":
    run_script(main)
