"""What the papers prove about the ops: closed forms, invariances and limits, on fresh random inputs."""

import math

import numpy as np
import pytest
import torch

import ivfast
from ivfast.testing import error

DOUBLE = torch.float64


def normal(*shape, dtype=DOUBLE):
    return torch.randn(*shape, dtype=dtype)


# SVGD


def test_svgd_direction_is_liu_and_wangs_formula():
    x, s, h = normal(9, 3), normal(9, 3), 1.7
    difference = x.unsqueeze(1) - x.unsqueeze(0)  # x_i − x_j
    k = torch.exp(-difference.square().sum(-1) / h)
    phi = (k @ s + (2 / h) * (difference * k.unsqueeze(-1)).sum(1)) / 9
    assert error(ivfast.svgd_direction(x, s, bandwidth=h), phi) < 1e-12


def test_svgd_direction_repels():
    """With no score, two particles part; the gradient index that S1's Eq. 2 prints would pull them together."""
    x = torch.tensor([[0.0], [1.0]])
    phi = ivfast.svgd_direction(x, torch.zeros_like(x), bandwidth=1.0)
    assert phi[0] < 0 < phi[1]


def test_svgd_direction_moves_with_translation_rotation_and_permutation():
    x, s = normal(20, 5), normal(20, 5)
    phi = ivfast.svgd_direction(x, s, bandwidth=4.0)
    assert error(ivfast.svgd_direction(x + 7, s, bandwidth=4.0), phi) < 1e-10
    q = torch.linalg.qr(normal(5, 5)).Q
    assert error(ivfast.svgd_direction(x @ q, s @ q, bandwidth=4.0), phi @ q) < 1e-12
    order = torch.randperm(20)
    assert error(ivfast.svgd_direction(x[order], s[order], bandwidth=4.0), phi[order]) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_svgd_direction_of_coincident_particles_is_the_score(dtype):
    x = normal(1, 6, dtype=dtype).repeat(17, 1) * 10
    assert error(ivfast.svgd_direction(x), -x) < 1e-5
    assert error(ivfast.svgd_direction(x[:1]), -x[:1]) < 1e-6
    wide, narrow = ivfast.svgd_direction(x, bandwidth=1e12), ivfast.svgd_direction(x + 1, bandwidth=1e-3)
    assert torch.isfinite(wide).all()
    assert torch.isfinite(narrow).all()


@pytest.mark.parametrize(("scale", "variance"), [(1.0, 0.21), (100.0, 0.99)])
def test_svgd_converges_to_the_shrunk_variance_that_s1_reports(scale, variance):
    x = normal(64, 16, dtype=torch.float32) * 2 + 1
    for _ in range(2000 if scale == 1 else 8000):
        x = x + ivfast.svgd_direction(x, scale=scale, convention="paper")
    assert float(x.var(0, unbiased=False).mean()) == pytest.approx(variance, abs=0.015)
    assert float(x.mean(0).abs().max()) < 0.05


@pytest.mark.parametrize("n", [1, 2, 3, 20, 31])
def test_median_bandwidth_follows_numpy_in_every_convention(n):
    x = normal(n, 4)
    distance = torch.cdist(x, x).numpy()
    below = distance[np.tril_indices(n, -1)]
    expected = {
        "liu-wang": np.median(distance**2) / math.log(n + 1),
        "numpyro": np.median(distance) ** 2 / math.log(max(n, 2)),
        "blackjax": np.median(below) ** 2 / math.log(max(n, 2)) if n > 1 else 0,
        "paper": np.median(below) ** 2 / math.log(max(n, 2)) if n > 1 else 0,
    }
    for convention, h in expected.items():
        actual = float(ivfast.median_bandwidth(x, convention=convention))
        if h > 0:
            assert actual == pytest.approx(h, rel=1e-6)
        else:  # no distance to take: mean squared distance from the first particle, or 1
            assert 0 < actual < math.inf


