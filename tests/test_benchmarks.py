"""What the benchmarks decide by themselves: which cells, which default, what is measured again,
and how runs are started.
"""

import ast
import gzip
import importlib
import json
import math
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from conftest import PROJECT, write_pictures

import train
from benchmarks import denoisers, objectives, quality, recipes, runs, solvers, speed, time_to_quality
from benchmarks.solvers import Cell
from nets import build
from nets.samplers import half_log_snr
from utils.checkpoint.file import Checkpoint, save_checkpoint
from utils.data.annotation import read_annotation
from utils.device import choose_precision
from utils.evaluate.classifier import FeatureNet, save_feature_net

T = 1000


def a_report(distances, T=T):
    """A report of {(solver, spacing, steps): [distance of each seed]}."""
    cells = [
        {
            "solver": solver,
            "spacing": spacing,
            "calls": steps,
            "steps": steps,
            "seed": seed,
            "distance": distance,
            "made": solvers.calls_of(solver, steps),
            "seconds_per_image": 0.1,
            "network_share": 0.97,
        }
        for (solver, spacing, steps), values in distances.items()
        for seed, distance in enumerate(values)
    ]
    about = {
        "weights": "w",
        "features_digest": "f",
        "reference_digest": "r",
        "samples": 100,
        "precision": "fp32",
        "T": T,
        "features": "some",
        "num_reference": 5,
        "trained_with": {"channel": 32},
        "parameters": 7,
        "held_out_distance": 0.5,
        "num_held_out": 3,
    }
    machine = {
        "clock": "wall",
        "gpu": None,
        "cpu": "a processor",
        "threads": 1,
        "cores": 2,
        "load": 0.0,
        "precision": "fp32",
        "versions": {},
    }
    return {"about": about, "machine": machine, "cells": cells, "wanted": len(cells)}


def choose(distances):
    row, ratio = solvers.choose_default(solvers.summaries(a_report(distances)), T)
    return row["solver"], row["made"], ratio


@pytest.mark.parametrize("calls", [1, 2, 5, 10, 15, 20, 25, 50, 100, 250, 1000])
def test_heun_gets_no_more_calls_than_the_others_and_at_most_one_fewer(calls):
    made = solvers.calls_of("heun", solvers.steps_for("heun", calls))
    assert made <= calls <= made + 1
    assert solvers.calls_of("ddim", solvers.steps_for("ddim", calls)) == calls


def test_the_cells_come_by_seed_and_by_cost_and_all_are_different():
    config = solvers.Config(calls=(5, 10, 25, 250, 1000), seeds=2)
    cells = solvers.wanted_cells(config, T)
    assert len(set(cells)) == len(cells)
    assert [cell.seed for cell in cells] == sorted(cell.seed for cell in cells)
    first = [cell for cell in cells if cell.seed == 0]
    yardstick = first.index(Cell("ddpm", "every", T, T, 0))
    costs = [cell.made for cell in first[:yardstick] + first[yardstick + 1 :]]
    assert costs == sorted(costs)
    assert first[yardstick - 1].made == 25 and first[yardstick + 1].made == 249
    # With as many steps as timesteps there is only one spacing; heun's 500 steps have all.
    assert sum(cell.calls == 1000 for cell in first) == len(solvers.SOLVERS) - 1 + len(solvers.SPACINGS)


def test_the_yardstick_is_always_there_and_steps_beyond_T_never():
    cells = solvers.wanted_cells(solvers.Config(solvers="ddim", spacings="trailing", calls=(5, 50), seeds=1), 20)
    assert cells == [Cell("ddim", "trailing", 5, 5, 0), Cell("ddpm", "every", 20, 20, 0)]


