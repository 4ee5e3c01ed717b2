"""Distances between sets of pictures: closed forms, torchmetrics on the same features, and sets
whose answer is known.
"""

import json
import math
import os
import pickle
import re
import shutil
import sys
import urllib.error
import zipfile

import numpy as np
import pytest
import torch
from conftest import read_file
from PIL import Image
from torch.testing import assert_close

import predict
from nets import build
from utils.checkpoint.integrity import save_tensors, weights_digest
from utils.data.image_format import ImageFormat
from utils.errors import UserError
from utils.evaluate import __main__ as evaluate
from utils.evaluate import features as features_module
from utils.evaluate import image_sets
from utils.evaluate.classifier import FeatureNet, load_feature_net, save_feature_net, train_feature_net
from utils.evaluate.distances import (
    FeatureStatistics,
    copied_fraction,
    frechet_distance,
    kernel_distance,
    nearest,
    precision_and_recall,
)
from utils.evaluate.features import Extractor, FeatureCache, collect, load_inception
from utils.evaluate.image_sets import open_images, scan_sizes
from utils.files import locked
from utils.images import save_png


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


KINDS = 4
GRAY = ImageFormat((8, 8), 1)


def shapes(count, size=12, seed=0):
    """(count, size, size, 1) uint8 and labels: stripes across, stripes down, discs and squares, in
    random places and greys.
    """
    draw = np.random.default_rng(seed)
    rows, columns = np.mgrid[:size, :size]
    pictures, labels = [], np.arange(count) % KINDS
    for kind in labels:
        y, x, phase, grey = *draw.integers(3, size - 3, 2), draw.integers(0, 4), draw.integers(120, 256)
        inside = [
            (rows + phase) % 4 < 2,
            (columns + phase) % 4 < 2,
            (rows - y) ** 2 + (columns - x) ** 2 < 10,
            np.maximum(abs(rows - y), abs(columns - x)) < 3,
        ][kind]
        pictures.append(np.where(inside, grey, 20) + draw.integers(0, 10, (size, size)))
    return np.clip(pictures, 0, 255).astype(np.uint8)[..., None], torch.from_numpy(labels)


@pytest.fixture(scope="module")
def net():
    """A classifier of the shapes, as benchmarks train one."""
    return train_on_shapes(800, 200, epochs=4)


def train_on_shapes(count, test_count, epochs, seed=0):
    parts = [tuple(map(torch.as_tensor, part)) for part in (shapes(count), shapes(test_count, seed=1))]
    return train_feature_net(*parts, KINDS, epochs=epochs, batch_size=50, seed=seed)


def features(net, pictures):
    channels = -1 if isinstance(net, FeatureNet) else 3
    return Extractor(net, "net", "cpu", channels=channels)(torch.as_tensor(pictures))


def frechet(net, first, second):
    return frechet_distance(*(FeatureStatistics().add(features(net, pictures)) for pictures in (first, second)))


# The Frechet distance


def distance_of(mean_1, cov_1, mean_2, cov_2):
    """The distance of statistics with these means and covariances."""
    values = [torch.as_tensor(value, dtype=torch.float64) for value in (mean_1, cov_1, mean_2, cov_2)]
    return frechet_distance(FeatureStatistics(2, *values[:2]), FeatureStatistics(2, *values[2:]))


def test_frechet_distance_of_one_dimension():
    """(m_1 - m_2)^2 + (s_1 - s_2)^2."""
    assert distance_of([1.0], [[4.0]], [-2.0], [[0.25]]) == pytest.approx(9 + 1.5**2)


def test_frechet_distance_of_covariances_that_commute():
    """In a shared basis of eigenvectors the deviations are subtracted one by one."""
    basis = torch.linalg.qr(randn(6, 6)).Q
    first, second = torch.tensor([3.0, 2, 1, 1e-3, 1e-9, 0]).double(), torch.tensor([1.0, 2, 5, 0, 1e-9, 0.5]).double()
    covariances = [basis @ torch.diag(values) @ basis.T for values in (first, second)]
    expected = 6 * 0.5**2 + (first.sqrt() - second.sqrt()).square().sum().item()
    assert distance_of(torch.zeros(6), covariances[0], torch.full((6,), 0.5), covariances[1]) == pytest.approx(
        expected, rel=1e-7
    )


def test_frechet_distance_of_covariances_that_do_not():
    """The root's trace from the eigenvalues of C_1 C_2, in numpy."""
    a, b = (randn(5, 5, seed=seed) for seed in (1, 2))
    a, b, shift = (a @ a.T).numpy(), (b @ b.T).numpy(), np.arange(5.0)
    assert np.abs(a @ b - b @ a).max() > 0.1
    expected = shift @ shift + np.trace(a) + np.trace(b) - 2 * np.sqrt(np.linalg.eigvals(a @ b).real).sum()
    assert distance_of(shift, a, 0 * shift, b) == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_of_singular_covariances():
    """Fewer pictures than features, as in small data sets.

    Nothing may turn negative, complex or NaN.
    """
    few, others = randn(10, 200), randn(10, 200, seed=1)
    first, second = FeatureStatistics().add(few), FeatureStatistics().add(others)
    assert frechet_distance(first, first) < 1e-9
    assert frechet_distance(first, second) > 10
    line, other_line = torch.zeros(3, 3), torch.zeros(3, 3)
    line[0, 0], other_line[1, 1] = 1, 4
    assert distance_of(torch.zeros(3), line, torch.zeros(3), other_line) == pytest.approx(5)
    assert 0 <= distance_of(torch.zeros(3), 1e-20 * line, torch.zeros(3), 1e-20 * line) < 1e-15


@pytest.mark.parametrize("bad", [torch.eye(3), torch.full((2, 2), math.nan)])
def test_frechet_distance_refuses(bad):
    with pytest.raises(RuntimeError, match="non-finite|shapes"):
        distance_of(torch.zeros(2), torch.eye(2), torch.zeros(2), bad)


def test_running_statistics_are_those_of_the_whole():
    """In batches of odd sizes, and far from zero, where sums of squares would lose all digits."""
    whole = randn(501, 7) * torch.arange(1, 8) + 1e6
    running = FeatureStatistics()
    for part in whole.split([1, 300, 7, 193]):
        running.add(part)
    assert running.count == 501
    assert_close(running.mean, torch.from_numpy(whole.numpy().mean(0)), rtol=1e-12, atol=0)
    assert_close(running.scatter / 500, torch.from_numpy(np.cov((whole.numpy() - 1e6).T)), rtol=1e-7, atol=1e-7)
    with pytest.raises(RuntimeError, match="size of tensor"):
        running.add(torch.zeros(2, 6))


