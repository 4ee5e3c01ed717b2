import math

import pytest
import torch
import torch.nn.functional as F
from conftest import OnMps, randomize

from nets import AttentionBlock, Downsample, PositionalEmbedding, ResidualBlock, UNet, Upsample, get_norm
from nets.unet import attend


def small_unet(**settings):
    return UNet(
        3, **{"base_channels": 32, "channel_mults": (1, 2), "num_res_blocks": 1, "time_emb_dim": 64, **settings}
    )


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 3, 8, 12, generator=generator), torch.tensor([3, 700])


def test_a_fresh_network_answers_zero_and_its_blocks_are_their_shortcuts(batch):
    x, t = batch
    torch.testing.assert_close(small_unet()(x, t), torch.zeros_like(x))
    h = torch.randn(2, 32, 4, 4)
    block = ResidualBlock(32, 32, dropout=0.0, time_emb_dim=8, use_attention=True)
    torch.testing.assert_close(block(h, torch.randn(2, 8)), h)


def test_the_output_has_the_images_shape_for_non_square_images(batch):
    x, t = batch
    output = randomize(small_unet())(x, t)
    assert output.shape == x.shape and output.std() > 0.01


def test_down_and_up_change_the_size_by_two():
    x = torch.randn(1, 4, 6, 8)
    assert Downsample(4)(x).shape == Downsample(4, padding=0)(x).shape == (1, 4, 3, 4)
    assert Upsample(4)(x).shape == (1, 4, 12, 16)


@pytest.mark.parametrize("head_dim, heads", [(None, 1), (8, 4)])
@pytest.mark.parametrize("h, w", [(4, 6), (1, 1)])
def test_attention_is_softmax_of_scaled_products_over_all_pixels(h, w, head_dim, heads):
    block = randomize(AttentionBlock(32, head_dim=head_dim)).double()
    x = torch.randn(2, 32, h, w, dtype=torch.float64)
    q, k, v = block.to_qkv(block.norm(x)).reshape(2, 3, heads, 32 // heads, h * w).unbind(1)
    weights = torch.softmax(torch.einsum("bnci,bncj->bnij", q, k) / math.sqrt(32 // heads), dim=-1)
    out = torch.einsum("bnij,bncj->bnci", weights, v).reshape(2, 32, h, w)
    torch.testing.assert_close(block(x), x + block.to_out(out))


def test_attention_is_contiguous_on_apples_gpus(monkeypatch):
    """PyTorch 2.8 has wrong results for other strides there. Elsewhere a copy costs time alone."""
    qkv, seen = torch.randn(2, 12, 4, 4), []
    attention = torch.nn.functional.scaled_dot_product_attention

    def spy(*parts):
        seen.append([part.is_contiguous() for part in parts])
        return attention(*parts)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    torch.testing.assert_close(attend(qkv.as_subclass(OnMps)).cpu(), attend(qkv))
    assert seen == [[True] * 3, [False] * 3]


def test_heads_that_do_not_fit_the_channels_are_refused():
    with pytest.raises(ValueError, match="32 channels are not a multiple of heads of 12"):
        AttentionBlock(32, head_dim=12)


@pytest.mark.parametrize("freq_shift", [0, 1])
def test_positional_embedding_against_its_formula(freq_shift):
    t = torch.tensor([0, 1, 999])
    frequencies = 10000.0 ** (-torch.arange(4, dtype=torch.float64) / (4 - freq_shift))
    angles = t[:, None] * 0.5 * frequencies
    expected = torch.cat((angles.sin(), angles.cos()), dim=1).float()
    torch.testing.assert_close(PositionalEmbedding(8, 0.5, freq_shift=freq_shift)(t), expected, rtol=0, atol=1e-4)
    for dim in (7, 2 * freq_shift):
        with pytest.raises(ValueError, match="even"):
            PositionalEmbedding(dim, freq_shift=freq_shift)


def test_the_time_embedding_stays_float32_under_autocast():
    """bf16 has 8 bits: 998 and 999 would be one number."""
    embedding = PositionalEmbedding(32)
    with torch.autocast("cpu", torch.bfloat16):
        low = embedding(torch.tensor([998, 999]))
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, embedding(torch.tensor([998, 999])))


def test_time_and_class_reach_the_output(batch):
    x, t = batch
    network = randomize(small_unet(num_classes=5)).eval()
    y = torch.tensor([0, 4])
    output = network(x, t, y)
    for other in (network(x, t + 100, y), network(x, t, torch.tensor([1, 3]))):
        assert (other - output).flatten(1).abs().amax(1).min() > 1e-3


def test_a_network_without_time_needs_none(batch):
    assert small_unet(time_emb_dim=None)(batch[0]).shape == batch[0].shape


def test_initial_pad_only_adds_a_border_that_is_cut_off(batch):
    x, t = batch
    plain, padded = randomize(small_unet()).eval(), randomize(small_unet(initial_pad=2)).eval()
    torch.testing.assert_close(padded(x, t), plain(F.pad(x, (2, 2, 2, 2)), t)[:, :, 2:-2, 2:-2])


def test_attention_sits_at_the_levels_asked_for():
    keys = small_unet(attention_resolutions=(0,)).state_dict()
    assert "downs.0.attention.to_qkv.weight" in keys and "downs.2.attention.to_qkv.weight" not in keys
    assert "mid.0.attention.to_qkv.weight" in keys and "mid.1.attention.to_qkv.weight" not in keys
    assert "ups.3.attention.to_qkv.weight" in keys and "ups.0.attention.to_qkv.weight" not in keys


def test_channels_last_gives_the_same_numbers(batch):
    x, t = batch
    network = randomize(small_unet()).eval()
    expected = network(x, t)
    network.to(memory_format=torch.channels_last)
    torch.testing.assert_close(network(x.to(memory_format=torch.channels_last), t), expected, rtol=1e-4, atol=1e-4)


def test_checkpointed_activations_give_the_same_gradients(batch):
    """With dropout on: the second pass has to draw the first one's mask."""
    x, t = batch
    gradients = []
    for checkpointing in (False, True):
        network = randomize(small_unet(activation_checkpointing=checkpointing, dropout=0.5)).train()
        torch.manual_seed(0)
        network(x, t).square().mean().backward()
        gradients.append([p.grad for p in network.parameters()])
    torch.testing.assert_close(gradients[1], gradients[0])


def test_dropout_acts_in_training_only(batch):
    x, t = batch
    network = randomize(small_unet(dropout=0.5))
    assert not torch.equal(network(x, t), network(x, t))
    network.eval()
    assert torch.equal(network(x, t), network(x, t))


@pytest.mark.parametrize(
    "name, kind",
    [
        ("gn", torch.nn.GroupNorm),
        ("bn", torch.nn.BatchNorm2d),
        ("in", torch.nn.InstanceNorm2d),
        (None, torch.nn.Identity),
    ],
)
def test_get_norm(name, kind):
    assert isinstance(get_norm(name, 64, 32), kind)


def test_get_norm_names_what_is_wrong():
    with pytest.raises(ValueError, match="unknown normalization 'ln'; known: gn, in, bn, None"):
        get_norm("ln", 64, 32)
    with pytest.raises(ValueError, match="48 channels are not a multiple of 32"):
        get_norm("gn", 48, 32)


def test_a_network_with_classes_asks_for_them():
    network = UNet(3, 32, (1,), num_res_blocks=1, num_classes=4)
    with pytest.raises(ValueError, match="pass y"):
        network(torch.zeros(1, 3, 8, 8), torch.zeros(1))
