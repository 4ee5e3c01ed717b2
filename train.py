"""Train a DDPM on the pictures of train_lines.txt. Every setting below is also an option: --batch_size 32."""
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch.nn.utils import clip_grad_norm_

from nets import GaussianDiffusion, build
from nets.diffusion import check_choice
from nets.samplers import SAMPLERS
from nets.unet import check_input_shape, check_levels, choose_groups
from nets.weights import known_settings
from utils import distributed
from utils.config import check_values, typed_options
from utils.data.dataset import (
    EpochBatches,
    ImageDataset,
    data_loader,
    effective_batch_size,
    normalise,
    open_dataset,
    split_validation,
)
from utils.device import autocast, choose_compile, choose_device, choose_precision, memory_format, peak_memory
from utils.errors import explain_out_of_memory, run_script
from utils.training.memory import advice_for_training, print_memory
from utils.training.meter import Meter, summary
from utils.training.optimizer import DECAYS, OPTIMIZERS, choose_rate, held_against, learning_rate, make_optimizer, set_rate, step_unless_bad
from utils.training.randomness import draw_step, mix
from utils.training.resume import check_classes, find_checkpoint, merge_config, restore, run_folder
from utils.training.run_files import RunFiles
from utils.training.stopping import StopSignal
from utils.training.summary import print_summary
from utils.training.validation import validation_loss


@dataclass
class Config:
    # Pictures
    annotation_path: str = "train_lines.txt"             # the list that txt_annotation.py writes
    input_shape: tuple[int, int] = (32, 32)              # height and width of the pictures that are learned and drawn
    img_channels: int = 3                                # 3 colour, 1 grey
    resize_mode: Literal["crop", "stretch", "pad"] = "crop"  # how a picture of another shape is made to fit
    background: tuple[int, int, int] = (255, 255, 255)   # what shows through where a picture is transparent
    icc: bool = True                                     # convert embedded colour profiles to sRGB; False: leave the pixels
    horizontal_flip: bool = False                        # mirror half of the pictures: not for text, faces with sides, flags
    num_workers: int = 0                                 # threads that decode the pictures, once; 0: one a core

    # Network
    channel: int = 128                                   # width of the first level; cost grows with its square
    channel_mults: tuple[int, ...] = (1, 2, 2, 2)        # width of each level, in channels; each level halves the size
    num_res_blocks: int = 2                              # residual blocks a level
    attention_resolutions: tuple[int, ...] = (1,)        # the levels that have attention; 0 is full size
    num_groups: Literal["auto"] | int = "auto"           # groups of the normalisation; auto: of 4 channels or more, at most 32
    dropout: float = 0.1                                 # share of features dropped in training
    activation_checkpointing: bool = False               # less memory for more time: activations are computed twice
    class_conditional: bool = False                      # learn the class folders, to draw by class later
    label_dropout: float = 0.1                           # share of labels hidden, for guidance when drawing by class

    # Diffusion
    schedule: str = "linear"                             # linear, cosine or sigmoid
    num_timesteps: int = 1000                            # T
    schedule_low: float = 1e-4                           # first beta of the linear schedule, at T = 1000
    schedule_high: float = 0.02                          # last beta of the linear schedule, at T = 1000
    prediction: str = "eps"                              # what the network predicts: eps (the noise), x0 or v
    loss_type: str = "l2"                                # l1, l2 or huber
    loss_weighting: str = "none"                         # none, or min_snr
    min_snr_gamma: float = 5.0                           # gamma of min_snr

    # Optimisation
    epochs: int = 1000                                   # times every picture is seen
    batch_size: int = 64                                 # pictures a step, over all processes
    accumulate: int = 1                                  # parts a batch is computed in: less memory, the same update
    init_lr: Literal["auto"] | float = "auto"            # highest learning rate; auto: 2e-4 at 128 channels, as 1/width, up to 1e-3
    min_lr: float = 2e-6                                 # last learning rate
    warmup: float = 0.05                                 # share of all steps in which the rate rises, at most 1000 steps
    optimizer_type: str = "adam"                         # adam or adamw
    momentum: float = 0.9                                # beta 1 of the optimizer
    weight_decay: float = 0.0                            # weight decay of the optimizer
    lr_decay_type: str = "cos"                           # cos or step
    grad_clip: float = 1.0                               # largest norm of the gradient; 0: no clipping
    max_bad_steps: int = 50                              # steps in a row with NaN or infinite gradients that end the run
    ema_decay: float = 0.9999                            # decay of the averaged weights, which draw the pictures
    ema_start: int = 2000                                # step at which averaging starts; before it they are copied
    ema_warmup: bool = True                              # let the average forget faster at first: for short runs

    # Machine
    device: str = "auto"                                 # auto, cuda, mps or cpu
    precision: str = "auto"                              # auto, fp32, bf16 or fp16
    compile: Literal["auto"] | bool = "auto"             # compile the network: auto, True or False
    seed: int = 0                                        # the run's randomness is a function of it

    # Output
    save_dir: str = "logs"                               # where the run's folder is made
    save_period: int = 25                                # epochs between the weights that are kept
    save_minutes: float = 10.0                           # minutes between saves of last.pth within an epoch
    keep_last: int = 0                                   # how many of the kept weights stay; 0: all
    preview_period: int = 10                             # epochs between preview pictures; 0: none
    preview_sampler: str = "sde-dpm++"                   # solver of the previews
    preview_steps: int = 25                              # its steps
    val_split: float = 0.0                               # share of the pictures kept aside for a validation loss
    dry_run: bool = False                                # print parameters, steps, memory and what "auto" became; stop
    resume: str = ""                                     # "latest", or a path: go on with that run


