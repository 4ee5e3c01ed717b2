"""Building from settings and from bare weights, and putting weights in."""

import pytest
import torch

from nets import GaussianDiffusion, UNet, from_config, from_weights, generate_cosine_schedule, load_weights
from nets.architecture import check_input_shape, choose_groups
from nets.build import config_from_weights

SMALL = {"channel": 32, "channel_mults": (1, 2), "num_res_blocks": 1, "input_shape": (8, 12), "num_timesteps": 50}


def shapes(diffusion):
    return {key: tuple(value.shape) for key, value in diffusion.state_dict().items()}


def wrapped(network, size=(8, 8), **settings):
    channels, rows = network.init_conv.in_channels, network.num_classes
    return GaussianDiffusion(network, size, channels, rows, **settings)


def assert_same(left, right):
    torch.testing.assert_close(dict(left.state_dict()), dict(right.state_dict()), rtol=0, atol=0)


# From settings


def test_no_settings_are_the_references_defaults():
    diffusion = from_config({})
    reference = GaussianDiffusion(UNet(3), (32, 32), 3)
    assert shapes(diffusion) == shapes(reference)
    for name in (
        "img_size",
        "img_channels",
        "num_classes",
        "loss_type",
        "prediction",
        "loss_weighting",
        "timestep_sampling",
        "ema_decay",
        "ema_start",
        "ema_update_rate",
        "ema_warmup",
        "null_class",
    ):
        assert getattr(diffusion, name) == getattr(reference, name), name
    torch.testing.assert_close(diffusion.betas, torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64).float())
    assert diffusion.model.downs[0].conv_2[0].p == 0.1


def test_each_setting_arrives():
    settings = {
        "dropout": 0.3,
        "attention_resolutions": (0,),
        "num_groups": 4,
        "img_channels": 1,
        "schedule": "cosine",
        "prediction": "v",
        "loss_type": "huber",
        "loss_weighting": "min_snr",
        "min_snr_gamma": 3.0,
        "timestep_sampling": "middle",
        "ema_decay": 0.99,
        "ema_start": 7,
        "ema_warmup": True,
        "activation_checkpointing": True,
    }
    diffusion = from_config(SMALL | settings)
    for name in ("prediction", "loss_type", "loss_weighting", "min_snr_gamma", "timestep_sampling"):
        assert getattr(diffusion, name) == settings[name], name
    for name in ("ema_decay", "ema_start", "ema_warmup"):
        assert getattr(diffusion, name) == settings[name], name
    assert diffusion.img_size == (8, 12) and diffusion.model.init_conv.weight.shape == (32, 1, 3, 3)
    assert {module.num_groups for module in diffusion.model.modules() if isinstance(module, torch.nn.GroupNorm)} == {4}
    assert diffusion.model.downs[0].conv_2[0].p == 0.3 and diffusion.model.activation_checkpointing
    assert "model.downs.0.attention.to_qkv.weight" in diffusion.state_dict()
    torch.testing.assert_close(diffusion.betas, torch.from_numpy(generate_cosine_schedule(50)).float())


@pytest.mark.parametrize(
    "channel, groups", [(128, 32), (256, 32), (64, 16), (32, 8), (40, 10), (150, 30), (7, 1), (3, 1)]
)
def test_auto_groups_divide_the_width_and_keep_four_channels(channel, groups):
    assert choose_groups("auto", channel) == groups
    assert choose_groups(5, channel) == 5


def test_a_narrow_network_sees_time_and_class_at_its_first_level():
    """With one channel a group the normalisation takes every shift away."""
    x = torch.randn(2, 32, 8, 12, generator=torch.Generator().manual_seed(0))
    for groups, seen in ((32, False), ("auto", True)):
        network = from_config(SMALL | {"num_groups": groups, "class_conditional": True}, num_classes=2).model.eval()
        block = network.downs[0]
        torch.nn.init.normal_(block.conv_2[1].weight)
        there, elsewhere = (
            block(x, network.time_mlp(torch.tensor([t, t])), torch.tensor([y, y])) for t, y in ((3, 0), (40, 1))
        )
        assert ((there - elsewhere).abs().max() > 1e-3) == seen


