# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""The scores of images, each against a computation of another kind: closed forms, NumPy, loops, or numbers by hand."""

import numpy as np
import pytest
import torch

from benchmarks import metrics
from benchmarks.metrics import clip_distance, clip_score, frechet_distance, kernel_distance, precision_recall


@pytest.fixture
def sets() -> tuple[torch.Tensor, torch.Tensor]:
    """Correlated features of 60 and 50 images."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(2, 6, 6, generator=generator)
    x = torch.randn(60, 6, generator=generator) @ mixing[0]
    return x, torch.randn(50, 6, generator=generator) @ mixing[1] + 0.5


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Matrices in several chunks, of which the last is smaller."""
    monkeypatch.setattr(metrics, "CHUNK", 16)


def test_frechet_distance_by_the_eigenvalues_of_the_product(sets):
    x, y = (one.double().numpy() for one in sets)
    a, b = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root_trace = np.sqrt(np.linalg.eigvals(a @ b).astype(complex)).sum().real
    expected = np.square(x.mean(0) - y.mean(0)).sum() + np.trace(a) + np.trace(b) - 2 * root_trace
    assert frechet_distance(*sets) == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_in_closed_form():
    """Whitened features, scaled per dimension: the distance is that of means and of deviations. One dimension is constant."""
    generator = torch.Generator().manual_seed(0)
    white = torch.randn(40, 4, generator=generator, dtype=torch.float64)
    white = torch.linalg.qr(white - white.mean(0)).Q * 39**0.5
    first, second = torch.tensor([1.0, 2.0, 0.0, 3.0]), torch.tensor([4.0, 2.0, 0.0, 1.0])
    shift = torch.tensor([0.0, 1.0, 2.0, 0.0])
    assert frechet_distance(white * first, white * second + shift) == pytest.approx(9 + 0 + 0 + 4 + 1 + 4, rel=1e-9)
    assert frechet_distance(white * first, white * first) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(white[:, :1], white[:, :1] * 3) == pytest.approx(4, rel=1e-9)


def test_frechet_distance_of_few_images_warns_and_is_finite(sets):
    """With singular covariances, the trace is the sum of the singular values of the product of the centered features."""
    x, y = (one[:4].double() for one in sets)
    with pytest.warns(UserWarning, match="of 4 images with 6 features is biased upwards"):
        distance = frechet_distance(x, y)
    a, b = ((one - one.mean(0)).numpy() / 3**0.5 for one in (x, y))
    nuclear = np.linalg.svd(a @ b.T, compute_uv=False).sum()
    expected = np.square((x.mean(0) - y.mean(0)).numpy()).sum() + (a**2).sum() + (b**2).sum() - 2 * nuclear
    assert distance == pytest.approx(expected, rel=1e-6)


def test_kernel_distance_by_loops(sets):
    x, y = (one.double().numpy() for one in sets)

    def mean(a: np.ndarray, b: np.ndarray) -> float:
        same = a is b
        return np.mean(
            [(p @ q / 6 + 1) ** 3 for i, p in enumerate(a) for j, q in enumerate(b) if not (same and i == j)]
        )

    assert kernel_distance(*sets) == pytest.approx(mean(x, x) + mean(y, y) - 2 * mean(x, y), rel=1e-9)


def test_kernel_distance_is_unbiased():
    """The mean over many small sets of one distribution is 0. The values of two pairs of points are computed by hand."""
    generator = torch.Generator().manual_seed(0)
    draws = [kernel_distance(*torch.randn(2, 4, 4, generator=generator)) for _ in range(500)]
    assert abs(np.mean(draws)) < 4 * np.std(draws) / 500**0.5
    x, y = 2**0.5 * torch.tensor([[1.0, 0.0], [0.0, 1.0]]), 2**0.5 * torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    # (x . y / 2 + 1)^3 is 1 between the points of x, 8 between those of y, and 8, 8, 1 and 1 across.
    assert kernel_distance(x, y) == pytest.approx(1 + 8 - 2 * 18 / 4)


def test_clip_distance_by_loops(sets):
    """The kernel of unit vectors, each with itself too, as published; scale does not matter."""
    x, y = (one.double().numpy() / np.linalg.norm(one.double().numpy(), axis=1, keepdims=True) for one in sets)

    def mean(a: np.ndarray, b: np.ndarray) -> float:
        return np.mean([np.exp(-np.square(p - q).sum() / (2 * 10**2)) for p in a for q in b])

    expected = 1000 * (mean(x, x) + mean(y, y) - 2 * mean(x, y))
    assert clip_distance(*sets) == pytest.approx(expected, rel=1e-9)
    assert clip_distance(4 * sets[0], sets[1]) == pytest.approx(expected, rel=1e-9)
    assert clip_distance(sets[0], sets[0]) == pytest.approx(0, abs=1e-9)


def test_precision_and_recall_by_loops(sets):
    x, y = (one.double().numpy() for one in sets)

    def covered(a: np.ndarray, b: np.ndarray, k: int) -> float:
        radii = [sorted(np.linalg.norm(p - q) for j, q in enumerate(b) if j != i)[k - 1] for i, p in enumerate(b)]
        return np.mean([any(np.linalg.norm(p - q) <= radius for q, radius in zip(b, radii)) for p in a])

    precision, recall = precision_recall(*sets)
    assert (precision, recall) == pytest.approx((covered(x, y, 3), covered(y, x, 3)))
    assert 0 < precision < 1 and 0 < recall < 1 and precision != recall
    assert precision_recall(*sets, k=1)[0] == pytest.approx(covered(x, y, 1)) != precision


def test_precision_and_recall_tell_fidelity_from_diversity():
    real = torch.randn(100, 2, generator=torch.Generator().manual_seed(0))
    center = real[real.norm(dim=1) < 0.5]  # good images of one kind
    precision, recall = precision_recall(center, real)
    assert precision == 1 and recall < 0.5
    assert precision_recall(real + 100, real) == (0, 0)
    assert precision_recall(real, real) == (1, 1)


def test_clip_score_by_hand():
    images, texts = torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [3.0, 4.0]])
    assert clip_score(images, texts) == pytest.approx((100 + 80) / 2)
    assert clip_score(images, -texts) == 0


@pytest.mark.parametrize("score", [frechet_distance, kernel_distance, clip_distance, precision_recall])
def test_bad_features(score):
    with pytest.raises(ValueError, match=r"\(8, 4\) and `real` \(8, 5\) must be \(N, D\) and \(M, D\)"):
        score(torch.zeros(8, 4), torch.zeros(8, 5))
    least = {clip_distance: 1, precision_recall: 4}.get(score, 2)
    with pytest.raises(ValueError, match=f"needs {least} images on each side; got {least - 1} and 8"):
        score(torch.zeros(least - 1, 4), torch.zeros(8, 4))
    with pytest.raises(ValueError, match="`real` has values that are not finite"):
        score(torch.zeros(8, 4), torch.full((8, 4), torch.inf))


def test_a_clip_score_needs_a_caption_per_image():
    with pytest.raises(ValueError, match=r"`images` \(3, 4\) and `texts` \(2, 4\) must both be"):
        clip_score(torch.zeros(3, 4), torch.zeros(2, 4))
