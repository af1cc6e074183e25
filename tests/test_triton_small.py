"""The Triton kernels of the ops that read their inputs once, interpreted where there is no GPU."""

import math

import pytest
import torch
from helpers import size

import ivfast
from ivfast import testing
from ivfast.ops import bridge, linear_multi_js
from ivfast.ops import gaussian as gaussian_op
from ivfast.testing import Case

HALF = (torch.bfloat16, torch.float16)
DTYPES = (torch.float64, torch.float32, *HALF)
device = "cuda" if torch.cuda.is_available() else "cpu"  # interpreted there: tests/conftest.py
pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.filterwarnings(
        "ignore:(overflow|invalid value) encountered:RuntimeWarning"
    ),  # in the interpreter's NumPy
]


def check(case: Case, dtype: torch.dtype = torch.float32):
    testing.check(case, testing.inputs(case, dtype, device=device), "triton")


def cases(op: str):
    return pytest.mark.parametrize("case", [c for c in testing.CASES if c.op == op], ids=str)


dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def batch() -> tuple[int, ...]:
    return tuple(size(1, 3) for _ in range(size(0, 2)))


def normal(*shapes, scale=1.0):
    return lambda generator: tuple(
        torch.randn(shape, generator=generator, dtype=torch.float64) * scale for shape in shapes
    )


def assert_close(ours, theirs, *, slack=1.0, unit=0.0):
    """Within the tolerance of ours' dtype; shape and contiguity too."""
    assert ours.shape == theirs.shape
    assert ours.is_contiguous()
    assert testing.error(ours.cpu(), theirs.cpu(), unit) <= slack * testing.TOLERANCES[ours.dtype]


class TestMultiJsRows:
    def compare(self, classes, n, first, rows, dtype, *, weighted=False, smoothing=0.0, gradient=True, logits=None):
        """Rows [first, first + rows) against the reference in float64 on the same logits."""
        x = torch.randn(rows, classes, device=device).mul(3).to(dtype) if logits is None else logits
        wide = torch.promote_types(dtype, torch.float32)
        weights = torch.rand(classes, device=device, dtype=wide) + 0.1 if weighted else None
        exact, before = x.to(torch.float64, copy=True), x.clone()
        exact_weights = None if weights is None else weights.double()
        expected = linear_multi_js.multi_js_rows_reference(exact, exact_weights, smoothing, first, n, gradient)
        with ivfast.use("triton"):
            loss = linear_multi_js._rows(x, weights, smoothing, first, n, gradient)
        assert loss.dtype == wide
        # a difference of numbers of about 1 for each row, and of probabilities in the gradient
        unit = 1 / (classes * n)
        assert_close(loss, expected, unit=rows * unit)
        if gradient:
            assert testing.error(x.cpu(), exact.cpu(), unit) <= testing.TOLERANCES[dtype]
        else:
            assert torch.equal(x, before)

    @dtypes
    @pytest.mark.parametrize("smoothing", [0.0, 0.3, 1.0])
    @pytest.mark.parametrize("weighted", [False, True])
    def test_chunks_that_begin_and_end_in_a_block(self, dtype, smoothing, weighted):
        classes, n = size(2, 40), size(2, 30)
        first = size(1, classes * n - 1)
        rows = size(1, classes * n - first)
        for gradient in (True, False):
            self.compare(classes, n, first, rows, dtype, weighted=weighted, smoothing=smoothing, gradient=gradient)

    @dtypes
    def test_one_row_of_each_class(self, dtype):
        self.compare(7, 1, 2, 5, dtype)
        self.compare(2, 1, 1, 1, dtype)

    @dtypes
    def test_rows_of_several_tiles_in_several_programs(self, monkeypatch, dtype):
        from ivfast.kernels import multi_js

        monkeypatch.setattr(multi_js, "TILE", dict.fromkeys(multi_js.TILE, 16))
        monkeypatch.setattr(multi_js, "PARTS", 4)
        self.compare(size(33, 50), 3, 5, size(30, 60), dtype, weighted=True, smoothing=0.3)
        self.compare(3, 50, 20, size(100, 130), dtype)

    def test_rows_beyond_32_bits(self):
        self.compare(5, 2**30, 3 * 2**30 - 3, 9, torch.float32, weighted=True)
        self.compare(5, 2**30, 4 * 2**30 + 2**29, 9, torch.float64)

    def test_strided_logits_are_written_back(self):
        logits = torch.randn(12, 8, device=device)[:, ::2]
        self.compare(4, 5, 3, 12, torch.float32, logits=logits)

    def test_no_rows(self):
        with ivfast.use("triton"):
            assert float(linear_multi_js._rows(torch.empty(0, 3, device=device), None, 0.0, 0, 4, True)) == 0

    def test_far_and_infinite_logits(self):
        x = torch.randn(9, 3, device=device) * 1e4
        self.compare(3, 5, 2, 9, torch.float32, logits=x)
        x = torch.randn(9, 3, device=device)
        x[4, 0] = float("-inf")  # of class 1
        self.compare(3, 5, 2, 9, torch.float32, logits=x)

    def test_nan_stays_in_its_row(self):
        x = torch.randn(9, 3, device=device)
        x[4, 2] = float("nan")
        with ivfast.use("triton"):
            assert linear_multi_js._rows(x, None, 0.0, 2, 5, True).isnan()
        assert x[4].isnan().all()
        assert x.isnan().sum() == 3

    def test_bits(self):
        x = torch.randn(300, 7, device=device)
        with ivfast.use("triton"):
            a, b = ((linear_multi_js._rows(y, None, 0.1, 3, 60, True), y) for y in (x.clone(), x.clone()))
        assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))

    @dtypes
    @cases("linear_multi_js_loss")
    def test_linear_layer(self, monkeypatch, case, dtype):
        monkeypatch.setitem(linear_multi_js.CHUNK, device, 300)
        # half precision rounds the logits and their gradient, and a product of those adds their errors
        check(case._replace(slack=2 * case.slack if dtype in HALF else case.slack), dtype)