@pytest.mark.parametrize(
    "settings, rows, null",
    [
        ({"class_conditional": False, "label_dropout": 0.1}, None, None),
        ({"class_conditional": True}, 7, None),
        ({"class_conditional": True, "label_dropout": 0.1}, 8, 7),
    ],
)
def test_label_dropout_adds_a_row_for_the_null_class(settings, rows, null):
    diffusion = from_config(SMALL | settings, num_classes=7)
    assert (diffusion.num_classes, diffusion.null_class, diffusion.model.num_classes) == (rows, null, rows)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"class_conditional": True}, "no classes"),
        ({"schedule": "cubic"}, "known: linear"),
        ({"attention_resolutions": (1, 2)}, r"levels from 0 to 1 .* not \[2\]"),
        ({"channel": 40}, "multiple of 32"),
        ({"input_shape": (8, 9)}, r"\(8, 9\) .* multiples of 2"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        from_config(SMALL | settings)


def test_input_shapes_that_fit_and_those_that_do_not():
    check_input_shape((8, 16), 4)
    check_input_shape((7, 3), 1)
    for shape in ((30, 32), (3, 8)):
        with pytest.raises(ValueError, match="multiples of 8"):
            check_input_shape(shape, 4)


# From weights

ARCHITECTURES = [
    {},
    {"channel_mults": (1, 2, 1), "num_res_blocks": 2, "attention_resolutions": (0, 2)},
    {"num_classes": 4, "time_emb_dim": 48},
    {"time_emb_dim": None},
    {"norm": "bn"},
    {"norm": None},
    {"img_channels": 1, "base_channels": 64, "attention_resolutions": ()},
]


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=str)
def test_a_bare_state_dict_brings_its_network_and_schedule_back(architecture):
    network = UNet(
        **{"img_channels": 3, "base_channels": 32, "channel_mults": (1, 2), "num_res_blocks": 1, **architecture}
    )
    torch.nn.init.normal_(network.out_conv.weight)
    source = wrapped(network, betas=generate_cosine_schedule(30)).eval()
    source.ema_model.out_conv.bias.fill_(0.5)
    built = from_weights(source.state_dict(), (8, 8)).eval()
    assert_same(built, source)
    assert built.num_timesteps == 30 and built.alpha_bars == source.alpha_bars
    assert built.num_classes == source.num_classes
    x, t, y = torch.randn(2, built.img_channels, 8, 8), torch.tensor([3, 20]), torch.tensor([0, 1])
    torch.testing.assert_close(built.ema_model(x, t, y), source.ema_model(x, t, y), rtol=0, atol=0)


def test_a_bare_state_dicts_average_is_not_overwritten_by_the_first_update():
    source = from_config(SMALL)
    source.ema_model.out_conv.bias.fill_(0.5)
    built = from_weights(source.state_dict(), (8, 12))
    assert built.ema_step == built.ema_start == 2000
    built.update_ema()
    torch.testing.assert_close(built.ema_model.out_conv.bias, torch.full((3,), 0.5 * 0.9999), rtol=1e-6, atol=0)


def test_averages_alone_in_half_precision_are_enough():
    source = from_config(SMALL)
    half = {
        key: value.half() if key.startswith("ema_model.") else value
        for key, value in source.state_dict().items()
        if not key.startswith("model.")
    }
    for built in (from_weights(half, (8, 12)), from_config(SMALL)):
        load_weights(built, half, kind="ema")
        for name, value in source.ema_model.state_dict().items():
            for network in (built.model, built.ema_model):
                torch.testing.assert_close(network.state_dict()[name], value.half().float(), rtol=0, atol=0)
        assert built.betas.dtype == torch.float32


