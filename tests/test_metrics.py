"""Metrics against their formulas in NumPy and SciPy, and against cases with known values."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from torch import nn

from ivfast import metrics
from ivfast.data import Dataset, load
from ivfast.metrics.classifier import classifier_of
from ivfast.metrics.inception import WeightsNotFound, inception


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def digits():
    return load("digits")


@pytest.fixture(scope="module")
def classifier(digits, tmp_path_factory):
    return classifier_of(digits, cache=tmp_path_factory.mktemp("cache"))


class Halving:
    """Codes are the pixels, and decoding halves them. Records training mode."""

    def __init__(self, d):
        self.settings = SimpleNamespace(device="cpu")
        self.modules = {"net": nn.Linear(1, 1)}
        self.d = d

    def train(self, mode=True):
        self.modules["net"].train(mode)

    def encode(self, x):
        assert not self.modules["net"].training
        assert not torch.is_grad_enabled()
        return x.flatten(1)

    def decode(self, z):
        side = math.isqrt(self.d)
        return z.view(-1, 1, side, side) / 2

    def sample(self, n, generator=None):
        return self.decode(torch.randn(n, self.d, generator=generator))


def frechet(x, y):
    x, y = x.double().numpy(), y.double().numpy()
    a, b = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    roots = np.sqrt(np.linalg.eigvals(a @ b).real.clip(0))  # Tr √(AB); features that never fire make A singular
    return ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(a + b) - 2 * roots.sum()


def test_bytes_and_floats_are_inverse_and_clamped():
    x = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(metrics.to_bytes(metrics.to_float(x)), x)
    assert metrics.to_bytes(torch.tensor([-7.0, 7.0])).tolist() == [0, 255]
    with pytest.raises(ValueError, match="images must be finite"):
        metrics.to_bytes(torch.tensor([float("nan")]))


@pytest.mark.parametrize("training", [True, False])
def test_reconstruction_of_a_known_decoder(training):
    n = metrics.BATCH + 7
    images = torch.randint(0, 256, (n, 1, 6, 6), dtype=torch.uint8)
    system = Halving(36)
    system.train(training)
    mse, psnr, _ = metrics.reconstruction(system, images)
    # x − x/2 in [-1, 1] is a quarter of x on the scale [0, 1]
    errors = ((images.double() / 127.5 - 1) / 4).square().flatten(1).mean(1)
    assert mse == pytest.approx(float(errors.mean()), rel=1e-5)
    assert psnr == pytest.approx(float((-10 * errors.log10()).mean()), rel=1e-5)
    assert system.modules["net"].training is training


def test_fld_of_codes_is_the_papers_formula():
    n, d = metrics.BATCH + 100, 9
    system, images = Halving(d), torch.randint(0, 256, (n, 1, 3, 3), dtype=torch.uint8)
    z = metrics.codes(system, images)
    torch.testing.assert_close(z, images.flatten(1).float() / 127.5 - 1)
    sigma = np.cov(z.double().numpy(), rowvar=False)
    expected = (z.double().mean(0) ** 2).sum() + np.trace(sigma - 2 * sqrtm(sigma).real + np.eye(d))
    assert metrics.latent_frechet_distance(z) == pytest.approx(float(expected), rel=1e-8)
    z[3, 2] = math.inf
    with pytest.raises(ValueError, match="codes must be finite"):
        metrics.latent_frechet_distance(z)


def test_the_seed_fixes_the_samples_of_a_prefix_of_batches():
    system = Halving(16)
    a, b = metrics.generate(system, metrics.BATCH + 30, 3), metrics.generate(system, metrics.BATCH + 30, 3)
    assert a.shape == (metrics.BATCH + 30, 1, 4, 4)
    assert torch.equal(a, b)
    assert not torch.equal(a, metrics.generate(system, metrics.BATCH + 30, 4))


def test_feature_distance_streams_to_the_same_number():
    real = torch.randint(0, 256, (metrics.BATCH + 41, 1, 3, 3), dtype=torch.uint8)
    fake = torch.randint(40, 200, (metrics.BATCH - 41, 1, 3, 3), dtype=torch.uint8)

    def features(x):
        return x.flatten(1).float() / 50

    expected = frechet(features(real), features(fake))
    assert metrics.feature_distance(features, real, fake) == pytest.approx(expected, rel=1e-6)
    assert metrics.feature_distance(features, real, real) == pytest.approx(0, abs=1e-9)


def test_a_reference_is_computed_once():
    seen = []

    def features(x):
        seen.append(len(x))
        return x.flatten(1).float() / 50

    real, *fakes = (torch.randint(0, 256, (n, 1, 3, 3), dtype=torch.uint8) for n in (40, 30, 20))
    distance = metrics.ReferenceDistance(features, real)
    values = [distance(fake) for fake in fakes]
    assert seen == [40, 30, 20]
    assert values == [metrics.feature_distance(features, real, fake) for fake in fakes]
    assert values == pytest.approx([frechet(features(real), features(fake)) for fake in fakes], rel=1e-6)


def test_classifier_of_digits_is_accurate_deterministic_and_cached(digits, classifier, tmp_path, monkeypatch):
    assert classifier.accuracy > 0.97
    right = metrics.probabilities(classifier, digits.test).argmax(1) == digits.test_labels
    assert classifier.accuracy == pytest.approx(float(right.double().mean()))
    some = Dataset(*load("digits", limit=300))
    first, second = (classifier_of(some, cache=tmp_path / name) for name in "ab")
    for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    monkeypatch.setattr("ivfast.metrics.classifier._train", lambda *_: pytest.fail("trained again"))
    cached = classifier_of(some, cache=tmp_path / "a")
    assert cached.accuracy == first.accuracy
    assert torch.equal(cached(metrics.to_float(some.test)), first(metrics.to_float(some.test)))
    with pytest.raises(pytest.fail.Exception):
        classifier_of(some._replace(train=some.train ^ 1), cache=tmp_path / "a")  # other images, another classifier


@pytest.mark.parametrize("shape", [(3, 40, 40), (1, 5, 5), (3, 64, 64)])
def test_classifier_takes_any_size(shape, tmp_path):
    """Classes that differ in brightness."""
    labels = torch.arange(64) % 2
    images = (torch.randint(0, 100, (64, *shape)) + 150 * labels[:, None, None, None]).to(torch.uint8)
    dataset = Dataset("bright", images, labels, images, labels, ("dark", "bright"))
    assert classifier_of(dataset, cache=tmp_path).accuracy == 1


def test_classifier_needs_labels(digits, tmp_path):
    with pytest.raises(ValueError, match="digits has none"):
        classifier_of(digits._replace(train_labels=None), cache=tmp_path)


def test_classifier_distance_is_frechets_and_orders_images(digits, classifier):
    noise = torch.randint(0, 256, (400, 1, 8, 8), dtype=torch.uint8)
    with torch.no_grad():
        x, y = (classifier.features(metrics.to_float(images)) for images in (digits.train, noise))
    to_noise = metrics.frechet_classifier_distance(classifier, digits.train, noise)
    assert to_noise == pytest.approx(frechet(x, y), rel=1e-3)
    assert 20 * metrics.frechet_classifier_distance(classifier, digits.train, digits.test) < to_noise


class ReadsPixel(nn.Module):
    """The class is the first pixel's value, with probability 1; if the second pixel is set, each class has 1/10."""

    def forward(self, x):
        value = ((x.flatten(1) + 1) * 127.5).round().long()
        logits = 100.0 * nn.functional.one_hot(value[:, 0], 10)
        return torch.where(value[:, 1:2] > 0, 0.0, logits)


