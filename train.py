"""Train a DDPM on the images of train_lines.txt."""

import utils.terminal  # noqa: F401 (first: Ctrl-C during the other imports is no traceback)

# isort: split
import math
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from typing import NamedTuple

import torch
from torch.nn.utils import clip_grad_norm_

from nets import GaussianDiffusion, architecture, build
from utils import distributed
from utils.checkpoint.file import Checkpoint
from utils.checkpoint.resume import check_classes, images_fingerprint, merge_settings, restore, start_settings
from utils.checkpoint.runs import find_resumed, open_weights, run_folder
from utils.cpu_threads import SpeedWatch, is_measured, set_threads
from utils.data.dataset import ImageDataset, epoch_batches, fit_batch_size, normalize, open_dataset, split_validation
from utils.data.image_format import ImageFormat
from utils.device import autocast, choose_compile, choose_device, choose_precision, memory_format, peak_memory
from utils.errors import UserError, explain_out_of_memory, run_script
from utils.settings import choice, defaults, preset_values, settings, typed_options
from utils.training.memory import advise, check_network_fits, measure_needs, print_memory, try_gradients
from utils.training.meter import Meter, counts_as_bad, epoch_means
from utils.training.optimizer import choose_learning_rate, learning_rate, make_optimizer, step_unless_bad
from utils.training.presets import PRESETS
from utils.training.run_files import RunWriter
from utils.training.settings_schema import CARRIED, RUN_SETTINGS
from utils.training.signals import StopSignal
from utils.training.step_rng import derive_seed, sample_step_noise
from utils.training.summary import origin, print_dry_run, print_time, summarize
from utils.training.validation import validation_loss


