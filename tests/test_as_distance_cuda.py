"""AS-Distance in CUDA C++, run on the CPU by tests/simt."""

import pytest
import torch
from helpers import by_cuda, same_bits_in_every_schedule, size

import ivfast
from ivfast import testing
from ivfast.testing import Case

HALF = (torch.bfloat16, torch.float16)


def matches(case: Case, dtype: torch.dtype = torch.float32):
    testing.check(case, testing.inputs(case, dtype), "cuda")


FORMS = [
    {"kernel": kernel, "measure": measure} for kernel in ("product", "additive") for measure in ("lebesgue", "prior")
]
FORM_NAMES = [f"{form['kernel']}-{form['measure']}" for form in FORMS]


def gaussians(n, m, d, *, batch=(), spread=1.0, logvars=(-3.0, 1.0), transform=lambda *q: q):
    """Means and log-variances of n and m posteriors, log-variances over the range of a trained VAE."""
    low, high = logvars

    def draw(generator):
        def one(rows):
            mu = spread * torch.randn(*batch, rows, d, generator=generator, dtype=torch.float64)
            return mu, low + (high - low) * torch.rand(*batch, rows, d, generator=generator, dtype=torch.float64)

        return transform(*one(n), *one(m))

    return draw


def distance_case(n, m, d, *, slack=1.0, log=True, unit=0.0, **options) -> Case:
    """The log-sums and D, each with its own gradient."""
    form = {key: options.pop(key) for key in ("kernel", "measure", "unbiased") if key in options}

    def function(*q):
        return ivfast.log_gaussian_kernel_sums(*q, **form), ivfast.as_distance(*q, log=log, **form)

    label = f"{(n, m, d)} {form} {options}"
    unit = max(unit, 1.0) if log else unit  # a logarithm is as accurate as its argument, and may be close to 0
    return Case("as_distance", label, function, gaussians(n, m, d, **options), slack=slack, unit=unit)


def rounding(log_k: float) -> float:
    """Gradients contain exp(log k − log Σ), off by |log k| eps; 2e-5 allows for |log k| below 100."""
    return max(1.0, log_k / 100)


@pytest.mark.usefixtures("simt")
@pytest.mark.parametrize("form", FORMS, ids=FORM_NAMES)
class TestAsDistance:
    @pytest.mark.parametrize(
        ("n", "m", "d"),
        [(1, 1, 1), (2, 3, 3), (1, 17, 16), (17, 2, 64), (64, 64, 16), (100, 33, 3), (9, 12, 128), (20, 40, 33)],
    )
    def test_sizes(self, form, n, m, d):
        matches(distance_case(n, m, d, slack=rounding(5 * d), **form))

    @pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
    def test_random_sizes(self, form, dtype):
        for unbiased in (False, True):
            batch = [size(1, 3) for _ in range(size(1, 2))]
            d = size(1, 40)
            matches(distance_case(size(2, 40), size(2, 40), d, batch=batch, unbiased=unbiased, slack=2, **form), dtype)
            matches(distance_case(size(2, 9), size(2, 9), size(1, 4), unbiased=unbiased, log=False, unit=0.05, **form))

    def test_one_sample_more_than_a_tile(self, form):
        # the last diagonal tile of (r, r') has one pair, which the unbiased form leaves out
        matches(distance_case(17, 33, 5, unbiased=True, **form))

    def test_duplicates_and_equal_batches(self, form):
        for unbiased in (False, True):
            case = distance_case(
                20,
                20,
                6,
                transform=lambda u, l, v, k: (u[:10].repeat(2, 1), l[:10].repeat(2, 1), u, l),
                **form,
                unbiased=unbiased,
            )
            matches(case)
        u, l = torch.randn(23, 6), torch.randn(23, 6)
        with ivfast.use("cuda"):
            sums = ivfast.log_gaussian_kernel_sums(u, l, u.clone(), l.clone(), **form)
            assert testing.error(sums, sums[:1].double().expand(3)) < 1e-6

    def test_extreme_variances(self, form):
        # t² − c/P for variances e^±10 is up to e^10, next to others of e^-10
        matches(distance_case(20, 30, 9, logvars=(-10.0, 10.0), slack=rounding(1e3), **form))
        # D is a difference of logarithms of about 60
        for logvar in (-10.0, 10.0):
            equal = {"logvars": (logvar, logvar), "spread": 0.01, "unit": 10.0}
            matches(distance_case(20, 30, 9, slack=rounding(300), **equal, **form))

    def test_far_batches(self, form):
        # δ²/s is 1e4 per dimension: exp of half of it is outside float32, and log k of (r, g) is off by 1e4 eps
        far = {"transform": lambda u, l, v, k: (u, l, v + 100.0, k), "logvars": (-1.0, 1.0)}
        matches(distance_case(20, 30, 7, slack=rounding(1e5), **far, **form))

    def test_gradients_of_one_output(self, form):
        tensors = [torch.randn(2, 9, 5) for _ in range(4)]
        additive, prior = form["kernel"] == "additive", form["measure"] == "prior"
        options = additive, prior, False, True
        _, sums = torch.ops.ivfast.as_distance.cuda(*tensors, *options)
        dvalue, dsums = torch.randn(2), torch.randn(2, 3, dtype=torch.float64)
        backward = torch.ops.ivfast.as_distance_backward
        for gradients in ((dvalue, None), (None, dsums), (dvalue, dsums)):
            ours = backward.cuda(*tensors, sums, *gradients, *options)
            doubles = [None if g is None else g.double() for g in gradients]
            theirs = backward.default(*(t.double() for t in tensors), sums, *doubles, *options)
            scale = max(float(t.abs().max()) for t in theirs)
            for a, b in zip(ours, theirs, strict=True):
                assert testing.error(a, b, scale) <= testing.TOLERANCES[torch.float32]

    @pytest.mark.parametrize(("n", "m", "d"), [(20, 17, 16), (5, 4, 70)])
    def test_every_schedule_gives_the_same_bits(self, simt, form, n, m, d):
        same_bits_in_every_schedule(simt, by_cuda(distance_case(n, m, d, batch=(2,), **form)))


