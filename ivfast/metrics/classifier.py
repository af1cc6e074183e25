"""A small classifier of a data set's own labels: the feature network if Inception's weights are not available."""

import hashlib
import json
import os
from pathlib import Path

import torch
from torch import Tensor, nn

from .. import _defaults
from .._extra import needs
from ..data import Dataset

with needs("ivfast.metrics"):
    from safetensors import safe_open
    from safetensors.torch import save_file

FEATURES = 128
RECIPE = "conv-bn-2"  # changes with the network or its training, so that old files are never mistaken for new ones


class Classifier(nn.Module):
    """Convolutions down to 4 x 4, then `FEATURES` ReLU units (the features), then one logit per class.

    Attributes:
        accuracy: on the test images.
    """

    def __init__(self, image_shape: tuple[int, int, int], classes: int):
        super().__init__()
        inner, side, _ = image_shape
        # the first layer reduces the image to 16 x 16 or less by a large stride: 2,000 steps should not take an hour
        stride, width, layers = next((s for s in (1, 2, 4, 8) if side <= 16 * s), 16), 32, []
        while True:
            padding = max(stride - 1, 1)
            layers += [nn.Conv2d(inner, width, 2 * padding + 1, stride, padding, bias=False), nn.BatchNorm2d(width)]
            layers += [nn.ReLU()]
            side, inner, width, stride = (side - 1) // stride + 1, width, min(2 * width, 128), 2
            if side <= 4:
                break
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(inner * side * side, FEATURES), nn.ReLU())
        self.head = nn.Linear(FEATURES, classes)
        self.accuracy = float("nan")

    def features(self, x: Tensor) -> Tensor:
        """Penultimate activations `[n, FEATURES]` of images in [-1, 1]."""
        return self.body(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


@_defaults.initial()
def classifier_of(dataset: Dataset, *, device: str = "cpu", cache: Path | None = None) -> Classifier:
    """The classifier of `dataset`'s labels, trained from a fixed seed the first time and loaded after that.

    Args:
        cache: folder of trained classifiers; None means `ivfast/` in the user's cache folder (`XDG_CACHE_HOME`).

    Raises:
        ValueError: the data set has fewer than two labelled classes.
    """
    if dataset.train_labels is None or len(dataset.classes) < 2:
        raise ValueError(
            f"a classifier needs labels of at least 2 classes, and {dataset.name} has none; sort an image folder into "
            "one subfolder per class"
        )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)  # only the CPU's
        model = Classifier(tuple(dataset.train.shape[1:]), len(dataset.classes))
    cache = cache or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ivfast"
    shape = "x".join(map(str, dataset.train.shape[1:]))
    path = cache / f"classifier-{dataset.name.replace(':', '-')}-{shape}-{_fingerprint(dataset)}.safetensors"
    if path.is_file():
        with safe_open(path, "pt") as file:
            model.load_state_dict({key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118  not a dict
            model.accuracy = json.loads(file.metadata()["accuracy"])
        return model.to(device).eval()
    _train(model.to(device), dataset, device)
    cache.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}")
    save_file({k: v.cpu() for k, v in model.state_dict().items()}, partial, {"accuracy": json.dumps(model.accuracy)})
    partial.replace(path)
    return model


def _fingerprint(dataset: Dataset) -> str:
    step = max(1, len(dataset.train) // 1000)
    digest = hashlib.sha256(f"{RECIPE} {tuple(dataset.train.shape)} {dataset.classes}".encode())
    digest.update(dataset.train[::step].contiguous().numpy().tobytes())
    digest.update(dataset.train_labels.numpy().tobytes())
    return digest.hexdigest()[:12]


def _train(model: Classifier, dataset: Dataset, device: str) -> None:
    """30 epochs, at most 2,000 steps, of Adam on batches of 128 with a one-cycle learning rate."""
    labelled = dataset.train_labels >= 0
    images, labels = dataset.train[labelled], dataset.train_labels[labelled]
    batch = min(128, len(images))
    steps = min(30 * (len(images) // batch), 2000)
    order = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3, weight_decay=1e-5)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    model.train()
    rows = torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        if len(rows) < batch:
            rows = torch.randperm(len(images), generator=order)
        take, rows = rows[:batch], rows[batch:]
        x = images[take].to(device).float() / 127.5 - 1
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), labels[take].to(device)).backward()
        optimizer.step()
        schedule.step()
    model.eval()
    model.accuracy = _accuracy(model, dataset, device)


@torch.no_grad()
def _accuracy(model: Classifier, dataset: Dataset, device: str) -> float:
    right = 0
    for x, y in zip(dataset.test.split(500), dataset.test_labels.split(500), strict=True):
        right += int((model(x.to(device).float() / 127.5 - 1).argmax(1).cpu() == y).sum())
    return right / len(dataset.test)
