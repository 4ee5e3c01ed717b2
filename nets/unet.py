"""The UNet of Ho et al. 2020 ("DDPM"): (x_t, t, y) -> a prediction with the shape of x_t.

Shapes: batch, channels, height, width (b, c, h, w). Attributes are the keys of the state dict.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .errors import SettingError, check_choice

MAX_GROUPS = 32  # group norm: the reference's default


def get_norm(norm: str | None, num_channels: int, num_groups: int, eps: float = 1e-5) -> nn.Module:
    """The layer for "gn", "in", "bn" (group, instance, batch norm) or None; else ValueError."""
    if norm == "gn" and num_channels % num_groups:
        raise SettingError(f"group norm: {num_channels} channels are not a multiple of {num_groups} groups; change one")
    layers = {"gn": partial(nn.GroupNorm, num_groups), "in": partial(nn.InstanceNorm2d, affine=True)}
    layers |= {"bn": nn.BatchNorm2d, None: nn.Identity}
    check_choice("normalization", norm, layers)
    return layers[norm](num_channels, eps=eps)


def zero_init(layer: nn.Conv2d) -> nn.Conv2d:
    """`layer` with zero weight and bias: a residual branch that ends in it first adds zero."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


class PositionalEmbedding(nn.Module):
    """Sines and cosines of the timestep at dim/2 frequencies (Vaswani et al. 2017, section 3.5).

    (b,) -> (b, dim) float32, also under autocast: bf16 rounds timestep 999 to 1000. freq_shift: 1
    spreads them from 1 to 1/10000 itself, as Ho et al.'s code does; 0 ends one step before it.
    """

    def __init__(self, dim: int, scale: float = 1.0, *, freq_shift: int = 0):
        super().__init__()
        if dim % 2 or dim <= 2 * freq_shift:
            least = 2 * freq_shift + 2
            raise SettingError(f"a positional embedding has an even number of channels from {least} on, not {dim}")
        self.dim, self.scale, self.freq_shift = dim, scale, freq_shift

    def forward(self, t: Tensor) -> Tensor:
        half = self.dim // 2
        step = -math.log(10000) / (half - self.freq_shift)
        frequencies = torch.exp(torch.arange(half, device=t.device, dtype=torch.float32) * step)
        angles = (t.float() * self.scale)[:, None] * frequencies  # (b, dim/2)
        return torch.cat((angles.sin(), angles.cos()), dim=-1)


