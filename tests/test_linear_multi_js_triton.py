"""Rows of the multi-class Jensen–Shannon loss in Triton, for the linear layer, interpreted if there is no GPU."""

import pytest
import torch
from helpers import assert_close, cases, size

import ivfast
from ivfast import testing
from ivfast.ops import linear_multi_js
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


class TestMultiJsRows:
    def compare(self, classes, n, first, rows, dtype, *, weighted=False, smoothing=0.0, gradient=True, logits=None):
        """Rows [first, first + rows) against the reference in float64 on the same logits."""
        x = torch.randn(rows, classes, device=device).mul(3).to(dtype) if logits is None else logits
        wide = torch.promote_types(dtype, torch.float32)
        weights = torch.rand(classes, device=device, dtype=wide) + 0.1 if weighted else None
        exact, before = x.to(torch.float64, copy=True), x.clone()
        exact_weights = None if weights is None else weights.double()
        expected = linear_multi_js.multi_js_rows_reference(exact, exact_weights, smoothing, first, n, gradient)
        with ivfast.use("triton"):
            loss = linear_multi_js._rows(x, weights, smoothing, first, n, gradient)
        assert loss.dtype == wide
        # differences of numbers of about 1 per row, and of probabilities in the gradient
        unit = 1 / (classes * n)
        assert_close(loss, expected, unit=rows * unit)
        if gradient:
            assert testing.error(x.cpu(), exact.cpu(), unit) <= testing.TOLERANCES[dtype]
        else:
            assert torch.equal(x, before)

    @dtypes
    @pytest.mark.parametrize("smoothing", [0.0, 0.3, 1.0])
    @pytest.mark.parametrize("weighted", [False, True])
    def test_chunks_that_begin_and_end_in_a_block(self, dtype, smoothing, weighted):
        classes, n = size(2, 40), size(2, 30)
        first = size(1, classes * n - 1)
        rows = size(1, classes * n - first)
        for gradient in (True, False):
            self.compare(classes, n, first, rows, dtype, weighted=weighted, smoothing=smoothing, gradient=gradient)

    @dtypes
    def test_one_row_of_each_class(self, dtype):
        self.compare(7, 1, 2, 5, dtype)
        self.compare(2, 1, 1, 1, dtype)

    @dtypes
    def test_rows_of_several_tiles_in_several_programs(self, monkeypatch, dtype):
        from ivfast.kernels import multi_js

        monkeypatch.setattr(multi_js, "TILE", dict.fromkeys(multi_js.TILE, 16))
        monkeypatch.setattr(multi_js, "PARTS", 4)
        self.compare(size(33, 50), 3, 5, size(30, 60), dtype, weighted=True, smoothing=0.3)
        self.compare(3, 50, 20, size(100, 130), dtype)

    def test_rows_beyond_32_bits(self):
        self.compare(5, 2**30, 3 * 2**30 - 3, 9, torch.float32, weighted=True)
        self.compare(5, 2**30, 4 * 2**30 + 2**29, 9, torch.float64)

    def test_strided_logits_are_written_back(self):
        logits = torch.randn(12, 8, device=device)[:, ::2]
        self.compare(4, 5, 3, 12, torch.float32, logits=logits)

    def test_no_rows(self):
        with ivfast.use("triton"):
            assert float(linear_multi_js._rows(torch.empty(0, 3, device=device), None, 0.0, 0, 4, True)) == 0

    def test_far_and_infinite_logits(self):
        x = torch.randn(9, 3, device=device) * 1e4
        self.compare(3, 5, 2, 9, torch.float32, logits=x)
        x = torch.randn(9, 3, device=device)
        x[4, 0] = float("-inf")  # of class 1
        self.compare(3, 5, 2, 9, torch.float32, logits=x)

    def test_nan_stays_in_its_row(self):
        x = torch.randn(9, 3, device=device)
        x[4, 2] = float("nan")
        with ivfast.use("triton"):
            assert linear_multi_js._rows(x, None, 0.0, 2, 5, True).isnan()
        assert x[4].isnan().all()
        assert x.isnan().sum() == 3

    def test_bits(self):
        x = torch.randn(300, 7, device=device)
        with ivfast.use("triton"):
            a, b = ((linear_multi_js._rows(y, None, 0.1, 3, 60, True), y) for y in (x.clone(), x.clone()))
        assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))

    @dtypes
    @cases("linear_multi_js_loss")
    def test_linear_layer(self, monkeypatch, case, dtype):
        monkeypatch.setitem(linear_multi_js.CHUNK, device, 300)
        # half precision rounds the logits and their gradient, and products add up their errors
        check(case._replace(slack=2 * case.slack if dtype in HALF else case.slack), dtype)


wide = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
