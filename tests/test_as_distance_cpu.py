"""The C++ AS-Distance beyond the case table: instruction sets, tiles, threads, extremes, memory."""

import contextlib
import itertools
import math
import subprocess
import sys

import pytest
import torch

import ivfast
from ivfast import testing

pytest.importorskip("ivfast._C")

FORMS = [
    {"kernel": kernel, "measure": measure}
    for kernel, measure in itertools.product(("product", "additive"), ("lebesgue", "prior"))
]


@pytest.fixture(params=FORMS, ids=lambda form: "-".join(form.values()))
def form(request):
    return request.param


def draw(n, m, d, dtype=torch.float32, batch=(), logvar=(-3.0, 1.0), shift=0.0):
    """Means of g are `shift` away from those of r; log-variances are uniform over a range."""
    low, high = logvar

    def one(rows, at):
        mu = torch.randn(*batch, rows, d, dtype=torch.float64) + at
        return mu.to(dtype), (torch.rand(*batch, rows, d, dtype=torch.float64) * (high - low) + low).to(dtype)

    return [x.requires_grad_() for x in (*one(n, 0.0), *one(m, shift))]


def sums_and_gradients(tensors, cotangent, **form):
    sums = ivfast.log_gaussian_kernel_sums(*tensors, **form)
    return [sums.detach(), *torch.autograd.grad(sums, tensors, cotangent.to(sums))]


def compare(tensors, slack=1.0, cotangent=None, **form):
    """Log-sums and gradients against the float64 reference, within TOLERANCES times the size of the numbers.

    Rounding log k changes every weight by |log k| eps, so the tolerance of gradients grows with |log k|.
    """
    dtype = tensors[0].dtype
    cotangent = torch.randn(*tensors[0].shape[:-2], 3).bfloat16() if cotangent is None else cotangent
    exact = [t.detach().double().requires_grad_() for t in tensors]
    with ivfast.use("reference"):
        expected = sums_and_gradients(exact, cotangent, **form)
    with ivfast.use("cpu"):
        actual = sums_and_gradients(tensors, cotangent, **form)
    tolerance = testing.TOLERANCES[dtype]
    wide = testing.TOLERANCES[torch.promote_types(dtype, torch.float32)]
    assert testing.error(actual[0], expected[0], 1.0) <= wide / 2, f"log-sums of {[*tensors[0].shape]} {form}"
    size = float(expected[0].abs().max()) if form.get("kernel") != "additive" else 1.0
    allowed = slack * (
        tolerance + 8 * torch.finfo(tensors[0].dtype if dtype == torch.float64 else torch.float32).eps * size
    )
    for kind, pair in (("mu", (1, 3)), ("logvar", (2, 4))):
        unit = max(float(expected[i].abs().max()) for i in pair)
        for i in pair:
            error = testing.error(actual[i], expected[i], unit)
            assert error <= allowed, f"d{kind} of {[*tensors[0].shape]} {form} is off by {error:.1e} of {allowed:.1e}"


@pytest.mark.parametrize("dtype", testing.TOLERANCES, ids=str)
def test_each_instruction_set_is_right_at_the_edges_of_tiles(isa, form, dtype):
    sizes = [
        *torch.randint(2, 71, (4, 3)).tolist(),
        [31, 33, 1],
        [64, 65, 16],
        [2, 130, 17],
        [129, 3, 35],
        [1, 1, 4],
    ]
    for i, (n, m, d) in enumerate(sizes):
        compare(draw(n, m, d, dtype), **form, unbiased=i % 2 == 0 and min(n, m) > 1)


@pytest.mark.parametrize("d", [512, 1024])
def test_each_instruction_set_is_right_in_many_dimensions(isa, form, d):
    compare(draw(9, 17, d), **form)


@pytest.mark.parametrize(("n", "m", "d"), [(300, 140, 24), (700, 600, 6)])
def test_blocks_of_many_tiles_are_right(form, n, m, d):
    compare(draw(n, m, d), **form)


@pytest.mark.parametrize(
    "logvar", [(-10.0, 4.0), (-10.5, -9.5), (9.5, 10.5), (-30.0, 20.0), (-30.0, -29.0), (19.0, 20.0)]
)
def test_variances_far_out(isa, form, logvar):
    # e^±30 takes products of four variances out of range; e^-30 alone makes log k about 1e14, with a large eps
    tensors = draw(20, 9, 37, logvar=logvar)
    if logvar[0] < -20:
        for mu in tensors[::2]:
            mu.data *= 1e-6
    compare(tensors, **form)


