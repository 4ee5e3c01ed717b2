"""The optimizers, the learning rate, and a step that a bad gradient cannot reach."""

import math

import torch
from torch.optim import Optimizer

from utils.training.muon import Muon

OPTIMIZERS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "muon": Muon}
MAX_WARMUP_STEPS = 1000


def make_optimizer(name, parameters, device, momentum=0.9, weight_decay=0.0) -> Optimizer:
    """A fused one. momentum is beta 1. `train_step` sets the learning rate."""
    fused = device.type in ("cpu", "cuda")
    return OPTIMIZERS[name](parameters, lr=0.0, betas=(momentum, 0.999), weight_decay=weight_decay, fused=fused)


def restore_optimizer(optimizer: Optimizer, saved: dict) -> None:
    """Loads the moments of a saved state; this run's settings hold, such as a new weight decay."""
    optimizer.load_state_dict({"state": saved["state"], "param_groups": optimizer.state_dict()["param_groups"]})
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if value.shape == parameter.shape:
                # In the memory layout of the weights: the fused step goes by addresses.
                state[name] = torch.empty_like(parameter).copy_(value)


def step_unless_bad(optimizer: Optimizer, scaler: torch.amp.GradScaler, bad: torch.Tensor) -> None:
    """One update; none of weights, moments and step counts where `bad` (0-dim, 0. or 1.) is 1.

    The fused optimizers read `bad` on the device: the host does not wait. On MPS it must look.
    """
    if optimizer.defaults["fused"]:
        optimizer.found_inf = bad  # an enabled GradScaler puts its own, equal one there
    if optimizer.defaults["fused"] or not bad:
        scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)


def choose_learning_rate(init_lr: float | str, channel: int) -> float:
    """For "auto" 2e-4 * 128 / channel, at most 1e-3."""
    # Adam moves a layer's output by the rate times its width (Yang et al. 2021, Tensor Programs V).
    return min(2e-4 * 128 / channel, 1e-3) if init_lr == "auto" else init_lr


DECAYS = {  # of (progress from 0 to 1, lowest, highest)
    "cos": lambda progress, low, high: low + (high - low) * (1 + math.cos(math.pi * progress)) / 2,
    # Ten equal stages, each lower by the same factor, as the reference's "step" has.
    "step": lambda progress, low, high: high * (low / high) ** (min(math.floor(progress * 10 + 1e-9), 9) / 9),
}


def learning_rate(step: int, total_steps: int, init_lr, min_lr, warmup=0.05, decay="cos") -> float:
    """Of a step from 0: linear warm-up for a fraction of all, at most 1,000, then one of DECAYS."""
    warmup_steps = min(round(warmup * total_steps), MAX_WARMUP_STEPS)
    if step < warmup_steps:
        return init_lr * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - 1 - warmup_steps)
    return DECAYS[decay](min(1.0, progress), min(min_lr, init_lr), init_lr)  # it never rises after the warm-up
