"""Facts about machine and versions, as they go into every result file."""

from __future__ import annotations

import os
import platform
from datetime import datetime, timezone
from typing import Any

import torch

from .. import __version__
from .._autotune import cpu_name

_MALLOC = ("MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_", "THP_MEM_ALLOC_ENABLE", "LD_PRELOAD")


def gpus() -> list[dict[str, Any]]:
    """Name, capability, memory and count of multiprocessors of every CUDA device."""
    found = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        p = torch.cuda.get_device_properties(index)
        found.append(
            {
                "name": p.name,
                "capability": f"{p.major}.{p.minor}",
                "memory_gib": round(p.total_memory / 2**30, 1),
                "multiprocessors": p.multi_processor_count,
            }
        )
    return found


def machine() -> dict[str, Any]:
    """What a reader needs to judge or repeat a measurement."""
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "dl4ds_kernels": __version__,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": gpus(),
        "environment": {k: v for k, v in sorted(os.environ.items()) if k.startswith("DL4DS_") or k in _MALLOC},
    }
