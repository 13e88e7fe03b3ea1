"""mkdocs hooks: notebooks become pages, roles of docstrings become code, wide tables scroll. No network, no other plugin."""

from __future__ import annotations

import json
import re
from typing import Any

_ROLE = re.compile(r":(?:func|class|meth|data|mod):(?=<code)")
_ANSI = re.compile(r"\x1b\[[0-9;]*m")


def on_page_read_source(page: Any, config: Any) -> str | None:
    """The Markdown of a notebook; other pages are read as they are."""
    if not page.file.src_uri.endswith(".ipynb"):
        return None
    with open(page.file.abs_src_path, encoding="utf-8") as file:
        return notebook_markdown(json.load(file))


def on_files(files: Any, config: Any) -> Any:
    """Notebooks are pages, not files to copy."""
    for file in files:
        if file.src_uri.endswith(".ipynb"):
            file.is_documentation_page = lambda: True
            file.is_media_file = lambda: False
            file.dest_uri = file.src_uri.removesuffix(".ipynb") + ".html"
            file.url = file.dest_uri
            file.abs_dest_path = f"{config['site_dir']}/{file.dest_uri}"
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Files of the repository that are no pages (``../bench/…``) are named, not linked: a site has no such folder."""
    return re.sub(r"\[([^\]]+)\]\(\.\./[^)]+\)", r"`\1`", markdown)


def on_page_content(html: str, page: Any, config: Any, files: Any) -> str:
    """``:func:`x` `` becomes ``x``."""
    return _ROLE.sub("", html)


def notebook_markdown(notebook: dict[str, Any]) -> str:
    """Cells in order: text as it is, code fenced, outputs as text or embedded pictures."""
    parts = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        for output in cell.get("outputs", []):
            parts.append(_output(output))
    return "\n\n".join(part for part in parts if part)


def _output(output: dict[str, Any]) -> str:
    if output["output_type"] == "stream":
        return _block("".join(output["text"]))
    data = output.get("data", {})
    if "image/png" in data:
        picture = "".join(data["image/png"]).replace("\n", "")
        return f'<img class="plot" alt="plot of the cell above" src="data:image/png;base64,{picture}">'
    return _block("".join(data.get("text/plain", [])))


def _block(text: str) -> str:
    text = _ANSI.sub("", text).rstrip()
    return f"```{{.text .output}}\n{text}\n```" if text else ""
