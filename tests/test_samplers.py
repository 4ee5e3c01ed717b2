"""The solvers: against diffusers, against distributions with a known answer, and against each
other.
"""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

from nets import (
    SAMPLERS,
    SPACINGS,
    GaussianDiffusion,
    generate_cosine_schedule,
    generate_linear_schedule,
    seeded_noise,
    slerp,
)
from nets.samplers import NOISE_BLOCK, Step, half_log_snr, repaint, solver_steps, timesteps

LINEAR = generate_linear_schedule(1000, 1e-4, 0.02)
ALPHA_BARS = np.cumprod(1 - LINEAR).tolist()


def run(solver, denoise, x, steps, noise=(), **options):
    """The last x of a solver."""
    *_, (x, _) = SAMPLERS[solver](denoise, x, steps, iter(noise), **options)
    return x


def wave(x, t):
    """Some network that predicts noise: smooth, not linear, different at each timestep."""
    return torch.sin(1.3 * x + 0.004 * t) + 0.3 * x


def wave_denoiser(clip, alpha_bars=ALPHA_BARS):
    def denoise(x, t):
        x_0 = (x - (1 - alpha_bars[t]) ** 0.5 * wave(x, t)) / alpha_bars[t] ** 0.5
        return x_0.clamp(-1, 1) if clip else x_0

    return denoise


def draws(count, seed=0, shape=(2, 3, 4, 4)):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(count)]


# Against diffusers. Its schedulers keep alpha_bar in float32, hence 1e-3.

CLOSE = {"rtol": 1e-3, "atol": 1e-3}


@pytest.mark.parametrize("t", [999, 500, 1, 0])
def test_a_ddpm_step_against_diffusers(t):
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(1000, beta_schedule="linear", variance_type="fixed_large", clip_sample=True)
    x = draws(1)[0].float()
    expected = scheduler.step(wave(x, t), t, x, generator=torch.Generator().manual_seed(5)).prev_sample
    z = torch.randn(x.shape, generator=torch.Generator().manual_seed(5))
    steps = [Step(ALPHA_BARS[t], ALPHA_BARS[t - 1] if t else 1.0, t)]
    torch.testing.assert_close(run("ddpm", wave_denoiser(clip=True), x, steps, [z]), expected, **CLOSE)


@pytest.mark.parametrize("count", [50, 10])
@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("clip", [False, True])
def test_ddim_against_diffusers(clip, eta, count):
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(
        1000, beta_schedule="linear", clip_sample=clip, set_alpha_to_one=True, timestep_spacing="trailing"
    )
    scheduler.set_timesteps(count)
    chosen = timesteps(ALPHA_BARS, count, "trailing")
    assert chosen == scheduler.timesteps.tolist()
    x, *noise = draws(count + 1)
    expected = x
    for t, z in zip(chosen, noise):
        step = scheduler.step(wave(expected, t), t, expected, eta=eta, use_clipped_model_output=clip, variance_noise=z)
        expected = step.prev_sample
    ours = run("ddim", wave_denoiser(clip), x, solver_steps(ALPHA_BARS, chosen), noise, eta=eta)
    torch.testing.assert_close(ours, expected, **CLOSE)


@pytest.mark.parametrize("order, count", [(2, 25), (2, 100), (1, 25)])
def test_dpm_solver_against_diffusers(order, count):
    """From 15 steps on: below, diffusers also takes the last but one step with order 1."""
    from diffusers import DPMSolverMultistepScheduler

    scheduler = DPMSolverMultistepScheduler(
        1000,
        beta_schedule="linear",
        algorithm_type="dpmsolver++",
        solver_order=order,
        solver_type="midpoint",
        final_sigmas_type="zero",
    )
    scheduler.set_timesteps(count)
    x = expected = draws(1)[0]
    for t in scheduler.timesteps:
        expected = scheduler.step(wave(expected, int(t)), t, expected).prev_sample
    steps = solver_steps(ALPHA_BARS, scheduler.timesteps.tolist())
    torch.testing.assert_close(run("dpm++", wave_denoiser(clip=False), x, steps, order=order), expected, **CLOSE)


