"""Train a DDPM on the pictures of train_lines.txt. Each setting is an option: --batch_size 32."""

import utils.terminal  # noqa: F401 (first: Ctrl-C during the other imports is no traceback)

# isort: split
import time
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch.nn.utils import clip_grad_norm_

from nets import LOSS_WEIGHTINGS, LOSSES, PREDICTIONS, SAMPLERS, SCHEDULES, GaussianDiffusion, build
from nets.sizes import check_input_shape, check_levels, choose_groups, count_flops, count_parameters
from nets.weights import known_settings, unet_arguments
from utils import distributed
from utils.config import block_settings, check_values, settings, typed_options
from utils.data.dataset import ImageDataset, epoch_batches, fit_batch_size, normalise, open_dataset, split_validation
from utils.data.decode import RESIZE_MODES
from utils.device import DTYPES, autocast, choose_compile, choose_device, choose_precision, memory_format, peak_memory
from utils.errors import UserError, explain_out_of_memory, run_script
from utils.run_folders import find_checkpoint, run_folder
from utils.training.memory import advice_for_training, check_network_fits
from utils.training.meter import Meter, counts_as_bad, epoch_means
from utils.training.optimizer import (
    DECAYS,
    OPTIMIZERS,
    choose_learning_rate,
    learning_rate,
    make_optimizer,
    step_unless_bad,
)
from utils.training.resume import check_classes, merge_config, restore
from utils.training.run_files import RunWriter
from utils.training.signals import StopSignal
from utils.training.start_from import find_start, start_config
from utils.training.step_rng import derive_seed, sample_step_noise
from utils.training.summary import print_dry_run, print_summary
from utils.training.validation import validation_loss


