"""The mathematics of denoising diffusion. Read schedules, unet, samplers, diffusion."""

from .build import from_config, from_weights, load_weights
from .diffusion import LOSS_WEIGHTINGS, LOSSES, PREDICTIONS, GaussianDiffusion
from .samplers import SAMPLERS, SPACINGS, seeded_noise, slerp
from .schedules import SCHEDULES, generate_cosine_schedule, generate_linear_schedule, generate_sigmoid_schedule
from .unet import AttentionBlock, Downsample, PositionalEmbedding, ResidualBlock, UNet, Upsample, get_norm

__all__ = [
    "LOSSES",
    "LOSS_WEIGHTINGS",
    "PREDICTIONS",
    "SAMPLERS",
    "SCHEDULES",
    "SPACINGS",
    "AttentionBlock",
    "Downsample",
    "GaussianDiffusion",
    "PositionalEmbedding",
    "ResidualBlock",
    "UNet",
    "Upsample",
    "from_config",
    "from_weights",
    "generate_cosine_schedule",
    "generate_linear_schedule",
    "generate_sigmoid_schedule",
    "get_norm",
    "load_weights",
    "seeded_noise",
    "slerp",
]
