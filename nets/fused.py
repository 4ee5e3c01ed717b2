"""Group norm, SiLU, dropout and convolution as one operation, for training on the CPU; everywhere else the plain four.

Apart, they keep four to five full-size tensors for the backward pass; together they keep the input (which in the first of a block
the shortcut holds anyway) and a byte-sized mask. What the convolution saw is computed again from them, cheap beside the convolution.
A compiler fuses the plain path by itself. The numbers are those of the plain path; only which features are dropped differs.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable


def norm_act_conv(norm, activation, x, conv, dropout=None):
    """conv(dropout(activation(norm(x)))) of a block's modules, in the way that keeps the least memory."""
    if worth_fusing(norm, activation, x):
        share = dropout.p if dropout is not None and dropout.training else 0.0
        return NormSiluDropoutConv.apply(x, norm.weight, norm.bias, norm.num_groups, norm.eps, share, conv.weight, conv.bias, conv.padding)
    x = activation(norm(x))
    return conv(x if dropout is None else dropout(x))


def worth_fusing(norm, activation, x):
    """Whether there is a backward pass to save memory for, on the CPU, without a compiler."""
    fits = isinstance(norm, nn.GroupNorm) and activation is F.silu and x.device.type == "cpu" and x.dim() == 4
    return fits and torch.is_grad_enabled() and norm.weight.requires_grad and not torch.compiler.is_compiling()


class NormSiluDropoutConv(torch.autograd.Function):
    """conv(dropout(silu(group_norm(x)))), stride 1; x (b, c, h, w) in any memory format and dtype, the norm's scale and shift (c,)."""

    @staticmethod
    def forward(ctx, x, scale, shift, groups, eps, share, weight, bias, padding):
        b, c, h, w = x.shape
        out, mean, rstd = torch.native_group_norm(x, scale, shift, b, c, h * w, groups, eps)
        dropped, factor = draw_mask(out, share) if share else (None, 1.0)
        out = drop(F.silu(out, inplace=True), dropped)
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else out.dtype
        # Times the factor that makes up for what is dropped: the weights are small, the features are not.
        ctx.weight_dtype, weight = weight.dtype, (weight * factor).to(dtype)
        ctx.save_for_backward(x, scale, shift, mean, rstd, dropped, weight)
        ctx.groups, ctx.factor, ctx.padding = groups, factor, padding
        return F.conv2d(out.to(dtype), weight, bias.to(dtype), padding=padding)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, scale, shift, mean, rstd, dropped, weight = ctx.saved_tensors
        b, c, h, w = x.shape
        x_factor, x_shift = affine(scale, shift, mean, rstd, ctx.groups)
        normed = torch.addcmul(as_images(x_shift, x), x, as_images(x_factor, x))
        seen = drop(F.silu(normed), dropped).to(weight.dtype)
        grad, weight_grad, bias_grad = torch.ops.aten.convolution_backward(
            grad, seen, weight, [len(weight)], (1, 1), ctx.padding, (1, 1), False, (0, 0), 1, [True] * 3
        )
        del seen
        grad = drop(grad.to(x.dtype), dropped)
        grad = torch.ops.aten.silu_backward.grad_input(grad, normed, grad_input=normed)
        if x.dtype in (torch.bfloat16, torch.float16):
            grads = group_norm_backward(grad, x, x_factor, scale, mean, rstd, ctx.groups)
        else:
            grads = torch.ops.aten.native_group_norm_backward(grad, x, mean, rstd, scale, b, c, h * w, ctx.groups, [True] * 3)
        return *grads, None, None, None, (weight_grad * ctx.factor).to(ctx.weight_dtype), bias_grad.to(ctx.weight_dtype), None


def drop(features, dropped):
    """`features`, in place, zero where `dropped` (None: nowhere)."""
    return features if dropped is None else features.masked_fill_(dropped, 0)


def draw_mask(like, share):
    """(True where a feature is dropped, factor for the others), laid out in memory as `like`. A third of bernoulli's time.

    16 random bits a feature decide, so that `share` is rounded to a 65536th; the factor makes up for what was rounded.
    """
    count = round(share * 2**16)
    size = -(-like.numel() // 4)  # 64 bits are four features
    bits = torch.empty(size, dtype=torch.int64).random_(-(2**63), None).view(torch.int16)[: like.numel()]
    dropped = (bits < count - 2**15).as_strided(like.shape, like.stride())
    return dropped, 2**16 / (2**16 - count)


def affine(weight, bias, mean, rstd, groups):
    """Group norm as a factor and a shift for each image and channel, (b, c) float32 each: out = factor * x + shift."""
    factor = (rstd.float()[:, :, None] * weight.float().view(groups, -1)).flatten(1)
    return factor, bias.float() - (mean.float()[:, :, None] * factor.view(len(mean), groups, -1)).flatten(1)


def as_images(table, x):
    """(b, c) -> (b, c, 1, 1) in x's dtype, to work on images with."""
    return table[:, :, None, None].to(x.dtype)


def group_norm_backward(grad, x, factor, weight, mean, rstd, groups):
    """The gradients of group norm in half precision, sums in float32: PyTorch's own takes three times as long in channels_last."""
    b, c, h, w = x.shape
    mean, rstd = mean.float(), rstd.float()
    sums = grad.sum((2, 3), dtype=torch.float32)  # of grad and of grad * x, (b, c)
    products = (grad * x).sum((2, 3), dtype=torch.float32)
    by_group = [(table * weight).view(b, groups, -1).sum(2) / (c // groups * h * w) for table in (sums, products)]
    x_factor = (by_group[0] * mean - by_group[1]) * rstd**3  # (b, groups)
    shift = -x_factor * mean - by_group[0] * rstd
    spread = [as_images(table.repeat_interleave(c // groups, 1), x) for table in (x_factor, shift)]
    x_grad = (grad * as_images(factor, x)).addcmul_(x, spread[0]).add_(spread[1])
    centred = products - sums * mean.repeat_interleave(c // groups, 1)
    weight_grad = (centred * rstd.repeat_interleave(c // groups, 1)).sum(0)
    return x_grad, weight_grad.to(weight.dtype), sums.sum(0).to(weight.dtype)
