"""The C++ MMD beyond the case table: instruction sets, tiles, threads, extremes, four digits, memory."""

import subprocess
import sys

import pytest
import torch

import ivfast
from ivfast import testing
from ivfast.testing import Case

pytest.importorskip("ivfast._C")

WAE = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)


def op(x, y, bandwidth=None, imq=True, scales=None, unbiased=True, x_gradient=True, y_gradient=True):
    """Value and gradients; without a bandwidth the scales are in units of r²."""
    scales = [s * 2 * x.shape[-1] for s in WAE] if scales is None else scales
    return torch.ops.ivfast.mmd(x, y, bandwidth, imq, scales, unbiased, x_gradient, y_gradient)


def assert_right(n, m, d, dtype=torch.float32, *, shift=0.3, slack=1.0, batch=(), **form):
    def draw(generator):
        x, y = (torch.randn(*batch, rows, d, generator=generator, dtype=torch.float64) for rows in (n, m))
        return x, y + shift

    # seven terms of k(0) = 1 on each side of the difference, each rounded by at most 2e-7: 3e-6 of a value near 0
    case = Case("mmd", f"{n},{m},{d}", lambda x, y: ivfast.mmd(x, y, **form), draw, slack=slack, unit=0.2)
    testing.check(case, testing.inputs(case, dtype), "cpu")


@pytest.mark.parametrize("dtype", testing.TOLERANCES, ids=str)
@pytest.mark.parametrize("kernel", ["imq", "rbf"])
def test_each_instruction_set_is_right_at_the_edges_of_tiles(isa, dtype, kernel):
    sizes = [
        *torch.randint(2, 71, (8, 3)).tolist(),
        [31, 33, 1],
        [64, 64, 16],
        [63, 130, 17],
        [2, 257, 15],
        [129, 3, 33],
    ]
    for i, (n, m, d) in enumerate(sizes):
        bandwidth = None if kernel == "imq" else 2.0 * d
        assert_right(n, m, d, dtype, kernel=kernel, bandwidth=bandwidth, unbiased=i % 2 == 0)


@pytest.mark.parametrize("d", [512, 1024])
def test_each_instruction_set_is_right_in_many_dimensions(isa, d):
    assert_right(40, 70, d)


@pytest.mark.parametrize(("n", "m", "d"), [(300, 140, 40), (1030, 600, 12), (700, 600, 256)])
def test_blocks_of_many_tiles_are_right(n, m, d):
    assert_right(n, m, d)


@pytest.mark.parametrize("kernel", ["imq", "rbf"])
def test_single_samples(isa, kernel):
    assert_right(1, 1, 3, kernel=kernel, bandwidth=2.0, unbiased=False)
    assert_right(1, 40, 5, kernel=kernel, bandwidth=2.0, unbiased=False)


@pytest.mark.parametrize("kernel", ["imq", "rbf"])
@pytest.mark.parametrize(
    "scales",
    [(0.7,), tuple(2.0**k for k in range(-10, 10)), (1.0, 1.0), (1e-6, 1.0, 1e6), (0.01, 0.011, 50.0, 51.0)],
    ids=len,
)
def test_any_scales(isa, kernel, scales):
    assert_right(70, 45, 9, kernel=kernel, bandwidth=18.0, scales=scales, slack=3)  # up to 20 terms in place of 7


def test_a_mean_far_away(isa):
    # inputs with mean 10 leave float32 ten times less precision in each difference
    x, y = torch.randn(200, 8) + 10, torch.randn(150, 8) + 10
    value, dx, dy = op(x, y)
    expected = op(x.double(), y.double())
    assert abs(float(value - expected[0])) < 4e-6
    assert testing.error(dx, expected[1]) < 2e-4
    assert testing.error(dy, expected[2]) < 2e-4
    assert_right(100, 90, 6, shift=10.0)  # only y is shifted


@pytest.mark.parametrize("imq", [True, False])
@pytest.mark.parametrize("unbiased", [True, False])
def test_gradcheck(imq, unbiased):
    x, y = torch.randn(2, 5, 3, dtype=torch.float64), torch.randn(2, 4, 3, dtype=torch.float64)
    kernel = "imq" if imq else "rbf"
    with ivfast.use("cpu"):
        assert torch.autograd.gradcheck(
            lambda x, y: ivfast.mmd(x, y, kernel=kernel, bandwidth=4.0, scales=(0.3, 1.0, 2.0), unbiased=unbiased),
            (x.requires_grad_(), y.requires_grad_()),
        )


