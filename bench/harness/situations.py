"""Ops and training steps in the situations that only a device has: graphs, streams, a second device, the settings of
matrix products. A CPU tries what it can: threads for streams, and the training steps.
"""

import contextlib
import dataclasses
import functools
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from ivfast import models, testing
from ivfast.train import Settings, checkpoint
from ivfast.train.loop import Interrupted, fit

from .checks import Row, compared, judged, row_of
from .measure import recorded

REPLAYS = 3
LOOSE = 5e-3  # error of an op with TF32 or bf16 products, relative to its largest value
SYSTEMS = ("ivaae-svgd", "ivaae-rad", "wae-mmd", "avb", "as-introvae", "ivdcgan")
ENDS = (torch.inf, -torch.inf)
STEPS = 12  # more than a captured run warms up with


def all_rows(device: str, cases: list[testing.Case], deadline: float) -> Iterator[Row]:
    """A row for each situation and case, and for each system's training step."""
    of_ops = {"replay": replayed, "streams": side_by_side, "second device": elsewhere}
    of_ops |= {name: functools.partial(loosely, setting) for name, setting in PRECISIONS.items()}
    of_steps = {"captured step": captured, "compiled step": compiled, "resumed": resumed}
    for checks, subjects in ((of_ops, cases), (of_steps, SYSTEMS)):
        for what, check in checks.items():
            for subject in subjects:
                yield row_of(what, subject, deadline, functools.partial(check, device, subject))


