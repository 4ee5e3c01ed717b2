"""Frechet distance (FID), kernel distance (KID), precision, recall, copies, nearest neighbors."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 2**23  # numbers in a block of distances: 64 MiB
SUBSETS, SUBSET_SIZE = 100, 1000  # of the kernel distance, as in the paper's code
Z = 1.96  # standard deviations to either side that hold 95 % of a normal distribution


@dataclass(eq=False)
class FeatureStatistics:
    """Count, mean and covariance of features that come in batches (Chan et al. 1979, pairwise)."""

    count: int = 0
    mean: Tensor | float = 0.0  # (d,)
    scatter: Tensor | float = 0.0  # (d, d), the sum of (x - mean)(x - mean)^T

    def add(self, features):
        features = as_features(features)
        count, total = len(features), self.count + len(features)
        mean = features.mean(0)
        centered, shift = features - mean, mean - self.mean
        self.scatter += centered.T @ centered + torch.outer(shift, shift) * (self.count * count / total)
        self.mean += shift * (count / total)
        self.count = total
        return self


def as_features(features):
    """(n, d) of any type as float64 on the CPU: Apple GPUs have none."""
    return torch.as_tensor(features, dtype=torch.float64, device="cpu")


def frechet_distance(first, second):
    """FID: |m_1 - m_2|^2 + tr(C_1 + C_2 - 2 (C_1 C_2)^(1/2)) (Heusel et al. 2017, equation 6)."""
    # With C = L L^T the trace of the root is the sum of the singular values of L_1^T L_2.
    cov_1, cov_2 = (part.scatter / (part.count - 1) for part in (first, second))  # unbiased, as is usual for FID
    eigen = [torch.linalg.eigh((covariance + covariance.T) / 2) for covariance in (cov_1, cov_2)]
    root_1, root_2 = (vectors * values.clamp(min=0).sqrt() for values, vectors in eigen)  # L; rounding goes below 0
    overlap = torch.linalg.svdvals(root_1.T @ root_2).sum()
    distance = (first.mean - second.mean).square().sum() + cov_1.trace() + cov_2.trace() - 2 * overlap
    return max(distance.item(), 0.0)


def kernel_distance(x, y, subsets=SUBSETS, subset_size=SUBSET_SIZE, seed=0):
    """KID of features (n, d): unbiased mean, standard deviation (Binkowski et al. 2018, eq. 4).

    The deviation is that of a random subset, no standard error of the mean: subsets overlap, and it
    is 0 where one holds everything.
    """
    x, y = as_features(x), as_features(y)
    size = min(subset_size, len(x), len(y))
    generator, values = torch.Generator().manual_seed(seed), []
    for _ in range(1 if size == len(x) == len(y) else subsets):  # small sets: one subset, of all
        a, b = (part[torch.randperm(len(part), generator=generator)[:size]] for part in (x, y))
        k_aa, k_bb, k_ab = ((p @ q.T / x.shape[1] + 1) ** 3 for p, q in ((a, a), (b, b), (a, b)))
        within = sum(k.sum() - k.trace() for k in (k_aa, k_bb)) / (size * (size - 1))
        values.append(within - 2 * k_ab.mean())
    values = torch.stack(values)
    return values.mean().item(), values.std(correction=0).item()


def precision_and_recall(samples, reference, k=3):
    """(precision, recall) of samples (n, d), references (m, d): Kynkaanniemi et al. 2019, eq. 1, 2.

    Precision is the fraction of samples nearer to a reference than its k-th neighbor.
    """
    samples, reference = as_features(samples), as_features(reference)
    # Float32 features of a copy differ in their last digits: it shall be in a ball of copies too.
    slack = 1e-6 * reference.square().sum(1).mean().sqrt()
    center = reference.mean(0)  # distances of centered features lose fewer digits
    samples, reference, fractions = samples - center, reference - center, []
    for queries, centers in ((samples, reference), (reference, samples)):
        radii = nearest(centers, [centers], k + 1)[0][:, -1] + slack  # the nearest is the center itself
        parts = queries.split(max(BLOCK // max(centers.shape), 1))
        inside = torch.cat([(torch.cdist(part, centers) <= radii).any(1) for part in parts])
        fractions.append(inside.double().mean().item())
    return tuple(fractions)


def copied_fraction(distances):
    """(fraction, low, high) of copies among samples: the gap ratio, and its 95 % interval.

    distances: (n, 2), to the two nearest training images. A copy has a first one below a third of
    the second (Gu et al. 2023, "On Memorization in Diffusion Models", after Yoon et al. 2023):
    duplicates among these images would hide it. The interval (Wilson 1927) holds near 0 and 1 too.
    """
    count, total = (3 * distances[:, 0] < distances[:, 1]).sum().item(), len(distances)
    center = (count + Z**2 / 2) / (total + Z**2)
    half = Z / (total + Z**2) * math.sqrt(count * (total - count) / total + Z**2 / 4)
    return count / total, center - half if count else 0.0, center + half if count < total else 1.0


def nearest(queries, bank, k=1):
    """Distances (float64) and positions, (n, k), of the k nearest in blocks (b, d), in order."""
    queries, position = torch.as_tensor(queries), 0
    best = torch.full((len(queries), k), torch.inf, dtype=torch.float64)
    found = torch.full((len(queries), k), -1)
    for block in map(as_features, bank):
        positions = torch.arange(position, position + len(block))
        for rows in torch.arange(len(queries)).split(max(BLOCK // max(block.shape), 1)):
            distances = torch.cat((best[rows], torch.cdist(as_features(queries[rows]), block)), 1)
            best[rows], order = distances.topk(k, largest=False)
            found[rows] = torch.cat((found[rows], positions.expand(len(rows), -1)), 1).gather(1, order)
        position += len(block)
    return best, found
