"""The losses as modules, with the habits of torch.nn."""

from torch import Tensor, nn

from .ops.as_distance import as_distance
from .ops.mmd import mmd
from .ops.multi_js import multi_js_loss


class MultiJSLoss(nn.Module):
    """`multi_js_loss` with its block weights π `[C]` (None: equal) as a buffer."""

    def __init__(self, weights: Tensor | None = None):
        super().__init__()
        self.register_buffer("weights", weights)

    def forward(self, logits: Tensor) -> Tensor:
        return multi_js_loss(logits, weights=self.weights)


class MMDLoss(nn.Module):
    """`mmd` with its kernel, scales, bandwidth and form fixed."""

    def __init__(
        self,
        kernel: str = "imq",
        scales: tuple[float, ...] | None = None,
        bandwidth: float | Tensor | str | None = None,
        unbiased: bool = True,
    ):
        super().__init__()
        self.kernel, self.scales, self.unbiased = kernel, scales, unbiased
        if isinstance(bandwidth, Tensor):
            self.register_buffer("bandwidth", bandwidth)
        else:
            self.bandwidth = bandwidth

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return mmd(x, y, kernel=self.kernel, scales=self.scales, bandwidth=self.bandwidth, unbiased=self.unbiased)

    def extra_repr(self) -> str:
        return f"kernel={self.kernel!r}, scales={self.scales}, unbiased={self.unbiased}"


class ASDistance(nn.Module):
    """`as_distance` with its kernel, measure and form fixed."""

    def __init__(self, kernel: str = "product", measure: str = "lebesgue", log: bool = False, unbiased: bool = False):
        super().__init__()
        self.form = {"kernel": kernel, "measure": measure, "log": log, "unbiased": unbiased}

    def forward(self, mu_r: Tensor, logvar_r: Tensor, mu_g: Tensor, logvar_g: Tensor) -> Tensor:
        return as_distance(mu_r, logvar_r, mu_g, logvar_g, **self.form)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.form.items())
