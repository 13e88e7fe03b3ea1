"""The typer application: one command a file."""

from __future__ import annotations

import typer

from .bench import bench
from .demo import demo
from .detect import detect
from .experiment import experiment
from .info import info
from .models import models
from .pose import pose
from .segment import segment
from .train import train

app = typer.Typer(
    help="Fused conv + BatchNorm + activation, residual and NMS kernels for PyTorch.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)
app.command()(info)
app.command()(demo)
app.command()(bench)
app.command()(models)
app.command()(detect)
app.command()(segment)
app.command()(pose)
app.command()(experiment)
app.command()(train)
