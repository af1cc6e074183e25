"""SVGD direction at a fixed bandwidth: `pytest bench/svgd.py`, `ivfast bench svgd`."""

import torch

import ivfast

from .harness import peers
from .harness.problem import BACKWARD, Problem, Provider


def at_fixed_bandwidth(function):
    return lambda x, score: function(x, score, float(x.shape[-1]))


def exact(tensors, cotangent, rows=64, above=8192):
    """φ_i and the gradients for some particles i, in O(n) memory, where n is too large for n × n matrices.

    The loss depends on particle i through φ_i, and through its term in every other φ_j.
    """
    x, score = tensors
    n, h = x.shape[-2], float(x.shape[-1])
    if n <= above or x.dim() > 2:
        return None
    chosen = torch.linspace(0, n - 1, rows, dtype=torch.float64).long().to(x.device)
    x_i, s_i = (t[chosen].clone().requires_grad_() for t in tensors)

    def terms(at, x, score):
        """Σ_j [k(x_j, at) s_j + ∇_{x_j} k(x_j, at)]/n over the particles that are given."""
        d2 = at.square().sum(1, keepdim=True) + x.square().sum(1) - 2 * at @ x.mT
        kernel = torch.exp(-d2 / h)
        return (kernel @ (score - (2 / h) * x) + (2 / h) * kernel.sum(1, keepdim=True) * at) / n

    phi = terms(x_i, x.index_put((chosen,), x_i), score.index_put((chosen,), s_i))
    others = cotangent.index_fill(0, chosen, 0)
    loss = (cotangent[chosen] * phi).sum() + (others * terms(x, x_i, s_i)).sum()
    gradients = torch.autograd.grad(loss, (x_i, s_i))
    return [(chosen, value) for value in (phi.detach(), *gradients)]


def work(size, what):
    """K and K V; backward recomputes K and multiplies four more times."""
    *_, n, d = size
    return (14 if what == BACKWARD else 4) * n * d * torch.Size(size[:-1]).numel()


PROBLEM = Problem(
    op="svgd_direction",
    axes="n×d",
    sizes=((64, 16), (100, 64), (128, 128), (1024, 64)),
    long_sizes=((4096, 64), (8192, 128), (65536, 64)),
    gpu_sizes=((64, 64, 16),),
    draw=lambda size: (torch.randn(size), torch.randn(size)),
    output=lambda size: size,
    function=lambda x, score: ivfast.svgd_direction(x, score, bandwidth=float(x.shape[-1])),
    peers=(
        Provider("eager", at_fixed_bandwidth(peers.svgd_matmul), squares=(3, 6)),
        Provider("eager-cdist", at_fixed_bandwidth(peers.svgd_cdist), squares=(3, 6)),
        Provider("compile", at_fixed_bandwidth(peers.compiled(peers.svgd_matmul)), squares=(2, 4), compiles=True),
        Provider("attention", at_fixed_bandwidth(peers.svgd_attention)),
        Provider("keops", at_fixed_bandwidth(peers.svgd_keops), packages=("pykeops",), compiles=True),
        Provider("jax", at_fixed_bandwidth(peers.svgd_jax), packages=("jax",), devices=("cpu",), bind=peers.bind_jax,
                 squares=(2, 4), compiles=True),
        Provider("blackjax", at_fixed_bandwidth(peers.svgd_blackjax), packages=("jax", "blackjax"), devices=("cpu",),
                 bind=peers.bind_jax, cubes=(1, 6), compiles=True),
    ),
    work=work,
    squares=(5, 9),
    exact=exact,
)  # fmt: skip


def test_svgd(timed):
    timed()
