"""The measures of `python -m utils.evaluate`, each printed and as a dict."""

import math
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from utils.data.dataset import normalize
from utils.device import autocast
from utils.errors import UserError
from utils.evaluate.distances import kernel_distance, nearest, precision_and_recall, statistics_distance
from utils.evaluate.features import with_progress
from utils.evaluate.likelihood import variational_bound
from utils.images import make_grid, save_png
from utils.terminal import printable

NEIGHBOURS = 3  # k of precision and recall, as in the paper
QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75)
PAIRS, COLUMNS = 20, 5  # of nearest images: so many of the closest, and so many spread over the rest


def print_line(name, text):
    print(f"{name:<24}{text}")


def measure_distances(config, sampled, known, extractor):
    """FID (Frechet distance), KID (kernel distance), precision and recall of two Collected."""
    frechet = statistics_distance(sampled.statistics, known.statistics)
    kernel, spread = kernel_distance(sampled.features, known.features, seed=config.seed)
    precision, recall = precision_and_recall(sampled.features, known.features, NEIGHBOURS)
    fid, kid = ("FID", "KID") if config.features == "inception" else ("Frechet distance", "kernel distance")
    counts = f"{len(sampled.features):,} against {len(known.features):,}"
    print_line(fid, f"{frechet:.4f}   ({sampled.statistics.count:,} against {known.statistics.count:,})")
    print_line(f"{kid} x 1000", f"{1000 * kernel:.3f} +- {1000 * spread:.3f}   ({counts})")
    print_line("precision, recall", f"{precision:.3f}, {recall:.3f}   (k = {NEIGHBOURS}, {counts})")
    return {
        "features": extractor.name,
        "features_digest": extractor.key,
        "frechet_distance": frechet,
        "kernel_distance": kernel,
        "kernel_distance_std": spread,
        "precision": precision,
        "recall": recall,
        "k": NEIGHBOURS,
        "kept_features": len(sampled.features),
    }


def measure_nearest(config, images, reference, held_out, extractor):
    """Distances of the samples (n, H, W, C) to the nearest reference images: are they copies?

    Beside them: those of the held-out images, or of the reference's to their nearest other.
    """
    extractor = extractor if config.nearest_by == "features" else None
    distances, found = nearest_images(images, reference, extractor)
    others, whose = (held_out, "held-out") if held_out else (reference, "reference, to its others")
    others = others.images(others.shuffled(config.nearest_images, config.seed))
    other_distances, _ = nearest_images(others, reference, extractor, 1 if held_out else 2)  # the nearest is itself
    quantiles = {
        name: torch.quantile(values, torch.tensor(QUANTILES).double()).tolist()
        for name, values in (("samples", distances), (whose, other_distances))
    }
    closer = (distances < quantiles[whose][0]).double().mean().item()
    title = f"nearest, in {'features' if extractor else 'levels'}"
    print_line(title, "  ".join(f"{quantile:>7.0%}" for quantile in QUANTILES))
    for name, values in quantiles.items():
        print_line(f"  {name}", "  ".join(f"{value:7.3f}" for value in values))
    print_line("  very close", f"{closer:.1%} of the samples are closer than the others' 1 % quantile (chance: 1 %)")
    return {
        "by": config.nearest_by,
        "quantiles": QUANTILES,
        **quantiles,
        "share_closer_than_first_quantile": closer,
        "pairs": save_pairs(config, images, reference, distances, found),
        "num_samples": len(distances),
        "num_others": len(others),
    }


def nearest_images(images, reference, extractor=None, k=1):
    """The k-th nearest reference images of images (n, H, W, C): (distances, numbers), (n,) each.

    Between features of the extractor. None: between pixels, the root mean square in levels of 0 to
    255, for any image size.
    """
    describe = extractor or (lambda block: block.flatten(1))
    blocks = with_progress(reference.blocks(), len(reference), "nearest")
    distances, found = nearest(describe(images), map(describe, blocks), k)
    return distances[:, -1] / (1 if extractor else math.sqrt(images[0].numel())), found[:, -1]


def save_pairs(config, images, reference, distances, found):
    """Save a grid of samples beside their nearest reference images. Returns the pairs as dicts."""
    order = distances.argsort().tolist()
    rest = order[PAIRS:]
    shown = order[:PAIRS] + [rest[i] for i in np.linspace(0, len(rest) - 1, min(PAIRS, len(rest))).astype(int)]
    path = Path(config.save_dir) / "evaluate_nearest_results.png"
    pairs = np.concatenate((images[shown].numpy(), reference.images(found[shown]).numpy()), axis=2)
    save_png(path, make_grid(pairs, COLUMNS, padding=4))
    print(f"{path.resolve()}: sample, nearest picture; the {min(PAIRS, len(order))} closest first, then farther ones")
    return [
        {"sample": i, "distance": distances[i].item(), "reference": printable(reference.paths[found[i]])} for i in shown
    ]


def measure_bits(config, model, held_out, device, precision):
    """Bits per dimension of held-out images, at most, term by term."""
    diffusion, order = model.diffusion, torch.from_numpy(held_out.shuffled(config.bits_images, config.seed))
    labels = held_out_labels(held_out, model)
    generator = torch.Generator(device).manual_seed(config.seed)
    terms = []
    for numbers in tqdm(order.split(config.batch_size), desc="bits", leave=False):
        y = None if labels is None else labels[numbers].to(device)
        with autocast(device, precision):
            denoise = diffusion.denoiser(y, config.use_ema)
            x = normalize(held_out.images(numbers), device)
            terms.append(variational_bound(denoise, diffusion.alpha_bars, x, generator))
    terms = torch.cat(terms)
    total, curve = terms.sum(1), terms.mean(0)
    error = (total.std() / math.sqrt(len(total))).item() if len(total) > 1 else None
    printed = "nan" if error is None else f"{error:.4f}"
    of = f"at most; {len(total):,} held-out pictures, T = {len(curve) - 1}"
    print_line("bits per dimension", f"{total.mean():.4f} +- {printed}   ({of})")
    print_line("  L_0, L_1..T-1, L_T", f"{curve[0]:.4f}, {curve[1:-1].sum():.4f}, {curve[-1]:.6f}")
    return {
        "bits_per_dimension": total.mean().item(),
        "standard_error": error,
        "num_images": len(total),
        "L_0": curve[0].item(),
        "L_between": curve[1:-1].sum().item(),
        "L_T": curve[-1].item(),
        "terms": curve.tolist(),
        "precision": precision,
    }


def held_out_labels(held_out, model):
    """The held-out images' class ids (N,); None: no classes, or the null class; else ValueError."""
    if model.classes and held_out.classes == model.classes:
        return held_out.labels
    if model.classes and model.diffusion.null_class is None:
        raise UserError(
            f"--bits: the model needs the classes {', '.join(model.classes[:5])} ..., and the held-out "
            "pictures are not sorted into folders of these names"
        )
    return None
