"""Reconstruction losses in Triton, interpreted if there is no GPU."""

import pytest
import torch
from helpers import assert_as_reference, assert_close, assert_strides_are_read, cases, losses_and_gradients, size

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


def reconstruction(kind: str):
    return lambda x, t: ivfast.reconstruction_loss(x, t, kind=kind)


pixels = pytest.mark.parametrize("kind", ["l2", "l1", "bce"])


class TestReconstruction:
    @dtypes
    @cases("reconstruction_loss")
    def test_cases(self, case, dtype):
        check(case, dtype)

    @pixels
    @dtypes
    def test_random_sizes(self, kind, dtype):
        for shape in ((size(1, 40),), (1, 1), (size(2, 40), size(1, 50)), (size(1, 3), 3, size(5, 40), size(5, 40))):
            check(Case(kind, str(shape), reconstruction(kind), testing._logits_and_pixels(*shape)), dtype)
            # only the gradient of the output
            check(Case(kind, str(shape), reconstruction(kind), testing._logits_and_pixels(*shape), constants=1), dtype)

    @pixels
    @dtypes
    def test_rows_in_parts(self, monkeypatch, kind, dtype):
        from ivfast.kernels import reconstruction as kernels

        monkeypatch.setattr(kernels, "TILE", 16)
        monkeypatch.setattr(kernels, "ONE_PROGRAM", 2)
        monkeypatch.setattr(kernels, "PARTS", 8)
        for shape in ((3, 200), (1, 47), (50, 7, 7)):
            check(Case(kind, str(shape), reconstruction(kind), testing._logits_and_pixels(*shape)), dtype)

    @pixels
    def test_strides(self, kind):
        tensors = [torch.rand(3, 5, 7, device=device).mT for _ in range(2)]
        assert_strides_are_read(reconstruction(kind), tensors)
        x = torch.rand(1, device=device).expand(6, 1)
        assert_close(*(losses_and_gradients(reconstruction(kind), (x, x), use)[0] for use in ("triton", "reference")))

    @pixels
    @wide
    def test_extremes(self, kind, dtype):
        inf, nan = float("inf"), float("nan")
        values = torch.tensor([0.0, -0.0, 1e4, -1e4, 30.0, -30.0, inf, -inf, nan], dtype=dtype, device=device)
        targets = torch.tensor([0.0, 0.5, 1.0, nan], dtype=dtype, device=device)
        x, t = (x.reshape(-1, 1) for x in torch.meshgrid(values, targets, indexing="ij"))
        loss, _, _ = assert_as_reference(reconstruction(kind), x, t)
        loss = loss.view(9, 4)
        assert loss[8].isnan().all()
        assert loss[:, 3].isnan().all()
        assert not loss[:8, :3].isnan().any()
        if kind == "bce":  # certain and correct
            assert loss[6, 2] == loss[7, 0] == 0

    @pixels
    def test_nan_stays_in_its_row(self, kind):
        x, t = torch.rand(2, 5, 300, device=device)
        x[2, 7] = float("nan")
        loss, *_ = losses_and_gradients(reconstruction(kind), (x, t), "triton")
        assert loss.isnan().tolist() == [False, False, True, False, False]

    @pixels
    def test_bits(self, monkeypatch, kind):
        from ivfast.kernels import reconstruction as kernels

        monkeypatch.setattr(kernels, "ONE_PROGRAM", 1)
        x, t = torch.rand(2, 3, 5000, device=device)
        first, second = (losses_and_gradients(reconstruction(kind), (x, t), "triton") for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))

    @pixels
    def test_no_samples_and_no_pixels(self, kind):
        for shape in ((0,), (0, 3, 4), (3, 0)):
            x = torch.empty(shape, device=device)
            loss, *gradients = losses_and_gradients(reconstruction(kind), (x, x), "triton")
            assert torch.equal(loss, torch.zeros(shape[0], device=device))
            assert all(g.shape == x.shape for g in gradients)
