"""Multi-class Jensen–Shannon loss in C++: instruction sets, odd sizes, threads, extremes."""

import math

import pytest
import torch
from helpers import assert_right_on_cpu, assert_threads_change_no_bit, size, undecided

import ivfast
from ivfast import testing
from ivfast.ops import linear_multi_js

pytest.importorskip("ivfast._C")

NAN, INF = math.nan, math.inf


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
            assert_right_on_cpu(
                "multi_js_loss",
                lambda x, w=weights, s=smoothing: ivfast.multi_js_loss(
                    x, weights=None if w is None else w.to(x), label_smoothing=s
                ),
                undecided(shape),
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


def test_the_number_of_threads_does_not_change_a_bit(threads):
    assert_threads_change_no_bit(ivfast.multi_js_loss, [(40, 700, 40)], threads)


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

    def test_an_offset_costs_no_digits(self, isa, classes):
        x = (torch.randn(classes, 7, classes, dtype=torch.float64) * 1024).round() / 1024  # x + 2^20 is exact
        for smoothing in (0.0, 0.3):
            exact = ivfast.multi_js_loss(x, label_smoothing=smoothing)
            assert testing.error(ivfast.multi_js_loss(x + 2**20, label_smoothing=smoothing), exact) <= 1e-15

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