# fmt: off
@settings
class Config:
    preset: str = ""                                     # named set of settings (PRESETS); "": the article's settings

    # Images
    annotation_path: str = "train_lines.txt"             # the annotation file that txt_annotation.py writes
    input_shape: tuple[int, int] = (32, 32)              # height and width of the images
    img_channels: int = 3                                # 3: color, 1: gray
    resize_mode: str = "crop"                            # how images of another aspect ratio are fitted
    background: tuple[int, int, int] = (255, 255, 255)   # background color: of transparent pixels and of pad's bars
    icc: bool = True                                     # convert embedded color profiles to sRGB; False: ignore them
    horizontal_flip: bool = False                        # random horizontal flips: not for text or flags
    num_workers: int = 0                                 # threads that decode images into the cache; 0: one per core

    # Network
    channel: int = 128                                   # channels of the first level; cost grows with their square
    channel_mults: tuple[int, ...] = (1, 2, 2, 2)        # channel multiplier per level; each next level halves the size
    num_res_blocks: int = 2                              # residual blocks per level
    attention_resolutions: tuple[int, ...] = (1,)        # levels with self-attention; 0 is the full resolution
    num_groups: int | str = "auto"                       # GroupNorm groups; auto: up to 32, each of 4 or more channels
    dropout: float = 0.1                                 # dropout probability
    activation_checkpointing: bool = False               # less memory, slower: the backward pass recomputes activations
    class_conditional: bool = False                      # train with the class folders as labels, to sample by class
    label_dropout: float = 0.1                           # probability of dropping label and condition, for guidance
    condition: str = ""                                  # image that the network is conditioned on, see conditioning.md
    condition_scale: int = 4                             # downscaling factor of the condition low_res

    # Diffusion
    schedule: str = "linear"                             # noise schedule
    num_timesteps: int = 1000                            # number of diffusion timesteps, T
    schedule_low: float = 1e-4                           # first beta of the linear schedule, at T = 1000
    schedule_high: float = 0.02                          # last beta of the linear schedule, at T = 1000
    schedule_shift: float = 0.0                          # added to lambda of cosine and sigmoid; positive: less noise
    prediction: str = "eps"                              # prediction target: noise (eps), image (x0), v-prediction (v)
    loss_type: str = "l2"                                # loss function
    loss_weighting: str = "none"                         # weights of the timesteps in the loss
    min_snr_gamma: float = 5.0                           # gamma of min_snr
    timestep_sampling: str = "uniform"                   # distribution of timesteps; middle: fewer extreme noise levels

    # Optimization
    epochs: int = 1000                                   # passes over all images
    steps: int = 0                                       # minimum number of steps, in whole epochs; 0: set by epochs
    batch_size: int = 64                                 # global batch size, over all processes
    accumulate: int = 1                                  # micro-batches per batch (gradient accumulation): less memory
    init_lr: float | str = "auto"                        # highest learning rate; auto: 2e-4 * 128 / channel, up to 1e-3
    min_lr: float = 2e-6                                 # last learning rate
    warmup: float = 0.05                                 # linear warm-up: fraction of all steps, at most 1000 steps
    optimizer_type: str = "adam"                         # optimizer; muon: more progress per step, slower steps
    momentum: float = 0.9                                # beta 1 of the optimizer
    weight_decay: float = 0.0                            # weight decay of the optimizer
    lr_decay_type: str = "cos"                           # learning rate decay
    grad_clip: float = 1.0                               # gradient norm to clip at; 0: no clipping
    max_bad_steps: int = 50                              # consecutive non-finite gradients (NaN, inf) that end the run
    ema_decay: float = 0.9999                            # the EMA averages about the last 1/(1 - ema_decay) steps
    ema_start: int = 2000                                # step at which the EMA starts; before, it equals the weights
    ema_warmup: bool = True                              # the EMA averages at most a ninth of the steps so far

    # Machine
    device: str = "auto"                                 # auto, cuda, cuda:1, mps or cpu
    precision: str = "auto"                              # mixed-precision dtype; fp32: TF32 convolutions on NVIDIA GPUs
    compile: bool | str = "auto"                         # torch.compile the network; auto: on CUDA from 5,000 steps on
    num_threads: int | str = "auto"                      # CPU threads; auto: OMP_NUM_THREADS if set, else the fastest
    seed: int = 0                                        # random seed of the run

    # Output
    save_dir: str = "logs"                               # folder in which the run's folder is created
    save_period: int = 25                                # save epoch_XXXX.pth every so many epochs
    save_minutes: float = 10.0                           # minutes between saves of last.pth within an epoch
    keep_last: int = 0                                   # number of newest epoch_XXXX.pth to keep; 0: all
    preview_period: int = 10                             # epochs between previews, the first after epoch 1; 0: none
    preview_sampler: str = "sde-dpm++"                   # solver of the previews
    preview_steps: int = 25                              # sampling steps of the previews
    val_split: float = 0.0                               # fraction of the images held out for the validation loss
    dry_run: bool = False                                # print steps, memory and time of the run without training
    start_from: str = ""                                 # weights to start a new run from; size and classes may differ
    resume: str = ""                                     # resume a run: "latest", or its folder or checkpoint
# fmt: on


class TrainContext(NamedTuple):
    """What `prepare` builds from the settings and `train` works with."""

    device: torch.device
    layout: torch.memory_format
    dataset: ImageDataset  # the images to train on
    validation: ImageDataset  # the images kept aside; may be empty
    batch_size: int  # of the whole batch, over all processes
    steps_per_epoch: int
    diffusion: GaussianDiffusion
    model: torch.nn.Module  # `diffusion`, with gradients averaged over all processes
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    meter: Meter
    about: Checkpoint  # what all checkpoints of the run share: settings and classes


def main(arguments=None):
    asked, own, checkpoint = read_settings(arguments)
    check(asked)
    config, device = resolve(asked)
    context = prepare(config, device, checkpoint, saved_settings(asked, config, own))
    config = resolve_by_steps(config, context, checkpoint)
    needs = measure_needs(config, context)
    with explain_out_of_memory(lambda: advise(needs, config, device)):
        choose_threads(config, context, checkpoint)
        start = restore(checkpoint, context, config)
        summary = summarize(config, context, start, PRESETS.get(config.preset, {}))
        print(summary)
        print_memory(needs, config, device)
        if config.dry_run:
            network = architecture.unet_arguments(context.about.config, len(context.dataset.classes))
            flops = architecture.count_flops(network, config.input_shape)
            print_dry_run(config, context, flops, partial(train_step, config, context, epoch=0, consumed=0, lr=0.0))
        else:
            print_time(config, context, start)
            summary = f"{origin(sys.argv[1:] if arguments is None else arguments)}\n{summary}"
            train(config, context, run_folder(checkpoint, config.save_dir), start, summary)
    distributed.stop()