@pytest.mark.parametrize("shift", [1e2, 1e4])
def test_batches_far_apart(isa, form, shift):
    tensors = draw(21, 18, 5, logvar=(-1.0, 1.0), shift=shift)
    # the logarithms of far terms are −10⁶ or lower, so that rounding destroys the terms' shares: those between the
    # batches and, if weighted by the prior, those within g, which is far from it
    near = torch.tensor([0.5, 2.0 if form["measure"] == "lebesgue" else 0.0, 0.0])
    compare(tensors, cotangent=near, **form)
    if form["kernel"] == "product":  # the one weight of a single pair is 1, however far
        tensors = draw(1, 1, 5, logvar=(-1.0, 1.0), shift=shift)
        compare(tensors, cotangent=torch.tensor([0.0, 0.0, 1.0]), **form, slack=5)


def test_log_kernels_keep_five_digits_at_512_dimensions(isa):
    for logvar in ((-3.0, 1.0), (-10.0, 4.0)):
        tensors = [t.detach() for t in draw(1, 1, 512, batch=(200,), logvar=logvar)]
        with ivfast.use("reference"):
            exact = ivfast.log_gaussian_kernel_sums(*(t.double() for t in tensors))
        log_k = ivfast.log_gaussian_kernel_sums(*tensors)
        # log k may cross 0: the sums of its positive and of its negative terms are about 100
        assert ((log_k - exact).abs() <= 1e-5 * exact.abs().clamp_min(100)).all()


def test_additive_kernel_is_the_per_dimension_form_in_circulation():
    # the loop of the authors' code: one normal density per pair and dimension, averaged
    q = [t.detach() for t in draw(5, 4, 3, torch.float64)]

    def mean(u, logvar, v, other):
        total = 0.0
        for i, j, k in itertools.product(range(len(u)), range(len(v)), range(u.shape[1])):
            s = math.exp(logvar[i, k]) + math.exp(other[j, k])
            total += math.exp(-((float(u[i, k] - v[j, k])) ** 2) / (2 * s)) / math.sqrt(2 * math.pi * s)
        return total / (u.shape[0] * v.shape[0] * u.shape[1])

    r, g = q[:2], q[2:]
    expected = mean(*r, *r) + mean(*g, *g) - 2 * mean(*r, *g)
    assert float(ivfast.as_distance(*q, kernel="additive")) == pytest.approx(expected, rel=1e-11)


@pytest.mark.parametrize(
    ("n", "m", "d", "batch"),
    [(260, 130, 40, ()), (70, 90, 24, (3,)), (65, 64, 20, (40,)), (500, 300, 100, (1,))],
    ids=str,
)
def test_the_number_of_threads_does_not_change_a_bit(form, n, m, d, batch, threads):
    tensors, cotangent = draw(n, m, d, batch=batch), torch.randn(*batch, 3)
    threads(1)
    expected = sums_and_gradients(tensors, cotangent, **form)
    for count in (2, 3, 7):
        threads(count)
        for a, b in zip(sums_and_gradients(tensors, cotangent, **form), expected, strict=True):
            assert torch.equal(a, b), f"{count} threads"


def test_a_batch_is_a_loop(form):
    tensors, cotangent = draw(33, 20, 7, batch=(2, 3)), torch.randn(2, 3, 3)
    actual = sums_and_gradients(tensors, cotangent, **form)
    for at in itertools.product(range(2), range(3)):
        alone = [t[at].detach().requires_grad_() for t in tensors]
        for a, b in zip(actual, sums_and_gradients(alone, cotangent[at], **form), strict=True):
            assert torch.equal(a[at], b)


def test_strides_do_not_matter(form):
    views = [torch.randn(5, rows, 4, 19).permute(2, 0, 3, 1).requires_grad_() for rows in (33, 33, 33, 33)]
    cotangent = torch.randn(3, 4, 5).permute(1, 2, 0)
    packed = [t.detach().contiguous().requires_grad_() for t in views]
    actual = sums_and_gradients(views, cotangent, **form)
    for a, b in zip(actual, sums_and_gradients(packed, cotangent.contiguous(), **form), strict=True):
        assert torch.equal(a, b)
    assert actual[0].is_contiguous()


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("unbiased", [False, True])
def test_the_distance_is_made_of_the_sums(form, log, unbiased):
    # slack: D is a difference of means that nearly cancel
    case = testing.Case(
        "as_distance",
        "forms",
        lambda *q: ivfast.as_distance(*q, **form, log=log, unbiased=unbiased),
        lambda generator: draw(20, 9, 3, torch.float64),
        unit=1.0 if log else 0.05,
    )
    testing.check(case, testing.inputs(case, torch.float32), "cpu")
    testing.check(case, testing.inputs(case, torch.float64), "cpu")


def test_gradcheck(form):
    tensors = draw(3, 2, 5, torch.float64)
    with ivfast.use("cpu"):
        for unbiased, log in itertools.product((False, True), (False, True)):
            assert torch.autograd.gradcheck(
                lambda *q, log=log, unbiased=unbiased: ivfast.as_distance(*q, **form, log=log, unbiased=unbiased),
                tensors,
            )


