"""Gaussian posteriors in Triton, interpreted if there is no GPU."""

import math

import pytest
import torch
from helpers import batch, cases, normal, size

import ivfast
from ivfast import testing
from ivfast.ops import gaussian as gaussian_op
from ivfast.testing import Case

HALF = (torch.bfloat16, torch.float16)
DTYPES = (torch.float64, torch.float32, *HALF)
device = "cuda" if torch.cuda.is_available() else "cpu"  # interpreted on the CPU: tests/conftest.py
pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.filterwarnings(
        "ignore:(overflow|invalid value) encountered:RuntimeWarning"
    ),  # in the interpreter's NumPy
]


def check(case: Case, dtype: torch.dtype = torch.float32):
    testing.check(case, testing.inputs(case, dtype, device=device), "triton")


dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def gaussian(function: str):
    """gaussian_kl, reparameterize, or one of its outputs."""
    if function == "gaussian_kl":
        return lambda mu, logvar, e: ivfast.gaussian_kl(mu, logvar)
    if function == "reparameterize":
        return lambda mu, logvar, e: ivfast.reparameterize(mu, logvar, draws=e)
    return lambda mu, logvar, e: getattr(ivfast.reparameterize(mu, logvar, draws=e), function)


functions = pytest.mark.parametrize("function", ["gaussian_kl", "reparameterize", "z", "kl"])


class TestGaussian:
    @dtypes
    @cases("gaussian_kl")
    def test_kl(self, case, dtype):
        check(case, dtype)

    @dtypes
    @cases("reparameterize")
    def test_reparameterize(self, case, dtype):
        check(case, dtype)

    @functions
    @dtypes
    def test_random_sizes(self, function, dtype):
        for d in (1, size(2, 70), size(2, 70)):
            shape = (*batch(), size(1, 40), d)
            check(Case(function, str(shape), gaussian(function), normal(shape, shape, shape), constants=1), dtype)

    @functions
    def test_edges(self, function):
        for shape in ((1,), (5,), (1, 1), (2, 3000), (1030, 1), (3, 1024)):
            check(Case(function, str(shape), gaussian(function), normal(shape, shape, shape), constants=1))

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
    def test_near_the_prior(self, dtype):
        # logvar only, across the boundary of the series and down to where only its square matters
        powers = [0.5**k for k in range(40 if dtype == torch.float64 else 20)]
        logvar = torch.tensor([[s * x] for x in (*powers, 0.499, 0.501, 0.03) for s in (-1, 1)], dtype=dtype)
        logvar = logvar.to(device).requires_grad_()
        mu = torch.zeros_like(logvar)
        with ivfast.use("triton"):
            kl = ivfast.gaussian_kl(mu, logvar)
            (gradient,) = torch.autograd.grad(kl.sum(), logvar)
        x = logvar.detach().double().cpu()
        expected = x.new_tensor([sum(v**k / math.factorial(k) for k in range(30, 1, -1)) / 2 for v in x[:, 0].tolist()])
        relative = (kl.detach().double().cpu() - expected).abs() / expected
        # e^x − 1 − x loses a digit at the boundary x = −½
        assert float(relative.max()) < 16 * torch.finfo(dtype).eps
        relative = (gradient.double().cpu() - 0.5 * x.expm1())[:, 0] / (0.5 * x.expm1())[:, 0]
        assert float(relative.abs().max()) < 16 * torch.finfo(dtype).eps

    @functions
    def test_strides(self, function):
        mu, logvar, draws = (torch.randn(2, 12, 9, device=device).mT for _ in range(3))
        mu, logvar = mu.requires_grad_(), logvar.requires_grad_()
        results = []
        for implementation, dtype in (("triton", torch.float32), ("reference", torch.float64)):
            with ivfast.use(implementation):
                out = testing.outputs(gaussian(function)(mu.to(dtype), logvar.to(dtype), draws.to(dtype)))
                weights = [torch.linspace(-1, 1, o.numel()).to(o).view(o.shape[::-1]) for o in out]
                weights = [w.permute(*range(w.dim())[::-1]) for w in weights]
                results.append([*out, *torch.autograd.grad(out, (mu, logvar), weights, allow_unused=True)])
                # an expanded gradient
                out = testing.outputs(gaussian(function)(mu.to(dtype), logvar.to(dtype), draws.to(dtype)))
                results[-1] += torch.autograd.grad([o.sum() for o in out], (mu, logvar))
        for ours, theirs in zip(*results, strict=True):
            assert testing.error(ours.cpu(), theirs.cpu()) <= testing.TOLERANCES[torch.float32]

    def test_the_gradient_of_z_is_copied(self):
        dz = torch.randn(3, 4, device=device)
        with ivfast.use("triton"):
            dmu, _ = gaussian_op._reparameterize_backward(dz, None, *torch.randn(3, 3, 4, device=device))
        assert torch.equal(dmu, dz)
        assert dmu.data_ptr() != dz.data_ptr()

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
    def test_extremes(self, dtype):
        inf, nan = float("inf"), float("nan")
        values = torch.tensor([0.0, 1e4, -1e4, inf, -inf, nan], dtype=dtype, device=device)
        mu, logvar = (x.reshape(-1, 1) for x in torch.meshgrid(values, values, indexing="ij"))
        mu, logvar = mu.contiguous().requires_grad_(), logvar.contiguous().requires_grad_()
        results = []
        for implementation in ("triton", "reference"):
            with ivfast.use(implementation):
                z, kl = ivfast.reparameterize(mu, logvar, draws=torch.ones_like(mu))
                gradients = [torch.autograd.grad(o.sum(), (mu, logvar), retain_graph=True) for o in (z, kl)]
                results.append([z, kl, *gradients[0], *gradients[1]])
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0, equal_nan=True)
        assert results[0][1].reshape(6, 6)[5].isnan().all()
        assert results[0][1].reshape(6, 6)[:, 5].isnan().all()

    @functions
    def test_no_posteriors_and_no_dimensions(self, function):
        for shape in ((0, 4), (2, 0, 3), (3, 0)):
            mu, logvar = (torch.empty(shape, device=device, requires_grad=True) for _ in range(2))
            with ivfast.use("triton"):
                out = testing.outputs(gaussian(function)(mu, logvar, torch.empty(shape, device=device)))
                gradients = torch.autograd.grad([o.sum() for o in out], (mu, logvar))
            assert all(g.shape == mu.shape for g in gradients)
            assert all((o == 0).all() for o in out)
