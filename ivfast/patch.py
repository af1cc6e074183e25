"""Replace the Fréchet distance of other packages with ivfast's in one line.

    ivfast.patch.pytorch_fid()  # from here on
    with ivfast.patch.torchmetrics(): ...  # within the block

The function is replaced in its module and wherever else the package imported it. Your own code keeps the original if it
imported the function by name earlier. The replacement has the same signature, checks and type of result as the
original, and computes `ivfast.frechet_distance` in float64. Covariances that are not finite raise the LinAlgError of
NumPy or PyTorch.
"""

import functools
import importlib
import importlib.metadata
import inspect
import sys
from collections.abc import Callable
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from ._extra import not_found
from .ops.frechet import frechet_distance


class Patch:
    """A replaced function of a package. Leaving a `with` block restores the package's previous state."""

    def __init__(self, package: str, original: Callable, replacement: Callable):
        self._package, self.original, self.replacement = package, original, replacement
        self._changed = self._swap(original, replacement)

    def restore(self) -> None:
        """Restore the original, whichever call replaced it."""
        self._swap(self.replacement, self.original)
        self._changed = False

    def __enter__(self) -> "Patch":
        self._changed |= self._swap(self.original, self.replacement)
        return self

    def __exit__(self, *_) -> None:
        if self._changed:
            self.restore()

    def _swap(self, old: Callable, new: Callable) -> bool:
        """Bind every name of `old` in the package's modules to `new`; return whether there was one."""
        modules = [m for name, m in list(sys.modules.items()) if f"{name}.".startswith(f"{self._package}.")]
        names = [(m, name) for m in modules if m is not None for name, value in vars(m).items() if value is old]
        for module, name in names:
            setattr(module, name, new)
        return bool(names)


def pytorch_fid() -> Patch:
    """Replace `pytorch_fid.fid_score.calculate_frechet_distance`, which fails with SciPy >= 1.18. `eps` has no effect.

    Raises:
        ImportError: pytorch-fid is not installed.
        RuntimeError: the installed version has no such function; nothing is replaced.
    """
    parameters = ("mu1", "sigma1", "mu2", "sigma2", "eps")
    return _patch("pytorch-fid", "pytorch_fid.fid_score", "calculate_frechet_distance", parameters, _pytorch_fid)


def torchmetrics() -> Patch:
    """Replace `torchmetrics.image.fid._compute_fid`, which FrechetInceptionDistance and torchmetrics' MiFID call. The
    replacement is differentiable.

    Raises the same errors as `pytorch_fid`.
    """
    parameters = ("mu1", "sigma1", "mu2", "sigma2")
    return _patch("torchmetrics", "torchmetrics.image.fid", "_compute_fid", parameters, _torchmetrics)


def torch_fidelity() -> Patch:
    """Replace `torch_fidelity.metric_fid.fid_statistics_to_metric`, which `calculate_metrics(fid=True)` calls.

    Raises the same errors as `pytorch_fid`.
    """
    name, parameters = "fid_statistics_to_metric", ("stat_1", "stat_2", "verbose")
    return _patch("torch-fidelity", "torch_fidelity.metric_fid", name, parameters, _torch_fidelity)


def _pytorch_fid(home: ModuleType) -> Callable:
    def calculate_frechet_distance(mu1, sigma1, mu2, sigma2, eps=1e-6):
        mu1, mu2 = np.atleast_1d(mu1), np.atleast_1d(mu2)
        sigma1, sigma2 = np.atleast_2d(sigma1), np.atleast_2d(sigma2)
        if mu1.shape != mu2.shape:
            raise AssertionError("Training and test mean vectors have different lengths")
        if sigma1.shape != sigma2.shape:
            raise AssertionError("Training and test covariances have different dimensions")
        single = np.result_type(mu1, sigma1, mu2, sigma2) in (np.float16, np.float32)
        distance = _array_distance(mu1, sigma1, mu2, sigma2)
        return np.float32(distance) if single else np.float64(distance)

    return calculate_frechet_distance


