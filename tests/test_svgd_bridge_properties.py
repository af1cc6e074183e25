"""The gradient of the SVGD bridge by finite differences."""

import torch

import ivfast
from ivfast.testing import error

DOUBLE = torch.float64


def normal(*shape, dtype=DOUBLE):
    return torch.randn(*shape, dtype=dtype)


def test_svgd_bridge_gradient_by_finite_differences_with_the_bandwidths_held():
    """The bandwidth is constant in the gradient, so differentiate a trajectory with frozen bandwidths."""
    z, draws = normal(7, 3).requires_grad_(), normal(3, 7, 3)
    bandwidths = []
    x = z.detach()
    for draw in draws[:-1]:
        bandwidths.append(100 * ivfast.median_bandwidth(x, convention="paper"))
        x = x + ivfast.svgd_direction(x, bandwidth=bandwidths[-1]) + 0.1 * draw

    def frozen(z):
        x = z
        for h, draw in zip(bandwidths, draws[:-1], strict=True):
            x = x + ivfast.svgd_direction(x, bandwidth=h) + 0.1 * draw
        return x

    assert torch.autograd.gradcheck(frozen, z)
    weights = normal(7, 3)
    ours = torch.autograd.grad((ivfast.svgd_bridge(z, 2, draws=draws)[1] * weights).sum(), z)[0]
    assert error(ours, torch.autograd.grad((frozen(z) * weights).sum(), z)[0]) < 1e-10
