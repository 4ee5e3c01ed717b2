"""Guidance, through the denoiser that the solvers call."""

import math

import pytest
import torch
from test_diffusion import BETAS, Scale, guided, small

from nets import GaussianDiffusion
from nets.errors import SettingError
from nets.sampling import SamplingOptions, apply_guidance, check_guiding_model, check_interval, sampling_schedule


@pytest.fixture
def x_t():
    return torch.rand(5, 3, 4, 6, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_the_scale_goes_from_the_weaker_model_over_the_own_one_and_beyond():
    own, weaker = torch.tensor([1.0, -2.0]), torch.tensor([0.5, 1.0])
    for scale, led in ((0, weaker), (1, own), (3, torch.tensor([2.0, -8.0]))):
        torch.testing.assert_close(apply_guidance(own, weaker, scale), led)


def test_guidance_one_is_the_plain_conditional_network(x_t):
    diffusion, y = guided(), torch.tensor([0, 1, 2, 0, 1])
    x_0 = diffusion.denoiser(y, guidance_scale=1.0, clip=False)(x_t, 7)
    assert diffusion.ema_model.calls == [(5, [7] * 5, y.tolist())]
    with torch.no_grad():
        plain = diffusion.ema_model(x_t, torch.full((5,), 7), y)
    a, s = diffusion.alpha_bars[7] ** 0.5, (1 - diffusion.alpha_bars[7]) ** 0.5
    torch.testing.assert_close(x_0, (x_t - s * plain) / a)


def test_guidance_against_its_formula_in_one_call_of_the_network(x_t):
    diffusion, y = guided(prediction="x0"), torch.tensor([0, 1, 2, 0, 1])
    x_0 = diffusion.denoiser(y, guidance_scale=2.5, clip=False)(x_t, 7)
    assert diffusion.ema_model.calls == [(10, [7] * 10, y.tolist() + [3] * 5)]
    conditional, null = 0.5 * x_t + y[:, None, None, None], 0.5 * x_t + 3
    torch.testing.assert_close(x_0, null + 2.5 * (conditional - null))


def test_guidance_acts_within_its_interval(x_t):
    """Outside it the network is called once for each image. All calls have one shape."""
    y = torch.tensor([0, 1, 2, 0, 1])
    diffusion = guided(prediction="x0")
    lambdas = [0.5 * math.log(alpha_bar / (1 - alpha_bar)) for alpha_bar in diffusion.alpha_bars]
    interval = (lambdas[8], lambdas[6])  # it falls with t
    denoise = diffusion.denoiser(y, guidance_scale=2.5, clip=False, guidance_interval=interval)
    for t in range(4, 11):
        diffusion.ema_model.calls.clear()
        x_0, within = denoise(x_t, t), 6 <= t <= 8
        assert [size for size, *_ in diffusion.ema_model.calls] == ([5, 5] if within else [5])
        torch.testing.assert_close(x_0, diffusion.denoiser(y, guidance_scale=2.5 if within else 1, clip=False)(x_t, t))
    images = [
        diffusion.sample(5, "cpu", y, steps=4, seeds=range(5), guidance_scale=2.5, guidance_interval=chosen)
        for chosen in (None, (-99.0, 99.0), (0.0, 99.0))
    ]
    assert torch.equal(images[0], images[1]) and not torch.equal(images[0], images[2])


def test_a_guiding_model_against_its_formula(x_t):
    """With or without classes, and of another prediction: both are x_0."""
    y = torch.tensor([0, 1, 2, 0, 1])
    for diffusion, guide, labels in (
        (guided(prediction="x0"), guided(prediction="eps"), y),
        (small(prediction="x0"), small(prediction="eps"), None),
    ):
        guide.ema_model.weight.fill_(0.25)
        strong, weak = (model.denoiser(labels, clip=False)(x_t, 7) for model in (diffusion, guide))
        x_0 = diffusion.denoiser(labels, guidance_scale=1.5, clip=False, guiding_model=guide)(x_t, 7)
        torch.testing.assert_close(x_0, weak + 1.5 * (strong - weak))
        assert (strong - weak).abs().max() > 0.1
        itself = diffusion.denoiser(labels, guidance_scale=1.5, guiding_model=diffusion)(x_t, 7)
        torch.testing.assert_close(itself, diffusion.denoiser(labels)(x_t, 7))


def test_a_guiding_model_is_not_clipped_before_the_comparison(x_t):
    """Its x_0 leaves [-1, 1] here; only what is led away from it is clipped."""
    diffusion, guide = small(prediction="x0"), small(prediction="x0")
    diffusion.ema_model.weight.data.fill_(2.0)
    guide.ema_model.weight.data.fill_(3.0)
    led = (3 + 1.5 * (2 - 3)) * x_t
    assert (3 * x_t).abs().max() > 2
    for clip in (False, True):
        x_0 = diffusion.denoiser(None, guidance_scale=1.5, clip=clip, guiding_model=guide)(x_t, 7)
        torch.testing.assert_close(x_0, led.clamp(-1, 1) if clip else led)


@pytest.mark.parametrize(
    ("words", "other"),
    [
        ("size", {"img_size": (4, 4)}),
        ("number of channels", {"img_channels": 1}),
        ("number of classes", {"num_classes": None, "null_class": None}),
        ("null class", {"null_class": None}),
        ("schedule", {"betas": BETAS[:-1]}),
    ],
)
def test_a_guiding_model_of_another_kind_is_refused(words, other):
    settings = {"img_size": (4, 6), "img_channels": 3, "num_classes": 4, "betas": BETAS, "null_class": 3}
    diffusion, guide = (GaussianDiffusion(Scale(4), **{**settings, **changes}) for changes in ({}, other))
    options = {"steps": 2, "guidance_scale": 2.0, "guiding_model": guide}
    with pytest.raises(ValueError, match=f"the guiding model has another {words}"):
        diffusion.sample(2, "cpu", torch.tensor([0, 1]), **options)


def test_a_guidance_interval_has_a_step():
    y = torch.tensor([0, 1])
    for interval, words in (((1.0, -1.0), "from the lower lambda to the higher"), ((50.0, 60.0), "no step is in the")):
        with pytest.raises(ValueError, match=words):
            guided().sample(2, "cpu", y, sampler="ddim", steps=4, guidance_scale=2.0, guidance_interval=interval)
    with pytest.raises(ValueError, match="from the lower lambda to the higher"):
        guided().denoiser(y, guidance_scale=2.0, guidance_interval=(1.0, -1.0))


def test_the_guiding_model_uses_its_ema_where_the_model_does(x_t):
    diffusion, guide = small(prediction="x0").eval(), small(prediction="x0").eval()
    values = {diffusion.model: 0.5, diffusion.ema_model: 0.4, guide.model: 0.3, guide.ema_model: 0.1}
    for network, value in values.items():
        network.weight.data.fill_(value)
    for use_ema, own, away in ((True, 0.4, 0.1), (False, 0.5, 0.3)):
        x_0 = diffusion.denoiser(None, use_ema, guidance_scale=2.0, clip=False, guiding_model=guide)(x_t, 7)
        torch.testing.assert_close(x_0, (2 * own - away) * x_t)


def test_what_has_no_guidance_passes_and_a_guiding_model_of_another_kind_never_does():
    plain = small()
    check_guiding_model(plain, 1.0)
    check_interval(None, schedule := sampling_schedule(plain.alpha_bars, SamplingOptions("ddim", 4)))
    check_interval((-99.0, 99.0), schedule)
    with pytest.raises(ValueError, match="another number of classes"):
        check_guiding_model(plain, 1.0, guided())


def test_labels_are_one_for_each_image_or_one_for_all():
    diffusion, x_t = guided(), torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    one = diffusion.denoiser(torch.tensor(1))(x_t, 7)
    assert torch.equal(one, diffusion.denoiser(torch.tensor([1, 1, 1, 1]))(x_t, 7))
    with pytest.raises(SettingError, match="y has 3 entries for a batch of 4"):
        diffusion.denoiser(torch.tensor([0, 1, 0]))(x_t, 7)
