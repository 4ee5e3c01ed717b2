"""Solvers: the ways from noise to an image, and the timesteps they stop at.

A solver is a generator over `steps`. It yields (x_s, predicted x_0) after each; the last x is the
image. It sees the network as `denoise(x_t, t) -> x_0` and the schedule as Python floats in float64.
Everywhere x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps. A step goes from timestep t to an
earlier s. To add a solver, write its generator and enter it in SAMPLERS.
"""

import inspect
import math
from typing import NamedTuple

import numpy as np
import torch

from .schedules import check_choice

NOISE_BLOCK = 8  # steps of noise drawn at once for an image; another number gives other images for the same seeds


VARIANCES = ("beta", "posterior")  # of ddpm's noise


class Step(NamedTuple):
    """From timestep t with alpha_bar_t to the next timestep's alpha_bar_s (1 at the end: no noise is left)."""

    alpha_bar_t: float
    alpha_bar_s: float
    t: int


def ddpm(denoise, x, steps, noise, *, variance="beta"):
    """Ancestral sampling (Ho et al. 2020, algorithm 2): the mean of q(x_s | x_t, x_0) (equation 7), plus noise.

    variance: of that noise, "beta" or the smaller "posterior" of equation 7. The last step adds none.
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


def ddim(denoise, x, steps, noise, *, eta=0.0):
    """Song et al. 2021 ("DDIM"), equations 12 and 16: eta 0 adds no noise, eta 1 is ddpm with the posterior variance."""
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must lie between 0 and 1, not {eta}")
    for alpha_bar_t, alpha_bar_s, t in steps:
        x_0 = denoise(x, t)
        eps = (x - math.sqrt(alpha_bar_t) * x_0) / math.sqrt(1 - alpha_bar_t)
        sigma_squared = eta**2 * (1 - alpha_bar_s) / (1 - alpha_bar_t) * (1 - alpha_bar_t / alpha_bar_s)
        x = math.sqrt(alpha_bar_s) * x_0 + math.sqrt(max(1 - alpha_bar_s - sigma_squared, 0.0)) * eps
        if sigma_squared > 0:
            x = x + math.sqrt(sigma_squared) * next(noise)
        yield x, x_0


def dpm_solver_pp(denoise, x, steps, noise, *, order=2, eta=0.0):
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2): x_0 is linear in lambda, half the log of the signal-to-noise ratio.

    With `order` 1 it is constant. So it is in the first step, which has no earlier x_0, and in the
    last, where lambda is infinite. eta 0 solves the ODE, eta 1 the reverse SDE (`sde_dpm_solver_pp`).
    """
    if order not in (1, 2):
        raise ValueError(f"order must be 1 or 2, not {order}")
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must lie between 0 and 1, not {eta}")
    last_x_0 = last_h = None
    for alpha_bar_t, alpha_bar_s, t in steps:
        x_0 = D = denoise(x, t)
        h = half_log_snr(alpha_bar_s) - half_log_snr(alpha_bar_t)  # lambda_s - lambda_t
        if order == 2 and last_x_0 is not None and alpha_bar_s < 1:
            D = x_0 + 0.5 * h / last_h * (x_0 - last_x_0)
        eta_h = eta * h if alpha_bar_s < 1 else 0.0  # at the end no noise is left to renew
        x_weight = math.sqrt((1 - alpha_bar_s) / (1 - alpha_bar_t)) * math.exp(-eta_h)  # sigma_s / sigma_t e^(-eta h)
        x = x_weight * x + (math.sqrt(alpha_bar_s) - x_weight * math.sqrt(alpha_bar_t)) * D
        if eta_h > 0:
            x = x + math.sqrt((1 - alpha_bar_s) * -math.expm1(-2 * eta_h)) * next(noise)
        last_x_0, last_h = x_0, h
        yield x, x_0


