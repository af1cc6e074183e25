"""Sampling by Stein variational gradient descent: the loop around `svgd_direction` that Bayesian inference needs."""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import Distribution

from . import _check, _defaults
from ._extra import needs
from .ops._pairwise import arithmetic
from .ops.svgd import svgd_direction

CHECK_EVERY = 64  # steps between checks of results on a GPU, because each check waits for it


class SvgdResult(NamedTuple):
    """The result of `svgd`, on x0's device. One step moves all particles once."""

    particles: Tensor  # [..., n, d] after the last step, in x0's dtype
    trajectory: Tensor  # [k, ..., n, d]: entry i after step i * trajectory_every, entry 0 is x0; k = 0 if not requested
    phi_norm: Tensor  # [steps, ...]: mean over the particles of ‖φ_i‖ at each step; 0 where SVGD has converged
    steps: int  # steps taken
    interrupted: bool  # by Ctrl-C


class NonFiniteParticles(ArithmeticError):
    """A score or a particle became NaN or infinite in `step`. `result` is the SvgdResult of the steps before it."""

    def __init__(self, message: str, step: int, result: SvgdResult):
        super().__init__(message)
        self.step, self.result = step, result


class AdaGradWithMomentum(torch.optim.Optimizer):
    """h ← φ² in the first step, then α h + (1 − α) φ²;  x ← x + lr φ/(ε + √h), elementwise, as in Liu & Wang's code.

    Step lengths stay at about `lr` however small φ becomes, so with a fixed `lr` the particles end up circling the
    solution at that distance.

    Args:
        parameters: as for any torch.optim.Optimizer; their gradient is −φ.
        lr: the step size; Liu & Wang use 0.05 for logistic regression.
        alpha, eps: α and ε.
    """

    def __init__(self, parameters, lr: float = 0.05, alpha: float = 0.9, eps: float = 1e-6):
        _check.number("lr", lr, positive=True)
        super().__init__(parameters, {"lr": lr, "alpha": alpha, "eps": eps})

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state, square = self.state[p], p.grad.square()
                h = state["h"].lerp(square, 1 - group["alpha"]) if "h" in state else square
                state["h"] = h
                p.addcdiv_(p.grad, h.sqrt() + group["eps"], value=-group["lr"])
        return loss