def test_the_default_is_the_fewest_calls_within_five_per_cent():
    yardstick = {("ddpm", "every", T): [10.0, 10.0]}
    rows = {
        ("ddim", "uniform", 10): [10.6, 10.6],
        ("dpm++", "logsnr", 20): [10.4, 10.4],
        ("heun", "logsnr", 13): [9, 9],
    }
    assert choose(yardstick | rows)[:2] == ("dpm++", 20)
    # Of equal cost the better one.
    assert choose(yardstick | {("ddim", "uniform", 20): [10.3, 10.3], ("dpm++", "logsnr", 20): [10.1, 10.1]})[:2] == (
        "dpm++",
        20,
    )
    # None that is cheap: the one that it takes, in the end the yardstick itself.
    assert choose(yardstick | {("ddim", "uniform", 20): [12, 12], ("ddim", "uniform", 250): [10, 10.2]})[:2] == (
        "ddim",
        250,
    )
    assert choose(yardstick) == ("ddpm", T, 1.0)
    assert solvers.choose_default(solvers.summaries(a_report({("ddim", "uniform", 20): [12]})), T) is None


def test_ratios_are_taken_over_the_seeds_that_both_have():
    solver, made, ratio = choose({("ddpm", "every", T): [10.0], ("ddim", "uniform", 20): [10.2, 50.0]})
    assert (solver, made) == ("ddim", 20) and math.isclose(ratio, 1.02)


def test_the_verdict_says_where_nothing_cheap_is_good_enough():
    rows = solvers.summaries(
        a_report({("ddpm", "every", T): [10.0], ("ddim", "trailing", 50): [10.2], ("ddim", "trailing", 25): [11.0]})
    )
    verdict = solvers.verdict(rows, T)
    assert "50 network evaluations" in verdict and "Nothing with 25 evaluations or fewer comes so close" in verdict
    assert "not known yet" in solvers.verdict(rows[1:], T)


def test_an_interrupted_table_goes_on_and_measures_no_cell_twice(tmp_path):
    path, measured = tmp_path / "solvers.json", []
    wanted = solvers.wanted_cells(solvers.Config(solvers="ddim,heun", calls=(5, 10), seeds=2), 100)
    empty = a_report({}, 100)

    def measure(cell):
        if len(measured) == 7:
            measured.append(None)
            raise KeyboardInterrupt
        measured.append(cell)
        return {"made": cell.made, "distance": 1.0 + cell.steps, "seconds_per_image": 0.1, "network_share": 0.97}

    with pytest.raises(KeyboardInterrupt):
        solvers.fill(empty, path, wanted, measure)
    report = solvers.opened(path, empty["about"])
    assert len(report["cells"]) == 7 and "UNFINISHED: 7 of" in path.with_suffix(".md").read_text("utf-8")
    report["machine"] = empty["machine"]
    solvers.fill(report, path, wanted, measure)
    assert [cell for cell in measured if cell] == wanted
    page = path.with_suffix(".md").read_text("utf-8")
    assert "UNFINISHED" not in page and page.endswith("\n![solvers](solvers.png)\n")

    with pytest.raises(ValueError, match="weights, samples"):
        solvers.opened(path, {**empty["about"], "weights": "others", "samples": 5})


def test_the_table_has_mean_and_spread_and_the_networks_share():
    text = solvers.as_text(a_report({("ddpm", "every", T): [10.0, 12.0], ("dpm++", "logsnr", 20): [10.0, 11.0]}))
    assert "| dpm++ | logsnr | 10.500 ± 0.707 |  |" in text and "| ddpm | every |  | 11.000 ± 1.414 |" in text
    assert "97.0% (97.0% to 97.0%)" in text


def test_as_many_epochs_as_fit_into_the_time_but_one_at_least(tmp_path):
    annotation = tmp_path / "train_lines.txt"
    annotation.write_text("".join(f"{tmp_path}/{number}.png\n" for number in range(1000)), "utf-8")
    assert runs.epochs_within(1, 100 * runs.OVERHEAD, annotation, {}) == 6
    assert runs.epochs_within(1, 100 * runs.OVERHEAD, annotation, {"val_split": 0.5}) == 12
    assert runs.epochs_within(1, 1, annotation, {}) == 1


