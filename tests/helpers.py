"""What several test files say alike."""

import copy
import datetime
import pathlib
from typing import NamedTuple

import torch
import torch.distributed as dist
from typer.testing import CliRunner

import ivfast
from ivfast import cli, testing
from ivfast.train import Settings


def size(low: int, high: int) -> int:
    """A random size from low to high, both included."""
    return int(torch.randint(low, high + 1, ()))


def small(system: str = "ivaae-rad", **changes) -> Settings:
    """Settings of a run of 20 small steps, 7 an epoch of 60 images; `changes` stand above them."""
    values = {
        "system": system,
        "steps": 20,
        "batch_size": 8,
        "latent_dim": 8,
        "width": 32,  # of 16 units with ReLU, all may be dead
        "discriminator_width": 32,
        "log_every": 6,
        "evaluate_every": 2,
        "tensorboard": False,
        "seed": int(torch.randint(1000, ())),
    }
    return Settings(**{**values, **changes})


class Rounding(NamedTuple):
    """What a system's losses and gradients may be off by: shares of the largest value, or of `unit`."""

    loss: float
    gradient: float
    unit: float


def doubled(system) -> dict:
    """Copies of a system's networks in float64, by their names."""
    return {name: copy.deepcopy(module).double() for name, module in system.modules.items()}


def drawn_again(state, *shape) -> torch.Tensor:
    """The float64 value of the normal noise that the generator gave in that state."""
    torch.set_rng_state(state)
    return torch.randn(shape).double()


def terms_and_gradients(phase, shared):
    """A phase's losses by their names, and the gradient of their sum for each of its parameters."""
    terms = phase.loss(shared)
    options = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
    return terms, torch.autograd.grad(sum(terms.values()), phase.parameters, **options)


def assert_equations(found, expected, networks, rounding: Rounding) -> None:
    """The terms and gradients of `terms_and_gradients` are those of `expected`, terms of the float64 `networks`."""
    terms, gradients = found
    assert terms.keys() == expected.keys()
    for name, value in expected.items():
        assert testing.error(terms[name], value, rounding.unit) < rounding.loss, name
    parameters = [p for network in networks for p in network.parameters()]
    theirs = torch.autograd.grad(sum(expected.values()), parameters, allow_unused=True, materialize_grads=True)
    for ours, gradient in zip(gradients, theirs, strict=True):
        assert testing.error(ours, gradient, rounding.unit) < rounding.gradient


def command(*arguments: object, code: int = 0) -> str:
    """Output of `ivfast ARGUMENTS`, both streams, as one line per sentence; it has to exit with `code`."""
    result = CliRunner().invoke(cli.app, [str(a) for a in arguments], env={"COLUMNS": "200", "TERM": "dumb"})
    if result.exit_code != code and result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result.output


def join(rank: int, world: int, folder: pathlib.Path) -> None:
    """This process becomes one of gloo's ranks, which meet in a file of `folder`."""
    minute = datetime.timedelta(seconds=60)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store{world}", rank=rank, world_size=world, timeout=minute
    )


def same_bits_in_every_schedule(simt, call) -> None:
    """Of the tensors that `call` returns; a missing barrier shows in one order of threads or another."""
    results = []
    for seed in range(6):
        simt.schedule(seed)
        results.append(call())
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def by_cuda(case: testing.Case):
    """A function that gives the case's value and gradients by the CUDA kernels, on one draw of its inputs."""
    tensors = testing.inputs(case, torch.float32)

    def call():
        with ivfast.use("cuda"):
            value, gradients = testing.value_and_gradients(case, tensors)
        return [*value, *gradients]

    return call