def test_median_bandwidth_of_ties_and_duplicates():
    assert float(ivfast.median_bandwidth(torch.ones(5, 3) * 1e4)) == 1.0
    grid = torch.tensor([[0.0], [1.0], [2.0], [3.0]])  # distances 1, 1, 1, 2, 2, 3
    assert float(ivfast.median_bandwidth(grid, convention="paper")) == pytest.approx(1.5**2 / math.log(4))
    assert error(ivfast.median_bandwidth(7 * grid), 49 * ivfast.median_bandwidth(grid)) < 1e-6


def test_no_gradient_flows_through_the_median_unless_asked():
    x = normal(12, 3).requires_grad_()
    h = ivfast.median_bandwidth(x)
    direction = normal(12, 3)

    def gradient(bandwidth):
        return torch.autograd.grad((ivfast.svgd_direction(x, bandwidth=bandwidth) * direction).sum(), x)[0]

    assert torch.equal(gradient("median"), gradient(h.detach()))
    assert error(gradient(h), gradient(h.detach())) > 1e-4


# Bridges


def bridges_of(z, t=4):
    return {
        "blockwise": ivfast.blockwise_bridge(z, t),
        "radial": ivfast.radial_bridge(z, t),
        "svgd": ivfast.svgd_bridge(z, t),
    }


def test_bridges_leave_the_standard_normal_unchanged():
    n, d = 2000, 16
    for name, bridge in bridges_of(normal(n, d, dtype=torch.float32)).items():
        for k, zk in enumerate(bridge):
            # FLD of n exact draws is near d²/4n + d/n = 0.04; SVGD with 0.1 noise stays within a few times that
            assert float(ivfast.fld(zk)) < 0.12, f"{name} T_{k}"


def test_bridges_begin_at_the_code_and_end_at_the_prior():
    z, other, draws = normal(30, 8), normal(30, 8), normal(30, 8)
    for f in (ivfast.blockwise_bridge, ivfast.radial_bridge):
        bridge = f(z, 4, draws=draws)
        assert torch.equal(bridge[0], z)
        assert torch.equal(bridge[-1], draws)
        assert torch.equal(f(other, 4, draws=draws)[-1], bridge[-1])
        assert bridge.is_contiguous()
    draws = normal(7, 30, 8)
    bridge = ivfast.svgd_bridge(z, 4, draws=draws)
    assert torch.equal(bridge[0], z)
    assert torch.equal(bridge[-1], draws[-1])
    x = z
    for draw in draws[:2]:
        x = x + ivfast.svgd_direction(x, scale=100.0, convention="paper") + 0.1 * draw
    assert error(bridge[1], x) < 1e-12


def test_generators_repeat_the_draws():
    z = normal(6, 4)
    for f in (ivfast.blockwise_bridge, ivfast.radial_bridge, ivfast.svgd_bridge):
        first, second = (f(z, 2, generator=torch.Generator().manual_seed(3)) for _ in range(2))
        assert torch.equal(first, second)


def test_blockwise_bridge_replaces_the_first_k_blocks():
    z, draws = torch.zeros(3, 8), torch.ones(3, 8)
    expected = torch.tensor([[0] * 8, [1, 1] + [0] * 6, [1] * 4 + [0] * 4, [1] * 6 + [0] * 2, [1] * 8])
    assert torch.equal(ivfast.blockwise_bridge(z, 4, draws=draws)[:, 0], expected.float())


def test_block_substitute_replaces_one_block_and_leaves_the_normal_unchanged():
    z, draws = torch.zeros(3, 6), torch.ones(3, 6)
    expected = [[1, 1, 0, 0, 0, 0], [0, 0, 1, 1, 0, 0], [0, 0, 0, 0, 1, 1]]
    assert ivfast.block_substitute(z, 3, torch.arange(3), draws=draws).int().tolist() == expected
    z = normal(4000, 8)
    assert float(ivfast.fld(ivfast.block_substitute(z, 4, torch.randint(4, (4000,))))) < 0.03


def test_svgd_bridge_gradient_by_finite_differences_with_the_bandwidths_held():
    """The bandwidth is a constant of the gradient, so differentiate a trajectory whose bandwidths are frozen."""
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


