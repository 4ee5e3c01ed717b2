"""The page of a run: whole, offline, and made of what is there."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, newest_run, run_main

from utils import report
from utils.errors import UserError, run_script
from utils.images import save_png

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
COPIES = {"copies": 0.25, "copies_low": 0.1, "copies_high": 0.5, "other_copies": 0.02, "other_copies_high": 0.04}
BAD = "<script>alert(1)</script>"


def made(folder):
    report.main([str(folder)])
    return (Path(folder) / "report.html").read_text(encoding="utf-8")


@pytest.fixture
def finished(workplace, capsys, curves):
    """A finished run with previews, samples, and an evaluation that says it is of this run."""
    run_main(
        "train.py",
        *TINY,
        "--epochs",
        "3",
        "--preview_period",
        "1",
        "--preview_steps",
        "2",
        "--val_split",
        "0.3",
        "--class_conditional",
        "True",
        "--annotation_path",
        "train_lines.txt",
    )
    folder = newest_run(workplace)
    assert f"`python -m utils.report {folder.relative_to(workplace)}` makes an HTML report" in capsys.readouterr().out
    run_main("predict.py", "--steps", "2")
    pixels = np.zeros((8, 16, 3), np.uint8)
    save_png(Path("results/evaluate_out/evaluate_nearest_results.png"), pixels)
    measured = {
        "samples": f"100 drawn, {folder.resolve()}/last.pth",
        "distances": {"features": f"classifier {BAD}", "frechet_distance": 12.5234567, "k": 3},
        "nearest": {"by": "pixels", **COPIES},
    }
    Path("results/evaluate_out/evaluate_results.json").write_text(json.dumps(measured))
    return folder


def test_the_page_shows_all_that_the_run_wrote(finished):
    config = json.loads((finished / "config.json").read_text())
    (finished / "config.json").write_text(json.dumps({**config, "save_dir": BAD}))
    text = made(finished)
    assert len(text.encode()) < 5_000_000 and BAD not in text and "&lt;script&gt;alert(1)" in text
    assert "<td>epochs</td><td>3 of 3</td>" in text and "<td>num_timesteps</td><td>20</td><td>1000</td>" in text
    assert "<td>loss_type</td>" not in text  # as in train.py
    started = text[text.index("<pre>") : text.index("</pre>")]
    assert "python train.py" in started and f"PyTorch {torch.__version__}" in started and "8x8, 3 channels" in started
    assert re.search(r"date +20\d\d-\d\d-\d\d .*\ncommand .*\ndevice +cpu.*\nimages .*\nnetwork .*\ntraining ", started)
    assert "each image is seen about 3 times" in started and "memorization" in text
    assert "The last grid of python predict.py, be it of this run or of other weights. A row of each class" in text
    assert text.count("data:image/png") >= 3 + 4 and 'type="range" min="0" max="2"' in text
    assert "<td>frechet_distance</td><td>12.52</td>" in text and "25.0% of the samples are copies" in text
    assert "<td>copies_low</td><td>0.1</td>" in text
    assert "<td>features</td><td>classifier &lt;script&gt;" in text and "<td>k</td><td>3</td>" in text
    assert not re.search(r"""(src|href)=["'](?!data:)""", text) and "http" not in re.sub('data:[^"]*', "", text)


def test_each_start_of_a_run_is_kept(finished, capsys):
    run_main("train.py", "--resume", "latest", "--epochs", "4")
    assert made(finished).count("command ") == 2
    (finished / "summary.txt").unlink()
    assert "<pre>" not in made(finished)


def test_warnings_say_what_the_tables_show(finished):
    table = finished / "epoch_loss.csv"
    names, *rows = table.read_text().splitlines()
    rows = [dict(zip(names.split(","), row.split(","))) for row in rows]
    rows[-1] |= {"skipped": "3", "val_loss": "9.0"}
    table.write_text("\n".join([names, *(",".join(row.values()) for row in rows)]))
    text = made(finished)
    assert "3 steps were skipped" in text and "memorizes" in text and "Lower --ema_start" not in text
    (finished / "config.json").write_text('{"ema_start": 2000}')
    assert "The EMA starts at step 2000, and the run has 6" in made(finished)
    (finished / "config.json").write_text('{"ema_start": "soon"}')
    assert "The EMA starts" not in made(finished)


def test_what_is_missing_or_damaged_is_left_out(finished):
    shutil.rmtree("results")
    for name in ("epoch_loss.png", "speed.csv"):
        (finished / name).unlink()
    (finished / "epoch_loss.csv").write_bytes(b"epoch,loss\n1,0.5\n2,\xff\n")
    os.mkfifo(finished / "speed.csv")  # reading it would wait
    text = made(finished)
    assert "python predict.py" in text and "python -m utils.evaluate" in text and "data:image" not in text
    Path("results/evaluate_out").mkdir(parents=True)
    Path("results/evaluate_out/evaluate_results.json").write_text("{damaged")
    assert made(finished) == text


