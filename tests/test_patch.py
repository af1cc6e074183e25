"""ivfast.patch against the real packages: the same result where theirs is correct, the correct one where it is not, and
restoring."""

import contextlib
import math
import re
import runpy
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.linalg
import torch
from processes import passes, without
from torch import nn

import ivfast

PACKAGES = {
    "pytorch_fid": ("pytorch_fid.fid_score", "calculate_frechet_distance"),
    "torchmetrics": ("torchmetrics.image.fid", "_compute_fid"),
    "torch_fidelity": ("torch_fidelity.metric_fid", "fid_statistics_to_metric"),
}


@pytest.fixture(params=PACKAGES)
def package(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def torchmetrics():
    yield from installed("torchmetrics")


@pytest.fixture
def torch_fidelity():
    yield from installed("torch_fidelity")


@pytest.fixture
def pytorch_fid(monkeypatch):
    """With a SciPy whose square root accepts `disp`, as before 1.18."""
    home = pytest.importorskip("pytorch_fid.fid_score")
    monkeypatch.setattr(home, "linalg", SimpleNamespace(sqrtm=lambda a, disp=True: (scipy.linalg.sqrtm(a), None)))
    yield from installed("pytorch_fid")


def installed(name):
    """A package, restored after the test."""
    module, function = PACKAGES[name]
    home = pytest.importorskip(module)
    original = getattr(home, function)
    yield SimpleNamespace(name=name, home=home, original=original, function=function, patch=getattr(ivfast.patch, name))
    assert getattr(home, function) is original


def current(package):
    return getattr(package.home, package.function)


def value(package, mu1, sigma1, mu2, sigma2):
    """The package's current result for NumPy statistics."""
    function = current(package)
    if package.name == "pytorch_fid":
        return function(mu1, sigma1, mu2, sigma2)
    if package.name == "torchmetrics":
        return function(*map(torch.from_numpy, (mu1, sigma1, mu2, sigma2))).item()
    return function({"mu": mu1, "sigma": sigma1}, {"mu": mu2, "sigma": sigma2}, False)["frechet_inception_distance"]


def samples(n, d):
    """Correlated, with a condition number of about a thousand."""
    x = torch.randn(n, d, dtype=torch.float64) @ torch.diag(torch.logspace(0, -1.5, d, dtype=torch.float64))
    return (x @ torch.linalg.qr(torch.randn(d, d, dtype=torch.float64))[0] + torch.randn(d)).numpy()


def statistics(x):
    return x.mean(0), np.cov(x, rowvar=False)


def nuclear(x, y):
    """The distance by ‖C₁C₂ᵀ‖_*, the singular values of the centred samples' products: no covariance, no root."""
    c1, c2 = ((z - z.mean(0)) / math.sqrt(len(z) - 1) for z in (x, y))
    product = np.linalg.svd(c1 @ c2.T, compute_uv=False).sum()
    return np.square(x.mean(0) - y.mean(0)).sum() + np.square(c1).sum() + np.square(c2).sum() - 2 * product


@pytest.mark.parametrize("d", [2, 7, 64])
def test_same_answer_on_full_rank(package, d):
    x, y = samples(5 * d, d), samples(6 * d, d)
    arguments = *statistics(x), *statistics(y)
    expected = value(package, *arguments)
    with package.patch():
        result = value(package, *arguments)
    assert result == pytest.approx(expected, rel=1e-8)
    assert result == pytest.approx(nuclear(x, y), rel=1e-11)  # 2e-13 observed
    assert type(result) is type(expected)


@pytest.mark.parametrize(("n", "m", "d"), [(2, 40, 24), (10, 20, 64), (30, 400, 128)])
def test_right_below_full_rank(package, n, m, d):
    x, y = samples(n, d), samples(m, d)
    with package.patch():
        assert value(package, *statistics(x), *statistics(y)) == pytest.approx(nuclear(x, y), rel=1e-9)


def test_zero_below_full_rank_where_the_original_is_not(package):
    """Rounding turns about 90 zero eigenvalues of ΣΣ (rank 9) into positive ones of 1e-14, whose roots add up."""
    mu, sigma = statistics(np.random.default_rng(0).standard_normal((10, 192)))  # of trace 190
    assert abs(value(package, mu, sigma, mu, sigma)) > 1e-6  # 3e-5 observed
    with package.patch():
        assert abs(value(package, mu, sigma, mu, sigma)) < 1e-10


def test_zero_covariances_and_one_feature(package):
    mu, sigma = statistics(samples(20, 5))
    zero, one, four = np.zeros_like(sigma), np.array([[1.0]]), np.array([[4.0]])
    with package.patch():
        assert value(package, mu, zero, mu, zero) == 0
        assert value(package, mu, zero, mu + 2, sigma) == pytest.approx(20 + np.trace(sigma), rel=1e-14)
        assert value(package, np.zeros(1), one, np.ones(1), four) == pytest.approx(2, rel=1e-15)


def test_float32_statistics_give_float32(package):
    x, y = samples(100, 9), samples(80, 9)
    arguments = [a.astype(np.float32) for a in (*statistics(x), *statistics(y))]
    expected = value(package, *arguments)
    with package.patch():
        result = value(package, *arguments)
    assert result == pytest.approx(expected, rel=1e-4)  # the originals compute in float32
    assert result == pytest.approx(nuclear(x, y), rel=1e-5)  # the statistics are rounded to 6e-8
    # in NumPy 1 the original of pytorch-fid returns float64, because 2 * float32 is
    assert type(result) is (np.float32 if package.name == "pytorch_fid" else type(expected))


def test_arrays_of_any_layout(package):
    """Reversed, transposed and read-only arrays; torchmetrics takes tensors, which have no negative strides."""
    if package.name == "torchmetrics":
        pytest.skip("no arrays")
    mu, sigma = statistics(samples(30, 6))
    reverse = slice(None, None, -1)
    frozen = np.array(sigma[reverse, reverse])
    frozen.flags.writeable = False
    with package.patch():
        expected = value(package, mu, sigma, mu + 1, 2 * sigma)
        result = value(package, mu[reverse], frozen, (mu + 1)[reverse], 2 * np.asfortranarray(sigma)[reverse, reverse])
    assert result == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("wrong", ["mean", "covariance"])
def test_shapes_that_do_not_fit_raise_what_the_original_raises(package, wrong):
    mu, sigma = statistics(samples(30, 6))
    arguments = (mu, sigma, mu[:5], sigma) if wrong == "mean" else (mu, sigma, mu, sigma[:5, :5])
    with pytest.raises((AssertionError, RuntimeError)) as original:
        value(package, *arguments)
    with package.patch(), pytest.raises(original.type):
        value(package, *arguments)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_covariances_that_are_not_finite_raise(package, bad):
    mu, sigma = statistics(samples(30, 6))
    broken = sigma.copy()
    broken[2, 3] = bad
    error = torch.linalg.LinAlgError if package.name == "torchmetrics" else np.linalg.LinAlgError
    with package.patch():
        for name, arguments in {"sigma1": (mu, broken, mu, sigma), "sigma2": (mu, sigma, mu, broken)}.items():
            with pytest.raises(error, match=f"{name} must be finite"):
                value(package, *arguments)


def test_takes_effect_at_once_and_is_reversed(package):
    patch = package.patch()
    assert current(package) is patch.replacement is not package.original
    for _ in range(2):
        patch.restore()
        assert current(package) is package.original
    with contextlib.suppress(KeyError), patch as entered:  # nested, and left by an error
        assert entered is patch
        assert current(package) is patch.replacement
        raise KeyError
    assert current(package) is package.original


def test_twice_is_once(package):
    first = package.patch()
    with package.patch() as second:
        assert second.original is package.original
        assert current(package) is first.replacement
    assert current(package) is first.replacement  # as it was before the block
    package.patch().restore()
    assert current(package) is package.original


def test_every_name_within_the_package_is_replaced(torchmetrics):
    """MiFID imports the function by name."""
    module = pytest.importorskip("torchmetrics.image.mifid")
    with torchmetrics.patch() as patch:
        assert module._compute_fid is patch.replacement
    assert module._compute_fid is torchmetrics.original


def test_missing_packages_are_named_with_the_pip_command():
    code = without(*PACKAGES) + "import ivfast\n"
    for name in PACKAGES:
        code += f"try: ivfast.patch.{name}()\nexcept ImportError as error: print(error)\n"
    names = {name: name.replace("_", "-") for name in PACKAGES}
    extras = {"pytorch_fid": "train", "torchmetrics": "metrics", "torch_fidelity": "metrics"}
    expected = [
        f'ivfast.patch.{name}() needs {pip}: pip install "ivfast[{extras[name]}]"' for name, pip in names.items()
    ]
    assert passes(code).splitlines() == expected


def test_another_version_is_named_and_left_alone(package, monkeypatch):
    expected = f"{package.name.replace('_', '-')} [0-9.]+: expected {re.escape(package.home.__name__)}"

    def other(mu1, sigma1):
        pass

    with monkeypatch.context() as context:
        context.setattr(package.home, package.function, other)
        with pytest.raises(RuntimeError, match=rf"{expected}.*\(mu1, sigma1\); nothing was patched"):
            package.patch()
        assert current(package) is other
        context.delattr(package.home, package.function)
        with pytest.raises(RuntimeError, match=f"{expected}.*there is no function {package.function}"):
            package.patch()
    monkeypatch.setitem(sys.modules, package.home.__name__, None)
    with pytest.raises(RuntimeError, match=f"{expected}.*there is no module"):
        package.patch()


class Pixels(nn.Module):
    """A stand-in for Inception: 64 fixed random projections of an 8 × 8 colour image in [0, 1]."""

    BLOCK_INDEX_BY_DIM = {64: 0, 192: 1, 768: 2, 2048: 3}
    num_features = 64

    def __init__(self, *_):
        super().__init__()
        self.register_buffer("weight", torch.randn(192, 64, generator=torch.Generator().manual_seed(1)) / 192**0.5)

    def features(self, x):
        return (x.flatten(1).float() @ self.weight).relu()

    def forward(self, x):
        return [self.features(x)[:, :, None, None]]


class BytePixels(Pixels):
    def forward(self, x):
        return self.features(x / 255)


def images(n, power):
    """uint8 `[n, 3, 8, 8]`, darker for a higher power."""
    return torch.rand(n, 3, 8, 8).pow(power).mul(255).round().to(torch.uint8)


def distance_of(real, fake):
    return nuclear(*(BytePixels()(x).double().numpy() for x in (real, fake)))


def test_python_m_pytorch_fid_with_scipy_1_18(pytorch_fid, tmp_path, monkeypatch, capsys):
    """Two folders with fewer PNG files than features; SciPy's square root no longer accepts `disp`."""
    from PIL import Image

    def sqrtm(A):  # SciPy 1.18's signature
        return scipy.linalg.sqrtm(A)

    monkeypatch.setattr(pytorch_fid.home, "linalg", SimpleNamespace(sqrtm=sqrtm))
    monkeypatch.setattr(pytorch_fid.home, "InceptionV3", Pixels)
    sets = {"real": images(12, 1.0), "fake": images(9, 1.5)}
    for name, pixels in sets.items():
        (tmp_path / name).mkdir()
        for i, image in enumerate(pixels):
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / name / f"{i:02}.png")
    options = ["--device", "cpu", "--num-workers", "0", "--dims", "64", "--batch-size", "5"]
    monkeypatch.setattr(sys, "argv", ["pytorch_fid", *(str(tmp_path / name) for name in sets), *options])
    with pytest.raises(TypeError, match="disp"):
        runpy.run_module("pytorch_fid", run_name="__main__")
    capsys.readouterr()
    with pytorch_fid.patch():
        runpy.run_module("pytorch_fid", run_name="__main__")
    # the features are float32 sums
    assert float(capsys.readouterr().out.split("FID:")[1]) == pytest.approx(distance_of(**sets), rel=1e-5)


