"""ivfast's metrics under torchmetrics' contract: batches, ranks, resets, copies; values against singular values."""

import copy
import math
import pickle
import subprocess
import sys

import pytest
import torch
from processes import passes, without
from test_patch import nuclear
from torch import nn

import ivfast
from ivfast import metrics

torchmetrics = pytest.importorskip("torchmetrics")


def distance(d=6, **keywords):
    """A metric on features that are passed directly."""
    return metrics.FrechetInceptionDistance(nn.Identity(), num_features=d, **keywords)


def filled(metric, real, fake, size=17):
    for x, is_real in ((real, True), (fake, False)):
        for batch in x.split(size):
            metric.update(batch, real=is_real)
    return metric


def samples(n, d, shift=0.0):
    return torch.randn(n, d, dtype=torch.float64) @ torch.randn(d, d, dtype=torch.float64) + shift


@pytest.fixture
def sets():
    return samples(50, 6, 2.0), samples(40, 6)


def expected(real, fake):
    return pytest.approx(nuclear(real.numpy(), fake.numpy()), rel=1e-9)


def fld(z):
    return pytest.approx(ivfast.fld(z).item(), rel=1e-9)


@pytest.mark.parametrize(("n", "m", "d"), [(50, 40, 6), (2, 9, 5), (12, 30, 64)])
def test_value_of_batches_is_that_of_all_samples(n, m, d):
    real, fake = samples(n, d, 2.0), samples(m, d)
    value = filled(distance(d), real, fake, size=7).compute()
    assert value.item() == expected(real, fake)
    assert value.dtype == torch.float64
    latent = metrics.FrechetLatentDistance(d)
    for batch in real.split(7):
        latent.update(batch)
    assert latent.compute().item() == fld(real)


def test_agrees_with_torchmetrics_and_outlives_its_cancellation():
    theirs_of = pytest.importorskip("torchmetrics.image.fid").FrechetInceptionDistance
    identity = nn.Identity()
    identity.num_features = 6
    for shift in (0.0, 1e8):  # Σxxᵀ − nμμᵀ leaves nothing of the covariance at the second
        real, fake = (samples(n, 6) + shift for n in (50, 40))
        ours, theirs = (
            filled(f(identity), real, fake).compute().item() for f in (metrics.FrechetInceptionDistance, theirs_of)
        )
        assert ours == pytest.approx(nuclear((real - shift).numpy(), (fake - shift).numpy()), rel=1e-6)
        assert (abs(theirs / ours - 1) < 1e-6) == (shift == 0)


class Mean(nn.Module):
    """Channel means, `[n, C]`; `[C]` for one image."""

    def forward(self, images):
        return images.double().mean((2, 3)).squeeze(0)


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_any_extractor_and_any_channels(channels):
    real, fake = (torch.randint(0, 256, (n, channels, 4, 4), dtype=torch.uint8) for n in (20, 21))
    for feature in (Mean(), lambda images: images.double().mean((2, 3))):
        metric = metrics.FrechetInceptionDistance(feature, num_features=channels)
        metric.update(real[:1], real=True)
        value = filled(metric, real[1:], fake).compute()
        assert value.item() == expected(*(x.double().mean((2, 3)) for x in (real, fake)))


def test_forward_accumulates(sets):
    real, fake = sets
    metric = distance()
    assert math.isnan(metric(real[:30], real=True))
    assert metric(fake[:20], real=False).item() == expected(real[:30], fake[:20])
    assert metric(real[30:], real=True).item() == expected(real, fake[:20])
    metric(fake[20:], real=False)
    assert metric.compute().item() == expected(real, fake)

    latent = metrics.FrechetLatentDistance(6)
    for batch in real.split(25):
        assert latent(batch.requires_grad_()).item() == fld(batch)  # of the batch, like torchmetrics' metrics
    assert latent.compute().item() == fld(real)


@pytest.mark.parametrize("keep", [False, True])
def test_reset(sets, keep):
    real, fake = sets
    metric = filled(distance(reset_real_features=not keep), real, fake)
    metric.compute()
    metric.reset()
    metric.update(2 * fake, real=False)
    if keep:
        assert metric.compute().item() == expected(real, 2 * fake)
    else:
        with pytest.raises(RuntimeError, match="real must hold at least 2 images, got 0"):
            metric.compute()
        metric.update(fake, real=True)
        assert metric.compute().item() == expected(fake, 2 * fake)


