"""S5's systems: losses against the equations, special cases, extremes, resumed runs, its tables."""

import copy
import dataclasses
import json
import math

import pytest
import torch
from helpers import assert_equations, command, own, settings_with, terms_and_gradients
from torch import distributions

from ivfast import data
from ivfast.data import points, sources
from ivfast.models import build, introspective, introvae, preset
from ivfast.papers import s5
from ivfast.testing import error
from ivfast.train import Settings, checkpoint
from ivfast.train.loop import fit
from ivfast.train.run import Run

FAMILY = ("introvae", "s-introvae", "as-introvae")
SHAPE = (1, 8, 8)
N, D = 24, 3
BETAS = {"beta_rec": 0.7, "beta_kl": 0.4, "beta_neg": 1.3}
PRIOR = distributions.Normal(0.0, 1.0)


@pytest.fixture(scope="module")
def digits():
    return data.load("digits")


def small(system, **changes) -> Settings:
    values = {"system": system, "batch_size": N, "latent_dim": D, "width": 32, "margin": 2.0, **BETAS}
    seed = int(torch.randint(1000, ()))
    return settings_with({**values, "tensorboard": False, "seed": seed}, changes)


def at_step(system, step):
    system.modules["schedule"].step.fill_(step)
    return system


def batch(shape):
    return torch.rand(N, *shape) * 2 - 1


class Reference:
    """S5's equations in float64, on copies of a system's networks, with the noise that it drew."""

    def __init__(self, system):
        self.s, self.shape = system.settings, system.image_shape
        self.E, self.G = (copy.deepcopy(system.modules[m]).double() for m in ("encoder", "decoder"))
        self.soft = system.settings.system != "introvae"
        self.scale = 1 / math.prod(self.shape) if self.soft else 1.0

    def q(self, x, noise):
        mu, logvar = self.E(x).chunk(2, 1)
        q = distributions.Normal(mu, (logvar / 2).exp())
        return q, mu + q.stddev * noise, distributions.kl_divergence(q, PRIOR).sum(1)

    def rec(self, a, b):
        unit = (lambda x: (x + 1) / 2) if len(self.shape) == 3 else (lambda x: x)
        return (unit(a) - unit(b)).square().flatten(1).sum(1)

    def distance(self, r, g):
        """Eq. 7 with Eq. 8's kernel and its missing exponential, from torch.distributions."""

        def k(a, b):
            spread = (a.variance[:, None] + b.variance[None]).sqrt()
            log = distributions.Normal(b.mean[None], spread).log_prob(a.mean[:, None])
            return (log.exp().mean(-1) if self.s.as_kernel == "additive" else log.sum(-1).exp()).mean()

        return k(r, r) + k(g, g) - 2 * k(r, g)

    def energies(self, r, g, c):
        (q_r, _, kl_r), (q_g, _, kl_g) = r, g
        if self.s.system != "as-introvae":
            return kl_r, kl_g
        d = self.distance(q_r, q_g)
        return c * kl_r + (1 - c) * d, c * kl_g + (1 - c) * d

    def encoder(self, x, noise, c):
        s, a = self.s, self.scale
        _, z, kl = self.q(x, noise["x"])
        x_r = self.G(z)
        terms = {"recon": a * s.beta_rec * self.rec(x_r, x).mean(), "kl": a * s.beta_kl * kl.mean()}
        fakes = {"rec": x_r.detach(), "fake": self.G(noise["prior"]).detach()}
        judged = {name: self.q(fake, noise[name]) for name, fake in fakes.items()}
        energies = dict(zip(fakes, self.energies(*judged.values(), c), strict=True))
        for name, fake in fakes.items():
            if self.soft:
                energy = s.beta_rec * self.rec(self.G(judged[name][1]), fake) + s.beta_neg * energies[name]
                terms[f"exp_{name}"] = 0.25 * (-2 * a * energy).exp().mean()
            else:
                terms[f"hinge_{name}"] = 0.5 * s.beta_neg * (s.margin - energies[name]).clamp_min(0).mean()
        return terms

    def generator(self, x, noise, z, c):
        s, a = self.s, self.scale
        fakes = {"rec": self.G(z), "fake": self.G(noise["prior"])}
        terms = {"recon": a * s.beta_rec * self.rec(fakes["rec"], x).mean()}
        judged = {name: self.q(fake, noise[name]) for name, fake in fakes.items()}
        weight = a * s.beta_kl if self.soft else s.beta_neg
        for name, energy in zip(fakes, self.energies(*judged.values(), c), strict=True):
            terms[f"kl_{name}"] = 0.5 * weight * energy.mean()
            if self.soft:
                again = self.rec(self.G(judged[name][1].detach()), fakes[name].detach())
                terms[f"again_{name}"] = 0.5 * a * s.gamma_r * s.beta_rec * again.mean()
        return terms