def test_frechet_distance_is_torchmetrics(net):
    fid = pytest.importorskip("torchmetrics.image.fid").FrechetInceptionDistance(feature=net)
    first, second = shapes(300)[0], shapes(240, seed=5)[0] // 2 + 40
    for pictures, real in ((first, True), (second, False)):
        fid.update(torch.from_numpy(pictures).permute(0, 3, 1, 2), real=real)
    assert frechet(net, first, second) == pytest.approx(fid.compute().item(), rel=1e-4)


def test_frechet_distance_orders_pictures(net):
    """Nothing to itself, little to others of the same kind; more with more noise.

    More with more classes missing.
    """
    real, labels = shapes(600)
    draw = np.random.default_rng(3)

    def noisy(deviation):
        return np.clip(real + deviation * draw.standard_normal(real.shape), 0, 255).astype(np.uint8)

    assert frechet(net, real, real) < 1e-3
    with_noise = [
        frechet(net, real, pictures) for pictures in (shapes(600, seed=7)[0], noisy(20), noisy(60), noisy(120))
    ]
    assert with_noise == sorted(with_noise) and with_noise[1] > 2 * with_noise[0]
    with_fewer = [frechet(net, real, real[labels < kinds]) for kinds in (4, 3, 2, 1)]
    assert with_fewer == sorted(with_fewer) and with_fewer[1] > 2 * with_noise[0]


# Kernel distance, precision and recall


def test_kernel_distance_is_torchmetrics(net):
    """One subset of all pictures: nothing is drawn at random."""
    with pytest.warns(UserWarning, match="buffer"):
        kid = pytest.importorskip("torchmetrics.image.kid").KernelInceptionDistance(
            feature=net, subsets=1, subset_size=200
        )
    first, second = shapes(200)[0], shapes(200, seed=5)[0] // 2 + 40
    for pictures, real in ((first, True), (second, False)):
        kid.update(torch.from_numpy(pictures).permute(0, 3, 1, 2), real=real)
    mean, spread = kernel_distance(features(net, first), features(net, second))
    assert mean == pytest.approx(kid.compute()[0].item(), rel=1e-3)
    assert spread == 0


def test_kernel_distance_is_unbiased():
    """Two sets of one distribution: 0 on average, of either sign, while the biased estimate would
    be far above.
    """
    values = [kernel_distance(randn(50, 8, seed=seed), randn(60, 8, seed=1000 + seed))[0] for seed in range(60)]
    assert min(values) < 0 < max(values)
    assert abs(np.mean(values)) < 3 * np.std(values) / math.sqrt(len(values))
    shifted, spread = kernel_distance(randn(300, 8), randn(400, 8, seed=1) + 1, subsets=20, subset_size=50)
    assert shifted > 10 * max(values) and spread > 0
    again = kernel_distance(randn(300, 8), randn(400, 8, seed=1) + 1, subsets=20, subset_size=50)
    other = kernel_distance(randn(300, 8), randn(400, 8, seed=1) + 1, subsets=20, subset_size=50, seed=1)
    assert (shifted, spread) == again != other


def test_precision_and_recall_of_known_sets():
    """Four far clusters: identical, disjoint, one cluster of four, and half of the samples off."""
    centres = 1000 * torch.eye(4).double()
    clusters = [randn(40, 4, seed=seed) + centre for seed, centre in enumerate(centres)]
    whole = torch.cat(clusters)
    assert precision_and_recall(whole, whole) == (1, 1)
    assert precision_and_recall(whole + 1e5, whole) == (0, 0)
    assert precision_and_recall(clusters[2], whole) == (1, 0.25)
    half_off = torch.cat((whole, whole + 1e5))
    assert precision_and_recall(half_off, whole) == (0.5, 1)
    copies = whole[:8].repeat(10, 1)  # more copies than neighbours: balls of no size
    assert precision_and_recall(copies * (1 + 1e-7), copies) == (1, 1)  # as float32 features of other batches would be


def test_balls_reach_to_the_third_neighbour():
    """Points on a line at 0, 1, 3, 6, 10: the ball around 0 has the radius 6, that around 10 the
    radius 9.
    """
    line = torch.tensor([0.0, 1, 3, 6, 10])[:, None]
    queries = torch.tensor([-5.9, -6.1, 18.9, 19.1, 16.5])[:, None]
    assert precision_and_recall(queries, line)[0] == pytest.approx(3 / 5)
    assert precision_and_recall(queries, line, k=1)[0] == 0


# Nearest pictures


def test_nearest_of_a_bank_in_blocks():
    bank, queries = randn(57, 5), randn(9, 5, seed=1)
    queries[4] = bank[50]
    expected = (queries[:, None] - bank).square().sum(2).sqrt().sort(1)
    distances, found = nearest(queries, bank.split(10), k=3)
    assert_close(distances, expected.values[:, :3], atol=1e-6, rtol=1e-6)
    assert torch.equal(found, expected.indices[:, :3])
    assert found[4, 0] == 50
    distances, found = nearest(queries, [bank], k=58)
    assert distances[:, :57].isfinite().all() and (found[:, 57] == -1).all()


def test_nearest_of_bytes_does_not_wrap():
    distances, found = nearest(np.array([[250, 0]], np.uint8), [np.array([[0, 0], [255, 0], [250, 200]], np.uint8)])
    assert distances.item() == pytest.approx(5) and found.item() == 1


@pytest.mark.parametrize("count, total", [(0, 50), (28, 200), (150, 150), (1, 3)])
def test_interval_of_the_copies(count, total):
    """Wilson's ends are the fractions p from which count / total is 1.96 standard deviations."""
    distances = torch.tensor([[1.0, 3.1]] * count + [[1.0, 3.0]] * (total - count))
    fraction, low, high = copied_fraction(distances)
    assert fraction == count / total and 0 <= low <= fraction <= high <= 1
    for p in {low, high} - {0.0, 1.0}:
        assert abs(fraction - p) == pytest.approx(1.959964 * math.sqrt(p * (1 - p) / total), rel=1e-4)
    assert (low == 0) == (count == 0) and (high == 1) == (count == total)


