"""The lecture's phenomena, each measured with this package's layers: numbers, a check and a picture.

    from dl4ds_kernels import experiments
    result = experiments.run("variance", quick=True)
    result.ok, result.numbers
    experiments.save(result, "variance.png")  # needs matplotlib

Each file has ``TITLE`` and ``run(seed, quick) -> Result``. Running needs only torch; drawing needs matplotlib.
"""

from __future__ import annotations

import importlib
from typing import Any

from ._result import Check, Result, save

# In the lecture's order. The files are imported when they are run.
NAMES = ("history", "degradation", "shattered", "paths", "order", "variance", "batchnorm", "layernorm", "landscape")


def module(name: str) -> Any:
    """The file of an experiment. ValueError for an unknown name."""
    if name not in NAMES:
        raise ValueError(f"experiments: name: expected one of {', '.join(NAMES)}, got {name!r}")
    return importlib.import_module(f".{name}", __name__)


def run(name: str, seed: int = 0, quick: bool = False) -> Result:
    """Run one experiment; ``quick`` is smaller (seconds), with the same checks where they still mean something."""
    return module(name).run(seed, quick)


__all__ = ["NAMES", "Check", "Result", "module", "run", "save"]
