"""What the papers prove about the multi-class Jensen–Shannon loss, on fresh random inputs."""

import contextlib
import math

import pytest
import torch
import torch.nn.functional as F

import ivfast
from ivfast.testing import error

DOUBLE = torch.float64


def normal(*shape, dtype=DOUBLE):
    return torch.randn(*shape, dtype=dtype)


def optimal_logits(samples, log_densities):
    """`[C, n, C]`: log p_c' at the samples of each p_c, the logits of the optimal classifier."""
    return torch.stack([torch.stack([f(z) for f in log_densities], -1) for z in samples])


@pytest.mark.parametrize("a", [0.0, 0.25, 0.5, 0.75, 1.0])
def test_square_fitting(a):
    """S2 Example 1: JS of the two squares is log 2 for every a; with their interventions it is (1 + a) log 2."""
    corners = [(0.0, 0.0), (a, 1.0), (0.0, 1.0), (a, 0.0)]  # α, β, γ₁, γ₂: uniform on unit squares
    axis = (torch.arange(200, dtype=DOUBLE) + 0.5) / 200
    unit = torch.cartesian_prod(axis, axis)

    def log_density(corner):
        def f(z):
            inside = ((z >= z.new_tensor(corner)) & (z < z.new_tensor(corner) + 1)).all(-1)
            return torch.where(inside, 0.0, -60.0).to(DOUBLE)

        return f

    def js(squares):
        samples = [unit + unit.new_tensor(corner) for corner in squares]
        return ivfast.multi_js_divergence(optimal_logits(samples, [log_density(corner) for corner in squares]))

    assert float(js(corners[:2])) == pytest.approx(math.log(2), rel=1e-9)
    assert float(js(corners)) == pytest.approx((1 + a) * math.log(2), rel=1e-9)


def test_multi_js_is_cross_entropy_with_block_labels():
    logits = normal(35, 7) * 3
    labels = torch.arange(7).repeat_interleave(5)
    assert error(ivfast.multi_js_loss(logits), torch.nn.functional.cross_entropy(logits, labels)) < 1e-12
    weights = torch.rand(7, dtype=DOUBLE)
    per_row = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    expected = (per_row.view(7, 5).mean(1) * weights).sum()
    assert error(ivfast.multi_js_loss(logits, weights=weights), expected) < 1e-12


def test_multi_js_bounds():
    """Equal distributions: log(t + 1). Disjoint supports: 0."""
    assert float(ivfast.multi_js_loss(torch.zeros(5, 8, 5))) == pytest.approx(math.log(5))
    confident = 1e4 * torch.eye(5).unsqueeze(1).expand(5, 8, 5)
    assert float(ivfast.multi_js_loss(confident)) == 0.0
    assert float(ivfast.multi_js_divergence(confident)) == pytest.approx(math.log(5))


def test_multi_js_of_the_optimal_classifier_is_log_c_minus_js():
    """Three Gaussians on a line: the loss at D* equals log 3 − JS by quadrature (S1 Theorem 2)."""
    means = (-1.0, 0.5, 2.0)
    x = torch.linspace(-12, 13, 200001, dtype=DOUBLE)
    log_p = torch.stack([-0.5 * (x - m).square() - 0.5 * math.log(2 * math.pi) for m in means])
    p = log_p.exp()
    js = (p * (log_p - p.mean(0).log())).sum() * (x[1] - x[0]) / 3
    samples = [m + normal(200_000) for m in means]
    logits = optimal_logits(samples, [lambda z, m=m: -0.5 * (z - m).square() for m in means])
    assert float(ivfast.multi_js_divergence(logits)) == pytest.approx(float(js), abs=5e-3)