def bridge_gradients(function, z, draws):
    """The bridges, and ∂/∂z of their sum weighted by a strided array."""
    out = function(z, draws)
    weights = torch.linspace(-1, 1, out.numel(), device=device, dtype=torch.float64).view(out.shape[::-1]).to(z.dtype)
    return out, torch.autograd.grad(out, z, weights.permute(*range(out.dim())[::-1]))[0]


BRIDGES = {
    "blockwise": lambda t: lambda z, e: ivfast.blockwise_bridge(z, t, draws=e),
    "radial": lambda t: lambda z, e: ivfast.radial_bridge(z, t, draws=e),
    "substitute": lambda t: lambda z, e: ivfast.block_substitute(z, t, testing._cycle(z, t), draws=e),
}
kinds = pytest.mark.parametrize("kind", BRIDGES)


class TestBridges:
    @dtypes
    @cases("blockwise_bridge")
    def test_blockwise(self, case, dtype):
        check(case, dtype)

    @dtypes
    @cases("radial_bridge")
    def test_radial(self, case, dtype):
        check(case, dtype)

    @dtypes
    @cases("block_substitute")
    def test_substitute(self, case, dtype):
        check(case, dtype)

    @kinds
    @dtypes
    @pytest.mark.parametrize("t", [1, 2, 3, 7])
    def test_random_sizes(self, kind, t, dtype):
        shape = (*batch(), size(1, 70), size(1, 20) * t)
        check(Case(kind, str(shape), BRIDGES[kind](t), normal(shape, shape), constants=1), dtype)

    @kinds
    def test_one_dimension_and_more_than_a_program_holds(self, kind):
        for shape, t in (((1, 1), 1), ((2049, 1), 1), ((1, 2050), 5), ((3, 1025), 25)):
            check(Case(kind, str(shape), BRIDGES[kind](t), normal(shape, shape), constants=1))

    @kinds
    def test_strides(self, kind):
        z, draws = (torch.randn(2, 12, 9, device=device).mT for _ in range(2))
        z = z.requires_grad_()
        with ivfast.use("triton"):
            ours = bridge_gradients(BRIDGES[kind](3), z, draws)
        with ivfast.use("reference"):
            theirs = bridge_gradients(BRIDGES[kind](3), z.double(), draws.double())
        for a, b in zip(ours, theirs, strict=True):
            assert_close(a, b)

    @kinds
    def test_expanded_gradient(self, kind):
        z, draws = (torch.randn(5, 6, device=device) for _ in range(2))
        z.requires_grad_()
        with ivfast.use("triton"):
            (ours,) = torch.autograd.grad(BRIDGES[kind](3)(z, draws).sum(), z)
        with ivfast.use("reference"):
            (theirs,) = torch.autograd.grad(BRIDGES[kind](3)(z.double(), draws.double()).sum(), z)
        assert_close(ours, theirs)

    @dtypes
    @pytest.mark.parametrize("t", [1, 2, 3, 50])
    def test_ends_are_copies_and_the_circle_is_round(self, t, dtype):
        z, draws = (torch.randn(4, 3, device=device).to(dtype) for _ in range(2))
        z[0, 0], draws[0, 0], z[1, 1], draws[1, 1] = float("inf"), 1.0, -0.0, 2.0
        with ivfast.use("triton"):
            out = ivfast.radial_bridge(z, t, draws=draws)
            assert torch.equal(out[0], z)
            assert torch.equal(out[t], draws)
            assert out[0, 1, 1].signbit()
            # cos² + sin² = 1 of z = (1, 0), draws = (0, 1)
            z, draws = torch.eye(2, device=device, dtype=dtype)
            points = ivfast.radial_bridge(z[None], t, draws=draws[None]).double()
        assert float((points.square().sum(-1) - 1).abs().max()) <= 2 * torch.finfo(dtype).eps

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
    def test_many_angles_within_two_roundings(self, dtype):
        # of numbers of at most 1
        z = torch.ones(1, 1, dtype=dtype, device=device)
        with ivfast.use("triton"):
            cos = ivfast.radial_bridge(z, 777, draws=torch.zeros_like(z)).flatten().double().cpu()
            sin = ivfast.radial_bridge(torch.zeros_like(z), 777, draws=z).flatten().double().cpu()
        angle = torch.arange(778, dtype=torch.float64) / 777 * torch.pi / 2
        assert float((cos - angle.cos()).abs().max()) <= 2 * torch.finfo(dtype).eps
        assert float((sin - angle.sin()).abs().max()) <= 2 * torch.finfo(dtype).eps

    @pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
    def test_substitute_leaves_rows_of_other_indices(self, index_dtype):
        z, draws = (torch.randn(7, 6, device=device) for _ in range(2))
        index = torch.tensor([0, 2, -1, 3, 1, 2**31 - 1, -(2**31)], dtype=index_dtype, device=device)
        expected = z.view(7, 3, 2).clone()
        for row, block in ((0, 0), (1, 2), (4, 1)):
            expected[row, block] = draws.view(7, 3, 2)[row, block]
        with ivfast.use("triton"):
            assert torch.equal(bridge._block_substitute(z, draws, index, 3), expected.view(7, 6))
            kept = bridge._block_substitute_backward(torch.ones(7, 6, device=device), index, 3)
        assert kept.sum() == 7 * 6 - 3 * 2
        if index_dtype == torch.int64:
            with ivfast.use("triton"):
                assert torch.equal(bridge._block_substitute(z, draws, index.new_full((7,), 2**32 + 1), 3), z)

    def test_what_is_replaced_leaks_nothing(self):
        nan = torch.full((4, 6), float("nan"), device=device)
        ones = torch.ones_like(nan)
        index = torch.tensor([0, 1, 2, 1], device=device)
        with ivfast.use("triton"):
            for z, draws in ((nan, ones), (ones, nan)):
                out = bridge._block_substitute(z, draws, index, 3)
                assert out.isnan().sum() == (4 * 4 if z is nan else 4 * 2)
                assert bridge._blockwise(z, draws, 3).isnan().sum() == 4 * 12
            grad = ones.expand(4, 4, 6).clone()
            grad[1:, :, :2] = float("nan")  # replaced from T_1 on
            assert torch.equal(bridge._blockwise_backward(grad, 3)[:, 0], torch.ones(4, device=device))
            grad = torch.where(torch.arange(6, device=device) // 2 == index[:, None], nan, ones)
            assert not bridge._block_substitute_backward(grad, index, 3).isnan().any()
            assert bridge._radial(nan, ones, 3)[:3].isnan().all()
            assert bridge._radial(ones, nan, 3)[1:].isnan().all()

    @kinds
    def test_no_sets(self, kind):
        z = torch.empty(0, 4, 6, device=device, requires_grad=True)
        with ivfast.use("triton"):
            out = BRIDGES[kind](3)(z, torch.empty(0, 4, 6, device=device))
            assert out.shape[-3:] == z.shape
            assert torch.autograd.grad(out.sum(), z)[0].shape == z.shape


def gaussian(function: str):
    """gaussian_kl, reparameterize, or one of its outputs."""
    if function == "gaussian_kl":
        return lambda mu, logvar, e: ivfast.gaussian_kl(mu, logvar)
    if function == "reparameterize":
        return lambda mu, logvar, e: ivfast.reparameterize(mu, logvar, draws=e)
    return lambda mu, logvar, e: getattr(ivfast.reparameterize(mu, logvar, draws=e), function)


functions = pytest.mark.parametrize("function", ["gaussian_kl", "reparameterize", "z", "kl"])


class TestGaussian:
    @dtypes
    @cases("gaussian_kl")
    def test_kl(self, case, dtype):
        check(case, dtype)

    @dtypes
    @cases("reparameterize")
    def test_reparameterize(self, case, dtype):
        check(case, dtype)

    @functions
    @dtypes
    def test_random_sizes(self, function, dtype):
        for d in (1, size(2, 70), size(2, 70)):
            shape = (*batch(), size(1, 40), d)
            check(Case(function, str(shape), gaussian(function), normal(shape, shape, shape), constants=1), dtype)

    @functions
    def test_edges(self, function):
        for shape in ((1,), (5,), (1, 1), (2, 3000), (1030, 1), (3, 1024)):
            check(Case(function, str(shape), gaussian(function), normal(shape, shape, shape), constants=1))

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
    def test_near_the_prior(self, dtype):
        # logvar alone, over the seam of the series and down to where its square is all there is
        powers = [0.5**k for k in range(40 if dtype == torch.float64 else 20)]
        logvar = torch.tensor([[s * x] for x in (*powers, 0.499, 0.501, 0.03) for s in (-1, 1)], dtype=dtype)
        logvar = logvar.to(device).requires_grad_()
        mu = torch.zeros_like(logvar)
        with ivfast.use("triton"):
            kl = ivfast.gaussian_kl(mu, logvar)
            (gradient,) = torch.autograd.grad(kl.sum(), logvar)
        x = logvar.detach().double().cpu()
        expected = x.new_tensor([sum(v**k / math.factorial(k) for k in range(30, 1, -1)) / 2 for v in x[:, 0].tolist()])
        relative = (kl.detach().double().cpu() - expected).abs() / expected
        # e^x − 1 − x at the seam, x = −½, loses a digit
        assert float(relative.max()) < 16 * torch.finfo(dtype).eps
        relative = (gradient.double().cpu() - 0.5 * x.expm1())[:, 0] / (0.5 * x.expm1())[:, 0]
        assert float(relative.abs().max()) < 16 * torch.finfo(dtype).eps

    @functions
    def test_strides(self, function):
        mu, logvar, draws = (torch.randn(2, 12, 9, device=device).mT for _ in range(3))
        mu, logvar = mu.requires_grad_(), logvar.requires_grad_()
        results = []
        for implementation, dtype in (("triton", torch.float32), ("reference", torch.float64)):
            with ivfast.use(implementation):
                out = testing.outputs(gaussian(function)(mu.to(dtype), logvar.to(dtype), draws.to(dtype)))
                weights = [torch.linspace(-1, 1, o.numel()).to(o).view(o.shape[::-1]) for o in out]
                weights = [w.permute(*range(w.dim())[::-1]) for w in weights]
                results.append([*out, *torch.autograd.grad(out, (mu, logvar), weights, allow_unused=True)])
                # an expanded gradient
                out = testing.outputs(gaussian(function)(mu.to(dtype), logvar.to(dtype), draws.to(dtype)))
                results[-1] += torch.autograd.grad([o.sum() for o in out], (mu, logvar))
        for ours, theirs in zip(*results, strict=True):
            assert testing.error(ours.cpu(), theirs.cpu()) <= testing.TOLERANCES[torch.float32]

    def test_the_gradient_of_z_is_copied(self):
        dz = torch.randn(3, 4, device=device)
        with ivfast.use("triton"):
            dmu, _ = gaussian_op._reparameterize_backward(dz, None, *torch.randn(3, 3, 4, device=device))
        assert torch.equal(dmu, dz)
        assert dmu.data_ptr() != dz.data_ptr()

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
    def test_extremes(self, dtype):
        inf, nan = float("inf"), float("nan")
        values = torch.tensor([0.0, 1e4, -1e4, inf, -inf, nan], dtype=dtype, device=device)
        mu, logvar = (x.reshape(-1, 1) for x in torch.meshgrid(values, values, indexing="ij"))
        mu, logvar = mu.contiguous().requires_grad_(), logvar.contiguous().requires_grad_()
        results = []
        for implementation in ("triton", "reference"):
            with ivfast.use(implementation):
                z, kl = ivfast.reparameterize(mu, logvar, draws=torch.ones_like(mu))
                gradients = [torch.autograd.grad(o.sum(), (mu, logvar), retain_graph=True) for o in (z, kl)]
                results.append([z, kl, *gradients[0], *gradients[1]])
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0, equal_nan=True)
        assert results[0][1].reshape(6, 6)[5].isnan().all()
        assert results[0][1].reshape(6, 6)[:, 5].isnan().all()

    @functions
    def test_no_posteriors_and_no_dimensions(self, function):
        for shape in ((0, 4), (2, 0, 3), (3, 0)):
            mu, logvar = (torch.empty(shape, device=device, requires_grad=True) for _ in range(2))
            with ivfast.use("triton"):
                out = testing.outputs(gaussian(function)(mu, logvar, torch.empty(shape, device=device)))
                gradients = torch.autograd.grad([o.sum() for o in out], (mu, logvar))
            assert all(g.shape == mu.shape for g in gradients)
            assert all((o == 0).all() for o in out)


