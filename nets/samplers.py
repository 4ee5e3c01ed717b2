"""Solvers, which turn noise into images step by step, and the spacing of the timesteps.

A solver is a generator (see Solver). After each step from timestep t to an earlier timestep s it
yields (x_s, predicted x_0); the last x_s is the image. x_t = sqrt(alpha_bar_t) x_0 +
sqrt(1 - alpha_bar_t) eps; alpha_bars are Python floats (float64). SAMPLERS lists the solvers.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .errors import SettingError, check_choice

NOISE_BLOCK = 8  # steps whose noise is sampled at once; another number changes the image of a seed
SEEDS = 2**32  # the seeds that a CPU generator tells apart
VARIANCES = ("beta", "posterior")  # of ddpm's noise: beta_t, or the smaller one of Ho et al. 2020, equation 7
DEFAULT_RESAMPLINGS = 10  # of RePaint's paper
LOWEST_LAMBDA = -5.1  # just below the last one of 500 or more linear timesteps; there x_t holds no image yet

Device = torch.device | str
Denoise = Callable[[Tensor, int], Tensor]  # (x_t (b, c, h, w), the timestep of all) -> x_0 in float32
Noise = Iterator[Tensor]  # endless, each like x_t
Trajectory = Iterator[tuple[Tensor, Tensor]]  # (x_s, x_0) after each step


class Step(NamedTuple):
    """From timestep t to an earlier s. The last step has alpha_bar_s 1: no noise is left."""

    alpha_bar_t: float
    alpha_bar_s: float
    t: int


Solver = Callable[[Denoise, Tensor, Sequence[Step], Noise], Trajectory]  # (denoise, x_T, steps, noise); options by name


def ddpm(denoise, x, steps, noise, *, variance: str = "beta") -> Trajectory:
    """DDPM (Ho et al. 2020, algorithm 2): the mean of q(x_s | x_t, x_0), equation 7, plus noise.

    variance of the noise: "beta", or the smaller "posterior" (equation 7). The last step adds none.
    """
    check_choice("variance", variance, VARIANCES)
    for alpha_bar_t, alpha_bar_s, t in steps:
        alpha = alpha_bar_t / alpha_bar_s
        beta = 1 - alpha
        x_0_weight = math.sqrt(alpha_bar_s) * beta / (1 - alpha_bar_t)
        x_weight = math.sqrt(alpha) * (1 - alpha_bar_s) / (1 - alpha_bar_t)
        x_0 = denoise(x, t)
        x = x_0_weight * x_0 + x_weight * x
        if alpha_bar_s < 1:
            factor = (1 - alpha_bar_s) / (1 - alpha_bar_t) if variance == "posterior" else 1
            x = x + math.sqrt(beta * factor) * next(noise)
        yield x, x_0


def ddim(denoise, x, steps, noise, *, eta: float = 0.0) -> Trajectory:
    """DDIM (Song et al. 2021, equations 12, 16). eta 0: no noise. eta 1: ddpm, "posterior"."""
    for alpha_bar_t, alpha_bar_s, t in steps:
        x_0 = denoise(x, t)
        eps = (x - math.sqrt(alpha_bar_t) * x_0) / math.sqrt(1 - alpha_bar_t)
        sigma_squared = eta**2 * (1 - alpha_bar_s) / (1 - alpha_bar_t) * (1 - alpha_bar_t / alpha_bar_s)
        x = math.sqrt(alpha_bar_s) * x_0 + math.sqrt(max(1 - alpha_bar_s - sigma_squared, 0.0)) * eps
        if sigma_squared > 0:
            x = x + math.sqrt(sigma_squared) * next(noise)
        yield x, x_0


def dpm_solver_pp(denoise, x, steps, noise, *, order: int = 2, eta: float = 0.0) -> Trajectory:
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2). eta 1: SDE-DPM-Solver++(2M).

    order 2 takes x_0 as linear in lambda, order 1 as constant. The first step has no earlier x_0,
    and the last step ends at infinite lambda: both are of order 1.
    """
    last_x_0 = last_h = None
    for alpha_bar_t, alpha_bar_s, t in steps:
        x_0 = D = denoise(x, t)
        h = half_log_snr(alpha_bar_s) - half_log_snr(alpha_bar_t)  # lambda_s - lambda_t
        if order == 2 and last_x_0 is not None and alpha_bar_s < 1:
            D = x_0 + 0.5 * h / last_h * (x_0 - last_x_0)
        eta_h = eta * h if alpha_bar_s < 1 else 0.0  # the last step adds no noise
        x_weight = math.sqrt((1 - alpha_bar_s) / (1 - alpha_bar_t)) * math.exp(-eta_h)  # sigma_s / sigma_t e^(-eta h)
        x = x_weight * x + (math.sqrt(alpha_bar_s) - x_weight * math.sqrt(alpha_bar_t)) * D
        if eta_h > 0:
            x = x + math.sqrt((1 - alpha_bar_s) * -math.expm1(-2 * eta_h)) * next(noise)
        last_x_0, last_h = x_0, h
        yield x, x_0


