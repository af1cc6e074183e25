"""The exponential ELBO in Triton, interpreted if there is no GPU."""

import pytest
import torch
from helpers import assert_as_reference, assert_strides_are_read, batch, cases

import ivfast
from ivfast import testing
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
wide = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)


class TestExpElbo:
    @dtypes
    @cases("exp_elbo_loss")
    def test_cases(self, case, dtype):
        check(case, dtype)

    @dtypes
    @pytest.mark.parametrize("n", [1, 2, 37, 1024, 2500])
    @pytest.mark.parametrize("left_out", [None, "beta_reconstruction", "beta_kl"])
    def test_sizes(self, n, left_out, dtype):
        shape = (*batch(), n)
        factors = {"scale": 0.3, "beta_reconstruction": 0.7, "beta_kl": 1.1, "alpha": 1.7}
        factors |= {} if left_out is None else {left_out: 0.0}

        def loss(reconstruction, kl):
            return ivfast.exp_elbo_loss(reconstruction, kl, **factors)

        check(Case("exp_elbo_loss", str(shape), loss, testing._positive(shape, shape, scale=3)), dtype)

    def test_strides(self):
        assert_strides_are_read(ivfast.exp_elbo_loss, [torch.rand(2, 9, 5, device=device).mT for _ in range(2)])

    @wide
    def test_extremes(self, dtype):
        inf, nan = float("inf"), float("nan")
        values = torch.tensor([0.0, 1e4, -1e4, -20.0, -20.1, -19.9, inf, -inf, nan], dtype=dtype, device=device)
        reconstruction, kl = (x.reshape(-1, 1) for x in torch.meshgrid(values, values, indexing="ij"))
        for factors in ({}, {"beta_kl": 0.0}, {"beta_reconstruction": 0.0}, {"scale": 0.0}):

            def loss(reconstruction, kl, factors=factors):
                return ivfast.exp_elbo_loss(reconstruction, kl, **factors)

            # e^80 is accurate to 80 eps
            value, _, _ = assert_as_reference(loss, reconstruction, kl, rtol=1e-4 if dtype == torch.float32 else 1e-10)
            assert value.isnan().any() == (factors.get("scale") != 0)

    def test_no_sets(self):
        empty = torch.empty(2, 0, 4, device=device)
        value, *gradients = assert_as_reference(ivfast.exp_elbo_loss, empty, empty)
        assert value.shape == (2, 0)
        assert all(g.shape == empty.shape for g in gradients)


def reconstruction(kind: str):
    return lambda x, t: ivfast.reconstruction_loss(x, t, kind=kind)