# Multi-class Jensen–Shannon


def optimal_logits(samples, log_densities):
    """`[C, n, C]`: log p_c' at the samples of each p_c, the logits of the optimal classifier."""
    return torch.stack([torch.stack([f(z) for f in log_densities], -1) for z in samples])


@pytest.mark.parametrize("a", [0.0, 0.25, 0.5, 0.75, 1.0])
def test_square_fitting(a):
    """S2 Example 1: JS of the two squares is log 2 for every a, with their interventions (1 + a) log 2."""
    corners = [(0.0, 0.0), (a, 1.0), (0.0, 1.0), (a, 0.0)]  # α, β, γ₁, γ₂: uniform on unit squares
    axis = (torch.arange(200, dtype=DOUBLE) + 0.5) / 200
    unit = torch.cartesian_prod(axis, axis)

    def log_density(corner):
        def f(z):
            inside = ((z >= z.new_tensor(corner)) & (z < z.new_tensor(corner) + 1)).all(-1)
            return torch.where(inside, 0.0, -60.0).to(DOUBLE)

        return f

    def js(squares):
        samples = [unit + unit.new_tensor(corner) for corner in squares]
        return ivfast.multi_js_divergence(optimal_logits(samples, [log_density(corner) for corner in squares]))

    assert float(js(corners[:2])) == pytest.approx(math.log(2), rel=1e-9)
    assert float(js(corners)) == pytest.approx((1 + a) * math.log(2), rel=1e-9)


def test_multi_js_is_cross_entropy_with_block_labels():
    logits = normal(35, 7) * 3
    labels = torch.arange(7).repeat_interleave(5)
    assert error(ivfast.multi_js_loss(logits), torch.nn.functional.cross_entropy(logits, labels)) < 1e-12
    weights = torch.rand(7, dtype=DOUBLE)
    per_row = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    expected = (per_row.view(7, 5).mean(1) * weights).sum()
    assert error(ivfast.multi_js_loss(logits, weights=weights), expected) < 1e-12


def test_multi_js_bounds():
    """Equal distributions: log(t + 1). Disjoint supports: 0."""
    assert float(ivfast.multi_js_loss(torch.zeros(5, 8, 5))) == pytest.approx(math.log(5))
    confident = 1e4 * torch.eye(5).unsqueeze(1).expand(5, 8, 5)
    assert float(ivfast.multi_js_loss(confident)) == 0.0
    assert float(ivfast.multi_js_divergence(confident)) == pytest.approx(math.log(5))


def test_multi_js_of_the_optimal_classifier_is_log_c_minus_js():
    """Three Gaussians on a line: the loss at D* equals log 3 − JS by quadrature (S1 Theorem 2)."""
    means = (-1.0, 0.5, 2.0)
    x = torch.linspace(-12, 13, 200001, dtype=DOUBLE)
    log_p = torch.stack([-0.5 * (x - m).square() - 0.5 * math.log(2 * math.pi) for m in means])
    p = log_p.exp()
    js = (p * (log_p - p.mean(0).log())).sum() * (x[1] - x[0]) / 3
    samples = [m + normal(200_000) for m in means]
    logits = optimal_logits(samples, [lambda z, m=m: -0.5 * (z - m).square() for m in means])
    assert float(ivfast.multi_js_divergence(logits)) == pytest.approx(float(js), abs=5e-3)


def test_multi_js_divergence_with_weights_is_the_entropy_at_disjoint_supports():
    weights = torch.tensor([0.7, 0.2, 0.1], dtype=DOUBLE)
    confident = 1e4 * torch.eye(3, dtype=DOUBLE).unsqueeze(1).expand(3, 4, 3)
    entropy = -(weights * weights.log()).sum()
    assert float(ivfast.multi_js_divergence(confident, weights=weights)) == pytest.approx(float(entropy))


# AS-Distance


