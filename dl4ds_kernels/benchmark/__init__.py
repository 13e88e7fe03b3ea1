"""The benchmark engine behind ``python -m dl4ds_kernels bench``, bench/ and ``info``: parity gate, then interleaved timing."""

from ._case import DTYPES, LAYOUTS, OURS, STOCK, Case, Run, Unavailable, default_backends, why_not
from ._engine import Row, failed, relative_error, run_case, run_cases
from ._machine import machine
from ._timing import Timing, measure, quantile, speedup, speedup_range
from .ops import OPS

__all__ = [
    "DTYPES",
    "LAYOUTS",
    "OPS",
    "OURS",
    "STOCK",
    "Case",
    "Row",
    "Run",
    "Timing",
    "Unavailable",
    "default_backends",
    "failed",
    "machine",
    "measure",
    "quantile",
    "relative_error",
    "run_case",
    "run_cases",
    "speedup",
    "speedup_range",
    "why_not",
]