@pytest.mark.parametrize("count", [25, 100])
def test_sde_dpm_solver_against_diffusers(count):
    from diffusers import DPMSolverMultistepScheduler

    scheduler = DPMSolverMultistepScheduler(
        1000,
        beta_schedule="linear",
        algorithm_type="sde-dpmsolver++",
        solver_order=2,
        solver_type="midpoint",
        final_sigmas_type="zero",
    )
    scheduler.set_timesteps(count)
    x, *noise = draws(count + 1)
    expected = x
    for t, z in zip(scheduler.timesteps, noise):
        expected = scheduler.step(wave(expected, int(t)), t, expected, variance_noise=z).prev_sample
    steps = solver_steps(ALPHA_BARS, scheduler.timesteps.tolist())
    torch.testing.assert_close(run("sde-dpm++", wave_denoiser(clip=False), x, steps, noise), expected, **CLOSE)


@pytest.mark.parametrize("count", [10, 40])
def test_heun_against_diffusers(count):
    """Its scheduler lives on z = x / sqrt(alpha_bar) and asks for the network at x."""
    from diffusers import HeunDiscreteScheduler

    scheduler = HeunDiscreteScheduler(1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear")
    chosen = timesteps(ALPHA_BARS, count, "trailing")
    scheduler.set_timesteps(timesteps=chosen)
    x = draws(1)[0].float()
    z = x / ALPHA_BARS[999] ** 0.5
    for t in scheduler.timesteps:
        z = scheduler.step(wave(scheduler.scale_model_input(z, t), int(t)), t, z).prev_sample
    torch.testing.assert_close(run("heun", wave_denoiser(clip=False), x, solver_steps(ALPHA_BARS, chosen)), z, **CLOSE)


@pytest.mark.parametrize("betas", [LINEAR, generate_cosine_schedule(1000)], ids=["linear", "cosine"])
def test_heun_against_edms_algorithm_on_noise_levels(betas):
    """Karras et al. 2022, algorithm 1, with its own variable and sigmas, in float64.

    Above a sigma of e^5.1 it has no second call.
    """
    alpha_bars = np.cumprod(1 - betas).tolist()
    chosen = timesteps(alpha_bars, 12, "logsnr")
    sigmas = [math.sqrt((1 - alpha_bars[t]) / alpha_bars[t]) for t in chosen] + [0.0]
    x = draws(1)[0]

    def denoise(x, t):  # differs from step to step at every noise level
        return math.sqrt(alpha_bars[t]) * x + 0.3 * torch.sin(2 * x + t)

    def D(z, i):
        return denoise(z / math.sqrt(1 + sigmas[i] ** 2), chosen[i])

    z = x * math.sqrt(1 + sigmas[0] ** 2)
    for i in range(12):
        d = (z - D(z, i)) / sigmas[i]
        euler = z + (sigmas[i + 1] - sigmas[i]) * d
        if sigmas[i + 1] != 0 and math.log(sigmas[i]) <= 5.1:
            d = (d + (euler - D(euler, i + 1)) / sigmas[i + 1]) / 2
        z = z + (sigmas[i + 1] - sigmas[i]) * d
    torch.testing.assert_close(run("heun", denoise, x, solver_steps(alpha_bars, chosen)), z)


@pytest.mark.parametrize("solver", SAMPLERS)
@pytest.mark.parametrize("spacing", SPACINGS)
def test_float32_is_enough_with_the_cosine_schedule(solver, spacing):
    """Its sqrt(alpha_bar) begins at 5e-5. float64 gives the same image, to 0.01 of 255 levels."""
    alpha_bars = np.cumprod(1 - generate_cosine_schedule(1000)).tolist()
    steps, noise = solver_steps(alpha_bars, timesteps(alpha_bars, 25, spacing)), draws(30)

    def in_type(dtype):
        x, *others = (z.to(dtype) for z in noise)
        return run(solver, lambda x, t: torch.tanh(x + 0.3 * torch.sin(3 * x) + 0.001 * t), x, steps, others)

    assert (in_type(torch.float32).double() - in_type(torch.float64)).abs().max() * 127.5 < 0.01


# Gaussian data: x_0 ~ N(MEAN, VARIANCE), whose best denoiser is known and linear

MEAN, VARIANCE = 0.4, 0.25


def gaussian_denoiser(alpha_bars, variance=VARIANCE):
    def denoise(x, t):
        """E[x_0 | x_t]."""
        a = alpha_bars[t]
        return MEAN + variance * math.sqrt(a) / (a * variance + 1 - a) * (x - math.sqrt(a) * MEAN)

    return denoise


def propagate(solver, steps, start, denoise, **options):
    """Mean and variance after a solver that starts from N(*start), exactly: it is linear in x_T
    and in each noise.

    Entry 0 of the batch starts from the mean without noise, entry 1 from one unit more, entry 2 + k
    gets one unit of the k-th noise.
    """
    x = torch.full((2 + len(steps),), start[0], dtype=torch.float64)
    x[1] += 1
    noise = torch.eye(2 + len(steps), dtype=torch.float64)[2:]
    out = run(solver, denoise, x, steps, noise, **options)
    gains = out[1:] - out[0]
    return out[0].item(), (start[1] * gains[0].square() + gains[1:].square().sum()).item()


RUNS = [
    ("ddpm", {"variance": "beta"}),
    ("ddpm", {"variance": "posterior"}),
    ("ddim", {"eta": 0.0}),
    ("ddim", {"eta": 0.5}),
    ("dpm++", {"order": 1}),
    ("dpm++", {"order": 2}),
    ("sde-dpm++", {}),
    ("heun", {}),
]


def test_clipped_logsnr_spends_no_step_where_there_is_only_noise():
    """Equal distances in lambda from where the linear schedule ends, whatever the schedule."""
    for betas, steps in ((LINEAR, 25), (generate_cosine_schedule(1000), 25), (generate_cosine_schedule(1000), 2)):
        alpha_bars = np.cumprod(1 - betas).tolist()
        chosen = timesteps(alpha_bars, steps, "clipped_logsnr")
        assert chosen[0] == 999 and chosen[-1] == 0
        lambdas = [half_log_snr(alpha_bar) for alpha_bar in alpha_bars]
        wanted = np.linspace(max(lambdas[-1], -5.1), lambdas[0], steps)
        for t, value in zip(chosen[1:], wanted[1:]):
            assert lambdas[t] > -5.1
            if t > 10:  # below there are fewer timesteps than steps
                assert lambdas[t + 1] < value < lambdas[t - 1]
    assert timesteps(ALPHA_BARS, 25, "clipped_logsnr") == timesteps(ALPHA_BARS, 25, "logsnr")  # of the linear one


@pytest.mark.parametrize("solver, options", RUNS)
@pytest.mark.parametrize("betas", [LINEAR, generate_cosine_schedule(1000)], ids=["linear", "cosine"])
def test_a_thousand_steps_give_the_datas_mean_and_variance(solver, options, betas):
    alpha_bars = np.cumprod(1 - betas).tolist()
    steps = solver_steps(alpha_bars, timesteps(alpha_bars, 1000, "trailing"))
    mean, variance = propagate(solver, steps, (0.0, 1.0), gaussian_denoiser(alpha_bars), **options)
    assert mean == pytest.approx(MEAN, rel=0.02)
    assert variance == pytest.approx(VARIANCE, rel=0.02)


@pytest.mark.parametrize("solver, options", RUNS)
def test_the_error_falls_at_the_solvers_order(solver, options):
    """Equal steps in lambda between two finite ends, from the true distribution at the one to that
    at the other.
    """
    order = 2 if solver in ("heun", "sde-dpm++") or options.get("order") == 2 else 1
    errors = []
    for count in (40, 80, 160):
        alpha_bars = [1 / (1 + math.exp(-2 * half)) for half in np.linspace(3.0, -3.0, count + 1)]
        steps = [Step(alpha_bars[t], alpha_bars[t - 1], t) for t in range(count, 0, -1)]
        a, b = alpha_bars[-1], alpha_bars[0]
        start = (math.sqrt(a) * MEAN, a * VARIANCE + 1 - a)
        mean, variance = propagate(solver, steps, start, gaussian_denoiser(alpha_bars), **options)
        errors.append((abs(mean - math.sqrt(b) * MEAN), abs(variance - (b * VARIANCE + 1 - b))))
    for coarse, fine in itertools.pairwise(errors):
        assert fine[1] < 0.02
        assert math.log2(coarse[1] / fine[1]) == pytest.approx(order, abs=0.3)
        assert fine[0] < 1e-12 or math.log2(coarse[0] / fine[0]) > order - 0.3


def test_ddpm_is_exact_for_data_of_variance_one():
    """q(x_s | x_t) then has the variance beta, so that even three steps are right."""
    steps = solver_steps(ALPHA_BARS, [999, 500, 200])
    frames = propagate("ddpm", steps[:2], (0.0, 1.0), gaussian_denoiser(ALPHA_BARS, variance=1.0), variance="beta")
    assert frames == pytest.approx((math.sqrt(ALPHA_BARS[200]) * MEAN, 1.0), abs=0.003)


# Against each other


def test_ddim_with_eta_one_is_ddpm_with_the_posteriors_variance():
    x, *noise = draws(21)
    steps = solver_steps(ALPHA_BARS, timesteps(ALPHA_BARS, 20, "logsnr"))
    ddpm = run("ddpm", wave_denoiser(clip=True), x, steps, noise, variance="posterior")
    torch.testing.assert_close(run("ddim", wave_denoiser(clip=True), x, steps, noise, eta=1.0), ddpm)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_dpm_solver_of_order_one_is_ddim_with_the_same_eta(eta):
    x, *noise = draws(21)
    steps = solver_steps(ALPHA_BARS, timesteps(ALPHA_BARS, 20, "uniform"))
    ddim = run("ddim", wave_denoiser(clip=True), x, steps, noise, eta=eta)
    torch.testing.assert_close(run("dpm++", wave_denoiser(clip=True), x, steps, noise, order=1, eta=eta), ddim)
    assert (run("dpm++", wave_denoiser(clip=True), x, steps, noise, order=2, eta=eta) - ddim).abs().max() > 1e-3


@pytest.mark.parametrize("solver", SAMPLERS)
@pytest.mark.parametrize("spacing", SPACINGS)
def test_an_oracle_brings_the_image_back_at_every_step_count(solver, spacing):
    x, *noise = draws(11)
    image = draws(1, seed=9)[0]
    alpha_bars = np.cumprod(1 - generate_linear_schedule(10, 0.05, 0.6)).tolist()
    for count in range(1, 11):
        steps = solver_steps(alpha_bars, timesteps(alpha_bars, count, spacing))
        for _, x_0 in SAMPLERS[solver](lambda x, t: image, x, steps, iter(noise)):
            torch.testing.assert_close(x_0, image)
        torch.testing.assert_close(run(solver, lambda x, t: image, x, steps, noise), image)


@pytest.mark.parametrize("solver", SAMPLERS)
def test_calls_of_the_network(solver):
    """One a step; heun two, but for its last. Each with the timestep at which x_t is."""
    chosen, called = timesteps(ALPHA_BARS, 8, "trailing"), []

    def denoise(x, t):
        called.append(t)
        return x * 0

    run(solver, denoise, draws(1)[0], solver_steps(ALPHA_BARS, chosen), draws(8))
    expected = [chosen[0], *(t for t in chosen[1:] for _ in range(2))] if solver == "heun" else chosen
    assert called == expected


def test_heun_takes_one_call_in_a_step_from_pure_noise():
    alpha_bars, called = np.cumprod(1 - generate_cosine_schedule(1000)).tolist(), []
    steps = solver_steps(alpha_bars, timesteps(alpha_bars, 13, "clipped_logsnr"))
    run("heun", lambda x, t: called.append(t) or x * 0, draws(1)[0], steps)
    assert called == [999, steps[1].t, *(step.t for step in steps[2:] for _ in range(2))]


def test_heun_does_not_enlarge_what_the_network_gets_wrong_in_pure_noise():
    """Images of independent standard normal pixels: the right x_0 is sqrt(alpha_bar) x. An error of
    0.5 at the last timestep, where sqrt(alpha_bar) is 5e-5, must not show."""
    alpha_bars = np.cumprod(1 - generate_cosine_schedule(1000)).tolist()
    steps, x = solver_steps(alpha_bars, timesteps(alpha_bars, 13, "clipped_logsnr")), draws(1)[0]
    right = run("heun", lambda x, t: math.sqrt(alpha_bars[t]) * x, x, steps)
    wrong = run("heun", lambda x, t: math.sqrt(alpha_bars[t]) * x + 0.5 * (t == 999), x, steps)
    torch.testing.assert_close(wrong, right, atol=0.01, rtol=0)


def test_an_unknown_variance_is_refused():
    with pytest.raises(ValueError, match="variance 'learned'; known: beta, posterior"):
        run("ddpm", wave_denoiser(True), draws(1)[0], solver_steps(ALPHA_BARS, [999]), variance="learned")


# Timesteps


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("T", [1, 2, 10, 1000])
def test_timesteps_fall_from_the_last_one_and_differ(spacing, T):
    alpha_bars = np.cumprod(1 - generate_cosine_schedule(T)).tolist()
    for start in sorted({0, T // 2, T - 1}):
        for count in {1, 2, 3, 25, start, start + 1} - {0}:
            if count > start + 1:
                continue
            chosen = timesteps(alpha_bars, count, spacing, start)
            assert len(chosen) == count and chosen[0] == start and chosen[-1] >= 0
            assert all(earlier > later for earlier, later in itertools.pairwise(chosen))


def test_spacings_are_what_they_are_called():
    assert timesteps(ALPHA_BARS, 4, "trailing") == [999, 749, 499, 249]
    assert timesteps(ALPHA_BARS, 4, "uniform") == [999, 666, 333, 0]
    halves = [half_log_snr(ALPHA_BARS[t]) for t in timesteps(ALPHA_BARS, 8, "logsnr")]
    gaps = np.diff(halves)
    assert halves[-1] == half_log_snr(ALPHA_BARS[0]) and gaps.max() / gaps.min() < 1.2


def test_the_last_step_leaves_no_noise():
    steps = solver_steps(ALPHA_BARS, [999, 10])
    assert steps == [(ALPHA_BARS[999], ALPHA_BARS[10], 999), (ALPHA_BARS[10], 1.0, 10)]


def test_impossible_timesteps_are_refused():
    with pytest.raises(ValueError, match="unknown spacing 'linear'; known: uniform, trailing, logsnr, clipped_logsnr"):
        timesteps(ALPHA_BARS, 10, "linear")
    for count, start in ((0, None), (1001, None), (12, 10)):
        with pytest.raises(ValueError, match=f"from 1 to {1000 if start is None else 11}.*not {count}"):
            timesteps(ALPHA_BARS, count, "trailing", start)


# Noise and seeds


def test_an_images_noise_depends_on_its_seed_alone():
    def noise(seeds):
        return torch.stack(list(itertools.islice(seeded_noise(seeds, (3, 5, 5), "cpu"), 2 * NOISE_BLOCK + 2)), dim=1)

    together = noise([3, 7, 2**40])
    for i, seed in enumerate([3, 7, 2**40]):
        assert torch.equal(noise([seed])[0], together[i])
    assert torch.equal(noise([7, 8, 9, 10])[0], together[1])
    flat = together.flatten(2).flatten(0, 1)  # every draw of every image is another one
    assert len({tuple(row.tolist()) for row in flat}) == len(flat)
    assert abs(flat.mean()) < 0.05 and abs(flat.std() - 1) < 0.05


def test_the_first_noise_is_a_plain_draw_from_the_seed():
    """So an image's start can be had without its other noise, and does not change with the length
    of a block.
    """
    expected = torch.randn(3, 5, 5, generator=torch.Generator().manual_seed(7))
    assert torch.equal(next(seeded_noise([7], (3, 5, 5), "cpu"))[0], expected)


class Wave(nn.Module):
    """A network without weights that remembers its timesteps and inputs.

    Dropout would show in what it answers.
    """

    def __init__(self):
        super().__init__()
        self.dropout = nn.Dropout(0.5)
        self.timesteps, self.inputs, self.training_seen = [], [], []

    def forward(self, x, t, y=None):
        self.timesteps.append(t[0].item())
        self.inputs.append(x)
        self.training_seen.append(self.training)
        return self.dropout(wave(x, t[0]))


def diffusion(T=100, size=(4, 6)):
    return GaussianDiffusion(Wave(), size, 3, betas=generate_linear_schedule(T, 1e-3, 0.2))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_same_seed_gives_the_same_image_in_any_batch(sampler):
    seeds = [11, 12, 13, 14, 15]
    together = diffusion().sample(5, "cpu", sampler=sampler, seeds=seeds, steps=20)
    apart = torch.cat(
        [diffusion().sample(len(part), "cpu", sampler=sampler, seeds=part, steps=20) for part in (seeds[:2], seeds[2:])]
    )
    torch.testing.assert_close(together, apart, rtol=0, atol=1 / 255)
    assert (together[0] - together[1]).abs().max() > 0.1


def test_without_seeds_the_global_generator_decides():
    def draw():
        torch.manual_seed(4)
        return diffusion().sample(2, "cpu", steps=5)

    first = draw()
    assert torch.equal(first, draw())
    assert not torch.equal(first, diffusion().sample(2, "cpu", steps=5))


# sample


@pytest.mark.parametrize(
    "sampler, count", [("ddpm", 100), ("ddim", 25), ("dpm++", 25), ("sde-dpm++", 25), ("heun", 25)]
)
def test_sampling_starts_at_the_last_timestep_and_has_default_steps(sampler, count):
    model = diffusion()
    frames = list(model.sample_steps(2, "cpu", sampler=sampler, seeds=[0, 1]))
    seen = model.ema_model.timesteps
    assert len(frames) == count and seen[0] == 99 and len(set(seen)) == count
    last, x_0 = frames[-1]
    assert last.shape == x_0.shape == (2, 3, 4, 6) and last.dtype == torch.float32 and last.abs().max() <= 1 + 1e-5
    assert torch.equal(last, diffusion().sample(2, "cpu", sampler=sampler, seeds=[0, 1]))


def test_fewer_timesteps_than_the_default_steps_are_all_walked():
    model = diffusion(T=10)
    model.sample(1, "cpu", sampler="dpm++")
    assert model.ema_model.timesteps == list(range(9, -1, -1))


def test_clipping_is_of_x_0_not_of_x_t():
    """Without it the first of 50 cosine steps amplifies an error 632 times.

    Of x_t it would grey the picture.
    """
    model = GaussianDiffusion(Wave(), (4, 6), 3, betas=generate_cosine_schedule(50))
    clipped = list(model.sample_steps(4, "cpu", seeds=[1, 2, 3, 4]))
    assert max(x_0.abs().max() for _, x_0 in clipped) <= 1
    assert max(x.abs().max() for x, _ in clipped[:-1]) > 1.5
    assert max(x_0.abs().max() for _, x_0 in model.sample_steps(4, "cpu", seeds=[1, 2, 3, 4], clip=False)) > 30


@pytest.mark.parametrize("use_ema", [True, False])
def test_dropout_is_off_whatever_the_mode(use_ema):
    model = diffusion().train()
    network = model.ema_model if use_ema else model.model
    first, second = (model.sample(1, "cpu", use_ema=use_ema, sampler="ddim", steps=4, seeds=[3]) for _ in range(2))
    assert torch.equal(first, second)
    assert network.training_seen == [False] * 8 and model.model.training and not model.ema_model.training


def test_sampling_takes_the_average_unless_told_otherwise():
    model = diffusion()
    model.sample(1, "cpu", steps=2)
    assert len(model.ema_model.timesteps) == 2 and not model.model.timesteps


def test_noise_can_be_given_in_place_of_seeds():
    model, given = diffusion(), draws(3, shape=(2, 3, 4, 6))
    model.sample(2, "cpu", sampler="ddpm", steps=3, noise=iter(given))
    assert torch.equal(model.ema_model.inputs[0], given[0].float())
    plain = diffusion().sample(2, "cpu", sampler="ddpm", steps=3, seeds=[1, 2])
    own = seeded_noise([1, 2], (3, 4, 6), "cpu")
    assert torch.equal(diffusion().sample(2, "cpu", sampler="ddpm", steps=3, noise=own), plain)


@pytest.mark.parametrize("strength, start", [(1.0, 99), (0.6, 59), (0.011, 0), (1e-6, 0)])
def test_an_image_to_start_from_is_noised_to_its_share_of_the_timesteps(strength, start):
    model, image = diffusion(), torch.rand(2, 3, 4, 6)
    model.sample(2, "cpu", seeds=[1, 2], init=image, strength=strength)
    assert model.ema_model.timesteps == list(range(start, -1, -1))
    noise = next(seeded_noise([1, 2], (3, 4, 6), "cpu"))
    expected = model.perturb_x(image, torch.tensor([start, start]), noise)
    torch.testing.assert_close(model.ema_model.inputs[0], expected)


def test_requests_that_do_not_fit_are_refused():
    model, image = diffusion(), torch.zeros(2, 3, 4, 6)
    for settings, message in (
        ({"sampler": "euler"}, "unknown sampler 'euler'; known: ddpm, ddim, dpm\\+\\+, sde-dpm\\+\\+, heun"),
        ({"steps": 101}, "from 1 to 100"),
        ({"seeds": [1]}, "seeds has 1 entries for a batch of 2"),
        ({"known": image, "mask": image, "sampler": "ddim"}, "inpainting"),
        ({"known": image}, "mask"),
    ):
        with pytest.raises(ValueError, match=message):
            model.sample(2, "cpu", **settings)
    with pytest.raises(TypeError, match="unexpected keyword argument 'eta'"):
        model.sample(2, "cpu", sampler="ddpm", eta=0.5)


# Inpainting


def test_inpainting_keeps_the_known_pixels_and_draws_the_others():
    model, known = diffusion(), torch.rand(2, 3, 4, 6) * 2 - 1
    mask = torch.zeros(1, 1, 4, 6)
    mask[..., 3:] = 1
    x = model.sample(2, "cpu", seeds=[1, 2], known=known, mask=mask, steps=10, resamplings=3)
    assert torch.equal(x[..., :3], known[..., :3])
    assert (x[..., 3:] - known[..., 3:]).abs().max() > 0.1
    assert len(model.ema_model.timesteps) == 3 * 9 + 1  # the last step has no noise to put back


@pytest.mark.parametrize("resamplings", [1, 4])
def test_repaint_keeps_the_distribution_at_every_timestep(resamplings):
    """Pixels of variance 1, half of them drawn: ddpm's step with variance beta is then exact, and
    resampling must not change that.
    """
    torch.manual_seed(0)
    alpha_bars = np.cumprod(1 - generate_linear_schedule(30, 1e-3, 0.5)).tolist()
    known = MEAN + torch.randn(20_000, dtype=torch.float64)
    mask = (torch.arange(20_000) % 2).double()
    noise = (torch.randn(20_000, dtype=torch.float64) for _ in itertools.count())
    steps = solver_steps(alpha_bars, timesteps(alpha_bars, 30, "trailing"))
    denoise = gaussian_denoiser(alpha_bars, variance=1.0)
    frames = repaint(denoise, next(noise), steps, noise, known=known, mask=mask, resamplings=resamplings)
    for (x, _), step in zip(frames, steps):
        for part in (x[0::2], x[1::2]):
            assert part.mean().item() == pytest.approx(math.sqrt(step.alpha_bar_s) * MEAN, abs=0.04)
            assert part.var().item() == pytest.approx(1.0, abs=0.06)


# Interpolation


def test_slerp_goes_from_one_noise_to_the_other_at_their_length():
    a, b = draws(2, shape=(1, 3, 32, 32))
    torch.testing.assert_close(slerp(a, b, 0.0), a)
    torch.testing.assert_close(slerp(a, b, 1.0), b)
    assert slerp(a, b, 0.5).std() == pytest.approx(1.0, abs=0.05)
    torch.testing.assert_close(slerp(a, a, 0.3), a)