def read_settings(arguments=None):
    """(Config, its defaults when the run began, Checkpoint or None).

    A resumed run has its own settings, a run that starts from weights their network and schedule.
    """
    declared = RUN_SETTINGS | {"preset": choice(PRESETS, fixed="run")}
    own, options = defaults(Config, declared), typed_options(Config, declared, __doc__, arguments)
    distributed.start({**own, **options})
    preset = preset_values(PRESETS, options.get("preset", own["preset"]), declared)
    config = {**own, **preset, **options}
    checkpoint = find_resumed(config["resume"], config["save_dir"])
    if checkpoint:
        checkpoint.config = build.settings_of(checkpoint)
        config, own = merge_settings(own, options, checkpoint), {**own, **checkpoint.defaults}
    elif config["start_from"]:
        checkpoint = replace(open_weights(config["start_from"]), training=None, ema_step=None)
        checkpoint.config = build.settings_of(checkpoint)
        config = start_settings(config, options, checkpoint)
    if "epochs" in options:  # a typed number of epochs overrides the steps of a preset or of a resumed run
        config = {**config, "steps": options.get("steps", 0)}
    return Config(**config), own, checkpoint


def check(config):
    """UserError now for settings that do not fit together: they would fail later."""
    if config.lr_decay_type == "step" and not (config.init_lr and config.min_lr):
        raise UserError("lr_decay_type step falls by a factor and cannot reach 0: set init_lr and min_lr above 0")
    architecture.check_levels(config.channel_mults, config.attention_resolutions)
    architecture.check_input_shape(config.input_shape, len(config.channel_mults))
    architecture.make_condition(asdict(config))


def resolve(config):
    """(Config with what fits this machine for every "auto" but compile's, torch.device)."""
    device = choose_device(config.device, distributed.local_rank(), distributed.world_size())
    precision = choose_precision(config.precision, device)
    if precision == "fp16" and device.type != "cuda":  # a GradScaler needs float64, which Apple's GPUs lack
        raise UserError("precision 'fp16' trains on CUDA alone: choose 'fp32' or 'bf16'")
    resolved = replace(
        config,
        device=str(device) if distributed.world_size() == 1 else device.type,
        precision=precision,
        num_groups=architecture.choose_groups(config.num_groups, config.channel),
        init_lr=choose_learning_rate(config.init_lr, config.channel),
    )
    return resolved, device


def saved_settings(asked, config, own):
    """A Checkpoint without weights: the settings asked for and, apart from them, the resolved."""
    before, now = asdict(asked), asdict(config)
    resolved = {name: now[name] for name in now if now[name] != before[name] or name == "device"}
    return Checkpoint(path=None, weights={}, config=before, resolved=resolved, defaults=own)


def prepare(config, device, checkpoint=None, about=None):
    """The TrainContext, with the checkpoint's weights where there is one."""
    carried = {name: checkpoint.config[name] for name in CARRIED if checkpoint and name in checkpoint.config}
    network = asdict(config) | carried
    image_format = ImageFormat.from_config(network)
    with distributed.one_per_machine_first():
        images = open_dataset(config.annotation_path, image_format, config.num_workers, condition=config.condition)
    digests = {"the digest of the images": images_fingerprint(images), "compile": None}  # it may fail on one machine
    position = {"the position of the checkpoint": checkpoint and checkpoint.training and checkpoint.training[:4]}
    distributed.check_equal({**network, **digests, **position})
    if checkpoint and config.start_from and checkpoint.training is None:
        weights = architecture.change_classes(checkpoint.weights, checkpoint.classes, images.classes, network)
        checkpoint = replace(checkpoint, weights=weights, kind="ema", classes=[])
    check_classes(config, images.classes, checkpoint)
    dataset, validation = split_validation(images, config.val_split)
    batch_size = fit_batch_size(len(dataset), config.batch_size, distributed.world_size() * config.accumulate)
    arguments = architecture.unet_arguments(network, len(images.classes))
    check_network_fits(architecture.count_parameters(arguments), device)
    torch.manual_seed(derive_seed(config.seed, "weights"))
    diffusion = build.from_config(network, len(images.classes))
    if checkpoint:
        build.load_weights(diffusion, checkpoint.weights, checkpoint.kind)
        diffusion.ema_step = config.ema_start if checkpoint.ema_step is None else checkpoint.ema_step
    layout = memory_format(device, config.precision)
    diffusion = diffusion.to(device=device, memory_format=layout).train()
    model = distributed.wrap(diffusion)
    trained = diffusion.model.parameters()  # the EMA's copy needs no optimizer
    optimizer = make_optimizer(config.optimizer_type, trained, device, config.momentum, config.weight_decay)
    scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
    meter, about = Meter(device, config.num_timesteps), about or saved_settings(config, config, {})
    about = replace(about, config=about.config | carried, classes=list(dataset.classes))
    steps = len(dataset) // batch_size
    return TrainContext(
        device, layout, dataset, validation, batch_size, steps, diffusion, model, optimizer, scaler, meter, about
    )


