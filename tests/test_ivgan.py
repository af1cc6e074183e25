"""S2's systems: steps, bitwise special cases, networks, presets and known values."""

import dataclasses
import math

import pytest
import torch
from helpers import own, settings_with, terms_and_gradients
from sklearn.datasets import load_digits

from ivfast import nets
from ivfast.data import points
from ivfast.models import build, preset
from ivfast.papers import truths
from ivfast.testing import error
from ivfast.train import Settings
from ivfast.train.batches import as_images
from ivfast.train.checkpoint import LAST, read
from ivfast.train.loop import fit
from ivfast.train.run import Run

FAMILY = (
    "dcgan", "lsgan", "wgan-gp", "mrgan", "ivdcgan", "ivlsgan", "pacdcgan", "veegan", "unrolled-gan",
)  # fmt: skip
SHAPE = (1, 8, 8)


def small(system, **changes) -> Settings:
    values = {"system": system, "batch_size": 16, "latent_dim": 8, "width": 16, "discriminator_width": 32}
    values |= {"learning_rates": {"default": 1e-3}, "betas": (0.5, 0.999), "tensorboard": False, "log_every": 10}
    return settings_with({**values, "seed": int(torch.randint(1000, ()))}, changes)


def digits(channels=1):
    images = (torch.from_numpy(load_digits().images[:200]) * (255 / 16)).round().to(torch.uint8).unsqueeze(1)
    return images.expand(-1, channels, -1, -1).contiguous()


def advanced(settings, images, steps) -> Run:
    """A run after a few steps; the caller's generator is not changed."""
    with torch.random.fork_rng():
        run = Run(build(settings, tuple(images.shape[1:])), images, settings, None, None)
        for _ in range(steps):
            run.advance()
    return run


def weights(run, *names):
    return [p.detach() for name in names for p in run.system.modules[name].parameters()]


def assert_same_bits(one, other, *names):
    assert all(map(torch.equal, weights(one, *names), weights(other, *names)))


def phase_of(system, name):
    return next(phase for phase in system.phases if phase.name == name)


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("data", ["digits", "colour", "ring"])
def test_a_few_steps_are_finite_and_move_everything(name, data):
    if data == "ring":
        images, changes = points.load("ring", 200), {}
    elif data == "digits":
        images, changes = digits(), {"instance_noise": 0.1}
    else:
        images, changes = digits(3), {"net": "conv", "width": 4, "packing": 2}
    run = advanced(small(name, **changes), images, 4)
    losses = run.record.read(4)
    assert all(map(math.isfinite, losses.values()))
    fresh = build(run.settings, tuple(images.shape[1:]))
    for module, network in fresh.modules.items():
        for before, after in zip(network.parameters(), run.system.modules[module].parameters(), strict=True):
            assert after.isfinite().all()
            assert not torch.equal(before, after)
    samples = run.system.sample(5, torch.Generator().manual_seed(1))
    assert samples.shape == (5, *images.shape[1:])
    if hasattr(run.system, "encode"):
        assert run.system.encode(as_images(images[:5])).shape == (5, 8)


def test_a_resumed_run_has_the_bits_of_an_uninterrupted_one(tmp_path):
    changes = {"net": "conv", "width": 4, "discriminator_steps": 3, "packing": 2, "instance_noise": 0.1, "ema": 0.9}
    images = digits()
    for name in ("ivlsgan", "wgan-gp"):
        settings = small(name, steps=9, **changes)
        fit(build(settings, SHAPE), images, settings, tmp_path / name / "straight", progress=False)
        parts = tmp_path / name / "parts"
        first = dataclasses.replace(settings, steps=4)
        fit(build(first, SHAPE), images, first, parts, progress=False)
        fit(build(settings, SHAPE), images, settings, parts, progress=False, resume=True)
        one, other = (read(out / LAST).tensors for out in (tmp_path / name / "straight", parts))
        assert one.keys() == other.keys()
        assert not [key for key in one if not torch.equal(one[key], other[key])]


@pytest.mark.parametrize(
    ("system", "changes", "base"),
    [
        ("pacdcgan", {"packing": 1}, "dcgan"),
        ("unrolled-gan", {"unroll": 0}, "dcgan"),
        ("dcgan", {"instance_noise": 0.0, "discriminator_steps": 1}, "dcgan"),
    ],
)
def test_systems_reduce_to_their_base_bit_for_bit(system, changes, base):
    images, seed = digits(), int(torch.randint(1000, ()))
    one, other = (advanced(small(name, seed=seed, **own(name, **changes)), images, 5) for name in (system, base))
    assert_same_bits(one, other, "generator", "discriminator")


