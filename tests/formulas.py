"""The definition of every op in float64, for the fuzz: direct differences, explicit pairs, nothing from ivfast.

A formula has the op's name and arguments, and PyTorch differentiates it. It returns what the op's docstring says, in an
order of operations that loses no more digits than the problem does.
"""

import math

import torch
from rounded import bent, factorized, levers, others, scaled, squares
from torch import Tensor

FULL = ("liu-wang", "numpyro")  # conventions that count the diagonal and each pair twice


def root(x: Tensor) -> Tensor:
    """√x with derivative 0 at 0."""
    return torch.where(x > 0, torch.where(x > 0, x, 1).sqrt(), x)


def middle(values: Tensor, tie: float = 1e-5) -> Tensor:
    """The median over the last dimension; values that agree to `tie` share its gradient."""
    count = values.shape[-1]
    ordered = values.detach().sort(-1).values
    both = []
    for place in ((count - 1) // 2, count // 2):
        m = ordered[..., place, None]
        tied = (values.detach() - m).abs() <= tie * m.abs()
        # their mean has the right gradient, the order statistic the right value
        mean = (values * tied).sum(-1) / tied.sum(-1)
        both.append(m.squeeze(-1) + (mean - mean.detach()))
    return (both[0] + both[1]) / 2


def pair_distances(x: Tensor, convention: str) -> Tensor:
    """The squared distances that a convention takes the median of."""
    n = x.shape[-2]
    d2 = squares(x, x)
    if convention in FULL or n == 1:
        return d2.flatten(-2)
    i, j = torch.triu_indices(n, n, 1)
    return d2[..., i, j]


def median_bandwidth(x: Tensor, convention: str = "liu-wang") -> Tensor:
    n = x.shape[-2]
    d2 = pair_distances(x, convention)
    med2 = middle(d2) if convention == "liu-wang" else middle(root(d2)).square()
    spread = (x - x[..., :1, :]).square().sum((-2, -1)).detach() / n
    divisor = math.log(n + 1 if convention == "liu-wang" or n == 1 else n)
    h = torch.where(med2 > 0, med2, torch.where(spread > 0, spread, divisor)) / divisor
    return h + 0 * x.detach().sum((-2, -1))  # NaN for a particle that is NaN


def svgd_direction(x, score=None, bandwidth="median", scale=1.0, convention="liu-wang"):
    h = median_bandwidth(x.detach(), convention) if isinstance(bandwidth, str) else bandwidth
    h = (torch.as_tensor(h, dtype=x.dtype) * scale).expand(x.shape[:-2])[..., None, None]
    s = -x if score is None else score
    centre, served = x.mean(-2, keepdim=True), 128 * h[..., 0, 0]
    # [i, j, d]; derivatives of x_i − x_i would cancel in exact arithmetic only
    difference = (x.unsqueeze(-2) - x.unsqueeze(-3)) * others(x) + levers(x, x, centre, served)
    k = torch.exp(-squares(x, x, centre, served) / h).unsqueeze(-1)
    return (k * (s.unsqueeze(-3) + 2 / h.unsqueeze(-1) * difference)).mean(-2)


def svgd_bridge(z, draws, t, iterations=2, step_size=1.0, scale=100.0, noise=0.1):
    x, bridge = z, [z]
    for step in range(1, t):
        for draw in draws[(step - 1) * iterations : step * iterations]:
            x = x + step_size * svgd_direction(x, scale=scale, convention="paper") + noise * draw
        bridge.append(x)
    return torch.stack([*bridge, draws[-1]])


def blockwise_bridge(z, draws, t):
    width = z.shape[-1] // t
    return torch.stack([torch.cat((draws[..., : k * width], z[..., k * width :]), -1) for k in range(t + 1)])


def radial_bridge(z, draws, t):
    inner = [math.cos(k * math.pi / 2 / t) * z + math.sin(k * math.pi / 2 / t) * draws for k in range(1, t)]
    return torch.stack([z, *inner, draws])


def block_substitute(z, draws, index, k):
    blocks, new = z.unflatten(-1, (k, -1)), draws.unflatten(-1, (k, -1))
    chosen = torch.nn.functional.one_hot(index.long(), k).bool().unsqueeze(-1)
    return torch.where(chosen, new, blocks).flatten(-2)


def exponential_remainder(x: Tensor) -> Tensor:
    """e^x − 1 − x, as Σ_{k>=2} x^k/k! where the difference would cancel."""
    small = torch.where(x.abs() < 1, x, 0)
    series = torch.full_like(small, 1 / math.factorial(22))  # its second derivative is off by x²¹/21!
    for k in range(21, 1, -1):
        series = series * small + 1 / math.factorial(k)
    return torch.where(x.abs() < 1, series * small.square(), x.expm1() - x)


def gaussian_kl(mu, logvar):
    return (mu.square() + exponential_remainder(logvar)).sum(-1) / 2


def reparameterize(mu, logvar, draws):
    return mu + (logvar / 2).exp() * draws, gaussian_kl(mu, logvar)


def softplus(x):
    """log(1 + eˣ), with derivatives also where eˣ overflows."""
    return torch.where(x > 0, x, 0) + torch.where(x > 0, -x, x).exp().log1p()


def reconstruction_loss(output, target, kind="l2"):
    x, t = output, target
    if kind == "bce":  # −t log σ(x) − (1 − t) log σ(−x)
        loss = t * softplus(-x) + (1 - t) * softplus(x)
    else:
        loss = (x - t) ** 2 if kind == "l2" else (x - t).abs()
    return loss.flatten(1).sum(1) if loss.dim() > 1 else loss.clone()


def importance_weighted_loss(logits):
    weights = torch.softmax(logits.detach(), -1)
    return (weights * softplus(-logits)).sum(-1)


def exp_elbo_loss(reconstruction, kl, scale=1.0, beta_reconstruction=1.0, beta_kl=1.0, alpha=2.0):
    exponent = torch.zeros_like(kl)
    for beta, term in ((beta_reconstruction, reconstruction), (beta_kl, kl)):
        if beta * scale:
            exponent = exponent - alpha * scale * beta * term
    return torch.where(exponent > 80, 80, exponent).exp().mean(-1) / alpha


def row_losses(logits: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """The cross-entropy of each row with its smoothed class `[..., C, n]`."""
    classes = logits.shape[-1]
    blocks = logits.unflatten(0, (classes, -1)) if logits.dim() == 2 else logits
    own = torch.eye(classes, dtype=logits.dtype).unsqueeze(-2) * (1 - label_smoothing) + label_smoothing / classes
    x = blocks - blocks.detach().amax(-1, keepdim=True)
    log_p = x - x.exp().sum(-1, keepdim=True).log()
    return -torch.where(own == 0, 0, own * log_p).sum(-1) + 0 * blocks.sum(-1)


def multi_js_loss(logits, weights=None, label_smoothing=0.0):
    blocks = row_losses(logits, label_smoothing).mean(-1)
    return blocks.mean(-1) if weights is None else (blocks * weights).sum(-1)


def multi_js_block_losses(logits):
    return row_losses(logits).mean(-1)


def multi_js_divergence(logits, weights=None):
    pi = torch.full(logits.shape[-1:], 1 / logits.shape[-1], dtype=logits.dtype) if weights is None else weights
    return -torch.where(pi > 0, pi * pi.log(), 0).sum() - multi_js_loss(logits, pi)


def linear_multi_js_loss(features, weight, bias=None, weights=None, label_smoothing=0.0):
    logits = features.reshape(-1, features.shape[-1]) @ weight.mT
    return multi_js_loss(logits if bias is None else logits + bias, weights, label_smoothing)


def mmd(x, y, kernel="imq", scales=None, bandwidth=None, unbiased=True):
    if scales is None:
        scales = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0) if kernel == "imq" else (1.0,)
    if bandwidth is None:
        bandwidth = 2.0 * x.shape[-1] if kernel == "imq" else "median"
    if isinstance(bandwidth, str):
        pooled = torch.cat((x, y), -2).detach()
        bandwidth = median_bandwidth(pooled, "paper") * math.log(pooled.shape[-2])
        if pooled.shape[-2] > 1:  # h = 1 where all coincide
            same = (pooled == pooled[..., :1, :]).all(-1).all(-1)
            bandwidth = torch.where(same, 1, bandwidth)
    b = torch.as_tensor(bandwidth, dtype=x.dtype)[..., None, None]

    centre, served = torch.cat((x, y), -2).detach().mean(-2, keepdim=True), 64 * min(scales) * b[..., 0, 0]

    def mean(a, c, within):
        d2 = squares(a, c, centre, served)
        k = sum(s * b / (s * b + d2) if kernel == "imq" else torch.exp(-d2 / (s * b)) for s in scales)
        if not (within and unbiased):
            return k.mean((-2, -1))
        n = k.shape[-1]
        return (k * (1 - torch.eye(n, dtype=k.dtype))).sum((-2, -1)) / (n * (n - 1))

    return mean(x, x, True) + mean(y, y, True) - 2 * mean(x, y, False)


def log_normal(x: Tensor, log_variance: Tensor) -> Tensor:
    """log N(x; 0, e^log_variance)."""
    return -(math.log(2 * math.pi) + log_variance + (x * (-log_variance / 2).exp()).square()) / 2


def log_kernel(a, b, kernel, measure):
    """log k_ij: the integral of N(z; u_i, l_i) N(z; u_j, l_j), which is N(u_i − u_j; 0, s) N(z; m, v) with s = l_i + l_j,
    m = (u_i l_j + u_j l_i)/s and v = l_i l_j/s. Against N(z; 0, 1) the second factor leaves N(m; 0, 1 + v)."""
    (u, p), (w, q) = a, b  # q, p: log-variances
    u, p, w, q = u.unsqueeze(-2), p.unsqueeze(-2), w.unsqueeze(-3), q.unsqueeze(-3)
    s = torch.logaddexp(p, q)
    l = log_normal(u - w, s)
    if measure == "prior":
        m = u * (q - s).exp() + w * (p - s).exp()
        v = p + q - s
        l = l + log_normal(m, torch.logaddexp(torch.zeros_like(v), v))
    return l.sum(-1) if kernel == "product" else torch.logsumexp(l, -1) - math.log(l.shape[-1])


def log_gaussian_kernel_sums(
    mu_r, logvar_r, mu_g, logvar_g, kernel="product", measure="lebesgue", unbiased=False
) -> Tensor:
    r, g = (mu_r, logvar_r), (mu_g, logvar_g)
    sums = []
    for a, b in ((r, r), (g, g), (r, g)):
        k = log_kernel(a, b, kernel, measure)
        if unbiased and a is b:
            k = torch.where(torch.eye(k.shape[-1], dtype=torch.bool), -1e300, k)
        sums.append(torch.logsumexp(k.flatten(-2), -1))
    return torch.stack(sums, -1)


def as_distance(mu_r, logvar_r, mu_g, logvar_g, kernel="product", measure="lebesgue", log=False, unbiased=False):
    sums = log_gaussian_kernel_sums(mu_r, logvar_r, mu_g, logvar_g, kernel, measure, unbiased)
    n, m = mu_r.shape[-2], mu_g.shape[-2]
    pairs = (n * (n - 1), m * (m - 1), n * m) if unbiased else (n * n, m * m, n * m)
    rr, gg, rg = (x - math.log(p) for x, p in zip(sums.unbind(-1), pairs, strict=True))
    return rr + gg - 2 * rg if log else rr.exp() + gg.exp() - 2 * rg.exp()


def covariance_factor(x: Tensor) -> tuple[Tensor, Tensor]:
    """The mean, and n − 1 rows C with CᵀC the covariance: Helmert's contrasts, which no mean reaches."""
    n = x.shape[-2]
    j = torch.arange(1, n, dtype=x.dtype)
    helmert = torch.tril(torch.ones(n - 1, n, dtype=x.dtype)) - torch.diag(j, 1)[:-1]
    relative = x - x[..., :1, :]  # of duplicates and constant columns exactly 0
    C = (helmert / (j * (j + 1)).sqrt().unsqueeze(-1)) @ relative / (n - 1) ** 0.5
    return x[..., 0, :] + relative.mean(-2), C


def spoiled(m: Tensor) -> Tensor:
    """0, or NaN for a matrix that is not finite, `[..., 1, 1]`."""
    return 0 * m.detach().sum((-2, -1), keepdim=True)


def finite(m: Tensor) -> Tensor:
    """m with zeros for matrices that are not finite."""
    return torch.where(spoiled(m) == 0, m, 0)


def nuclear_norm(m: Tensor) -> Tensor:
    """The sum of the singular values; those that are 0 up to rounding have no gradient."""
    m, mark = finite(m), spoiled(m)[..., 0, 0]
    S = scaled(torch.linalg.svdvals(factorized(m)))
    there = 1e-13 * S[..., :1] < S
    return torch.where(there, S, 0).sum(-1) + bent(m, torch.where(there, S, math.inf)) + mark


def fld(z):
    mu, C = covariance_factor(z)
    return mu.square().sum(-1) + C.square().sum((-2, -1)) + z.shape[-1] - 2 * nuclear_norm(C)


def frechet_distance_from_samples(x, y):
    (mu1, C1), (mu2, C2) = covariance_factor(x), covariance_factor(y)
    sizes = C1.square().sum((-2, -1)) + C2.square().sum((-2, -1))
    return (mu1 - mu2).square().sum(-1) + sizes - 2 * nuclear_norm(C1 @ C2.mT)


def sqrtm_spd(a):
    """S S = a by Newton's method from a root without gradient: S ← S + X, S X + X S = a − S². Each step doubles the order
    of the derivatives that are right, so two give second derivatives. A singular matrix has a root only."""
    a = (a + a.mT) / 2
    values, V = torch.linalg.eigh(finite(a).detach())
    S = (V * values.clamp_min(0).sqrt().unsqueeze(-2)) @ V.mT
    if not (values[..., 0] > 1e-12 * values[..., -1]).all():
        return S + spoiled(a)
    eye = torch.eye(a.shape[-1], dtype=a.dtype)
    for _ in range(2):
        pencil = torch.einsum("ik,...jl->...ijkl", eye, S) + torch.einsum("...ik,jl->...ijkl", S, eye)
        right = (a - S @ S).flatten(-2).unsqueeze(-1)
        S = S + torch.linalg.solve(pencil.flatten(-4, -3).flatten(-2, -1), right).view(a.shape)
    return S + spoiled(a)


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """Tr √(Σ₁Σ₂) = Tr √(S Σ₂ S), S = √Σ₁."""
    S = sqrtm_spd(sigma1)
    trace = sqrtm_spd(S @ sigma2 @ S)
    traces = [x.diagonal(dim1=-2, dim2=-1).sum(-1) for x in (sigma1, sigma2, trace)]
    return (mu1 - mu2).square().sum(-1) + traces[0] + traces[1] - 2 * traces[2]


def polar(m):
    """m (mᵀm)^−½, or (mmᵀ)^−½ m; U Vᵀ over the rank where m has none of full rank."""
    if m.shape[-2] < m.shape[-1]:
        return polar(m.mT).mT
    U, S, Vh = torch.linalg.svd(factorized(finite(m)).detach(), full_matrices=False)
    if (S[..., -1] > 1e-6 * S[..., 0]).all():
        factor = torch.linalg.solve(sqrtm_spd(m.mT @ m), m, left=False)
    else:
        factor = (U * (1e-11 * S[..., :1] < S).unsqueeze(-2)) @ Vh  # rounding stays below
    return factor + spoiled(m)


def gaussian_statistics(x):
    """The mean and the unbiased covariance."""
    mu, C = covariance_factor(x)
    return mu, C.mT @ C