def test_options_are_written_as_the_scripts_read_them():
    assert runs.as_options({"input_shape": (8, 8), "channel_mults": (1,), "name": "v"}) == [
        "--input_shape",
        "8,8",
        "--channel_mults",
        "1,",
        "--name",
        "v",
    ]


def test_what_a_benchmark_started_ends_with_it(tmp_path, monkeypatch):
    """A signal to the parent alone, as a batch scheduler sends it, reaches the child, which has
    time to save.
    """
    (tmp_path / "child.py").write_text(
        "import os, pathlib, signal, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: (pathlib.Path('saved').touch(), os._exit(3)))\n"
        "time.sleep(0.5)\nos.kill(os.getppid(), signal.SIGTERM)\ntime.sleep(60)\n",
        "utf-8",
    )
    (tmp_path / "parent.py").write_text(
        f"import sys, pathlib\nsys.path.insert(0, {str(runs.PROJECT)!r})\nfrom benchmarks import runs\n"
        "runs.PROJECT = pathlib.Path.cwd()\nruns.stop_with_children()\nruns.run_project('child.py', {}, '.')\n",
        "utf-8",
    )
    assert subprocess.run([sys.executable, "parent.py"], cwd=tmp_path, timeout=240).returncode == 128 + 15
    assert (tmp_path / "saved").exists()


@pytest.mark.parametrize(
    ("name", "multiples"),
    [
        ("speed_cpu", [("this project, bf16", 1.16), ("diffusers, fp32", 0.6), ("diffusers, bf16", 1)]),
        ("speed_cpu_no_bf16", [("this project, fp32", 1.22), ("diffusers, fp32", 1)]),
    ],
)
def test_the_speed_figure_compares_in_equal_precision_and_says_so(name, multiples):
    shown = speed.bars(json.loads((PROJECT / f"benchmarks/results/{name}.json").read_text(encoding="utf-8")))
    assert {label: shown["training step"][label] for label, _ in multiples} == pytest.approx(dict(multiples), abs=0.005)
    assert next(title for title in shown if title.startswith("25 images")).endswith("25 steps here, 1000 elsewhere")


def test_quality_replaces_a_report_of_other_settings_and_adds_to_one_of_the_same(tmp_path):
    path, config = tmp_path / "quality.json", quality.Config(samples=100)
    report = quality.opened(path, config)
    report["runs"]["emoji/eps"] = {"found": 1}
    runs.write_json(path, report)
    assert quality.opened(path, quality.Config(samples=100, variants="v", data="fashion_mnist"))["runs"] == {
        "emoji/eps": {"found": 1}
    }
    assert quality.opened(path, quality.Config(samples=200))["runs"] == {}


def test_archives_that_were_compressed_anew_are_taken_from_a_root_and_the_root_stays_as_it_is(tmp_path):
    raw = tmp_path / "root" / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    (raw / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(b"images", mtime=7))
    (raw / "train-labels-idx1-ubyte").write_bytes(b"labels")
    runs.copy_unpacked(tmp_path / "root", tmp_path / "own")
    found = {path.name: path.read_bytes() for path in (tmp_path / "own" / "FashionMNIST" / "raw").iterdir()}
    assert found == {"train-images-idx3-ubyte": b"images", "train-labels-idx1-ubyte": b"labels"}
    assert sorted(path.name for path in raw.iterdir()) == ["train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte"]
    with pytest.raises(ValueError, match="no files in FashionMNIST/raw"):
        runs.copy_unpacked(tmp_path, tmp_path / "own")


def test_a_cell_is_measured_on_a_checkpoint(workplace):
    settings = {
        "annotation_path": "train_lines.txt",
        "input_shape": (8, 8),
        "channel": 8,
        "channel_mults": (1,),
        "num_res_blocks": 1,
        "attention_resolutions": (),
        "num_groups": 4,
        "schedule": "cosine",
    }
    save_checkpoint(Checkpoint(Path("small.pth"), build.from_config(settings).state_dict(), config=settings))
    save_feature_net("net.pth", FeatureNet(3, 2))
    config = solvers.Config(model_path="small.pth", features="net.pth", samples=6, batch_size=4, compile=False)
    bench = solvers.Bench(config, torch.device("cpu"))
    found = bench.measure(Cell("ddim", "trailing", 5, 5, 0))
    assert found["distance"] > 0 and found["seconds_per_image"] > 0 and bench.about()["num_reference"] == 24
    assert (found["made"], bench.measure(Cell("heun", "clipped_logsnr", 10, 5, 0))["made"]) == (5, 8)