@pytest.mark.parametrize("net", ["mlp", "conv"])
@pytest.mark.parametrize(
    ("system", "changes", "base"),
    [
        ("ivdcgan", {"mu": 0.0, "lam": 0.0}, "dcgan"),
        ("ivlsgan", {"mu": 0.0, "lam": 0.0}, "lsgan"),
        ("mrgan", {"lam": 0.0, "lam2": 0.0}, "dcgan"),
    ],
)
def test_regularizers_of_weight_zero_leave_the_base_gan(system, changes, base, net):
    """One step: after it the two have drawn different amounts of random numbers."""
    images, seed = digits(), int(torch.randint(1000, ()))
    settings = [small(name, seed=seed, net=net, width=8, **own(name, **changes)) for name in (system, base)]
    one, other = (advanced(s, images, 1) for s in settings)
    assert_same_bits(one, other, "generator", "discriminator")
    fresh = build(one.settings, SHAPE)
    assert all(map(torch.equal, weights(one, "encoder"), fresh.modules["encoder"].parameters()))


def test_wgan_gp_without_its_penalty_is_wgan():
    system = build(small("wgan-gp", penalty=0.0), SHAPE)
    shared = system.share(as_images(digits()[:16]))
    terms, gradients = terms_and_gradients(phase_of(system, "discriminator"), shared)
    D = system.modules["discriminator"]
    expected = torch.autograd.grad((D(shared.fake) - D(shared.x)).mean(), list(D.parameters()))
    assert float(terms["penalty"].detach()) == 0
    assert all(error(a, b) < 1e-5 for a, b in zip(gradients, expected, strict=True))


def test_equilibria():
    """An ignorant discriminator: GAN 2 log 2 and log 2, LSGAN 2 and 0, Wasserstein 0 and 0."""
    known = {"dcgan": (2 * math.log(2), math.log(2)), "lsgan": (2, 0), "wgan-gp": (0, 0)}
    for name, (of_discriminator, of_generator) in known.items():
        system = build(small(name), SHAPE)
        zero = torch.zeros(7, 1)
        assert float(sum(system.real_or_fake(zero, zero).values())) == pytest.approx(of_discriminator)
        assert float(system.deceiving(zero)) == pytest.approx(of_generator)


def test_a_packed_discriminator_sees_samples_side_by_side():
    system = build(small("ivdcgan", packing=2), (3, 8, 8))
    x = torch.rand(16, 3, 8, 8)
    packed = system.seen(x)
    assert packed.shape == (8, 6, 8, 8)
    assert torch.equal(packed[5], torch.cat([x[10], x[11]]))
    shared = system.share(x)
    assert shared.block.shape == (8,)
    changed = (shared.substituted != shared.code).view(16, 4, 2).any(2)  # one block in each, the same in a pack
    assert torch.equal(changed.float().argmax(1), shared.block.repeat_interleave(2))
    assert (changed.sum(1) == 1).all()
    assert system.discriminate(x).shape == (8, 1)
    with pytest.raises(ValueError, match="packing must divide batch_size = 16, got 3"):
        build(small("dcgan", packing=3), SHAPE)


def test_instance_noise_is_on_all_that_the_discriminator_sees():
    system = build(small("ivdcgan", instance_noise=0.3), SHAPE)
    seen = []
    system.modules["discriminator"].features.register_forward_hook(lambda _, args, out: seen.append(args[0]))
    shared = system.share(torch.zeros(16, *SHAPE))
    system.discriminator_loss(shared)
    clean = [shared.x, shared.fake, shared.intervened]
    noise = [min(((s - c).std(), (s - c).mean().abs()) for c in clean) for s in seen]
    assert len(seen) == 3
    assert all(0.27 < deviation < 0.33 and mean < 0.05 for deviation, mean in noise)


