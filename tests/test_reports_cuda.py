"""Sums over blocks by the last block to report (csrc/cuda/reports.h), run on the CPU by tests/simt."""

import ctypes

import pytest
import torch
from simt import build


@pytest.fixture(scope="module")
def probes():
    try:
        library = ctypes.CDLL(str(build.build("reports", [build.HERE / "reports.cu"])))
    except build.NoCompilerError as error:
        pytest.skip(str(error))
    library.probe_signature.restype = ctypes.c_uint64
    library.probe_sum.restype = ctypes.c_char_p
    return library


@pytest.mark.parametrize("before", [0, -1, None])
@pytest.mark.parametrize(("sets", "blocks"), [(1, 1), (3, 2), (2, 70), (1, 512)])
def test_a_launch_may_be_replayed(probes, sets, blocks, before):
    reports = (
        torch.randint(-(2**63), 2**63 - 1, (sets, blocks + 1))
        if before is None
        else torch.full((sets, blocks + 1), before)
    )
    for _ in range(2):  # launches, in what memory the last left
        signature = probes.probe_signature()
        assert signature & 0xFFFF == 0
        for seed in range(3):  # replays
            probes.simt_seed(ctypes.c_uint64(seed))
            x, sums = torch.randn(sets, blocks, 64, dtype=torch.float64), torch.full((sets,), torch.nan).double()
            writers = torch.zeros(sets, dtype=torch.int32)
            tensors = (ctypes.c_void_p(t.data_ptr()) for t in (x, sums, writers, reports))
            error = probes.probe_sum(*tensors, ctypes.c_uint64(signature), sets, blocks)
            assert error is None, error
            assert writers.tolist() == [1] * sets
            assert torch.equal(reports[:, 0], torch.zeros(sets, dtype=torch.int64))  # the tickets are closed
            assert (sums - x.sum((1, 2))).abs().max() < 1e-10

            probes.simt_seed(ctypes.c_uint64(seed + 100))
            again = sums.clone()
            tensors = (ctypes.c_void_p(t.data_ptr()) for t in (x, again, writers, reports))
            assert probes.probe_sum(*tensors, ctypes.c_uint64(signature), sets, blocks) is None
            assert torch.equal(sums, again)  # whichever block is last


def test_signatures_are_never_repeated(probes):
    drawn = [probes.probe_signature() for _ in range(5000)]
    assert len(set(drawn)) == len(drawn)
    assert 0 not in drawn