def copied(metric):
    return copy.deepcopy(metric)


def pickled(metric):
    return pickle.loads(pickle.dumps(metric))


def loaded(metric):
    assert not metric.state_dict()  # torchmetrics' states persist only on request
    metric.persistent(True)
    other = distance()
    other.persistent(True)
    other.load_state_dict(metric.state_dict())
    return other


def moved(metric):
    assert copied(metric).to("meta").fake.is_meta
    return metric.to("cpu").half().set_dtype(torch.float32)


@pytest.mark.parametrize("how", [copied, pickled, loaded, moved])
def test_copies_go_on_where_the_original_was(sets, how):
    real, fake = sets
    metric = how(filled(distance(), real[:30], fake[:30]))
    assert filled(metric, real[30:], fake[30:]).compute().item() == expected(real, fake)


CASTS = {
    "to": lambda module: module.to(torch.bfloat16),
    "to the device too": lambda module: module.to("cpu", torch.float16),
    "half": lambda module: module.half(),
    "bfloat16": lambda module: module.bfloat16(),
    "double": lambda module: module.double(),
    "type": lambda module: module.type(torch.float32),
    "as DeepSpeed": lambda module: module._apply(lambda x: x.half() if x.is_floating_point() else x),
}


@pytest.mark.parametrize("cast", CASTS)
def test_casts_of_the_whole_module_leave_state_and_network_alone(sets, cast):
    real, fake = sets
    network = nn.Linear(6, 6)
    first = network(real.float()).double(), network(fake.float()).double()
    whole = nn.ModuleDict(
        {
            "other": nn.Linear(2, 2),
            "fid": metrics.FrechetInceptionDistance(network, num_features=6),
            "fld": metrics.FrechetLatentDistance(6),
        }
    )
    filled(whole["fid"], real[:30].float(), fake[:30].float())
    whole["fid"].compute()
    whole["fld"].update(real)
    CASTS[cast](whole)
    states = [getattr(metric, name) for metric in (whole["fid"], whole["fld"]) for name in metric._defaults]
    assert [x.dtype for x in states] == [torch.float64] * 3
    assert whole["fid"]._computed.dtype == torch.float64
    assert network.weight.dtype == torch.float32
    assert filled(whole["fid"], real[30:].float(), fake[30:].float()).compute().item() == pytest.approx(
        nuclear(*(x.detach().numpy() for x in first)),
        rel=1e-5,  # features are float32
    )
    assert whole["fld"].compute().item() == fld(real)


def test_a_rounded_state_is_refused(sets):
    metric = filled(distance(), *sets)
    metric.persistent(True)
    with pytest.raises(ValueError, match=r"real must be float64, got torch\.float16"):
        distance().load_state_dict({name: x.half() for name, x in metric.state_dict().items()})


def test_features_are_computed_in_evaluation_mode_and_the_network_keeps_its_mode(sets):
    real, fake = sets
    network = nn.Sequential(nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 4)).double()
    network[0].running_mean.fill_(0.3)
    before = copy.deepcopy(network.state_dict())
    expected_value = nuclear(*(network.eval()(x).detach().numpy() for x in (real, fake)))
    for feature in (network, network.forward):
        metric = nn.ModuleDict({"fid": metrics.FrechetInceptionDistance(feature, num_features=4)})
        metric.train()
        network.train()
        network[1].eval()
        value = filled(metric["fid"], real, fake).compute()
        assert value.item() == pytest.approx(expected_value, rel=1e-9)
        assert [module.training for module in network.modules()] == [True, True, False, True]
    assert all(torch.equal(x, before[name]) for name, x in network.state_dict().items())
    network.eval()
    nn.ModuleDict({"fid": metrics.FrechetInceptionDistance(network, num_features=4)}).train()
    assert not network.training  # it is the metric's, which does not train


def test_inference_mode(sets):
    real, fake = sets
    metric = distance()
    with torch.inference_mode():
        filled(metric, real[:30], fake[:30])
    assert filled(metric, real[30:], fake[30:]).compute().item() == expected(real, fake)


