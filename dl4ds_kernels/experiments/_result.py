"""What an experiment hands back, and how it is drawn."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Check:
    """One measured value and where it must lie (both ends included)."""

    name: str
    value: float
    low: float = -math.inf
    high: float = math.inf

    @property
    def ok(self) -> bool:
        return self.low <= self.value <= self.high  # False for NaN

    @property
    def wanted(self) -> str:
        """``0.9 to 1.1``, ``at least 0.9`` or ``at most 1.1``."""
        if self.low == -math.inf:
            return f"at most {self.high:.4g}"
        if self.high == math.inf:
            return f"at least {self.low:.4g}"
        return f"{self.low:.4g} to {self.high:.4g}" if self.low != self.high else f"{self.low:.6g}"

    def as_dict(self) -> dict[str, Any]:
        return {"name": self.name, "value": self.value, "low": self.low, "high": self.high, "ok": self.ok}


@dataclass
class Result:
    """Numbers of a run, its checks, and ``paint(figure)``, which draws them into a matplotlib figure of ``size`` inches."""

    title: str
    numbers: dict[str, Any]
    checks: list[Check]
    paint: Callable[[Any], None] = field(repr=False)
    size: tuple[float, float] = (10.0, 4.2)

    @property
    def ok(self) -> bool:
        return bool(self.checks) and all(check.ok for check in self.checks)


def near(name: str, value: float, target: float, relative: float) -> Check:
    """``value`` within ``relative`` of ``target``."""
    return Check(name, value, target - relative * abs(target), target + relative * abs(target))


def save(result: Result, path: str | Path) -> Path:
    """Draw ``result`` into a PNG (the whole file or none). ImportError without matplotlib."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("experiments: figures need matplotlib: pip install 'dl4ds_kernels[cli]'") from error
    from ._style import STYLE

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=result.size, layout="constrained")
        result.paint(figure)
        figure.suptitle(result.title, fontsize=13, fontweight="bold")
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                figure.savefig(file, format="png", dpi=110, metadata={"Software": None})
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
    return path