@pytest.mark.parametrize("by_held_out", [False, True])
def test_copies_are_counted_by_the_gap_ratio(by_held_out, tmp_path, monkeypatch, capsys):
    """Independently in numpy. Duplicates in the reference, one for each copy, hide none."""
    draw = np.random.default_rng(0)
    reference, others = draw.integers(0, 256, (2, 30, 8, 8, 1), dtype=np.uint8)
    # From a copy to a mixture of two: the ratio passes a third on the way.
    mixed = [(1 - i / 24) * reference[i] + i / 24 * reference[i + 1] for i in range(12)]
    reference[29], others[:4] = np.clip(reference[28] + 1.0, 0, 255), reference[4:8]  # a pair of its own, and copies
    sets = {"samples": np.stack(mixed).round(), "reference": reference[[*range(30), *range(12)]], "held_out": others}
    sets = {name: save_npz(tmp_path / f"{name}.npz", pixels.astype(np.uint8)) for name, pixels in sets.items()}
    options = [f"--{name}={path}" for name, path in sets.items() if by_held_out or name != "held_out"]
    found = run(monkeypatch, tmp_path, *options, "--distances", "False")["nearest"]

    def share(name, skipped=0):
        flat = {name: np.load(path)["arr_0"].reshape(-1, 64).astype(float) for name, path in sets.items()}
        queries, bank = np.unique(flat[name], axis=0), np.unique(flat["reference"], axis=0)
        near = np.sort(np.linalg.norm(queries[:, None] - bank, axis=2))[:, skipped:]
        return (near[:, 0] / near[:, 1] < 1 / 3).mean()

    chance = share("held_out") if by_held_out else share("reference", skipped=1)
    assert (found["copies"], found["other_copies"], found["num_different"]) == (share("samples"), chance, 30)
    assert 0.2 < found["copies"] < 0.8 and 0 < chance < 0.2
    said = f"{found['copies']:7.1%} ({found['copies_low']:.1%} to {found['copies_high']:.1%})"
    assert said in capsys.readouterr().out


def test_too_few_different_references_for_a_second_nearest(tmp_path, monkeypatch):
    same = save_npz(tmp_path / "same.npz", np.repeat(shapes(2, size=8)[0], 5, axis=0))
    monkeypatch.setattr(evaluate, "collect", lambda *_: pytest.fail("worked before it looked"))
    with pytest.raises(UserError, match="2 different images.*--nearest False"):
        run(monkeypatch, tmp_path, "--samples", same, "--reference", same, "--distances", "False")


# The classifier


def test_feature_net_learns_and_repeats(net, tmp_path):
    assert net.accuracy > 0.9 and not net.training
    again = train_on_shapes(200, 40, epochs=1, seed=4)
    torch.manual_seed(99)
    global_state = torch.random.get_rng_state()
    same = train_on_shapes(200, 40, epochs=1, seed=4)
    assert torch.equal(global_state, torch.random.get_rng_state())
    other = train_on_shapes(200, 40, epochs=1, seed=5)
    assert weights_digest(again.state_dict()) == weights_digest(same.state_dict()) != weights_digest(other.state_dict())
    save_feature_net(tmp_path / "net.pth", net)
    loaded = load_feature_net(tmp_path / "net.pth")
    assert weights_digest(loaded.state_dict()) == weights_digest(net.state_dict()) and loaded.accuracy == net.accuracy
    pictures = shapes(5)[0]
    assert torch.equal(features(loaded, pictures), features(net, pictures))
    assert features(net, pictures).shape == (5, net.num_features)


def test_feature_net_refuses(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="no such"):
        load_feature_net(tmp_path / "none.pth")
    torch.save({"weights": {}}, tmp_path / "other.pth")
    (tmp_path / "text.pth").write_text("text")
    save_feature_net(tmp_path / "large.pth", FeatureNet(1, 4))
    large = torch.load(tmp_path / "large.pth", weights_only=True)
    torch.save({**large, "num_classes": 2**40}, tmp_path / "large.pth")
    monkeypatch.setattr(FeatureNet, "__init__", lambda *_: pytest.fail("a network of that size was built"))
    for name in ("other.pth", "text.pth", "large.pth"):
        with pytest.raises(ValueError, match="feature net"):
            load_feature_net(tmp_path / name)


# Sets of pictures


@pytest.fixture
def folder(tmp_path):
    """40 shapes as PNG files in class folders, kind_0 to kind_3."""
    pictures, labels = shapes(40, size=8)
    for number, (picture, label) in enumerate(zip(pictures, labels)):
        save_png(tmp_path / "pictures" / f"kind_{label}" / f"{number:03d}.png", picture)
    return tmp_path / "pictures"


def save_npz(path, pictures):
    np.savez_compressed(path, arr_0=pictures)
    return path


@pytest.mark.skipif(os.name == "nt", reason="names of POSIX")
def test_a_folder_may_have_names_that_no_list_can_hold(tmp_path):
    (tmp_path / "a\nset").mkdir()
    Image.new("L", (8, 8), 7).save(tmp_path / "a\nset" / "one\ntwo.png")
    pictures = open_images(tmp_path / "a\nset", GRAY, cache_path=tmp_path / "cache")
    assert (next(pictures.blocks()) == 7).all() and pictures.name == str(tmp_path.resolve() / r"a\nset")


def test_folder_list_and_npz_are_the_same_pictures(folder, tmp_path):
    from utils.data.annotation import write_annotation
    from utils.data.search import find_images

    pictures = open_images(folder, GRAY, cache_path=tmp_path / "cache")
    write_annotation(tmp_path / "list.txt", find_images(folder))
    listed = open_images(tmp_path / "list.txt", GRAY, cache_path=tmp_path / "cache")
    packed = open_images(save_npz(tmp_path / "p.npz", pictures.pixels), GRAY)
    assert pictures.classes == [f"kind_{kind}" for kind in range(KINDS)] and listed.classes == packed.classes == []
    expected = shapes(40, size=8)[0][np.argsort(np.arange(40) % KINDS, kind="stable")]
    for source, name in ((folder, pictures), (tmp_path / "list.txt", listed), (tmp_path / "p.npz", packed)):
        assert scan_sizes(source) == ({(8, 8): 40}, False)
        assert_close(torch.cat(list(name.blocks())), torch.from_numpy(expected))
    assert len({pictures.key(), listed.key(), packed.key()}) == 3
    assert pictures.key() == open_images(folder, GRAY, cache_path=tmp_path / "cache").key()

    part = pictures.subset([30, 3, 7]).subset([2, 0], ", two")
    assert part.name.endswith(", two") and [part.paths[0], part.paths[1]] == [pictures.paths[7], pictures.paths[30]]
    assert_close(next(part.blocks()), pictures.images([7, 30]))
    assert part.labels.tolist() == [pictures.labels[7], pictures.labels[30]]
    order = pictures.shuffled(20, seed=1)
    assert len(set(order)) == 20 and len({pictures.labels[number].item() for number in order}) > 1
    assert order.tolist() == pictures.shuffled(20, seed=1).tolist() != pictures.shuffled(20, seed=2).tolist()


