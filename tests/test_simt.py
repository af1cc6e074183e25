"""The CUDA-on-CPU shim of tests/simt detects the faults that it is meant to detect."""

import ctypes

import pytest
import torch
from simt import build


@pytest.fixture(scope="module")
def probes():
    try:
        library = ctypes.CDLL(str(build.build("probes", [build.HERE / "probes.cu"])))
    except build.NoCompilerError as error:
        pytest.skip(str(error))

    def call(name, *arguments, seed=0):
        """Runs a probe and raises the error it reports."""
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
