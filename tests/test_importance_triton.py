"""The importance-weighted loss in Triton, interpreted if there is no GPU."""

import pytest
import torch
from helpers import assert_as_reference, assert_strides_are_read, batch, cases, normal

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


class TestImportance:
    @dtypes
    @cases("importance_weighted_loss")
    def test_cases(self, case, dtype):
        check(case, dtype)

    @dtypes
    @pytest.mark.parametrize("n", [1, 2, 37, 1024, 2500])
    def test_sizes(self, n, dtype):
        shape = (*batch(), n)
        check(Case("importance", str(shape), ivfast.importance_weighted_loss, normal(shape, scale=4)), dtype)

    def test_strides(self):
        assert_strides_are_read(ivfast.importance_weighted_loss, [torch.randn(2, 9, 5, device=device).mT])

    @wide
    def test_equal_logits_keep_their_digits(self, dtype):
        # log σ(20) is −2e-9, negligible next to 1
        for logit in (-1e4, -50.0, -1.0, 0.0, 1.0, 20.0, 80.0):
            logits = torch.full((5,), logit, dtype=dtype, device=device)
            # e^−80 is accurate to 80 eps
            assert_as_reference(ivfast.importance_weighted_loss, logits, rtol=200 * torch.finfo(dtype).eps)

    @wide
    def test_extremes(self, dtype):
        for values in ((1e4, -1e4, 0.0), (-1e4, -1e4), (float("-inf"), 0.0), (float("inf"), 0.0), (float("-inf"),)):
            assert_as_reference(ivfast.importance_weighted_loss, torch.tensor(values, dtype=dtype, device=device))

    def test_nan_stays_in_its_set(self):
        x = torch.randn(2, 5, device=device)
        x[1, 3] = float("nan")
        loss, gradient = assert_as_reference(ivfast.importance_weighted_loss, x)
        assert loss.isnan().tolist() == [False, True]
        assert gradient.isnan().sum(-1).tolist() == [0, 5]

    def test_no_sets(self):
        loss, gradient = assert_as_reference(ivfast.importance_weighted_loss, torch.empty(0, 4, device=device))
        assert loss.shape == (0,)
        assert gradient.shape == (0, 4)