def test_wrong_sets_are_named(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.npz").write_text("text")
    np.savez(tmp_path / "floats.npz", arr_0=np.zeros((2, 4, 4, 3)))
    np.savez(tmp_path / "nothing.npz", arr_0=np.zeros((0, 4, 4, 3), np.uint8))
    np.savez(tmp_path / "statistics.npz", mu=np.zeros(4), sigma=np.eye(4))
    np.savez(tmp_path / "name.npz", other=np.zeros((2, 4, 4, 3), np.uint8))
    for name, message in (
        ("empty", "no images"),
        ("text.npz", "no .npz"),
        ("floats.npz", "float64"),
        ("nothing.npz", r"uint8 \(0, 4, 4, 3\)"),
        ("name.npz", "arr_0"),
        ("statistics.npz", "the statistics of features: name the images themselves"),
        ("none.npz", "No such"),
        ("none.txt", "not there"),
    ):
        with pytest.raises((ValueError, OSError), match=message):
            scan_sizes(tmp_path / name)
    good = save_npz(tmp_path / "good.npz", np.zeros((2, 4, 4, 3), np.uint8))
    with pytest.raises(ValueError, match="as they are"):
        open_images(good, ImageFormat((8, 8)))


def test_an_npz_in_columns_first_order_is_read(tmp_path):
    pictures = shapes(20, size=8)[0]
    rows, columns = (
        save_npz(tmp_path / "rows.npz", pictures),
        save_npz(tmp_path / "columns.npz", np.asfortranarray(pictures)),
    )
    assert scan_sizes(columns) == ({(8, 8): 20}, False)
    first, second = (open_images(path, GRAY) for path in (rows, columns))
    assert_close(torch.cat(list(second.blocks())), torch.from_numpy(pictures))
    assert first.hashes == second.hashes


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_damaged_npz_is_named(tmp_path, save):
    pictures = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 3), dtype=np.uint8)
    save(tmp_path / "p.npz", arr_0=pictures)
    content = bytearray((tmp_path / "p.npz").read_bytes())
    content[2000:2010] = bytes(10)
    (tmp_path / "p.npz").write_bytes(content)
    with pytest.raises(ValueError, match="p.npz: no .npz with images as arr_0"):
        open_images(tmp_path / "p.npz", ImageFormat((8, 8)))


def test_an_npz_whose_array_is_cut_off_is_named(tmp_path):
    np.save(tmp_path / "arr_0.npy", np.zeros((20, 8, 8, 3), np.uint8))
    with zipfile.ZipFile(tmp_path / "p.npz", "w") as archive:
        archive.writestr("arr_0.npy", (tmp_path / "arr_0.npy").read_bytes()[:-1])
    with pytest.raises(ValueError, match="p.npz: no .npz with images as arr_0"):
        open_images(tmp_path / "p.npz", ImageFormat((8, 8)))


def test_an_npz_that_unpacks_to_far_more_than_its_size_is_refused(tmp_path, monkeypatch):
    """Nothing is unpacked; the same images without compression are read."""
    monkeypatch.setattr(image_sets, "ALWAYS_ALLOWED", 2**16)
    black = np.zeros((40, 64, 64, 1), np.uint8)
    with monkeypatch.context() as patch:
        patch.setattr(zipfile.ZipFile, "extract", lambda *_: pytest.fail("unpacked"))
        for read in (scan_sizes, lambda path: open_images(path, ImageFormat((64, 64), 1))):
            with pytest.raises(ValueError, match="p.npz: .* more than 20 to 1: save it without compression") as error:
                read(save_npz(tmp_path / "p.npz", black))
            assert "\n" not in str(error.value)
    np.savez(tmp_path / "plain.npz", arr_0=black)
    assert scan_sizes(tmp_path / "plain.npz") == ({(64, 64): 40}, False)


@pytest.mark.parametrize("name", ["a.pth", "a.pt", "a.ckpt", "a.bin", "a.safetensors", "a.pth.tar", "A.CKPT", ""])
def test_names_of_checkpoints(name):
    assert evaluate.is_checkpoint(name)
    assert not evaluate.is_checkpoint(name + "x.txt")


def test_collect_keeps_the_first_only(net):
    pictures = torch.from_numpy(shapes(50)[0])
    found = collect(pictures.split(20), Extractor(net, "net", "cpu"), max_features=30, max_images=25)
    assert found.statistics.count == 50
    assert_close(found.features, features(net, pictures)[:30])
    assert torch.equal(found.images, pictures[:25])
    blocks = iter(pictures.split(20))
    assert torch.equal(collect(blocks, max_images=25).images, pictures[:25])
    assert len(list(blocks)) == 1  # no more is drawn than is looked at


def test_reference_statistics_are_kept_by_data_and_network(net, tmp_path, monkeypatch):
    pictures = open_images(save_npz(tmp_path / "p.npz", shapes(50)[0]), ImageFormat((12, 12), 1))
    others = open_images(save_npz(tmp_path / "q.npz", shapes(50, seed=1)[0]), ImageFormat((12, 12), 1))
    cache, extractor, calls = FeatureCache(tmp_path / "cache"), Extractor(net, "net", "cpu"), []
    monkeypatch.setattr(FeatureNet, "__call__", lambda self, x: calls.append(len(x)) or self.forward(x))

    def counted(*arguments):
        calls.clear()
        return cache.collected(*arguments), sum(calls)

    first, count = counted(pictures, extractor, 20)
    assert count == 50 and len(first.features) == 20
    again, count = counted(pictures, extractor, 20)
    assert count == 0
    assert torch.equal(again.features, first.features) and frechet_distance(again.statistics, first.statistics) < 1e-9
    assert counted(others, extractor, 20)[1] == 50
    assert counted(pictures, extractor, 30)[1] == 50
    random_net = Extractor(FeatureNet(1, KINDS).eval(), "other", "cpu")
    assert counted(pictures, random_net, 20)[1] == 50
    next(iter((tmp_path / "cache").glob("*.features.pth"))).write_bytes(b"damaged")
    assert sorted(
        counted(p, e, n)[1]
        for p, e, n in (
            (pictures, extractor, 20),
            (others, extractor, 20),
            (pictures, extractor, 30),
            (pictures, random_net, 20),
        )
    ) == [0, 0, 0, 50]


