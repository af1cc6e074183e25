"""S4's system: losses against the equations in float64, known optima, training and its table."""

import copy
import dataclasses
import json
import math

import pytest
import torch
from helpers import assert_equations, command, drawn_again, settings_with, terms_and_gradients
from torch import distributions

from ivfast import data, metrics
from ivfast.data import points, sources
from ivfast.models import avb, build, preset
from ivfast.models.avb import Encoded
from ivfast.nets import noisy
from ivfast.papers import s4
from ivfast.runs import load_system
from ivfast.runs.evaluation import Evaluation
from ivfast.testing import error
from ivfast.train import Settings
from ivfast.train.checkpoint import LAST, read
from ivfast.train.loop import fit
from ivfast.train.run import Run

SHAPE = (1, 8, 8)
N, D, E, DRAWS = 24, 6, 5, 7
FORMS = [{"contrast": c, "divergence": d} for c in ("prior", "adaptive") for d in ("js", "kl")]
NORMAL = distributions.Normal(torch.zeros((), dtype=torch.float64), 1.0)


@pytest.fixture(scope="module")
def digits():
    return data.load("digits")


def small(**changes) -> Settings:
    values = {"system": "avb", "batch_size": N, "latent_dim": D, "noise_dim": E, "contrast_draws": DRAWS}
    values |= {"width": 32, "discriminator_width": 24, "tensorboard": False, "seed": int(torch.randint(1000, ()))}
    return settings_with(values, changes)


@pytest.mark.parametrize("net", ["mlp", "conv"])
@pytest.mark.parametrize("form", FORMS, ids=lambda form: "-".join(form.values()))
def test_losses_are_equations_3_3_and_3_9(form, net, rounding):
    """With adaptive contrast, those of the whitened codes, and log r − log p; with "kl", Eq. 5.10."""
    system = build(small(net=net, width=4 if net == "conv" else 32, **form), SHAPE)
    encoder, G, T = (copy.deepcopy(system.modules[m]).double() for m in ("encoder", "generator", "discriminator"))
    x, state = torch.rand(N, *SHAPE) * 2 - 1, torch.get_rng_state()
    shared = system.share(x)
    torch.set_rng_state(state)
    x64, noise, prior = x.double(), torch.randn(N, E).double(), torch.randn(N, D).double()
    z = encoder(x64, noise)
    assert error(shared.z, z) < rounding.loss

    w, ratio = z, torch.zeros(N).double()
    if form["contrast"] == "adaptive":
        noise = torch.randn(N, DRAWS * E).double().view(N, DRAWS, E)
        with torch.no_grad():
            draws = encoder(x64.repeat_interleave(DRAWS, 0), noise.flatten(0, 1)).view(N, DRAWS, D)
            mean = draws.mean(1)
            deviation = ((draws - mean[:, None]).square().sum(1) / (DRAWS - 1)).sqrt()
        w = (z - mean) / deviation
        ratio = (distributions.Normal(mean, deviation).log_prob(z) - NORMAL.log_prob(z)).sum(1)

    def score(codes):
        return (T.of_image(x64) * T.of_code(codes)).sum(1)

    if form["divergence"] == "js":
        of_code, of_contrast = -torch.sigmoid(score(w.detach())).log(), -(1 - torch.sigmoid(score(prior))).log()
    else:
        of_code, of_contrast = -score(w.detach()), torch.exp(score(prior) - 1)
    expected = {"code": of_code.mean(), "contrast": of_contrast.mean()}
    assert_equations(terms_and_gradients(system.phases[0], shared), expected, [T], rounding)

    p, t = torch.sigmoid(G(z)), (x64 + 1) / 2
    recon = -(t * p.log() + (1 - t) * (1 - p).log()).sum((1, 2, 3))
    known = score(w) - (form["divergence"] == "kl") * torch.ones(N)
    expected = {"recon": recon.mean(), "adversarial": known.mean()}
    if form["contrast"] == "adaptive":
        expected["contrast"] = ratio.mean()
    assert_equations(terms_and_gradients(system.phases[1], shared), expected, [encoder, G], rounding)
    torch.set_rng_state(state)
    assert error(system.bound(x), -(recon + known + ratio)) < rounding.loss


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo's own look
@pytest.mark.parametrize("form", FORMS[::3], ids=lambda form: "-".join(form.values()))
def test_losses_are_one_graph_for_a_compiler(form):
    system = build(small(discriminator_steps=2, **form), SHAPE)
    x, state = torch.rand(N, *SHAPE) * 2 - 1, torch.get_rng_state()
    shared = system.share(x)
    torch.set_rng_state(state)
    traced = torch.compile(system.share, backend="eager", fullgraph=True)(x)
    assert all(map(torch.equal, traced, shared) if system.adaptive else map(torch.equal, traced[:3], shared[:3]))
    for phase in system.phases:
        found = torch.compile(phase.loss, backend="eager", fullgraph=True)(shared)
        for name, value in phase.loss(shared).items():
            assert torch.equal(found[name], value)


