"""GaussianDiffusion: forward process, loss, EMA and sampling for a network (x_t, t, y)."""

import copy
import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import cpu_fused, sampling
from .condition import Condition
from .ema import ema_weight, tensors_of, update_
from .errors import check_choice
from .samplers import Denoise, Device, Trajectory
from .sampling import PREDICTIONS, SamplingOptions
from .schedules import check_betas, make_betas, schedule_tables

LOSSES = {"l1": F.l1_loss, "l2": F.mse_loss, "huber": F.huber_loss}
# (SNR, gamma) -> weight of the squared error of x_0. None: weight 1 for the error of the output.
LOSS_WEIGHTINGS = {"none": None, "min_snr": np.minimum}  # Hang et al. 2023 ("Min-SNR"), section 3.4
# alpha_bars (T,) float64 -> the probability of less noise at a training timestep, (T,). The density
# is one of lambda, half the log-SNR, whatever the schedule. None: all timesteps alike (Ho et al.
# 2020, algorithm 1).
TIMESTEP_SAMPLINGS = {
    "uniform": None,
    # Proportional to sigmoid(2 - 2 lambda) sigmoid(2 lambda). The squared error of v is that of eps
    # divided by alpha_bar = sigmoid(2 lambda): the loss of v is that of eps with the weight
    # sigmoid(2 - log-SNR) of Kingma & Gao 2023 (arXiv 2303.00848, section 5).
    "middle": lambda alpha_bars: torch.log1p((math.e**2 - 1) * (1 - alpha_bars)) / 2,
    # Standard normal, as the logit of rectified flow's t in Esser et al. 2024 ("SD3", section 3.1).
    "logit_normal": lambda alpha_bars: torch.special.ndtr(-torch.logit(alpha_bars) / 2),
}


Labels = Tensor | None  # class ids (b,); None: no classes, or the null class


def extract(table: Tensor, t: Tensor, x: Tensor) -> Tensor:
    """table (T,), t (b,) -> table[t] as (b, 1, 1, 1), which broadcasts to the images x."""
    return table[t].reshape(-1, *(1,) * (x.ndim - 1))