@pytest.mark.usefixtures("simt")
class TestAsDistanceArguments:
    def test_largest_sizes(self):
        # D itself is 1e-100, so compare logarithms
        for n, m, d in ((256, 200, 8), (128, 100, 128)):
            matches(distance_case(n, m, d, slack=rounding(5 * d), **FORMS[size(0, 3)]))

    def test_strides(self):
        r = [torch.randn(3, 12, 2, 21)[:, :, 1].mT, torch.randn(12, 21, 3).permute(2, 1, 0)]
        g = [torch.randn(3, 12, 35).mT[:, 3:], torch.randn(1, 1, 12).expand(3, 32, 12)]
        form, dvalue, dsums = (
            (False, False, False, False),
            torch.rand(()).expand(3),
            torch.rand(3, 3, dtype=torch.float64).mT,
        )
        results = []
        for copy in (lambda t: t, torch.Tensor.contiguous):
            q = [copy(t) for t in (*r, *g)]
            value, sums = torch.ops.ivfast.as_distance.cuda(*q, *form)
            backward = torch.ops.ivfast.as_distance_backward.cuda
            results.append((value, sums, *backward(*q, copy(sums.mT).mT, copy(dvalue), copy(dsums), *form)))
        for a, b in zip(*results, strict=True):
            assert a.is_contiguous()
            assert torch.equal(a, b)

    def test_rows_that_do_not_start_on_four_elements(self):
        form = False, False, True, False
        for dtype in (torch.float32, *HALF):
            storage = torch.randn(1 + 9 * 8).to(dtype)
            q = [storage[1:].view(9, 8), *(torch.randn(rows, 8).to(dtype) for rows in (9, 6, 6))]
            results = []
            for mu_r in (q[0], q[0].clone()):
                value, sums = torch.ops.ivfast.as_distance.cuda(mu_r, *q[1:], *form)
                dvalue = torch.ones(())
                backward = torch.ops.ivfast.as_distance_backward.cuda
                results.append((value, sums, *backward(mu_r, *q[1:], sums, dvalue, None, *form)))
            assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))

    def test_what_is_no_number_is_seen(self):
        q = [torch.randn(20, 5) for _ in range(4)]
        q[2][18, 3] = float("nan")
        with ivfast.use("cuda"):
            assert ivfast.log_gaussian_kernel_sums(*q).isnan().tolist() == [False, True, True]

    def test_no_sets(self):
        with ivfast.use("cuda"):
            q = [torch.empty(0, rows, 3, requires_grad=True) for rows in (4, 4, 5, 5)]
            value = ivfast.as_distance(*q)
            assert value.shape == (0,)
            assert torch.autograd.grad(value.sum(), q[2])[0].shape == (0, 5, 3)

    def test_what_it_does_not_serve_is_refused(self):
        with ivfast.use("cuda"):
            for n, m, d in ((257, 3, 2), (3, 257, 2), (3, 4, 129)):
                shapes = (n, d), (n, d), (m, d), (m, d)
                with pytest.raises(RuntimeError, match=rf"n, m <= 256 and d <= 128, got n = {n}, m = {m}, d = {d}"):
                    ivfast.as_distance(*map(torch.randn, shapes))
            with pytest.raises(RuntimeError, match=r"takes float32, bfloat16 or float16, got Double"):
                ivfast.as_distance(*(torch.randn(5, 3).double() for _ in range(4)))
