"""Inverse square roots of small symmetric matrices, by matrix products.

Newton–Schulz iteration of order 3, which drives A = X a X to I. With E = I − A,

    T = I + E/2 + 3E²/8,  X ← XT,  A ← TAT,

until ‖E‖ is small enough for one last step. Every matrix is a polynomial in a and therefore symmetric. The iteration
takes every eigenvalue of A in (0, 7/3) to 1; a is first divided by s, which is at least λ_max / 2.2. An eigenvalue of
A below 1 grows by up to (15/8)² per step: 24 steps are enough for a condition number of 10¹², and eigenvalues that
are 0 up to rounding stay so small that nothing overflows.

Source: Higham, Functions of Matrices (2008), chapters 6 to 8; Björck & Bowie 1971.
"""

import torch
from torch import Tensor

from .._registry import register

MOST = 128  # rows of the largest matrix that the kernels take
STEPS = 24
LAST = 2e-4  # below this ‖E‖ a step of order 4, T + 5E³/16, is the last: the error, 35 ‖E‖⁴/128, is then 4e-16
CONVERGED = 1e-5


def inverse_root_reference(a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """X = a^−½, Σ √λ and the error ‖I − X a X‖ for symmetric positive semi-definite a `[..., d, d]`.

    The error is that of the iteration, without rounding. It is above `CONVERGED` if a is too ill-conditioned for the
    number of steps, and NaN if a is not finite. Eigenvalues that are 0 up to rounding then have a large inverse root.
    """
    g = a.double()
    eye = torch.eye(g.shape[-1], dtype=g.dtype, device=g.device)
    bound = torch.minimum(g.abs().sum(-1).amax(-1), g.square().sum((-2, -1)).sqrt())
    scale = torch.maximum(trace_of(g) / g.shape[-1], bound / 2.2)
    scale = torch.where(scale == 0, 1, scale)
    A = g / scale[..., None, None]
    X = torch.where(A.isfinite(), eye, A)  # NaN and infinity stay
    error = g.new_full(g.shape[:-2], torch.inf)
    for _ in range(STEPS):
        E = eye - A
        error = torch.where(error <= LAST, error, E.square().sum((-2, -1)).sqrt())
        squared = E @ E
        T = eye + E / 2 + 0.375 * squared
        last = (error <= LAST)[..., None, None]
        X = _symmetric(X @ torch.where(last, T + 0.3125 * (squared @ E), T))
        A = torch.where(last, eye, _symmetric(T @ T @ A))
    X = X / scale.sqrt()[..., None, None]
    # errors of X enter only to second order: Tr √a = Tr(aX) ½ (3 − …), as in one more step of order 2
    M = g @ X
    trace = 1.5 * trace_of(M) - 0.5 * ((M.mT @ M) * X).sum((-2, -1))
    trace = torch.where(error <= LAST, trace, trace_of(M))
    error = torch.where(error <= LAST, 35 / 128 * error**4, error)
    return X.to(a.dtype), trace.to(a.dtype), error.float()


def trace_of(a: Tensor) -> Tensor:
    return a.diagonal(dim1=-2, dim2=-1).sum(-1)


def _symmetric(a: Tensor) -> Tensor:
    return (a + a.mT) / 2


def few_rows_in_cuda(rows: int) -> tuple[str, ...]:
    """Which kernels take matrices of this many rows. The order comes from operation counts, not from timings."""
    return ("cuda", "triton") if 1 <= rows <= MOST else ()


def shared_of(rows: int) -> int:
    """Bytes of shared memory that the CUDA C++ kernels need: two halves of a matrix in float64, in tiles of 4 x 4."""
    side = 16 if rows <= 64 else 32
    return 2 * 8 * 16 * (side * (side + 1) // 2)


inverse_root = register(
    "inverse_root(Tensor a) -> (Tensor inverse, Tensor trace, Tensor error)",
    reference=inverse_root_reference,
    triton="inverse_root.forward",
    cuda=True,
    prefer=lambda a: few_rows_in_cuda(a.shape[-1]),
    shared=lambda a: shared_of(a.shape[-1]),
)
