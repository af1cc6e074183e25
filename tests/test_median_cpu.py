"""The C++ median beyond the case table: exactness, adversarial data, both paths, threads, memory."""

import ctypes
import subprocess
import sys

import pytest
import torch
from helpers import clear_median

import ivfast
from ivfast import testing
from ivfast.testing import Case

_C = pytest.importorskip("ivfast._C")

LIBRARY = ctypes.CDLL(_C.__file__)
HISTOGRAMS = LIBRARY.ivfast_median_histograms  # passes of the slow path so far
HISTOGRAMS.restype = ctypes.c_int64
REACH = LIBRARY.ivfast_median_reach  # half width of the bracket, in √sample ranks
REACH.argtypes, REACH.restype = [ctypes.c_double], None
KEPT = 362  # the most particles whose distances are all kept


@pytest.fixture
def reach():
    yield REACH
    REACH(2.0)


def middles(x, full=False):
    return torch.ops.ivfast.median_bandwidth(x, full, True, 1.0)[1]


def gradient(x, grad, full=False, squared=True):
    found = middles(x, full)
    return torch.ops.ivfast.median_bandwidth_backward(grad, x, found, squared, 1.0)


def whole(*shape, dtype=torch.float32, largest=None):
    """Whole numbers with their negatives: the mean is 0, and every product and sum is exact in `dtype`."""
    bits = 23 if dtype == torch.float32 else 51
    largest = largest or int((2.0**bits / (4 * shape[-1])) ** 0.5)
    half = torch.randint(-largest, largest + 1, (*shape[:-2], shape[-2] // 2, shape[-1]), dtype=torch.float64)
    rows = [half, -half, half.new_zeros(*shape[:-2], shape[-2] % 2, shape[-1])]
    return torch.cat(rows, -2).to(dtype)


def drawn(n, d, **how):
    """Fresh particles, in float64, whose median rounding does not choose."""
    return clear_median(n, d, **how)(torch.Generator().manual_seed(int(torch.randint(2**31, ()))))[0]


def squared_distances(x):
    """Exact for whole numbers."""
    gram = x.double() @ x.double().T
    norms = gram.diagonal()
    return norms + norms[:, None] - 2 * gram


def exact_middles(x, full=False):
    d2, n = squared_distances(x), len(x)
    d2 = (d2.flatten() if full else d2[torch.triu(torch.ones(n, n, dtype=torch.bool), 1)]).sort().values
    return torch.stack([d2[(len(d2) - 1) // 2], d2[len(d2) // 2]])


@pytest.mark.parametrize("dtype", testing.TOLERANCES, ids=str)
@pytest.mark.parametrize("convention", ["liu-wang", "paper"])
def test_each_instruction_set_is_right_at_the_edges_of_tiles(isa, dtype, convention):
    # among many pairs, two may lie so close to the middle that rounding decides which pair gets the gradient
    for n in [1, 2, 3, 15, 16, 17, *torch.randint(4, 40, (6,)).tolist()]:
        d = int(torch.randint(1 if dtype == torch.float64 else 5, 70, ()))

        def draw(generator, n=n, d=d):
            return (torch.randn(n, d, generator=generator, dtype=torch.float64) + 0.5,)

        case = Case("median_bandwidth", f"{n}x{d}", lambda x: ivfast.median_bandwidth(x, convention=convention), draw)
        testing.check(case, testing.inputs(case, dtype), "cpu")


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_middles_are_the_order_statistics_to_the_last_bit(isa, dtype, full):
    for n in [2, 3, 63, 64, 65, 127, 129, 200, KEPT, KEPT + 1, 401, 700]:
        x = whole(n, int(torch.randint(1, 9, ())), dtype=dtype)
        assert torch.equal(middles(x, full).double(), exact_middles(x, full)), n


def clusters(n, d):
    x = whole(n, d, largest=9)
    x[: n // 4] += 500
    x[n // 2 : n // 2 + n // 4] -= 500
    return x


ADVERSARIAL = {
    "all equal": lambda n: torch.ones(n, 3) * 7,
    "half duplicates": lambda n: whole(n // 2, 4).repeat(2, 1),
    "mostly duplicates": lambda n: torch.cat([whole(n // 10, 4), torch.zeros(n - n // 10, 4)]),
    "all ties": lambda n: torch.cat([torch.eye(n // 2), -torch.eye(n // 2)])[:, : n // 2] * 8,
    "few values": lambda n: whole(n, 2, largest=1),
    "codes": lambda n: (whole(n, 33, largest=1) > 0).float() * 2 - 1,
    "two clusters": lambda n: clusters(n, 3),
    "two points": lambda n: torch.cat([torch.ones(n // 2, 2), -torch.ones(n - n // 2, 2)])[: n // 2 * 2],
    "classes in turn": lambda n: clusters(n, 3)[torch.arange(n // 4 * 4).view(4, -1).T.flatten()],
    "sorted": lambda n: whole(n, 1).sort(0).values,
    "evenly spaced": lambda n: (torch.arange(n // 2 * 2).float() * 2 - n // 2 * 2 + 1)[:, None],
    "heavy tails": lambda n: torch.cat([whole(n - 20, 2, largest=3), whole(20, 2, largest=700)]),
    "one far away": lambda n: torch.cat([whole(n - 2, 2, largest=3), torch.tensor([[900.0, 0], [-900, 0]])]),
}


@pytest.mark.parametrize("data", ADVERSARIAL)
@pytest.mark.parametrize("n", [100, 600])
def test_adversarial_data(isa, data, n):
    x = ADVERSARIAL[data](n)
    if data == "codes":
        x = torch.cat([x, -x])
    for full in (False, True):
        assert torch.equal(middles(x, full).double(), exact_middles(x, full))
        check_gradient(x, full)


def check_gradient(x, full=False):
    """Against the formula in float64 on the kernel's own middles, which are exact here."""
    dtype, x64 = x.dtype, x.double()
    for squared in (False, True):
        found = middles(x, full).double()
        ours = gradient(x, torch.tensor(1.5, dtype=dtype), full, squared).double()
        d2 = squared_distances(x)
        slope = [0.5, 0.5] if squared else [float(found.sqrt().sum() / (4 * m.sqrt())) if m > 0 else 0.0 for m in found]
        expected = torch.zeros_like(x64)
        if found.sqrt().sum() > 0:
            for m, s in zip(found, slope, strict=True):
                c = ((d2 == m) & (m > 0)).double()
                expected += 1.5 * s * 4 / c.sum().clamp_min(1) * (c.sum(1, keepdim=True) * x64 - c @ x64)
        assert testing.error(ours, expected) <= testing.TOLERANCES[dtype]


def test_half_precision_is_exact_too(isa):
    for dtype in (torch.bfloat16, torch.float16):
        for n in (80, 500):
            x = whole(n, 3, largest=200).to(dtype)
            assert torch.equal(middles(x).double(), exact_middles(x))


@pytest.mark.parametrize("data", ["normal", *ADVERSARIAL])
def test_a_bracket_that_misses_is_noticed(isa, reach, data):
    x = torch.randn(500, 5) if data == "normal" else ADVERSARIAL[data](500)
    expected = middles(x), middles(x, full=True)
    taken = 0
    for wrong in (0.0, -10.0, 30.0, 1e9):  # a point; an empty bracket; too many to keep; everything
        reach(wrong)
        before = HISTOGRAMS()
        assert torch.equal(middles(x), expected[0])
        assert torch.equal(middles(x, full=True), expected[1])
        taken += HISTOGRAMS() - before
    assert taken > 0 or data in ("all equal", "mostly duplicates", "all ties", "two points")


def test_ordinary_data_needs_no_second_pass():
    before = HISTOGRAMS()
    for data in ADVERSARIAL:
        middles(ADVERSARIAL[data](600))
    for _ in range(20):
        middles(torch.randn(500, 7))
    assert HISTOGRAMS() - before <= 1  # ±4σ: a miss in ten thousand


def test_many_particles_against_a_sort():
    x = torch.randn(8192, 64)
    found = middles(x).double()
    p = torch.pdist(x.double()).square()
    ranks = (len(p) - 1) // 2, len(p) // 2
    torch.testing.assert_close(found[0], p.kthvalue(ranks[0] + 1).values, rtol=1e-6, atol=0)
    for m, rank in zip(found, ranks, strict=True):
        # by rank: u is a sum of 64 products and two norms, rounded by at most 1e-6 of those
        assert (p < m * (1 - 2e-6)).sum() <= rank < (p <= m * (1 + 2e-6)).sum()


@pytest.mark.parametrize("shape", [(90, 20), (500, 12), (1100, 70)], ids=str)
def test_gradient_moves_the_middle_pair_alone(isa, shape):
    x = torch.randn(shape)
    dx = gradient(x, torch.tensor(1.0)).double()
    moved = dx.abs().sum(1).nonzero().flatten()
    assert 2 <= len(moved) <= 20  # among 600,000 distances a few pairs tie in float32
    found = middles(x).double()
    torch.testing.assert_close(dx.sum(0), torch.zeros(shape[1], dtype=torch.float64), rtol=0, atol=1e-6)
    # h is a square: ⟨x, ∂h/∂x⟩ = 2h
    torch.testing.assert_close((dx * x.double()).sum(), found.sum(), rtol=1e-5, atol=0)
    if len(moved) == 2 and found[0] == found[1]:
        i, j = moved
        torch.testing.assert_close(dx[i], 2 * (x[i] - x[j]).double())


@pytest.mark.parametrize("shape", [(700, 90), (1, 450, 24), (3, 400, 33), (40, 65, 20), (2600, 3)], ids=str)
def test_the_number_of_threads_does_not_change_a_bit(shape, threads):
    x, grad = torch.randn(shape), torch.randn(shape[:-2])
    threads(1)
    expected = [*torch.ops.ivfast.median_bandwidth(x, False, False, 2.0), gradient(x, grad)]
    for count in (2, 3, 7):
        threads(count)
        actual = [*torch.ops.ivfast.median_bandwidth(x, False, False, 2.0), gradient(x, grad)]
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True)), f"{count} threads"


def test_the_slow_way_and_many_ties_do_not_depend_on_threads_either(threads, reach):
    x = (torch.randn(1500, 9) * 2).round()
    results = []
    for count in (1, 3):
        threads(count)
        reach(0.0)
        results.append([middles(x), gradient(x, torch.tensor(1.0))])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("n", [33, 400])
def test_a_batch_is_its_sets_and_strides_do_not_matter(n):
    x, grad = torch.randn(5, n, 2, 7).permute(2, 0, 3, 1), torch.randn(5, 2).T  # [2, 5, 7, n]
    x = x.mT
    h, found = torch.ops.ivfast.median_bandwidth(x, True, False, 3.0)
    dx = torch.ops.ivfast.median_bandwidth_backward(grad, x, found, False, 3.0)
    assert all(tensor.is_contiguous() for tensor in (h, found, dx))
    for i in range(2):
        for j in range(5):
            one, pair = torch.ops.ivfast.median_bandwidth(x[i, j].clone(), True, False, 3.0)
            assert torch.equal(one, h[i, j])
            assert torch.equal(pair, found[i, j])
            alone = torch.ops.ivfast.median_bandwidth_backward(grad[i, j].clone(), x[i, j].clone(), pair, False, 3.0)
            assert torch.equal(alone, dx[i, j])


def test_no_sets():
    h, found = torch.ops.ivfast.median_bandwidth(torch.empty(0, 4, 3), True, True, 1.0)
    assert h.shape == (0,)
    assert found.shape == (0, 2)


@pytest.mark.parametrize("n", [1, 5, 500])
def test_values_that_are_no_numbers_end(isa, n):
    for value in (float("nan"), float("inf"), 1e30):
        x = torch.randn(n, 3)
        x[n // 2, 1] = value
        for full in (True, False):
            h, found = torch.ops.ivfast.median_bandwidth(x, full, False, 1.0)
            assert h.isnan() == (value != 1e30)
            assert found.isnan().all() == h.isnan()
            dx = torch.ops.ivfast.median_bandwidth_backward(torch.ones(()), x, found, False, 1.0)
            assert dx.isnan().all() == h.isnan()


def test_zero_middles_take_the_spread():
    x = torch.zeros(30, 2)
    x[3] = torch.tensor([3.0, 4.0])
    h, found = torch.ops.ivfast.median_bandwidth(x, False, False, 2.0)
    torch.testing.assert_close(h, torch.tensor(25 / 30 / 2))
    assert torch.equal(found, torch.zeros(2))
    x.zero_()
    assert torch.ops.ivfast.median_bandwidth(x, False, False, 2.0)[0] == 1


def test_middles_of_other_particles_are_refused():
    with pytest.raises(RuntimeError, match="middles must be squared distances of x"):
        torch.ops.ivfast.median_bandwidth_backward(torch.ones(()), torch.randn(9, 3), torch.ones(2), False, 1.0)


def test_memory_is_not_that_of_the_distances():
    # the distances alone would be 134 MB, and x is 2 MB; VmHWM is the peak of a fresh process
    script = """
import re, torch, ivfast
peak = lambda: int(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1])
def run(n):
    x = torch.randn(n, 64, requires_grad=True)
    ivfast.median_bandwidth(x, convention="paper").backward()
run(600)
before = peak()
run(8192)
print(peak() - before)
"""
    if not sys.platform.startswith("linux"):
        pytest.skip("reads /proc")
    fresh = subprocess.run([sys.executable, "-c", script], cwd="/", check=True, capture_output=True, text=True)
    assert int(fresh.stdout) < 20_000  # kB


@pytest.mark.parametrize("far", [1e4, 1e5, 1e8])
@pytest.mark.parametrize("n", [20, 60, 500])
def test_particles_far_from_most(isa, n, far):
    # norms of 1e10 or 1e16 beside distances of 1: float32 products leave nothing of those
    def some_far(x):
        x[: n // 15] *= far
        return x.float().double()

    x = drawn(n, 3, change=some_far).float()
    exact = ivfast.median_bandwidth(x.double())
    assert testing.error(ivfast.median_bandwidth(x), exact) <= testing.TOLERANCES[torch.float32]
    ours, theirs = x.requires_grad_(), x.detach().double().requires_grad_()
    a, b = (torch.autograd.grad(ivfast.median_bandwidth(y), y)[0] for y in (ours, theirs))
    assert testing.error(a, b) <= testing.TOLERANCES[torch.float32]


@pytest.mark.parametrize("implementation", ["cpu", "reference"])
@pytest.mark.parametrize("convention", ["paper", "liu-wang"])
@pytest.mark.parametrize("n", [60, 400])
def test_the_ends_of_the_range(isa, n, convention, implementation):
    """h is right wherever float32 holds it. If it does not hold the middles, the gradient is NaN."""
    for d, scale, held in ((2, 1e-19, True), (2, 7e18, True), (10, 7e18, False)):
        x = (drawn(n, d) * scale).float()
        ours, theirs, grad = x.clone().requires_grad_(), x.double().requires_grad_(), torch.tensor(0.01 / scale)
        with ivfast.use(implementation):
            h = ivfast.median_bandwidth(ours, convention=convention)
            (dx,) = torch.autograd.grad(h, ours, grad)
        expected = ivfast.median_bandwidth(theirs, convention=convention)
        assert abs(h.double() / expected - 1) < 1e-5
        if held:
            assert testing.error(dx, torch.autograd.grad(expected, theirs, grad.double())[0]) < 1e-5
        else:
            assert dx.isnan().all()


def test_middles_that_are_neighbours_in_float32(isa):
    """A particle far away, so that the pairs are found in float64: each belongs to the middle that it rounds to."""
    above = float(torch.nextafter(torch.tensor(1.5), torch.tensor(2.0)))
    # the middles are the diagonals, whose squares are 4.5 and 4.5 + 3.6e-7
    x = torch.tensor([[0, 0], [1.5, 0], [1.5, 1.5], [0, above], [1e4, 0]])
    low, high = middles(x).tolist()
    assert torch.nextafter(torch.tensor(low), torch.tensor(5.0)) == high
    expected = torch.zeros(5, 2)
    expected[:4] = x[:4] - x[[2, 3, 0, 1]]
    assert torch.allclose(gradient(x, torch.tensor(1.0)), expected, rtol=0, atol=1e-6)
