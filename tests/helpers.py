"""Shared test helpers."""

import contextlib
import copy
import datetime
import functools
import math
import os
import pathlib
import signal
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from typer.testing import CliRunner

import ivfast
from ivfast import cli, models, testing
from ivfast.train import Settings


def size(low: int, high: int) -> int:
    """A random size from low to high, inclusive."""
    return int(torch.randint(low, high + 1, ()))


def own(system: str, /, **values) -> dict:
    """Those of `values`, meant for several systems, that the system has."""
    return models.find(system)[1].Settings.own(values)


def settings_with(values: dict, changes: dict) -> Settings:
    """The settings of a system: those of the shared `values` that it has, and all `changes`."""
    system = {**values, **changes}["system"]
    return models.settings(**{**own(system, **values), **changes})


def small(system: str = "ivaae-rad", **changes) -> Settings:
    """Settings of a run of 20 small steps, 7 per epoch of 60 images; `changes` override them."""
    values = {
        "system": system,
        "steps": 20,
        "batch_size": 8,
        "latent_dim": 8,
        "width": 32,  # with 16 ReLU units, all may be dead
        "discriminator_width": 32,
        "log_every": 6,
        "evaluate_every": 2,
        "tensorboard": False,
        "seed": int(torch.randint(1000, ())),
    }
    return settings_with(values, changes)


class Rounding(NamedTuple):
    """Allowed errors of a system's losses and gradients, relative to the largest value or to `unit`."""

    loss: float
    gradient: float
    unit: float


def doubled(system) -> dict:
    """Float64 copies of a system's networks, by name."""
    return {name: copy.deepcopy(module).double() for name, module in system.modules.items()}


def drawn_again(state, *shape) -> torch.Tensor:
    """The normal noise that the generator gave in that state, in float64."""
    torch.set_rng_state(state)
    return torch.randn(shape).double()


def terms_and_gradients(phase, shared):
    """A phase's losses by name, and the gradient of their sum with respect to each of its parameters."""
    terms = phase.loss(shared)
    options = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
    return terms, torch.autograd.grad(sum(terms.values()), phase.parameters, **options)


def assert_equations(found, expected, networks, rounding: Rounding) -> None:
    """The results of `terms_and_gradients` equal those of `expected`, terms computed with the float64 `networks`."""
    terms, gradients = found
    assert terms.keys() == expected.keys()
    for name, value in expected.items():
        assert testing.error(terms[name], value, rounding.unit) < rounding.loss, name
    parameters = [p for network in networks for p in network.parameters()]
    theirs = torch.autograd.grad(sum(expected.values()), parameters, allow_unused=True, materialize_grads=True)
    for ours, gradient in zip(gradients, theirs, strict=True):
        assert testing.error(ours, gradient, rounding.unit) < rounding.gradient


def command(*arguments: object, code: int = 0) -> str:
    """Both output streams of `ivfast ARGUMENTS`, one line per sentence; it must exit with `code`."""
    result = CliRunner().invoke(cli.app, [str(a) for a in arguments], env={"COLUMNS": "200", "TERM": "dumb"})
    if result.exit_code != code and result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result.output


PATIENCE = 900  # seconds, of a machine that is busy


def run_script(file: str, folder: pathlib.Path, *flags: str) -> None:
    """Run a test file as a script, which calls `as_ranks`; it must succeed."""
    root = str(pathlib.Path(ivfast.__file__).parent.parent)  # the same sources, whether installed or not
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root}
    command = [sys.executable, *flags, file, str(folder)]
    script = subprocess.Popen(command, cwd="/", env=environment, start_new_session=True)
    try:
        assert script.wait(PATIENCE) == 0
    finally:
        with contextlib.suppress(ProcessLookupError):  # its ranks are in its group
            os.killpg(script.pid, signal.SIGKILL)


