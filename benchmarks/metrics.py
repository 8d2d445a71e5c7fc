# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0


"""
Scores of generated images from features: Fréchet distance (FID), kernel distances (KID, CMMD), improved precision and recall,
and the CLIP score. Features are tensors `(N, D)` of any model, one row per image; everything is computed in float64.
"""

import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F


CHUNK = 1024  # rows of a kernel or distance matrix that are in memory at a time


def check_features(features: torch.Tensor, real: torch.Tensor, least: int) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Return two sets of features as float64.

    Raises:
        `ValueError`: if they are not `(N, D)` and `(M, D)` with N and M of at least `least`, or are not finite.
    """
    if features.ndim != 2 or real.ndim != 2 or features.shape[1] != real.shape[1]:
        raise ValueError(
            f"`features` {tuple(features.shape)} and `real` {tuple(real.shape)} must be (N, D) and (M, D): take both from one "
            "model."
        )
    if min(len(features), len(real)) < least:
        raise ValueError(f"The score needs {least} images on each side; got {len(features)} and {len(real)}.")
    for name, values in (("features", features), ("real", real)):
        if not values.isfinite().all():
            raise ValueError(f"`{name}` has values that are not finite: compute the features in float32.")
    return features.double(), real.double()


def frechet_distance(features: torch.Tensor, real: torch.Tensor) -> float:
    """
    Return the Fréchet distance of two sets of features, each taken for a Gaussian (FID; Heusel et al., 2017). The covariances
    may be singular. Warns if a set has no more images than features have dimensions: the distance is too large then.

    Raises:
        `ValueError`: if the sets do not fit (see [`check_features`]) or have fewer than two images.
    """
    x, y = check_features(features, real, least=2)
    fewest, dim = min(len(x), len(y)), x.shape[1]
    if fewest <= dim:
        warnings.warn(
            f"The Fréchet distance of {fewest} images with {dim} features is biased upwards: use more images than features, or "
            "the kernel distance, which has no such bias.",
            stacklevel=2,
        )
    roots = []
    for one in (x, y):
        values, vectors = torch.linalg.eigh(one.T.cov().reshape(dim, dim))
        roots.append(vectors * values.clamp(min=0).sqrt() @ vectors.T)
    a, b = roots
    # The trace of the root of a product of covariances is the sum of the singular values of the product of their roots, which
    # exist where the usual root of a matrix does not.
    shared = torch.linalg.svdvals(a @ b).sum()
    distance = (x.mean(0) - y.mean(0)).square().sum() + a.square().sum() + b.square().sum() - 2 * shared
    return distance.clamp(min=0).item()


def squared_mmd(
    x: torch.Tensor, y: torch.Tensor, kernel: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], unbiased: bool
) -> float:
    """
    Return the squared maximum mean discrepancy of `(N, D)` and `(M, D)` by a `kernel`, which maps `(n, D)` and `(m, D)` to
    `(n, m)`. Unbiased, it leaves out each image's kernel with itself, and may be below 0.
    """

    def within(a: torch.Tensor) -> float:
        total = 0.0
        for i in range(0, len(a), CHUNK):
            values = kernel(a[i : i + CHUNK], a)
            total += (values.sum() - values.diagonal(i).sum() * unbiased).item()
        return total / (len(a) * (len(a) - unbiased))

    between = sum(kernel(part, y).sum().item() for part in x.split(CHUNK)) / (len(x) * len(y))
    return within(x) + within(y) - 2 * between


def kernel_distance(features: torch.Tensor, real: torch.Tensor) -> float:
    """
    Return the kernel distance of two sets of features (KID; Binkowski et al., 2018): the squared MMD without bias, by the kernel
    `(x . y / D + 1)^3`, over all images instead of subsets. It is 0 on average for independent images of one kind, and below 0
    if the sets are copies of each other.

    Raises:
        `ValueError`: if the sets do not fit (see [`check_features`]) or have fewer than two images.
    """
    x, y = check_features(features, real, least=2)
    return squared_mmd(x, y, lambda a, b: (a @ b.T / a.shape[1] + 1) ** 3, unbiased=True)


def clip_distance(embeddings: torch.Tensor, real: torch.Tensor, sigma: float = 10.0) -> float:
    """
    Return the CMMD of two sets of CLIP image embeddings (Jayasumana et al., 2024): the squared MMD of the embeddings scaled to
    unit length, by a Gaussian kernel of width `sigma`, times 1000. As published, it has the small bias of an image's kernel with
    itself, and is 0 for copies.

    Raises:
        `ValueError`: if the sets do not fit (see [`check_features`]) or are empty.
    """
    x, y = (F.normalize(one) for one in check_features(embeddings, real, least=1))
    # For unit vectors the squared distance is 2 - 2 cos.
    return 1000 * squared_mmd(x, y, lambda a, b: ((a @ b.T - 1) / sigma**2).exp(), unbiased=False)


def measure_distances(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    # Without matrix products, which lose the digits of small distances.
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


def precision_recall(features: torch.Tensor, real: torch.Tensor, k: int = 3) -> tuple[float, float]:
    """
    Return the improved precision and recall of generated images (Kynkäänniemi et al., 2019), each in [0, 1].

    The manifold of a set is the union of the balls around its images that reach to the `k`-th nearest neighbor in the set.
    Precision is the share of the images with `features` that lie on the manifold of the `real` ones, and recall the reverse.
    Both depend on the numbers of images: compare only scores of equally many.

    Raises:
        `ValueError`: if the sets do not fit (see [`check_features`]) or have no more than `k` images.
    """
    x, y = check_features(features, real, least=k + 1)

    def radii(a: torch.Tensor) -> torch.Tensor:
        nearest = [measure_distances(part, a).topk(k + 1, largest=False).values[:, -1] for part in a.split(CHUNK)]
        return torch.cat(nearest)

    def covered(a: torch.Tensor, b: torch.Tensor) -> float:
        reach = radii(b)
        inside = [(measure_distances(part, b) <= reach).any(1) for part in a.split(CHUNK)]
        return torch.cat(inside).double().mean().item()

    return covered(x, y), covered(y, x)


def clip_score(images: torch.Tensor, texts: torch.Tensor) -> float:
    """
    Return the CLIP score (Hessel et al., 2021) of images and their captions, by their CLIP embeddings, `(N, D)` each: 100 times
    the mean cosine, and at least 0, as torchmetrics defines it.

    Raises:
        `ValueError`: if there are not as many images as captions, or none.
    """
    if images.shape != texts.shape or images.ndim != 2 or not len(images):
        raise ValueError(
            f"`images` {tuple(images.shape)} and `texts` {tuple(texts.shape)} must both be (N, D), with one caption per image."
        )
    cosines = F.cosine_similarity(images.double(), texts.double())
    return (100 * cosines.mean()).clamp(min=0).item()
