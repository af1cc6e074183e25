"""`ivfast.svgd`: it samples the given target, and stops, keeps results and fails as documented."""

import functools
import signal

import pytest
import torch
from torch.distributions import Categorical, Gamma, Independent, MixtureSameFamily, MultivariateNormal, Normal
from torch.utils._python_dispatch import TorchDispatchMode

import ivfast
from ivfast.sampling import AdaGradWithMomentum, NonFiniteParticles, SvgdResult
from ivfast.testing import error

DOUBLE = torch.float64
EACH_RULE = pytest.mark.parametrize(
    "rule",
    [
        {},
        {"step_size": 0.2},
        {"optimizer": functools.partial(AdaGradWithMomentum, lr=0.1)},
        {"optimizer": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.5)},
    ],
    ids=["default", "plain", "liu-wang", "sgd"],
)


def normal(*shape, dtype=DOUBLE):
    return torch.randn(*shape, dtype=dtype)


def log_normal(x):
    return -0.5 * x.square().sum(-1)


# Targets. n particles of SVGD have more accurate moments than n draws, whose mean is off by n^-½ and whose variance by
# (2/n)^½ times the true one; the median bandwidth shrinks the variance by about 5 % at n = 150, d = 2.


def test_standard_normal_is_recovered():
    n = 150
    result = ivfast.svgd(2 * normal(n, 2) + 1, 800)
    x = result.particles
    assert x.mean(0).abs().max() < n**-0.5 / 4
    assert (torch.cov(x.T) - torch.eye(2)).abs().max() < (2 / n) ** 0.5
    assert result.steps == len(result.phi_norm) == 800
    assert result.phi_norm[-100:].mean() < 0.1 * result.phi_norm[0]


def test_correlated_gaussian_is_recovered():
    n, mean, covariance = 150, torch.tensor([1.0, -2.0]), torch.tensor([[1.0, 0.7], [0.7, 2.0]])
    x = ivfast.svgd(2 * torch.randn(n, 2), 500, log_prob=MultivariateNormal(mean, covariance)).particles
    assert (x.mean(0) - mean).abs().max() < n**-0.5 / 4
    assert ((torch.cov(x.T) - covariance).abs() / covariance.diagonal().max()).max() < (2 / n) ** 0.5


def test_both_modes_of_a_mixture_are_occupied():
    """Liu & Wang's first example, ⅓ N(−2, 1) + ⅔ N(2, 1), from particles that cover both modes."""
    modes = Independent(Normal(torch.tensor([[-2.0], [2.0]]), torch.ones(2, 1)), 1)
    target = MixtureSameFamily(Categorical(torch.tensor([1 / 3, 2 / 3])), modes)
    x = ivfast.svgd(4 * torch.randn(100, 1), 500, log_prob=target).particles
    # 100 draws: a share of 0.33 ± 0.05, a mean of 0.67 ± 0.21, a second moment of 5 ± 0.45
    assert abs((x < 0).float().mean() - 1 / 3) < 0.1
    assert abs(x.mean() - 2 / 3) < 0.3
    assert abs(x.square().mean() - 5) < 0.3


def test_log_prob_and_score_and_no_target_give_the_same_path():
    x0 = normal(33, 3)
    one = ivfast.svgd(x0, 30, log_prob=log_normal, step_size=0.3).particles
    assert torch.equal(one, ivfast.svgd(x0, 30, score=torch.neg, step_size=0.3).particles)
    assert error(ivfast.svgd(x0, 30, step_size=0.3).particles, one) < 1e-11  # rounding alone: the flow contracts


def test_distributions_over_vectors_and_over_numbers():
    x0, mean = normal(20, 3), torch.tensor([0.0, 1.0, 2.0], dtype=DOUBLE)
    expected = ivfast.svgd(x0, 10, score=lambda x: mean - x).particles
    one = torch.ones(3, dtype=DOUBLE)
    for target in (Independent(Normal(mean, one), 1), MultivariateNormal(mean, torch.diag(one)), Normal(mean, one)):
        assert error(ivfast.svgd(x0, 10, log_prob=target).particles, expected) < 1e-10