# fmt: off
@settings
class Config:
    preset: "Literal[tuple(PRESETS)]" = ""               # settings by one name, see PRESETS; "": the article's

    # Pictures
    annotation_path: str = "train_lines.txt"             # the list that txt_annotation.py writes
    input_shape: tuple[int, int] = (32, 32)              # height and width of the pictures that are learned and drawn
    img_channels: Literal[3, 1] = 3                      # 3 colour, 1 grey
    resize_mode: Literal[tuple(RESIZE_MODES)] = "crop"   # how a picture of another shape is made to fit
    background: tuple[int, int, int] = (255, 255, 255)   # what shows through where a picture is transparent
    icc: bool = True                                     # convert colour profiles to sRGB; False: ignore them
    horizontal_flip: bool = False                        # mirror half of the pictures: not for text or flags
    num_workers: int = 0                                 # threads that decode the pictures, once; 0: one a core

    # Network
    channel: int = 128                                   # width of the first level; cost grows with its square
    channel_mults: tuple[int, ...] = (1, 2, 2, 2)        # width of each level, in channels; each level halves the size
    num_res_blocks: int = 2                              # residual blocks a level
    attention_resolutions: tuple[int, ...] = (1,)        # the levels that have attention; 0 is full size
    num_groups: Literal["auto"] | int = "auto"           # of group norm; auto: of 4 channels or more, at most 32
    dropout: float = 0.1                                 # share of features dropped in training
    activation_checkpointing: bool = False               # less memory for more time: activations are computed twice
    class_conditional: bool = False                      # learn the class folders, to draw by class later
    label_dropout: float = 0.1                           # share of labels hidden, for guidance when drawing by class

    # Diffusion
    schedule: Literal[tuple(SCHEDULES)] = "linear"       # how the noise grows with the timestep
    num_timesteps: int = 1000                            # T
    schedule_low: float = 1e-4                           # first beta of the linear schedule, at T = 1000
    schedule_high: float = 0.02                          # last beta of the linear schedule, at T = 1000
    schedule_shift: float = 0.0                          # added to lambda of cosine or sigmoid: above 0 is less noise
    prediction: Literal[tuple(PREDICTIONS)] = "eps"      # what the network predicts: eps is the noise, x0 the image
    loss_type: Literal[tuple(LOSSES)] = "l2"             # how errors of the prediction are counted
    loss_weighting: Literal[tuple(LOSS_WEIGHTINGS)] = "none"  # how timesteps are weighted
    min_snr_gamma: float = 5.0                           # gamma of min_snr

    # Optimisation
    epochs: int = 1000                                   # how often every picture is seen
    batch_size: int = 64                                 # pictures a step, over all processes
    accumulate: int = 1                                  # micro-batches of a batch: less memory, the same update
    init_lr: Literal["auto"] | float = "auto"            # highest learning rate; auto: 2e-4 * 128 / channel, up to 1e-3
    min_lr: float = 2e-6                                 # last learning rate
    warmup: float = 0.05                                 # share of all steps with a rising learning rate, at most 1000
    optimizer_type: Literal[tuple(OPTIMIZERS)] = "adam"  # the optimizer; muon: steps that teach more and take longer
    momentum: float = 0.9                                # beta 1 of the optimizer
    weight_decay: float = 0.0                            # weight decay of the optimizer
    lr_decay_type: Literal[tuple(DECAYS)] = "cos"        # how the learning rate falls
    grad_clip: float = 1.0                               # largest norm of the gradient; 0: no clipping
    max_bad_steps: int = 50                              # steps in a row with NaN gradients that end the run
    ema_decay: float = 0.9999                            # the EMA of the weights spans the last 1/(1 - ema_decay) steps
    ema_start: int = 2000                                # step at which the EMA starts; it copies the weights before
    ema_warmup: bool = True                              # the EMA spans at most a ninth of the steps so far

    # Machine
    device: str = "auto"                                 # auto, cuda, mps or cpu
    precision: Literal[("auto", *DTYPES)] = "auto"       # numbers that the network computes in
    compile: Literal["auto"] | bool = "auto"             # compile the network: auto, True or False
    seed: int = 0                                        # the run's randomness is a function of it

    # Output
    save_dir: str = "logs"                               # where the run's folder is made
    save_period: int = 25                                # epochs between the weights that are kept
    save_minutes: float = 10.0                           # minutes between saves of last.pth within an epoch
    keep_last: int = 0                                   # how many of the kept weights stay; 0: all
    preview_period: int = 10                             # epochs between preview pictures, after the first; 0: none
    preview_sampler: Literal[tuple(SAMPLERS)] = "sde-dpm++"  # solver of the previews
    preview_steps: int = 25                              # its steps
    val_split: float = 0.0                               # share of the pictures for a validation loss, not trained on
    dry_run: bool = False                                # print what the run needs: steps, memory, time; stop
    start_from: str = ""                                 # weights to begin a new run with, of any size or classes
    resume: str = ""                                     # "latest", or a path: resume that run


# Settings by one name. A typed option goes over the preset, the preset over the block.
# benchmarks/recipes.py and benchmarks/time_to_quality.py measure them (benchmarks/NOTES.md).
PRESETS = {
    # The article's settings, as the block has them.
    "": {},
    # Minutes without a GPU. v with the cosine schedule learns soonest, Muon's steps teach most, and
    # a narrow network and small batches leave time for many. The EMA begins early, as the
    # run is short.
    "quick": {
        "channel": 32, "num_res_blocks": 1, "dropout": 0.0, "prediction": "v", "schedule": "cosine",
        "epochs": 8, "batch_size": 16, "init_lr": 1.2e-3, "warmup": 0.01,
        "optimizer_type": "muon", "ema_start": 100,
    },
    # An hour on one core, minutes on a GPU: more channels where the images are small, which cost
    # little there, and batches that make Muon's share of the time small. Its network is that of the
    # weights in the box. 60 epochs suit a few thousand images.
    "small": {
        "channel": 32, "channel_mults": (1, 2, 4, 4), "num_res_blocks": 1, "attention_resolutions": (2,),
        "dropout": 0.0, "prediction": "v", "schedule": "cosine",
        "epochs": 60, "batch_size": 32, "init_lr": 1.4e-3, "optimizer_type": "muon", "ema_start": 100,
        "ema_decay": 0.999,
    },
}
# fmt: on


