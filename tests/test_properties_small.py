"""What mathematics says of the classifier's loss, the samplers and the small losses, on fresh random inputs."""

import math

import pytest
import torch
import torch.nn.functional as F

import ivfast
from ivfast.ops import linear_multi_js
from ivfast.testing import error

DOUBLE = torch.float64


def normal(*shape, dtype=DOUBLE):
    return torch.randn(*shape, dtype=dtype)


# The classifier's loss


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


@pytest.fixture
def chunks(monkeypatch):
    """A few rows at a time, as if the classes were many."""
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
    """Over 20,000 rows each gradient is below float16's smallest number until the loss is scaled."""
    monkeypatch.setitem(linear_multi_js.CHUNK, "cpu", 5000)
    features, weight, bias = layer(5, 4000, 8, torch.float16)
    loss = ivfast.linear_multi_js_loss(features, weight, bias)
    (gradient,) = torch.autograd.grad(loss, features, torch.tensor(2.0**14))
    exact = features.detach().double().requires_grad_()
    expected = ivfast.multi_js_loss(F.linear(exact, weight.double(), bias.double()))
    (theirs,) = torch.autograd.grad(expected, exact, torch.tensor(2.0**14, dtype=DOUBLE))
    assert error(gradient, theirs) < 4e-3


# Samplers


def test_gaussian_kl_agrees_with_torch_distributions():
    mu, logvar = normal(8, 5), normal(8, 5)
    q, p = torch.distributions.Normal(mu, (0.5 * logvar).exp()), torch.distributions.Normal(0.0, 1.0)
    assert error(ivfast.gaussian_kl(mu, logvar), torch.distributions.kl_divergence(q, p).sum(-1)) < 1e-12
    assert float(ivfast.gaussian_kl(torch.zeros(4), torch.zeros(4))) == 0.0


def test_reparameterized_samples_have_their_moments():
    mu, logvar = torch.tensor([0.5, -2.0]), torch.tensor([0.0, 1.2])
    z, kl = ivfast.reparameterize(mu.expand(200_000, 2), logvar.expand(200_000, 2))
    assert torch.allclose(z.mean(0), mu, atol=0.02)
    assert torch.allclose(z.var(0).log(), logvar, atol=0.03)
    assert torch.equal(kl[:1], ivfast.gaussian_kl(mu, logvar)[None])


def test_reparameterize_gradients_of_one_output_alone():
    mu, logvar, draws = normal(4, 3).requires_grad_(), normal(4, 3).requires_grad_(), normal(4, 3)
    g = normal(4, 3)
    z, kl = ivfast.reparameterize(mu, logvar, draws=draws)
    dmu, dlogvar = torch.autograd.grad(z, (mu, logvar), g, retain_graph=True)
    assert torch.equal(dmu, g)
    assert error(dlogvar, g * draws * 0.5 * (0.5 * logvar).exp()) < 1e-12
    dmu, dlogvar = torch.autograd.grad(kl.sum(), (mu, logvar))
    assert error(dmu, mu) < 1e-12
    assert error(dlogvar, 0.5 * logvar.expm1()) < 1e-12


def test_reparameterize_repeats_its_draws():
    mu = normal(3, 2)
    z = [ivfast.reparameterize(mu, mu, generator=torch.Generator().manual_seed(3)).z for _ in range(2)]
    assert torch.equal(*z)


# Losses of samples


def test_importance_weights_are_the_softmax_of_the_logits():
    """w = D/(1 − D) = exp(logit), normalised; held constant in the gradient (S3 Eq. 22)."""
    l = normal(11).requires_grad_()
    d = torch.sigmoid(l)
    w = (d / (1 - d)).detach()
    expected = -(w / w.sum() * torch.log(d)).sum()
    loss = ivfast.importance_weighted_loss(l)
    assert error(loss, expected) < 1e-12
    assert error(torch.autograd.grad(loss, l)[0], torch.autograd.grad(expected, l)[0]) < 1e-12


def test_importance_weighted_loss_of_equal_logits_is_the_non_saturating_one():
    l = torch.full((13,), float(torch.randn(())), dtype=DOUBLE, requires_grad=True)
    plain = torch.nn.functional.softplus(-l).mean()
    loss = ivfast.importance_weighted_loss(l)
    assert error(loss, plain) < 1e-12
    assert error(torch.autograd.grad(loss, l)[0], torch.autograd.grad(plain, l)[0]) < 1e-12


def test_exp_elbo_is_soft_intro_vaes():
    """¼ Σ-form of the published code: (1/2) mean exp(−2 s (β_rec rec + β_kl KL)) at α = 2."""
    rec, kl = torch.rand(64, dtype=DOUBLE) * 50, torch.rand(64, dtype=DOUBLE) * 50
    ours = ivfast.exp_elbo_loss(rec, kl, scale=1 / 64, beta_reconstruction=0.2, beta_kl=0.9)
    assert error(ours, 0.5 * torch.exp(-2 / 64 * (0.2 * rec + 0.9 * kl)).mean()) < 1e-12


@pytest.mark.parametrize("device_dtype", [torch.float32, DOUBLE], ids=str)
def test_exp_elbo_is_finite_however_far_the_sample(device_dtype):
    rec = torch.tensor([0.0, 1e30, math.inf], dtype=device_dtype, requires_grad=True)
    kl = torch.tensor([1e9, 0.0, 0.0], dtype=device_dtype, requires_grad=True)
    loss = ivfast.exp_elbo_loss(rec, kl, beta_kl=0.0)
    assert float(loss.detach()) == pytest.approx(1 / 6)
    for gradient in torch.autograd.grad(loss, (rec, kl)):
        assert gradient.isfinite().all()
    far = torch.full((4,), -1e6, dtype=device_dtype, requires_grad=True)
    loss = ivfast.exp_elbo_loss(far, torch.zeros_like(far))
    assert loss.isfinite()
    assert torch.equal(torch.autograd.grad(loss, far)[0], torch.zeros_like(far))


def test_reconstruction_losses_are_torchs():
    x, t = normal(5, 3, 4, 4), torch.rand(5, 3, 4, 4, dtype=DOUBLE)
    torchs = {"l2": F.mse_loss, "l1": F.l1_loss, "bce": F.binary_cross_entropy_with_logits}
    for kind, function in torchs.items():
        expected = function(x, t, reduction="none").flatten(1).sum(1)
        assert error(ivfast.reconstruction_loss(x, t, kind=kind), expected) < 1e-12


def test_certain_and_right_logits_cost_nothing():
    x = torch.tensor([[math.inf, -math.inf], [math.inf, math.inf]], requires_grad=True)
    t = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    loss = ivfast.reconstruction_loss(x, t, kind="bce")
    assert loss[0] == 0
    assert loss[1] > 1e38
    (gradient,) = torch.autograd.grad(loss.sum(), x)
    assert torch.equal(gradient, torch.tensor([[0.0, 0.0], [1.0, 0.0]]))


def test_linear_multi_js_is_checked():
    features, weight, bias = layer(5, 3, 4)
    wrong = [
        ((features[:14], weight, bias), r"features must hold n rows for each of weight's C = 5 classes, got \(14, 4\)"),
        ((features[:, :3], weight, bias), r"features must be .* with f = 4 as in weight, got \(15, 3\)"),
        ((features, weight, bias[:4]), r"bias must have shape \(5,\) as weight's rows, got \(4,\)"),
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
