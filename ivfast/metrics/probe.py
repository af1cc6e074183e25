"""S1's probe: how well a perceptron learns labels from an encoder's frozen features."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from .. import _check, _defaults, nets

WIDTH, DEPTH, BATCH, RATE = 1000, 2, 60, 1e-4  # S1, section 4


class Probe(NamedTuple):
    """Share of test images with a wrong label after each number of steps."""

    steps: list[int]
    errors: list[float]


@_defaults.initial()
def probe(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    *,
    steps: int = 2000,
    every: int = 100,
    seed: int = 0,
    device="cpu",
) -> Probe:
    """Error rate of a perceptron with 2 x 1000 units on features of test images, every `every` training steps.

    Batches of 60, Adam at 1e-4. The same seed gives the same probe; global generators are not changed.

    Args:
        train, test: features `[n, d]`.
        train_labels, test_labels: int64 `[n]`; rows labelled −1 are left out.

    Raises:
        ValueError: labels with fewer than two classes, fewer labels than features, or a seed, `steps` or `every` out
            of range.

    Source: S1 Fig. 5.
    """
    _check.count("steps", steps)
    _check.count("every", every)
    _check.count("seed", seed, at_least=0)
    for what, features, labels in (("train", train, train_labels), ("test", test, test_labels)):
        if labels is None or len(labels) != len(features):
            got = "none" if labels is None else len(labels)
            raise ValueError(f"{what}_labels must hold one label per feature: {len(features)}, got {got}")
    known, judged = train_labels >= 0, test_labels >= 0
    x, y = train[known].float().to(device), train_labels[known].to(device)
    x_test, y_test = test[judged].float().to(device), test_labels[judged].to(device)
    classes = int(max(y.max(), y_test.max())) + 1 if len(y) else 0
    if classes < 2:
        raise ValueError(f"train_labels must hold at least 2 classes, got {classes}")
    order = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        network = nets.mlp(x.shape[1], classes, WIDTH, DEPTH).to(device)
    optimizer = torch.optim.Adam(network.parameters(), RATE)
    found = Probe([], [])
    for step in range(1, steps + 1):
        rows = torch.randint(len(x), (BATCH,), generator=order).to(device)
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(x[rows]), y[rows]).backward()
        optimizer.step()
        if step % every == 0 or step == steps:
            with torch.no_grad():
                wrong = network(x_test).argmax(1) != y_test
            found.steps.append(step)
            found.errors.append(float(wrong.double().mean()))
    return found


def last_hidden_layer(encoder: nn.Sequential) -> nn.Module:
    """An encoder of `ivfast.nets` without its final linear layer, which produces the codes."""
    if not isinstance(encoder, nn.Sequential) or not isinstance(encoder[-1], nn.Linear):
        raise ValueError("encoder must be a Sequential that ends in a linear layer")
    return encoder[:-1]
