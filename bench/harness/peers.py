"""The best other ways to compute what ivfast computes. Each is checked against float64 before it is timed."""

import functools
import math
import os
import types
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def compiled(function: Callable) -> Callable:
    """`function` under torch.compile, for exactly the shapes it is called with."""

    @functools.cache
    def build():
        return torch.compile(function, fullgraph=True, dynamic=False)

    return lambda *args, **keywords: build()(*args, **keywords)


def svgd_matmul(x: Tensor, score: Tensor, h: float) -> Tensor:
    """SVGD direction of x [..., n, d]: K by one addmm of the centred particles, then K V."""
    x = x - x.mean(-2, keepdim=True)
    norms = x.square().sum(-1)
    norms = norms[..., :, None] + norms[..., None, :]
    product = torch.addmm if x.dim() == 2 else torch.baddbmm
    kernel = product(norms, x, x.mT, beta=-1 / h, alpha=2 / h).clamp_max(0).exp()
    return (kernel @ (score - (2 / h) * x) + (2 / h) * kernel.sum(-1, keepdim=True) * x) / x.shape[-2]


def svgd_cdist(x: Tensor, score: Tensor, h: float) -> Tensor:
    """SVGD direction of x [..., n, d] through torch.cdist."""
    kernel = torch.exp(torch.cdist(x, x).square() / -h)
    return (kernel @ (score - (2 / h) * x) + (2 / h) * kernel.sum(-1, keepdim=True) * x) / x.shape[-2]


def svgd_attention(x: Tensor, score: Tensor, h: float) -> Tensor:
    """SVGD direction of x [..., n, d] by fused attention, which never writes K.

    Key j's logit is 2 x_i·x_j/h − ‖x_j‖²/h. One more key, of logit ‖x_i‖²/h and of value (0, 1), brings out the
    denominator: the last column is 1/(r_i + 1), and the others are (K V)_i/(r_i + 1).
    """
    x = x - x.mean(-2, keepdim=True)
    norms = x.square().sum(-1, keepdim=True) / h
    query = torch.cat([(2 / h) * x, torch.ones_like(norms), norms], -1)
    key = F.pad(torch.cat([x, -norms], -1), (0, 1, 0, 1))
    value = F.pad(score - (2 / h) * x, (0, 2, 0, 1))
    last = torch.zeros_like(value)
    last[..., -1, -1] = 1
    heads = (part.reshape(-1, 1, *part.shape[-2:]) for part in (query, key + last, value + last))
    out = F.scaled_dot_product_attention(*heads, scale=1.0).view(*x.shape[:-1], -1)
    total = 1 / out[..., -1:]  # r + 1
    return (total * out[..., :-2] + (2 / h) * (total - 1) * x) / x.shape[-2]


def svgd_keops(x: Tensor, score: Tensor, h: float) -> Tensor:
    """SVGD direction of x [..., n, d] by a KeOps reduction, which never writes K: K [V, 1] in one pass."""
    for name in ("PYKEOPS_VERBOSE", "KEOPS_VERBOSE"):
        os.environ.setdefault(name, "0")
    from pykeops.torch import LazyTensor

    x_i, x_j = LazyTensor(x[..., :, None, :].contiguous()), LazyTensor(x[..., None, :, :].contiguous())
    values = torch.cat([score - (2 / h) * x, torch.ones_like(x[..., :1])], -1)
    sums = (-(x_i - x_j).sqnorm2() / h).exp() @ values
    return (sums[..., :-1] + (2 / h) * sums[..., -1:] * x) / x.shape[-2]


