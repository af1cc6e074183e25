"""Settings: everything that a run depends on, in a frozen record that goes through JSON and back.

`Settings` holds what every run has. A system's own settings are in a subclass beside what reads them, as in
`ivfast/models/ivaae.py`; `ivfast.models.preset` fills them in, `dataclasses.replace(settings, seed=1)` changes one.
"""

import dataclasses
import functools
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from . import files
from .declare import DATA, LENGTH, MACHINE, NETWORKS, OPTIMIZER, RUN, About, about, did_you_mean, setting

_STREAMS = ("weights", "noise", "order")
_systems: dict[str, type] = {}


@dataclass(frozen=True)
class Settings:
    """What every run has: data, length, networks, optimizer, machine, log.

    Raises:
        ValueError: a value out of range, or a setting that the system does not have, by its name.
    """

    system: str = setting("ivaae-rad", help="System to train.", panel=RUN, option="")
    data: str = setting("digits", help="Data set.", panel=DATA)
    root: str = setting("data", help="Folder that holds the data set.", panel=DATA, metavar="DIR", resumable=True)
    image_size: int | None = setting(
        None, help="Resize images to S x S pixels.", panel=DATA, at_least=1, metavar="S", none="the data set's own size"
    )
    flip: bool = setting(False, help="Mirror training images at random, left to right. The papers do not.", panel=DATA)
    data_share: float = setting(
        1.0, help="Share of the training images to use, the same for each class.", panel=DATA, above=0, at_most=1,
        metavar="P",
    )  # fmt: skip
    data_memory: float | None = setting(
        None,
        help="Device memory for the training images, in GiB. A larger set stays on the host and is prefetched.",
        panel=DATA,
        at_least=0,
        metavar="GIB",
        none="half of the free memory",
        resumable=True,
    )
    epochs: int = setting(300, help="Passes over the data.", panel=LENGTH, at_least=1, resumable=True)
    steps: int | None = setting(
        None,
        help="Optimizer steps; overrides --epochs.",
        panel=LENGTH,
        at_least=1,
        none="set by --epochs",
        resumable=True,
    )
    batch_size: int = setting(
        64, help="Images per step; an epoch's last, partial batch is dropped.", panel=LENGTH, at_least=1, metavar="B"
    )
    latent_dim: int = setting(16, help="Dimensions of a code.", panel=NETWORKS, at_least=1, metavar="D")
    net: str = setting(
        "mlp", help="Fully connected or convolutional networks.", panel=NETWORKS, choices=("mlp", "conv")
    )
    width: int = setting(
        1024, help="Units per hidden layer, or channels of a conv net's first layer.", panel=NETWORKS, at_least=1
    )
    depth: int = setting(2, help="Hidden layers of an mlp.", panel=NETWORKS, at_least=0)
    ema: float = setting(
        0.0,
        help="Decay of the moving average of the weights, such as 0.999; 0 turns it off.",
        panel=OPTIMIZER,
        at_least=0,
        below=1,
        must="be 0 (off) or a decay below 1",
        metavar="DECAY",
    )
    learning_rates: dict[str, float] = setting(  # noqa: RUF009
        {"default": 1e-3}, help='Learning rate of each network by its name; "default" is for the others.',
        panel=OPTIMIZER, above=0,
    )  # fmt: skip
    betas: tuple[float, float] = setting(
        (0.9, 0.999), help="Adam's two decay rates.", panel=OPTIMIZER, at_least=0, below=1
    )
    milestones: dict[int, float] = setting(  # noqa: RUF009
        {},
        help="Factors on every learning rate, by the epoch at which each starts. They multiply.",
        panel=OPTIMIZER,
        at_least=0,
    )
    device: str = setting(
        "cpu", help="cpu, cuda or cuda:N; presets use a GPU if there is one.", panel=MACHINE, resumable=True
    )
    precision: str = setting(
        "fp32", help="bf16 uses autocast: weights stay in fp32.", panel=MACHINE, choices=("fp32", "bf16")
    )
    compile: bool = setting(
        False, help="Compile the forward pass and the losses with torch.compile.", panel=MACHINE, resumable=True
    )
    capture: bool | None = setting(
        None,
        help="Run each step as one CUDA graph.",
        panel=MACHINE,
        none="on a GPU if the system allows it, without --compile",
        resumable=True,
    )
    seed: int = setting(
        0, help="Seed of the weights, the noise and the order of the data.", panel=RUN, at_least=0, metavar="S"
    )
    log_every: int = setting(50, help="Steps between lines of the log.", panel=RUN, at_least=1)
    evaluate_every: int = setting(
        10, help="Epochs between evaluations, which also draw pictures.", panel=RUN, at_least=1, resumable=True
    )
    save_every: int = setting(10, help="Epochs between checkpoints.", panel=RUN, at_least=1, resumable=True)
    tensorboard: bool = setting(True, help="Write TensorBoard event files.", panel=RUN, resumable=True)

    def __new__(cls, *values, **named):
        unknown = [name for name in named if name not in cls.declared()]
        if unknown:
            raise refusal(unknown, named.get("system"), cls)
        return super().__new__(cls)

    def __post_init__(self):
        for name, entry in self.declared().items():
            object.__setattr__(self, name, entry.plain(getattr(self, name)))
            entry.check(getattr(self, name))

    @classmethod
    def declared(cls) -> dict[str, About]:
        """Its settings by their names, and what is said about each."""
        return _declared(cls)

    @classmethod
    def own(cls, values: Mapping[str, object]) -> dict[str, object]:
        """The part of `values`, given to several systems, that this class has.

        Raises:
            ValueError: a name that no system has.
        """
        unknown = [name for name in values if name not in cls.declared() and not readers(name)]
        if unknown:
            raise refusal(unknown, None, cls)
        return {name: value for name, value in values.items() if name in cls.declared()}

    def stream(self, purpose: str) -> int:
        """The seed of one of the independent random streams that `seed` starts: "weights", "noise" or "order"."""
        import torch

        seeds = torch.randint(2**31, (len(_STREAMS),), generator=torch.Generator().manual_seed(self.seed), device="cpu")
        return int(seeds[_STREAMS.index(purpose)])

    def learning_rate(self, module: str) -> float:
        """The base rate of a module, before milestones."""
        rates = self.learning_rates
        if module not in rates and "default" not in rates:
            raise ValueError(f"learning_rates must name {module!r} or 'default', got {sorted(rates)}")
        return rates.get(module, rates.get("default"))

    def learning_rate_factor(self, epoch: int) -> float:
        """Product of the factors of all milestones up to `epoch` (from 0)."""
        factor = 1.0
        for milestone in sorted(self.milestones):
            if epoch >= milestone:
                factor *= self.milestones[milestone]
        return factor

    def to_dict(self) -> dict[str, object]:
        """A dictionary that JSON can hold."""
        return {name: entry.encode(getattr(self, name)) for name, entry in self.declared().items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> "Settings":
        """Inverse of `to_dict`: the settings of the system that `values` name.

        Raises:
            ValueError: no dictionary, an unknown system, a setting that the system does not have, a value out of range.
        """
        if not isinstance(values, Mapping):
            raise ValueError(f"settings must be an object, got {values!r:.80}")
        kind = kind_of(str(values.get("system", cls.declared()["system"].default))) if cls is Settings else cls
        known = kind.declared()
        return kind(**{name: known[name].decode(value) if name in known else value for name, value in values.items()})

    def save(self, path: Path) -> None:
        files.replace(path, f"{json.dumps(self.to_dict(), indent=2)}\n".encode())

    @classmethod
    def load(cls, path: Path) -> "Settings":
        """Raises ValueError that names the file, for what `from_dict` refuses and for what is not JSON."""
        try:
            return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: {error}") from error


@functools.cache
def _declared(kind: type[Settings]) -> dict[str, About]:
    return {field.name: about(field) for field in dataclasses.fields(kind)}


def register(systems: dict[str, type]) -> None:
    """Name -> class of each system; `ivfast.models` calls this, so that settings can be read and refused by system."""
    global _systems
    _systems = systems


def kind_of(system: str) -> type[Settings]:
    """The settings class of a system; ValueError for one that does not exist."""
    if not _systems:
        raise ValueError(f"the settings of {system} are in ivfast.models: import it first")
    if system not in _systems:
        raise ValueError(no_system(system, _systems))
    return _systems[system].Settings


def no_system(name: str, known: Iterable[str]) -> str:
    return f"there is no system {name!r}; {did_you_mean(name, known) or 'ivfast train --help lists them'}"


def readers(name: str) -> list[str]:
    """The systems that have a setting."""
    return [system for system, factory in _systems.items() if name in factory.Settings.declared()]


def one_of(names: Iterable[str], all_names: Iterable[str]) -> str:
    """Names as a phrase: themselves, or those that are not among them where these are fewer."""
    names, others = list(names), [name for name in all_names if name not in names]
    if not others:
        return "all"
    return ", ".join(names) if len(names) < len(others) else f"all but {', '.join(others)}"


def refusal(names: Iterable[str], system: str | None, kind: type[Settings]) -> ValueError:
    """The error about settings that `system` does not have: who reads the first of them, or what it may have meant."""
    names, whose = list(names), system or kind.__name__
    for name in names:
        reading = readers(name)
        if reading:
            return ValueError(f"{name} has no effect on {whose}; it is read by {one_of(reading, _systems)}")
    near = did_you_mean(names[0], kind.declared(), 0.75)
    hint = f"; {near}" if near else f", which {whose} does not have"
    return ValueError(f"unknown settings: {', '.join(names)}{hint}")
