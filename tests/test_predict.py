"""predict.py as a user runs it, on a model trained in a few steps."""

import errno
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import PROJECT, TINY, newest_run, read_file, run, run_main, torchrun, write_pictures
from PIL import EpsImagePlugin, Image

import predict
from nets import GaussianDiffusion, build, seeded_noise, slerp
from nets.samplers import half_log_snr
from nets.sampling import SamplingOptions, sampling_schedule
from utils.checkpoint.file import load_checkpoint
from utils.checkpoint.integrity import save_tensors
from utils.convert.__main__ import export_weights
from utils.device import memory_format
from utils.files import locked
from utils.images import make_grid, save_png, to_uint8

# Long steps, and a prediction that is not clipped everywhere: so the pictures show what differs.
TRAINING = [*TINY, "--epochs", "3", "--init_lr", "0.02", "--prediction", "v", "--precision", "fp32"]
CLASSES = ["--class_conditional", "True"]
SIZE, PADDING = 8, 2


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """(a run without classes, one with the classes `even` and `odd` and a null class), each a
    folder.
    """
    folder = tmp_path_factory.mktemp("trained")
    write_pictures(folder / "datasets")
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run_main("txt_annotation.py")
        for options in ([], [*CLASSES, "--resize_mode", "pad", "--background", "255,0,0"]):
            run_main("train.py", *TRAINING, *options, "--save_dir", folder / f"logs{len(found)}" / "logs")
            found.append(newest_run(folder / f"logs{len(found)}"))
    tell_classes_apart(found[1] / "last.pth")
    return found


def tell_classes_apart(path):
    """A few steps do not teach a network what a class is: make what it knows of them weigh more."""
    checkpoint = read_file(path)
    for name, value in checkpoint["weights"].items():
        value *= 10 if "class_bias" in name else 1
    save_tensors(path, checkpoint)


@pytest.fixture
def plain(runs, tmp_path, monkeypatch):
    """The run without classes, and an empty folder to draw in."""
    monkeypatch.chdir(tmp_path)
    return runs[0]


@pytest.fixture
def classy(runs, tmp_path, monkeypatch):
    """The run with classes, and an empty folder to draw in."""
    monkeypatch.chdir(tmp_path)
    return runs[1]


def draw(model, *options, out="out"):
    """Run predict.py and return its folder."""
    run_main(
        "predict.py",
        "--model_path",
        model,
        "--device",
        "cpu",
        "--precision",
        "fp32",
        "--save_dir",
        out,
        "--steps",
        "3",
        *options,
    )
    return Path(out)


def singles(folder):
    """{seed: pixels} of the single files."""
    return {int(path.stem.removeprefix("seed_")): pixels(path) for path in sorted(folder.glob("seed_*.png"))}


def names(folder):
    """What a folder holds, without its lock."""
    return sorted(path.name for path in Path(folder).iterdir() if path.name != ".lock")


def pixels(path):
    return np.array(Image.open(path))


