"""The diffusion experiment's distance between two sets of images, against closed forms and scipy's matrix root."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn", reason="the demo extra is not installed")

from superlora_tn_paper.judge import frechet, frechet_spread, moments


def test_frechet_of_diagonal_gaussians_is_the_closed_form() -> None:
    """In a common eigenbasis it is |m - m'|^2 + sum (s - s')^2."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(12, 12, generator=generator, dtype=torch.float64))[0]
    mean, mean2 = torch.randn(2, 12, generator=generator, dtype=torch.float64)
    spread, spread2 = torch.rand(2, 12, generator=generator, dtype=torch.float64)
    spread[0] = 0  # a direction without any spread
    ones = [(m, (basis * s.square()) @ basis.T) for m, s in ((mean, spread), (mean2, spread2))]
    expected = float((mean - mean2).square().sum() + (spread - spread2).square().sum())
    # float64; a root of a rounded zero eigenvalue leaves 1e-8.
    assert abs(frechet(ones[0], ones[1]) - expected) < 1e-6
    assert abs(frechet(ones[1], ones[0]) - expected) < 1e-6
    assert abs(frechet(ones[0], ones[0])) < 1e-6


def test_frechet_of_gaussians_without_a_common_basis() -> None:
    """Against the trace of scipy's matrix root of the plain product S S'."""
    linalg = pytest.importorskip("scipy.linalg", reason="scipy is not installed")
    generator = np.random.default_rng(0)
    one, other = (generator.normal(size=(40, 6)) @ generator.normal(size=(6, 6)) for _ in range(2))
    covariances = [np.cov(x.T) for x in (one, other)]
    root = linalg.sqrtm(covariances[0] @ covariances[1]).real
    expected = ((one.mean(0) - other.mean(0)) ** 2).sum() + np.trace(covariances[0] + covariances[1] - 2 * root)
    found = frechet(moments(torch.from_numpy(one)), moments(torch.from_numpy(other)))
    assert abs(found - expected) < 1e-9 * max(1, expected)


def test_the_bootstrap_sees_chance() -> None:
    """More images, less of it; one image repeated has none."""
    features = torch.randn(400, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    reference = (torch.ones(5, dtype=torch.float64), torch.eye(5, dtype=torch.float64))
    assert 0 < frechet_spread(features, reference, 0) < frechet_spread(features[:40], reference, 0)
    # float64 alone.
    assert frechet_spread(features[:1].expand(40, -1), reference, 0) < 1e-9