def test_four_points_are_their_own_bernoulli_outcomes():
    for name in ("avb", "vae"):
        system = build(small(system=name, data="four-points"), (4,))
        x, z = torch.eye(4), torch.randn(4, D)
        p = torch.sigmoid(copy.deepcopy(system.modules["generator"]).double()(z.double()))
        assert error(system.surprise(x, z), -(x * p.log() + (1 - x) * (1 - p).log()).sum(1)) < 2e-5
        assert error(system.decode(z), p) < 2e-5
        with pytest.raises(ValueError, match=f"{name} decodes to Bernoulli means, and ring does not hold only 0 and 1"):
            build(small(system=name, data="ring"), (2,))


MEANS = torch.tensor([[-1.0, 0.5], [1.2, 0.0], [0.0, -1.5], [0.3, 0.9]], dtype=torch.float64)
DEVIATIONS = torch.tensor([[0.6, 0.9], [0.5, 0.7], [1.1, 0.4], [0.8, 0.8]], dtype=torch.float64)


def known_codes(system, n):
    """x and codes of the four Gaussians N(MEANS, DEVIATIONS²), with the moments that adaptive contrast needs."""
    i = torch.randint(4, (n,))
    z = (MEANS[i] + DEVIATIONS[i] * torch.randn(n, 2)).float()
    moments = (MEANS[i].float(), DEVIATIONS[i].float()) if system.adaptive else ()
    return i, Encoded(torch.eye(4)[i], z, torch.randn(n, 2), *moments)


def log_ratio(i, z, mean=0.0, deviation=1.0):
    """log q(z|x_i) − log N(z; mean, deviation²)."""
    contrast = distributions.Normal(mean, torch.as_tensor(deviation, dtype=torch.float64))
    return (distributions.Normal(MEANS[i], DEVIATIONS[i]).log_prob(z) - contrast.log_prob(z)).sum(1)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: "-".join(form.values()))
def test_the_optimal_discriminator_is_the_log_ratio(form):
    """T* is stationary: the mean gradient for a shift of T in any direction h(x, z) vanishes there and only there."""
    system = build(small(data="four-points", latent_dim=2, **form), (4,))
    n = 100_000
    i, shared = known_codes(system, n)
    offset = 1.0 if form["divergence"] == "kl" else 0.0

    def optimal(z):  # T is of whitened codes
        if system.adaptive:
            return torch.zeros(n, dtype=torch.float64) + offset
        return log_ratio(i, z.double()) + offset

    def slopes(change):
        """∂L_T/∂a for T = T* + change + a h, in standard errors."""
        found = []
        for h in (lambda z: z[:, 0], lambda z: z.prod(1).tanh(), lambda z: (z[:, 1] > 0.3).float()):
            steps = []

            def discriminator(x, *codes, h=h, steps=steps):
                t = []
                for z in codes:
                    a = torch.zeros(n, dtype=torch.float64, requires_grad=True)
                    steps.append(a)
                    t.append(optimal(z) + change * z[:, 0].double() + a * h(z).double())
                return t

            system.modules["discriminator"] = discriminator
            sum(system.discriminator_loss(shared).values()).backward()
            each = n * sum(a.grad for a in steps)
            found.append(abs(float(each.mean() / each.std())) * math.sqrt(n))
        return found

    assert max(slopes(0.0)) < 5
    assert max(slopes(0.3)) > 20

    # L_θφ's estimate of KL(q, p) at T*, with and without the intermediate Gaussian
    system.modules["discriminator"] = lambda x, *codes: [optimal(z) for z in codes]
    terms = system.terms(shared)
    assert error(sum(terms.values()) - terms["recon"], log_ratio(i, shared.z.double())) < 2e-5