def bind_jax(function: Callable, tensors, cotangent: Tensor | None):
    """One jitted call of `function` on jax arrays that are there already, with its gradients by jax.vjp."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    import jax

    jax.config.update("jax_default_matmul_precision", "highest")  # TF32 is not what the others compute

    def pulled(arrays, cotangent):
        out, pull = jax.vjp(function, *arrays)
        return (out, *pull(cotangent))

    def plain(arrays, cotangent):
        return (function(*arrays),)

    run = jax.jit(plain if cotangent is None else pulled)
    arrays = [jax.numpy.array(x.cpu().numpy()) for x in tensors]
    cotangent = None if cotangent is None else jax.numpy.array(cotangent.cpu().numpy())
    return lambda: jax.block_until_ready(run(arrays, cotangent))


def svgd_jax(x, score, h: float):
    """SVGD direction of a jax array x [n, d] by matrix algebra."""
    import jax.numpy as jnp

    x = x - x.mean(0)
    norms = jnp.square(x).sum(1)
    kernel = jnp.exp(jnp.minimum((2 * x @ x.T - norms[:, None] - norms) / h, 0))
    return (kernel @ (score - (2 / h) * x) + (2 / h) * kernel.sum(1, keepdims=True) * x) / len(x)


def svgd_blackjax(x, score, h: float):
    """SVGD direction of a jax array x [n, d] by blackjax's own kernel.

    Its score is a function of a particle, so a particle carries its score with it; an optimiser whose state is the
    gradient that it is given hands out −φ.
    """
    import jax
    import optax
    from blackjax.vi import svgd

    taps = optax.GradientTransformation(lambda particles: particles, lambda gradient, *_: (gradient, gradient))
    state = svgd.init({"x": x, "score": score}, {"h": h}, taps)

    def kernel(a, b, h):
        return svgd.rbf_kernel(a["x"], b["x"], length_scale=h)

    def gradient(particle):
        return {"x": particle["score"], "score": jax.numpy.zeros_like(particle["score"])}

    return -svgd.build_kernel(taps)(state, gradient, kernel).opt_state["x"]


def median_pdist(x: Tensor) -> Tensor:
    """med²/log n of x [n, d] as it is usually written; torch.median is the lower of two middles."""
    return torch.pdist(x).median().square() / math.log(len(x))


def median_cdist(x: Tensor) -> Tensor:
    """The same over the full matrix: n zeros, then each distance twice."""
    n = len(x)
    lower = (n * (n - 1) // 2 - 1) // 2
    return torch.cdist(x, x).flatten().kthvalue(n + 2 * lower + 1).values.square() / math.log(n)


def median_sort(x: Tensor) -> Tensor:
    """The same by sorting, with the mean of the two middles."""
    ordered = torch.pdist(x).sort().values
    count = len(ordered)
    return ((ordered[(count - 1) // 2] + ordered[count // 2]) / 2).square() / math.log(len(x))


def median_jax(x):
    """blackjax's heuristic, its distances by matrix algebra."""
    import jax.numpy as jnp

    x = x - x.mean(0)
    norms = jnp.square(x).sum(1)
    d2 = jnp.maximum(norms[:, None] + norms - 2 * x @ x.T, 0)
    return jnp.square(jnp.median(jnp.sqrt(d2[jnp.tril_indices(len(x), k=-1)]))) / jnp.log(len(x))


def svgd_bridge(z: Tensor, t: int, draws: Tensor | None = None) -> Tensor:
    """S1's bridge of z [n, d] as a loop: two noisy steps from one bridge to the next, the bandwidth anew in each."""
    x, bridges = z, [z]
    for step in range(2 * (t - 1)):
        h = 100 * median_pdist(x.detach())
        x = x + svgd_cdist(x, -x, h) + 0.1 * (torch.randn_like(x) if draws is None else draws[step])
        if step % 2:
            bridges.append(x)
    bridges.append(torch.randn_like(z) if draws is None else draws[-1])
    return torch.stack(bridges)


WAE_SCALES = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)


def mmd(x: Tensor, y: Tensor) -> Tensor:
    """WAE's unbiased MMD² of x and y [n, d] for a standard normal prior: its loop over scales."""
    n, d = x.shape
    norms_x, norms_y = x.square().sum(1, keepdim=True), y.square().sum(1, keepdim=True)
    within_x, within_y = (a + a.T - 2 * z @ z.T for a, z in ((norms_x, x), (norms_y, y)))
    between = norms_x + norms_y.T - 2 * x @ y.T
    others = 1 - torch.eye(n, dtype=x.dtype, device=x.device)
    value = 0.0
    for scale in WAE_SCALES:
        c = 2.0 * d * scale
        within = (c / (c + within_x) + c / (c + within_y)) * others
        value = value + within.sum() / (n * n - n) - (c / (c + between)).sum() * 2 / (n * n)
    return value


