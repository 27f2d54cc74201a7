"""The Frechet distance against scipy, closed forms and torchmetrics."""

import numpy as np
import pytest
import torch
from torch import nn

from tetris.frechet import Gaussian, frechet_distance

linalg = pytest.importorskip("scipy.linalg", reason="scipy is in tetris[test]")


def gaussian(seed, size=12, rank=None):
    random = torch.Generator().manual_seed(seed)
    factor = torch.randn(size, rank or size, generator=random, dtype=torch.float64)
    return Gaussian(torch.randn(size, generator=random, dtype=torch.float64), factor @ factor.T)


@pytest.mark.parametrize("seed", range(5))
def test_known_gaussians_agree_with_scipy(seed):
    a, b = gaussian(2 * seed), gaussian(2 * seed + 1)
    root = linalg.sqrtm(a.covariance.numpy() @ b.covariance.numpy())
    assert np.abs(np.imag(root)).max() < 1e-6
    apart = float((a.mean - b.mean).square().sum())
    want = apart + float(a.covariance.trace() + b.covariance.trace()) - 2 * np.trace(root.real)
    assert frechet_distance(a, b) == pytest.approx(want, rel=1e-9)
    assert frechet_distance(b, a) == pytest.approx(want, rel=1e-9)


def test_closed_forms():
    a, b = torch.tensor([1.0, 4.0, 9.0]).double(), torch.tensor([4.0, 4.0, 1.0]).double()
    shift = torch.tensor([3.0, 0.0, 4.0]).double()
    zero = torch.zeros(3).double()
    # Variances on the diagonal: (sqrt(a) - sqrt(b))^2 each, and the distance of the means.
    found = frechet_distance(Gaussian(zero, torch.diag(a)), Gaussian(shift, torch.diag(b)))
    assert found == pytest.approx(25.0 + 1.0 + 0.0 + 4.0)
    assert frechet_distance(gaussian(0), gaussian(0)) == pytest.approx(0.0, abs=1e-9)


def test_singular_covariances_are_no_special_case():
    a, b = gaussian(0, rank=3), gaussian(1, rank=5)
    nudged = [Gaussian(g.mean, g.covariance + 1e-10 * torch.eye(12).double()) for g in (a, b)]
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(*nudged), rel=1e-3)
    point = Gaussian(torch.zeros(12).double(), torch.zeros(12, 12).double())
    want = float(a.mean.square().sum() + a.covariance.trace())
    assert frechet_distance(point, a) == pytest.approx(want)


def test_features_agree_with_torchmetrics():
    fid = pytest.importorskip("torchmetrics.image.fid", reason="torchmetrics is not installed")

    class Features(nn.Module):
        num_features = 6

        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.net = nn.Linear(3 * 8 * 8, 6)

        def forward(self, images):
            return self.net(images.float().flatten(1) / 255.0)

    features = Features()
    images = [torch.randint(0, 256, (50, 3, 8, 8), dtype=torch.uint8) for _ in range(2)]
    images[1] = images[1] // 2
    metric = fid.FrechetInceptionDistance(feature=features)
    metric.update(images[0], real=True)
    metric.update(images[1], real=False)
    with torch.no_grad():
        found = frechet_distance(features(images[0]), features(images[1]))
    assert found == pytest.approx(float(metric.compute()), rel=1e-3)


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (torch.zeros(1, 3), "n of 2 or more"),
        (torch.zeros(4), "must be floating"),
        (torch.zeros(4, 3, dtype=torch.int64), "must be floating"),
        (torch.full((4, 3), torch.nan), "must be finite"),
    ],
)
def test_features_are_checked(features, message):
    with pytest.raises(ValueError, match=message):
        frechet_distance(features, torch.randn(5, 3))


def test_gaussians_are_checked_and_kept_in_double():
    with pytest.raises(ValueError, match=r"\[d\] and \[d, d\] \(got \[3\] and \[3\]\)"):
        Gaussian(torch.zeros(3), torch.ones(3))
    with pytest.raises(TypeError, match=r"mean must be a torch\.Tensor"):
        Gaussian(np.zeros(3), torch.eye(3))  # type: ignore[arg-type]
    a = gaussian(0)
    assert Gaussian(a.mean.float(), a.covariance.float()).covariance.dtype == torch.float64
    elsewhere = object.__new__(Gaussian)
    for name in ("mean", "covariance"):
        object.__setattr__(elsewhere, name, getattr(a, name).to("meta"))
    with pytest.raises(ValueError, match=r"one device \(got cpu and meta\)"):
        frechet_distance(a, elsewhere)


def test_both_need_equally_many_features():
    with pytest.raises(ValueError, match=r"equally many features \(got 3 and 4\)"):
        frechet_distance(torch.randn(5, 3), torch.randn(5, 4))
