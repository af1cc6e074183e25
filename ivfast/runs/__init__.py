"""The settings and the folder of a command."""

import dataclasses
import json
import shlex
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from .. import _defaults, models
from .. import data as datasets
from ..data import Dataset, stratified, target_of
from ..data.sources import DATASETS
from ..train import checkpoint
from ..train.average import floating_state
from ..train.declare import did_you_mean
from ..train.log import read_log
from ..train.phase import System
from ..train.run import RESUMABLE
from ..train.settings import Settings, no_system, readers, refusal

RUNS = Path("runs")
DEFAULT = Settings.declared()["system"].default


def unknown(what: str, given: str, known: Iterable[str]) -> ValueError:
    """An error that names the closest known names, or all where none is close."""
    known = list(known)
    hint = did_you_mean(given, known, 0.4) or f"known: {', '.join(known)}"
    return ValueError(f"there is no {what} {given!r}; {hint}")


def assignments(pairs: Iterable[str], system: str) -> dict[str, object]:
    """`name=value` with JSON values (plain words are strings), of settings that a system has."""
    kind = models.find(system)[1].Settings
    values, known = {}, kind.declared()
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals:
            raise ValueError(f"--set takes NAME=VALUE, got {pair!r}")
        if name not in known and not readers(name):
            near = did_you_mean(name, known, 0.4) or f"ivfast train {system} --help lists those of {system}"
            raise ValueError(f"there is no setting {name!r}; {near}")
        if name not in known:
            raise refusal([name], system, kind)
        value = _value(text)
        if isinstance(value, str) and known[name].kind is not str:
            raise ValueError(f"--set {name} takes a JSON value like {known[name].example}, got {text!r:.80}")
        values[name] = known[name].decode(value)
    return values


def assigned(given: dict[str, object], pairs: Iterable[str], run: Path | None) -> dict[str, object]:
    """`assignments` to the settings of the system that is `given`, or else of a run to go on with."""
    system = config(run).system if run and "system" not in given else given.get("system", DEFAULT)
    values = assignments(pairs, system_name(str(system)))
    if "system" in values:
        raise ValueError(f"--set cannot change the system; use: ivfast train {values['system']}")
    return values


def _value(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):  # no JSON, or a number of thousands of digits
        return text


def system_name(name: str) -> str:
    """The name behind an alias; ValueError for a system that does not exist."""
    if name not in models.SYSTEMS and name not in models.ALIASES:
        raise ValueError(no_system(name, [*models.SYSTEMS, *models.ALIASES]))
    return models.find(name)[0]


def fresh(given: dict[str, object], out: Path | None) -> tuple[Settings, Path]:
    """Settings and folder of a new run: the paper's settings unless `given` overrides them."""
    name, data = system_name(str(given.get("system", DEFAULT))), str(given.get("data", "digits"))
    known_data(data)
    models.check_data(name, data)
    defaults = models.preset(name, data)
    settings = dataclasses.replace(defaults, **{**given, "system": name})
    check_device(settings.device)
    out = out or _next_folder(RUNS, f"{settings.system}-{data.replace(':', '-')}")
    if (out / "config.json").exists():
        raise FileExistsError(f"{out} already holds a run; add --resume to continue it, or choose another --out")
    return settings, out


def resumed(given: dict[str, object], out: Path | None) -> tuple[Settings, Path]:
    """Settings and folder of a run to resume."""
    if out is None:
        newest = max(RUNS.glob("*/config.json"), key=lambda path: path.stat().st_mtime, default=None)
        hint = f"; the newest is --out {shlex.quote(str(newest.parent))}" if newest else ""
        raise ValueError(f"--resume needs --out, the folder of the run{hint}")
    settings = config(out)
    if "system" in given:
        given = {**given, "system": system_name(str(given["system"]))}
    for name, value in given.items():
        has = getattr(settings, name)
        if has != value and name not in RESUMABLE:
            raise ValueError(
                f"--{name.replace('_', '-')}: the run in {out} has {has}, and --resume cannot change it to {value}; "
                "omit the option, or start a new run"
            )
    settings = dataclasses.replace(settings, **given)
    check_device(settings.device)
    return settings, out


def with_classes(settings: Settings, dataset: Dataset) -> Settings:
    """The settings with the data set's classes, for a system that reads labels; ValueError if it has no classes."""
    if models.find(settings.system)[1].labels == "none":
        return settings
    if dataset.train_labels is None or not dataset.classes:
        unlabelled = [name for name, system in models.SYSTEMS.items() if system.labels == "none"]
        raise ValueError(
            f"{settings.system} learns from labels, and {dataset.name} has none; sort an image folder into one "
            f"subfolder per class, or use a system that needs none: {', '.join(unlabelled)}; "
            f"{models.learnable(settings.system)}"
        )
    return dataclasses.replace(settings, classes=len(dataset.classes))