class Parts(NamedTuple):
    """What `prepare` builds from the settings and `train` works with."""

    device: torch.device
    layout: torch.memory_format
    dataset: ImageDataset
    rows: torch.Tensor  # indices into the dataset of the pictures that are trained on
    val_rows: torch.Tensor  # and of those kept aside
    batch_size: int
    diffusion: GaussianDiffusion
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    meter: Meter


def main():
    typed = typed_options(Config, __doc__)
    distributed.start()
    source, checkpoint = find_checkpoint(typed.get("resume", Config.resume), typed.get("save_dir", Config.save_dir))
    if checkpoint:
        checkpoint["config"] = known_settings(checkpoint)
    config = merge_config(Config, typed, checkpoint, source) if checkpoint else Config(**typed)
    check(config)
    device = choose_device(config.device, distributed.local_rank(), distributed.world_size())
    precision, compiled = choose_precision(config.precision, device), choose_compile(config.compile, device)
    groups, rate = choose_groups(config.num_groups, config.channel), choose_rate(config.init_lr, config.channel)
    device_name = str(device) if distributed.world_size() == 1 else device.type
    config = replace(config, device=device_name, precision=precision, compile=compiled, num_groups=groups, init_lr=rate)
    parts = prepare(config, device, checkpoint)
    print_summary(config, parts)
    if config.dry_run:
        print_memory(config, parts)
    else:
        folder = run_folder(checkpoint, source, config.save_dir)
        with explain_out_of_memory(lambda: advice_for_training(config, parts)):
            train(config, parts, folder, restore(checkpoint, parts, config))
    distributed.stop()


def check(config):
    """Refuse now what would fail later: ValueError for a setting out of range or unknown."""
    check_values(
        config, input_shape=(1, None), background=(0, 255), num_workers=(0, None), channel=(1, None), channel_mults=(1, None),
        num_res_blocks=(1, None), num_groups=(1, None), dropout=(0, 0.99), label_dropout=(0, 0.99), num_timesteps=(1, None),
        min_snr_gamma=(0, None),
        epochs=(1, None), batch_size=(1, None), accumulate=(1, None), init_lr=(0, None), min_lr=(0, None), warmup=(0, 1),
        momentum=(0, 0.9999), weight_decay=(0, None), grad_clip=(0, None), max_bad_steps=(1, None), ema_decay=(0, 1),
        ema_start=(0, None), save_period=(1, None), save_minutes=(0, None), keep_last=(0, None), preview_period=(0, None),
        preview_steps=(1, None), val_split=(0, 0.9),
    )  # fmt: skip
    check_choice("img_channels", config.img_channels, (1, 3))
    check_choice("lr_decay_type", config.lr_decay_type, DECAYS)
    check_choice("optimizer_type", config.optimizer_type, OPTIMIZERS)
    check_choice("preview_sampler", config.preview_sampler, SAMPLERS)
    check_levels(config.channel_mults, config.attention_resolutions)
    check_input_shape(config.input_shape, len(config.channel_mults))


def prepare(config, device, checkpoint=None):
    """Everything that the loop needs, with the checkpoint's weights where there is one."""
    with distributed.one_per_machine_first():
        dataset = open_dataset(
            config.annotation_path, config.input_shape, config.img_channels, config.resize_mode, config.background,
            config.num_workers, icc=config.icc,
        )
    check_classes(config, dataset.classes, checkpoint)
    rows, val_rows = split_validation(dataset.hashes, config.val_split)
    batch_size = effective_batch_size(len(rows), config.batch_size, distributed.world_size() * config.accumulate)
    torch.manual_seed(mix(config.seed, "weights"))
    diffusion = build.from_config(asdict(config), len(dataset.classes))
    if checkpoint:
        build.load_weights(diffusion, checkpoint["weights"], checkpoint["weights_kind"])
        diffusion.ema_step = checkpoint.get("ema_step", config.ema_start)
    layout = memory_format(device, config.precision)
    diffusion = diffusion.to(device=device, memory_format=layout).train()
    trained = [parameter for parameter in diffusion.parameters() if parameter.requires_grad]
    optimizer = make_optimizer(config.optimizer_type, trained, device, config.momentum, config.weight_decay)
    scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
    meter = Meter(device, config.num_timesteps)
    return Parts(device, layout, dataset, rows, val_rows, batch_size, diffusion, optimizer, scaler, meter)


