"""Kernels proved without a GPU: Triton interpreted, CUDA C++ compiled by nvcc; and tests/simt."""

import ctypes
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from helpers import size
from simt import build

import ivfast
from ivfast import testing
from ivfast.testing import Case

REPOSITORY = Path(__file__).resolve().parents[1]
TARGETS = (80, 90, 100)  # A100, H100 and H200, B200
REGISTERS = 160  # at most, per thread: 144 (nvcc 13.0) when written, and room for other compilers
HALF = (torch.bfloat16, torch.float16)
triton_device = "cuda" if torch.cuda.is_available() else "cpu"  # interpreted there: tests/conftest.py


def assert_matches(case: Case, dtype: torch.dtype, implementation: str, device: str = "cpu"):
    testing.check(case, testing.inputs(case, dtype, device=device), implementation)


# Triton: the multi-class Jensen–Shannon loss


def js_case(shape, *, weighted=False, scale=3.0, slack=1.0, dtype=torch.float32) -> Case:
    weights = torch.rand(shape[-1]) + 0.1 if weighted else None

    def loss(x):
        on_device = None if weights is None else weights.to(x)  # rounded as the input is, for the reference too
        return ivfast.multi_js_loss(x, weights=on_device)

    def draw(generator):
        return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale,)

    if weights is not None:
        weights = weights.to(dtype)
    return Case("multi_js_loss", f"{tuple(shape)}", loss, draw, slack=slack)


@pytest.mark.usefixtures("poisoned")
class TestMultiJs:
    """Interpreted where there is no GPU."""

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF], ids=str)
    @pytest.mark.parametrize("case", [c for c in testing.CASES if c.op == "multi_js_loss"], ids=str)
    def test_cases(self, case, dtype):
        assert_matches(case, dtype, "triton", triton_device)

    @pytest.mark.parametrize("weighted", [False, True])
    @pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
    @pytest.mark.parametrize("classes", [2, 3, 5, 17, 32, 33])
    def test_random_sizes(self, classes, dtype, weighted):
        batch = [size(1, 3) for _ in range(size(0, 2))]
        shape = (*batch, classes, size(1, 37), classes)
        assert_matches(js_case(shape, weighted=weighted, dtype=dtype), dtype, "triton", triton_device)

    @pytest.mark.parametrize("classes", [100, 600])
    def test_many_classes(self, classes):
        assert_matches(js_case((classes, 1, classes)), torch.float32, "triton", triton_device)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("scale", [3.0, 300.0])
    def test_a_row_of_several_tiles(self, monkeypatch, dtype, scale):
        from ivfast.kernels import multi_js

        # 65,536 classes would be 4·10⁹ logits: a small tile takes the same path
        monkeypatch.setattr(multi_js, "TILE", dict.fromkeys(multi_js.TILE, 16))
        monkeypatch.setattr(multi_js, "PARTS", 4)
        classes = size(33, 50)
        assert multi_js._Shape(1, 2, 2 * classes, classes, torch.float32).programs == 4
        # a log-sum-exp of 900 is rounded by up to 3e-5, which is a relative error of exp(x − lse)
        case = js_case((classes, 2, classes), scale=scale, slack=3 if scale > 100 else 1)
        assert_matches(case, dtype, "triton", triton_device)

    def test_paper_sizes_take_one_launch_forward(self):
        from ivfast.kernels.multi_js import _Shape

        for n in (64, 100, 128):
            assert _Shape(1, n, 5 * n, 5, torch.float32).programs == 1

    def test_infinite_logits_give_what_the_reference_gives(self):
        x = torch.randn(3, 40, 3, device=triton_device)
        x[0, :, 1] = float("-inf")
        x[1, 7] = torch.tensor([0.0, 1.0, float("inf")])
        expected = ivfast.multi_js_loss(x.double())
        with ivfast.use("triton"):
            assert float(ivfast.multi_js_loss(x)) == float(expected) == float("inf")
        x[1, 7] = 0.0
        with ivfast.use("triton"):
            assert testing.error(ivfast.multi_js_loss(x), ivfast.multi_js_loss(x.double())) < 1e-6

    def test_expanded_gradient_and_strided_logits(self):
        x = torch.randn(2, 3, 5, 6, device=triton_device)[..., ::2].requires_grad_()
        assert not x.is_contiguous()
        with ivfast.use("triton"):
            (ours,) = torch.autograd.grad(ivfast.multi_js_loss(x).sum(), x)
        (theirs,) = torch.autograd.grad(ivfast.multi_js_loss(x.double()).sum(), x)
        assert testing.error(ours.cpu(), theirs.cpu()) <= testing.TOLERANCES[torch.float32]

    def test_no_sets(self):
        x = torch.empty(0, 3, 5, 3, device=triton_device, requires_grad=True)
        with ivfast.use("triton"):
            loss = ivfast.multi_js_loss(x)
            assert loss.shape == (0,)
            assert torch.autograd.grad(loss.sum(), x)[0].shape == x.shape


# CUDA C++: nvcc


def toolkit() -> Path | None:
    nvcc = shutil.which("nvcc")
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda", Path(nvcc).resolve().parents[1] if nvcc else None]
    usable = (Path(home) for home in homes if home)
    return next((h for h in usable if (h / "bin/nvcc").is_file() and (h / "include/cuda_runtime.h").is_file()), None)