def as_ranks(world: int, main: Callable[[int], None], folder: pathlib.Path, codes: Sequence[int] = ()) -> None:
    """Run `main(rank)` in each of the ranks of a gloo group, which end with `codes`: by default 0.

    They are forks of this process, a script without threads: what it has imported, they need not, and they meet at
    once, in a file in `folder`.
    """
    ranks = []
    for rank in range(world):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside threads
            ranks.append(os.fork())
        if not ranks[-1]:
            code = 1
            try:
                dist.init_process_group(
                    "gloo",
                    init_method=f"file://{folder}/store{world}",
                    rank=rank,
                    world_size=world,
                    timeout=datetime.timedelta(seconds=PATIENCE),
                )
                main(rank)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
    found = [os.waitstatus_to_exitcode(os.waitpid(rank, 0)[1]) for rank in ranks]
    assert found == list(codes or [0] * world)


def same_bits_in_every_schedule(simt, call) -> None:
    """The tensors that `call` returns do not change; a missing barrier would show in some order of threads."""
    results = []
    for seed in range(6):
        simt.schedule(seed)
        results.append(call())
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def by_cuda(case: testing.Case):
    """A function that computes the case's value and gradients with the CUDA kernels, on one draw of its inputs."""
    tensors = testing.inputs(case, torch.float32)

    def call():
        with ivfast.use("cuda"):
            value, gradients = testing.value_and_gradients(case, tensors)
        return [*value, *gradients]

    return call


@functools.cache
def smallest_cases() -> list[testing.Case]:
    """The cases of each op that have the fewest numbers."""
    sizes = [(sum(x.numel() for x in testing.inputs(c, torch.float32, seed=0)), c) for c in testing.CASES]
    least = {c.op: size for size, c in sorted(sizes, key=lambda each: -each[0])}
    return [c for size, c in sizes if size == least[c.op]]


@contextlib.contextmanager
def set_by_caller(dtype, device):
    """The caller's defaults, which nothing inside may change."""
    torch.set_default_dtype(dtype)
    torch.set_default_device(device)
    try:
        yield
        assert torch.get_default_dtype() == dtype
        assert torch.get_default_device() == torch.device(device)
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)


def cases(*ops: str):
    return pytest.mark.parametrize("case", [c for c in testing.CASES if c.op in ops], ids=str)


def batch() -> tuple[int, ...]:
    return tuple(size(1, 3) for _ in range(size(0, 2)))


def normal(*shapes, scale=1.0):
    return lambda generator: tuple(
        torch.randn(shape, generator=generator, dtype=torch.float64) * scale for shape in shapes
    )


def undecided(shape, scale=3.0):
    """Logits of which a row is undecided: where all rows are certain, the loss is below the rounding of Σ exp(x − max)."""

    def draw(generator):
        logits = torch.randn(shape, generator=generator, dtype=torch.float64) * scale
        logits[..., 0, :] *= 0.1  # but not 0, whose gradient is 0 with smoothed labels
        return (logits,)

    return draw


def clear_median(n, d, batch=(), change=lambda x: x):
    """Normal particles, changed, whose middle distances are clear of all others, or rounding would choose the median
    pair."""

    def clear(rows):
        d2 = torch.pdist(rows).square().sort().values
        pairs, all_entries = n * (n - 1) // 2, n * n  # which hold each pair twice, after the diagonal
        places = {(pairs - 1) // 2, pairs // 2, ((all_entries - 1) // 2 - n) // 2, (all_entries // 2 - n) // 2}
        around = torch.tensor([p for place in places for p in (place, place + 1) if 0 < p < pairs])
        return bool(((d2[around] - d2[around - 1]) > 1e-5 * d2[around]).all())

    def draw(generator):
        for _ in range(1000):
            x = change(torch.randn(*batch, n, d, generator=generator, dtype=torch.float64))
            if n < 3 or all(map(clear, x.reshape(-1, n, d))):
                return (x,)
        raise AssertionError(f"no clear median in {(*batch, n, d)}")

    return draw


def close(ours: torch.Tensor, theirs: torch.Tensor, slack: float = 1.0, unit: float = 0.0):
    assert ours.shape == theirs.shape
    assert testing.error(ours, theirs, unit) <= slack * testing.TOLERANCES[ours.dtype]


def assert_close(ours, theirs, *, slack=1.0, unit=0.0):
    """Equal within the tolerance of ours' dtype, and in shape and contiguity."""
    assert ours.shape == theirs.shape
    assert ours.is_contiguous()
    assert testing.error(ours.cpu(), theirs.cpu(), unit) <= slack * testing.TOLERANCES[ours.dtype]


def misaligned(x: torch.Tensor) -> torch.Tensor:
    """x, shifted by one element off every alignment boundary."""
    storage = x.new_empty(x.numel() + 1)
    return storage[1:].view(x.shape).copy_(x)


def same_bits(results):
    return all(torch.equal(a, b) for result in results[1:] for a, b in zip(result, results[0], strict=True))


def losses_and_gradients(function, tensors, implementation, dtype=None):
    """The losses, and the gradients of their sum weighted by an expanded number, for leaves with the strides of
    `tensors`."""
    leaves = [x.detach().to(dtype or x.dtype, copy=True).requires_grad_() for x in tensors]
    with ivfast.use(implementation):
        out = function(*leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, torch.tensor(0.7).to(out).expand(out.shape))]