def test_what_a_kill_left_goes_and_no_link_is_followed(finished):
    mine, link = finished / "mine", finished / "report.html"
    mine.write_text("mine")
    link.symlink_to(mine)
    for name in (".report.html.01234567.tmp", ".mine.01234567.tmp"):
        (finished / name).write_text("half")
    assert "<h1>Run" in made(finished) and not link.is_symlink() and mine.read_text() == "mine"
    assert [path.name for path in finished.glob(".*.tmp")] == [".mine.01234567.tmp"]


def test_an_evaluation_of_another_run_is_not_shown(finished):
    """Neither of a run whose name begins or ends alike, nor of one in another place."""
    path, own = Path("results/evaluate_out/evaluate_results.json"), finished.resolve() / "last.pth"
    measured = json.loads(path.read_text())
    for folder in (f"{own.parent}2", own.parent.with_name(own.parent.name[:-1]), f"/elsewhere{own.parent}"):
        path.write_text(json.dumps({**measured, "samples": f"100 drawn, {folder}/last.pth"}))
        assert "frechet_distance" not in made(finished)
    measured["samples"] = f"100 samples, ddim, seeds from 0, {own}"
    path.write_text(json.dumps(measured))
    text = made(finished)
    assert "frechet_distance" in text and 'alt="evaluate_nearest_results"' in text
    path.write_text(json.dumps({**measured, "nearest": None}))  # the pairs are those of an earlier one
    assert 'alt="evaluate_nearest_results"' not in made(finished)


ODD = [[], "words", 1e999, 10**400, None, True, {"a": ["b"]}, "\udcff"]


@pytest.mark.parametrize("odd", ODD, ids=repr)
def test_odd_values_end_in_no_traceback(finished, odd):
    path = Path("results/evaluate_out/evaluate_results.json")
    measured, config = json.loads(path.read_text()), json.loads((finished / "config.json").read_text())
    (finished / "config.json").write_text(json.dumps(dict.fromkeys(config, odd)))
    inside = {
        "distances": dict.fromkeys(measured["distances"], odd),
        "nearest": dict.fromkeys(measured["nearest"], odd),
    }
    for results in (odd, {**measured, "distances": odd, "nearest": odd}, {**measured, **inside}, {"samples": odd}):
        path.write_text(json.dumps(results))
        assert "Run " in made(finished)
    (finished / "config.json").write_text(json.dumps([odd]))
    with pytest.raises(UserError, match="no run with a sound config.json"):
        made(finished)


@pytest.mark.parametrize("word", ["-h", "--help"])
def test_help(capsys, word):
    run_script(lambda: report.main([word]))
    said = capsys.readouterr()
    assert "usage: python -m utils.report [logs/<run>]" in said.out and said.err == ""


@pytest.mark.parametrize("words", [["nowhere"], ["logs", "more"]])
def test_what_is_no_run_is_one_line(workplace, capsys, words):
    with pytest.raises(SystemExit):
        run_script(lambda: report.main(words))
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1 and "python -m utils.report logs/<run>" in error[0]


def test_many_previews_stay_small(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    noise = np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)
    for epoch in range(1, 102):
        save_png(Path("results/train_out/run") / f"epoch_{epoch:04d}.png", noise)
    text = report.previews(tmp_path / "run")
    assert len(text) < 5_000_000 and '"epoch 0101"' in text and 20 < text.count('"epoch 0') <= 40


def test_previews_are_sorted_by_number_and_other_names_are_left_out(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = Path("results/train_out/run")
    for name in ("epoch_9999", "epoch_10000", "epoch_0002", "epoch_1_copy", "epoch_<img src=x onerror=alert(1)>"):
        save_png(folder / f"{name}.png", np.zeros((2, 2, 3), np.uint8))
    os.mkfifo(folder / "epoch_0003.png")
    text = report.previews(tmp_path / "run")
    assert re.findall(r'\["([^"]+)"', text) == ["epoch 0002", "epoch 9999", "epoch 10000"] and "onerror" not in text


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
def test_a_browser_shows_the_preview_of_the_slider(finished, tmp_path):
    text = made(finished)
    moved = (
        '<script>const bar=document.getElementById("time");bar.value=0;bar.oninput({target:bar});'
        'document.title=document.getElementById("when").textContent+" "+document.getElementById("preview")'
        ".src.length</script></html>"
    )
    page = finished / "moved.html"
    page.write_text(text.replace("</html>", moved), encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
    done = subprocess.run([BROWSER, *options, page.as_uri()], capture_output=True, text=True, timeout=120)
    first = report.embedded(Path("results/train_out", finished.name, "epoch_0001.png"))
    assert f"<title>epoch 0001 {len(first)}</title>" in done.stdout


def test_an_expression_in_the_block_is_left_out_of_the_table(tmp_path, monkeypatch):
    script = tmp_path / "train.py"
    script.write_text("class Config:\n    epochs: int = 10 ** 3\n    seed: int = 0\n")
    monkeypatch.setattr(report, "SCRIPT", script)
    table = report.settings_table({"epochs": 5, "seed": 1})
    assert "<td>seed</td><td>1</td><td>0</td>" in table and "epochs" not in table
