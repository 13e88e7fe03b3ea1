"""What ``info`` prints: a table for a person, and a block for an issue."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from .. import benchmark
from ._console import out


def _text(value: Any) -> str:
    if isinstance(value, dict):
        on = [k for k, v in value.items() if v is True]
        return ", ".join(on + [f"{k}={v}" for k, v in value.items() if not isinstance(v, bool) and v is not None])
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _lines(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """(name, text) of all facts but the checks."""
    machine, build = facts["machine"], facts["build"]
    gpus = [f"{g['name']} (sm_{g['capability'].replace('.', '')}, {g['memory_gib']} GiB)" for g in machine["gpus"]]
    lines = [
        ("dl4ds_kernels", machine["dl4ds_kernels"]),
        ("torch", f"{machine['torch']} ({'CUDA ' + machine['cuda'] if machine['cuda'] else 'CPU build'})"),
        ("python", f"{machine['python']} on {machine['system']}"),
        ("packages", _text([f"{name} {version}" for name, version in facts["packages"].items()])),
        ("CPU", f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads"),
        ("CPU features", _text(facts["cpu_features"] or "unknown: they come from the part _C")),
        ("GPU", _text(gpus) if gpus else f"none: {facts['no_gpu']}"),
    ]
    lines += [("", why) for why in facts["gpus_without_code"]]
    if facts["torchvision_problem"]:
        lines.append(("torchvision", f"NMS was not checked, torchvision does not run here: {facts['torchvision_problem']}"))
    if facts["driver"]:
        lines.append(("NVIDIA driver", facts["driver"]))
    for name, part in facts["parts"].items():
        lines.append((f"part {name}", f"loaded {part['file']}" if part["loaded"] else f"not loaded: {part['reason']}"))
        if part["cure"] and not part["loaded"]:
            lines.append(("", part["cure"]))
    lines.append(("build", _text(build) if build else "never built here (no _build_info.json)"))
    for device, names in facts["backends"].items():
        lines.append((f"runs on {device}", _text(names)))
        lines += [("", f"not {name}: {why}") for name, why in facts["not_here"][device].items()]
    lines += [("backend", facts["backend"]), ("environment", _text(facts["environment"]) or "no DL4DS_ variable is set")]
    return lines


def _anonymous(text: str) -> str:
    """Without the user's home folder and name in it: the block is for a public place."""
    home = str(Path.home())
    return re.sub(r"/(home|Users)/[^/\s]+", "~", text.replace(home, "~") if len(home) > 1 else text)


def issue_block(facts: dict[str, Any]) -> str:
    """Markdown to paste: the facts, how many checks passed, and those that did not. No host name, no home folder."""
    lines = [f"{name + ':':15}{text}" if name else " " * 15 + text for name, text in _lines(facts)]
    rows = facts["checks"]
    bad = [row for row in rows if row["status"] not in ("ok", "parity")]
    lines.append(
        f"{'checks:':15}{len(rows) - len(bad)} of {len(rows)} calls of {len({r['op'] for r in rows})} ops agree with fp64"
    )
    for row in bad:
        where = f"{row['op']} {row['direction']} {row['dtype']} {row['device']} {row['provider']}"
        lines.append(" " * 15 + f"{where}: {row['status']}: {row['message']}")
    # A fence longer than any run of backticks inside cannot be closed by a message.
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", "\n".join(lines))), default=0))
    return _anonymous(f"{fence}text\n" + "\n".join(lines) + f"\n{fence}\n")


def show(facts: dict[str, Any]) -> None:
    """The table, one line an op and pass with the error of every backend, and the block."""
    console = out()
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in _lines(facts):
        color = "green" if text.startswith("loaded ") else "yellow" if text.startswith("not loaded") else ""
        style = "dim" if not name else color
        table.add_row(name, f"[{style}]{escape(text)}[/]" if style else escape(text))
    console.print(table)
    names = [name for name in benchmark.OURS if any(row["provider"] == name for row in facts["checks"])]
    checks = Table(
        "op", "pass", "dtype", "device", title="every op once: error against fp64 by backend (-: has no such kernel)",
        title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False,
    )  # fmt: skip
    for name in (*names, "allowed"):
        checks.add_column(name, justify="right")
    grouped: dict[tuple[str, ...], dict[str, dict[str, Any]]] = {}
    for row in facts["checks"]:
        key = (row["op"], row["direction"], row["dtype"], row["device"])
        grouped.setdefault(key, {})[row["provider"]] = row
    for key, found in grouped.items():
        limits = [row["limit"] for row in found.values() if row["limit"] is not None]
        cells = [_cell(found.get(name)) for name in names]
        checks.add_row(*key, *cells, f"{limits[0]:.1e}" if limits else "-")
    console.print(checks)
    console.print("paste this into an issue (`python -m dl4ds_kernels info --issue` prints it alone):", style="bold")
    print(facts["issue"], end="")


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return "[dim]-[/]"
    if row["status"] in ("ok", "parity"):
        return f"[green]{row['error']:.1e}[/]"
    return f"[red]{row['status']}{'' if row['error'] is None else format(row['error'], ' .1e')}[/]"
