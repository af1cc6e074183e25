"""Adam that computes and applies the weight gradients of linear layers: the numbers and behaviour of
torch.optim.Adam."""

import copy
import dataclasses
import io
import re

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
            layer.weight.release()
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


def clipped(net, optimizer):
    nn.utils.clip_grad_norm_(net.parameters(), 1e-3)
    optimizer.step()


def clamped(net, optimizer):
    nn.utils.clip_grad_value_(net.parameters(), 1e-4)
    optimizer.step()


def averaged(net, optimizer):
    """As code for several ranks does."""
    for p in net.parameters():
        p.grad /= 4
    optimizer.step()


def dropped(net, optimizer):
    net.zero_grad()
    optimizer.step()


def decayed(net, optimizer):
    optimizer.param_groups[0]["weight_decay"] = 0.3
    optimizer.step()


@pytest.mark.usefixtures("small_layers")
class TestWhatReadsGradients:
    """Between backward and step it sees what it would see beside torch.optim.Adam, and what it does counts."""

    @pytest.mark.parametrize("use", [clipped, clamped, averaged, dropped, decayed])
    @pytest.mark.parametrize("fused", [True, False])
    def test_it_is_honoured(self, use, fused):
        (one_net, one), (other_net, other) = pair(fused=fused)
        for _ in range(3):
            x = torch.randn(10, 13)
            for net, optimizer in ((one_net, one), (other_net, other)):
                optimizer.zero_grad()
                net(x).square().mean().backward()
                use(net, optimizer)
        # Adam divides by the size of the gradient: the averages show it, the weights hardly do
        for p, q in zip(one_net.parameters(), other_net.parameters(), strict=True):
            for name, value in other.state[q].items() if q in other.state else ():
                torch.testing.assert_close(one.state[p][name], value, rtol=1e-4, atol=1e-12)
        close(one_net, other_net)

    @pytest.mark.parametrize("fused", [True, False])
    def test_a_scaler_unscales_and_skips_steps_of_infinite_gradients(self, fused):
        (one_net, one), (other_net, other) = pair(fused=fused)
        scalers = [torch.amp.GradScaler("cpu", init_scale=1024.0) for _ in range(2)]
        for bad in (False, True, False):
            x = torch.randn(10, 13)
            x[0, 0] = torch.inf if bad else 1
            for net, optimizer, scaler in ((one_net, one, scalers[0]), (other_net, other, scalers[1])):
                optimizer.zero_grad()
                before = net[0].weight.detach().clone()
                scaler.scale(net(x).square().mean()).backward()
                scaler.step(optimizer)
                scaler.update()
                assert torch.equal(net[0].weight, before) == bad
        assert scalers[0].get_scale() == scalers[1].get_scale() == 512
        for p, q in zip(one_net.parameters(), other_net.parameters(), strict=True):
            torch.testing.assert_close(one.state[p]["exp_avg_sq"], other.state[q]["exp_avg_sq"], rtol=1e-4, atol=1e-12)
        close(one_net, other_net)

    def test_hooks_and_autograd_get_the_gradient(self):
        (one_net, _), (other_net, _) = pair()
        x, seen = torch.randn(10, 13), []
        for net in (one_net, other_net):
            net[0].weight.register_hook(lambda grad: seen.append(grad) or 2 * grad)
            net[2].weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
            net(x).square().mean().backward()
            seen.append(net[0].weight.grad)
            seen.append(torch.autograd.grad(net(x).square().mean(), net[4].weight)[0])
        assert len(seen) == 8
        for ours, theirs in zip(seen[:4], seen[4:], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)

    def test_a_gradient_that_nobody_asked_for_is_not_spent_later(self):
        (one_net, one), (other_net, other) = pair()
        x = torch.randn(10, 13, requires_grad=True)
        for net, optimizer in ((one_net, one), (other_net, other)):
            torch.autograd.grad(net(x).sum(), x)
            net(x).sum().backward(inputs=[net[4].bias])
            net(x).square().mean().backward()
            optimizer.step()
        close(one_net, other_net)

    @pytest.mark.parametrize("read", [True, False])
    def test_an_input_that_is_overwritten_before_the_step_is_an_error(self, read):
        (net, optimizer), _ = pair()
        x = torch.randn(10, 13)
        net(x).sum().backward()
        x.zero_()
        with pytest.raises(RuntimeError, match="the input of a fused Linear layer was modified in place"):
            net[0].weight.grad if read else optimizer.step()

    def test_copies_and_pickles_are_ordinary_layers(self):
        (net, _), _ = pair()
        net(torch.randn(10, 13)).sum().backward()
        file = io.BytesIO()
        torch.save(net, file)
        file.seek(0)
        for other in (copy.deepcopy(net), torch.load(file, weights_only=False)):
            assert {type(p) for p in other.parameters()} == {nn.Parameter}
            other(torch.randn(10, 13)).sum().backward()
            assert all(p.grad is not None for p in other.parameters())

    def test_autocast_and_unfusing_lose_no_gradient(self):
        (net, optimizer), (other, _) = pair()
        x = torch.randn(10, 13)
        for one in (net, other):
            with torch.autocast("cpu", torch.bfloat16):
                y = one(x)
            y.float().sum().backward()
            one(x).square().sum().backward()
        optimizer.unfuse()
        for a, b in zip(net.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-5)


