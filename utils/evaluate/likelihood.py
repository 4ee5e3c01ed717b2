"""Bits per dimension, from the variational bound (Ho et al. 2020, sections 2, 3.3 and 4.3)."""

import math

import torch


@torch.no_grad()
def variational_bound(denoise, alpha_bars, x, generator=None):
    """The bound of Ho et al. 2020, for 8-bit images x (b, c, h, w) in [-1, 1]: (b, T + 1) bits/dim.

    Column t is L_t: the decoder (equation 13), the steps (8), the prior (5). The sum of a row is at
    least -log2 p(x) / (c h w). Steps and decoder have variance beta_t. denoise: (x_t, t) -> x_0.
    Published numbers mostly come from a decoder with the variance beta~_1, 0.55 beta_0 with the
    linear schedule, which Ho et al. use in their code: their L_0 is up to 0.4 bits lower.
    """
    nats = []
    for t, alpha_bar in enumerate(alpha_bars):
        noise = torch.randn(x.shape, generator=generator, device=x.device)
        sigma = math.sqrt(1 - alpha_bar)
        x_0 = denoise(math.sqrt(alpha_bar) * x + sigma * noise, t)
        term = step_divergence(x, x_0, alpha_bars[t - 1], alpha_bar) if t else -decoder_log_likelihood(x, x_0, sigma)
        nats.append(term.flatten(1).mean(1).cpu().double())
    nats.append(prior_divergence(x, alpha_bars[-1]).flatten(1).mean(1).cpu().double())
    return torch.stack(nats, 1) / math.log(2)


def prior_divergence(x, alpha_bar):
    """KL(q(x_T | x) || N(0, 1)) in nats, elementwise (the first term of equation 5)."""
    return 0.5 * (alpha_bar * x**2 - alpha_bar - math.log1p(-alpha_bar))


def step_divergence(x, x_0, alpha_bar_s, alpha_bar_t):
    """KL(q(x_s | x_t, x) || p(x_s | x_t)) in nats, elementwise, neighbors s < t (equation 5)."""
    # q has the mean and variance beta~ of equation 7, p that mean with x_0 for x, and beta.
    beta = 1 - alpha_bar_t / alpha_bar_s
    ratio = (1 - alpha_bar_s) / (1 - alpha_bar_t)  # beta~ / beta
    x_0_factor = math.sqrt(alpha_bar_s) * beta / (1 - alpha_bar_t)
    return 0.5 * (ratio - 1 - math.log(ratio) + (x_0_factor * (x - x_0)) ** 2 / beta)


def decoder_log_likelihood(x, mean, sigma):
    """log P(N(mean, sigma^2) gives the level x), elementwise, in nats (equation 13)."""
    x, mean, half = x.cpu().double(), mean.cpu().double(), 1 / 255  # Apple GPUs have no float64
    # A level owns the values half the way to its neighbors; the first and the last all beyond.
    lower = torch.where(x < -1 + half, -math.inf, (x - half - mean) / sigma)
    upper = torch.where(x > 1 - half, math.inf, (x + half - mean) / sigma)
    return log_normal_probability(lower, upper)


def log_normal_probability(lower, upper):
    """log(Phi(upper) - Phi(lower)), also where both are far out and the difference rounds to 0."""
    flipped = lower + upper > 0  # Phi(u) - Phi(l) = Phi(-l) - Phi(-u): on the lower side logarithms keep their digits
    lower, upper = torch.where(flipped, -upper, lower), torch.where(flipped, -lower, upper)
    log_lower, log_upper = torch.special.log_ndtr(lower), torch.special.log_ndtr(upper)
    return log_upper + torch.log(-torch.expm1(log_lower - log_upper))
