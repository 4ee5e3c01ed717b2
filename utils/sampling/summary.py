"""What predict.py is about to do: the settings that were chosen for the user."""
from utils.device import describe_device


def print_summary(config, rows, classes, device, precision, checkpoint):
    """config: resolved. rows: the class names that have a row in the grid; [] for one class."""
    if not checkpoint["config"]:
        size = ",".join(map(str, config.input_shape))
        print(f"these weights do not say their size: drawing {size}; --input_shape sets another")
    guidance = f", guidance {config.guidance_scale:g}" if config.guidance_scale != 1 else ""
    if config.guidance_interval:
        guidance += " for lambda from {:g} to {:g}".format(*config.guidance_interval)
    print(f"{describe_device(device)}, precision {precision}; {config.sampler}, {config.steps} steps{guidance}; "
          f"{config.num_images} pictures from seed {config.seed} on")
    if rows:
        more = f" (and {len(classes) - len(rows)} more: --class_name draws one)" if len(classes) > len(rows) else ""
        print(f"a row of each class, from the top: {', '.join(rows)}{more}")