def test_multi_js_divergence_with_weights_is_the_entropy_at_disjoint_supports():
    weights = torch.tensor([0.7, 0.2, 0.1], dtype=DOUBLE)
    confident = 1e4 * torch.eye(3, dtype=DOUBLE).unsqueeze(1).expand(3, 4, 3)
    entropy = -(weights * weights.log()).sum()
    assert float(ivfast.multi_js_divergence(confident, weights=weights)) == pytest.approx(float(entropy))


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_label_smoothing_is_cross_entropys(smoothing):
    logits = normal(35, 7) * 3
    labels = torch.arange(7).repeat_interleave(5)
    expected = F.cross_entropy(logits, labels, label_smoothing=smoothing)
    assert error(ivfast.multi_js_loss(logits, label_smoothing=smoothing), expected) < 1e-12


def test_uniform_target_is_least_where_the_classifier_cannot_tell():
    x = normal(20, 5).requires_grad_()
    assert float(ivfast.multi_js_loss(x.detach(), label_smoothing=1.0)) > math.log(5)
    equal = x.detach()[:, :1].expand(20, 5).clone().requires_grad_()
    loss = ivfast.multi_js_loss(equal, label_smoothing=1.0)
    assert float(loss.detach()) == pytest.approx(math.log(5), rel=1e-12)
    assert torch.autograd.grad(loss, equal)[0].abs().max() < 1e-15


def test_block_losses_of_mapped_batches():
    batches = normal(3, 8, 4)
    each = torch.stack([ivfast.multi_js_block_losses(x) for x in batches])
    assert error(torch.func.vmap(ivfast.multi_js_block_losses)(batches), each) < 1e-14


def test_block_losses_average_to_the_loss():
    for logits in (normal(35, 7), normal(2, 3, 4, 3)):
        blocks = ivfast.multi_js_block_losses(logits.requires_grad_())
        assert not blocks.requires_grad
        assert blocks.shape == (*logits.shape[:-3], logits.shape[-1])
        assert error(blocks.mean(-1), ivfast.multi_js_loss(logits)) < 1e-12


def test_a_block_of_weight_zero_counts_for_nothing():
    logits = normal(3, 4, 3).requires_grad_()
    weights = torch.tensor([0.5, 0.0, 0.5], dtype=DOUBLE)
    loss = ivfast.multi_js_loss(logits, weights=weights)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert error(loss, ivfast.multi_js_block_losses(logits)[[0, 2]].mean()) < 1e-12
    assert (gradient[1] == 0).all()
    assert (gradient[0] != 0).all()


@pytest.mark.parametrize("use", ["reference", None])
@pytest.mark.parametrize("classes", [3, 5, 40])
@pytest.mark.parametrize("shift", [0.0, 1e3, 1e5])
def test_an_offset_of_all_logits_costs_no_precision(use, classes, shift):
    """Shifted logits are rounded, not the loss or its gradient: both are right for the logits as given."""
    with ivfast.use(use) if use else contextlib.nullcontext():
        for smoothing in (0.0, 0.3, 1.0):
            x = (torch.randn(classes, 4, classes) + shift).requires_grad_()
            exact = x.detach().double().requires_grad_()
            label = torch.arange(classes).repeat_interleave(4)
            theirs = F.cross_entropy(exact.flatten(0, 1), label, label_smoothing=smoothing)
            ours = ivfast.multi_js_loss(x, label_smoothing=smoothing)
            assert error(ours, theirs) < 2e-6
            a, b = torch.autograd.grad(ours, x)[0], torch.autograd.grad(theirs, exact)[0]
            assert error(a, b) < 2e-6
        blocks = ivfast.multi_js_block_losses(x)
        rows = F.cross_entropy(exact.flatten(0, 1), label, reduction="none")
        assert error(blocks, rows.view(classes, 4).mean(1)) < 2e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_entropy_is_not_taken_in_the_weights_dtype(dtype):
    weights, logits = torch.tensor([0.2, 0.3, 0.5]).to(dtype), torch.randn(3, 9, 3)
    pi = weights.double()
    expected = -(pi * pi.log()).sum() - ivfast.multi_js_loss(logits.double(), weights=pi)
    for x in (logits, logits.double()):
        assert abs(float(ivfast.multi_js_divergence(x, weights=weights)) - float(expected)) < 1e-6