def draws(state, *names):
    torch.set_rng_state(state)
    return {name: torch.randn(N, D).double() for name in names}


@pytest.mark.parametrize(("net", "shape"), [("mlp", (2,)), ("mlp", SHAPE), ("conv", SHAPE)])
@pytest.mark.parametrize(
    ("name", "changes"),
    [("introvae", {}), ("s-introvae", {}), ("as-introvae", {}), ("as-introvae", {"as_kernel": "additive"})],
)
def test_losses_are_the_papers_equations(name, changes, net, shape, rounding):
    # γ_r large enough to show in the gradient
    given = own(name, gamma_r=0.6, anneal_steps=10)
    settings = small(name, net=net, width=8 if net == "conv" else 32, **given, **changes)
    system = at_step(build(settings, shape), 3)
    reference, x = Reference(system), batch(shape)
    state = torch.get_rng_state()
    shared = system.share(x)
    noise = draws(state, "x", "prior")
    assert error(shared.c, torch.tensor(0.3 if name == "as-introvae" else 1.0).double()) < 1e-6
    encoder, generator = system.phases
    state = torch.get_rng_state()
    found = terms_and_gradients(encoder, shared)
    noise |= draws(state, "rec", "fake")
    assert_equations(found, reference.encoder(x.double(), noise, 0.3), [reference.E], rounding)
    state = torch.get_rng_state()
    found = terms_and_gradients(generator, shared)
    noise |= draws(state, "rec", "fake")
    expected = reference.generator(x.double(), noise, shared.q.z.detach().double(), 0.3)
    assert_equations(found, expected, [reference.G], rounding)


def both_phases(system, x, state, step):
    torch.set_rng_state(state)
    shared = at_step(system, step).share(x)
    return [terms_and_gradients(phase, shared) for phase in system.phases]


@pytest.mark.parametrize("kernel", ["product", "additive"])
@pytest.mark.parametrize(("anneal", "step"), [(0, 0), (10, 10), (10, 25)])
def test_as_introvae_at_c_1_is_soft_introvae(anneal, step, kernel):
    system = build(small("as-introvae", anneal_steps=anneal, as_kernel=kernel), (2,))
    soft = build(dataclasses.replace(system.settings, system="s-introvae"), (2,))
    x, state = batch((2,)), torch.get_rng_state()
    pairs = zip(both_phases(system, x, state, step), both_phases(soft, x, state, step), strict=True)
    for (terms, ours), (others, theirs) in pairs:
        assert terms.keys() == others.keys()
        assert all(torch.equal(terms[name], others[name]) for name in terms)
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    if anneal:
        terms, _ = both_phases(system, x, state, anneal - 1)[0]
        others, _ = both_phases(soft, x, state, anneal - 1)[0]
        assert not torch.equal(terms["exp_fake"], others["exp_fake"])


@pytest.mark.parametrize("name", FAMILY)
def test_a_system_starts_as_a_vae(name):
    """Up to `vae_steps`, its loss and gradients are those of a VAE, except for the factor s."""
    system = build(small(name, vae_steps=4), (2,))
    vae = introspective.Vae(system.settings, (2,))
    for module in vae.modules:
        vae.modules[module].load_state_dict(system.modules[module].state_dict())
    x, state = batch((2,)), torch.get_rng_state()
    pairs = zip(both_phases(system, x, state, 3), both_phases(vae, x, state, 3), strict=True)
    for (terms, ours), (others, theirs) in pairs:
        assert len(terms) > len(others)
        assert all(float(terms[term].detach()) == 0 for term in terms.keys() - others.keys())
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, system.scale * b, rtol=1e-6, atol=0)
    for terms, _ in both_phases(system, x, state, 4):
        assert all(float(term.detach()) != 0 for term in terms.values())


