"""What a trained system is worth: FLD, reconstruction, FID, and distances in a classifier's features.

Images come as uint8 `[n, C, H, W]`; systems take and return floats in [-1, 1]. A system is what
`ivfast.models.build` returns; those without an encoder have no `encode`.

`FrechetInceptionDistance` and `FrechetLatentDistance` are these distances as metrics of torchmetrics; asking for them
raises ImportError where it is not installed.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import _check
from .classifier import Classifier
from .points import Mixture
from .statistics import GaussianStatistics

BATCH = 500


def __getattr__(name: str):
    if name not in ("FrechetInceptionDistance", "FrechetLatentDistance"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from . import _torchmetrics
    except ModuleNotFoundError as error:
        if error.name != "torchmetrics":
            raise
        raise ImportError(f"{__name__}.{name} needs torchmetrics: pip install torchmetrics", name=error.name) from error
    return getattr(_torchmetrics, name)


class Reconstruction(NamedTuple):
    mse: float  # per pixel and channel, images in [0, 1]
    psnr: float  # dB, mean over images
    ssim: float  # mean over images


class HistogramDivergence(NamedTuple):
    kl: float  # as published, no divergence in nats
    jsd: float  # as published
    js: float  # nats, from 0 to log 2


class Modes(NamedTuple):
    covered: int  # modes with a confident sample
    kl: float  # of the histogram of confident samples to the uniform one, nats
    confident: float  # share of samples that surely belong to a mode


def to_float(images: Tensor) -> Tensor:
    """uint8 0..255 to float32 [-1, 1]; floating tensors pass through (points)."""
    return images.float() / 127.5 - 1 if images.dtype == torch.uint8 else images


def to_bytes(images: Tensor) -> Tensor:
    """Floats in [-1, 1] to uint8 on the CPU, rounded as a PNG file is; what lies outside is clamped. Points `[n, D]`
    stay as they are.

    Raises:
        ValueError: a pixel that is not finite.
    """
    if not bool(images.isfinite().all()):
        raise ValueError("images must be finite; the system has diverged")
    if images.dim() == 2:
        return images.float().cpu()
    return images.float().add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8).cpu()


@contextlib.contextmanager
def _evaluating(system, seed: int = 0) -> Iterator[torch.device]:
    """Evaluation mode without gradients, noise from `seed`, and mode and generators of before afterwards.

    Yields the system's device.
    """
    training = any(module.training for module in system.modules.values())
    device = torch.device(system.settings.device)
    system.train(False)
    try:
        with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            yield device
    finally:
        system.train(training)


def codes(system, images: Tensor) -> Tensor:
    """E(x) of every image, float32 `[n, d]` on the CPU; of a stochastic encoder one draw."""
    with _evaluating(system) as device:
        return torch.cat([system.encode(to_float(x.to(device))).float().cpu() for x in images.split(BATCH)])


def posterior_codes(system, images: Tensor, seed: int = 0) -> Tensor:
    """A code from the posterior of every image, float32 `[n, d]` on the CPU; E(x) of systems without a posterior.

    Over images of the data these are a sample of the aggregated posterior q(z).
    """
    draw = getattr(system, "draw_codes", None) or system.encode
    with _evaluating(system, seed) as device:
        return torch.cat([draw(to_float(x.to(device))).float().cpu() for x in images.split(BATCH)])


def decoded(system, z: Tensor) -> Tensor:
    """G(z) of every code `[n, d]`, as uint8 `[n, C, H, W]` on the CPU."""
    with _evaluating(system) as device:
        return torch.cat([to_bytes(system.decode(part.to(device))) for part in z.split(BATCH)])


def latent_frechet_distance(z: Tensor) -> float:
    """FLD of codes `[n, d]` to the prior N(0, I) (S1, section 4).

    Raises:
        ValueError: a code that is not finite.
    """
    if not bool(z.isfinite().all()):
        raise ValueError("codes must be finite; the encoder has diverged")
    return float(distance_to_prior(GaussianStatistics(z.shape[1]).update(z.double())))


def kl_to_prior(z: Tensor, neighbours: int = 5) -> float:
    """KL(q(z) ‖ N(0, I)) of codes `[n, d]` drawn from q, nats, by the distances r to the k-th nearest neighbours:

    ½ E‖z‖² + (d/2) log 2π − [ψ(n) − ψ(k) + log(volume of the unit ball) + d E log r], the bracket an estimate of q's
    entropy. Consistent, not unbiased: in many dimensions it needs many codes, and codes on top of each other (k + 1
    equal ones) make it infinite, as the divergence of a distribution with atoms is.

    Raises:
        ValueError: a code that is not finite, or no more codes than `neighbours`.

    Source: Kozachenko & Leonenko 1987. S4 Table 1 takes KL(q(z), p) from the ITE toolbox and does not say by which of
    its estimators.
    """
    from sklearn.neighbors import NearestNeighbors

    n, d = z.shape
    _check.count("neighbours", neighbours)
    if n <= neighbours:
        raise ValueError(f"codes must be more than neighbours = {neighbours}, got {n}")
    if not bool(z.isfinite().all()):
        raise ValueError("codes must be finite; the encoder has diverged")
    z = z.double().cpu()
    distance, _ = NearestNeighbors(n_neighbors=neighbours).fit(z.numpy()).kneighbors()
    log_r = torch.from_numpy(distance[:, -1].copy()).log().mean()
    log_ball = d / 2 * math.log(math.pi) - math.lgamma(d / 2 + 1)
    counts = torch.tensor([n, neighbours], dtype=torch.float64).digamma()
    entropy = counts[0] - counts[1] + log_ball + d * log_r
    return float(0.5 * z.square().sum(1).mean() + d / 2 * math.log(2 * math.pi) - entropy)


def distance_to_prior(codes: GaussianStatistics) -> Tensor:
    """Fréchet distance of codes to N(0, I), a float64 scalar; errors as `distance_between`'s."""
    prior = GaussianStatistics(len(codes.mean), device=codes.mean.device)
    eye = torch.eye(len(codes.mean), dtype=torch.float64, device=codes.mean.device)
    prior.load_state_dict({"mean": torch.zeros_like(codes.mean), "covariance": eye})
    return distance_between(codes, prior)


