"""What the training loop hands to its parts: recorded in short runs of train.py."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TINY, newest_run, read_file, read_history, run_main

import train
from nets import Condition, GaussianDiffusion
from utils.checkpoint import saving
from utils.data.dataset import ImageDataset, normalize
from utils.training.memory import MemoryNeeds
from utils.training.validation import validation_loss

RUN = [*TINY, "--epochs", "2", "--seed", "1"]  # 6 steps


@pytest.fixture
def calls(monkeypatch):
    """All calls of the loss, as dicts, without those that only measure memory and time."""
    recorded, forward = [], GaussianDiffusion.forward
    monkeypatch.setattr(train, "print_time", lambda *_: None)
    monkeypatch.setattr(train, "measure_needs", lambda config, context: MemoryNeeds(8, 1, 1.0))

    def recording(self, x, y=None, **options):
        recorded.append({"x": x.clone(), "y": y, "training": self.model.training, **options})
        return forward(self, x, y, **options)

    monkeypatch.setattr(GaussianDiffusion, "forward", recording)
    return recorded


def test_labels_are_hidden_at_the_rate_asked_for(workplace, calls):
    run_main("train.py", *RUN, "--class_conditional", "True", "--label_dropout", "0.5", "--epochs", "12")
    labels = torch.cat([call["y"] for call in calls])
    assert set(labels.tolist()) == {0, 1, 2}
    assert 0.35 < (labels == 2).float().mean() < 0.65


def test_without_label_dropout_there_is_no_null_class(workplace, calls):
    run_main("train.py", *RUN, "--class_conditional", "True", "--label_dropout", "0")
    assert set(torch.cat([call["y"] for call in calls]).tolist()) == {0, 1}
    weights = read_file(newest_run(workplace) / "last.pth")["weights"]
    assert weights["model.downs.0.class_bias.weight"].shape[0] == 2


def test_half_of_the_pictures_are_mirrored(workplace, calls):
    run_main("train.py", *RUN, "--epochs", "8", "--horizontal_flip", "True")
    mirrored = [call["x"] for call in calls]
    calls.clear()
    run_main("train.py", *RUN, "--epochs", "8")
    plain = [call["x"] for call in calls]
    changed = torch.cat([(a != b).flatten(1).any(1) for a, b in zip(mirrored, plain, strict=True)])
    assert 0.35 < changed.float().mean() < 0.65
    for a, b in zip(mirrored, plain, strict=True):
        assert torch.equal(torch.where((a != b).flatten(1).any(1)[:, None, None, None], a.flip(3), a), b)


def test_every_step_of_every_epoch_draws_anew(workplace, calls):
    run_main("train.py", *RUN)
    assert len({tuple(call["noise"].flatten()[:3].tolist()) for call in calls}) == len(calls) == 6
    assert all(call["training"] for call in calls)


def test_dropout_draws_anew_each_step(workplace, monkeypatch):
    seeds = []
    monkeypatch.setattr(torch, "manual_seed", lambda seed: seeds.append(seed))
    run_main("train.py", *RUN)
    assert len(set(seeds)) == len(seeds) == 7  # one for the weights, one a step


def test_validation_is_drawn_with_the_average_and_always_the_same(workplace, calls):
    run_main("train.py", *RUN, "--val_split", "0.3", "--num_timesteps", "1000")
    validation = [call for call in calls if call.get("use_ema")]
    assert len(validation) >= 2 and len(validation) % 2 == 0
    half = len(validation) // 2
    for a, b in zip(validation[:half], validation[half:], strict=True):
        assert torch.equal(a["noise"], b["noise"]) and torch.equal(a["t"], b["t"]) and torch.equal(a["x"], b["x"])
    assert len([call for call in calls if not call.get("use_ema")]) == 2 * (
        (24 - sum(len(c["x"]) for c in validation[:half])) // 8
    )


def test_the_density_of_the_timesteps_is_that_of_training_alone(workplace, calls):
    """Their validation losses compare, as timesteps and noise are the same."""
    settings = ["--val_split", "0.3", "--num_timesteps", "1000", "--accumulate", "2"]
    for name in ("uniform", "middle"):
        run_main("train.py", *RUN, *settings, "--timestep_sampling", name)
    uniform, middle = calls[: len(calls) // 2], calls[len(calls) // 2 :]
    for one, other in zip(uniform, middle, strict=True):
        assert torch.equal(one["t"], other["t"]) == one.get("use_ema", False)
        assert not one.get("use_ema") or torch.equal(one["noise"], other["noise"])
    trained = [torch.cat([call["t"] for call in part if not call.get("use_ema")]) for part in (uniform, middle)]
    assert len(trained[0]) > 30 and trained[1].double().mean() < 0.7 * trained[0].double().mean()


@pytest.mark.parametrize("batch_size", [8, 4096])
def test_validation_spreads_the_timesteps_of_each_class_over_all_of_them(monkeypatch, batch_size):
    """The list is sorted by class. Each class has the mean of all timesteps, and no wide gap."""
    pixels, numbers = np.zeros((300, 2, 2, 1), np.uint8), torch.arange(300)
    images, asked = ImageDataset("images", pixels, [""] * 300, numbers, [], [""] * 300), []

    def diffusion(x, y, t, noise, **options):
        asked.extend(zip(y.tolist(), t.tolist()))
        return torch.zeros(len(x))

    diffusion.sample_timesteps = lambda count, generator: torch.zeros(count)
    diffusion.condition, diffusion.betas = Condition(), torch.zeros(1)
    cpu = torch.device("cpu")
    meter, layout = SimpleNamespace(dtype=torch.float64), torch.contiguous_format
    context = SimpleNamespace(
        device=cpu, validation=images, batch_size=batch_size, meter=meter, layout=layout, diffusion=diffusion
    )
    settings = {"img_channels": 1, "input_shape": (2, 2), "num_timesteps": 1000, "precision": "fp32"}
    validation_loss(train.Config(**settings, class_conditional=True), context)
    assert [number for number, _ in asked] == numbers.tolist()
    for first in range(0, 300, 30):  # ten classes of 30
        t = sorted(t for _, t in asked[first : first + 30])
        assert np.mean(t) == pytest.approx(500, abs=60) and max(np.diff([0, *t, 999])) < 90


def test_the_first_preview_comes_after_the_first_epoch(workplace):
    run_main("train.py", *RUN, "--epochs", "3", "--preview_period", "2", "--preview_steps", "2")
    found = sorted(path.name for path in Path("results/train_out").rglob("*.png"))
    assert found == ["epoch_0001.png", "epoch_0002.png", "epoch_0003.png"]


def test_rate_and_clipping_reach_the_optimizer(workplace, monkeypatch):
    rates, norms, step = [], [], train.step_unless_bad

    def recording(optimizer, scaler, bad):
        gradients = [parameter.grad for group in optimizer.param_groups for parameter in group["params"]]
        rates.append(optimizer.param_groups[0]["lr"])
        norms.append(float(torch.stack([gradient.norm() for gradient in gradients]).norm()))
        step(optimizer, scaler, bad)

    monkeypatch.setattr(train, "step_unless_bad", recording)
    run_main("train.py", *RUN, "--grad_clip", "0.01", "--warmup", "0.5", "--init_lr", "3e-3", "--min_lr", "1e-3")
    assert rates == pytest.approx([1e-3, 2e-3, 3e-3, 3e-3, 2e-3, 1e-3])
    assert norms == pytest.approx([0.01] * 6, rel=1e-3)
    norms.clear()
    run_main("train.py", *RUN, "--grad_clip", "0")
    assert min(norms) > 0.1


@pytest.fixture
def gradients(monkeypatch):
    """The gradients of each step as one vector, as the optimizer gets them."""
    recorded, step = [], train.step_unless_bad

    def recording(optimizer, *arguments):
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        recorded.append(torch.cat([parameter.grad.flatten() for parameter in parameters]))
        step(optimizer, *arguments)

    monkeypatch.setattr(train, "step_unless_bad", recording)
    return recorded


PLAIN = [*RUN, "--epochs", "1", "--dropout", "0", "--precision", "fp32"]


def test_micro_batches_add_up_to_the_gradient_of_the_batch(workplace, gradients):
    """Adam hides a factor, so the gradients are compared."""
    run_main("train.py", *PLAIN, "--grad_clip", "0")
    whole = torch.stack(gradients)
    for accumulate in ("2", "8"):
        gradients.clear()
        run_main("train.py", *PLAIN, "--grad_clip", "0", "--accumulate", accumulate)
        assert (torch.stack(gradients) - whole)[0].norm() < 1e-4 * whole[0].norm()


def test_gradients_are_clipped_by_their_own_norm_not_the_scaled_one(workplace, gradients, monkeypatch):
    """With a GradScaler, as for fp16, the run is the same as without: gradients, norms, weights."""
    run_main("train.py", *PLAIN, "--grad_clip", "0.5")
    without, first = torch.stack(gradients), newest_run(workplace)
    gradients.clear()
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda device, enabled: scaler(device, init_scale=1024.0))
    run_main("train.py", *PLAIN, "--grad_clip", "0.5")
    second = newest_run(workplace)
    assert second != first and read_file(second / "last.pth")["scaler"]["scale"] == 1024
    torch.testing.assert_close(torch.stack(gradients)[0], without[0], rtol=1e-3, atol=1e-6)
    one, other = (read_history(run)[-1] for run in (first, second))
    assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-2) and one["grad_norm"] > 0.5


def test_each_process_drops_other_features_and_has_its_part_of_the_same_noise(workplace, monkeypatch):
    make_batch, seen = train.make_batch, []

    def as_one_of_two(config, context, images, labels, *position):
        with monkeypatch.context() as patch:
            patch.setattr(train.distributed, "world_size", lambda: 2)
            for rank in (0, 1, 0):
                patch.setattr(train.distributed, "rank", lambda rank=rank: rank)
                *_, step = make_batch(config, context, images[:4], labels[:4], *position)
                seen.append((step.noise, torch.nn.functional.dropout(torch.ones(100))))
        return make_batch(config, context, images, labels, *position)

    monkeypatch.setattr(train, "make_batch", as_one_of_two)
    run_main("train.py", *PLAIN)
    (noise, dropped), (other_noise, other_dropped), (same_noise, same_dropped) = seen[:3]
    assert torch.equal(dropped, same_dropped) and not torch.equal(dropped, other_dropped)
    assert torch.equal(noise, same_noise) and not torch.equal(noise, other_noise)


def test_moments_come_back_in_the_weights_own_layout(workplace, monkeypatch):
    """A run goes on the same whatever memory layout the saved moments had."""
    run_main("train.py", *RUN)
    first = newest_run(workplace)
    results = []
    for layout in (torch.contiguous_format, torch.channels_last):
        with monkeypatch.context() as patch:
            patch.setattr(train, "memory_format", lambda *_, layout=layout: layout)
            target = workplace / f"{layout}".replace("torch.", "")
            target.mkdir()
            for name in ("last.pth", "config.json"):
                (target / name).write_bytes((first / name).read_bytes())
            run_main("train.py", "--resume", target, "--epochs", "4")
        results.append(read_history(target)[-1]["loss"])
    assert results[0] == pytest.approx(results[1], rel=1e-4)


def test_a_new_weight_decay_holds_after_resuming(workplace, monkeypatch):
    run_main("train.py", *RUN)
    seen, step = set(), train.step_unless_bad
    monkeypatch.setattr(
        train,
        "step_unless_bad",
        lambda optimizer, *a: (seen.add(optimizer.defaults["weight_decay"]), step(optimizer, *a)),
    )
    run_main("train.py", "--resume", "latest", "--epochs", "3", "--weight_decay", "0.25")
    assert seen == {0.25}
    assert read_file(newest_run(workplace) / "last.pth")["optimizer"]["param_groups"][0]["weight_decay"] == 0.25


def test_only_the_newest_weights_are_kept(workplace):
    run_main("train.py", *RUN, "--epochs", "5", "--save_period", "1", "--keep_last", "2")
    assert sorted(path.name for path in newest_run(workplace).glob("epoch_*.pth")) == [
        "epoch_0004.pth",
        "epoch_0005.pth",
    ]


def test_previews_are_drawn_with_the_average_in_eval_mode_from_the_same_noise(workplace, monkeypatch):
    asked, sample = [], GaussianDiffusion.sample

    def recording(self, *arguments, **options):
        asked.append((list(options["seeds"]), options.get("use_ema", True), self.ema_model.training))
        return sample(self, *arguments, **options)

    monkeypatch.setattr(GaussianDiffusion, "sample", recording)
    run_main("train.py", *RUN, "--preview_period", "1", "--preview_steps", "2")
    assert asked == [(list(range(1, 26)), True, False)] * 2
    assert len(list((workplace / "results/train_out").glob("*/*.png"))) == 2


def test_saves_within_an_epoch_come_by_the_clock(workplace, monkeypatch):
    positions, save = [], saving.save_checkpoint
    monkeypatch.setattr(
        saving, "save_checkpoint", lambda checkpoint: (positions.append(checkpoint.training), save(checkpoint))
    )
    monkeypatch.setattr(saving.CheckpointWriter, "is_cheap", lambda self: True)
    run_main("train.py", *RUN, "--save_minutes", "0")
    assert [(p.epoch, p.images) for p in positions if p] == [
        (0, 8),
        (0, 16),
        (0, 24),
        (1, 0),
        (1, 8),
        (1, 16),
        (1, 24),
        (2, 0),
    ]


def test_normalized_pictures_reach_the_network(workplace, calls):
    run_main("train.py", *RUN)
    x = torch.cat([call["x"] for call in calls])
    assert x.min() == -1 and x.max() == 1
    both_ends = normalize(torch.tensor([[[[0], [255]]]], dtype=torch.uint8), torch.device("cpu"))
    torch.testing.assert_close(both_ends.flatten(), torch.tensor([-1.0, 1.0]))
