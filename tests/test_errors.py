"""What a user gets wrong is one line that says what to do, exit code 1, no traceback, and nothing
is lost.
"""

import os
import pickle
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ONE_SAMPLE, TINY, command, newest_run, read_file, run, run_main, write_pictures

from nets.errors import check_choice
from utils.checkpoint.integrity import save_tensors
from utils.checkpoint.resume import check_classes
from utils.convert.diffusers_folder import choose_label

TRAIN = [*TINY, "--epochs", "1", "--precision", "fp32"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run with two classes and no null class, as files: {path below the folder: bytes}."""
    folder = tmp_path_factory.mktemp("trained")
    write_pictures(folder / "datasets", count=8)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run_main("txt_annotation.py")
        run_main("train.py", *TRAIN, "--class_conditional", "True", "--label_dropout", "0")
        return (newest_run(folder) / "last.pth").read_bytes()


@pytest.fixture
def place(trained, workplace):
    """A folder with pictures, their list and that run's last.pth.

    Everything in it must survive every mistake.
    """
    folder = workplace / "logs" / "run"
    folder.mkdir(parents=True)
    (folder / "last.pth").write_bytes(trained)
    return workplace


def snapshot(folder):
    """{path: bytes} of all files but the pictures' cache."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and ".cache" not in path.parts}


def refused(capsys, *arguments):
    """Run a script that must refuse; returns its one line of stderr.

    Nothing may have changed on the disk.
    """
    before = snapshot(Path.cwd())
    capsys.readouterr()
    with pytest.raises(SystemExit) as raised:
        run_main(*arguments)
    assert raised.value.code == 1
    # without progress bars
    lines = [line for line in capsys.readouterr().err.splitlines() if line and "img/s" not in line]
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    assert snapshot(Path.cwd()) == before
    return lines[0]


def test_lists(place, capsys):
    listed, texts = place / "train_lines.txt", {}
    texts["no_lines.txt"] = ("is not there: run `python txt_annotation.py`", None)
    texts["empty_lines.txt"] = ("lists no image: run `python txt_annotation.py`", "\n")
    texts["relative_lines.txt"] = ("line 1: datasets/even/000.png, not '<absolute path>'", "datasets/even/000.png\n")
    texts["gone_lines.txt"] = ("run `python txt_annotation.py`", f"{place / 'datasets/gone.png'}\n")
    for name, (words, text) in texts.items():
        if text is not None:
            (place / name).write_text(text)
        line = refused(capsys, "train.py", *TRAIN, "--annotation_path", name)
        assert words in line and ("gone.png" in line or name in line), line
    (place / "datasets/even/000.png").unlink()
    assert "000.png" in refused(capsys, "train.py", *TRAIN)
    assert listed.exists()


def test_no_pictures(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train_lines.txt").write_text("an older list\n")
    assert "is not a folder" in refused(capsys, "txt_annotation.py")
    (tmp_path / "datasets").mkdir()
    assert "no image in" in refused(capsys, "txt_annotation.py")
    (tmp_path / "datasets" / "bad.png").write_text("no picture")
    assert "none of the 1 images" in refused(capsys, "txt_annotation.py")


class Attack:
    """Makes a file where a pickle of it is loaded with trust."""

    def __reduce__(self):
        return os.mkdir, ("attacked",)


def foreign_checkpoints(good):
    """{file name: (bytes or a function that writes it, words of the refusal)}."""
    weights = {name: torch.zeros(2) for name in ("conv.weight", "conv.bias")}

    def saved(value, **options):
        return lambda path: torch.save(value, path, **options)

    def pickled(value):
        return lambda path: path.write_bytes(pickle.dumps(value))

    return {
        "missing.pth": (None, "there is no such PyTorch checkpoint"),
        "empty.pth": (b"", "damaged, or no PyTorch checkpoint"),
        "cut.pth": (good[: len(good) // 2], "damaged, or no PyTorch checkpoint"),
        "cut_at_the_end.pth": (good[:-1], "damaged, or no PyTorch checkpoint"),
        "foreign.pth": (
            saved({"model": weights}),
            "neither a checkpoint of this project nor a state dict",
        ),
        "list.pth": (saved([1, 2]), "neither a checkpoint of this project nor a state dict"),
        "tensor.pth": (saved(torch.zeros(3)), "neither a checkpoint"),
        "other_net.pth": (saved(weights), "not a state dict of a GaussianDiffusion"),
        "attack.pth": (saved({"weights": Attack()}), "could run code hidden in it"),
        "old_attack.pth": (saved(Attack(), _use_new_zipfile_serialization=False), "could run code hidden in it"),
        "pickle.pth": (pickled(Attack()), "could run code hidden in it"),
    }


@pytest.mark.parametrize("script", ["predict.py", "train.py"])
def test_files_that_are_no_checkpoints(place, trained, capsys, script):
    for name, (content, words) in foreign_checkpoints(trained).items():
        path = place / name
        if callable(content):
            content(path)
        elif content is not None:
            path.write_bytes(content)
        arguments = ["--model_path", path, *ONE_SAMPLE] if script == "predict.py" else ["--resume", path, *TRAIN]
        line = refused(capsys, script, *arguments)
        assert name in line or name == "other_net.pth", line
        assert words in line, line
    assert not (place / "attacked").exists()


def test_text_is_no_checkpoint(place, capsys):
    (place / "text.pth").write_text("these are no weights")
    assert "text.pth" in refused(capsys, "predict.py", "--model_path", "text.pth", *ONE_SAMPLE)


def test_damaged_newest_run_is_not_drawn_silently(place, trained, capsys):
    (place / "logs/run/last.pth").write_bytes(trained[:1000])
    assert "logs/run/last.pth: damaged" in refused(capsys, "predict.py", *ONE_SAMPLE)


def test_archive_of_something_else(place, capsys):
    with zipfile.ZipFile(place / "photos.pth", "w") as archive:
        archive.writestr("holiday.txt", "sun")
    assert "photos.pth: damaged, or no PyTorch checkpoint" in refused(
        capsys, "predict.py", "--model_path", "photos.pth", *ONE_SAMPLE
    )


def test_no_weights_at_all(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    line = refused(capsys, "predict.py", *ONE_SAMPLE)
    assert "holds no weights: run `python train.py` first, or name a checkpoint with --model_path" in line
    (tmp_path / "logs" / "empty_run").mkdir(parents=True)
    line = refused(capsys, "predict.py", "--model_path", "logs/empty_run", *ONE_SAMPLE)
    assert "logs/empty_run/last.pth: there is no such PyTorch checkpoint" in line


def test_checkpoint_of_another_architecture(place, capsys):
    checkpoint = read_file(place / "logs/run/last.pth")
    cases = (
        ({"channel": 64}, "of another shape"),
        ({"channel_mults": (1, 2)}, "missing"),
        ({"class_conditional": False}, "unknown"),
    )
    for changed, words in cases:
        save_tensors("other.pth", {**checkpoint, "config": {**checkpoint["config"], **changed}})
        line = refused(capsys, "predict.py", "--model_path", "other.pth", *ONE_SAMPLE)
        assert "the weights do not fit this network" in line and words in line
    save_tensors("other.pth", {**checkpoint, "config": {**checkpoint["config"], "num_res_blocks": 0}})
    line = refused(capsys, "predict.py", "--model_path", "other.pth", *ONE_SAMPLE)
    assert "other.pth: damaged, or edited: num_res_blocks is 0: expected a whole number from 1 to 1024" in line
    for option, value in (
        ("--channel", "64"),
        ("--channel_mults", "1,2"),
        ("--num_timesteps", "30"),
        ("--input_shape", "16,16"),
    ):
        arguments = [*TRAIN[TRAIN.index("--batch_size") :], "--resume", "logs/run", option, value]
        assert f"{option[2:]} = " in refused(capsys, "train.py", *arguments)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--sampler euler", "--sampler euler: expected one of 'ddpm', 'ddim', 'dpm++', 'sde-dpm++', 'heun'"),
        ("--spacing karras", "--spacing karras: expected one of '', 'uniform', 'trailing', 'logsnr'"),
        ("--steps 21", "steps must be from 1 to 20"),
        ("--sampler ddpm --steps 1000", "steps must be from 1 to 20"),
        ("--num_images 0", "--num_images 0: expected a whole number from 1 to 4294967296"),
        ("--batch_size -4", "--batch_size -4: expected a whole number from 1 to 65536"),
        ("--eta 1.5 --sampler ddim", "--eta 1.5: expected a number from 0 to 1"),
        ("--eta 0.5", "--eta is an option of ddim: add --sampler ddim"),
        ("--variance posterior", "--variance is an option of ddpm: add --sampler ddpm"),
        ("--variance large", "expected one of 'beta', 'posterior'"),
        ("--samples 3", "--help lists every setting"),
        ("--seed 4294967296", "--seed 4294967296: expected a whole number from -1 to 4294967295"),
        ("--seed_to 1099511627776", "--seed_to 1099511627776: expected a whole number from -1 to 4294967295"),
        (
            "--seed 4294967294 --num_images 3",
            "seeds 4294967294 to 4294967296 exceed 4294967295; lower --seed or --num_images",
        ),
        ("--num_images 1000000000000", "--num_images 1000000000000: expected a whole number from 1 to 4294967296"),
        ("--batch_size 1000000000", "--batch_size 1000000000: expected a whole number from 1 to 65536"),
        ("--num_image 3", "--num_image is no setting (did you mean num_images?); --help lists every setting"),
        ("--input_shape 8", "--input_shape 8: expected 2 whole numbers from 1 to 16384 with commas"),
        ("--input_shape 0,8", "--input_shape 0,8: expected 2 whole numbers from 1 to 16384"),
        ("--class_name fruit", "unknown class_name 'fruit'; known: even, odd"),
        (
            "--guidance_scale 3",
            "needs a model with a null class, as logs/emoji.pth has: train with --class_conditional True and label",
        ),
        ("--guidance_scale -1", "--guidance_scale -1: expected a number from 0 to 1000"),
        (
            "--guidance_interval 0,1",
            "guidance_interval does nothing with a guidance_scale of 1: add --guidance_scale 2",
        ),
        ("--guiding_path weak.pth", "guiding_path does nothing with a guidance_scale of 1: add --guidance_scale 2"),
        ("--guidance_scale 2 --guidance_interval 1,0", "from the lower lambda to the higher, not (1.0, 0.0)"),
        ("--guidance_scale 2 --guidance_interval 1", "--guidance_interval 1: expected 2"),
        ("--guidance_scale 2 --guiding_path gone.pth", "gone.pth"),
        ("--interpolate 4", "--interpolate is the number of images: leave out --num_images"),
        ("--seed_to 4", "--seed_to does nothing without --interpolate"),
        ("--strength 0.4", "--strength does nothing without --init_image"),
        ("--mask m.png", "--mask does nothing without --init_image"),
        ("--init_image p.png --resamplings 3", "--resamplings does nothing without --mask"),
        ("--init_image p.png --strength 0", "strength is 0: it must be above 0 and at most 1"),
        ("--init_image p.png --strength 1.2", "--strength 1.2: expected a number from 0 to 1 or None"),
        ("--init_image p.png --strength 0.1 --steps 9", "steps must be from 1 to 2"),
        ("--init_image gone.png", "gone.png: cannot be read as an image (No such file or directory)"),
        ("--init_image train_lines.txt", "train_lines.txt: cannot be read as an image (not an image"),
        ("--init_image p.png --mask gone.png", "gone.png: cannot be read as an image"),
        ("--init_image p.png --mask black.png", "the mask is all black: paint white"),
        ("--init_image p.png --mask white.png", "the mask is all white: paint white"),
        ("--init_image p.png --mask wide.png", "the mask is 16x8 and p.png 8x8"),
        (
            "--init_image p.png --mask m.png --sampler ddim",
            "--mask needs the sampler ddpm: --sampler ddim cannot inpaint",
        ),
        ("--device gpu", "device 'gpu' is unknown"),
        ("--device cuda:99", "cuda:99"),
        ("--precision fp8", "--precision fp8: expected one of 'auto', 'fp32', 'bf16', 'fp16'"),
        ("--precision fp16", "precision 'fp16' is for GPUs"),
        ("--save_dir train_lines.txt", "train_lines.txt cannot be written to"),
        (
            "--save_dir train_lines.txt/inside",
            "train_lines.txt/inside cannot be written to (Not a directory): choose another --save_dir",
        ),
    ],
)
def test_settings_of_predict(place, capsys, options, words):
    from PIL import Image

    for name, size, colour in (
        ("p", (8, 8), 90),
        ("black", (8, 8), 0),
        ("white", (8, 8), 255),
        ("wide", (16, 8), 0),
        ("m", (8, 8), 0),
    ):
        picture = Image.new("L", size, colour)
        if name in ("wide", "m"):
            picture.paste(255, (0, 0, 4, 4))
        picture.save(f"{name}.png")
    assert words in refused(capsys, "predict.py", *ONE_SAMPLE, *options.split())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--interpolate 1", "--interpolate 1: expected a whole number from 2 to 10000 or 0"),
        ("--interpolate 3", "--interpolate stays within one class: name it with --class_name; known: even, odd"),
        ("--interpolate 3 --init_image p.png", "--init_image and --interpolate exclude each other"),
    ],
)
def test_strips_that_cannot_be(place, capsys, options, words):
    assert words in refused(capsys, "predict.py", "--device", "cpu", *options.split())


def test_class_of_a_model_without_classes(place, capsys):
    checkpoint = read_file("logs/run/last.pth")
    weights = {name: value for name, value in checkpoint["weights"].items() if "class_bias" not in name}
    save_tensors(
        "plain.pth", {**checkpoint, "weights": weights, "config": {**checkpoint["config"], "class_conditional": False}}
    )
    for options, words in (
        ("--class_name even", "was trained without classes, which logs/emoji.pth has"),
        ("--guidance_scale 2", "needs a model with a null class, as logs/emoji.pth has"),
    ):
        assert words in refused(capsys, "predict.py", "--model_path", "plain.pth", *ONE_SAMPLE, *options.split())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--batchsize 4", "--batchsize is no setting (did you mean batch_size?); --help lists every setting"),
        ("--epochs many", "--epochs many: expected a whole number"),
        ("--channel_mults 1,x", "expected whole numbers from 1 to 1024 with commas between them (a single one as 1,)"),
        ("--input_shape 9,8 --channel_mults 1,1", "multiples of 2"),
        ("--schedule quadratic", "quadratic"),
        ("--prediction noise", "one of 'eps', 'x0', 'v'"),
        ("--loss_type l3", "one of 'l1', 'l2', 'huber'"),
        ("--loss_weighting snr", "one of 'none', 'min_snr'"),
        ("--optimizer_type sgd", "one of 'adam', 'adamw', 'muon'"),
        ("--lr_decay_type exp", "one of 'cos', 'step'"),
        ("--preview_sampler euler", "one of 'ddpm', 'ddim'"),
        ("--resize_mode fit", "'crop', 'stretch', 'pad'"),
        ("--attention_resolutions 3,", "attention_resolutions"),
        ("--num_groups 12", "not a multiple of 12 groups"),
        ("--dropout 1", "--dropout 1: expected a number from 0 to 0.99"),
        ("--device tpu", "device 'tpu' is unknown"),
        ("--accumulate 3", "batch_size 8 is no multiple of 3 (processes x accumulate): use 6"),
        ("--resume nowhere.pth", "nowhere.pth: there is no such PyTorch checkpoint"),
        ("--save_dir train_lines.txt", "train_lines.txt"),
        ("--num_timesteps 0", "--num_timesteps 0: expected a whole number from 1 to 1000000"),
        ("--schedule_high 0", "beta"),
        ("--img_channels 4", "expected one of 3, 1"),
    ],
)
def test_settings_of_train(place, capsys, options, words):
    assert words in refused(capsys, "train.py", *TRAIN, *options.split())


def test_list_that_cannot_be_written(place, capsys):
    line = refused(capsys, "txt_annotation.py", "--annotation_path", "logs/run/last.pth/train_lines.txt")
    assert "logs/run/last.pth" in line and "check this path" in line


def test_the_process_itself_ends_with_code_1_and_one_line(place):
    printed = run(command("predict.py", "--sampler", "euler"), place, expect=1)
    assert printed == "error: --sampler euler: expected one of 'ddpm', 'ddim', 'dpm++', 'sde-dpm++', 'heun'\n"


@pytest.mark.parametrize("what", ["predict", "resume", "convert"])
def test_of_many_classes_a_message_names_a_few(what):
    known = [f"class {number:05d}" for number in range(10_000)]
    other = [name if name != known[5000] else "Class 05000" for name in known]
    with pytest.raises(ValueError, match=r"class 05000.* and 99\d\d more") as caught:
        if what == "predict":
            check_choice("class_name", "Class 05000", known)
        elif what == "convert":
            choose_label(None, known, "Class 05000")
        else:
            config = SimpleNamespace(class_conditional=True)
            check_classes(config, other, SimpleNamespace(classes=known))
    assert len(str(caught.value)) < 1000