def heun(denoise, x, steps, noise) -> Trajectory:
    """Heun's method (Karras et al. 2022, "EDM", algorithm 1): up to 2N - 1 calls in N steps.

    It solves dz/dsigma = (z - x_0) / sigma for z = x / sqrt(alpha_bar), but stays with x: with the
    cosine schedule z starts at 2e4, and float32 would lose the image in it.
    A step that begins below LOWEST_LAMBDA is Euler's, with one call. Heun's correction of z is
    (sigma_t / sigma_s - 1) / 2 times the difference of two predicted x_0: 142 times in the first of
    13 clipped_logsnr steps of the cosine schedule. There it amplifies the errors of a briefly
    trained network into a tint of the whole image.
    """
    for i, (alpha_bar_t, alpha_bar_s, t) in enumerate(steps):
        x_0 = denoise(x, t)
        x_weight = math.sqrt((1 - alpha_bar_s) / (1 - alpha_bar_t))
        x = x_weight * x + (math.sqrt(alpha_bar_s) - x_weight * math.sqrt(alpha_bar_t)) * x_0  # Euler's step
        if alpha_bar_s < 1 and i + 1 < len(steps) and half_log_snr(alpha_bar_t) >= LOWEST_LAMBDA:
            sigma_ratio = math.sqrt(alpha_bar_s / alpha_bar_t) / x_weight  # sigma_t / sigma_s
            x = x + 0.5 * math.sqrt(alpha_bar_s) * (sigma_ratio - 1) * (denoise(x, steps[i + 1].t) - x_0)
        yield x, x_0


def repaint(denoise, x, steps, noise, *, known: Tensor, mask: Tensor, variance="beta", resamplings=DEFAULT_RESAMPLINGS):
    """RePaint (Lugmayr et al. 2022, algorithm 1, jumps of one step): ddpm that keeps known pixels.

    known: images (b, c, h, w). mask: broadcastable to known, 1 where pixels are sampled; elsewhere
    the last x equals `known`. Each step runs `resamplings` times and adds its noise again in
    between, so that new pixels fit the known ones.
    """
    for step in steps:
        alpha = step.alpha_bar_t / step.alpha_bar_s
        for again in reversed(range(resamplings if step.alpha_bar_s < 1 else 1)):
            x, x_0 = next(ddpm(denoise, x, [step], noise, variance=variance))
            x = torch.where(mask > 0.5, x, diffuse(known, step.alpha_bar_s, noise))
            if again:
                x = math.sqrt(alpha) * x + math.sqrt(1 - alpha) * next(noise)
        yield x, x_0


def diffuse(x_0: Tensor, alpha_bar: float, noise: Noise) -> Tensor:
    """A sample of q(x_t | x_0) (Ho et al. 2020, equation 4); x_0 for alpha_bar 1."""
    return math.sqrt(alpha_bar) * x_0 + math.sqrt(1 - alpha_bar) * next(noise) if alpha_bar < 1 else x_0


def half_log_snr(alpha_bar: float) -> float:
    """lambda = log sqrt(alpha_bar / (1 - alpha_bar)) (Lu et al. 2022), infinite for alpha_bar 1."""
    return 0.5 * (math.log(alpha_bar) - math.log1p(-alpha_bar)) if alpha_bar < 1 else math.inf


