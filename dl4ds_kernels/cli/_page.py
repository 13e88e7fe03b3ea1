"""The environment of every HTML page: everything escaped, an undefined name is an error."""

from __future__ import annotations

from jinja2 import BaseLoader, Environment, PackageLoader, StrictUndefined


def environment(loader: BaseLoader | None = None) -> Environment:
    """For the templates of ``loader``, by default this package's."""
    return Environment(
        loader=loader or PackageLoader("dl4ds_kernels.cli"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