def tiles(path, size=SIZE):
    """A grid's pictures, {(row, column): pixels}.

    Fails unless the lines between them are plain white.
    """
    grid, step = pixels(path), size + PADDING
    assert (grid.shape[0] - PADDING) % step == 0 and (grid.shape[1] - PADDING) % step == 0
    found = {}
    for row in range(grid.shape[0] // step):
        for column in range(grid.shape[1] // step):
            top, left = PADDING + row * step, PADDING + column * step
            found[row, column] = grid[top : top + size, left : left + size].copy()
            grid[top : top + size, left : left + size] = 255
    assert (grid == 255).all()
    return found


def expected(model, seeds, y=None, **settings):
    """What the library itself draws, as pixels. model: a run's folder, or a file."""
    diffusion, _ = build.from_checkpoint(load_checkpoint(model / "last.pth" if model.is_dir() else model), (SIZE, SIZE))
    diffusion = diffusion.to(memory_format=memory_format(torch.device("cpu"), "fp32"))
    return to_uint8(diffusion.sample(len(seeds), torch.device("cpu"), y, seeds=seeds, **settings))


def test_newest_run_is_drawn_as_one_picture_and_a_clean_grid(plain, capsys):
    for name, options in (("2020_older", {"prediction": "eps"}), ("2019_newer", {})):
        folder = Path("logs") / name
        folder.mkdir(parents=True)
        checkpoint = read_file(plain / "last.pth")
        save_tensors(folder / "last.pth", {**checkpoint, "config": {**checkpoint["config"], **options}})
    run_main("predict.py", "--device", "cpu", "--seed", "3", "--precision", "fp32")
    assert f"{(folder / 'last.pth').resolve()}, the newest run's" in capsys.readouterr().out
    wanted = expected(plain, list(range(3, 28)), sampler="sde-dpm++", steps=20)
    assert np.array_equal(pixels("results/predict_out/predict_1x1_results.png"), wanted[0])
    found = tiles("results/predict_out/predict_5x5_results.png")
    assert len(found) == 25
    for (row, column), picture in found.items():
        assert np.array_equal(picture, wanted[row * 5 + column])
    assert names("results/predict_out") == ["predict_1x1_results.png", "predict_5x5_results.png"]


@pytest.mark.parametrize(
    ("options", "settings"),
    [
        ("--sampler ddpm --steps 0", {"sampler": "ddpm", "steps": 20}),
        (
            "--sampler ddpm --steps 7 --variance posterior --spacing uniform",
            {"sampler": "ddpm", "steps": 7, "variance": "posterior", "spacing": "uniform"},
        ),
        ("--sampler ddim --steps 6", {"sampler": "ddim", "steps": 6}),
        (
            "--sampler ddim --steps 6 --eta 0.7 --spacing logsnr",
            {"sampler": "ddim", "steps": 6, "eta": 0.7, "spacing": "logsnr"},
        ),
        ("--sampler dpm++ --steps 6", {"sampler": "dpm++", "steps": 6}),
        ("--sampler heun --steps 6", {"sampler": "heun", "steps": 6}),
        ("--use_ema False", {"sampler": "sde-dpm++", "steps": 3, "use_ema": False}),
    ],
)
def test_options_of_the_solver_reach_it(plain, options, settings):
    out = draw(
        plain, "--seed", "5", "--num_images", "4", "--batch_size", "4", "--individual_files", "True", *options.split()
    )
    wanted = expected(plain, [5, 6, 7, 8], **settings)
    assert all(np.array_equal(singles(out)[5 + i], wanted[i]) for i in range(4))
    if "sampler" in options or "False" in options:  # the setting shows: it is not the default's picture
        assert not np.array_equal(wanted, expected(plain, [5, 6, 7, 8], sampler="sde-dpm++", steps=3))


def test_class_grid_has_a_row_a_class(classy, capsys):
    grid = tiles(draw(classy, "--seed", "10", "--batch_size", "10") / "predict_5x5_results.png")
    assert "a row of each class, from the top: even, odd" in capsys.readouterr().out
    assert len(grid) == 10
    labels = torch.tensor([0] * 5 + [1] * 5)
    wanted = expected(classy, list(range(10, 20)), labels, sampler="sde-dpm++", steps=3)
    one_class = expected(classy, list(range(10, 20)), torch.zeros(10, dtype=torch.long), sampler="sde-dpm++", steps=3)
    for (row, column), picture in grid.items():
        assert np.array_equal(picture, wanted[row * 5 + column])
    assert np.abs(wanted[5:].astype(int) - one_class[5:]).max() > 1


def test_a_model_with_classes_samples_without_slow_imports(classy):
    code = "import sys, predict; predict.main(); assert not {'torchvision', 'torch._dynamo'} & set(sys.modules)"
    options = ["--model_path", classy, "--save_dir", Path("out").resolve(), "--num_images", "1", "--steps", "1"]
    done = subprocess.run([sys.executable, "-c", code, *options], cwd=PROJECT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_one_class_and_guidance(classy):
    options = [
        "--seed",
        "4",
        "--num_images",
        "3",
        "--batch_size",
        "3",
        "--class_name",
        "odd",
        "--individual_files",
        "True",
    ]
    odd = torch.ones(3, dtype=torch.long)
    pictures = {}
    for scale in (1, 3):
        pictures[scale] = singles(draw(classy, *options, "--guidance_scale", scale, out=f"by{scale}"))
        wanted = expected(classy, [4, 5, 6], odd, sampler="sde-dpm++", steps=3, guidance_scale=scale)
        assert all(np.array_equal(pictures[scale][4 + i], wanted[i]) for i in range(3))
    assert not np.array_equal(pictures[1][4], pictures[3][4])


def test_guidance_within_an_interval_and_by_a_weaker_model(runs, classy, plain, capsys):
    """Against `sample`, with classes and without; a guiding model of other classes is refused."""
    diffusion = build.from_checkpoint(load_checkpoint(plain / "last.pth"))[0]
    middle = half_log_snr(sampling_schedule(diffusion.alpha_bars, SamplingOptions("sde-dpm++", 3))[1].alpha_bar_t)
    interval = (round(middle - 0.1, 3), round(middle + 0.1, 3))
    for model, y, labels in ((classy, torch.ones(3, dtype=torch.long), ["--class_name", "odd"]), (plain, None, [])):
        for file, factor in (("weaker.pth", 0.8), ("weak.pth", 0.9)):
            weak = read_file(model / "last.pth")
            for value in (value for value in weak["weights"].values() if value.ndim > 1):
                value *= factor
            save_tensors(file, weak)
        guide = build.from_checkpoint(load_checkpoint("weak.pth"))[0].to(
            memory_format=memory_format(torch.device("cpu"), "fp32")
        )
        common = [
            "--seed",
            "4",
            "--num_images",
            "3",
            "--batch_size",
            "3",
            "--individual_files",
            "True",
            "--guidance_scale",
            "3",
            *labels,
        ]
        choices = {
            "interval": {"guidance_interval": interval},
            "model": {"guiding_model": guide},
            "both": {"guidance_interval": interval, "guiding_model": guide},
        }
        for name in choices if labels else ("model", "both"):
            options = ["--guidance_interval", "{},{}".format(*interval)] if name in ("interval", "both") else []
            options += ["--guiding_path", "weak.pth"] if name in ("model", "both") else []
            found = singles(draw(model, *common, *options, out=f"{model.parent.parent.name}_{name}"))
            wanted = expected(model, [4, 5, 6], y, sampler="sde-dpm++", steps=3, guidance_scale=3, **choices[name])
            assert all(np.array_equal(found[4 + i], wanted[i]) for i in range(3)), name
            without = expected(model, [4, 5, 6], y, sampler="sde-dpm++", steps=3)
            assert not np.array_equal(wanted, without), name
            other = ["--guiding_path", "weaker.pth"] if name != "interval" else []  # without the interval
            with pytest.raises(SystemExit):
                draw(model, *common, *other, out=f"{model.parent.parent.name}_{name}")
            differs = capsys.readouterr().err.splitlines()[-1].partition("differs in ")[2]
            assert ("guidance_interval" in differs) == (name != "model")
            assert ("guiding weights" in differs) == (name != "interval")


def test_a_guiding_model_that_leads_nowhere_or_elsewhere_is_refused(runs, plain, capsys):
    """Also the model's own half-precision copy."""
    export_weights(plain, "half.pth")
    checkpoint = read_file(plain / "last.pth")
    for file, config in (
        ("large.pth", {"input_shape": (16, 16)}),
        ("linear.pth", {"schedule": "cosine"}),
        ("deep.pth", {"channel_mults": (1, 2)}),
    ):
        weights = build.from_config({**checkpoint["config"], **config}).state_dict()
        save_tensors(file, {**checkpoint, "config": {**checkpoint["config"], **config}, "weights": weights})
    save_tensors("short.pth", {**checkpoint, "weights": dict(list(checkpoint["weights"].items())[:-9])})
    for path, words in (
        (runs[1], "the guiding model has another number of classes"),
        (plain, "has the same weights"),
        ("half.pth", "has the same weights"),
        ("gone.pth", "gone.pth"),
        ("large.pth", "the guiding model learned another input_shape"),
        ("linear.pth", "the guiding model has another schedule"),
        ("short.pth", "the guiding model: "),
    ):
        with pytest.raises(SystemExit):
            draw(plain, "--guidance_scale", "2", "--guiding_path", path)
        assert words in capsys.readouterr().err.splitlines()[-1], path
    draw(plain, "--guidance_scale", "2", "--guiding_path", "deep.pth")  # a smaller network is fine
    assert "3 steps, guidance 2; 25 images" in capsys.readouterr().out
    raw = ["--guidance_scale", "2", "--guiding_path", "deep.pth", "--use_ema", "False", "--guidance_interval"]
    draw(plain, *raw, "-9,9")
    assert "guidance 2 for lambda from -9 to 9; 25 images" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        draw(plain, *raw, "50,60")
    assert "no step is in the guidance_interval (50.0, 60.0)" in capsys.readouterr().err.splitlines()[-1]


def test_many_classes_take_turns(plain, capsys):
    checkpoint = read_file(plain / "last.pth")
    config = {**checkpoint["config"], "class_conditional": True, "label_dropout": 0.1, "attention_resolutions": ()}
    classes = [f"kind {number}" for number in range(12)]
    weights = build.from_config(config, len(classes)).state_dict()
    save_tensors("many.pth", {"config": config, "classes": classes, "weights": weights, "weights_kind": "full"})
    out = draw("many.pth", "--seed", "0", "--steps", "1", out="grid")
    assert "and 2 more" in capsys.readouterr().out
    assert len(tiles(out / "predict_5x5_results.png")) == 50
    out = draw("many.pth", "--seed", "0", "--steps", "1", "--num_images", "61", "--individual_files", "True")
    found = [Image.open(path).text["class"] for path in sorted(out.glob("seed_*.png"))]
    assert found == [name for name in classes for _ in range(5)] + ["kind 0"]


def test_a_picture_depends_on_its_seed_alone(plain):
    many = singles(
        draw(plain, "--seed", "5", "--num_images", "7", "--batch_size", "3", "--individual_files", "True", out="many")
    )
    assert sorted(many) == list(range(5, 12))
    alone = draw(plain, "--seed", "9", "--num_images", "1", "--batch_size", "3", out="alone")
    assert np.array_equal(pixels(alone / "predict_1x1_results.png"), many[9])
    assert list(tiles(alone / "predict_5x5_results.png")) == [(0, 0)]
    other = singles(
        draw(plain, "--seed", "5", "--num_images", "7", "--batch_size", "7", "--individual_files", "True", out="other")
    )
    assert max(np.abs(other[seed].astype(int) - many[seed]).max() for seed in many) <= 1
    assert not np.array_equal(many[5], many[6])


def test_seed_minus_one_draws_a_seed_and_prints_it(plain, capsys):
    seeds = []
    for out in ("one", "two"):
        draw(plain, "--num_images", "1", "--batch_size", "1", out=out)
        seeds.append(int(re.search(r"from seed (\d+) on", capsys.readouterr().out)[1]))
    assert seeds[0] != seeds[1]
    draw(plain, "--num_images", "1", "--batch_size", "1", "--seed", seeds[0], out="again")
    again = pixels("again/predict_1x1_results.png")
    assert np.array_equal(again, pixels("one/predict_1x1_results.png"))
    assert not np.array_equal(again, pixels("two/predict_1x1_results.png"))


def test_two_processes_and_other_outputs_draw_the_same(plain, tmp_path):
    options = ["--seed", "5", "--num_images", "7", "--batch_size", "2", "--individual_files", "True", "--npz", "True"]
    one = draw(plain, *options, out="one")
    fixed = ["--model_path", plain, "--device", "cpu", "--precision", "fp32", "--save_dir", "two", "--steps", "3"]
    run(torchrun(2, "predict.py", *fixed, *options, "--trajectory", "True"), tmp_path)
    more = ["predict_trajectory_results.png", "predict_trajectory_results.gif"]
    assert names("two") == sorted(names(one) + more)
    for name in names(one):
        assert (one / name).read_bytes() == Path("two", name).read_bytes(), name
    assert len(tiles("two/predict_trajectory_results.png")) == 4 * 2 * 3  # pictures drawn by both processes


def test_picture_to_start_from_is_converted_as_in_training(classy):
    blue = np.zeros((40, 80, 3), np.uint8) + np.array([0, 0, 255], np.uint8)
    save_png("wide.png", blue)
    padded = torch.tensor([255.0, 0, 0]).reshape(1, 3, 1, 1).repeat(1, 1, SIZE, SIZE)  # this run pads with red
    padded[:, :, 2:6] = torch.tensor([0, 0, 255.0]).reshape(3, 1, 1)
    init = (padded / 127.5 - 1).expand(2, -1, -1, -1)
    even = torch.zeros(2, dtype=torch.long)
    options = [
        "--init_image",
        "wide.png",
        "--seed",
        "2",
        "--num_images",
        "2",
        "--batch_size",
        "2",
        "--class_name",
        "even",
    ]
    for given, strength in (([], 0.6), (["--strength", "0.25"], 0.25)):
        out = draw(classy, *options, *given, "--individual_files", "True", out=f"out{strength}")
        wanted = expected(classy, [2, 3], even, sampler="sde-dpm++", steps=3, init=init, strength=strength)
        assert all(np.array_equal(singles(out)[2 + i], wanted[i]) for i in range(2)), strength


def test_mask_keeps_what_is_black_in_it(plain, capsys):
    write_pictures(".", count=1, seed=3)
    picture = pixels("even/000.png")
    mask = np.zeros((16, 16, 1), np.uint8)
    mask[:, 8:] = 255
    save_png("mask.png", mask)
    options = [
        "--init_image",
        "even/000.png",
        "--mask",
        "mask.png",
        "--num_images",
        "2",
        "--batch_size",
        "2",
        "--seed",
        "1",
    ]
    out = draw(plain, *options, "--resamplings", "2", "--individual_files", "True")
    assert "; ddpm, 3 steps" in capsys.readouterr().out
    for drawn in singles(out).values():
        assert np.array_equal(drawn[:, :4], picture[:, :4])
        assert (drawn[:, 4:] != picture[:, 4:]).mean() > 0.5
    once = draw(plain, *options, "--resamplings", "1", "--strength", "0.5", out="once")
    known, new = torch.from_numpy(picture).permute(2, 0, 1)[None] / 127.5 - 1, torch.zeros(1, 1, SIZE, SIZE)
    new[..., 4:] = 1
    both = known.expand(2, -1, -1, -1)
    wanted = expected(
        plain, [1, 2], sampler="ddpm", steps=3, known=both, mask=new, resamplings=1, init=both, strength=0.5
    )
    assert np.array_equal(pixels(once / "predict_1x1_results.png"), wanted[0])


def test_strip_between_two_seeds(plain, capsys):
    ends = singles(
        draw(plain, "--seed", "3", "--num_images", "10", "--batch_size", "5", "--individual_files", "True", out="ends")
    )
    options = [
        "--seed",
        "3",
        "--seed_to",
        "12",
        "--interpolate",
        "6",
        "--batch_size",
        "5",
        "--individual_files",
        "True",
    ]
    out = draw(plain, *options, "--npz", "True")
    strip = tiles(out / "predict_interpolation_results.png")
    assert list(strip) == [(0, column) for column in range(6)]
    assert (
        np.abs(strip[0, 0].astype(int) - ends[3]).max() <= 1 and np.abs(strip[0, 5].astype(int) - ends[12]).max() <= 1
    )
    away = [np.abs(strip[0, column].astype(int) - ends[3]).mean() for column in range(6)]
    assert away == sorted(away) and away[1] > 0
    assert [np.array_equal(pixels(path), strip[0, i]) for i, path in enumerate(sorted(out.glob("between_*.png")))] == [
        True
    ] * 6
    assert np.array_equal(np.load(out / "predict_results.npz")["arr_0"], np.stack(list(strip.values())))
    # to the next seed, if none is given
    draw(plain, "--seed", "3", "--interpolate", "2", "--batch_size", "5", out="next")
    neighbours = tiles("next/predict_interpolation_results.png")
    assert np.abs(neighbours[0, 1].astype(int) - ends[4]).max() <= 1


def test_strip_within_a_class_ends_at_both_seeds_pictures_with_a_noisy_solver_too(classy):
    options = ["--interpolate", "3", "--seed", "3", "--batch_size", "3", "--class_name", "odd", "--sampler", "ddpm"]
    strip = tiles(draw(classy, *options) / "predict_interpolation_results.png")
    odd = torch.ones(3, dtype=torch.long)
    halfway = (
        slerp(a, b, 0.5).expand(3, -1, -1, -1) for a, b in seeded_noise((3, 4), (3, SIZE, SIZE), torch.device("cpu"))
    )
    middle = expected(classy, [0, 0, 0], odd, sampler="ddpm", steps=3, noise=halfway)[0]
    ends = expected(classy, [3, 4, 5], odd, sampler="ddpm", steps=3)
    for column, wanted in enumerate((ends[0], middle, ends[1])):
        assert np.abs(strip[0, column].astype(int) - wanted).max() <= 1


def test_trajectory_shows_the_way_to_the_same_pictures(plain):
    options = ["--seed", "5", "--num_images", "6", "--batch_size", "4", "--steps", "14"]
    grid = tiles(draw(plain, *options, out="without") / "predict_5x5_results.png")
    out = draw(plain, *options, "--trajectory", "True")
    assert (out / "predict_5x5_results.png").read_bytes() == Path("without/predict_5x5_results.png").read_bytes()
    strip = tiles(out / "predict_trajectory_results.png")
    assert len(strip) == 4 * 2 * 10
    for number in range(4):
        assert np.array_equal(strip[2 * number, 9], grid[0, number])  # x_t ends as the picture,
        # and so does the predicted x_0, without noise to come
        assert np.array_equal(strip[2 * number + 1, 9], grid[0, number])
        assert not np.array_equal(strip[2 * number, 0], strip[2 * number + 1, 0])
    with Image.open(out / "predict_trajectory_results.gif") as animation:
        assert animation.n_frames == 14
        animation.seek(13)
        last = np.array(animation.convert("RGB")).astype(int)
    assert np.abs(last - pixels(out / "predict_5x5_results.png")).mean() < 8  # 256 colours, all of the grid


def test_npz_holds_all_pictures_in_order(plain, monkeypatch):
    seen = []  # in the folder while it is drawn: nothing is left there by whatever kills the process
    monkeypatch.setattr(predict, "to_uint8", lambda x: (seen.extend(names("out")), to_uint8(x))[1])
    out = draw(
        plain, "--seed", "5", "--num_images", "30", "--batch_size", "4", "--individual_files", "True", "--npz", "True"
    )
    with np.load(out / "predict_results.npz") as archive:
        assert archive.files == ["arr_0"]
        found = archive["arr_0"]
    assert found.dtype == np.uint8 and found.shape == (30, SIZE, SIZE, 3)
    assert np.array_equal(found, np.stack([picture for _, picture in sorted(singles(out).items())]))
    assert len(tiles(out / "predict_5x5_results.png")) == 25
    assert seen and all(name.startswith("seed_") for name in seen)


def test_an_npz_that_does_not_fit_on_the_disk_is_refused_before_drawing(plain, monkeypatch, capsys):
    def disk_full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", disk_full)
    batches = count_batches(monkeypatch)
    with pytest.raises(SystemExit):
        draw(plain, "--num_images", "3", "--npz", "True")
    assert "too little space for the .npz" in capsys.readouterr().err
    assert batches == [] and names("out") == []


def count_batches(monkeypatch, fail_at=None):
    """A list that grows with every batch that is drawn; the one with the number `fail_at` fails."""
    batches, original = [], GaussianDiffusion.sample_steps

    def counted(self, *args, **kwargs):
        batches.append(kwargs["seeds"])
        if len(batches) == fail_at:
            raise RuntimeError("no electricity")
        return original(self, *args, **kwargs)

    monkeypatch.setattr(GaussianDiffusion, "sample_steps", counted)
    return batches


def test_single_files_go_on_where_they_stopped(plain, monkeypatch):
    options = ["--seed", "5", "--num_images", "8", "--batch_size", "3", "--individual_files", "True", "--npz", "True"]
    whole = draw(plain, *options, out="whole")
    with monkeypatch.context() as patch:
        count_batches(patch, fail_at=3)
        with pytest.raises(RuntimeError, match="no electricity"):
            draw(plain, *options)
    out = Path("out")
    # no part of a file
    assert names(out) == [f"seed_{seed:010d}.png" for seed in range(5, 11)]
    (out / "seed_0000000006.png").unlink()
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    batches = count_batches(monkeypatch)
    draw(plain, *options)
    assert batches == [[5, 6, 7], [11, 12, 13]]  # 8, 9 and 10 are there
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    for path in whole.iterdir():
        assert path.read_bytes() == (out / path.name).read_bytes(), path.name
    draw(plain, *options, "--trajectory", "True")
    assert len(batches) == 5  # how pictures formed is no file: it takes drawing them once more
    assert (out / "predict_results.npz").read_bytes() == (whole / "predict_results.npz").read_bytes()


def test_other_first_seed_shares_the_files(plain, monkeypatch):
    out = draw(plain, "--seed", "5", "--num_images", "4", "--batch_size", "2", "--individual_files", "True")
    batches = count_batches(monkeypatch)
    draw(plain, "--seed", "7", "--num_images", "4", "--batch_size", "2", "--individual_files", "True")
    assert batches == [[9, 10]] and sorted(singles(out)) == [5, 6, 7, 8, 9, 10]


@pytest.mark.parametrize(
    ("options", "differs"),
    [
        ("--steps 4", "steps"),
        ("--sampler ddim", "sampler"),
        ("--use_ema False", "use_ema, weights"),
        ("--spacing uniform", "spacing"),
        ("--class_name even", "class"),
        ("--guidance_scale 2", "guidance_scale"),
        ("--input_shape 16,16", "size"),
        ("--init_image a.png", "init"),
        ("--precision bf16", "precision"),
    ],
)
def test_files_of_other_settings_are_neither_taken_nor_overwritten(classy, capsys, options, differs):
    save_png("a.png", np.zeros((SIZE, SIZE, 3), np.uint8))
    common = ["--seed", "5", "--num_images", "2", "--batch_size", "2", "--individual_files", "True"]
    out = draw(classy, *common, "--class_name", "odd")
    before = {path: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(SystemExit):
        draw(classy, *common, *(["--class_name", "odd"] if "class" not in options else []), *options.split())
    line = capsys.readouterr().err.splitlines()[-1]
    assert "seed_0000000005.png is there already and differs in" in line and differs in line
    assert {path: path.read_bytes() for path in out.iterdir()} == before


def test_files_with_more_in_them_are_not_taken_either(plain, capsys):
    write_pictures(".", count=1)
    common = ["--seed", "5", "--num_images", "1", "--batch_size", "1", "--individual_files", "True"]
    draw(plain, *common, "--init_image", "even/000.png", "--strength", "1")
    for options, words in (([], "differs in strength, init"), (["--seed", "6"], "cannot be read")):
        Path("out/seed_0000000006.png").write_bytes(Path("out/seed_0000000005.png").read_bytes()[:150])
        with pytest.raises(SystemExit):
            draw(plain, *common, *options)
        assert words in capsys.readouterr().err.splitlines()[-1]


MANY = ["--seed", "5", "--num_images", "4", "--batch_size", "2", "--individual_files", "True"]


def at_batch(monkeypatch, number, action):
    """Calls action() before the batch `number` is sampled, counted from 0."""
    original, count = GaussianDiffusion.sample_steps, iter(range(1000))

    def counted(self, *args, **kwargs):
        if next(count) == number:
            action()
        return original(self, *args, **kwargs)

    monkeypatch.setattr(GaussianDiffusion, "sample_steps", counted)


def test_two_runs_at_once_do_not_mix_in_one_folder(plain, monkeypatch, capsys):
    """The second one begins while the first one samples: it is refused, whatever its model."""
    weights = read_file(plain / "last.pth")
    save_tensors("other.pth", {**weights, "weights": {name: 0.9 * x for name, x in weights["weights"].items()}})
    wanted = singles(draw(plain, *MANY, out="alone"))
    codes = []

    def second_run():
        for options in (MANY, ["--num_images", "1"]):
            with pytest.raises(SystemExit) as end:
                draw("other.pth", *options)
            codes.append(end.value.code)
            assert "another process writes to" in capsys.readouterr().err.splitlines()[-1]

    at_batch(monkeypatch, 1, second_run)
    found = singles(draw(plain, *MANY))
    assert codes == [1, 1] and found.keys() == wanted.keys()
    assert all(np.array_equal(found[seed], wanted[seed]) for seed in wanted)


def test_a_file_that_appears_meanwhile_is_compared(plain, monkeypatch, capsys):
    """As if this file system had no locks."""
    for options, refused in (([], False), (["--steps", "4"], True)):
        folder = f"with_{refused}"
        other = (draw(plain, *MANY, *options, out=f"for_{refused}") / "seed_0000000008.png").read_bytes()
        with monkeypatch.context() as patch:
            at_batch(patch, 1, lambda: Path(folder, "seed_0000000008.png").write_bytes(other))  # noqa: B023
            if refused:
                with pytest.raises(SystemExit):
                    draw(plain, *MANY, out=folder)
                assert "seed_0000000008.png is there already and differs in steps" in capsys.readouterr().err
            else:
                draw(plain, *MANY, out=folder)
        assert Path(folder, "seed_0000000008.png").read_bytes() == other


def test_a_file_of_another_device_is_not_taken(plain, capsys):
    """Its generator gives other noise."""
    path = draw(plain, *MANY) / "seed_0000000006.png"
    with Image.open(path) as image:
        text, drawn = dict(image.text), np.asarray(image)
    assert text["device"] == "cpu" and text["precision"] == "fp32"
    save_png(path, drawn, {**text, "device": "cuda"})
    with pytest.raises(SystemExit):
        draw(plain, *MANY)
    assert (
        capsys.readouterr()
        .err.splitlines()[-1]
        .endswith("differs in device: move it away, or choose another --save_dir")
    )


def test_a_rerun_removes_what_a_killed_run_left_half_written(plain, monkeypatch, capsys):
    """But nothing of another program's, and nothing while another run is alive."""
    spools = []
    monkeypatch.setattr(os, "posix_fallocate", lambda *_: spools.extend(Path("out").glob(".predict*")))
    draw(plain, "--num_images", "1", "--npz", "True")
    left = [
        ".seed_0000000005.png.0123abcd.tmp",
        ".predict_5x5_results.png.0123abcd.tmp",
        *map(os.path.basename, spools),
    ]
    kept = [".train_lines.txt.0123abcd.tmp", ".seed.tmp", "seed_1.tmp"]
    assert len(left) == 3 and not set(left) & set(names("out"))
    for name in left + kept:
        Path("out", name).write_bytes(b"half")
    with locked("out", "busy"), pytest.raises(SystemExit):
        draw(plain, *MANY)
    assert {*left, *kept} <= set(names("out"))
    draw(plain, *MANY)
    assert not set(left) & set(names("out")) and set(kept) < set(names("out"))


def test_outputs_replace_links_and_say_where_they_are(plain, capsys):
    """A folder from someone else: no fixed name redirects a write, and no line names its target."""
    outputs = [f"predict_{name}" for name in ("1x1_results.png", "5x5_results.png", "results.npz")]
    outputs += ["predict_trajectory_results.png", "predict_trajectory_results.gif"]
    secrets = [".lock", "seed_0000000005.png", f".predict_results.{os.getpid()}.tmp"]
    Path("out").mkdir()
    for number, name in enumerate(outputs + secrets):
        Path("out", name).symlink_to(f"../there_{number}")
        if name not in secrets[:2]:  # a dangling link else
            Path(f"there_{number}").write_text("mine")
    before = names(".")
    draw(plain, *MANY, "--npz", "True", "--trajectory", "True")
    said = capsys.readouterr().out
    assert names(".") == before and all(Path(name).read_text() == "mine" for name in before if name != "out")
    for name in outputs:
        assert not Path("out", name).is_symlink() and str(Path("out").resolve() / name) in said.splitlines()


def test_other_things_in_the_place_of_outputs_are_refused_before_the_first_step(plain, monkeypatch, capsys):
    """Neither a pipe blocks, nor does a PostScript file start a program."""
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: pytest.fail("a program is started"))
    single, grid = "seed_0000000005.png", "predict_5x5_results.png"
    finished = draw(plain, *MANY, out="finished") / single
    with Image.open(finished) as image:
        text, drawn = dict(image.text), np.asarray(image)

    def write_eps(path):
        Image.new("RGB", (8, 8)).save(path, "EPS")

    for place, make, words in (
        (single, write_eps, "cannot be read"),
        (single, os.mkfifo, "is no regular file"),
        (single, os.mkdir, "is a folder"),
        (single, lambda path: Path(path).symlink_to(os.devnull), f"{single} cannot be read (is no regular file"),
        (single, lambda path: save_png(path, drawn[:4], text), "differs in size"),
        (single, lambda path: save_png(path, drawn[..., :1], text), "differs in size"),
        (grid, os.mkfifo, "is no file"),
        (grid, os.mkdir, "is no file"),
    ):
        folder = Path(f"out{len(names('.'))}")
        folder.mkdir()
        make(folder / place)
        batches = count_batches(monkeypatch)
        with pytest.raises(SystemExit):
            draw(plain, *MANY, out=folder)
        assert words in capsys.readouterr().err.splitlines()[-1], words
        assert batches == [] and names(folder) == [place]


@pytest.mark.parametrize("setting", ["init_image", "mask"])
def test_given_images_are_read_as_those_of_training(plain, monkeypatch, capsys, setting):
    """By the formats that the project reads, whatever the name says: no PostScript, no pipe."""
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: pytest.fail("a program is started"))
    Image.new("RGB", (8, 8)).save("photo.png")
    Image.new("RGB", (8, 8)).save("eps.png", "EPS")
    os.mkfifo("pipe.png")
    for name, words in (("eps.png", "not an image, or of an unknown format"), ("pipe.png", "is no regular file")):
        images = {"init_image": "photo.png", setting: name}
        with pytest.raises(SystemExit):
            draw(plain, *(word for option, value in images.items() for word in (f"--{option}", value)))
        assert f"{name}: cannot be read as an image ({words}" in capsys.readouterr().err.splitlines()[-1]


def test_images_without_content_are_said(plain, capsys):
    """Weights that training has ruined draw black, and the files look like any others."""
    draw(plain, *MANY)
    assert "warning" not in capsys.readouterr().out
    checkpoint = read_file(plain / "last.pth")
    for name, value in checkpoint["weights"].items():
        value *= 1e8 if "model." in name else 1
    save_tensors("large.pth", checkpoint)
    for _ in range(2):  # drawn, then taken from the files
        draw("large.pth", *MANY, out="large")
        assert "warning: a single color fills 4 of 4 images: try another" in capsys.readouterr().out.splitlines()[-1]


def test_older_results_stay_if_drawing_fails(plain, monkeypatch):
    options = ["--seed", "5", "--num_images", "4", "--batch_size", "2", "--npz", "True"]
    out = draw(plain, *options)
    before = {path: path.read_bytes() for path in out.iterdir()}
    count_batches(monkeypatch, fail_at=2)
    with pytest.raises(RuntimeError, match="no electricity"):
        draw(plain, *options, "--sampler", "ddim")
    assert {path: path.read_bytes() for path in out.iterdir()} == before


@pytest.mark.parametrize("number", [0, 1])
def test_bare_state_dict(runs, tmp_path, monkeypatch, capsys, number):
    monkeypatch.chdir(tmp_path)
    torch.save(
        {f"module.{name}": value for name, value in read_file(runs[number] / "last.pth")["weights"].items()},
        "bare.pth",
    )
    out = draw("bare.pth", "--seed", "5", "--num_images", "1", "--batch_size", "1", "--steps", "1")
    printed = capsys.readouterr().out
    assert "these weights do not say their size: sampling 32,32; --input_shape sets another" in printed
    assert ("a row of each class, from the top: 0, 1, 2" in printed) == number
    assert pixels(out / "predict_1x1_results.png").shape == (32, 32, 3)
    label = ["--class_name", "1"] if number else []
    out = draw("bare.pth", "--seed", "5", "--num_images", "1", "--batch_size", "1", "--input_shape", "8,8", *label)
    wanted = expected(Path("bare.pth"), [5], torch.tensor([1]) if number else None, sampler="sde-dpm++", steps=3)
    assert np.array_equal(pixels(out / "predict_1x1_results.png"), wanted[0])


def test_without_clipping_the_pictures_are_the_samples_without(plain):
    """The reference's sampling; individual files of one kind are not taken for the other's."""
    common = ("--seed", "5", "--num_images", "1", "--batch_size", "1", "--individual_files", "True")
    found = []
    for clip in (True, False):
        out = draw(plain, *common, "--clip", clip, out=f"out_{clip}")
        found.append(pixels(out / "predict_1x1_results.png"))
        wanted = expected(plain, [5], None, sampler="sde-dpm++", steps=3, clip=clip)
        assert np.array_equal(found[-1], wanted[0])
    assert not np.array_equal(*found)
    with pytest.raises(SystemExit):
        draw(plain, *common, "--clip", "True", out="out_False")


def test_shipped_weights_where_there_is_no_run(plain, capsys):
    """A file of one's own in logs/ goes first, and is not called the project's."""
    export_weights(plain, "logs/emoji.pth")
    draw("", "--seed", "5", "--num_images", "1", "--batch_size", "1")
    assert "emoji.pth (bundled; your newest run in logs/ takes precedence)" in capsys.readouterr().out
    export_weights(plain, "logs/ddpm.pth")
    draw("", "--seed", "5", "--num_images", "1", "--batch_size", "1")
    said = capsys.readouterr().out
    assert "ddpm.pth (a file in logs; your newest run in logs/ takes precedence)" in said and "bundled" not in said
    wanted = expected(plain, [5], sampler="sde-dpm++", steps=3)[0].astype(int)
    assert np.abs(pixels("out/predict_1x1_results.png") - wanted).max() <= 4  # half precision


def test_grey_pictures(plain):
    config = {**read_file(plain / "last.pth")["config"], "img_channels": 1, "input_shape": (8, 16)}
    weights = build.from_config(config).state_dict()
    save_tensors("grey.pth", {"config": config, "classes": [], "weights": weights, "weights_kind": "full"})
    options = ["--seed", "1", "--num_images", "6", "--batch_size", "6", "--individual_files", "True"]
    out = draw("grey.pth", *options, "--npz", "True", "--trajectory", "True")
    assert np.load(out / "predict_results.npz")["arr_0"].shape == (6, 8, 16, 1)
    assert pixels(out / "predict_1x1_results.png").shape == (8, 16)
    first = out.joinpath("predict_5x5_results.png").read_bytes()
    draw("grey.pth", *options)  # and back from the single files
    assert out.joinpath("predict_5x5_results.png").read_bytes() == first
    assert np.array_equal(
        pixels(out / "predict_5x5_results.png"), make_grid(np.load(out / "predict_results.npz")["arr_0"], 5)[..., 0]
    )


def test_precision_and_compile(plain, monkeypatch):
    options = ["--seed", "5", "--num_images", "2", "--batch_size", "2"]
    exact = pixels(draw(plain, *options, out="exact") / "predict_1x1_results.png").astype(int)
    compiled = []
    # trying the compiler takes a minute
    monkeypatch.setattr(predict, "choose_compile", lambda setting, device, calls: setting is True)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compiled.append(self))
    rough = pixels(
        draw(plain, *options, "--precision", "bf16", "--compile", "True", out="rough") / "predict_1x1_results.png"
    )
    assert 0 < np.abs(rough - exact).max() <= 16
    assert len(compiled) == 1


def test_network_calls_decide_whether_compiling_pays():
    config = predict.Config(num_images=26, batch_size=25, steps=10)
    assert predict.network_calls(config) == 20
    assert predict.network_calls(predict.replace(config, sampler="heun")) == 40
    assert predict.network_calls(predict.replace(config, mask="m.png", resamplings=7)) == 140


# The bundled checkpoint


def test_the_bundled_checkpoint_samples_its_classes():
    path = PROJECT / "logs" / "emoji.pth"
    assert path.stat().st_size < 24e6
    checkpoint = load_checkpoint(path)
    assert checkpoint.kind == "ema" and checkpoint.training is None and "optimizer" not in read_file(path)
    diffusion, classes = build.from_checkpoint(checkpoint)
    assert classes == sorted(path.name for path in (PROJECT / "datasets" / "noto_emoji").glob("*") if path.is_dir())
    samples = {}
    for name in ("faces", "flags"):
        y = torch.full((8,), classes.index(name))
        samples[name] = diffusion.sample(8, "cpu", y, steps=10, guidance_scale=2.0, seeds=range(8))
    red, green, blue = samples["faces"][:, :, 16:48, 16:48].mean((0, 2, 3))
    assert red > green > blue + 0.5  # faces are yellow
    edges = samples["flags"][..., 0:8, :]
    assert edges.mean() > 0.9  # flags are wider than high: white above them