class Parts(NamedTuple):
    """What `prepare` builds from the settings and `train` works with."""

    device: torch.device
    layout: torch.memory_format
    dataset: ImageDataset  # the images to train on
    validation: ImageDataset  # the images kept aside; may be empty
    batch_size: int  # of the whole batch, over all processes
    diffusion: GaussianDiffusion
    model: torch.nn.Module  # `diffusion`, with gradients averaged over all processes
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    meter: Meter
    generator: torch.Generator  # seeded anew at each step


def main(arguments=None):
    config, checkpoint, source = read_settings(arguments)
    check(config)
    config, device = resolve(config)
    parts = prepare(config, device, checkpoint)
    print_summary(config, parts, PRESETS[config.preset])
    with explain_out_of_memory(lambda: advice_for_training(config, parts)):
        if config.dry_run:
            flops = count_flops(unet_arguments(asdict(config), len(parts.dataset.classes)), config.input_shape)
            print_dry_run(config, parts, flops, partial(train_step, config, parts, epoch=0, consumed=0, lr=0.0))
        else:
            folder = run_folder(checkpoint, source, config.save_dir)
            train(config, parts, folder, restore(checkpoint, source, parts, config))
    distributed.stop()


def read_settings(arguments=None):
    """(Config, checkpoint or None, its path). A resumed run has its own settings."""
    block, typed = block_settings(Config), typed_options(Config, __doc__, arguments)
    distributed.start()
    block = replace(block, preset=typed.get("preset", block.preset))
    block = replace(block, **PRESETS[block.preset])
    config = replace(block, **typed)
    source, checkpoint = find_checkpoint(config.resume, config.save_dir)
    if checkpoint:
        checkpoint["config"] = known_settings(checkpoint)
        config = merge_config(block, typed, checkpoint, source)
    elif config.start_from:
        source, checkpoint = find_start(config.start_from)
        checkpoint["config"] = known_settings(checkpoint)
        config = start_config(config, typed, checkpoint, source)
    return config, checkpoint, source


def check(config):
    """ValueError now for a setting out of range: it would fail later."""
    check_values(
        config,
        input_shape=(1, 2**14),
        background=(0, 255),
        num_workers=(0, 1024),
        channel=(1, 2**16),
        channel_mults=(1, 1024),
        num_res_blocks=(1, 1024),
        num_groups=(1, None),
        dropout=(0, 0.99),
        label_dropout=(0, 0.99),
        num_timesteps=(1, 10**6),
        schedule_shift=(-5, 5),
        min_snr_gamma=(0, None),
        epochs=(1, None),
        batch_size=(1, None),
        accumulate=(1, None),
        init_lr=(0, None),
        min_lr=(0, None),
        warmup=(0, 1),
        momentum=(0, 0.9999),
        weight_decay=(0, None),
        grad_clip=(0, None),
        max_bad_steps=(1, None),
        ema_decay=(0, 1),
        ema_start=(0, None),
        save_period=(1, None),
        save_minutes=(0, None),
        keep_last=(0, None),
        preview_period=(0, None),
        preview_steps=(1, None),
        val_split=(0, 0.9),
    )
    if config.lr_decay_type == "step" and not (config.init_lr and config.min_lr):
        raise UserError("lr_decay_type step falls by a factor and cannot reach 0: set init_lr and min_lr above 0")
    check_levels(config.channel_mults, config.attention_resolutions)
    check_input_shape(config.input_shape, len(config.channel_mults))