def distance_between(first: GaussianStatistics, second: GaussianStatistics) -> Tensor:
    """Fréchet distance of two sets of features, a float64 scalar.

    Raises:
        ValueError: a feature that is not finite, or fewer than two samples.
    """
    for statistics in (first, second):
        if not bool(statistics.mean.isfinite().all()):
            raise ValueError("features must be finite, got NaN or infinity")
    return first.frechet_distance(second)


def reconstruction(system, images: Tensor) -> Reconstruction:
    """Mean squared error, PSNR and SSIM of G(E x) against x, on images in [0, 1]."""
    errors, similarities = [], []
    with _evaluating(system) as device:
        for x in images.split(BATCH):
            x = to_float(x.to(device))
            back = system.decode(system.encode(x)).float().clamp(-1, 1)
            errors.append((back - x).div(2).square().flatten(1).mean(1).cpu())  # [batch]
            similarities.append(structural_similarity((back + 1) / 2, (x + 1) / 2).cpu())
    mse = torch.cat(errors).double()
    psnr = float(-10 * mse.clamp_min(1e-10).log10().mean())
    return Reconstruction(float(mse.mean()), psnr, float(torch.cat(similarities).double().mean()))


def structural_similarity(x: Tensor, y: Tensor) -> Tensor:
    """SSIM of each pair of images in [0, 1], float `[n, C, H, W]` -> `[n]`, 1 where they are equal.

    A Gaussian window of 11 pixels and deviation 1.5 around every pixel, the image reflected at its edges as by
    torchmetrics; K₁ = .01, K₂ = .03. A side below 6 pixels has no 5 to reflect: the window is smaller there.

    Source: Wang et al. 2004, Eq. 13.
    """
    _check.same("y", y, "x", x)
    n, side = len(x), x.shape[2:]
    reach = min(5, *(pixels - 1 for pixels in side))
    taps = torch.arange(-reach, reach + 1, dtype=x.dtype, device=x.device)
    taps = torch.exp(-taps.square() / (2 * 1.5**2))
    window = torch.outer(taps, taps) / taps.sum() ** 2
    x, y = (F.pad(images, (reach,) * 4, mode="reflect").flatten(0, 1)[:, None] for images in (x, y))
    planes = torch.cat([x, y, x * x, y * y, x * y])
    means = F.conv2d(planes, window[None, None]).view(5, n, -1)
    mu_x, mu_y, xx, yy, xy = means.unbind()
    c1, c2 = 0.01**2, 0.03**2
    luminance = (2 * mu_x * mu_y + c1) / (mu_x**2 + mu_y**2 + c1)
    structure = (2 * (xy - mu_x * mu_y) + c2) / (xx - mu_x**2 + yy - mu_y**2 + c2)
    return (luminance * structure).mean(1)


