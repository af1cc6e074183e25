"""MMD against published formulas, on fresh random inputs."""

import pytest
import torch

import ivfast
from ivfast.testing import error

DOUBLE = torch.float64


def normal(*shape, dtype=DOUBLE):
    return torch.randn(*shape, dtype=dtype)


def test_mmd_agrees_with_waes_formula():
    """WAE's published loop over scales for a standard normal prior: C = 2 d s, off-diagonal means minus twice the cross."""
    n, d = 20, 5
    x, y = normal(n, d), normal(n, d)
    expected = 0.0
    for s in (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0):
        c = 2 * d * s
        xx, yy, xy = (c / (c + torch.cdist(a, b).square()) for a, b in ((x, x), (y, y), (x, y)))
        off = 1 - torch.eye(n, dtype=DOUBLE)
        expected += ((xx + yy) * off).sum() / (n * (n - 1)) - 2 * xy.mean()
    assert error(ivfast.mmd(x, y), expected) < 1e-9


def test_mmd_agrees_with_waes_rbf_form():
    """exp(−r²/(2σ²)) with σ² from the batch's own distances, as in its code: a single bandwidth."""
    n, d = 24, 6
    x, y = normal(n, d), normal(n, d) + 0.5
    half = (n * n - n) // 2
    xx, yy, xy = (torch.cdist(a, b).square() for a, b in ((x, x), (y, y), (x, y)))
    sigma2 = sum(r2.flatten().topk(half).values[half - 1] for r2 in (xy, xx))
    off = 1 - torch.eye(n, dtype=DOUBLE)
    within = ((torch.exp(-xx / 2 / sigma2) + torch.exp(-yy / 2 / sigma2)) * off).sum() / (n * n - n)
    expected = within - torch.exp(-xy / 2 / sigma2).sum() * 2 / (n * n)
    assert error(ivfast.mmd(x, y, kernel="rbf", bandwidth=2 * sigma2), expected) < 1e-9


@pytest.mark.parametrize("kernel", ["imq", "rbf"])
def test_mmd_agrees_with_pythaes_formula(kernel):
    """pythae's WAE_MMD: C = 2 d h² with its kernel_bandwidth h, scales only for its IMQ, diagonals removed."""
    n, d, h, scales = 20, 5, 0.7, (0.1, 0.3, 2.0, 4.0)
    x, y = normal(n, d), normal(n, d)
    c = 2 * d * h**2

    def gram(a, b):
        r2 = torch.norm(a[:, None] - b[None], dim=-1) ** 2
        return sum(s * c / (s * c + r2) for s in scales) if kernel == "imq" else torch.exp(-r2 / c)

    within = sum((k - k.diag().diag()).sum() / ((n - 1) * n) for k in (gram(x, x), gram(y, y)))
    expected = within - 2 * gram(x, y).sum() / n**2
    ours = ivfast.mmd(x, y, kernel=kernel, scales=scales if kernel == "imq" else None, bandwidth=c)
    assert error(ours, expected) < 1e-9


def test_mmds_median_is_the_pooled_samples():
    x, y = normal(3, 9, 4), normal(3, 12, 4) + 1
    pooled = [torch.pdist(torch.cat(pair)).sort().values for pair in zip(x, y, strict=True)]
    b = torch.stack([((p[(len(p) - 1) // 2] + p[len(p) // 2]) / 2).square() for p in pooled])
    for kernel in ("imq", "rbf"):
        ours = ivfast.mmd(x, y, kernel=kernel, bandwidth="median")
        assert error(ours, ivfast.mmd(x, y, kernel=kernel, bandwidth=b)) < 1e-9


def test_mmd_of_one_sample_with_itself_is_zero_and_of_two_distributions_is_not():
    x = normal(50, 4)
    assert abs(float(ivfast.mmd(x, x, unbiased=False))) < 1e-12
    assert float(ivfast.mmd(x, x + 3, unbiased=False)) > 0.5
    assert error(ivfast.mmd(x, x + 3), ivfast.mmd(x + 3, x)) < 1e-10
    values = torch.stack([ivfast.mmd(normal(40, 3), normal(40, 3), kernel="rbf", bandwidth=3.0) for _ in range(400)])
    assert abs(float(values.mean())) < 4 * float(values.std()) / 20  # unbiased


@pytest.mark.parametrize("use", ["reference", "cpu"])
def test_gradients_of_far_samples_do_not_cancel(use):
    """At 1,000 bandwidths the slope of a pair is 1e-12 of that of a sample with itself, whose distance is always 0."""
    if use == "cpu":
        pytest.importorskip("ivfast._C")
    x, y = (normal(4, 3) * 1e3 for _ in range(2))
    x.requires_grad_()
    xx, xy = ((x.unsqueeze(1) - z).square().sum(-1) for z in (x, y))
    k_xx, k_xy = (1 / (1 + d2) for d2 in (xx, xy))
    plain = (k_xx.sum() - 4) / 12 - 2 * k_xy.mean()
    with ivfast.use(use):
        value = ivfast.mmd(x, y, scales=(1.0,), bandwidth=1.0)
        (gradient,) = torch.autograd.grad(value, x)
    assert error(gradient, torch.autograd.grad(plain, x)[0]) < 1e-11
