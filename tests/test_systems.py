"""S1's systems: losses against the equations, special cases, and results of the paper, on scikit-learn's digits."""

import dataclasses
import math

import pytest
import torch
from helpers import assert_equations, doubled, drawn_again, own, settings_with, terms_and_gradients
from sklearn.datasets import load_digits
from torch.nn import functional as F

import ivfast
from ivfast import nets
from ivfast.models import SYSTEMS, build, preset
from ivfast.testing import error
from ivfast.train import Settings
from ivfast.train.batches import as_images
from ivfast.train.loop import fit
from ivfast.train.run import Run

SHAPE = (1, 8, 8)
IVAAE = ("ivaae-bw", "ivaae-rad", "ivaae-svgd")
FAMILY = ("wae-mmd", "wae-gan", *IVAAE)


@pytest.fixture(scope="module")
def digits():
    return (torch.from_numpy(load_digits().images) * (255 / 16)).round().to(torch.uint8).unsqueeze(1)


def small(system, **changes) -> Settings:
    values = {"system": system, "batch_size": 32, "latent_dim": 8, "width": 32, "discriminator_width": 32, "t": 4}
    seed = int(torch.randint(1000, ()))
    return settings_with({**values, "tensorboard": False, "seed": seed}, changes)


def bridge_of(name, z, noise, t):
    """S1's three bridges by their definitions, in z's dtype; `noise` `[n, d]`, for SVGD `[(t−1)·2 + 1, n, d]`."""
    n, d = z.shape
    if name == "ivaae-rad":
        return [z * math.cos(k * math.pi / 2 / t) + noise * math.sin(k * math.pi / 2 / t) for k in range(t + 1)]
    if name == "ivaae-bw":
        return [torch.cat([noise[:, : k * d // t], z[:, k * d // t :]], 1) for k in range(t + 1)]
    bridges, x = [z], z
    for step in range(2 * (t - 1)):
        distance = torch.pdist(x.detach()).sort().values
        count = len(distance)
        median = (distance[(count - 1) // 2] + distance[count // 2]) / 2
        h = 100 * median**2 / math.log(n)
        difference = x[:, None] - x[None]  # x_i − x_j
        kernel = torch.exp(-difference.square().sum(-1) / h)
        x = x + (kernel @ -x + (2 / h * difference * kernel[..., None]).sum(1)) / n + 0.1 * noise[step]
        if step % 2:
            bridges.append(x)
    return [*bridges, noise[-1]]


def cross_entropy(discriminator, bridges):
    """−(1/(m(t+1))) Σ_k Σ_j log D_k(T_k z_j)."""
    return -torch.stack([discriminator(z).log_softmax(1)[:, k].mean() for k, z in enumerate(bridges)]).mean()


def parts(nets64):
    return [nets64["encoder"], nets64["decoder"]]


def squared_error(nets64, x, z):
    return ((nets64["decoder"](z) - x) ** 2).flatten(1).sum(1).mean()


@pytest.mark.parametrize("encoder_loss", ["ascent", "confusion"])
@pytest.mark.parametrize("name", IVAAE)
def test_ivaae_is_algorithm_1(name, encoder_loss, rounding):
    t, lam, mu1, mu2 = 4, 0.7, 1.3, 0.6
    system = build(small(name, lam=lam, mu1=mu1, mu2=mu2, encoder_loss=encoder_loss), SHAPE)
    reference = doubled(system)
    x = torch.rand(32, *SHAPE) * 2 - 1
    state = torch.get_rng_state()
    shared = system.share(x)
    noise = drawn_again(state, *((7, 32, 8) if name == "ivaae-svgd" else (32, 8)))
    z = reference["encoder"](x.double())
    bridges = bridge_of(name, z, noise, t)
    assert error(shared.bridge, torch.stack(bridges)) < rounding.loss

    D = reference["discriminator"]
    discriminator, autoencoder = system.phases
    expected = {"intervention": mu1 * cross_entropy(D, [b.detach() for b in bridges])}
    assert_equations(terms_and_gradients(discriminator, shared), expected, [D], rounding)
    if encoder_loss == "ascent":
        intervention = -cross_entropy(D, bridges)
    else:
        intervention = -torch.stack([D(b).log_softmax(1).mean() for b in bridges]).mean()
    expected = {"recon": lam * squared_error(reference, x.double(), z), "intervention": mu2 * intervention}
    assert_equations(terms_and_gradients(autoencoder, shared), expected, parts(reference), rounding)


def test_wae_gan_is_its_equations(rounding):
    system = build(small("wae-gan", lam=0.7), SHAPE)
    reference = doubled(system)
    x = torch.rand(32, *SHAPE) * 2 - 1
    shared = system.share(x)
    z = reference["encoder"](x.double())
    D = reference["discriminator"]
    discriminator, autoencoder = system.phases
    state = torch.get_rng_state()
    found = terms_and_gradients(discriminator, shared)
    prior = drawn_again(state, 32, 8)
    # BCE(D(z), 1) + BCE(D(E x), 0)
    expected = {"prior": -torch.sigmoid(D(prior)).log().mean(), "code": -torch.sigmoid(-D(z.detach())).log().mean()}
    assert_equations(found, expected, [D], rounding)
    expected = {
        "recon": squared_error(reference, x.double(), z),
        "adversarial": -0.7 * torch.sigmoid(D(z)).log().mean(),
    }
    found = terms_and_gradients(autoencoder, shared)
    assert_equations(found, expected, parts(reference), rounding)


def test_wae_mmd_is_its_equations(rounding):
    system = build(small("wae-mmd", lam=3.0), SHAPE)
    reference = doubled(system)
    x = torch.rand(32, *SHAPE) * 2 - 1
    shared = system.share(x)
    z, (n, d) = reference["encoder"](x.double()), shared.z.shape
    state = torch.get_rng_state()
    found = terms_and_gradients(system.phases[0], shared)
    prior = drawn_again(state, n, d)

    def kernel(a, b):
        r2 = (a[:, None] - b[None]).square().sum(-1)
        return sum(2 * d * s / (2 * d * s + r2) for s in (0.1, 0.2, 0.5, 1, 2, 5, 10))

    off = 1 - torch.eye(n, dtype=torch.float64)
    within = sum((kernel(a, a) * off).sum() / (n * (n - 1)) for a in (z, prior))
    expected = {
        "recon": squared_error(reference, x.double(), z),
        "mmd": 3 * (within - 2 * kernel(z, prior).mean()),
    }
    assert_equations(found, expected, parts(reference), rounding)


@pytest.mark.parametrize("name", FAMILY)
def test_fld_weight_adds_the_weighted_distance_of_the_codes(name, rounding):
    system, plain = (build(small(name, fld_weight=w, seed=1), SHAPE) for w in (0.3, 0.0))
    x = torch.rand(32, *SHAPE) * 2 - 1
    state = torch.get_rng_state()
    shared, phase = system.share(x), system.phases[-1]
    terms, gradients = terms_and_gradients(phase, shared)
    torch.set_rng_state(state)
    without, before = terms_and_gradients(plain.phases[-1], plain.share(x))
    assert terms.keys() - without.keys() == {"fld"}
    assert all(torch.equal(terms[name], value) for name, value in without.items())

    reference = doubled(system)
    z = reference["encoder"](x.double())
    sigma = torch.cov(z.mT)  # ‖μ‖² + Tr(Σ + I) − 2 Tr √Σ
    expected = 0.3 * (z.mean(0).square().sum() + sigma.trace() + 8 - 2 * torch.linalg.eigvalsh(sigma).sqrt().sum())
    assert error(terms["fld"], expected) < rounding.loss
    parameters = list(reference["encoder"].parameters())
    for ours, theirs, g in zip(gradients, before, torch.autograd.grad(expected, parameters), strict=False):
        assert error(ours - theirs, g, rounding.unit) < rounding.gradient
    assert all(map(torch.equal, gradients[len(parameters) :], before[len(parameters) :]))  # the decoder's


def test_fld_weight_brings_the_codes_to_the_prior(digits, tmp_path):
    def trained(w):
        system = build(small("wae-mmd", fld_weight=w, batch_size=64, steps=60, seed=1), SHAPE)
        history = fit(system, digits, system.settings, tmp_path / str(w))
        return float(ivfast.fld(system.encode(as_images(digits)).detach())), history

    (without, _), (distance, history) = trained(0.0), trained(10.0)
    assert distance < 0.5 * without
    assert any("fld" in name for record in history for name in record.get("losses", {}))


@pytest.mark.parametrize("name", IVAAE)
def test_one_bridge_is_the_two_class_form_of_aae(name):
    system = build(small(name, t=1), SHAPE)
    assert (system.mu1, system.mu2) == (2, 1)
    shared = system.share(torch.rand(32, *SHAPE) * 2 - 1)
    codes, prior = shared.bridge.detach()
    assert torch.equal(codes, shared.z)

    def logit(z):  # of "prior"; two logits are one
        a, b = system.discriminate(z).unbind(1)
        return b - a

    # μ₁ CE = BCE(D(z), 1) + BCE(D(E x), 0)
    expected = F.softplus(-logit(prior)).mean() + F.softplus(logit(codes)).mean()
    assert error(system.phases[0].loss(shared)["intervention"], expected) < 1e-5


def test_default_weights_are_the_papers():
    system = build(small("ivaae-rad"), SHAPE)
    assert (system.mu1, system.mu2, system.settings.lam) == (0.8, 0.4, 1.0)
    logits = torch.zeros(5 * 7, 5)  # an ignorant D: loss μ₁ log(t+1) and −μ₂ log(t+1)
    system.discriminate = lambda z: logits
    shared = system.share(torch.zeros(7, *SHAPE))
    discriminator, autoencoder = (phase.loss(shared)["intervention"].detach() for phase in system.phases)
    assert float(discriminator) == pytest.approx(0.8 * math.log(5), rel=1e-6)
    assert float(autoencoder) == pytest.approx(-0.4 * math.log(5), rel=1e-6)


def test_confusion_is_bounded_by_its_value_at_equal_logits_where_its_gradient_is_zero():
    system = build(small("ivaae-rad", encoder_loss="confusion"), SHAPE)
    shared = system.share(torch.zeros(7, *SHAPE))
    bound = 0.4 * math.log(5)
    for scale in (0.0, 1e-3, 1.0, 300.0):
        logits = (torch.randn(35, 5) * scale).requires_grad_()
        system.discriminate = lambda z, logits=logits: logits
        loss = system.autoencoder_loss(shared)["intervention"]
        (gradient,) = torch.autograd.grad(loss, logits)
        assert float(loss.detach()) >= bound - 1e-6
        assert scale or gradient.abs().max() < 1e-8


@pytest.mark.trains
@pytest.mark.parametrize("name", FAMILY)
def test_short_training_lowers_reconstruction_and_keeps_codes_from_running_away(name, digits, tmp_path):
    settings = small(name, batch_size=64, steps=200, evaluate_every=100, **own(name, width=64, discriminator_width=64))
    system = build(settings, SHAPE)
    x = as_images(digits[:500])

    @torch.no_grad()
    def look(system):
        z = system.encode(x)
        return {"fld": float(ivfast.fld(z)), "recon": float((system.decode(z) - x).square().sum((1, 2, 3)).mean())}

    before = look(system)
    history = fit(system, digits, settings, tmp_path, evaluate=look, progress=False)
    after = history[-1]["metrics"]
    constant = float((x - x.mean(0)).square().sum((1, 2, 3)).mean())  # the best result that ignores the code
    assert after["recon"] < 0.85 * constant < before["recon"]
    assert after["fld"] < 1000


@pytest.mark.trains
def test_discriminator_alone_wins_against_aae_and_much_less_against_ivaae(digits, tmp_path):
    """S1 Fig. 2: freeze E and G after a while, continue D; its final loss relative to its initial loss."""
    fall = {}
    for name in ("wae-gan", "ivaae-bw"):
        settings = small(name, batch_size=64, latent_dim=16, width=128, discriminator_width=128)
        run = Run(build(settings, SHAPE), digits, settings, tmp_path, None)
        for _ in range(250):
            run.advance()
            run.record.clear()
        phase = run.system.phases[0]
        curve = []
        for _ in range(250):
            with torch.no_grad():
                shared = run.system.share(*run.batches.next())
            curve.append(sum(v.detach() for v in run.update(phase, phase.loss, shared).values()))
        fall[name] = float(torch.stack(curve[-20:]).mean() / torch.stack(curve[:20]).mean())
    assert fall["wae-gan"] < 0.15
    assert fall["ivaae-bw"] > 0.25


@pytest.mark.parametrize("net", ["mlp", "conv"])
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 9, 13), (2, 28, 28)])
def test_networks_take_any_image_from_8_pixels(net, shape):
    system = build(small("ivaae-rad", net=net, width=16 if net == "conv" else 64), shape)
    x = torch.rand(6, *shape) * 2 - 1
    z = system.encode(x)
    assert z.shape == (6, 8)
    y = system.decode(z)
    assert y.shape == x.shape
    assert y.abs().max() <= 1
    shared = system.share(x)
    for phase in system.phases:
        _, gradients = terms_and_gradients(phase, shared)
        assert all(g.isfinite().all() and g.abs().max() > 0 for g in gradients)


def test_networks_are_the_papers_tables():
    with torch.device("meta"):
        encoder, decoder = nets.conv_encoder((3, 64, 64), 64), nets.conv_decoder((3, 64, 64), 64)
        perceptron = nets.mlp_encoder((1, 64, 64), 16)
    kernels = [tuple(p.shape) for p in encoder.parameters() if p.dim() == 4]
    assert kernels == [(128, 3, 5, 5), (256, 128, 5, 5), (512, 256, 5, 5), (1024, 512, 5, 5)]
    assert encoder.code.weight.shape == (64, 1024 * 4 * 4)
    kernels = [tuple(p.shape) for p in decoder.parameters() if p.dim() == 4]
    assert kernels == [(1024, 512, 5, 5), (512, 256, 5, 5), (256, 128, 5, 5), (3, 128, 4, 4)]
    assert decoder.code.weight.shape == (1024 * 8 * 8, 64)
    assert [tuple(p.shape) for p in perceptron.parameters() if p.dim() == 2] == [(1024, 4096), (1024, 1024), (16, 1024)]
    with pytest.raises(ValueError, match=r"image_shape must be \(C, H, W\) with C >= 1 and H, W >= 8, got \(1, 8, 7\)"):
        nets.mlp_encoder((1, 8, 7), 4)


def test_presets_are_the_papers_settings():
    mnist, celeba, cifar = (preset("ivaae-bw", data) for data in ("mnist", "celeba", "cifar10"))
    assert (mnist.latent_dim, mnist.batch_size, mnist.net, mnist.width, mnist.image_size) == (16, 64, "mlp", 1024, 64)
    assert [mnist.learning_rate(m) for m in ("encoder", "decoder", "discriminator")] == [5e-5, 1e-4, 1e-4]
    assert [mnist.learning_rate_factor(epoch) for epoch in (0, 99, 100, 299)] == [1, 1, 0.5, 0.25]
    assert (celeba.latent_dim, celeba.batch_size) == (64, 100)
    assert (cifar.latent_dim, cifar.batch_size) == (128, 128)
    for settings in (celeba, cifar):
        assert (settings.net, settings.image_size, settings.t, settings.lam) == ("conv", 64, 4, 1.0)
        assert [settings.learning_rate(m) for m in ("encoder", "decoder", "discriminator")] == [1e-3, 1e-3, 5e-4]
        factors = [settings.learning_rate_factor(epoch) for epoch in (29, 30, 50, 100)]
        assert factors == pytest.approx([1, 0.5, 0.1, 0.01])
    assert preset("aae", "mnist") == preset("wae-gan", "mnist")
    assert set(FAMILY) <= set(SYSTEMS)


def test_samples_follow_the_generator(digits):
    system = build(small("ivaae-rad"), SHAPE)
    one, same = (system.sample(5, torch.Generator().manual_seed(4)) for _ in range(2))
    assert torch.equal(one, same)
    other = dataclasses.replace(system.settings, seed=system.settings.seed + 1)
    assert not torch.equal(build(other, SHAPE).sample(5, torch.Generator().manual_seed(4)), one)
    z = torch.randn(5, 8, generator=torch.Generator().manual_seed(4))
    assert torch.equal(system.decode(z), one)