# The command


def run(monkeypatch, tmp_path, *arguments):
    """The JSON that the command writes."""
    common = [
        "--save_dir",
        str(tmp_path / "out"),
        "--cache_dir",
        str(tmp_path / "cache"),
        "--device",
        "cpu",
        "--precision",
        "fp32",
    ]
    monkeypatch.setattr(sys, "argv", ["evaluate", *map(str, arguments), *common])
    evaluate.main()
    return json.loads((tmp_path / "out" / "evaluate_results.json").read_text())


@pytest.fixture
def net_file(net, tmp_path):
    save_feature_net(tmp_path / "net.pth", net)
    return tmp_path / "net.pth"


def test_a_set_against_itself_and_a_copy_of_it(folder, net_file, tmp_path, monkeypatch, capsys):
    """The distance is 0, precision and recall are 1, and every sample is found to be a copy, of
    the right file.
    """
    samples = save_npz(tmp_path / "samples.npz", open_images(folder, GRAY, cache_path=tmp_path / "cache").pixels)
    found = run(monkeypatch, tmp_path, "--samples", samples, "--reference", folder, "--features", net_file)
    assert found["distances"]["frechet_distance"] < 1e-3
    assert (found["distances"]["precision"], found["distances"]["recall"]) == (1, 1)
    assert found["nearest"]["quantiles"] and max(found["nearest"]["samples"]) < 1e-3
    assert min(found["nearest"]["reference, to its others"]) > 1
    assert found["nearest"]["copies"] == found["nearest"]["copies_high"] == 1 > found["nearest"]["other_copies_high"]
    order = np.random.default_rng(0).permutation(40)
    paths = sorted(folder.rglob("*.png"))
    assert all(pair["reference"] == str(paths[order[pair["sample"]]]) for pair in found["nearest"]["pairs"])
    printed = capsys.readouterr().out
    assert "warning: FID is biased upward below 10,000 samples" in printed
    assert "   (one subset; 40 against 40)" in printed and "+-" not in printed  # its deviation says nothing
    picture = np.asarray(Image.open(tmp_path / "out" / "evaluate_nearest_results.png"))
    for row, column in ((0, 0), (3, 4)):  # a pair is 8 x 16 pixels, with 4 around it
        pair = picture[4 + 12 * row :, 4 + 20 * column :]
        assert np.array_equal(pair[:8, :8], pair[:8, 8:16]) and pair[:8, :8].std() > 5
    for name in ("evaluate_results.json", "evaluate_nearest_results.png"):
        assert str(tmp_path / "out" / name) in printed


def colour_folder(path, count, sizes=(8,), seed=0):
    """`count` colour pictures, of these sizes in turn."""
    for number in range(count):
        size = sizes[number % len(sizes)]
        pixels = np.random.default_rng(seed + number).integers(0, 256, (size, size, 3), dtype=np.uint8)
        save_png(path / f"{number:03d}.png", pixels)
    return path


def test_one_grey_sample_does_not_make_all_of_them_grey(tmp_path, monkeypatch, capsys):
    """Nor does a grey set, where the reference has colour: grey copies of it are no copies."""
    reference = colour_folder(tmp_path / "reference", 12)
    samples = colour_folder(tmp_path / "samples", 6, seed=100)
    Image.open(samples / "000.png").convert("L").save(samples / "000.png")
    only = ("--reference", reference, "--distances", "False")
    found = run(monkeypatch, tmp_path, "--samples", samples, *only)
    assert found["compared_at"] == [8, 8, 3] and "compared at             8x8 (height x width), color" in (
        capsys.readouterr().out
    )
    grey = tmp_path / "grey"
    for path in reference.glob("*.png"):
        save_png(grey / path.name, np.asarray(Image.open(path).convert("L"))[..., None])
    pixels = np.stack([np.asarray(Image.open(path))[..., None] for path in sorted(grey.glob("*.png"))])
    for source in (grey, save_npz(tmp_path / "grey.npz", pixels)):
        found = run(monkeypatch, tmp_path, "--samples", source, *only)
        assert found["compared_at"] == [8, 8, 3] and min(found["nearest"]["samples"]) > 20
    found = run(monkeypatch, tmp_path, "--samples", grey, "--reference", grey, "--distances", "False")
    assert found["compared_at"] == [8, 8, 1] and max(found["nearest"]["samples"]) < 1e-3


def test_the_most_frequent_size_is_the_one_to_compare_at(tmp_path, monkeypatch, capsys):
    samples = colour_folder(tmp_path / "samples", 7, sizes=(1, 8, 8, 8))
    save_png(samples / "zzz.png", np.zeros((40, 40, 3), np.uint8))
    options = ("--samples", samples, "--reference", colour_folder(tmp_path / "reference", 12), "--distances", "False")
    found = run(monkeypatch, tmp_path, *options)
    assert found["compared_at"] == [8, 8, 3] and found["sample_sizes"] == {"8x8": 5, "1x1": 2, "40x40": 1}
    said = capsys.readouterr().out
    assert "warning: 3 sizes of samples, {'8x8': 5, '1x1': 2, '40x40': 1}: all are made 8x8" in said
    assert run(monkeypatch, tmp_path, *options, "--input_shape", "4,6")["compared_at"] == [4, 6, 3]


def test_too_few_pictures_are_refused_before_any_work(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "load_extractor", lambda *_: pytest.fail("worked before it looked"))
    few = save_npz(tmp_path / "few.npz", shapes(4, size=8)[0])
    for options in (("--samples", few, "--reference", folder), ("--samples", folder, "--reference", few)):
        with pytest.raises(ValueError, match="too few for .* 5 of each: .*4 (samples|reference images)"):
            run(monkeypatch, tmp_path, *options, "--features", "classifier")


