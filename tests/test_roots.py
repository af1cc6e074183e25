"""Square roots and polar factors: definitions, singular matrices, gradients by an independent method, errors."""

import pytest
import torch

import ivfast
from ivfast.ops.inverse_root import inverse_root


def error(result, expected):
    result, expected = result.detach(), expected.detach()
    return float((result - expected).norm() / expected.norm().clamp_min(1e-300))


def spd(d, condition=10.0, batch=(3,)):
    Q = torch.linalg.qr(torch.randn(*batch, d, d, dtype=torch.float64))[0]
    values = torch.logspace(0, -1, d, base=condition, dtype=torch.float64)
    a = (Q * values) @ Q.mT
    return (a + a.mT) / 2


@pytest.mark.parametrize("condition", [1, 1e3, 1e6, 1e9, 1e12])
@pytest.mark.parametrize("d", [1, 2, 7, 64, 128, 150])
def test_a_root_squares_to_its_matrix(d, condition):
    a = spd(d, condition)
    root = ivfast.sqrtm_spd(a)
    assert error(root @ root, a) < 1e-13
    assert error(root, root.mT) < 1e-14
    assert float(torch.linalg.eigvalsh(root).min()) > -1e-12
    single = a.float()
    assert error(ivfast.sqrtm_spd(single).double(), ivfast.sqrtm_spd(single.double())) < 1e-7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_eigenvalues_that_rounding_made_negative_count_as_0(dtype):
    a = torch.diag_embed(torch.tensor([2.0, 1.0, 1.0, -(2.0**-20)], dtype=dtype)).expand(2, 4, 4)
    expected = torch.diag(torch.tensor([2.0**0.5, 1, 1, 0], dtype=torch.float64)).expand(2, 4, 4)
    for matrices in (a, a.clone().requires_grad_()):
        assert error(ivfast.sqrtm_spd(matrices).double(), expected) < torch.finfo(dtype).eps


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_singular_matrices_have_roots(rank):
    factor = torch.randn(2, 6, rank, dtype=torch.float64)
    a = factor @ factor.mT
    root = ivfast.sqrtm_spd(a)
    assert error(root @ root, a) < 1e-12
    a.requires_grad_()
    (gradient,) = torch.autograd.grad(ivfast.sqrtm_spd(a).sum(), a)
    assert bool(gradient.isfinite().all())


def test_only_the_symmetric_part_counts():
    a = spd(5)
    skew = torch.randn(3, 5, 5, dtype=torch.float64)
    assert error(ivfast.sqrtm_spd(a + skew - skew.mT), ivfast.sqrtm_spd(a)) < 1e-12


def test_the_gradient_of_a_root_solves_lyapunov():
    a, G = spd(8).requires_grad_(), torch.randn(3, 8, 8, dtype=torch.float64)
    root = ivfast.sqrtm_spd(a)
    (D,) = torch.autograd.grad(root, a, G)
    assert error((root @ D + D @ root), (G + G.mT) / 2) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lower_precision_comes_back_rounded_once(dtype):
    a = spd(9).to(dtype)
    root = ivfast.sqrtm_spd(a)
    assert root.dtype == dtype
    assert error(root.double(), ivfast.sqrtm_spd(a.double())) < 2 * torch.finfo(dtype).eps
    m = torch.randn(5, 3).to(dtype)
    assert ivfast.polar(m).dtype == dtype
    assert error(ivfast.polar(m).double(), ivfast.polar(m.double())) < 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize(("p", "q"), [(1, 1), (5, 5), (9, 4), (4, 9), (1, 6), (200, 150)])
def test_a_polar_factor_is_orthonormal_and_leaves_a_symmetric_rest(p, q):
    m = torch.randn(2, p, q, dtype=torch.float64)
    P = ivfast.polar(m)
    eye = torch.eye(min(p, q), dtype=torch.float64).expand(2, -1, -1)
    assert error(P.mT @ P if p >= q else P @ P.mT, eye) < 1e-12
    H = P.mT @ m
    assert error(H, H.mT) < 1e-12
    assert float(torch.linalg.eigvalsh(H).min()) > -1e-10


