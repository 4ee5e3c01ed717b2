"""GaussianDiffusion: the forward process, the loss, the moving average of the weights, and sampling, around any network (x_t, t, y)."""

import copy

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from nets import samplers

from .schedules import check_betas, make_betas, schedule_tables

LOSSES = {"l1": F.l1_loss, "l2": F.mse_loss, "huber": F.huber_loss}
PREDICTIONS = ("eps", "x0", "v")
# Weights of the loss from the signal-to-noise ratio. Hang et al. 2023 ("Min-SNR"), section 3.4: min(SNR, gamma) on the error of
# x_0, restated for what the network predicts.
LOSS_WEIGHTINGS = {
    "none": lambda snr, gamma, prediction: np.ones_like(snr),
    "min_snr": lambda snr, gamma, prediction: np.minimum(snr, gamma) / {"eps": snr, "x0": 1.0, "v": snr + 1}[prediction],
}


def check_choice(name, value, known):
    """ValueError that lists the known values unless `value` is one of them."""
    if value not in known:
        raise ValueError(f"unknown {name} {value!r}; known: {', '.join(map(str, known))}")


def extract(table, t, x):
    """table (T,), t (b,) -> table[t] as (b, 1, 1, 1), to multiply the images x with."""
    return table[t].reshape(-1, *(1,) * (x.ndim - 1))


