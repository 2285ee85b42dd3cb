"""Distances between sets of samples in the features of a network: Fréchet distance and kernel distance.

With any features but Inception's of 2015 these are not the FID and KID of papers, and with clips not FVD: numbers
compare only where features, reference and the number of samples are the same.
"""

from __future__ import annotations

import os
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mambavision.engine.files import atomic_path
from mambavision.engine.photos import DatasetError

# what numpy raises at a file that is no .npz, or a damaged one
UNREADABLE = (OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile, zlib.error)


@dataclass(frozen=True)
class FeatureSet:
    """The features of a set of samples, or only their mean and covariance.

    Attributes:
        extractor: By which they were computed, see :class:`mambavision.diffusion.features.FeatureExtractor`.
        source: Of which samples, for messages.
        count: How many, N.
        mean: float64 (D,).
        covariance: float64 (D, D), divided by N - 1.
        features: float32 (N, D), or None.
        size: (H, W) of the pictures or (T, H, W) of the clips, or None where it is not known.
    """

    extractor: str
    source: str
    count: int
    mean: Tensor
    covariance: Tensor
    features: Tensor | None = None
    size: tuple[int, ...] | None = None

    @classmethod
    def of(cls, features: Tensor, *, extractor: str, source: str, size: tuple[int, ...] | None = None) -> FeatureSet:
        """From features (N, D).

        Raises:
            ValueError: If there are fewer than 2.
        """
        if len(features) < 2:
            raise ValueError(f"{source}: {len(features)} samples have no covariance; at least 2 are needed")
        exact = features.double()
        return cls(extractor, source, len(features), exact.mean(0), exact.T.cov(), features.float(), size)

    def save(self, path: str | os.PathLike, *, with_features: bool = True) -> None:
        """Write as ``*.npz``, whole or not at all.

        Args:
            path: The file.
            with_features: Also the features themselves, which the kernel distance needs, as float16 where they fit.

        Raises:
            ValueError: If the file's name ends in something else.
        """
        if Path(path).suffix != ".npz":
            raise ValueError(f"{path}: features are written as .npz; name such a file")
        arrays = {"mean": self.mean.numpy(), "covariance": self.covariance.numpy(), "count": np.asarray(self.count)}
        if with_features and self.features is not None:
            half = self.features.half()
            arrays["features"] = (half if half.isfinite().all() else self.features).numpy()
        if self.size is not None:
            arrays["size"] = np.asarray(self.size)
        text = {"extractor": np.asarray(self.extractor), "source": np.asarray(self.source)}
        with atomic_path(path) as temporary:
            np.savez_compressed(temporary, **arrays, **text)

    @classmethod
    def load(cls, path: str | os.PathLike) -> FeatureSet:
        """Read a file of :meth:`save`.

        Raises:
            FileNotFoundError: If there is none.
            DatasetError: If it is none.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"{path}: no such file of features")
        try:
            with np.load(path, allow_pickle=False) as file:
                mean, covariance = (torch.from_numpy(file[name]) for name in ("mean", "covariance"))
                features = torch.from_numpy(file["features"]).float() if "features" in file else None
                size = tuple(map(int, file["size"])) if "size" in file else None
                count, extractor, source = int(file["count"]), str(file["extractor"]), str(file["source"])
        except UNREADABLE as error:
            raise DatasetError(f"{path}: no file of features, or a damaged one ({error})") from error
        return cls(extractor, source, count, mean, covariance, features, size)


def frechet_distance(a: FeatureSet, b: FeatureSet) -> float:
    """Squared Fréchet (2-Wasserstein) distance of the normal distributions with the means and covariances of two sets.

    |m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a^1/2 C_b C_a^1/2)^1/2), in float64 (Dowson and Landau, "The Fréchet distance
    between multivariate normal distributions", 1982). It is biased upwards, the more the fewer the samples: compare
    sets of one size.

    Raises:
        ValueError: If the sets were not made by the same features, or are of different sizes.
    """
    _check_same(a, b)
    root = _root(a.covariance)
    product = torch.linalg.eigvalsh(root @ b.covariance @ root).clamp(min=0).sqrt().sum()
    distance = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * product
    return max(distance.item(), 0.0)


def _root(covariance: Tensor) -> Tensor:
    """The symmetric square root of a positive semidefinite matrix."""
    values, vectors = torch.linalg.eigh(covariance)
    return vectors * values.clamp(min=0).sqrt() @ vectors.T


def kernel_distance(
    a: FeatureSet, b: FeatureSet, *, subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Mean and standard deviation of the unbiased squared MMD over random subsets of two sets.

    The kernel is (x.y / D + 1)^3 (Binkowski et al., "Demystifying MMD GANs", 2018, who call it KID with Inception's
    features; their subsets are 100 of 1000).

    Args:
        a, b: The sets.
        subsets: How many pairs of subsets.
        subset_size: Samples of each; all, where there are fewer.
        seed: By which they are drawn.

    Raises:
        ValueError: If the sets were not made by the same features, or one holds its mean and covariance only.
    """
    _check_same(a, b)
    for one in (a, b):
        if one.features is None:
            raise ValueError(
                f"{one.source}: the kernel distance needs the features, here are their mean and covariance"
            )
    generator = torch.Generator().manual_seed(seed)
    size = min(subset_size, a.count, b.count)
    values = []
    for _ in range(1 if size == a.count == b.count else subsets):  # of all of both there is one subset
        x, y = (one.features[torch.randperm(one.count, generator=generator)[:size]] for one in (a, b))
        values.append(squared_mmd(x, y))
    found = torch.tensor(values, dtype=torch.float64)
    return found.mean().item(), found.std(unbiased=False).item()


def squared_mmd(x: Tensor, y: Tensor) -> float:
    """The unbiased estimate of the squared MMD of features (M, D) and (N, D), both at least 2; may be negative."""
    x, y = x.double(), y.double()

    def kernel(u: Tensor, v: Tensor) -> Tensor:
        return (u @ v.T / x.shape[1] + 1) ** 3

    def within(u: Tensor) -> Tensor:
        k = kernel(u, u)
        return (k.sum() - k.trace()) / (len(u) * (len(u) - 1))

    return (within(x) + within(y) - 2 * kernel(x, y).mean()).item()


def _check_same(a: FeatureSet, b: FeatureSet) -> None:
    if a.extractor != b.extractor or len(a.mean) != len(b.mean):
        raise ValueError(
            f"features of {a.source} are by {a.extractor}, those of {b.source} by {b.extractor}: compute both by one"
        )
    if a.size and b.size and a.size != b.size:
        ours, theirs = ("x".join(map(str, size)) for size in (a.size, b.size))
        raise ValueError(f"{a.source} holds samples of {ours}, {b.source} of {theirs}: bring both to one size")