@pytest.mark.parametrize("measure", ["lebesgue", "prior"])
@pytest.mark.parametrize("d", [1, 2])
def test_as_kernel_against_quadrature(measure, d):
    axis = torch.linspace(-15, 15, 1501, dtype=DOUBLE)
    u, logvar = normal(2, d), torch.rand(2, d, dtype=DOUBLE) * 2 - 1

    def density(u, logvar):  # of one dimension over the axis
        return torch.exp(-0.5 * (axis - u).square() / logvar.exp() - 0.5 * logvar) / math.sqrt(2 * math.pi)

    weight = torch.exp(-0.5 * axis.square()) / math.sqrt(2 * math.pi) if measure == "prior" else torch.ones_like(axis)
    one = [density(u[0, j], logvar[0, j]) * density(u[1, j], logvar[1, j]) * weight for j in range(d)]
    per_dimension = torch.stack([v.sum() * (axis[1] - axis[0]) for v in one])
    for kernel, expected in (("product", per_dimension.prod()), ("additive", per_dimension.mean())):
        sums = ivfast.log_gaussian_kernel_sums(u[:1], logvar[:1], u[1:], logvar[1:], kernel=kernel, measure=measure)
        assert float(sums[2]) == pytest.approx(float(expected.log()), abs=1e-9)


@pytest.mark.parametrize("kernel", ["product", "additive"])
@pytest.mark.parametrize("measure", ["lebesgue", "prior"])
def test_as_distance_is_a_distance(kernel, measure):
    form = {"kernel": kernel, "measure": measure}
    r = normal(6, 3), torch.rand(6, 3, dtype=DOUBLE)
    g = normal(5, 3), torch.rand(5, 3, dtype=DOUBLE)
    d = ivfast.as_distance(*r, *g, **form)
    assert float(d) > 0
    assert error(ivfast.as_distance(*g, *r, **form), d) < 1e-10
    assert abs(float(ivfast.as_distance(*r, *r, **form))) < 1e-14
    assert float(ivfast.as_distance(*r, *g, log=True, **form)) > 0
    assert abs(float(ivfast.as_distance(*r, *r, log=True, **form))) < 1e-12
    order = torch.randperm(6)
    assert error(ivfast.as_distance(r[0][order], r[1][order], *g, **form), d) < 1e-10


def test_as_distance_does_not_underflow_at_512_dimensions():
    q = [normal(8, 512, dtype=torch.float32) for _ in range(4)]
    for x in q:
        x.requires_grad_()
    value = ivfast.as_distance(*q, log=True)
    gradients = torch.autograd.grad(value, q)
    assert torch.isfinite(value)
    assert all(torch.isfinite(g).all() and g.abs().max() > 0 for g in gradients)


# MMD


def test_mmd_agrees_with_waes_formula():
    """WAE's published loop over scales for a standard normal prior: C = 2 d s, off-diagonal means minus twice the cross."""
    n, d = 20, 5
    x, y = normal(n, d), normal(n, d)
    expected = 0.0
    for s in (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0):
        c = 2 * d * s
        xx, yy, xy = (c / (c + torch.cdist(a, b).square()) for a, b in ((x, x), (y, y), (x, y)))
        off = 1 - torch.eye(n, dtype=DOUBLE)
        expected += ((xx + yy) * off).sum() / (n * (n - 1)) - 2 * xy.mean()
    assert error(ivfast.mmd(x, y), expected) < 1e-9


def test_mmd_agrees_with_waes_rbf_form():
    """exp(−r²/(2σ²)) with a σ² of the batch's own distances, as its code takes it: a bandwidth of one number."""
    n, d = 24, 6
    x, y = normal(n, d), normal(n, d) + 0.5
    half = (n * n - n) // 2
    xx, yy, xy = (torch.cdist(a, b).square() for a, b in ((x, x), (y, y), (x, y)))
    sigma2 = sum(r2.flatten().topk(half).values[half - 1] for r2 in (xy, xx))
    off = 1 - torch.eye(n, dtype=DOUBLE)
    within = ((torch.exp(-xx / 2 / sigma2) + torch.exp(-yy / 2 / sigma2)) * off).sum() / (n * n - n)
    expected = within - torch.exp(-xy / 2 / sigma2).sum() * 2 / (n * n)
    assert error(ivfast.mmd(x, y, kernel="rbf", bandwidth=2 * sigma2), expected) < 1e-9


