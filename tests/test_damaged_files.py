"""What a file may hold: damage, edited values and claims of any size end in one line before
anything is built.
"""

import errno
import math
import os
import random
import re
import subprocess
import sys
import zipfile
from dataclasses import replace

import pytest
import torch
from conftest import ONE_SAMPLE, PROJECT, TINY, newest_run, read_file, run_main, write_pictures

from nets import build
from utils.checkpoint.file import load_checkpoint
from utils.checkpoint.integrity import load_tensors, save_tensors
from utils.checkpoint.runs import find_weights, newest_last
from utils.evaluate.classifier import FeatureNet, load_feature_net, save_feature_net
from utils.evaluate.features import Extractor, FeatureCache


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The last.pth of a run with two classes and a null class, stopped in the middle of its life:
    all of its parts are filled.
    """
    folder = tmp_path_factory.mktemp("trained")
    write_pictures(folder / "datasets")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run_main("txt_annotation.py")
        run_main("train.py", *TINY, "--epochs", "1", "--precision", "fp32", "--class_conditional", "True")
    return newest_run(folder) / "last.pth"


def small(folder):
    """A checkpoint of a few kB."""
    weights = {f"layer{number}": torch.arange(40.0) + number for number in range(4)}
    save_tensors(
        folder / "small.pth",
        {"format": 1, "weights": weights, "config": {"channel": 32, "epochs": 7}, "classes": ["a", "b"]},
    )
    return folder / "small.pth"


def flipped(content, bit):
    content = bytearray(content)
    content[bit // 8] ^= 1 << bit % 8
    return bytes(content)


@pytest.mark.parametrize("lazily", [False, True])
def test_a_flipped_bit_is_refused_or_changes_nothing(tmp_path, lazily):
    """200 single bits anywhere in a file, 100 more within the values themselves."""
    path = small(tmp_path)
    content, whole = path.read_bytes(), load_checkpoint(path)
    values = content.index(torch.arange(40.0).numpy().tobytes()) * 8
    draw = random.Random(0)
    bits = [draw.randrange(len(content) * 8) for _ in range(200)] + [
        values + draw.randrange(40 * 32) for _ in range(100)
    ]
    refused = 0
    for number, bit in enumerate(bits):
        path = tmp_path / f"{number}.pth"  # a new name: what is mapped stays mapped
        path.write_bytes(flipped(content, bit))
        try:
            found = load_checkpoint(path, lazily)
        except ValueError as error:
            assert "\n" not in str(error) and str(path) in str(error)
            refused += 1
            continue
        assert replace(found, path=None, weights={}) == replace(whole, path=None, weights={})
        assert found.weights.keys() == whole.weights.keys()
        assert all(torch.equal(found.weights[name], value) for name, value in whole.weights.items())
    assert refused > 150


@pytest.mark.parametrize("lazily", [False, True])
def test_a_damaged_directory_of_the_zip_file_names_the_file(tmp_path, lazily):
    """Its offsets lead anywhere: what the system says of that has no name in it."""
    path = small(tmp_path)
    content = path.read_bytes()
    start, refused = content.index(b"PK\x01\x02"), 0
    for place in range(start, len(content)):
        path = tmp_path / f"{place}.pth"
        path.write_bytes(content[:place] + bytes([content[place] ^ 0xFF]) + content[place + 1 :])
        try:
            load_tensors(path, lazily)
        except ValueError as error:
            assert str(error).startswith(f"{path}: "), error
            refused += 1
    assert refused > (len(content) - start) / 2


def test_an_error_of_the_system_names_the_file_and_resuming_what_to_do(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "logs/run").mkdir(parents=True)
    path = small(tmp_path).rename(tmp_path / "logs/run/last.pth")

    def broken_disk(*_, **__):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(zipfile.ZipFile, "testzip", broken_disk)
    with pytest.raises(OSError) as error:
        load_tensors(path)
    assert error.value.filename == str(path)
    write_pictures("datasets")
    run_main("txt_annotation.py")
    line = error_of(capsys, "train.py", *TINY, "--resume", "latest")
    assert f"{os.path.join('logs', 'run', 'last.pth')}: {os.strerror(errno.EIO)}" in line
    assert "name another run's folder, or an epoch_XXXX.pth" in line


def test_a_flipped_bit_in_a_feature_cache_is_computed_again(tmp_path):
    class Pictures:
        def key(self):
            return "key"

        def __len__(self):
            return 8

        def shuffled(self, *_, **__):
            return None

        def blocks(self, _):
            return iter([torch.arange(8 * 64, dtype=torch.int64).remainder(251).to(torch.uint8).reshape(8, 8, 8, 1)])

    torch.manual_seed(0)
    cache, extractor = FeatureCache(str(tmp_path)), Extractor(FeatureNet(1, 2).eval(), "net", "cpu")
    whole = cache.collected(Pictures(), extractor, 8).features
    (path,) = tmp_path.glob("*.features.pth")
    content = path.read_bytes()
    place = content.index(whole.numpy().tobytes()[:64])
    path.write_bytes(flipped(content, place * 8 + 77))
    assert torch.equal(cache.collected(Pictures(), extractor, 8).features, whole)
    assert path.read_bytes() == content


def test_parts_of_one_name_and_compressed_parts_are_refused(tmp_path):
    path = small(tmp_path)
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(tmp_path / "packed.pth", "w", zipfile.ZIP_DEFLATED) as packed:
        for part in source.infolist():
            packed.writestr(part.filename, source.read(part))
    with pytest.raises(ValueError, match="packed.pth: damaged.*compressed"):
        load_tensors(tmp_path / "packed.pth")
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr(archive.namelist()[-1], b"again")
    with pytest.raises(ValueError, match="small.pth: damaged.*one name"):
        load_tensors(path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n", "run `git lfs pull`"),
        ("\n<!DOCTYPE html>\n<html><title>Файл</title></html>", "a web page instead of the weights"),
        ("weights are elsewhere", "(it begins with b'weights ')"),
        ("й" * 600, "it begins with"),
    ],
)
def test_text_in_place_of_a_checkpoint(tmp_path, text, words):
    (tmp_path / "text.pth").write_text(text, encoding="utf-8")
    for read in (load_checkpoint, load_feature_net):
        with pytest.raises(ValueError, match="text.pth: ") as error:
            read(tmp_path / "text.pth")
        assert words in str(error.value)


def test_a_file_of_safetensors_is_converted_by_the_command_that_its_refusal_names(tmp_path, monkeypatch):
    library = pytest.importorskip("safetensors.torch")
    monkeypatch.chdir(tmp_path)
    weights = {"a": torch.arange(4.0)}
    library.save_file(weights, "theirs.pth")
    with pytest.raises(ValueError, match=r"theirs\.pth: of safetensors") as error:
        load_tensors("theirs.pth")
    command = re.search(r"torch\.save\(.*'\)", str(error.value))[0]
    exec(command, {"torch": torch, "safetensors": __import__("safetensors")})
    assert torch.equal(load_tensors("weights.pth")["a"], weights["a"])


@pytest.mark.parametrize("top", ["", "archive"])
def test_an_unpacked_checkpoint_says_how_it_is_packed(tmp_path, top):
    folder = tmp_path / "emoji" / top
    with zipfile.ZipFile(small(tmp_path)) as archive:
        archive.extractall(folder.parent)
    (folder.parent / "archive").rename(folder)
    with pytest.raises(ValueError, match="emoji: an unpacked checkpoint: take the file itself") as error:
        find_weights(tmp_path / "emoji")
    assert f"in {folder.parent}, `zip -0 -r weights.pth {folder.name}`" in str(error.value)
    with zipfile.ZipFile(tmp_path / "again.pth", "w") as archive:  # as that command does
        for path in sorted(folder.rglob("*")):
            archive.write(path, path.relative_to(folder.parent))
    assert load_checkpoint(tmp_path / "again.pth").classes == ["a", "b"]


@pytest.mark.parametrize("inside", ["model_index.json", "unet/config.json"])
def test_a_folder_of_diffusers_names_the_command_that_reads_it(workplace, capsys, inside):
    path = workplace / "theirs" / inside
    path.parent.mkdir(parents=True)
    path.write_text("{}")
    for arguments in (("predict.py", "--model_path", "theirs", *ONE_SAMPLE), ("train.py", *TINY, "--resume", "theirs")):
        assert "python -m utils.convert import theirs FILE" in error_of(capsys, *arguments)


def error_of(capsys, *arguments, expect=(1,)):
    """The one line of a script that refuses; "" where it works and may.

    No traceback in either case.
    """
    capsys.readouterr()
    code = 0
    try:
        run_main(*arguments)
    except SystemExit as end:
        code = end.code
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert code in expect and len(errors) == (code == 1), (arguments, code, errors)
    return errors[0] if errors else ""


# Which run


def test_the_newest_run_is_the_same_for_all(tmp_path):
    """By time, and by name where the times are equal, whatever order the folders come in."""
    for name in ("b", "d", "a", "c"):
        (tmp_path / name).mkdir()
        path = small(tmp_path / name).rename(tmp_path / name / "last.pth")
        os.utime(path, ns=(10**18, 10**18))
    assert find_weights("", tmp_path)[0] == newest_last(tmp_path).path == tmp_path / "d" / "last.pth"
    os.utime(tmp_path / "a" / "last.pth", ns=(10**18, 10**18 + 1))
    assert find_weights("", tmp_path)[0] == newest_last(tmp_path).path == tmp_path / "a" / "last.pth"


# Values of a wrong kind

WRONG = (None, -1, 10**9, "x", [], {}, math.nan, 10**400, 10**5000, True, (1,) * 40, 0.5, b"x", "\x1b[2J")


def mutants(checkpoint, count, seed):
    """`count` pairs of (what was changed, a copy of the checkpoint with one value of a wrong
    kind).
    """
    draw = random.Random(seed)
    places = [("config", name) for name in checkpoint["config"]] * 2 + [(name,) for name in checkpoint]
    places += [("position", name) for name in checkpoint["position"]] * 3 + [
        ("classes", 0),
        ("optimizer", "state"),
        ("scaler", "scale"),
    ]
    places += [("weights", "betas"), ("weights", "model.init_conv.weight"), ("optimizer", "state", 3)]
    places += [("optimizer", "state", 3, "exp_avg")]
    for _ in range(count):
        place, value = draw.choice(places), draw.choice(WRONG)
        yield f"{place} = {str(type(value))}", with_value(checkpoint, place, value)


def with_value(values, place, value):
    if not place:
        return value
    copy = values.copy()
    if isinstance(copy, list) and not copy:
        return copy
    copy[place[0]] = with_value(copy[place[0]] if place[1:] else None, place[1:], value)
    return copy


@pytest.mark.parametrize("script", ["predict.py", "train.py"])
def test_values_of_a_wrong_kind_end_in_one_line(trained, workplace, capsys, monkeypatch, script):
    """What a script accepts after all, it works with: a drawing of one image, or a dry run."""
    checkpoint = read_file(trained)
    (workplace / "run").mkdir()
    path, refused = workplace / "run" / "last.pth", 0
    for name, mutant in mutants(checkpoint, 120, seed=script == "train.py"):
        torch.save(mutant, path)
        options = (
            ("--model_path", path, *ONE_SAMPLE) if script == "predict.py" else ("--resume", path, "--dry_run", "True")
        )
        try:
            refused += bool(error_of(capsys, script, *options, expect=(0, 1)))
        except Exception as error:
            raise AssertionError(f"{name}: {error!r}") from error
    assert refused > 45


def test_the_training_state_is_held_against_the_weights(trained, workplace, capsys):
    checkpoint, path = read_file(trained), workplace / "last.pth"
    draw, refused = random.Random(2), 0
    places = [
        ("optimizer", "state", 3),
        ("optimizer", "state", 3, "exp_avg"),
        ("optimizer", "state", 3, "step"),
        ("optimizer", "state"),
    ]
    places += [
        ("optimizer",),
        ("sums",),
        ("scaler",),
        ("bad_in_row",),
        ("position", "images"),
        ("position", "batch_size"),
    ]
    for place in places:
        for value in draw.sample((*WRONG, torch.zeros(3), torch.zeros(2, 3), {99: {}}, {0: {"step": 1}}), 5):
            torch.save(with_value(checkpoint, place, value), path)
            line = error_of(
                capsys, "train.py", "--resume", path, "--epochs", "2", "--preview_period", "0", expect=(0, 1)
            )
            refused += bool(line)
    assert refused > 40


def test_nan_in_weights_is_refused_by_name(trained, workplace, capsys):
    checkpoint = read_file(trained)
    for name, value in (
        ("model.mid.0.conv_1.bias", math.nan),
        ("ema_model.out_conv.weight", -math.inf),
        ("sigma", math.nan),
    ):
        bad = checkpoint["weights"][name].clone()
        bad[(-1,) * bad.ndim] = value
        save_tensors("bad.pth", {**checkpoint, "weights": {**checkpoint["weights"], name: bad}})
        for arguments in (("predict.py", "--model_path", "bad.pth", *ONE_SAMPLE), ("train.py", "--resume", "bad.pth")):
            assert f"bad.pth: its weights hold NaN or infinity (the first is {name})" in error_of(capsys, *arguments)


# Sizes

LIMITED = """
import resource, sys, torch
sys.path.insert(0, {project!r})
from nets import build
from utils.checkpoint.file import load_checkpoint
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in {paths!r}:
    for use in (build.from_checkpoint, build.settings_of):
        try:
            use(load_checkpoint(path, lazily=use is build.from_checkpoint))
            print("accepted", path)
        except ValueError as error:
            print("refused:", error)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