def training_set(system: System, dataset: Dataset, *, download: bool = False) -> tuple[Tensor, Tensor | None]:
    """Images and labels for `fit`: the share given by the settings, with hidden labels as −1.

    A system that reads labels is told the names of the classes, which its checkpoints keep.
    """
    if system.labels != "none":
        system.class_names = tuple(dataset.classes)
    settings, images, labels = system.settings, dataset.train, dataset.train_labels
    if settings.data_share < 1:
        rows = stratified(torch.zeros(len(images), device="cpu") if labels is None else labels, settings.data_share)
        images, labels = images[rows], None if labels is None else labels[rows]
    if system.labels == "none":
        return images, None
    if system.labels == "some":
        labelled = (labels >= 0).nonzero()[:, 0]
        share = settings.label_share * (len(labels) / len(labelled))
        if share > 1:
            most = len(labelled) / len(labels)
            raise ValueError(f"label_share must be at most {most:.4f}, the share of {dataset.name} that has labels")
        known = labelled[stratified(labels[labelled], share)]
        labels = torch.full_like(labels, -1).index_copy(0, known, labels[known])
    if system.labels == "source":
        images, labels = images[labels >= 0], labels[labels >= 0]
        target = target_of(dataset, settings.target, settings.root, download=download).train
        images, labels = torch.cat([images, target]), torch.cat([labels, labels.new_full((len(target),), -1)])
    return images, labels


def same_classes(system: System, dataset: Dataset) -> None:
    """Raises ValueError where the data set has other classes than the one that a system learnt from."""
    if system.class_names:
        datasets.same_classes(dataset.name, dataset.classes, "the run", system.class_names)


def config(run: Path) -> Settings:
    """The settings of a run; FileNotFoundError lists the existing runs."""
    if not (run / "config.json").is_file():
        runs = sorted(str(path.parent) for path in RUNS.glob("*/config.json"))
        hint = f" Runs here: {', '.join(runs[-5:])}." if runs else " Make one with ivfast train."
        raise FileNotFoundError(f"{run} is not the folder of a run: it has no config.json.{hint}")
    return Settings.load(run / "config.json")


def known_data(data: str) -> None:
    if data.partition(":")[0] not in DATASETS:
        raise unknown("data set", data, DATASETS)
    datasets.check_category(data)


def check_device(device: str) -> None:
    try:
        kind, index = torch.device(device).type, torch.device(device).index
    except RuntimeError as error:
        raise ValueError(f"--device must be cpu, cuda or cuda:N, got {device!r}") from error
    if kind not in ("cpu", "cuda"):
        raise ValueError(f"--device must be cpu, cuda or cuda:N, got {device!r}")
    if kind == "cuda" and (index or 0) >= torch.cuda.device_count():
        found = f"torch {torch.__version__} sees {torch.cuda.device_count()} CUDA devices"
        raise ValueError(f"--device {device} is not available: {found}; use --device cpu, or see ivfast info")


def use_threads(threads: int | None, settings: Settings) -> None:
    """Set the CPU threads of the run. The default is one for networks that are too small to split.

    Layers of 64 x 256 x 256 finish before a second thread wakes up, and on a busy machine its spinning takes the core
    from the first: 230 steps on digits took 14.1 s with two threads and 2.9 s with one (two cores, load 3.7).
    """
    small = settings.net == "mlp" and settings.batch_size * settings.width**2 <= 1 << 24
    if threads or small:
        torch.set_num_threads(threads or 1)


def _next_folder(parent: Path, stem: str) -> Path:
    numbers = [path.name.removeprefix(f"{stem}-") for path in parent.glob(f"{stem}-*")]
    return parent / f"{stem}-{max((int(n) for n in numbers if n.isdigit()), default=0) + 1}"


def trained(run: Path, device: str | None, root: Path | None = None) -> tuple[System, Settings]:
    """The system of a run on `device` (default: the GPU if there is one), in evaluation mode, and its settings, with
    the data sets in `root` (default: the run's)."""
    config(run)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    check_device(device)
    return load_system(run, device, root=root)


def last_step(run: Path) -> int:
    """The last step in the log of a run; 0 without a log."""
    log = run / "log.jsonl"
    return max((record["step"] for record in read_log(log)), default=0) if log.is_file() else 0


@_defaults.initial()
def load_system(
    run_folder: Path | str, device: str = "cpu", *, average: bool = True, root: Path | str | None = None
) -> tuple[System, Settings]:
    """The trained system of a run, in evaluation mode on `device`, and its settings.

    Args:
        run_folder: the folder that `fit` wrote to, or a checkpoint file.
        device: replaces the training device.
        average: use the moving average of the weights if the run kept one.
        root: replaces the folder of the data sets, such as the target of domain adaptation.

    Raises:
        CheckpointError: no checkpoint, or one that is truncated, foreign or does not fit; names the file and reason.
    """
    path = Path(run_folder)
    path = path if path.suffix == ".safetensors" else path / checkpoint.LAST
    saved = checkpoint.read(path)
    settings = dataclasses.replace(checkpoint.settings_of(saved, path), device=str(device))
    if root is not None:
        settings = dataclasses.replace(settings, root=str(root))
    try:
        system = models.build(settings, tuple(saved.about["image_shape"]))
    except (TypeError, ValueError, RuntimeError) as error:
        raise checkpoint.CheckpointError(path, f"its system cannot be built: {error}") from error
    system.class_names = tuple(saved.about.get("class_names", ()))
    weights = saved.part("weights")
    if average and settings.ema:
        averaged = saved.part("average")
        layouts = {name: checkpoint.Layout.of(x) for name, x in floating_state(system).items()}
        checkpoint.check_layout(averaged, layouts, path)
        weights = {**weights, **averaged}
    checkpoint.load_weights(system, weights, path)
    system.train(False)
    return system, settings
