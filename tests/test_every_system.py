"""Tests for every system of the papers, with its own settings: training on digits, colours, one graph under compile.

Exact resume is in test_resume, capture in test_capture, several ranks in test_ranks.
"""

import copy
import dataclasses

import pytest
import torch

from ivfast import data, metrics, runs
from ivfast.data import sources
from ivfast.models import SYSTEMS, build, preset
from ivfast.train.batches import as_images
from ivfast.train.loop import fit
from ivfast.train.run import Run
from ivfast.train.settings import Settings


@pytest.fixture(scope="module")
def digits():
    return data.load("digits")


def settings_of(name, **changes):
    seed = int(torch.randint(1000, ()))
    base = preset(name, "digits")
    return dataclasses.replace(base, seed=seed, tensorboard=False, **base.own(changes))


@pytest.mark.trains
@pytest.mark.parametrize("name", SYSTEMS)
def test_fifty_steps_on_digits_are_finite_and_falling(name, digits, tmp_path):
    settings = settings_of(name, steps=50, log_every=5, evaluate_every=1000, save_every=1000)
    system = build(settings, digits.train.shape[1:])
    images, labels = runs.training_set(system, digits)
    known = digits.test_labels if system.labels == "all" else None
    bounds = [metrics.lower_bound(system, digits.test, known)] if name.startswith("aa") else []
    history = fit(system, images, settings, tmp_path, labels=labels, progress=False)
    lines = [line["losses"] for line in history if line["kind"] == "losses"]
    assert len(lines) == 10  # with finite losses, or `fit` would have raised
    if hasattr(system, "sample"):
        samples = system.sample(7)
        assert samples.shape == (7, 1, 8, 8)
        assert samples.isfinite().all()
        assert samples.abs().max() <= 1
    if bounds:  # their losses depend on the weights of a discriminator that also learns
        assert metrics.lower_bound(system, digits.test, known) > bounds[0] + 5
        return
    names = [n for n in lines[0] if n.endswith(("/recon", "/reconstruction", "/classification"))]
    if names:
        first, last = (sum(line[n] for n in names) for line in (lines[0], lines[-1]))
    else:  # the discriminator's, which falls until the generator raises it again
        names = [n for n in lines[0] if n.startswith(f"{system.phases[0].name}/")]
        first, *later = (sum(line[n] for n in names) for line in lines)
        last = min(later)
    assert last < first, (names, first, last)


@pytest.mark.parametrize("net", ["mlp", "conv"])
@pytest.mark.parametrize("name", SYSTEMS)
def test_three_channels_and_sides_that_differ(name, net):
    settings = settings_of(name, net=net, batch_size=8, width=16, discriminator_width=16, depth=1, latent_dim=8)
    system = build(settings, (3, 9, 12))
    images, labels = torch.randint(256, (24, 3, 9, 12), dtype=torch.uint8), torch.arange(24) % 10
    if system.labels == "source":
        labels[::2] = -1
    run = Run(system, images, settings, None, None if system.labels == "none" else labels)
    system.train()
    for _ in range(3):
        run.advance()
    assert all(value == value for value in run.record.read(3).values())
    if hasattr(system, "sample"):
        system.train(False)
        assert system.sample(2).shape == (2, 3, 9, 12)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo's own look
@pytest.mark.parametrize("name", SYSTEMS)
def test_what_is_compiled_is_one_graph_with_the_same_numbers(name, digits):
    """No graph breaks; test_train checks for one system that the compiled code trains."""
    settings = settings_of(name, batch_size=8, width=16, discriminator_width=16, latent_dim=8)
    system = build(settings, digits.train.shape[1:])
    batch = [as_images(digits.train[:8])]
    if system.labels != "none":
        batch.append(digits.train_labels[:8].clone())
        if system.labels == "source":
            batch[1][::2] = -1
    torch.compiler.reset()
    before = copy.deepcopy({name: module.state_dict() for name, module in system.modules.items()})
    with torch.random.fork_rng():
        start = torch.random.get_rng_state()
        plain = [system.share(*batch)]
        plain += [phase.loss(plain[0]) for phase in system.phases if phase.compile]
        torch.random.set_rng_state(start)
        for name, module in system.modules.items():  # a system may count its steps
            module.load_state_dict(before[name])
        share = torch.compile(system.share, backend="eager", fullgraph=True)
        compiled = [share(*batch)]
        losses = [
            torch.compile(phase.loss, backend="eager", fullgraph=True) for phase in system.phases if phase.compile
        ]
        compiled += [loss(compiled[0]) for loss in losses]
    assert len(losses) >= 1
    for ours, theirs in zip(plain[1:], compiled[1:], strict=True):
        assert ours.keys() == theirs.keys()
        for term in ours:
            torch.testing.assert_close(theirs[term], ours[term], rtol=1e-5, atol=1e-6)


