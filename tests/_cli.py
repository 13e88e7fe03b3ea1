"""Running the command line in this process."""

import json
from pathlib import Path

from typer.testing import CliRunner

from dl4ds_kernels.cli.app import app

ROOT = Path(__file__).resolve().parents[1]


def invoke(*arguments):
    """(exit code, stdout, stderr) of a command in this process."""
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception  # a traceback is never the answer to a user
    return result.exit_code, result.stdout, result.stderr


def strict_json(text):
    def refuse(constant):
        raise ValueError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)