def stacked(numbers):
    images = torch.zeros(len(numbers), 3, 4, 4, dtype=torch.uint8)
    for channel, power in enumerate((100, 10, 1)):
        images[:, channel, 0, 0] = numbers // power % 10
    return images


def test_modes_counts_confident_triples_and_their_kl():
    numbers = torch.tensor([7, 7, 7, 123, 999, 250])
    images = stacked(numbers)
    images[5, 1, 0, 1] = 1  # one unsure digit
    covered, kl, confident = metrics.modes(ReadsPixel(), images)
    q = np.array([3, 1, 1]) / 5
    assert covered == 3
    assert kl == pytest.approx((q * np.log(q * 1000)).sum())
    assert confident == pytest.approx(5 / 6)
    assert metrics.modes(ReadsPixel(), stacked(torch.arange(1000))) == (1000, pytest.approx(0, abs=1e-12), 1.0)


def test_classifier_score_is_the_number_of_sure_classes():
    for k in (1, 4, 10):
        numbers = torch.arange(5 * k) % k
        assert metrics.classifier_score(ReadsPixel(), stacked(numbers)[:, 2:]) == pytest.approx(k)
    unsure = torch.zeros(20, 1, 2, 2, dtype=torch.uint8)
    unsure[..., 1] = 1
    assert metrics.classifier_score(ReadsPixel(), unsure) == pytest.approx(1)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file of random Inception weights in pytorch-fid's layout."""
    from unittest import mock

    from pytorch_fid import inception as network

    with (
        mock.patch.object(network, "load_state_dict_from_url", return_value={}),
        mock.patch.object(nn.Module, "load_state_dict"),
    ):
        state = network.fid_inception_v3().state_dict()
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(state, path)
    return path