@pytest.mark.filterwarnings("ignore:The `disp` argument is deprecated:DeprecationWarning")
def test_pytorch_fid_with_the_scipy_that_is_installed(pytorch_fid, monkeypatch):
    """The original gives the same result, or fails from SciPy 1.18 on."""
    monkeypatch.setattr(pytorch_fid.home, "linalg", scipy.linalg)
    arguments = *statistics(samples(100, 8)), *statistics(samples(90, 8))
    with pytorch_fid.patch():
        result = value(pytorch_fid, *arguments)
    new = tuple(map(int, scipy.__version__.split(".")[:2])) >= (1, 18)
    with pytest.raises(TypeError, match="disp") if new else contextlib.nullcontext():
        assert value(pytorch_fid, *arguments) == pytest.approx(result, rel=1e-8)


@pytest.mark.parametrize("n", [200, 12])
def test_torchmetrics_frechet_inception_distance(torchmetrics, n):
    metric = torchmetrics.home.FrechetInceptionDistance(feature=BytePixels())
    real, fake = images(n, 1.0), images(n + 3, 1.5)
    for x, is_real in ((real, True), (fake, False)):
        metric.update(x[:1], real=is_real)  # a batch of one
        metric.update(x[1:], real=is_real)
    with torchmetrics.patch():
        result = metric.compute()
    assert result.dtype == torch.float32
    assert result.item() == pytest.approx(distance_of(real, fake), rel=1e-6)  # the metric rounds to float32