def losses_and_gradients(function, tensors, implementation, dtype=None):
    """The losses, and the gradients of their sum weighted by an expanded number, of leaves with the strides of
    `tensors`."""
    leaves = [x.detach().to(dtype or x.dtype, copy=True).requires_grad_() for x in tensors]
    with ivfast.use(implementation):
        out = function(*leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, torch.tensor(0.7).to(out).expand(out.shape))]


def assert_strides_are_read(function, tensors):
    assert not any(x.is_contiguous() for x in tensors)
    ours = losses_and_gradients(function, tensors, "triton")
    theirs = losses_and_gradients(function, tensors, "reference", torch.float64)
    for a, b in zip(ours, theirs, strict=True):
        assert_close(a, b)


def assert_as_reference(function, *tensors, rtol=1e-5):
    """Number by number, NaN and infinity too."""
    ours, theirs = (losses_and_gradients(function, tensors, use) for use in ("triton", "reference"))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=1e-30, equal_nan=True)
    return ours


wide = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)


class TestImportance:
    @dtypes
    @cases("importance_weighted_loss")
    def test_cases(self, case, dtype):
        check(case, dtype)

    @dtypes
    @pytest.mark.parametrize("n", [1, 2, 37, 1024, 2500])
    def test_sizes(self, n, dtype):
        shape = (*batch(), n)
        check(Case("importance", str(shape), ivfast.importance_weighted_loss, normal(shape, scale=4)), dtype)

    def test_strides(self):
        assert_strides_are_read(ivfast.importance_weighted_loss, [torch.randn(2, 9, 5, device=device).mT])

    @wide
    def test_equal_logits_keep_their_digits(self, dtype):
        # log σ(20) is −2e-9, beside 1 nothing
        for logit in (-1e4, -50.0, -1.0, 0.0, 1.0, 20.0, 80.0):
            logits = torch.full((5,), logit, dtype=dtype, device=device)
            # e^−80 is right to 80 eps
            assert_as_reference(ivfast.importance_weighted_loss, logits, rtol=200 * torch.finfo(dtype).eps)

    @wide
    def test_extremes(self, dtype):
        for values in ((1e4, -1e4, 0.0), (-1e4, -1e4), (float("-inf"), 0.0), (float("inf"), 0.0), (float("-inf"),)):
            assert_as_reference(ivfast.importance_weighted_loss, torch.tensor(values, dtype=dtype, device=device))

    def test_nan_stays_in_its_set(self):
        x = torch.randn(2, 5, device=device)
        x[1, 3] = float("nan")
        loss, gradient = assert_as_reference(ivfast.importance_weighted_loss, x)
        assert loss.isnan().tolist() == [False, True]
        assert gradient.isnan().sum(-1).tolist() == [0, 5]

    def test_no_sets(self):
        loss, gradient = assert_as_reference(ivfast.importance_weighted_loss, torch.empty(0, 4, device=device))
        assert loss.shape == (0,)
        assert gradient.shape == (0, 4)


