"""The C++ kernels of the Fréchet ops against float64 singular values: instruction sets, sizes, condition numbers,
threads."""

import pytest
import torch

import ivfast
from ivfast.ops.fld import fld_gram_reference, fld_reference
from ivfast.ops.inverse_root import CONVERGED, MOST, inverse_root_reference

pytest.importorskip("ivfast._C")

SHAPES = [(2, 1), (3, 1), (2, 3), (7, 7), (20, 40), (40, 300), (100, 32), (513, 17), (1000, 16), (1500, 128), (3000, 5)]
# for the gradient: rounding of the results, and in float32 products with a condition number up to 100
GRADIENT = {torch.float64: 1e-9, torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
dtypes = pytest.mark.parametrize("dtype", GRADIENT, ids=str)


def error(result, expected):
    result = result.detach()
    return float((result.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-300))


@dtypes
@pytest.mark.parametrize(("n", "d"), SHAPES)
@pytest.mark.usefixtures("poisoned")
def test_distance_and_gradient(isa, n, d, dtype):
    z = (torch.randn(2, n, d) * (0.5 + torch.rand(d)) + torch.randn(d)).to(dtype)
    distance, gradient, left = torch.ops.ivfast.fld_gram(z, True)
    expected, slope = fld_reference(z.double(), True)
    assert error(distance, expected) < (1e-12 if dtype == torch.float64 else 1e-6)
    assert error(gradient, slope) < GRADIENT[dtype]
    assert bool((left <= CONVERGED).all())
    assert gradient.dtype == dtype
    value, none, _ = torch.ops.ivfast.fld_gram(z, False)
    assert torch.equal(value, distance)
    assert none.numel() == 0


@pytest.mark.parametrize("n", [64, 200, 1000, 10_000])
def test_float32_keeps_five_digits_of_a_small_distance(isa, n):
    """z ~ N(0, I): the distance is a small difference of sums of size 128."""
    z = torch.randn(n, 128)
    assert error(ivfast.fld(z), fld_reference(z.double(), False)[0]) < 2e-6


@pytest.mark.parametrize("condition", [1, 1e2, 1e4, 1e6, 1e8, 1e10, 1e12, 1e16])
@pytest.mark.parametrize(("n", "d"), [(200, 30), (31, 30), (30, 30), (12, 30)])
def test_every_condition(condition, n, d):
    """Condition numbers beyond 10⁸ use singular values."""
    z = torch.randn(3, n, d, dtype=torch.float64) * torch.logspace(0, -0.5, d, base=condition, dtype=torch.float64)
    z[1] = torch.randn(n, d)
    z.requires_grad_()
    distance = ivfast.fld(z)
    (gradient,) = torch.autograd.grad(distance.sum(), z)
    expected, slope = fld_reference(z.detach(), True)
    assert error(distance, expected) < 1e-12
    # a Gram matrix is rounded by 1e-16 of its largest eigenvalue; P has size 1 in every direction
    assert (gradient - slope).abs().max() < 1e-7 / n
    assert error(gradient[1], slope[1]) < 1e-9


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_collapsed_codes(dtype):
    for z in (
        torch.full((5, 3), 2.0),
        torch.zeros(2, 1),
        torch.randn(2, 6).repeat(4, 1),
        torch.randn(40, 1) * torch.ones(7),
    ):
        z = z.to(dtype).requires_grad_()
        distance = ivfast.fld(z)
        (gradient,) = torch.autograd.grad(distance, z)
        expected, slope = fld_reference(z.detach().double(), True)
        assert error(distance, expected) < 1e-6
        assert (gradient - slope).abs().max() < 1e-5


@pytest.mark.parametrize("scale", [1e-30, 1e-15, 1e15, 1e30])
def test_far_scales(isa, scale):
    z = torch.randn(50, 6)
    ours = torch.ops.ivfast.fld_gram(z * scale, True)
    expected, slope = fld_reference((z * scale).double(), True)
    assert torch.allclose(ours[0].double(), expected.float().double(), rtol=1e-6)  # infinity at 1e30
    assert error(ours[1], slope) < 2e-6


def test_far_mean(isa):
    z = torch.randn(300, 20) + 1e4
    distance, gradient, _ = torch.ops.ivfast.fld_gram(z, True)
    expected, slope = fld_reference(z.double(), True)
    assert error(distance, expected) < 1e-6
    assert error(gradient, slope) < 1e-6
    centred = gradient.double() - gradient.double().mean(0), slope - slope.mean(0)
    assert error(*centred) < 1e-2  # the rounding of gradients of size 2μ/n; 4e-3 observed


def test_not_finite_stays_in_its_set():
    z = torch.randn(4, 9, 3)
    z[1, 2, 0], z[2, 0, 1] = torch.nan, torch.inf
    z.requires_grad_()
    distance = ivfast.fld(z)
    (gradient,) = torch.autograd.grad(distance.sum(), z)
    assert distance.isnan().tolist() == [False, True, True, False]
    assert torch.equal(distance[[0, 3]], ivfast.fld(z[[0, 3]]))
    assert bool(gradient[[0, 3]].isfinite().all())
    assert bool(gradient[[1, 2]].isnan().all())


def test_bits_do_not_depend_on_threads(threads):
    z = torch.randn(3000, 128)
    results = []
    for count in (1, 2, 3):
        threads(count)
        results.append(torch.ops.ivfast.fld_gram(z, True))
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_wide_and_large_are_refused():
    with pytest.raises(RuntimeError, match="min\\(n, d\\) <= 128"):
        torch.ops.ivfast.fld_gram(torch.randn(MOST + 1, MOST + 1), False)
    with pytest.raises(RuntimeError, match="d <= 128"):
        torch.ops.ivfast.inverse_root(torch.eye(MOST + 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("d", [1, 2, 5, 16, 31, 64, 100, 128])
@pytest.mark.usefixtures("poisoned")
def test_inverse_root(isa, d, dtype):
    factor = torch.randn(3, d, 2 * d, dtype=torch.float64)
    a = (factor @ factor.mT).to(dtype)
    inverse, trace, left = torch.ops.ivfast.inverse_root(a)
    values, V = torch.linalg.eigh(a.double())
    rounding = 1e-12 if dtype == torch.float64 else 1e-7
    assert error(inverse, (V / values.sqrt().unsqueeze(-2)) @ V.mT) < rounding
    assert error(trace, values.sqrt().sum(-1)) < rounding
    assert bool((left <= CONVERGED).all())


@pytest.mark.parametrize("gram", [torch.ops.ivfast.fld_gram, fld_gram_reference])
@pytest.mark.parametrize(("n", "d"), [(40, 8), (8, 40), (7, 2), (130, 100)])
def test_gradients_in_float64_are_off_by_rounding_alone(isa, gram, n, d):
    """The truncation of the iteration does not show where the condition number is at most 2."""
    samples, rank = torch.randn(n, d, dtype=torch.float64), min(n - 1, d)
    U, _, Vh = torch.linalg.svd(samples - samples.mean(0), full_matrices=False)
    U, Vh, S = U[:, :rank], Vh[:rank], 1.5 + torch.rand(rank, dtype=torch.float64) / 2
    gradient = gram((n - 1) ** 0.5 * (U * S) @ Vh, True)[1]
    assert error(gradient, 2 / (n - 1) ** 0.5 * (U * (S - 1)) @ Vh) < 2e-14


def test_inverse_root_says_where_it_does_not_serve():
    a = torch.diag_embed(torch.tensor([[1.0, 1e-9, 1.0], [1.0, 0.0, 2.0], [1.0, 2.0, 3.0]], dtype=torch.float64))
    inverse, _, left = torch.ops.ivfast.inverse_root(a)
    assert (left > CONVERGED).tolist() == [True, True, False]
    assert inverse.isnan().flatten(1).all(1).tolist() == [True, True, False]


@pytest.mark.parametrize("condition", [1, 1e4, 1e8, 1e10])
def test_references(condition):
    """The same by the products that kernels use."""
    z = torch.randn(2, 60, 9, dtype=torch.float64) * torch.logspace(0, -0.5, 9, base=condition, dtype=torch.float64)
    expected, slope = fld_reference(z, True)
    distance, gradient, left = fld_gram_reference(z, True)
    assert error(distance, expected) < 1e-9
    assert (gradient - slope).abs().max() < 1e-5 / 60
    assert bool((left <= CONVERGED).all())
    singular = torch.diag_embed(torch.tensor([1.0, 0.0, 4.0], dtype=torch.float64))
    inverse, trace, left = inverse_root_reference(singular)
    assert float(trace) == pytest.approx(3)
    assert bool(inverse.isfinite().all())
    assert float(left) > CONVERGED


def test_the_mean_does_not_round_what_is_subtracted(isa):
    """Two codes in one dimension, close together and far from 0: P is ±1/√2, of which a rounded mean leaves 10 digits."""
    z = torch.randn(8, 1, 1, dtype=torch.float64) + 1e-5 * torch.randn(8, 2, 1, dtype=torch.float64)
    gradient = torch.ops.ivfast.fld_gram(z, True)[1]
    difference = z[:, :1] - z[:, 1:]
    c = torch.cat((difference, -difference), 1) / 2
    expected = z.mean(1, keepdim=True) + 2 * (c - 0.5**0.5 * c.sign())
    assert (gradient - expected).abs().max() < 1e-14
