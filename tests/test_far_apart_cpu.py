"""Particles so far from the others that squares of their coordinates hold nothing of the distances that matter."""

import formulas
import pytest
import torch

import ivfast
from ivfast import testing

N, D = 30, 4
# Sums of a_ij (x_i − x_j) are computed as (Σ_j a_ij) x_i − Σ_j a_ij x_j in float64. With x about the columns' medians they
# lose EPS ‖x‖ where two far rows are near each other, and nothing elsewhere.
EPS = 64 * torch.finfo(torch.float64).eps


def outliers(x, far):
    return torch.cat((x[:3] * far, x[3:]))


def clusters(x, far):
    """Two clusters; the second, two thirds of the rows, is a thousandth as wide as it is far away."""
    third = len(x) // 3
    return torch.cat((x[:third], x[third:] * (1 + far * 1e-3) + far))


def tight(x, far):
    """A fifth of the rows are far away and close together; in float32 some coincide."""
    fifth = len(x) // 5
    return torch.cat((x[:fifth] * 2e-8 * far - far, x[fifth:]))


def drawn(place, far, dtype, n=N, d=D):
    """Particles, of which no two pairs near the median share it by rounding."""
    for _ in range(100):
        x = place(torch.randn(n, d, dtype=torch.float64), far).to(dtype)
        d2 = formulas.pair_distances(x.double(), "paper").sort().values[n * (n - 1) // 4 - 2 :][:5]
        if (d2.diff() > 1e-4 * d2[:-1]).all():
            return x
    raise AssertionError("no such particles")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("place", [outliers, clusters, tight])
def test_far_apart_particles(place, dtype, isa):
    compare("cpu", place, dtype, eps=EPS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("place", [outliers, clusters, tight])
def test_the_references_of_far_apart_particles(place, dtype):
    compare("reference", place, dtype, eps=EPS)


def compare(implementation, place, dtype, n=N, d=D, only=None, eps=0.0, device="cpu"):
    far = 10 ** float(torch.empty(()).uniform_(3, 12))
    x, y = drawn(place, far, dtype, n, d), drawn(place, far, dtype, n, d)
    score, h = torch.randn(n, d).to(dtype), torch.tensor(2.0 * d, dtype=torch.promote_types(dtype, torch.float32))
    bound = testing.TOLERANCES[dtype] + (0 if place is outliers else eps * far)
    calls = {
        "median": (lambda its, x: its.median_bandwidth(x, convention="paper"), (x,)),
        "direction": (lambda its, x, s, h: its.svgd_direction(x, s, bandwidth=h), (x, score, h)),
        "mmd": (lambda its, x, y: its.mmd(x, y), (x, y)),
        "rbf": (lambda its, x, y: its.mmd(x, y, kernel="rbf", bandwidth=3.0), (x, y)),
    }
    for name, (call, inputs) in calls.items():
        if only and name != only:
            continue
        ours = [t.to(device, copy=True).requires_grad_() for t in inputs]
        exact = [t.double().requires_grad_() for t in inputs]
        with ivfast.use(implementation):
            a, b = call(ivfast, *ours), call(formulas, *exact)
            weights = torch.randn_like(b)
            found = [g.cpu() for g in torch.autograd.grad(a, ours, weights.to(a))]
        wanted = torch.autograd.grad(b, exact, weights)
        # sums that may cancel, a difference of means and ∂h, are held against the size of their terms
        units = [
            1.0 if name in ("mmd", "rbf") else 0.0,
            *(0.0 if q.dim() else float((b.detach() * weights).norm()) / 8 for q in wanted),
        ]
        for p, q, unit in zip((a.cpu(), *found), (b, *wanted), units, strict=True):
            assert testing.error(p, q, unit) <= bound, (name, p.shape, far)


@pytest.mark.parametrize("height", [1.2e38, 3.3e38])
def test_rows_whose_sums_overflow(height, isa):
    """A constant column of numbers whose sum has no float32: nothing but −x depends on it."""
    x, y, score = torch.randn(N, D), torch.randn(N // 2, D), torch.randn(N, D)
    x[:, 1] = y[:, 1] = height
    compare_sums(lambda x: ivfast.median_bandwidth(x), x)
    compare_sums(lambda x: ivfast.svgd_direction(x, bandwidth=100.0), x, derivative=False)  # −x overflows in −x·∂φ
    compare_sums(lambda x, s: ivfast.svgd_direction(x, s, bandwidth=100.0), x, score)
    compare_sums(ivfast.mmd, x, y)


def compare_sums(call, *inputs, derivative=True):
    ours, exact = ([t.to(dtype).requires_grad_() for t in inputs] for dtype in (torch.float32, torch.float64))
    a, b = call(*ours), call(*exact)
    weights = torch.randn_like(b) / N
    found, wanted = [a], [b]
    if derivative and a.requires_grad:
        found += torch.autograd.grad(a, ours, weights.float())
        wanted += torch.autograd.grad(b, exact, weights)
    for p, q in zip(found, wanted, strict=True):
        assert testing.error(p.detach(), q.detach()) <= 2e-5


def test_the_slope_of_equal_particles_far_from_the_others(isa):
    """Groups of equal rows that do not see each other: φ does not depend on h, and all that a derivative in h can hold
    are differences of 0, not rounding of ‖x‖⁴/h²."""
    h = torch.tensor(1e6, requires_grad=True)
    rows = torch.nn.functional.normalize(torch.randn(8, 4, 63), dim=-1) * 1e4
    x, g = rows[:, torch.arange(13) % 4], torch.randn(8, 13, 63)
    phi = ivfast.svgd_direction(x, bandwidth=h)
    slope = torch.autograd.grad(phi, h, g)[0]
    assert abs(slope) * h**2 <= 1e-3 * (g * phi).detach().abs().sum()
