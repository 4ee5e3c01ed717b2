"""Models as folders of diffusers, and back, against diffusers itself."""

import ast
import json
import re
import shutil
import subprocess
import sys
import traceback
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from conftest import newest_run, read_file, run_main, write_pictures

from nets import UNet, build
from train import Config
from utils.checkpoint.file import load_checkpoint
from utils.checkpoint.integrity import save_tensors
from utils.convert import __main__ as convert
from utils.convert.diffusers_folder import export_model, import_model, to_unet2d
from utils.errors import run_script
from utils.training.settings_schema import CARRIED

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("safetensors.torch")
safetensors = pytest.importorskip("safetensors")
diffusers.utils.logging.set_verbosity_error()
diffusers.utils.logging.disable_progress_bar()

PROJECT = Path(__file__).resolve().parents[1]
SMALL = {
    "input_shape": (8, 8),
    "channel": 32,
    "channel_mults": (1, 2),
    "num_res_blocks": 1,
    "num_timesteps": 40,
    "num_groups": 8,
}
CLASSES = ["cats", "dogs", "old trees"]


def scramble(network):
    """Weights far from what a fresh network has: zeros would hide a layer in the wrong place, ones
    a swapped norm.
    """
    generator = torch.Generator().manual_seed(0)
    for name, parameter in network.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = (
            noise * parameter[0].numel() ** -0.5
            if parameter.ndim > 1
            else 0.3 * noise + ("norm" in name and "weight" in name)
        )


def write_checkpoint(path, classes=(), **settings):
    config = asdict(Config(**{**SMALL, "class_conditional": bool(classes), **settings}))
    diffusion = build.from_config(config, len(classes))
    scramble(diffusion.ema_model)
    checkpoint = {"config": config, "classes": list(classes), "weights": diffusion.state_dict(), "weights_kind": "full"}
    save_tensors(path, checkpoint)
    return diffusion.eval()


def outputs(network, size=(8, 8), channels=3, T=40, **arguments):
    """What a network says of fixed noise at the first, a middle and the last timestep."""
    x = torch.randn(3, channels, *size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return network(x, torch.tensor([0, T // 3, T - 1]), **arguments)


def assert_equal_networks(ours, theirs, label=None, **shape):
    y = None if label is None else torch.full((3,), label)
    expected = outputs(ours, y=y, **shape)
    assert expected.std() > 0.1
    torch.testing.assert_close(outputs(theirs, **shape).sample, expected, rtol=0, atol=1e-4)


# To diffusers

ARCHITECTURES = [
    {},
    {"channel_mults": (1, 2, 1, 3), "num_res_blocks": 2, "attention_resolutions": (0, 2)},
    {"img_channels": 1, "attention_resolutions": ()},
    {"channel_mults": (1,), "attention_resolutions": (0,), "channel": 64},
    {"input_shape": (8, 12)},
]


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=str)
def test_diffusers_network_is_ours(tmp_path, architecture):
    ours = write_checkpoint(tmp_path / "a.pth", **architecture)
    export_model(tmp_path / "a.pth", tmp_path / "out")
    theirs = diffusers.DDPMPipeline.from_pretrained(tmp_path / "out").unet
    assert type(theirs) is diffusers.UNet2DModel
    assert_equal_networks(ours.ema_model, theirs, size=ours.img_size, channels=ours.img_channels)


@pytest.mark.parametrize("name, label", [("", 3), ("dogs", 1), ("old trees", 2)])
def test_a_class_is_folded_in_and_the_null_class_unless_named(tmp_path, name, label):
    ours = write_checkpoint(tmp_path / "a.pth", CLASSES)
    export_model(tmp_path / "a.pth", tmp_path / "out", name)
    theirs = diffusers.DDPMPipeline.from_pretrained(tmp_path / "out").unet
    assert_equal_networks(ours.ema_model, theirs, label)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"schedule": "cosine"},
        {"prediction": "x0", "schedule": "sigmoid"},
        {"prediction": "v"},
        {"input_shape": (8, 12), "img_channels": 1},
    ],
    ids=str,
)
def test_the_pipeline_draws_what_our_ddpm_draws(tmp_path, settings):
    ours = write_checkpoint(tmp_path / "a.pth", **settings)
    export_model(tmp_path / "a.pth", tmp_path / "out")
    pipeline = diffusers.DDPMPipeline.from_pretrained(tmp_path / "out")
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.scheduler.betas.tolist() == ours.betas.tolist()
    torch.manual_seed(5)
    theirs = pipeline(batch_size=2, num_inference_steps=40, output_type="pt").images
    torch.manual_seed(5)
    expected = (ours.sample(2, "cpu", sampler="ddpm") / 2 + 0.5).clamp(0, 1)
    assert expected.std() > 0.05
    torch.testing.assert_close(theirs, expected, rtol=0, atol=1e-3)