CONDITIONAL = {
    "annotation_path": "train_lines.txt",
    "input_shape": (8, 8),
    "channel": 8,
    "channel_mults": (1,),
    "num_res_blocks": 1,
    "num_groups": 4,
    "attention_resolutions": (),
    "num_timesteps": 10,
    "class_conditional": True,
    "label_dropout": 0.1,
}


def conditional_diffusion(seed, classes=2):
    diffusion, generator = build.from_config(CONDITIONAL, classes).eval(), torch.Generator().manual_seed(seed)
    for parameter in diffusion.ema_model.parameters():  # many are zero at first
        torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    return diffusion


def test_changes_of_the_predicted_image():
    """Against their definitions."""
    diffusion, guide, t = conditional_diffusion(0), conditional_diffusion(1), 1
    own = half_log_snr(diffusion.alpha_bars[t])
    config = denoisers.Config(scales=(1.0, 1.25), guidances=(2.0,), interval=(own - 0.1, own + 0.1))
    where = f"{own - 0.1:g} < lambda < {own + 0.1:g}"
    x, y = 0.1 * torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(4) % 2

    def images(t):
        changes = denoisers.denoisers(config, diffusion, guide)
        return {name: denoiser(y)(x, t) for name, denoiser in changes.items()}

    plain, null, away = (
        model.denoiser(labels)(x, t) for model, labels in ((diffusion, y), (diffusion, None), (guide, y))
    )
    a = diffusion.alpha_bars[t] ** 0.5
    wanted = {
        "as predicted": plain,
        "noise / 1": plain,
        "noise / 1.25": (x - (x - a * plain) / 1.25) / a,
        "guidance 2": 2 * plain - null,
        f"guidance 2, {where}": 2 * plain - null,
        "autoguidance 2": 2 * plain - away,
        f"autoguidance 2, {where}": 2 * plain - away,
    }
    assert max(value.abs().max() for value in wanted.values()) < 1  # nothing is clipped
    found, elsewhere = images(t), images(t + 1)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, msg=name)
    for name in wanted:
        if name.endswith(where):
            torch.testing.assert_close(elsewhere[name], diffusion.denoiser(y)(x, t + 1))
    assert len({round(value.sum().item(), 4) for value in (plain, null, wanted["noise / 1.25"], away)}) == 4


def test_changes_of_the_predicted_image_are_measured_on_a_checkpoint(workplace, capsys):
    classes = read_annotation("train_lines.txt").classes
    save_feature_net("net.pth", FeatureNet(3, 2))
    for name in ("model.pth", "weaker.pth"):
        weights = conditional_diffusion(len(name), len(classes)).state_dict()
        save_checkpoint(Checkpoint(Path(name), weights, config=CONDITIONAL, classes=classes))
    options = [
        "--model_path",
        "model.pth",
        "--guiding_path",
        "weaker.pth",
        "--features",
        "net.pth",
        "--device",
        "cpu",
        "--samples",
        "6",
        "--batch_size",
        "4",
        "--calls",
        "2",
        "--seeds",
        "1",
    ]
    denoisers.main([*options, "--scales", "1.01,", "--guidances", "2,"])
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][2:]
    names = [
        "as predicted",
        "noise / 1.01",
        "guidance 2",
        "guidance 2, -1 < lambda < 2",
        "autoguidance 2",
        "autoguidance 2, -1 < lambda < 2",
    ]
    assert [row[0] for row in rows] == [f"| {name}" for name in names]
    assert all(float(row[1].removesuffix(" |")) >= 0 for row in rows)
    other = {**CONDITIONAL, "num_timesteps": 12}
    weights = build.from_config(other, len(classes)).state_dict()
    save_checkpoint(Checkpoint(Path("weaker.pth"), weights, config=other, classes=classes))
    with pytest.raises(ValueError, match="the guiding model has another schedule"):
        denoisers.main(options)


