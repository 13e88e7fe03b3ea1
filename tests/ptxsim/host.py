"""Running host launchers (`launch_<op>_fwd(params, stream)`) as shipped: nvcc objects over the stand-in CUDA runtime."""

from __future__ import annotations

import ctypes as c
import functools
import re
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from . import build
from . import library as core
from .module import Arr
from .report import Report


class Session:
    """Launches of one `HostLibrary.session`; `reports` has one Report per kernel launch."""

    def __init__(self, library: HostLibrary) -> None:
        self._library = library
        self._arrays: list[Arr] = []
        self.reports: list[Report] = []

    def pointer(self, array: Arr | None) -> int:
        """The address of an array to write into a Params struct or to pass; 0 for None."""
        if array is None:
            return 0
        self._arrays.append(array)
        return array.register()

    def call(self, name: str, *args: Any, restype: Any = c.c_int) -> Any:
        """Calls a host function; structures are passed by reference (`const Params&`), None as a null stream."""
        function = self._library.function(name)
        function.restype = restype
        converted = [c.byref(a) if isinstance(a, c.Structure) else c.c_void_p(a) if a is None else a for a in args]
        try:
            return function(*converted)
        finally:
            self.reports += map(Report.from_result, core.take_results())

    @property
    def errors(self) -> list[str]:
        """Errors of all launches. An output may be written by several kernels: what the last leaves unwritten counts."""
        texts = []
        for report in self.reports:
            last = report is self.reports[-1]
            texts += [f"{report.kernel[:80]}: {e}" for e in report.errors if last or not e.startswith("UNWRITTEN")]
        return texts

    def check(self) -> Session:
        """Raises AssertionError unless there were launches and all were clean."""
        assert self.reports, "no kernel was launched"
        assert not self.errors, "\n  ".join(self.errors)
        return self


class HostLibrary:
    """A shared library of host launchers and embedded PTX, linked with the stand-in runtime instead of libcudart."""

    def __init__(self, objects: Sequence[Path | str]) -> None:
        self.path = build.link_host_library(objects)
        core.library()  # its symbols come from the library already loaded
        self._handle = c.CDLL(str(self.path))
        self._functions: dict[str, Any] = {}

    @classmethod
    def from_sources(
        cls, sources: Sequence[Path | str], includes: Sequence[Path | str] = (), flags: Sequence[str] = ()
    ) -> HostLibrary:
        """Compiles .cu files with nvcc (cached) and links them."""
        return cls([build.compile_cuda(s, "object", includes=includes, flags=flags)[0] for s in sources])

    @functools.cached_property
    def symbols(self) -> list[str]:
        """Names of the functions the library defines (mangled for C++)."""
        listing = subprocess.run(["nm", "-D", "--defined-only", str(self.path)], capture_output=True, text=True, check=True)
        return [line.split()[-1] for line in listing.stdout.splitlines() if " T " in line or " W " in line]

    def function(self, name: str) -> Any:
        """The function of that name: a C symbol, or the only C++ function called so in any namespace."""
        if name in self._functions:
            return self._functions[name]
        pattern = re.compile(rf"^{re.escape(name)}$|{len(name)}{re.escape(name)}(?=[ERKPiljmfdbsthv]|$)")
        found = [s for s in self.symbols if pattern.search(s)]
        if len(found) != 1:
            raise LookupError(f"{len(found)} functions match {name!r}: {found}")
        return self._functions.setdefault(name, self._handle[found[0]])

    def device(self, capability: int = 80, processors: int = 108, shared_optin: int = 166912) -> None:
        """What the stand-in runtime says of its device."""
        self._handle.ptxsim_device(capability, processors, shared_optin)

    @contextmanager
    def session(self, **options: int) -> Iterator[Session]:
        """Sets options (as in Module.launch) for the launches inside; arrays are forgotten at the end."""
        core.set_options(**options)
        core.library().ptxsim_clear()
        core.take_results()
        session = Session(self)
        try:
            yield session
        finally:
            core.library().ptxsim_clear()
