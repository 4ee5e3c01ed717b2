"""Adam and AdamW, and a step that a gradient gone bad cannot reach."""

import math

import torch

OPTIMIZERS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}


def make_optimizer(name, parameters, device, momentum=0.9, weight_decay=0.0):
    """A fused Adam or AdamW. momentum is its beta 1. The rate is set by `set_rate` before each step."""
    if name not in OPTIMIZERS:
        raise ValueError(f"optimizer_type {name!r} is unknown: choose one of {', '.join(OPTIMIZERS)}")
    fused = device.type in ("cpu", "cuda")
    return OPTIMIZERS[name](parameters, lr=0.0, betas=(momentum, 0.999), weight_decay=weight_decay, fused=fused)


def set_rate(optimizer, rate):
    for group in optimizer.param_groups:
        group["lr"] = rate


def restore_optimizer(optimizer, saved):
    """The moments of a saved state under this run's own settings (a new weight decay on the command line holds)."""
    optimizer.load_state_dict({"state": saved["state"], "param_groups": optimizer.state_dict()["param_groups"]})
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if value.shape == parameter.shape:
                # In the weights' own memory layout, which the run may have saved otherwise: the fused step goes by addresses.
                state[name] = torch.empty_like(parameter).copy_(value)


def step_unless_bad(optimizer, scaler, bad):
    """One update that leaves weights, moments and step counts alone where `bad` (0-dim tensor, 0. or 1.) is 1.

    The fused optimizers read the flag on the device, so the host does not wait for it; elsewhere it must look.
    """
    if optimizer.defaults["fused"]:
        optimizer.found_inf = bad  # an enabled GradScaler puts its own, equal one there
        scaler.step(optimizer)
    elif not bad:
        scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)


def held_against(bad, scaler):
    """`bad`, but 0 while a GradScaler still halves its factor: an overflow there is its way to find the largest that fits."""
    if not scaler.is_enabled():
        return bad
    # The scale as a tensor on the device; scaler.get_scale() would make the host wait.
    return bad * (scaler._scale <= 1)


MAX_WARMUP_STEPS = 1000
RATE, AT_CHANNELS, HIGHEST_RATE = 2e-4, 128, 1e-3


def _cosine(share):
    return (1 + math.cos(math.pi * share)) / 2


def _step(share):
    # Ten equal stages, as the reference's "step" decay has.
    return math.floor(share * 10 + 1e-9) / 9 if share < 1 else 1.0


DECAYS = {
    "cos": lambda share, low, high: low + (high - low) * _cosine(share),
    "step": lambda share, low, high: high * (low / high) ** _step(share),
}


def choose_rate(init_lr, channel):
    """`init_lr`, or for "auto" 2e-4 * 128 / channel, at most 1e-3.

    Adam moves each weight by about the rate, so a layer's output moves by the rate times its width: with the rate of 128 channels a
    narrow network takes several times the steps (Adam's rate goes as 1/width: Yang et al. 2021, "Tensor Programs V").
    """
    return min(RATE * AT_CHANNELS / channel, HIGHEST_RATE) if init_lr == "auto" else init_lr


def learning_rate(step, total_steps, init_lr, min_lr, warmup=0.05, decay="cos"):
    """The rate of step `step` (0 ... total_steps - 1): a linear warm-up to init_lr, then a decay to min_lr.

    Args: warmup: the share of all steps that it takes, at most 1,000 of them. decay: "cos" (half a cosine) or "step"
    (ten equal stages, each lower by the same factor). Raises ValueError for an unknown decay.
    """
    if decay not in DECAYS:
        raise ValueError(f"lr_decay_type {decay!r} is unknown: choose one of {', '.join(DECAYS)}")
    warmup_steps = min(round(warmup * total_steps), MAX_WARMUP_STEPS)
    if step < warmup_steps:
        return init_lr * (step + 1) / warmup_steps
    share = (step - warmup_steps) / max(1, total_steps - 1 - warmup_steps)
    return DECAYS[decay](min(1.0, share), min_lr, init_lr)
