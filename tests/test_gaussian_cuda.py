"""Gaussian posteriors in CUDA C++, run on the CPU by tests/simt."""

import pytest
import torch
from helpers import cases, close, misaligned, same_bits_in_every_schedule

import ivfast
from ivfast import testing
from ivfast.ops.gaussian import _reparameterize_backward_reference, gaussian_kl_reference
from ivfast.testing import Case

HALF = (torch.bfloat16, torch.float16)
pytestmark = pytest.mark.usefixtures("simt")
dtypes = pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)


def matches(case: Case, dtype: torch.dtype = torch.float32):
    testing.check(case, testing.inputs(case, dtype), "cuda")


def posterior_case(shape, *, sample=False, scale=1.0) -> Case:
    def draw(generator):
        return tuple(torch.randn(shape, generator=generator, dtype=torch.float64) * scale for _ in range(2 + sample))

    if sample:
        function = lambda mu, logvar, e: ivfast.reparameterize(mu, logvar, draws=e)  # noqa: E731
        return Case("reparameterize", f"{shape}", function, draw, constants=1)
    return Case("gaussian_kl", f"{shape}", ivfast.gaussian_kl, draw)


class TestGaussians:
    @dtypes
    @cases("gaussian_kl", "reparameterize")
    def test_cases(self, case, dtype):
        matches(case, dtype)

    @dtypes
    @pytest.mark.parametrize(
        "shape",
        [(1,), (7,), (300, 1), (5, 3), (70, 8), (2, 9, 33), (130, 16), (3, 128), (2, 1, 1000), (9, 261)],
        ids=str,
    )
    def test_sizes(self, shape, dtype):
        for sample in (False, True):
            matches(posterior_case(shape, sample=sample), dtype)

    def test_near_the_prior(self):
        # KL of logvar x is about x²/4: the difference of two numbers near 1 would keep none of its digits
        for x in (1e-6, 1e-3, 0.0299, 0.0301, 0.1, 3.0):
            logvar = torch.tensor([[x, -x, x / 3], [x] * 3])
            mu = torch.zeros_like(logvar)
            ours = torch.ops.ivfast.gaussian_kl.cuda(mu, logvar).double()
            theirs = gaussian_kl_reference(mu.double(), logvar.double())
            # a few roundings of the series; beyond it the difference amplifies those of e^x − 1 up to 67 times
            assert ((ours - theirs) / theirs).abs().max() < (1e-6 if x < 0.03 else 1e-5)

    def test_extremes(self):
        logvar = torch.tensor([[80.0, -1e4], [-200.0, 60.0]])
        mu = torch.tensor([[1e3, -1e3], [0.0, 1e-3]])
        close(torch.ops.ivfast.gaussian_kl.cuda(mu, logvar), gaussian_kl_reference(mu.double(), logvar.double()))
        mu[0, 0] = float("nan")
        assert torch.ops.ivfast.gaussian_kl.cuda(mu, logvar).isnan().tolist() == [True, False]

    @dtypes
    @pytest.mark.parametrize("shape", [(9, 16), (2, 5, 7)], ids=str)
    def test_gradients_of_one_output(self, shape, dtype):
        mu, logvar, draws, dz = (torch.randn(shape).to(dtype) for _ in range(4))
        dkl = torch.randn(shape[:-1])
        for given in ((dz, None), (None, dkl), (dz, dkl)):
            ours = torch.ops.ivfast.reparameterize_backward.cuda(*given, mu, logvar, draws)
            exact = (None if t is None else t.double() for t in (*given, mu, logvar, draws))
            for a, b in zip(ours, _reparameterize_backward_reference(*exact), strict=True):
                assert a.dtype == dtype
                close(a, b)

    def test_a_gradient_that_is_not_there_reads_nothing_of_its_own(self):
        nan, x = torch.full((3, 5), float("nan")), torch.randn(3, 5)
        backward = torch.ops.ivfast.reparameterize_backward.cuda
        assert all(g.isfinite().all() for g in backward(None, torch.ones(3), x, x, nan))
        assert all(g.isfinite().all() for g in backward(x, None, nan, x, x))
        wide = torch.full_like(x, 100)  # e^logvar is infinite in float32, but not part of ∂z
        assert all(g.isfinite().all() for g in backward(x, None, x, wide, x))

    @dtypes
    def test_strides_and_places_off_a_boundary(self, dtype):
        def results(copy):
            mu, logvar, draws, dz = (copy(x.mT[..., ::2]) for x in inputs)
            dkl = copy(torch.tensor(0.5).expand(2, 6))
            yield torch.ops.ivfast.gaussian_kl.cuda(mu, logvar)
            yield from torch.ops.ivfast.gaussian_kl_backward.cuda(dkl, mu, logvar)
            yield from torch.ops.ivfast.reparameterize.cuda(mu, logvar, draws)
            yield from torch.ops.ivfast.reparameterize_backward.cuda(dz[:1].expand(2, 6, 8), dkl, mu, logvar, draws)

        inputs = [torch.randn(2, 16, 6).to(dtype) for _ in range(4)]
        theirs = list(results(torch.Tensor.contiguous))
        for copy in (lambda x: x, misaligned):
            for a, b in zip(results(copy), theirs, strict=True):
                assert a.is_contiguous()
                close(a, b)  # lanes share a row differently

    def test_every_schedule_gives_the_same_bits(self, simt):
        mu, logvar, draws = (torch.randn(40, 37) for _ in range(3))
        same_bits_in_every_schedule(simt, lambda: torch.ops.ivfast.reparameterize.cuda(mu, logvar, draws))

    def test_no_posteriors(self):
        with ivfast.use("cuda"):
            mu = torch.empty(0, 5, requires_grad=True)
            z, kl = ivfast.reparameterize(mu, torch.empty(0, 5))
            assert (z.shape, kl.shape) == ((0, 5), (0,))
            assert torch.autograd.grad(kl.sum() + z.sum(), mu)[0].shape == (0, 5)
            assert torch.equal(ivfast.gaussian_kl(torch.empty(3, 0), torch.empty(3, 0)), torch.zeros(3))

    def test_float64_is_refused(self):
        with ivfast.use("cuda"), pytest.raises(RuntimeError, match="takes float32, bfloat16 or float16, got Double"):
            ivfast.gaussian_kl(torch.randn(6, 3).double(), torch.randn(6, 3).double())
