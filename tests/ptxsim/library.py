"""ctypes binding of libptxsim.so (core/api.h)."""

from __future__ import annotations

import ctypes as c
import functools
import json
from typing import Any

from . import build

WRITABLE, UNDEFINED, OUTPUT = 1, 2, 4
OPTIONS = {
    "races": 1,
    "traffic": 1,
    "lazy_copies": 1,
    "schedule": 0,
    "max_reports": 20,
    "budget": 1 << 33,
    "limit": (1 << 63) - 1,
    "tags": 1,
    "grid_delta": 0,
}


class SimulatorError(RuntimeError):
    """The PTX could not be loaded, or a kernel could not go on (unsupported instruction, deadlock, trap, …)."""


@functools.cache
def library() -> c.CDLL:
    """The simulator; the first call on a machine compiles it (about 15 s on two cores)."""
    lib = c.CDLL(str(build.simulator() / "libptxsim.so"))
    for name, result, arguments in [
        ("error", c.c_char_p, []),
        ("load", c.c_void_p, [c.c_char_p]),
        ("unload", None, [c.c_void_p]),
        ("describe", c.c_char_p, [c.c_void_p]),
        ("opcodes", c.c_char_p, []),
        ("symbol", c.c_uint64, [c.c_void_p, c.c_char_p]),
        ("register", c.c_uint64, [c.c_uint64, c.c_uint64, c.c_int, c.c_char_p]),
        ("unregister", None, [c.c_uint64]),
        ("clear", None, []),
        ("host_address", c.c_uint64, [c.c_uint64]),
        ("option", c.c_int, [c.c_char_p, c.c_int64]),
        ("launch", c.c_int, [c.c_void_p, c.c_char_p, c.c_void_p, c.c_void_p, c.c_uint32, c.c_void_p]),
        ("replace", None, [c.c_char_p, c.c_void_p]),
        ("results", c.c_char_p, []),
    ]:
        function = getattr(lib, f"ptxsim_{name}")
        function.restype, function.argtypes = result, arguments
    return lib


def last_error() -> str:
    """Why the last call failed."""
    return library().ptxsim_error().decode(errors="replace")


def set_options(**options: int) -> None:
    """Sets every option: those given, and the defaults of the others. Unknown names raise TypeError."""
    for name in options:
        if name not in OPTIONS:
            raise TypeError(f"unknown simulator option {name!r}; there are {', '.join(OPTIONS)}")
    for name, default in OPTIONS.items():
        library().ptxsim_option(name.encode(), int(options.get(name, default)))


def take_results() -> list[dict[str, Any]]:
    """Results of all launches since the last call."""
    return json.loads(library().ptxsim_results().decode(errors="replace"))