def svgd(
    x0: Tensor,
    steps: int,
    *,
    log_prob: Callable[[Tensor], Tensor] | Distribution | None = None,
    score: Callable[[Tensor], Tensor] | None = None,
    optimizer: Callable[[list[Tensor]], torch.optim.Optimizer] | None = None,
    step_size: float | None = None,
    bandwidth: float | Tensor | str = "median",
    scale: float = 1.0,
    convention: str = "liu-wang",
    trajectory_every: int | None = None,
    callback: Callable[[int, Tensor], object] | None = None,
    progress: bool = False,
) -> SvgdResult:
    """Move particles along the SVGD direction φ towards a sample of the target p: x ← x + ε φ(x), `steps` times.

    Pass the target as `log_prob` or as `score`; without either it is N(0, I). Both may be unnormalised and may draw a
    new minibatch at each call. No gradient flows from the result to x0.

    Args:
        x0: particles `[..., n, d]` to start from; leading dimensions are independent particle sets. In half precision
            the particles are kept in float32, and the target and φ see rounded values.
        steps: number of steps.
        log_prob: log density of each particle, x `[..., n, d]` → `[..., n]`, differentiated by autograd in one
            batched backward; or an object with a method `log_prob`, such as a torch.distributions.Distribution over
            vectors, or over scalars, which is applied to the d coordinates independently. (On a GPU, construct the
            Distribution with validate_args=False: its checks wait for the device.)
        score: ∇ log p, x `[..., n, d]` → `[..., n, d]`; called in the caller's gradient mode.
        optimizer: creates a torch.optim.Optimizer from a list of one tensor, the particles, whose gradient is −φ:
            `lambda p: torch.optim.Adagrad(p, lr=1.0)`. Default: Adam at 0.05, which converges to rest. Liu & Wang's
            rule is `ivfast.sampling.AdaGradWithMomentum`. Elementwise rules keep particle sets independent.
        step_size: ε of the plain update, instead of an optimizer.
        bandwidth, scale, convention: as for `svgd_direction`.
        trajectory_every: keep the particles every this many steps, including x0. The
            `steps // trajectory_every + 1` particle sets are allocated on x0's device at the start.
        callback: called after each step with its number, from 1, and the particles, which later steps do not
            overwrite. A true result stops the run. Reading the values on a GPU waits for it.
        progress: show a progress bar on stderr.

    Returns:
        SvgdResult. Ctrl-C stops cleanly: the result covers the steps taken so far, with `interrupted` set.

    Raises:
        TypeError, ValueError: wrong arguments, or a target that returns a wrong shape or does not depend on x.
        RuntimeError: `log_prob` under torch.inference_mode(); torch.no_grad() is fine.
        NonFiniteParticles: a NaN or infinite score, or particles that left the range of their dtype; carries the
            result of the steps before. On the CPU it is raised at once; on a GPU, which is not synchronised otherwise,
            within the next 64 steps.

    Source: Liu & Wang 2016, Algorithm 1.
    """
    _check.samples("x0", x0)
    steps = _check.count("steps", steps, at_least=0)
    if trajectory_every is not None:
        trajectory_every = _check.count("trajectory_every", trajectory_every)
    if bad := int((~x0.isfinite()).any(-1).sum()):
        raise ValueError(f"x0 must be finite, got NaN or infinity in {bad} of {x0.shape[:-1].numel()} particles")
    target = _target(log_prob, score, x0)
    start = x0.detach().clone(memory_format=torch.contiguous_format)
    move = _rule(optimizer, step_size, arithmetic(start))
    run = _Run(start, steps, trajectory_every)
    interrupted = False
    try:
        with _bar(steps, progress) as show:
            for step in range(1, steps + 1):
                x = run.state.x
                s = None if target is None else target(x)
                phi = arithmetic(svgd_direction(x, s, bandwidth=bandwidth, scale=scale, convention=convention))
                run.advance(s, phi, move(phi))
                show(step, run.phi_norm)
                if callback is not None and callback(step, run.state.x.detach()):
                    break
    except KeyboardInterrupt:
        interrupted = True
    run.check()
    return run.result(interrupted)


def _target(log_prob, score, x0: Tensor) -> Callable[[Tensor], Tensor] | None:
    """x `[..., n, d]` → its score, which has x's shape, dtype and device."""
    if log_prob is not None and score is not None:
        raise ValueError("log_prob and score are two ways to give the target: pass one of them, got both")
    if score is not None:
        if not callable(score):
            raise TypeError(f"score must be a callable x -> ∇ log p(x), got {type(score).__name__}")

        def checked(x):
            s, x = _check.promoted(score(x.detach()), x)
            _check.same("score(x)", s, "x", x)
            return s.detach()

        return checked
    if log_prob is None:
        return None
    if torch.is_inference_mode_enabled():
        raise RuntimeError("log_prob is differentiated, which torch.inference_mode() forbids: use torch.no_grad()")
    coordinates = False
    if isinstance(log_prob, Distribution):
        event, d = tuple(log_prob.event_shape), x0.shape[-1]
        if event not in ((), (d,)):
            raise ValueError(f"log_prob must be a distribution over ({d},), as x0, or over (), got {event}")
        coordinates = event == ()
    density = getattr(log_prob, "log_prob", log_prob)
    if not callable(density):
        raise TypeError(f"log_prob must be a callable x -> log p(x) or have one, got {type(log_prob).__name__}")
    return lambda x: _gradient(density, x, coordinates)


def _gradient(density: Callable[[Tensor], Tensor], x: Tensor, coordinates: bool) -> Tensor:
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        value = density(x)
        _check.floating("log_prob(x)", value)
        needed = x.shape if coordinates else x.shape[:-1]
        if value.shape != needed:
            raise ValueError(
                f"log_prob(x) must hold one log density per particle of x {tuple(x.shape)}: {tuple(needed)}, "
                f"got {tuple(value.shape)}"
            )
        gradient = None
        if value.requires_grad:
            (gradient,) = torch.autograd.grad(value, x, torch.ones_like(value), allow_unused=True)
    if gradient is None:
        raise ValueError("log_prob(x) must depend on x through operations that autograd can differentiate, got none")
    return gradient