def test_only_the_projects_own_files_are_deleted(folder, net_file, tmp_path, monkeypatch):
    """Old files of others stay, in the cache and beside the results; what kills left goes."""
    foreign = {"mine.json", "mine.pixels", "mine.features.pth", f"{'a' * 24}.pth", ".mine.json.01234567.tmp"}
    left = {f".{'a' * 24}.features.pth.01234567.tmp", f".{'a' * 24}.pixels.01234567.tmp"}
    results = {".evaluate_results.json.01234567.tmp", ".evaluate_nearest_results.png.01234567.tmp"}
    for place, names in (("cache", foreign | left), ("out", foreign | results)):
        (tmp_path / place).mkdir()
        for name in names:
            (tmp_path / place / name).write_text("{}")
            os.utime(tmp_path / place / name, (1e9, 1e9))
    monkeypatch.setattr(features_module, "KEPT_FILES", 1)
    for reference in (folder, folder / "kind_0", folder):
        run(monkeypatch, tmp_path, "--samples", folder, "--reference", reference, "--features", net_file)
    names = set(os.listdir(tmp_path / "cache"))
    own = {re.sub("[0-9a-f]{24}", "KEY", name) for name in names - foreign}
    assert foreign <= names and own == {"KEY.features.pth", "KEY.json", "KEY.pixels"}
    assert sum(name.endswith(".features.pth") for name in names - foreign) == 2  # the newest, and the one in use
    assert set(os.listdir(tmp_path / "out")) - foreign == {
        ".lock",
        "evaluate_results.json",
        "evaluate_nearest_results.png",
    }


def test_results_that_cannot_be_written_are_said_before_the_work(folder, tmp_path, monkeypatch):
    """A link of that name is replaced, a link that was typed is followed."""
    monkeypatch.setattr(evaluate, "evaluate", lambda _: {"done": True})
    out = tmp_path / "out"
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "mine").write_text("mine")
    out.symlink_to("elsewhere")
    (out / "evaluate_results.json").symlink_to(tmp_path / "mine")
    assert run(monkeypatch, tmp_path, "--samples", folder) == {"done": True}
    assert out.is_symlink() and (tmp_path / "mine").read_text() == "mine"
    with locked(out, "busy"), pytest.raises(UserError, match="another process writes to .*elsewhere: wait"):
        run(monkeypatch, tmp_path, "--samples", folder)
    (out / "evaluate_nearest_results.png").mkdir()
    with pytest.raises(UserError, match="evaluate_nearest_results.png is no file: move it away"):
        run(monkeypatch, tmp_path, "--samples", folder)
    out.unlink()
    out.write_text("a file")
    with pytest.raises(UserError, match="out cannot be written to .*: choose another --save_dir"):
        run(monkeypatch, tmp_path, "--samples", folder)


def test_all_results_go_to_the_folder_that_was_locked(folder, tmp_path, monkeypatch):
    """Also where the link that was typed leads elsewhere meanwhile."""
    monkeypatch.setattr(evaluate, "collect", lambda *arguments: relink() or collect(*arguments))
    out, other = tmp_path / "out", tmp_path / "other"
    for place in (tmp_path / "first", other):
        place.mkdir()
    out.symlink_to("first")

    def relink():
        out.unlink()
        out.symlink_to("other")

    with pytest.raises(FileNotFoundError):  # the JSON is where it was announced
        run(monkeypatch, tmp_path, "--samples", folder, "--reference", folder, "--distances", "False")
    names = {"evaluate_results.json", "evaluate_nearest_results.png"}
    assert names <= set(os.listdir(tmp_path / "first")) and not os.listdir(other)


def test_seeds_beyond_the_last_are_refused(folder, tmp_path, monkeypatch):
    for options in (("--seed", 2**32), ("--seed", 2**32 - 5, "--num_images", 6)):
        with pytest.raises(ValueError, match="seed"):
            run(monkeypatch, tmp_path, "--samples", folder, "--reference", folder, *options)


def test_nearest_beside_held_out_pictures(folder, net_file, tmp_path, monkeypatch, capsys):
    """By features too; held-out pictures that are copies are warned about."""
    held_out = save_npz(tmp_path / "held_out.npz", shapes(12, size=8, seed=9)[0])
    samples = save_npz(tmp_path / "samples.npz", shapes(10, size=8, seed=8)[0])
    common = ("--samples", samples, "--reference", folder, "--distances", "False")
    found = run(
        monkeypatch, tmp_path, *common, "--held_out", held_out, "--nearest_by", "features", "--features", net_file
    )
    assert "distances" not in found and found["nearest"]["num_others"] == 12 and found["nearest"]["num_samples"] == 10
    assert found["nearest"]["samples"][2] > 0 and found["nearest"]["held-out"][2] > 0
    assert "warning" not in capsys.readouterr().out
    by_pixels = run(monkeypatch, tmp_path, *common, "--held_out", folder)
    assert max(by_pixels["nearest"]["held-out"]) < 1e-3
    assert "the reference has 40 held-out images too" in capsys.readouterr().out
    bank = torch.from_numpy(shapes(40, size=8)[0]).double()  # one picture by hand, in root mean square levels
    apart = (
        (torch.from_numpy(shapes(10, size=8, seed=8)[0]).double()[:, None] - bank)
        .square()
        .mean((2, 3, 4))
        .sqrt()
        .min(1)
        .values
    )
    assert_close(torch.quantile(apart, 0.5).item(), by_pixels["nearest"]["samples"][3], rtol=1e-6, atol=1e-6)


@pytest.fixture
def checkpoint(folder, tmp_path):
    """An untrained model of the folder's classes, which kept a fifth of them aside."""
    shutil.copytree(folder, tmp_path / "more" / "pictures")
    config = {
        "input_shape": (8, 8),
        "img_channels": 1,
        "channel": 32,
        "channel_mults": (1,),
        "num_res_blocks": 1,
        "attention_resolutions": (),
        "class_conditional": True,
        "label_dropout": 0.1,
        "num_groups": 8,  # groups of one channel would normalize the class away
        "schedule": "cosine",
        "num_timesteps": 6,
        "val_split": 0.2,
        "annotation_path": str(folder),
    }
    torch.manual_seed(0)
    diffusion = build.from_config(config, KINDS)
    path = tmp_path / "run" / "last.pth"
    save_tensors(
        path,
        {
            "config": config,
            "classes": [f"kind_{kind}" for kind in range(KINDS)],
            "weights": diffusion.state_dict(),
            "weights_kind": "full",
        },
    )
    return path


