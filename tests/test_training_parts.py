"""The pieces of the training loop, each by itself."""

import hashlib
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, run_main
from PIL import Image

import train
from nets import TIMESTEP_SAMPLINGS, GaussianDiffusion, generate_cosine_schedule
from utils import distributed
from utils.checkpoint.resume import own_sums
from utils.data.dataset import ImageDataset, split_validation
from utils.training.meter import Meter, epoch_means
from utils.training.optimizer import choose_learning_rate, learning_rate
from utils.training.step_rng import derive_seed, sample_step_noise
from utils.training.summary import ema_span


def test_rate_rises_then_falls_by_half_a_cosine():
    rates = [learning_rate(step, 1000, 2e-4, 2e-6, 0.05) for step in range(1000)]
    assert rates[0] == pytest.approx(2e-4 / 50)
    assert rates[49] == rates[50] == max(rates) == 2e-4
    assert rates[-1] == pytest.approx(2e-6)
    middle = 50 + (999 - 50) / 2
    assert (rates[math.floor(middle)] + rates[math.ceil(middle)]) / 2 == pytest.approx((2e-4 + 2e-6) / 2, rel=1e-3)
    assert all(a >= b for a, b in zip(rates[50:], rates[51:]))


def test_warmup_is_never_longer_than_a_thousand_steps():
    assert learning_rate(999, 10**6, 1.0, 0.0, 0.05) == 1.0
    assert learning_rate(499, 10**6, 1.0, 0.0, 0.05) == 0.5


def test_step_decay_has_ten_equal_stages():
    rates = [learning_rate(step, 1000, 1.0, 1e-3, 0.0, "step") for step in range(1000)]
    assert len(set(rates)) == 10
    assert rates[0] == 1.0 and rates[-1] == pytest.approx(1e-3)
    assert [rates.count(rate) for rate in sorted(set(rates))][1:-1] == pytest.approx([100] * 8, abs=1)


@pytest.mark.parametrize("total", [1, 2, 3])
def test_rate_of_the_shortest_runs_is_finite(total):
    for decay in ("cos", "step"):
        assert all(0 < learning_rate(step, total, 1e-3, 1e-5, 0.05, decay) <= 1e-3 for step in range(total))


def test_auto_rate_goes_as_one_over_the_width():
    assert [choose_learning_rate("auto", channel) for channel in (128, 64, 32, 256, 1)] == [
        2e-4,
        4e-4,
        8e-4,
        1e-4,
        1e-3,
    ]
    assert choose_learning_rate(3e-4, 64) == 3e-4


def timesteps_of(name="uniform"):
    """`sample_timesteps` of a GaussianDiffusion of 100 timesteps."""
    betas = generate_cosine_schedule(100)
    return GaussianDiffusion(torch.nn.Identity(), (4, 4), 3, betas=betas, timestep_sampling=name).sample_timesteps


@pytest.mark.parametrize("name", TIMESTEP_SAMPLINGS)
def test_draws_are_those_of_the_whole_batch_whatever_the_share(name):
    generator, rest = torch.Generator(), ((8, 3, 4, 4), timesteps_of(name), 0.5, 0.3)
    whole = sample_step_noise(generator, derive_seed(0, 1, 2), *rest)
    torch.randn(5, generator=generator)
    shares = [sample_step_noise(generator, derive_seed(0, 1, 2), *rest).of_rank(rank, 4) for rank in range(4)]
    for field in whole._fields:
        assert torch.equal(torch.cat([getattr(share, field) for share in shares]), getattr(whole, field))
    other = sample_step_noise(generator, derive_seed(0, 1, 3), *rest)
    assert not torch.equal(whole.noise, other.noise) and not torch.equal(whole.t, other.t)


def test_the_draws_of_a_step_are_the_same_as_ever():
    """Pinned: a resumed run goes on with the numbers that it began with."""
    step_noise = sample_step_noise(torch.Generator(), derive_seed(0, 1, 2), (8, 3, 4, 4), timesteps_of(), 0.5, 0.3)
    assert step_noise.t.tolist() == [71, 38, 33, 43, 50, 59, 5, 36]
    assert step_noise.noise.flatten()[:2].tolist() == pytest.approx([-0.129967287, 1.133228898])
    assert step_noise.flip.nonzero().flatten().tolist() == [6, 7]
    assert step_noise.drop.nonzero().flatten().tolist() == [0, 4]


