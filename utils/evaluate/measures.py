"""The measures of `python -m utils.evaluate`, each printed and as a dict."""

import math
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from utils.data.dataset import conditioned
from utils.device import autocast
from utils.evaluate.distances import (
    SUBSET_SIZE,
    copied_fraction,
    frechet_distance,
    kernel_distance,
    nearest,
    precision_and_recall,
)
from utils.evaluate.features import with_progress
from utils.evaluate.likelihood import variational_bound
from utils.images import make_grid, save_png
from utils.terminal import plural, printable

NEIGHBORS = 3  # k of precision and recall, as in the paper
QUANTILES = torch.tensor((0.01, 0.05, 0.25, 0.5, 0.75), dtype=torch.float64)
PAIRS, COLUMNS = 20, 5  # of nearest images: so many of the closest, and so many spread over the rest


def print_line(name, text):
    print(f"{name:<24}{text}")


def measure_distances(config, sampled, known, extractor):
    """Frechet distance (FID), kernel distance (KID), precision and recall."""
    fid, kid = ("FID", "KID") if config.features == "inception" else ("Frechet distance", "kernel distance")
    frechet = frechet_distance(sampled.statistics, known.statistics)
    print_line(fid, f"{frechet:.4f}   ({sampled.statistics.count:,} against {known.statistics.count:,})")
    sizes = len(sampled.features), len(known.features)
    counts, size = "{:,} against {:,}".format(*sizes), min(SUBSET_SIZE, *sizes)
    kernel, spread = kernel_distance(sampled.features, known.features, seed=config.seed)
    remark = f"random subsets of {size:,} have standard deviation {1000 * spread:.3f}" if spread else "one subset"
    print_line(f"{kid} x 1000", f"{1000 * kernel:.3f}   ({remark}; {counts})")
    precision, recall = precision_and_recall(sampled.features, known.features, NEIGHBORS)
    print_line("precision, recall", f"{precision:.3f}, {recall:.3f}   (k = {NEIGHBORS}, {counts})")
    results = {"features": extractor.name, "features_digest": extractor.key, "kept_features": len(sampled.features)}
    results |= {"frechet_distance": frechet, "kernel_distance": kernel, "kernel_distance_std": spread}
    return results | {"precision": precision, "recall": recall, "k": NEIGHBORS}


def measure_nearest(config, images, reference, held_out, extractor):
    """Are samples (n, H, W, C) copies? Distances to the nearest reference images, and others'.

    reference: without duplicates.
    """
    extractor = extractor if config.nearest_by == "features" else None
    others, whose = (held_out, "held-out") if held_out else (reference, "reference, to its others")
    others = others.images(others.shuffled(config.nearest_images, config.seed))
    distances, found = nearest_images(images, reference, extractor)
    other_distances, _ = nearest_images(others, reference, extractor, skipped=0 if held_out else 1)  # itself
    space = "distance of features" if extractor else "RMS distance (0-255)"
    print_line("nearest neighbor", f"{space}; {len(reference):,} different reference images")
    heads = [*(f"{quantile:>7.0%}" for quantile in QUANTILES), " copies (95 % interval)"]
    print_line("  quantile", "  ".join(heads))
    results = {"by": config.nearest_by, "num_samples": len(images), "num_others": len(others)}
    results |= {"num_different": len(reference), "quantiles": QUANTILES.tolist()}
    for key, name, values in (("copies", "samples", distances), ("other_copies", whose, other_distances)):
        results[name] = values[:, 0].quantile(QUANTILES).tolist()
        fraction, low, high = copied_fraction(values)
        results |= {key: fraction, f"{key}_low": low, f"{key}_high": high}
        shown = [*(f"{value:7.3f}" for value in results[name]), f"{fraction:7.1%} ({low:.1%} to {high:.1%})"]
        print_line(f"  {name}", "  ".join(shown))
    print_line("  copies", "their nearest distance is below a third of that to the second nearest reference image")
    return results | {"pairs": save_pairs(config, images, reference, distances[:, 0], found[:, 0])}


def nearest_images(images, reference, extractor=None, skipped=0):
    """The two nearest reference images of images (n, H, W, C): (distances, numbers), (n, 2) each.

    skipped: so many that are nearer do not count.
    """
    describe = extractor or (lambda block: block.flatten(1))
    blocks = with_progress(reference.blocks(), len(reference), "nearest")
    distances, found = nearest(describe(images), map(describe, blocks), 2 + skipped)
    return distances[:, skipped:] / (1 if extractor else math.sqrt(images[0].numel())), found[:, skipped:]


def save_pairs(config, images, reference, distances, found):
    """Saves a grid of samples next to their nearest reference images. Returns the pairs."""
    order = distances.argsort().tolist()
    spread = np.linspace(PAIRS, len(order) - 1, min(PAIRS, max(len(order) - PAIRS, 0))).astype(int)
    shown = order[:PAIRS] + [order[i] for i in spread]
    path = Path(config.save_dir) / "evaluate_nearest_results.png"
    pairs = np.concatenate((images[shown].numpy(), reference.images(found[shown]).numpy()), axis=2)
    save_png(path, make_grid(pairs, COLUMNS, padding=4))
    print(f"{path}: sample, nearest image; the {min(PAIRS, len(order))} closest first, then farther ones")
    names = [printable(reference.paths[number]) for number in found[shown]]
    return [{"sample": i, "distance": distances[i].item(), "reference": name} for i, name in zip(shown, names)]


def measure_bits(config, model, held_out, device, precision):
    """Bits per dimension of held-out images, at most, term by term."""
    diffusion, order = model.diffusion, torch.from_numpy(held_out.shuffled(config.bits_images, config.seed))
    labels = held_out.labels if model.classes and held_out.classes == model.classes else None
    generator, terms = torch.Generator(device).manual_seed(config.seed), []
    for numbers in tqdm(order.split(config.batch_size), desc="bits", leave=False):
        y = None if labels is None else labels[numbers].to(device)
        with autocast(device, precision):
            x, cond = conditioned(diffusion, held_out, numbers)
            denoise = diffusion.denoiser(y, config.use_ema, cond=cond)
            terms.append(variational_bound(denoise, diffusion.alpha_bars, x, generator))
    terms = torch.cat(terms)
    total, curve = terms.sum(1), terms.mean(0)
    error = (total.std() / math.sqrt(len(total))).item()
    L_0, L_between, L_T = curve[0].item(), curve[1:-1].sum().item(), curve[-1].item()
    counts = f"at most; {plural(len(total), 'held-out image')}, T = {len(curve) - 1}"
    print_line("bits per dimension", f"{total.mean():.4f} +- {error:.4f} (standard error)   ({counts})")
    print_line("  L_0, L_1..T-1, L_T", f"{L_0:.4f}, {L_between:.4f}, {L_T:.6f}   (decoder variance: beta_0)")
    results = {"bits_per_dimension": total.mean().item(), "standard_error": error, "num_images": len(total)}
    return results | {"L_0": L_0, "L_between": L_between, "L_T": L_T, "terms": curve.tolist(), "precision": precision}
