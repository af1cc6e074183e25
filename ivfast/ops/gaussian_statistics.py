"""Streaming Gaussian statistics of features, for Fréchet distances.

The state is float64, and means are subtracted before any product: no Σxxᵀ − nμμᵀ. Products of float32 and half
precision samples are float32, over chunks whose sums are accumulated in float64. A chunk's variances are also summed
in blocks. If the product's variances differ from these by more than 2e-6, as happens with an outlier of a thousand
standard deviations, the chunk is computed in float64. Variances are then accurate to 1e-6 and Σ_ij to 2e-6 σ_i σ_j,
for any summation order of the BLAS.
"""

import contextlib
import copy
import importlib.util
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _check
from .._torch import without_autocast
from . import _statistics_file
from .frechet import frechet_distance

# A float32 sum of k squares in one chain has a relative error of about ε√k/4, ε = 6e-8: 1e-6 at k = 4096. It reaches
# kε = 2.4e-4 when a few large squares dominate the sum and the others are rounded against it. Longer chunks save no
# time.
CHUNK = 4096  # rows per product
STRAYED = 2e-6  # relative error of a chunk's float32 variance above which the chunk is computed in float64
BLOCK = 256  # rows of the scatter per product; columns left of the block are skipped: 9/16 of the work at d = 2048
SOME = 16  # samples whose mean is near that of a chunk
FEW = 256  # below this many rows the d x d sum dominates, and float64 products save one of those sums
LEAST, MOST = 1e-30, 1e36  # sums of squares outside are near the ends of float32's range
NARROW = 256  # dimensions up to which a GPU makes one pass over a batch; above, the products are worth cuBLAS


@contextlib.contextmanager
def _state() -> Iterator[None]:
    """Tensors made here can be modified anywhere: no graph, and no inference tensors under `inference_mode`. Products
    are as exact as their dtype, also under autocast."""
    with torch.inference_mode(False), torch.no_grad(), without_autocast():
        yield