def _torchmetrics(home: ModuleType) -> Callable:
    def _compute_fid(mu1: Tensor, sigma1: Tensor, mu2: Tensor, sigma2: Tensor) -> Tensor:
        d = mu1.numel()
        if not (mu1.shape == mu2.shape == (d,) and sigma1.shape == sigma2.shape == (d, d)):
            shapes = ", ".join(str(tuple(x.shape)) for x in (mu1, sigma1, mu2, sigma2))
            raise RuntimeError(f"mu1, sigma1, mu2, sigma2 must have shapes (d,), (d, d), (d,), (d, d), got {shapes}")
        if sigma1.dtype != sigma2.dtype:
            raise RuntimeError(f"sigma2 must match sigma1: {sigma1.dtype}, got {sigma2.dtype}")
        for name, sigma in (("sigma1", sigma1), ("sigma2", sigma2)):
            if not bool(sigma.isfinite().all()):
                raise torch.linalg.LinAlgError(f"{name} must be finite, got NaN or infinity")  # type: ignore[attr-defined]
        distance = frechet_distance(mu1.double(), sigma1.double(), mu2.double(), sigma2.double())
        return distance.to(functools.reduce(torch.promote_types, (mu1.dtype, mu2.dtype, sigma1.dtype, torch.float32)))

    return _compute_fid


def _torch_fidelity(home: ModuleType) -> Callable:
    key_of_fid, vprint = home.KEY_METRIC_FID, home.vprint

    def fid_statistics_to_metric(stat_1, stat_2, verbose):
        for key in ("mu", "sigma"):
            first, second = stat_1[key], stat_2[key]
            if first.shape != second.shape or first.dtype != second.dtype:
                sides = f"{first.dtype} {first.shape}, got {second.dtype} {second.shape}"
                raise AssertionError(f"{key} of stat_2 must match that of stat_1: {sides}")
        distance = _array_distance(stat_1["mu"], stat_1["sigma"], stat_2["mu"], stat_2["sigma"])
        vprint(verbose, f"Frechet Inception Distance: {distance:.7g}")
        return {key_of_fid: distance}

    return fid_statistics_to_metric


def _array_distance(mu1: np.ndarray, sigma1: np.ndarray, mu2: np.ndarray, sigma2: np.ndarray) -> float:
    """Fréchet distance from means `[d]` and covariances `[d, d]`; the two of each have the same shape."""
    if mu1.ndim != 1 or sigma1.shape != (mu1.size, mu1.size):
        raise ValueError(f"means must have shape (d,) and covariances (d, d), got {mu1.shape} and {sigma1.shape}")
    for name, sigma in (("sigma1", sigma1), ("sigma2", sigma2)):
        if not np.isfinite(sigma).all():
            raise np.linalg.LinAlgError(f"{name} must be finite, got NaN or infinity")
    # PyTorch does not accept negative strides and warns about read-only arrays, so each array is copied
    copies = (np.array(x, np.float64, order="C") for x in (mu1, sigma1, mu2, sigma2))
    return frechet_distance(*map(torch.from_numpy, copies)).item()


def _patch(
    distribution: str, module: str, name: str, parameters: tuple[str, ...], build: Callable[[ModuleType], Callable]
) -> Patch:
    """Replace `module.name(*parameters)` with `build(module)`."""
    package = module.partition(".")[0]
    expected = f"{module}.{name}({', '.join(parameters)})"
    try:
        home = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name == package:
            raise not_found(f"ivfast.patch.{package}()", package) from None
        if f"{module}.".startswith(f"{error.name}."):
            raise _unexpected(distribution, expected, f"there is no module {error.name}") from error
        raise
    function = vars(home).get(name)
    original = _ORIGINALS.get(function, function) if function else None
    if not inspect.isfunction(original):
        raise _unexpected(distribution, expected, f"there is no function {name}")
    if tuple(inspect.signature(original).parameters) != parameters:
        raise _unexpected(distribution, expected, f"it is {name}{inspect.signature(original)}")
    return Patch(package, original, _replacement(build, home, original))


_ORIGINALS: dict[Callable, Callable] = {}  # replacement → original


@functools.cache
def _replacement(build: Callable[[ModuleType], Callable], home: ModuleType, original: Callable) -> Callable:
    replacement = functools.wraps(original)(build(home))
    _ORIGINALS[replacement] = original
    return replacement


def _unexpected(distribution: str, expected: str, found: str) -> RuntimeError:
    try:
        version = importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        version = "of unknown version"
    return RuntimeError(f"{distribution} {version}: expected {expected}, but {found}; nothing was patched")