sde_dpm_solver_pp = partial(dpm_solver_pp, eta=1.0)
SAMPLERS = {"ddpm": ddpm, "ddim": ddim, "dpm++": dpm_solver_pp, "sde-dpm++": sde_dpm_solver_pp, "heun": heun}
# The best with 25 network calls, or close to it (benchmarks/results/solvers_cpu.md).
DEFAULT_SPACING = {name: "trailing" if name in ("ddpm", "ddim") else "clipped_logsnr" for name in SAMPLERS}
# For all solvers but ddpm, which takes every timestep. The Frechet distance of sde-dpm++ with 25
# steps is within 5 % of ddpm's. No solver without new noise was so close with up to 100 calls.
DEFAULT_STEPS = 25


def logsnr(alpha_bars, steps, start, lowest=-math.inf) -> np.ndarray:
    """Equal distances in lambda (Lu et al. 2022, "DPM-Solver", section 3.4), from `lowest` on."""
    lambdas = [half_log_snr(alpha_bar) for alpha_bar in alpha_bars[: start + 1]]  # lambda falls with t
    wanted = np.linspace(max(lambdas[start], lowest), lambdas[0], steps)
    found = np.interp(-wanted, -np.asarray(lambdas), np.arange(start + 1))
    return np.concatenate(([start], found[1:]))


SPACINGS = {
    "uniform": lambda alpha_bars, steps, start: np.linspace(start, 0, steps),
    # The last timestep of each of `steps` equal parts of 0..start (Lin et al. 2024, table 2).
    "trailing": lambda alpha_bars, steps, start: (start + 1) * np.arange(steps, 0, -1) / steps - 1,
    "logsnr": logsnr,
    # The cosine schedule ends at -10: logsnr spends eight of 25 steps where nothing can be seen.
    "clipped_logsnr": partial(logsnr, lowest=LOWEST_LAMBDA),
}


def timesteps(alpha_bars: Sequence[float], steps: int, spacing: str, start: int | None = None) -> list[int]:
    """`steps` different timesteps that fall from `start` (None: T - 1), for T alpha_bars."""
    start = len(alpha_bars) - 1 if start is None else start
    check_choice("spacing", spacing, SPACINGS)
    if not 1 <= steps <= start + 1:
        raise SettingError(f"steps must be from 1 to {start + 1}, the number of timesteps, not {steps}")
    chosen = []
    for i, t in enumerate(np.rint(SPACINGS[spacing](alpha_bars, steps, start)).astype(int).tolist()):
        below = chosen[-1] - 1 if chosen else start
        chosen.append(max(min(t, below), steps - 1 - i))  # leaves a timestep for each later step
    return chosen


def solver_steps(alpha_bars: Sequence[float], chosen: Sequence[int]) -> list[Step]:
    """Falling timesteps -> a list of Step. The last step ends at alpha_bar 1."""
    ends = [alpha_bars[t] for t in chosen[1:]] + [1.0]
    return [Step(alpha_bars[t], end, t) for t, end in zip(chosen, ends)]


def seeded_noise(seeds: Iterable[int], shape: tuple[int, ...], device: Device) -> Noise:
    """Yields normal noise (len(seeds), *shape) without end: x_T, then that of the steps.

    Image i depends on seeds[i] alone, on any device: GPUs have other generators, so the CPU samples
    and sends it, NOISE_BLOCK steps at a time.
    """
    generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds]
    on_cuda = torch.device(device).type == "cuda"

    def sample(*steps):  # (*steps, len(seeds), *shape)
        images = torch.stack([torch.randn(*steps, *shape, generator=own) for own in generators], dim=len(steps))
        # From pinned memory the copy goes on while the host launches the next steps.
        return (images.pin_memory() if on_cuda else images).to(device, non_blocking=on_cuda)

    yield sample()
    while True:
        yield from sample(NOISE_BLOCK).unbind(0)


def slerp(a: Tensor, b: Tensor, weight: float | Tensor) -> Tensor:
    """Spherical interpolation of noises (..., c, h, w) (Shoemake 1985). It keeps their length."""
    dims = (-3, -2, -1)
    a_squared, b_squared = (noise.square().sum(dims, keepdim=True) for noise in (a, b))
    cosine = (a * b).sum(dims, keepdim=True) / (a_squared * b_squared).sqrt()
    angle = torch.acos(cosine.clamp(-1, 1)).clamp(min=1e-6)
    return (torch.sin((1 - weight) * angle) * a + torch.sin(weight * angle) * b) / torch.sin(angle)
