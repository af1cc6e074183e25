"""How Triton's kernels are launched on cards that need not exist: what they may use there, and what that compiles."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from cubin_variants import AMD, CARDS

from ivfast.kernels.card import card, on

GB10 = SimpleNamespace(major=12, minor=1, shared_memory_per_block_optin=101376, multi_processor_count=48)
MI300 = SimpleNamespace(
    gcnArchName="gfx942:sramecc+:xnack-", shared_memory_per_block=65536, multi_processor_count=304, warp_size=64
)


@pytest.fixture
def present(monkeypatch):
    """Puts a GPU in sight."""

    def place(properties):
        monkeypatch.setattr(torch.version, "hip", "7.0" if hasattr(properties, "gcnArchName") else None)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        return card(torch.device("cuda", 0))

    card.cache_clear()
    yield place
    card.cache_clear()


class TestCard:
    def test_nvidia(self, present):
        found = present(GB10)
        assert found == ("cuda", 121, 101376, 48, 32)
        assert found.programs(2) == 96
        assert found.precision("tf32x3") == "tf32x3"
        options = {"num_warps": 8, "maxnreg": 128, "enable_fp_fusion": True}
        assert found.options(options) == options

    def test_amd(self, present):
        found = present(MI300)
        assert found == ("hip", "gfx942", 65536, 304, 64)
        assert {found.precision(name) for name in ("tf32", "tf32x3")} == {"ieee"}
        assert found.options({"num_warps": 1}) == {"num_warps": 1}
        x = SimpleNamespace(device=torch.device("cuda", 0))
        assert on(x, {"num_warps": 8, "maxnreg": 128, "enable_fp_fusion": True}) == {
            "num_warps": 4,  # of 64 lanes
            "enable_fp_fusion": True,
        }

    def test_pytorch_says_what_the_precision_is_on_amd_too(self, present):
        from ivfast.kernels.particles import precision

        present(MI300)
        torch.set_float32_matmul_precision("high")
        try:
            assert precision(torch.device("cuda", 0)) == "ieee"
        finally:
            torch.set_float32_matmul_precision("highest")

    @pytest.mark.parametrize(("properties", "shown"), [(GB10, "GPU 0 (sm_121)"), (MI300, "GPU 0 (gfx942)")])
    def test_info_names_what_triton_compiles_for(self, present, monkeypatch, properties, shown):
        info = pytest.importorskip("ivfast.cli.info")
        present(properties)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU {index}")
        assert info.gpu(0) == shown

    def test_info_names_rocm(self, monkeypatch):
        info = pytest.importorskip("ivfast.cli.info")
        monkeypatch.setattr(torch.version, "cuda", None)
        monkeypatch.setattr(torch.version, "hip", "7.0")
        assert info.built_for() == "ROCm 7.0"

    def test_only_data_centre_cards_from_hopper_on_have_the_large_tiles(self):
        assert {target for target, found in CARDS.items() if found.wide} == {90, 100}

    def test_a_larger_card_gets_more_programs(self):
        from ivfast.kernels import particles

        small, large = (CARDS[120]._replace(processors=n) for n in (36, 170))
        for found, parts in ((small, 8), (large, 34)):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(particles, "card", lambda device, found=found: found)
                assert particles.shares(100, 10, torch.device("cuda", 0), 2)[0] == pytest.approx(parts, abs=1)


MOST = {  # variants of a kernel for the cases in float32 and bfloat16; by default DEFAULT
    "particles._pack_kernel": 40,
    "mmd_far._rows_kernel": 24,
    "as_distance_backward._gradient_kernel": 22,
    "multi_js._forward_kernel": 20,
    "multi_js._backward_kernel": 18,
}
DEFAULT = 16


@pytest.mark.parametrize("targets", [(80, 86, 90, 100, 120), AMD], ids=["nvidia", "amd"])
def test_every_case_launches_tiles_that_are_compiled_ahead_of_time_and_few_variants(targets):
    """On a card that is drawn; `test_cubins` shows that the tiles fit."""
    target = random.Random(torch.initial_seed()).choice(targets)
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", str(Path(__file__).with_name("launches.py")), str(target)]
    process = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.returncode == 0, target
    found = json.loads(process.stdout.splitlines()[-1])
    assert not found["missing"], target
    assert found["precisions"] == (["ieee"] if target in AMD else ["tf32", "tf32x3"])
    many = {kernel: n for kernel, n in found["counts"].items() if n > MOST.get(kernel, DEFAULT)}
    assert not many, target
    assert len(found["counts"]) > 35  # the kernels were launched