class GaussianStatistics:
    """Mean and covariance of samples that arrive in batches, on several devices or in several processes.

    Batches and parts are merged by Chan's formula, S = Σ_i S_i + Σ_i n_i (m_i − m)(m_i − m)ᵀ, in float64. `a + b` and
    `sum([...])` return merged copies.

    Args:
        d: dimension of a sample.
        device: where the statistics live; batches are moved there.

    Attributes:
        count: samples seen; None after loading a pytorch-fid file, which does not store it.
        mean: `[d]`, float64.

    Source: Chan, Golub & LeVeque 1983.
    """

    def __init__(self, d: int, *, device: torch.device | str = "cpu"):
        d = _check.count("d", d)
        with _state():
            self.count: int | None = 0
            self.mean = torch.zeros(d, dtype=torch.float64, device=device)
            # Σ (x − μ)(x − μ)ᵀ, [d, d], or the covariance if count is None; entries below the diagonal are never read
            self._upper = torch.zeros(d, d, dtype=torch.float64, device=device)

    def update(self, x: Tensor) -> "GaussianStatistics":
        """Add a batch of samples `[n, d]` of any floating dtype; raises ValueError for any other shape.

        float64 samples are processed in float64. So are all others on a GPU above d = 256, and on a CPU where float32
        products are set to less than float32 precision (`torch.set_float32_matmul_precision`).
        """
        self._growing("self")
        _check.floating("x", x)
        if x.dim() != 2 or x.shape[1] != len(self.mean):
            raise ValueError(f"x must have shape [n, {len(self.mean)}], got {tuple(x.shape)}")
        if len(x):
            with _state():
                self._add_between(len(x), *self._add_within(x.to(self.mean.device)))
        return self

    def _add_within(self, x: Tensor) -> tuple[int, Tensor]:
        """Add the scatter of each chunk of x about its own mean. Returns the rows per chunk (the last may differ) and
        the means `[k, d]`."""
        if _one_pass(x):
            from ..kernels import gaussian_statistics

            rows, means, scatter = gaussian_statistics.forward(x)
            self._upper += scatter
            return rows, means
        single = x.is_cpu and x.dtype != torch.float64 and len(x) >= FEW and _exact_products()
        rows = math.ceil(len(x) / math.ceil(len(x) / CHUNK))
        whole = len(x) // rows
        together = torch.get_num_threads() if x.shape[1] <= BLOCK else 1  # a small product gets one thread
        groups = [*x[: whole * rows].unflatten(0, (whole, rows)).split(together), x[whole * rows :].unsqueeze(0)]
        means = []
        for group in filter(Tensor.numel, groups):
            found = self._add_single(group) if single else None
            if found is None:
                found = torch.stack([self._add_double(chunk) for chunk in group])
            means.append(found)
        return rows, torch.cat(means)

    def _add_single(self, x: Tensor) -> Tensor | None:
        """Add the scatter of each x[k] in float32 and return the means. Returns None and adds nothing where float32 is
        too inaccurate."""
        rows, means = _centred(x.float())
        products = [torch.bmm(rows[..., i : i + BLOCK].mT, rows[..., i:]) for i in range(0, x.shape[-1], BLOCK)]
        rounded = torch.cat([product.diagonal(dim1=-2, dim2=-1) for product in products], -1)
        squares = rows.square_().sum(1)  # PyTorch sums in blocks: accurate to about 4e-7 in any order of the samples
        right = (squares >= LEAST) & (squares <= MOST) & ((rounded - squares).abs_() <= STRAYED * squares)
        if not right.all() and (~right.unsqueeze(1) & (x != x[:, :1])).any():  # a constant dimension is exactly 0
            return None
        for i, product in enumerate(products):
            for part in product:
                self._upper[i * BLOCK : (i + 1) * BLOCK, i * BLOCK :] += part
        self._upper.diagonal().add_((squares - rounded).sum(0))  # small, so float32 is enough
        return means

    def _add_double(self, x: Tensor) -> Tensor:
        """Add the scatter of x in float64 and return its mean."""
        x, mean = _centred(x.double())
        self._add_products(x)
        return mean

    def _add_products(self, x: Tensor) -> None:
        """Add xᵀx in float64."""
        for i in range(0, x.shape[1], BLOCK):
            self._upper[i : i + BLOCK, i:].addmm_(x[:, i : i + BLOCK].mT, x[:, i:])

    def _add_between(self, n: int, rows: int, means: Tensor) -> None:
        """Add Σ_i n_i (m_i − m)(m_i − m)ᵀ for `self` and the chunks of n samples, whose scatters are already in."""
        counts = means.new_full((len(means) + 1,), rows)  # made on the device, without synchronising
        seen = self.count or 0
        counts[0], counts[-1] = seen, n - rows * (len(means) - 1)
        base = self.mean if seen else means[0]
        deltas = F.pad(
            means - base, (0, 0, 1, 0)
        )  # small even where means are large; the delta of `self` is 0 or has no weight
        self.count = seen + n
        shift = (counts / self.count) @ deltas
        self._add_products((deltas - shift) * counts.sqrt().unsqueeze(1))
        self.mean = base + shift

    def merge(self, other: "GaussianStatistics") -> "GaussianStatistics":
        """Add the samples that `other` has seen."""
        self._same("other", other)
        self._growing("self")
        other._growing("other")
        if other.count:
            with _state():
                count, mean = other.count, other.mean.to(self.mean.device)  # `other` may be `self`
                self._upper += other._upper.to(self.mean.device)
                self._add_between(count, count, mean.unsqueeze(0))
        return self

    def __deepcopy__(self, memo) -> "GaussianStatistics":
        found = copy.copy(self)
        with _state():
            found.mean, found._upper = self.mean.clone(), self._upper.clone()
        return found

    def __add__(self, other: "GaussianStatistics") -> "GaussianStatistics":
        if not isinstance(other, GaussianStatistics):
            return NotImplemented
        return copy.deepcopy(self).merge(other)

    def __radd__(self, other: int) -> "GaussianStatistics":
        return copy.deepcopy(self) if isinstance(other, int) and other == 0 else NotImplemented  # sum() starts from 0

    def all_reduce(self, group=None) -> "GaussianStatistics":
        """Merge the statistics of every rank of a `torch.distributed` group into each of them, in O(d²) memory.

        Call it once, at the end of a stream: a second call would count every sample once more per rank.

        Raises:
            ValueError: on every rank, if ranks differ in d or one of them has no count.
        """
        import torch.distributed as dist

        from . import _collectives

        d, device = self.mean.shape[0], self.mean.device
        ranks = dist.get_world_size(group)
        with _state():
            own = torch.tensor([d, -1 if self.count is None else self.count], device=device)
            gathered = own.new_empty(ranks, 2)
            _collectives.all_gather(gathered.view(-1), own, group)
            table = gathered.tolist()
            for rank, (other_d, count) in enumerate(table):
                if other_d != table[0][0]:
                    raise ValueError(f"d must match that of rank 0: {table[0][0]}, got {other_d} on rank {rank}")
                if count < 0:
                    raise ValueError(f"rank {rank} has statistics without a count of samples, which cannot be merged")
            means = self.mean.new_empty(ranks, d)
            _collectives.all_gather(means.view(-1), self.mean.contiguous(), group)
            counts = [count for _, count in table]
            total = sum(counts)
            if not total:
                return self
            base = means[counts.index(max(counts))]
            # a rank that has seen nothing has mean 0 and no weight
            shift = sum((mean - base) * (count / total) for count, mean in zip(counts, means, strict=True))
            merged = copy.deepcopy(self)  # a failure leaves `self` unchanged
            merged._add_products(((self.mean - base - shift) * math.sqrt(self.count or 0)).unsqueeze(0))
            _collectives.all_reduce(merged._upper, group=group)
            self._upper, self.mean, self.count = merged._upper, base + shift, total
        return self

    @property
    def scatter(self) -> Tensor:
        """Σ (x − μ)(x − μ)ᵀ `[d, d]` in float64."""
        self._growing("self")
        return _symmetric(self._upper)

    @property
    def covariance(self) -> Tensor:
        """Unbiased covariance `[d, d]` in float64; raises ValueError before the second sample."""
        if self.count is None:
            return _symmetric(self._upper)
        if self.count < 2:
            raise ValueError(f"covariance needs at least 2 samples, got {self.count}")
        return _symmetric(self._upper) / (self.count - 1)

    def frechet_distance(self, other: "GaussianStatistics") -> Tensor:
        """Fréchet distance to `other`, a float64 scalar on the device of `self`: `ivfast.frechet_distance`."""
        self._same("other", other)
        theirs = (x.to(self.mean.device) for x in (other.mean, other.covariance))
        return frechet_distance(self.mean, self.covariance, *theirs)

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of `mean`, and of `count` and `scatter`, or of `covariance` if the count is unknown."""
        if self.count is None:
            return {"mean": self.mean.clone(), "covariance": self.covariance}
        return {"count": torch.tensor(self.count, device="cpu"), "mean": self.mean.clone(), "scatter": self.scatter}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore a `state_dict`. A state that does not fit raises KeyError or ValueError and changes nothing."""
        matrix = "scatter" if "count" in state else "covariance"
        for name, own in (("mean", self.mean), (matrix, self._upper)):
            if name not in state:
                raise KeyError(f"state must hold count, mean and scatter, or mean and covariance, got {list(state)}")
            if state[name].shape != own.shape:
                raise ValueError(f"state[{name!r}] must have shape {tuple(own.shape)}, got {tuple(state[name].shape)}")
            if not state[name].is_floating_point():
                raise ValueError(f"state[{name!r}] must be floating, got {state[name].dtype}")
        if "count" in state and (state["count"].numel() != 1 or state["count"].is_floating_point()):
            raise ValueError(f"state['count'] must be one integer, got {state['count']}")
        count = int(state["count"]) if "count" in state else None
        if count is not None:
            _check.count("state['count']", count, at_least=0)
        with _state():
            self.count = count
            self.mean = state["mean"].to(self.mean, copy=True)
            self._upper = state[matrix].to(self._upper, copy=True)

    def save(self, path: str | os.PathLike) -> None:
        """Write `mu` and `sigma` in pytorch-fid's format, and `count`. A failed write leaves the old file in place.

        Raises:
            ValueError: fewer than 2 samples (use `state_dict` for those), a sample that was not finite, or a path that
                does not end in .npz.
            OSError: the file cannot be written.
        """
        path = Path(path)
        if path.suffix != ".npz":
            raise ValueError(f"path must end in .npz, by which pytorch-fid recognises statistics, got {path}")
        arrays: dict[str, Any] = {"mu": self.mean.cpu().numpy(), "sigma": self.covariance.cpu().numpy()}
        if not all(np.isfinite(array).all() for array in arrays.values()):
            raise ValueError("statistics must be finite, got NaN or infinity")
        if self.count is not None:
            arrays["count"] = np.int64(self.count)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            with open(temporary, "wb") as file:
                np.savez(file, **arrays)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)  # already gone if the rename succeeded

    @classmethod
    def load(cls, path: str | os.PathLike, *, device: torch.device | str = "cpu") -> "GaussianStatistics":
        """Read an .npz file written by `save` or pytorch-fid; statistics from pytorch-fid give distances but cannot be
        updated.

        Raises:
            ValueError: not an .npz file, a damaged one, or one without a finite `mu [d]`, a covariance `sigma [d, d]`
                and, if there is a `count`, an integer of at least 2. The message names the file.
            OSError: the file cannot be read.
        """
        mean, covariance, count = _statistics_file.read(path)
        state = {"mean": mean, "covariance": covariance}
        if count is not None:
            state = {"mean": mean, "count": torch.tensor(count, device="cpu"), "scatter": covariance * (count - 1)}
        stats = cls(len(mean), device=device)
        stats.load_state_dict(state)
        return stats

    def _same(self, name: str, other: "GaussianStatistics") -> None:
        if not isinstance(other, GaussianStatistics):
            raise TypeError(f"{name} must be GaussianStatistics, got {type(other).__name__}")
        if other.mean.shape != self.mean.shape:
            raise ValueError(f"{name} must have d = {self.mean.shape[0]}, got d = {other.mean.shape[0]}")

    def _growing(self, name: str) -> None:
        if self.count is None:
            raise ValueError(
                f"{name} must have a count of samples, got statistics of mu and sigma only, which serve distances"
            )


def _centred(x: Tensor) -> tuple[Tensor, Tensor]:
    """x minus its mean, and the mean in float64.

    The mean is c + mean(x − c), where c is the mean of a few samples from all parts of x. The result is exact to
    ε max|x − c| however far the mean is from 0.
    """
    near = x[..., :: math.ceil(x.shape[-2] / SOME), :].mean(-2, keepdim=True)
    rows = x - near
    shift = rows.mean(-2, keepdim=True)
    return rows.sub_(shift), (near.double() + shift).squeeze(-2)


def _symmetric(upper: Tensor) -> Tensor:
    return upper.triu() + upper.triu(1).mT


def _one_pass(x: Tensor) -> bool:
    """Whether x uses the Triton kernel."""
    return x.is_cuda and x.dtype != torch.float64 and x.shape[1] <= NARROW and bool(importlib.util.find_spec("triton"))


def _exact_products() -> bool:
    """Whether PyTorch multiplies float32 on the CPU in float32 rather than in bfloat16 or TF32."""
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # set by torch at import
    return matmul.fp32_precision in ("none", "ieee")