@pytest.mark.parametrize("kernel", ["imq", "rbf"])
def test_mmd_agrees_with_pythaes_formula(kernel):
    """pythae's WAE_MMD: C = 2 d h² of its kernel_bandwidth h, scales for its IMQ alone, diagonals taken off."""
    n, d, h, scales = 20, 5, 0.7, (0.1, 0.3, 2.0, 4.0)
    x, y = normal(n, d), normal(n, d)
    c = 2 * d * h**2

    def gram(a, b):
        r2 = torch.norm(a[:, None] - b[None], dim=-1) ** 2
        return sum(s * c / (s * c + r2) for s in scales) if kernel == "imq" else torch.exp(-r2 / c)

    within = sum((k - k.diag().diag()).sum() / ((n - 1) * n) for k in (gram(x, x), gram(y, y)))
    expected = within - 2 * gram(x, y).sum() / n**2
    ours = ivfast.mmd(x, y, kernel=kernel, scales=scales if kernel == "imq" else None, bandwidth=c)
    assert error(ours, expected) < 1e-9


def test_mmds_median_is_the_pooled_samples():
    x, y = normal(3, 9, 4), normal(3, 12, 4) + 1
    pooled = [torch.pdist(torch.cat(pair)).sort().values for pair in zip(x, y, strict=True)]
    b = torch.stack([((p[(len(p) - 1) // 2] + p[len(p) // 2]) / 2).square() for p in pooled])
    for kernel in ("imq", "rbf"):
        ours = ivfast.mmd(x, y, kernel=kernel, bandwidth="median")
        assert error(ours, ivfast.mmd(x, y, kernel=kernel, bandwidth=b)) < 1e-9


def test_mmd_of_one_sample_with_itself_is_zero_and_of_two_distributions_is_not():
    x = normal(50, 4)
    assert abs(float(ivfast.mmd(x, x, unbiased=False))) < 1e-12
    assert float(ivfast.mmd(x, x + 3, unbiased=False)) > 0.5
    assert error(ivfast.mmd(x, x + 3), ivfast.mmd(x + 3, x)) < 1e-10
    values = torch.stack([ivfast.mmd(normal(40, 3), normal(40, 3), kernel="rbf", bandwidth=3.0) for _ in range(400)])
    assert abs(float(values.mean())) < 4 * float(values.std()) / 20  # unbiased


# Fréchet distances


def random_covariance(d, rank=None):
    a = normal(rank or 3 * d, d)
    return a.mT @ a / a.shape[0]


def test_frechet_distance_of_commuting_gaussians_is_exact():
    mu1, mu2, s1, s2 = normal(7), normal(7), torch.rand(7, dtype=DOUBLE), torch.rand(7, dtype=DOUBLE)
    q = torch.linalg.qr(normal(7, 7)).Q
    expected = (mu1 - mu2).square().sum() + (s1 - s2).square().sum()
    actual = ivfast.frechet_distance(mu1, q @ s1.square().diag() @ q.mT, mu2, q @ s2.square().diag() @ q.mT)
    assert error(actual, expected) < 1e-10


def test_frechet_distance_agrees_with_scipys_square_root():
    from scipy import linalg

    mu1, mu2, s1, s2 = normal(12), normal(12), random_covariance(12), random_covariance(12)
    root = np.trace(np.real(linalg.sqrtm((s1 @ s2).numpy())))
    expected = (mu1 - mu2).square().sum() + s1.trace() + s2.trace() - 2 * root
    assert error(ivfast.frechet_distance(mu1, s1, mu2, s2), expected) < 1e-8


def test_frechet_distance_is_zero_at_equality_and_symmetric():
    x, y = normal(30, 6), normal(25, 6) * 2
    assert abs(float(ivfast.frechet_distance_from_samples(x, x))) < 1e-12
    forward, back = ivfast.frechet_distance_from_samples(x, y), ivfast.frechet_distance_from_samples(y, x)
    assert error(forward, back) < 1e-12
    stats = [(z.mean(0), torch.cov(z.mT)) for z in (x, y)]
    assert error(ivfast.frechet_distance(*stats[0], *stats[1]), forward) < 1e-10


@pytest.mark.parametrize(("n", "m", "d"), [(6, 6, 12), (2, 9, 4), (3, 40, 20), (2, 2, 1)])
def test_frechet_distance_of_rank_deficient_samples(n, m, d):
    """Tr √(Σ₁Σ₂) = Σ singular values of C₁C₂ᵀ, taken directly from the n × m matrix."""
    x, y = normal(n, d), normal(m, d)
    c1, c2 = ((z - z.mean(0)) / math.sqrt(len(z) - 1) for z in (x, y))
    expected = (x.mean(0) - y.mean(0)).square().sum() + c1.square().sum() + c2.square().sum()
    expected = expected - 2 * torch.linalg.svdvals(c1 @ c2.mT).sum()
    assert error(ivfast.frechet_distance_from_samples(x, y), expected) < 1e-10
    moments = [(z.mean(0), torch.cov(z.mT).view(d, d)) for z in (x, y)]
    # from covariances half of the digits go: √ of a rounding error of 1e-16
    assert error(ivfast.frechet_distance(*moments[0], *moments[1]), expected) < 1e-6


def test_fld_of_whitened_codes_is_zero_and_follows_its_formula():
    z = normal(200, 9) @ normal(9, 9) + 1
    mu, sigma = z.mean(0), torch.cov(z.mT)
    values, vectors = torch.linalg.eigh(sigma)
    expected = mu.square().sum() + (values.sqrt() - 1).square().sum()
    assert error(ivfast.fld(z), expected) < 1e-9
    white = (z - mu) @ vectors @ values.rsqrt().diag()
    assert abs(float(ivfast.fld(white))) < 1e-10
    assert float(ivfast.fld(torch.zeros(10, 4))) == pytest.approx(4.0)  # collapsed codes: d


def test_fld_gradient_is_finite_for_collapsed_codes():
    for z in (torch.zeros(10, 4), torch.randn(5, 1).repeat(1, 6), torch.randn(3, 12)):
        z = z.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(ivfast.fld(z), z)
        assert torch.isfinite(gradient).all()


def test_gaussian_statistics_stream_to_the_same_moments():
    x = normal(1000, 5) * 1e-3 + 1e4  # Σxxᵀ − nμμᵀ would lose everything
    whole, left, right = (ivfast.GaussianStatistics(5) for _ in range(3))
    whole.update(x)
    for batch in x[:400].split(7):
        left.update(batch)
    right.update(x[400:])
    merged = left.merge(right).merge(ivfast.GaussianStatistics(5))
    for stats in (whole, merged):
        assert stats.count == 1000
        assert error(stats.mean, x.mean(0)) < 1e-13
        assert error(stats.covariance, torch.cov(x.mT)) < 1e-8


# Modules


def test_modules_are_their_functions():
    x, y = normal(9, 4), normal(8, 4)
    assert torch.equal(
        ivfast.nn.MMDLoss(kernel="rbf", bandwidth=2.0)(x, y), ivfast.mmd(x, y, kernel="rbf", bandwidth=2.0)
    )
    logits, weights = normal(6, 3), torch.tensor([0.2, 0.3, 0.5], dtype=DOUBLE)
    assert torch.equal(ivfast.nn.MultiJSLoss(weights)(logits), ivfast.multi_js_loss(logits, weights=weights))
    q = [normal(5, 3) for _ in range(4)]
    assert torch.equal(ivfast.nn.ASDistance(log=True)(*q), ivfast.as_distance(*q, log=True))
    assert "weights" in dict(ivfast.nn.MultiJSLoss(weights).named_buffers())