class TestExpElbo:
    @dtypes
    @cases("exp_elbo_loss")
    def test_cases(self, case, dtype):
        check(case, dtype)

    @dtypes
    @pytest.mark.parametrize("n", [1, 2, 37, 1024, 2500])
    @pytest.mark.parametrize("left_out", [None, "beta_reconstruction", "beta_kl"])
    def test_sizes(self, n, left_out, dtype):
        shape = (*batch(), n)
        factors = {"scale": 0.3, "beta_reconstruction": 0.7, "beta_kl": 1.1, "alpha": 1.7}
        factors |= {} if left_out is None else {left_out: 0.0}

        def loss(reconstruction, kl):
            return ivfast.exp_elbo_loss(reconstruction, kl, **factors)

        check(Case("exp_elbo_loss", str(shape), loss, testing._positive(shape, shape, scale=3)), dtype)

    def test_strides(self):
        assert_strides_are_read(ivfast.exp_elbo_loss, [torch.rand(2, 9, 5, device=device).mT for _ in range(2)])

    @wide
    def test_extremes(self, dtype):
        inf, nan = float("inf"), float("nan")
        values = torch.tensor([0.0, 1e4, -1e4, -20.0, -20.1, -19.9, inf, -inf, nan], dtype=dtype, device=device)
        reconstruction, kl = (x.reshape(-1, 1) for x in torch.meshgrid(values, values, indexing="ij"))
        for factors in ({}, {"beta_kl": 0.0}, {"beta_reconstruction": 0.0}, {"scale": 0.0}):

            def loss(reconstruction, kl, factors=factors):
                return ivfast.exp_elbo_loss(reconstruction, kl, **factors)

            # e^80 is right to 80 eps
            value, _, _ = assert_as_reference(loss, reconstruction, kl, rtol=1e-4 if dtype == torch.float32 else 1e-10)
            assert value.isnan().any() == (factors.get("scale") != 0)

    def test_no_sets(self):
        empty = torch.empty(2, 0, 4, device=device)
        value, *gradients = assert_as_reference(ivfast.exp_elbo_loss, empty, empty)
        assert value.shape == (2, 0)
        assert all(g.shape == empty.shape for g in gradients)


