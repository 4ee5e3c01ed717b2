"""Noise schedules: beta_t, the variance of the noise in step t (Ho et al. 2020, equation 2).

alpha, alpha_bar and the other tables follow from the betas (`schedule_tables`). Everything here is
float64: in float32, 1 - beta loses digits of beta. SCHEDULES lists the schedules by name.
"""

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from .errors import SettingError, check_choice

MAX_BETA = 0.999  # beta 1 erases the image in one step and leads to a division by alpha 0


def generate_linear_schedule(T: int, low: float, high: float) -> np.ndarray:
    """T betas in equal steps from low to high (Ho et al. 2020, section 4: T 1000, 1e-4 to 0.02)."""
    return np.linspace(low, high, T, dtype=np.float64)


def generate_cosine_schedule(T: int, s: float = 0.008) -> np.ndarray:
    """T betas up to 0.999 whose alpha_bar follows cos^2 (Nichol & Dhariwal 2021, equation 17)."""
    time = np.arange(T + 1, dtype=np.float64) / T
    return betas_from_alpha_bar(np.cos((time + s) / (1 + s) * np.pi / 2) ** 2)


def generate_sigmoid_schedule(T: int, start: float = -3, end: float = 3, tau: float = 1.0) -> np.ndarray:
    """T betas up to 0.999 whose alpha_bar follows a sigmoid (Jabri et al. 2022, algorithm 1)."""
    time = np.arange(T + 1, dtype=np.float64) / T
    falling = 1 / (1 + np.exp((time * (end - start) + start) / tau))
    return betas_from_alpha_bar(falling - falling[-1])


def betas_from_alpha_bar(alpha_bar: np.ndarray) -> np.ndarray:
    """beta_t = 1 - alpha_bar_t / alpha_bar_(t-1): (T + 1,) -> (T,). A common factor cancels out."""
    return np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], MAX_BETA)


def scaled_linear(T: int, low: float, high: float) -> np.ndarray:
    """Linear betas up to 0.999. The factor 1000/T keeps alpha_bar_T close to that of T = 1000."""
    return np.minimum(generate_linear_schedule(T, low * 1000 / T, high * 1000 / T), MAX_BETA)


SCHEDULES = {
    "linear": scaled_linear,
    "cosine": lambda T, low, high: generate_cosine_schedule(T),
    "sigmoid": lambda T, low, high: generate_sigmoid_schedule(T),
}


def shift_betas(betas: np.ndarray, shift: float) -> np.ndarray:
    """Betas whose lambda, half the log-SNR, is `shift` higher at every timestep but those at 0.999.

    Hoogeboom et al. 2023 ("simple diffusion", section 3.1) lower it for large images.
    """
    alpha_bar = np.cumprod(np.concatenate(([1.0], 1 - betas)))
    factor = np.exp(2 * shift)
    return betas_from_alpha_bar(factor * alpha_bar / (factor * alpha_bar + 1 - alpha_bar))


def make_betas(
    schedule="linear", num_timesteps=1000, schedule_low=1e-4, schedule_high=0.02, schedule_shift=0.0
) -> np.ndarray:
    """The (T,) float64 betas of the named schedule.

    schedule_low, schedule_high: the first and last beta of the linear schedule for T = 1000.
    schedule_shift: what is added to lambda (`shift_betas`), for the other schedules. ValueError: an
    unknown name, betas outside (0, 1), an alpha_bar_T that rounds to 0, or a shift of the linear
    schedule. A warning: alpha_bar_T > 0.01, as x_T keeps a part of the image, but sampling starts
    from pure noise; or below what float32 holds, as most timesteps are pure noise.
    """
    check_choice("schedule", schedule, SCHEDULES)
    if schedule == "linear" and schedule_shift:
        raise SettingError("the linear schedule has no schedule_shift: move it by schedule_low and schedule_high")
    betas = check_betas(SCHEDULES[schedule](num_timesteps, schedule_low, schedule_high))
    betas = check_betas(shift_betas(betas, schedule_shift)) if schedule_shift else betas
    alpha_bar_T = float(np.prod(1 - betas))
    if alpha_bar_T > 0.01:
        found = f"the {schedule} schedule has alpha_bar_T = {alpha_bar_T:.3g} > 0.01: x_T is not pure noise"
        remedy = "lower schedule_shift" if schedule_shift > 0 else "raise schedule_high, or use the cosine schedule"
        warnings.warn(f"{found}; raise num_timesteps, {remedy}", stacklevel=2)
    if alpha_bar_T < float(np.finfo(np.float32).tiny):
        lower = f"alpha_bar_T = {alpha_bar_T:.3g} is too small for float32: lower schedule_high"
        if alpha_bar_T == 0:  # solvers divide by it
            raise SettingError(lower)
        warnings.warn(lower, stacklevel=2)
    return betas


def check_betas(betas: Sequence[float] | np.ndarray) -> np.ndarray:
    """`betas` as a (T,) float64 array; ValueError unless T >= 1 and every 0 < beta < 1."""
    betas = np.asarray(betas, dtype=np.float64)
    if betas.ndim != 1 or betas.size == 0 or not np.all((betas > 0) & (betas < 1)):
        raise SettingError("the betas must be a list of numbers between 0 and 1")
    return betas


def schedule_tables(betas: np.ndarray) -> dict[str, np.ndarray]:
    """The tables that a state dict stores, (T,) float64 each (letters of Ho et al. 2020)."""
    alphas = 1 - betas
    alphas_cumprod = np.cumprod(alphas)
    return {
        "betas": betas,
        "alphas": alphas,
        "alphas_cumprod": alphas_cumprod,
        "sqrt_alphas_cumprod": np.sqrt(alphas_cumprod),
        "sqrt_one_minus_alphas_cumprod": np.sqrt(1 - alphas_cumprod),
        "reciprocal_sqrt_alphas": np.sqrt(1 / alphas),
        "remove_noise_coeff": betas / np.sqrt(1 - alphas_cumprod),
        "sigma": np.sqrt(betas),
    }


def find_schedule(betas: Sequence[float] | np.ndarray) -> dict[str, Any]:
    """The arguments of `make_betas` for (float32) betas, a dict; ValueError for unknown betas."""
    betas = check_betas(betas)
    T, free = len(betas), max(np.flatnonzero(betas < MAX_BETA), default=0)  # free: the last index below the cap
    last = betas[0] + (betas[free] - betas[0]) * (T - 1) / free if free else betas[0]  # the last beta without the cap
    low, high = (float(f"{beta * T / 1000:.6g}") for beta in (betas[0], last))
    for schedule, make in SCHEDULES.items():
        unshifted = make(T, low, high)
        odds, before = ((1 - values[0]) / values[0] for values in (betas, unshifted))  # the SNR of timestep 0
        shift = 0.0 if schedule == "linear" else round(0.5 * float(np.log(odds / before)), 6)
        if np.allclose(shift_betas(unshifted, shift) if shift else unshifted, betas, rtol=1e-5, atol=1e-9):
            limits = {"schedule_low": low, "schedule_high": high} if schedule == "linear" else {}
            return {"schedule": schedule, "num_timesteps": T, **limits, **({"schedule_shift": shift} if shift else {})}
    raise SettingError(f"this is not one of our models: its betas match no schedule of ours ({', '.join(SCHEDULES)})")
