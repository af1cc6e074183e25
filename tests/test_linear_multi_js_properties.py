"""The Jensen–Shannon loss of a linear layer equals the loss of its logits, on fresh random inputs."""

import pytest
import torch
import torch.nn.functional as F

import ivfast
from ivfast import testing
from ivfast.ops import linear_multi_js
from ivfast.testing import error

DOUBLE = torch.float64


def normal(*shape, dtype=DOUBLE):
    return torch.randn(*shape, dtype=dtype)


@pytest.fixture
def chunks(monkeypatch):
    """Only a few rows at a time, as with many classes."""
    monkeypatch.setitem(linear_multi_js.CHUNK, "cpu", 50)


def layer(classes, n, width, dtype=DOUBLE):
    return [x.to(dtype).requires_grad_() for x in (normal(classes * n, width), normal(classes, width), normal(classes))]


def test_linear_multi_js_is_the_loss_of_the_layer(chunks):
    features, weight, bias = tensors = layer(6, 5, 4)
    weights = torch.rand(6, dtype=DOUBLE)
    for form in ({}, {"weights": weights, "label_smoothing": 0.3}):
        ours = ivfast.linear_multi_js_loss(*tensors, **form)
        theirs = ivfast.multi_js_loss(F.linear(features, weight, bias), **form)
        assert error(ours, theirs) < 1e-12
        gradients = [torch.autograd.grad(3 * loss, tensors) for loss in (ours, theirs)]
        assert all(error(a, b) < 1e-12 for a, b in zip(*gradients, strict=True))


def test_linear_multi_js_backward_twice_and_in_part(chunks):
    tensors = layer(5, 3, 4)
    loss = ivfast.linear_multi_js_loss(*tensors)
    first = torch.autograd.grad(loss, tensors, retain_graph=True)
    kept = [g.clone() for g in first]
    second = torch.autograd.grad(2 * loss, tensors)
    assert all(torch.equal(a, b) for a, b in zip(first, kept, strict=True))
    assert all(error(b, 2 * a) < 1e-12 for a, b in zip(kept, second, strict=True))
    (alone,) = torch.autograd.grad(ivfast.linear_multi_js_loss(tensors[0].detach(), *tensors[1:]), tensors[1:2])
    assert error(alone, kept[1]) < 1e-12


def test_linear_multi_js_keeps_small_gradients_in_half_precision(monkeypatch):
    """With 20,000 rows each gradient is below float16's smallest number unless the loss is scaled."""
    monkeypatch.setitem(linear_multi_js.CHUNK, "cpu", 5000)
    features, weight, bias = layer(5, 4000, 8, torch.float16)
    loss = ivfast.linear_multi_js_loss(features, weight, bias)
    (gradient,) = torch.autograd.grad(loss, features, torch.tensor(2.0**14))
    exact = features.detach().double().requires_grad_()
    expected = ivfast.multi_js_loss(F.linear(exact, weight.double(), bias.double()))
    (theirs,) = torch.autograd.grad(expected, exact, torch.tensor(2.0**14, dtype=DOUBLE))
    assert error(gradient, theirs) < 4e-3


def test_linear_multi_js_is_checked():
    features, weight, bias = layer(5, 3, 4)
    wrong = [
        ((features[:14], weight, bias), r"features must hold n rows for each of weight's C = 5 classes, got \(14, 4\)"),
        ((features[:, :3], weight, bias), r"features must be .* with f = 4 as in weight, got \(15, 3\)"),
        ((features, weight, bias[:4]), r"bias must have shape \(5,\), one entry per row of weight, got \(4,\)"),
        ((features, weight[0], bias), r"weight must be \[C, f\] with C >= 2, got \(4,\)"),
    ]
    for arguments, message in wrong:
        with pytest.raises(ValueError, match=message):
            ivfast.linear_multi_js_loss(*arguments)
    with pytest.raises(ValueError, match=r"label_smoothing must lie in \[0, 1\], got 1.5"):
        ivfast.multi_js_loss(normal(6, 3), label_smoothing=1.5)
    with pytest.raises(ValueError, match="kind must be one of 'l2', 'l1', 'bce', got 'huber'"):
        ivfast.reconstruction_loss(features, features, kind="huber")
    with pytest.raises(ValueError, match="alpha must be finite and positive, got 0"):
        ivfast.exp_elbo_loss(features, features, alpha=0)


@pytest.mark.parametrize(
    ("dtype", "classes", "n", "shift"), [(torch.float16, 10, 600, 20.0), (torch.bfloat16, 2, 9000, 3.0)]
)
def test_half_precision_sums_its_chunks_in_float32(monkeypatch, dtype, classes, n, shift):
    """C·n times the weight's gradient is beyond float16, and a sum of rounded gradients far off where it cancels."""
    monkeypatch.setitem(linear_multi_js.CHUNK, "cpu", 40_000)
    x = (torch.randn(classes * n, 3) + shift).to(dtype)
    w = (torch.randn(classes, 3) * 0.01).to(dtype).requires_grad_()
    exact = w.detach().double().requires_grad_()
    logits = F.linear(x, w.detach()).double() + F.linear(x.double(), exact) - F.linear(x.double(), exact.detach())
    (theirs,) = torch.autograd.grad(ivfast.multi_js_loss(logits), exact)  # at the rounded logits
    (ours,) = torch.autograd.grad(linear_multi_js.fused(x, w, None), w)
    assert testing.error(ours, theirs) <= testing.TOLERANCES[dtype]


def test_a_graph_of_higher_order_keeps_no_gradients_of_the_first(chunks):
    features, weight, _ = layer(6, 50, 4)
    loss = ivfast.linear_multi_js_loss(features, weight)
    assert loss.grad_fn.kept is not None
    first = torch.autograd.grad(loss, features, create_graph=True)
    assert loss.grad_fn.kept is None
    (again,) = torch.autograd.grad(ivfast.linear_multi_js_loss(features, weight), features)
    assert error(*first, again) < 1e-12
