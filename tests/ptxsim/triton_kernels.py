"""Compiles Triton kernels to PTX without a GPU.

The compiler runs in a process of its own: under TRITON_INTERPRET=1 (as in this project's tests) `@triton.jit` gives
interpreted functions, and triton's own library with them, so the process that runs the tests can't compile.
"""

from __future__ import annotations

import atexit
import functools
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .build import REPOSITORY


@dataclass(frozen=True)
class CompiledTriton:
    """PTX, dynamic shared memory in bytes, threads per block and kernel name."""

    ptx: str
    shared: int
    threads: int
    name: str


class TritonCompileError(RuntimeError):
    """Triton could not compile the kernel; the message is the compiler's."""


@functools.cache
def _worker() -> subprocess.Popen[str]:
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path)}
    command = [sys.executable, "-m", __name__]
    worker = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY, env=environment
    )
    atexit.register(worker.kill)
    return worker


def compile_triton(
    kernel: Any,
    signature: dict[str, str],
    constants: dict[str, Any],
    divisible_by_16: Sequence[str] | None = None,
    capability: int = 80,
    **options: Any,
) -> CompiledTriton:
    """Compiles a module-level `@triton.jit` function ahead of time.

    signature: type of every run-time argument ("*fp16", "i32", "fp32"). constants: values of the constexpr ones.
    divisible_by_16: integer arguments and pointers whose values are multiples of 16, as the launcher specialises them;
    by default all pointers. options: num_warps, num_stages, … as in a launch.
    """
    function = kernel.fn
    if divisible_by_16 is None:
        divisible_by_16 = [name for name, kind in signature.items() if kind.startswith("*")]
    request = {
        "module": function.__module__,
        "name": function.__name__,
        "signature": signature,
        "constants": constants,
        "divisible": list(divisible_by_16),
        "capability": capability,
        "options": options,
    }
    worker = _worker()
    worker.stdin.write(json.dumps(request) + "\n")
    worker.stdin.flush()
    line = worker.stdout.readline()
    if not line:
        raise TritonCompileError("the compiler process ended; its message is on stderr")
    answer = json.loads(line)
    if "error" in answer:
        raise TritonCompileError(answer["error"])
    return CompiledTriton(**answer)


def _compile(request: dict[str, Any]) -> dict[str, Any]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(importlib.import_module(request["module"]), request["name"])
    names = kernel.arg_names
    types = {name: request["signature"].get(name, "constexpr") for name in names}
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in request["divisible"]}
    constants = {(names.index(k),): v for k, v in request["constants"].items()}
    source = ASTSource(kernel, types, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", request["capability"], 32), options=request["options"])
    metadata = compiled.metadata
    return {"ptx": compiled.asm["ptx"], "shared": metadata.shared, "threads": 32 * metadata.num_warps, "name": metadata.name}


def _serve() -> None:
    """One JSON request per line in, one JSON answer per line out."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not get between the answers
    for line in sys.stdin:
        try:
            answer = _compile(json.loads(line))
        except Exception as error:  # any failure is the caller's answer
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    _serve()
