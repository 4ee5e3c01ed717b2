"""Models as folders that the library diffusers loads (DDPMPipeline), and back.

python -m utils.diffusers_format export CHECKPOINT FOLDER [--class_name X]
python -m utils.diffusers_format import FOLDER FILE

Our UNet is a UNet2DModel with other names, so the weights are only renamed. Classes alone are not: a class is added after the
activation here and before it there, and the pipeline passes none. One class, by default the null class, is therefore folded
into the biases of the time embedding. diffusers itself is not needed for this.
"""
import argparse
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from nets import build
from nets.schedules import find_schedule, generate_cosine_schedule
from utils.atomic import atomic_folder, atomic_write
from utils.checkpoint import FORMAT, all_finite, find_weights, load_checkpoint, save_checkpoint
from utils.config import run_script
from utils.diffusers_unet import layer_names, read_unet_settings, rename, rename_back, unet2d_settings

try:
    from safetensors import SafetensorError
    from safetensors import torch as safetensors
except ImportError:  # an optional extra: diffusers reads PyTorch's own format too
    safetensors = None

WEIGHTS = "diffusion_pytorch_model"  # .safetensors or .bin
PREDICTIONS = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}


def to_unet2d(network, input_shape, label=None):
    """(settings, weights) of the UNet2DModel that computes what `network`, a UNet, does for class `label` (None: without classes).

    ValueError that names what a UNet2DModel cannot express.
    """
    found = build.read_architecture({**network.state_dict(), "betas": torch.zeros(1)}, "")
    check_expressible(network, found)
    weights = {name: value for name, value in network.state_dict().items() if ".class_bias." not in name}
    if found["num_classes"] is not None:
        for name, module in network.named_modules():
            if name.endswith("class_bias"):
                bias = name.replace("class_bias", "time_bias") + ".bias"
                weights[bias] = weights[bias] + module.weight[label].detach()
    settings = unet2d_settings(found, input_shape, network.downs[0].conv_2[0].p, network.out_norm.num_groups)
    return settings, rename(weights, layer_names(len(found["channel_mults"]), found["num_res_blocks"]))


def check_expressible(network, found):
    """ValueError that names each part of a UNet that diffusers' UNet2DModel lacks. found: build.read_architecture's."""
    norms = {module.__class__.__name__ for module in network.modules() if isinstance(module, nn.InstanceNorm2d | nn.BatchNorm2d)}
    norm = norms.pop() if norms else found["norm"]
    parts = {
        f"norm {norm} (only group norm)": norm != "gn",
        f"initial_pad {network.initial_pad} (only 0)": network.initial_pad != 0,
        "time_emb_dim None (only with time)": network.time_mlp is None,
        "time_emb_scale (only 1)": network.time_mlp is not None and network.time_mlp[0].scale != 1,
        f"activation {getattr(network.activation, '__name__', network.activation)} (only silu)": network.activation is not F.silu,
        f"channel_mults {found['channel_mults']} (the first must be 1)": found["channel_mults"][0] != 1,
    }
    lacking = [part for part, given in parts.items() if given]
    if lacking:
        raise ValueError(f"diffusers' UNet2DModel cannot express this network: {', '.join(lacking)}")


def scheduler_settings(diffusion):
    """The scheduler_config.json of a DDPMScheduler that takes the steps of our ddpm solver: x_0 clipped, the variance beta."""
    betas = [float(str(beta)) for beta in diffusion.betas.cpu().numpy()]  # float32's own digits: 0.02, not 0.019999999552965164
    return {
        "_class_name": "DDPMScheduler", "num_train_timesteps": len(betas), "trained_betas": betas,
        "beta_schedule": "linear", "beta_start": betas[0], "beta_end": betas[-1],  # not used, as trained_betas are given
        "prediction_type": PREDICTIONS[diffusion.prediction], "variance_type": "fixed_large",
        "clip_sample": True, "clip_sample_range": 1.0, "thresholding": False, "rescale_betas_zero_snr": False,
        "timestep_spacing": "trailing", "steps_offset": 0,  # starts at T - 1 for any number of steps, as we do
    }  # fmt: skip


def export_model(checkpoint_path, folder, class_name=""):
    """Write a checkpoint's averaged network as a folder for DDPMPipeline.from_pretrained. ValueError where that cannot be.

    class_name: the class that it will draw; "" is the null class, for a network that has one.
    """
    refuse_to_overwrite(folder)
    path, _ = find_weights(checkpoint_path)
    diffusion, classes = build.from_checkpoint(load_checkpoint(path, lazily=True))
    label = choose_label(diffusion, classes, class_name)
    settings, weights = to_unet2d(diffusion.ema_model, diffusion.img_size, label)
    if not all_finite(weights):
        raise ValueError(f"{path}: its weights hold NaN or infinity")
    index = {"_class_name": "DDPMPipeline", "scheduler": ["diffusers", "DDPMScheduler"], "unet": ["diffusers", "UNet2DModel"]}
    with atomic_folder(folder) as unfinished:
        write_json(unfinished / "model_index.json", index)
        write_json(unfinished / "scheduler" / "scheduler_config.json", scheduler_settings(diffusion))
        write_json(unfinished / "unet" / "config.json", settings)
        write_weights(unfinished / "unet", weights)
    return diffusion


