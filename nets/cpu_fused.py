"""Group norm, SiLU, dropout and convolution as one operation, on the CPU; everywhere else the plain four.

In training they keep, apart, four to five full-size tensors for the backward pass; together the input (which in the first of a
block the shortcut holds anyway) and a byte-sized mask. What the convolution saw is computed again from them, cheap beside the
convolution. A compiler fuses the plain path by itself. The numbers are those of the plain path within the dtype's rounding; only
which features are dropped differs.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable


def applies(norm, activation, x, conv, dropout=None):
    """The guard: whether `norm_act_conv` below may stand in for the plain operations.

    It needs a CPU, no compiler, and exactly the operations that are written out here.
    """
    here = x.device.type == "cpu" and x.dim() == 4 and x.numel() > 0 and not torch.compiler.is_compiling()
    known = isinstance(norm, nn.GroupNorm) and norm.affine and activation in (None, F.silu)
    simple = conv.stride == conv.dilation == (1, 1) and conv.groups == 1 and conv.padding_mode == "zeros"
    if not (here and known and simple) or conv.bias is None or isinstance(conv.padding, str):
        return False
    rate = dropout_rate(dropout)
    return rate < 1 and norm.weight.requires_grad if torch.is_grad_enabled() else not rate


def dropout_rate(dropout):
    """The share of features that a dropout layer, or None, zeroes now."""
    return dropout.p if dropout is not None and dropout.training else 0.0


def norm_act_conv(norm, activation, x, conv, dropout=None):
    """conv(dropout(activation(norm(x)))) where `applies` holds."""
    if torch.is_grad_enabled():
        settings = norm.num_groups, norm.eps, activation is not None, dropout_rate(dropout), conv.padding
        return NormActDropoutConv.apply(x, norm.weight, norm.bias, conv.weight, conv.bias, *settings)
    out = group_norm(x, norm.weight, norm.bias, norm.num_groups, norm.eps)[0]
    return conv(out if activation is None else F.silu(out, inplace=True))


class NormActDropoutConv(torch.autograd.Function):
    """conv(dropout(silu(group_norm(x)))), stride 1; x (b, c, h, w) in any memory format and dtype, the norm's scale and shift (c,).

    silu False leaves the SiLU out; share is the dropout's.
    """

    @staticmethod
    def forward(ctx, x, scale, shift, weight, bias, groups, eps, silu, share, padding):
        out, mean, rstd = group_norm(x, scale, shift, groups, eps)
        out = F.silu(out, inplace=True) if silu else out
        dropped, factor = draw_mask(out, share) if share else (None, 1.0)
        out = drop(out, keep_bits(dropped, out.dtype))
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else out.dtype
        # Times the factor that makes up for what is dropped: the weights are small, the features are not.
        ctx.weight_dtype, weight = weight.dtype, (weight * factor if share else weight).to(dtype)
        ctx.save_for_backward(x, scale, shift, mean, rstd, dropped, weight)
        ctx.groups, ctx.silu, ctx.factor, ctx.padding = groups, silu, factor, padding
        return F.conv2d(out.to(dtype), weight, bias.to(dtype), padding=padding)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, scale, shift, mean, rstd, dropped, weight = ctx.saved_tensors
        b, c, h, w = x.shape
        half = x.dtype in (torch.bfloat16, torch.float16)
        if half:
            x, mean = centred(x, mean, ctx.groups)
        x_factor, x_shift = affine(scale, shift, mean, rstd, ctx.groups)
        normed = torch.addcmul(as_images(x_shift, x), x, as_images(x_factor, x))
        kept = keep_bits(dropped, x.dtype)
        seen = drop(F.silu(normed) if ctx.silu else normed, kept).to(weight.dtype)
        grad, weight_grad, bias_grad = torch.ops.aten.convolution_backward(
            grad, seen, weight, [len(weight)], (1, 1), ctx.padding, (1, 1), False, (0, 0), 1, [True] * 3
        )
        del seen
        grad = drop(grad.to(x.dtype), kept)
        if ctx.silu:
            grad = torch.ops.aten.silu_backward.grad_input(grad, normed, grad_input=normed)
        if half:
            grads = group_norm_backward(grad, x, x_factor, scale, mean, rstd, ctx.groups)
        else:
            grads = torch.ops.aten.native_group_norm_backward(grad, x, mean, rstd, scale, b, c, h * w, ctx.groups, [True] * 3)
        return *grads, (weight_grad * ctx.factor).to(ctx.weight_dtype), bias_grad.to(ctx.weight_dtype), None, None, None, None, None


def group_norm(x, scale, shift, groups, eps):
    """(normed x, mean, 1/deviation (b, groups)). On small maps in bf16 PyTorch's own takes three to six times as long."""
    b, c, h, w = x.shape
    if x.dtype != torch.bfloat16 or h * w >= 1024 or not x.is_contiguous(memory_format=torch.channels_last):
        return torch.native_group_norm(x, scale, shift, b, c, h * w, groups, eps)
    count, values = c // groups * h * w, x.float()
    mean = values.sum((2, 3)).view(b, groups, -1).sum(2) / count
    values.sub_(mean.repeat_interleave(c // groups, 1)[:, :, None, None])
    rstd = (values.square().sum((2, 3)).view(b, groups, -1).sum(2) / count + eps).rsqrt_()
    x_factor, _ = affine(scale, shift, mean, rstd, groups)
    return values.mul_(x_factor[:, :, None, None]).add_(shift[:, None, None]).to(x.dtype), mean, rstd


def centred(x, mean, groups):
    """(x less its groups' means as far as x's dtype knows them, what is left of the means): else factor * x + shift would round the
    mean's share of both, many times the result where the mean is large."""
    known = mean.to(x.dtype)
    return x - as_images(known.repeat_interleave(x.shape[1] // groups, 1), x), mean - known


def keep_bits(dropped, dtype):
    """Integers of the dtype's width, all bits set where a feature is kept and none where it is `dropped` (None stays None)."""
    return None if dropped is None else dropped.to({2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]).sub_(1)


def drop(features, kept):
    """`features`, in place, zero where no bit is `kept` (None: all are). A fraction of masked_fill_'s time."""
    if kept is not None:
        features.view(kept.dtype).bitwise_and_(kept)
    return features


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
    each = len(weight) // groups
    factor = rstd.float().repeat_interleave(each, 1) * weight.float()
    return factor, bias.float() - mean.float().repeat_interleave(each, 1) * factor


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
