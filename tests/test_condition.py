"""Networks conditioned on an image: what the condition is, training, sampling, files."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import (
    TINY,
    assert_same_state,
    newest_run,
    randomize,
    read_file,
    run,
    run_main,
    stop_at_step,
    torchrun,
    write_pictures,
)
from PIL import Image

import predict as predict_module
import train
from nets import Condition, UNet, build
from nets.architecture import change_classes
from nets.condition import luminance, random_known
from nets.errors import SettingError
from utils.checkpoint.file import load_checkpoint
from utils.data.dataset import conditioned, normalize, open_dataset
from utils.data.image_format import ImageFormat
from utils.errors import UserError
from utils.training.step_rng import sample_step_noise

SMALL = {
    "input_shape": (8, 8),
    "channel": 8,
    "channel_mults": (1, 2),
    "num_res_blocks": 1,
    "attention_resolutions": (),
    "num_groups": 2,
    "num_timesteps": 20,
    "prediction": "v",
    "label_dropout": 0.1,
    "condition_scale": 2,
}
KINDS = ("low_res", "gray", "masked", "pairs")


def images_of(count=6, channels=3, size=8, seed=0):
    return torch.rand(count, channels, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def noise_of(images, seed=0):
    return torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))


def small_model(kind, **settings):
    """(GaussianDiffusion with nothing left at zero, images, their conditions)."""
    diffusion = build.from_config({**SMALL, "condition": kind, **settings}).eval()
    for network in (diffusion.model, diffusion.ema_model):
        randomize(network)
    x = images_of(channels=6 if kind == "pairs" else 3)
    return diffusion, *diffusion.condition(x, noise_of(x))


# The conditions


def test_low_res_is_the_mean_of_squares_enlarged():
    condition, x = Condition("low_res", scale=4), images_of(2, size=16)
    images, cond = condition(x, noise_of(x))
    means = torch.stack(
        [x[:, :, i : i + 4, j : j + 4].mean((2, 3)) for i in range(0, 16, 4) for j in range(0, 16, 4)], 2
    )
    torch.testing.assert_close(cond, F.interpolate(means.view(2, 3, 4, 4), size=(16, 16), mode="bicubic"))
    assert images is x and torch.equal(cond, condition.of_given(F.avg_pool2d(x, 4)))


def test_training_adds_noise_of_another_level_to_each_low_res_and_drops_some():
    condition, x, drop = Condition("low_res", scale=2), torch.zeros(4000, 1, 32, 32), torch.arange(4000) % 4 == 0
    _, cond = condition(x, noise_of(x), drop)
    assert torch.equal((cond == 0).flatten(1).all(1), drop) and cond.mean().abs() < 1e-3
    small = F.avg_pool2d(cond[~drop], 2)  # enlarging and averaging blur: about three quarters are left
    levels = small.std((1, 2, 3)).sort().values
    normal = torch.randn(3000, generator=torch.Generator().manual_seed(1)).abs().sort().values
    assert 0.6 < (levels / (0.05 * normal)).median() < 1 and levels[0] < 1e-3 and 0.1 < levels[-1] < 0.25
    assert (levels / normal)[300:2900].std() < 0.1 * (levels / normal)[300:2900].mean()  # as a half-normal's are
    assert torch.equal(condition(x, noise_of(x))[1], torch.zeros_like(x))


def test_gray_is_what_pillow_calls_luminance():
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    ours = luminance(torch.from_numpy(pixels).permute(2, 0, 1)[None].float())[0, 0]
    theirs = np.asarray(Image.fromarray(pixels).convert("L"), dtype=np.float32)
    assert np.abs(ours.numpy() - theirs).max() <= 1


def test_masked_tells_which_pixels_it_knows():
    condition, x = Condition("masked"), images_of(300, size=16)
    images, cond = condition(x, noise_of(x))
    known = cond[:, 3:]
    assert images is x and set(known.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(cond[:, :3], x * known)
    hidden = (1 - known).mean((1, 2, 3))
    assert hidden.min() > 0 and 0.15 < hidden.mean() < 0.6
    assert len(known.unique(dim=0)) > 290


def test_rectangles_and_strokes_are_where_their_numbers_say():
    """By the coordinates of each pixel, along and across a hole, in quarters of the sides."""
    height, width, away = 21, 41, [9.0, 9.0, 0.0, 0.0, -1.0]
    upright, stroke = [1.0, -0.5, 0.4, 0.9, -0.3], [0.0, 0.5, 3.0, 1.4, math.pi / 8]  # the latter at 45 degrees
    noise = torch.zeros(3, 1, height, width)
    for row, holes in enumerate(((upright, away, away), (away, stroke, away), (upright, stroke, away))):
        noise[row].view(-1)[:15] = torch.tensor(sum(holes, []))
    rectangle, line, both = 1 - random_known(noise)[:, 0]
    for row in range(height):
        for column in range(width):
            y, x = 4 * row / (height - 1) - 2, 4 * column / (width - 1) - 2
            assert rectangle[row, column] == (abs(y - 1) < 0.5 and abs(x + 0.5) < 1.0), (row, column)
            along, across = (x - 0.5 + y) / 2**0.5, (y - x + 0.5) / 2**0.5
            assert line[row, column] == (abs(along) < 1.5 and abs(across) < 0.2), (row, column)
    assert torch.equal(both, torch.maximum(rectangle, line)) and 0 < line.sum() < rectangle.sum()


def test_the_holes_of_images_differ_in_place_and_size():
    known = random_known(noise_of(torch.zeros(500, 3, 32, 32)))
    assert len(known.unique(dim=0)) == 500
    fractions = known.flatten(1).mean(1)
    assert fractions.min() < 0.3 and fractions.max() > 0.95


def test_holes_do_not_depend_on_other_images(tmp_path):
    """By the numbers of the images: whatever the batch."""
    write_pictures(tmp_path / "images")
    paths = sorted((tmp_path / "images").rglob("*.png"))
    (tmp_path / "lines.txt").write_text("".join(f"{path}\n" for path in paths))
    dataset = open_dataset(tmp_path / "lines.txt", ImageFormat((8, 8)), cache_path=tmp_path / "cache")
    diffusion = build.from_config({**SMALL, "condition": "masked"})
    x, cond = conditioned(diffusion, dataset, range(6))
    parts = [conditioned(diffusion, dataset, numbers) for numbers in ([0], np.array([1, 2]), torch.arange(3, 6))]
    assert torch.equal(torch.cat([images for images, _ in parts]), x)
    assert torch.equal(torch.cat([own for _, own in parts]), cond) and len(cond[:, 3:].unique(dim=0)) == 6


def test_of_pairs_the_left_half_is_the_condition_and_each_half_is_mirrored_in_its_place(tmp_path):
    left, right = np.zeros((4, 8, 3), np.uint8), np.full((4, 8, 3), 100, np.uint8)
    left[:, 0], right[:, 0] = 50, 200  # the first column of each
    Image.fromarray(np.concatenate((left, right), axis=1)).save(tmp_path / "pair.png")
    (tmp_path / "lines.txt").write_text(f"{tmp_path / 'pair.png'}\n")
    form = ImageFormat((4, 8), resize_mode="stretch")
    dataset = open_dataset(tmp_path / "lines.txt", form, cache_path=tmp_path / "cache", condition="pairs")
    pixels, _ = dataset.batch([0])
    assert torch.equal(dataset.images([0])[0], torch.from_numpy(right))
    assert torch.equal(next(dataset.blocks())[0], torch.from_numpy(right))
    for flip, column in ((False, 0), (True, -1)):
        x = normalize(pixels, "cpu", torch.tensor([flip]))
        image, cond = (part.add(1).mul(127.5).round()[0, :, 0] for part in Condition("pairs")(x, None))
        assert cond[0, column] == 50 and image[0, column] == 200 and (cond == 50).sum() == 3 == (image == 200).sum()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"condition": "low_res", "condition_scale": 3}, "no multiple of condition_scale 3"),
        ({"condition": "gray", "img_channels": 1}, "condition gray needs img_channels 3"),
        ({"condition": "pairs", "resize_mode": "crop"}, "condition pairs needs resize_mode stretch"),
        ({"condition": "sketch"}, "unknown condition 'sketch'; known: , low_res"),
    ],
)
def test_settings_that_do_not_fit_are_one_line(settings, words):
    with pytest.raises(SettingError, match=words):
        build.from_config({**SMALL, **settings})


# The network and its sampling


@pytest.mark.parametrize("kind", KINDS)
def test_the_network_sees_the_condition_and_none_is_zeros(kind):
    diffusion, x, cond = small_model(kind)
    t = torch.full((len(x),), 7)
    with torch.no_grad():
        output = diffusion.model(x, t, None, cond)
        assert output.shape == x.shape and not torch.allclose(output, diffusion.model(x, t))
        assert torch.equal(diffusion.model(x, t), diffusion.model(x, t, None, torch.zeros_like(cond)))
        one = diffusion.model(x[:1], t[:1], None, cond[:1])
    torch.testing.assert_close(output[:1], one)
    loss = diffusion.get_losses(x, t, None, noise=x, cond=cond, reduction="none")
    assert not torch.allclose(loss, diffusion.get_losses(x, t, None, noise=x, reduction="none"))


@pytest.mark.parametrize("kind", ["", "masked"])
def test_it_is_one_graph_and_the_memory_format_changes_nothing(kind, monkeypatch):
    checks = torch.distributions.Distribution  # the compiler turns their checks off, for all later tests too
    monkeypatch.setattr(checks, "_validate_args", checks._validate_args)
    network = randomize(
        UNet(3, 8, (1, 2), 1, num_groups=2, attention_resolutions=(), cond_channels=4 * bool(kind))
    ).eval()
    x, t, cond = images_of(), torch.arange(6), images_of(channels=4) if kind else None
    given = (x, t, None, cond) if kind else (x, t)
    expected = network(*given)
    torch.testing.assert_close(torch.compile(network, backend="eager", fullgraph=True)(*given), expected)
    last = [
        value.to(memory_format=torch.channels_last) if torch.is_tensor(value) and value.ndim == 4 else value
        for value in given
    ]
    torch.testing.assert_close(network.to(memory_format=torch.channels_last)(*last), expected, rtol=1e-4, atol=1e-5)


def test_a_network_without_conditions_has_the_parameters_of_before():
    plain, none = UNet(3, 8, num_groups=2), UNet(3, 8, num_groups=2, cond_channels=0)
    assert {name: p.shape for name, p in plain.state_dict().items()} == {
        name: p.shape for name, p in none.state_dict().items()
    }


def test_a_network_without_conditions_refuses_one():
    network, t = UNet(3, 8, (1,), 1, num_groups=2, attention_resolutions=()), torch.zeros(6, dtype=torch.long)
    with pytest.raises(RuntimeError, match="channels"):
        network(images_of(), t, None, images_of())


def test_guidance_leads_away_from_no_class_and_no_condition():
    _, x, cond = small_model("low_res")
    diffusion = build.from_config({**SMALL, "condition": "low_res", "class_conditional": True}, num_classes=2).eval()
    randomize(diffusion.ema_model)
    y, t = torch.tensor([0, 1, 0, 1, 0, 1]), torch.full((6,), 5)
    with torch.no_grad():
        strong = diffusion.ema_model(x, t, y, cond)
        weak = diffusion.ema_model(x, t, torch.full((6,), 2), torch.zeros_like(cond))
    a, s = diffusion.alpha_bars[5] ** 0.5, (1 - diffusion.alpha_bars[5]) ** 0.5
    expected = a * x - s * (weak + 3 * (strong - weak))
    for interval in (None, (-100.0, 100.0)):  # at once, and one after the other
        denoise = diffusion.denoiser(y, cond=cond, guidance_scale=3.0, guidance_interval=interval, clip=False)
        torch.testing.assert_close(denoise(x, 5), expected, rtol=1e-4, atol=1e-5)


def test_guidance_works_over_the_condition_alone_where_training_dropped_it():
    diffusion, x, cond = small_model("low_res")
    found = [
        diffusion.sample(6, "cpu", cond=cond, sampler="ddim", steps=3, seeds=range(6), guidance_scale=scale)
        for scale in (1.0, 3.0)
    ]
    assert not torch.equal(*found)
    with pytest.raises(SettingError, match="pass y or cond"):
        diffusion.sample(6, "cpu", steps=3, sampler="ddim", guidance_scale=2.0)
    with pytest.raises(SettingError, match="null class"):
        small_model("low_res", label_dropout=0.0)[0].denoiser(cond=cond, guidance_scale=2.0)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm++", "sde-dpm++", "heun"])
def test_known_pixels_come_out_exact_and_so_does_the_luminance(sampler):
    diffusion, x, cond = small_model("masked")
    found = diffusion.sample(6, "cpu", cond=cond, sampler=sampler, steps=4, seeds=range(6))
    known = cond[:, 3:].expand_as(x) > 0.5
    assert torch.equal(found[known], x[known]) and not torch.equal(found, x)
    diffusion, x, cond = small_model("gray")
    found = diffusion.sample(6, "cpu", cond=cond, sampler=sampler, steps=4, seeds=range(6), clip=False)
    torch.testing.assert_close(luminance(found), cond, rtol=0, atol=1e-4)


# Training


def pictures(folder, pairs=False):
    """24 images of 8x8 pixels with a list, or as many pairs of 16x8."""
    write_pictures(folder / "datasets")
    for path in (folder / "datasets").rglob("*.png") if pairs else ():
        pixels = np.asarray(Image.open(path))
        Image.fromarray(np.concatenate((255 - pixels, pixels), axis=1)).save(path)
    run_main("txt_annotation.py")


EXACT = ("--precision", "fp32")  # bf16, which some CPUs choose, rounds otherwise in parts of a batch


def options(kind, *more):
    own = ("--condition", kind, "--condition_scale", 2, "--dropout", 0, "--epochs", 2, "--channel", 8)
    return (*TINY, *own, *(("--resize_mode", "stretch") if kind == "pairs" else ()), *more)


@pytest.fixture(params=KINDS)
def kind(request, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pictures(tmp_path, request.param == "pairs")
    return request.param


def test_a_run_is_resumed_bit_for_bit(kind, tmp_path, monkeypatch):
    """Stopped within an epoch, with previews and a validation loss; the seeds of a run without."""
    more = ("--preview_period", 1, "--preview_steps", 2, "--val_split", 0.3, "--horizontal_flip", True, "--seed", -3)
    arguments = options(kind, *more, "--batch_size", 4)
    run_main("train.py", *arguments, "--save_dir", "logs/whole")
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        stop_at_step(patch, train, 4)
        run_main("train.py", *arguments, "--save_dir", "logs/stopped")
    run_main("train.py", "--resume", next(Path("logs/stopped").iterdir()))
    whole, stopped = (read_file(next(Path("logs", name).iterdir()) / "last.pth") for name in ("whole", "stopped"))
    assert_same_state(whole, stopped)
    preview = np.asarray(Image.open(sorted(Path("results/train_out").rglob("*.png"))[0]))
    assert preview.shape[1] == 5 * (3 * 8 + 2) + 2  # condition, sample and original in each place


def context_of(kind, *more):
    config, own, _ = train.read_settings(list(map(str, options(kind, *more))))
    config, device = train.resolve(config)
    return config, train.prepare(config, device)


def test_micro_batches_are_the_batch_and_a_dropped_condition_is_zeros(kind):
    gradients = []
    for accumulate in (1, 2):
        config, context = context_of(kind, "--accumulate", accumulate, "--label_dropout", 0.5, *EXACT)
        randomize(context.diffusion.model)
        x, y, cond, noise = train.make_batch(config, context, *context.dataset.batch(range(8)), 0, 0)
        train.backward(config, context, x, y, cond, noise)
        gradients.append(torch.cat([p.grad.flatten() for p in context.diffusion.model.parameters()]))
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)
    dropped = (cond == 0).flatten(1).all(1)
    assert torch.equal(dropped, noise.drop) and 0 < dropped.sum() < 8


@pytest.mark.parametrize("kind", ["masked"], indirect=True)
def test_two_processes_are_one(kind, tmp_path):
    run_main("train.py", *options(kind, "--save_dir", "logs/one", *EXACT))
    run(torchrun(2, "train.py", *options(kind, "--save_dir", "logs/two", *EXACT)), tmp_path)
    one, two = (read_file(next(Path("logs", name).iterdir()) / "last.pth")["weights"] for name in ("one", "two"))
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-3, atol=1e-5)


def test_the_random_numbers_of_a_step_are_those_of_before():
    generator = torch.Generator()
    timesteps = lambda count, generator: torch.randint(100, (count,), generator=generator)  # noqa: E731
    with_numbers = sample_step_noise(generator, 7, (8, 3, 4, 4), timesteps, 0.5, 0.5, cond=True)
    generator.manual_seed(7)
    t, noise = torch.randint(100, (8,), generator=generator), torch.randn(8, 3, 4, 4, generator=generator)
    flip, drop = (torch.rand(8, generator=generator) < 0.5 for _ in range(2))
    for found, expected in zip(with_numbers, (t, noise, flip, drop, torch.randn(8, 3, 4, 4, generator=generator))):
        assert torch.equal(found, expected)
    without = sample_step_noise(generator, 7, (8, 3, 4, 4), timesteps, 0.5, 0.5)
    assert all(map(torch.equal, without[:4], with_numbers)) and without.condition.shape == (8,)
    parts = [with_numbers.of_rank(rank, 4).condition for rank in range(4)]
    assert torch.equal(torch.cat(parts), with_numbers.condition)


def test_a_conditioned_run_starts_as_the_network_of_its_unconditioned_weights(tmp_path):
    plain = build.from_config(SMALL).eval()
    randomize(plain.ema_model)
    for kind in KINDS:
        config = {**SMALL, "condition": kind}
        weights = change_classes(plain.state_dict(), [], [], config)
        started = build.from_config(config).eval()
        build.load_weights(started, weights, "ema")
        x, t = images_of(), torch.full((6,), 3)
        _, _, cond = small_model(kind)
        torch.testing.assert_close(started.model(x, t, None, cond), plain.ema_model(x, t))
        torch.testing.assert_close(started.ema_model(x, t, None, cond), plain.ema_model(x, t))
        again = change_classes(started.state_dict(), [], [], config)  # from weights of the same condition
        assert torch.equal(again["ema_model.init_conv.weight"], started.ema_model.init_conv.weight)
        other = build.from_config(SMALL)
        with pytest.raises(SettingError, match="do not fit this network: .*init_conv"):
            build.load_weights(other, change_classes(started.state_dict(), [], [], SMALL), "ema")


@pytest.mark.parametrize("kind", ["gray"], indirect=True)
def test_start_from_and_resume_name_what_cannot_be(kind, tmp_path, capsys):
    run_main("train.py", *options(""), "--save_dir", "logs/plain", "--epochs", "1")
    plain = next(Path("logs/plain").iterdir())
    run_main(
        "train.py",
        "--start_from",
        plain,
        "--condition",
        kind,
        "--epochs",
        1,
        "--device",
        "cpu",
        "--save_dir",
        "logs/gray",
    )
    gray = next(Path("logs/gray").iterdir())
    assert json.loads((gray / "config.json").read_text())["condition"] == "gray"
    for arguments, words in (
        (("--resume", plain, "--condition", "gray"), "was built with condition = '', which cannot change"),
        (("--start_from", gray, "--device", "cpu"), "was built with condition = gray, which cannot change"),
        (
            ("--start_from", gray, "--condition", "low_res", "--condition_scale", 2, "--device", "cpu"),
            "was built with condition = gray, which cannot change",
        ),
    ):
        with pytest.raises(SystemExit):
            run_main("train.py", *arguments)
        assert words in capsys.readouterr().err
    torch.save(read_file(gray / "last.pth")["weights"], "bare.pth")
    with pytest.raises(SystemExit):
        run_main("predict.py", "--model_path", "bare.pth", "--device", "cpu")
    assert "which only this project's own files describe" in capsys.readouterr().err


def test_a_dry_run_says_what_it_costs(kind, capsys):
    run_main("train.py", *options(kind, "--dry_run", True))
    said = capsys.readouterr().out
    assert "memory " in said and "time " in said


# predict.py


def trained(kind, *more):
    run_main("train.py", *options(kind, "--epochs", 1, *more))
    return newest_run(".")


def save(path, pixels):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def noisy(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def predict(model, *arguments, out="out"):
    run_main(
        "predict.py", "--model_path", model, "--steps", 3, "--seed", 5, "--save_dir", out, "--device", "cpu", *arguments
    )
    return {path.name: np.asarray(Image.open(path)) for path in Path(out).glob("*.png")}


def test_an_edited_number_of_images_is_that_of_each_condition(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pictures(tmp_path, False)
    model, read = trained("gray"), predict_module.read_settings

    def edited(arguments):
        config, options = read(arguments)
        return replace(config, num_images=2), options

    monkeypatch.setattr(predict_module, "read_settings", edited)
    found = predict(model, "--condition_image", save("gray/a.png", noisy(8, 8)), "--individual_files", True)
    assert {name for name in found if "predict" not in name} == {"a_seed_0000000005.png", "a_seed_0000000006.png"}


def test_a_condition_named_as_an_overview_keeps_its_sample(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pictures(tmp_path, False)
    model, path = trained("gray"), save("gray/predict_1x1_results.png", noisy(8, 8))
    for _ in range(2):  # a repeated command takes the file that is there
        found = predict(model, "--condition_image", path, "--individual_files", True)
        names = ["predict_1x1_results.png", "predict_1x1_results_seed_0000000005.png", "predict_5x5_results.png"]
        assert sorted(found) == names


def test_each_condition_has_its_samples_under_its_name(kind, capsys):
    model, size = trained(kind), 4 if kind == "low_res" else 8
    for number, name in enumerate(("b", "a", "c")):
        save(f"conditions/{name}.png", noisy(size, size, number))
    mask = np.zeros((8, 8), np.uint8)
    mask[2:6, 2:6] = 255
    more = ("--mask", save("mask.png", mask)) if kind == "masked" else ()
    folder = ("--condition_image", "conditions", "--individual_files", True, *more)
    once = predict(model, *folder)
    assert {name for name in once if "predict" not in name} == {"a.png", "b.png", "c.png"}
    twice = predict(model, *folder, "--num_images", 2, "--batch_size", 4, out="twice")
    save("alone/deep/b.png", noisy(size, size, 0))
    alone = predict(model, "--condition_image", "alone", *folder[2:], out="alone_out")
    assert {name for name in alone if "predict" not in name} == {"b.png"}
    save("alone/B.png", noisy(size, size, 1))
    both = predict(model, "--condition_image", "alone", *folder[2:], out="both")  # the same name, or nearly: unique
    names = {name for name in both if "predict" not in name}
    assert names == {"B_seed_0000000005.png", "b_seed_0000000006.png"}
    names = sorted(name for name in twice if "predict" not in name)
    assert names == sorted(f"{'abc'[n % 3]}_seed_{5 + n:010d}.png" for n in range(6))
    one = predict(
        model,
        "--condition_image",
        "conditions/b.png",
        "--individual_files",
        True,
        *more,
        "--num_images",
        3,
        "--seed",
        8,
        out="one",
    )
    assert np.array_equal(twice["b_seed_0000000009.png"], one["b_seed_0000000009.png"])  # the seed and condition alone
    assert once["predict_5x5_results.png"].shape[:2] == (8 + 4, 3 * (8 + 2) + 2)
    if kind == "masked":
        original = noisy(8, 8, 1)  # of a.png
        assert np.array_equal(once["a.png"][mask == 0], original[mask == 0])
        assert not np.array_equal(once["a.png"], original)
    if kind == "gray":
        given = np.asarray(Image.open("conditions/a.png").convert("L"), dtype=float)
        assert np.abs(np.asarray(Image.fromarray(once["a.png"]).convert("L")) - given).mean() < 40  # where not clipped
    before = {path: path.stat().st_mtime_ns for path in Path("twice").glob("?_seed*.png")}
    predict(model, *folder, "--num_images", 2, "--batch_size", 4, out="twice")  # resumed: nothing is sampled again
    assert before == {path: path.stat().st_mtime_ns for path in before}
    save("conditions/b.png", noisy(size, size, 7))  # another image of the same name: nothing old is kept for it
    with pytest.raises(SystemExit):
        predict(model, *folder, "--num_images", 2, "--batch_size", 4, out="twice")
    assert "is there already and differs in cond: move it away" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["low_res"], indirect=True)
def test_a_wrong_condition_is_one_line(kind, tmp_path, capsys):
    model, (good, large) = trained(kind), (save("good.png", noisy(4, 4)), save("large.png", noisy(8, 8)))
    run_main("train.py", *options("", "--epochs", 1, "--save_dir", "logs_plain"))
    plain = next(Path("logs_plain").iterdir())
    Path("bad.png").write_bytes(b"no image")
    Path("empty").mkdir()
    for path, arguments, words in (
        (model, ("--condition_image", good, "--init_image", good), "--init_image and --condition_image exclude each"),
        (model, ("--condition_image", good, "--interpolate", 3), "--condition_image and --interpolate exclude each"),
        (model, (), "this model needs --condition_image (low_res) and no --mask"),
        (plain, ("--condition_image", good), "this model needs no --condition_image"),
        (model, ("--condition_image", large), "large.png: it is 8x8, and this model enlarges images of 4x4"),
        (model, ("--condition_image", "bad.png"), "bad.png: cannot be read as an image"),
        (model, ("--condition_image", "none.png"), "none.png: cannot be read as an image"),
        (model, ("--condition_image", "empty"), "empty holds no images"),
        (model, ("--condition_image", good, "--mask", good), "(low_res) and no --mask"),
        (plain, ("--mask", good), "--mask does nothing without --init_image"),
    ):
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            run_main("predict.py", "--model_path", path, "--device", "cpu", *arguments)
        said = capsys.readouterr().err.strip()
        assert end.value.code == 1 and words in said and "\n" not in said, said


@pytest.mark.parametrize("kind", ["masked"], indirect=True)
def test_masked_needs_a_mask_that_lies_on_the_image(kind, capsys):
    model = trained(kind)
    image, wide = save("image.png", noisy(8, 8)), save("wide.png", noisy(8, 16))
    for mask, words in (
        ((), "this model needs --condition_image and --mask, white"),
        (("--mask", wide), "they must have the same shape"),
    ):
        with pytest.raises(SystemExit):
            run_main("predict.py", "--model_path", model, "--device", "cpu", "--condition_image", image, *mask)
        assert words in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["low_res"], indirect=True)
def test_a_cascade_is_two_commands(kind, tmp_path):
    """4x4 samples of one run are the conditions of another: grids among them are none."""
    run_main("train.py", *options("", "--input_shape", "4,4", "--epochs", 1, "--save_dir", "logs_small"))
    small = predict(next(Path("logs_small").iterdir()), "--num_images", 3, "--individual_files", True, out="small")
    assert "predict_5x5_results.png" in small
    large = predict(trained(kind), "--condition_image", "small", "--individual_files", True, out="large")
    names = {f"seed_{number:010d}.png" for number in (5, 6, 7)}
    assert names == {name for name in large if "predict" not in name} and large[names.pop()].shape == (8, 8, 3)


@pytest.mark.parametrize("kind", ["gray"], indirect=True)
def test_a_model_of_classes_takes_the_null_class_or_the_one_that_is_named(kind):
    run_main(
        "train.py", *options(kind, "--class_conditional", True, "--epochs", 1, "--init_lr", 0.05)
    )  # it learns fast
    condition, found = save("image.png", noisy(8, 8)), []
    for number, more in enumerate(((), ("--class_name", "odd"), ("--guidance_scale", 3))):
        arguments = ("--condition_image", condition, "--num_images", 2, *more)
        found.append(predict(newest_run("."), *arguments, out=str(number))["predict_1x1_results.png"])
    assert not np.array_equal(found[0], found[1]) and not np.array_equal(found[0], found[2])


# Other commands


def test_export_keeps_the_condition_and_refuses_formats_without(kind, capsys):
    model = trained(kind, "--channel", 32, "--num_groups", 32)  # which the reference's code could have
    run_main_of_convert("weights", model, "small.pth")
    assert build.from_checkpoint(load_checkpoint("small.pth"))[0].condition == Condition(
        kind, 2 if kind == "low_res" else 1, True
    )
    for command in ("reference", "diffusers"):
        if command == "diffusers":
            pytest.importorskip("diffusers")
        with pytest.raises(SystemExit):
            run_main_of_convert(command, model, f"{command}_out")
        assert "these weights are conditioned on an image" in capsys.readouterr().err
        assert not Path(f"{command}_out").exists()


def run_main_of_convert(*arguments):
    from utils.convert.__main__ import main
    from utils.errors import run_script

    run_script(lambda: main(list(map(str, arguments))))


def test_evaluate_measures_pairs_in_the_features_of_a_classifier(tmp_path, monkeypatch, capsys):
    """Of the images alone, without their conditions; an .npz holds no pairs."""
    from utils.evaluate import __main__ as evaluate

    monkeypatch.chdir(tmp_path)
    for number in range(120):
        save(f"pairs/{'ab'[number % 2]}/{number}.png", noisy(8, 16, number))
    run_main("txt_annotation.py", "--datasets_path", "pairs")
    model = trained("pairs", "--class_conditional", False)
    arguments = ["--samples", model, "--features", "classifier", "--num_images", 8, "--steps", 2, "--nearest", False]
    evaluate.main(list(map(str, [*arguments, "--reference", "train_lines.txt", "--device", "cpu"])))
    assert "frechet" in capsys.readouterr().out.lower()
    np.savez("images.npz", np.zeros((4, 8, 8, 3), np.uint8))
    with pytest.raises(UserError, match="an .npz holds no pairs"):
        evaluate.main(list(map(str, [*arguments, "--reference", "images.npz", "--device", "cpu"])))


def test_a_model_without_classes_and_condition_says_what_guidance_needs():
    diffusion = build.from_config({**SMALL, "class_conditional": False, "label_dropout": 0.1})
    with pytest.raises(SettingError, match="needs a model with a null class"):
        diffusion.sample(1, "cpu", guidance_scale=2.0, sampler="ddim", steps=2)


def test_settings_that_do_nothing_with_a_condition_are_refused():
    for option in ("--resamplings 5", "--variance posterior"):
        with pytest.raises(UserError, match=option.split()[0]):
            predict_module.read_settings(["--condition_image", "x.png", "--mask", "m.png", *option.split()])


def test_evaluate_takes_the_conditions_of_the_reference(kind, monkeypatch, capsys):
    """What the network is given: conditions of the reference images, in the order of the seed."""
    from utils.evaluate import __main__ as evaluate

    model, seen = trained(kind), []
    batches = evaluate.sample_batches

    def noticing(*arguments, options):
        seen.append(options.cond)
        return batches(*arguments, options=options)

    monkeypatch.setattr(evaluate, "sample_batches", noticing)
    arguments = ["--samples", model, "--reference", "train_lines.txt", "--held_out", "train_lines.txt", "--bits", True]
    arguments += ["--bits_images", 3, "--distances", False, "--num_images", 6, "--steps", 2, "--nearest_images", 6]
    evaluate.main(list(map(str, [*arguments, "--batch_size", 4, "--device", "cpu"])))
    config = load_checkpoint(Path(model, "last.pth")).config
    reference = open_dataset("train_lines.txt", ImageFormat.from_config(config), condition=kind)
    order = torch.randperm(len(reference), generator=torch.Generator().manual_seed(0))[:8]
    expected = conditioned(build.from_config({**config, "input_shape": (8, 8)}), reference, order)[1]
    torch.testing.assert_close(torch.cat(seen), expected)
    if kind != "masked":  # whose holes are random
        x = normalize(reference.batch(order)[0], "cpu")
        given = {"pairs": x[:, :3], "gray": x, "low_res": F.avg_pool2d(x, 2)}[kind]
        torch.testing.assert_close(expected, Condition(kind, 2).of_given(given))
    assert "bits per dimension" in capsys.readouterr().out
