"""Group norm, SiLU, dropout and convolution as one operation: less memory and time on the CPU.

The plain operations keep four to five full-size tensors for the backward pass. This one keeps its
input and a mask of one byte per feature, and computes the convolution's input again. Results equal
the plain ones up to rounding; dropout drops other features. `install` puts in the layers of
compiled.py too, which act only while a compiler traces them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .compiled import WRITTEN_OUT
from .unet import AttentionBlock, ResidualBlock, UNet, attend

aten = torch.ops.aten


class FusedResidualBlock(ResidualBlock):
    def forward(self, x, time_emb=None, y=None):
        h = norm_act_conv(self.norm_1, self.activation, x, self.conv_1)
        h = self.add_conditions(h, time_emb, y)
        dropout, conv = self.conv_2
        h = norm_act_conv(self.norm_2, self.activation, h, conv, dropout)
        return self.attention(h + self.residual_connection(x))


class FusedAttentionBlock(AttentionBlock):
    def forward(self, x):
        return x + self.to_out(attend(norm_act_conv(self.norm, None, x, self.to_qkv), self.num_heads))


class FusedUNet(UNet):
    def to_output(self, x):
        return norm_act_conv(self.out_norm, self.activation, x, self.out_conv)


FUSED = {ResidualBlock: FusedResidualBlock, AttentionBlock: FusedAttentionBlock, UNet: FusedUNet, **WRITTEN_OUT}


def install(network: nn.Module) -> nn.Module:
    """`network`, whose blocks and layers have other classes, and the same keys, from now on."""
    for module in network.modules():
        module.__class__ = FUSED.get(type(module), type(module))
    return network


def norm_act_conv(norm, activation, x: Tensor, conv, dropout=None) -> Tensor:
    """conv(dropout(activation(norm(x)))) for x (b, c, h, w). activation and dropout may be None."""
    fits = x.device.type == "cpu" and isinstance(norm, nn.GroupNorm) and activation in (None, F.silu)
    plain = conv.bias is not None and conv.stride == conv.dilation == (1, 1) and conv.padding_mode == "zeros"
    if not (fits and plain) or torch.compiler.is_compiling():  # a compiler fuses them itself
        x = norm(x) if activation is None else activation(norm(x))
        return conv(x if dropout is None else dropout(x))
    rate = dropout.p if dropout is not None and dropout.training else 0.0
    settings = norm.num_groups, norm.eps, activation is not None, rate, conv.padding
    return NormActDropoutConv.apply(x, norm.weight, norm.bias, conv.weight, conv.bias, *settings)


class NormActDropoutConv(torch.autograd.Function):
    """norm_act_conv with stride 1. scale, shift (c,): group norm's. rate: dropout's probability."""

    @staticmethod
    def forward(ctx, x, scale, shift, weight, bias, groups, eps, silu, rate, padding):
        out, mean, rstd = group_norm(x, scale, shift, groups, eps)
        out = F.silu(out, inplace=True) if silu else out
        dropped, factor = sample_mask(out, rate) if rate else (None, 1.0)
        out = drop(out, keep_bits(dropped, out.dtype))
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else out.dtype
        # Dropout's factor scales the weights: they are fewer than the features.
        ctx.weight_dtype, weight = weight.dtype, (weight * factor if rate else weight).to(dtype)
        ctx.save_for_backward(x, scale, shift, mean, rstd, dropped, weight)
        ctx.groups, ctx.silu, ctx.factor, ctx.padding = groups, silu, factor, padding
        return F.conv2d(out.to(dtype), weight, bias.to(dtype), padding=padding)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, scale, shift, mean, rstd, dropped, weight = ctx.saved_tensors
        half = x.dtype in (torch.bfloat16, torch.float16)
        if half:  # a large mean would cost digits of the normed x
            rounded = mean.to(x.dtype)
            x, mean = x - spread(rounded, x), mean - rounded
        factor = by_channel(rstd.float(), scale) * scale.float()  # group norm is factor * x + offset
        offset = shift.float() - by_channel(mean.float(), scale) * factor
        normed = torch.addcmul(spread(offset, x), x, spread(factor, x))
        kept = keep_bits(dropped, x.dtype)
        conv_input = drop(F.silu(normed) if ctx.silu else normed, kept).to(weight.dtype)
        grad, weight_grad, bias_grad = aten.convolution_backward(
            grad, conv_input, weight, [len(weight)], (1, 1), ctx.padding, (1, 1), False, (0, 0), 1, [True] * 3
        )
        del conv_input
        grad = drop(grad.to(x.dtype), kept)
        if ctx.silu:
            grad = aten.silu_backward.grad_input(grad, normed, grad_input=normed)
        b, c, h, w = x.shape
        if half:
            grads = group_norm_backward(grad, x, factor, scale, mean.float(), rstd.float())
        else:
            grads = aten.native_group_norm_backward(grad, x, mean, rstd, scale, b, c, h * w, ctx.groups, [True] * 3)
        return *grads, (weight_grad * ctx.factor).to(ctx.weight_dtype), bias_grad.to(ctx.weight_dtype), *[None] * 5


def group_norm(x, scale, shift, groups, eps):
    """(normed x, mean, rstd (b, groups)). Small bf16 images: three to six times PyTorch's speed."""
    b, c, h, w = x.shape
    if x.dtype != torch.bfloat16 or h * w >= 1024 or not x.is_contiguous(memory_format=torch.channels_last):
        return torch.native_group_norm(x, scale, shift, b, c, h * w, groups, eps)
    count, values = c // groups * h * w, x.float()
    mean = values.sum((2, 3)).view(b, groups, -1).sum(2) / count
    values.sub_(spread(mean, values))
    rstd = (values.square().sum((2, 3)).view(b, groups, -1).sum(2) / count + eps).rsqrt_()
    values.mul_(spread(by_channel(rstd, scale) * scale.float(), values))
    return values.add_(shift[:, None, None]).to(x.dtype), mean, rstd