def mmd_keops(x: Tensor, y: Tensor) -> Tensor:
    """The same by KeOps reductions, which never write a matrix; the pairs of a sample with itself are taken off."""
    for name in ("PYKEOPS_VERBOSE", "KEOPS_VERBOSE"):
        os.environ.setdefault(name, "0")
    from pykeops.torch import LazyTensor

    n, d = x.shape

    def total(a, b):
        r2 = (LazyTensor(a[:, None]) - LazyTensor(b[None])).sqnorm2()
        kernel = sum(2.0 * d * scale / (2.0 * d * scale + r2) for scale in WAE_SCALES)
        return kernel.sum(1).sum()

    themselves = 2 * n * len(WAE_SCALES)
    return (total(x, x) + total(y, y) - themselves) / (n * n - n) - total(x, y) * 2 / (n * n)


def as_distance(mu_r: Tensor, logvar_r: Tensor, mu_g: Tensor, logvar_g: Tensor) -> Tensor:
    """log S_rr + log S_gg − 2 log S_rg of diagonal Gaussians [n, d], as one writes it: n×n×d arrays."""

    def log_mean(a, logvar_a, b, logvar_b):
        s = logvar_a.exp()[:, None] + logvar_b.exp()
        log_k = -0.5 * ((2 * math.pi * s).log() + (a[:, None] - b).square() / s).sum(-1)
        return log_k.flatten().logsumexp(0) - math.log(log_k.numel())

    within = log_mean(mu_r, logvar_r, mu_r, logvar_r) + log_mean(mu_g, logvar_g, mu_g, logvar_g)
    return within - 2 * log_mean(mu_r, logvar_r, mu_g, logvar_g)


def as_distance_additive(mu_r: Tensor, logvar_r: Tensor, mu_g: Tensor, logvar_g: Tensor) -> Tensor:
    """The same with a kernel per dimension, averaged over pairs and dimensions."""

    def log_mean(a, logvar_a, b, logvar_b):
        s = logvar_a.exp()[:, None] + logvar_b.exp()
        log_k = -0.5 * ((2 * math.pi * s).log() + (a[:, None] - b).square() / s)
        return log_k.flatten().logsumexp(0) - math.log(log_k.numel())

    within = log_mean(mu_r, logvar_r, mu_r, logvar_r) + log_mean(mu_g, logvar_g, mu_g, logvar_g)
    return within - 2 * log_mean(mu_r, logvar_r, mu_g, logvar_g)


def pytorch_fid(*statistics: Tensor) -> Tensor:
    """pytorch-fid's, by SciPy's square root; SciPy 1.18 took away an argument that it passes."""
    import scipy.linalg
    from pytorch_fid import fid_score

    linalg = fid_score.linalg
    fid_score.linalg = types.SimpleNamespace(sqrtm=lambda a, disp: (scipy.linalg.sqrtm(a), None))
    try:
        return torch.tensor(fid_score.calculate_frechet_distance(*(x.numpy() for x in statistics)))
    finally:
        fid_score.linalg = linalg


def torchmetrics_fid(mu1: Tensor, sigma1: Tensor, mu2: Tensor, sigma2: Tensor) -> Tensor:
    """torchmetrics', by the eigenvalues of Σ₁Σ₂."""
    from torchmetrics.image.fid import _compute_fid

    return _compute_fid(mu1, sigma1, mu2, sigma2)


def torch_fidelity_fid(mu1: Tensor, sigma1: Tensor, mu2: Tensor, sigma2: Tensor) -> Tensor:
    """torch-fidelity's, in NumPy."""
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric

    both = ({"mu": mu.numpy(), "sigma": sigma.numpy()} for mu, sigma in ((mu1, sigma1), (mu2, sigma2)))
    return torch.tensor(fid_statistics_to_metric(*both, False)[KEY_METRIC_FID], dtype=torch.float64)
