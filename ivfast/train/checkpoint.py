"""Checkpoints: one safetensors file with everything that a run needs to go on bit for bit. No pickle.

Tensors: `weights/*`, `average/*` (EMA), `optimizer/<phase>/<parameter>/*`, `batches/*` (data order), `record/*` (losses
not yet logged), `random/*` (PyTorch's generators). The rest is JSON under the metadata key "ivfast", with a CRC-32 of
each tensor; that of the JSON is under the key "crc32". They tell damage from what was written; they are no signature.
Reading checks the file by itself, `ivfast.train.restore` that it fits the run.
"""

import json
import math
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _defaults
from .._extra import needs
from . import files
from .phase import System
from .settings import Settings

with needs("ivfast.train"):
    import safetensors.torch
    from safetensors import SafetensorError, safe_open

FORMAT = 2
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
    copies = {name: x.detach().to("cpu", copy=True).contiguous() for name, x in tensors.items()}
    sums = {name: _checksum(x) for name, x in copies.items()}
    text = json.dumps({**about, "format": FORMAT, "crc32": sums})
    data = safetensors.torch.save(copies, {"ivfast": text, "crc32": _hex(text.encode())})
    try:
        files.replace(path, data)
    except OSError as error:
        kept = "the previous checkpoint is intact" if path.exists() else "there was no previous checkpoint"
        raise CheckpointError(path, f"the checkpoint could not be written ({error}); {kept}") from error


def _hex(data: bytes | memoryview, start: int = 0) -> str:
    return f"{zlib.crc32(data, start):08x}"


def _checksum(x: Tensor) -> str:
    """Of dtype, shape and bytes. It takes 0.4 ms per MB, a tenth of what writing to disk does; BLAKE2 takes 1.9."""
    start = zlib.crc32(f"{x.dtype} {tuple(x.shape)}".encode())
    return _hex(memoryview(x.reshape(-1).view(torch.uint8).numpy()), start)


@_defaults.initial()
def read(path: Path) -> Checkpoint:
    """A checkpoint that holds what was written.

    Raises:
        CheckpointError: a file that is missing, truncated, damaged, foreign or of another format, by the field.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(path, "the file does not exist")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118  not a dict
    except (SafetensorError, OSError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise CheckpointError(path, f"it is not a complete safetensors file ({error})") from error
    if "ivfast" not in metadata:
        raise CheckpointError(path, "it is a safetensors file, but not a checkpoint of ivfast")
    about = _about(path, metadata)
    for name in sorted(tensors.keys() | about["crc32"].keys()):
        if name not in tensors:
            raise CheckpointError(path, f"the tensor {name} is missing")
        if name not in about["crc32"]:
            raise CheckpointError(path, f"it has a tensor {name}, which was not written with it")
        if _checksum(tensors[name]) != about["crc32"][name]:
            raise CheckpointError(path, f"the tensor {name} is damaged: its checksum is not that of what was written")
    return Checkpoint(tensors, about)


def _about(path: Path, metadata: Mapping[str, str]) -> dict:
    """The JSON of a checkpoint, with every field there and of its type."""
    text = metadata["ivfast"]
    try:
        about = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(path, f"its metadata 'ivfast' is not JSON ({error})") from error
    if not isinstance(about, dict):
        raise CheckpointError(path, f"its metadata 'ivfast' must be an object, got {text[:80]!r}")
    if about.get("format") != FORMAT:
        raise CheckpointError(path, f"it has format {about.get('format')!r}, this version of ivfast reads {FORMAT}")
    for name, (must, holds) in _FIELDS.items():
        if name not in about:
            raise CheckpointError(path, f"the field {name} is missing")
        if not holds(about[name]):
            raise CheckpointError(path, f"the field {name} must be {must}, got {json.dumps(about[name])[:80]}")
    if metadata.get("crc32") != _hex(text.encode()):
        raise CheckpointError(path, "its metadata 'ivfast' is damaged: its checksum is not that of what was written")
    return about


def _whole(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _described(record: object) -> bool:
    return (
        isinstance(record, dict)
        and isinstance(names := record.get("names"), list)
        and all(isinstance(name, list) and [type(part) for part in name] == [str, str] for name in names)
        and isinstance(ran := record.get("ran"), dict)
        and all(_whole(count, 0) for count in ran.values())
    )


_FIELDS = {
    "step": ("an integer >= 1", lambda value: _whole(value, 1)),
    "seconds": (
        "a finite number >= 0",
        lambda value: type(value) in (int, float) and math.isfinite(value) and value >= 0,
    ),
    "settings": ("an object", lambda value: isinstance(value, dict)),
    "image_shape": (
        "a list of integers >= 1",
        lambda value: isinstance(value, list) and bool(value) and all(_whole(n, 1) for n in value),
    ),
    "record": ("the names of losses and how often their phases ran", _described),
    "optimizer": (
        "a list of parameters for each phase",
        lambda value: (
            isinstance(value, dict)
            and all(isinstance(indices, list) and all(_whole(i, 0) for i in indices) for indices in value.values())
        ),
    ),
    "crc32": (
        "a checksum for each tensor",
        lambda value: isinstance(value, dict) and all(isinstance(text, str) for text in value.values()),
    ),
}


def settings_of(checkpoint: Checkpoint, path: Path) -> Settings:
    try:
        return Settings.from_dict(checkpoint.about["settings"])
    except (TypeError, ValueError) as error:
        raise CheckpointError(path, f"its settings cannot be used: {error}") from error


class Layout(NamedTuple):
    shape: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, x: Tensor) -> "Layout":
        return cls(tuple(x.shape), x.dtype)

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} {self.shape}"


def check_layout(tensors: Mapping[str, Tensor], expected: Mapping[str, Layout], path: Path) -> None:
    """Raises CheckpointError for a tensor that is missing, unknown, or of another shape or dtype."""
    for name in sorted(expected.keys() | tensors.keys()):
        if name not in tensors:
            raise CheckpointError(path, f"the tensor {name} is missing")
        if name not in expected:
            raise CheckpointError(path, f"it has a tensor {name}, which the system does not have")
        found = Layout.of(tensors[name])
        if found != expected[name]:
            raise CheckpointError(path, f"the tensor {name} must be {expected[name]}, it is {found}")


def weights_of(system: System) -> dict[str, Tensor]:
    return torch.nn.ModuleDict(system.modules).state_dict()


def load_weights(system: System, weights: Mapping[str, Tensor], path: Path) -> None:
    """Copy `weights` into the system's networks.

    Raises:
        CheckpointError: a tensor that is missing, unknown or of another shape or dtype; nothing was copied.
    """
    own = weights_of(system)
    check_layout(weights, {name: Layout.of(x) for name, x in own.items()}, path)
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


def optimizer_indices(system: System) -> dict[str, list[int]]:
    """By phase, the parameters that have optimizer state."""
    return {phase.name: sorted(phase.optimizer.state_dict()["state"]) for phase in system.phases}


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
