"""A step of training as phases: which parameters move, by which optimizer, on which loss, how often."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

import ivfast

from ..optim import Adam
from .settings import Settings


@dataclass(eq=False)
class Phase:
    """One optimizer step on one loss.

    Attributes:
        name: appears in the log and in errors.
        optimizer: its parameters are the only ones that move, and the only ones whose gradients are computed.
        loss: what `System.share` returned -> named terms, scalars whose sum is minimised. The names reach the log and
            the guard against NaN, so the terms carry their weights and signs.
        interval: run at every step whose number (from 0) it divides.
        retain_graph: a later phase of the step walks a graph that this one has walked.
        compile: False keeps the loss out of `torch.compile` (double backward does not work under it).
    """

    name: str
    optimizer: torch.optim.Optimizer
    loss: Callable[[object], Mapping[str, Tensor]]
    interval: int = 1
    retain_graph: bool = False
    compile: bool = True
    parameters: list[nn.Parameter] = field(init=False)

    def __post_init__(self):
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]


class System:
    """What a paper trains: networks and the phases of a step. It saves, logs and moves nothing by itself.

    A subclass's constructor takes `(settings, image_shape)` and fills `modules`, moves them to `settings.device`, then
    fills `phases`. Images are float `[B, C, H, W]` in [-1, 1] throughout. On CUDA a step becomes a graph, unless it
    reads values on the host, or changes anything but tensors in place from step to step (see `ivfast/train/watch.py`).

    Attributes:
        labels: "none"; "all" where every image needs one; "some" where −1 stands for none; "source" where
            −1 marks images of the target domain.
        Settings: the class of its settings; each system reads all that its class has.
        settings, image_shape: what it was built from; `(C, H, W)`.
        latent_dim: d, the size of a code.
        modules: name -> network. Weights, EMA and learning rates go by these names.
        class_names: one per label where it reads labels and they are known; kept in checkpoints.
        phases: run in this order in every step.
        ops: where its losses find what looks at a batch as a whole, and noise: `ivfast`, or the same names over a batch
            that is spread over ranks (`ivfast.train.ranks.Ops`).
    """

    labels: str = "none"
    class_names: tuple[str, ...] = ()
    Settings: type[Settings] = Settings
    modules: dict[str, nn.Module]
    phases: list[Phase]

    def __init__(self, settings: Settings, image_shape: tuple[int, int, int]):
        self.settings, self.image_shape, self.latent_dim = settings, tuple(image_shape), settings.latent_dim
        self.modules, self.phases, self.ops = {}, [], ivfast
        if not isinstance(settings, self.Settings):
            raise TypeError(f"settings must be {self.Settings.__name__}, got {type(settings).__name__}")

    @classmethod
    def preset(cls, data: str) -> dict[str, object]:
        """The paper's settings for a data set, as fields of its family's `Settings`."""
        return {}

    @classmethod
    def misfit(cls, data: str) -> str | None:
        """Why the system cannot learn from the data set of that name, as a phrase after its own; None where it may."""
        return None

    def share(self, x: Tensor) -> object:
        """The forward pass that a step runs once; every phase of the step gets its result.

        Called as `share(x, labels)` where the system reads labels.
        """
        return x

    def prior_codes(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """n codes from N(0, I), `[n, d]`. The generator may live on the CPU while the system does not."""
        device = self.settings.device
        place = device if generator is None else generator.device
        return torch.randn(n, self.latent_dim, generator=generator, device=place).to(device)

    def randn_like(self, z: Tensor) -> Tensor:
        """Standard normal noise for the rows of a batch `[n, d]`."""
        return torch.randn_like(z) if self.ops is ivfast else self.ops.randn_like(z)

    def to_device(self) -> None:
        """Move the networks; convolutions with their channels last, which CPUs and tensor cores read faster."""
        for module in self.modules.values():
            convolves = any(isinstance(part, nn.Conv2d | nn.ConvTranspose2d) for part in module.modules())
            module.to(self.settings.device, memory_format=torch.channels_last if convolves else None)

    def train(self, mode: bool = True) -> None:
        for module in self.modules.values():
            module.train(mode)

    def adam(self, *names: str) -> Adam:
        """Adam on the named modules, each at its own learning rate from the settings, fused where the device can.

        Rates are tensors there, so that a captured step can follow them: in float64, or in float32 as CUDA wants them.
        """
        device = torch.device(self.settings.device)
        fused = device.type in ("cpu", "cuda")
        groups = []
        for name in names:
            rate = self.settings.learning_rate(name)
            dtype = torch.float32 if device.type == "cuda" else torch.float64
            tensor = torch.tensor(rate, dtype=dtype, device=device) if fused else rate
            groups.append({"params": list(self.modules[name].parameters()), "lr": tensor, "initial_lr": rate})
        return Adam(groups, betas=tuple(self.settings.betas), fused=fused, capturable=device.type == "cuda")
