"""Runs compiled GPU kernels (PTX) without a GPU, with checks and traffic counts. See README.md.

args = [Arr(x, "x", read_only=True), Arr(y, "y", output=True), n]
report = Module("kernel.ptx").launch("add_act", grid=4, block=256, args=args)
report.check()          # no finding
print(report.profile()) # per source line
"""

from .build import BuildError, compile_cuda
from .host import HostLibrary, Session
from .library import SimulatorError
from .module import Arr, Module, Struct, aligned
from .report import Finding, Report, profile
from .structs import Headers

__all__ = [
    "Arr",
    "BuildError",
    "Finding",
    "Headers",
    "HostLibrary",
    "Module",
    "Report",
    "Session",
    "SimulatorError",
    "Struct",
    "aligned",
    "compile_cuda",
    "profile",
]
