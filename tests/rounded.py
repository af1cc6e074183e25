"""The building blocks of formulas that round as the kernels' order of operations does, while the fuzz asks for it.

Kernels take squared distances, sums of differences and singular values from products of whole matrices. That loses digits
which the problem has, a known share of them; without the fuzz, these are the exact definitions.
"""

from collections.abc import Callable

import torch
from torch import Tensor

# Set by the fuzz: the rounding of squared distances, relative to the norms from whose products they come,
gram: Callable | None = None
# and of differences x_i − x_j in sums Σ_j a_ij (x_i − x_j) that are computed as (Σ_j a_ij) x_i − Σ_j a_ij x_j.
lever: Callable | None = None


def squares(x: Tensor, y: Tensor, centre: Tensor | None = None, served: Tensor | None = None) -> Tensor:
    """‖x_i − y_j‖² `[..., n, m]`; `centre` is near the mean of all points, and `served` as in `levers`."""
    d2 = (x.unsqueeze(-2) - y.unsqueeze(-3)).square().sum(-1)
    if gram is None:
        return d2
    centre = x.mean(-2, keepdim=True) if centre is None else centre
    norms = [(a - centre).square().sum(-1).amax(-1) for a in (x.detach(), y.detach())]
    rows = gram(d2[..., 0])  # a row's norm is rounded once for all its pairs
    columns = rows if x is y else gram(d2[..., 0, :])
    loss = gram(d2)
    loss = loss.triu(1) + loss.triu(1).mT if x is y else loss
    loss = (loss + rows.unsqueeze(-1) + columns.unsqueeze(-2)) * torch.maximum(*norms)[..., None, None]
    rounded = torch.where(d2 > 0, (d2 + loss).clamp_min(0), d2)
    if served is None:
        return rounded
    moved = (x - x.detach()).unsqueeze(-2) - (y - y.detach()).unsqueeze(-3)  # 0, with the derivatives of x_i − y_j
    return rounded + 2 * (moved * levers(x, y, centre, served)).sum(-1)


def levers(x: Tensor, y: Tensor, centre: Tensor, served: Tensor) -> Tensor | float:
    """The rounding of x_i − y_j `[..., n, m, d]` as kernels have it: of the distances of both from `centre`. They work in
    float32 up to squared distances of `served` (csrc/README.md), and in float64 beyond."""
    if lever is None:
        return 0.0
    both = torch.cat((x, y), -2).detach()
    radius = (both - centre.detach()).square().sum(-1).amax(-1).sqrt()
    rounding = lever(x.unsqueeze(-2) - y.unsqueeze(-3), radius, both.abs().amax((-2, -1)), served.detach().sqrt())
    return rounding * others(x) if x is y else rounding


def others(x: Tensor) -> Tensor:
    """0 for the pair of a row with itself, otherwise 1, `[n, n, 1]`."""
    return 1 - torch.eye(x.shape[-2], dtype=x.dtype).unsqueeze(-1)


def factorized(m: Tensor) -> Tensor:
    """m as its Gram matrix has it, off by rounding of ‖m‖² over its smallest singular value. Kernels take eigenvalues of
    the Gram matrix up to its condition number of 10⁸ (inverse_root_kernel.h), and singular values beyond it, which are
    stable."""
    if gram is None:
        return m
    S = torch.linalg.svdvals(m.detach())
    condition = S[..., :1] / S[..., -1:]
    scale = torch.where(condition <= 1.1e4, condition, 1) * S[..., :1]
    return m + gram(m) * scale.nan_to_num(0).unsqueeze(-1)


def bent(m: Tensor, S: Tensor) -> Tensor | float:
    """0, with the rounding of the second derivatives of m's nuclear norm: that of a projection, over the smallest of the
    singular values S. Formulas in which the projection is empty have none."""
    if gram is None or not S.shape[-1]:
        return 0.0
    return (gram(m) * (m - m.detach()).square()).sum((-2, -1)) / S.detach().amin(-1)


def scaled(S: Tensor) -> Tensor:
    """Singular values whose derivatives round as those of a polar factor C (CᵀC)^−½ do: by the share of a Gram matrix's
    rounding in an eigenvalue. Beyond the condition number of `factorized`, without."""
    if gram is None or not S.shape[-1]:
        return S
    share = (S[..., :1] / S).square().detach()
    share = torch.where(share <= 1.2e8, share, 0)
    return S + gram(S) * share * (S - S.detach())