def assert_strides_are_read(function, tensors):
    assert not any(x.is_contiguous() for x in tensors)
    ours = losses_and_gradients(function, tensors, "triton")
    theirs = losses_and_gradients(function, tensors, "reference", torch.float64)
    for a, b in zip(ours, theirs, strict=True):
        assert_close(a, b)


def assert_as_reference(function, *tensors, rtol=1e-5):
    """Equal to the reference number by number, including NaN and infinity."""
    ours, theirs = (losses_and_gradients(function, tensors, use) for use in ("triton", "reference"))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=1e-30, equal_nan=True)
    return ours


def assert_right_on_cpu(op, function, draw, dtype, **keywords):
    case = testing.Case(op, "random", function, draw, **keywords)
    testing.check(case, testing.inputs(case, dtype), "cpu")


def assert_right_where_particles_hardly_meet(implementation, device="cpu"):
    """k' = 5e-8 for the nearest other particle: a particle's own term, times 2/h, must not be rounded. Kernel values so
    small have a relative error of eps times their exponent."""
    h = 1e-3
    x = 5 * torch.randn(9, 3, dtype=torch.float64)
    x[1] = x[0] + torch.tensor([(h * math.log(2e7)) ** 0.5, 0, 0])
    x = x.float()
    score, weights = torch.randn(9, 3), torch.randn(9, 3)
    results = []
    for use, dtype in ((implementation, torch.float32), ("reference", torch.float64)):
        leaves = [t.to(device, dtype).requires_grad_() for t in (x, score, torch.tensor(h))]
        with ivfast.use(use):
            phi = ivfast.svgd_direction(*leaves[:2], bandwidth=leaves[2])
            results.append((phi, *torch.autograd.grad(phi, leaves, weights.to(device, dtype))))
    for ours, exact in zip(*results, strict=True):
        close(ours, exact)


def assert_the_gradient_of_h_is_optional(implementation, dtype=torch.float32, device="cpu"):
    """The backward of the SVGD direction gives the same bits without ∂h, which is then empty."""
    from ivfast.ops import svgd

    x, score, grad = (torch.randn(2, 20, 3, dtype=dtype, device=device) for _ in range(3))
    x[:, :2] += 1e4  # far rows
    h = torch.tensor([2.0, 3.0], dtype=dtype, device=device)
    for s in (None, score):
        with ivfast.use(implementation):
            row_sum = svgd._forward(x, s, h)[1]
            *both, dh = svgd._backward(grad, x, s, h, row_sum, True)
            *alone, none = svgd._backward(grad, x, s, h, row_sum, False)
        assert dh.shape == h.shape
        assert none.shape == (0,)
        assert none.dtype == dh.dtype
        assert same_bits([both, alone])


def assert_threads_change_no_bit(op, shapes, threads):
    """Value and gradient of `op` on normal tensors are the same with one thread and with several."""
    tensors = [torch.randn(shape, requires_grad=i < 2) for i, shape in enumerate(shapes)]
    leaves = tensors[:1]

    def run():
        out = op(*tensors)
        return out, *torch.autograd.grad(out, leaves, torch.linspace(-1, 1, out.numel()).view(out.shape))

    threads(1)
    expected = run()
    for count in (2, 5):
        threads(count)
        assert all(torch.equal(a, b) for a, b in zip(run(), expected, strict=True))
