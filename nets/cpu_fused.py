"""Group norm, SiLU, dropout and convolution as one operation: less memory and time on the CPU.

The four plain operations keep four to five full-size tensors for the backward pass. This one keeps
its input and a mask of one byte per feature. The backward pass computes the convolution's input
again, which is cheap. Results equal the plain ones up to rounding; dropout drops other features.
`install` puts it into a network; nobody needs it to understand the network.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

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
        return x + self.to_out(attend(norm_act_conv(self.norm, None, x, self.to_qkv)))


class FusedUNet(UNet):
    def to_output(self, x):
        return norm_act_conv(self.out_norm, self.activation, x, self.out_conv)


FUSED = {ResidualBlock: FusedResidualBlock, AttentionBlock: FusedAttentionBlock, UNet: FusedUNet}


def install(network: nn.Module) -> nn.Module:
    """`network`, whose blocks take the fused path from now on wherever it applies.

    It changes their class alone: parameters and keys stay, and copies of the network have it too.
    """
    for module in network.modules():
        module.__class__ = FUSED.get(type(module), type(module))
    return network


def norm_act_conv(norm, activation, x: Tensor, conv, dropout=None) -> Tensor:
    """conv(dropout(activation(norm(x)))) for x (b, c, h, w). activation and dropout may be None."""
    if applies(norm, activation, x, conv, dropout):
        return fused(norm, activation, x, conv, dropout)
    x = norm(x)
    x = x if activation is None else activation(x)
    return conv(x if dropout is None else dropout(x))


def applies(norm, activation, x, conv, dropout=None):
    """Whether `fused` can replace the plain operations; not where a compiler fuses them."""
    on_cpu = x.device.type == "cpu" and x.dim() == 4 and x.numel() > 0 and not torch.compiler.is_compiling()
    norm_fits = isinstance(norm, nn.GroupNorm) and norm.affine and activation in (None, F.silu)
    conv_fits = conv.stride == conv.dilation == (1, 1) and conv.groups == 1 and conv.padding_mode == "zeros"
    if not (on_cpu and norm_fits and conv_fits) or conv.bias is None or isinstance(conv.padding, str):
        return False
    rate = dropout_rate(dropout)
    return rate < 1 and norm.weight.requires_grad if torch.is_grad_enabled() else not rate


def dropout_rate(dropout):
    """The dropout probability of a layer, or None, in its present mode."""
    return dropout.p if dropout is not None and dropout.training else 0.0


def fused(norm, activation, x, conv, dropout=None):
    """`norm_act_conv` in one operation, where `applies` holds."""
    if torch.is_grad_enabled():
        settings = norm.num_groups, norm.eps, activation is not None, dropout_rate(dropout), conv.padding
        return NormActDropoutConv.apply(x, norm.weight, norm.bias, conv.weight, conv.bias, *settings)
    out = group_norm(x, norm.weight, norm.bias, norm.num_groups, norm.eps)[0]
    return conv(out if activation is None else F.silu(out, inplace=True))


class NormActDropoutConv(torch.autograd.Function):
    """conv(dropout(silu(group_norm(x)))) with stride 1, for x (b, c, h, w) of any memory format.

    scale, shift: group norm's, (c,). silu: False leaves the SiLU out. rate: dropout's probability.
    """

    @staticmethod
    def forward(ctx, x, scale, shift, weight, bias, groups, eps, silu, rate, padding):
        out, mean, rstd = group_norm(x, scale, shift, groups, eps)
        out = F.silu(out, inplace=True) if silu else out
        dropped, factor = draw_mask(out, rate) if rate else (None, 1.0)
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
        b, c, h, w = x.shape
        half = x.dtype in (torch.bfloat16, torch.float16)
        if half:  # a large mean would cost digits of the normed x
            rounded = mean.to(x.dtype)
            x, mean = x - per_channel(rounded.repeat_interleave(c // ctx.groups, 1), x), mean - rounded
        x_factor, x_shift = affine(scale, shift, mean, rstd, ctx.groups)
        normed = torch.addcmul(per_channel(x_shift, x), x, per_channel(x_factor, x))
        kept = keep_bits(dropped, x.dtype)
        conv_input = drop(F.silu(normed) if ctx.silu else normed, kept).to(weight.dtype)
        grad, weight_grad, bias_grad = aten.convolution_backward(
            grad, conv_input, weight, [len(weight)], (1, 1), ctx.padding, (1, 1), False, (0, 0), 1, [True] * 3
        )
        del conv_input
        grad = drop(grad.to(x.dtype), kept)
        if ctx.silu:
            grad = aten.silu_backward.grad_input(grad, normed, grad_input=normed)
        if half:
            grads = group_norm_backward(grad, x, x_factor, scale, mean, rstd, ctx.groups)
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
    values.sub_(mean.repeat_interleave(c // groups, 1)[:, :, None, None])
    rstd = (values.square().sum((2, 3)).view(b, groups, -1).sum(2) / count + eps).rsqrt_()
    x_factor, _ = affine(scale, shift, mean, rstd, groups)
    return values.mul_(x_factor[:, :, None, None]).add_(shift[:, None, None]).to(x.dtype), mean, rstd


def keep_bits(dropped, dtype):
    """Integers as wide as dtype: all bits 1, or 0 where `dropped` is True. None for None."""
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    return None if dropped is None else dropped.to(integer).sub_(1)


def drop(features, kept):
    """Sets features to zero in place where the bits of `kept` are 0. Faster than masked_fill_."""
    if kept is not None:
        features.view(kept.dtype).bitwise_and_(kept)
    return features


def draw_mask(like, rate):
    """(mask with the strides of `like`, True where dropout drops; factor for the other features).

    16 random bits per feature take a third of bernoulli's time. They round the rate to 2^-16.
    """
    count = round(rate * 2**16)
    size = -(-like.numel() // 4)  # four features per 64-bit integer
    bits = torch.empty(size, dtype=torch.int64).random_(-(2**63), None).view(torch.int16)[: like.numel()]
    dropped = (bits < count - 2**15).as_strided(like.shape, like.stride())
    return dropped, 2**16 / (2**16 - count)


def affine(weight, bias, mean, rstd, groups):
    """(factor, shift), (b, c) float32 each: group norm is factor * x + shift."""
    group_size = len(weight) // groups
    factor = rstd.float().repeat_interleave(group_size, 1) * weight.float()
    return factor, bias.float() - mean.float().repeat_interleave(group_size, 1) * factor


def per_channel(table, x):
    """(b, c) -> (b, c, 1, 1) in x's dtype, which broadcasts to x."""
    return table[:, :, None, None].to(x.dtype)


def group_norm_backward(grad, x, factor, weight, mean, rstd, groups):
    """Gradients of x, weight and bias in half precision. channels_last: 3 times PyTorch's speed."""
    b, c, h, w = x.shape
    mean, rstd = mean.float(), rstd.float()
    sums = grad.sum((2, 3), dtype=torch.float32)  # (b, c)
    products = (grad * x).sum((2, 3), dtype=torch.float32)
    by_group = [(table * weight).view(b, groups, -1).sum(2) / (c // groups * h * w) for table in (sums, products)]
    x_factor = (by_group[0] * mean - by_group[1]) * rstd**3  # (b, groups)
    shift = -x_factor * mean - by_group[0] * rstd
    x_factor, shift = (per_channel(table.repeat_interleave(c // groups, 1), x) for table in (x_factor, shift))
    x_grad = (grad * per_channel(factor, x)).addcmul_(x, x_factor).add_(shift)
    weight_grad = products - sums * mean.repeat_interleave(c // groups, 1)
    weight_grad = (weight_grad * rstd.repeat_interleave(c // groups, 1)).sum(0)
    return x_grad, weight_grad.to(weight.dtype), sums.sum(0).to(weight.dtype)
