"""The settings of a training run, one declaration each: what it may be, and whether it is fixed.

train.py's Config has defaults and help texts. Settings in checkpoints are checked here as well.
utils imports nets here alone, for the names of its choices.
"""

from nets import CONDITIONS, LOSS_WEIGHTINGS, LOSSES, PREDICTIONS, SAMPLERS, SCHEDULES, TIMESTEP_SAMPLINGS
from utils.cpu_threads import NUM_THREADS
from utils.data.image_format import RESIZE_MODES
from utils.device import DTYPES
from utils.settings import LARGEST, PAIR, SEVERAL, choice, flag, number, pathname, text, whole
from utils.training.optimizer import DECAYS, OPTIMIZERS

RUN_SETTINGS = {
    "preset": text(fixed="run"),  # a file may have one of a later version's
    # Images
    "annotation_path": pathname(),
    "input_shape": whole(1, 2**14, count=PAIR, fixed="run"),
    "img_channels": choice((3, 1), fixed="run"),
    "resize_mode": choice(RESIZE_MODES),
    "background": whole(0, 255, count=range(3, 4)),
    "icc": flag(),
    "horizontal_flip": flag(),
    "num_workers": whole(0, 1024),
    # Network
    "channel": whole(1, 2**16, fixed="weights"),
    "channel_mults": whole(1, 1024, count=SEVERAL, fixed="weights"),
    "num_res_blocks": whole(1, 1024, fixed="weights"),
    "attention_resolutions": whole(0, 31, count=range(33), fixed="weights"),
    "num_groups": whole(1, 2**16, "auto", fixed="weights"),
    "dropout": number(0, 0.99),
    "activation_checkpointing": flag(),
    "class_conditional": flag(fixed="run"),
    "label_dropout": number(0, 0.99),
    "condition": choice(CONDITIONS, fixed="run"),
    "condition_scale": whole(2, 64, fixed="run"),
    # Diffusion
    "schedule": choice(SCHEDULES, fixed="weights"),
    "num_timesteps": whole(1, 10**6, fixed="weights"),
    "schedule_low": number(0, fixed="weights"),
    "schedule_high": number(0, fixed="weights"),
    "schedule_shift": number(-5, 5, fixed="weights"),
    "prediction": choice(PREDICTIONS, fixed="weights"),
    "loss_type": choice(LOSSES),
    "loss_weighting": choice(LOSS_WEIGHTINGS),
    "min_snr_gamma": number(0),
    "timestep_sampling": choice(TIMESTEP_SAMPLINGS),
    # Optimization
    "epochs": whole(1),
    "steps": whole(0),
    "batch_size": whole(1),
    "accumulate": whole(1),
    "init_lr": number(0, LARGEST, "auto"),
    "min_lr": number(0),
    "warmup": number(0, 1),
    "optimizer_type": choice(OPTIMIZERS),
    "momentum": number(0, 0.9999),
    "weight_decay": number(0),
    "lr_decay_type": choice(DECAYS),
    "grad_clip": number(0),
    "max_bad_steps": whole(1),
    "ema_decay": number(0, 1),
    "ema_start": whole(0),
    "ema_warmup": flag(),
    # Machine
    "device": text(),
    "precision": choice(("auto", *DTYPES)),
    "compile": flag(choices=("auto",)),
    "num_threads": NUM_THREADS,
    "seed": whole(-(2**63), 2**63 - 1),
    # Output
    "save_dir": pathname(),
    "save_period": whole(1),
    "save_minutes": number(0),
    "keep_last": whole(0),
    "preview_period": whole(0),
    "preview_sampler": choice(SAMPLERS),
    "preview_steps": whole(1),
    "val_split": number(0, 0.9),
    "dry_run": flag(),
    "start_from": pathname(fixed="run"),
    "resume": pathname(),
}
# Arguments of UNet that weights from elsewhere need. train.py has no such settings: the file of the
# weights carries them where they are not the defaults, and so do the files of a run that has them.
CARRIED = {
    "time_emb_dim": whole(1, 2**16),
    "norm_eps": number(0, 1),
    "attention_head_dim": whole(1, 2**16, None),
    "downsample_padding": whole(0, 1),
    "freq_shift": whole(0, 1),
}