def choose_label(diffusion, classes, class_name):
    """The row of the class embeddings to fold in; None for a network without classes. ValueError that lists the known classes."""
    if diffusion.num_classes is None:
        if class_name:
            raise ValueError(f"--class_name {class_name}: this model was trained without classes")
        return None
    if class_name and class_name not in classes:
        raise ValueError(f"unknown class_name {class_name!r}; known: {', '.join(classes)}")
    if class_name:
        return classes.index(class_name)
    if diffusion.null_class is None:
        raise ValueError(f"this model has no null class, and the pipeline passes none: choose a --class_name among {', '.join(classes)}")
    return diffusion.null_class


def refuse_to_overwrite(path):
    """ValueError where `path` exists, unless it is an empty folder."""
    path = Path(path)
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise ValueError(f"{path} is there already: choose another name, or move it away")


def write_json(path, values):
    with atomic_write(path, "w", encoding="utf-8") as file:
        json.dump(values, file, indent=2)


def write_weights(folder, weights):
    if safetensors:
        with atomic_write(folder / f"{WEIGHTS}.safetensors") as file:
            file.write(safetensors.save(weights, metadata={"format": "pt"}))
    else:
        save_checkpoint(folder / f"{WEIGHTS}.bin", weights)


def import_model(folder, file):
    """Write a checkpoint of this project from a folder of diffusers, where its network is one that train.py could have built.

    It draws with predict.py, and train.py goes on from it. ValueError that names what is not ours.
    """
    refuse_to_overwrite(file)
    folder = Path(folder)
    unet, scheduler = read_json(folder / "unet" / "config.json"), read_json(folder / "scheduler" / "scheduler_config.json")
    config = {**read_unet_settings(unet), **read_scheduler_settings(scheduler)}
    diffusion = build.from_config(config)
    names = layer_names(len(config["channel_mults"]), config["num_res_blocks"])
    weights = rename_back(read_weights(folder / "unet"), diffusion.ema_model.state_dict(), names)
    tables = {name: value for name, value in diffusion.state_dict().items() if not name.startswith(("model.", "ema_model."))}
    weights = {f"ema_model.{name}": value for name, value in weights.items()} | tables
    save_checkpoint(file, {"format": FORMAT, "config": config, "classes": [], "weights": weights, "weights_kind": "ema"})
    return diffusion


def read_json(path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} is not there: a folder that diffusers' DDPMPipeline saved has it") from None
    except ValueError:
        raise ValueError(f"{path} is damaged: no JSON") from None


def read_weights(folder):
    path = folder / f"{WEIGHTS}.safetensors"
    if not path.exists():
        return load_checkpoint(folder / f"{WEIGHTS}.bin")["weights"]
    if safetensors is None:
        raise ValueError(f"{path}: reading it needs `pip install safetensors`")
    try:
        return safetensors.load(path.read_bytes())
    except SafetensorError as error:
        raise ValueError(f"{path}: damaged ({error})") from None


def read_scheduler_settings(scheduler):
    """A scheduler's config -> settings of train.py. Whatever solver it is for: only schedule and prediction belong to the model.

    ValueError for a prediction or a schedule that is not ours.
    """
    predictions = {theirs: ours for ours, theirs in PREDICTIONS.items()}
    prediction = scheduler.get("prediction_type", "epsilon")
    if prediction not in predictions:
        raise ValueError(f"this is not one of our models: prediction_type is {prediction!r}; known: {', '.join(predictions)}")
    if scheduler.get("rescale_betas_zero_snr"):
        raise ValueError("this is not one of our models: rescale_betas_zero_snr is on, whose last beta is 1")
    return {**find_schedule(read_betas(scheduler)), "prediction": predictions[prediction]}


def read_betas(scheduler):
    """The betas of a scheduler's config, (T,) float64. ValueError for a beta_schedule that is none of ours."""
    T, kind = scheduler.get("num_train_timesteps", 1000), scheduler.get("beta_schedule", "linear")
    if scheduler.get("trained_betas") is not None:
        return np.asarray(scheduler["trained_betas"], dtype=np.float64)
    if kind == "linear":
        return np.linspace(scheduler.get("beta_start", 1e-4), scheduler.get("beta_end", 0.02), T)
    if kind == "squaredcos_cap_v2":
        return generate_cosine_schedule(T)
    raise ValueError(f"this is not one of our models: beta_schedule is {kind!r} (ours: linear, squaredcos_cap_v2, or trained_betas)")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    export = commands.add_parser("export", help="a checkpoint -> a folder for diffusers")
    export.add_argument("checkpoint", metavar="CHECKPOINT", help="a checkpoint, or a run's folder")
    export.add_argument("folder", metavar="FOLDER", help="the folder to write; it must not be there yet")
    export.add_argument("--class_name", default="", help="the class that it will draw (default: the null class)")
    back = commands.add_parser("import", help="a folder of diffusers -> a checkpoint")
    back.add_argument("folder", metavar="FOLDER", help="what DDPMPipeline.save_pretrained wrote")
    back.add_argument("file", metavar="FILE", help="the checkpoint to write; it must not be there yet")
    arguments = parser.parse_args()
    if arguments.command == "export":
        diffusion = export_model(arguments.checkpoint, arguments.folder, arguments.class_name)
        print(f'DDPMPipeline.from_pretrained("{arguments.folder}")(num_inference_steps={diffusion.num_timesteps}) draws with it')
    else:
        import_model(arguments.folder, arguments.file)
        print(f"python predict.py --model_path {arguments.file}  draws with it")


if __name__ == "__main__":
    run_script(main)