def test_c_grows_with_the_steps():
    system = build(small("as-introvae", anneal_steps=8, vae_steps=2), (2,))
    c = [float(system.share(batch((2,))).c) for _ in range(13)]
    assert c == pytest.approx([0, 0, *(min(i / 8, 1) for i in range(11))])


@pytest.mark.parametrize(("length", "points"), [({"steps": 33}, 60), ({"epochs": 11}, 3 * N), ({"epochs": 3}, 11 * N)])
@pytest.mark.parametrize("name", FAMILY)
def test_schedules_follow_the_length_of_the_run(name, length, points):
    """c = min(5 i/T, 1), i from the end of a plain VAE of T/15 steps, T = 33 by steps, by epochs and by the data."""
    assert preset(name, "8-gaussians").vae_steps is None
    system = build(small(name, vae_steps=None, **length), (2,))
    run = Run(system, torch.randn(points, 2), system.settings, None, None)
    shared = [system.share(batch((2,))) for _ in range(12)]
    assert [bool(s.adversarial) for s in shared] == [i >= 2 for i in range(12)]
    growing = [min(max(5 * (i - 2) / 33, 0), 1) for i in range(12)]
    assert [float(s.c) for s in shared] == pytest.approx(growing if name == "as-introvae" else [1] * 12)
    run.advance()


def test_every_preset_follows_the_length_of_its_run():
    for name in (*sources.DATASETS, "8-gaussians", "spirals"):
        settings = dataclasses.replace(preset("as-introvae", name), steps=50, device="cpu", net="mlp", width=8)
        assert settings.anneal_steps is None
        system = build(settings, (1, 8, 8))
        system.plan(50)
        first = system.vae_steps
        assert first == (3 if settings.vae_steps is None else 0)
        c = [float(system.share_of_kl(torch.tensor(first + i))) for i in (0, 5, 10, 40)]
        assert c == pytest.approx([0, 0.5, 1, 1])


@pytest.mark.parametrize("name", FAMILY)
def test_a_run_that_would_never_leave_the_plain_vae_is_refused(name, tmp_path):
    for length in ({"steps": 6}, {"epochs": 3}):  # of two batches
        settings = small(name, vae_steps=6, **length)
        with pytest.raises(ValueError, match=r"^vae_steps must be below the run's 6 steps, got 6"):
            fit(build(settings, (2,)), torch.randn(2 * N, 2), settings, tmp_path, progress=False)
    assert not list(tmp_path.iterdir())
    settings = small(name, vae_steps=5, steps=6)
    fit(build(settings, (2,)), torch.randn(2 * N, 2), settings, tmp_path, progress=False)


def test_without_the_length_of_a_run_only_its_first_step_is_known():
    system = build(small("as-introvae"), (2,))
    assert float(system.share(batch((2,))).c) == 0
    with pytest.raises(RuntimeError, match=r"which plan\(steps\) has to tell"):
        system.share(batch((2,)))
    with pytest.raises(ValueError, match=r"which plan\(steps\) has to tell"):
        build(small("introvae", vae_steps=None), (2,)).share(batch((2,)))


