"""What keeps a step from being a CUDA graph: the watch names the operator, the phase and the reason."""

import dataclasses
import warnings

import pytest
import torch
from helpers import small
from tapes import assert_same_bits, random_images, tapes, train

from ivfast.models.ivaae import WaeMmd
from ivfast.train.watch import CannotCapture, Watch


def test_warnings_of_a_watched_step_reach_the_caller():
    with pytest.warns(UserWarning, match="mind the step"):
        Watch(lambda: "").step(lambda: warnings.warn("mind the step", stacklevel=1))


library = torch.library.Library("ivfast_test", "DEF")
library.define("waiting(Tensor x) -> Tensor")


@torch.library.impl(library, "waiting", "CompositeExplicitAutograd")
def _waiting(x):
    """Synchronisations as PyTorch's own operators report them."""
    warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
    return x.sum()


class Faulty(WaeMmd):
    """A term that a graph could not hold or would get wrong."""

    kind, number, kept, mean = "", 0, (), None

    def __init__(self, settings, image_shape):
        with torch.random.fork_rng():
            torch.manual_seed(settings.seed)
            super().__init__(settings, image_shape)
        self.kept, self.own = [], torch.Generator().manual_seed(1)

    def autoencoder_loss(self, shared):
        terms = super().autoencoder_loss(shared)
        terms["recon"] = terms["recon"] + getattr(self, self.kind)(shared.z, terms["recon"].detach())
        return terms

    def item(self, z, loss):
        return 0.1 * loss.item()

    def branch(self, z, loss):
        return 0.1 if loss > 1 else 0.2

    def cpu(self, z, loss):
        return loss.cpu()

    def numpy(self, z, loss):
        return float(loss.numpy())

    def mask(self, z, loss):
        return z[z > 0].sum()

    def nonzero(self, z, loss):
        return z.detach().nonzero().sum()

    def svd(self, z, loss):
        return torch.linalg.svd(z.detach())[1].sum()

    def waiting(self, z, loss):
        return torch.ops.ivfast_test.waiting(z.detach())

    def counting(self, z, loss):
        self.number += 1
        return z.square().sum() * self.number

    def course(self, z, loss):
        self.number += 1
        return z.square().sum() if self.number % 2 else z.abs().sum()

    def longer(self, z, loss):
        self.number += 1
        return sum(z.square().sum() for _ in range(self.number))

    def moving(self, z, loss):
        old = z.detach().mean(0) if self.mean is None else self.mean
        self.mean = 0.9 * old + 0.1 * z.detach().mean(0)
        return (z - old).square().sum()

    def growing(self, z, loss):
        self.kept.append(z.detach().clone())
        return z.square().sum()

    def constant(self, z, loss):
        return z.sum() * torch.tensor(0.1)

    def generator(self, z, loss):
        return (z * torch.randn(z.shape, generator=self.own)).sum()


FAULTS = {
    "item": (r"Tensor\.item", "copies values to the host"),
    "branch": (r"Tensor\.__bool__", "reads a value on the host"),
    "cpu": (r"Tensor\.cpu", "copies values to the host"),
    "numpy": (r"Tensor\.numpy", "copies values to the host"),
    "mask": (r"aten\.index\.Tensor", "takes a mask"),
    "nonzero": (r"aten\.nonzero\.default", "has a shape that depends on values"),
    "svd": (r"aten\._linalg_svd\.default", "waits for its error code"),
    "waiting": (r"ivfast_test\.waiting\.default", "waits for the device"),
    "counting": (r"aten\.mul\.Tensor", "got 3, and 2 in the previous step: put a value that changes into a tensor"),
    "course": (r"aten\.\w+\.\w+", "is called where the previous step called"),
    "longer": (r"aten\.\w+\.\w+", "is called where the previous step called|was not called in the previous step"),
    "moving": (r"aten\.\w+\.\w+", "reads a tensor that has moved since the previous step"),
    "growing": (r"aten\.clone\.default", "made a tensor that is still held after the next step"),
    "constant": (r"torch\.tensor", "makes a tensor from values on the host"),
    "generator": (r"aten\.randn\.generator", "draws from its own generator"),
}


def test_every_fault_is_tried():
    ours = {name for name in vars(Faulty) if callable(getattr(Faulty, name)) and not name.startswith("_")}
    assert set(FAULTS) == ours - {"autoencoder_loss"}


@pytest.mark.filterwarnings("ignore:called a synchronizing")
@pytest.mark.parametrize("fault", FAULTS)
def test_a_step_that_cannot_be_captured_says_which_op_of_which_phase_and_runs_without(fault, tmp_path):
    (op, reason), images = FAULTS[fault], random_images()

    def faulty(settings, shape):
        system = Faulty(settings, shape)
        system.kind = fault
        return system

    settings = small("wae-mmd", steps=9)
    train(settings, images, tmp_path / "plain", faulty)
    with tapes() as made:
        _, history = train(settings, images, tmp_path / "tried", faulty)
        with pytest.raises(CannotCapture, match=rf"in phase 'autoencoder', {op} ({reason})") as caught:
            train(dataclasses.replace(settings, capture=True), images, tmp_path / "required", faulty)
    assert caught.value.place == "phase 'autoencoder'"
    assert not any(tape.recorded for tape in made)
    (line,) = (line for line in history if line["kind"] == "capture")
    assert line["captured"] is False
    assert "in phase 'autoencoder', " in line["why"]
    assert_same_bits(tmp_path / "plain", tmp_path / "tried")
