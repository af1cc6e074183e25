"""Checkpoints: one safetensors file with everything that a run needs to go on bit for bit. No pickle.

Tensors: `weights/*`, `average/*` (EMA), `optimizer/<phase>/<parameter>/*`, `batches/*` (data order), `record/*` (losses
not yet logged), `random/*` (PyTorch's generators). The rest is JSON under the metadata key "ivfast".
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .._extra import needs
from . import files
from .phase import System
from .settings import Settings

with needs("ivfast.train"):
    import safetensors.torch
    from safetensors import SafetensorError, safe_open

FORMAT = 1
LAST = Path("checkpoints") / "last.safetensors"


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or read; the message names the file and the reason."""

    def __init__(self, path: Path, reason: str):
        self.path, self.reason = Path(path), reason
        super().__init__(f"{path}: {reason}")


class Checkpoint(NamedTuple):
    tensors: dict[str, Tensor]
    about: dict[str, object]  # format, settings, image_shape, step, ...

    def part(self, prefix: str) -> dict[str, Tensor]:
        """The tensors below `prefix/`, by the rest of their names."""
        return {name[len(prefix) + 1 :]: x for name, x in self.tensors.items() if name.startswith(prefix + "/")}


def write(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, object]) -> None:
    """Write a checkpoint so that `path` holds either the old file or the whole new one, whatever happens.

    Raises:
        CheckpointError: the file cannot be written; the one that was there before is untouched.
    """
    path = Path(path)
    data = safetensors.torch.save(
        {name: x.detach().to("cpu", copy=True).contiguous() for name, x in tensors.items()},
        {"ivfast": json.dumps({"format": FORMAT, **about})},
    )
    try:
        files.replace(path, data)
    except OSError as error:
        kept = "the previous checkpoint is intact" if path.exists() else "there was no previous checkpoint"
        raise CheckpointError(path, f"the checkpoint could not be written ({error}); {kept}") from error


def read(path: Path) -> Checkpoint:
    """Raises CheckpointError for a file that is missing, truncated, foreign or of another format."""
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(path, "the file does not exist")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118  not a dict
    except (SafetensorError, OSError) as error:
        raise CheckpointError(path, f"it is not a complete safetensors file ({error})") from error
    if "ivfast" not in metadata:
        raise CheckpointError(path, "it is a safetensors file, but not a checkpoint of ivfast")
    about = json.loads(metadata["ivfast"])
    if about["format"] != FORMAT:
        raise CheckpointError(path, f"it has format {about['format']}, and this version of ivfast reads {FORMAT}")
    return Checkpoint(tensors, about)


def settings_of(checkpoint: Checkpoint, path: Path) -> Settings:
    try:
        return Settings.from_dict(checkpoint.about["settings"])
    except (TypeError, ValueError) as error:
        raise CheckpointError(path, f"its settings cannot be used: {error}") from error


def load_weights(system: System, weights: Mapping[str, Tensor], path: Path) -> None:
    """Copy `weights` into the system's networks.

    Raises:
        CheckpointError: a tensor that is missing, unknown or of another shape.
    """
    own = torch.nn.ModuleDict(system.modules).state_dict()
    for name in sorted(own.keys() | weights.keys()):
        if name not in weights:
            raise CheckpointError(path, f"the weight {name} is missing")
        if name not in own:
            raise CheckpointError(path, f"it has a weight {name}, which {system.settings.system} does not have")
        if own[name].shape != weights[name].shape:
            raise CheckpointError(
                path, f"the weight {name} must have shape {tuple(own[name].shape)}, got {tuple(weights[name].shape)}"
            )
    with torch.no_grad():
        for name, value in own.items():
            value.copy_(weights[name])


def optimizer_tensors(system: System) -> dict[str, Tensor]:
    """Optimizer state by `<phase>/<parameter>/<key>`. Rates and other numbers follow from the settings."""
    tensors = {}
    for phase in system.phases:
        for index, values in phase.optimizer.state_dict()["state"].items():
            for key, value in values.items():
                if not isinstance(value, Tensor):
                    raise TypeError(f"optimizer state {key!r} of phase {phase.name!r} must be a tensor, got {value!r}")
                tensors[f"{phase.name}/{index}/{key}"] = value
    return tensors


def load_optimizers(system: System, tensors: Mapping[str, Tensor]) -> None:
    for phase in system.phases:
        state: dict[int, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            owner, index, key = name.rsplit("/", 2)
            if owner == phase.name:
                state.setdefault(int(index), {})[key] = value
        groups = phase.optimizer.state_dict()["param_groups"]
        phase.optimizer.load_state_dict({"state": state, "param_groups": groups})


def random_state(device: str) -> dict[str, Tensor]:
    """States of PyTorch's generators for the CPU and for a CUDA `device`."""
    states = {"cpu": torch.get_rng_state()}
    if torch.device(device).type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def load_random_state(states: Mapping[str, Tensor], device: str) -> None:
    torch.set_rng_state(states["cpu"])
    if torch.device(device).type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
