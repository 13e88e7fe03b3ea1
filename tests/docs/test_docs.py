"""The documentation: it builds without a warning and without the network, loads nothing remote, and its notebooks run."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from dl4ds_kernels import functional as F

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"


def tour() -> ModuleType:
    pytest.importorskip("nbclient", reason="the docs extra is not installed: pip install 'dl4ds_kernels[docs]'")
    spec = importlib.util.spec_from_file_location("tour_make", DOCS / "tour/make.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


NAMES = ("residual", "detection", "segmentation")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built strictly by a process that cannot open a connection."""
    for name in ("mkdocs", "material", "mkdocstrings"):
        pytest.importorskip(name, reason="the docs extra is not installed: pip install 'dl4ds_kernels[docs]'")
    folder = tmp_path_factory.mktemp("site")
    code = (
        "import socket, sys\n"
        "def refuse(*a, **k): raise OSError('no network while building the docs')\n"
        "socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse\n"
        "from mkdocs.__main__ import cli\n"
        "cli()"
    )
    command = [sys.executable, "-c", code, "build", "--strict", "-q", "--site-dir", folder]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return folder


@pytest.mark.slow
def test_every_page_is_there_and_loads_nothing_remote(site: Path) -> None:
    pages = {str(p.relative_to(site)) for p in site.rglob("*.html")}
    wanted = {str(p.relative_to(DOCS).with_suffix(".html")) for p in (*DOCS.rglob("*.md"), *DOCS.rglob("*.ipynb"))}
    assert wanted <= pages, wanted - pages
    for page in pages:
        html = (site / page).read_text()
        loads = re.findall(r"<(?:script|img|link|iframe|source)\b[^>]*?(?:src|href)=[\"']?([^\"'\s>]+)", html)
        remote = [url for url in loads if re.match(r"(https?:)?//", url)]
        assert not remote, f"{page}: {remote}"
    for sheet in site.rglob("*.css"):
        assert not re.search(r"(url\(|@import)\s*[\"']?(https?:)?//", sheet.read_text()), sheet.name


@pytest.mark.slow
def test_the_reference_has_every_function_with_its_parameters(site: Path) -> None:
    html = (site / "api/functional.html").read_text()
    for name in F.__all__:
        assert re.search(rf'id="dl4ds_kernels\.functional\.\w+\.{name}"', html), name
    assert ":func:" not in html and html.count("Parameters:") >= 14


@pytest.mark.slow
def test_notebooks_are_pages_with_their_outputs(site: Path) -> None:
    html = (site / "tour/residual.html").read_text()
    assert "largest difference:" in html and "data:image/png;base64," in html
    assert not list(site.rglob("*.ipynb"))


@pytest.mark.parametrize("name", NAMES)
def test_committed_notebooks_are_what_the_source_makes(name: str) -> None:
    """Edit docs/tour/make.py and run it: nothing else writes notebooks."""
    module = tour()
    committed = module.nbformat.read(DOCS / f"tour/{name}.ipynb", as_version=4)
    fresh = module.build(name)
    assert [(c.cell_type, c.source) for c in committed.cells] == [(c.cell_type, c.source) for c in fresh.cells]
    code = [c for c in committed.cells if c.cell_type == "code"]
    assert all(c.execution_count for c in code) and not [o for c in code for o in c.outputs if o.output_type == "error"]
    assert set(NAMES) == set(module.NOTEBOOKS)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_notebooks_run(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every cell, assertions included, in a fresh kernel."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    module = tour()
    done = module.execute(module.nbformat.read(DOCS / f"tour/{name}.ipynb", as_version=4))
    assert all(c.execution_count for c in done.cells if c.cell_type == "code")


def test_quoted_commands_exist() -> None:
    """Files and commands that the pages name are there."""
    known = {"info", "demo", "bench", "models", "detect", "segment", "pose", "experiment", "train"}
    for page in DOCS.rglob("*.md"):
        text = page.read_text()
        for path in re.findall(r"\b((?:bench|tests|csrc|docs)/[\w/]+\.\w+)", text):
            assert (ROOT / path).exists(), f"{page.name}: {path}"
        for command in re.findall(r"python -m dl4ds_kernels (\w+)", text):
            assert command in known, f"{page.name}: {command}"
