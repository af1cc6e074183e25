"""The Triton kernels of SVGD, interpreted where there is no GPU: the direction, the median heuristic and the bridge."""

import pytest
import torch
from test_cuda_svgd import direction_case, median_case, size

import ivfast
from ivfast import testing
from ivfast.ops import median, svgd

HALF = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *HALF)
device = "cuda" if torch.cuda.is_available() else "cpu"  # interpreted there: tests/conftest.py
pytestmark = pytest.mark.usefixtures("poisoned")


def check(case, dtype=torch.float32):
    testing.check(case, testing.inputs(case, dtype, device=device), "triton")


def same_bits(results):
    return all(torch.equal(a, b) for result in results[1:] for a, b in zip(result, results[0], strict=True))


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
        # the interpreter pays by the loop: products take more dimensions at once than on a GPU, still fewer than d
        from ivfast.kernels import svgd as kernels

        monkeypatch.setattr(
            kernels, "backward_tile", lambda D, major: kernels.Tile(64, 64, 64, 32 if D == 64 else 128, 4)
        )
        check(direction_case(n, d, score=bool(size(0, 1))), dtype)

    @pytest.mark.parametrize(("d", "width"), [(13, 16), (16, 16), (17, 16), (33, 32), (32, 32), (64, 32)])
    def test_products_of_one_and_of_several_parts(self, monkeypatch, d, width):
        from ivfast.kernels import particles
        from ivfast.kernels import svgd as kernels

        tile = kernels.Tile(32, 32, 16, width, 4)
        monkeypatch.setattr(kernels, "forward_tile", lambda D, major: tile)
        monkeypatch.setattr(kernels, "backward_tile", lambda D, major: tile)
        monkeypatch.setattr(particles, "PROGRAMS", size(1, 40))
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
        # inputs of mean 10 leave float32 ten times less of each difference
        check(direction_case(70, 20, shift=10.0, slack=10))

    def test_many_dimensions(self, monkeypatch):
        from ivfast.kernels import svgd as kernels

        monkeypatch.setattr(kernels, "backward_tile", lambda D, major: kernels.Tile(64, 64, 128, 256, 4))
        check(direction_case(17, 512))

    @pytest.mark.parametrize("d", [7, 64])
    def test_equal_particles_are_at_distance_zero_to_the_bit(self, d):
        # nothing else survives so narrow a kernel
        x, h = torch.randn(40, d, device=device).repeat(2, 1), torch.tensor(1e-9, device=device)
        with ivfast.use("triton"):
            row_sum = svgd._forward(x, None, h)[1]
        assert torch.equal(row_sum, torch.full_like(row_sum, 2.0))

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
        assert 5e-6 < errors[1] < 2e-3  # operands rounded to 2^-12, seen, and no more than that
        assert errors[0] < errors[1]

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

        monkeypatch.setattr(particles, "PROGRAMS", 1)  # otherwise a smaller batch is split further
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


@pytest.fixture(params=["sampled", "all", "below", "above"])
def streamed(request, monkeypatch):
    """Passes over tiles at any n. The first window is around a sample's quantile, or everything, or wide of the rank:
    it is below the window, or above it."""
    from ivfast.kernels import median, selection

    monkeypatch.setattr(median, "SMALL", 0)
    monkeypatch.setattr(selection, "SAMPLES", 64)
    monkeypatch.setattr(selection, "MARGIN", 16)
    monkeypatch.setattr(selection, "SAMPLED", 1 << 62 if request.param == "all" else 0)
    if request.param in ("below", "above"):
        low = 0x7F000000 if request.param == "below" else 1
        window = torch.tensor([low, 0], dtype=torch.int32, device=device)
        monkeypatch.setattr(selection, "_window", lambda packed, ranks: window.expand(packed.sets, 2, 2).clone())


def middles(x, full):
    with ivfast.use("triton"):
        return median._forward(x, full, True, 1.0)[1]


def expected_middles(x, full):
    d2 = (x.double().unsqueeze(-2) - x.double().unsqueeze(-3)).square().sum(-1)
    return median._middles(d2, full)