def outputs_and_gradients(case: testing.Case, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    values, gradients = testing.value_and_gradients(case, tensors)
    return [*values, *gradients]


def different(one, other) -> Row:
    """Whether two results have the same bits, NaN aside, which has many."""
    errors = [
        float((a.double() - b.double()).abs().nan_to_num(torch.inf).max()) for a, b in zip(one, other, strict=True)
        if not torch.equal(a.isnan(), b.isnan()) or not torch.equal(a.nan_to_num(0, *ENDS), b.nan_to_num(0, *ENDS))
    ]  # fmt: skip
    return {"status": "wrong", "reason": f"differs by {max(errors):.2g}"} if errors else {"status": "ok"}


def replayed(device: str, case: testing.Case) -> Row:
    """A graph of the op and its gradient, replayed with new inputs each time, against the calls that it replaces."""
    if device == "cpu":
        return {"status": "absent", "reason": "CUDA graphs need a CUDA device"}
    drawn = [testing.inputs(case, torch.float32, device=device) for _ in range(REPLAYS)]
    expected = [outputs_and_gradients(case, x) for x in drawn]
    held = testing.inputs(case, torch.float32, device=device)
    graph, found = recorded(lambda: outputs_and_gradients(case, held))
    for inputs, wanted in zip(drawn, expected, strict=True):
        with torch.no_grad():
            for place, new in zip(held, inputs, strict=True):
                place.copy_(new)
        graph.replay()
        row = different(found, wanted)
        if row["status"] != "ok":
            return row
    return {"status": "ok"}


def side_by_side(device: str, case: testing.Case) -> Row:
    """The op on two streams, or in two threads, at once, several times, against one after the other."""
    drawn = [testing.inputs(case, torch.float32, device=device) for _ in range(2)]
    expected = [outputs_and_gradients(case, x) for x in drawn]
    found: list[list] = [[], []]

    def work(i: int) -> None:
        stream = torch.cuda.stream(torch.cuda.Stream()) if device == "cuda" else contextlib.nullcontext()
        with stream:
            for _ in range(2 * REPLAYS):
                found[i] = outputs_and_gradients(case, drawn[i])

    if device == "cuda":
        torch.cuda.synchronize()  # the inputs were drawn on another stream
    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if device == "cuda":
        torch.cuda.synchronize()
    if not all(found):
        return {"status": "error", "reason": "a thread stopped with an exception"}
    return different([x for its in found for x in its], [x for its in expected for x in its])


def elsewhere(device: str, case: testing.Case) -> Row:
    """The op on a device that is not the current one."""
    if device == "cpu" or torch.cuda.device_count() < 2:
        return {"status": "absent", "reason": "one device"}
    return compared(case, testing.inputs(case, torch.float32, device="cuda:1"))


@contextlib.contextmanager
def by_name(name: str) -> Iterator[None]:
    """PyTorch's older setting of float32 products."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextlib.contextmanager
def by_backend(name: str) -> Iterator[None]:
    """PyTorch's newer one, which every reading of the older one refuses from then on."""
    backend = torch.backends.cuda.matmul
    before, backend.fp32_precision = backend.fp32_precision, name
    try:
        yield
    finally:
        backend.fp32_precision = before


PRECISIONS = {
    "set_float32_matmul_precision('high')": lambda: by_name("high"),
    "set_float32_matmul_precision('medium')": lambda: by_name("medium"),
    "matmul.fp32_precision = 'tf32'": lambda: by_backend("tf32"),
    "matmul.fp32_precision = 'ieee'": lambda: by_backend("ieee"),
}


def loosely(setting: Callable, device: str, case: testing.Case) -> Row:
    """The op with products of another precision, against the reference by a tolerance for it."""
    with setting():
        errors = testing.compare(case, testing.inputs(case, torch.float32, device=device))
    loose = LOOSE / testing.TOLERANCES[torch.float32]
    return judged({name: error / loose for name, error in errors.items()})


def settings_of(system: str, device: str, **changes) -> Settings:
    values = {"data": "digits", "batch_size": 16, "latent_dim": 8, "width": 32, "steps": STEPS}
    values |= {"device": device, "tensorboard": False} | changes
    return models.settings(system, **models.SYSTEMS[system].Settings.own(values))


def weights(settings: Settings, interrupted: bool = False) -> dict[str, torch.Tensor]:
    """The last checkpoint's tensors of a run, or of one that is interrupted after an epoch and resumed."""
    images = torch.randint(256, (64, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))

    def interrupt(system):
        signal.raise_signal(signal.SIGINT)  # Ctrl-C
        return {}

    with tempfile.TemporaryDirectory() as folder:
        for resume in (False, True) if interrupted else (False,):
            system = models.build(settings, (1, 8, 8))
            labels = torch.arange(len(images)) % 10 if system.labels != "none" else None
            evaluate = interrupt if interrupted and not resume else None
            with contextlib.suppress(Interrupted):
                fit(
                    system, images.to(settings.device), settings, folder,
                    labels=labels, resume=resume, evaluate=evaluate, progress=False,
                )  # fmt: skip
        return checkpoint.read(Path(folder) / checkpoint.LAST).tensors


def same_weights(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> Row:
    return different(list(one.values()), [other[name] for name in one])


def captured(device: str, system: str) -> Row:
    """Steps as CUDA graphs have the bits of eager ones."""
    if device == "cpu":
        return {"status": "absent", "reason": "CUDA graphs need a CUDA device"}
    plain = settings_of(system, device, capture=False)
    return same_weights(weights(plain), weights(dataclasses.replace(plain, capture=True)))


def compiled(device: str, system: str) -> Row:
    """Compiled steps train to finite weights; they round in another order."""
    if device == "cpu":
        return {"status": "absent", "reason": "takes minutes on a CPU"}
    found = weights(settings_of(system, device, compile=True, capture=False))
    finite = all(bool(x.isfinite().all()) for x in found.values() if x.is_floating_point())
    return {"status": "ok"} if finite else {"status": "wrong", "reason": "weights are not finite"}


def resumed(device: str, system: str) -> Row:
    """A run that is interrupted and resumed against one that is not: the same bits on a CPU, close on a GPU."""
    settings = settings_of(system, device, evaluate_every=1)
    one, other = weights(settings), weights(settings, interrupted=True)
    if device == "cpu":
        return same_weights(one, other)
    errors = {
        name: testing.error(other[name].cpu(), x.cpu()) / LOOSE for name, x in one.items() if x.is_floating_point()
    }
    return judged(errors)