def generate(system, n: int, seed: int = 0) -> Tensor:
    """n samples as uint8 `[n, C, H, W]`, or points `[n, D]`, the same for the same seed; classes are drawn in turn."""
    _check.count("n", n)
    with _evaluating(system) as device:
        generator = torch.Generator(device).manual_seed(seed)
        if getattr(system, "classes", 0):
            parts = (torch.arange(n) % system.classes).split(BATCH)
            images = (system.sample(len(part), generator=generator, labels=part) for part in parts)
        else:
            images = (system.sample(min(BATCH, n - i), generator=generator) for i in range(0, n, BATCH))
        return torch.cat([to_bytes(x) for x in images])


def lower_bound(system, images: Tensor, labels: Tensor | None = None, seed: int = 0) -> float:
    """Mean of the variational lower bound over uint8 images, in nats, by one code each.

    Args:
        labels: int64 `[n]`, for systems that need them all: their bound is of log p(x|y).

    Source: S3 Table 3.
    """
    images, bounds = images.split(BATCH), []
    labels = [None] * len(images) if labels is None else labels.split(BATCH)
    with _evaluating(system, seed) as device:
        for x, y in zip(images, labels, strict=True):
            bounds.append(system.bound(to_float(x.to(device)), None if y is None else y.to(device)).double().cpu())
    return float(torch.cat(bounds).mean())


def importance_log_likelihood(
    system, images: Tensor, labels: Tensor | None = None, *, draws: int = 100, seed: int = 0
) -> float:
    """Mean of log (1/K) Σ_k p(x|z_k) p(z_k) / r(z_k|x) over images, in nats, z_k from the Gaussian r of `proposal`.

    A lower bound of log p(x) on average, tight as K grows; at K = 1 and with r = q(z|x) the variational bound.

    Args:
        system: with Bernoulli pixels and a Gaussian to draw codes from: a VAE's posterior, AVB's moments of it.
        labels: int64 `[n]`, for systems that need them all: it is log p(x|y).
        draws: K.

    Source: Burda et al. 2015, Eq. 8.
    """
    _check.count("draws", draws)
    images, values = images.split(BATCH), []
    labels = [None] * len(images) if labels is None else labels.split(BATCH)
    with _evaluating(system, seed) as device:
        for x, y in zip(images, labels, strict=True):
            x = to_float(x.to(device))
            given = () if y is None else (system.one_hot(y.to(device)),)
            mu, logvar = (moment.double() for moment in system.proposal(x, *given))
            total = mu.new_full((len(x),), -math.inf)
            for _ in range(draws):
                noise = torch.randn_like(mu)
                z = mu + (0.5 * logvar).exp() * noise
                log_ratio = 0.5 * (noise.square() + logvar - z.square()).sum(1)  # log p(z) − log r(z|x)
                total = torch.logaddexp(total, log_ratio - system.surprise(x, z.float(), *given))
            values.append((total - math.log(draws)).cpu())
    return float(torch.cat(values).mean())


def quadrature_log_likelihood(system, x: Tensor, *, span: float = 6.0, cells: int = 300) -> Tensor:
    """log ∫ p(x|z) p(z) dz of images or points `[n]`, float64, over a grid of codes of one or two dimensions.

    Args:
        span, cells: the grid reaches to ±span, in so many steps a dimension.

    Raises:
        ValueError: codes of more dimensions.
    """
    d = system.latent_dim
    if d > 2:
        raise ValueError(f"quadrature is over codes of one or two dimensions, got {d}")
    with _evaluating(system) as device:
        axis = torch.linspace(-span, span, cells + 1, dtype=torch.float64, device=device)
        z = torch.cartesian_prod(*[axis] * d).view(-1, d)
        log_prior = -0.5 * z.square().sum(1) + d * math.log(2 * span / cells) - d / 2 * math.log(2 * math.pi)
        values = []
        for row in to_float(x.to(device)):
            parts = z.float().split(16 * BATCH)
            surprise = torch.cat([system.surprise(row.expand(len(part), *row.shape), part).double() for part in parts])
            values.append(torch.logsumexp(log_prior - surprise, 0))
    return torch.stack(values).cpu()


def accuracy(system, images: Tensor, labels: Tensor) -> float:
    """Share of uint8 images to which the system's own classifier gives their label (S3 Table 2, right)."""
    with _evaluating(system) as device:
        best = torch.cat([system.classify(to_float(x.to(device))).argmax(1).cpu() for x in images.split(BATCH)])
    return float((best == labels).double().mean())


