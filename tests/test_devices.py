"""Which implementation serves a GPU, by its architecture and its shared memory; the GPUs here are imagined."""

import pytest
import torch

import ivfast
from ivfast import _build, _devices, testing
from ivfast._registry import OPS, Op
from ivfast.cli import info


@pytest.fixture
def gpu(monkeypatch):
    """Imagines a GPU of this name and compute capability, and an `ivfast._cuda` for these architectures."""

    def imagine(name, capability, built="8.0;9.0;10.0+PTX"):
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda index=None: name)
        monkeypatch.setattr(_build, "BUILT", {"_cuda": built})
        monkeypatch.setattr(Op, "_has_kernel", staticmethod(lambda name, key: True))

    return imagine


def test_an_old_gpu_gets_the_reference(gpu, monkeypatch):
    gpu("Tesla T4", (7, 5))
    op = OPS["gaussian_kl"]
    assert op.missing("cuda", "cuda") == (
        "ivfast._cuda was built for compute capability 8.0;9.0;10.0+PTX, and Tesla T4 has 7.5"
    )
    assert (
        op.missing("triton", "cuda") == "Triton serves GPUs of compute capability 8.0 and above, and Tesla T4 has 7.5"
    )
    monkeypatch.setattr(op, "_served", {})
    mu, logvar = torch.randn(5, 3), torch.randn(5, 3)
    assert torch.equal(op.on_cuda(mu, logvar), op.reference(mu, logvar))
    reasons = info.missing(op)
    assert info.served(reasons)[1] == "reference"
    assert "Tesla T4 has 7.5" in reasons[1]
    assert "Tesla T4 has 7.5" in reasons[2]


@pytest.mark.parametrize(
    ("capability", "built", "runs"),
    [
        ((8, 0), "8.0", True),
        ((8, 9), "8.0 9.0", True),
        ((8, 0), "8.6", False),
        ((9, 0), "8.0;8.6", False),
        ((9, 0), "8.0;8.6+PTX", True),
        ((12, 0), "8.0;9.0;10.0+PTX", True),
        ((12, 0), "8.0;9.0;10.0", False),
        ((9, 0), "9.0a", True),
        ((10, 3), "10.0a+PTX", False),
        ((10, 3), "10.0f", True),
        ((7, 5), "Ampere", True),  # no number: not refused
        ((7, 5), None, True),
    ],
)
def test_images_and_the_gpus_that_run_them(gpu, capability, built, runs):
    gpu("a GPU", capability, built)
    assert (OPS["mmd"].missing("cuda", "cuda") is None) == runs


def square(rows):
    a = torch.randn(rows, 2 * rows, dtype=torch.float64)
    return (a @ a.mT / rows,)


def direction(d):
    return torch.randn(40, d), torch.randn(40, d), None, torch.tensor(float(d)), torch.ones(40), False


SIZED = [("inverse_root", lambda size: square(size)), ("fld_gram", lambda size: (torch.randn(150, size), True)),
         ("svgd_direction_backward", direction)]  # fmt: skip


@pytest.mark.parametrize("kib", [99, 163, 227])
@pytest.mark.parametrize("size", [32, 64, 65, 128])
@pytest.mark.parametrize(("name", "draw"), SIZED, ids=[name for name, _ in SIZED])
def test_a_kernel_that_does_not_fit_leaves_its_place_to_the_next(simt, monkeypatch, name, draw, size, kib):
    op, args, called = OPS[name], draw(size), []
    monkeypatch.setattr(_devices, "shared_memory", lambda index: kib << 10)
    monkeypatch.setattr(op, "missing", lambda *_: None)
    monkeypatch.setattr(op, "_served", {})
    monkeypatch.setattr(op, "launch_triton", lambda *args: called.append("triton") or op.reference(*args))
    simt.shared_memory(kib)
    try:
        ours = op.on_cuda(*args)  # raises if the kernel asks for more
        for a, b in zip(ours, op.reference(*args), strict=True):
            assert testing.error(a, b, 1e-6) <= 1e-4
        assert bool(called) == (kib == 99 and size > 64)
        if called:
            with pytest.raises(RuntimeError, match=rf"needs \d+ bytes of shared memory .* has {kib << 10}"):
                getattr(torch.ops.ivfast, name).cuda(*args)
    finally:
        simt.shared_memory()


@pytest.mark.parametrize("kib", [99, 227])
def test_other_kernels_fit_every_gpu_at_their_largest_sizes(simt, kib):
    cases = {
        "median": lambda x, y: ivfast.median_bandwidth(x, convention="paper"),
        "direction": lambda x, y: ivfast.svgd_direction(x, bandwidth=128.0).detach() + 0 * x,
        "bridge": lambda x, y: ivfast.svgd_bridge(x, 2, draws=torch.stack((y, y)), iterations=1),
        "mmd": lambda x, y: ivfast.mmd(x, y),
        "as_distance": lambda x, y: ivfast.as_distance(x, 0.1 * y, y, 0.1 * x, log=True),
    }
    x, y = torch.randn(256, 128), torch.randn(256, 128)
    simt.shared_memory(kib)
    try:
        for name, call in cases.items():
            results = []
            for implementation, dtype in (("cuda", torch.float32), ("reference", torch.float64)):
                leaf = x.to(dtype).requires_grad_()
                with ivfast.use(implementation):
                    value = call(leaf, y.to(dtype))
                    results.append((value, torch.autograd.grad(value.sum(), leaf)[0]))
            assert testing.error(results[0][0], results[1][0], 0.1) <= 3e-5, name
            if name != "median":  # whose middle pair rounding may choose
                assert testing.error(results[0][1], results[1][1]) <= 1e-4, name
    finally:
        simt.shared_memory()