def test_collection(sets):
    real, fake = sets
    some = metrics.FrechetInceptionDistance(lambda x: x[:, :3], num_features=3)
    collection = torchmetrics.MetricCollection(
        {"all": distance(), "some": some, "fld": metrics.FrechetLatentDistance(6)}
    )
    for batch in real.split(9):
        collection.update(batch, real=True)
    for batch in fake.split(9):
        collection.update(batch, real=False)
    values = collection.compute()
    assert values["all"].item() == expected(real, fake)
    assert values["some"].item() == expected(real[:, :3], fake[:, :3])
    assert values["fld"].item() == fld(torch.cat([real, fake]))


def test_what_does_not_fit(sets):
    with pytest.raises(ValueError, match="num_features must be given"):
        metrics.FrechetInceptionDistance(nn.Identity())
    with pytest.raises(TypeError, match="feature must be the width of a layer of Inception or a callable, got '2048'"):
        metrics.FrechetInceptionDistance("2048", num_features=6)
    with pytest.raises(TypeError, match="normalize must be True or False, got 'no'"):
        distance(normalize="no")
    metric = filled(distance(), sets[0], sets[1][:1])
    with pytest.raises(RuntimeError, match="fake must hold at least 2 images, got 1"):
        metric.compute()
    with pytest.raises(ValueError, match=r"x must have shape \[n, 6\]"):
        metric.update(torch.randn(3, 5), real=True)
    metric.update(torch.full((2, 6), math.nan), real=False)
    with pytest.raises(ValueError, match="features must be finite"):
        metric.compute()
    latent = metrics.FrechetLatentDistance(6)
    latent.update(sets[0][:1])
    with pytest.raises(RuntimeError, match="codes must hold at least 2 samples, got 1"):
        latent.compute()


RANK = """
import sys, torch, torch.distributed as dist
from ivfast import metrics
rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
real, fake = torch.load(f"{folder}/x.pt")
fid = metrics.FrechetInceptionDistance(torch.nn.Identity(), num_features=6)
stepping = metrics.FrechetInceptionDistance(torch.nn.Identity(), num_features=6, dist_sync_on_step=True)
fld = metrics.FrechetLatentDistance(6)
mine = real.tensor_split([31])[rank]
fid.update(mine[:9], real=True)
if rank:
    fid.update(fake, real=False)  # the other has seen none
first = fid.compute()
fid.update(mine[9:], real=True)
fld.update(mine)
stepping(mine, real=True)
values = first, fid.compute(), fld.compute(), stepping(fake.tensor_split([1])[rank], real=False)
torch.save((values, fid.real), f"{folder}/{rank}.pt")
dist.barrier()
dist.destroy_process_group()
"""


def test_two_ranks_give_the_value_of_all_samples(tmp_path):
    real, fake = samples(50, 6) + 1e4, samples(40, 6) + 1e4
    torch.save((real, fake), tmp_path / "x.pt")
    command = [sys.executable, "-W", "error", "-c", RANK]
    ranks = [subprocess.Popen([*command, str(rank), str(tmp_path)], cwd="/") for rank in range(2)]
    assert [rank.wait(120) for rank in ranks] == [0, 0]
    (values, own), (others, _) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert all(torch.equal(a, b) for a, b in zip(values, others, strict=True))
    first, fid, latent, stepping = (value.item() for value in values)
    assert first == pytest.approx(nuclear(torch.cat([real[:9], real[31:40]]).numpy(), fake.numpy()), rel=1e-8)
    for value in (fid, stepping):
        assert value == pytest.approx(nuclear(real.numpy(), fake.numpy()), rel=1e-8)
    assert latent == fld(real)
    assert own[0, 0] == 31  # a rank's own samples are kept separately


def test_without_torchmetrics_the_rest_works():
    code = without("torchmetrics") + (
        "from ivfast import metrics\n"
        "assert not hasattr(metrics, 'FrechetLatent')\n"
        "for name in ('FrechetInceptionDistance', 'FrechetLatentDistance'):\n"
        "    try: getattr(metrics, name)\n"
        "    except ImportError as error: print(error)\n"
    )
    assert passes(code).splitlines() == [
        f'ivfast.metrics.Frechet{name}Distance needs torchmetrics: pip install "ivfast[metrics]"'
        for name in ("Inception", "Latent")
    ]