def test_input_shape_is_the_users_and_checked():
    weights = from_config(SMALL).state_dict()
    assert from_weights(weights).img_size == (32, 32)
    with pytest.raises(ValueError, match="multiples of 2"):
        from_weights(weights, (9, 8))


@pytest.mark.parametrize(
    "foreign, message",
    [
        ({"conv1.weight": torch.zeros(3)}, "not a state dict of a GaussianDiffusion"),
        ({"ema_model.init_conv.weight": torch.zeros(0, 3, 3, 3)}, "not a state dict of a GaussianDiffusion"),
        ({}, "not a state dict of a GaussianDiffusion"),
    ],
)
def test_something_else_is_refused(foreign, message):
    with pytest.raises(ValueError, match=message):
        from_weights(foreign)


def test_a_truncated_state_dict_names_what_is_missing():
    weights = from_config(SMALL).state_dict()
    del weights["model.downs.0.conv_2.1.bias"]
    with pytest.raises(ValueError, match="1 missing: model.downs.0.conv_2.1.bias"):
        from_weights(weights, (8, 12))


def test_settings_read_off_weights_build_the_same_network():
    source = from_config(SMALL | {"class_conditional": True, "attention_resolutions": (0, 1)}, num_classes=3)
    config = config_from_weights(source.state_dict())
    assert shapes(from_config(config, num_classes=3)) == shapes(source)
    other = from_config(SMALL | {"schedule": "cosine"})
    torch.testing.assert_close(from_config(config_from_weights(other.state_dict())).betas, other.betas)
    assert config_from_weights(wrapped(UNet(3, 32, (1,), 1, time_emb_dim=48)).state_dict())["time_emb_dim"] == 48


@pytest.mark.parametrize("architecture", [{"time_emb_dim": None}, {"norm": "bn"}, {"norm": None}], ids=str)
def test_weights_that_cannot_be_trained_are_refused(architecture):
    with pytest.raises(ValueError, match="trains only networks with group norm and a time embedding"):
        config_from_weights(wrapped(UNet(3, 32, (1,), 1, **architecture)).state_dict())


# Putting weights in


@pytest.mark.parametrize(
    "prefix, inner",
    [
        ("module.", ""),
        ("_orig_mod.", ""),
        ("module._orig_mod.", ""),
        ("", "_orig_mod."),
        ("module.", "module._orig_mod."),
    ],
)
def test_prefixes_of_wrappers_are_understood(prefix, inner):
    source, target = from_config(SMALL), from_config(SMALL)
    weights = {prefix + key.replace("model.", "model." + inner, 1): value for key, value in source.state_dict().items()}
    load_weights(target, weights)
    assert_same(target, source)
    assert_same(from_weights(weights, (8, 12)), source)


def test_every_kind_of_mismatch_is_named_and_nothing_is_loaded():
    target = from_config(SMALL)
    before = {key: value.clone() for key, value in target.state_dict().items()}
    weights = {key: value + 1 for key, value in before.items()}
    del weights["sigma"]
    weights |= {f"extra.{i}": torch.zeros(1) for i in range(5)}
    weights["model.init_conv.bias"] = torch.zeros(7)
    with pytest.raises(ValueError) as error:
        load_weights(target, weights)
    message = str(error.value)
    assert "5 unknown: extra.0, extra.1, extra.2;" in message
    assert "1 missing: sigma" in message
    assert "1 of another shape: model.init_conv.bias (7,) instead of (32,)" in message
    torch.testing.assert_close(dict(target.state_dict()), before, rtol=0, atol=0)


def test_no_condition_is_the_same_from_settings_and_from_python():
    """Else a model built by hand could not guide one that was built from settings."""
    by_hand = GaussianDiffusion(UNet(3, 8, (1,), 1, num_groups=2, attention_resolutions=()), (8, 8), 3)
    assert from_config({"input_shape": (8, 8), "channel": 32}).condition == by_hand.condition
