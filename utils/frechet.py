"""The Frechet distance between two sets of features, in float64, and the running statistics that it is computed from."""
import torch


class FeatureStatistics:
    """Count, mean and covariance of features that come in batches: float64, memory for d x d numbers whatever the count.

    Batches are merged by the pairwise update of Chan et al. 1979 ("Updating formulae ..."), which does not subtract large sums from
    each other as sum(x x^T) - n mean mean^T does.
    """

    def __init__(self):
        self.count = 0
        self.mean = None  # (d,)
        self.scatter = None  # (d, d), the sum of (x - mean)(x - mean)^T

    def add(self, features):
        """features: (n, d), a tensor or array of any float type, n may be 0. ValueError for another shape or values not finite."""
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
            raise ValueError(f"features of {len(mean)} numbers added to features of {len(self.mean)}")
        shift, total = mean - self.mean, self.count + count
        self.scatter += scatter + torch.outer(shift, shift) * (self.count * count / total)
        self.mean += shift * (count / total)
        self.count = total
        return self

    @property
    def covariance(self):
        """(d, d), the unbiased one (divided by n - 1), as the field's implementations take it. ValueError below 2 features."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 pictures, not {self.count}")
        return self.scatter / (self.count - 1)


def as_features(features):
    """(n, d) float64 tensor on the CPU (Apple GPUs have no float64). ValueError for another shape or values not finite."""
    features = torch.as_tensor(features).detach().to("cpu", torch.float64)
    if features.ndim != 2:
        raise ValueError(f"features must be (pictures, numbers), not of shape {tuple(features.shape)}")
    if not features.isfinite().all():
        raise ValueError("features hold NaN or infinite values")
    return features


def frechet_distance(mean_1, cov_1, mean_2, cov_2):
    """|m_1 - m_2|^2 + tr(C_1 + C_2 - 2 (C_1 C_2)^(1/2)), a float, never below 0 (Dowson & Landau 1982; Heusel et al. 2017, equation 6).

    Args: means (d,) and symmetric covariances (d, d), which may be singular; tensors or arrays, taken as float64.
    With C = L L^T the trace of the root is the sum of the singular values of L_1^T L_2: there is no root of a matrix that is not
    symmetric, so nothing turns complex, and a set against itself gives its own eigenvalues, so 0 to rounding even where C is singular.
    ValueError for shapes that do not fit or values not finite.
    """
    mean_1, cov_1, mean_2, cov_2 = (torch.as_tensor(value).detach().to("cpu", torch.float64) for value in (mean_1, cov_1, mean_2, cov_2))
    d = mean_1.numel()
    if any(mean.shape != (d,) for mean in (mean_1, mean_2)) or any(cov.shape != (d, d) for cov in (cov_1, cov_2)):
        raise ValueError(f"means and covariances do not fit together: {[tuple(v.shape) for v in (mean_1, cov_1, mean_2, cov_2)]}")
    if not all(value.isfinite().all() for value in (mean_1, cov_1, mean_2, cov_2)):
        raise ValueError("means or covariances hold NaN or infinite values")
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
