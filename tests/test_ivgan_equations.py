"""S2's losses and gradients, and those of its baselines, against their equations in float64."""

import copy

import pytest
import torch
from helpers import assert_equations, doubled, drawn_again, settings_with, terms_and_gradients
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from ivfast.models import build
from ivfast.testing import error
from ivfast.train import Settings

SHAPE = (1, 8, 8)


def small(system, **changes) -> Settings:
    values = {"system": system, "batch_size": 16, "latent_dim": 8, "width": 16, "discriminator_width": 32}
    values |= {"learning_rates": {"default": 1e-3}, "betas": (0.5, 0.999), "tensorboard": False, "log_every": 10}
    return settings_with({**values, "seed": int(torch.randint(1000, ()))}, changes)


def phase_of(system, name):
    return next(phase for phase in system.phases if phase.name == name)


def assert_phase(system, name, shared, expected, networks, rounding):
    assert_equations(terms_and_gradients(phase_of(system, name), shared), expected, networks, rounding)


def adversarial(name, D, real, fake):
    """L_D's two terms and L_G, by their definitions."""
    if name.endswith("lsgan"):
        return {"real": ((D(real) - 1) ** 2).mean(), "fake": ((D(fake) + 1) ** 2).mean()}, (D(fake) ** 2).mean()
    sigmoid = torch.sigmoid
    return (
        {"real": -sigmoid(D(real)).log().mean(), "fake": -(1 - sigmoid(D(fake))).log().mean()},
        -sigmoid(D(fake)).log().mean(),
    )


def drawn(system, x):
    """The shared forward pass, and the same in float64 with the noise that it drew."""
    state = torch.get_rng_state()
    shared = system.share(x)
    return shared, drawn_again(state, *shared.z.shape)


@pytest.mark.parametrize("encoder_loss", ["ascent", "confusion"])
@pytest.mark.parametrize("code_reconstruction", ["prior", "codes"])
@pytest.mark.parametrize("name", ["ivdcgan", "ivlsgan"])
def test_ivgan_is_algorithm_1(name, code_reconstruction, encoder_loss, rounding):
    k, lam, mu = 4, 0.7, 0.6
    system = build(
        small(name, k=k, lam=lam, mu=mu, code_reconstruction=code_reconstruction, encoder_loss=encoder_loss), SHAPE
    )
    reference = doubled(system)
    G, E, D, f = (reference[part] for part in ("generator", "encoder", "discriminator", "classifier"))
    x = torch.rand(16, *SHAPE) * 2 - 1
    shared, z = drawn(system, x)
    noise = torch.randint(k, (16,))  # in the order that `share` draws: i, then the noise of O_i
    assert torch.equal(noise, shared.block)
    epsilon = torch.randn(16, 8).double()
    code = E(x.double())
    blocks = torch.arange(8) // 2 == shared.block[:, None]
    w = torch.where(blocks, epsilon, code)
    intervened = G(w)
    assert error(shared.intervened, intervened) < rounding.loss

    def classify(image):
        return f(D.features(image)).log_softmax(1)

    rows = torch.arange(16)
    of_judges, _ = adversarial(name, D, x.double(), G(z).detach())
    expected = {**of_judges, "intervention": -mu * classify(intervened.detach())[rows, shared.block].mean()}
    assert_phase(system, "discriminator", shared, expected, [D, f], rounding)

    _, deceiving = adversarial(name, D, x.double(), G(z))
    log_f = classify(intervened)
    target, image = (z, G(z)) if code_reconstruction == "prior" else (w, intervened)
    expected = {
        "adversarial": deceiving,
        "recon": lam * (G(code) - x.double()).abs().mean(),
        "code": lam * (E(image) - target).abs().mean(),
        "intervention": mu * (log_f[rows, shared.block].mean() if encoder_loss == "ascent" else -log_f.mean()),
    }
    assert_phase(system, "generator", shared, expected, [G, E], rounding)


def test_the_classifier_shares_the_discriminators_features_but_not_its_head():
    system = build(small("ivdcgan"), SHAPE)
    x = torch.rand(16, *SHAPE) * 2 - 1
    D = system.modules["discriminator"]
    features, head, own = (list(m.parameters()) for m in (D.features, D.head, system.modules["classifier"]))
    shared = system.share(x)
    cross_entropy = F.cross_entropy(system.block_logits(shared.intervened.detach()), shared.block)
    gradients = torch.autograd.grad(cross_entropy, features + head + own, allow_unused=True)
    assert [g is None for g in gradients] == [False] * len(features) + [True] * len(head) + [False] * len(own)
    phase = system.phases[0]
    assert set(phase.parameters) == {*features, *head, *own}


def test_mrgan_is_its_equations(rounding):
    system = build(small("mrgan", lam=0.7, lam2=0.3), SHAPE)
    reference = doubled(system)
    G, E, D = (reference[part] for part in ("generator", "encoder", "discriminator"))
    x = torch.rand(16, *SHAPE) * 2 - 1
    shared, z = drawn(system, x)
    back = G(E(x.double()))
    expected = {
        "adversarial": -torch.sigmoid(D(G(z))).log().mean(),
        "recon": 0.7 * (back - x.double()).square().mean(),
        "modes": -0.3 * torch.sigmoid(D(back)).log().mean(),
    }
    assert_phase(system, "generator", shared, expected, [G, E], rounding)