def test_hooks_run_once_around_a_step():
    torch.optim.Adam([nn.Parameter(torch.zeros(1))])  # which wraps torch.optim.Adam.step
    p, calls = nn.Parameter(torch.ones(1)), []
    optimizer = optim.Adam([p])
    optimizer.register_step_pre_hook(lambda *_: calls.append(1))
    p.grad = torch.ones(1)
    optimizer.step()
    assert len(calls) == 1


def stepped(fused=True, **keywords):
    p = nn.Parameter(torch.randn(4, 6))
    optimizer = optim.Adam([nn.Parameter(torch.zeros(2)), p], fused=fused, **keywords)
    p.grad = torch.randn(4, 6)
    optimizer.step()
    return p, optimizer


class TestWhatTheFusedKernelTakesForGranted:
    @pytest.mark.parametrize("fused", [True, False])
    @pytest.mark.parametrize("name", ["exp_avg", "exp_avg_sq", "max_exp_avg_sq"])
    @pytest.mark.parametrize("shape", [(3, 3), (6, 4), (24,), (1, 6)])
    def test_a_state_of_another_shape_is_refused_when_loaded_and_when_used(self, shape, name, fused):
        p, optimizer = stepped(fused, amsgrad=True)
        state = copy.deepcopy(optimizer.state_dict())
        state["state"][1][name] = torch.zeros(shape)
        message = rf"the state '{name}' of parameter 1 must have shape \(4, 6\), got {re.escape(str(shape))}"
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict(state)
        optimizer.state[p][name] = torch.zeros(shape)
        with pytest.raises(
            ValueError, match=rf"the state '{name}' of parameter 1 must match it: \(4, 6\) torch.float32"
        ):
            optimizer.step()

    @pytest.mark.parametrize("name", ["step", "exp_avg", "exp_avg_sq"])
    def test_a_state_that_is_missing_in_part_is_refused(self, name):
        _, optimizer = stepped()
        state = copy.deepcopy(optimizer.state_dict())
        del state["state"][1][name]
        with pytest.raises(ValueError, match=f"the state '{name}' of parameter 1 is missing"):
            optimizer.load_state_dict(state)

    @pytest.mark.parametrize("change", [lambda x: x[:2], lambda x: x.double(), lambda x: x.repeat(2, 2)])
    def test_a_parameter_that_changed_after_backward_is_refused(self, change):
        p, optimizer = stepped()
        p.grad = torch.randn(4, 6)
        p.data = change(p.data)
        with pytest.raises(ValueError, match="the gradient of parameter 1 must match it"):
            optimizer.step()

    @pytest.mark.parametrize("p", [torch.zeros(1, 6).expand(4, 6), torch.zeros(4, 12)[:, ::2]])
    def test_a_parameter_with_gaps_or_overlaps_is_refused(self, p):
        p = nn.Parameter(p)
        optimizer = optim.Adam([p], fused=True)
        p.grad = torch.ones(4, 6)
        with pytest.raises(ValueError, match=r"parameter 0 must be dense in memory for fused=True, got shape \(4, 6\)"):
            optimizer.step()

    def test_other_strides_are_followed(self):
        start, grads = torch.randn(5, 7), torch.randn(3, 5, 7)
        weights = nn.Parameter(start.t().clone(memory_format=torch.preserve_format)), nn.Parameter(start.clone())
        optimizers = optim.Adam([weights[0]], 0.1, fused=True), torch.optim.Adam([weights[1]], 0.1)
        for grad in grads:
            weights[0].grad, weights[1].grad = grad.t().contiguous(), grad.clone()
            for optimizer in optimizers:
                optimizer.step()
        torch.testing.assert_close(weights[0].t(), weights[1], rtol=1e-5, atol=1e-6)

    def test_decoupled_decay_is_that_of_adamw(self):
        starts, weights = torch.randn(5, 7), []
        for kind, keywords in ((optim.Adam, {"decoupled_weight_decay": True}), (torch.optim.AdamW, {})):
            weights.append(nn.Parameter(starts.clone()))
            optimizer = kind([weights[-1]], 0.1, weight_decay=0.3, fused=True, **keywords)
            for _ in range(3):
                weights[-1].grad = starts.sin()
                optimizer.step()
        assert torch.equal(*weights)


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