def resolve(config):
    """(Config with every "auto" replaced by what fits this machine, torch.device)."""
    device = choose_device(config.device, distributed.local_rank(), distributed.world_size())
    return replace(
        config,
        device=str(device) if distributed.world_size() == 1 else device.type,
        precision=choose_precision(config.precision, device),
        compile=choose_compile(config.compile, device),
        num_groups=choose_groups(config.num_groups, config.channel),
        init_lr=choose_learning_rate(config.init_lr, config.channel),
    ), device


def prepare(config, device, checkpoint=None):
    """The Parts, with the checkpoint's weights where there is one."""
    with distributed.one_per_machine_first():
        images = open_dataset(
            config.annotation_path,
            config.input_shape,
            config.img_channels,
            config.resize_mode,
            config.background,
            config.num_workers,
            icc=config.icc,
        )
    if checkpoint and config.start_from and "position" not in checkpoint:
        checkpoint = build.with_classes(checkpoint, asdict(config), images.classes)
    check_classes(config, images.classes, checkpoint)
    dataset, validation = split_validation(images, config.val_split)
    batch_size = fit_batch_size(len(dataset), config.batch_size, distributed.world_size() * config.accumulate)
    check_network_fits(count_parameters(unet_arguments(asdict(config), len(images.classes))), device)
    torch.manual_seed(derive_seed(config.seed, "weights"))
    diffusion = build.from_config(asdict(config), len(images.classes))
    if checkpoint:
        build.load_weights(diffusion, checkpoint["weights"], checkpoint["weights_kind"])
        diffusion.ema_step = checkpoint.get("ema_step", config.ema_start)
    layout = memory_format(device, config.precision)
    diffusion = diffusion.to(device=device, memory_format=layout).train()
    trained = [parameter for parameter in diffusion.parameters() if parameter.requires_grad]
    return Parts(
        device,
        layout,
        dataset,
        validation,
        batch_size,
        diffusion,
        model=distributed.wrap(diffusion),
        optimizer=make_optimizer(config.optimizer_type, trained, device, config.momentum, config.weight_decay),
        scaler=torch.amp.GradScaler(device.type, enabled=config.precision == "fp16"),
        meter=Meter(device, config.num_timesteps),
        generator=torch.Generator(device),
    )