@pytest.mark.trains
def test_a_trained_discriminator_comes_to_the_log_ratio():
    settings = small(data="four-points", latent_dim=2, discriminator_width=64, learning_rates={"default": 3e-3})
    system = build(settings, (4,))
    phase = system.phases[0]
    i, shared = known_codes(system, 4000)
    before = (system.modules["discriminator"](shared.x, shared.z)[0] - log_ratio(i, shared.z.double())).std()
    for _ in range(250):
        _, fresh = known_codes(system, 512)
        phase.optimizer.zero_grad()
        sum(phase.loss(fresh).values()).backward(inputs=phase.parameters)
        phase.optimizer.step()
    with torch.no_grad():
        (t,) = system.modules["discriminator"](shared.x, shared.z)
    truth = log_ratio(i, shared.z.double())
    assert (t - truth).std() < 0.4 * before
    assert abs(float((t - truth).mean())) < 0.25 * float(truth.mean())  # of the divergence


class GaussianEncoder(torch.nn.Module):
    def forward(self, x, noise):
        return x @ MEANS.float() + (x @ DEVIATIONS.float()) * noise


def test_whitened_gaussians_leave_the_discriminator_nothing():
    """An encoder with Gaussian q: z̃ is normal, T* = 0, and log r − log p alone is KL(q, p)."""
    system = build(small(data="four-points", latent_dim=2, noise_dim=2, contrast="adaptive", contrast_draws=2000), (4,))
    system.modules["encoder"] = GaussianEncoder()
    shared = system.share(torch.eye(4).repeat(200, 1))
    assert error(shared.mean, MEANS.repeat(200, 1)) < 0.15  # six errors of a mean of 2000
    assert error(shared.deviation, DEVIATIONS.repeat(200, 1)) < 0.12
    w = system.whitened(shared)
    assert w.mean(0).abs().max() < 6 / math.sqrt(800)
    assert (w.std(0) - 1).abs().max() < 6 / math.sqrt(1600)
    kl = distributions.kl_divergence(distributions.Normal(MEANS, DEVIATIONS), NORMAL).sum(1).mean()
    term = system.terms(shared)["contrast"].double()
    assert abs(float(term.mean() - kl)) < 6 * float(term.std()) / math.sqrt(800)


@pytest.mark.trains
@pytest.mark.parametrize("form", FORMS, ids=lambda form: "-".join(form.values()))
def test_digits_train_and_resume(form, digits, tmp_path):
    settings = small(steps=50, ema=0.9, log_every=10, width=64, discriminator_steps=2, **form)
    straight, parts = tmp_path / "straight", tmp_path / "parts"
    history = fit(build(settings, SHAPE), digits.train, settings, straight, progress=False)
    losses = [line["losses"] for line in history if line["kind"] == "losses"]
    assert all(math.isfinite(value) for line in losses for value in line.values())
    (recon,) = (name for name in losses[0] if name.endswith("recon"))
    assert losses[-1][recon] < 0.95 * losses[0][recon]  # means of the last and the first ten steps
    first = dataclasses.replace(settings, steps=21)
    fit(build(first, SHAPE), digits.train, first, parts, progress=False)
    fit(build(settings, SHAPE), digits.train, settings, parts, progress=False, resume=True)
    one, other = (read(out / LAST).tensors for out in (straight, parts))
    assert one.keys() == other.keys()
    assert not [key for key in one if not torch.equal(one[key], other[key])]


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 9, 13), (1, 28, 28), (3, 64, 64)])
def test_convolutions_take_any_image_and_feel_the_noise(shape):
    system = build(small(net="conv", width=16, discriminator_width=64, contrast="adaptive", contrast_draws=2), shape)
    x = torch.rand(4, *shape) * 2 - 1
    shared = system.share(x)
    assert system.decode(shared.z).shape == x.shape
    for phase in system.phases:
        for g in terms_and_gradients(phase, shared)[1]:
            assert g.isfinite().all()
            assert g.abs().max() > 0
    assert not torch.equal(system.encode(x), system.encode(x))
    if max(shape) >= 28:  # five layers
        encoder, G = system.modules["encoder"], system.modules["generator"]
        assert len(encoder.convolutions) == 4
        assert sum(isinstance(m, torch.nn.ConvTranspose2d) for m in G) == 4
        assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in G.modules())