@pytest.mark.parametrize("shape", [(90, 130, 20), (700, 450, 24), (1100, 30, 260)], ids=str)
def test_only_what_is_asked_for_is_computed_and_it_is_the_same(shape):
    n, m, d = shape
    x, y = torch.randn(n, d), torch.randn(m, d)
    value, dx, dy = op(x, y)
    for wanted in ((True, False), (False, True), (False, False)):
        alone = op(x, y, x_gradient=wanted[0], y_gradient=wanted[1])
        assert torch.equal(alone[1], dx if wanted[0] else torch.empty(0))
        assert torch.equal(alone[2], dy if wanted[1] else torch.empty(0))
        torch.testing.assert_close(alone[0], value, rtol=0, atol=1e-7)


@pytest.mark.parametrize("batch", [(), (3,), (40,)], ids=str)
@pytest.mark.parametrize("sizes", [(260, 200, 130), (60, 450, 24), (65, 63, 20)], ids=str)
def test_the_number_of_threads_does_not_change_a_bit(sizes, batch, threads):
    n, m, d = sizes
    x, y = torch.randn(*batch, n, d), torch.randn(*batch, m, d)
    threads(1)
    expected = op(x, y)
    for count in (2, 3, 7):
        threads(count)
        for a, b in zip(op(x, y), expected, strict=True):
            assert torch.equal(a, b), f"{count} threads"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_a_batch_is_its_sets_and_strides_do_not_matter(dtype):
    x = torch.randn(5, 33, 2, 19).to(dtype).permute(2, 0, 3, 1).mT  # [2, 5, 33, 19]
    y = torch.randn(19, 5, 40, 2).to(dtype).permute(3, 1, 2, 0)
    wide = torch.promote_types(dtype, torch.float32)
    b = (torch.rand(5, 2).to(wide) + 0.5).T
    value, dx, dy = op(x, y, b, scales=[10.0, 20.0])
    assert all(tensor.is_contiguous() and tensor.dtype == wide for tensor in (value, dx, dy))
    assert value.shape == (2, 5)
    for i in range(2):
        for j in range(5):
            one = op(x[i, j].clone(), y[i, j].clone(), b[i, j].clone(), scales=[10.0, 20.0])
            number = op(x[i, j], y[i, j], scales=[10 * float(b[i, j]), 20 * float(b[i, j])])
            for a, n, whole in zip(one, number, (value, dx, dy), strict=True):
                assert torch.equal(a, whole[i, j])
                assert torch.equal(n, whole[i, j])


