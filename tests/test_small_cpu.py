"""The small C++ ops where the case table cannot reach: instruction sets, odd sizes, threads, extremes."""

import math

import pytest
import torch
from helpers import size

import ivfast
from ivfast import testing
from ivfast.ops import linear_multi_js
from ivfast.testing import Case

pytest.importorskip("ivfast._C")

NAN, INF = math.nan, math.inf


def normal(*shapes, scale=1.0):
    return lambda generator: tuple(
        torch.randn(shape, generator=generator, dtype=torch.float64) * scale for shape in shapes
    )


def assert_right(op, function, draw, dtype, **keywords):
    case = Case(op, "random", function, draw, **keywords)
    testing.check(case, testing.inputs(case, dtype), "cpu")


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", testing.TOLERANCES, ids=str)
class TestEachInstructionSet:
    @pytest.mark.parametrize("classes", [2, 3, 5, 15, 31, 32, 33, 130])
    def test_multi_js(self, isa, classes, dtype):
        for smoothing in (0.0, 0.3, 1.0):
            shape = (size(1, 2), classes, size(1, 37), classes)
            weights = torch.rand(classes) + 0.1 if size(0, 1) else None
            if weights is not None:
                weights = weights.to(dtype)
            assert_right(
                "multi_js_loss",
                lambda x, w=weights, s=smoothing: ivfast.multi_js_loss(
                    x, weights=None if w is None else w.to(x), label_smoothing=s
                ),
                normal(shape, scale=3),
                dtype,
            )

    def test_rows_in_place(self, isa, dtype):
        for classes in (3, 5, 40):
            n, smoothing = size(2, 20), (0.0, 0.3, 1.0)[size(0, 2)]
            first = size(0, classes * n - 1)
            logits = torch.randn(size(1, classes * n - first), classes).to(dtype)
            weights = torch.rand(classes).to(torch.promote_types(dtype, torch.float32))
            ours, theirs = logits.clone(), logits.to(torch.float64, copy=True)
            kept = logits.clone()
            arguments = smoothing, first, n
            loss = torch.ops.ivfast.multi_js_rows_(ours, weights, *arguments, True)
            exact = linear_multi_js.multi_js_rows_reference(theirs, weights.double(), *arguments, True)
            assert testing.error(loss, exact, unit=0.1) <= testing.TOLERANCES[dtype]
            assert testing.error(ours, theirs) <= testing.TOLERANCES[dtype]
            alone = torch.ops.ivfast.multi_js_rows_(kept, weights, *arguments, False)
            assert testing.error(alone, loss, unit=0.1) <= testing.TOLERANCES[dtype]
            assert torch.equal(kept, logits)

    def test_bridges(self, isa, dtype):
        for _ in range(4):
            t = size(1, 6)
            shape = (size(1, 2), size(1, 40), t * size(1, 25))
            draw = normal(shape, shape)
            blockwise = lambda z, e, t=t: ivfast.blockwise_bridge(z, t, draws=e)  # noqa: E731
            radial = lambda z, e, t=t: ivfast.radial_bridge(z, t, draws=e)  # noqa: E731
            assert_right("blockwise_bridge", blockwise, draw, dtype, constants=1)
            assert_right("radial_bridge", radial, draw, dtype, constants=1)
            index = torch.randint(0, t, shape[:-1], dtype=(torch.int64, torch.int32)[size(0, 1)])
            substitute = lambda z, e, t=t, i=index: ivfast.block_substitute(z, t, i, draws=e)  # noqa: E731
            assert_right("block_substitute", substitute, draw, dtype, constants=1)

    def test_gaussians(self, isa, dtype):
        for scale in (1e-3, 0.5, 2.0):
            shape = (size(1, 3), size(1, 5), size(1, 140))
            draw = normal(shape, shape, shape, scale=scale)
            assert_right(
                "reparameterize", lambda m, v, e: ivfast.reparameterize(m, v, draws=e), draw, dtype, constants=1
            )
            assert_right("gaussian_kl", ivfast.gaussian_kl, normal(shape, shape, scale=scale), dtype)

    @pytest.mark.parametrize("kind", ["l2", "l1", "bce"])
    def test_reconstruction(self, isa, kind, dtype):
        for elements in (1, size(2, 70), 5000):
            shape = (size(1, 5), elements)
            loss = lambda x, t: ivfast.reconstruction_loss(x, t, kind=kind)  # noqa: E731
            assert_right("reconstruction_loss", loss, normal(shape, shape), dtype)


