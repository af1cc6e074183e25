"""What an optional part needs and is not installed: said in one line, with the extra that brings it."""

import contextlib
import sys
from collections.abc import Iterator
from importlib.util import find_spec

# package as it is imported: its name for pip, and the extra
PACKAGES = {
    "torchvision": ("torchvision", "train"),
    "PIL": ("Pillow", "train"),
    "sklearn": ("scikit-learn", "train"),
    "pytorch_fid": ("pytorch-fid", "train"),
    "safetensors": ("safetensors", "train"),
    "matplotlib": ("matplotlib", "train"),
    "tensorboard": ("tensorboard", "train"),
    "typer": ("typer", "train"),
    "rich": ("rich", "train"),
    "torchmetrics": ("torchmetrics", "metrics"),
    "torch_fidelity": ("torch-fidelity", "metrics"),
    "pykeops": ("pykeops", "bench"),
    "jax": ("jax", "bench"),
    "blackjax": ("blackjax", "bench"),
}


class PackageNotFound(ModuleNotFoundError):
    """A package of an extra is not installed; the message is one line with the command that installs it."""


def not_found(who: str, package: str) -> PackageNotFound:
    name, extra = PACKAGES[package]
    return PackageNotFound(f'{who} needs {name}: pip install "ivfast[{extra}]"', name=package)


@contextlib.contextmanager
def needs(who: str) -> Iterator[None]:
    """Inside the block, or the decorated function, an import of a package of an extra raises `PackageNotFound`."""
    try:
        yield
    except PackageNotFound:
        raise
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in PACKAGES or _installed(package):
            raise
        raise not_found(who, package) from None


@contextlib.contextmanager
def command(who: str) -> Iterator[None]:
    """`needs` for a command: one line on stderr and exit code 2."""
    try:
        with needs(who):
            yield
    except PackageNotFound as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def check(who: str, *packages: str) -> None:
    """Raise `PackageNotFound` for the first of `packages` that is not installed, without importing any."""
    for package in packages:
        if not _installed(package):
            raise not_found(who, package)


def require(who: str, *packages: str) -> None:
    """`check` for a command: one line on stderr and exit code 2."""
    with command(who):
        check(who, *packages)


def _installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except (ImportError, ValueError):
        return False