def test_the_distance_is_not_negative_and_nearly_0_for_equal_batches(isa, form):
    for n, d in ((2, 1), (40, 3), (70, 33)):
        q = [t.detach() for t in draw(n, n, d)]
        for log in (False, True):
            # D is zero up to the rounding of mean k(r, r')
            one = float(ivfast.log_gaussian_kernel_sums(*q[:2], *q[:2], **form)[0]) - 2 * math.log(n)
            unit = 1.0 if log else math.exp(one)
            assert abs(float(ivfast.as_distance(*q[:2], *q[:2], **form, log=log))) <= 1e-6 * unit
            assert float(ivfast.as_distance(*q, **form, log=log)) >= -1e-6 * unit


def test_duplicates_count_as_often_as_they_stand(form):
    q = [t.detach() for t in draw(7, 5, 9)]
    once = ivfast.as_distance(*q, **form, log=True)
    twice = ivfast.as_distance(*(t.repeat(2, 1) for t in q), **form, log=True)
    assert float(twice) == pytest.approx(float(once), abs=1e-5)


def test_exchanging_the_batches_exchanges_the_gradients(form):
    tensors = draw(35, 20, 6)
    cotangent = torch.tensor([0.3, -1.2, 0.7])
    sums, *gradients = sums_and_gradients(tensors, cotangent, **form)
    swapped, *others = sums_and_gradients([*tensors[2:], *tensors[:2]], cotangent[[1, 0, 2]], **form)
    for a, b in zip((sums, *gradients), (swapped[[1, 0, 2]], *others[2:], *others[:2]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_nan_shows_where_it_matters(form):
    for k in range(4):
        tensors = draw(70, 66, 5)
        tensors[k].data[65, 2] = math.nan
        sums, *gradients = sums_and_gradients(tensors, torch.ones(3), **form)
        assert sums.isnan().tolist() == [k < 2, k >= 2, True]
        assert all(g.isnan().any() for g in gradients)


def test_empty_batches_of_problems():
    q = [torch.randn(0, 3, 4, requires_grad=True) for _ in range(4)]
    value = ivfast.as_distance(*q)
    assert value.shape == (0,)
    assert all(g.shape == (0, 3, 4) for g in torch.autograd.grad(value.sum(), q))


def test_memory_grows_with_n_and_not_with_its_square():
    # log k alone would be 400 MB per kind; VmHWM is the peak of a fresh process
    script = """
import re, torch, ivfast
peak = lambda: int(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1])
def run(n):
    q = [torch.randn(n, 8, requires_grad=True) for _ in range(4)]
    ivfast.as_distance(*q, log=True).backward()
run(600)
before = peak()
run(10_000)
print(peak() - before)
"""
    if not sys.platform.startswith("linux"):
        pytest.skip("reads /proc")
    fresh = subprocess.run([sys.executable, "-c", script], cwd="/", check=True, capture_output=True, text=True)
    grown = int(fresh.stdout)
    assert grown < 30_000  # kB


def test_gradients_do_not_overflow_on_the_way():
    """1/P is 10³² and the kernel 10³¹, whose product float32 does not hold; a gradient in log l is of the order of D."""
    q = [torch.randn(6, 2, dtype=torch.float64) * 1e-17 for _ in range(2)]
    q = [q[0], torch.full((6, 2), -75.0, dtype=torch.float64), q[1], torch.full((6, 2), -74.0, dtype=torch.float64)]
    results = []
    for dtype in (torch.float64, torch.float32):
        tensors = [x.to(dtype, copy=True).requires_grad_() for x in q]
        with ivfast.use("reference") if dtype == torch.float64 else contextlib.nullcontext():
            value = ivfast.as_distance(*tensors)
            results.append([value.detach(), *torch.autograd.grad(1e-5 * value, tensors)])
    for ours, exact in list(zip(*results[::-1], strict=True))[::2]:  # D and the gradients in log l
        assert exact.abs().max() > 0
        assert (ours.double() - exact).abs().max() < 1e-4 * exact.abs().max()  # `testing.error` has a floor of 1e-30


def test_gradients_do_not_underflow_on_the_way():
    """1/P is 10⁻¹⁷ and the kernel 10⁻³⁶, whose product float32 does not hold; a gradient in log l is of the order of D."""
    q = [scale * torch.randn(5, 4, dtype=torch.float64) + logvar for scale, logvar in ((1e8, 0.0), (0.3, 38.0)) * 2]
    results = []
    for dtype in (torch.float64, torch.float32):
        tensors = [x.float().to(dtype, copy=True).requires_grad_() for x in q]
        with ivfast.use("reference") if dtype == torch.float64 else contextlib.nullcontext():
            value = ivfast.as_distance(*tensors)
            results.append([value.detach(), *torch.autograd.grad(value, tensors)])
    for ours, exact in list(zip(*results[::-1], strict=True))[::2]:  # D and the gradients in log l
        assert exact.abs().max() > 1e-38
        assert (ours.double() - exact).abs().max() < 1e-4 * exact.abs().max()  # `testing.error` has a floor of 1e-30