def group_norm_backward(grad, x, factor, scale, mean, rstd):
    """Gradients of x, scale and shift in half precision. channels_last: 3 times PyTorch's speed."""
    b, c, h, w = x.shape
    sums = grad.sum((2, 3), dtype=torch.float32)  # (b, c)
    products = (grad * x).sum((2, 3), dtype=torch.float32)
    group_sums, group_products = (
        (table * scale).view(*mean.shape, -1).sum(2) / (x[0].numel() // mean.shape[1]) for table in (sums, products)
    )
    x_factor = (group_sums * mean - group_products) * rstd**3  # (b, groups)
    offset = -x_factor * mean - group_sums * rstd
    x_grad = (grad * spread(factor, x)).addcmul_(x, spread(x_factor, x)).add_(spread(offset, x))
    scale_grad = (products - sums * by_channel(mean, scale)) * by_channel(rstd, scale)
    return x_grad, scale_grad.sum(0).to(scale.dtype), sums.sum(0).to(scale.dtype)


def by_channel(table, scale):
    """(b, groups) -> (b, c) for scale (c,)."""
    return table.repeat_interleave(len(scale) // table.shape[1], 1)


def spread(table, x):
    """(b, groups) or (b, c) -> (b, c, 1, 1) in x's dtype, which broadcasts to x (b, c, h, w)."""
    return by_channel(table, x[0])[:, :, None, None].to(x.dtype)


def keep_bits(dropped, dtype):
    """Integers as wide as dtype: all bits 1, or 0 where `dropped` is True. None for None."""
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    return None if dropped is None else dropped.to(integer).sub_(1)


def drop(features, kept):
    """Sets features to zero in place where the bits of `kept` are 0. Faster than masked_fill_."""
    if kept is not None:
        features.view(kept.dtype).bitwise_and_(kept)
    return features


def sample_mask(like, rate):
    """(mask with the strides of `like`, True where dropout drops; factor for the other features).

    16 random bits per feature take a third of bernoulli's time. They round the rate to 2^-16.
    """
    count = round(rate * 2**16)
    size = -(-like.numel() // 4)  # four features per 64-bit integer
    bits = torch.empty(size, dtype=torch.int64).random_(-(2**63), None).view(torch.int16)[: like.numel()]
    dropped = (bits < count - 2**15).as_strided(like.shape, like.stride())
    return dropped, 2**16 / (2**16 - count)
