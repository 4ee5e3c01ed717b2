"""GaussianDiffusion: forward process, loss, EMA and sampling for a network (x_t, t, y)."""

import copy
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from . import guidance, samplers
from .ema import ema_weight, update_
from .errors import SettingError, check_choice
from .schedules import check_betas, make_betas, schedule_tables

LOSSES = {"l1": F.l1_loss, "l2": F.mse_loss, "huber": F.huber_loss}


class Prediction(NamedTuple):
    """The meaning of the network's output, with x_t = a x_0 + s eps (`signal_and_noise`)."""

    target: Callable  # (x_0, eps, a, s) -> the output that the loss asks for
    to_x_0: Callable  # (output, x_t, a, s) -> x_0; linear in the output


PREDICTIONS = {
    "eps": Prediction(lambda x_0, eps, a, s: eps, lambda output, x_t, a, s: (x_t - s * output) / a),
    "x0": Prediction(lambda x_0, eps, a, s: x_0, lambda output, x_t, a, s: output),
    # Salimans & Ho 2022, section 4.
    "v": Prediction(lambda x_0, eps, a, s: a * eps - s * x_0, lambda output, x_t, a, s: a * x_t - s * output),
}

# (SNR, gamma) -> weight of the squared error of x_0. None: weight 1 for the error of the output.
LOSS_WEIGHTINGS = {"none": None, "min_snr": np.minimum}  # Hang et al. 2023 ("Min-SNR"), section 3.4


def extract(table, t, x):
    """table (T,), t (b,) -> table[t] as (b, 1, 1, 1), which broadcasts to the images x."""
    return table[t].reshape(-1, *(1,) * (x.ndim - 1))


