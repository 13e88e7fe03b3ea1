"""Optional measured choices, kept in a file: ``DL4DS_AUTOTUNE=1``.

Without the variable nothing here runs. With it, a choice that the cost model would make from sizes is made by timing the
candidates on the real operands, once for (sizes, threads, instruction set, CPU name, versions); _cuda_autotune.py does the same
for CUDA and keeps its times here. The times go to a JSON file, ``$DL4DS_AUTOTUNE_CACHE`` or
``$XDG_CACHE_HOME/dl4ds_kernels/autotune.json``, so that the next process does not time again.

The file is replaced whole, under a lock, after reading what other processes have added. A file that is not ours, or is damaged,
is left as it is: one warning says so, and the choices of this process stay in memory.
"""

from __future__ import annotations

import json
import math
import os
import platform
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch

from . import _extension
from ._version import __version__

try:
    import fcntl
except ImportError:  # not POSIX: without the lock two processes may lose one of two choices, no more
    fcntl = None  # type: ignore[assignment]

Times = dict[int, float]  # algorithm code -> microseconds a call

_FORMAT = "dl4ds_kernels autotune 1"
_MOST_BYTES = 16 << 20  # of a cache file; more than that was not written by this module
_ROUNDS, _BUDGET_S = 7, 0.02
_HOPELESS = 2.0  # times the fastest first call: not timed any further
_MARGIN = 0.97  # a candidate must take less than this part of the default's time to replace it

lock = threading.RLock()  # also: one timing at a time
_known: dict[Path, dict[str, Any]] = {}  # cache file -> what it held when read, and what was added since
_warned: set[Path] = set()


def wanted() -> bool:
    """Whether the environment asks for measured choices."""
    return os.environ.get("DL4DS_AUTOTUNE") == "1"


def possible() -> bool:
    """Whether this is a moment to time something: no graph is being traced, no gradient recorded."""
    return not (torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing())


def cache_file() -> Path:
    """Where choices are kept."""
    named = os.environ.get("DL4DS_AUTOTUNE_CACHE")
    if named:
        return Path(named).expanduser().absolute()
    xdg = os.environ.get("XDG_CACHE_HOME", "")
    folder = Path(xdg) if xdg.startswith("/") else Path.home() / ".cache"  # the XDG rules: a relative path is ignored
    return folder / "dl4ds_kernels" / "autotune.json"


