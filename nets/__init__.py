# ruff: noqa: F401 (what is imported here is the package's interface)
"""The mathematics of denoising diffusion. Read schedules, unet, samplers, sampling, diffusion."""

from .build import from_checkpoint, from_config, from_weights, load_weights
from .condition import CONDITIONS, Condition
from .diffusion import LOSS_WEIGHTINGS, LOSSES, TIMESTEP_SAMPLINGS, GaussianDiffusion
from .samplers import SAMPLERS, SPACINGS, seeded_noise, slerp
from .sampling import PREDICTIONS, SamplingOptions
from .schedules import SCHEDULES, generate_cosine_schedule, generate_linear_schedule, generate_sigmoid_schedule
from .unet import AttentionBlock, Downsample, PositionalEmbedding, ResidualBlock, UNet, Upsample, get_norm