class GaussianDiffusion(nn.Module):
    """Trains `model(x_t, t, y)` to remove noise from images, and samples with it.

    img_size: (height, width). betas: (T,); None is the linear schedule of 1000 steps. loss_type,
    prediction, loss_weighting: names from LOSSES, PREDICTIONS, LOSS_WEIGHTINGS; else ValueError.
    null_class: the class id for "no class". ema_start, ema_update_rate: see update_ema.

    The state dict holds the network, its EMA and the float32 tables of the schedule. Sampling
    computes float64 tables from these float32 betas, so a loaded file gives the same images.
    """

    def __init__(
        self,
        model,
        img_size,
        img_channels,
        num_classes=None,
        betas=None,
        loss_type="l2",
        ema_decay=0.9999,
        ema_start=2000,
        ema_update_rate=1,
        *,
        prediction="eps",
        loss_weighting="none",
        min_snr_gamma=5.0,
        ema_warmup=False,
        null_class=None,
    ):
        super().__init__()
        check_choice("loss_type", loss_type, LOSSES)
        check_choice("prediction", prediction, PREDICTIONS)
        check_choice("loss_weighting", loss_weighting, LOSS_WEIGHTINGS)
        self.img_size = tuple(img_size)
        self.img_channels = img_channels
        self.num_classes = num_classes
        self.null_class = null_class
        self.loss_type = loss_type
        self.prediction = prediction
        self.loss_weighting = loss_weighting
        self.min_snr_gamma = min_snr_gamma
        self.ema_decay = ema_decay
        self.ema_start = ema_start
        self.ema_update_rate = ema_update_rate
        self.ema_warmup = ema_warmup

        self.model = model
        self.ema_model = copy.deepcopy(model).requires_grad_(False).eval()
        self.register_buffer("ema_counter", torch.zeros((), dtype=torch.int64), persistent=False)

        betas = make_betas() if betas is None else check_betas(betas)
        self.num_timesteps = len(betas)
        for name, table in schedule_tables(betas).items():
            self.register_buffer(name, torch.tensor(table, dtype=torch.float32))
        self.register_buffer("loss_weight", torch.ones(len(betas)), persistent=False)
        self.derive_tables()

    # The tables of the schedule

    def derive_tables(self):
        """The tables that a state dict lacks: float64 alpha_bars and a loss weight per timestep."""
        alpha_bars = np.cumprod(1 - self.betas.double().cpu().numpy())
        self.alpha_bars = alpha_bars.tolist()
        weighting = LOSS_WEIGHTINGS[self.loss_weighting]
        weight = np.ones_like(alpha_bars)
        if weighting:  # error of x_0 = error of the output * d x_0 / d output
            a, s = np.sqrt(alpha_bars), np.sqrt(1 - alpha_bars)
            to_x_0 = PREDICTIONS[self.prediction].to_x_0
            weight *= weighting(a**2 / s**2, self.min_snr_gamma) * (to_x_0(1, 0, a, s) - to_x_0(0, 0, a, s)) ** 2
        self.loss_weight = torch.tensor(weight, dtype=torch.float32, device=self.betas.device)

    def _load_from_state_dict(self, *args, **kwargs):
        """Derives the tables again: the loaded betas may be other ones."""
        super()._load_from_state_dict(*args, **kwargs)
        self.derive_tables()

    def _apply(self, fn, recurse=True):
        """Keeps the dtype of the tables: in bf16 they would add no noise at the first timesteps."""
        tables = {name: buffer for name, buffer in self.named_buffers(recurse=False) if buffer.is_floating_point()}
        super()._apply(fn, recurse)
        for name, table in tables.items():
            if self._buffers[name].dtype != table.dtype:
                self._buffers[name] = table.to(self._buffers[name].device)
        return self

    def train(self, mode=True):
        """Sets the mode of the network. The EMA always stays in eval mode."""
        super().train(mode)
        self.ema_model.eval()
        return self

    # Training

    def forward(self, x, y=None, *, t=None, noise=None, use_ema=False, reduction="mean"):
        """The loss of images x (b, c, h, w) in [-1, 1] at random timesteps, or at `t` (b,).

        ValueError for images of another size.
        """
        if (size := tuple(x.shape[2:])) != self.img_size:
            raise SettingError(f"images are {size} (height, width), this model was built for {self.img_size}")
        if t is None:
            t = torch.randint(0, self.num_timesteps, (len(x),), device=x.device)
        return self.get_losses(x, t, y, noise=noise, use_ema=use_ema, reduction=reduction)

    def get_losses(self, x, t, y, *, noise=None, use_ema=False, reduction="mean"):
        """The loss at timesteps t (b,) in float32: a scalar, or (b,) for reduction "none".

        Ho et al. 2020, equation 14, for eps, l2 and no weighting. noise None: new noise.
        """
        noise = torch.randn_like(x) if noise is None else noise
        output = (self.ema_model if use_ema else self.model)(self.perturb_x(x, t, noise), t, y)
        target = PREDICTIONS[self.prediction].target(x, noise, *self.signal_and_noise(t, x))
        errors = LOSSES[self.loss_type](output.float(), target.float(), reduction="none")
        losses = errors.flatten(1).mean(1) * self.loss_weight[t]
        return losses if reduction == "none" else losses.mean()

    def perturb_x(self, x, t, noise):
        """A sample x_t of q(x_t | x_0) (Ho et al. 2020, equation 4)."""
        a, s = self.signal_and_noise(t, x)
        return a * x + s * noise

    def signal_and_noise(self, t, x):
        """a = sqrt(alpha_bar_t) and s = sqrt(1 - alpha_bar_t) for t (b,), each (b, 1, 1, 1)."""
        return extract(self.sqrt_alphas_cumprod, t, x), extract(self.sqrt_one_minus_alphas_cumprod, t, x)

    # The EMA of the weights

    @property
    def ema_step(self):
        """The number of counted optimizer steps. Reading waits for the device, setting does not."""
        return int(self.ema_counter)

    @ema_step.setter
    def ema_step(self, step):
        self.ema_counter.fill_(step)

    @torch.no_grad()
    def update_ema(self, skip=None):
        """One EMA update, after a step of the optimizer. Before step ema_start the EMA is a copy.

        skip: None, or a 0-dim float tensor on the device. 1 keeps EMA and counter: the optimizer
        skipped this step. Only every ema_update_rate-th step changes the EMA. No operation here
        waits for the device.
        """
        taken = 1 - skip.to(torch.int64) if skip is not None else torch.ones_like(self.ema_counter)
        self.ema_counter += taken
        weight = ema_weight(self.ema_counter - self.ema_start, self.ema_decay, self.ema_warmup)
        update_(self.ema_model, self.model, weight * (taken * (self.ema_counter % self.ema_update_rate == 0)))

    # Sampling

    @torch.no_grad()
    def remove_noise(self, x, t, y, use_ema=True):
        """The mean of a reverse step from x_t, t (b,), unclipped (Ho et al. 2020, equation 11)."""
        output = (self.ema_model if use_ema else self.model)(x, t, y).float()
        a, s = self.signal_and_noise(t, x)
        eps = (x - a * PREDICTIONS[self.prediction].to_x_0(output, x, a, s)) / s
        return (x - extract(self.remove_noise_coeff, t, x) * eps) * extract(self.reciprocal_sqrt_alphas, t, x)

    def denoiser(self, y=None, use_ema=True, guidance_scale=1.0, clip=True, guidance_interval=None, guiding_model=None):
        """The function denoise(x_t, t: int) -> x_0 (float32) that the solvers call.

        y: class ids (b,). None is the null class, where the network has classes.
        guidance_scale: the scale of guidance.lead_away. 1 is the conditional network without
        guidance. The null class is predicted in the same call, on twice the batch.
        guidance_interval: guidance acts where lambda is between these two, None: at each step
        (Kynkäänniemi et al. 2024, whose interval is of sigma: lambda = -log sigma).
        guiding_model: a weaker GaussianDiffusion in the place of the null class (Karras et al.
        2024, "autoguidance"). It needs no classes.
        clip: x_0 to [-1, 1]. Without it the first of 1000 cosine steps amplifies an error of eps
        almost 32 times, and a larger step more.
        ValueError: guidance without a null class or without y, a missing y, an interval from high
        to low, or another kind of guiding model.
        """
        network = self.ema_model if use_ema else self.model
        to_x_0 = PREDICTIONS[self.prediction].to_x_0
        guidance.check_weaker_model(self, guidance_scale, guiding_model)
        by_class = guidance_scale != 1 and guiding_model is None
        guide = guiding_model and guiding_model.denoiser(y, use_ema, clip=False)
        in_interval = guidance.within(guidance_interval)
        labels = {doubled: self.labels(y, doubled) for doubled in {False, by_class}}
        ts = torch.arange(self.num_timesteps, device=self.betas.device)  # ts[t:t+1] is a view, not a copy to the device

        @torch.no_grad()
        def denoise(x, t):
            guided = guidance_scale != 1 and in_interval(samplers.half_log_snr(self.alpha_bars[t]))
            doubled = guided and by_class
            was_training = network.training
            if was_training:  # turns dropout off
                network.eval()
            batch = torch.cat((x, x)) if doubled else x
            class_ids = None if labels[doubled] is None else labels[doubled].expand(len(batch))
            output = network(batch, ts[t : t + 1].expand(len(batch)), class_ids)
            if was_training:
                network.train()
            output = output.float()
            if doubled:
                conditional, null = output.chunk(2)
                output = guidance.lead_away(conditional, null, guidance_scale)
            x_0 = to_x_0(output, x, self.alpha_bars[t] ** 0.5, (1 - self.alpha_bars[t]) ** 0.5)
            if guided and guide:
                x_0 = guidance.lead_away(x_0, guide(x, t), guidance_scale)
            return x_0.clamp(-1, 1) if clip else x_0

        return denoise

    def labels(self, y, guided):
        """The class ids of one network call: y, or (y, null classes) for guidance.

        y None: one null class for the whole batch, or None for a network without classes.
        """
        if self.num_classes is None:
            return None
        if y is None and (guided or self.null_class is None):
            raise SettingError("guidance, and a network without a null class, need a class for each image: pass y")
        y = torch.as_tensor([self.null_class] if y is None else y, device=self.betas.device)
        return torch.cat((y, torch.full_like(y, self.null_class))) if guided else y

    def sample(self, batch_size, device, y=None, use_ema=True, **settings):
        """New images (batch_size, c, h, w), float32 in about [-1, 1]. settings: of sample_steps."""
        for x, _ in self.sample_steps(batch_size, device, y, use_ema, **settings):  # noqa: B007 (returns the last x)
            pass
        return x

    @torch.no_grad()
    def sample_steps(
        self,
        batch_size,
        device,
        y=None,
        use_ema=True,
        *,
        sampler="ddpm",
        steps=None,
        spacing=None,
        clip=True,
        seeds=None,
        guidance_scale=1.0,
        guidance_interval=None,
        guiding_model=None,
        noise=None,
        init=None,
        strength=1.0,
        known=None,
        mask=None,
        **sampler_options,
    ):
        """Yields (x, x_0) after each step of the solver, each (batch_size, c, h, w).

        sampler, spacing: names from samplers.SAMPLERS and SPACINGS. steps: None is all timesteps
        for ddpm and 25 for the others. seeds: one integer per image, which determines its noise;
        None is torch's global generator. noise: an endless iterator of (batch_size, c, h, w) that
        replaces seeds; its first item is x_T. clip, guidance_scale, guidance_interval,
        guiding_model: of `denoiser`.
        init, strength: start from the images `init`, noised to timestep strength * T, strength in
        (0, 1] (Meng et al. 2022, "SDEdit"). known, mask: keep the images `known` where mask is 0,
        sample where mask is 1 (ddpm only). Pixels are in [-1, 1].
        sampler_options go to the solver. ValueError: an unknown name, option, shape or range.
        """
        for name, given in (("y", y), ("seeds", seeds)):
            if given is not None and len(given) != batch_size:
                raise SettingError(f"{name} has {len(given)} entries for a batch of {batch_size}")
        check_choice("sampler", sampler, samplers.SAMPLERS)
        solver = samplers.SAMPLERS[sampler]
        if known is not None or mask is not None:
            if sampler != "ddpm" or known is None or mask is None:
                raise SettingError(
                    "inpainting needs the sampler ddpm, known (the images) and mask (1 where they change)"
                )
            solver = samplers.repaint
            sampler_options |= {"known": known.to(device, torch.float32), "mask": mask.to(device, torch.float32)}
        samplers.check_options(sampler, solver, sampler_options)
        plan = self.plan(sampler, steps, spacing, strength if init is not None else 1.0)

        shape = (self.img_channels, *self.img_size)
        if noise is None and seeds is None:
            noise = samplers.global_noise(batch_size, shape, device)
        elif noise is None:
            noise = samplers.seeded_noise(seeds, shape, device)
        x = self.check_images(next(noise), batch_size, device, "noise")
        if init is not None:
            x = samplers.diffuse(self.check_images(init, batch_size, device, "init"), plan[0].alpha_bar_t, iter([x]))
        guidance.check_interval(guidance_interval, plan)
        denoise = self.denoiser(y, use_ema, guidance_scale, clip, guidance_interval, guiding_model)
        yield from solver(denoise, x, plan, noise, **sampler_options)

    def plan(self, sampler, steps=None, spacing=None, strength=1.0):
        """The steps of a solver, a list of samplers.Step. None: the default of the sampler."""
        if not 0 < strength <= 1:
            raise SettingError(f"strength must be above 0 and at most 1, not {strength}")
        start = max(int(strength * self.num_timesteps), 1) - 1
        if steps is None:
            steps = start + 1 if sampler == "ddpm" else min(samplers.DEFAULT_STEPS, start + 1)
        chosen = samplers.timesteps(self.alpha_bars, steps, spacing or samplers.DEFAULT_SPACING[sampler], start)
        return samplers.solver_steps(self.alpha_bars, chosen)

    def check_images(self, x, batch_size, device, name):
        """x as float32 on the device. ValueError unless it is (batch_size, c, h, w)."""
        shape = (batch_size, self.img_channels, *self.img_size)
        if tuple(x.shape) != shape:
            raise SettingError(f"{name} must have the shape {shape}, not {tuple(x.shape)}")
        return x.to(device, torch.float32)