def test_an_object_with_log_prob_and_parameters_is_left_without_gradients():
    class Flow(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.shift = torch.nn.Parameter(torch.ones(2, dtype=DOUBLE))

        def log_prob(self, x):
            return log_normal(x - self.shift)

    flow, x0 = Flow(), normal(9, 2)
    expected = ivfast.svgd(x0, 5, score=lambda x: 1 - x).particles
    assert torch.equal(ivfast.svgd(x0, 5, log_prob=flow).particles, expected)
    assert flow.shift.grad is None
    with torch.no_grad():
        assert torch.equal(ivfast.svgd(x0, 5, log_prob=flow).particles, expected)


def test_a_target_may_draw_minibatches():
    """Posterior N(Σy/(N + 1), 1/(N + 1)) of a mean with prior N(0, 1), from batches of the N observations."""
    y = torch.randn(500) + 3
    draws = torch.Generator().manual_seed(0)

    def log_prob(x):
        batch = y[torch.randint(len(y), (50,), generator=draws)]
        return log_normal(x) - 0.5 * len(y) * (x - batch).square().mean(-1)

    after = []
    ivfast.svgd(torch.randn(50, 1), 600, log_prob=log_prob, callback=lambda step, x: after.append(x.mean()))
    # a batch's score has a standard error of 7 % of a standard deviation of y; Adam averages over about 20 batches
    assert abs(torch.stack(after[300:]).mean() - y.sum() / (len(y) + 1)) < 0.05


# The update


@EACH_RULE
def test_batch_equals_loop(rule):
    x0 = normal(2, 3, 17, 4)
    together = ivfast.svgd(x0, 20, log_prob=log_normal, trajectory_every=10, **rule)
    for i in range(2):
        for j in range(3):
            alone = ivfast.svgd(x0[i, j], 20, log_prob=log_normal, trajectory_every=10, **rule)
            # batched products sum in another order; normalised steps amplify the effect on the smallest φ
            assert error(together.trajectory[:, i, j], alone.trajectory) < 1e-8
            assert error(together.phi_norm[:, i, j], alone.phi_norm) < 1e-8


def test_plain_update_is_x_plus_step_phi():
    x0, s = normal(12, 3), lambda x: torch.cos(x)
    x, norms = x0, []
    for _ in range(3):
        phi = ivfast.svgd_direction(x, s(x), scale=2.0, convention="blackjax")
        norms.append(phi.norm(dim=1).mean())
        x = x + 0.2 * phi
    result = ivfast.svgd(x0, 3, score=s, step_size=0.2, scale=2.0, convention="blackjax")
    assert torch.equal(result.particles, x)
    assert torch.equal(result.phi_norm, torch.stack(norms))
    x = x0 + 0.2 * ivfast.svgd_direction(x0, s(x0), bandwidth=3.0)
    assert torch.equal(ivfast.svgd(x0, 1, score=s, step_size=0.2, bandwidth=3.0).particles, x)


def test_default_is_adam_and_optimizers_descend_minus_phi():
    x0 = normal(12, 3)
    x = torch.nn.Parameter(x0.clone())
    adam = torch.optim.Adam([x], lr=0.05)
    for _ in range(5):
        x.grad = -ivfast.svgd_direction(x.detach())
        adam.step()
    assert torch.equal(ivfast.svgd(x0, 5).particles, x.detach())
    assert torch.equal(ivfast.svgd(x0, 5, optimizer=lambda p: torch.optim.Adam(p, lr=0.05)).particles, x.detach())
    sgd = ivfast.svgd(x0, 5, optimizer=lambda p: torch.optim.SGD(p, lr=0.2)).particles
    assert error(sgd, ivfast.svgd(x0, 5, step_size=0.2).particles) < 1e-13


def test_liu_wang_rule_is_that_of_their_code():
    x0 = normal(12, 3)
    x, h = x0, None
    for _ in range(4):
        phi = ivfast.svgd_direction(x)
        h = phi**2 if h is None else 0.9 * h + 0.1 * phi**2
        x = x + 0.07 * phi / (1e-6 + h.sqrt())
    result = ivfast.svgd(x0, 4, optimizer=functools.partial(AdaGradWithMomentum, lr=0.07))
    assert error(result.particles, x) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_low_precision_follows_double(dtype):
    x0 = normal(40, 3).to(dtype)
    result = ivfast.svgd(x0, 100, log_prob=log_normal, step_size=0.1, trajectory_every=50)
    expected = ivfast.svgd(x0.double(), 100, log_prob=log_normal, step_size=0.1, trajectory_every=50)
    assert result.particles.dtype == result.trajectory.dtype == dtype
    assert result.phi_norm.dtype == torch.float32
    # In float32 each of the 100 steps rounds once (4 ε at most in 30 runs). Half precision is kept in float32, so that
    # only the result's rounding counts; added in half precision, steps of 0.1 φ would get lost and cost 4 to 28 ε.
    bound = 50 if dtype == torch.float32 else 1
    assert error(result.trajectory.double(), expected.trajectory) < bound * torch.finfo(dtype).eps
    by_optimizer = ivfast.svgd(x0, 100, log_prob=log_normal, optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    assert error(by_optimizer.particles.double(), expected.particles) < bound * torch.finfo(dtype).eps


def test_x0_of_any_strides_is_left_as_it_was():
    x0 = normal(3, 11).T
    before = x0.clone()
    for rule in ({}, {"step_size": 0.5}):
        result = ivfast.svgd(x0.requires_grad_(), 3, **rule)
        assert result.particles.is_contiguous()
        assert not result.particles.requires_grad
        assert torch.equal(x0, before)
    assert torch.equal(ivfast.svgd(x0, 0).particles, before)
    assert ivfast.svgd(x0, 0).particles.data_ptr() != x0.data_ptr()


# What is kept, and when the run stops


@EACH_RULE
def test_trajectory_holds_every_kth_step(rule):
    x0, seen = normal(7, 2), []
    result = ivfast.svgd(x0, 10, trajectory_every=3, callback=lambda step, x: seen.append((step, x)), **rule)
    assert isinstance(result, SvgdResult)
    assert [step for step, _ in seen] == list(range(1, 11))
    kept = [x0] + [x for step, x in seen if step % 3 == 0]  # also: what the callback got was not overwritten
    assert torch.equal(result.trajectory, torch.stack(kept))
    assert torch.equal(result.particles, seen[-1][1])
    without = ivfast.svgd(x0, 10, **rule)
    assert without.trajectory.shape == (0, 7, 2)
    assert torch.equal(without.particles, result.particles)


def test_callback_stops():
    result = ivfast.svgd(normal(7, 2), 100, trajectory_every=2, callback=lambda step, x: step == 5)
    assert (result.steps, result.interrupted) == (5, False)
    assert result.phi_norm.shape == (5,)
    assert len(result.trajectory) == 3


@pytest.fixture
def _sigint():
    """SIGINT as Python handles it; a shell's background jobs are started with it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_sigint")
@pytest.mark.parametrize("place", ["score", "callback"])
def test_interrupt_returns_the_particles_so_far(place):
    x0, calls = normal(9, 2), []

    def interrupt(at):
        calls.append(None)
        if len(calls) == at:
            signal.raise_signal(signal.SIGINT)

    def score(x):
        if place == "score":
            interrupt(at=6)  # in the sixth step, which does not count
        return -x

    def callback(step, x):
        if place == "callback":
            interrupt(at=5)

    result = ivfast.svgd(x0, 100, score=score, trajectory_every=2, callback=callback)
    assert (result.steps, result.interrupted) == (5, True)
    expected = ivfast.svgd(x0, 5, score=torch.neg, trajectory_every=2)
    for name in ("particles", "trajectory", "phi_norm"):
        assert torch.equal(getattr(result, name), getattr(expected, name)), name


def test_other_errors_of_a_target_pass():
    with pytest.raises(ZeroDivisionError):
        ivfast.svgd(normal(9, 2), 3, score=lambda x: x / (1 // 0))


def test_progress_goes_to_stderr_and_changes_nothing(capfd):
    x0 = normal(9, 2)
    shown = ivfast.svgd(x0, 20, progress=True)
    out, err = capfd.readouterr()
    assert out == ""
    assert "20/20" in err
    assert f"‖φ‖ {float(shown.phi_norm[-1]):.2g}" in err
    assert torch.equal(shown.particles, ivfast.svgd(x0, 20).particles)
    assert capfd.readouterr() == ("", "")


# Failure


@EACH_RULE
@pytest.mark.parametrize("wrong", [float("nan"), float("inf")], ids=str)
def test_a_score_that_is_not_finite_names_step_and_count(rule, wrong):
    x0, calls = normal(2, 8, 3), []

    def score(x):
        calls.append(None)
        s = -x
        if len(calls) == 4:
            s[0, 2, 1] = s[1, 5] = wrong
        return s

    message = r"step 4: the score is not finite at 2 of 16 particles; `result` .* the particles of step 3"
    with pytest.raises(NonFiniteParticles, match=message) as caught:
        ivfast.svgd(x0, 50, score=score, trajectory_every=2, **rule)
    expected = ivfast.svgd(x0, 3, score=torch.neg, trajectory_every=2, **rule)
    assert caught.value.step == 4
    for name in ("particles", "trajectory", "phi_norm"):
        assert torch.equal(getattr(caught.value.result, name), getattr(expected, name)), name
    assert len(calls) == 4


def test_a_failure_seen_late_freezes_the_particles(monkeypatch):
    """As on a GPU, where results are checked every 64 steps."""
    calls, x0 = [], normal(8, 3)

    def score(x):
        calls.append(None)
        return x * float("nan") if len(calls) in (10, 12) else -x

    class Skipping(torch.optim.SGD):
        """Skips a gradient with NaN, as gradient scalers do, so that only the freeze keeps the particles of step 9."""

        def step(self, closure=None):
            (p,) = self.param_groups[0]["params"]
            return super().step() if p.grad.isfinite().all() else None

    look = ivfast.sampling._Run.check
    monkeypatch.setattr(ivfast.sampling._Run, "check", lambda run: look(run) if run.state.step in (16, 20) else None)
    with pytest.raises(NonFiniteParticles, match="step 10: the score is not finite at 8 of 8") as caught:
        ivfast.svgd(x0, 20, score=score, trajectory_every=1, optimizer=lambda p: Skipping(p, lr=0.1))
    assert len(calls) == 16
    expected = ivfast.svgd(x0, 9, score=torch.neg, trajectory_every=1, optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    assert torch.equal(caught.value.result.particles, expected.particles)
    assert torch.equal(caught.value.result.trajectory, expected.trajectory)
    assert torch.equal(caught.value.result.phi_norm, expected.phi_norm)


def test_nothing_is_read_on_the_host_between_checks(monkeypatch):
    """On a GPU every such read would synchronise; the checks, which run at every step on the CPU, are removed."""

    class Reads(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
            return func(*args, **(kwargs or {}))

    monkeypatch.setattr(ivfast.sampling._Run, "check", lambda run: None)
    reads = []
    for steps in (1, 40):
        with Reads() as mode:
            ivfast.svgd(torch.randn(8, 3), steps, log_prob=log_normal, step_size=0.1, trajectory_every=2)
        reads.append(mode.count)
    assert reads == [1, 1]  # x0 is finite


def test_a_step_too_large_is_told_apart():
    with pytest.raises(NonFiniteParticles, match=r"step 1: the step moved .* of torch.float16; try a smaller step"):
        ivfast.svgd(torch.randn(8, 3).half(), 3, step_size=1e6)


@pytest.mark.parametrize(
    ("kind", "message", "keywords"),
    [
        (ValueError, "steps must be an integer >= 0, got -1", {"steps": -1}),
        (ValueError, r"x0 must have shape \[..., n, d\], got \(4,\)", {"x0": torch.zeros(4)}),
        (TypeError, "x0 must be float32", {"x0": torch.zeros(4, 3, dtype=torch.int64)}),
        (ValueError, "x0 must be finite, got NaN or infinity in 4 of 4", {"x0": torch.full((4, 3), torch.nan)}),
        (ValueError, "log_prob and score .* got both", {"log_prob": log_normal, "score": torch.neg}),
        (TypeError, "score must be a callable .* got Tensor", {"score": torch.zeros(4, 3)}),
        (TypeError, "log_prob must be a callable .* got float", {"log_prob": 0.5}),
        (ValueError, r"score\(x\) must match x: \(4, 3\), got \(4,\)", {"score": log_normal}),
        (TypeError, r"score\(x\) must match x: torch.float32, got torch.float64", {"score": lambda x: x.double()}),
        (ValueError, r"log_prob\(x\) must hold .* x \(4, 3\): \(4,\), got \(4, 3\)", {"log_prob": torch.neg}),
        (ValueError, r"log_prob\(x\) must hold .* \(4,\), got \(\)", {"log_prob": torch.sum}),
        (TypeError, r"log_prob\(x\) must be a Tensor, got float", {"log_prob": lambda x: 0.0}),
        (ValueError, r"log_prob\(x\) must depend on x", {"log_prob": lambda x: torch.zeros(4)}),
        (ValueError, r"log_prob\(x\) must depend on x", {"log_prob": lambda x: torch.zeros(4, requires_grad=True) + 1}),
        (
            ValueError,
            r"log_prob must be a distribution over \(3,\), as x0, or over \(\), got \(2,\)",
            {"log_prob": MultivariateNormal(torch.zeros(2), torch.eye(2))},
        ),
        (
            ValueError,
            "within the support",
            {"log_prob": Gamma(torch.ones(()), torch.ones(()), validate_args=True), "x0": -torch.ones(4, 3)},
        ),
        (ValueError, "step_size must be finite and positive, got 0", {"step_size": 0.0}),
        (ValueError, "step_size .* got both", {"step_size": 0.1, "optimizer": torch.optim.Adam}),
        (TypeError, "optimizer must return a torch.optim.Optimizer, got list", {"optimizer": list}),
        (ValueError, "lr must be finite and positive", {"optimizer": lambda p: AdaGradWithMomentum(p, lr=-1)}),
        (ValueError, "bandwidth must be one of", {"bandwidth": "silverman"}),
        (ValueError, "bandwidth must be finite and positive", {"bandwidth": -1.0}),
        (ValueError, "convention must be one of", {"convention": "mine"}),
        (ValueError, "scale must be finite and positive", {"scale": 0.0}),
        (ValueError, "trajectory_every must be an integer >= 1, got 0", {"trajectory_every": 0}),
    ],
)
def test_wrong_arguments(kind, message, keywords):
    keywords = {"x0": torch.randn(4, 3), "steps": 2, **keywords}
    with pytest.raises(kind, match=message):
        ivfast.svgd(**keywords)


def test_log_prob_under_inference_mode_says_what_to_do():
    with torch.inference_mode():
        with pytest.raises(RuntimeError, match=r"use torch.no_grad\(\)"):
            ivfast.svgd(torch.randn(4, 3), 2, log_prob=log_normal)
        assert ivfast.svgd(torch.randn(4, 3), 2).steps == 2