class GaussianDiffusion(nn.Module):
    """Trains `model(x_t, t, y)` to undo noise, and samples from it.

    img_size: (height, width). betas: (T,), the linear schedule of 1000 steps unless given. prediction: what the network's output
    is: "eps" (the noise), "x0" (the image) or "v" (Salimans & Ho 2022). null_class: the label that stands for "no class".
    ema_start, ema_update_rate: see update_ema. ValueError for an unknown name among loss_type, prediction, loss_weighting.

    The state dict holds the network, its average and the float32 tables of the schedule. Sampling uses float64 tables made of
    those float32 betas, so that a loaded file samples as the run that wrote it.
    """

    def __init__(self, model, img_size, img_channels, num_classes=None, betas=None, loss_type="l2", ema_decay=0.9999, ema_start=2000,
                 ema_update_rate=1, *, prediction="eps", loss_weighting="none", min_snr_gamma=5.0, ema_warmup=False, null_class=None):
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

        betas = make_betas("linear", 1000) if betas is None else check_betas(betas)
        self.num_timesteps = len(betas)
        for name, table in schedule_tables(betas).items():
            self.register_buffer(name, torch.tensor(table, dtype=torch.float32))
        self.register_buffer("loss_weight", torch.ones(len(betas)), persistent=False)
        self.derive_tables()

    # The schedule's tables

    def derive_tables(self):
        """What is made of the betas but not stored: float64 alpha_bars as Python floats, and the weight of each timestep's loss."""
        alpha_bars = np.cumprod(1 - self.betas.double().cpu().numpy())
        self.alpha_bars = alpha_bars.tolist()
        snr = alpha_bars / (1 - alpha_bars)
        weight = LOSS_WEIGHTINGS[self.loss_weighting](snr, self.min_snr_gamma, self.prediction)
        self.loss_weight = torch.tensor(weight, dtype=torch.float32, device=self.betas.device)

    def _load_from_state_dict(self, *args, **kwargs):
        """Other betas may have come with the file: the tables follow them."""
        super()._load_from_state_dict(*args, **kwargs)
        self.derive_tables()

    def _apply(self, fn, recurse=True):
        """Devices change, the tables' precision does not: in bf16 the first timesteps would get no noise at all."""
        tables = {name: buffer for name, buffer in self.named_buffers(recurse=False) if buffer.is_floating_point()}
        super()._apply(fn, recurse)
        for name, table in tables.items():
            if self._buffers[name].dtype != table.dtype:
                self._buffers[name] = table.to(self._buffers[name].device)
        return self

    def train(self, mode=True):
        """Training mode for the network; its average is only ever sampled from and stays in eval mode."""
        super().train(mode)
        self.ema_model.eval()
        return self

    # Training

    def forward(self, x, y=None, *, t=None, noise=None, use_ema=False, reduction="mean"):
        """The loss of images x (b, c, h, w) in [-1, 1] at random timesteps, or at `t` (b,). ValueError for images of another size."""
        if tuple(x.shape[2:]) != self.img_size:
            raise ValueError(f"images are {tuple(x.shape[2:])} (height, width), this model was built for {self.img_size}")
        if t is None:
            t = torch.randint(0, self.num_timesteps, (len(x),), device=x.device)
        return self.get_losses(x, t, y, noise=noise, use_ema=use_ema, reduction=reduction)

    def get_losses(self, x, t, y, *, noise=None, use_ema=False, reduction="mean"):
        """The error of the network at timesteps t (b,), in float32: the batch's mean, or with reduction "none" (b,), one an image.

        Ho et al. 2020, equation 14, for prediction eps, l2, no weighting. Drawn noise is from torch's global generator.
        """
        noise = torch.randn_like(x) if noise is None else noise
        output = (self.ema_model if use_ema else self.model)(self.perturb_x(x, t, noise), t, y)
        errors = LOSSES[self.loss_type](output.float(), self.target(x, t, noise).float(), reduction="none")
        losses = errors.flatten(1).mean(1) * self.loss_weight[t]
        return losses if reduction == "none" else losses.mean()

    def perturb_x(self, x, t, noise):
        """x_t, a draw from q(x_t | x_0) (Ho et al. 2020, equation 4)."""
        return extract(self.sqrt_alphas_cumprod, t, x) * x + extract(self.sqrt_one_minus_alphas_cumprod, t, x) * noise

    def target(self, x, t, noise):
        """What the network should answer; v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x_0 (Salimans & Ho 2022, section 4)."""
        if self.prediction == "eps":
            return noise
        if self.prediction == "x0":
            return x
        return extract(self.sqrt_alphas_cumprod, t, x) * noise - extract(self.sqrt_one_minus_alphas_cumprod, t, x) * x

    # The moving average of the weights

    @property
    def ema_step(self):
        """How many updates the average has seen. Reading it waits for the device; setting it does not."""
        return int(self.ema_counter)

    @ema_step.setter
    def ema_step(self, step):
        self.ema_counter.fill_(step)

    @torch.no_grad()
    def update_ema(self, skip=None):
        """One step of the average, after one of the optimizer. Before step `ema_start` it is a copy of the network.

        skip: None, or a 0-dim float tensor on the device; 1 leaves average and counter alone, for a step that the optimizer left
        out. Every `ema_update_rate`-th step counts. Nothing here waits for the device: the counter and the weight live on it.
        """
        taken = 1 - skip.to(torch.int64) if skip is not None else torch.ones_like(self.ema_counter)
        self.ema_counter += taken
        weight = self.ema_weight() * (taken * (self.ema_counter % self.ema_update_rate == 0))
        blend_(list(self.ema_model.parameters()), [p.detach() for p in self.model.parameters()], weight)
        for average, buffer in zip(self.ema_model.buffers(), self.model.buffers()):  # batch norm's statistics are copied
            average.copy_(torch.where(weight > 0, buffer, average))

    def ema_weight(self):
        """How much of the network goes into the average at this step: a 0-dim float32 tensor on the device."""
        n = self.ema_counter - self.ema_start
        decay = torch.full_like(self.ema_counter, self.ema_decay, dtype=torch.float32)
        if self.ema_warmup:  # an average of few steps must not hang on to the first of them
            decay = torch.minimum(decay, (1 + n) / (10 + n))
        return torch.where(n < 0, 1.0, 1 - decay)

    # Sampling

    @torch.no_grad()
    def remove_noise(self, x, t, y, use_ema=True):
        """The mean of one reverse step from x_t, t (b,) (Ho et al. 2020, equation 11). It never clips x_0; `sample` does."""
        output = (self.ema_model if use_ema else self.model)(x, t, y).float()
        alpha_bar_root, noise_root = extract(self.sqrt_alphas_cumprod, t, x), extract(self.sqrt_one_minus_alphas_cumprod, t, x)
        if self.prediction == "x0":
            output = (x - alpha_bar_root * output) / noise_root
        elif self.prediction == "v":
            output = alpha_bar_root * output + noise_root * x
        return (x - extract(self.remove_noise_coeff, t, x) * output) * extract(self.reciprocal_sqrt_alphas, t, x)

    def to_x_0(self, output, x, t):
        """The image that the network's output stands for, in float32, at one timestep t (a Python int)."""
        a, s = self.alpha_bars[t] ** 0.5, (1 - self.alpha_bars[t]) ** 0.5
        output = output.float()
        if self.prediction == "eps":
            return (x - s * output) / a
        return output if self.prediction == "x0" else a * x - s * output

    def denoiser(self, y=None, use_ema=True, guidance_scale=1.0, clip=True):
        """The function denoise(x_t, t: int) -> x_0 (float32) that the solvers see.

        y: class ids (b,), or None: the null class, where the network has classes. guidance_scale s: null + s (class - null)
        (Ho & Salimans 2022, equation 6 with s = 1 + w), both in one call of the network on twice the batch; 1 is the plain
        conditional network. clip: x_0 to [-1, 1], without which the first steps amplify the network's error up to 31 times.
        ValueError: guidance without a null class or without y, or no y for a network that needs one.
        """
        network = self.ema_model if use_ema else self.model
        self.check_guidance(guidance_scale)
        guided = guidance_scale != 1
        labels = self.labels(y, guided)
        ts = torch.arange(self.num_timesteps, device=self.betas.device)  # ts[t:t+1] is a view: no number travels to the device

        @torch.no_grad()
        def denoise(x, t):
            was_training = network.training
            if was_training:  # dropout would draw a different network at every step
                network.eval()
            batch = torch.cat((x, x)) if guided else x
            output = network(batch, ts[t : t + 1].expand(len(batch)), None if labels is None else labels.expand(len(batch)))
            if was_training:
                network.train()
            if guided:
                conditional, null = output.float().chunk(2)
                output = null + guidance_scale * (conditional - null)
            x_0 = self.to_x_0(output, x, t)
            return x_0.clamp(-1, 1) if clip else x_0

        return denoise

    def check_guidance(self, guidance_scale):
        """ValueError for guidance, a scale other than 1, without a null class."""
        if guidance_scale != 1 and self.null_class is None:
            raise ValueError(f"guidance_scale {guidance_scale:g} needs a model with a null class: "
                             "train with --class_conditional True and label_dropout above 0")

    def labels(self, y, guided):
        """The class ids of one network call: y, twice the batch for guidance, or one null class for all; None without classes."""
        device = self.betas.device
        if guided and y is None:
            raise ValueError("guidance needs classes to guide to: pass y")
        if self.num_classes is None:
            return None
        if y is None and self.null_class is None:
            raise ValueError(f"this network is conditioned on {self.num_classes} classes and has no null class: pass y")
        if y is None:
            return torch.tensor([self.null_class], device=device)
        y = torch.as_tensor(y, device=device)
        return torch.cat((y, torch.full_like(y, self.null_class))) if guided else y

    def sample(self, batch_size, device, y=None, use_ema=True, **settings):
        """New images, (batch_size, c, h, w) float32 in about [-1, 1]. The settings are those of `sample_steps`."""
        for x, _ in self.sample_steps(batch_size, device, y, use_ema, **settings):  # noqa: B007 (only the last x is wanted)
            pass
        return x

    @torch.no_grad()
    def sample_steps(self, batch_size, device, y=None, use_ema=True, *, sampler="ddpm", steps=None, spacing=None, clip=True, seeds=None,
                     guidance_scale=1.0, noise=None, init=None, strength=1.0, known=None, mask=None, **sampler_options):
        """The generator behind `sample`: (x, x_0), both (batch_size, c, h, w), after each step of the solver.

        sampler, spacing: names from samplers.SAMPLERS and SPACINGS. steps: None is all timesteps for ddpm, 25 for the others.
        seeds: one integer an image, which alone decides its noise; None draws from torch's global generator.
        noise: an endless iterator of (batch_size, c, h, w) in place of the seeds'; its first is x_T.
        init, strength: start from these images instead, with noise up to the share `strength`, in (0, 1], of the timesteps (Meng et
        al. 2022, "SDEdit"). known, mask: keep the images `known` where mask is 0 and draw where it is 1 (ddpm only). Pixels are in
        [-1, 1]. Further options go to the solver. ValueError for what does not fit.
        """
        for name, given in (("y", y), ("seeds", seeds)):
            if given is not None and len(given) != batch_size:
                raise ValueError(f"{name} has {len(given)} entries for a batch of {batch_size}")
        solver = samplers.find_sampler(sampler)
        if known is not None or mask is not None:
            solver, sampler_options = self.inpainter(sampler, known, mask, device, sampler_options)
        samplers.check_options(sampler, solver, sampler_options)
        plan = self.plan(sampler, steps, spacing, strength if init is not None else 1.0)

        shape = (self.img_channels, *self.img_size)
        if noise is None:
            noise = samplers.global_noise(batch_size, shape, device) if seeds is None else samplers.seeded_noise(seeds, shape, device)
        x = self.as_images(next(noise), batch_size, device, "noise")
        if init is not None:
            x = samplers.diffuse(self.as_images(init, batch_size, device, "init"), plan[0].alpha_bar_t, iter([x]))
        yield from solver(self.denoiser(y, use_ema, guidance_scale, clip), x, plan, noise, **sampler_options)

    def plan(self, sampler, steps, spacing, strength):
        """The steps that a solver takes: a list of samplers.Step."""
        if not 0 < strength <= 1:
            raise ValueError(f"strength must be above 0 and at most 1, not {strength}")
        start = max(int(strength * self.num_timesteps), 1) - 1
        if steps is None:
            steps = start + 1 if sampler == "ddpm" else min(samplers.DEFAULT_STEPS, start + 1)
        chosen = samplers.timesteps(self.alpha_bars, steps, spacing or samplers.DEFAULT_SPACING[sampler], start)
        return samplers.solver_steps(self.alpha_bars, chosen)

    def inpainter(self, sampler, known, mask, device, options):
        """The solver for inpainting and its options."""
        if sampler != "ddpm":
            raise ValueError(f"inpainting takes ddpm's steps: sampler {sampler} cannot do it")
        if known is None or mask is None:
            raise ValueError("inpainting needs both known (the images) and mask (1 where they are drawn anew)")
        return samplers.repaint, {"known": known.to(device, torch.float32), "mask": mask.to(device, torch.float32), **options}

    def as_images(self, x, batch_size, device, name):
        """x as float32 on the device; ValueError unless it is (batch_size, c, h, w)."""
        shape = (batch_size, self.img_channels, *self.img_size)
        if tuple(x.shape) != shape:
            raise ValueError(f"{name} must have the shape {shape}, not {tuple(x.shape)}")
        return x.to(device, torch.float32)


def blend_(averages, values, weight):
    """averages += weight (values - averages), in place, over whole lists of tensors in a few launches; exact for weight 0 and 1.

    weight: a 0-dim tensor. On a CPU reading it is free and one pass does it; elsewhere that would wait for the device.
    """
    if weight.device.type == "cpu":
        if weight > 0:
            torch._foreach_lerp_(averages, values, weight.item())
        return
    torch._foreach_mul_(averages, 1 - weight)
    torch._foreach_add_(averages, torch._foreach_mul(values, weight))
