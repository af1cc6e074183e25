"""SVGD direction in Triton, interpreted if there is no GPU."""

from collections import Counter

import pytest
import torch
from helpers import (
    assert_right_where_particles_hardly_meet,
    assert_the_gradient_of_h_is_optional,
    same_bits,
    size,
)
from test_svgd_cuda import direction_case

import ivfast
from ivfast import testing
from ivfast.ops import svgd

HALF = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *HALF)
device = "cuda" if torch.cuda.is_available() else "cpu"  # interpreted on the CPU: tests/conftest.py
pytestmark = pytest.mark.usefixtures("poisoned")


def check(case, dtype=torch.float32):
    testing.check(case, testing.inputs(case, dtype, device=device), "triton")


class TestDirection:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("score", [False, True])
    @pytest.mark.parametrize(("n", "d"), [(1, 1), (2, 13), (3, 16), (65, 17)])
    def test_edges(self, n, d, score, dtype):
        check(direction_case(n, d, batch=(size(1, 2),), score=score), dtype)

    @pytest.mark.parametrize(
        ("n", "d", "dtype"),
        [(130, 64, torch.bfloat16), (33, 65, torch.float16), (65, 128, torch.float32), (33, 300, torch.float32)],
    )
    def test_wide(self, monkeypatch, n, d, dtype):
        # loops are slow in the interpreter: products take more dimensions at once than on a GPU, but fewer than d
        from ivfast.kernels import svgd as kernels

        monkeypatch.setattr(
            kernels, "backward_tile", lambda D, card: kernels.Tile(64, 64, 64, 32 if D == 64 else 128, 4)
        )
        check(direction_case(n, d, score=bool(size(0, 1))), dtype)

    @pytest.mark.parametrize(("d", "width"), [(13, 16), (16, 16), (17, 16), (33, 32), (32, 32), (64, 32)])
    def test_products_of_one_and_of_several_parts(self, monkeypatch, d, width):
        from ivfast.kernels import particles
        from ivfast.kernels import svgd as kernels
        from ivfast.kernels.card import card

        tile = kernels.Tile(32, 32, 16, width, 4)
        monkeypatch.setattr(kernels, "forward_tile", lambda D, card: tile)
        monkeypatch.setattr(kernels, "backward_tile", lambda D, card: tile)
        monkeypatch.setattr(particles, "card", lambda device: card(device)._replace(processors=size(1, 20)))
        check(direction_case(size(20, 60), d))

    def test_strides(self):
        x, score = (torch.randn(3, 20, 35, device=device).mT.requires_grad_() for _ in range(2))
        h = (torch.rand((), device=device) + 4).expand(3)
        with ivfast.use("triton"):
            ours = torch.autograd.grad(ivfast.svgd_direction(x, score, bandwidth=h).sum(), (x, score))
        with ivfast.use("reference"):
            phi = ivfast.svgd_direction(x.double(), score.double(), bandwidth=h.double())
            theirs = torch.autograd.grad(phi.sum(), (x, score))
        for a, b in zip(ours, theirs, strict=True):
            assert a.is_contiguous()
            assert testing.error(a, b) <= testing.TOLERANCES[torch.float32]

    def test_data_far_from_the_origin(self):
        # inputs with mean 10 leave float32 ten times less precision in each difference
        check(direction_case(70, 20, shift=10.0, slack=10))

    def test_many_dimensions(self, monkeypatch):
        from ivfast.kernels import svgd as kernels

        monkeypatch.setattr(kernels, "backward_tile", lambda D, card: kernels.Tile(64, 64, 128, 256, 4))
        check(direction_case(17, 512))

    @pytest.mark.parametrize("d", [7, 64])
    def test_equal_particles_are_at_distance_zero_to_the_bit(self, d):
        # only equal particles interact in such a narrow kernel
        x, h = torch.randn(40, d, device=device).repeat(2, 1), torch.tensor(1e-9, device=device)
        with ivfast.use("triton"):
            row_sum = svgd._forward(x, None, h)[1]
        assert torch.equal(row_sum, torch.full_like(row_sum, 2.0))

    def test_particles_that_hardly_meet(self):
        assert_right_where_particles_hardly_meet("triton", device)

    def test_the_gradient_of_the_bandwidth_is_optional(self):
        assert_the_gradient_of_h_is_optional("triton", device=device)

    def test_the_gradient_of_a_detached_bandwidth_costs_no_launches(self):
        from torch.utils._python_dispatch import TorchDispatchMode

        from ivfast.kernels import svgd as kernels

        class Calls(TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                seen.append((function.overloadpacket.__name__, args))
                return function(*args, **(kwargs or {}))

        x, h, launches = torch.randn(9, 3, device=device), torch.tensor(2.0, device=device), []
        for learned in (False, True):
            leaf, bandwidth, seen = x.clone().requires_grad_(), h.clone().requires_grad_(learned), []
            with ivfast.use("triton"):
                phi = ivfast.svgd_direction(leaf, bandwidth=bandwidth)
                with Calls():
                    phi.backward(x)
            ((*_, asked),) = [args for name, args in seen if name == "svgd_direction_backward"]
            assert asked is learned
            seen = []
            with Calls():
                kernels.backward(x, x, None, h, None, asked)
            launches.append(Counter(name for name, _ in seen))
        assert Counter(["cat", "sum", "div", "div", "_to_copy", "_to_copy"]) <= launches[1] - launches[0]
        assert not launches[0] - launches[1]

    def test_equal_particles_share_their_scores(self):
        x, score = torch.randn(1, 7, device=device).expand(70, 7), torch.randn(70, 7, device=device)
        with ivfast.use("triton"):
            phi = ivfast.svgd_direction(x, score, bandwidth=0.01)
        assert testing.error(phi, score.double().mean(0).expand(70, 7)) <= testing.TOLERANCES[torch.float32]

    def test_isolated_particles_follow_their_own_score_exactly(self):
        x, score = torch.arange(70.0, device=device)[:, None] * 100 + torch.zeros(3, device=device), torch.randn(70, 3)
        x, score, h = x.requires_grad_(), score.to(device).requires_grad_(), torch.tensor(1e-4, device=device)
        with ivfast.use("triton"):
            phi = ivfast.svgd_direction(x, score, bandwidth=h)
            dx, dscore = torch.autograd.grad(phi.sum(), (x, score))
        torch.testing.assert_close(phi, score / 70, rtol=2e-7, atol=0)
        assert torch.equal(dx, torch.zeros_like(dx))
        torch.testing.assert_close(dscore, torch.full_like(dx, 1 / 70), rtol=2e-7, atol=0)

    @pytest.mark.parametrize("bandwidth", [1e-30, 1e-6, 1e30])
    @pytest.mark.parametrize("scale", [1e-10, 1e8])
    @pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # 2^-inf, in the interpreter's NumPy
    def test_extremes_stay_finite(self, bandwidth, scale):
        x, h = (torch.randn(20, 9, device=device) * scale).requires_grad_(), torch.tensor(bandwidth, device=device)
        with ivfast.use("triton"):
            phi = ivfast.svgd_direction(x, torch.randn(20, 9, device=device), bandwidth=h)
            (dx,) = torch.autograd.grad(phi.sum(), x)
        assert phi.isfinite().all()
        assert dx.isfinite().all()

    def test_tf32_where_pytorch_says_so(self):
        case = direction_case(70, 20)
        tensors = testing.inputs(case, torch.float32, device=device)
        errors = []
        for setting in ("highest", "high"):
            before = torch.get_float32_matmul_precision()
            torch.set_float32_matmul_precision(setting)
            try:
                errors.append(testing.compare(case, tensors, "triton")["value 0"] * testing.TOLERANCES[torch.float32])
            finally:
                torch.set_float32_matmul_precision(before)
        assert 5e-6 < errors[1] < 2e-3  # operands rounded to 2^-12: visible, but no more than that
        assert errors[0] < errors[1]

    @pytest.mark.parametrize(
        ("setting", "expected"),
        [
            (lambda: None, "tf32x3"),
            (lambda: torch.set_float32_matmul_precision("high"), "tf32"),
            (lambda: torch.set_float32_matmul_precision("medium"), "tf32"),
            (lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", True), "tf32"),
            (lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32"), "tf32"),
            (lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "ieee"), "tf32x3"),
            (lambda: setattr(torch.backends, "fp32_precision", "tf32"), "tf32"),
            (lambda: setattr(torch.backends, "fp32_precision", "ieee"), "tf32x3"),
        ],
    )
    def test_every_way_to_set_the_precision_is_honoured(self, setting, expected):
        from ivfast.kernels.particles import precision

        try:
            setting()
            assert precision(torch.device(device)) == expected
        finally:
            torch.set_float32_matmul_precision("highest")
            torch.backends.fp32_precision = torch.backends.cuda.matmul.fp32_precision = "none"
        assert precision(torch.device(device)) == "tf32x3"
        assert torch.get_float32_matmul_precision() == "highest"

    def test_every_run_gives_the_same_bits(self):
        case = direction_case(70, 16, batch=(2,))
        tensors = testing.inputs(case, torch.float32, device=device)
        results = []
        for _ in range(2):
            with ivfast.use("triton"):
                value, gradients = testing.value_and_gradients(case, tensors)
            results.append([*value, *gradients])
        assert same_bits(results)

    def test_a_set_gives_the_same_bits_in_any_batch(self, monkeypatch):
        from ivfast.kernels import particles
        from ivfast.kernels.card import card

        # otherwise a smaller batch is split further
        monkeypatch.setattr(particles, "card", lambda device: card(device)._replace(processors=1))
        x, h = torch.randn(3, 40, 5, device=device), torch.rand(3, device=device) + 3
        with ivfast.use("triton"):
            together = ivfast.svgd_direction(x, bandwidth=h)
            apart = [ivfast.svgd_direction(a, bandwidth=b) for a, b in zip(x, h, strict=True)]
        assert torch.equal(together, torch.stack(apart))

    def test_no_sets_and_no_float64(self):
        with ivfast.use("triton"):
            assert ivfast.svgd_direction(torch.empty(0, 4, 3, device=device), bandwidth=1.0).shape == (0, 4, 3)
            with pytest.raises(TypeError, match=r"in Triton takes float32.*got torch.float64"):
                ivfast.svgd_direction(torch.randn(5, 3, dtype=torch.float64, device=device), bandwidth=1.0)
