"""What every test runs under: NaN in uninitialised memory, fixed seeds, two threads, and the backends that are there."""

from __future__ import annotations

import os

# Read when the package (and triton) is imported: the C++ output pool hands out NaN, Triton kernels run on the CPU.
os.environ.setdefault("DL4DS_POOL_POISON", "1")
os.environ.pop("DL4DS_BACKEND", None)
# Threads that wait do not spin: the suite shares its machine with compilers and subprocesses.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from dl4ds_kernels import _backend, _extension, _packing

# torch.empty then holds NaN (floats) or the largest value (integers) instead of whatever was there.
torch.use_deterministic_algorithms(True, warn_only=True)
torch.set_num_threads(2)

BACKENDS = ["reference", "cpu"] + (["cuda", "triton"] if torch.cuda.is_available() else [])


def device_of(backend: str) -> str:
    """The device whose tensors a backend serves in the tests."""
    return "cuda" if backend in ("cuda", "triton") else "cpu"


def skip_unless_loaded(backend: str) -> None:
    """Skip with the package's own words where the compiled part of ``backend`` is not there."""
    part = {"cpu": "_C", "cuda": "_cuda"}.get(backend)
    if part and not _extension.status()[part].loaded:
        pytest.skip(_extension.missing_reason(backend))


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """Every backend of this machine, asked for by name."""
    skip_unless_loaded(request.param)
    return request.param


@pytest.fixture(params=[b for b in BACKENDS if b != "reference"])
def kernel_backend(request: pytest.FixtureRequest) -> str:
    """The backends with kernels of their own (the dispatcher's ops)."""
    skip_unless_loaded(request.param)
    return request.param


@pytest.fixture(autouse=True)
def _repeatable() -> object:
    """The same numbers in every run and order; no test leaves a backend choice or a thread count behind."""
    torch.manual_seed(0)
    before = (_backend._default, _backend._state.name, _backend.untouched, torch.get_num_threads())
    yield
    _backend._default, _backend._state.name, _backend.untouched = before[:3]
    torch.set_num_threads(before[3])


@pytest.fixture(autouse=True)
def _prepack_small_layers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The models of tests/convert are small: let them take the prepacked path that real layers take."""
    if request.path.parent.name == "convert":
        monkeypatch.setattr(_packing, "MIN_MACS", 0)
        monkeypatch.setattr(_packing, "MIN_LIBRARY_MACS", 0)


@pytest.fixture
def namespace(kernel_backend: str) -> str:
    """The dispatcher namespace of a kernel backend."""
    return "dl4ds_kernels_triton" if kernel_backend == "triton" else "dl4ds_kernels"


@pytest.fixture
def fresh_dynamo() -> object:
    """No compiled code from another test."""
    torch._dynamo.reset()
    yield torch._dynamo
    torch._dynamo.reset()


@pytest.fixture
def kernels() -> None:
    """The test needs the CPU kernels."""
    skip_unless_loaded("cpu")