def test_torchmetrics_gradient(torchmetrics):
    arguments = [torch.from_numpy(a).requires_grad_() for n in (30, 40) for a in statistics(samples(n, 5))]
    with torchmetrics.patch():
        gradients = torch.autograd.grad(current(torchmetrics)(*arguments), arguments)
    expected = torch.autograd.grad(torchmetrics.original(*arguments), arguments)
    for a, b in zip(gradients, expected, strict=True):  # of a covariance, its symmetric part
        torch.testing.assert_close((a + a.mT) / 2 if a.dim() == 2 else a, (b + b.mT) / 2 if b.dim() == 2 else b)


def test_torch_fidelity_calculate_metrics(torch_fidelity, monkeypatch, capsys):
    fidelity = pytest.importorskip("torch_fidelity")
    registry = pytest.importorskip("torch_fidelity.registry")
    from torch_fidelity.feature_extractor_base import FeatureExtractorBase

    class Extractor(FeatureExtractorBase):
        def __init__(self, name, features_list, **_):
            super().__init__(name, features_list)
            self.network = BytePixels()

        @staticmethod
        def get_provided_features_list():
            return ("64",)

        @staticmethod
        def get_default_feature_layer_for_metric(metric):
            return "64"

        @staticmethod
        def can_be_compiled():
            return False

        def forward(self, x):
            return (self.network(x),)

    monkeypatch.setitem(registry.FEATURE_EXTRACTORS_REGISTRY, "pixels", Extractor)
    real, fake = images(12, 1.0), images(9, 1.5)
    options = {"feature_extractor": "pixels", "cuda": False, "cache": False, "batch_size": 4, "save_cpu_ram": True}
    with torch_fidelity.patch():
        result = fidelity.calculate_metrics(
            input1=Images(real), input2=Images(fake), fid=True, isc=True, isc_splits=2, verbose=True, **options
        )["frechet_inception_distance"]
    assert result == pytest.approx(distance_of(real, fake), rel=1e-5)
    assert f"Frechet Inception Distance: {result:.7g}\n" in capsys.readouterr().err


class Images(torch.utils.data.Dataset):
    """The input of torch-fidelity: a Dataset of images; a TensorDataset would yield tuples."""

    def __init__(self, x):
        self.x = x

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return self.x[i]