def test_the_critic_takes_its_steps_before_the_generators_next():
    settings = small("wgan-gp", discriminator_steps=5)
    run = advanced(settings, digits(), 1)
    with torch.random.fork_rng():
        moved = []
        for _ in range(5):
            before = [p.clone() for p in weights(run, "generator")]
            run.advance()
            moved.append(not all(map(torch.equal, before, weights(run, "generator"))))
    assert moved == [False, False, False, False, True]
    assert [phase.compile for phase in run.system.phases] == [False, True]
    assert [phase.compile for phase in build(small("unrolled-gan"), SHAPE).phases] == [True, False]


def test_networks_are_table_4():
    shape = (3, 64, 64)
    with torch.device("meta"):
        D, G, E = nets.dcgan_features(shape), nets.dcgan_generator(shape, 100), nets.dcgan_encoder(shape, 100)

    def layers(net):
        return [type(m).__name__ for m in net]

    def kernels(net):
        return [tuple(p.shape) for p in net.parameters() if p.dim() == 4]

    down = [(64, 3, 4, 4), (128, 64, 4, 4), (256, 128, 4, 4), (512, 256, 4, 4)]
    assert kernels(D) == down
    assert layers(D) == ["Conv2d", "BatchNorm2d", "LeakyReLU"] * 4 + ["Flatten"]
    assert kernels(G) == [(100, 512, 4, 4), (512, 256, 4, 4), (256, 128, 4, 4), (128, 64, 4, 4), (64, 3, 4, 4)]
    assert layers(G)[1:] == ["ConvTranspose2d", "BatchNorm2d", "ReLU"] * 4 + ["ConvTranspose2d", "Tanh"]
    assert kernels(E) == [*down, (100, 512, 4, 4)]
    assert layers(E)[:5] == ["Conv2d", "LeakyReLU", "Conv2d", "BatchNorm2d", "LeakyReLU"]
    assert layers(E)[-3:] == ["Conv2d", "Flatten", "BatchNorm1d"]
    for other in ((1, 28, 28), (3, 9, 13)):
        z = nets.dcgan_encoder(other, 8, 4)(torch.rand(3, *other))
        assert nets.dcgan_generator(other, 8, 4)(z).shape == (3, *other)


def test_presets_are_table_5():
    table = {
        "dcgan": (1e-4, 1e-4, None), "lsgan": (2e-4, 2e-4, None), "wgan-gp": (1e-4, 1e-4, None),
        "mrgan": (2e-4, 2e-4, 1e-2), "ivdcgan": (2e-4, 2e-4, 5e-3), "ivlsgan": (2e-4, 2e-4, 5e-3),
    }  # fmt: skip
    for name, (of_d, of_g, of_e) in table.items():
        settings = preset(name, "cifar10")
        assert (settings.learning_rate("discriminator"), settings.learning_rate("generator")) == (of_d, of_g)
        assert of_e is None or settings.learning_rate("encoder") == of_e
        assert (settings.batch_size, settings.image_size, settings.latent_dim) == (64, 64, 100)
        assert tuple(settings.betas) == ((0.5, 0.9) if name == "wgan-gp" else (0.5, 0.999))
    iv, wgan, mr = (preset(name, "mnist") for name in ("ivlsgan", "wgan-gp", "mrgan"))
    assert (iv.k, iv.mu, iv.lam, mr.lam, mr.lam2) == (4, 0.5, 0.25, 0.25, 0.25)
    assert (wgan.discriminator_steps, wgan.penalty) == (5, 10)
    assert preset("ivlsgan", "stacked-mnist").steps == 100_000
    assert preset("pacdcgan", "stacked-mnist").packing == 2
    for name in (*FAMILY, "ivaae-rad"):
        assert (preset(name, "ring").net, preset(name, "ring").image_size) == ("mlp", None)


@pytest.mark.parametrize("a", [0.0, 0.25, 0.5, 0.75, 1.0])
def test_square_fitting(a):
    two, four = truths.square_fitting(a)
    assert two == pytest.approx(math.log(2), abs=1e-12)
    assert four == pytest.approx((1 + a) * math.log(2), abs=1e-12)


def test_coverage_counts_after_a_run():
    changes = {"steps": 3, "width": 8, "discriminator_width": 8}
    (row,) = truths.coverage(["dcgan"], seeds=[1], samples=100, **changes)
    assert (row.system, row.seed) == ("dcgan", 1)
    assert 0 <= row.confident <= 1
    (again,) = truths.coverage(["dcgan"], seeds=[1], samples=100, **changes)
    assert again._replace(seconds=0) == row._replace(seconds=0)