def test_fid_is_frechets_in_pytorch_fids_features(weights):
    from unittest import mock

    from pytorch_fid import inception as network

    real = torch.randint(0, 256, (30, 3, 32, 32), dtype=torch.uint8)
    fake = torch.randint(0, 120, (26, 3, 32, 32), dtype=torch.uint8)
    state = torch.load(weights, weights_only=True)
    with mock.patch.object(network, "load_state_dict_from_url", return_value=state):
        model = network.InceptionV3([0]).eval()
    with torch.no_grad():
        x, y = (model(images / 255)[0].mean((2, 3)) for images in (real, fake))
    value = metrics.frechet_inception_distance(real, fake, weights=weights, features=64)
    assert value == pytest.approx(frechet(x, y), rel=2e-3)
    assert value > 0
    grey, three = real[:4, :1], real[:4, :1].expand(-1, 3, -1, -1)
    other = fake[:4]
    assert metrics.frechet_inception_distance(grey, other, weights=weights, features=64) == pytest.approx(
        metrics.frechet_inception_distance(three, other, weights=weights, features=64)
    )


def test_the_metric_of_torchmetrics_is_the_same_fid(weights):
    pytest.importorskip("torchmetrics")
    real = torch.randint(0, 256, (9, 3, 16, 16), dtype=torch.uint8)
    fake = torch.randint(0, 120, (7, 1, 16, 16), dtype=torch.uint8)
    expected = metrics.frechet_inception_distance(real, fake, weights=weights, features=64)
    metric = metrics.FrechetInceptionDistance(64, weights=weights).train()  # must not affect batch normalisation
    for part in real.split(5):
        metric.update(part, real=True)
    metric.update(fake, real=False)
    # the features are float32 sums, in an order that depends on the batch
    assert metric.compute().item() == pytest.approx(expected, rel=1e-4)
    with pytest.raises(ValueError, match="images must have 1 or 3 channels, got 2"):
        metric.update(real[:, :2], real=True)
    scaled = metrics.FrechetInceptionDistance(64, weights=weights, normalize=True)
    scaled.update((real + 0.5) / 255, real=True)  # as in torchmetrics: whole 255ths, rounded down
    scaled.update((fake + 0.5) / 255, real=False)
    assert scaled.compute().item() == pytest.approx(expected, rel=1e-4)


def test_images_of_another_range_or_dtype_are_refused(weights):
    """Any of them would give a distance, and a wrong one."""
    pytest.importorskip("torchmetrics")
    images = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
    images[0, 0, 0, :2] = torch.tensor([0, 255])  # the ends of the range, which a draw may lack
    plain, scaled = (metrics.FrechetInceptionDistance(64, weights=weights, normalize=n) for n in (False, True))
    for x in (images / 255, images.half(), images.long(), images > 9, images.numpy()):
        with pytest.raises(TypeError, match="images must be uint8, 0 to 255, got"):
            plain.update(x, real=True)
    with pytest.raises(ValueError, match=r"images must have shape \[n, C, H, W\], got \(3, 8, 8\)"):
        plain.update(images[0], real=True)
    for x in (images, images.long(), images > 9):
        with pytest.raises(TypeError, match="images must be floating with normalize=True, got torch"):
            scaled.update(x, real=True)
    for x in (
        images / 127.5 - 1,
        images / 250,
        images.float(),
        images / 255 - 1e-3,
        torch.full((1, 3, 8, 8), math.nan),
    ):
        with pytest.raises(ValueError, match=r"images must be in \[0, 1\] with normalize=True, got"):
            scaled.update(x, real=False)
    assert float(plain.real[0, 0] + scaled.fake[0, 0]) == 0
    for call in (metrics.feature_distance, metrics.frechet_classifier_distance):
        with pytest.raises(TypeError, match="images must be uint8"):
            call(nn.Flatten(), images / 255, images)


