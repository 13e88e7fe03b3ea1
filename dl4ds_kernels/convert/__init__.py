"""Drop-in replacement of stock layers: ``optimize``, ``analyze``, ``restore``, ``refresh`` and the report."""

from .api import StrictError, algorithms, analyze, optimize, refresh, restore
from .report import REASONS, Report, Row

__all__ = ["REASONS", "Report", "Row", "StrictError", "algorithms", "analyze", "optimize", "refresh", "restore"]