def test_a_checkpoint_is_drawn_from_and_its_bits_are_measured(
    checkpoint, folder, net_file, tmp_path, monkeypatch, capsys
):
    """The reference is what was trained on, the held-out pictures the rest.

    A sample depends on its seed, not on the batch.
    """
    common = (
        "--reference",
        folder,
        "--features",
        net_file,
        "--num_images",
        12,
        "--steps",
        3,
        "--bits",
        "True",
        "--guidance_scale",
        2,
    )
    found = run(monkeypatch, tmp_path, "--samples", checkpoint.parent, "--batch_size", 8, *common)
    deviation = f"{1000 * found['distances']['kernel_distance_std']:.3f}"
    printed = capsys.readouterr().out
    assert f"(random subsets of 12 have standard deviation {deviation}; 12 against" in printed
    assert "(decoder variance: beta_0)" in printed
    aside = found["bits"]["num_images"]
    assert 0 < aside < 40 and found["num_reference"] == 40 - aside and found["num_samples"] == 12
    assert len(found["bits"]["terms"]) == 7
    assert sum(found["bits"]["terms"]) == pytest.approx(found["bits"]["bits_per_dimension"])
    bits = found["bits"]
    assert bits["L_0"] + bits["L_between"] + bits["L_T"] == pytest.approx(sum(bits["terms"]))
    again = run(monkeypatch, tmp_path, "--samples", checkpoint, "--batch_size", 12, *common)
    assert again["distances"]["frechet_distance"] == pytest.approx(found["distances"]["frechet_distance"], rel=1e-3)
    assert again["weights"] == found["weights"]


def test_in_predicts_own_folder_each_sample_counts_once(checkpoint, folder, tmp_path, monkeypatch):
    """Not its grid, strip and animation, nor the pairs of an earlier evaluation."""
    out = ("--device", "cpu", "--save_dir", str(tmp_path / "out"))  # where the results go too
    more = ("--individual_files", "True", "--trajectory", "True", "--steps", "2")
    predict.main(["--model_path", str(checkpoint), "--num_images", "6", *more, *out])
    predict.main(["--model_path", str(checkpoint), "--interpolate", "3", "--class_name", "kind_1", *more, *out])
    common = ("--samples", tmp_path / "out", "--reference", folder, "--distances", "False")
    for _ in range(2):
        found = run(monkeypatch, tmp_path, *common)
        assert (found["num_samples"], found["sample_sizes"]) == (9, {"8x8": 9})
    names = {path.name for path in (tmp_path / "out").glob("*_results.*")}
    assert len(names) == 7  # 1x1, 5x5, interpolation, two of the trajectory, two of the evaluation
    for path in (tmp_path / "out").glob("*[0-9].png"):
        path.unlink()
    with pytest.raises(UserError, match="holds no images .grids and animations of predict.py are none"):
        run(monkeypatch, tmp_path, *common)


def test_guidance_reaches_the_samples(checkpoint, folder, net_file, tmp_path, monkeypatch, capsys):
    """An interval, a weaker model, and both: each gives other samples, and the table says which."""
    generator = torch.Generator().manual_seed(0)
    for name in ("model.pth", "weak.pth"):  # an untrained network has zeros where it ends
        other = read_file(checkpoint)
        for value in (value for key, value in other["weights"].items() if "model." in key):
            value += 0.1 * torch.randn(value.shape, generator=generator)
        save_tensors(tmp_path / name, other)
    common = (
        "--samples",
        tmp_path / "model.pth",
        "--reference",
        folder,
        "--features",
        net_file,
        "--num_images",
        12,
        "--steps",
        3,
        "--nearest",
        "False",
    )
    interval, guide = ("--guidance_interval", "-1,2"), ("--guiding_path", tmp_path / "weak.pth")
    distances = {}
    for options in ((), interval, guide, interval + guide):
        found = run(monkeypatch, tmp_path, *common, "--guidance_scale", 5, *options)
        distances[options] = found["distances"]["frechet_distance"]
        assert (found["guiding_weights"] is not None) == (guide[1] in options)
        assert found["guiding_weights"] != found["weights"]
        assert ("guidance 5 for lambda from -1 to 2" in found["samples"]) == ("-1,2" in options)
        assert (f" by {guide[1]}," in found["samples"]) == (guide[1] in options)
    assert len(set(distances.values())) == 4
    for options, words in (
        (interval, "does nothing with a guidance_scale of 1"),
        (guide, "does nothing with a"),
        (("--guidance_scale", 2, "--guiding_path", tmp_path / "gone.pth"), "gone.pth"),
        (("--guidance_scale", 2, "--guidance_interval", "50,60"), "no step is in the"),
        (("--samples", folder, "--guidance_scale", 2), "--guidance_scale need a checkpoint"),
    ):
        with pytest.raises((SystemExit, ValueError, OSError)) as error:
            run(monkeypatch, tmp_path, *common, *options)
        assert words in capsys.readouterr().err + str(error.value)


def test_labels_follow_the_reference(checkpoint, folder, tmp_path):
    config = evaluate.Config(samples=str(checkpoint), reference=str(folder), cache_dir=str(tmp_path / "cache"))
    model = evaluate.load_model(config, torch.device("cpu"), "fp32")
    reference, _ = evaluate.open_references(config, model, evaluate.make_opener(config, model)[0])
    reference = reference.subset(np.flatnonzero(reference.labels.numpy() < 2))
    labels = evaluate.labels_like(reference, model, seed=0)
    assert torch.equal(torch.bincount(labels), torch.bincount(reference.labels))
    other_names = model._replace(classes=["a", "b", "c", "d"])
    assert evaluate.labels_like(reference, other_names, seed=0).tolist() == [0, 1, 2, 3]
    assert evaluate.labels_like(reference, model._replace(classes=[]), seed=0) is None