@pytest.mark.trains
@pytest.mark.parametrize("contrast", ["prior", "adaptive"])
def test_residual_units_are_section_4s_for_faces_and_learn(contrast, digits):
    changes = {"contrast": contrast, "contrast_draws": 2, "learning_rates": {"default": 1e-3}, "batch_size": 32}
    settings = small(net="residual", width=8, **changes)
    system = build(settings, (3, 64, 64))
    encoder, G, T = (system.modules[name] for name in ("encoder", "generator", "discriminator"))
    for network in (encoder, G):
        assert sum(isinstance(m, noisy.ResidualUnit) for m in network.modules()) == 3 * 4
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in G.modules())
    x, z = torch.rand(4, 3, 64, 64) * 2 - 1, torch.randn(4, settings.latent_dim)
    assert torch.equal(T(x, z, z)[0], T(x, z, z)[1])
    for network, inputs in ((encoder, (x, torch.randn(4, settings.noise_dim))), (T.network, (x, z))):
        assert len(network.projections) == 4  # every hidden layer
        gradients_of = torch.autograd.grad(network(*inputs).square().sum(), list(network.projections.parameters()))
        assert all(g.abs().max() > 0 for g in gradients_of)
    assert system.sample(2).shape == (2, 3, 64, 64)
    near, far = T(x, z, z + 5)  # all codes of a batch shifted: the network must see it despite its batch norms
    assert (near.mean() - far.mean()).abs() > 0.1 * near.std()

    run = Run(build(settings, SHAPE), digits.train, settings, None, None)
    recon = []
    for step in range(1, 31):
        run.advance()
        recon.append(run.record.read(step)["autoencoder/recon"])
        run.record.clear()
    assert sum(recon[-5:]) < 0.9 * sum(recon[:5])


@pytest.mark.parametrize("net", ["mlp", "conv"])
def test_moments_are_computed_in_chunks_that_change_nothing(net, monkeypatch):
    """A likelihood's 64 draws for each of 500 images would take 40 GiB at CelebA's preset."""
    system = build(small(net=net, width=8), SHAPE)
    x, encoder, sizes = torch.rand(21, *SHAPE) * 2 - 1, system.modules["encoder"], []
    encoder.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    system.train(False)
    state = torch.get_rng_state()
    mean, logvar = system.proposal(x)
    assert max(sizes) <= avb.ROWS < sum(sizes) == 21 * 64
    reference = copy.deepcopy(encoder).double()
    noise = drawn_again(state, 21, 64, system.settings.noise_dim)
    z = torch.stack([reference(x.double(), noise[:, k]) for k in range(64)])
    assert error(mean, z.mean(0)) < 1e-5
    assert error(logvar, z.var(0).log()) < 1e-4  # of deviations, to float32's rounding of z
    system.train()
    sizes.clear()
    system.proposal(x)
    assert sizes == [21 * 64]  # batch norm looks at all


def test_only_avb_has_residual_networks():
    with pytest.raises(ValueError, match=r"^net must be one of 'mlp', 'conv', got 'residual'"):
        build(small(system="vae", net="residual"), SHAPE)


