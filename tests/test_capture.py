"""Steps as CUDA graphs, as far as can be tested on a CPU: a tape replaces the graph, and the watch finds what no graph
can hold."""

import contextlib
import dataclasses
import json
import re
import warnings

import pytest
import torch
from helpers import small
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ivfast.models import SYSTEMS, build
from ivfast.models.ivaae import WaeMmd
from ivfast.ops import bridge
from ivfast.train import Settings, checkpoint
from ivfast.train import run as run_module
from ivfast.train.capture import WARM_UP, Captured, CudaGraphs, choose
from ivfast.train.loop import fit
from ivfast.train.phase import Phase, System
from ivfast.train.run import Run
from ivfast.train.watch import CannotCapture, Watch

SHAPE = (1, 8, 8)
PER_EPOCH = 7  # 60 images in batches of 8, four dropped


class Tape(TorchDispatchMode):
    """A stand-in for a graph: repeats the operators of a step on the tensors it was recorded with, without Python.

    A CPU runs the step while recording it, so its first repetition is already done.
    """

    def __init__(self):
        super().__init__()
        self.recorded = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        if function.namespace != "profiler":
            given = {storage(x) for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
            own = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor) and storage(x) not in given]
            self.calls.append((function, args, kwargs, own, given))
        return result

    def warm_up(self, body):
        body()

    def capture(self, body):
        self.calls = calls = []
        self.recorded += 1
        with self:
            body()
        done = [True]

        @torch.no_grad()
        def replay():
            if done:
                return done.clear()
            for function, args, kwargs, own, given in calls:
                result = function(*args, **kwargs)
                new = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor) and storage(x) not in given]
                for ours, theirs in zip(own, new, strict=True):
                    ours.copy_(theirs)

        return replay


def storage(x):
    return x.untyped_storage().data_ptr()


@pytest.fixture
def images():
    return torch.randint(256, (60, *SHAPE), dtype=torch.uint8)


@pytest.fixture
def tapes(monkeypatch):
    """Makes runs capture on tapes; returns the tapes in order."""
    made = []

    def tape(device):
        made.append(Tape())
        return made[-1]

    @contextlib.contextmanager
    def on():
        with monkeypatch.context() as patch:
            patch.setattr(run_module, "choose", lambda settings: (settings.capture is not False, "a test"))
            patch.setattr(run_module, "CudaGraphs", tape)
            patch.setattr(bridge, "check_range", lambda index, k: None)  # only on the CPU: it reads values
            yield made

    return on


def train(settings, images, out, kind=None, **keywords):
    system = kind(settings, SHAPE) if kind else build(settings, SHAPE)
    if system.labels != "none":
        keywords["labels"] = torch.arange(len(images)) % 10
        if system.labels == "source":
            keywords["labels"][::2] = -1
    return system, fit(system, images, settings, out, progress=False, **keywords)


def assert_same_bits(one, other):
    a, b = (checkpoint.read(out / checkpoint.LAST) for out in (one, other))
    assert a.tensors.keys() == b.tensors.keys()
    different = [
        name
        for name in a.tensors
        if a.tensors[name].dtype != b.tensors[name].dtype
        or not torch.equal(
            a.tensors[name].contiguous().view(-1).view(torch.uint8),
            b.tensors[name].contiguous().view(-1).view(torch.uint8),
        )
    ]
    assert not different
    assert {k: v for k, v in a.about.items() if k != "seconds"} == {k: v for k, v in b.about.items() if k != "seconds"}
    kept = ("step", "epoch", "losses", "learning_rates", "metrics")
    lines = [
        [
            {k: line.get(k) for k in kept}
            for line in map(json.loads, (out / "log.jsonl").read_text().splitlines())
            if line["kind"] != "capture"
        ]
        for out in (one, other)
    ]
    assert lines[0] == lines[1]


def test_warnings_of_a_watched_step_reach_the_caller():
    with pytest.warns(UserWarning, match="mind the step"):
        Watch(lambda: "").step(lambda: warnings.warn("mind the step", stacklevel=1))


