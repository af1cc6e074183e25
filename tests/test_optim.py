"""Adam that computes and applies the weight gradients of linear layers: the numbers and behaviour of
torch.optim.Adam."""

import copy
import dataclasses

import pytest
import torch
from helpers import size
from torch import nn
from torch.nn import functional as F

from ivfast import optim
from ivfast.models import build, preset
from ivfast.nn import Linear
from ivfast.ops.linear_adam import linear_adam_, linear_adam_reference
from ivfast.train.loop import fit
from ivfast.train.run import Run

pytest.importorskip("ivfast._C")


@pytest.fixture
def small_layers(monkeypatch):
    """Layers of any size are fused."""
    monkeypatch.setattr(optim, "LEAST", 1)


def assert_right(count, outputs, inputs):
    weights = [torch.randn(outputs, inputs), 0.1 * torch.randn(outputs, inputs), torch.rand(outputs, inputs)]
    weights[2].view(-1)[::3] = 0  # where √v is 0, or nearly
    weights[2].view(-1)[1::3] *= 1e-40
    grad, x = torch.randn(count, outputs), torch.randn(count, inputs)
    grad[:, : outputs // 2] *= 1e-12
    numbers = (1e-3, 1.7, 0.9, 0.999, 1e-8)
    exact = [w.double() for w in weights]
    # every other row belongs to another tensor: nothing may be written outside the weights
    room = [torch.full((outputs + 2, inputs), 7.0) for _ in weights]
    ours = [r[1:-1].copy_(w) for r, w in zip(room, weights, strict=True)]
    linear_adam_(*ours, grad, x, *numbers)
    linear_adam_reference(*exact, grad.double(), x.double(), *numbers)
    gradient = (grad.double().t() @ x.double()).abs()
    rounding = 1e-6 * (grad.abs().double().t() @ x.abs().double())  # of the sum over the samples
    moved, below = (exact[0] - weights[0]).abs(), 1.7 * exact[2].sqrt() + 1e-8
    limits = [
        # √v has at most the relative error of g
        1e-6 * exact[0].abs() + moved * (4e-6 + 2 * rounding / gradient.clamp_min(1e-30)) + 1e-4 * rounding / below,
        1e-6 * exact[1].abs() + rounding,
        1e-6 * exact[2] + 1e-3 * 2 * gradient * rounding + 1e-40,
    ]
    for name, a, b, limit in zip("wmv", ours, exact, limits, strict=True):
        assert bool(((a - b).abs() <= limit).all()), name
    assert all(bool((r[0] == 7).all() and (r[-1] == 7).all()) for r in room)


@pytest.mark.parametrize(
    ("count", "outputs", "inputs"), [(1, 1, 1), (2, 8, 48), (7, 9, 49), (64, 33, 17), (5, 3, 200), (130, 16, 96)]
)
def test_each_instruction_set(isa, count, outputs, inputs):
    assert_right(count, outputs, inputs)


def test_odd_sizes(isa):
    for _ in range(5):
        assert_right(size(1, 70), size(1, 70), size(1, 150))


def test_threads_change_no_bit(threads):
    count, outputs, inputs = 64, 200, 700
    grad, x, start = torch.randn(count, outputs), torch.randn(count, inputs), torch.rand(3, outputs, inputs)
    found = []
    for number in (1, 2, 3):
        threads(number)
        found.append(start.clone())
        linear_adam_(*found[-1], grad, x, 1e-3, 1.1, 0.9, 0.999, 1e-8)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_gradients_that_are_not_finite_reach_the_weights():
    grad, x, start = torch.randn(4, 8), torch.randn(4, 48), torch.rand(3, 8, 48)
    grad[1, 2], x[2, 5] = torch.inf, torch.nan
    w, _, _ = start.clone()
    linear_adam_(w, start[1], start[2], grad, x, 1e-3, 1.1, 0.9, 0.999, 1e-8)
    assert not w[2].isfinite().any()
    assert not w[:, 5].isfinite().any()
    assert w[3, 6:].isfinite().all()


def perceptron():
    return nn.Sequential(Linear(13, 21), nn.ReLU(), Linear(21, 9, bias=False), nn.ReLU(), Linear(9, 1))


def pair(**keywords):
    """Two copies of a perceptron and its optimizer, the first one fused."""
    fused = perceptron()
    plain = copy.deepcopy(fused)
    keywords = {"lr": 1e-2, "fused": True, **keywords}
    one, other = optim.Adam(fused.parameters(), **keywords), torch.optim.Adam(plain.parameters(), **keywords)
    one.fuse([fused])
    return (fused, one), (plain, other)


def close(one: nn.Module, other: nn.Module) -> None:
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        # a weight whose gradient is 0 up to rounding moves by the sign of the rounding; few do on random numbers
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("small_layers")
class TestAdam:
    def test_follows_torch_adam(self):
        (fused, one), (plain, other) = pair()
        for _ in range(8):
            x = torch.randn(10, 13)
            for net, optimizer in ((fused, one), (plain, other)):
                optimizer.zero_grad()
                # a layer that is used twice in one loss
                (net(x[:6]).square().mean() + net(x[6:]).sum()).backward()
                optimizer.step()
        assert all(fused[i].weight.grad is None for i in (0, 2, 4))  # so it was the fused step
        close(fused, plain)

    def test_a_closure_is_evaluated_first(self):
        (fused, one), (plain, other) = pair()
        x = torch.randn(10, 13)
        for _ in range(2):
            for net, optimizer in ((fused, one), (plain, other)):

                def loss(net=net, optimizer=optimizer):
                    optimizer.zero_grad()
                    value = net(x).square().mean()
                    value.backward()
                    return value

                assert float(optimizer.step(loss).detach()) > 0
        close(fused, plain)

    @pytest.mark.parametrize(
        "changes", [{"weight_decay": 0.1}, {"maximize": True}, {"amsgrad": True}, {"fused": False}]
    )
    def test_unfused_layers_step_as_torch_adam_bit_for_bit(self, changes):
        (fused, _), (plain, _) = pair()
        keywords = {"lr": torch.tensor(1e-2, dtype=torch.float64), "fused": True, **changes}
        if not keywords["fused"]:
            keywords["lr"] = 1e-2
        one, other = optim.Adam(fused.parameters(), **keywords), torch.optim.Adam(plain.parameters(), **keywords)
        for layer in (fused[0], fused[2], fused[4]):
            del layer.weight.pending
        for _ in range(4):
            x = torch.randn(10, 13)
            for net, optimizer in ((fused, one), (plain, other)):
                optimizer.zero_grad()
                net(x).square().mean().backward()
                optimizer.step()
        assert all(map(torch.equal, fused.parameters(), plain.parameters()))

    def test_state_goes_to_torch_adam_and_back(self):
        (fused, one), (plain, other) = pair()
        x = torch.randn(3, 10, 13)

        def step(net, optimizer, batch):
            optimizer.zero_grad()
            net(batch).square().mean().backward()
            optimizer.step()

        step(fused, one, x[0])
        step(plain, other, x[0])
        exchanged = copy.deepcopy(one.state_dict()), copy.deepcopy(other.state_dict())
        one.load_state_dict(exchanged[1])
        other.load_state_dict(exchanged[0])
        step(fused, one, x[1])
        step(plain, other, x[1])
        close(fused, plain)
        assert exchanged[0]["state"].keys() == exchanged[1]["state"].keys()

    def test_gradients_made_elsewhere_are_added(self):
        (fused, one), (plain, other) = pair()
        x, w = torch.randn(10, 13), torch.randn(21, 13)
        for net, optimizer in ((fused, one), (plain, other)):
            optimizer.zero_grad()
            (net(x).square().mean() + (w * net[0].weight).sum()).backward()
            optimizer.step()
        assert fused[0].weight.grad is not None
        close(fused, plain)

    def test_large_batches_are_left_to_a_product(self, monkeypatch):
        monkeypatch.setattr(optim, "MOST_SAMPLES", 9)
        (fused, one), (plain, other) = pair()
        x = torch.randn(10, 13)
        for net, optimizer in ((fused, one), (plain, other)):
            net(x).square().mean().backward()
            optimizer.step()
        assert fused[0].weight.grad is not None
        close(fused, plain)

    def test_zero_grad_drops_what_backward_left(self):
        (fused, one), _ = pair()
        before = [p.clone() for p in fused.parameters()]
        fused(torch.randn(10, 13)).sum().backward()
        one.zero_grad()
        one.step()
        assert all(torch.equal(a, b) for a, b in zip(before, fused.parameters(), strict=True))

    def test_unfused_it_is_torch_adam(self):
        (fused, one), _ = pair()
        one.unfuse()
        fused(torch.randn(10, 13)).sum().backward()
        assert all(p.grad is not None for p in fused.parameters())

    def test_inputs_of_backward(self):
        """A gradient that was not requested changes nothing."""
        (fused, one), _ = pair()
        before = fused[0].weight.clone()
        one.zero_grad()
        fused(torch.randn(10, 13)).sum().backward(inputs=[fused[4].bias])
        one.zero_grad()
        one.step()
        assert torch.equal(before, fused[0].weight)

    def test_a_gradient_of_a_gradient(self):
        """A gradient penalty reaches the weights through the backward pass of its own gradient and the forward pass."""
        (fused, one), (plain, other) = pair()
        x = torch.randn(10, 13)
        for net, optimizer in ((fused, one), (plain, other)):
            at = x.clone().requires_grad_()
            (slope,) = torch.autograd.grad(net(at).square().sum(), at, create_graph=True)
            optimizer.zero_grad()
            slope.square().sum().backward()
            optimizer.step()
        close(fused, plain)

    @pytest.mark.parametrize("changes", [{"weight_decay": 0.1}, {"amsgrad": True}, {"maximize": True}])
    def test_what_it_cannot_do_is_refused(self, changes):
        net = perceptron()
        with pytest.raises(ValueError, match=rf"{next(iter(changes))} must be (False|0\.0) for a fused step"):
            optim.Adam(net.parameters(), **changes).fuse([net])


def test_weights_with_their_channels_last():
    """torch's fused step on the CPU assumes that gradients and averages are laid out like the weights."""
    start, grads = torch.randn(4, 3, 5, 5), torch.randn(3, 4, 3, 5, 5)
    found = []
    for layout in (torch.contiguous_format, torch.channels_last):
        weight = nn.Parameter(start.clone(memory_format=layout))
        optimizer = optim.Adam([weight], lr=0.1, fused=True)
        for grad in grads:
            weight.grad = grad.clone()
            optimizer.step()
            saved = copy.deepcopy(optimizer.state_dict())
            for state in saved["state"].values():
                state["exp_avg"] = state["exp_avg"].contiguous()  # as stored in a checkpoint
            optimizer.load_state_dict(saved)
        found.append(weight.detach())
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-6)


