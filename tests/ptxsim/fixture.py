"""pytest fixture: a kernel test in three lines.

    def test_add_act(ptxsim):
        kernels = ptxsim.cuda("csrc/ops/add_act/add_act_fwd.cu", includes=["csrc"])      # or ptxsim.triton(fn, signature, …)
        report = kernels.launch("add_act_fwd_kernel", grid, block, [ptxsim.Arr(x, "x", read_only=True), …])
        …                                                                            # compare numbers

Every launch made through the fixture must be clean: findings fail the test at its end, unless it called `expect`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from . import build, toolchain
from .host import HostLibrary, Session
from .module import Arr, Module, Struct
from .report import Report
from .structs import Headers


class Simulator:
    """What the `ptxsim` fixture hands to a test."""

    Arr, Struct, Headers = Arr, Struct, Headers
    repository = build.REPOSITORY

    def __init__(self) -> None:
        self.reports: list[Report] = []
        self._sessions: list[Session] = []
        self._expected: set[str] = set()

    def _path(self, path: Path | str) -> Path:
        return self.repository / path

    def ptx(self, source: str | Path) -> Recorded:
        """A module from PTX text or a .ptx file."""
        return Recorded(self, Module(source))

    def cuda(self, source: Path | str, includes: Sequence[Path | str] = (), flags: Sequence[str] = ()) -> Recorded:
        """A module compiled from a .cu file (paths relative to the repository); skips where there is no nvcc."""
        require_nvcc()
        return self.ptx(
            build.compile_cuda(self._path(source), "ptx", includes=[self._path(i) for i in includes], flags=flags)[0]
        )

    def triton(self, kernel: Any, signature: dict[str, str], constants: dict[str, Any], **options: Any) -> Recorded:
        """A Triton kernel compiled offline (see `compile_triton`); launch with block 32 * num_warps as usual."""
        from .triton_kernels import compile_triton

        compiled = compile_triton(kernel, signature, constants, **options)
        recorded = self.ptx(compiled.ptx)
        recorded.smem, recorded.block = compiled.shared, compiled.threads
        return recorded

    def host(
        self, sources: Sequence[Path | str], includes: Sequence[Path | str] = ("csrc",), flags: Sequence[str] = ()
    ) -> HostLibrary:
        """Host launchers of .cu files over the stand-in CUDA runtime; skips where there is no nvcc."""
        require_nvcc()
        return HostLibrary.from_sources([self._path(s) for s in sources], [self._path(i) for i in includes], flags)

    def watch(self, session: Session) -> Session:
        """The session's launches must be clean at the end of the test."""
        self._sessions.append(session)
        return session

    def expect(self, *kinds: str) -> None:
        """The test provokes findings of these kinds; each must occur, and no other may."""
        self._expected |= set(kinds)

    def finish(self) -> None:
        """Called when the test ends."""
        errors = [e for report in self.reports for e in report.errors] + [e for s in self._sessions for e in s.errors]
        kinds = {kind for report in self.reports for kind in report.kinds} | {
            f.kind for s in self._sessions for r in s.reports for f in r.findings
        }
        if self._expected:
            assert kinds == self._expected, f"expected {sorted(self._expected)}, got {sorted(kinds)}:\n  " + "\n  ".join(errors)
        else:
            assert not errors, "findings of the simulator:\n  " + "\n  ".join(errors)


class Recorded:
    """A Module whose reports the fixture collects."""

    def __init__(self, simulator: Simulator, module: Module) -> None:
        self._simulator, self.module, self.smem, self.block = simulator, module, 0, 0

    def launch(
        self, kernel: str, grid: Any, block: Any, args: Sequence[Any], smem: int | None = None, **options: int
    ) -> Report:
        """As Module.launch; block 0 and no smem mean what the compiler of a Triton kernel asked for."""
        report = self.module.launch(
            kernel, grid, block or self.block, args, smem=self.smem if smem is None else smem, stop=False, **options
        )
        self._simulator.reports.append(report)
        return report


def require_nvcc() -> None:
    """Skips the test on machines without nvcc."""
    if toolchain.nvcc() is None:
        pytest.skip("no nvcc (CUDA_HOME, /usr/local/cuda, PATH or cuda-toolkit[nvcc])")


def require_simulator() -> None:
    """Skips the test on machines without a C++ compiler."""
    if toolchain.cxx() is None:
        pytest.skip("the PTX simulator needs a C++ compiler")


@pytest.fixture
def ptxsim() -> Iterator[Simulator]:
    """The PTX simulator; findings fail the test when it ends."""
    require_simulator()
    simulator = Simulator()
    yield simulator
    simulator.finish()