def test_an_option_does_not_change_another_ones_draws():
    with_flips, without = (
        sample_step_noise(torch.Generator(), 7, (64, 1, 2, 2), timesteps_of(), flip=flip, drop=0.5)
        for flip in (0.5, 0.0)
    )
    assert torch.equal(with_flips.noise, without.noise) and torch.equal(with_flips.drop, without.drop)
    assert with_flips.flip.any() and not without.flip.any()


def test_seeds_of_neighbouring_steps_do_not_collide():
    assert (
        len({derive_seed(seed, epoch, step) for seed in range(10) for epoch in range(20) for step in range(50)})
        == 10_000
    )


def test_meter_adds_losses_by_quarter_and_leaves_bad_steps_out():
    meter = Meter(torch.device("cpu"), 100)
    t, losses = torch.tensor([0, 24, 25, 50, 99]), torch.tensor([1.0, 3.0, 5.0, 7.0, 9.0])
    meter.add(losses, t, torch.tensor(2.0), torch.zeros(()), torch.zeros(()))
    meter.add(losses * float("nan"), t, torch.tensor(float("nan")), torch.ones(()), torch.ones(()))
    row = epoch_means(meter.sums[None])
    assert row == {
        "loss": 5.0,
        "loss_t1": 2.0,
        "loss_t2": 5.0,
        "loss_t3": 7.0,
        "loss_t4": 9.0,
        "grad_norm": 2.0,
        "skipped": 1,
    }
    assert meter.latest() == (5.0, 1)
    meter.add(losses, t, torch.tensor(2.0), torch.zeros(()), torch.zeros(()))
    assert meter.latest()[1] == 0


def test_summary_of_two_processes_is_the_mean_over_all_images():
    a, b = Meter(torch.device("cpu"), 4), Meter(torch.device("cpu"), 4)
    zero = torch.zeros(())
    a.add(torch.tensor([1.0, 1.0]), torch.tensor([0, 1]), torch.tensor(3.0), zero, zero)
    b.add(torch.tensor([5.0, 2.0]), torch.tensor([1, 2]), torch.tensor(3.0), zero, zero)
    row = epoch_means(torch.stack([a.sums, b.sums]))
    assert (row["loss"], row["loss_t2"], row["loss_t4"], row["grad_norm"]) == (2.25, 3.0, None, 3.0)


def dataset_of(hashes):
    """Images of one pixel each.

    A label is the image's place, so a subset shows which images it has.
    """
    pixels = np.arange(len(hashes)).astype(np.uint8).reshape(-1, 1, 1, 1)
    return ImageDataset("pictures", pixels, hashes, torch.arange(len(hashes)), [], hashes)


def test_validation_side_is_the_contents_and_never_changes():
    hashes = [hashlib.md5(str(number).encode()).hexdigest() for number in range(4000)]
    train, aside = split_validation(dataset_of(hashes), 0.1)
    assert 300 < len(aside) < 500 and len(train) + len(aside) == 4000
    assert sorted(train.hashes + aside.hashes) == sorted(hashes)
    _, again = split_validation(dataset_of(list(reversed(hashes[:1000]))), 0.1)
    assert set(again.hashes) == set(aside.hashes) & set(hashes[:1000])
    for side in (train, aside):  # hashes, labels and pixels are of the same images
        assert side.hashes == [hashes[label] for label in side.labels.tolist()]
        assert torch.equal(side.images(range(len(side))).flatten(), side.labels.to(torch.uint8))


def test_validation_share_is_the_same_as_ever():
    """Pinned: another rule would put images that were trained on into the validation share of a
    resumed run.
    """
    hashes = [hashlib.md5(str(number).encode()).hexdigest() for number in range(60)]
    train, aside = split_validation(dataset_of(hashes), 0.1)
    assert aside.labels.tolist() == [6, 27, 33, 43, 59]
    assert train.labels.tolist() == [number for number in range(60) if number not in (6, 27, 33, 43, 59)]


def test_validation_share_that_leaves_a_side_empty_is_refused():
    with pytest.raises(ValueError, match="val_split"):
        split_validation(dataset_of(["ff" * 16] * 3), 0.1)
    train, aside = split_validation(dataset_of(["00" * 16, "ff" * 16]), 0.0)
    assert len(train) == 2 and len(aside) == 0


