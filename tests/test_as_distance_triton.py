"""AS-Distance in Triton, interpreted if there is no GPU."""

import pytest
import torch
from helpers import size

import ivfast
from ivfast import testing

HALF = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *HALF)
device = "cuda" if torch.cuda.is_available() else "cpu"  # interpreted on the CPU: tests/conftest.py
pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),  # 2^-inf, in the interpreter's NumPy
]


def check(case, dtype=torch.float32):
    testing.check(case, testing.inputs(case, dtype, device=device), "triton")


@pytest.fixture
def large_tiles(monkeypatch):
    """The interpreter's time grows with the number of tiles."""
    from ivfast.kernels import as_distance, as_distance_backward

    for module in (as_distance, as_distance_backward):
        monkeypatch.setattr(module, "OTHERS", 128)


def as_case(n, m, d, *, batch=(), logvar=(-3.0, 1.0), shift=0.0, apart=0.0, log=True, slack=1.0, unit=0.0, **form):
    def draw(generator):
        def one(rows, shift):
            mu = torch.randn(*batch, rows, d, generator=generator, dtype=torch.float64) + shift
            low, high = logvar
            return mu, torch.rand(mu.shape, generator=generator, dtype=torch.float64) * (high - low) + low

        return *one(n, shift), *one(m, shift + apart)

    def function(*q):
        return ivfast.as_distance(*q, log=log, **form)

    unit = 1.0 if log else unit  # a logarithm is as accurate as its argument, and may be close to 0
    return testing.Case("as_distance", f"{(*batch, n, m, d)} {form}", function, draw, slack=slack, unit=unit)


FORMS = [(kernel, measure) for kernel in ("product", "additive") for measure in ("lebesgue", "prior")]


@pytest.mark.usefixtures("large_tiles")
class TestAsDistance:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize(("kernel", "measure"), FORMS)
    @pytest.mark.parametrize(("n", "m", "d"), [(2, 3, 1), (17, 2, 5), (3, 65, 13)])
    def test_edges(self, n, m, d, kernel, measure, dtype):
        form = {"kernel": kernel, "measure": measure, "unbiased": bool(size(0, 1))}
        check(as_case(n, m, d, batch=(size(1, 2),), **form), dtype)

    @pytest.mark.parametrize(("kernel", "measure"), FORMS)
    @pytest.mark.parametrize("log", [False, True])
    def test_value_of_both_kinds(self, kernel, measure, log):
        check(as_case(5, 4, 3, kernel=kernel, measure=measure, log=log, unbiased=log, unit=0.01))

    @pytest.mark.parametrize("measure", ["lebesgue", "prior"])
    def test_log_sums(self, measure):
        case = as_case(6, 7, 9)
        check(case._replace(function=lambda *q: ivfast.log_gaussian_kernel_sums(*q, measure=measure, unbiased=True)))

    @pytest.mark.parametrize("d", [16, 64, 65, 130])
    def test_dimensions(self, d):
        # |log k| up to 6 d, so exp(log k − log Σ) is off by as many eps
        check(as_case(9, 6, d, measure="prior" if d % 2 else "lebesgue", slack=1 + d / 10))

    def test_many_dimensions(self):
        check(as_case(5, 4, 512, slack=50))  # as above

    def test_several_tiles(self):
        check(as_case(130, 3, 2, unbiased=True))

    @pytest.mark.parametrize(("kernel", "measure"), FORMS)
    @pytest.mark.parametrize("logvar", [(-10.0, -9.0), (9.5, 10.5), (-10.0, 10.0), (-30.0, 30.0)])
    def test_extreme_variances(self, kernel, measure, logvar):
        # only the sums: for wide Gaussians all are equal, and D cancels. Between narrow ones |log k| is 10⁴ to 10⁵, and
        # log Σ is rounded to that many eps before exp(log k − log Σ)
        case = as_case(7, 5, 6, logvar=logvar, slack=300)

        def sums(*q):
            return ivfast.log_gaussian_kernel_sums(*q, kernel=kernel, measure=measure)

        check(case._replace(function=sums))

    @pytest.mark.parametrize(("kernel", "measure"), FORMS)
    def test_far_batches(self, kernel, measure):
        # log k of about −30 d
        check(as_case(7, 5, 6, apart=10.0, kernel=kernel, measure=measure, slack=10))

    @pytest.mark.parametrize("kernel", ["product", "additive"])
    def test_shifted_mean(self, kernel):
        # inputs with mean 10 leave float32 ten times less precision in each difference
        check(as_case(7, 5, 6, shift=10.0, kernel=kernel, slack=10))

    @pytest.mark.parametrize(("kernel", "measure"), FORMS)
    def test_equal_batches_and_duplicates(self, kernel, measure):
        mu = torch.randn(4, 3, device=device).repeat(2, 1).requires_grad_()
        logvar = torch.randn(4, 3, device=device).repeat(2, 1).requires_grad_()
        q = mu, logvar, mu.detach(), logvar.detach()
        for log in (False, True):
            with ivfast.use("triton"):
                value = ivfast.as_distance(*q, kernel=kernel, measure=measure, log=log)
                gradients = torch.autograd.grad(value, (mu, logvar))
            assert abs(float(value.detach())) < 2e-6
            assert all(float(g.abs().max()) < 2e-6 for g in gradients)

    def test_one_gaussian(self):
        check(as_case(1, 1, 4, log=False, unit=0.01))

    def test_splits_strides_and_bits(self, monkeypatch):
        from ivfast.kernels import as_distance, as_distance_backward, particles
        from ivfast.kernels.card import card

        monkeypatch.setattr(as_distance, "OTHERS", 32)
        monkeypatch.setattr(as_distance_backward, "OTHERS", 64)
        q = [torch.randn(2, 3, n, device=device).mT.requires_grad_() for n in (40, 40, 9, 9)]
        results = []
        for processors in (0, 132, 132):
            found = card(q[0].device)._replace(processors=processors)
            monkeypatch.setattr(particles, "card", lambda device, found=found: found)
            with ivfast.use("triton"):
                value = ivfast.as_distance(*q, log=True)
                results.append([value.detach(), *torch.autograd.grad(value.sum(), q)])
        assert all(torch.equal(a, b) for a, b in zip(*results[1:], strict=True))
        for a, b in zip(*results[:2], strict=True):
            assert b.is_contiguous()
            assert testing.error(a, b.double()) < 2e-6

    def test_no_sets_and_no_float64(self):
        q = [torch.empty(0, n, 3, device=device) for n in (4, 4, 5, 5)]
        with ivfast.use("triton"):
            assert ivfast.as_distance(*q).shape == (0,)
            with pytest.raises(TypeError, match=r"in Triton takes float32.*got torch.float64"):
                ivfast.as_distance(*(t.double() for t in q))
