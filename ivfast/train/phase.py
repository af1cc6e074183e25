"""A step of training as phases: which parameters move, by which optimizer, on which loss, how often."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

import ivfast

from .. import _defaults
from ..distributed import exchange
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


@dataclass(frozen=True)
class Part:
    """The rows of a batch that a process has: all of them, or the `rank`-th of `world` equal parts.

    Every rank draws for the whole batch, from a generator in the same state, and takes its rows.
    """

    rank: int = 0
    world: int = 1

    def draw(self, sample: Callable[..., Tensor], shape: Sequence[int], dim: int = 0, **keywords: object) -> Tensor:
        """This part's rows, along `dim` of `shape`, of what `sample(shape, **keywords)` gives for the whole batch."""
        if self.world == 1:
            return sample(shape, **keywords)
        whole = list(shape)
        whole[dim] *= self.world
        return sample(whole, **keywords).narrow(dim, self.rank * shape[dim], shape[dim])

    def sum(self, x: Tensor) -> Tensor:
        """The sum of x over the parts. Its gradient is that of the sum of the parts' losses."""
        return x if self.world == 1 else exchange.total(x, None)


class System:
    """What a paper trains: networks and the phases of a step. It saves, logs and moves nothing by itself.

    A subclass's constructor takes `(settings, image_shape)` and fills `modules`, moves them to `settings.device`, then
    fills `phases`. Images are float `[B, C, H, W]` in [-1, 1] throughout. On CUDA a step becomes a graph, unless it
    reads values on the host, or changes anything but tensors in place from step to step (see `ivfast/train/watch.py`).

    Losses are means over a batch, of which a process may have a part. So whatever else looks at the batch goes through
    `ops`, `mean` and `mean_over_parts`, and all noise through `randn`, `randn_like`, `rand` and `randint`.

    Attributes:
        labels: "none"; "all" where every image needs one; "some" where −1 stands for none; "source" where
            −1 marks images of the target domain.
        Settings: the class of its settings; each system reads all that its class has.
        settings, image_shape: what it was built from; `(C, H, W)`.
        latent_dim: d, the size of a code.
        modules: name -> network. Weights, EMA and learning rates go by these names.
        rated: the names of learning rates that it has read.
        class_names: one per label where it reads labels and they are known; kept in checkpoints.
        phases: run in this order in every step.
        ops: where its losses find the ops that look at a batch as a whole or draw: `ivfast`, or the same names over a
            batch that is spread over ranks (`ivfast.train.spread.Ops`).
        part: the rows of a batch that it gets.
        packing: a batch's rows are judged so many at a time, which no two parts divide.
    """

    labels: str = "none"
    class_names: tuple[str, ...] = ()
    Settings: type[Settings] = Settings
    packing: int = 1
    modules: dict[str, nn.Module]
    phases: list[Phase]

    def __init__(self, settings: Settings, image_shape: tuple[int, int, int]):
        self.settings, self.image_shape, self.latent_dim = settings, tuple(image_shape), settings.latent_dim
        self.modules, self.phases, self.ops, self.part = {}, [], ivfast, Part()
        self.rated: list[str] = []
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

    def check(self) -> None:
        """What is right about settings and networks together, once the system is built.

        Raises:
            ValueError: by the setting.
        """
        if unknown := [name for name in self.settings.learning_rates if name not in ("default", *self.rated)]:
            raise ValueError(
                f"learning_rates has {', '.join(map(repr, unknown))}, which {self.settings.system} does not have; "
                f"its rates are {', '.join(self.rated)} and default, for the others"
            )
        norms = [part for module in self.modules.values() for part in module.modules()]
        if self.settings.batch_size < 2 and any(isinstance(norm, nn.BatchNorm1d) for norm in norms):
            raise ValueError(f"batch_size must be at least 2 for batch normalisation, got {self.settings.batch_size}")

    def learning_rate(self, name: str) -> float:
        """The base rate of a network, or of something else that the system's constructor names."""
        if name not in self.rated:
            self.rated.append(name)
        return self.settings.learning_rate(name)

    def share(self, x: Tensor) -> object:
        """The forward pass that a step runs once; every phase of the step gets its result.

        Called as `share(x, labels)` where the system reads labels.
        """
        return x

    def plan(self, steps: int) -> None:
        """Told, before the first step, how many the run has.

        Raises:
            ValueError: a schedule that does not fit into them.
        """

    def prior_codes(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """n codes from N(0, I), `[n, d]`. The generator may live on the CPU while the system does not."""
        device = self.settings.device
        place = device if generator is None else generator.device
        z = torch.randn(n, self.latent_dim, generator=generator, dtype=_defaults.DTYPE, device=place)
        return z.to(device)

    def randn(self, n: int, *shape: int) -> Tensor:
        """Standard normal noise `[n, *shape]` for the n rows of a batch."""
        return self.part.draw(torch.randn, (n, *shape), dtype=_defaults.DTYPE, device=self.settings.device)

    def randn_like(self, x: Tensor) -> Tensor:
        """Standard normal noise for the rows of a batch `[n, ...]`."""
        return self.part.draw(torch.randn, x.shape, dtype=x.dtype, device=x.device)

    def rand(self, n: int, *shape: int) -> Tensor:
        """Uniform numbers in [0, 1), `[n, *shape]`, for the n rows of a batch."""
        return self.part.draw(torch.rand, (n, *shape), dtype=_defaults.DTYPE, device=self.settings.device)

    def randint(self, high: int, n: int) -> Tensor:
        """Uniform integers in [0, high), `[n]`, for the n rows of a batch."""
        return self.part.draw(functools.partial(torch.randint, high), (n,), device=self.settings.device)

    def reparameterize(self, mu: Tensor, logvar: Tensor, kinds: int = 1) -> ivfast.ops.gaussian.Reparameterized:
        """Codes of the posteriors of so many kinds of batches `[kinds n, d]`, and their KLs to the prior."""
        noise = torch.cat([self.randn_like(part) for part in mu.chunk(kinds)])
        return ivfast.reparameterize(mu, logvar, draws=noise)

    def mean(self, values: Tensor, chosen: Tensor) -> Tensor:
        """The mean of `values [n]` over the rows `chosen [n]` of the whole batch, 0 where there is none.

        On a part, the sum over its own rows divided by the mean count of a part: the mean over the parts is that mean.
        """
        count = self.part.sum(chosen.sum()).clamp_min(1)
        return self.part.world * (values * chosen).sum() / count

    def mean_over_parts(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """Each tensor's mean over the parts of a batch, such as a gradient that a loss takes itself; differentiable."""
        if self.part.world == 1:
            return tensors
        flat = self.part.sum(torch.cat([x.flatten() for x in tensors])) / self.part.world
        return [x.view_as(y) for x, y in zip(flat.split([y.numel() for y in tensors]), tensors, strict=True)]

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
            rate = self.learning_rate(name)
            dtype = torch.float32 if device.type == "cuda" else torch.float64
            tensor = torch.tensor(rate, dtype=dtype, device=device) if fused else rate
            groups.append({"params": list(self.modules[name].parameters()), "lr": tensor, "initial_lr": rate})
        return Adam(groups, betas=tuple(self.settings.betas), fused=fused, capturable=device.type == "cuda")