def resolve_by_steps(config, context, checkpoint):
    """Config with what the number of steps decides: epochs, and whether compiling pays."""
    epochs = math.ceil(config.steps / context.steps_per_epoch) if config.steps else config.epochs
    done = checkpoint.training.epoch if checkpoint and checkpoint.training else 0
    compiled = choose_compile(config.compile, context.device, (epochs - done) * context.steps_per_epoch)
    context.about.resolved.update(epochs=epochs, compile=compiled)
    return replace(config, epochs=epochs, compile=compiled)


def choose_threads(config, context, checkpoint=None):
    """Sets the number of CPU threads, a resumed run's own where it has one. Checkpoints keep it."""
    kept = checkpoint.resolved.get("num_threads") if checkpoint and checkpoint.training else None
    step, images = partial(try_gradients, config, context), context.batch_size // config.accumulate
    number = set_threads(config.num_threads, context.device, step, images, kept=kept)
    if context.device.type == "cpu" and distributed.world_size() == 1:
        context.about.resolved["num_threads"] = number


def train(config, context, folder, start, summary):
    """The training loop, from the position in `start` to the last epoch, or to a signal.

    summary: what the folder keeps of how the run was started.
    """
    rank, world_size, batch_size = distributed.rank(), distributed.world_size(), context.batch_size
    compile_network(config, context.diffusion)
    lagged_max, speed = distributed.LaggedMax(), SpeedWatch()
    timed_again = is_measured(config.num_threads, context.device) and not config.compile  # it would compile again
    with StopSignal() as stop, RunWriter(folder, config, context, start, summary) as files:
        for epoch in range(start.epoch, config.epochs):
            consumed = start.images if epoch == start.epoch else 0  # images of this epoch
            context.meter.reset(start.sums if epoch == start.epoch else None)
            batches = epoch_batches(len(context.dataset), batch_size, config.seed, epoch, consumed, rank, world_size)
            for images, labels in context.dataset.batches(batches, pin_memory=context.device.type == "cuda"):
                lr = learning_rate_at(config, context, epoch * context.steps_per_epoch + consumed // batch_size)
                began = time.perf_counter()
                train_step(config, context, images, labels, epoch, consumed, lr)
                consumed += batch_size
                if timed_again and speed.changed(time.perf_counter() - began):
                    choose_threads(config, context)

                loss, bad_in_row = context.meter.latest()
                files.show(epoch, batch_size, loss, lr)
                # Rank 0 keeps the time, any process may get a signal: all act two steps later.
                number, save_now, bad_in_row = lagged_max.largest(stop.number, int(files.save_due()), bad_in_row)
                if bad_in_row >= config.max_bad_steps:
                    raise UserError(f"{bad_in_row} steps in a row had NaN or infinite gradients. {files.advice()}")
                saved = (number or save_now) and files.save(epoch, consumed)
                if number:
                    files.stop(number, saved)
            finish_epoch(config, context, files, epoch)
        files.finish()


def compile_network(config, diffusion):
    if config.compile:
        # Older versions split the network for DDP and then refuse recomputed activations.
        torch._dynamo.config.optimize_ddp = not config.activation_checkpointing
        diffusion.model.compile()  # in place: the keys of its state dict stay the same


def learning_rate_at(config, context, step):
    total = config.epochs * context.steps_per_epoch
    return learning_rate(step, total, config.init_lr, config.min_lr, config.warmup, config.lr_decay_type)


def train_step(config, context, images, labels, epoch, consumed, lr):
    """One update of weights, EMA and meter from a batch.

    images (b, H, W, C) uint8, labels (b,): this process's part of the batch that starts after
    `consumed` images of `epoch`. A gradient that is not finite changes nothing but the meter.
    """
    (group,) = context.optimizer.param_groups
    group["lr"] = lr
    x, y, cond, step_noise = make_batch(config, context, images, labels, epoch, consumed)
    losses = backward(config, context, x, y, cond, step_noise)
    context.scaler.unscale_(context.optimizer)
    norm = clip_grad_norm_(group["params"], config.grad_clip or float("inf"))
    bad = 1 - norm.isfinite().float()
    step_unless_bad(context.optimizer, context.scaler, bad)
    context.diffusion.update_ema(skip=bad)
    context.meter.add(losses, step_noise.t, norm, bad, counts_as_bad(bad, context.scaler))


def make_batch(config, context, images, labels, epoch, consumed):
    """(x (b, C, H, W) in [-1, 1], class ids (b,) or None, conditions or None, StepNoise).

    The randomness is sampled for the whole batch on every process, so that the number of processes
    changes nothing but dropout.
    """
    rank, world_size = distributed.rank(), distributed.world_size()
    torch.manual_seed(derive_seed(config.seed, epoch, consumed, "dropout", rank))
    generator, seed = torch.Generator(context.device), derive_seed(config.seed, epoch, consumed)
    shape = (context.batch_size, config.img_channels, *config.input_shape)
    given = context.diffusion.sample_timesteps, config.horizontal_flip / 2, config.label_dropout, bool(config.condition)
    step_noise = sample_step_noise(generator, seed, shape, *given).of_rank(rank, world_size)
    x = normalize(images, context.device, step_noise.flip if config.horizontal_flip else None, context.layout)
    x, cond = context.diffusion.condition(x, step_noise.condition, step_noise.drop)
    y = None
    if config.class_conditional:
        labels = labels.to(context.device, non_blocking=context.device.type == "cuda")
        y = torch.where(step_noise.drop, context.diffusion.num_classes - 1, labels)
    return x, y, cond, step_noise


def backward(config, context, x, y, cond, step_noise):
    """The gradients of the batch, micro-batch by micro-batch. Returns the losses (b,)."""
    world_size, size, losses = distributed.world_size(), len(x) // config.accumulate, []
    for number in range(config.accumulate):
        rows = slice(number * size, (number + 1) * size)
        last = world_size == 1 or number == config.accumulate - 1
        given = {"t": step_noise.t[rows], "noise": step_noise.noise[rows], "reduction": "none"}
        given["cond"] = None if cond is None else cond[rows]
        with nullcontext() if last else context.model.no_sync():  # the processes' gradients are averaged once a step
            with autocast(context.device, config.precision):
                loss = context.model(x[rows], None if y is None else y[rows], **given)
            context.scaler.scale(loss.mean() / config.accumulate).backward()
        losses.append(loss.detach())
    return torch.cat(losses)


def finish_epoch(config, context, files, epoch):
    """Writes the epoch's row with its validation loss, then curves, checkpoints and preview."""
    sums = torch.stack(distributed.gather(context.meter.sums.cpu()))
    seconds = time.monotonic() - files.epoch_began
    step = (epoch + 1) * context.steps_per_epoch
    lr = learning_rate_at(config, context, step - 1)
    row = {"epoch": epoch + 1, "step": step, **epoch_means(sums), "learning_rate": lr}
    if len(context.validation):
        row["val_loss"] = validation_loss(config, context)
    if distributed.is_main():
        files.end_epoch(row, seconds, peak_memory(context.device))


if __name__ == "__main__":
    run_script(main)
