"""FID (Frechet distance), KID (kernel distance), precision, recall, nearest images, in float64."""

from dataclasses import dataclass

import torch

from utils.errors import UserError


@dataclass(eq=False)
class FeatureStatistics:
    """Count, mean and covariance (d, d) of features that come in batches, in float64.

    The pairwise update of Chan et al. 1979 ("Updating formulae ...") merges the batches. It does
    not subtract large sums from each other.
    """

    count: int = 0
    mean: torch.Tensor | None = None  # (d,)
    scatter: torch.Tensor | None = None  # (d, d), the sum of (x - mean)(x - mean)^T

    def add(self, features):
        """features: as `as_features` takes them, n may be 0. Returns self."""
        features = as_features(features)
        count, mean = len(features), features.mean(0)
        if count == 0:
            return self
        centred = features - mean
        scatter = centred.T @ centred
        if self.count == 0:
            self.count, self.mean, self.scatter = count, mean, scatter
            return self
        if len(mean) != len(self.mean):
            raise UserError(f"features of {len(mean)} numbers added to features of {len(self.mean)}")
        shift, total = mean - self.mean, self.count + count
        self.scatter += scatter + torch.outer(shift, shift) * (self.count * count / total)
        self.mean += shift * (count / total)
        self.count = total
        return self

    @property
    def covariance(self):
        """(d, d), unbiased (divided by n - 1), as is usual for FID. ValueError below 2 features."""
        if self.count < 2:
            raise UserError(f"a covariance needs at least 2 pictures, not {self.count}")
        return self.scatter / (self.count - 1)


def as_features(features):
    """(n, d) of any type as float64 on the CPU (Apple GPUs have none). ValueError: shape, NaN."""
    features = torch.as_tensor(features).detach().to("cpu", torch.float64)
    if features.ndim != 2:
        raise UserError(f"features must be (pictures, numbers), not of shape {tuple(features.shape)}")
    if not features.isfinite().all():
        raise UserError("features hold NaN or infinite values")
    return features


def frechet_distance(mean_1, cov_1, mean_2, cov_2):
    """FID: |m_1 - m_2|^2 + tr(C_1 + C_2 - 2 (C_1 C_2)^(1/2)), never below 0.

    Dowson & Landau 1982; Heusel et al. 2017, equation 6. Means (d,) and symmetric covariances
    (d, d), which may be singular; tensors or arrays. With C = L L^T the trace of the root is the
    sum of the singular values of L_1^T L_2: nothing turns complex, and a set against itself gives
    0 to rounding even where C is singular. ValueError: shapes that do not fit, values not finite.
    """
    values = [torch.as_tensor(value).detach().to("cpu", torch.float64) for value in (mean_1, cov_1, mean_2, cov_2)]
    (mean_1, cov_1, mean_2, cov_2), shapes, d = values, [tuple(value.shape) for value in values], values[0].numel()
    if shapes != [(d,), (d, d)] * 2:
        raise UserError(f"means and covariances do not fit together: {shapes}")
    if not all(value.isfinite().all() for value in values):
        raise UserError("means or covariances hold NaN or infinite values")
    overlap = torch.linalg.svdvals(factor(cov_1).T @ factor(cov_2)).sum()
    distance = (mean_1 - mean_2).square().sum() + cov_1.trace() + cov_2.trace() - 2 * overlap
    return max(distance.item(), 0.0)


def factor(covariance):
    """L with L L^T = covariance, (d, d); eigenvalues that rounding made negative count as 0."""
    values, vectors = torch.linalg.eigh((covariance + covariance.T) / 2)
    return vectors * values.clamp(min=0).sqrt()


def statistics_distance(first, second):
    """`frechet_distance` of two FeatureStatistics."""
    return frechet_distance(first.mean, first.covariance, second.mean, second.covariance)


BLOCK = 2**23  # numbers in a block of distances or features: 64 MiB


