"""Sampling: from the network to `denoise(x_t, t) -> x_0`, guided or not, and from there to images.

Guidance leads a prediction away from a weaker one: the network's without a class (Ho & Salimans
2022), or that of an earlier GaussianDiffusion of the same run (Karras et al. 2024, "autoguidance").
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import samplers
from .errors import SettingError, check_choice
from .samplers import Denoise, Device, Solver, Step, Trajectory, half_log_snr


class Prediction(NamedTuple):
    """The meaning of the network's output, with x_t = a x_0 + s eps."""

    target: Callable  # (x_0, eps, a, s) -> the output that the loss asks for
    to_x_0: Callable  # (output, x_t, a, s) -> x_0; linear in the output


PREDICTIONS = {
    "eps": Prediction(lambda x_0, eps, a, s: eps, lambda output, x_t, a, s: (x_t - s * output) / a),
    "x0": Prediction(lambda x_0, eps, a, s: x_0, lambda output, x_t, a, s: output),
    # Salimans & Ho 2022, section 4.
    "v": Prediction(lambda x_0, eps, a, s: a * eps - s * x_0, lambda output, x_t, a, s: a * x_t - s * output),
}


class SamplingOptions(NamedTuple):
    """How to sample. Images (b, c, h, w) are in [-1, 1]."""

    sampler: str = "ddpm"  # a name from samplers.SAMPLERS
    steps: int | None = None  # None: all timesteps for ddpm, samplers.DEFAULT_STEPS for the others
    spacing: str | None = None  # a name from samplers.SPACINGS; None: what suits the sampler
    use_ema: bool = True
    # x_0 to [-1, 1]. Without it the first of 1000 cosine steps amplifies an error of eps 32 times.
    clip: bool = True
    guidance_scale: float = 1.0  # of apply_guidance; 1: no guidance
    # The lambdas between which it acts (Kynkäänniemi et al. 2024; -log sigma); None: at each step.
    guidance_interval: tuple[float, float] | None = None
    guiding_model: nn.Module | None = None  # in the place of the null class; it needs no classes
    cond: Tensor | None = None  # (b, k, h, w), the condition of each image, see condition.py
    init: Tensor | None = None  # images to start from (Meng et al. 2022, "SDEdit")
    strength: float = 1.0  # they are noised to timestep strength * T
    known: Tensor | None = None  # images to keep where mask is 0 (ddpm only)
    mask: Tensor | None = None  # 1 where pixels are sampled; it broadcasts to `known`
    solver_options: dict[str, Any] = {}  # the solver's own, such as eta

    def override(self, **settings: Any) -> "SamplingOptions":
        """Other settings by name. Those that are no field go to the solver."""
        own = {name: settings.pop(name) for name in self._fields if name in settings}
        return self._replace(**{"solver_options": self.solver_options | settings, **own})