@pytest.mark.parametrize("kernel", ["product", "additive"])
def test_encoder_raises_the_as_distance_and_generator_lowers_it(kernel):
    system = build(small("as-introvae", beta_rec=0.0, gamma_r=0.0, anneal_steps=10, as_kernel=kernel), (2,))
    shared = at_step(system, 0).share(3 * batch((2,)))  # c = 0
    state = torch.get_rng_state()

    def slope(loss, parameters):
        """The change of D against a descent step on `loss`."""
        torch.set_rng_state(state)
        fakes = system.run("decoder", torch.cat([shared.q.z.detach(), shared.noise]), 2)
        distance = system.energies(shared, system.judge(fakes, again=False).q)[0]
        gradients = [torch.autograd.grad(value, parameters, retain_graph=True) for value in (loss(fakes), distance)]
        return -sum(float((a * b).sum()) for a, b in zip(*gradients, strict=True))

    encoder, generator = (phase.parameters for phase in system.phases)
    assert slope(lambda fakes: sum(system.rejecting(shared, fakes.detach()).values()), encoder) > 0
    assert slope(lambda fakes: sum(system.deceiving(shared, fakes).values()), generator) < 0


def assert_finite_steps(system, x, steps=3):
    shared = system.share(x)
    for phase in system.phases:
        terms, found = terms_and_gradients(phase, shared)
        assert all(bool(term.isfinite()) for term in terms.values()), terms
        assert all(bool(g.isfinite().all()) for g in found), phase.name
    run = Run(system, x.repeat(2, *[1] * (x.dim() - 1)), system.settings, None, None)
    for step in range(1, steps + 1):
        run.advance()
        assert all(map(math.isfinite, run.record.read(step).values()))
    assert all(bool(p.isfinite().all()) for p in run.every_parameter)


@pytest.mark.parametrize(("kernel", "latent_dim"), [("product", 2), ("product", 64), ("additive", 64)])
@pytest.mark.parametrize("part", ["means", "narrow", "wide", "images", "duplicates"])
@pytest.mark.parametrize("name", FAMILY)
def test_extremes_stay_finite(name, part, kernel, latent_dim):
    if name != "as-introvae" and (kernel, latent_dim) != ("product", 64):
        pytest.skip("has no kernel")
    system = build(small(name, latent_dim=latent_dim, **own(name, as_kernel=kernel, anneal_steps=10)), (2,))
    x, last = batch((2,)), system.modules["encoder"][-1]
    with torch.no_grad():
        if part == "means":  # KLs of about 1e11
            last.weight[:latent_dim] *= 1e6
        elif part == "images":  # reconstruction errors of about 1e11
            system.modules["decoder"][-1].weight *= 1e6
        elif part == "duplicates":
            x = x[:1].expand(N, 2).clone()
        else:
            last.bias[latent_dim:] = -1e3 if part == "narrow" else 1e3
    assert_finite_steps(system, x)


def test_log_variances_outside_their_bounds_come_back():
    x = torch.tensor([-12.0, -12.0, -3.0, 12.0, 12.0], requires_grad=True)
    y = introspective.returning_clamp(x, -10, 10)
    assert y.tolist() == [-10, -10, -3, 10, 10]
    (grad,) = torch.autograd.grad(y, x, torch.tensor([-1.0, 1.0, 2.0, 1.0, -1.0]))
    assert grad.tolist() == [-1, 0, 2, 1, 0]
    system = build(small("introvae"), (2,))
    with torch.no_grad():
        system.modules["encoder"][-1].bias[D:] = torch.tensor([15.0, -15.0, 15.0])
    (grad,) = torch.autograd.grad(system.posterior(batch((2,))).kl.mean(), system.modules["encoder"][-1].bias)
    assert (grad[D:].sign() == torch.tensor([1, -1, 1])).all()  # descent leads back to the prior's variance


@pytest.mark.parametrize("d", [1, 2, 8, 16, 64, 500])
def test_no_product_kernel_exceeds_its_bound(d):
    system = build(small("as-introvae", latent_dim=d, anneal_steps=10), (2,))
    mu, logvar = torch.zeros(8, d), torch.full((8, d), -introspective.LOGVAR)
    mu[4:] = 10
    q = introspective.Posterior(mu, logvar, mu, torch.zeros(8))
    shared = introspective.Encoded(mu, q, mu, torch.zeros(()), torch.tensor(True))
    most = math.log(2) + min(introvae.DISTANCE, d / 2 * (introspective.LOGVAR - math.log(4 * math.pi)))
    assert float(system.energies(shared, q)[0].log()) == pytest.approx(most, rel=1e-4)