@pytest.mark.parametrize(
    ("op", "shapes"),
    [
        (ivfast.multi_js_loss, [(40, 700, 40)]),
        (lambda z, e: ivfast.radial_bridge(z, 3, draws=e), [(900, 1000)] * 2),
        (lambda z, e: ivfast.blockwise_bridge(z, 4, draws=e), [(900, 1000)] * 2),
        (lambda m, v, e: torch.cat([x.flatten() for x in ivfast.reparameterize(m, v, draws=e)]), [(3000, 300)] * 3),
        (lambda x, t: ivfast.reconstruction_loss(x, t, kind="bce"), [(300, 3000)] * 2),
    ],
    ids=["multi_js", "radial", "blockwise", "reparameterize", "reconstruction"],
)
def test_the_number_of_threads_does_not_change_a_bit(op, shapes, threads):
    tensors = [torch.randn(shape, requires_grad=i < 2) for i, shape in enumerate(shapes)]
    leaves = tensors[:1]

    def run():
        out = op(*tensors)
        return out, *torch.autograd.grad(out, leaves, torch.linspace(-1, 1, out.numel()).view(out.shape))

    threads(1)
    expected = run()
    for count in (2, 5):
        threads(count)
        assert all(torch.equal(a, b) for a, b in zip(run(), expected, strict=True))


@pytest.mark.parametrize("classes", [5, 40])
class TestExtremeLogits:
    def test_impossible_classes(self, isa, classes):
        x = torch.randn(classes, 7, classes)
        x[0, :, 1] = -INF
        x = x.requires_grad_()
        exact = x.detach().double().requires_grad_()
        ours, theirs = ivfast.multi_js_loss(x), ivfast.multi_js_loss(exact)
        assert testing.error(ours, theirs) <= testing.TOLERANCES[torch.float32]
        a, b = (torch.autograd.grad(loss, leaf)[0] for loss, leaf in ((ours, x), (theirs, exact)))
        assert testing.error(a, b) <= testing.TOLERANCES[torch.float32]
        assert (a[0, :, 1] == 0).all()

    def test_an_own_class_that_is_impossible_costs_infinitely_much(self, isa, classes):
        x = torch.randn(classes, 7, classes)
        x[1, 3, 1] = -INF
        assert ivfast.multi_js_loss(x) == INF

    def test_large(self, isa, classes):
        x = torch.where(torch.rand(classes, 7, classes) < 0.5, 1e4, -1e4)
        assert testing.error(ivfast.multi_js_loss(x), ivfast.multi_js_loss(x.double())) <= 1e-6

    def test_nan_stays(self, isa, classes):
        for at in ((0, 0, 0), (classes - 1, 6, classes - 1), (1, 3, 0)):
            x = torch.randn(classes, 7, classes)
            x[at] = NAN
            x.requires_grad_()
            loss = ivfast.multi_js_loss(x)
            assert loss.isnan()
            (gradient,) = torch.autograd.grad(loss, x)
            assert gradient[at[:2]].isnan().all()
            gradient[at[:2]] = 0
            assert not gradient.isnan().any()


def test_kl_of_any_variance(isa):
    for value in (-INF, -200.0, -110.0, -90.0, -50.0, -0.51, -0.49, -1e-3, 0.0, 1e-4, 0.3, 0.5, 0.51, 5.0, 80.0, NAN):
        logvar = torch.full((3, 17), value)
        ours = ivfast.gaussian_kl(torch.zeros_like(logvar), logvar)
        theirs = ivfast.gaussian_kl(torch.zeros(3, 17).double(), logvar.double()).float()
        torch.testing.assert_close(ours, theirs, rtol=5e-6, atol=0, equal_nan=True)


@pytest.mark.parametrize("target", [0.0, 0.5, 1.0])
def test_bce_of_any_logit(isa, target):
    for value in (-INF, -1e4, -100.0, -20.0, -3.0, 0.0, 1e-3, 3.0, 20.0, 1e4, INF, NAN):
        x = torch.full((2, 19), value, requires_grad=True)
        exact = x.detach().double().requires_grad_()
        losses = [ivfast.reconstruction_loss(v, torch.full_like(v, target), kind="bce") for v in (x, exact)]
        if math.isfinite(value):
            torch.testing.assert_close(losses[0], losses[1].float(), rtol=5e-6, atol=1e-38)
        gradients = [torch.autograd.grad(loss.sum(), v)[0] for loss, v in zip(losses, (x, exact), strict=True)]
        # σ − t: rounded at the size of 1
        torch.testing.assert_close(gradients[0], gradients[1].float(), rtol=0, atol=2e-7, equal_nan=True)
    certain = torch.tensor([[INF, -INF]])
    assert ivfast.reconstruction_loss(certain, torch.tensor([[1.0, 0.0]]), kind="bce") == 0


def test_half_precision_passes_through_every_number(isa):
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        z = every.view(dtype).view(256, 256)
        out = ivfast.radial_bridge(z, 2, draws=torch.zeros_like(z))[1]
        exact = (z.float() * math.cos(math.pi / 4)).to(dtype)
        torch.testing.assert_close(out, exact, rtol=0, atol=0, equal_nan=True)