def whole_numbers(n, d, below=50):
    """Centred as they are and at distances that float32 holds, so that the median is right to the bit or wrong."""
    half = torch.randint(below, (n // 2, d), device=device).float()
    return torch.cat([half, torch.zeros(n % 2, d, device=device), -half])


class TestMedian:
    @pytest.mark.parametrize("convention", ["liu-wang", "blackjax", "numpyro"])
    @pytest.mark.parametrize(("n", "d"), [(1, 1), (2, 13), (3, 16), (17, 65), (63, 7), (64, 3)])
    def test_one_program(self, n, d, convention):
        check(median_case(n, d, convention, batch=(size(1, 2),)))

    @pytest.mark.parametrize("convention", ["liu-wang", "paper"])
    @pytest.mark.parametrize(("n", "d"), [(2, 13), (66, 5), (67, 33)])
    def test_streamed(self, streamed, n, d, convention):
        check(median_case(n, d, convention))

    @pytest.mark.parametrize("dtype", HALF, ids=str)
    @pytest.mark.parametrize("n", [20, 66])
    def test_half_precision(self, n, dtype):
        check(median_case(n, 5), dtype)

    @pytest.mark.parametrize("full", [False, True])
    @pytest.mark.parametrize("n", [5, 6, 63, 64])
    def test_exact_to_the_bit_in_one_program(self, n, full):
        x = whole_numbers(n, 3)
        assert torch.equal(middles(x, full).double(), expected_middles(x, full))

    @pytest.mark.parametrize("full", [False, True])
    @pytest.mark.parametrize("n", [66, 67])
    def test_exact_to_the_bit_streamed(self, streamed, n, full):
        x = torch.stack([whole_numbers(n, 2), whole_numbers(n, 2, 3)])  # and many ties
        assert torch.equal(middles(x, full).double(), expected_middles(x, full))

    @pytest.mark.parametrize("n", [8, 66])
    def test_pairs_that_tie_share_the_gradient(self, n):
        check(median_case(n, 2, whole=3))

    @pytest.mark.parametrize("n", [1, 40, 66])
    def test_where_the_median_is_zero(self, n):
        x = torch.zeros(2, n, 3, device=device)
        x[1, 0] = 1  # all but one coincide
        x = (x + 0.3).requires_grad_()
        with ivfast.use("triton"):
            h = ivfast.median_bandwidth(x)
            (dx,) = torch.autograd.grad(h.sum(), x)
        with ivfast.use("reference"):
            expected = ivfast.median_bandwidth(x.double())
        assert h[0] == 1
        assert testing.error(h, expected) <= testing.TOLERANCES[torch.float32]
        assert torch.equal(dx, torch.zeros_like(dx))

    def test_strides(self):
        x = torch.randn(2, 5, 40, device=device).mT.requires_grad_()
        with ivfast.use("triton"):
            ours = ivfast.median_bandwidth(x)
            (dx,) = torch.autograd.grad(ours.sum(), x)
        theirs = ivfast.median_bandwidth(x.double())
        assert testing.error(ours, theirs) <= testing.TOLERANCES[torch.float32]
        assert testing.error(dx, torch.autograd.grad(theirs.sum(), x)[0]) <= testing.TOLERANCES[torch.float32]

    def test_no_sets_and_no_float64(self):
        with ivfast.use("triton"):
            assert ivfast.median_bandwidth(torch.empty(0, 4, 3, device=device)).shape == (0,)
            with pytest.raises(TypeError, match=r"in Triton takes float32.*got torch.float64"):
                ivfast.median_bandwidth(torch.randn(5, 3, dtype=torch.float64, device=device))


def bridge_case(n, d, t=3, *, iterations=2, batch=(), slack=1.0):
    def draw(generator):
        shape = (*batch, n, d)
        draws = torch.randn((t - 1) * iterations + 1, *shape, generator=generator, dtype=torch.float64)
        return torch.randn(shape, generator=generator, dtype=torch.float64), draws

    def bridge(z, draws):
        return ivfast.svgd_bridge(z, t, iterations=iterations, step_size=0.7, scale=2.0, draws=draws)

    return testing.Case("svgd_bridge", f"{(*batch, n, d)}", bridge, draw, slack=slack, constants=1)


class TestBridge:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize(("n", "d"), [(1, 1), (2, 13), (17, 16), (32, 5)])
    def test_one_program(self, n, d, dtype):
        check(bridge_case(n, d, size(1, 3), iterations=size(1, 2), batch=(size(1, 2),)), dtype)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize(("n", "d"), [(66, 5), (9, 17), (64, 16)])
    def test_one_launch_after_the_other(self, n, d, dtype):
        check(bridge_case(n, d, 2, iterations=size(1, 2), batch=(size(1, 2),)), dtype)

    def test_both_ways_agree(self, monkeypatch):
        from ivfast.kernels import svgd_bridge

        z, draws = torch.randn(2, 20, 7, device=device), torch.randn(4, 2, 20, 7, device=device)
        one = svgd_bridge.forward(z, draws, 2, 3, 1.0, 100.0, 0.1)
        monkeypatch.setattr(svgd_bridge, "SMALL_N", 0)
        other = svgd_bridge.forward(z, draws, 2, 3, 1.0, 100.0, 0.1)
        for a, b in zip(one, other, strict=True):
            assert a.shape == b.shape
            assert a.dtype == b.dtype
            assert testing.error(a, b) <= testing.TOLERANCES[torch.float32]

    def test_equal_particles(self):
        # every distance is 0: h = scale, and φ is the score
        z, draws = torch.full((2, 20, 3), 0.3, device=device), torch.zeros(2, 2, 20, 3, device=device)
        with ivfast.use("triton"):
            bridges = ivfast.svgd_bridge(z, 2, iterations=1, step_size=0.5, draws=draws)
        assert torch.equal(bridges[0], z)
        assert testing.error(bridges[1], 0.5 * z) <= 1e-6

    def test_strides_and_no_sets(self):
        z, draws = torch.randn(5, 20, device=device).mT.requires_grad_(), torch.randn(3, 5, 20, device=device).mT
        with ivfast.use("triton"):
            ours = ivfast.svgd_bridge(z, 2, draws=draws)
            (dz,) = torch.autograd.grad(ours.square().sum(), z)
            assert ivfast.svgd_bridge(torch.empty(0, 4, 3, device=device), 2).shape == (3, 0, 4, 3)
        with ivfast.use("reference"):
            theirs = ivfast.svgd_bridge(z.double(), 2, draws=draws.double())
        assert testing.error(ours, theirs) <= testing.TOLERANCES[torch.float32]
        assert testing.error(dz, torch.autograd.grad(theirs.square().sum(), z)[0]) <= testing.TOLERANCES[torch.float32]

    def test_every_run_gives_the_same_bits(self):
        case = bridge_case(20, 7)
        tensors = testing.inputs(case, torch.float32, device=device)
        results = []
        for _ in range(2):
            with ivfast.use("triton"):
                value, gradients = testing.value_and_gradients(case, tensors)
            results.append([*value, *gradients])
        assert same_bits(results)
