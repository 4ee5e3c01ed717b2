"""What makes things fast or small changes no result: the fast paths against the plain ones.

Nothing here is timed.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import randomize
from torch import nn

from nets import GaussianDiffusion, UNet, unet
from nets import cpu_fused as fused
from nets.cpu_fused import NormActDropoutConv, install, norm_act_conv
from utils.checkpoint.integrity import weights_digest
from utils.device import autocast, memory_format, round_weights


def plain(norm, activation, x, conv, dropout=None):
    x = norm(x) if activation is None else activation(norm(x))
    return conv(x if dropout is None else dropout(x))


def conv_of(channels, dtype=torch.float32):
    torch.manual_seed(4)
    return nn.Conv2d(channels, 5, 3, padding=1).to(dtype)  # older versions draw other numbers in bf16


def looking_glass(channels):
    """A convolution that changes nothing, to see what comes into it."""
    conv = nn.Conv2d(channels, channels, 1)
    nn.init.dirac_(conv.weight)
    nn.init.zeros_(conv.bias)
    return conv


def norm_of(channels, groups=8):
    generator = torch.Generator().manual_seed(1)
    norm = nn.GroupNorm(groups, channels)
    norm.weight.data = torch.randn(channels, generator=generator)
    norm.bias.data = torch.randn(channels, generator=generator)
    return norm


def run(function, norm, x):
    """(result, gradients of input, both weights and both biases) for a loss that weighs every
    feature differently.
    """
    x, conv = x.clone(memory_format=torch.preserve_format).requires_grad_(), conv_of(x.shape[1], x.dtype)
    out = function(norm, F.silu, x, conv)
    weights = torch.linspace(-1, 1, out.numel()).view(out.shape).to(out.dtype)
    return out.detach(), *torch.autograd.grad(
        (out * weights).sum(), (x, norm.weight, norm.bias, conv.weight, conv.bias)
    )


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", [(3, 16, 6, 10), (2, 16, 1, 1), (2, 32, 8, 8)])
def test_fused_norm_and_silu_have_the_plain_results_and_gradients(shape, layout):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(memory_format=layout)
    norm = norm_of(shape[1])
    assert type(norm_act_conv(norm, F.silu, x, conv_of(shape[1])).grad_fn).__name__ == "NormActDropoutConvBackward"
    for ours, expected in zip(run(norm_act_conv, norm, x), run(plain, norm, x)):
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_in_bf16_the_gradients_are_those_of_float32_within_rounding(layout):
    x = torch.randn(4, 16, 8, 8, generator=torch.Generator().manual_seed(0)).to(memory_format=layout)
    norm = norm_of(16)
    for ours, exact in zip(run(norm_act_conv, norm, x.bfloat16()), run(plain, norm, x.bfloat16().float())):
        torch.testing.assert_close(ours.float(), exact, atol=0.02 * exact.abs().max().item(), rtol=0)


def test_fused_dropout_drops_its_share_scales_the_rest_and_passes_no_gradient_where_it_dropped():
    x = (
        torch.randn(8, 16, 32, 32, generator=torch.Generator().manual_seed(0))
        .to(memory_format=torch.channels_last)
        .requires_grad_()
    )
    norm, conv, share = norm_of(16), looking_glass(16), 0.3
    torch.manual_seed(0)
    out = norm_act_conv(norm, F.silu, x, conv, nn.Dropout(share).train())
    whole = plain(norm, F.silu, x, conv).detach()
    dropped = out == 0
    assert abs(dropped.float().mean().item() - share) < 0.005  # of 131072 features: 4 standard deviations
    for mean in (dropped.float().mean((0, 2, 3)), dropped.float().mean((0, 1, 2)), dropped.float().mean((0, 1, 3))):
        assert (mean - share).abs().max() < 0.04  # no channel, row or column is spared
    torch.testing.assert_close(out.detach(), torch.where(dropped, 0, whole / (1 - share)), atol=1e-4, rtol=1e-4)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    ours = torch.autograd.grad(out, (x, norm.weight, norm.bias, conv.weight), grad)
    masked = torch.where(dropped, 0, F.silu(norm(x)) / (1 - share))
    for one, other in zip(ours, torch.autograd.grad(conv(masked), (x, norm.weight, norm.bias, conv.weight), grad)):
        torch.testing.assert_close(one, other, atol=2e-4, rtol=1e-3)


def test_fused_dropout_is_a_function_of_the_seed_and_new_at_each_call():
    x, norm, conv, dropout = torch.randn(2, 8, 8, 8), norm_of(8), looking_glass(8), nn.Dropout(0.5).train()
    draws = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        draws += [norm_act_conv(norm, F.silu, x, conv, dropout), norm_act_conv(norm, F.silu, x, conv, dropout)]
    assert torch.equal(draws[0], draws[2]) and torch.equal(draws[1], draws[3])
    assert not torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[4])


def test_with_other_modules_the_path_is_plain(monkeypatch):
    def refuse(*arguments):
        raise AssertionError("fused")

    monkeypatch.setattr(NormActDropoutConv, "apply", refuse)
    x, norm, conv = torch.randn(2, 8, 4, 4), norm_of(8), conv_of(8)
    assert torch.equal(norm_act_conv(norm, F.relu, x, conv), plain(norm, F.relu, x, conv))
    assert torch.equal(norm_act_conv(nn.Identity(), F.silu, x, conv), conv(F.silu(x)))


@pytest.mark.parametrize("activation", [None, F.silu])
def test_without_gradients_the_result_is_the_plain_paths_and_its_input_stays(activation):
    x, norm, conv = torch.randn(2, 8, 4, 4), norm_of(8), conv_of(8)
    before = x.clone()
    with torch.no_grad():
        torch.testing.assert_close(
            norm_act_conv(norm, activation, x, conv), plain(norm, activation, x, conv), atol=1e-6, rtol=1e-5
        )
        assert torch.equal(x, before)
        dropped = (
            norm_act_conv(norm, activation, torch.randn(8, 8, 8, 8), looking_glass(8), nn.Dropout(0.5).train()) == 0
        )
    assert 0.4 < dropped.float().mean() < 0.6  # training mode without gradients still drops


@pytest.mark.parametrize("head_dim", [None, 8])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_attention_has_the_plain_paths_gradients(layout, head_dim):
    block = randomize(unet.AttentionBlock(32, num_groups=8, norm_eps=0.1, head_dim=head_dim)).to(memory_format=layout)
    fast = install(copy.deepcopy(block))
    x, weights = torch.randn(2, 32, 4, 6).to(memory_format=layout).requires_grad_(), torch.randn(2, 32, 4, 6)

    def gradients(block):
        return torch.autograd.grad((block(x) * weights).sum(), (x, *block.parameters()))

    for ours, expected in zip(gradients(fast), gradients(block), strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-3)


def test_the_whole_network_has_the_plain_paths_result_and_gradients():
    network = randomize(UNet(3, base_channels=32, channel_mults=(1, 2), num_res_blocks=1, dropout=0.0)).train()
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([3, 700])

    def outcome(network, layout):
        copied = copy.deepcopy(network).to(memory_format=layout)
        out = copied(x.to(memory_format=layout), t)
        out.square().sum().backward()
        return [out.detach(), *(parameter.grad for parameter in copied.parameters())]

    fast = outcome(install(copy.deepcopy(network)), torch.channels_last)
    for ours, expected in zip(fast, outcome(network, torch.contiguous_format), strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-4 * max(1, expected.abs().max().item()), rtol=1e-3)


def test_the_fused_path_keeps_less_for_the_backward_pass():
    network = UNet(3, base_channels=32, channel_mults=(1,), num_res_blocks=1, attention_resolutions=()).train()
    x, t = torch.randn(8, 3, 16, 16), torch.zeros(8)

    def kept(network):
        storages = {}

        def count(tensor):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            out = network(x, t)
        return sum(storages.values()), out

    assert kept(install(copy.deepcopy(network)))[0] < 0.55 * kept(network)[0]


def fused_calls(function, monkeypatch):
    """How many operations of the fused path `function` does."""
    calls, original = [], NormActDropoutConv.apply
    with monkeypatch.context() as patch:
        patch.setattr(NormActDropoutConv, "apply", lambda *arguments: (calls.append(1), original(*arguments))[1])
        function()
    return len(calls)


@pytest.mark.parametrize("activation_checkpointing", [False, True])
def test_every_network_of_a_diffusion_has_the_fused_path_and_its_own_keys(monkeypatch, activation_checkpointing):
    settings = {"num_res_blocks": 1, "attention_resolutions": (), "activation_checkpointing": activation_checkpointing}
    network = UNet(3, 32, (1,), **settings)
    keys, kinds = list(network.state_dict()), len(list(network.modules()))
    diffusion = GaussianDiffusion(network, (8, 8), 3).train()
    assert list(diffusion.model.state_dict()) == list(diffusion.ema_model.state_dict()) == keys
    x, t = torch.randn(1, 3, 8, 8), torch.zeros(1)
    passes = 2 if activation_checkpointing else 1  # of the blocks
    copied = copy.deepcopy(diffusion).to(memory_format=torch.channels_last)
    for model in (diffusion.model, copied.model):
        assert len(list(model.modules())) == kinds and isinstance(model, UNet)
        # Two in each of five blocks, one in the attention of the middle, one at the end.
        assert fused_calls(lambda model=model: model(x, t).sum().backward(), monkeypatch) == passes * 11 + 1
    with torch.no_grad():
        assert diffusion.ema_model(x, t).grad_fn is None  # nothing is kept for a backward pass


def test_a_compiler_sees_the_plain_network(monkeypatch):
    network = install(UNet(3, 32, (1,), num_res_blocks=1, attention_resolutions=()).train())
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert fused_calls(lambda: network(torch.randn(1, 3, 8, 8), torch.zeros(1)).sum().backward(), monkeypatch) == 0


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mean", [0, 30])
def test_group_norm_written_out_for_a_compiler_is_pytorchs_in_float64(monkeypatch, layout, dtype, mean):
    """Its statistics are float32: far from zero bf16 has too few digits for them."""
    norm, generator = norm_of(16), torch.Generator().manual_seed(0)
    x = (mean + torch.randn(3, 16, 6, 10, generator=generator)).to(dtype).to(memory_format=layout)
    weights, results = torch.randn(x.shape, generator=generator), []
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    for layer, values in ((install(nn.Sequential(copy.deepcopy(norm))), x), (norm.double(), x.double())):
        values = values.detach().requires_grad_()
        out = layer(values)
        results.append([out, *torch.autograd.grad((out * weights.to(out.dtype)).sum(), (values, *layer.parameters()))])
    assert results[0][0].dtype == dtype and type(norm) is nn.GroupNorm
    for ours, exact in zip(*results, strict=True):
        error = 0.01 if dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(ours.double(), exact, atol=error * exact.abs().max().item(), rtol=0)


def test_upsampling_written_out_for_a_compiler_is_pytorchs(monkeypatch):
    x = torch.randn(2, 5, 3, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    nearest, bilinear = (nn.Upsample(scale_factor=2, mode=mode) for mode in ("nearest", "bilinear"))
    expected = nearest(x), bilinear(x)
    weights = torch.linspace(-1, 1, expected[0].numel()).view(expected[0].shape)
    install(nn.Sequential(nearest, bilinear))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    for layer, out in zip((nearest, bilinear), expected, strict=True):
        assert torch.equal(layer(x), out)
        gradients = [torch.autograd.grad((result * weights).sum(), x)[0] for result in (layer(x), out)]
        torch.testing.assert_close(*gradients)


def test_a_compiled_network_has_no_layer_that_leaves_channels_last():
    """The graph is traced as ever, and run by PyTorch: compiling it to C++ takes a minute."""
    details = {"norm_eps": 0.1, "attention_head_dim": 8, "downsample_padding": 0, "freq_shift": 1}
    settings = {"num_classes": 3, "dropout": 0.0, "attention_resolutions": (1,), "num_groups": 4}
    network = UNet(3, 16, (1, 2), 1, 16, **settings, **details)
    network = GaussianDiffusion(randomize(network), (8, 8), 3).to(memory_format=torch.channels_last).model
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)).to(memory_format=torch.channels_last)
    x, t, y = x.requires_grad_(), torch.tensor([3.0, 700.0]), torch.tensor([0, 2])
    names, results = [], []

    def backend(graph, inputs):
        names.extend(getattr(node.target, "__name__", node.target) for node in graph.graph.nodes)
        return graph.forward

    for compiled in (False, True):
        if compiled:
            network.compile(backend=backend, fullgraph=True)
        out = network(x, t, y)
        results.append([out, *torch.autograd.grad(out.square().mean(), (x, *network.parameters()))])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
    norms = sum(isinstance(module, nn.GroupNorm) for module in network.modules())
    assert names.count("var_mean") == norms > 10 and "expand" in names
    assert not any("group_norm" in name or "interpolate" in name for name in names)


def test_under_autocast_the_gradients_are_those_of_the_plain_path_within_rounding():
    x, norm, grads = torch.randn(2, 8, 8, 8, generator=torch.Generator().manual_seed(0)), norm_of(8), []
    for function in (norm_act_conv, plain):
        with autocast(torch.device("cpu"), "bf16"):
            grads.append(run(function, norm, x))
    for ours, expected in zip(*grads, strict=True):
        assert ours.dtype == expected.dtype
        torch.testing.assert_close(ours.float(), expected.float(), atol=0.03 * expected.abs().max().item(), rtol=0)


@pytest.mark.parametrize("share, count", [(0.1, 6554), (0.5, 32768), (0.25, 16384)])
def test_the_masks_share_and_factor_belong_together(share, count):
    torch.manual_seed(0)
    dropped, factor = fused.sample_mask(torch.empty(3, 5, 7, 11), share)  # no multiple of four
    assert dropped.shape == (3, 5, 7, 11) and dropped.dtype == torch.bool
    assert factor == 2**16 / (2**16 - count)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_dropping_by_bits_is_filling_with_zeros(dtype):
    x = torch.randn(2, 3, 5, 7, dtype=dtype).to(memory_format=torch.channels_last)
    x[0, 0, 0, 0] = float("nan")
    dropped = torch.rand(x.shape).to(memory_format=torch.channels_last) < 0.5
    expected = x.masked_fill(dropped, 0)
    torch.testing.assert_close(fused.drop(x, fused.keep_bits(dropped, dtype)), expected, atol=0, rtol=0, equal_nan=True)


@pytest.mark.parametrize("mean", [0, 8, 64])
@pytest.mark.parametrize("size", [4, 16, 32])  # PyTorch's own takes over at 32
def test_group_norm_in_bf16_is_that_of_float32_far_from_zero_too(size, mean):
    x = (
        (mean + torch.randn(4, 32, size, size, generator=torch.Generator().manual_seed(0)))
        .bfloat16()
        .to(memory_format=torch.channels_last)
    )
    norm = norm_of(32)
    out, means, rstd = fused.group_norm(x, norm.weight, norm.bias, 8, norm.eps)
    groups = x.double().reshape(4, 8, -1)
    torch.testing.assert_close(means.double().view(4, 8), groups.mean(2), atol=1e-4, rtol=1e-5)
    if size < 32:  # PyTorch's own variance is off by 1 % at 64
        torch.testing.assert_close(
            rstd.double().view(4, 8), (groups.var(2, correction=0) + norm.eps).rsqrt(), atol=1e-4, rtol=1e-5
        )
    torch.testing.assert_close(out.float(), norm(x.float()), atol=0.02, rtol=0.01)
    conv = looking_glass(32).bfloat16()
    with torch.no_grad():  # as when drawing
        seen = norm_act_conv(norm, F.silu, x, conv).float()
    torch.testing.assert_close(seen, F.silu(norm(x.float())).detach(), atol=0.03, rtol=0.02)


@pytest.mark.parametrize("value", [0.3, 10, 1000])
@pytest.mark.parametrize("size", [1, 4, 16])
def test_group_norm_of_a_flat_map_in_bf16_is_its_shift(size, value):
    x = torch.full((2, 32, size, size), float(value)).bfloat16().to(memory_format=torch.channels_last)
    norm = norm_of(32, groups=32)
    out = fused.group_norm(x, norm.weight, norm.bias, 32, norm.eps)[0].float()
    torch.testing.assert_close(out, norm.bias[:, None, None].detach().expand_as(out), atol=0.01, rtol=0.01)


@pytest.mark.parametrize("size", [16, 32])
def test_in_bf16_gradients_far_from_zero_are_those_of_float32_within_rounding(size):
    x = 30 + torch.randn(4, 16, size, size, generator=torch.Generator().manual_seed(0))
    x, norm = x.bfloat16().to(memory_format=torch.channels_last), norm_of(16)
    for ours, exact in zip(run(norm_act_conv, norm, x), run(plain, norm, x.float()), strict=True):
        torch.testing.assert_close(ours.float(), exact, atol=0.02 * exact.abs().max().item(), rtol=0)


def test_a_digest_of_weights_knows_no_memory_format():
    network = UNet(3, base_channels=32, channel_mults=(1, 2), num_res_blocks=1)
    before = weights_digest(network.state_dict())
    assert weights_digest(network.to(memory_format=torch.channels_last).state_dict()) == before


def test_layouts_by_device():
    cpu = torch.channels_last if torch.backends.mkldnn.is_available() else torch.contiguous_format
    assert memory_format(torch.device("cpu"), "fp32") == memory_format(torch.device("cpu"), "bf16") == cpu
    assert memory_format(torch.device("cuda"), "bf16") == torch.channels_last
    assert (
        memory_format(torch.device("cuda"), "fp32")
        == memory_format(torch.device("mps"), "fp32")
        == torch.contiguous_format
    )


def small_network(**settings):
    torch.manual_seed(0)
    network = UNet(3, base_channels=32, channel_mults=(1, 2), num_res_blocks=1, **settings).eval().requires_grad_(False)
    nn.init.normal_(network.out_conv.weight, std=0.05)
    return network


def test_rounded_weights_give_the_pictures_of_autocast_bit_for_bit():
    network, device = small_network(num_classes=3), torch.device("cpu")
    x, t, y = torch.linspace(-1, 1, 2 * 3 * 64).view(2, 3, 8, 8), torch.tensor([3, 700]), torch.tensor([0, 2])
    with autocast(device, "bf16"):
        expected = network(x, t, y)
        round_weights(network, "bf16")
        assert network.init_conv.weight.dtype == torch.bfloat16 and network.out_norm.weight.dtype == torch.float32
        assert torch.equal(network(x, t, y), expected)


def test_in_float32_no_weight_is_rounded():
    network = small_network()
    round_weights(network, "fp32")
    assert all(parameter.dtype == torch.float32 for parameter in network.parameters())


def test_classes_do_not_turn_the_features_of_autocast_into_float32():
    network, dtypes = small_network(num_classes=3), []
    network.downs[0].conv_2[1].register_forward_pre_hook(lambda layer, inputs: dtypes.append(inputs[0].dtype))
    with autocast(torch.device("cpu"), "bf16"):
        network(torch.zeros(1, 3, 8, 8), torch.tensor([1]), torch.tensor([1]))
    assert dtypes == [torch.bfloat16]