def test_half_precision_is_float32_on_what_it_holds(isa):
    for dtype in (torch.bfloat16, torch.float16):
        x, y = torch.randn(50, 30).to(dtype), torch.randn(70, 30).to(dtype)
        for a, b in zip(op(x, y), op(x.float(), y.float()), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("imq", [True, False])
def test_a_sample_is_at_no_distance_from_itself(isa, imq):
    x = torch.randn(100, 24)
    value, dx, dy = op(x, x, imq=imq, unbiased=False)
    assert abs(float(value)) < 1e-7
    assert dx.abs().max() < 1e-7
    assert dy.abs().max() < 1e-7
    shuffled = op(x, x[torch.randperm(100)], imq=imq, unbiased=False)[0]
    assert abs(float(shuffled)) < 1e-7
    # unbiased, 2 (mean over i ≠ j − mean over all pairs), whose diagonal is 7
    r2 = torch.pdist(x.double()).square()
    mean = sum((c / (c + r2) if imq else torch.exp(-r2 / c)).mean() for c in (s * 48 for s in WAE))
    unbiased = op(x, x, imq=imq)[0].double()
    torch.testing.assert_close(unbiased, 2 * (mean - 7) / 100, rtol=1e-5, atol=0)


@pytest.mark.parametrize("imq", [True, False])
def test_equal_samples(isa, imq):
    x = torch.randn(1, 7).expand(40, 7)
    for unbiased in (True, False):
        value, dx, dy = op(x, x[:33], imq=imq, unbiased=unbiased)
        assert abs(float(value)) < 1e-6
        assert max(float(dx.abs().max()), float(dy.abs().max())) < 1e-7
    twice = torch.randn(30, 6).repeat(2, 1)
    value, dx, _ = op(twice, twice[:30] + 0.5, imq=imq, unbiased=False)
    once, dx_once, _ = op(twice[:30], twice[:30] + 0.5, imq=imq, unbiased=False)
    torch.testing.assert_close(value, once, rtol=1e-5, atol=0)
    torch.testing.assert_close(2 * dx[:30], dx_once, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(dx[:30], dx[30:], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("imq", [True, False])
def test_distances_lost_in_rounding_are_not_negative(isa, imq):
    # y equals x up to a rounding of the squares that is far wider than the kernel: MMD² = 1 − (k(x₁, y₁) + k(x₂, y₂))/2
    x = torch.randn(1000, 1, 9)
    x = torch.cat((x, -x), 1)
    value = op(x, x * (1 + 2e-7), imq=imq, scales=[1e-9], unbiased=False)[0]
    assert value.min() >= -1e-6
    assert value.max() <= 1 + 1e-6


def test_symmetry(isa):
    x, y = torch.randn(90, 12), torch.randn(140, 12) + 0.2
    for a, b in zip(op(x, y), [op(y, x)[i] for i in (0, 2, 1)], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=3e-7)


def test_moving_both_samples_changes_nothing():
    _, dx, dy = op(torch.randn(90, 12), torch.randn(140, 12) + 0.2)
    torch.testing.assert_close(dx.sum(0) + dy.sum(0), torch.zeros(12), rtol=0, atol=1e-6)


@pytest.mark.parametrize("imq", [True, False])
def test_four_digits_of_a_small_value(imq):
    """The kernels' means, up to 7, agree with float64 to 1e-9: four digits of an MMD² of 1e-5, and two of 1e-7."""
    x, y = torch.randn(4096, 64), torch.randn(4096, 64) * 1.003
    value = op(x, y, imq=imq, x_gradient=False, y_gradient=False)[0]
    exact = op(x.double(), y.double(), imq=imq, x_gradient=False, y_gradient=False)[0]
    assert abs(float(value) - float(exact)) < 1e-9


@pytest.mark.parametrize("imq", [True, False])
@pytest.mark.parametrize("scale", [1e-30, 1e-10, 1e10, 1e30])
@pytest.mark.parametrize("spread", [1e-10, 1.0, 1e8])
def test_extremes_stay_finite(isa, imq, scale, spread):
    x, y = torch.randn(50, 9) * spread, torch.randn(20, 9) * spread
    value, dx, dy = op(x, y, imq=imq, scales=[scale, 3 * scale])
    assert value.isfinite()
    assert abs(float(value)) <= 4
    if scale >= 1e-10:  # below, the slope at distances of the size of rounding overflows float32
        assert dx.isfinite().all()
        assert dy.isfinite().all()


@pytest.mark.parametrize("imq", [True, False])
def test_not_a_number_stays_one(isa, imq):
    for bad in (float("nan"), float("inf")):
        x = torch.randn(40, 5)
        x[17, 3] = bad
        value, dx, _ = op(x, torch.randn(20, 5), imq=imq)
        assert value.isnan()
        assert dx.isnan().any()


@pytest.mark.parametrize("imq", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_bandwidth_that_is_not_a_number_gives_none(isa, imq, dtype):
    x, y = torch.randn(2, 9, 5).to(dtype), torch.randn(2, 4, 5).to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    results = op(x, y, torch.tensor([float("nan"), 1.0], dtype=wide), imq=imq, scales=[1.0, 2.0])
    assert all(result[0].isnan().all() for result in results)
    assert all(result[1].isfinite().all() for result in results)


def test_no_sets():
    value, dx, dy = op(torch.empty(0, 4, 3), torch.empty(0, 5, 3))
    assert (value.shape, dx.shape, dy.shape) == ((0,), (0, 4, 3), (0, 5, 3))


def test_memory_is_not_that_of_the_distances():
    # one n × m matrix alone would be 268 MB, and x is 2 MB; VmHWM is the peak of a fresh process
    script = """
import re, torch, ivfast
peak = lambda: int(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1])
def run(n):
    x, y = (torch.randn(n, 64, requires_grad=True) for _ in range(2))
    ivfast.mmd(x, y).backward()
run(600)
before = peak()
run(8192)
print(peak() - before)
"""
    if not sys.platform.startswith("linux"):
        pytest.skip("reads /proc")
    fresh = subprocess.run([sys.executable, "-c", script], cwd="/", check=True, capture_output=True, text=True)
    assert int(fresh.stdout) < 50_000  # kB


@pytest.mark.parametrize("imq", [True, False])
@pytest.mark.parametrize("unit", [1e-18, 1.0, 1e18])
@pytest.mark.parametrize("far", [0.0, 1e3, 1e5])
def test_extreme_units_and_clusters_far_apart(isa, imq, unit, far):
    # norms of up to 1e10 beside distances of 1, in units whose squares are near the ends of float32
    x, y = torch.randn(40, 3), torch.randn(30, 3)
    x[:3] += far
    y[10:] -= far
    x, y, b = x * unit, y * unit, 6 * unit**2
    names = {"kernel": "imq" if imq else "rbf", "bandwidth": b}
    ours, exact = [t.clone().requires_grad_() for t in (x, y)], [t.double().requires_grad_() for t in (x, y)]
    values = ivfast.mmd(*ours, **names), ivfast.mmd(*exact, **names)
    assert testing.error(*values, unit=0.1) <= testing.TOLERANCES[torch.float32]
    gradients = zip(torch.autograd.grad(values[0], ours), torch.autograd.grad(values[1], exact), strict=True)
    for a, g in gradients:
        assert testing.error(a * unit, g * unit) <= testing.TOLERANCES[torch.float32]