VALUES = {  # two of each setting
    **dict.fromkeys(("t", "k", "packing", "unroll", "noise_dim", "vae_steps", "anneal_steps"), (2, 1)),
    **dict.fromkeys(("discriminator_width", "discriminator_depth", "discriminator_steps", "contrast_draws"), (2, 3)),
    **dict.fromkeys(("lam", "lam2", "mu", "mu1", "mu2", "penalty", "gamma_r", "margin", "temperature"), (0.3, 2.0)),
    **dict.fromkeys(("fld_weight", "instance_noise", "beta_rec", "beta_kl", "beta_neg"), (0.3, 0.6)),
    **dict.fromkeys(("width", "depth"), (5, 3)),
    "latent_dim": (4, 8),
    "net": ("mlp", "conv"),
    "learning_rates": ({"default": 1e-3}, {"default": 2e-3}),
    "betas": ((0.5, 0.999), (0.6, 0.999)),
    "classes": (10, 12),
    "encoder_loss": ("ascent", "confusion"),
    "code_reconstruction": ("prior", "codes"),
    "contrast": ("prior", "adaptive"),
    "divergence": ("js", "kl"),
    "as_kernel": ("product", "additive"),
}
OF_THE_DATA = ("label_share", "target")  # tested in test_unified


def three_steps(name, **changes):
    """Losses and weights of a small run with fixed data and seed."""
    tiny = {"batch_size": 8, "latent_dim": 4, "width": 16, "discriminator_width": 16, "discriminator_depth": 2}
    known = {"vae_steps": 0, "contrast": "adaptive", "tensorboard": False, "capture": False}
    base = preset(name, "digits")
    settings = dataclasses.replace(base, **{**base.own({**tiny, **known}), **changes})
    system = build(settings, (1, 8, 8))
    images, labels = torch.arange(24 * 64).mul(37).remainder(256).to(torch.uint8).view(24, 1, 8, 8), torch.arange(24)
    labels = torch.where(labels % 2 == 0, labels % 10, -1 if system.labels == "source" else 1)
    run = Run(system, images, settings, None, None if system.labels == "none" else labels)
    for _ in range(3):
        run.advance()
    weights = [p.detach().double().sum() for module in system.modules.values() for p in module.parameters()]
    return run.record.read(3), torch.stack(weights).tolist()


ITS_OWN = {setting for kind in SYSTEMS.values() for setting in kind.Settings.declared()} - {*Settings.declared()}
OF_EVERY_NETWORK = ("latent_dim", "net", "width", "depth", "learning_rates", "betas")


def test_there_are_values_for_each_setting_that_not_all_have():
    assert {*VALUES, *OF_THE_DATA} == {*ITS_OWN, *OF_EVERY_NETWORK}


@pytest.mark.parametrize("setting", VALUES)
def test_a_setting_changes_every_system_that_has_it(setting):
    having = {name for name, kind in SYSTEMS.items() if setting in kind.Settings.declared()}
    changed = {name for name in having if len({str(three_steps(name, **{setting: v})) for v in VALUES[setting]}) == 2}
    assert changed == having != set()


@pytest.mark.parametrize("setting", sorted(ITS_OWN))
def test_a_setting_is_refused_by_every_system_that_does_not_have_it(setting):
    for name, kind in SYSTEMS.items():
        if setting not in kind.Settings.declared():
            with pytest.raises(ValueError, match=f"^{setting} has no effect on {name}; it is read by "):
                dataclasses.replace(preset(name, "digits"), **{setting: 1})


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_preset_gives_what_some_system_of_the_family_has(name):
    """A family's systems share their presets, and each takes what it has: a name that none of them has is a mistake."""
    module = SYSTEMS[name].__module__
    family = [kind for kind in SYSTEMS.values() if kind.__module__ == module]
    known = {setting for kind in family for setting in kind.Settings.declared()}
    for data_set in (*sources.DATASETS, "ring"):
        assert {*SYSTEMS[name].preset(data_set)} <= known