CLAIMS = [
    {"channel": 10**6},
    {"channel_mults": (10**6,)},
    {"num_res_blocks": 10**9},
    {"img_channels": 10**8},
    {"num_timesteps": 10**9},
    {"channel": 4096},
    {"channel": 2**50, "channel_mults": (2**50,)},
]


def test_a_claim_of_any_size_is_refused_in_little_memory(trained, tmp_path):
    checkpoint, paths = read_file(trained), []
    for number, claim in enumerate(CLAIMS):
        paths.append(str(tmp_path / f"large_{number}.pth"))
        save_tensors(paths[-1], {**checkpoint, "config": {**checkpoint["config"], **claim}})
    refused_in_little(paths)


def refused_in_little(paths):
    """A process that reads the files refuses each, and grows by less than 100 MB."""
    script = LIMITED.format(project=str(PROJECT), paths=paths)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    *lines, megabytes = done.stdout.splitlines()
    assert [line.split(":")[0] for line in lines] == ["refused"] * 2 * len(paths), lines
    assert float(megabytes) < 100


def test_a_bare_state_dict_that_claims_more_than_it_has(trained, tmp_path):
    """Each size that is read off one tensor sets the size of many others."""
    weights = {name: value.clone() for name, value in read_file(trained)["weights"].items()}
    claims = {
        "time_mlp.1.weight": torch.zeros(10**6, 1),
        "downs.0.class_bias.weight": torch.zeros(10**6, 1),
        "downs.0.conv_1.weight": torch.zeros(32 * 10**4, 1, 1, 1),
        "init_conv.weight": torch.zeros(10**6, 1, 1, 1),
        "mid.0.conv_1.weight": torch.zeros(1),
        "init_conv.weight ": torch.zeros(0, 3),
        "init_conv.weight  ": torch.zeros(1).expand(10**5, 10**5),
    }
    paths = []
    for number, (name, value) in enumerate(claims.items()):
        paths.append(str(tmp_path / f"bare_{number}.pth"))
        torch.save({**weights, f"model.{name.strip()}": value}, paths[-1])
    refused_in_little(paths)


def test_more_classes_than_rows(trained, tmp_path):
    checkpoint = load_checkpoint(trained)
    with pytest.raises(ValueError, match="class_bias.weight .* instead of .10001"):
        build.from_checkpoint(replace(checkpoint, classes=[str(number) for number in range(10_000)]))


# Feature nets


def test_edited_feature_nets(tmp_path):
    path = tmp_path / "net.pth"
    save_feature_net(path, FeatureNet(1, 3))
    assert load_feature_net(path).accuracy is None
    whole = torch.load(path, weights_only=True)
    draw, refused = random.Random(0), 0
    for name in ("img_channels", "num_classes", "accuracy", "weights", "feature_net"):
        for value in (*WRONG, {"head.bias": 1}):
            torch.save({**whole, name: value}, path)
            try:
                load_feature_net(path)
            except ValueError as error:
                assert str(path) in str(error) and "\n" not in str(error)
                refused += 1
    for name in draw.sample(list(whole["weights"]), 5):
        for bad in (torch.zeros(1), torch.full_like(whole["weights"][name], 1) / 0):
            torch.save({**whole, "weights": {**whole["weights"], name: bad}}, path)
            with pytest.raises(ValueError, match=r"net.pth: "):
                load_feature_net(path)
    assert refused > 45