def conditional_accuracy(classifier: Classifier, images: Tensor, device="cpu") -> float:
    """Share of the images that `generate` drew from a system with classes that a classifier takes for their class.

    Source: S3 Table 2, middle, and section G.1.
    """
    p = probabilities(classifier, images, device)
    return float((p.argmax(1) == torch.arange(len(p)) % p.shape[1]).double().mean())


def feature_distance(features: Callable[[Tensor], Tensor], real: Tensor, fake: Tensor, device="cpu") -> float:
    """Fréchet distance between the features of two sets of uint8 images, any extractor `[n, C, H, W] -> [n, d]`.

    `features` gets uint8 batches on `device`. Source: Heusel et al. 2017.
    """
    first, second = (feature_statistics(features, images, device) for images in (real, fake))
    return float(distance_between(first, second))


@torch.no_grad()
def feature_statistics(features: Callable[[Tensor], Tensor], images: Tensor, device="cpu") -> GaussianStatistics:
    """Mean and covariance of the features of uint8 images, streamed."""
    statistics = None
    for batch in images.split(BATCH if images.shape[-1] <= 96 else 50):
        x = features(batch.to(device))
        statistics = statistics or GaussianStatistics(x.shape[1], device=x.device)
        statistics.update(x)
    return statistics


def frechet_inception_distance(
    real: Tensor,
    fake: Tensor,
    *,
    weights: str | Path | None = None,
    download: bool = False,
    features: int = 2048,
    device="cpu",
) -> float:
    """FID of two sets of uint8 images; one-channel images are repeated to three.

    Arguments and errors as `ivfast.inception.inception`'s. Below 2,048 images a side the covariances are rank
    deficient: exact, but biased upwards.
    """
    extract = InceptionFeatures(weights, download=download, features=features).to(device)
    return feature_distance(extract, real, fake, device)


class InceptionFeatures(nn.Module):
    """Inception's features `[n, d]` of uint8 images `[n, C, H, W]` of 1 or 3 channels, never in training mode.

    Arguments and errors as `ivfast.inception.inception`'s.
    """

    def __init__(self, weights: str | Path | None = None, *, download: bool = False, features: int = 2048):
        from .inception import inception

        super().__init__()
        self.network = inception(weights, download=download, features=features)
        self.num_features = features

    def train(self, mode: bool = True) -> "InceptionFeatures":
        return super().train(False)

    def forward(self, images: Tensor) -> Tensor:
        if images.shape[1] not in (1, 3):
            raise ValueError(f"images must have 1 or 3 channels, got {images.shape[1]}")
        # Inception works at 299 x 299: batches of 50, as in pytorch-fid
        parts = (x.expand(-1, 3, -1, -1).float() / 255 for x in images.split(50))
        return torch.cat([self.network(x)[0].mean((2, 3)) for x in parts])


def frechet_classifier_distance(classifier: Classifier, real: Tensor, fake: Tensor, device="cpu") -> float:
    """Fréchet distance in the penultimate features of a classifier trained on the data set itself.

    Not FID, and not comparable with it or across data sets: each classifier has its own scale. The distance between
    training and test images, in the same features, is the yardstick.
    """
    return feature_distance(lambda x: classifier.features(to_float(x)), real, fake, device)


@torch.no_grad()
def probabilities(classifier: Callable[[Tensor], Tensor], images: Tensor, device="cpu") -> Tensor:
    """Class probabilities `[n, classes]`, float64."""
    logits = torch.cat([classifier(to_float(x.to(device))).cpu() for x in images.split(BATCH)])
    return logits.double().softmax(1)


def classifier_score(classifier: Callable[[Tensor], Tensor], images: Tensor, device="cpu") -> float:
    """exp E KL(p(y|x) ‖ p(y)): the Inception score's formula, from 1 to classes.

    Args:
        classifier: any network from images in [-1, 1] to logits `[n, classes]`; under Inception it is the Inception
            score, under `ivfast.classifier.classifier_of(dataset)` the score of the data set's own classifier.

    Source: Salimans et al. 2016; S3 (On Unifying) scores MNIST so.
    """
    p = probabilities(classifier, images, device)
    log_p = p.clamp_min(1e-300).log()
    return float((p * (log_p - p.mean(0).clamp_min(1e-300).log())).sum(1).mean().exp())


