"""Which settings of predict.py exclude or need each other; those of guidance in evaluate too."""

from utils.errors import UserError

# setting -> the setting without which it does nothing
NEEDS = {"strength": "init_image", "mask": "init_image", "resamplings": "mask", "seed_to": "interpolate"}
OWNERS = {"eta": "ddim", "variance": "ddpm"}  # option of one solver -> that solver


def check_guidance(config):
    """ValueError for settings of guidance that do nothing."""
    for name in ("guidance_interval", "guiding_path"):
        if getattr(config, name) and config.guidance_scale == 1:
            raise UserError(f"{name} does nothing with a guidance_scale of 1: add --guidance_scale 2, or leave it out")


def check_combinations(config, typed):
    """ValueError for settings that do not go together. typed: the command line's, {name: value}."""
    check_guidance(config)
    if config.batch_size > 2**16:
        raise UserError(f"batch_size is {config.batch_size}: more than {2**16} pictures at once fit nowhere; lower it")
    if config.strength is not None and not 0 < config.strength <= 1:
        raise UserError(f"strength is {config.strength}: it must be above 0 and at most 1 (all is drawn anew)")
    for name, needed in NEEDS.items():
        if name in typed and not getattr(config, needed):
            raise UserError(f"--{name} does nothing without --{needed}: give both, or leave it out")
    for name, sampler in OWNERS.items():
        if name in typed and config.sampler != sampler and not (sampler == "ddpm" and config.mask):
            raise UserError(f"--{name} is an option of {sampler}: add --sampler {sampler}, or leave it out")
    if config.mask and typed.get("sampler", "ddpm") != "ddpm":
        raise UserError(f"--mask is drawn with ddpm's steps: --sampler {config.sampler} cannot do it; leave it out")
    if config.interpolate and config.init_image:
        raise UserError("--interpolate goes from one seed's noise to another's: leave out --init_image")
    if config.interpolate and "num_images" in typed:
        raise UserError("--interpolate is the number of pictures: leave out --num_images")
    if config.interpolate == 1:
        raise UserError("--interpolate 1: a strip has at least 2 pictures, one an end")
