"""MMD in Triton, interpreted if there is no GPU."""

import pytest
import torch
from helpers import size

import ivfast
from ivfast import testing
from ivfast.ops import mmd

HALF = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *HALF)
device = "cuda" if torch.cuda.is_available() else "cpu"  # interpreted on the CPU: tests/conftest.py
pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),  # 2^-inf, in the interpreter's NumPy
]


def check(case, dtype=torch.float32):
    testing.check(case, testing.inputs(case, dtype, device=device), "triton")


def normal(*shapes, shifts=(0.0, 0.0)):
    def draw(generator):
        samples = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
        return tuple(x + shift for x, shift in zip(samples, shifts, strict=True))

    return draw


def mmd_case(n, m, d, *, batch=(), shifts=(0.0, 0.0), slack=1.0, **form):
    """Each kernel is 1 at distance 0."""

    def function(x, y):
        return ivfast.mmd(x, y, **form)

    draw = normal((*batch, n, d), (*batch, m, d), shifts=shifts)
    return testing.Case("mmd", f"{(*batch, n, m, d)} {form}", function, draw, unit=0.1, slack=slack)


class TestMmd:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("kernel", ["imq", "rbf"])
    @pytest.mark.parametrize(("n", "m", "d"), [(2, 3, 1), (17, 2, 13), (3, 65, 16)])
    def test_edges(self, n, m, d, kernel, dtype):
        check(
            mmd_case(n, m, d, batch=(size(1, 2),), kernel=kernel, bandwidth=2.0 * d, unbiased=bool(size(0, 1))), dtype
        )

    @pytest.mark.parametrize(("n", "m", "d"), [(130, 5, 64), (33, 17, 65), (9, 20, 130), (5, 9, 512)])
    def test_wide(self, monkeypatch, n, m, d):
        from ivfast.kernels import mmd as kernels

        # loops are slow in the interpreter: fewer parts than on a GPU, but several
        monkeypatch.setattr(kernels, "tile_of", lambda D, card, gradient: kernels.Tile(128, 128, min(D, 128), D // 2))
        check(mmd_case(n, m, d, unbiased=False))

    def test_a_median_for_each_set_and_more_scales_than_a_launch_takes(self):
        scales = tuple(0.3 * 1.5**k for k in range(size(9, 13)))
        bandwidth = torch.tensor([3.0, 20.0], device=device)
        for kernel in ("imq", "rbf"):
            case = mmd_case(7, 9, 3, batch=(2,), kernel=kernel, scales=scales, bandwidth=bandwidth.double())
            check(case._replace(unit=1.0))  # a sum of as many kernels

    @pytest.mark.parametrize("shift", [(10.0, 10.0), (3.0, -3.0)])
    def test_shifted_and_apart(self, shift):
        # inputs with mean 10 leave float32 ten times less precision in each difference
        check(mmd_case(20, 30, 6, shifts=shift, slack=10))

    @pytest.mark.parametrize("kernel", ["imq", "rbf"])
    def test_equal_samples_are_at_zero(self, kernel):
        x = torch.randn(70, 5, device=device).requires_grad_()
        with ivfast.use("triton"):
            value = ivfast.mmd(x, x.detach(), kernel=kernel, bandwidth=5.0, unbiased=False)
            (dx,) = torch.autograd.grad(value, x)
        assert abs(float(value.detach())) < 2e-6  # of up to seven kernels
        assert float(dx.abs().max()) < 1e-6

    @pytest.mark.parametrize("kernel", ["imq", "rbf"])
    def test_points_that_coincide_count_in_full_however_narrow_the_kernel(self, kernel):
        x = torch.arange(30.0, device=device)[:, None].repeat(2, 3)
        with ivfast.use("triton"):
            value = ivfast.mmd(x, x + 0.5, kernel=kernel, scales=(1e-12,), bandwidth=1.0)
        assert abs(float(value.detach()) - 2 * 60 / (60 * 59)) < 1e-7  # each point of either sample meets its copy

    @pytest.mark.parametrize("d", [5, 64])
    def test_equal_rows_are_at_distance_zero_to_the_bit(self, d):
        x = 10 * torch.randn(30, d, device=device).repeat(2, 1)
        with ivfast.use("triton"):
            value = ivfast.mmd(x, x.flip(0), kernel="rbf", scales=(1e-12,), bandwidth=1.0)
        # each point meets one double within its sample and two in the other
        assert abs(float(value) - (2 * 60 / (60 * 59) - 2 * 120 / 60**2)) < 1e-7

    def test_only_the_gradients_asked_for(self):
        x, y = torch.randn(20, 5, device=device), torch.randn(7, 5, device=device)
        with ivfast.use("triton"):
            value, dx, dy = mmd._forward(x, y, None, True, [10.0], True, True, True)
            for x_too, y_too in ((False, False), (True, False), (False, True)):
                again = mmd._forward(x, y, None, True, [10.0], True, x_too, y_too)
                torch.testing.assert_close(again[0], value, rtol=0, atol=1e-6)
                assert torch.equal(again[1], dx if x_too else dx.new_empty(0))
                assert torch.equal(again[2], dy if y_too else dy.new_empty(0))

    def test_splits_strides_and_bits(self, monkeypatch):
        from ivfast.kernels import particles
        from ivfast.kernels.card import card

        x, y = (torch.randn(2, 5, n, device=device).mT.requires_grad_() for n in (150, 20))
        results = []
        for processors in (1, 132, 132):
            found = card(x.device)._replace(processors=processors)
            monkeypatch.setattr(particles, "card", lambda device, found=found: found)
            with ivfast.use("triton"):
                value = ivfast.mmd(x, y)
                results.append([value.detach(), *torch.autograd.grad(value.sum(), (x, y))])
        assert all(torch.equal(a, b) for a, b in zip(*results[1:], strict=True))
        for a, b in zip(*results[:2], strict=True):
            assert b.is_contiguous()
            assert testing.error(a, b.double(), 0.1 if a.dim() == 1 else 0.0) < 1e-5

    def test_tf32_where_pytorch_says_so(self):
        case = mmd_case(40, 50, 20)
        tensors = testing.inputs(case, torch.float32, device=device)
        errors = []
        before = torch.get_float32_matmul_precision()
        for setting in ("highest", "high"):
            torch.set_float32_matmul_precision(setting)
            try:
                errors.append(
                    testing.compare(case, tensors, "triton")["gradient 0"] * testing.TOLERANCES[torch.float32]
                )
            finally:
                torch.set_float32_matmul_precision(before)
        assert errors[0] < 2e-5 < errors[1] < 5e-3  # operands rounded to 2^-12: visible, but no more than that

    def test_no_sets_and_no_float64(self):
        with ivfast.use("triton"):
            assert ivfast.mmd(torch.empty(0, 4, 3, device=device), torch.empty(0, 5, 3, device=device)).shape == (0,)
            with pytest.raises(TypeError, match=r"in Triton takes float32.*got torch.float64"):
                ivfast.mmd(torch.randn(5, 3, dtype=torch.float64, device=device), torch.ones(4, 3).double().to(device))
