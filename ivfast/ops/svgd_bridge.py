"""S1's SVGD bridge from codes to the prior N(0, I): iterates of noisy Stein variational gradient descent."""

import torch
from torch import Tensor

from .. import _check
from .._registry import register
from . import median, svgd
from ._draws import prior_draws
from ._once import once_differentiable
from ._pairwise import arithmetic
from .bridge import check_codes


def svgd_bridge(
    z: Tensor,
    t: int,
    *,
    iterations: int = 2,
    step_size: float = 1.0,
    scale: float = 100.0,
    noise: float = 0.1,
    draws: Tensor | None = None,
    generator=None,
) -> Tensor:
    """T_0 = z, then t − 1 iterates of SVGD towards N(0, I), `iterations` steps apart, then T_t drawn from the prior.

    One step is z ← z + step_size φ(z) + noise ε, with h = scale·med²/log n of the current particles ("paper"
    convention). No gradient flows through h; gradients flow through the steps.

    Args:
        z: codes `[..., n, d]`; leading dimensions are independent particle sets.
        t: number of steps of the bridge.
        iterations: SVGD steps per bridge step.
        step_size, scale, noise: ε, the factor on h₀ and the standard deviation of the noise after each step.
        draws: standard normal `[(t−1)·iterations + 1, ..., n, d]`, the last of them for T_t; None draws them.
        generator: random generator for `draws`.

    Returns:
        `[t+1, ..., n, d]`, contiguous, in z's dtype. Differentiable once in z.

    Raises:
        TypeError, ValueError: a wrong dtype or shape, counts < 1, or numbers that are not finite.

    Source: S1 (IVAAE) section 4, "MNIST" and Eq. 2.
    """
    check_codes(z, t)
    _check.count("iterations", iterations)
    _check.number("step_size", step_size)
    _check.number("scale", scale, positive=True)
    _check.number("noise", noise, non_negative=True)
    draws = prior_draws(z, draws, generator, leading=((t - 1) * iterations + 1,))
    arguments = z, draws, t, iterations, step_size, scale, noise
    if z.requires_grad and torch.is_grad_enabled():
        return _SvgdBridge.apply(*arguments)
    return _forward(*arguments)[0]


def svgd_bridge_reference(z, draws, t, iterations, step_size, scale, noise):
    """The bridge and, for backward, every particle set `[L, ..., n, d]` at which φ was evaluated, its h `[L, ...]` and
    its row sums `[L, ..., n]`, L = (t−1)·iterations."""
    x = arithmetic(z)
    heuristic = median.heuristic(z.shape[-2], "paper")
    bridges, states, bandwidths, row_sums = [z], [], [], []
    for step, draw in enumerate(draws[:-1].unbind(0)):
        h = scale * median._forward(x, *heuristic)[0]
        phi, row_sum = svgd._forward(x, None, h)
        states.append(x)
        bandwidths.append(h)
        row_sums.append(row_sum)
        x = x + step_size * phi + noise * arithmetic(draw)
        if (step + 1) % iterations == 0:
            bridges.append(x.to(z.dtype))
    bridges.append(draws[-1])

    def stacked(tensors, shape):
        return torch.stack(tensors) if tensors else x.new_empty(0, *shape)

    return (
        torch.stack(bridges),
        stacked(states, z.shape),
        stacked(bandwidths, z.shape[:-2]),
        stacked(row_sums, z.shape[:-1]),
    )


def _backward_reference(grad, states, bandwidths, row_sums, iterations, step_size):
    g = torch.zeros_like(arithmetic(grad[0]))
    for step in reversed(range(states.shape[0])):
        if (step + 1) % iterations == 0:
            g = g + arithmetic(grad[(step + 1) // iterations])
        dx, _, _ = svgd._backward(step_size * g, states[step], None, bandwidths[step], row_sums[step])
        g = g + dx
    return (g + arithmetic(grad[0])).to(grad.dtype)


class _SvgdBridge(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z, draws, t, iterations, step_size, scale, noise):
        bridges, *saved = _forward(z, draws, t, iterations, step_size, scale, noise)
        ctx.save_for_backward(*saved)
        ctx.steps = iterations, step_size
        return bridges

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return _backward(grad, *ctx.saved_tensors, *ctx.steps), *[None] * 6


def _prefer(z, *_):
    """CUDA C++ for small sets, otherwise Triton. Both compute in float32."""
    if z.dtype == torch.float64:
        return ()
    return ("cuda", "triton") if z.shape[-2] <= 256 and z.shape[-1] <= 128 else ("triton",)


_forward = register(
    "svgd_bridge(Tensor z, Tensor draws, int t, int iterations, float step_size, float scale, float noise)"
    " -> (Tensor bridges, Tensor states, Tensor bandwidths, Tensor row_sums)",
    reference=svgd_bridge_reference,
    triton="svgd_bridge.forward",
    cuda=True,
    prefer=_prefer,
)
_backward = register(
    "svgd_bridge_backward(Tensor grad, Tensor states, Tensor bandwidths, Tensor row_sums, int iterations,"
    " float step_size) -> Tensor",
    reference=_backward_reference,
    triton="svgd_bridge.backward",
    cuda=True,
    prefer=lambda grad, states, bandwidths, row_sums, *_: _prefer(grad[0]),
)