def kernel_distance(features_1, features_2, subsets=100, subset_size=1000, seed=0):
    """(mean, standard deviation over subsets) of the squared MMD (Binkowski et al. 2018, "KID").

    features: (n, d), (m, d). Kernel (x y / d + 1)^3, unbiased: it may fall below 0. subset_size:
    images of each set for one estimate, fewer where a set is smaller; one estimate where it is all
    of both sets. ValueError for sets of fewer than 2.
    """
    features_1, features_2 = as_features(features_1), as_features(features_2)
    size = min(subset_size, len(features_1), len(features_2))
    if size < 2:
        raise UserError(
            f"a kernel distance needs at least 2 pictures on both sides, not {len(features_1)} and {len(features_2)}"
        )
    if size == len(features_1) == len(features_2):
        subsets = 1
    generator = torch.Generator().manual_seed(seed)
    values = []
    for _ in range(subsets):
        x, y = (
            features[torch.randperm(len(features), generator=generator)[:size]] for features in (features_1, features_2)
        )
        values.append(squared_discrepancy(x, y))
    values = torch.stack(values)
    return values.mean().item(), values.std(correction=0).item()


def squared_discrepancy(x, y):
    """The unbiased estimate (Binkowski et al. 2018, equation 4) of x (n, d) and y (m, d), 0-dim."""

    def kernel(a, b):
        return (a @ b.T / a.shape[1] + 1) ** 3

    def mean_of_pairs(a):  # of different pictures: a picture with itself would bias it
        k = kernel(a, a)
        return (k.sum() - k.trace()) / (len(a) * (len(a) - 1))

    return mean_of_pairs(x) + mean_of_pairs(y) - 2 * kernel(x, y).mean()


def precision_and_recall(samples, reference, k=3):
    """(precision, recall), 0 to 1 each (Kynkaanniemi et al. 2019, equations 1 and 2).

    A set's manifold is the union of balls around its features, each as large as the distance to its
    k-th nearest neighbour in the set. Precision is the share of samples (n, d) in the manifold of
    the reference (m, d), recall the converse. Both depend on n and m: compare values of the same
    counts only. ValueError unless both sets have more than k.
    """
    samples, reference = as_features(samples), as_features(reference)
    if min(len(samples), len(reference)) <= k:
        raise UserError(
            f"precision and recall with k = {k} need more than {k} pictures on both sides, "
            f"not {len(samples)} and {len(reference)}"
        )
    # Float32 features of a copy differ in their last digits: it shall be in a ball of copies too.
    slack = 1e-6 * reference.square().sum(1).mean().sqrt()
    centre = reference.mean(0)  # distances of centred features lose fewer digits
    samples, reference = samples - centre, reference - centre
    return share_inside(samples, reference, k, slack), share_inside(reference, samples, k, slack)


def share_inside(queries, centres, k, slack):
    """The share of queries (n, d) in the ball of a centre (m, d), or at most `slack` outside."""
    rows = max(BLOCK // len(centres), 1)
    # itself is one
    radii = torch.cat([torch.cdist(block, centres).kthvalue(k + 1, dim=1).values for block in centres.split(rows)])
    inside = [(torch.cdist(block, centres) <= radii + slack).any(1) for block in queries.split(rows)]
    return torch.cat(inside).double().mean().item()


def nearest(queries, bank, k=1):
    """The k nearest of a bank: (distances (n, k) float64, positions (n, k)), nearest first.

    queries: (n, d). bank: an iterable of blocks (b, d), read once. Any number type; a block at a
    time becomes float64. ValueError for a bank of fewer than k.
    """
    queries = torch.as_tensor(queries)
    best = torch.full((len(queries), k), float("inf"), dtype=torch.float64)
    found = torch.full((len(queries), k), -1)
    position = 0
    for block in bank:
        block = as_features(block)
        positions = torch.arange(position, position + len(block))
        for part in torch.arange(len(queries)).split(max(BLOCK // max(block.shape), 1)):
            distances = torch.cat((best[part], torch.cdist(as_features(queries[part]), block)), 1)
            best[part], order = distances.topk(k, largest=False)
            found[part] = torch.cat((found[part], positions.expand(len(part), -1)), 1).gather(1, order)
        position += len(block)
    if position < k:
        raise UserError(f"the {k} nearest of {position} pictures cannot be found")
    return best, found
