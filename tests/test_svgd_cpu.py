"""The C++ SVGD kernel beyond the case table: instruction sets, edges of tiles, threads, extremes, memory."""

import math
import subprocess
import sys

import pytest
import torch
from helpers import assert_right_where_particles_hardly_meet, assert_the_gradient_of_h_is_optional

import ivfast
from ivfast import testing

pytest.importorskip("ivfast._C")


def draw(shape, dtype=torch.float32, score=True, bandwidth=None):
    x = torch.randn(shape).add(0.5).to(dtype)
    h = (torch.rand(shape[:-2]) + 0.5) * shape[-1] if bandwidth is None else torch.full(shape[:-2], bandwidth)
    s = torch.randn(shape).to(dtype) if score else None
    return [t if t is None else t.requires_grad_() for t in (x, s, h.double() if dtype == torch.float64 else h)]


def value_and_gradients(x, score, h, weights):
    phi = ivfast.svgd_direction(x, score, bandwidth=h)
    inputs = [t for t in (x, score, h) if t is not None]
    return [phi.detach(), *torch.autograd.grad(phi, inputs, weights.to(phi))]


def assert_right(tensors):
    x = tensors[0]
    weights = torch.randn(4, *x.shape).bfloat16()
    exact = [t if t is None else t.detach().double().requires_grad_() for t in tensors]
    with ivfast.use("reference"):
        expected, *others = [value_and_gradients(*exact, w) for w in weights]
    with ivfast.use("cpu"):
        actual = value_and_gradients(*tensors, weights[0])
    weightings = [gradients for _, *gradients in (expected, *others)]
    units = [0.0, *testing.gradient_units([t for t in exact if t is not None], *weightings)]
    for name, a, b, unit in zip(("phi", "first", "second", "third"), actual, expected, units, strict=False):
        error = testing.error(a, b, unit)
        assert error <= testing.TOLERANCES[x.dtype], f"{name} of {tuple(x.shape)} is off by {error:.1e}"


@pytest.mark.parametrize("dtype", testing.TOLERANCES, ids=str)
def test_each_instruction_set_is_right_at_the_edges_of_tiles(isa, dtype):
    sizes = [*torch.randint(1, 71, (12,)).tolist(), 1, 31, 33, 63, 65, 257, 321]
    widths = [*torch.randint(1, 40, (12,)).tolist(), 1, 15, 17, 129, 256, 31, 8]
    for i, (n, d) in enumerate(zip(sizes, widths, strict=True)):
        assert_right(draw((n, d), dtype, score=i % 2 == 0))


@pytest.mark.parametrize("d", [512, 1000])
def test_each_instruction_set_is_right_in_many_dimensions(isa, d):
    assert_right(draw((int(torch.randint(30, 70, ())), d)))


@pytest.mark.parametrize(("n", "d"), [(300, 40), (1030, 12), (1100, 256)])
def test_blocks_of_many_tiles_are_right(n, d):
    assert_right(draw((n, d)))


@pytest.mark.parametrize("shape", [(260, 130), (1, 450, 24), (3, 257, 33), (40, 65, 20), (700, 300)], ids=str)
def test_the_number_of_threads_does_not_change_a_bit(shape, threads):
    tensors, weights = draw(shape), torch.randn(shape)
    threads(1)
    expected = value_and_gradients(*tensors, weights)
    for count in (2, 3, 7):
        threads(count)
        for a, b in zip(value_and_gradients(*tensors, weights), expected, strict=True):
            assert torch.equal(a, b), f"{count} threads"


def test_strides_do_not_matter():
    x, score, weights = (torch.randn(5, 33, 4, 19) for _ in range(3))
    views = [t.permute(2, 0, 3, 1) for t in (x, score, weights)]  # [4, 5, 19, 33]
    h = torch.tensor(20.0).expand(4, 5)
    packed = [t.contiguous() for t in (*views, h)]
    actual = value_and_gradients(*(t.requires_grad_() for t in views[:2]), h.requires_grad_(), views[2])
    expected = value_and_gradients(*(t.requires_grad_() for t in (*packed[:2], packed[3])), packed[2])
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)
    assert actual[0].is_contiguous()


@pytest.mark.parametrize("bandwidth", [1e-30, 1e-6, 1e30])
@pytest.mark.parametrize("scale", [1e-10, 1.0, 1e8])
def test_extremes_stay_finite(isa, bandwidth, scale):
    x, score, h = draw((50, 9), bandwidth=bandwidth)
    x = (x.detach() * scale).requires_grad_()
    for result in value_and_gradients(x, score, h, torch.randn(50, 9))[:3]:
        assert result.isfinite().all()


def test_isolated_particles_follow_their_own_score_exactly(isa):
    x, score, _ = draw((64, 3))
    x = (torch.arange(64.0)[:, None] * 100 + x.detach()).requires_grad_()
    phi, dx, dscore, _ = value_and_gradients(x, score, torch.tensor(1e-4, requires_grad=True), torch.ones(64, 3))
    assert torch.equal(phi, score.detach() / 64)
    assert torch.equal(dx, torch.zeros(64, 3))
    assert torch.equal(dscore, torch.full((64, 3), 1 / 64))