def test_running_sums_survive_another_number_of_processes(monkeypatch):
    saved, sums = torch.tensor([[1.0, 2.0], [10.0, 20.0]]), {}
    for world_size in (1, 2, 3):
        for rank in range(world_size):
            monkeypatch.setattr(distributed, "world_size", lambda world_size=world_size: world_size)
            monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
            monkeypatch.setattr(distributed, "is_main", lambda rank=rank: rank == 0)
            sums[world_size, rank] = own_sums(saved).tolist()
    assert sums == {
        (1, 0): [11, 22],
        (2, 0): [1, 2],
        (2, 1): [10, 20],
        (3, 0): [11, 22],
        (3, 1): [0, 0],
        (3, 2): [0, 0],
    }


def test_one_image_is_no_images(workplace, capsys):
    """What a run prints about one thing says so of one."""
    Path("one.txt").write_text(Path("train_lines.txt").read_text().splitlines()[0].split(";")[1])
    one = ["--annotation_path", "one.txt", "--epochs", "1", "--img_channels", "1"]
    run_main("train.py", *TINY, *one, "--dry_run", "True")
    run_main("train.py", *TINY, *one)
    with pytest.raises(SystemExit):
        run_main("train.py", *TINY, *one, "--val_split", "0.5")
    with pytest.raises(SystemExit):
        run_main("train.py", *TINY, *one, "--accumulate", "2")
    said = "".join(capsys.readouterr())
    assert said.count("1 image") >= 5
    assert re.findall(r"(?<![\d.,x])1 (?:image|time|epoch|step|channel|group|thread)s\b", said) == []


@pytest.mark.parametrize("decay", ["cos", "step"])
def test_the_learning_rate_never_rises_after_the_warmup(decay):
    rates = [learning_rate(step, 100, 1e-6, 2e-6, 0.1, decay) for step in range(100)]
    assert max(rates) == 1e-6 and all(a >= b for a, b in zip(rates[10:], rates[11:]))


def test_stages_that_fall_by_a_factor_cannot_reach_zero(workplace, capsys):
    for settings in (("--min_lr", "0"), ("--init_lr", "0")):
        with pytest.raises(SystemExit):
            run_main("train.py", *TINY, "--lr_decay_type", "step", *settings)
        assert "cannot reach 0: set init_lr and min_lr above 0" in capsys.readouterr().err


def test_a_loss_is_shown_only_once_there_is_one():
    meter, nan = Meter(torch.device("cpu"), 10), torch.tensor(float("nan"))
    meter.add(torch.tensor([float("nan")]), torch.tensor([3]), nan, torch.ones(()), torch.ones(()))
    assert math.isnan(meter.latest()[0]) and meter.latest()[1] == 1


@pytest.mark.parametrize(
    ("decay", "warmup", "steps", "span"),
    [
        (0.999, True, 901, 101),
        (0.999, True, 100_000, 1000),
        (0.999, False, 5000, 1000),
        (0.9999, False, 300, 300),
        (0.0, True, 50, 1),
    ],
)
def test_the_span_of_the_ema(decay, warmup, steps, span):
    """Against the weights of an EMA that sees its steps one by one: their mean age, but for a
    cut-off start.
    """
    config = train.Config(ema_decay=decay, ema_warmup=warmup, ema_start=1)
    found = ema_span(config, steps)
    assert found == pytest.approx(span, rel=0.02)
    age = 0.0
    for n in range(steps):
        now = min(decay, (1 + n) / (10 + n)) if warmup else decay
        age = now * (age + 1)
    if decay and steps > 10 * span or warmup:
        assert found == pytest.approx(age + 1, rel=0.15)


@pytest.mark.parametrize("colored, channels, said", [(0, 3, True), (1, 3, False), (0, 1, False)])
def test_gray_images_learned_in_color_are_told(tmp_path, monkeypatch, capsys, colored, channels, said):
    """Gray ones in color files too; a single color pixel is enough for color."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "datasets").mkdir()
    for number in range(8):
        levels = np.random.default_rng(number).integers(0, 256, (8, 8, 1), dtype=np.uint8).repeat(3, axis=2)
        levels[3, 4, 0] ^= colored if number == 7 else 0
        Image.fromarray(levels).save(tmp_path / "datasets" / f"{number}.png")
    run_main("txt_annotation.py")
    run_main("train.py", *TINY, "--dry_run", "True", "--img_channels", channels)
    assert ("all images are gray: a run with --img_channels 1" in capsys.readouterr().out) == said