class GaussianDiffusion(nn.Module):
    """Trains `model(x_t, t, y)` to remove noise from images, and samples with it.

    img_size: (height, width). betas: (T,); None is the linear schedule of 1000 steps. loss_type,
    prediction, loss_weighting, timestep_sampling: names from LOSSES, PREDICTIONS, LOSS_WEIGHTINGS,
    TIMESTEP_SAMPLINGS; else ValueError.
    null_class: the class id for "no class". ema_start, ema_update_rate: see update_ema.
    condition: None, or what the model is conditioned on, as model(x_t, t, y, cond).

    The state dict holds the network, its EMA and the float32 tables of the schedule. Sampling
    computes float64 tables from these float32 betas, so a loaded file gives the same images.
    """

    def __init__(
        self,
        model: nn.Module,
        img_size: Sequence[int],
        img_channels: int,
        num_classes: int | None = None,
        betas: Sequence[float] | None = None,
        loss_type: str = "l2",
        ema_decay: float = 0.9999,
        ema_start: int = 2000,
        ema_update_rate: int = 1,
        *,
        prediction: str = "eps",
        loss_weighting: str = "none",
        min_snr_gamma: float = 5.0,
        timestep_sampling: str = "uniform",
        ema_warmup: bool = False,
        null_class: int | None = None,
        condition: Condition | None = None,
    ):
        super().__init__()
        check_choice("loss_type", loss_type, LOSSES)
        check_choice("prediction", prediction, PREDICTIONS)
        check_choice("loss_weighting", loss_weighting, LOSS_WEIGHTINGS)
        check_choice("timestep_sampling", timestep_sampling, TIMESTEP_SAMPLINGS)
        self.img_size, self.img_channels = tuple(img_size), img_channels
        self.num_classes, self.null_class, self.condition = num_classes, null_class, condition or Condition()
        self.prediction, self.loss_type = prediction, loss_type
        self.loss_weighting, self.min_snr_gamma = loss_weighting, min_snr_gamma
        self.timestep_sampling = timestep_sampling
        self.ema_decay, self.ema_warmup = ema_decay, ema_warmup
        self.ema_start, self.ema_update_rate = ema_start, ema_update_rate
        # Here, where every script's network comes by; the EMA is a copy and has the fast path too.
        self.model = cpu_fused.install(model)
        self.ema_model = copy.deepcopy(model).requires_grad_(False).eval()
        self.register_buffer("ema_counter", torch.zeros((), dtype=torch.int64), persistent=False)
        betas = make_betas() if betas is None else check_betas(betas)
        self.num_timesteps = len(betas)
        for name, table in schedule_tables(betas).items():
            self.register_buffer(name, torch.tensor(table, dtype=torch.float32))
        self.register_buffer("loss_weight", torch.ones(len(betas)), persistent=False)
        self.register_buffer("timestep_edges", None, persistent=False)
        self.derive_tables()

    def derive_tables(self) -> None:
        """What a state dict lacks: float64 alpha_bars, loss weights and edges of the timesteps."""
        alpha_bars = np.cumprod(1 - self.betas.cpu().double().numpy())  # Apple GPUs have no float64
        self.alpha_bars = alpha_bars.tolist()
        weighting, weight = LOSS_WEIGHTINGS[self.loss_weighting], np.ones_like(alpha_bars)
        if weighting:  # error of x_0 = error of the output * d x_0 / d output
            a, s = np.sqrt(alpha_bars), np.sqrt(1 - alpha_bars)
            to_x_0 = PREDICTIONS[self.prediction].to_x_0
            weight *= weighting(a**2 / s**2, self.min_snr_gamma) * (to_x_0(1, 0, a, s) - to_x_0(0, 0, a, s)) ** 2
        self.loss_weight = torch.tensor(weight, dtype=torch.float32, device=self.betas.device)
        if distribution := TIMESTEP_SAMPLINGS[self.timestep_sampling]:
            less_noise = distribution(torch.from_numpy(alpha_bars))
            self.timestep_edges = (less_noise[1:] + less_noise[:-1]).div(2).float().to(self.betas.device)

    def _load_from_state_dict(self, *args, **kwargs):
        super()._load_from_state_dict(*args, **kwargs)
        self.derive_tables()  # the loaded betas may be other ones
        self.__dict__.pop("ema_tensors", None)

    def _apply(self, fn, recurse=True):
        """Keeps the dtype of the tables: in bf16 they would add no noise at the first timesteps."""
        tables = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, table in tables.items():
            self._buffers[name] = table.to(self._buffers[name].device)
        self.__dict__.pop("ema_tensors", None)  # some devices' parameters are new objects
        return self

    def train(self, mode: bool = True) -> "GaussianDiffusion":
        """Sets the mode of the network. The EMA always stays in eval mode."""
        super().train(mode)
        self.ema_model.eval()
        return self

    def network(self, use_ema: bool) -> nn.Module:
        return self.ema_model if use_ema else self.model

    def forward(self, x: Tensor, y: Labels = None, *, t: Tensor | None = None, **settings: Any) -> Tensor:
        """get_losses of images x (b, c, h, w) in [-1, 1] at sampled timesteps, or at `t` (b,)."""
        if (size := tuple(x.shape[2:])) != self.img_size:
            raise ValueError(f"images are {size} (height, width), this model was built for {self.img_size}")
        if t is None:
            t = self.sample_timesteps(len(x))
        return self.get_losses(x, t, y, **settings)

    def sample_timesteps(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """Timesteps (count,) to train at, on the device. generator: None is PyTorch's own.

        By inversion: a timestep has the numbers between its two edges, of those from 0 to 1.
        """
        on = {"generator": generator, "device": self.betas.device}
        if self.timestep_edges is None:
            return torch.randint(0, self.num_timesteps, (count,), **on)
        return torch.bucketize(torch.rand(count, **on), self.timestep_edges, right=True)

    def get_losses(
        self, x: Tensor, t: Tensor, y: Labels, *, noise=None, cond=None, use_ema=False, reduction="mean"
    ) -> Tensor:
        """The loss at timesteps t (b,) in float32: a scalar, or (b,) for reduction "none".

        Ho et al. 2020, equation 14, for eps, l2, no weighting. noise None: new. cond: (b, k, h, w).
        """
        noise = torch.randn_like(x) if noise is None else noise
        output = self.network(use_ema)(self.perturb_x(x, t, noise), t, y, *([] if cond is None else [cond]))
        target = PREDICTIONS[self.prediction].target(x, noise, *self.signal_and_noise(t, x))
        errors = LOSSES[self.loss_type](output.float(), target.float(), reduction="none")
        losses = errors.flatten(1).mean(1) * self.loss_weight[t]
        return losses if reduction == "none" else losses.mean()

    def perturb_x(self, x: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """A sample x_t of q(x_t | x_0) (Ho et al. 2020, equation 4)."""
        a, s = self.signal_and_noise(t, x)
        return a * x + s * noise

    def signal_and_noise(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """a = sqrt(alpha_bar_t) and s = sqrt(1 - alpha_bar_t) for t (b,), each (b, 1, 1, 1)."""
        return extract(self.sqrt_alphas_cumprod, t, x), extract(self.sqrt_one_minus_alphas_cumprod, t, x)

    @property
    def ema_step(self) -> int:
        """The number of counted optimizer steps. Reading waits for the device, setting does not."""
        return int(self.ema_counter)

    @ema_step.setter
    def ema_step(self, step: int) -> None:
        self.ema_counter.fill_(step)

    @cached_property
    def ema_tensors(self):
        return tensors_of(self.ema_model), tensors_of(self.model)

    @torch.no_grad()
    def update_ema(self, skip: Tensor | None = None) -> None:
        """One EMA update, after a step of the optimizer. Before step ema_start the EMA is a copy.

        skip: a 0-dim float tensor on the device; 1 keeps EMA and counter, as the optimizer skipped
        this step. Only every ema_update_rate-th step changes the EMA. Nothing here waits.
        """
        taken = 1 - skip.to(torch.int64) if skip is not None else torch.ones_like(self.ema_counter)
        self.ema_counter += taken
        weight = ema_weight(self.ema_counter - self.ema_start, self.ema_decay, self.ema_warmup)
        update_(*self.ema_tensors, weight * (taken * (self.ema_counter % self.ema_update_rate == 0)))

    @torch.no_grad()
    def remove_noise(self, x: Tensor, t: Tensor, y: Labels, use_ema: bool = True) -> Tensor:
        """The mean of a reverse step from x_t, t (b,), unclipped (Ho et al. 2020, equation 11)."""
        output = self.network(use_ema)(x, t, y).float()
        a, s = self.signal_and_noise(t, x)
        eps = (x - a * PREDICTIONS[self.prediction].to_x_0(output, x, a, s)) / s
        return (x - extract(self.remove_noise_coeff, t, x) * eps) * extract(self.reciprocal_sqrt_alphas, t, x)

    def denoiser(self, y: Labels = None, use_ema: bool = True, **settings: Any) -> Denoise:
        """denoise(x_t, t: int) -> x_0, with the network as it is. settings: of SamplingOptions."""
        return sampling.make_denoiser(self, y, SamplingOptions().override(use_ema=use_ema, **settings))

    def sample(self, batch_size: int, device: Device, y: Labels = None, use_ema=True, **settings: Any) -> Tensor:
        """New images (batch_size, c, h, w), float32 in about [-1, 1]. settings: of sample_steps."""
        for x, _ in self.sample_steps(batch_size, device, y, use_ema=use_ema, **settings):  # noqa: B007 (the last x)
            pass
        return x

    def sample_steps(
        self, batch_size: int, device: Device, y: Labels = None, *, seeds=None, noise=None, **settings: Any
    ) -> Trajectory:
        """sampling.sample_steps. settings: `options`; fields of it and solver options by name."""
        options = settings.pop("options", SamplingOptions()).override(**settings)
        return sampling.sample_steps(self, batch_size, device, y, options, seeds, noise)