def modes(classifier: Classifier, images: Tensor, *, confidence: float = 0.9, device="cpu") -> Modes:
    """Mode coverage of stacked images `[n, 3, H, W]`, by a ten-class classifier of each channel.

    Pixel noise too "covers" 1,000 modes, so samples count only where all three digits have `confidence`.

    Source: S2 (IVGAN), stacked MNIST; Metz et al. 2017.
    """
    n = len(images)
    p = probabilities(classifier, images.flatten(0, 1)[:, None], device).view(n, 3, -1)
    best, digit = p.max(2)
    sure = (best >= confidence).all(1)
    return _coverage(digit @ torch.tensor([100, 10, 1]), sure, 1000)


def point_modes(points: Tensor, mixture: Mixture, *, within: float = 3.0) -> Modes:
    """Mode coverage of points `[n, d]`: each counts for its nearest centre, where it lies within so many deviations
    (of centres without spread, within half the distance of the nearest two).

    Source: Srivastava et al. 2017 and Lin et al. 2018, who call such a point of high quality; both take 3.
    """
    distance, mode = torch.cdist(points.double(), mixture.centers.double()).min(1)
    reach = within * mixture.deviation or float(torch.pdist(mixture.centers).min()) / 2
    return _coverage(mode, distance <= reach, len(mixture.centers))


def histogram_divergence(real: Tensor, fake: Tensor, reach: float = 2.0, bins: int = 100) -> HistogramDivergence:
    """Divergences of two sets of points in the plane `[n, 2]`, by histograms on [-reach, reach]².

    With p and q the *densities* of real and generated points in bins² cells of side 2 reach/bins (points outside the
    square do not count), and ε = 1e-14, the published Soft-IntroVAE evaluation has

        kl = Σ p log(p/(q + ε))/bins,   jsd = ½ Σ m [log(m/(p + ε)) + log(m/(q + ε))]/bins,   m = ½ (p + q).

    Sums run over cells and not over their area, so both are bins/(4 reach²) = 6.25 times a divergence in nats at the
    published bins = 100 and reach = 2. Where q is empty log ε stands for it, about 220 for a set that misses all of
    p's cells; `jsd` has its arguments the wrong way round, so that it too counts empty cells by log ε and reaches 110.
    Both measure above all what share of points fell into a cell that the other set left empty, and so depend on the
    number of points: 5,000 a side are published. A set of points that all lie outside has q = 0.

    js is the Jensen–Shannon divergence of the same cells' masses, all points outside in one more cell: 0 where the
    histograms agree, log 2 where they are disjoint, and above 0 for two samples of one distribution.

    Source: S5 Table 1; the public code of Daniel & Tamar 2021.
    """
    p, q = (_masses(points, reach, bins) for points in (real, fake))
    area = (2 * reach / bins) ** 2
    dp, dq = (mass[:-1] / (mass[:-1].sum().clamp_min(1e-300) * area) for mass in (p, q))
    dm, tiny = (dp + dq) / 2, 1e-14
    kl = (torch.xlogy(dp, dp) - dp * (dq + tiny).log()).sum() / bins
    jsd = sum((torch.xlogy(dm, dm) - dm * (d + tiny).log()).sum() for d in (dp, dq)) / (2 * bins)
    m = (p + q) / 2
    js = sum((torch.xlogy(mass, mass) - torch.xlogy(mass, m)).sum() for mass in (p, q)) / 2
    return HistogramDivergence(float(kl), float(jsd), float(js.clamp_min(0)))


def _masses(points: Tensor, reach: float, bins: int) -> Tensor:
    """Shares of the points in each cell, row by row, and outside: float64 `[bins² + 1]`."""
    points = points.double()
    inside = (points.abs() <= reach).all(1)
    # the last cell of a row includes its upper edge, as NumPy's does
    cell = ((points[inside] + reach) * (bins / (2 * reach))).long().clamp(max=bins - 1)
    counts = torch.bincount(cell[:, 0] * bins + cell[:, 1], minlength=bins**2)
    return torch.cat([counts, (~inside).sum().view(1)]).double() / len(points)


def _coverage(mode: Tensor, sure: Tensor, modes: int) -> Modes:
    histogram = torch.bincount(mode[sure], minlength=modes).double()
    q = histogram / histogram.sum().clamp_min(1)
    kl = float((q * (q * modes).clamp_min(1e-300).log()).sum()) if bool(sure.any()) else float("inf")
    return Modes(int((histogram > 0).sum()), kl, float(sure.double().mean()))
