"""Apply a trained system to images and codes: in evaluation mode, without gradients, in batches."""

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from .. import _check, _defaults

BATCH = 500


def to_float(images: Tensor) -> Tensor:
    """uint8 0..255 to float32 [-1, 1]; floating tensors pass through (points)."""
    return images.float() / 127.5 - 1 if images.dtype == torch.uint8 else images


def to_bytes(images: Tensor) -> Tensor:
    """Floats in [-1, 1] to uint8 on the CPU, rounded as in a PNG file; values outside are clamped. Points `[n, D]` are
    not changed.

    Raises:
        ValueError: a pixel that is not finite.
    """
    if not bool(images.isfinite().all()):
        raise ValueError("images must be finite; the system has diverged")
    if images.dim() == 2:
        return images.float().cpu()
    return images.float().add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8).cpu()


@contextlib.contextmanager
def evaluating(system, seed: int = 0) -> Iterator[torch.device]:
    """Evaluation mode without gradients, with noise from `seed`; mode and generators are restored afterwards.

    Yields the system's device.

    Raises:
        ValueError: a seed that is not an integer >= 0.
    """
    _check.count("seed", seed, at_least=0)
    training = any(module.training for module in system.modules.values())
    device = torch.device(system.settings.device)
    random = torch.random.fork_rng([device] if device.type == "cuda" else [])
    system.train(False)
    try:
        with torch.no_grad(), random, _defaults.initial():
            torch.manual_seed(seed)
            yield device
    finally:
        system.train(training)


@contextlib.contextmanager
def evaluation_mode(function: Callable) -> Iterator[None]:
    """Evaluation mode for a network, or for the network whose method `function` is; each module's mode is restored."""
    owner = function if isinstance(function, nn.Module) else getattr(function, "__self__", None)
    training = [module for module in owner.modules() if module.training] if isinstance(owner, nn.Module) else []
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def codes(system, images: Tensor) -> Tensor:
    """E(x) of every image, float32 `[n, d]` on the CPU; for a stochastic encoder, one draw."""
    with evaluating(system) as device:
        return torch.cat([system.encode(to_float(x.to(device))).float().cpu() for x in images.split(BATCH)])


def posterior_codes(system, images: Tensor, seed: int = 0) -> Tensor:
    """A code from the posterior of every image, float32 `[n, d]` on the CPU; E(x) for systems without a posterior.

    Over the images of a data set, these are a sample from the aggregated posterior q(z).
    """
    draw = getattr(system, "draw_codes", None) or system.encode
    with evaluating(system, seed) as device:
        return torch.cat([draw(to_float(x.to(device))).float().cpu() for x in images.split(BATCH)])


def decoded(system, z: Tensor) -> Tensor:
    """G(z) of every code `[n, d]`, as uint8 `[n, C, H, W]` on the CPU."""
    with evaluating(system) as device:
        return torch.cat([to_bytes(system.decode(part.to(device))) for part in z.split(BATCH)])


def generate(system, n: int, seed: int = 0) -> Tensor:
    """n samples as uint8 `[n, C, H, W]`, or points `[n, D]`, reproducible by seed; classes take turns."""
    _check.count("n", n)
    _check.count("seed", seed, at_least=0)
    with evaluating(system) as device:
        generator = torch.Generator(device).manual_seed(seed)
        if getattr(system, "classes", 0):
            parts = (torch.arange(n) % system.classes).split(BATCH)
            images = (system.sample(len(part), generator=generator, labels=part) for part in parts)
        else:
            images = (system.sample(min(BATCH, n - i), generator=generator) for i in range(0, n, BATCH))
        return torch.cat([to_bytes(x) for x in images])
