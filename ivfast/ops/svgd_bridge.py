"""S1's SVGD bridge from codes to the prior N(0, I): iterates of noisy Stein variational gradient descent."""

import torch
from torch import Tensor

from .. import _check
from .._registry import register
from . import median, svgd
from ._derivatives import differentiable
from ._draws import prior_draws
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
        `[t+1, ..., n, d]`, contiguous, in z's dtype. Differentiable in z; forward mode and higher orders take
        O(n²) memory per step.

    Raises:
        TypeError, ValueError: a wrong dtype or shape, counts < 1, or numbers that are not finite.

    Source: S1 (IVAAE) section 4, "MNIST" and Eq. 2.
    """
    z, draws = _check.promoted(z, draws)
    t = check_codes(z, t)
    iterations = _check.count("iterations", iterations)
    step_size = _check.number("step_size", step_size)
    scale = _check.number("scale", scale, positive=True)
    noise = _check.number("noise", noise, non_negative=True)
    draws = prior_draws(z, draws, generator, leading=((t - 1) * iterations + 1,))
    return _bridge(z, draws, t, iterations, step_size, scale, noise)


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
        dx, _, _ = svgd._backward(step_size * g, states[step], None, bandwidths[step], row_sums[step], False)
        g = g + dx
    return (g + arithmetic(grad[0])).to(grad.dtype)


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


def _gradients(backward, grads, inputs, outputs, needed):
    _, _, _, iterations, step_size, *_ = inputs
    return backward(*grads, *outputs, iterations, step_size), None


def _pull(grads, inputs, needed):
    """The gradient through the steps, each differentiable itself."""
    z, *others = inputs
    return torch.func.vjp(lambda z: _steps(z, *others), z)[1](grads[0])[0], None


def _steps(z, draws, t, iterations, step_size, scale, noise):
    x, bridges = arithmetic(z), [z]
    for step, draw in enumerate(draws[:-1].unbind(0)):
        h = scale * median.median_bandwidth(x.detach(), convention="paper")
        x = x + step_size * svgd.direction(x, None, h) + noise * arithmetic(draw)
        if (step + 1) % iterations == 0:
            bridges.append(x.to(z.dtype))
    return torch.stack([*bridges, draws[-1]])


_bridge = differentiable(
    _forward,
    _gradients,
    backward=_backward,
    pull=_pull,
    tensors=2,
    outputs=4,
    saved=slice(1, 4),
    axes=(0, 1),
    out_axes=(1, 1, 1, 1),
)
