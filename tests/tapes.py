"""Runs that capture on a CPU: a tape replaces the CUDA graph, and a captured run must have the bits of another."""

import contextlib
import json

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ivfast.models import build
from ivfast.ops import bridge
from ivfast.train import checkpoint
from ivfast.train import run as run_module
from ivfast.train.loop import fit

SHAPE = (1, 8, 8)


class Tape(TorchDispatchMode):
    """A stand-in for a graph: repeats the operators of a step on the tensors it was recorded with, without Python.

    A CPU runs the step while recording it, so its first repetition is already done.
    """

    def __init__(self):
        super().__init__()
        self.recorded = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        if function.namespace != "profiler":
            given = {storage(x) for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
            own = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor) and storage(x) not in given]
            self.calls.append((function, args, kwargs, own, given))
        return result

    def warm_up(self, body):
        body()

    def capture(self, body):
        self.calls = calls = []
        self.recorded += 1
        with self:
            body()
        done = [True]

        @torch.no_grad()
        def replay():
            if done:
                return done.clear()
            for function, args, kwargs, own, given in calls:
                result = function(*args, **kwargs)
                new = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor) and storage(x) not in given]
                for ours, theirs in zip(own, new, strict=True):
                    ours.copy_(theirs)

        return replay


def storage(x):
    return x.untyped_storage().data_ptr()


@contextlib.contextmanager
def tapes():
    """Inside, runs capture on tapes; yields the tapes in order."""
    made = []

    def tape(device):
        made.append(Tape())
        return made[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "choose", lambda settings: (settings.capture is not False, "a test"))
        patch.setattr(run_module, "CudaGraphs", tape)
        patch.setattr(bridge, "check_range", lambda index, k: None)  # only on the CPU: it reads values
        yield made


def random_images():
    return torch.randint(256, (60, *SHAPE), dtype=torch.uint8)


def train(settings, images, out, kind=None, **keywords):
    system = kind(settings, SHAPE) if kind else build(settings, SHAPE)
    if system.labels != "none":
        keywords["labels"] = torch.arange(len(images)) % 10
        if system.labels == "source":
            keywords["labels"][::2] = -1
    return system, fit(system, images, settings, out, progress=False, **keywords)


def assert_same_bits(one, other):
    a, b = (checkpoint.read(out / checkpoint.LAST) for out in (one, other))
    assert a.tensors.keys() == b.tensors.keys()
    different = [
        name
        for name in a.tensors
        if a.tensors[name].dtype != b.tensors[name].dtype
        or not torch.equal(
            a.tensors[name].contiguous().view(-1).view(torch.uint8),
            b.tensors[name].contiguous().view(-1).view(torch.uint8),
        )
    ]
    assert not different
    assert {k: v for k, v in a.about.items() if k != "seconds"} == {k: v for k, v in b.about.items() if k != "seconds"}
    kept = ("step", "epoch", "losses", "learning_rates", "metrics")
    lines = [
        [
            {k: line.get(k) for k in kept}
            for line in map(json.loads, (out / "log.jsonl").read_text().splitlines())
            if line["kind"] != "capture"
        ]
        for out in (one, other)
    ]
    assert lines[0] == lines[1]
