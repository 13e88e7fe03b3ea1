"""The README's commands and code: every command exists with the options it is printed with, every snippet runs."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer.main

from dl4ds_kernels.cli.app import app

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "docs/quickstart.md", ROOT / "docs/benchmarks.md",
         ROOT / "docs/recipes.md"]  # fmt: skip
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(page: Path, language: str) -> list[str]:
    return [text for kind, text in FENCE.findall(page.read_text()) if kind == language]


def commands() -> list[str]:
    """Lines of plain fences and inline code that start a program."""
    found = []
    for page in PAGES:
        text = page.read_text()
        lines = [line for block in blocks(page, "") for line in block.splitlines()]
        lines += re.findall(r"`((?:make|python) [^`\n]+)`", FENCE.sub("", text))
        for line in lines:
            command = line.split("  #")[0].strip()
            if re.match(r"(make|pip|python|git) ", command) and "…" not in command:
                found.append(command)
    return list(dict.fromkeys(found))


COMMANDS = commands()


def test_there_are_commands() -> None:
    assert len(COMMANDS) > 12 and "make demo" in COMMANDS


def _options(name: str) -> dict[str, object]:
    command = typer.main.get_command(app).commands[name]
    return {option: p for p in command.params for option in p.opts}


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("python -m dl4ds_kernels")], ids=str)
def test_cli_commands_parse(command: str) -> None:
    """With typer's own parser: names of commands and options, types and numbers of values; nothing is run."""
    words = shlex.split(command)[3:]
    group = typer.main.get_command(app)
    if not words:
        return
    assert words[0] in group.commands, command
    context = group.commands[words[0]].make_context(words[0], words[1:], resilient_parsing=False)
    assert context.params


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("make ")], ids=str)
def test_make_targets_exist(command: str) -> None:
    done = subprocess.run([*shlex.split(command), "-n"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("command", [c for c in COMMANDS if re.match(r"python (bench|docs|tools)/", c)], ids=str)
def test_scripts_have_their_options(command: str) -> None:
    words = shlex.split(command)[1:]
    done = subprocess.run([sys.executable, words[0], "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for option in (word.split("=")[0] for word in words[1:] if word.startswith("--")):
        assert option in done.stdout, f"{words[0]} has no {option}"


def test_everything_else_is_known() -> None:
    """What no other test here checks is a command of pip, git or pytest."""
    rest = [c for c in COMMANDS if not re.match(r"make |python -m dl4ds_kernels|python (bench|docs|tools)/", c)]
    for command in rest:
        assert re.match(r"pip install |git clone |python -m (pytest|http\.server|tests\.)", command), command
        for path in re.findall(r"\b(?:bench|tests)/\S+\.py", command):
            assert (ROOT / path).exists(), command


@pytest.mark.slow
def test_readme_code_runs() -> None:
    """Both snippets, the second with the tensors that it speaks of."""
    first, second = blocks(ROOT / "README.md", "python")
    exec(compile(first, "README.md", "exec"), {})
    g = torch.Generator().manual_seed(0)
    c, corner = 16, torch.rand(50, 2, generator=g)
    names: dict[str, object] = {
        "x": torch.randn(2, c, 14, 14, generator=g), "identity": torch.randn(2, c, 14, 14, generator=g),
        "weight": torch.randn(c, c, 3, 3, generator=g), "mean": torch.zeros(c), "var": torch.ones(c),
        "gamma": torch.ones(c), "beta": torch.zeros(c), "boxes": torch.cat([corner, corner + 0.5], 1),
        "scores": torch.rand(50, generator=g),
    }  # fmt: skip
    namespace: dict[str, object] = {}
    exec("import torch, torchvision\nimport dl4ds_kernels as dk\n", namespace)
    namespace["model"] = namespace["dk"].optimize(torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU()).eval())
    namespace.update(names)
    exec(compile(second, "README.md", "exec"), namespace)
    assert namespace["out"].shape == names["x"].shape and namespace["keep"].dtype == torch.int64
