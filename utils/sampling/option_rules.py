"""Which settings of predict.py need or exclude each other; evaluate shares those of guidance."""

from utils.errors import UserError

# (setting, one without which it does nothing)
NEEDS = [("strength", "init_image"), ("mask", "init_image"), ("seed_to", "interpolate")]
NEEDS += [("resamplings", "mask"), ("resamplings", "init_image")]
SOLVER_OPTIONS = {"eta": "ddim", "variance": "ddpm"}  # option of one solver -> that solver
# What a setting is that is not used: any other value in Config counts as one of the command line.
UNUSED = {"strength": None, "mask": "", "resamplings": 0, "seed_to": -1, "eta": 0.0, "variance": "beta"}


def check_guidance(config):
    """UserError for settings of guidance that do nothing."""
    for name in ("guidance_interval", "guiding_path"):
        if getattr(config, name) and config.guidance_scale == 1:
            raise UserError(f"{name} does nothing with a guidance_scale of 1: add --guidance_scale 2, or leave it out")


def check_rules(config, options):
    """UserError for settings that do not go together. options: of the command line, by name."""
    check_guidance(config)
    used = {*options, *(name for name, unused in UNUSED.items() if getattr(config, name) != unused)}
    for name, needed in NEEDS:
        if name in used and not getattr(config, needed) and not (name == "mask" and config.condition_image):
            raise UserError(f"--{name} does nothing without --{needed}: give both, or leave it out")
    if config.strength == 0:
        raise UserError("strength is 0: it must be above 0 and at most 1 (everything is sampled again)")
    for name, sampler in SOLVER_OPTIONS.items():
        if name in used and config.sampler != sampler and not (sampler == "ddpm" and config.mask and config.init_image):
            raise UserError(f"--{name} is an option of {sampler}: add --sampler {sampler}, or leave it out")
    if config.mask and config.init_image and options.get("sampler", "ddpm") != "ddpm":
        raise UserError(f"--mask needs the sampler ddpm: --sampler {config.sampler} cannot inpaint; leave it out")
    starts = [f"--{name}" for name in ("init_image", "condition_image", "interpolate") if getattr(config, name)]
    if len(starts) > 1:
        raise UserError(f"{' and '.join(starts)} exclude each other: leave one out")
    if config.interpolate and "num_images" in options:
        raise UserError("--interpolate is the number of images: leave out --num_images")