def _rule(optimizer, step_size: float | None, x: Tensor) -> Callable[[Tensor], Tensor]:
    """φ → the moved particles, in the dtype of the arithmetic."""
    if step_size is not None:
        if optimizer is not None:
            raise ValueError("step_size is for the plain update: pass it or an optimizer, got both")
        step_size = _check.number("step_size", step_size, positive=True)

        def plain(phi):
            nonlocal x
            x = x + step_size * phi
            return x

        return plain
    particles = torch.nn.Parameter(x.clone())
    chosen = torch.optim.Adam([particles], lr=0.05) if optimizer is None else optimizer([particles])
    if not isinstance(chosen, torch.optim.Optimizer):
        raise TypeError(f"optimizer must return a torch.optim.Optimizer, got {type(chosen).__name__}")

    def by_optimizer(phi):
        particles.grad = -phi
        with _defaults.initial() if optimizer is None else contextlib.nullcontext():
            chosen.step()
        return particles.detach()

    return by_optimizer


class _State(NamedTuple):
    """Replaced as a whole, so that Ctrl-C always finds the particles of a single step."""

    step: int
    x: Tensor  # stays at the last good particles
    good: Tensor  # int64 [], steps before the first that failed
    bad_scores: Tensor  # int64 [], particles whose score was not finite in the last step, or the first that failed


class _Run:
    """The particles and their record. Everything stays on the device; only `check` waits for it."""

    def __init__(self, x: Tensor, steps: int, every: int | None):
        kept = 0 if every is None else steps // every + 1
        self.every = every
        self.trajectory = x.new_empty(kept, *x.shape)
        self.trajectory[:1] = x
        self.phi_norm = arithmetic(x).new_empty(steps, *x.shape[:-2])
        zero = torch.zeros((), dtype=torch.int64, device=x.device)
        self.state = _State(0, x, zero, zero)

    def advance(self, score: Tensor | None, phi: Tensor, moved: Tensor) -> None:
        step, x, good, bad_scores = self.state
        moved = moved.to(x.dtype)
        healthy, finite = good == step, moved.isfinite().all()
        if score is not None:
            bad = (~score.isfinite()).any(-1).sum()
            bad_scores = torch.where(healthy, bad, bad_scores)
            finite = finite & (bad == 0)
        healthy = healthy & finite
        x = torch.where(healthy, moved, x)  # a copy: optimizers write in place
        self.phi_norm[step] = phi.norm(dim=-1).mean(-1)
        step += 1
        if self.every is not None and step % self.every == 0:
            self.trajectory[step // self.every] = x
        self.state = _State(step, x, good + healthy, bad_scores)
        if x.device.type == "cpu" or step % CHECK_EVERY == 0:
            self.check()

    def check(self) -> None:
        step, x, good, bad_scores = self.state
        steps = int(good)
        if steps == step:
            return
        count = x.shape[:-1].numel()
        if bad := int(bad_scores):
            what = f"the score is not finite at {bad} of {count} particles"
        else:
            what = f"the step moved some of {count} particles out of the range of {x.dtype}; try a smaller step"
        self.state = _State(steps, x, good, bad_scores)
        message = f"step {steps + 1}: {what}; `result` of this error holds the particles of step {steps}"
        raise NonFiniteParticles(message, steps + 1, self.result(interrupted=False))

    def result(self, interrupted: bool) -> SvgdResult:
        step, x = self.state[:2]
        kept = 0 if self.every is None else step // self.every + 1
        return SvgdResult(x, self.trajectory[:kept], self.phi_norm[:step], step, interrupted)


@contextlib.contextmanager
def _bar(steps: int, shown: bool) -> Iterator[Callable[[int, Tensor], None]]:
    """Yield a function of the step and of all ‖φ‖ that reads them ten times a second."""
    if not shown:
        yield lambda step, phi_norm: None
        return
    with needs("the progress bar of ivfast.svgd"):
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = BarColumn(20), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.fields[phi]}")
    with Progress(TextColumn("SVGD"), *columns, console=Console(stderr=True)) as bar:
        task, looked = bar.add_task("svgd", total=steps, phi=""), 0.0

        def show(step, phi_norm):
            nonlocal looked
            if time.perf_counter() - looked > 0.1 or step == steps:
                bar.update(task, completed=step, phi=f"‖φ‖ {float(phi_norm[step - 1].mean()):.2g}")
                looked = time.perf_counter()

        yield show