class Downsample(nn.Module):
    """Halves height and width, which are even, with a strided convolution.

    padding: 1 puts zeros all around, 0 only on the right and below, as TensorFlow's "same" does.
    """

    def __init__(self, in_channels: int, padding: int = 1):
        super().__init__()
        self.padding = padding
        self.downsample = nn.Conv2d(in_channels, in_channels, 3, stride=2, padding=padding)

    def forward(self, x: Tensor, time_emb: Tensor | None = None, y: Tensor | None = None) -> Tensor:
        return self.downsample(x if self.padding else F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Doubles height and width: nearest neighbour, then a convolution. No checkerboard patterns."""

    def __init__(self, in_channels: int):
        super().__init__()
        conv = nn.Conv2d(in_channels, in_channels, 3, padding=1)
        self.upsample = nn.Sequential(nn.Upsample(scale_factor=2, mode="nearest"), conv)

    def forward(self, x: Tensor, time_emb: Tensor | None = None, y: Tensor | None = None) -> Tensor:
        return self.upsample(x)


class AttentionBlock(nn.Module):
    """Self-attention over all pixels, added to its input. It costs O((h*w)^2).

    head_dim: channels of each head; None is one head.
    """

    def __init__(
        self, in_channels: int, norm: str | None = "gn", num_groups: int = MAX_GROUPS, norm_eps=1e-5, head_dim=None
    ):
        super().__init__()
        if head_dim is not None and in_channels % head_dim:
            raise SettingError(f"attention: {in_channels} channels are not a multiple of heads of {head_dim} channels")
        self.num_heads = 1 if head_dim is None else in_channels // head_dim
        self.norm = get_norm(norm, in_channels, num_groups, norm_eps)
        self.to_qkv = nn.Conv2d(in_channels, in_channels * 3, 1)
        self.to_out = zero_init(nn.Conv2d(in_channels, in_channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.to_out(attend(self.to_qkv(self.norm(x)), self.num_heads))


def attend(qkv: Tensor, num_heads: int = 1) -> Tensor:
    """softmax(q k^T / sqrt(d)) v over the pixels: (b, 3c, h, w) -> (b, c, h, w), d = c/heads."""
    b, channels, h, w = qkv.shape
    # The fast kernels need contiguous channels: free in channels_last, else one copy.
    pixels = qkv.flatten(2).transpose(1, 2).contiguous()  # (b, h*w, 3c)
    q, k, v = pixels.unflatten(2, (3, num_heads, -1)).transpose(1, 3).unbind(2)  # (b, heads, h*w, d)
    if qkv.device.type == "mps":  # PyTorch 2.8 reads other strides wrong there
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    out = F.scaled_dot_product_attention(q, k, v)
    return out.transpose(1, 2).flatten(2).transpose(1, 2).reshape(b, channels // 3, h, w)


class ResidualBlock(nn.Module):
    """Two convolutions with a shortcut, then attention: (b, in, h, w) -> (b, out, h, w).

    Time and class shift the channels in between; time_emb_dim or num_classes None: no such shift.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        dropout: float,
        time_emb_dim: int | None = None,
        num_classes: int | None = None,
        activation: Callable[[Tensor], Tensor] = F.relu,
        norm: str | None = "gn",
        num_groups: int = MAX_GROUPS,
        use_attention: bool = False,
        *,
        norm_eps: float = 1e-5,
        attention_head_dim: int | None = None,
    ):
        super().__init__()
        self.activation = activation
        self.norm_1 = get_norm(norm, in_channels, num_groups, norm_eps)
        self.conv_1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm_2 = get_norm(norm, out_channels, num_groups, norm_eps)
        self.conv_2 = nn.Sequential(nn.Dropout(dropout), zero_init(nn.Conv2d(out_channels, out_channels, 3, padding=1)))
        self.time_bias = nn.Linear(time_emb_dim, out_channels) if time_emb_dim is not None else None
        self.class_bias = nn.Embedding(num_classes, out_channels) if num_classes is not None else None
        same = in_channels == out_channels
        self.residual_connection = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)
        settings = (out_channels, norm, num_groups, norm_eps, attention_head_dim)
        self.attention = AttentionBlock(*settings) if use_attention else nn.Identity()

    def forward(self, x: Tensor, time_emb: Tensor | None = None, y: Tensor | None = None) -> Tensor:
        h = self.conv_1(self.activation(self.norm_1(x)))
        h = self.add_conditions(h, time_emb, y)
        h = self.conv_2(self.activation(self.norm_2(h)))
        return self.attention(h + self.residual_connection(x))

    def add_conditions(self, h: Tensor, time_emb: Tensor | None, y: Tensor | None) -> Tensor:
        """h with the sum of time_bias and class_bias, (b, out_channels), added to its channels."""
        shift = None
        if self.time_bias is not None:
            shift = self.time_bias(self.activation(time_emb))
        if self.class_bias is not None:
            shift = self.class_bias(y) if shift is None else shift + self.class_bias(y)
        # Under autocast a class embedding is float32.
        return h if shift is None else h + shift[:, :, None, None].to(h.dtype)


