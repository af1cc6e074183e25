"""A checkpoint is checked whole against the run that takes it up before any of it is loaded."""

from pathlib import Path

import torch

from .. import optim
from . import checkpoint
from .batches import check_generator
from .checkpoint import Checkpoint, CheckpointError, Layout
from .phase import Phase


def check(run, saved: Checkpoint, path: Path) -> None:
    """Raises CheckpointError for what does not fit a `Run`, by the tensor or field."""
    n, order = run.batches.order.n, saved.tensors.get("batches/order")
    if order is not None and len(order.shape) == 1 and len(order) != n:
        raise CheckpointError(path, f"its data order is for {len(order)} images, not {n}")
    shape = list(run.system.image_shape)
    if saved.about["image_shape"] != shape:
        raise CheckpointError(path, f"the field image_shape must be {shape}, it is {saved.about['image_shape']}")
    checkpoint.check_layout(saved.tensors, _layout(run, saved, path), path)
    step = saved.about["step"]
    try:
        run.batches.order.check(saved.part("batches"), step)
        run.record.check(saved.part("record"), saved.about["record"], step, run.system.phases)
        check_generator("random/cpu", saved.tensors["random/cpu"])
        for phase in run.system.phases:
            _check_counts(phase, saved, step)
    except ValueError as error:
        raise CheckpointError(path, str(error)) from error


def _layout(run, saved: Checkpoint, path: Path) -> dict[str, Layout]:
    """Every tensor that the run's checkpoint has."""
    average = {} if run.average is None else run.average.values
    state = torch.get_rng_state()
    record = saved.about["record"]
    expected = {
        **{f"weights/{name}": Layout.of(x) for name, x in checkpoint.weights_of(run.system).items()},
        **{f"average/{name}": Layout.of(x) for name, x in average.items()},
        "batches/generator": Layout.of(state),
        "batches/order": Layout((run.batches.order.n,), torch.int64),
        "batches/position": Layout((), torch.int64),
        "record/values": Layout(
            (saved.about["step"] % run.settings.log_every, len(record["names"])), run.record.zero.dtype
        ),
        "random/cpu": Layout.of(state),
    }
    if "random/cuda" in saved.tensors:  # a run may change its device
        expected["random/cuda"] = Layout((16,), torch.uint8)
    phases = [phase.name for phase in run.system.phases]
    if saved.about["optimizer"].keys() != set(phases):
        given = list(saved.about["optimizer"])
        raise CheckpointError(path, f"the field optimizer must be of the phases {phases}, it is of {given}")
    for phase in run.system.phases:
        expected.update(_state(phase, saved, path))
    return expected


def _state(phase: Phase, saved: Checkpoint, path: Path) -> dict[str, Layout]:
    """The state of the phase's optimizer. A parameter that never had a gradient has none."""
    expected = {}
    owners = [(p, group) for group in phase.optimizer.param_groups for p in group["params"]]
    for index in saved.about["optimizer"][phase.name]:
        if index >= len(owners):
            raise CheckpointError(
                path, f"the field optimizer names parameter {index} of phase {phase.name!r}, which has {len(owners)}"
            )
        prefix = f"optimizer/{phase.name}/{index}/"
        if isinstance(phase.optimizer, torch.optim.Adam):
            p, group = owners[index]
            for key, shape in optim.layout(p, group).items():
                expected[prefix + key] = Layout(shape, torch.float32 if key == "step" else p.dtype)
        else:  # only the optimizer knows; what was written is what is there
            expected.update({name: Layout.of(x) for name, x in saved.tensors.items() if name.startswith(prefix)})
    return expected


def _check_counts(phase: Phase, saved: Checkpoint, step: int) -> None:
    """An optimizer has stepped at most as often as its phase ran."""
    most = -(-step // phase.interval)
    for index in saved.about["optimizer"][phase.name]:
        name = f"optimizer/{phase.name}/{index}/step"
        count = float(saved.tensors[name]) if isinstance(phase.optimizer, torch.optim.Adam) else 1.0
        if not (1 <= count <= most and count == int(count)):
            raise ValueError(f"the tensor {name} must be a number of steps from 1 to {most}, it is {count:g}")