def test_equal_particles_attract_nothing_and_share_their_scores(isa):
    x, score, _ = draw((1, 7))
    x, score = x.detach().expand(40, 7), torch.randn(40, 7)
    phi, row_sum = torch.ops.ivfast.svgd_direction(x, score, torch.tensor(0.01))
    assert torch.equal(row_sum, torch.full((40,), 40.0))
    torch.testing.assert_close(phi, score.mean(0).expand(40, 7), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("d", [1, 7, 64, 300, 1100])
def test_equal_particles_are_at_distance_zero_to_the_bit(isa, d, dtype):
    x = torch.randn(45, d, dtype=dtype)
    x[:, 0] += 10 * torch.randperm(45)  # other particles are too far to count, in one dimension too
    x = x.repeat(2, 1)
    row_sum = torch.ops.ivfast.svgd_direction(x, None, torch.tensor(1e-9, dtype=dtype))[1]
    assert torch.equal(row_sum, torch.full_like(row_sum, 2.0))


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1.2e-7), (torch.float64, 5e-16)], ids=str)
def test_exponential_is_as_accurate_as_stated(isa, dtype, bound):
    # ±a and h = 2 log2(e): k = 2^(−2a²) with an exact exponent; the second particle's score (0, 1) makes φ contain k/2
    a = torch.arange(1, 2000, dtype=dtype) / 256
    h = torch.tensor(2 / math.log(2), dtype=dtype)
    assert torch.tensor(2 / math.log(2) / float(h)).to(dtype) == 1
    zero = torch.zeros_like(a)
    x = torch.stack([torch.stack([a, zero], -1), torch.stack([-a, zero], -1)], -2)  # [N, 2, 2]
    score = torch.tensor([[0, 0], [0, 1]], dtype=dtype).expand_as(x)
    k = 2 * torch.ops.ivfast.svgd_direction(x, score, h.expand(len(a)))[0][:, 0, 1]
    expected = torch.tensor([2.0 ** (-2 * float(t) ** 2) for t in a], dtype=torch.float64)
    normal = expected >= torch.finfo(dtype).tiny
    assert normal.sum() > 1900
    assert ((k.double() / expected - 1).abs()[normal] <= bound).all()
    assert (k[~normal] < torch.finfo(dtype).tiny).all()


def test_memory_grows_with_n_and_not_with_its_square():
    # K alone would be 1.6 GB; VmHWM is the peak of a fresh process
    script = """
import re, torch, ivfast
peak = lambda: int(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1])
def run(n):
    x = torch.randn(n, 8, requires_grad=True)
    ivfast.svgd_direction(x, torch.randn(n, 8), bandwidth=8.0).sum().backward()
run(600)
before = peak()
run(20_000)
print(peak() - before)
"""
    if not sys.platform.startswith("linux"):
        pytest.skip("reads /proc")
    fresh = subprocess.run([sys.executable, "-c", script], cwd="/", check=True, capture_output=True, text=True)
    grown = int(fresh.stdout)
    assert grown < 50_000  # kB


@pytest.mark.parametrize("n", [9, 300])
def test_a_coordinate_that_is_no_number_reaches_every_particle(isa, n):
    for bad in (float("nan"), float("inf")):
        x = torch.randn(n, 3)
        x[n // 2, 1] = bad
        x.requires_grad_()
        phi = ivfast.svgd_direction(x, torch.randn(n, 3), bandwidth=3.0)
        assert phi.isnan().all()
        assert torch.autograd.grad(phi.sum(), x)[0].isnan().all()
    h = torch.tensor(float("nan"))
    assert ivfast.svgd_direction(torch.randn(n, 3), bandwidth=h).isnan().all()


@pytest.mark.parametrize("n", [60, 300])
@pytest.mark.parametrize(("far", "h"), [(1e4, 3.0), (1e5, 1.0), (1e4, 1e-3), (1e3, 1e4)])
def test_particles_far_from_most(isa, n, far, h):
    x = torch.randn(n, 3)
    x[:4] += far * torch.randn(4, 3)
    assert_right([t.requires_grad_() for t in (x, torch.randn(n, 3), torch.tensor(h))])


@pytest.mark.parametrize("scale", [1e-20, 1e-12, 1e13, 1e19])
def test_extreme_units(isa, scale):
    # squares near the ends of float32; h's gradient sums products of them, and at 1e-13 is itself beyond float32
    x, score = torch.randn(50, 4) * scale, torch.randn(50, 4) / scale
    h = torch.tensor(3.0 * scale**2)
    if scale > 1e-20:  # there h is no normal number
        assert_right([t.clone().requires_grad_() for t in (x, score, h)])
    a, b = (ivfast.svgd_direction(y, s, bandwidth=h.to(y)) for y, s in ((x, score), (x.double(), score.double())))
    assert testing.error(a, b) <= testing.TOLERANCES[torch.float32]


def test_particles_that_hardly_meet(isa):
    assert_right_where_particles_hardly_meet("cpu")


@pytest.mark.parametrize("implementation", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_gradient_of_the_bandwidth_is_optional(implementation, dtype, isa):
    assert_the_gradient_of_h_is_optional(implementation, dtype)