@pytest.mark.trains
@pytest.mark.parametrize("net", ["mlp", "conv"])
@pytest.mark.parametrize("name", FAMILY)
def test_digits_are_learnt_in_fifty_steps(name, net, digits):
    changes = {**preset(name, "digits").to_dict(), "tensorboard": False, "device": "cpu", "net": net}
    settings = dataclasses.replace(Settings.from_dict(changes), width=8 if net == "conv" else 64, batch_size=32)
    settings = dataclasses.replace(settings, learning_rates={"default": 2e-3}, **settings.own({"anneal_steps": 20}))
    run = Run(build(settings, SHAPE), digits.train, settings, None, None)
    recon = []
    for step in range(1, 51):
        run.advance()
        values = run.record.read(step)
        run.record.clear()
        assert all(map(math.isfinite, values.values())), values
        recon.append(values["encoder/recon"])
    assert sum(recon[-5:]) < 0.8 * sum(recon[:5])
    assert float(run.system.modules["schedule"].step) == 50


@pytest.mark.parametrize("name", FAMILY)
def test_resumed_run_goes_on_with_c_and_has_the_same_bits(name, tmp_path):
    settings = small(name, steps=14, ema=0.9, log_every=4, vae_steps=3, **own(name, anneal_steps=11))
    x = points.load("8-gaussians", 60)

    def train(steps, out, resume=False):
        system = build(settings, (2,))
        fit(system, x, dataclasses.replace(settings, steps=steps), tmp_path / out, resume=resume, progress=False)
        return checkpoint.read(tmp_path / out / checkpoint.LAST).tensors

    straight = train(14, "straight")
    assert int(train(5, "parts")["weights/schedule.step"]) == 5
    resumed = train(14, "parts", resume=True)
    assert int(resumed["weights/schedule.step"]) == 14
    assert straight.keys() == resumed.keys()
    assert [key for key in straight if not torch.equal(straight[key], resumed[key])] == []


def test_table_1_and_its_figure(tmp_path):
    rows = s5.table1(seeds=(0, 1), steps=3, width=8)
    assert [(row.system, row.seed) for row in rows] == [(name, seed) for seed in (0, 1) for name in s5.PAPER]
    for row in rows:
        assert 0 <= row.js <= math.log(2) + 1e-12
        assert (row.paper_kl, row.paper_jsd) == s5.PAPER[row.system]
    assert s5.markdown(rows).count("\n") == 2 + len(rows)
    assert s5.figure(tmp_path / "figure.png", systems=["vae", "introvae"], steps=2, width=8).stat().st_size > 1000
    full = s5.settings("as-introvae", 0, full=True)
    assert (full.steps, full.vae_steps, full.anneal_steps, full.batch_size, full.width) == (
        30_000,
        2000,
        6000,
        512,
        256,
    )


def test_table_1s_vae_starts_from_the_weights_of_the_others():
    vae, other = (s5.train(name, s5.settings(name, 3, steps=1, width=8, learning_rates={"default": 1e-30}))
                  for name in ("vae", "as-introvae"))  # fmt: skip
    assert isinstance(vae, introspective.Vae)
    for a, b in zip(vae.modules["encoder"].parameters(), other.modules["encoder"].parameters(), strict=True):
        assert torch.equal(a, b)


def test_options_reach_the_settings(tmp_path, monkeypatch, threads):
    threads(1)
    monkeypatch.chdir(tmp_path)
    given = {"beta_rec": 0.3, "beta_kl": 0.2, "beta_neg": 0.8, "vae_steps": 1, "anneal_steps": 2}
    given |= {"as_kernel": "additive"}
    options = [o for name, value in given.items() for o in (f"--{name.replace('_', '-')}", value)]
    steps = ("--steps", 3, "--set", "width=8", "--out", "run")
    command("train", "as-introvae", "--data", "8-gaussians", *steps, *options)
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert {name: saved[name] for name in given} == given
    with pytest.raises(ValueError, match="as_kernel must be one of 'product', 'additive', got 'both'"):
        small("as-introvae", as_kernel="both")