@pytest.mark.skipif(toolkit() is None, reason="no CUDA toolkit with nvcc and cuda_runtime.h")
@pytest.mark.parametrize("source", sorted((REPOSITORY / "csrc/cuda").glob("*.cu")), ids=lambda path: path.name)
def test_cuda_kernels_compile_without_spills(source, tmp_path):
    nvcc = toolkit() / "bin/nvcc"
    known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()
    targets = [cc for cc in TARGETS if f"compute_{cc}" in known]
    command = [
        *(str(nvcc), "-std=c++17", "-O3", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000"),
        *(f"-I{build.TORCH / 'include'}", "-Xptxas", "-v", "--threads", "2"),
        *(f"-gencode=arch=compute_{cc},code=sm_{cc}" for cc in targets),
        *("-c", str(source), "-o", str(tmp_path / "kernels.o")),
    ]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    report = result.stdout + result.stderr
    kernels = re.findall(r"Compiling entry function '(\S+)' for '(\S+)'", report)
    assert {sm for _, sm in kernels} == {f"sm_{cc}" for cc in targets}
    used = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert len(used) == len(kernels)
    assert set(used) == {("0", "0", "0")}


# The shim itself


@pytest.fixture(scope="module")
def probes():
    try:
        library = ctypes.CDLL(str(build.build("probes", [build.HERE / "probes.cu"])))
    except build.NoCompilerError as error:
        pytest.skip(str(error))

    def call(name, *arguments, seed=0):
        """Runs a probe; raises what it reports."""
        library.simt_seed(ctypes.c_uint64(seed))
        function = getattr(library, f"probe_{name}")
        function.restype = ctypes.c_char_p
        converted = [ctypes.c_void_p(a.data_ptr()) if isinstance(a, torch.Tensor) else a for a in arguments]
        error = function(*converted)
        if error:
            raise RuntimeError(error.decode())

    return call


class TestShim:
    @pytest.mark.parametrize("probe", ["reverse", "reverse_rounds"])
    def test_a_missing_barrier_gives_wrong_results(self, probes, probe):
        x, y = torch.randn(4, 64), torch.empty(4, 64)
        wrong = 0
        for seed in range(10):
            probes(probe, x, y, ctypes.c_bool(True), seed=seed)
            assert torch.equal(y, x.flip(1))
            probes(probe, x, y, ctypes.c_bool(False), seed=seed)
            wrong += not torch.equal(y, x.flip(1))
        assert wrong == 10

    def test_threads_that_disagree_at_a_barrier(self, probes):
        y = torch.zeros(64)
        with pytest.raises(RuntimeError, match=r"64 threads of a block disagree: 40 at the barrier .*; 24 finished"):
            probes("divergent_barrier", y)
        with pytest.raises(RuntimeError, match=r"disagree: 32 at the barrier .*; 32 at the barrier"):
            probes("two_barriers", y)

    def test_a_missing_lane(self, probes):
        with pytest.raises(RuntimeError, match=r"disagree: 2 finished; 62 in the warp operation probes.cu:\d+"):
            probes("missing_lane", torch.zeros(64))

    def test_shared_memory(self, probes):
        y = torch.zeros(64)
        probes("unwritten_shared", y)
        assert y.isnan().all()
        with pytest.raises(RuntimeError, match="past its dynamic shared memory"):
            probes("past_the_end", torch.zeros(64))
        with pytest.raises(RuntimeError, match="invalid argument"):
            probes("shared_memory", y, ctypes.c_size_t(50_000), ctypes.c_bool(False))
        probes("shared_memory", y, ctypes.c_size_t(163 * 1024), ctypes.c_bool(True))
        with pytest.raises(RuntimeError, match="refused"):
            probes("shared_memory", y, ctypes.c_size_t(163 * 1024 + 1), ctypes.c_bool(True))

    def test_warp_operations(self, probes):
        x, y = torch.randn(64), torch.empty(11, 64)
        probes("warp_operations", x, y, seed=3)
        warp, lane = x.view(2, 32), torch.arange(32)
        half = x.view(4, 16)
        expected = [
            warp[:, lane ^ 5],
            warp[:, torch.where(lane + 3 < 32, lane + 3, lane)],
            warp[:, torch.where(lane % 16 >= 3, lane - 3, lane)],
            warp[:, lane // 8 * 8 + 1],
            ((warp[:, 16:] > 0) * 2 ** torch.arange(16)).sum(1, keepdim=True).expand(2, 32),
            (half > 1.5).any(1, keepdim=True).expand(4, 16),
            (half > -1.5).all(1, keepdim=True).expand(4, 16),
            half[:, [*range(1, 16), 15]],
            (warp * 1024).trunc().amin(1, keepdim=True).expand(2, 32),
            (half * 1024).trunc().amax(1, keepdim=True).expand(4, 16),
            warp.square().amax(1, keepdim=True).expand(2, 32),
        ]
        for ours, theirs in zip(y, expected, strict=True):
            assert torch.equal(ours, theirs.reshape(64).float())

    def test_indices_of_a_three_dimensional_grid(self, probes):
        y, total = torch.zeros(12 * 60), torch.zeros(2, dtype=torch.int32)
        probes("indices", y, total, seed=5)
        assert torch.equal(y, torch.ones_like(y))
        assert total.tolist() == [720, 11]