@pytest.mark.usefixtures("small_layers")
@pytest.mark.parametrize("system", ["ivaae-svgd", "wae-mmd", "ivdcgan", "aasvae"])
def test_steps_of_a_system(system, monkeypatch):
    """A run does the same with and without fused optimizers."""
    seed = size(0, 1000)
    images, labels = torch.randint(256, (40, 1, 8, 8), dtype=torch.uint8), torch.arange(40) % 10
    found = []
    for fuses in (True, False):
        settings = dataclasses.replace(preset(system, "digits"), batch_size=20, seed=seed)
        net = build(settings, (1, 8, 8))
        if not fuses:
            monkeypatch.setattr(Run, "fuse", lambda run: None)
        with torch.random.fork_rng():
            run = Run(net, images, settings, None, None if net.labels == "none" else labels)
            for _ in range(3):
                run.advance()
        weights = dict(nn.ModuleDict(net.modules).named_parameters())
        assert any(getattr(w, "pending", None) is not None for w in weights.values()) == fuses
        found.append((run.record.values[: run.record.rows], weights))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("small_layers")
def test_a_system_is_given_back_unfused(tmp_path):
    settings = dataclasses.replace(preset("wae-mmd", "digits"), steps=2, tensorboard=False)
    system = build(settings, (1, 8, 8))
    fit(system, torch.randint(256, (80, 1, 8, 8), dtype=torch.uint8), settings, tmp_path, progress=False)
    F.mse_loss(system.decode(torch.randn(4, 16)), torch.zeros(4, 1, 8, 8)).backward()
    assert all(p.grad is not None for p in system.modules["decoder"].parameters())
