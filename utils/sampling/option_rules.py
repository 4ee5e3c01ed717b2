"""Which settings of predict.py need or exclude each other; evaluate shares those of guidance."""

from utils.errors import UserError

# (setting, one without which it does nothing)
NEEDS = [("strength", "init_image"), ("resamplings", "mask"), ("resamplings", "init_image"), ("seed_to", "interpolate")]
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
    inpaints = config.mask and config.init_image
    used = {*options, *(name for name, unused in UNUSED.items() if getattr(config, name) != unused)}
    needs = [] if config.condition_image else [("mask", "init_image")]  # or it is a part of the condition
    for name, needed in [*NEEDS, *needs]:
        if name in used and not getattr(config, needed):
            raise UserError(f"--{name} does nothing without --{needed}: give both, or leave it out")
    if config.strength == 0:
        raise UserError("strength is 0: it must be above 0 and at most 1 (everything is sampled again)")
    for name, sampler in SOLVER_OPTIONS.items():
        if name in used and config.sampler != sampler and not (sampler == "ddpm" and inpaints):
            raise UserError(f"--{name} is an option of {sampler}: add --sampler {sampler}, or leave it out")
    if inpaints and options.get("sampler", "ddpm") != "ddpm":
        raise UserError(f"--mask needs the sampler ddpm: --sampler {config.sampler} cannot inpaint; leave it out")
    if config.condition_image and config.init_image:
        raise UserError("--condition_image: the samples start from noise: leave out --init_image")
    if config.interpolate and config.init_image:
        raise UserError("--interpolate goes from one seed's noise to another's: leave out --init_image")
    if config.interpolate and "num_images" in options:
        raise UserError("--interpolate is the number of images: leave out --num_images")
