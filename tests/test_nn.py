"""Modules compute the same as their functions, and keep what they were made with."""

import copy
import io
import pickle

import pytest
import torch

import ivfast

DOUBLE = torch.float64


def normal(*shape, dtype=DOUBLE):
    return torch.randn(*shape, dtype=dtype)


def test_modules_are_their_functions():
    x, y = normal(9, 4), normal(8, 4)
    assert torch.equal(
        ivfast.nn.MMDLoss(kernel="rbf", bandwidth=2.0)(x, y), ivfast.mmd(x, y, kernel="rbf", bandwidth=2.0)
    )
    logits, weights = normal(6, 3), torch.tensor([0.2, 0.3, 0.5], dtype=DOUBLE)
    assert torch.equal(ivfast.nn.MultiJSLoss(weights)(logits), ivfast.multi_js_loss(logits, weights=weights))
    q = [normal(5, 3) for _ in range(4)]
    assert torch.equal(ivfast.nn.ASDistance(log=True)(*q), ivfast.as_distance(*q, log=True))
    assert "weights" in dict(ivfast.nn.MultiJSLoss(weights).named_buffers())


def weighted(weights):
    """A model with the loss as a part."""
    return torch.nn.ModuleDict({"net": torch.nn.Linear(3, 3), "loss": ivfast.nn.MultiJSLoss(weights)})


def saved(model):
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


PI = torch.tensor([0.2, 0.3, 0.5])


@pytest.mark.parametrize("before", [None, PI.flip(0)], ids=["none", "others"])
@pytest.mark.parametrize("weights", [None, PI], ids=["none", "weights"])
def test_a_loss_has_the_weights_of_the_state_that_it_loads(weights, before):
    logits = torch.randn(6, 3)
    expected = ivfast.multi_js_loss(logits, weights=weights)
    state, model = saved(weighted(weights)), weighted(before)
    assert model.load_state_dict(state) == ([], [])
    assert torch.equal(model["loss"](logits), expected)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), weighted(before)):
        again.load_state_dict(state, assign=True)
        assert torch.equal(again["loss"](logits), expected)
        assert all(torch.equal(a, b) for a, b in zip(saved(again).values(), state.values(), strict=True))
    wide = model.to(DOUBLE)["loss"]
    assert wide.weights is None or wide.weights.dtype == DOUBLE
    assert abs(wide(logits.double()) - expected) < 1e-6  # rounding of float32


def test_a_state_without_the_loss():
    """From a module that had no weights, before they were in the state; weights are not dropped for it."""
    assert ivfast.nn.MultiJSLoss().load_state_dict({}) == ([], [])
    with pytest.raises(RuntimeError, match=r'Missing key.*"weights"'):
        ivfast.nn.MultiJSLoss(PI).load_state_dict({})
    with pytest.raises(RuntimeError, match="size mismatch for weights"):
        ivfast.nn.MultiJSLoss(PI).load_state_dict(ivfast.nn.MultiJSLoss(torch.ones(4) / 4).state_dict())
    with pytest.raises(TypeError, match="weights must be a Tensor, got list"):
        ivfast.nn.MultiJSLoss([0.2, 0.3, 0.5])


def test_buffers_are_copies():
    weights, bandwidth = PI.clone(), torch.tensor(2.0)
    loss, mmd = ivfast.nn.MultiJSLoss(weights), ivfast.nn.MMDLoss(bandwidth=bandwidth)
    loss.load_state_dict({"weights": PI.flip(0)})
    mmd.load_state_dict({"bandwidth": torch.tensor(5.0)})
    assert torch.equal(weights, PI)
    assert bandwidth == 2
    x, y = torch.randn(5, 3), torch.randn(4, 3)
    for again in (mmd, copy.deepcopy(mmd), pickle.loads(pickle.dumps(mmd))):
        assert torch.equal(again(x, y), ivfast.mmd(x, y, bandwidth=5.0 * torch.ones(())))


def test_a_linear_layer_whose_gradient_waits_is_saved_and_copied():
    layer = ivfast.nn.Linear(1024, 600)
    optimizer = ivfast.optim.Adam(layer.parameters())
    optimizer.fuse([layer])
    x = torch.randn(4, 1024)
    layer(x).square().sum().backward()
    copies = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), ivfast.nn.Linear(1024, 600)]
    copies[2].load_state_dict(saved(layer))
    expected = torch.nn.functional.linear(x, layer.weight.detach().clone(), layer.bias.detach().clone())
    optimizer.step()
    assert not torch.equal(layer(x), expected)
    for other in copies:
        assert type(other.weight) is torch.nn.Parameter
        assert torch.equal(other(x), expected)
    layer.load_state_dict(copies[0].state_dict())
    assert torch.equal(layer(x), expected)