def test_a_network_in_training_mode_is_measured_in_evaluation_mode(digits):
    network = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Dropout(0.5), nn.Linear(64, 10)).eval()

    class Bytes(nn.Module):
        def __init__(self):
            super().__init__()
            self.network = network

        def forward(self, x):
            return self.network(metrics.to_float(x))

    with torch.no_grad():
        logits = network(metrics.to_float(digits.test))
        expected = frechet(Bytes()(digits.train), Bytes()(digits.test))
    before = network[1].running_mean.clone()
    network.train()
    assert metrics.feature_distance(Bytes(), digits.train, digits.test) == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(metrics.probabilities(network, digits.test), logits.double().softmax(1))
    assert torch.equal(before, network[1].running_mean)
    assert all(module.training for module in network.modules())


def test_fid_without_weights_downloads_nothing_unless_asked(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *a, **k: pytest.fail("downloaded"))
    with pytest.raises(WeightsNotFound, match=r"checkpoints/pt_inception.*--inception-weights.*--download"):
        inception()
    with pytest.raises(WeightsNotFound, match=r"nowhere\.pth does not exist"):
        inception(tmp_path / "nowhere.pth", download=True)

    def refuse(*args, **keywords):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    with pytest.raises(WeightsNotFound, match=r"could not be downloaded.*no network"):
        inception(download=True)


def test_fid_refuses_a_file_of_other_weights(tmp_path):
    torch.save({"weight": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="does not hold pytorch-fid's Inception"):
        inception(tmp_path / "other.pth")
    (tmp_path / "text.pth").write_text("hello")
    with pytest.raises(ValueError, match="does not hold weights"):
        inception(tmp_path / "text.pth")
    with pytest.raises(ValueError, match="features must be one of 64, 192, 768, 2048, got 100"):
        inception(tmp_path / "other.pth", features=100)


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 17, 12), (1, 28, 28)])
def test_ssim_is_torchmetrics(shape):
    functional = pytest.importorskip("torchmetrics.functional.image")
    x = torch.rand(5, *shape)
    y = (x + 0.2 * torch.randn_like(x)).clamp(0, 1)
    theirs = functional.structural_similarity_index_measure(x, y, data_range=1.0, reduction="none")
    torch.testing.assert_close(metrics.structural_similarity(x, y), theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 8, 8), (2, 9, 20), (3, 4, 6)])
def test_ssim_by_its_definition(shape):
    x, y = torch.rand(2, *shape).double(), torch.rand(2, *shape).double()
    reach = min(5, shape[1] - 1)
    weight = torch.exp(-(torch.arange(-reach, reach + 1) ** 2) / 4.5).double()
    weight = torch.outer(weight, weight) / weight.sum() ** 2
    a, b = (np.pad(v.numpy(), [(0, 0), (0, 0), (reach, reach), (reach, reach)], mode="reflect") for v in (x, y))
    values = np.zeros(2)
    for i in range(shape[1]):
        for j in range(shape[2]):
            part = np.s_[:, :, i : i + 2 * reach + 1, j : j + 2 * reach + 1]
            mean_a, mean_b = ((weight.numpy() * v[part]).sum((2, 3), keepdims=True) for v in (a, b))
            da, db = a[part] - mean_a, b[part] - mean_b
            va, vb, cov = ((weight.numpy() * u).sum((2, 3)) for u in (da * da, db * db, da * db))
            mean_a, mean_b = mean_a[..., 0, 0], mean_b[..., 0, 0]
            top = (2 * mean_a * mean_b + 1e-4) * (2 * cov + 9e-4)
            values += (top / ((mean_a**2 + mean_b**2 + 1e-4) * (va + vb + 9e-4))).mean(1)
    values = torch.from_numpy(values) / (shape[1] * shape[2])
    torch.testing.assert_close(metrics.structural_similarity(x, y), values)
    torch.testing.assert_close(metrics.structural_similarity(x, x), torch.ones(2).double())