@cache
def cpu_name() -> str:
    """Model name of the processor."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.lower().startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def machine_key() -> str:
    """What times are comparable within: CPU, instruction set, threads, and the versions of the code that ran."""
    isa = _extension.host().cpu_features()["isa"]
    return f"{cpu_name()}, {isa}, {torch.get_num_threads()} threads, dl4ds_kernels {__version__}, torch {torch.__version__}"


def choose(key: str, default: int, candidates: Mapping[int, Callable[[], Callable[[], Any]]]) -> int:
    """The fastest candidate for ``key``: from the cache file, else timed now and added to it.

    Args:
        key: the sizes, in words that are the same in every process.
        default: the code to prefer where no other is clearly faster; one of ``candidates``.
        candidates: code -> maker of the call to time (a maker prepares what need not be timed, such as a pack).
    """
    with lock:
        machine = machine_key()
        times = known(machine, key)
        if not times.keys() >= candidates.keys():
            times |= time_calls({code: make() for code, make in candidates.items()})
            keep(machine, key, times)
    return best_of(times, candidates, default)


def known(machine: str, key: str) -> Times:
    """Times that this process or the cache file has; {} if there are none. Call it under ``lock``."""
    return _times(_load(cache_file()).get(machine, {}).get(key))


def keep(machine: str, key: str, times: Times) -> None:
    """Add times to this process and the cache file. Call it under ``lock``."""
    path = cache_file()
    _load(path)
    _add(path, machine, key, times)


def best_of(times: Times, codes: Iterable[int], default: int) -> int:
    """The fastest of ``codes``, but ``default`` unless it is clearly beaten."""
    best = min(codes, key=times.__getitem__)
    return best if times[best] < _MARGIN * times[default] else default


def time_calls(calls: Mapping[int, Callable[[], Any]]) -> Times:
    """Microseconds of each call: the least of interleaved samples, with caches as they are inside a network.

    Between two samples more memory is touched than the cores' own caches hold, since a layer's weight is not in them when its
    turn comes. After the first call only candidates within a factor of two of the fastest are timed on.
    """
    l2_bytes = max(1 << 20, int(_extension.host().cpu_features()["l2_bytes"]))
    other = torch.zeros(2 * l2_bytes * min(8, torch.get_num_threads()) // 4)

    def sample(call: Callable[[], Any]) -> float:
        other.add_(1.0)
        start = time.perf_counter()
        call()
        return (time.perf_counter() - start) * 1e6

    times = {}
    for code, call in calls.items():
        call()
        times[code] = sample(call)
    limit = _HOPELESS * min(times.values())
    start = time.perf_counter()
    for index in range(_ROUNDS):
        if index >= 2 and time.perf_counter() - start > _BUDGET_S:
            break
        for code, call in calls.items():
            if times[code] <= limit:
                times[code] = min(times[code], sample(call))
    return times


def forget() -> None:
    """Drop what this process remembers of cache files; they are read again at the next choice."""
    with lock:
        _known.clear()
        _warned.clear()


# ------------------------------------------------------------------------------------------------------------- the file


def _times(entry: Any) -> Times:
    """An entry of the file as times; empty if it is not one."""
    if not isinstance(entry, dict):
        return {}
    good = {}
    for code, value in entry.items():
        if not code.isdecimal() or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            return {}
        good[int(code)] = float(value)
    return good


def _read(path: Path) -> dict[str, Any] | None:
    """The machines of a cache file; {} where there is no file, None (and a warning) where it is not ours."""
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise ValueError(f"it is larger than {_MOST_BYTES >> 20} MiB")
        document = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(document, dict) or document.get("format") != _FORMAT:
            raise ValueError(f'no "format": "{_FORMAT}" in it')
        machines = document.get("machines")
        if not isinstance(machines, dict) or not all(isinstance(entries, dict) for entries in machines.values()):
            raise ValueError('no "machines" of entries in it')
        return machines
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as problem:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        _warn(path, f"is not read ({problem}) and stays as it is; delete it, or name another one")
        return None


def _load(path: Path) -> dict[str, Any]:
    if path not in _known:
        _known[path] = _read(path) or {}
    return _known[path]


def _add(path: Path, machine: str, key: str, times: Times) -> None:
    """Remember an entry, and merge it into the file unless that is not ours or cannot be written."""
    entry = {str(code): round(value, 2) for code, value in sorted(times.items())}
    _known[path].setdefault(machine, {})[key] = entry
    if path in _warned:
        return
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _exclusive(path):
            machines = _read(path)
            if machines is None:
                return
            machines.setdefault(machine, {})[key] = entry
            _replace(path, {"format": _FORMAT, "machines": machines})
            for name, entries in machines.items():  # what other processes have found since
                _known[path][name] = entries | _known[path].get(name, {})
    except OSError as problem:
        _warn(path, f"cannot be written ({problem}); choices are not kept")


@contextmanager
def _exclusive(path: Path) -> Iterator[None]:
    """One process at a time, by a lock on a file beside ``path``."""
    if fcntl is None:
        yield
        return
    with open(path.with_name(path.name + ".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _replace(path: Path, document: dict[str, Any]) -> None:
    """Write whole or not at all; readers see the old file or the new one."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with open(handle, "w", encoding="utf-8") as file:
            json.dump(document, file, indent=1, sort_keys=True)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _warn(path: Path, what: str) -> None:
    """Once for each file."""
    if path not in _warned:
        _warned.add(path)
        warnings.warn(f"DL4DS_AUTOTUNE: {path} {what}", stacklevel=2)
