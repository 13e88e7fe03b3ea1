"""Which forwards may be recorded and repeated (modules/_replay.py): only what the module holds and reads has a say in them."""

from __future__ import annotations

from torch import nn

from ..modules._replay import is_known
from .audit import Untraceable
from .passing import FusedMarker, runs_its_class
from .plan import default_arguments
from .trace import TENSOR, trace_forward


def is_pure(module: nn.Module) -> bool:
    """A module below the recorded one: torch's or ours, taken by ``optimize``, or one that a trace shows completely."""
    if is_known(module):
        return True
    if not runs_its_class(module):
        return False
    fused = module.__dict__.get("forward")
    if isinstance(fused, FusedMarker):
        return fused.is_pure
    try:
        arguments = default_arguments(module)
        return list(arguments.values()) == [TENSOR] and trace_forward(module, arguments).from_instances
    except Untraceable:
        return False