@pytest.mark.parametrize("path", sorted((PROJECT / "benchmarks").glob("*.py")), ids=lambda path: path.stem)
def test_what_a_benchmark_takes_from_a_module_is_there(path):
    """`module.name`, for the project's modules: a benchmark runs too rarely to notice a move."""
    benchmark = importlib.import_module(f"benchmarks.{path.stem}")
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            module = vars(benchmark).get(node.value.id)
            if isinstance(module, types.ModuleType):
                assert hasattr(module, node.attr), f"{path.name}, line {node.lineno}: {node.value.id}.{node.attr}"


def test_each_variant_of_a_recipe_changes_the_training_and_leaves_nothing_behind(workplace, monkeypatch):
    monkeypatch.setattr(recipes, "sampled", lambda evaluator, run: 0.0)
    evaluator = types.SimpleNamespace(
        config=recipes.Config(size=16, images=24), annotation="train_lines.txt", channels=3, device=torch.device("cpu")
    )

    def losses(variant, images=24, seconds=0, **settings):
        values = {
            "init_lr": 1e-2,
            "optimizer_type": "adam",
            "val_split": 0.5,
            "ema_start": 0,
            "batch_size": 8,
            **settings,
        }
        steps, _, _, loss, *_ = recipes.measure(evaluator, variant, images, seconds, values)
        return steps, loss

    plain, classes = losses(""), losses("", class_conditional=True, horizontal_flip=True)
    for variant in recipes.VARIANTS:
        steps, loss = losses(variant)
        assert steps == 3 and (loss != plain[1]) == bool(variant) and loss != classes[1], variant
    assert losses("") == plain
    assert losses("half size", images=8)[0] == 1
    monkeypatch.setattr(recipes, "steps_a_minute", lambda clock, run: run.train_step() or 120)
    assert losses("", seconds=2) == losses("", images=32)  # four steps, without those that were timed


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a=|b=variant:nope", "unknown variant 'nope'"),
        ("a=|b=batchsize:8", "unknown setting 'batchsize'"),
        ("a=images:8e3", "--images 8e3"),
        ("a=warmup", "--warmup"),
    ],
)
def test_a_wrong_recipe_is_refused_before_the_first_training(text, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        recipes.main(["--recipes", text])


def test_recipes_are_read():
    config = recipes.Config(recipes="a=|b=variant:laplace;images:5;init_lr:2e-3;channel_mults:1,2")
    assert recipes.read_recipes(config) == {
        "a": {"variant": "", "images": 8000, "seconds": 0, "settings": {}},
        "b": {"variant": "laplace", "images": 5, "seconds": 0, "settings": {"init_lr": 2e-3, "channel_mults": (1, 2)}},
    }


def test_a_folder_of_images_is_data_too(workplace):
    lists = [runs.list_images("datasets", workplace / "work")]
    (workplace / "datasets" / "odd" / "001.png").unlink()
    lists.append(runs.list_images("datasets", workplace / "work"))
    write_pictures(workplace / "other" / "datasets")
    assert lists[0] == lists[1] != runs.list_images("other/datasets", workplace / "work")
    found = read_annotation(lists[0])
    assert len(found.paths) == 23 and found.classes == ["even", "odd"]


def sigma_of(t):
    return (0.002 * (80 / 0.002) ** (t / 1000)).reshape(-1, 1, 1, 1)


def ideal_edm(mean, std):
    """Karras et al. 2022, equation 7 solved for the network, as the images are N(mean, std^2)."""

    def network(scaled, t):
        sigma = sigma_of(t)
        x = scaled * (sigma**2 + 0.25) ** 0.5
        best = (std**2 * x + sigma**2 * mean) / (std**2 + sigma**2)
        return (best - 0.25 / (sigma**2 + 0.25) * x) / (sigma * 0.5 / (sigma**2 + 0.25) ** 0.5)

    return network


def ideal_flow(mean, std):
    """E[noise - image | x_t] as the images are N(mean, std^2)."""

    def network(x_t, t):
        t = (t / 1000).reshape(-1, 1, 1, 1)
        slope = (t - (1 - t) * std**2) / ((1 - t) ** 2 * std**2 + t**2)
        return slope * (x_t - (1 - t) * mean) - mean

    return network


@pytest.mark.parametrize(("name", "ideal"), [("edm", ideal_edm), ("flow", ideal_flow)])
def test_another_objective_has_the_known_answers_of_gaussian_images(name, ideal, monkeypatch):
    """Images that are all alike have no loss. The ODE from noise to N(mean, std^2) is linear."""
    objective, mean, std, calls = objectives.OBJECTIVES[name], 0.3, 0.4, []
    noise = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    alike = torch.full_like(noise, mean)
    losses = objective.losses(ideal(mean, 0.0), alike, noise, torch.linspace(-2, 2, 6))
    torch.testing.assert_close(losses, torch.zeros(6), atol=1e-6, rtol=0)

    def network(x, t):
        calls.append(len(x))
        return ideal(mean, std)(x, t)

    known = mean + std * noise
    if name == "edm":  # what is left of the mean where it begins, at sigma 80
        known = mean + std * (80 * noise - mean) / (std**2 + 80**2) ** 0.5
    errors = [(objective.sample(network, noise) - known).abs().max()]
    assert calls == [6] * time_to_quality.STEPS
    for steps in (26, 52):
        monkeypatch.setattr(objectives, "STEPS", steps)
        errors.append((objective.sample(network, noise) - known).abs().max())
    assert errors[2] < 0.01 and errors[0] > 3.8 * errors[1] > 3.8**2 * errors[2]  # of second order


def test_edm_gives_its_network_unit_variance_and_asks_for_unit_variance():
    """Karras et al. 2022, appendix B.6. The weight takes the preconditioning out of the loss."""
    generator, inputs = torch.Generator().manual_seed(0), []
    x, noise = (torch.randn(3, 1, 256, 256, generator=generator) for _ in range(2))
    losses = objectives.edm_losses(
        lambda scaled, t: inputs.append((scaled, t)) or torch.zeros_like(scaled), 0.5 * x, noise, torch.arange(-1.0, 2)
    )
    ((scaled, t),) = inputs
    torch.testing.assert_close(scaled.flatten(1).var(1), torch.ones(3), atol=0.02, rtol=0)
    torch.testing.assert_close(losses, torch.ones(3), atol=0.02, rtol=0)
    torch.testing.assert_close(sigma_of(t).flatten().log(), -1.2 + 1.2 * torch.arange(-1.0, 2))


def test_the_fair_table_trains_the_best_rate_to_the_end_and_goes_on_where_it_was(workplace, monkeypatch, capsys):
    for name in ("WORK", "RESULTS"):
        monkeypatch.setattr(time_to_quality, name, workplace / name)
    monkeypatch.setattr(time_to_quality, "steps_a_minute", lambda clock, run: 200)
    monkeypatch.setattr(time_to_quality, "plot", lambda report, path: None)
    evaluator = {"annotation": workplace / "train_lines.txt", "channels": 3}
    monkeypatch.setattr(time_to_quality, "Evaluator", lambda config, device: types.SimpleNamespace(**evaluator))
    tiny = {"channel": 8, "channel_mults": (1,), "attention_resolutions": (), "batch_size": 8}
    monkeypatch.setitem(train.PRESETS, "quick", train.PRESETS["quick"] | tiny)
    rates = {1.2e-3: 3.0, 1e-4: 5.0, 1e-2: 2.0}
    measured, losses, edm = [], [], objectives.OBJECTIVES["edm"]
    counted = edm._replace(losses=lambda *given: losses.append(edm.losses(*given)) or losses[-1])
    monkeypatch.setitem(objectives.OBJECTIVES, "edm", counted)

    def distance(evaluator, run):
        measured.append((run.objective, run.config.optimizer_type, run.config.init_lr, run.seed, run.step))
        return rates[run.config.init_lr] + run.seed

    monkeypatch.setattr(time_to_quality, "sampled", distance)
    options = {"data": "datasets", "size": 8, "minutes": 0.02, "marks": (0.01,), "rates": (1e-4, 1e-2), "seeds": 2}
    arguments = runs.as_options({**options, "methods": "quick-middle,edm-adam", "device": "cpu", "name": "own"})
    time_to_quality.main(arguments)
    assert len(losses) == 4 + 2 * 2 + 2 + 2 * 4  # steps, which all ask for this objective
    row = ("EDM", "adam")
    assert [found for found in measured if found[0] == "EDM"] == [
        *((*row, 1.2e-3, 0, step) for step in (2, 4)),
        *((*row, rate, 0, 2) for rate in (1e-4, 1e-2)),
        (*row, 1e-2, 0, 4),
        *((*row, rate, 1, step) for rate in (1.2e-3, 1e-2) for step in (2, 4)),
    ]
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    table = {row[0].removeprefix("| "): dict(zip(rows[0][1:], row[1:])) for row in rows[2:]}
    assert list(table) == ["quick-middle", "edm-adam", "edm-adam 0.0001", "edm-adam 0.01"]
    assert (
        table["edm-adam 0.01"]["0.02 min |"] == "2.50 (2.00, 3.00) |" and table["edm-adam 0.0001"]["0.02 min |"] == " |"
    )
    own = table["quick-middle"]
    values = ("0.0012", "muon", "no", "2", "0.0", choose_precision("auto", torch.device("cpu")), "8")
    assert tuple(own[name] for name in time_to_quality.COLUMNS) == values
    assert (own["objective"], own["sampler (NFE)"]) == ("v, cosine, middle t", "sde-dpm++ (25)")
    assert table["edm-adam"]["sampler (NFE)"] == "heun (25)" and table["edm-adam"]["optimizer"] == "adam"
    count = len(measured)
    time_to_quality.main(arguments)
    assert len(measured) == count

    state = next((workplace / "WORK").rglob("edm-adam 0.0001_0.pth"))
    rates[1e-4] = 1.0
    report = json.loads((workplace / "RESULTS/time_to_quality_own_datasets.json").read_text("utf-8"))
    del report["methods"]["edm-adam 0.0001"]["0"]["marks"][0]
    runs.write_json(workplace / "RESULTS/time_to_quality_own_datasets.json", report)
    time_to_quality.main(arguments)
    assert state.is_file() and measured[count:] == [(*row, 1e-4, seed, step) for seed in (0, 1) for step in (2, 4)]

    report = json.loads((workplace / "RESULTS/time_to_quality_own_datasets.json").read_text("utf-8"))
    del report["methods"]["edm-adam"]["1"]["marks"][1]  # its state is that of the second mark
    runs.write_json(workplace / "RESULTS/time_to_quality_own_datasets.json", report)
    count = len(measured)
    time_to_quality.main(arguments)
    assert measured[count:] == [(*row, 1.2e-3, 1, step) for step in (2, 4)]

    count, preset = len(measured), train.PRESETS["quick"]
    monkeypatch.setitem(train.PRESETS, "quick", {**preset, "init_lr": 1e-2})
    time_to_quality.main(
        runs.as_options({**options, "seeds": 1, "methods": "quick-middle", "device": "cpu", "name": "own"})
    )
    assert [found[2:] for found in measured[count:]] == [(1e-2, 0, step) for step in (2, 4)]
    report = json.loads((workplace / "RESULTS/time_to_quality_own_datasets.json").read_text("utf-8"))
    assert list(report["methods"]["quick-middle"]) == ["0"]  # no mean over two rates