@pytest.mark.parametrize(("p", "q"), [(5, 5), (9, 4), (4, 9)])
def test_a_polar_factor_is_the_gradient_of_the_nuclear_norm(p, q):
    m = torch.randn(p, q, dtype=torch.float64).requires_grad_()
    (gradient,) = torch.autograd.grad(torch.linalg.svdvals(m).sum(), m)
    assert error(ivfast.polar(m), gradient) < 1e-12


def test_polar_factors_below_full_rank():
    left, right = torch.randn(7, 2, dtype=torch.float64), torch.randn(2, 5, dtype=torch.float64)
    m = (left @ right).requires_grad_()
    P = ivfast.polar(m)
    assert error(P @ P.mT @ P, P.detach()) < 1e-12
    assert float(P.detach().square().sum()) == pytest.approx(2)
    # along directions that keep the rank: the derivative through the factors
    step = 1e-6 * (torch.randn(7, 2, dtype=torch.float64) @ right)
    weights = torch.randn(7, 5, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(P, m, weights)
    ahead, behind = ((ivfast.polar((m + s * step).detach()) * weights).sum() for s in (1, -1))
    assert float((gradient * step).sum()) == pytest.approx(float(ahead - behind) / 2, rel=1e-5, abs=1e-10)
    assert bool(ivfast.polar(torch.zeros(3, 2)).eq(0).all())


def test_inverse_root_is_an_operator():
    torch.library.opcheck(inverse_root.default, (spd(6).float(),))


@pytest.mark.parametrize("bad", [torch.zeros(3), torch.zeros(2, 3), torch.zeros(2, 0, 0)])
def test_errors(bad):
    with pytest.raises(ValueError, match=r"a must have shape \[..., d, d\]"):
        ivfast.sqrtm_spd(bad)
    with pytest.raises(TypeError, match="a must"):
        ivfast.sqrtm_spd(torch.eye(3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"m must have shape \[..., p, q\]"):
        ivfast.polar(torch.zeros(4))


@pytest.mark.parametrize("function", [ivfast.sqrtm_spd, ivfast.polar], ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_matrix_that_is_not_finite_gives_nan_and_leaves_the_others(function, dtype):
    clean = spd(4).to(dtype)
    for bad in (float("nan"), float("inf")):
        for at in range(4):
            a = clean.clone()
            a[1, at, at] = bad
            root = function(a)
            assert root[1].isnan().all()
            torch.testing.assert_close(root[::2], function(clean)[::2])
            a.requires_grad_()
            (gradient,) = torch.autograd.grad(function(a).sum(), a)
            assert gradient[1].isnan().all()
            assert gradient[::2].isfinite().all()


def test_second_derivatives_at_a_singular_covariance_are_nan_and_first_ones_of_least_norm():
    mu, eye = torch.zeros(3, dtype=torch.float64), torch.eye(3, dtype=torch.float64)
    singular = torch.diag(torch.tensor([4.0, 0.0, 0.0], dtype=torch.float64))
    direction = spd(3, batch=())

    def distance(sigma):
        return ivfast.frechet_distance(mu, sigma, mu, eye)

    both = torch.stack([singular, spd(3, batch=())])
    assert torch.vmap(torch.func.hessian(distance))(both).isnan().flatten(1).all(1).tolist() == [True, False]
    # tr Σ − 2 tr √Σ has gradient I − Σ^−½ within the range
    expected = direction.trace() - direction[0, 0] / 2
    for slope in (
        torch.func.jvp(distance, (singular,), (direction,))[1],
        (torch.func.grad(distance)(singular) * direction).sum(),
    ):
        torch.testing.assert_close(slope, expected)
