"""The command line. Its libraries are an extra (``pip install 'dl4ds_kernels[cli]'``); the package itself needs only torch."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code."""
    missing = [name for name in ("typer", "rich") if importlib.util.find_spec(name) is None]
    if missing:
        print(
            f"dl4ds_kernels: the command line needs {' and '.join(missing)}: pip install 'dl4ds_kernels[cli]'", file=sys.stderr
        )
        return 1
    from .app import app

    app(args=None if arguments is None else list(arguments), prog_name="python -m dl4ds_kernels")
    return 0
