"""The variational bound: terms of known value, and the bits of a Gaussian whose chain can be
worked out by hand.
"""

import math

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from nets import GaussianDiffusion, generate_linear_schedule
from utils.evaluate.likelihood import (
    decoder_log_likelihood,
    log_normal_probability,
    prior_divergence,
    step_divergence,
    variational_bound,
)

LEVELS = torch.arange(256, dtype=torch.float64) / 127.5 - 1


def levels(x):
    """x rounded to the nearest of the 256 levels."""
    return ((x.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1


def gaussian_images(std, count=24, size=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return levels(std * torch.randn(count, 3, size, size, generator=generator))


def best_gain(alpha_bars, variance):
    """E[x_0 | x_t] / x_t for x_0 ~ N(0, variance), as a function of t."""
    return lambda t: math.sqrt(alpha_bars[t]) * variance / (alpha_bars[t] * variance + 1 - alpha_bars[t])


def test_the_decoder_of_published_numbers_costs_less():
    """What the docstring says: the variance of Ho et al.'s code and ours, for a perfect network."""
    betas = generate_linear_schedule(1000, 1e-4, 0.02)
    alpha_bars, x = np.cumprod(1 - betas), torch.zeros(1, 1, 1, 1) + 1 / 255
    published = betas[1] * (1 - alpha_bars[0]) / (1 - alpha_bars[1])
    assert published / betas[0] == pytest.approx(0.55, abs=0.005)
    ours, theirs = (
        -math.log2(math.erf(1 / 255 / math.sqrt(2 * variance))) for variance in (betas[0], published)
    )  # the probability of the level's own interval
    assert ours - theirs == pytest.approx(0.4, abs=0.01)
    assert variational_bound(lambda x_t, t: x, alpha_bars, x)[0, 0].item() == pytest.approx(ours, rel=1e-5)


# A Gaussian with a known answer


def chain_bits(betas, variance, gain):
    """Bits per dimension of the bound for x_0 ~ N(0, variance), from the chain's own covariances.

    Ho et al. 2020, equation 3, before it is rearranged into the L_t that the code computes:
        E_q[-log p(x_T) - sum_t log p(x_{t-1} | x_t) + sum_t log q(x_t | x_{t-1})].
    Here all is Gaussian. The forward chain has Var x_t = alpha_t Var x_{t-1} + beta_t and
    Cov(x_{t-1}, x_t) = sqrt(alpha_t) Var x_{t-1}.
    The model's step is N(m_t x_t, beta_t); with x_0 predicted as gain_t x_t its factor is
        m_t = (sqrt(abar_{t-1}) beta_t gain_t + sqrt(alpha_t) (1 - abar_{t-1})) / (1 - abar_t)
    with abar_0 = 1. So
        E[-log p(x_{t-1} | x_t)] = log(2 pi beta_t) / 2 + E[(x_{t-1} - m_t x_t)^2] / (2 beta_t),
    where the square's expectation is Var x_{t-1} - 2 m_t Cov + m_t^2 Var x_t, and
    E[log q(x_t | x_{t-1})] = -log(2 pi e beta_t) / 2. That is a density; the probability of a
    level of width 2/255 is the density times the width as long as the decoder is wider than a
    level, which subtracts log2(2/255). The levels' rounding adds (2/255)^2 / 12 to the variance
    of x_0.
    """
    variances, abar = [variance + (2 / 255) ** 2 / 12], 1.0
    nats = 0.0
    for t, beta in enumerate(betas):
        alpha, before = 1 - beta, variances[-1]
        variances.append(alpha * before + beta)
        m = (math.sqrt(abar) * beta * gain(t) + math.sqrt(alpha) * (1 - abar)) / (1 - abar * alpha)
        square = before - 2 * m * math.sqrt(alpha) * before + m**2 * variances[-1]
        nats += 0.5 * math.log(2 * math.pi * beta) + square / (2 * beta) - 0.5 * math.log(2 * math.pi * math.e * beta)
        abar *= alpha
    nats += 0.5 * math.log(2 * math.pi) + variances[-1] / 2
    return nats / math.log(2) - math.log2(2 / 255)


@pytest.mark.parametrize("T,std,mistake", [(1000, 0.25, 1.0), (200, 0.1, 1.0), (200, 0.25, 0.9)])
def test_bits_of_a_gaussian(T, std, mistake):
    """A wrong network (its gain too small) costs what the formula says too."""
    betas = generate_linear_schedule(T, 1e-4 * 1000 / T, 0.02 * 1000 / T)
    alpha_bars = np.cumprod(1 - betas).tolist()
    best = best_gain(alpha_bars, std**2)

    def gain(t):
        return mistake * best(t)

    x = gaussian_images(std)
    bits = variational_bound(lambda x_t, t: gain(t) * x_t, alpha_bars, x, torch.Generator().manual_seed(1)).sum(1)
    expected = chain_bits(betas, x.double().square().mean().item() - (2 / 255) ** 2 / 12, gain)
    entropy = 0.5 * math.log2(2 * math.pi * math.e * std**2) - math.log2(2 / 255)
    assert bits.mean().item() == pytest.approx(expected, rel=0.01)
    assert expected > entropy
    if T == 1000:  # so many steps that the bound is nearly tight: the Gaussian's own entropy is the answer
        assert bits.mean().item() == pytest.approx(entropy, rel=0.01)
    elif mistake != 1:
        assert expected > 1.02 * chain_bits(betas, std**2, best)


# Term by term


def test_a_perfect_network_leaves_what_the_variances_cost():
    """With x_0 known the steps differ by their variances alone: E log(beta / beta~) and the
    decoder's rounding remain.
    """
    betas = generate_linear_schedule(50, 0.002, 0.4)
    alpha_bars = np.cumprod(1 - betas)
    x = gaussian_images(0.5, count=2, size=4)
    terms = variational_bound(lambda x_t, t: x, alpha_bars.tolist(), x)
    assert terms.shape == (2, 51)
    posterior = betas[1:] * (1 - alpha_bars[:-1]) / (1 - alpha_bars[1:])
    cost = [
        torch.distributions.kl_divergence(
            torch.distributions.Normal(0.0, p**0.5), torch.distributions.Normal(0.0, b**0.5)
        )
        for p, b in zip(posterior, betas[1:])
    ]
    assert_close(terms[:, 1:-1], (torch.tensor(cost).double() / math.log(2)).expand(2, -1), atol=1e-6, rtol=1e-5)
    middle = -math.log2(math.erf(1 / 255 / math.sqrt(2 * betas[0])))  # of a level that is neither black nor white
    inner = x[0, 0, 0, :1]
    assert -decoder_log_likelihood(inner, inner, math.sqrt(betas[0])).item() / math.log(2) == pytest.approx(
        middle, rel=1e-4
    )


def test_step_is_the_divergence_of_two_gaussians():
    """The posterior by Bayes's rule from its two factors, in torch.distributions, at every pair of
    neighbouring timesteps.
    """
    alphas = 1 - generate_linear_schedule(20, 0.01, 0.5)
    alpha_bars = np.cumprod(alphas)
    x, x_0, x_t = torch.tensor(0.3, dtype=torch.float64), torch.tensor(-0.2, dtype=torch.float64), 0.7
    for t in range(1, 20):
        beta, before = 1 - alphas[t], 1 - alpha_bars[t - 1]
        precision = alphas[t] / beta + 1 / before  # of x_s, from q(x_t | x_s) and q(x_s | x)

        def mean(image, t=t, beta=beta, before=before, precision=precision):
            return (math.sqrt(alphas[t]) * x_t / beta + math.sqrt(alpha_bars[t - 1]) * image / before) / precision

        q = torch.distributions.Normal(mean(x), precision**-0.5)
        p = torch.distributions.Normal(mean(x_0), beta**0.5)
        assert_close(step_divergence(x, x_0, alpha_bars[t - 1], alpha_bars[t]), torch.distributions.kl_divergence(q, p))


def test_prior_is_the_divergence_of_two_gaussians():
    x = torch.tensor([-1.0, 0.0, 0.4], dtype=torch.float64)
    for alpha_bar in (1e-9, 4e-5, 0.3):
        q = torch.distributions.Normal(math.sqrt(alpha_bar) * x, math.sqrt(1 - alpha_bar))
        expected = torch.distributions.kl_divergence(
            q, torch.distributions.Normal(torch.zeros(3, dtype=torch.float64), 1.0)
        )
        assert_close(prior_divergence(x, alpha_bar), expected, atol=1e-15, rtol=1e-6)


@pytest.mark.parametrize("mean,sigma", [(0.1, 0.01), (-1.3, 0.3), (0.999, 0.002), (5.0, 1.0)])
def test_decoder_gives_all_levels_a_probability_of_one_together(mean, sigma):
    log_p = decoder_log_likelihood(LEVELS, torch.full_like(LEVELS, mean), sigma)
    assert_close(log_p.exp().sum(), torch.tensor(1.0, dtype=torch.float64))
    assert (log_p <= 0).all() and log_p.isfinite().all()


def test_decoder_keeps_its_digits_far_out():
    """A pixel missed by 40 to 190 deviations, where differences of probabilities are 0 and their
    logarithm is not.
    """
    for low, high in ((40.0, 41.0), (-41.0, -40.0), (190.0, 190.8)):
        got = log_normal_probability(
            torch.tensor([low], dtype=torch.float64), torch.tensor([high], dtype=torch.float64)
        ).item()
        z = min(abs(low), abs(high))
        # Mills's ratio
        expected = -z * z / 2 - 0.5 * math.log(2 * math.pi) - math.log(z) + math.log1p(-1 / z**2 + 3 / z**4)
        assert got == pytest.approx(expected, rel=1e-9)
    assert log_normal_probability(torch.tensor([-math.inf]), torch.tensor([math.inf])).item() == 0.0


# With the project's own diffusion


class Constant(torch.nn.Module):
    """Predicts one grey for every picture of a class."""

    def __init__(self):
        super().__init__()
        self.grey = torch.nn.Parameter(torch.tensor([-0.5, 0.0, 0.5]))

    def forward(self, x, t, y=None):
        return self.grey[y][:, None, None, None].expand_as(x)


def test_diffusion_by_its_denoiser():
    """A picture of its class's grey costs less than one of another's, and the same seed gives the
    same bits.
    """
    diffusion = GaussianDiffusion(
        Constant(), (4, 4), 1, 3, betas=generate_linear_schedule(30, 0.005, 0.5), prediction="x0"
    )
    x = levels(torch.tensor([-0.5, 0.5])[:, None, None, None].expand(2, 1, 4, 4))

    def bits(y):
        denoise = diffusion.denoiser(torch.tensor(y))
        return variational_bound(denoise, diffusion.alpha_bars, x, torch.Generator().manual_seed(3))

    right, wrong = bits([0, 2]), bits([1, 1])
    assert right.shape == (2, 31) and right.dtype == torch.float64
    assert (right[:, :-1] < wrong[:, :-1]).all()
    assert_close(right[:, -1], wrong[:, -1])
    assert torch.equal(right, bits([0, 2]))
