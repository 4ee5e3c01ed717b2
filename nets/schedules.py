"""Noise schedules: beta_t, the variance that step t of the forward process adds (Ho et al. 2020, equation 2).

alpha, alpha_bar and the rest follow from the betas (`schedule_tables`). All is float64: in float32
1 - beta loses the digits of beta. To add a schedule, write its function and enter it in SCHEDULES.
"""

import warnings

import numpy as np

MAX_BETA = 0.999  # a beta of 1 erases the image in one step, and its alpha of 0 divides by zero


def generate_linear_schedule(T, low, high):
    """T betas in equal steps from `low` to `high` (Ho et al. 2020, section 4: 1e-4 to 0.02 for T = 1000)."""
    return np.linspace(low, high, T, dtype=np.float64)


def generate_cosine_schedule(T, s=0.008):
    """T betas whose alpha_bar follows cos^2 (Nichol & Dhariwal 2021, equation 17), capped at 0.999."""
    time = np.arange(T + 1, dtype=np.float64) / T
    return betas_from_alpha_bar(np.cos((time + s) / (1 + s) * np.pi / 2) ** 2)


def generate_sigmoid_schedule(T, start=-3, end=3, tau=1.0):
    """T betas whose alpha_bar follows a falling sigmoid from 1 to 0 (Jabri et al. 2022, algorithm 1), capped at 0.999."""
    time = np.arange(T + 1, dtype=np.float64) / T
    falling = 1 / (1 + np.exp((time * (end - start) + start) / tau))
    return betas_from_alpha_bar(falling - falling[-1])


def betas_from_alpha_bar(alpha_bar):
    """(T + 1,) alpha_bar at times 0..T, up to a common factor -> (T,) betas: beta_t = 1 - alpha_bar_t / alpha_bar_(t-1)."""
    return np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], MAX_BETA)


def scaled_linear(T, low, high):
    """The linear schedule for any T. The factor 1000/T keeps alpha_bar_T about as it is for T = 1000. Capped at 0.999."""
    return np.minimum(generate_linear_schedule(T, low * 1000 / T, high * 1000 / T), MAX_BETA)


SCHEDULES = {
    "linear": scaled_linear,
    "cosine": lambda T, low, high: generate_cosine_schedule(T),
    "sigmoid": lambda T, low, high: generate_sigmoid_schedule(T),
}


def make_betas(schedule="linear", num_timesteps=1000, schedule_low=1e-4, schedule_high=0.02):
    """The (T,) float64 betas of a schedule by its name. low and high belong to the linear one, as for T = 1000.

    ValueError: an unknown name, T < 1, or betas outside (0, 1). Warns where alpha_bar_T > 0.01: x_T
    then keeps some of the image, and the network never sees the pure noise that sampling starts from.
    """
    check_choice("schedule", schedule, SCHEDULES)
    if num_timesteps != int(num_timesteps) or num_timesteps < 1:
        raise ValueError(f"num_timesteps must be a whole number of at least 1, not {num_timesteps}")
    betas = check_betas(SCHEDULES[schedule](int(num_timesteps), schedule_low, schedule_high))
    alpha_bar_T = float(np.prod(1 - betas))
    if alpha_bar_T > 0.01:
        warnings.warn(f"the {schedule} schedule ends at alpha_bar_T = {alpha_bar_T:.3g}: above 0.01, x_T is not pure noise and samples "
                      "will be off; raise schedule_high or num_timesteps, or use the cosine schedule", stacklevel=2)
    return betas


def check_betas(betas):
    """`betas` as a (T,) float64 array. ValueError unless T >= 1 and every beta lies strictly between 0 and 1."""
    betas = np.asarray(betas, dtype=np.float64)
    if betas.ndim != 1 or betas.size == 0:
        raise ValueError(f"betas must be a list of at least one number, not of shape {betas.shape}")
    if not np.all((betas > 0) & (betas < 1)):
        raise ValueError(f"every beta must lie between 0 and 1, these run from {betas.min():.3g} to {betas.max():.3g}")
    return betas


def schedule_tables(betas):
    """The tables that a state dict stores, (T,) float64 each (letters as in Ho et al. 2020).

    remove_noise_coeff and reciprocal_sqrt_alphas are the factors of equation 11, sigma is the noise of algorithm 2.
    """
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


def check_choice(name, value, known):
    """ValueError that lists the known values unless `value` is one of them."""
    if value not in known:
        raise ValueError(f"unknown {name} {value!r}; known: {', '.join(map(str, known))}")