@pytest.mark.parametrize(
    ("system", "changes"),
    [(name, {}) for name in SYSTEMS]
    + [
        ("ivaae-svgd", {"ema": 0.9, "milestones": {1: 0.5, 2: 0.1}}),
        ("ivaae-rad", {"net": "conv", "width": 4, "precision": "bf16"}),
        ("wae-gan", {"fld_weight": 0.5}),
        ("ivaae-bw", {"fld_weight": 0.5, "encoder_loss": "confusion"}),
    ],
)
def test_captured_run_has_the_bits_of_an_uncaptured_one(system, changes, images, tapes, tmp_path):
    settings = small(system, **{"ema": 0.8, "milestones": {1: 0.5}, **changes})

    def evaluate(system):
        return {"noise": float(system.sample(3).sum() if hasattr(system, "sample") else torch.rand(()))}

    train(settings, images, tmp_path / "plain", evaluate=evaluate)
    with tapes() as made:
        _, history = train(settings, images, tmp_path / "captured", evaluate=evaluate)
    assert [tape.recorded for tape in made] == [1]
    assert [(line["step"], line["captured"], line["why"]) for line in history if line["kind"] == "capture"] == [
        (WARM_UP + 1, True, "a test")
    ]
    assert_same_bits(tmp_path / "plain", tmp_path / "captured")


def test_captured_and_uncaptured_parts_of_a_run_go_together(images, tapes, tmp_path):
    settings = small(ema=0.9, steps=23, milestones={1: 0.5})
    train(settings, images, tmp_path / "straight")
    train(dataclasses.replace(settings, steps=9), images, tmp_path / "parts")
    with tapes():
        train(dataclasses.replace(settings, steps=17), images, tmp_path / "parts", resume=True)
    train(settings, images, tmp_path / "parts", resume=True)
    for out in ("straight", "parts"):  # evaluations at the ends of parts
        log = [json.loads(line) for line in (tmp_path / out / "log.jsonl").read_text().splitlines()]
        (tmp_path / out / "log.jsonl").write_text("".join(json.dumps(x) + "\n" for x in log if x["kind"] == "losses"))
    assert_same_bits(tmp_path / "straight", tmp_path / "parts")


class Intervals(System):
    """Two phases, the second every third step."""

    def __init__(self, settings, image_shape):
        super().__init__(settings, image_shape)
        with torch.random.fork_rng():
            torch.manual_seed(settings.seed)
            self.modules = {"one": nn.Linear(64, 3), "two": nn.Linear(64, 3)}
        self.phases = [
            Phase("often", self.adam("one"), lambda x: {"fit": self.both(x)}),
            Phase("rare", self.adam("two"), lambda x: {"fit": self.both(x)}, 3),
        ]

    def both(self, x):
        x = (x + torch.randn_like(x)).flatten(1)
        return (self.modules["one"](x) - self.modules["two"](x)).square().mean()


def test_phases_of_an_interval_have_a_graph_per_pattern(images, tapes, tmp_path):
    settings = small(ema=0.9, steps=40, log_every=5)
    train(settings, images, tmp_path / "plain", Intervals)
    with tapes() as made:
        _, history = train(settings, images, tmp_path / "captured", Intervals)
    assert made[0].recorded == 2
    assert [line["step"] for line in history if line["kind"] == "capture"] == [6]  # the fourth step without "rare"
    assert_same_bits(tmp_path / "plain", tmp_path / "captured")


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
def test_a_step_that_cannot_be_captured_says_which_op_of_which_phase_and_runs_without(fault, images, tapes, tmp_path):
    op, reason = FAULTS[fault]

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


class Stubborn(Tape):
    """A device that refuses to capture, as CUDA does: in the middle, and again at the end."""

    def capture(self, body):
        try:
            raise RuntimeError("operation not permitted when stream is capturing\nCompile with ...")
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")


def test_a_capture_that_the_device_refuses_says_where(images, tapes, tmp_path, monkeypatch):
    with tapes():
        monkeypatch.setattr(run_module, "CudaGraphs", lambda device: Stubborn())
        with pytest.raises(CannotCapture) as caught:
            train(small(steps=9), images, tmp_path)
    expected = r"capture \(test_capture.py:\d+\) failed: operation not permitted when stream is capturing; the system trains with --no-capture"
    assert re.search(expected, str(caught.value))
    assert "Compile" not in str(caught.value)


class Descent(WaeMmd):
    def __init__(self, settings, image_shape):
        super().__init__(settings, image_shape)
        parameters = [p for module in self.modules.values() for p in module.parameters()]
        self.phases = [Phase("autoencoder", torch.optim.SGD(parameters, lr=1e-4), self.autoencoder_loss)]


def test_a_rate_that_is_a_number_is_refused_where_milestones_would_change_it(images, tapes, tmp_path):
    settings = small("wae-mmd", milestones={1: 0.5}, steps=9)
    with tapes() as made:
        _, history = train(settings, images, tmp_path / "a", Descent)
        assert "in phase 'autoencoder', SGD has a number as its learning rate" in history[0]["why"]
        _, history = train(dataclasses.replace(settings, milestones={}), images, tmp_path / "b", Descent)
        assert history[0]["captured"] is True
    assert [tape.recorded for tape in made] == [0, 1]