@pytest.mark.trains
def test_table_1_measures_what_it_says(tmp_path, monkeypatch):
    """On nets trained for a few steps: the identities between its columns, and the VAE's ELBO by both estimators."""
    monkeypatch.setattr(s4, "DRAWS", 4000)
    rows = s4.table1(seeds=(1,), steps=60, width=16)
    assert rows[:2] == list(s4.PAPER)
    vae, avb = rows[2:]
    assert (vae.system, avb.system, vae.seed) == ("vae", "avb", 1)
    for row in (vae, avb):
        assert row.elbo < row.log_likelihood + 0.03  # the error of the estimate by nearest neighbours
        assert row.log_likelihood < s4.OPTIMUM
    system = s4.trained("vae", seed=1, steps=60, width=16, discriminator_width=16)
    many = torch.eye(4).repeat_interleave(5000, 0)
    z = metrics.posterior_codes(system, many)
    kl = sum(metrics.kl_to_prior(part) for part in z.split(5000)) / 4
    assert -4 * vae.reconstruction - kl == pytest.approx(vae.elbo, abs=0.06)
    text = s4.markdown(rows)
    assert "| vae, S4 | – | -1.593 | 0.091 | -1.700 | -1.700 | 0.175 |" in text
    assert f"{avb.log_likelihood:.3f}" in text
    other = s4.trained("avb", seed=1, steps=5, width=16, discriminator_width=16)
    assert s4.figure({"VAE": system, "AVB": other}, tmp_path / "figure.png").stat().st_size > 10_000


def test_the_command_line_trains_and_evaluates(tmp_path, monkeypatch, threads):
    threads(1)
    monkeypatch.chdir(tmp_path)

    changes = ("--contrast", "adaptive", "--divergence", "js", "--set", "tensorboard=false", "--device", "cpu")
    command("train", "avb", "--data", "four-points", "--steps", 4, "--out", "points", *changes)
    system, settings = load_system("points")
    assert (settings.contrast, settings.divergence, settings.latent_dim) == ("adaptive", "js", 2)
    assert system.sample(3).shape == (3, 4)
    command("evaluate", "points", "--metrics", "kl-to-prior,modes")
    assert {"kl_to_prior", "modes"} <= json.loads((tmp_path / "points" / "metrics.json").read_text()).keys()


def test_evaluation_on_images(digits, tmp_path):
    system = build(small(), SHAPE)
    evaluation = Evaluation(system, digits)
    assert {"bound", "likelihood", "kl-to-prior", "fld", "reconstruction"} <= set(evaluation.default())
    (bound,), (likelihood,), (kl,) = map(evaluation.run, ("bound", "likelihood", "kl-to-prior"))
    assert "as its discriminator estimates it" in bound.meaning
    assert bound.value == metrics.lower_bound(system, digits.test)
    assert likelihood.value == metrics.importance_log_likelihood(system, digits.test)
    assert kl.value == metrics.kl_to_prior(metrics.posterior_codes(system, digits.train))
    assert s4.interpolation(system, digits, tmp_path / "lines.png", rows=2).stat().st_size > 5000


def test_presets_build_for_every_kind_of_data():
    shapes = {"digits": (1, 8, 8), "mnist": (1, 28, 28), "celeba": (3, 64, 64), "four-points": (4,)}
    for name in (*sources.DATASETS, "four-points"):  # T keeps near T*
        settings = preset("avb", name)
        assert settings.learning_rate("discriminator") == 5 * settings.learning_rate("encoder")
        assert settings.learning_rate("generator") == settings.learning_rate("encoder")
    for name, shape in shapes.items():
        settings = dataclasses.replace(preset("avb", name), device="cpu")
        assert settings.image_size == (None if name == "four-points" else shape[-1])
        assert settings.net == {"mnist": "conv", "celeba": "residual"}.get(name, "mlp")
        if name != "celeba":
            system = build(settings, shape)
            assert system.sample(2).shape == (2, *shape)
    assert preset("vae", "four-points").steps == preset("avb", "four-points").steps
    with pytest.raises(ValueError, match="contrast must be one of 'prior', 'adaptive', got 'posterior'"):
        small(contrast="posterior")
    with pytest.raises(ValueError, match="divergence must be one of 'js', 'kl', got 'tv'"):
        small(divergence="tv")
    with pytest.raises(ValueError, match="contrast_draws must be an integer >= 2, got 1"):
        small(contrast_draws=1)
    assert points.load("four-points", 10).unique().tolist() == [0, 1]
