"""SVGD as computed by Liu & Wang's paper, blackjax and numpyro, each unmodified: the same direction and bandwidth.

float64 throughout; only the order of sums differs. For a median over an even number of distances all of them take the
mean of the two in the middle, so both parities of n are tested, and n = 2, whose full matrix is half zeros.
"""

import math

import numpy as np
import pytest
import torch

import ivfast

# Sums of n ≤ 17 terms, and numpyro's ‖x‖² + ‖y‖² − 2 x·y, which cancels a few digits.
TOLERANCE = 1e-12
EACH_N = pytest.mark.parametrize("n", [2, 3, 12, 17])


@pytest.fixture(scope="module")
def jax():
    jax = pytest.importorskip("jax", reason="jax is not installed (extra `test`, Python >= 3.11)")
    with jax.enable_x64(True):
        yield jax


@pytest.fixture(scope="module")
def blackjax(jax):
    return pytest.importorskip("blackjax.vi.svgd", reason="blackjax is not installed (extra `test`, Python >= 3.11)")


@pytest.fixture(scope="module")
def numpyro(jax):
    return pytest.importorskip(
        "numpyro.contrib.einstein", reason="numpyro is not installed (extra `test`, Python >= 3.11)"
    )


def particles(n, d=3):
    """Particles and the score of N(1, 2²) at them."""
    x = 2 * torch.randn(n, d, dtype=torch.float64) + 5
    return x, (1 - x) / 4


def close(actual, expected, slack=1):
    tolerance = slack * TOLERANCE
    np.testing.assert_allclose(np.asarray(actual), np.asarray(expected), rtol=tolerance, atol=tolerance)


def direction(x, s, h):
    """φ(x_i) = (1/n) Σ_j [k(x_j, x_i) s(x_j) + ∇_{x_j} k(x_j, x_i)], Liu & Wang 2016, Eq. 8, term by term."""
    phi = np.zeros_like(x)
    for i, x_i in enumerate(x):
        for x_j, s_j in zip(x, s, strict=True):
            k = math.exp(-((x_j - x_i) ** 2).sum() / h)
            phi[i] += k * s_j + k * (-2 / h) * (x_j - x_i)
    return phi / len(x)


def distances(x, pairs):
    return [math.sqrt(((x[i] - x[j]) ** 2).sum()) for i, j in pairs]


def all_pairs(n):
    return [(i, j) for i in range(n) for j in range(n)]


def distinct_pairs(n):
    return [(i, j) for i in range(n) for j in range(i)]


# The paper has med²/log n without saying over which pairs. The authors' code, https://github.com/dilinwang820
# (svgd.py, svgd_kernel), uses the length h = √(½ median(d²)/log(n + 1)) in exp(−d²/2h²), including the zero diagonal.
BANDWIDTHS = {
    "liu-wang": lambda x, n: (
        2 * math.sqrt(0.5 * np.median(np.square(distances(x, all_pairs(n)))) / math.log(n + 1)) ** 2
    ),
    "blackjax": lambda x, n: np.median(distances(x, distinct_pairs(n))) ** 2 / math.log(n),
    "paper": lambda x, n: np.median(distances(x, distinct_pairs(n))) ** 2 / math.log(n),
    "numpyro": lambda x, n: np.median(distances(x, all_pairs(n))) ** 2 / math.log(n),
}


@EACH_N
@pytest.mark.parametrize("convention", BANDWIDTHS)
def test_formula_of_the_paper(convention, n):
    x, s = particles(n)
    h = BANDWIDTHS[convention](x.numpy(), n)
    close(ivfast.median_bandwidth(x, convention=convention), h)
    expected = direction(x.numpy(), s.numpy(), h)
    close(ivfast.svgd_direction(x, s, convention=convention), expected)
    close(ivfast.svgd_direction(x, s, bandwidth=h), expected)


def test_conventions_are_told_apart():
    """The tests above would prove nothing if two conventions gave the same number."""
    x, _ = particles(17)
    h = [float(ivfast.median_bandwidth(x, convention=c)) for c in ("liu-wang", "blackjax", "numpyro")]
    assert min(abs(a / b - 1) for a, b in [(h[0], h[1]), (h[0], h[2]), (h[1], h[2])]) > 1e-3


@EACH_N
def test_blackjax(jax, blackjax, n):
    optax = pytest.importorskip("optax")
    x, s = particles(n)
    ascend = optax.sgd(1.0)  # blackjax hands −φ to the optimiser

    @jax.jit
    def step(y):
        state = blackjax.update_median_heuristic(blackjax.init(y, {"length_scale": 1.0}, ascend))
        moved = blackjax.build_kernel(ascend)(state, lambda y: (1 - y) / 4, blackjax.rbf_kernel).particles
        return state.kernel_parameters["length_scale"], moved

    h, moved = step(x.numpy())
    close(ivfast.median_bandwidth(x, convention="blackjax"), h)
    close(x + ivfast.svgd_direction(x, s, convention="blackjax"), moved)


@EACH_N
def test_numpyro_kernel(jax, numpyro, n):
    from numpyro.contrib.einstein.stein_util import median_bandwidth

    x, _ = particles(n)

    @jax.jit
    def bandwidth_and_kernel(y):
        k = numpyro.RBFKernel().compute(None, y, None, None)
        return median_bandwidth(y, lambda n: 1 / jax.numpy.log(n)), jax.vmap(lambda a: jax.vmap(lambda b: k(a, b))(y))(
            y
        )

    h, K = bandwidth_and_kernel(x.numpy())
    epsilon = np.finfo(np.float64).eps  # which numpyro adds to h
    # its diagonal is not 0 but √(rounding of ‖x‖²) ~ 1e-7, and half the matrix at n = 2
    slack = 1e6 if n == 2 else 1
    close(ivfast.median_bandwidth(x, convention="numpyro"), h - epsilon, slack)
    close(torch.exp(-torch.cdist(x, x).square() / ivfast.median_bandwidth(x, convention="numpyro")), K, slack)


def test_numpyro_single_particle(jax, numpyro):
    from numpyro.contrib.einstein.stein_util import median_bandwidth

    x, _ = particles(1)
    h = ivfast.median_bandwidth(x, convention="numpyro")
    assert h == median_bandwidth(jax.numpy.asarray(x.numpy()), None) == 1


def test_numpyro_svgd(jax, numpyro):
    """One step of numpyro's own SVGD on a model; it sums n terms of log p/n, whereas φ averages those of log p."""
    from numpyro import distributions, optim, sample

    mean, deviation, n, step = np.array([1.0, -2.0, 0.5]), np.array([1.0, 0.5, 2.0]), 9, 0.01

    def model():
        sample("x", distributions.Normal(mean, deviation).to_event(1))

    sampler = numpyro.SVGD(model, optim.SGD(step), numpyro.RBFKernel(), num_stein_particles=n)
    state = sampler.init(jax.random.key(int(torch.randint(2**31, ()))))
    (before,) = sampler.get_params(state).values()
    (after,) = sampler.get_params(jax.jit(sampler.update)(state)[0]).values()
    x = torch.tensor(np.asarray(before))
    score = (torch.tensor(mean) - x) / torch.tensor(deviation) ** 2
    phi = ivfast.svgd_direction(x, score, convention="numpyro")
    np.testing.assert_allclose(np.asarray(after - before) / step, phi, rtol=1e-10, atol=1e-11)  # the division by 0.01
