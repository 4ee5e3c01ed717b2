"""The UNet of Ho et al. 2020 ("DDPM"): (x_t, t, y) -> a prediction with the shape of x_t.

Shapes are (b, c, h, w): batch, channels, height, width. The attributes of the blocks are the keys
of the state dict.
"""

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from . import cpu_fused
from .errors import SettingError, check_choice

MAX_GROUPS = 32  # group norm: the reference's default
TIME_EMB_DIM = 512  # the reference's default


def get_norm(norm, num_channels, num_groups):
    """The layer for "gn", "in", "bn" (group, instance, batch norm) or None; else ValueError."""
    if norm == "gn" and num_channels % num_groups:
        raise SettingError(f"group norm: {num_channels} channels are not a multiple of {num_groups} groups; change one")
    choices = {
        "gn": lambda: nn.GroupNorm(num_groups, num_channels),
        "in": lambda: nn.InstanceNorm2d(num_channels, affine=True),
        "bn": lambda: nn.BatchNorm2d(num_channels),
        None: nn.Identity,
    }
    check_choice("normalization", norm, choices)
    return choices[norm]()


def zero_init(layer):
    """`layer` with zero weight and bias: a residual branch that ends in it first adds zero."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def norm_act_conv(norm, activation, x, conv, dropout=None):
    """conv(dropout(activation(norm(x)))) for x (b, c, h, w). activation and dropout may be None."""
    if cpu_fused.applies(norm, activation, x, conv, dropout):  # same result, less memory and time
        return cpu_fused.norm_act_conv(norm, activation, x, conv, dropout)
    x = norm(x)
    x = x if activation is None else activation(x)
    return conv(x if dropout is None else dropout(x))


class PositionalEmbedding(nn.Module):
    """Sines and cosines of the timestep at dim/2 frequencies (Vaswani et al. 2017, section 3.5).

    The frequencies fall from 1 to about 1/10000. (b,) integers or floats -> (b, dim) float32, also
    under autocast: bf16 rounds timestep 999 to 1000.
    """

    def __init__(self, dim, scale=1.0):
        super().__init__()
        if dim % 2:
            raise SettingError(f"a positional embedding has an even number of channels, not {dim}")
        self.dim = dim
        self.scale = scale

    def forward(self, t):
        half = self.dim // 2
        frequencies = torch.exp(torch.arange(half, device=t.device, dtype=torch.float32) * (-math.log(10000) / half))
        angles = (t.float() * self.scale)[:, None] * frequencies  # (b, dim/2)
        return torch.cat((angles.sin(), angles.cos()), dim=-1)


class Downsample(nn.Module):
    """Halves height and width with a strided convolution; ValueError for an odd size."""

    def __init__(self, in_channels):
        super().__init__()
        self.downsample = nn.Conv2d(in_channels, in_channels, 3, stride=2, padding=1)

    def forward(self, x, time_emb=None, y=None):
        for name, size in zip(("height", "width"), x.shape[2:]):
            if size % 2:
                raise SettingError(f"downsampling needs an even {name}, got {size}: each level but the last halves it")
        return self.downsample(x)


class Upsample(nn.Module):
    """Doubles height and width: nearest neighbour, then a convolution. No checkerboard patterns."""

    def __init__(self, in_channels):
        super().__init__()
        conv = nn.Conv2d(in_channels, in_channels, 3, padding=1)
        self.upsample = nn.Sequential(nn.Upsample(scale_factor=2, mode="nearest"), conv)

    def forward(self, x, time_emb=None, y=None):
        return self.upsample(x)


class AttentionBlock(nn.Module):
    """Self-attention over all pixels with one head, added to its input. It costs O((h*w)^2)."""

    def __init__(self, in_channels, norm="gn", num_groups=MAX_GROUPS):
        super().__init__()
        self.in_channels = in_channels
        self.norm = get_norm(norm, in_channels, num_groups)
        self.to_qkv = nn.Conv2d(in_channels, in_channels * 3, 1)
        self.to_out = zero_init(nn.Conv2d(in_channels, in_channels, 1))

    def forward(self, x):
        qkv = norm_act_conv(self.norm, None, x, self.to_qkv).flatten(2).transpose(1, 2)  # (b, h*w, 3c)
        # The fast kernels need contiguous channels: free in channels_last, else one copy.
        q, k, v = qkv.contiguous().unsqueeze(1).chunk(3, dim=-1)  # (b, 1 head, h*w, c)
        out = F.scaled_dot_product_attention(q, k, v)  # softmax(q k^T / sqrt(c)) v
        out = out.squeeze(1).transpose(1, 2).reshape(x.shape)
        return x + self.to_out(out)


class ResidualBlock(nn.Module):
    """Two convolutions with a shortcut, then attention: (b, in, h, w) -> (b, out, h, w).

    Time and class shift the channels between the convolutions. time_emb_dim or num_classes None: no
    such shift. ValueError: a missing time_emb or y.
    """

    def __init__(
        self,
        in_channels,
        out_channels,
        dropout,
        time_emb_dim=None,
        num_classes=None,
        activation=F.relu,
        norm="gn",
        num_groups=MAX_GROUPS,
        use_attention=False,
    ):
        super().__init__()
        self.activation = activation
        self.norm_1 = get_norm(norm, in_channels, num_groups)
        self.conv_1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm_2 = get_norm(norm, out_channels, num_groups)
        self.conv_2 = nn.Sequential(nn.Dropout(dropout), zero_init(nn.Conv2d(out_channels, out_channels, 3, padding=1)))
        self.time_bias = nn.Linear(time_emb_dim, out_channels) if time_emb_dim is not None else None
        self.class_bias = nn.Embedding(num_classes, out_channels) if num_classes is not None else None
        same = in_channels == out_channels
        self.residual_connection = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)
        self.attention = AttentionBlock(out_channels, norm, num_groups) if use_attention else nn.Identity()

    def forward(self, x, time_emb=None, y=None):
        out = norm_act_conv(self.norm_1, self.activation, x, self.conv_1)
        shift = self.shift(time_emb, y)
        if shift is not None:
            out = out + shift[:, :, None, None].to(out.dtype)  # under autocast a class embedding is float32
        dropout, conv = self.conv_2
        out = norm_act_conv(self.norm_2, self.activation, out, conv, dropout)
        return self.attention(out + self.residual_connection(x))

    def shift(self, time_emb, y):
        """The sum of time_bias and class_bias, (b, out_channels); None without both."""
        if self.time_bias is not None and time_emb is None:
            raise SettingError("this block is conditioned on time: pass time_emb")
        if self.class_bias is not None and y is None:
            raise SettingError("this block is conditioned on classes: pass y")
        shift = None
        if self.time_bias is not None:
            shift = self.time_bias(self.activation(time_emb))
        if self.class_bias is not None:
            shift = self.class_bias(y) if shift is None else shift + self.class_bias(y)
        return shift


class UNet(nn.Module):
    """Predicts eps, x_0 or v from x_t, as GaussianDiffusion trains it.

    channel_mults: a factor of base_channels for each level. attention_resolutions: levels, 0 is the
    full size. time_emb_dim None: no input t. num_classes None: no input y. initial_pad: the border
    of zeros around x, in pixels; the output lacks it. activation_checkpointing: the backward pass
    computes activations again, in a third more time and a fraction of the memory.
    """

    def __init__(
        self,
        img_channels,
        base_channels=128,
        channel_mults=(1, 2, 2, 2),
        num_res_blocks=2,
        time_emb_dim=TIME_EMB_DIM,
        time_emb_scale=1.0,
        num_classes=None,
        activation=F.silu,
        dropout=0.1,
        attention_resolutions=(1,),
        norm="gn",
        num_groups=MAX_GROUPS,
        initial_pad=0,
        *,
        activation_checkpointing=False,
    ):
        super().__init__()
        self.activation = activation
        self.initial_pad = initial_pad
        self.num_classes = num_classes
        self.activation_checkpointing = activation_checkpointing
        self.time_mlp = None
        if time_emb_dim is not None:
            self.time_mlp = nn.Sequential(
                PositionalEmbedding(base_channels, time_emb_scale),
                nn.Linear(base_channels, time_emb_dim),
                nn.SiLU(),
                nn.Linear(time_emb_dim, time_emb_dim),
            )
        self.init_conv = nn.Conv2d(img_channels, base_channels, 3, padding=1)
        block = partial(
            ResidualBlock,
            dropout=dropout,
            time_emb_dim=time_emb_dim,
            num_classes=num_classes,
            activation=activation,
            norm=norm,
            num_groups=num_groups,
        )

        widths = [base_channels * mult for mult in channel_mults]
        channels = base_channels
        skips = [channels]  # the channels of the skip connections
        self.downs = nn.ModuleList()
        for level, width in enumerate(widths):
            for _ in range(num_res_blocks):
                self.downs.append(block(channels, width, use_attention=level in attention_resolutions))
                channels = width
                skips.append(channels)
            if level < len(widths) - 1:
                self.downs.append(Downsample(channels))
                skips.append(channels)

        self.mid = nn.ModuleList([block(channels, channels, use_attention=True), block(channels, channels)])

        self.ups = nn.ModuleList()
        for level, width in reversed(list(enumerate(widths))):
            for _ in range(num_res_blocks + 1):
                self.ups.append(block(channels + skips.pop(), width, use_attention=level in attention_resolutions))
                channels = width
            if level > 0:
                self.ups.append(Upsample(channels))

        self.out_norm = get_norm(norm, channels, num_groups)
        self.out_conv = zero_init(nn.Conv2d(channels, img_channels, 3, padding=1))

    def forward(self, x, time=None, y=None):
        """x (b, c, h, w), time (b,) timesteps, y (b,) class ids -> (b, c, h, w)."""
        if self.num_classes is not None and y is None:
            raise SettingError("this network is conditioned on classes: pass y")
        time_emb = self.embed_time(time)
        pad = self.initial_pad
        x = self.init_conv(F.pad(x, (pad,) * 4) if pad else x)
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
        x = norm_act_conv(self.out_norm, self.activation, x, self.out_conv)
        return x[:, :, pad:-pad, pad:-pad] if pad else x

    def embed_time(self, time):
        """(b,) timesteps -> (b, time_emb_dim), or None for a network without time."""
        if self.time_mlp is None:
            return None
        if time is None:
            raise SettingError("this network is conditioned on time: pass time")
        return self.time_mlp(time)

    def run(self, layer, x, time_emb, y):
        """layer(x, time_emb, y), with activation checkpointing where it is on."""
        if self.activation_checkpointing and self.training and torch.is_grad_enabled():
            return checkpoint(layer, x, time_emb, y, use_reentrant=False)
        return layer(x, time_emb, y)
