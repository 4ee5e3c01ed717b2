"""Guidance leads a prediction away from that of a weaker model.

The weaker model is the network without a class (Ho & Salimans 2022, "classifier-free guidance"), or
an earlier state of its training (Karras et al. 2024, "autoguidance").
"""

import math

from .errors import SettingError
from .samplers import half_log_snr


def lead_away(prediction, weaker, scale):
    """The weaker model's prediction for scale 0, the model's own for 1, and beyond it above 1.

    The scale is 1 + w of Ho & Salimans 2022, equation 6. Shapes: any, the same for both.
    """
    return weaker + scale * (prediction - weaker)


def within(interval):
    """lambda -> whether it lies in the interval; None: always. ValueError for a reversed one."""
    lowest, highest = interval or (-math.inf, math.inf)
    if not lowest < highest:
        raise SettingError(f"guidance_interval goes from the lower lambda to the higher, not {interval}")
    return lambda value: lowest <= value <= highest


def check_interval(interval, plan):
    """ValueError for a guidance interval, or None, in which none of the plan's steps lies."""
    lambdas = [half_log_snr(step.alpha_bar_t) for step in plan]
    if not any(map(within(interval), lambdas)):
        raise SettingError(
            f"no step is in the guidance_interval {interval}: their lambdas go from "
            f"{lambdas[0]:.3g} to {lambdas[-1]:.3g}"
        )


def check_weaker_model(diffusion, scale, guiding_model=None):
    """ValueError for a guiding model, a GaussianDiffusion, of another kind than the guided one.

    Without one: for a scale other than 1 where the network has no null class.
    """
    if guiding_model is not None:
        for name, words in (
            ("img_size", "size"),
            ("img_channels", "number of channels"),
            ("num_classes", "number of classes"),
            ("null_class", "null class"),
            ("alpha_bars", "schedule"),
        ):
            if getattr(guiding_model, name) != getattr(diffusion, name):
                raise SettingError(f"the guiding model has another {words}: take an earlier file of the same run")
    elif scale != 1 and diffusion.null_class is None:
        raise SettingError(
            f"guidance_scale {scale:g} needs a model with a null class: train with "
            "--class_conditional True and label_dropout above 0, or name an earlier file of the same "
            "run as --guiding_path"
        )