def sde_dpm_solver_pp(denoise, x, steps, noise):
    """SDE-DPM-Solver++(2M) (Lu et al., "DPM-Solver++", arXiv 2211.01095, solvers for diffusion SDEs): dpm_solver_pp with eta 1.

    Each step keeps e^-h of the old noise and draws the rest of its variance, 1 - e^-2h, anew. Fresh
    noise removes earlier errors of the network. With order 1 it is ddpm with the posterior variance.
    """
    return dpm_solver_pp(denoise, x, steps, noise, eta=1.0)


def heun(denoise, x, steps, noise):
    """Karras et al. 2022 ("EDM"), algorithm 1 (no churn), on our timesteps. N steps are 2N - 1 calls of the network.

    It solves dz/dsigma = (z - x_0) / sigma for z = x / sqrt(alpha_bar) with noise of deviation sigma.
    """
    for i, (alpha_bar_t, alpha_bar_s, t) in enumerate(steps):
        sigma_t, sigma_s = noise_level(alpha_bar_t), noise_level(alpha_bar_s)
        z = x / math.sqrt(alpha_bar_t)
        x_0 = denoise(x, t)
        slope = (z - x_0) / sigma_t
        x = math.sqrt(alpha_bar_s) * (z + (sigma_s - sigma_t) * slope)
        if alpha_bar_s < 1 and i + 1 < len(steps):
            slope_s = (x / math.sqrt(alpha_bar_s) - denoise(x, steps[i + 1].t)) / sigma_s
            x = math.sqrt(alpha_bar_s) * (z + (sigma_s - sigma_t) * 0.5 * (slope + slope_s))
        yield x, x_0


def repaint(denoise, x, steps, noise, *, known, mask, variance="beta", resamplings=10):
    """RePaint (Lugmayr et al. 2022, algorithm 1, jumps of one step): ddpm where `mask` is 1, the noised `known` where it is 0.

    known (b, c, h, w); mask broadcastable to it. Each step runs `resamplings` times, with its noise
    put back in between: the new part comes to fit the known one. Pixels with mask 0 end exactly as
    they are in `known`.
    """
    if resamplings < 1:
        raise ValueError(f"resamplings must be at least 1, not {resamplings}")
    for step in steps:
        alpha = step.alpha_bar_t / step.alpha_bar_s
        for again in reversed(range(resamplings if step.alpha_bar_s < 1 else 1)):
            x, x_0 = next(ddpm(denoise, x, [step], noise, variance=variance))
            x = torch.where(mask > 0.5, x, diffuse(known, step.alpha_bar_s, noise))
            if again:
                x = math.sqrt(alpha) * x + math.sqrt(1 - alpha) * next(noise)
        yield x, x_0


def diffuse(x_0, alpha_bar, noise):
    """A sample of q(x_t | x_0) (Ho et al. 2020, equation 4); x_0 itself where alpha_bar is 1."""
    return math.sqrt(alpha_bar) * x_0 + math.sqrt(1 - alpha_bar) * next(noise) if alpha_bar < 1 else x_0


def noise_level(alpha_bar):
    """EDM's sigma: the deviation of the noise over the scale of the image, 0 for alpha_bar 1."""
    return math.sqrt((1 - alpha_bar) / alpha_bar)


def half_log_snr(alpha_bar):
    """DPM-Solver's lambda = log(sqrt(alpha_bar) / sqrt(1 - alpha_bar)), infinite for alpha_bar 1."""
    return 0.5 * (math.log(alpha_bar) - math.log1p(-alpha_bar)) if alpha_bar < 1 else math.inf


SAMPLERS = {"ddpm": ddpm, "ddim": ddim, "dpm++": dpm_solver_pp, "sde-dpm++": sde_dpm_solver_pp, "heun": heun}
# The best with 25 network calls: benchmarks/results/solvers_cpu.md.
DEFAULT_SPACING = dict.fromkeys(SAMPLERS, "logsnr") | {"ddpm": "trailing", "ddim": "trailing"}
# Of every solver but ddpm, which takes all timesteps. With so many, sde-dpm++ is within 5 % of that
# ddpm; no solver without fresh noise came so close with up to 100 calls (same file).
DEFAULT_STEPS = 25


def find_sampler(name):
    """The solver called `name`; ValueError that lists the known ones."""
    check_choice("sampler", name, SAMPLERS)
    return SAMPLERS[name]