def train(config, parts, folder, start):
    """The training loop, from the position in `start` to the last epoch, or to a signal."""
    rank, world_size, batch_size = distributed.rank(), distributed.world_size(), parts.batch_size
    steps_per_epoch = len(parts.dataset) // batch_size
    learning_rate_at = partial(
        learning_rate,
        total_steps=config.epochs * steps_per_epoch,
        init_lr=config.init_lr,
        min_lr=config.min_lr,
        warmup=config.warmup,
        decay=config.lr_decay_type,
    )
    compile_network(config, parts.diffusion)
    agreement = distributed.Agreement()
    with StopSignal() as stop, RunWriter(folder, config, parts, start) as files:
        for epoch in range(start.epoch, config.epochs):
            consumed = start.images if epoch == start.epoch else 0  # images of this epoch
            parts.meter.reset(start.sums if epoch == start.epoch else None)
            batches = epoch_batches(len(parts.dataset), batch_size, config.seed, epoch, consumed, rank, world_size)
            for images, labels in parts.dataset.batches(batches, pin_memory=parts.device.type == "cuda"):
                lr = learning_rate_at(epoch * steps_per_epoch + consumed // batch_size)
                train_step(config, parts, images, labels, epoch, consumed, lr)
                consumed += batch_size

                loss, bad_in_row = parts.meter.latest()
                files.show(epoch, batch_size, loss, lr)
                # Rank 0 keeps the time, any process may get a signal: all act two steps later.
                number, save_now, bad_in_row = agreement.largest(stop.number, int(files.save_due()), bad_in_row)
                if bad_in_row >= config.max_bad_steps:
                    raise UserError(f"{bad_in_row} steps in a row had NaN or infinite gradients. {files.advice()}")
                saved = (number or save_now) and files.save(epoch, consumed)
                if number:
                    files.stop(number, saved)
            finish_epoch(config, parts, files, epoch, learning_rate_at)


def compile_network(config, diffusion):
    """Compiles the network in place where the settings say so: its keys stay the same."""
    if config.compile:
        # Older versions split the network for DDP and then refuse recomputed activations.
        torch._dynamo.config.optimize_ddp = not config.activation_checkpointing
        diffusion.model.compile()


def train_step(config, parts, images, labels, epoch, consumed, lr):
    """One update of weights, EMA and meter from a batch.

    images (b, H, W, C) uint8, labels (b,): this process's part of the batch that starts after
    `consumed` images of `epoch`. A gradient that is not finite changes nothing but the meter.
    """
    (group,) = parts.optimizer.param_groups
    group["lr"] = lr
    x, y, draws = make_batch(config, parts, images, labels, epoch, consumed)
    losses = backward(config, parts, x, y, draws)
    parts.scaler.unscale_(parts.optimizer)
    norm = clip_grad_norm_(group["params"], config.grad_clip or float("inf"))
    bad = 1 - norm.isfinite().float()
    step_unless_bad(parts.optimizer, parts.scaler, bad)
    parts.diffusion.update_ema(skip=bad)
    parts.meter.add(losses, draws.t, norm, bad, counts_as_bad(bad, parts.scaler))


def make_batch(config, parts, images, labels, epoch, consumed):
    """(x (b, C, H, W) in [-1, 1], class ids (b,) or None, StepNoise) on the device.

    The randomness is drawn for the whole batch on every process, so that the number of processes
    changes nothing but dropout.
    """
    rank, world_size = distributed.rank(), distributed.world_size()
    torch.manual_seed(derive_seed(config.seed, epoch, consumed, "dropout", rank))
    shape = (parts.batch_size, config.img_channels, *config.input_shape)
    flip, drop = config.horizontal_flip / 2, config.label_dropout if config.class_conditional else 0.0
    draws = sample_step_noise(
        parts.generator, derive_seed(config.seed, epoch, consumed), shape, config.num_timesteps, flip, drop
    )
    draws = draws.of_rank(rank, world_size)
    x = normalise(images, parts.device, draws.flip if config.horizontal_flip else None, parts.layout)
    y = None
    if config.class_conditional:
        y = torch.where(draws.drop, parts.diffusion.num_classes - 1, labels.to(parts.device, non_blocking=True))
    return x, y, draws


def backward(config, parts, x, y, draws):
    """The gradients of the batch, micro-batch by micro-batch. Returns the losses (b,)."""
    world_size, size, losses = distributed.world_size(), len(x) // config.accumulate, []
    for number in range(config.accumulate):
        rows = slice(number * size, (number + 1) * size)
        last = world_size == 1 or number == config.accumulate - 1
        with nullcontext() if last else parts.model.no_sync():  # gradients are averaged over the processes once a step
            with autocast(parts.device, config.precision):
                labels = None if y is None else y[rows]
                loss = parts.model(x[rows], labels, t=draws.t[rows], noise=draws.noise[rows], reduction="none")
            parts.scaler.scale(loss.mean() / config.accumulate).backward()
        losses.append(loss.detach())
    return torch.cat(losses)


def finish_epoch(config, parts, files, epoch, learning_rate_at):
    """Writes the epoch's row with its validation loss, then curves, checkpoints and preview."""
    sums = torch.stack(distributed.gather(parts.meter.sums.cpu()))
    seconds = time.monotonic() - files.epoch_began
    step = (epoch + 1) * (len(parts.dataset) // parts.batch_size)
    row = {"epoch": epoch + 1, "step": step, **epoch_means(sums), "learning_rate": learning_rate_at(step - 1)}
    if len(parts.validation):
        row["val_loss"] = validation_loss(config, parts)
    if distributed.is_main():
        files.end_epoch(row, seconds, peak_memory(parts.device))


if __name__ == "__main__":
    run_script(main)