def test_with_few_steps_the_pipeline_starts_at_the_last_timestep(tmp_path, capsys):
    """The folder comes from the call that is printed, whatever its name holds."""
    write_checkpoint(tmp_path / "a.pth")
    export_model(tmp_path / "a.pth", tmp_path / 'one\'s "own"')
    folder = re.search(r"from_pretrained\((.*)\)\(num_inference_steps=40\) samples with it", capsys.readouterr().out)[1]
    pipeline = diffusers.DDPMPipeline.from_pretrained(ast.literal_eval(folder))
    pipeline.scheduler.set_timesteps(5)
    assert pipeline.scheduler.timesteps.tolist() == [39, 31, 23, 15, 7]


def test_a_bare_state_dict_is_exported_too(tmp_path):
    ours = build.from_config({**SMALL, "num_groups": 32, "input_shape": (32, 32)})
    scramble(ours.ema_model)
    save_tensors(tmp_path / "a.pth", ours.state_dict())
    export_model(tmp_path / "a.pth", tmp_path / "out")
    pipeline = diffusers.DDPMPipeline.from_pretrained(tmp_path / "out")
    assert pipeline.unet.config.sample_size == 32
    assert_equal_networks(ours.ema_model.eval(), pipeline.unet)


class Trap:
    """Pickled, it is a call of Path.touch."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_pytorchs_format_is_read_and_nothing_in_it_runs(tmp_path):
    ours = write_checkpoint(tmp_path / "a.pth")
    export_model(tmp_path / "a.pth", tmp_path / "out")
    diffusers.DDPMPipeline.from_pretrained(tmp_path / "out").save_pretrained(tmp_path / "bin", safe_serialization=False)
    assert [path.name for path in sorted((tmp_path / "bin" / "unet").iterdir())] == [
        "config.json",
        "diffusion_pytorch_model.bin",
    ]
    import_model(tmp_path / "bin", tmp_path / "back.pth")
    torch.save({"conv_in.bias": Trap(tmp_path / "ran")}, tmp_path / "bin" / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(ValueError, match="could run code"):
        import_model(tmp_path / "bin", tmp_path / "other.pth")
    assert not (tmp_path / "ran").exists() and not (tmp_path / "other.pth").exists()
    torch.testing.assert_close(
        loaded(tmp_path / "back.pth").ema_model.state_dict(), ours.ema_model.state_dict(), rtol=0, atol=0
    )


@pytest.mark.parametrize(
    "arguments, part",
    [
        ({"norm": "bn"}, "norm bn"),
        ({"norm": None}, "norm None"),
        ({"time_emb_dim": None}, "time_emb_dim None"),
        ({"channel_mults": (2, 2)}, r"channel_mults \(2, 2\)"),
    ],
)
def test_what_diffusers_cannot_express_is_named(arguments, part):
    network = UNet(
        **{"img_channels": 3, "base_channels": 32, "channel_mults": (1, 2), "num_res_blocks": 1, **arguments}
    )
    with pytest.raises(ValueError, match=f"cannot express this network: {part}"):
        to_unet2d(network, (8, 8))


def test_other_groups_and_embeddings_are_expressed():
    network = UNet(3, 32, (1, 2), 1, num_groups=8, time_emb_dim=48).eval()
    scramble(network)
    settings, weights = to_unet2d(network, (8, 8))
    theirs = diffusers.UNet2DModel.from_config(settings).eval()
    theirs.load_state_dict(weights)
    assert_equal_networks(network, theirs)


def test_classes_that_do_not_fit_are_refused(tmp_path):
    write_checkpoint(tmp_path / "null.pth", CLASSES)
    write_checkpoint(tmp_path / "classes.pth", CLASSES, label_dropout=0.0)
    write_checkpoint(tmp_path / "plain.pth")
    for file, name, message in [
        ("null", "birds", "known: cats, dogs, old trees"),
        ("classes", "", "without a null class it needs a --class_name; known: cats, dogs, old trees"),
        ("plain", "cats", "without classes"),
    ]:
        with pytest.raises(ValueError, match=message):
            export_model(tmp_path / f"{file}.pth", tmp_path / "out", name)
    assert not (tmp_path / "out").exists()


def test_nothing_is_overwritten_and_nothing_half_is_left(tmp_path, monkeypatch):
    write_checkpoint(tmp_path / "a.pth")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="there already"):
        export_model(tmp_path / "a.pth", tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]

    def disk_full(tensors, path, **_):
        Path(path).write_bytes(b"half")
        raise safetensors.SafetensorError("no space left")

    monkeypatch.setattr(safetensors.torch, "save_file", disk_full)
    with pytest.raises(ValueError, match="could not be written .no space"):
        export_model(tmp_path / "a.pth", tmp_path / "other")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pth", "out"]


# And back


def loaded(path):
    return build.from_checkpoint(load_checkpoint(path))[0]


SETTINGS = [
    {},
    {"schedule": "cosine", "prediction": "v"},
    {"schedule": "sigmoid", "prediction": "x0", "num_timesteps": 1000},
    {"schedule": "cosine", "schedule_shift": -0.7, "num_timesteps": 1000},
    {"num_timesteps": 1000, "schedule_low": 2e-4, "schedule_high": 0.015, "dropout": 0.25},
    {
        "input_shape": (8, 12),
        "img_channels": 1,
        "channel_mults": (1, 3),
        "num_res_blocks": 2,
        "attention_resolutions": (0, 1),
    },
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_there_and_back_is_the_same_model(tmp_path, settings):
    ours = write_checkpoint(tmp_path / "a.pth", **settings)
    export_model(tmp_path / "a.pth", tmp_path / "out")
    diffusers.DDPMPipeline.from_pretrained(tmp_path / "out").save_pretrained(tmp_path / "resaved")
    import_model(tmp_path / "resaved", tmp_path / "back.pth")
    back = loaded(tmp_path / "back.pth")
    for network in (back.ema_model, back.model):
        torch.testing.assert_close(network.state_dict(), ours.ema_model.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(back.betas, ours.betas, rtol=1e-5, atol=0)
    before, after = (read_file(tmp_path / name)["config"] for name in ("a.pth", "back.pth"))
    assert {name: before[name] for name in after} == {**after, "label_dropout": before["label_dropout"]}


def foreign(folder, unet=(), scheduler=()):
    """A pipeline that is ours but for these settings, as diffusers writes it."""
    settings = {
        "sample_size": 8,
        "block_out_channels": (32, 64),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 1,
        "attention_head_dim": None,
        "flip_sin_to_cos": False,
        "time_embedding_dim": 512,
    }
    network = diffusers.UNet2DModel(**settings | dict(unet))
    diffusers.DDPMPipeline(network, diffusers.DDPMScheduler(**dict(scheduler))).save_pretrained(folder)
    return network


@pytest.mark.parametrize("settings, schedule", [({"beta_schedule": "squaredcos_cap_v2"}, "cosine"), ({}, "linear")])
def test_a_model_made_with_diffusers_comes_in(tmp_path, settings, schedule):
    theirs = foreign(tmp_path / "in", scheduler=settings)
    import_model(tmp_path / "in", tmp_path / "back.pth")
    back = loaded(tmp_path / "back.pth")
    assert read_file(tmp_path / "back.pth")["config"]["schedule"] == schedule
    torch.testing.assert_close(back.betas, diffusers.DDPMScheduler(**settings).betas, rtol=1e-5, atol=1e-9)
    assert_equal_networks(back.ema_model, theirs.eval())


# The configurations of google/ddpm-cifar10-32 and google/ddpm-celebahq-256 on huggingface.co and of
# diffusers' examples/unconditional_image_generation, at a quarter of their width and their groups.
GOOGLE = {"attention_head_dim": None, "downsample_padding": 0, "flip_sin_to_cos": False, "freq_shift": 1}
GOOGLE |= {"norm_eps": 1e-6, "layers_per_block": 2}
SIX_LEVELS = {
    "sample_size": 32,
    "layers_per_block": 2,
    "block_out_channels": (32, 32, 64, 64, 128, 128),
    "down_block_types": (*["DownBlock2D"] * 4, "AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D", *["UpBlock2D"] * 4),
}
CIFAR10 = {
    **GOOGLE,
    "sample_size": 32,
    "block_out_channels": (32, 64, 64, 64),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
}
PUBLIC = {"cifar10": CIFAR10, "celebahq": {**SIX_LEVELS, **GOOGLE}, "example": SIX_LEVELS}
OLD_LAYERS = {"to_q.": "query.", "to_k.": "key.", "to_v.": "value.", "to_out.0.": "proj_attn."}


def public(folder, name):
    """The UNet2DModel of a public configuration, and its folder as it is on huggingface.co."""
    network = diffusers.UNet2DModel(**PUBLIC[name], norm_num_groups=8).eval()
    scramble(network)
    diffusers.DDPMPipeline(network, diffusers.DDPMScheduler()).save_pretrained(folder)
    if name != "example":  # of the first version: one flat folder, other names in attention
        weights = network.state_dict()
        for new, old in OLD_LAYERS.items():
            weights = {key.replace(new, old): value for key, value in weights.items()}
        for part in (folder / "unet", folder / "scheduler"):
            for path in part.iterdir():
                path.rename(folder / path.name)
            part.rmdir()
        safetensors.torch.save_file(weights, folder / "diffusion_pytorch_model.safetensors")
    return network


def assert_same_outputs(ours, theirs):
    found, expected = outputs(ours, (32, 32), T=1000), outputs(theirs, (32, 32), T=1000).sample
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_model_comes_in_is_trained_and_goes_back(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    theirs = public(tmp_path / "in", name)
    import_model(tmp_path / "in", tmp_path / "public.pth")
    ours = loaded(tmp_path / "public.pth")
    assert_same_outputs(ours.ema_model, theirs)
    export_model(tmp_path / "public.pth", tmp_path / "out")
    assert_same_outputs(ours.ema_model, diffusers.DDPMPipeline.from_pretrained(tmp_path / "out").unet)
    run_main("predict.py", "--model_path", "public.pth", "--num_images", "1", "--steps", "2", "--device", "cpu")
    # A run whose learning rate is too small for a change, from its weights, and resumed.
    write_pictures(tmp_path / "datasets", 4, 32)
    run_main("txt_annotation.py")
    few = ("--batch_size", "4", "--preview_period", "0", "--device", "cpu", "--precision", "fp32", "--dropout", "0")
    run_main("train.py", "--start_from", "public.pth", "--epochs", "1", "--init_lr", "1e-12", "--min_lr", "0", *few)
    run_main("train.py", "--resume", "latest", "--epochs", "2")
    run = newest_run(tmp_path)
    config = json.loads((run / "config.json").read_text())
    carried = read_file(tmp_path / "public.pth")["config"]
    assert len(carried.keys() & CARRIED) >= 2 and {key: config[key] for key in carried.keys() & CARRIED} == {
        key: carried[key] for key in carried.keys() & CARRIED
    }
    back = loaded(run / "last.pth")
    assert_same_outputs(back.ema_model, theirs)
    assert_same_outputs(back.model, theirs)


def test_the_references_code_cannot_use_such_a_model(tmp_path):
    public(tmp_path / "in", "cifar10")
    import_model(tmp_path / "in", tmp_path / "public.pth")
    with pytest.raises(ValueError, match="norm_eps 1e-06, downsample_padding 0, freq_shift 1"):
        convert.export_reference(tmp_path / "public.pth", tmp_path / "bare.pth")


@pytest.mark.parametrize(
    "unet, part",
    [
        ({"out_channels": 6}, "out_channels is 6"),
        ({"mid_block_scale_factor": 2}, "mid_block_scale_factor is 2"),
        ({"time_embedding_type": "fourier", "time_embedding_dim": 32}, "time_embedding_type is 'fourier'"),
        ({"num_class_embeds": 4}, "num_class_embeds is 4"),
        ({"act_fn": "relu"}, "act_fn is 'relu'"),
        ({"block_out_channels": (64, 96)}, "block_out_channels is"),
        ({"up_block_types": ("UpBlock2D", "UpBlock2D")}, "up_block_types is"),
        (
            {"down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D")},
            r"down_block_types is \('ResnetDownsampleBlock2D', 'AttnDownBlock2D'\) \(ours: \('DownBlock2D', ",
        ),
        ({"add_attention": False}, "add_attention is False"),
        ({"resnet_time_scale_shift": "scale_shift"}, "resnet_time_scale_shift is"),
    ],
)
def test_the_part_that_is_not_ours_is_named(tmp_path, unet, part):
    foreign(tmp_path / "in", unet)
    with pytest.raises(ValueError, match=f"not one of our networks: {part}[^;]*$"):
        import_model(tmp_path / "in", tmp_path / "back.pth")
    assert not (tmp_path / "back.pth").exists()


@pytest.mark.parametrize(
    "scheduler, part",
    [
        ({"beta_schedule": "scaled_linear"}, "scaled_linear"),
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr"),
        ({"trained_betas": [0.1, 0.3, 0.2]}, "its betas"),
        ({"prediction_type": "score"}, "prediction_type 'score'"),
        ({"trained_betas": [0.1, 0.3, 1.2]}, "between 0 and 1"),
    ],
)
def test_a_schedule_or_prediction_that_is_not_ours_is_named(tmp_path, scheduler, part):
    foreign(tmp_path / "in", scheduler=scheduler)
    with pytest.raises(ValueError, match=part):
        import_model(tmp_path / "in", tmp_path / "back.pth")


def test_other_groups_come_in(tmp_path):
    theirs = foreign(tmp_path / "in", {"norm_num_groups": 16})
    import_model(tmp_path / "in", tmp_path / "back.pth")
    back = loaded(tmp_path / "back.pth").ema_model
    assert back.out_norm.num_groups == 16
    assert_equal_networks(back, theirs.eval())


def test_settings_that_a_file_leaves_out_are_diffusers_own(tmp_path):
    theirs = foreign(tmp_path / "in", {"attention_head_dim": 8, "flip_sin_to_cos": True})
    path = tmp_path / "in" / "unet" / "config.json"
    settings = json.loads(path.read_text())
    assert settings.pop("attention_head_dim") == 8 and settings.pop("flip_sin_to_cos")
    path.write_text(json.dumps(settings))
    import_model(tmp_path / "in", tmp_path / "back.pth")
    assert_equal_networks(loaded(tmp_path / "back.pth").ema_model, theirs.eval())


def test_weights_that_do_not_fit_are_named(tmp_path):
    network = foreign(tmp_path / "in")
    for change, message in [
        (lambda w: w.pop("conv_in.bias"), "1 missing: conv_in.bias"),
        (lambda w: w.update(extra=torch.zeros(1)), "1 unknown: extra"),
        (lambda w: w.update({"conv_in.bias": torch.zeros(7)}), r"conv_in.bias \(7,\) instead of \(32,\)"),
    ]:
        weights = dict(network.state_dict())
        change(weights)
        (tmp_path / "in" / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(safetensors.torch.save(weights))
        with pytest.raises(ValueError, match=message):
            import_model(tmp_path / "in", tmp_path / "back.pth")


def test_damaged_and_missing_files_are_named(tmp_path):
    foreign(tmp_path / "in")
    for name, message in [
        ("unet/diffusion_pytorch_model.safetensors", "damaged"),
        ("scheduler/scheduler_config.json", "scheduler_config.json is not there, or damaged"),
    ]:
        (tmp_path / "in" / name).write_bytes(b"\x07")
        with pytest.raises(ValueError, match=message):
            import_model(tmp_path / "in", tmp_path / "back.pth")
    with pytest.raises(ValueError, match="config.json is not there"):
        import_model(tmp_path / "nowhere", tmp_path / "back.pth")


@pytest.mark.parametrize(
    "unet",
    [
        {"block_out_channels": 32},
        {"block_out_channels": []},
        {"block_out_channels": [32, -64]},
        {"in_channels": "three"},
        {"layers_per_block": 10**12},
        {"layers_per_block": 1.5},
        {"sample_size": [8, 8, 8]},
        {"sample_size": "small"},
        {"dropout": None},
        {"norm_num_groups": 0},
        {"down_block_types": [1, 2]},
        {"down_block_types": ["DownBlock2D"]},
        {"block_out_channels": [10**9, 10**9]},
        {"_class_name": "UNet2DConditionModel"},
        {"_class_name": None},
    ],
    ids=str,
)
def test_an_odd_network_is_refused_in_one_line(tmp_path, unet):
    foreign(tmp_path / "in")
    path = tmp_path / "in" / "unet" / "config.json"
    settings = json.loads(path.read_text()) | unet
    path.write_text(json.dumps({name: value for name, value in settings.items() if name != "_class_name" or value}))
    assert_refused(tmp_path, "not one of our networks|not of one of our networks")


@pytest.mark.parametrize(
    "scheduler",
    [
        {"num_train_timesteps": -1},
        {"num_train_timesteps": "many"},
        {"beta_start": None},
        {"trained_betas": "none"},
        {"trained_betas": []},
        {"trained_betas": [[0.1, 0.2]]},
        {"_class_name": 3},
    ],
    ids=str,
)
def test_an_odd_scheduler_is_refused_in_one_line(tmp_path, scheduler):
    foreign(tmp_path / "in")
    path = tmp_path / "in" / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | scheduler))
    assert_refused(tmp_path, "scheduler_config.json is damaged, or")


def test_a_scheduler_of_any_length_is_refused_before_it_fills_the_memory(tmp_path, monkeypatch):
    foreign(tmp_path / "in")
    path = tmp_path / "in" / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_train_timesteps": 10**9}))
    monkeypatch.setattr(diffusers.DDPMScheduler, "from_config", lambda _: pytest.fail("12 GB would be filled"))
    assert_refused(tmp_path, "num_timesteps is 1000000000: expected a whole number from 1 to 1000000")


def assert_refused(folder, message):
    """By one line that our own code raises: run_script shows any other error as a traceback."""
    with pytest.raises(ValueError, match=message) as caught:
        import_model(folder / "in", folder / "back.pth")
    raised_in = traceback.extract_tb(caught.value.__traceback__)[-1]
    assert Path(raised_in.filename).name == "diffusers_folder.py" and raised_in.line.startswith("raise ")
    assert "\n" not in str(caught.value) and not (folder / "back.pth").exists()


def test_weights_that_are_not_finite_are_refused(tmp_path):
    network = foreign(tmp_path / "in")
    weights = {**network.state_dict(), "conv_in.bias": torch.full((32,), torch.nan)}
    safetensors.torch.save_file(weights, tmp_path / "in" / "unet" / "diffusion_pytorch_model.safetensors")
    assert_refused(tmp_path, "its weights hold NaN")


def test_settings_without_an_object_are_damaged(tmp_path):
    foreign(tmp_path / "in")
    (tmp_path / "in" / "unet" / "config.json").write_text("[1, 2]")
    assert_refused(tmp_path, "config.json is not there, or damaged")


def test_the_network_is_never_asked(tmp_path, monkeypatch):
    import socket

    write_checkpoint(tmp_path / "a.pth")
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: pytest.fail("asked the network"))
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("asked the network"))
    export_model(tmp_path / "a.pth", tmp_path / "out")
    import_model(tmp_path / "out", tmp_path / "back.pth")
    shutil.rmtree(tmp_path / "out" / "unet")
    with pytest.raises(ValueError, match="config.json is not there"):
        import_model(tmp_path / "out", tmp_path / "other.pth")


def test_without_diffusers_one_line_says_so(tmp_path, monkeypatch):
    write_checkpoint(tmp_path / "a.pth")
    monkeypatch.setitem(sys.modules, "diffusers", None)
    for call in (
        lambda: export_model(tmp_path / "a.pth", tmp_path / "out"),
        lambda: import_model(tmp_path, tmp_path / "back.pth"),
    ):
        with pytest.raises(ValueError, match="need the package diffusers: pip install diffusers"):
            call()
    assert [path.name for path in tmp_path.iterdir()] == ["a.pth"]


# The command


def test_the_command_exports_and_imports(tmp_path, monkeypatch, capsys):
    ours = write_checkpoint(tmp_path / "run" / "last.pth", CLASSES)
    command = [
        sys.executable,
        "-m",
        "utils.convert",
        "diffusers",
        tmp_path / "run",
        tmp_path / "out",
        "--class_name",
        "old trees",
    ]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)
    assert done.returncode == 0 and "num_inference_steps=40" in done.stdout, done.stderr
    monkeypatch.setattr(sys, "argv", ["convert", "import", str(tmp_path / "out"), str(tmp_path / "back.pth")])
    convert.main()
    expected = outputs(ours.ema_model, y=torch.full((3,), 2))
    torch.testing.assert_close(outputs(loaded(tmp_path / "back.pth").ema_model), expected, rtol=0, atol=1e-4)
    with pytest.raises(SystemExit):
        run_script(convert.main)
    error = f"error: {tmp_path / 'back.pth'} is there already: choose another name, or move it away\n"
    assert capsys.readouterr().err == error