def test_everything_that_a_step_keeps_stays_where_it_is(images):
    settings = small(ema=0.9, milestones={1: 0.5})
    run = Run(build(settings, SHAPE), images, settings, None, None)
    run.advance()

    def addresses():
        weights = [p for module in run.system.modules.values() for p in (*module.parameters(), *module.buffers())]
        states = [x for phase in run.system.phases for s in phase.optimizer.state.values() for x in s.values()]
        rates = [group["lr"] for phase in run.system.phases for group in phase.optimizer.param_groups]
        others = run.batches.rows, run.batches.images, run.record.values, run.record.row, *run.average.weights.values()
        return [x.data_ptr() for x in (*weights, *states, *rates, *others, *run.average.values.values())]

    before = addresses()
    for _ in range(2 * PER_EPOCH):
        if run.step % settings.log_every == 0:
            run.record.clear()
        run.advance()
        assert addresses() == before
    assert float(run.system.phases[0].optimizer.param_groups[0]["lr"]) == 0.5 * settings.learning_rate("default")


def test_a_rate_in_a_tensor_gives_the_bits_of_a_number(images):
    settings = small("ivaae-svgd", milestones={1: 0.3}, log_every=20)
    runs = [Run(build(settings, SHAPE), images, settings, None, None) for _ in range(2)]
    for phase in runs[1].system.phases:
        for group in phase.optimizer.param_groups:
            group["lr"] = group.pop("initial_lr")
    weights = []
    for run in runs:
        torch.manual_seed(settings.seed)
        for _ in range(2 * PER_EPOCH):
            run.advance()
        weights.append(nn.utils.parameters_to_vector(p for m in run.system.modules.values() for p in m.parameters()))
    assert isinstance(runs[1].system.phases[0].optimizer.param_groups[0]["lr"], float)
    assert torch.equal(*weights)


def test_the_default_follows_the_device_and_says_why(images, tmp_path):
    gpu = small(device="cuda")
    assert choose(gpu) == (True, "the default on CUDA: one launch per step")
    assert choose(dataclasses.replace(gpu, capture=False)) == (False, "turned off by --no-capture")
    assert choose(dataclasses.replace(gpu, capture=True, compile=True)) == (True, "requested by --capture")
    assert choose(dataclasses.replace(gpu, compile=True))[0] is False
    with pytest.raises(ValueError, match="capture needs a CUDA device, the run is on cpu; use --no-capture"):
        train(small(capture=True), images, tmp_path / "asked")
    _, history = train(small(steps=2), images, tmp_path / "cpu")
    assert history[0] == {
        "kind": "capture",
        "step": 1,
        "captured": False,
        "why": "CUDA graphs need a CUDA device, the run is on cpu",
    }


def test_old_settings_and_checkpoints_load(images, tmp_path):
    settings = small(steps=9)
    old = {name: value for name, value in settings.to_dict().items() if name != "capture"}
    assert Settings.from_dict(old) == settings
    train(settings, images, tmp_path / "straight")
    train(dataclasses.replace(settings, steps=5), images, tmp_path / "old")
    path = tmp_path / "old" / checkpoint.LAST
    saved = checkpoint.read(path)
    about = {**saved.about, "settings": {**old, "steps": 5}}
    checkpoint.write(path, saved.tensors, {k: v for k, v in about.items() if k != "format"})
    train(settings, images, tmp_path / "old", resume=True)
    a, b = (checkpoint.read(tmp_path / out / checkpoint.LAST).tensors for out in ("straight", "old"))
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("system", SYSTEMS)
def test_cuda_graphs_give_the_bits_of_eager_steps(system, precision, images, tmp_path):
    settings = small(system, device="cuda", precision=precision, ema=0.9, milestones={1: 0.5}, steps=30)
    for name, value in (("plain", False), ("captured", True)):
        _, history = train(dataclasses.replace(settings, capture=value), images.cuda(), tmp_path / name)
        assert history[0]["captured"] is value
    a, b = (checkpoint.read(tmp_path / out / checkpoint.LAST).tensors for out in ("plain", "captured"))
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_names_what_it_could_not_capture(images, tmp_path):
    settings = small(device="cuda", capture=True)
    run = Run(build(settings, SHAPE), images.cuda(), settings, None, None)
    body = run.body

    def waits(due):
        body(due)
        torch.cuda.synchronize()  # not visible to any operator

    run.take = Captured(waits, lambda: run.place, CudaGraphs(run.device), required=True)
    for _ in range(WARM_UP):
        run.advance()
    with pytest.raises(CannotCapture, match=r"in the record of losses, .* failed: "):
        run.advance()
