"""What predict.py is about to do: the settings that were chosen for the user."""

from utils.device import describe_device


def describe_guidance(config):
    """The words for the guidance of predict.py or utils.evaluate; "" without."""
    if config.guidance_scale == 1:
        return ""
    where = " for lambda from {:g} to {:g}".format(*config.guidance_interval) if config.guidance_interval else ""
    return f", guidance {config.guidance_scale:g}{where}"


def print_summary(config, rows, classes, device, precision, checkpoint):
    """config: resolved. rows: the class names that have a row in the grid; [] for one class."""
    if not checkpoint["config"]:
        size = ",".join(map(str, config.input_shape))
        print(f"these weights do not say their size: drawing {size}; --input_shape sets another")
    print(
        f"{describe_device(device)}, precision {precision}; {config.sampler}, {config.steps} steps"
        f"{describe_guidance(config)}; "
        f"{config.num_images} pictures from seed {config.seed} on"
    )
    if rows:
        more = f" (and {len(classes) - len(rows)} more: --class_name draws one)" if len(classes) > len(rows) else ""
        print(f"a row of each class, from the top: {', '.join(rows)}{more}")
