"""What the tests take from the last build: the PTX in an object, and only objects of the flags that they ask for."""

from __future__ import annotations

import re

import _cuda_launch as cuda
import pytest
from _cuda_built import BUILD, built_objects, ptx_in
from ptxsim import Module, compile_cuda
from ptxsim.fixture import require_nvcc, require_simulator

SAMPLE = cuda.ROOT / "tests/ptxsim/samples/host.cu"
INCLUDES = [SAMPLE.parent.parent]


def _words(ptx: str) -> list[str]:
    return re.sub(r"//.*", "", ptx).split()


def test_embedded_ptx_is_what_nvcc_prints() -> None:
    require_nvcc()
    require_simulator()
    printed = compile_cuda(SAMPLE, "ptx", includes=INCLUDES)[0].read_text()
    embedded = ptx_in(compile_cuda(SAMPLE, "object", includes=INCLUDES)[0])
    assert _words(embedded) == _words(printed)
    code = embedded.partition("\n.section")[0]
    assert code.count("\n}\n") == len(Module(embedded).kernels)  # a line of its own ends a body, and nothing else


def test_an_object_without_kernels_has_no_ptx() -> None:
    objects = [BUILD / "csrc/ops/add_act/add_act_cpu.cpp.o"]
    if not objects[0].exists():
        pytest.skip("no build folder: the package is installed")
    assert ptx_in(objects[0]) == ""


def test_objects_of_other_flags_are_not_taken() -> None:
    assert built_objects(cuda.SOURCES, ("-DNO_SUCH_MACRO",)) is None
    assert built_objects([cuda.CSRC / "ops/no_such.cu"], ()) is None