def test_what_does_not_fit_is_said_in_one_line(checkpoint, folder, net_file, tmp_path, monkeypatch):
    packed, one = (save_npz(tmp_path / f"{count}.npz", shapes(count, size=8)[0]) for count in (10, 1))
    for arguments, message in (
        (("--samples", packed, "--bits", "True"), "need a checkpoint"),
        (("--samples", checkpoint, "--reference", tmp_path / "more", "--bits", "True"), "--held_out"),
        (("--samples", packed, "--input_shape", "16,16", "--reference", packed), "as they are"),
        (("--samples", packed, "--reference", packed, "--features", "classifier"), "2 class folders"),
        (
            ("--samples", folder, "--reference", folder, "--features", "classifier"),
            "100 images, not 4 classes and 40 different",
        ),
        (("--samples", folder, "--img_channels", 3, "--reference", folder, "--features", net_file), "1 channel does"),
        (("--samples", one, "--reference", packed), "need 5 of each: 1 sample, 10 reference images$"),
        (("--samples", packed, "--reference", one), "need 5 of each: 10 samples, 1 reference image$"),
        (("--samples", packed, "--sampler", "magic"), "ddim"),
        (("--samples", packed, "--eta", "0.5"), "--eta is an option of ddim"),
        (("--samples", checkpoint, "--sampler", "ddpm", "--eta", "0.5"), "--eta is an option of ddim"),
        (("--samples", checkpoint, "--img_channels", 3), "the model has images of 1"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            run(monkeypatch, tmp_path, *arguments)
        assert "\n" not in str(error.value)


# Inception


def test_without_the_packages(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(ValueError, match="pip install torch-fidelity") as error:
        load_inception()
    assert "\n" not in str(error.value)


def test_a_broken_package_is_one_line(monkeypatch, tmp_path):
    (tmp_path / "torch_fidelity.py").write_text("raise TypeError('built for another numpy\\n at line 3')")
    monkeypatch.delitem(sys.modules, "torch_fidelity", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=r"features \(TypeError: built for another numpy at line 3\)") as error:
        load_inception()
    assert "\n" not in str(error.value)


def test_weights_that_cannot_be_downloaded(monkeypatch, tmp_path):
    extractor = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3", reason="pip install torch-fidelity")

    def offline(*_, **__):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(extractor, "load_state_dict_from_url", offline)
    with pytest.raises(ValueError, match="no Inception features .URLError: .*no network.*--inception_weights") as error:
        load_inception()
    assert "\n" not in str(error.value)
    (tmp_path / "weights.pth").write_text("text")
    (tmp_path / "page.pth").write_text("<!DOCTYPE html>")
    messages = {
        "none.pth": "none.pth: there is no such PyTorch checkpoint",
        "weights.pth": "weights.pth: damaged, or no PyTorch checkpoint",
        "page.pth": "page.pth: a text file, a web page instead of the weights",
    }
    for name, message in messages.items():
        with pytest.raises(UserError, match=message) as error:
            load_inception(str(tmp_path / name))
        assert "\n" not in str(error.value)


def test_inception_from_a_file_of_weights(monkeypatch, tmp_path):
    """Random weights in the real network: grey pictures become colour. The features are, bit for
    bit, those of torchmetrics without antialiasing, which is the resize of the paper's graph.
    """
    extractor = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3", reason="pip install torch-fidelity")
    kind = extractor.FeatureExtractorInceptionV3
    with monkeypatch.context() as patch:
        patch.setattr(extractor, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(kind, "load_state_dict", lambda *_, **__: None)
        torch.manual_seed(0)
        torch.save(load_inception().state_dict(), tmp_path / "weights.pth")
    network = load_inception(str(tmp_path / "weights.pth"))
    grey = torch.from_numpy(shapes(3)[0])
    found = Extractor(network, "", "cpu", channels=3)(grey)
    assert found.shape == (3, 2048) and found.std(0).max() > 0
    fid = pytest.importorskip("torchmetrics.image.fid").FrechetInceptionDistance
    theirs = [fid(feature_extractor_weights_path=tmp_path / "weights.pth", antialias=on).inception for on in (0, 1)]
    plain, antialiased = (net(grey.permute(0, 3, 1, 2).repeat(1, 3, 1, 1)) for net in theirs)
    assert torch.equal(found, plain) and not torch.allclose(found, antialiased, rtol=1e-3, atol=0)
    keys = {Extractor(net, "", "cpu").key for net in (network, theirs[1])}
    assert len(keys) == 2  # of equal weights: the resize is part of what the cache is asked for
    again = load_inception(str(tmp_path / "weights.pth"))
    assert weights_digest(network.state_dict()) == weights_digest(again.state_dict())


class Attack:
    """Makes a folder where a pickle of it is loaded with trust."""

    def __reduce__(self):
        return os.mkdir, ("attacked",)


@pytest.mark.parametrize("kind", ["zip", "old", "pickle", "value"])
def test_no_code_of_an_inception_file_runs(monkeypatch, tmp_path, kind):
    """Neither of a file that is named, nor of what lies where the download is kept."""
    extractor = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3", reason="pip install torch-fidelity")
    monkeypatch.chdir(tmp_path)
    kept = tmp_path / "hub" / "checkpoints" / extractor.URL_INCEPTION_V3.rsplit("/", 1)[1]
    kept.parent.mkdir(parents=True)
    if kind == "pickle":
        kept.write_bytes(pickle.dumps(Attack()))
    else:
        torch.save(
            {"fc.weight": Attack()} if kind == "value" else Attack(), kept, _use_new_zipfile_serialization=kind != "old"
        )
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    with pytest.raises(ValueError, match="no Inception features .*could run code") as error:
        load_inception(str(kept))
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="no Inception features") as error:
        load_inception()
    assert "\n" not in str(error.value)
    assert not (tmp_path / "attacked").exists()


def test_a_download_of_other_content_is_not_kept(monkeypatch, tmp_path):
    """The digest in the name is compared by torch.hub, which fetches from a file here."""
    extractor = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3", reason="pip install torch-fidelity")
    served = tmp_path / extractor.URL_INCEPTION_V3.rsplit("/", 1)[1]
    torch.save({}, served)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(extractor, "URL_INCEPTION_V3", served.as_uri())
    with pytest.raises(ValueError, match="invalid hash value"):
        load_inception()
    assert list((tmp_path / "hub").rglob("*.pth")) == []


def test_inception_with_its_own_weights():
    """Set against itself, with noise, and as torchmetrics has it."""
    fid = pytest.importorskip("torchmetrics.image.fid")
    extractor = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3", reason="pip install torch-fidelity")
    name = extractor.URL_INCEPTION_V3.rsplit("/", 1)[1]
    kept = torch.hub.get_dir() + "/checkpoints/" + name
    try:
        network = load_inception(kept)
    except ValueError:
        pytest.skip(
            f"not run: the Inception weights are not in {kept} (python -m utils.evaluate downloads them, with "
            "a network)"
        )
    pictures = torch.from_numpy(shapes(24)[0])
    noisy = (pictures.double() + 60 * randn(*pictures.shape)).clamp(0, 255).byte()
    metric = fid.FrechetInceptionDistance(feature_extractor_weights_path=kept, antialias=False)
    for images, real in ((pictures, True), (noisy, False)):
        metric.update(images.permute(0, 3, 1, 2).repeat(1, 3, 1, 1), real=real)
    assert frechet(network, pictures, pictures) < 1e-3
    assert frechet(network, pictures, noisy) == pytest.approx(metric.compute().item(), rel=1e-3)