class UNet(nn.Module):
    """Predicts eps, x_0 or v from x_t, as GaussianDiffusion trains it.

    channel_mults: a factor of base_channels per level. attention_resolutions: levels, 0 is full
    size. time_emb_dim, num_classes: None for no input t or y. initial_pad: pixels of zeros around.
    activation_checkpointing: the backward pass computes activations again, in a third more time.

    The next four are what other projects' weights need. norm_eps: of the norms. attention_head_dim:
    see AttentionBlock. downsample_padding: see Downsample. freq_shift: see PositionalEmbedding.
    cond_channels: of the images that the network is conditioned on; zeros take the place of none.
    """

    def __init__(
        self,
        img_channels: int,
        base_channels: int = 128,
        channel_mults: Sequence[int] = (1, 2, 2, 2),
        num_res_blocks: int = 2,
        time_emb_dim: int | None = 512,
        time_emb_scale: float = 1.0,
        num_classes: int | None = None,
        activation: Callable[[Tensor], Tensor] = F.silu,
        dropout: float = 0.1,
        attention_resolutions: Sequence[int] = (1,),
        norm: str | None = "gn",
        num_groups: int = MAX_GROUPS,
        initial_pad: int = 0,
        *,
        activation_checkpointing: bool = False,
        norm_eps: float = 1e-5,
        attention_head_dim: int | None = None,
        downsample_padding: int = 1,
        freq_shift: int = 0,
        cond_channels: int = 0,
    ):
        super().__init__()
        self.activation, self.num_classes, self.initial_pad = activation, num_classes, initial_pad
        self.activation_checkpointing, self.cond_channels = activation_checkpointing, cond_channels
        details = {"norm_eps": norm_eps, "attention_head_dim": attention_head_dim}
        self.details = details | {"downsample_padding": downsample_padding, "freq_shift": freq_shift}
        self.time_mlp = None
        if time_emb_dim is not None:
            layers = nn.Linear(base_channels, time_emb_dim), nn.SiLU(), nn.Linear(time_emb_dim, time_emb_dim)
            embedding = PositionalEmbedding(base_channels, time_emb_scale, freq_shift=freq_shift)
            self.time_mlp = nn.Sequential(embedding, *layers)
        self.init_conv = nn.Conv2d(img_channels + cond_channels, base_channels, 3, padding=1)
        self.downs, self.mid, self.ups = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        levels = [(base_channels * mult, i in attention_resolutions) for i, mult in enumerate(channel_mults)]
        shared = {"dropout": dropout, "time_emb_dim": time_emb_dim, "num_classes": num_classes}
        shared |= {"activation": activation, "norm": norm, "num_groups": num_groups, **details}
        self.add_blocks(base_channels, levels, num_res_blocks, partial(ResidualBlock, **shared), downsample_padding)
        self.out_norm = get_norm(norm, levels[0][0], num_groups, norm_eps)
        self.out_conv = zero_init(nn.Conv2d(levels[0][0], img_channels, 3, padding=1))

    def add_blocks(self, channels: int, levels: list[tuple[int, bool]], num_res_blocks: int, block, padding) -> None:
        """levels: (channels, with attention) from full size on. block: makes a ResidualBlock."""
        skips = [channels]  # the channels of the skip connections
        for level, (width, attention) in enumerate(levels):
            for _ in range(num_res_blocks):
                self.downs.append(block(skips[-1], width, use_attention=attention))
                skips.append(width)
            if level < len(levels) - 1:
                self.downs.append(Downsample(skips[-1], padding))
                skips.append(skips[-1])
        channels = skips[-1]
        self.mid.extend(block(channels, channels, use_attention=attention) for attention in (True, False))
        for level, (width, attention) in reversed(list(enumerate(levels))):
            for _ in range(num_res_blocks + 1):
                self.ups.append(block(channels + skips.pop(), width, use_attention=attention))
                channels = width
            if level > 0:
                self.ups.append(Upsample(channels))

    def forward(self, x: Tensor, time: Tensor | None = None, y: Tensor | None = None, cond=None) -> Tensor:
        """x (b, c, h, w), time (b,), classes y (b,), cond (b, k, h, w) or None -> (b, c, h, w)."""
        if self.num_classes is not None and y is None:
            raise ValueError("this network is conditioned on classes: pass y")
        time_emb = None if self.time_mlp is None else self.time_mlp(time)
        x = x if cond is None else torch.cat((x, cond), dim=1)
        pad, missing = self.initial_pad, self.cond_channels if cond is None else 0
        x = self.init_conv(F.pad(x, (pad,) * 4 + (0, missing)) if pad or missing else x)
        skips = [x]
        for layer in self.downs:
            x = self.run(layer, x, time_emb, y)
            skips.append(x)
        for layer in self.mid:
            x = self.run(layer, x, time_emb, y)
        for layer in self.ups:
            if isinstance(layer, ResidualBlock):
                x = torch.cat((x, skips.pop()), dim=1)
            x = self.run(layer, x, time_emb, y)
        x = self.to_output(x)
        return x[:, :, pad:-pad, pad:-pad] if pad else x

    def to_output(self, x: Tensor) -> Tensor:
        """The last features (b, c, h, w) -> (b, img_channels, h, w)."""
        return self.out_conv(self.activation(self.out_norm(x)))

    def run(self, layer: nn.Module, x: Tensor, time_emb: Tensor | None, y: Tensor | None) -> Tensor:
        """layer(x, time_emb, y), with activation checkpointing where it is on."""
        if self.activation_checkpointing and self.training and torch.is_grad_enabled():
            return checkpoint(layer, x, time_emb, y, use_reentrant=False)
        return layer(x, time_emb, y)
