"""Argument checks whose messages name the argument and both sides; they run before any kernel."""

import functools
import math
import operator
from typing import SupportsFloat, SupportsIndex

import torch
from torch import Tensor

from ._torch import autocasting, constant

LARGEST = 2**63 - 1  # of an integer in PyTorch
FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def floating(name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a Tensor, got {type(x).__name__}")
    if x.dtype not in FLOATING:
        raise TypeError(f"{name} must be float32, float64, bfloat16 or float16, got {x.dtype}")


def promoted(*tensors):
    """Under autocast, tensors of different floating dtypes in the dtype that they promote to, as PyTorch's losses take
    them; otherwise as they are, and the checks say which differs."""
    if not autocasting():
        return tensors
    dtypes = [x.dtype for x in tensors if isinstance(x, Tensor) and x.dtype in FLOATING]
    if all(dtype == dtypes[0] for dtype in dtypes):
        return tensors
    widest = functools.reduce(torch.promote_types, dtypes)
    return tuple(x.to(widest) if isinstance(x, Tensor) and x.dtype in FLOATING else x for x in tensors)


def samples(name: str, x: Tensor, *, at_least: int = 1) -> None:
    """`x` is a set of n samples in d dimensions, `[..., n, d]`."""
    floating(name, x)
    shape = x.shape
    if len(shape) < 2:
        raise ValueError(f"{name} must have shape [..., n, d], got {tuple(shape)}")
    if shape[-2] < at_least or shape[-1] < 1:
        raise ValueError(f"{name} must hold n >= {at_least} samples of d >= 1 dimensions, got {tuple(shape)}")


def square(name: str, x: Tensor) -> None:
    """`x` holds matrices `[..., d, d]`, d >= 1, of a floating dtype."""
    floating(name, x)
    if x.dim() < 2 or x.shape[-1] != x.shape[-2] or not x.shape[-1]:
        raise ValueError(f"{name} must have shape [..., d, d] with d >= 1, got {tuple(x.shape)}")


def same(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    """`x` has the shape, dtype and device of `other`."""
    alike(name, x, other_name, other)
    if x.shape != other.shape:
        raise ValueError(f"{name} must match {other_name}: {tuple(other.shape)}, got {tuple(x.shape)}")


def alike(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    """`x` has the dtype and device of `other`, which is already checked."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a Tensor, got {type(x).__name__}")
    if x.dtype != other.dtype:
        raise TypeError(f"{name} must match {other_name}: {other.dtype}, got {x.dtype}")
    if x.device != other.device:
        raise ValueError(f"{name} must match {other_name}: device {other.device}, got {x.device}")


def two_samples(x_name: str, x: Tensor, y_name: str, y: Tensor, *, at_least: int = 1) -> None:
    """`x [..., n, d]` and `y [..., m, d]` agree in everything except the number of samples."""
    samples(x_name, x, at_least=at_least)
    samples(y_name, y, at_least=at_least)
    alike(y_name, y, x_name, x)
    if x.shape[:-2] != y.shape[:-2] or x.shape[-1] != y.shape[-1]:
        raise ValueError(f"{y_name} must match {x_name} except for n: {tuple(x.shape)}, got {tuple(y.shape)}")


def choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def number(name: str, value: SupportsFloat, *, positive: bool = False, non_negative: bool = False) -> float:
    """`value` as Python's float or int, from any real type such as NumPy's or a tensor without dimensions."""
    if not isinstance(value, int | float):
        value = _real(name, value)
    # comparisons, because Dynamo has no math.isfinite of a number that varies between calls
    if not -math.inf < value < math.inf or (positive and value <= 0) or (non_negative and value < 0):
        kind = "finite and positive" if positive else "finite and >= 0" if non_negative else "finite"
        raise ValueError(f"{name} must be {kind}, got {value}")
    return value


def _real(name: str, value: SupportsFloat) -> float:
    if getattr(value, "ndim", 0) or not hasattr(value, "__float__"):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if isinstance(value, Tensor) and not constant(value):
        raise TypeError(f"{name} must be a number, through which no derivative flows, got a Tensor that needs one")
    return float(value)


def count(name: str, value: SupportsIndex, *, at_least: int = 1) -> int:
    """`value` as Python's int, from any integer type such as NumPy's or a tensor without dimensions."""
    found = value if isinstance(value, int) else _integer(value)
    if found is None or isinstance(found, bool) or found < at_least:
        raise ValueError(f"{name} must be an integer >= {at_least}, got {value!r}")
    if found > LARGEST:
        raise ValueError(f"{name} must be an integer from {at_least} to 2^63 - 1, got {value!r:.80}")
    return found


def _integer(value: SupportsIndex) -> int | None:
    if getattr(value, "ndim", 0) or str(getattr(value, "dtype", "")).endswith("bool"):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None
