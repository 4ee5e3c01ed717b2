"""Training objectives of other papers, with their own samplers, for this project's network.

EDM (Karras et al. 2022, table 1 and algorithm 1) and rectified flow with logit-normal t (Esser et
al. 2024, "SD3", sections 2 and 3.1). A network is called as network(x, t (b,)), with t from 0 to
1000 as in training. Images x (b, c, h, w) are in [-1, 1], noise is standard normal.
"""

import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch

SIGMA_DATA, SIGMA_MIN, SIGMA_MAX, RHO, MEAN, STD = 0.5, 0.002, 80.0, 7, -1.2, 1.2
STEPS = 13  # of Heun's method: 25 network evaluations, as the last step ends at no noise


class Objective(NamedTuple):
    name: str
    losses: Callable  # (network, x, noise, normal (b,), which decides the noise levels) -> (b,)
    sample: Callable  # (network, noise) -> images


def edm_denoise(network, x, sigma):
    """D(x, sigma) with the preconditioning of equation 7. sigma: (b, 1, 1, 1)."""
    total = sigma**2 + SIGMA_DATA**2
    # As linear in ln(sigma) as c_noise there, over the range that this network's embedding has.
    t = 1000 * (sigma.flatten() / SIGMA_MIN).log() / math.log(SIGMA_MAX / SIGMA_MIN)
    output = network(x / total.sqrt(), t).float()
    return SIGMA_DATA**2 / total * x + sigma * SIGMA_DATA / total.sqrt() * output


def edm_losses(network, x, noise, normal):
    sigma = torch.exp(MEAN + STD * normal)[:, None, None, None]
    weight = (sigma**2 + SIGMA_DATA**2) / (sigma * SIGMA_DATA) ** 2
    return (weight * (edm_denoise(network, x + sigma * noise, sigma) - x) ** 2).flatten(1).mean(1)


def edm_sample(network, noise):
    ends = SIGMA_MAX ** (1 / RHO), SIGMA_MIN ** (1 / RHO)
    sigmas = [*(torch.linspace(*ends, STEPS, dtype=torch.float64) ** RHO).tolist(), 0.0]
    return heun(lambda x, sigma: (x - edm_denoise(network, x, sigma)) / sigma, SIGMA_MAX * noise, sigmas)


def flow_losses(network, x, noise, normal):
    t = torch.sigmoid(normal)
    x_t = torch.lerp(x, noise, t[:, None, None, None])
    return (network(x_t, 1000 * t).float() - (noise - x)).square().flatten(1).mean(1)


def flow_sample(network, noise):
    return heun(lambda x, t: network(x, 1000 * t.flatten()).float(), noise, torch.linspace(1, 0, STEPS + 1).tolist())


def heun(slope, x, times):
    """x at the last of the times, by Heun's method; Euler's where a step ends at 0.

    slope: (x, time (b, 1, 1, 1)) -> dx / dtime.
    """
    for now, then in itertools.pairwise(times):
        first = slope(x, torch.full_like(x[:, :1, :1, :1], now))
        ahead = x + (then - now) * first
        if then:
            second = slope(ahead, torch.full_like(x[:, :1, :1, :1], then))
            ahead = x + (then - now) * (first + second) / 2
        x = ahead
    return x


OBJECTIVES = {
    "edm": Objective("EDM", edm_losses, edm_sample),
    "flow": Objective("rectified flow, logit-normal t", flow_losses, flow_sample),
}
