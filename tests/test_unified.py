"""S3's systems: losses against the equations, and special cases in which one system equals another."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from helpers import assert_equations, own, settings_with, terms_and_gradients
from torch import distributions
from torch.nn import functional as F

from ivfast import data, metrics, runs
from ivfast.models import SYSTEMS, build, preset
from ivfast.papers import s3
from ivfast.testing import error
from ivfast.train import Settings
from ivfast.train.loop import fit
from ivfast.train.run import Run

GANS = ("gan", "iwgan", "cgan", "iwcgan", "infogan")
ACTIVATED = {"aavae": "vae", "aacvae": "cvae", "aasvae": "svae"}
VAES = (*ACTIVATED, *ACTIVATED.values())
FAMILY = (*GANS, "ada", *VAES)
SHAPE = (1, 8, 8)
N, D, C = 24, 6, 10


@pytest.fixture(scope="module")
def digits():
    return data.load("digits")


def small(system, **changes) -> Settings:
    values = {"system": system, "batch_size": N, "latent_dim": D, "width": 32, "discriminator_width": 32}
    seed = int(torch.randint(1000, ()))
    return settings_with({**values, "tensorboard": False, "seed": seed}, changes)


def labels_for(system, n=N):
    """Labels in the form of `System.share`: none, all, or every third hidden."""
    if SYSTEMS[system].labels == "none":
        return ()
    labels = torch.randint(C, (n,))
    if SYSTEMS[system].labels != "all":
        labels[::3] = -1
    return (labels,)


def planes(x, labels):
    return torch.cat([x, F.one_hot(labels, C)[:, :, None, None].expand(-1, -1, *x.shape[2:]).to(x)], 1)


def image():
    return torch.rand(N, *SHAPE) * 2 - 1


@pytest.mark.parametrize(
    ("net", "shape"), [("mlp", SHAPE), ("conv", SHAPE), ("conv", (3, 9, 13)), ("mlp", (2, 16, 16))]
)
@pytest.mark.parametrize("name", FAMILY)
def test_steps_of_every_system_are_finite(name, net, shape, digits, tmp_path):
    # ada's heads are perceptrons of that width, like D's head: a few ReLU units may all be dead
    width = 32 if net == "mlp" or name == "ada" else 4
    settings = small(name, net=net, width=width, batch_size=12)
    images = digits.train[:48] if shape == SHAPE else torch.randint(256, (48, *shape), dtype=torch.uint8)
    run = Run(build(settings, shape), images, settings, tmp_path, *(labels_for(name, 48) or (None,)))
    before = [p.detach().clone() for p in run.every_parameter]
    for _ in range(4):
        run.advance()
    assert all(map(math.isfinite, run.record.read(4).values()))
    assert not any(torch.equal(p, b) for p, b in zip(run.every_parameter, before, strict=True))
    if name != "ada":
        samples = run.system.sample(7, torch.Generator().manual_seed(1))
        assert samples.shape == (7, *shape)
        assert samples.abs().max() <= 1
        assert torch.equal(samples, run.system.sample(7, torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("name", ["gan", "iwcgan", "infogan", "ada", "aavae", "aacvae", "aasvae"])
def test_resumed_run_has_the_bits_of_an_uninterrupted_one(name, digits, tmp_path):
    settings = small(name, steps=14, ema=0.9, log_every=4)
    labels = labels_for(name, 60) or (None,)

    def train(steps, out, resume=False):
        system = build(settings, SHAPE)
        fit(system, digits.train[:60], replace(settings, steps=steps), tmp_path / out, labels=labels[0],
            resume=resume, progress=False)  # fmt: skip
        return system

    straight = train(14, "straight")
    train(5, "parts")
    resumed = train(14, "parts", resume=True)
    for module in straight.modules:
        for a, b in zip(straight.modules[module].parameters(), resumed.modules[module].parameters(), strict=True):
            assert torch.equal(a, b)
    loaded, _ = runs.load_system(tmp_path / "parts", average=False)
    x = torch.rand(3, *SHAPE)
    for call in ("encode", "classify", "discriminate"):
        if hasattr(loaded, call) and name not in ("iwcgan", "ada"):
            assert torch.equal(getattr(loaded, call)(x), getattr(resumed, call)(x))


@pytest.mark.parametrize("name", GANS)
def test_gans_are_their_equations(name, rounding):
    system = build(small(name, **own(name, lam=0.7)), SHAPE)
    G, D_ = (copy.deepcopy(system.modules[m]).double() for m in ("generator", "discriminator"))
    x, labels = image(), labels_for(name)
    shared = system.share(x, *labels)
    z, real = shared.z.double(), x.double()
    if labels:
        z, real = torch.cat([z, F.one_hot(labels[0], C)], 1), planes(real, *labels)
    fake = G(z).tanh()
    assert error(shared.fake, fake) < rounding.loss

    def probability(x):
        return torch.sigmoid(D_(planes(x, *labels) if labels and len(x[0]) == 1 else x))[:, 0]

    expected = {"real": -probability(real).log().mean(), "fake": -(1 - probability(fake.detach())).log().mean()}
    assert_equations(terms_and_gradients(system.phases[0], shared), expected, [D_], rounding)
    p = probability(fake)
    if name.startswith("iw"):  # S3 Eqs. 22 and 44
        w = (p / (1 - p)).detach()
        expected = {"adversarial": -(w / w.sum() * p.log()).sum()}
    else:
        expected = {"adversarial": -p.log().mean()}
    networks = [G]
    if name == "infogan":
        E = copy.deepcopy(system.modules["encoder"]).double()
        mu, logvar = E(fake).chunk(2, 1)
        log_q = distributions.Normal(mu, (logvar / 2).exp()).log_prob(shared.z.double()).sum(1)
        expected["code"], networks = -0.7 * log_q.mean(), [G, E]
    assert_equations(terms_and_gradients(system.phases[1], shared), expected, networks, rounding)


def test_domain_adaptation_is_equations_1_and_2(rounding):
    system = build(small("ada", lam=0.7), SHAPE)
    x, (labels,) = image(), labels_for("ada")
    shared = system.share(x, labels)
    G, classify, D_ = (copy.deepcopy(system.modules[m]).double() for m in ("extractor", "classifier", "discriminator"))
    features = G(x.double())
    source, target = labels >= 0, labels < 0

    def p(z):
        return torch.sigmoid(D_(z))

    z = features.detach()
    expected = {"source": -p(z[source]).log().mean(), "target": -(1 - p(z[target])).log().mean()}
    assert_equations(terms_and_gradients(system.phases[0], shared), expected, [D_], rounding)
    expected = {
        "classification": F.cross_entropy(classify(features[source]), labels[source]),
        "source": -0.7 * (1 - p(features[source])).log().mean(),
        "target": -0.7 * p(features[target]).log().mean(),
    }
    assert_equations(terms_and_gradients(system.phases[1], shared), expected, [G, classify], rounding)
    # a batch without a target image has no term for it
    alone = system.phases[0].loss(system.share(x, labels.clamp_min(0)))
    assert float(alone["target"].detach()) == 0


def bernoulli_terms(E, G, x, y, state):
    """−log p(x|z, y) and KL with float64 networks on grey pixels; ε as drawn by `reparameterize`."""
    torch.set_rng_state(state)
    inputs = x if y is None else torch.cat([x, y[:, :, None, None].expand(-1, -1, *x.shape[2:])], 1)
    mu, logvar = E(inputs).chunk(2, 1)
    q = distributions.Normal(mu, (logvar / 2).exp())
    z = mu + q.stddev * torch.randn(mu.shape).double()
    p = torch.sigmoid(G(z if y is None else torch.cat([z, y], 1)))
    t = (x + 1) / 2
    log_p = (t * p.log() + (1 - t) * (1 - p).log()).sum((1, 2, 3))
    return -log_p, distributions.kl_divergence(q, distributions.Normal(0.0, 1.0)).sum(1)


@pytest.mark.parametrize("name", ["vae", "cvae"])
def test_vaes_are_equation_17(name, rounding):
    system = build(small(name), SHAPE)
    E, G = (copy.deepcopy(system.modules[m]).double() for m in ("encoder", "generator"))
    x, labels = image(), labels_for(name)
    y = F.one_hot(labels[0], C).double() if labels else None
    state = torch.get_rng_state()
    recon, kl = bernoulli_terms(E, G, x.double(), y, state)
    torch.set_rng_state(state)
    found = terms_and_gradients(system.phases[0], system.share(x, *labels))
    assert_equations(found, {"recon": recon.mean(), "kl": kl.mean()}, [E, G], rounding)
    torch.set_rng_state(state)
    assert error(system.bound(x, *labels), -recon - kl) < rounding.loss
    # an image shows the Bernoulli means, 2 σ(l) − 1
    turn = F.one_hot(torch.arange(5), C) if labels else torch.empty(5, 0)
    state = torch.get_rng_state()
    samples = system.sample(5)
    torch.set_rng_state(state)
    z = torch.randn(5, D)
    assert error(samples, 2 * torch.sigmoid(G(torch.cat([z, turn], 1).double())) - 1) < rounding.loss


def test_semi_supervised_vae_is_kingmas_objective(rounding):
    share = 0.6
    system = build(small("svae", label_share=share), SHAPE)
    E, G, f = (copy.deepcopy(system.modules[m]).double() for m in ("encoder", "generator", "classifier"))
    x, (labels,) = image(), labels_for("svae")
    state = torch.get_rng_state()
    shared = system.share(x, labels)
    terms = system.terms(shared)
    # ε belongs to (image, class), images outermost
    rows, classes = x.double().repeat_interleave(C, 0), torch.eye(C).double().repeat(N, 1)
    recon, kl = (v.view(N, C) for v in bernoulli_terms(E, G, rows, classes, state))
    minus_l = recon + kl + math.log(C)  # −L(x, y)
    q = f(x.double()).softmax(1)
    for i, label in enumerate(labels.tolist()):
        ours = terms["recon"][i] + terms["kl"][i] + terms["label"][i]
        if label >= 0:
            assert error(ours, minus_l[i, label]) < rounding.loss
            assert error(terms["classification"][i], -0.1 / share * q[i, label].log()) < rounding.loss
        else:
            assert error(ours, (q[i] * minus_l[i]).sum() - distributions.Categorical(q[i]).entropy()) < rounding.loss
            assert float(terms["classification"][i].detach()) == 0
    torch.set_rng_state(state)
    phase = system.phases[0]
    _, ours = terms_and_gradients(phase, shared)
    known = labels >= 0
    r = torch.where(known[:, None], F.one_hot(labels.clamp_min(0), C).double(), q)
    total = (r * minus_l).sum(1) + torch.where(known, 0, (q * q.log()).sum(1))
    cross_entropy = -q.log().gather(1, labels.clamp_min(0)[:, None])[:, 0]
    total = (total + torch.where(known, 0.1 / share * cross_entropy, 0)).mean()
    theirs = torch.autograd.grad(total, [p for n in (E, G, f) for p in n.parameters()])
    assert all(error(a, b, rounding.unit) < rounding.gradient for a, b in zip(ours, theirs, strict=True))
    torch.set_rng_state(state)
    unlabelled = system.terms(shared._replace(labels=torch.full((N,), -1)))
    torch.set_rng_state(state)
    assert torch.equal(system.bound(x), -(unlabelled["recon"] + unlabelled["kl"] + unlabelled["label"]))


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("name", ACTIVATED)
def test_activated_losses_are_weighted_by_the_discriminator(name, temperature, rounding):
    system = build(small(name, temperature=temperature, discriminator_width=64), SHAPE)
    with torch.no_grad():
        system.modules["discriminator"][-1].weight.mul_(20)  # weights far from ½, on fakes that differ
        system.modules["generator"][-2].weight.mul_(20)
    shared = system.share(image(), *labels_for(name))
    assert shared.fake.x.shape == shared.real.x.shape
    assert not shared.fake.x.requires_grad
    state = torch.get_rng_state()
    terms, ours = terms_and_gradients(system.phases[1], shared)
    torch.set_rng_state(state)
    total, expected = 0, {}
    for prefix, images in (("", shared.real), ("fake_", shared.fake)):
        logits = system.discriminate(images.x).detach()
        assert logits.std() > 0.05  # so a weight matters
        w = torch.sigmoid(logits / temperature)
        for term, value in system.terms(images).items():
            expected[prefix + term] = (w * value).sum() / N / 2
            total = total + expected[prefix + term]
    assert terms.keys() == expected.keys()
    for term, value in expected.items():
        assert error(terms[term], value.double(), rounding.unit) < rounding.loss
    for a, b in zip(ours, torch.autograd.grad(total, system.phases[1].parameters), strict=True):
        assert error(a, b.double(), rounding.unit) < rounding.gradient
    real, fake = (torch.sigmoid(system.discriminate(i.x).double()) for i in (shared.real, shared.fake))
    loss = system.phases[0].loss(shared)
    assert error(loss["real"], -real.log().mean()) < rounding.loss
    assert error(loss["fake"], -(1 - fake).log().mean()) < rounding.loss


@pytest.mark.parametrize(("name", "plain"), ACTIVATED.items())
def test_perfect_discriminator_gives_half_the_vaes_loss_and_gradient(name, plain):
    """S3 Lemma 2: a VAE has an implicit adversary that blocks out its fakes."""
    system = build(small(name), SHAPE)
    vae = build(replace(system.settings, system=plain), SHAPE)
    for module in vae.modules:
        vae.modules[module].load_state_dict(system.modules[module].state_dict())
    x, labels = image(), labels_for(name)
    shared = system.share(x, *labels)
    system.discriminate = lambda x: torch.full((N,), 1e4 if x is shared.real.x else -1e4)
    state = torch.get_rng_state()
    terms, ours = terms_and_gradients(system.phases[1], shared)
    torch.set_rng_state(state)
    plain_terms, theirs = terms_and_gradients(vae.phases[0], vae.share(x, *labels))
    for term, value in plain_terms.items():
        assert torch.equal(terms[term], 0.5 * value)
        assert float(terms[f"fake_{term}"].detach()) == 0
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, 0.5 * b, rtol=1e-6, atol=1e-12)


def test_a_hot_discriminator_weighs_reals_and_fakes_alike():
    system = build(small("aavae", temperature=1e9), SHAPE)
    shared = system.share(image())
    state = torch.get_rng_state()
    terms = system.phases[1].loss(shared)
    torch.set_rng_state(state)
    for prefix, images in (("", shared.real), ("fake_", shared.fake)):
        for name, value in system.terms(images).items():
            assert error(terms[prefix + name], value.double().mean() / 4) < 1e-6


@pytest.mark.parametrize(("name", "plain"), [("iwgan", "gan"), ("iwcgan", "cgan")])
def test_equal_logits_turn_importance_weighting_into_the_plain_gan(name, plain):
    weighted, gan = build(small(name), SHAPE), build(small(plain), SHAPE)
    for value in (-3.0, 0.0, 5.0):
        logits = torch.full((32,), value, requires_grad=True)
        losses = [system.adversarial(logits) for system in (weighted, gan)]
        a, b = (torch.autograd.grad(loss, logits)[0] for loss in losses)
        torch.testing.assert_close(*losses, rtol=1e-6, atol=0)
        torch.testing.assert_close(a, b, rtol=1e-6, atol=0)
    logits = torch.randn(1, requires_grad=True)  # one sample: the bound of k = 1
    torch.testing.assert_close(weighted.adversarial(logits), gan.adversarial(logits), rtol=1e-6, atol=1e-7)
    # equal logits in the networks themselves: the last layer depends only on its bias
    for system in (weighted, gan):
        for module in system.modules:
            system.modules[module].load_state_dict(weighted.modules[module].state_dict())
        torch.nn.init.zeros_(system.modules["discriminator"][-1].weight)
    shared = weighted.share(image(), *labels_for(name))
    for a, b in zip(*(system.generator_loss(shared).values() for system in (weighted, gan)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=0)


def test_importance_weights_favour_what_fools_the_discriminator():
    system = build(small("iwgan"), SHAPE)
    logits = torch.randn(32, dtype=torch.float64, requires_grad=True)
    (g,) = torch.autograd.grad(system.adversarial(logits), logits)
    w = -g / torch.sigmoid(-logits).detach()  # ∂(−log D) = −(1 − D)
    D_ = torch.sigmoid(logits).detach()
    assert error(w, (D_ / (1 - D_)) / (D_ / (1 - D_)).sum()) < 1e-9
    assert torch.equal(w.argsort(), logits.argsort())


def test_presets_are_dcgans_settings():
    for name in FAMILY:
        mnist = preset(name, "mnist")
        assert (mnist.net, mnist.latent_dim, mnist.batch_size, mnist.image_size) == ("conv", 100, 128, 28)
        assert (mnist.learning_rate("generator"), mnist.betas, getattr(mnist, "temperature", 1.0)) == (
            2e-4,
            (0.5, 0.999),
            1.0,
        )
        assert [preset(name, d).image_size for d in ("cifar10", "svhn", "celeba", "digits")] == [32, 32, 64, 8]


def test_networks_are_dcgans():
    settings = preset("cgan", "folder")  # 64 pixels wide, with labels
    system = build(replace(settings, device="cpu", width=8, discriminator_width=4), (3, 64, 64))
    G, D_ = system.modules["generator"], system.modules["discriminator"]
    kernels = [tuple(p.shape) for p in G.parameters() if p.dim() == 4]
    assert kernels == [(64, 32, 5, 5), (32, 16, 5, 5), (16, 8, 5, 5), (8, 3, 5, 5)]
    assert G.code.weight.shape == (64 * 4 * 4, 100 + 10)
    kernels = [tuple(p.shape) for p in D_.parameters() if p.dim() == 4]
    assert kernels == [(4, 13, 5, 5), (8, 4, 5, 5), (16, 8, 5, 5), (32, 16, 5, 5)]
    assert float(G.code.weight.detach().std()) == pytest.approx(0.02, rel=0.05)


def test_conditional_samples_have_the_classes_asked_for():
    system = build(small("cgan"), SHAPE)
    one, turn = (system.sample(20, torch.Generator().manual_seed(3), labels) for labels in (torch.full((20,), 3), None))
    same = [i for i in range(20) if torch.equal(one[i], turn[i])]
    assert same == [3, 13]
    whole = metrics.generate(system, 20, seed=3)
    assert torch.equal(whole, metrics.to_bytes(turn))


def test_bound_and_accuracy_of_test_images(digits):
    system = build(small("svae"), SHAPE)
    first, again = (metrics.lower_bound(system, digits.test, seed=2) for _ in range(2))
    assert first == again != metrics.lower_bound(system, digits.test, seed=3)
    logits = 5 * F.one_hot(digits.test_labels, C).float()
    parts = iter(logits.split(500))
    system.classify = lambda x: next(parts)
    assert metrics.accuracy(system, digits.test, digits.test_labels) == 1
    parts = iter(logits.roll(1, 1).split(500))
    assert metrics.accuracy(system, digits.test, digits.test_labels) == 0


def test_tables_train_every_pair_and_choose_the_temperature_on_held_out_images(digits, monkeypatch):
    few = digits._replace(train=digits.train[:200], train_labels=digits.train_labels[:200], test=digits.test[:50],
                          test_labels=digits.test_labels[:50])  # fmt: skip
    rest, images, _ = s3.held_out(few)
    assert len(rest.train) + len(images) == 200
    assert torch.equal(images, few.train[data.stratified(few.train_labels, 0.1)])
    tiny = {"steps": 2, "batch_size": 16, "width": 8, "discriminator_width": 8, "device": "cpu"}
    rows = [row for pair in s3.PAIRS.items() for row in s3.compare(few, pair, s3.bound, (0.5,), (0,), **tiny)]
    assert [(row.system, row.share) for row in rows] == [(name, 0.5) for pair in s3.PAIRS.items() for name in pair]
    assert all(-500 < row.value < 0 for row in rows)

    trained_at = []

    def trained(name, dataset, *, temperature, **changes):
        assert len(dataset.train) == len(rest.train)
        trained_at.append((name, temperature, changes))
        return build(small(name, **own(name, temperature=temperature)), SHAPE)

    monkeypatch.setattr(s3, "trained", trained)

    def measure(system, x, y):
        t = getattr(system.settings, "temperature", 1.0)  # a plain VAE has none
        return -abs(t - 3.0) if x.shape == images.shape and torch.equal(x, images) else 10 * t

    rows = list(s3.compare(few, ("vae", "aavae"), measure, (0.5,), (7,)))
    assert [row[1:] for row in rows] == [(0.5, 7, 1.0, 10.0), (0.5, 7, 3.0, 30.0)]
    assert [t for name, t, _ in trained_at] == [1.0, *s3.TEMPERATURES]
    assert trained_at[0][2] == {"seed": 7, "data_share": 0.5}
