"""MMD in CUDA C++, run on the CPU by tests/simt."""

import pytest
import torch
from helpers import by_cuda, same_bits_in_every_schedule, size

import ivfast
from ivfast import testing
from ivfast.testing import Case

HALF = (torch.bfloat16, torch.float16)


def matches(case: Case, dtype: torch.dtype = torch.float32):
    testing.check(case, testing.inputs(case, dtype), "cuda")


def mmd_case(n, m, d, *, batch=(), transform=lambda x, y: (x, y), unit=0.1, **form) -> Case:
    """Each kernel is 1 at distance 0, and the sum over scales is a few times that, hence `unit`."""

    def draw(generator):
        x, y = (torch.randn(*batch, rows, d, generator=generator, dtype=torch.float64) for rows in (n, m))
        return transform(x, y + 0.5)

    return Case("mmd", f"{(*batch, n, m, d)} {form}", lambda x, y: ivfast.mmd(x, y, **form), draw, unit=unit)


@pytest.mark.usefixtures("simt")
class TestMmd:
    @pytest.mark.parametrize(
        ("n", "m", "d"),
        [(2, 2, 1), (2, 3, 3), (3, 17, 16), (17, 2, 64), (64, 64, 16), (100, 64, 3), (128, 100, 33)],
    )
    def test_sizes(self, n, m, d):
        for kernel in ("imq", "rbf"):
            matches(mmd_case(n, m, d, kernel=kernel, bandwidth=2.0 * d))

    @pytest.mark.parametrize(("n", "m", "d"), [(128, 128, 128), (256, 200, 64), (200, 256, 128)])
    def test_largest_sizes(self, n, m, d):
        matches(mmd_case(n, m, d))

    def test_one_sample_each(self):
        for shape in ((1, 1, 1), (1, 1, 70), (1, 5, 4), (6, 1, 4)):
            matches(mmd_case(*shape, unbiased=False))

    @pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
    @pytest.mark.parametrize("unbiased", [False, True])
    def test_random_sizes(self, dtype, unbiased):
        for kernel in ("imq", "rbf"):
            batch = [size(1, 3) for _ in range(size(1, 2))]
            shape = size(2, 60), size(2, 60), size(1, 128)
            matches(mmd_case(*shape, batch=batch, kernel=kernel, bandwidth=float(shape[2]), unbiased=unbiased), dtype)

    @pytest.mark.parametrize("count", [1, 32])
    def test_scales_and_a_bandwidth_per_set(self, count):
        bandwidth = torch.rand(3) * 5 + 1
        scales = (torch.rand(count) * 3 + 0.1).tolist()
        for kernel in ("imq", "rbf"):
            matches(
                mmd_case(20, 30, 5, batch=(3,), bandwidth=bandwidth, kernel=kernel, scales=scales, unit=0.1 * count)
            )

    def test_duplicates_and_equal_batches(self):
        for unbiased in (False, True):
            matches(mmd_case(40, 40, 6, transform=lambda x, y: (x[:20].repeat(2, 1), x), unbiased=unbiased))
        matches(mmd_case(30, 30, 6, transform=lambda x, y: (x, x.clone())))
        x = torch.randn(30, 6)
        with ivfast.use("cuda"):
            # the pairs (x_i, x_j) of all three sums have the same bits; each value is summed in float64, each gradient
            # in float32, of 60 terms below 4 slope/(30·30)
            value, dx, dy = torch.ops.ivfast.mmd.cuda(x, x.clone(), None, True, [5.0], False, True, True)
            assert abs(float(value)) < 1e-14
            assert max(float(dx.abs().max()), float(dy.abs().max())) < 1e-8
            equal = torch.full((9, 3), 0.25, requires_grad=True)
            value = ivfast.mmd(equal, torch.full((5, 3), 0.25), bandwidth=1.0)
            assert abs(value.item()) < 1e-13
            assert torch.equal(torch.autograd.grad(value, equal)[0], torch.zeros_like(equal))

    def test_far_apart_and_far_from_the_origin(self):
        # gradients depend on differences, which are as exact as the inputs anywhere
        matches(mmd_case(30, 20, 7, transform=lambda x, y: (x, y + 1e3)))
        matches(mmd_case(30, 20, 7, transform=lambda x, y: ((x + 1e3).float().double(), (y + 1e3).float().double())))

    @pytest.mark.parametrize("wanted", [(False, False), (True, False), (False, True)])
    def test_the_gradients_that_are_asked_for(self, wanted):
        x, y = torch.randn(2, 33, 6), torch.randn(2, 50, 6)
        arguments = None, True, [2.0, 12.0], True
        both = torch.ops.ivfast.mmd.cuda(x, y, *arguments, True, True)
        ours = torch.ops.ivfast.mmd.cuda(x, y, *arguments, *wanted)
        assert torch.equal(ours[0], both[0])
        for is_wanted, a, b in zip(wanted, ours[1:], both[1:], strict=True):
            assert torch.equal(a, b) if is_wanted else a.shape == (0,)

    @pytest.mark.parametrize(("n", "m", "d"), [(50, 31, 16), (10, 9, 70)])
    def test_every_schedule_gives_the_same_bits(self, simt, n, m, d):
        same_bits_in_every_schedule(simt, by_cuda(mmd_case(n, m, d, batch=(2,))))

    def test_strides(self):
        wide, tall = torch.randn(3, 16, 2, 21), torch.randn(3, 16, 35)
        x, y = wide[:, :, 1].mT, tall.mT[:, 3:]
        bandwidth = torch.tensor(5.0).expand(3)
        ours = torch.ops.ivfast.mmd.cuda(x, y, bandwidth, True, [1.0], True, True, True)
        theirs = torch.ops.ivfast.mmd.cuda(*(t.contiguous() for t in (x, y, bandwidth)), True, [1.0], True, True, True)
        for a, b in zip(ours, theirs, strict=True):
            assert a.is_contiguous()
            assert torch.equal(a, b)

    def test_rows_that_do_not_start_on_four_elements(self):
        for dtype in (torch.float32, *HALF):
            storage = torch.randn(1 + 9 * 8).to(dtype)
            x, y = storage[1:].view(9, 8), torch.randn(6, 8).to(dtype)
            ours = torch.ops.ivfast.mmd.cuda(x, y, None, True, [1.0], True, True, True)
            theirs = torch.ops.ivfast.mmd.cuda(x.clone(), y, None, True, [1.0], True, True, True)
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))

    def test_no_sets(self):
        with ivfast.use("cuda"):
            x = torch.empty(0, 4, 3, requires_grad=True)
            value = ivfast.mmd(x, torch.empty(0, 5, 3))
            assert value.shape == (0,)
            assert torch.autograd.grad(value.sum(), x)[0].shape == x.shape

    def test_what_it_does_not_serve_is_refused(self):
        limits = r"n, m <= 256 and d <= 128, got n = {}, m = {}, d = {}"
        with ivfast.use("cuda"):
            for n, m, d in ((257, 3, 2), (3, 257, 2), (3, 4, 129)):
                with pytest.raises(RuntimeError, match=limits.format(n, m, d)):
                    ivfast.mmd(torch.randn(n, d), torch.randn(m, d))
            with pytest.raises(RuntimeError, match=r"takes float32, bfloat16 or float16, got Double"):
                ivfast.mmd(torch.randn(5, 3).double(), torch.randn(5, 3).double())
            with pytest.raises(RuntimeError, match=r"up to 32 scales, got 33"):
                ivfast.mmd(torch.randn(5, 3), torch.randn(5, 3), scales=[1.0] * 33)