def reconstruction(kind: str):
    return lambda x, t: ivfast.reconstruction_loss(x, t, kind=kind)


pixels = pytest.mark.parametrize("kind", ["l2", "l1", "bce"])


class TestReconstruction:
    @dtypes
    @cases("reconstruction_loss")
    def test_cases(self, case, dtype):
        check(case, dtype)

    @pixels
    @dtypes
    def test_random_sizes(self, kind, dtype):
        for shape in ((size(1, 40),), (1, 1), (size(2, 40), size(1, 50)), (size(1, 3), 3, size(5, 40), size(5, 40))):
            check(Case(kind, str(shape), reconstruction(kind), testing._logits_and_pixels(*shape)), dtype)
            # the gradient of the output alone
            check(Case(kind, str(shape), reconstruction(kind), testing._logits_and_pixels(*shape), constants=1), dtype)

    @pixels
    @dtypes
    def test_rows_in_parts(self, monkeypatch, kind, dtype):
        from ivfast.kernels import reconstruction as kernels

        monkeypatch.setattr(kernels, "TILE", 16)
        monkeypatch.setattr(kernels, "ONE_PROGRAM", 2)
        monkeypatch.setattr(kernels, "PARTS", 8)
        for shape in ((3, 200), (1, 47), (50, 7, 7)):
            check(Case(kind, str(shape), reconstruction(kind), testing._logits_and_pixels(*shape)), dtype)

    @pixels
    def test_strides(self, kind):
        tensors = [torch.rand(3, 5, 7, device=device).mT for _ in range(2)]
        assert_strides_are_read(reconstruction(kind), tensors)
        x = torch.rand(1, device=device).expand(6, 1)
        assert_close(*(losses_and_gradients(reconstruction(kind), (x, x), use)[0] for use in ("triton", "reference")))

    @pixels
    @wide
    def test_extremes(self, kind, dtype):
        inf, nan = float("inf"), float("nan")
        values = torch.tensor([0.0, -0.0, 1e4, -1e4, 30.0, -30.0, inf, -inf, nan], dtype=dtype, device=device)
        targets = torch.tensor([0.0, 0.5, 1.0, nan], dtype=dtype, device=device)
        x, t = (x.reshape(-1, 1) for x in torch.meshgrid(values, targets, indexing="ij"))
        loss, _, _ = assert_as_reference(reconstruction(kind), x, t)
        loss = loss.view(9, 4)
        assert loss[8].isnan().all()
        assert loss[:, 3].isnan().all()
        assert not loss[:8, :3].isnan().any()
        if kind == "bce":  # right and certain
            assert loss[6, 2] == loss[7, 0] == 0

    @pixels
    def test_nan_stays_in_its_row(self, kind):
        x, t = torch.rand(2, 5, 300, device=device)
        x[2, 7] = float("nan")
        loss, *_ = losses_and_gradients(reconstruction(kind), (x, t), "triton")
        assert loss.isnan().tolist() == [False, False, True, False, False]

    @pixels
    def test_bits(self, monkeypatch, kind):
        from ivfast.kernels import reconstruction as kernels

        monkeypatch.setattr(kernels, "ONE_PROGRAM", 1)
        x, t = torch.rand(2, 3, 5000, device=device)
        first, second = (losses_and_gradients(reconstruction(kind), (x, t), "triton") for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))

    @pixels
    def test_no_samples_and_no_pixels(self, kind):
        for shape in ((0,), (0, 3, 4), (3, 0)):
            x = torch.empty(shape, device=device)
            loss, *gradients = losses_and_gradients(reconstruction(kind), (x, x), "triton")
            assert torch.equal(loss, torch.zeros(shape[0], device=device))
            assert all(g.shape == x.shape for g in gradients)
