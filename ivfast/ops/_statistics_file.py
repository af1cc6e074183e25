"""Files of Gaussian statistics, .npz as pytorch-fid writes them: nothing in them is believed before it is checked."""

import io
import math
import os
import zipfile
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
import torch
from numpy.lib import format as npy
from torch import Tensor

MOST = 1 << 53  # samples; float64 counts exactly up to here
DEFLATE = 1032  # bytes that one byte of deflate stands for at most
ROUNDING = 1e-2  # of σ_i σ_j; sums in float32 and storage in float16 move Σ_ij, and Σ's eigenvalues, by less


class _Member(NamedTuple):
    """An array of an .npz file whose header is read and whose size is checked."""

    file: IO[bytes]
    shape: tuple[int, ...]
    fortran: bool
    dtype: np.dtype

    def read(self) -> np.ndarray:
        values = np.frombuffer(self.file.read(), self.dtype)  # to the end, where zipfile compares the checksum
        return values.reshape(self.shape, order="F" if self.fortran else "C")


def read(path: str | os.PathLike) -> tuple[Tensor, Tensor, int | None]:
    """Mean `[d]` and symmetric covariance `[d, d]` in float64, and the number of samples if the file has it.

    Raises:
        ValueError: it is damaged or holds something else; the message names the file.
        OSError: it cannot be read.
    """
    content = Path(path).read_bytes()
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            _check_directory(archive, content)
            names = set(archive.namelist())
            members = {
                name: _member(archive, f"{name}.npy") for name in ("mu", "sigma", "count") if f"{name}.npy" in names
            }
            _check_headers(members, names)
            arrays = {name: member.read() for name, member in members.items()}
    except _Refused as error:
        raise ValueError(f"{path}: {error}") from None
    except Exception as error:  # a damaged file may raise anything
        raise ValueError(f"{path} is not an .npz file of arrays: {error or type(error).__name__}") from error
    try:
        return _statistics(arrays)
    except _Refused as error:
        raise ValueError(f"{path}: {error}") from None


class _Refused(ValueError):
    """A whole file that does not hold statistics."""


def _check_directory(archive: zipfile.ZipFile, content: bytes) -> None:
    """A member is in the directory and in front of its data, by one name, and their number is in the last record."""
    for info in archive.infolist():
        archive.open(info).close()  # compares the names
    end = content.rfind(b"PK\5\6")
    said = int.from_bytes(content[end + 10 : end + 12], "little")
    if said not in (len(archive.infolist()), 0xFFFF):
        raise ValueError(f"its directory has {len(archive.infolist())} of {said} members")


def _member(archive: zipfile.ZipFile, name: str) -> _Member:
    info = archive.getinfo(name)
    if info.file_size > DEFLATE * info.compress_size:
        raise ValueError(f"{name} claims {info.file_size:,} bytes, compressed to {info.compress_size:,}")
    file = archive.open(info)
    header = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}[npy.read_magic(file)]
    shape, fortran, dtype = header(file)
    needed = math.prod(shape) * dtype.itemsize
    if needed != info.file_size - file.tell():
        raise ValueError(f"{name} claims {needed:,} bytes of numbers, and has {info.file_size - file.tell():,}")
    return _Member(file, shape, fortran, dtype)


def _check_headers(members: dict[str, _Member], names: set[str]) -> None:
    if not {"mu", "sigma"} <= members.keys():
        found = sorted(name.removesuffix(".npy") for name in names)
        raise _Refused(f"it must hold mu and sigma, got {found}")
    mu, sigma, count = members["mu"], members["sigma"], members.get("count")
    for name, member in (("mu", mu), ("sigma", sigma)):
        if member.dtype.kind not in "fiu":
            raise _Refused(f"{name} must hold real numbers, got {member.dtype}")
    d = math.prod(mu.shape)
    square = [(d, d), ()] if d == 1 else [(d, d)]  # numpy.cov of one feature has no dimensions
    if mu.shape not in ((d,), ()) or d == 0 or sigma.shape not in square:
        raise _Refused(f"mu and sigma must be [d] and [d, d], got {list(mu.shape)}, {list(sigma.shape)}")
    if count is not None and (count.dtype.kind not in "iu" or count.shape != ()):
        raise _Refused(f"count must be one integer, got {count.dtype} {list(count.shape)}")


def _statistics(arrays: dict[str, np.ndarray]) -> tuple[Tensor, Tensor, int | None]:
    with np.errstate(over="ignore"):  # an extended number beyond float64 becomes infinite, which is refused
        mean, sigma = (torch.from_numpy(arrays[name].astype(np.float64)) for name in ("mu", "sigma"))
    mean = mean.reshape(-1)
    sigma = sigma.reshape(len(mean), len(mean))
    for name, x in (("mu", mean), ("sigma", sigma)):
        if not bool(x.isfinite().all()):
            raise _Refused(f"{name} must be finite, got NaN or infinity")
    count = int(arrays["count"]) if "count" in arrays else None
    if count is not None and not 2 <= count <= MOST:
        raise _Refused(f"count must be at least 2 and at most 2^53, got {count}")
    covariance = sigma / 2 + sigma.mT / 2
    _check_covariance(sigma, covariance)
    if not bool((covariance.diagonal() * ((count or 2) - 1)).isfinite().all()):
        raise _Refused(f"sigma must have a finite sum over {count:,} samples, got variances to {covariance.max():g}")
    return mean, covariance, count


def _check_covariance(sigma: Tensor, covariance: Tensor) -> None:
    """Symmetric and without negative eigenvalues, up to rounding, in units of the standard deviations."""
    variance = covariance.diagonal()
    if bool((variance < 0).any()):
        raise _Refused(f"sigma must be a covariance, got the variance {variance.min():g}")
    inverse = torch.where(variance > 0, variance, 1).rsqrt()  # a feature that never varies has a row of zeros
    scale = inverse.unsqueeze(1)
    uneven = float(((sigma - covariance) * scale * inverse).abs().max())
    if uneven > ROUNDING / 2:
        raise _Refused("sigma must be symmetric, and is not")
    correlation = covariance * scale * inverse
    correlation.diagonal().add_(ROUNDING)
    if int(torch.linalg.cholesky_ex(correlation).info):
        raise _Refused("sigma must be a covariance, and has a negative eigenvalue")
