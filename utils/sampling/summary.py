"""What predict.py is about to do: the settings that were chosen for the user."""

from utils.device import describe_device
from utils.terminal import plural


def describe_guidance(config):
    """The words for the guidance of predict.py or utils.evaluate; "" without."""
    if config.guidance_scale == 1:
        return ""
    where = " for lambda from {:g} to {:g}".format(*config.guidance_interval) if config.guidance_interval else ""
    return f", guidance {config.guidance_scale:g}{where}"


def print_sampling(config, classes, rows, device, precision, checkpoint):
    """config: resolved. classes: their names. rows: how many of them have a row in the grid."""
    if not checkpoint.config:
        size = ",".join(map(str, config.input_shape))
        print(f"these weights do not say their size: sampling {size}; --input_shape sets another")
    print(
        f"{describe_device(device)}, precision {precision}; {config.sampler}, {plural(config.steps, 'step')}"
        f"{describe_guidance(config)}; {plural(config.num_images, 'image')} from seed {config.seed} on"
    )
    if rows:
        more = f" (and {len(classes) - rows} more: --class_name samples one)" if len(classes) > rows else ""
        print(f"a row of each class, from the top: {', '.join(classes[:rows])}{more}")
