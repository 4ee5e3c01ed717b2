"""The learning rate as a pure function of how far the training has come."""
import math

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