def test_veegan_is_its_algorithm_1(rounding):
    system = build(small("veegan", lam=0.7), SHAPE)
    reference = doubled(system)
    G, E, D = (reference[part] for part in ("generator", "encoder", "discriminator"))
    x = torch.rand(16, *SHAPE) * 2 - 1
    shared, z = drawn(system, x)

    def judge(code, image):
        return D.head(torch.cat([D.features(image), code], 1))

    expected = {
        "generated": -torch.sigmoid(judge(z, G(z).detach())).log().mean(),
        "encoded": -(1 - torch.sigmoid(judge(E(x.double()).detach(), x.double()))).log().mean(),
    }
    assert_phase(system, "discriminator", shared, expected, [D], rounding)
    recon = 0.7 * (E(G(z)) - z).square().sum(1).mean()
    expected = {"adversarial": judge(z, G(z)).mean(), "code": recon}
    assert_phase(system, "generator", shared, expected, [G, E], rounding)


def smooth(network):
    """No unit that rounding switches on or off: a penalty is a gradient, which would jump."""
    for module in list(network.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.LeakyReLU):
                setattr(module, name, nn.Tanh())


@pytest.mark.parametrize("packing", [1, 2])
def test_the_gradient_penalty_is_that_of_each_sample(packing, rounding):
    """Against float64, sample by sample; and by hand for a linear D: (‖w‖ − 1)², 2 (1 − 1/‖w‖) w."""
    system = build(small("wgan-gp", packing=packing), SHAPE)
    smooth(system.modules["discriminator"])
    x, fake = (system.pack(torch.rand(8, *SHAPE) * 2 - 1) for _ in range(2))
    D = copy.deepcopy(system.modules["discriminator"]).double()
    state = torch.get_rng_state()
    ours = system.gradient_penalty(x, fake)
    torch.set_rng_state(state)
    share = torch.rand(len(x), 1, 1, 1).double()
    between = share * x.double() + (1 - share) * fake.double()
    norms = []
    for sample in between:
        point = sample[None].requires_grad_()
        norms.append(torch.autograd.grad(D(point).squeeze(), point, create_graph=True)[0].square().sum().sqrt())
    theirs = (torch.stack(norms) - 1).square().mean()
    assert error(ours, theirs) < rounding.loss
    parameters, reference = list(system.modules["discriminator"].parameters()), list(D.parameters())
    a = torch.autograd.grad(ours, parameters, allow_unused=True, materialize_grads=True)
    b = torch.autograd.grad(theirs, reference, allow_unused=True, materialize_grads=True)
    assert all(error(one, other) < rounding.loss for one, other in zip(a, b, strict=True))

    linear = nn.Sequential(nn.Flatten(), nn.Linear(packing * 64, 1))
    system.modules["discriminator"] = linear
    w = linear[1].weight
    penalty = system.gradient_penalty(x, fake)
    (gradient,) = torch.autograd.grad(penalty, w)
    assert float(penalty.detach()) == pytest.approx(float((w.norm() - 1).detach() ** 2), rel=1e-5)
    assert error(gradient, 2 * (1 - 1 / w.norm()) * w) < 1e-5


@pytest.mark.parametrize("net", ["mlp", "conv"])
def test_unrolling_differentiates_through_the_discriminators_steps(net, rounding):
    """Against a central difference of L_G(θ_G, θ_D^K(θ_G)) in float64, along one direction of θ_G."""
    rate, steps = 0.3, 3
    rates = {"default": 1e-3, "unrolled": rate}
    system = build(small("unrolled-gan", unroll=steps, learning_rates=rates, net=net, width=8, batch_size=8), SHAPE)
    reference = doubled(system)
    G, D = reference["generator"], reference["discriminator"]
    x = torch.rand(8, *SHAPE) * 2 - 1
    shared, z = drawn(system, x)
    start = dict(G.named_parameters())
    direction = {name: torch.randn_like(p) for name, p in start.items()}

    def value(shift):
        fake = functional_call(G, {n: p.detach() + shift * direction[n] for n, p in start.items()}, (z,))
        theta = {name: p.detach().requires_grad_() for name, p in D.named_parameters()}
        for _ in range(steps):
            real_logit, fake_logit = (functional_call(D, theta, (images,)) for images in (x.double(), fake))
            loss = F.softplus(-real_logit).mean() + F.softplus(fake_logit).mean()
            slopes = torch.autograd.grad(loss, list(theta.values()))
            theta = {
                n: (p - rate * g).detach().requires_grad_() for (n, p), g in zip(theta.items(), slopes, strict=True)
            }
        return F.softplus(-functional_call(D, theta, (fake,))).mean().detach()

    terms, gradients = terms_and_gradients(phase_of(system, "generator"), shared)
    assert error(terms["adversarial"], value(0.0)) < rounding.loss
    slope = sum((g.double() * d).sum() for g, d in zip(gradients, direction.values(), strict=True))
    h = 1e-9  # a step over the kink of one of D's units would make the difference quotient a jump's
    expected = (value(h) - value(-h)) / (2 * h)
    assert float(slope) == pytest.approx(float(expected), rel=max(rounding.gradient, 1e-3), abs=1e-5)
    # the term that unrolling adds must not be small: without it this would test a plain GAN with other weights
    theta = system.modules["discriminator"]
    plain = torch.autograd.grad(F.softplus(-theta(shared.fake)).mean(), list(system.modules["generator"].parameters()))
    assert abs(
        float(sum((g.double() * d).sum() for g, d in zip(plain, direction.values(), strict=True)) - slope)
    ) > 1e-3 * abs(float(slope))