def train(config, parts, folder, start):
    """The training loop, from the position in `start` to the last epoch, or to the signal that ends it earlier."""
    device, layout, dataset, rows, val_rows, batch_size, diffusion, optimizer, scaler, meter = parts
    rank, world_size, is_main = distributed.rank(), distributed.world_size(), distributed.is_main()
    model = distributed.wrap(diffusion)
    if config.compile:
        # Older versions of its splitting for DDP refuse recomputed activations.
        torch._dynamo.config.optimize_ddp = not config.activation_checkpointing
        diffusion.model.compile()
    trained = [parameter for parameter in diffusion.parameters() if parameter.requires_grad]
    steps_per_epoch, size = len(rows) // batch_size, batch_size // (world_size * config.accumulate)
    shape = (batch_size, config.img_channels, *config.input_shape)
    drop = config.label_dropout if config.class_conditional else 0.0
    rate_at = partial(
        learning_rate, total_steps=config.epochs * steps_per_epoch, init_lr=config.init_lr, min_lr=config.min_lr, warmup=config.warmup,
        decay=config.lr_decay_type,
    )  # fmt: skip
    generator, agreement = torch.Generator(device), distributed.Agreement()

    with StopSignal() as stop, RunFiles(folder, config, parts, start) as files:
        for epoch in range(start.epoch, config.epochs):
            consumed = start.images if epoch == start.epoch else 0
            meter.reset(start.sums if epoch == start.epoch else None)
            batches = EpochBatches(rows, batch_size, config.seed, epoch, consumed, rank, world_size)
            for images, labels in data_loader(dataset, batches, pin_memory=device.type == "cuda"):
                rate = rate_at(epoch * steps_per_epoch + consumed // batch_size)
                set_rate(optimizer, rate)

                # Drawn for the whole batch on every process, so that their number changes nothing but dropout.
                torch.manual_seed(mix(config.seed, epoch, consumed, "dropout", rank))
                seed = mix(config.seed, epoch, consumed)
                draws = draw_step(generator, seed, shape, config.num_timesteps, config.horizontal_flip / 2, drop).share(rank, world_size)
                x = normalise(images, device, draws.flip if config.horizontal_flip else None, layout)
                y = None
                if config.class_conditional:
                    y = torch.where(draws.drop, diffusion.num_classes - 1, labels.to(device, non_blocking=True))

                losses = []
                for part in range(config.accumulate):
                    mine = slice(part * size, (part + 1) * size)
                    last = world_size == 1 or part == config.accumulate - 1
                    with nullcontext() if last else model.no_sync():  # gradients are averaged over the processes once a step
                        with autocast(device, config.precision):
                            part_y = None if y is None else y[mine]
                            loss = model(x[mine], part_y, t=draws.t[mine], noise=draws.noise[mine], reduction="none")
                        scaler.scale(loss.mean() / config.accumulate).backward()
                    losses.append(loss.detach())

                scaler.unscale_(optimizer)
                norm = clip_grad_norm_(trained, config.grad_clip or float("inf"))
                bad = 1 - norm.isfinite().float()
                step_unless_bad(optimizer, scaler, bad)
                diffusion.update_ema(skip=bad)
                meter.add(torch.cat(losses), draws.t, norm, bad, held_against(bad, scaler))
                consumed += batch_size

                loss, bad_in_row = meter.shown()
                files.show(epoch, batch_size, loss, rate)
                # Rank 0 keeps the time, any process may get a signal; all hear of it at the same step, two steps later.
                number, save_now, bad_in_row = agreement.largest(stop.number, int(is_main and files.save_due()), bad_in_row)
                if bad_in_row >= config.max_bad_steps:
                    raise ValueError(f"{bad_in_row} steps in a row had NaN or infinite gradients. {files.advice()}")
                saved = (number or save_now) and files.save(epoch, consumed)
                if number:
                    files.stop(number, saved)

            sums = torch.stack(distributed.gather(meter.sums.cpu()))
            seconds = files.seconds()
            step = (epoch + 1) * steps_per_epoch
            row = {"epoch": epoch + 1, "step": step, **summary(sums), "learning_rate": rate_at(step - 1)}
            if len(val_rows):
                row["val_loss"] = validation_loss(diffusion, dataset, val_rows, batch_size, config, device, layout)
            if is_main:
                files.end_epoch(row, seconds, peak_memory(device))


if __name__ == "__main__":
    run_script(main)
