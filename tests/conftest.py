"""Without a GPU, Triton kernels are interpreted: the variable must be set before triton is first imported."""

import os
import zlib

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # one process per core: more threads would wait for each other

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# These take longest, and so run first: a file that starts last would leave the other cores idle.
LONGEST = [
    "cubins",
    "nvcc",
    "ranks",
    "as_distance_cuda",
    "distributed",
    "as_distance_triton",
    "import",
    "papers",
    "cli",
]
APART = ["cubins", "ops"]  # files whose tests share nothing and run on any worker; those of `ops` fill the end of a run


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """With `-n`, the tests of a file run in one process, so that what they share is made once: ranks, runs, builds."""
    if config.getoption("dist") != "load":
        return None
    from xdist.scheduler import LoadScopeScheduling

    here = os.path.dirname(__file__)
    assert all(os.path.exists(os.path.join(here, f"test_{name}.py")) for name in LONGEST + APART)

    def stem(scope):
        return os.path.basename(scope.partition("::")[0]).removeprefix("test_").removesuffix(".py")

    def place(scope):
        return LONGEST.index(stem(scope)) if stem(scope) in LONGEST else len(LONGEST)

    class Files(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            return nodeid if stem(nodeid) in APART else nodeid.partition("::")[0]

        def _assign_work_unit(self, node):
            self.workqueue.move_to_end(min(self.workqueue, key=place), last=False)
            super()._assign_work_unit(node)

    return Files(config, log)


@pytest.fixture(autouse=True)
def _fresh_seed(request):
    """Inputs differ from run to run; a failing test prints its seed, and IVFAST_SEED repeats it.

    IVFAST_INPUTS, a word, determines one seed per test: `.ci/run` passes the tree's hash, so that each commit gets
    fresh inputs and the same commit always gets the same verdict. Tests of how far a training run gets (the mark
    `trains`) have a fixed seed, because luck is not what they test.
    """
    word = os.environ.get("IVFAST_INPUTS")
    fresh = zlib.crc32(f"{word} {request.node.nodeid}".encode()) % 2**31 if word else torch.seed() % 2**31
    steady = 1 if request.node.get_closest_marker("trains") else fresh
    seed = int(os.environ.get("IVFAST_SEED", steady))
    torch.manual_seed(seed)
    request.node.add_report_section("setup", "seed", f"IVFAST_SEED={seed}")


@pytest.fixture(params=["float64", "float32"])
def rounding(request, monkeypatch):
    """A system in float64, where rounding neither cancels a sum nor switches a unit on or off, and in float32.

    In float64 the system's casts to float32, meant for half precision, are disabled. In float32, one unit of one image
    that is on in one computation and off in the other changes a gradient by a hundredth, in one draw of thousands.
    """
    from helpers import Rounding

    from ivfast import _defaults

    if request.param == "float32":
        yield Rounding(loss=5e-5, gradient=0.1, unit=0.1)
        return
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    monkeypatch.setattr(_defaults, "DTYPE", torch.float64)
    torch.set_default_dtype(torch.float64)
    yield Rounding(loss=1e-9, gradient=1e-8, unit=1e-3)
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def poisoned():
    """Memory from torch.empty is NaN, so any part of an output that no kernel wrote shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def bounds():
    """Interpreted Triton kernels may touch nothing but their tensors; counts the accesses that were checked."""
    from bounds import checked

    with checked() as check:
        yield check


@pytest.fixture(autouse=True)
def _bounds_everywhere(request):
    if os.environ.get("IVFAST_BOUNDS") == "1" and request.node.path.name.endswith("_triton.py"):
        request.getfixturevalue("bounds")


@pytest.fixture
def simt(poisoned):
    """The kernels of csrc/cuda run on CPU tensors, through tests/simt."""
    from simt import build

    try:
        build.load()
    except build.NoCompilerError as error:
        pytest.skip(str(error))
    return build


@pytest.fixture(params=["generic", "avx2", "avx512"])
def isa(request):
    """Each instruction set of the C++ kernels that this CPU has, forced."""
    pytest.importorskip("ivfast._C")
    from ivfast._registry import instruction_set

    before = instruction_set()
    try:
        instruction_set(request.param)
    except ValueError as error:
        pytest.skip(str(error))
    yield request.param
    instruction_set(before)


@pytest.fixture
def threads():
    """Sets the number of threads for this test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
