"""Fréchet distances by matrix products, the route of a GPU, run here on the CPU: accuracy, bounds, and no waiting."""

import mpmath
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import ivfast
from ivfast.ops import fld, frechet, polar_products
from ivfast.ops.frechet_error import bounded_frechet_distance
from ivfast.ops.frechet_products import covariance_trace_by_products, factor_trace_by_products
from ivfast.ops.polar_products import nuclear_by_products
from ivfast.testing import error

DOUBLE = torch.float64
WAITS = (
    "_local_scalar_dense",
    "item",
    "nonzero",
    "is_nonzero",
    "equal",
    "masked_select",
    "eig",
    "svd",
    "lstsq",
    "inv_ex",
)


class NothingWaits(TorchDispatchMode):
    """Refuses every operator with which the host waits for a GPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert not any(word in name for word in WAITS), name
        if "cholesky" in name:
            assert name == "linalg_cholesky_ex", name
            assert not (kwargs or {}).get("check_errors", False), name
        return func(*args, **(kwargs or {}))


@pytest.fixture
def on_gpu(monkeypatch):
    """The compositions take CPU tensors for those of a GPU."""
    for module in (frechet, fld):
        monkeypatch.setattr(module, "waits", lambda x: True)


def normal(*shape):
    return torch.randn(*shape, dtype=DOUBLE)


def basis(d):
    return torch.linalg.qr(normal(d, d))[0]


def covariance(values):
    Q = basis(len(values))
    sigma = (Q * values) @ Q.mT
    return (sigma + sigma.mT) / 2


def spectrum(d, decades):
    return torch.logspace(0, -decades, d, dtype=DOUBLE)


def gram(rank, d):
    c = normal(rank, d)
    return c.mT @ c / rank


def in_float32(sigma):
    return sigma.float().double()  # its eigenvalues that are 0 become positive and negative ones of 1e-8


PAIRS = {
    "random": lambda d: (gram(2 * d, d), gram(3 * d, d)),
    "condition 1e12": lambda d: (covariance(spectrum(d, 12)), covariance(spectrum(d, 12))),
    "one of condition 1e12": lambda d: (covariance(spectrum(d, 12)), gram(2 * d, d)),
    "equal": lambda d: (gram(2 * d, d),) * 2,
    "equal, condition 1e12": lambda d: (covariance(spectrum(d, 12)),) * 2,
    "deficient": lambda d: (gram(d // 2, d), gram(2 * d, d)),
    "both deficient": lambda d: (gram(d // 2, d), gram(d // 3, d)),
    "equal and deficient": lambda d: (gram(d // 2, d),) * 2,
    "deficient in float32": lambda d: (in_float32(gram(d // 2, d)), gram(2 * d, d)),
    "both deficient in float32": lambda d: (in_float32(gram(d // 2, d)), in_float32(gram(d // 3, d))),
    "tiny": lambda d: (1e-200 * gram(2 * d, d), gram(2 * d, d)),
    "huge": lambda d: (1e150 * gram(2 * d, d), 1e-120 * gram(2 * d, d)),
    "zero": lambda d: (torch.zeros(d, d, dtype=DOUBLE), gram(2 * d, d)),
    "24 decades": lambda d: (covariance(spectrum(d, 24)), covariance(spectrum(d, 24))),
}


def size_of(sigma1, sigma2):
    """√(Tr Σ₁ Tr Σ₂), the largest value of the trace."""
    return sigma1.trace().clamp_min(0).sqrt() * sigma2.trace().clamp_min(0).sqrt()


def weighted(gradient, sigma):
    """√Σ ∂ √Σ, the gradient with respect to relative changes of Σ, which rounding leaves its digits."""
    root = frechet._root(sigma)[0]
    return root @ gradient @ root.mT


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("d", [6, 40, 130])
def test_trace_and_gradients_are_those_of_the_decompositions(name, d):
    pair = PAIRS[name](d)
    found = covariance_trace_by_products(*pair)
    trace, *gradients = frechet.frechet_covariance_trace_reference(*pair, True)
    size = float(size_of(*pair))
    # rounding of the root of the smallest eigenvalue that may count; those below count as 0 here, which changes √FLOOR
    floor = polar_products.FLOOR
    tolerance = 10 * floor**0.5 if name == "24 decades" else d * polar_products.EPS / floor**0.5
    assert abs(float(found.trace - trace)) <= tolerance * size
    for sigma, ours, theirs in zip(pair, (found.d1, found.d2), gradients, strict=True):
        assert float(weighted(ours - theirs, sigma).norm()) <= tolerance * size
    if "deficient" in name and "float32" not in name:
        assert error(found.d1, gradients[0]) < 1e-9  # the subgradient of least norm


def exact_trace(sigma1, sigma2):
    """Tr √(Σ₁Σ₂) with 60 digits: eigenvalues that are negative through rounding count as 0."""
    with mpmath.workdps(60):
        roots = []
        for sigma in (sigma1, sigma2):
            values, V = mpmath.eigsy(mpmath.matrix(sigma.tolist()))
            roots.append(V * mpmath.diag([mpmath.sqrt(max(v, 0)) for v in values]) * V.T)
        product = roots[0] * roots[1]
        found = mpmath.eigsy(product * product.T, eigvals_only=True)
        return float(mpmath.fsum(mpmath.sqrt(max(v, 0)) for v in found))


@pytest.mark.parametrize("name", [name for name in PAIRS if name != "huge"])
def test_error_bounds_hold_with_60_digits(name):
    pair = PAIRS[name](7)
    found = covariance_trace_by_products(*pair)
    exact, size = exact_trace(*pair), float(size_of(*pair))
    assert abs(float(found.trace) - exact) <= float(found.error)
    assert float(found.error) <= 5e-6 * size + 1e-300 + 1e-11 * (size == 0) * float(pair[1].norm())
    if name in ("random", "equal", "tiny"):
        assert float(found.error) <= 1e-12 * size


def test_the_distance_comes_with_its_bound():
    mu1, mu2 = normal(3, 5), normal(3, 5)
    sigma1, sigma2 = torch.stack([gram(2, 5) for _ in range(3)]), torch.stack([gram(9, 5) for _ in range(3)])
    found = bounded_frechet_distance(mu1, sigma1, mu2, sigma2)
    expected = ivfast.frechet_distance(mu1, sigma1, mu2, sigma2)
    # of the expected values, 1e-8: √ of the rounding of eigenvalues that are 0
    assert bool(((found.distance - expected).abs() <= found.error + 1e-7).all())
    assert bool((found.error < 1e-5).all())
    with pytest.raises(ValueError, match="sigma1 must have shape"):
        bounded_frechet_distance(mu1, sigma1[0], mu2, sigma2)


@pytest.mark.parametrize(
    ("n", "m", "d"), [(30, 20, 50), (20, 60, 50), (90, 60, 50), (300, 7, 20), (2, 2, 5), (9, 9, 1)]
)
def test_factors_have_the_trace_and_gradients_of_the_decompositions(n, m, d):
    """The first sample is 0, which may leave the factor below full rank; without it, the decompositions are exact."""
    c1, c2 = normal(2, n, d), normal(2, m, d)
    c1[..., 0, :] = 0
    for second in (c2, None):
        found = factor_trace_by_products(c1, second)
        trace, d1, d2 = frechet.frechet_factor_trace_reference(c1[..., 1:, :], second, True)
        assert error(found.trace, trace) < 1e-13
        assert bool(((found.trace - trace).abs() <= found.error + 1e-13 * trace).all())
        assert bool((found.error < 1e-9 * trace).all())
        assert error(found.d1[..., 1:, :], d1) < 1e-8
        assert float(found.d1[..., 0, :].abs().max()) < 1e-12
        if second is not None:
            assert error(found.d2, d2) < 1e-8


@pytest.mark.parametrize("decades", [0, 3, 8, 12])
@pytest.mark.parametrize(("p", "q"), [(1, 1), (9, 4), (60, 60), (20, 70)])
def test_polar_factors_by_products(p, q, decades):
    k = min(p, q)
    U, V, s = basis(p)[:, :k], basis(q)[:, :k], spectrum(k, decades)
    found = nuclear_by_products((U * s) @ V.mT)
    assert abs(float(found.norm - s.sum())) <= float(found.error) < 1e-10
    # rounding turns pairs of directions by eps / (s_i + s_j)
    off = (U.mT @ found.polar @ V - torch.eye(k, dtype=DOUBLE)) * (s.unsqueeze(1) + s)
    assert float(off.abs().max()) < 1e-13


def test_steps_are_a_step_function():
    x = torch.cat([torch.logspace(-18, 0, 20000, dtype=DOUBLE), torch.ones(1, dtype=DOUBLE)])
    y = x.clone()
    for a, b, c in polar_products.STEPS:
        y = a * y + b * y**3 + c * y**5
        assert float(y.max()) < 1.7
    assert float((y[x >= polar_products.FLOOR] - 1).abs().max()) < 1e-14
    assert float(y[x < polar_products.FLOOR / 6].abs().max()) < 1e-10
    assert float(y.max()) < 1 + 1e-15


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_stays_in_its_matrix(bad):
    sigma1, sigma2 = (torch.stack([gram(9, 5) for _ in range(3)]) for _ in range(2))
    clean = covariance_trace_by_products(sigma1, sigma2)
    sigma1[1, 2, 3] = bad
    found = covariance_trace_by_products(sigma1, sigma2)
    c = normal(3, 4, 6)
    c[1, 2, 3] = bad
    for result in (found, factor_trace_by_products(c, None), factor_trace_by_products(normal(3, 9, 6), c)):
        for x in result[:3]:
            if x.numel():
                assert bool(x[1].isnan().all())
                assert bool(x[::2].isfinite().all())
    for x, y in zip(found, clean, strict=True):
        torch.testing.assert_close(x[::2], y[::2])


def test_a_bound_that_is_not_met_gives_nan(monkeypatch):
    """Steps that stop too early, and steps that overshoot."""
    sigma1, sigma2 = covariance(spectrum(30, 2)), covariance(spectrum(30, 2))
    for steps in (polar_products.STEPS[:2], polar_products.STEPS[:10] + polar_products.STEPS[-1:] * 3, [(3.0, 0, 0)]):
        monkeypatch.setattr(polar_products, "STEPS", steps)
        found = covariance_trace_by_products(sigma1, sigma2)
        assert bool(found.trace.isnan()), steps
        assert bool(found.d1.isnan().all()), steps
        assert bool(factor_trace_by_products(sigma1, sigma2).trace.isnan()), steps


@pytest.mark.parametrize(("n", "d"), [(300, 150), (140, 200), (50, 9)])
def test_public_functions_do_not_wait_and_agree_with_the_cpu(n, d, on_gpu):
    x, y = normal(n, d).requires_grad_(), normal(n + 3, d).requires_grad_()
    sigma, other = (torch.cov(z.detach().mT).requires_grad_() for z in (x, y))

    def everything():
        mu = torch.zeros(d, dtype=DOUBLE)
        values = [
            ivfast.frechet_distance(mu, sigma, mu, other),
            ivfast.frechet_distance_from_samples(x, y),
            ivfast.fld(x),
            ivfast.fld(x.float()).double(),
        ]
        return values, torch.autograd.grad(sum(values), (x, y, sigma, other))

    with NothingWaits():
        values, gradients = everything()
        bounded_frechet_distance(x[0].detach(), sigma.detach(), y[0].detach(), other.detach())
    with ivfast.use("reference"):
        expected, slopes = everything()
    for ours, theirs in zip((*values, *gradients), (*expected, *slopes), strict=True):
        assert error(ours, theirs) < 1e-6  # fld of float32


def test_shapes_alone_determine_what_is_computed():
    """Tensors without values pass."""
    a, b = torch.empty(2, 20, 5, dtype=DOUBLE, device="meta"), torch.empty(2, 4, 5, dtype=DOUBLE, device="meta")
    assert factor_trace_by_products(a, b).d1.shape == (2, 20, 5)
    assert factor_trace_by_products(b, None).d1.shape == (2, 4, 5)
    sigma = torch.empty(2, 600, 600, dtype=DOUBLE, device="meta")
    assert covariance_trace_by_products(sigma, sigma).d2.shape == sigma.shape


def test_codes_that_the_kernel_does_not_resolve_are_off_by_what_is_documented():
    for values in (spectrum(20, 9), torch.tensor([1.0] + [1e-7] * 19, dtype=DOUBLE), spectrum(20, 3) > 0.1):
        z = normal(60, 20) * values
        share = 2 * 20 * 3e-7 * float(torch.linalg.matrix_norm(frechet.factor(z)[1]))
        assert abs(float(fld.fld_gram_reference(z, False)[0] - fld.fld_reference(z, False)[0])) <= share