def check_options(name, solver, options):
    """ValueError for an option that the solver does not have, listing those that it has."""
    known = [key for key, parameter in inspect.signature(solver).parameters.items() if parameter.kind is parameter.KEYWORD_ONLY]
    unknown = [key for key in options if key not in known]
    if unknown:
        raise ValueError(f"sampler {name} has no option {', '.join(unknown)}; its options: {', '.join(known) or 'none'}")


def uniform(alpha_bars, steps, start):
    """Equal distances in t, timestep 0 included."""
    return np.linspace(start, 0, steps)


def trailing(alpha_bars, steps, start):
    """The ends of `steps` equal parts of 0..start (Lin et al. 2024, "Common diffusion noise schedules ... are flawed", table 2)."""
    return (start + 1) * np.arange(steps, 0, -1) / steps - 1


def logsnr(alpha_bars, steps, start):
    """Equal distances in the log of the signal-to-noise ratio (Lu et al. 2022, DPM-Solver, section 3.4): many steps near the end."""
    lambdas = [half_log_snr(alpha_bar) for alpha_bar in alpha_bars[: start + 1]]  # falls with t
    wanted = np.linspace(lambdas[start], lambdas[0], steps)
    return np.interp(-wanted, -np.asarray(lambdas), np.arange(start + 1))


SPACINGS = {"uniform": uniform, "trailing": trailing, "logsnr": logsnr}


def timesteps(alpha_bars, steps, spacing, start=None):
    """`steps` different timesteps, falling from `start` (T - 1 unless given), for a table of T alpha_bars.

    Where a spacing names a timestep twice, the later one moves to a neighbour. ValueError: an
    unknown spacing, or more steps than timesteps.
    """
    start = len(alpha_bars) - 1 if start is None else start
    check_choice("spacing", spacing, SPACINGS)
    if not 1 <= steps <= start + 1:
        raise ValueError(f"steps must be from 1 to {start + 1}, the timesteps that there are to walk through, not {steps}")
    chosen = []
    for i, t in enumerate(np.rint(SPACINGS[spacing](alpha_bars, steps, start)).astype(int).tolist()):
        below = chosen[-1] - 1 if chosen else start
        chosen.append(max(min(t, below), steps - 1 - i))  # below the one before, with room for those to come
    return chosen


def solver_steps(alpha_bars, chosen):
    """Falling timesteps -> [Step]; the last one goes to alpha_bar 1."""
    shares = [alpha_bars[t] for t in chosen] + [1.0]
    return [Step(shares[i], shares[i + 1], t) for i, t in enumerate(chosen)]


def seeded_noise(seeds, shape, device):
    """Endless (len(seeds), *shape) standard normal noise. That of image i is a function of seeds[i] alone.

    The first draw is x_T. Then noise comes in blocks of constant length: one launch an image and a
    step would take longer.
    """
    generators = [torch.Generator(device).manual_seed(int(seed)) for seed in seeds]

    def draw(*steps):
        one_each = [torch.randn(*steps, *shape, generator=generator, device=device) for generator in generators]
        return torch.stack(one_each, dim=len(steps))

    yield draw()
    while True:
        yield from draw(NOISE_BLOCK).unbind(0)


def global_noise(batch_size, shape, device):
    """Endless (batch_size, *shape) standard normal noise from torch's global generator."""
    while True:
        yield torch.randn(batch_size, *shape, device=device)


def slerp(a, b, weight):
    """Spherical interpolation between two noises, per image (Shoemake 1985). It keeps their length, as the network expects.

    a, b (..., c, h, w). `weight` 0 is a, 1 is b.
    """
    dims = (-3, -2, -1)
    cosine = (a * b).sum(dims, keepdim=True) / (a.square().sum(dims, keepdim=True) * b.square().sum(dims, keepdim=True)).sqrt()
    angle = torch.acos(cosine.clamp(-1, 1)).clamp(min=1e-6)
    return (torch.sin((1 - weight) * angle) * a + torch.sin(weight * angle) * b) / torch.sin(angle)
