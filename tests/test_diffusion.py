"""The forward process, the objectives, the EMA, labels."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import OnMps
from torch import nn

from nets import LOSSES, PREDICTIONS, GaussianDiffusion, UNet, build, generate_cosine_schedule, generate_linear_schedule
from nets.ema import tensors_of, update_
from nets.schedules import make_betas

T = 100
BETAS = generate_linear_schedule(T, 1e-3, 0.2)


class Scale(nn.Module):
    """The smallest network: x_t times one number, plus the class's number.

    It remembers how it was called.
    """

    def __init__(self, classes=1):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.5))
        self.shift = nn.Parameter(torch.arange(classes, dtype=torch.float32))
        self.dropout = nn.Dropout(0.5)
        self.calls = []

    def forward(self, x, t, y=None):
        self.calls.append((len(x), t.tolist(), None if y is None else y.tolist()))
        shift = 0 if y is None else self.shift[y][:, None, None, None]
        return self.dropout(self.weight * x + shift)


class Oracle(nn.Module):
    """Knows the image, and answers in whichever way it is asked."""

    def __init__(self, x_0, betas, prediction):
        super().__init__()
        self.x_0, self.prediction = x_0, prediction
        self.alpha_bars = torch.from_numpy(np.cumprod(1 - betas))

    def forward(self, x, t, y=None):
        a, s = self.alpha_bars[t].sqrt()[:, None, None, None], (1 - self.alpha_bars[t]).sqrt()[:, None, None, None]
        eps = (x - a * self.x_0) / s
        return {"eps": eps, "x0": self.x_0.expand_as(x), "v": a * eps - s * self.x_0}[self.prediction].float()


def small(model=None, betas=BETAS, **settings):
    return GaussianDiffusion(Scale() if model is None else model, (4, 6), 3, betas=betas, **settings)


def guided(**settings):
    return GaussianDiffusion(Scale(classes=4), (4, 6), 3, num_classes=4, betas=BETAS, null_class=3, **settings)


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    x, noise = torch.rand(5, 3, 4, 6, generator=generator) * 2 - 1, torch.randn(5, 3, 4, 6, generator=generator)
    return x, torch.tensor([0, 1, 40, 98, 99]), noise


# The forward process


def test_perturb_x_against_the_formula(batch):
    x, t, noise = batch
    alpha_bar = torch.from_numpy(np.cumprod(1 - BETAS))[t][:, None, None, None]
    expected = alpha_bar.sqrt() * x + (1 - alpha_bar).sqrt() * noise
    torch.testing.assert_close(small().perturb_x(x, t, noise), expected.float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_schedule_survives_a_cast_of_the_module(dtype, batch):
    """In bf16, 1 - 1e-4 is 1: the first timesteps would get no noise at all."""
    betas = generate_linear_schedule(1000, 1e-4, 0.02)
    diffusion = small(betas=betas, timestep_sampling="middle")
    before = {name: buffer.clone() for name, buffer in diffusion.named_buffers()}
    alpha_bars = diffusion.alpha_bars
    diffusion.to(dtype)
    assert diffusion.model.weight.dtype == dtype
    torch.testing.assert_close(dict(diffusion.named_buffers()), before, rtol=0, atol=0)
    assert diffusion.alpha_bars == alpha_bars
    with torch.autocast("cpu", torch.bfloat16):
        x_t = diffusion.perturb_x(torch.zeros(1, 3, 4, 6), torch.tensor([0]), torch.ones(1, 3, 4, 6))
    torch.testing.assert_close(x_t, torch.full_like(x_t, 0.01))


def test_solvers_tables_are_float64_and_follow_loaded_betas():
    other = generate_cosine_schedule(T)
    settings = {"loss_weighting": "min_snr", "timestep_sampling": "middle"}
    diffusion, source = small(**settings), small(betas=other, **settings)
    diffusion.load_state_dict(source.state_dict())
    assert diffusion.alpha_bars == source.alpha_bars
    for name in ("loss_weight", "timestep_edges"):
        torch.testing.assert_close(getattr(diffusion, name), getattr(source, name), rtol=0, atol=0)
    np.testing.assert_allclose(diffusion.alpha_bars[:-1], np.cumprod(1 - other)[:-1], rtol=1e-4)
    np.testing.assert_allclose(
        diffusion.alpha_bars, np.cumprod(1 - other.astype(np.float32).astype(np.float64)), rtol=1e-12
    )


@pytest.mark.parametrize("betas", [[0.1, 1.0], [0.0, 0.1], [[0.1]], [0.1, math.nan]])
def test_impossible_betas_are_refused(betas):
    with pytest.raises(ValueError, match="betas? must"):
        small(betas=betas)


# Objectives


@pytest.mark.parametrize("name, function", [("l1", F.l1_loss), ("l2", F.mse_loss), ("huber", F.huber_loss)])
def test_losses_per_image_and_their_mean(name, function, batch):
    x, t, noise = batch
    diffusion = small(loss_type=name).eval()
    output = 0.5 * diffusion.perturb_x(x, t, noise)
    expected = torch.stack([function(output[i], noise[i]) for i in range(5)])
    torch.testing.assert_close(diffusion.get_losses(x, t, None, noise=noise, reduction="none"), expected)
    torch.testing.assert_close(diffusion(x, t=t, noise=noise), expected.mean())


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", LOSSES)
def test_an_oracle_has_no_loss_and_finds_the_image(prediction, name, batch):
    x, t, noise = batch
    diffusion = small(Oracle(x.double(), BETAS, prediction), prediction=prediction, loss_type=name)
    assert diffusion(x, t=t, noise=noise) < 1e-6
    denoise = diffusion.denoiser(clip=False)
    for step in (0, 40, 99):
        x_t = diffusion.perturb_x(x, torch.full((5,), step), noise)
        torch.testing.assert_close(denoise(x_t, step), x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_remove_noise_is_the_posteriors_mean_for_each_prediction(prediction, batch):
    """Ho et al. 2020, equation 7, in x_0 and x_t.

    The code under test goes through the noise (equation 11).
    """
    x, t, noise = batch
    diffusion = small(Oracle(x.double(), BETAS, prediction), prediction=prediction)
    x_t = diffusion.perturb_x(x, t, noise)
    alpha_bar = np.cumprod(1 - BETAS)
    for i, k in enumerate(t.tolist()):
        before = alpha_bar[k - 1] if k else 1.0
        mean = (before**0.5 * BETAS[k] * x[i] + (1 - BETAS[k]) ** 0.5 * (1 - before) * x_t[i]) / (1 - alpha_bar[k])
        torch.testing.assert_close(diffusion.remove_noise(x_t, t, None)[i], mean, rtol=1e-4, atol=1e-4)


def test_remove_noise_never_clips(batch):
    x, t, _ = batch
    mean = small(prediction="x0").remove_noise(100 * x, torch.zeros_like(t), None)
    torch.testing.assert_close(mean, 50 * x)  # at t = 0 the mean is the predicted x_0


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_min_snr_weights_against_their_formulas(prediction, batch):
    x, t, noise = batch
    plain, weighted = (
        small(prediction=prediction, loss_weighting=name, min_snr_gamma=5.0).eval() for name in ("none", "min_snr")
    )
    alpha_bar = np.cumprod(1 - BETAS)[t.numpy()]
    snr = alpha_bar / (1 - alpha_bar)
    assert snr[0] > 5 > snr[-1]
    expected = {"eps": np.minimum(snr, 5) / snr, "x0": np.minimum(snr, 5), "v": np.minimum(snr, 5) / (snr + 1)}[
        prediction
    ]
    ratio = weighted.get_losses(x, t, None, noise=noise, reduction="none") / plain.get_losses(
        x, t, None, noise=noise, reduction="none"
    )
    np.testing.assert_allclose(ratio.detach().numpy(), expected, rtol=1e-5)


def test_min_snr_weighs_the_same_error_of_x_0_alike():
    """The three weightings are one objective: an error of 0.1 in x_0 costs the same, in whatever
    way it is predicted.
    """
    x = torch.zeros(T, 3, 4, 6)
    t, noise = torch.arange(T), torch.randn(x.shape)
    costs = []
    for prediction in PREDICTIONS:
        diffusion = small(Oracle(x.double() + 0.1, BETAS, prediction), prediction=prediction, loss_weighting="min_snr")
        costs.append(diffusion.get_losses(x, t, None, noise=noise, reduction="none"))
    torch.testing.assert_close(costs[0], costs[1], rtol=1e-2, atol=1e-5)
    torch.testing.assert_close(costs[2], costs[1], rtol=1e-2, atol=1e-5)


def test_the_loss_is_float32_under_autocast(batch):
    """The output is rounded to bf16, as autocast has it.

    The noise it is compared with and the mean are not.
    """
    x, t, noise = batch

    class Low(Scale):
        def forward(self, x, t, y=None):
            return super().forward(x, t, y).bfloat16()

    diffusion = small(Low()).eval()
    with torch.autocast("cpu", torch.bfloat16):
        losses = diffusion.get_losses(x, t, None, noise=noise, reduction="none")
    assert losses.dtype == torch.float32
    output = (0.5 * diffusion.perturb_x(x, t, noise)).bfloat16().float()
    torch.testing.assert_close(losses, (output - noise).square().mean((1, 2, 3)), rtol=1e-6, atol=0)


def test_forward_draws_all_timesteps_and_fresh_noise():
    diffusion = small().eval()
    torch.manual_seed(0)
    for _ in range(40):
        diffusion(torch.zeros(50, 3, 4, 6))
    drawn = {t for _, ts, _ in diffusion.model.calls for t in ts}
    assert drawn == set(range(T))
    x, t = torch.zeros(2, 3, 4, 6), torch.tensor([5, 5])
    assert diffusion(x, t=t) != diffusion(x, t=t)


def test_use_ema_takes_the_average_for_the_loss(batch):
    x, t, noise = batch
    diffusion = small().eval()
    diffusion.model.weight.data.fill_(0.0)
    torch.testing.assert_close(diffusion(x, t=t, noise=noise), noise.square().mean())
    assert diffusion(x, t=t, noise=noise, use_ema=True) != diffusion(x, t=t, noise=noise)


@pytest.mark.parametrize(
    "setting, message",
    [
        ({"loss_type": "l3"}, "loss_type 'l3'; known: l1, l2, huber"),
        ({"prediction": "x"}, "prediction 'x'; known: eps, x0, v"),
        ({"loss_weighting": "snr"}, "loss_weighting 'snr'; known: none, min_snr"),
        ({"timestep_sampling": "snr"}, "timestep_sampling 'snr'; known: uniform, middle, logit_normal"),
    ],
)
def test_unknown_names_list_the_known_ones(setting, message):
    with pytest.raises(ValueError, match=message):
        small(**setting)


# Timesteps to train at

DENSITIES = {  # of lambda, up to a factor
    "middle": lambda lambdas: 1 / ((1 + np.exp(2 * lambdas - 2)) * (1 + np.exp(-2 * lambdas))),
    "logit_normal": lambda lambdas: np.exp(-(lambdas**2) / 2),
}


@pytest.mark.parametrize("schedule", ["linear", "cosine", "sigmoid"])
@pytest.mark.parametrize("name", DENSITIES)
def test_lambdas_have_their_density_whatever_the_schedule(name, schedule):
    """Counts of 200,000 timesteps in twenty equally likely ranges, against the integrated density:
    chi-square, above 50 by chance once in 10,000 times.
    """
    diffusion = small(betas=make_betas(schedule), timestep_sampling=name)
    t = diffusion.sample_timesteps(200_000, torch.Generator().manual_seed(0))
    alpha_bars = np.array(diffusion.alpha_bars)
    lambdas = np.log(alpha_bars / (1 - alpha_bars)) / 2
    grid = np.linspace(-20, 20, 400_001)
    above = np.cumsum(DENSITIES[name](grid)[::-1])[::-1]  # the density above each lambda
    between = np.interp((lambdas[1:] + lambdas[:-1]) / 2, grid, above / above[0])
    last = np.searchsorted(between, np.arange(1, 20) / 20)  # of each range but the last one
    expected = np.diff([0, *between[last], 1]) * len(t)
    counts, _ = np.histogram(t.numpy(), [0, *(last + 1), 1000])
    assert expected.min() > 2000 and ((counts - expected) ** 2 / expected).sum() < 50


def test_middle_leaves_out_what_uniform_wastes_on_the_cosine_schedule():
    """Fractions of timesteps whose sigma is above 5, and below 0.1."""
    found = {}
    for name in ("uniform", "middle"):
        diffusion = small(betas=make_betas("cosine"), timestep_sampling=name)
        alpha_bars = torch.tensor(diffusion.alpha_bars)[diffusion.sample_timesteps(200_000)]
        sigma = (1 / alpha_bars - 1).sqrt()
        found[name] = [(sigma > 5).double().mean().item(), (sigma < 0.1).double().mean().item()]
    assert found["uniform"] == pytest.approx([0.127, 0.056], abs=0.004)
    assert found["middle"] == pytest.approx([0.0169, 0.0307], abs=0.003)


@pytest.mark.parametrize(
    ("name", "schedule", "timesteps"),
    [
        ("middle", "linear", 1000),
        ("middle", "cosine", 1000),
        ("middle", "sigmoid", 1000),
        ("middle", "cosine", 2),
        ("logit_normal", "linear", 1000),
        ("logit_normal", "sigmoid", 1000),
        ("logit_normal", "cosine", 20),
    ],
)
def test_the_first_and_the_last_timestep_can_be_reached(monkeypatch, name, schedule, timesteps):
    """By the least and the largest numbers that torch.rand gives."""
    diffusion = small(betas=make_betas(schedule, timesteps, schedule_high=0.02), timestep_sampling=name)
    monkeypatch.setattr(torch, "rand", lambda count, **_: torch.tensor([0.0, 1 - 2**-24]))
    assert diffusion.sample_timesteps(2).tolist() == [0, timesteps - 1]


def test_uniform_timesteps_are_those_of_randint(batch):
    """The default, with PyTorch's own generator or another; forward takes them, and so it does
    those of a density.
    """
    x, _, noise = batch
    diffusion = small().eval()
    expected = torch.randint(0, T, (5,), generator=torch.Generator().manual_seed(3))
    assert torch.equal(diffusion.sample_timesteps(5, torch.Generator().manual_seed(3)), expected)
    for diffusion in (small().eval(), small(timestep_sampling="logit_normal").eval()):
        torch.manual_seed(3)
        diffusion(x, noise=noise)
        sampled = diffusion.sample_timesteps(5, torch.Generator().manual_seed(3))
        assert diffusion.model.calls[-1][1] == sampled.tolist()
    assert not torch.equal(sampled, expected)
    assert small(betas=[0.5], timestep_sampling="middle").sample_timesteps(3).tolist() == [0, 0, 0]


# The moving average


def averaged(updates, skips=None, **settings):
    """The network's weight takes the values `updates`, one a step.

    Returns the average's after each step, and the diffusion.
    """
    diffusion, seen = small(**settings), []
    for i, value in enumerate(updates):
        diffusion.model.weight.data.fill_(value)
        diffusion.update_ema(skip=None if skips is None else torch.tensor(float(skips[i])))
        seen.append(diffusion.ema_model.weight.item())
    return seen, diffusion


def test_the_average_is_a_copy_before_ema_start_and_lags_after():
    seen, diffusion = averaged([0.1, 0.2, 1.0, 2.0], ema_start=3, ema_decay=0.9)
    assert diffusion.ema_step == 4
    third = 0.9 * 0.2 + 0.1 * 1.0
    torch.testing.assert_close(torch.tensor(seen), torch.tensor([0.1, 0.2, third, 0.9 * third + 0.1 * 2.0]))
    assert seen[0] == torch.tensor(0.1).item() and seen[1] == torch.tensor(0.2).item()


def test_ema_warmup_against_its_formula():
    values = [1.0, 2.0, -1.0, 4.0, 0.5]
    seen, _ = averaged(values, ema_start=2, ema_decay=0.3, ema_warmup=True)
    expected, average = [], None
    for step, value in enumerate(values, start=1):
        n = step - 2
        decay = 0.0 if n < 0 else min(0.3, (1 + n) / (10 + n))
        average = value if average is None else decay * average + (1 - decay) * value
        expected.append(average)
    torch.testing.assert_close(torch.tensor(seen), torch.tensor(expected))


class OnGpu(torch.Tensor):
    """A number of the host that says it is on a GPU."""

    device = property(lambda self: torch.device("cuda", 0))


@pytest.mark.parametrize("weight", [0.0, 0.25, 1.0])
def test_the_update_on_a_gpu_is_that_on_the_cpu(weight):
    """Other operations, as reading the weight would make the host wait for the GPU."""
    torch.manual_seed(0)
    model, average = (nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3)) for _ in range(2))
    model[1].running_mean.fill_(5.0)
    average.requires_grad_(False)
    expected = [a + weight * (b.detach() - a) for a, b in zip(average.parameters(), model.parameters())]
    on_gpu = copy.deepcopy(average)
    for network, number in ((average, torch.tensor(weight)), (on_gpu, torch.tensor(weight).as_subclass(OnGpu))):
        update_(tensors_of(network), tensors_of(model), number)
        torch.testing.assert_close(list(network.parameters()), expected)
        assert network[1].running_mean[0] == (5 if weight else 0)


def test_the_update_lists_the_weights_once(monkeypatch):
    """The module tree is walked by Python, at every step of the loop."""
    diffusion = small(ema_start=100)
    diffusion.update_ema()
    monkeypatch.setattr(nn.Module, "named_parameters", None)
    monkeypatch.setattr(nn.Module, "named_buffers", None)
    diffusion.model.weight.data.fill_(2.5)
    diffusion.update_ema()
    assert diffusion.ema_model.weight.item() == 2.5


@pytest.mark.parametrize(
    "replace",
    [
        lambda diffusion: diffusion.load_state_dict(diffusion.state_dict(), assign=True),
        lambda diffusion: diffusion.double(),
        copy.deepcopy,
    ],
    ids=["assign", "double", "copy"],
)
def test_the_update_reaches_weights_that_are_other_objects_now(replace):
    diffusion = small(ema_start=100)
    diffusion.update_ema()
    replaced = replace(diffusion)
    diffusion = replaced if isinstance(replaced, GaussianDiffusion) else diffusion
    diffusion.ema_step = 0
    diffusion.model.weight.data.fill_(2.5)
    diffusion.update_ema()
    assert diffusion.ema_model.weight.item() == 2.5


def test_ema_update_rate_counts_every_step_and_acts_on_some():
    seen, diffusion = averaged([1.0, 2.0, 3.0, 4.0], ema_update_rate=2, ema_start=100)
    assert seen == [0.5, 2.0, 2.0, 4.0] and diffusion.ema_step == 4


def test_a_skipped_step_leaves_average_and_counter_alone():
    seen, diffusion = averaged([1.0, math.nan, 3.0], skips=[0, 1, 0], ema_start=2, ema_decay=0.5)
    assert seen == [1.0, 1.0, 2.0] and diffusion.ema_step == 2


def test_ema_step_can_be_set_and_is_not_stored():
    """A resumed run whose counter starts at 0 overwrites its average.

    A file with the counter is not the reference's.
    """
    diffusion = small(ema_start=10, ema_decay=0.9)
    diffusion.ema_step = 10
    diffusion.model.weight.data.fill_(1.5)
    diffusion.update_ema()
    assert diffusion.ema_step == 11
    torch.testing.assert_close(diffusion.ema_model.weight.item(), 0.9 * 0.5 + 0.1 * 1.5)
    stored = [key for key in diffusion.state_dict() if not key.startswith(("model.", "ema_model."))]
    assert stored == [
        "betas",
        "alphas",
        "alphas_cumprod",
        "sqrt_alphas_cumprod",
        "sqrt_one_minus_alphas_cumprod",
        "reciprocal_sqrt_alphas",
        "remove_noise_coeff",
        "sigma",
    ]


def test_batch_norms_buffers_are_copied_and_a_poisoned_one_is_not():
    network = UNet(3, base_channels=8, channel_mults=(1,), num_res_blocks=1, time_emb_dim=8, norm="bn")
    diffusion = small(network, ema_start=0, ema_decay=0.9).train()
    diffusion(torch.randn(4, 3, 4, 6))
    diffusion.update_ema()
    mean = diffusion.model.out_norm.running_mean
    assert mean.abs().max() > 0 and diffusion.ema_model.out_norm.num_batches_tracked == 1
    torch.testing.assert_close(diffusion.ema_model.out_norm.running_mean, mean)
    good = mean.clone()
    mean.fill_(math.nan)
    diffusion.update_ema(skip=torch.tensor(1.0))
    torch.testing.assert_close(diffusion.ema_model.out_norm.running_mean, good)


def test_the_average_is_never_trained():
    diffusion = small().train()
    assert diffusion.model.training and not any(module.training for module in diffusion.ema_model.modules())
    assert not any(p.requires_grad for p in diffusion.ema_model.parameters())
    diffusion(torch.zeros(2, 3, 4, 6)).backward()
    assert diffusion.ema_model.weight.grad is None and diffusion.model.weight.grad is not None


# Labels


def test_without_labels_the_null_class_is_drawn():
    diffusion = guided()
    diffusion.sample(2, "cpu", steps=3)
    assert [y for _, _, y in diffusion.ema_model.calls] == [[3, 3]] * 3


def test_labels_and_guidance_that_cannot_work_are_refused():
    plain, conditional = small(), GaussianDiffusion(Scale(4), (4, 6), 3, num_classes=4, betas=BETAS)
    y = torch.tensor([0, 1])
    for diffusion in (plain, conditional):
        with pytest.raises(ValueError, match="null class"):
            diffusion.sample(2, "cpu", y, steps=2, guidance_scale=2.0)
    with pytest.raises(ValueError, match="pass y"):
        conditional.sample(2, "cpu", steps=2)
    with pytest.raises(ValueError, match="pass y"):
        guided().sample(2, "cpu", steps=2, guidance_scale=2.0)
    with pytest.raises(ValueError, match="y has 2 entries for a batch of 3"):
        conditional.sample(3, "cpu", y, steps=2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_nothing_waits_for_the_gpu():
    diffusion = guided().cuda()
    skip, y = torch.tensor(0.0, device="cuda"), torch.tensor([0, 1], device="cuda")
    steps = diffusion.sample_steps(2, "cuda", y, sampler="ddim", eta=1.0, steps=20, seeds=[1, 2], guidance_scale=2.0)
    next(steps)
    for network in (diffusion.model, diffusion.ema_model):
        network.forward = lambda x, t, y=None: 0.5 * x
    torch.cuda.set_sync_debug_mode("error")
    try:
        diffusion.update_ema(skip=skip)
        for _ in steps:
            pass
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_images_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"\(6, 4\) \(height, width\), this model was built for \(4, 6\)"):
        small()(torch.zeros(1, 3, 6, 4))


def test_tables_are_derived_where_float64_is(monkeypatch):
    """Apple's GPUs have none: the betas come to the CPU first, also those of a state dict there."""
    diffusion = GaussianDiffusion(UNet(3, 32, (1,), 1, attention_resolutions=()), (8, 8), 3)
    wanted = diffusion.alpha_bars
    weights = {name: value.as_subclass(OnMps) for name, value in diffusion.state_dict().items()}
    assert build.read_settings(weights)[0]["schedule"] == "linear"  # also through check_sizes
    diffusion._buffers["betas"] = diffusion.betas.as_subclass(OnMps)
    monkeypatch.setattr(OnMps, "device", torch.device("cpu"))  # where a table of this test can go
    diffusion.derive_tables()
    assert diffusion.alpha_bars == wanted