class Denoiser:
    """denoise(x_t, t) -> the network's own x_0. The network should be in eval mode.

    y: class ids (b,), or one for all. None is the null class; ValueError where there is none.
    """

    def __init__(self, diffusion: nn.Module, y: Tensor | None = None, use_ema: bool = True, cond: Tensor | None = None):
        device = diffusion.betas.device
        self.network, self.null_class = diffusion.network(use_ema), diffusion.null_class
        self.alpha_bars = diffusion.alpha_bars
        self.output_to_x_0 = PREDICTIONS[diffusion.prediction].to_x_0
        self.timesteps = torch.arange(len(self.alpha_bars), device=device)  # a slice is a view, not a copy to a GPU
        self.y, self.cond = None, None if cond is None else cond.to(device)
        if diffusion.num_classes is not None:
            if y is None and self.null_class is None:
                raise SettingError("without a null class, each image needs a class: pass y, or use --class_name")
            self.y = torch.as_tensor(self.null_class if y is None else y, device=device).reshape(-1)

    def __call__(self, x_t: Tensor, t: int) -> Tensor:
        return self.to_x_0(self.predict(x_t, t, self.y, self.cond), x_t, t)

    @torch.no_grad()
    def predict(self, x_t: Tensor, t: int, y: Tensor | None, cond: Tensor | None) -> Tensor:
        """The network's output in float32. y: (b,), or one for each equal part of the batch."""
        b = len(x_t)
        if y is not None and b % len(y):
            raise SettingError(f"y has {len(y)} entries for a batch of {b}")
        y = None if y is None else y.repeat_interleave(b // len(y))
        return self.network(x_t, self.timesteps[t : t + 1].expand(b), y, *([] if cond is None else [cond])).float()

    def to_x_0(self, output: Tensor, x_t: Tensor, t: int) -> Tensor:
        return self.output_to_x_0(output, x_t, self.alpha_bars[t] ** 0.5, (1 - self.alpha_bars[t]) ** 0.5)


def apply_guidance(prediction: Tensor, weaker: Tensor, scale: float) -> Tensor:
    """From the weaker prediction (scale 0) past the own one (1): Ho & Salimans 2022, equation 6."""
    return weaker + scale * (prediction - weaker)


def classifier_free_guidance(denoiser: Denoiser, scale: float, at_once: bool) -> Denoise:
    """Guidance away from no class and no condition. at_once: one call, on twice the batch."""
    own, empty = (denoiser.y, denoiser.cond), (denoiser.null_class, 0.0)
    null = [None if given is None else torch.full_like(given, none) for given, none in zip(own, empty)]
    both = [None if given is None else torch.cat((given, none)) for given, none in zip(own, null)]

    def denoise(x_t, t):
        if at_once:
            strong, weak = denoiser.predict(torch.cat((x_t, x_t)), t, *both).chunk(2)
        else:
            strong, weak = (denoiser.predict(x_t, t, *given) for given in (own, null))
        return denoiser.to_x_0(apply_guidance(strong, weak, scale), x_t, t)

    return denoise


def autoguidance(denoiser: Denoise, guide: Denoise, scale: float) -> Denoise:
    """Guidance away from another model, whose prediction may be of another kind: both give x_0."""
    return lambda x_t, t: apply_guidance(denoiser(x_t, t), guide(x_t, t), scale)


def make_denoiser(diffusion: nn.Module, y: Tensor | None, options: SamplingOptions) -> Denoise:
    """denoise(x_t, t) -> x_0 with guidance and clipping. ValueError: guidance that cannot work."""
    scale, guide, cond = options.guidance_scale, options.guiding_model, options.cond
    check_guiding_model(diffusion, scale, guide)
    acts = interval_predicate(options.guidance_interval)
    plain = guided = Denoiser(diffusion, y, options.use_ema, cond)
    if scale != 1 and guide is not None:
        guided = autoguidance(plain, Denoiser(guide, y, options.use_ema, cond), scale)
    elif scale != 1:
        if y is None and cond is None:
            raise SettingError("guidance needs a class or a condition for each image: pass y or cond")
        # An interval has steps without guidance: one shape for all calls is compiled once.
        guided = classifier_free_guidance(plain, scale, at_once=options.guidance_interval is None)

    def denoise(x_t, t):
        x_0 = (guided if acts(half_log_snr(diffusion.alpha_bars[t])) else plain)(x_t, t)
        x_0 = x_0 if cond is None else diffusion.condition.restore(x_0, plain.cond)
        return x_0.clamp(-1, 1) if options.clip else x_0

    return denoise


def interval_predicate(interval: tuple[float, float] | None) -> Callable[[float], bool]:
    """lambda -> whether it lies in the interval; None: always. ValueError for a reversed one."""
    lowest, highest = interval or (-math.inf, math.inf)
    if not lowest < highest:
        raise SettingError(f"guidance_interval goes from the lower lambda to the higher, not {interval}")
    return lambda value: lowest <= value <= highest


def check_interval(interval: tuple[float, float] | None, schedule: list[Step]) -> None:
    """ValueError for a guidance interval in which no step of the schedule lies."""
    lambdas = [half_log_snr(step.alpha_bar_t) for step in schedule]
    if not any(map(interval_predicate(interval), lambdas)):
        span = f"their lambdas go from {lambdas[0]:.3g} to {lambdas[-1]:.3g}"
        raise SettingError(f"no step is in the guidance_interval {interval}: {span}")


def check_guiding_model(diffusion: nn.Module, scale: float, guide: nn.Module | None = None) -> None:
    """ValueError for a guiding model of another kind, or guidance without it and a null class."""
    if guide is None and scale != 1 and diffusion.null_class is None and not diffusion.condition.dropped:
        raise SettingError(
            f"guidance_scale {scale:g} needs a model with a null class, as logs/emoji.pth has: train with "
            "--class_conditional True and label_dropout above 0, or name an earlier file of the run as --guiding_path"
        )
    words = {"img_size": "size", "img_channels": "number of channels", "num_classes": "number of classes"}
    for name, word in {**words, "null_class": "null class", "condition": "condition", "alpha_bars": "schedule"}.items():
        if guide is not None and getattr(guide, name) != getattr(diffusion, name):
            raise SettingError(f"the guiding model has another {word}: take an earlier file of the same run")


def sampling_schedule(alpha_bars: Sequence[float], options: SamplingOptions) -> list[Step]:
    """The steps of the solver, from timestep strength * T on."""
    start, steps = max(int(options.strength * len(alpha_bars)), 1) - 1, options.steps
    if steps is None:
        steps = start + 1 if options.sampler == "ddpm" else min(samplers.DEFAULT_STEPS, start + 1)
    spacing = options.spacing or samplers.DEFAULT_SPACING[options.sampler]
    return samplers.solver_steps(alpha_bars, samplers.timesteps(alpha_bars, steps, spacing, start))


@torch.no_grad()
def sample_steps(diffusion, batch_size: int, device: Device, y, options: SamplingOptions, seeds, noise) -> Trajectory:
    """Yields (x, x_0) after each step of the solver, each (batch_size, c, h, w).

    y: None, or class ids (batch_size,). seeds: an integer per image, which determines its noise;
    None is torch's global generator. noise: None, or an endless iterator of (batch_size, c, h, w)
    that replaces seeds, x_T first. ValueError: settings that do not fit.
    """
    for name, given in (("y", y), ("seeds", seeds), ("cond", options.cond)):
        if given is not None and len(given) != batch_size:
            raise SettingError(f"{name} has {len(given)} entries for a batch of {batch_size}")
    if not (0 < options.strength <= 1 and 0 <= options.solver_options.get("eta", 0) <= 1):
        raise SettingError("strength must be above 0 and at most 1, and eta from 0 to 1")
    solver, solver_options = choose_solver(options, device)
    options = options if options.init is not None else options._replace(strength=1.0)
    schedule = sampling_schedule(diffusion.alpha_bars, options)
    check_interval(options.guidance_interval, schedule)
    denoise = make_denoiser(diffusion, y, options)

    shape = (diffusion.img_channels, *diffusion.img_size)
    if noise is None and seeds is None:
        noise = (torch.randn(batch_size, *shape, device=device) for _ in itertools.count())
    elif noise is None:
        noise = samplers.seeded_noise(seeds, shape, device)
    x = next(noise).to(device, torch.float32)
    if options.init is not None:
        x = samplers.diffuse(options.init.to(x), schedule[0].alpha_bar_t, iter([x]))
    networks = [part.network(options.use_ema) for part in (diffusion, options.guiding_model) if part is not None]
    training = [network.eval() for network in networks if network.training]  # no dropout
    try:
        yield from solver(denoise, x, schedule, noise, **solver_options)
    finally:
        for network in training:
            network.train()


def choose_solver(options: SamplingOptions, device: Device) -> tuple[Solver, dict[str, Any]]:
    """(the solver, its options); repaint where there is a mask."""
    check_choice("sampler", options.sampler, samplers.SAMPLERS)
    known, mask = options.known, options.mask
    if known is None and mask is None:
        return samplers.SAMPLERS[options.sampler], options.solver_options
    if options.sampler != "ddpm" or known is None or mask is None:
        raise SettingError("inpainting needs the sampler ddpm, known (the images) and mask (1 where they change)")
    images = {"known": known.to(device, torch.float32), "mask": mask.to(device, torch.float32)}
    return samplers.repaint, options.solver_options | images
