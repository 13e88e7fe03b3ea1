"""``bench --model`` and the HTML report: models by name and factory, peers, parity, what is refused; roofline and escaping."""

from __future__ import annotations

import re
import sys
import types
from html.parser import HTMLParser
from typing import Any

import pytest
import torch
from _cli import invoke, strict_json
from torch import Tensor, nn

from dl4ds_kernels import benchmark
from dl4ds_kernels.benchmark import models, peers
from dl4ds_kernels.cli import _bench_report, _bench_view, _roofline

HOSTILE = "<img src=x onerror=alert(1)>"


class Small(nn.Module):
    """conv-bn-relu with a residual: something to fuse, milliseconds to run."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16))
        self.head = nn.Linear(16, 7)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.stem(x)
        x = torch.relu(x + self.body(x))
        return {"out": self.head(x.mean((2, 3)))}


@pytest.fixture
def zoo(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    module = types.ModuleType("zoo_of_the_test")
    module.small, module.number, module.broken = Small, lambda: 3, lambda: 1 // 0
    monkeypatch.setitem(sys.modules, "zoo_of_the_test", module)
    return module


def run(*arguments: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    code, out, err = invoke("bench", *arguments, "--json", "-")
    assert code == 0, err
    document = strict_json(out)
    return document, document["rows"]


def test_a_factory_with_every_layout_and_dtype(zoo: types.ModuleType, kernels: None) -> None:
    document, rows = run(
        "--model", "zoo_of_the_test:small", "--shapes", "3x24x20", "--batch", 2, "--rounds", 2, "--layout", "nchw,nhwc",
        "--dtype", "fp32,bf16", "--compare", "eager,channels_last,folded", "--backends", "auto,cpu",
    )  # fmt: skip
    assert document["op"] == "model" and document["model"] == "zoo_of_the_test:small"
    assert {row["shape"] for row in rows} == {"N2x3x24x20"} and len(rows) == 4 * 5
    by_status = {row["provider"]: row["status"] for row in rows if row["dtype"] == "bf16"}
    assert by_status.pop("folded") == "unavailable" and set(by_status.values()) == {"ok"}
    for row in (row for row in rows if row["dtype"] == "fp32"):
        assert row["status"] == "ok" and 0 < row["error"] <= row["limit"] == pytest.approx(1e-4) or row["provider"] == "eager"
        # Two 3x3 convolutions and the linear layer, two operations a multiply-add.
        flops = 2 * 2 * (24 * 20 * 9 * 16 * (3 + 16) + 16 * 7)
        assert row["gflop_per_s"] == pytest.approx(flops / row["median_ms"] / 1e6, rel=0.02, abs=0.06)


def test_exact_has_the_strict_limit(zoo: types.ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.no_grad():
        bench = models.ModelBench("zoo_of_the_test:small", exact=True)
    case = benchmark.Case("model", bench.select("3x8x8")[0], 1, "fp32", "nchw")
    assert bench.floor(case, "auto") < 1e-6 < bench.floor(case, "eager") == 1e-4
    asked = []
    monkeypatch.setattr(models, "optimize", lambda model, **options: asked.append(options["exact"]) or model)
    for exact in (True, False):
        bench.exact = exact
        bench._call(case, "auto", torch.randn(1, 3, 8, 8))
    assert asked == [True, False]


def test_an_optimized_model_that_is_wrong_gets_no_speed(zoo: types.ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(model: nn.Module, **_: Any) -> nn.Module:
        with torch.no_grad():
            model.head.bias.add_(0.01)
        return model

    monkeypatch.setattr(models, "optimize", broken)
    code, out, err = invoke(
        "bench", "--model", "zoo_of_the_test:small", "--shapes", "3x8x8", "--rounds", 1, "--compare", "eager"
    )
    assert code == 1 and "auto wrong" in err and re.search(r"ours: auto\s+wrong", out)


def test_own_models_are_compared_with_plain_torch() -> None:
    """The baseline of one of our own models runs none of our ops."""
    with torch.no_grad():
        bench = models.ModelBench("cifar_resnet20")
        assert bench.size == (3, 32, 32)
        case = benchmark.Case("model", bench.select("")[0], 1, "fp32", "nchw")
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            bench.setup(case, "eager").fn()
        seen = [event.key for event in profile.key_averages()]
    assert not [name for name in seen if "dl4ds_kernels" in name]
    assert "aten::batch_norm" in seen


@pytest.mark.parametrize("spec", ["torchvision:squeezenet1_0", "timm:mobilenetv3_small_050", "resnet18"])
def test_models_by_name(spec: str) -> None:
    if spec.startswith("timm"):
        pytest.importorskip("timm", reason="timm is not installed")
    with torch.no_grad():
        model, size, own = models.load(spec)
        again = models.load(spec)[0]
    assert not model.training and size == (3, 224, 224) and own == (":" not in spec)
    for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b)  # same weights on every load


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(peers.RUNTIMES))
def test_runtimes_agree_where_installed(zoo: types.ModuleType, name: str) -> None:
    pytest.importorskip(name, reason=f"{name} is not installed")
    _, rows = run("--model", "torchvision:squeezenet1_1", "--shapes", "3x64x64", "--rounds", 1, "--compare", f"eager,{name}")
    assert [(row["provider"], row["status"]) for row in rows] == [(p, "ok") for p in ("eager", name, "auto")]


def test_a_missing_runtime_is_named(zoo: types.ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    found = peers.importlib.util.find_spec
    monkeypatch.setattr(
        peers.importlib.util, "find_spec", lambda name, *rest: None if name == "openvino" else found(name, *rest)
    )
    _, rows = run("--model", "zoo_of_the_test:small", "--shapes", "3x8x8", "--rounds", 1, "--compare", "eager,openvino")
    assert (rows[1]["status"], rows[1]["message"]) == ("unavailable", "openvino is not installed")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "torchvision:resnet19"), "model: cannot build 'torchvision:resnet19'"),
        (("--model", "nothing_of_that_name:f"), "No module named 'nothing_of_that_name'"),
        (("--model", "zoo_of_the_test:none"), "model: cannot build"),
        (("--model", "zoo_of_the_test:number"), "expected zoo_of_the_test:number() to return an nn.Module, got int"),
        (("--model", "zoo_of_the_test:broken"), "division"),
        (("--model", "resnet19"), "such as resnet18"),
        (("--model", "zoo_of_the_test:small", "--shapes", "224"), "--shapes: expected CxHxW such as 3x224x224"),
        (("--model", "zoo_of_the_test:small", "--compare", "tensorrt"), "--compare: expected one or more of none, eager"),
        (("--model", "resnet18", "--op", "nms"), "expected one of --op"),
        ((), "expected one of --op"),
    ],
    ids=lambda value: "-".join(value[-2:]) or "none" if isinstance(value, tuple) else None,
)
def test_bad_models_are_refused(zoo: types.ModuleType, arguments: tuple[str, ...], message: str) -> None:
    code, out, err = invoke("bench", *arguments)
    text = " ".join(re.sub(r"[│╭╮╰╯─]", " ", err).split())
    assert code == 2 and message in text and "Traceback" not in err and out == ""


# ------------------------------------------------------------------------------------------------------------------ report


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.loads: list[str | None] = []
        self.handlers: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loads += [v for n, v in attributes if n in ("src", "href", "srcset", "data", "action", "xlink:href")]
        self.handlers += [n for n, _ in attributes if n.startswith("on")]


def test_html_report_of_a_run(tmp_path: Any) -> None:
    path = tmp_path / "deep" / "r.html"
    code, out, err = invoke(
        "bench", "--op", "conv_bn_act", "--shapes", "8x12x12", "--rounds", 2, "--compare", "eager,channels_last", "--layout",
        "nchw", "--backends", "auto", "--html", path,
    )  # fmt: skip
    assert code == 0, err
    html, page = path.read_text(), _Page()
    page.feed(html)
    assert str(path) in out.replace("\n", "") and page.loads == [] and page.handlers == []
    assert not {"script", "link", "iframe", "object", "embed", "base", "img"} & set(page.tags)
    assert "prefers-color-scheme: dark" in html and "default-src 'none'" in html and "url(" not in html
    assert html.count('class="ours"') == 2 and html.count("<title>") == 1 + 3  # the page and a tooltip a point


def _row(**more: Any) -> dict[str, Any]:
    base = benchmark.Row("conv", "case", "N1", "fp32", "nchw", "fwd", "cpu", "eager", False, "ok", error=1e-7, limit=1e-6)
    return {**base.as_dict(), **more}


def _document(rows: list[dict[str, Any]]) -> dict[str, Any]:
    roof = {"gbytes": 10.0, "gflops": {"fp32": 100.0}}
    return {"op": "x", "model": HOSTILE, "machine": benchmark.machine(), "rounds": 3, "roof": roof, "rows": rows, "schema": 2}


TIMED = {"median_ms": 2.0, "p20_ms": 1.0, "p80_ms": 4.0, "gbytes_per_s": 5.0, "gflop_per_s": 50.0, "speedup": 1.0}


def test_report_escapes_everything_and_shows_failures() -> None:
    rows = [
        _row(case=HOSTILE, **TIMED, speedup_best_stock=1.0),
        _row(case=HOSTILE, provider="auto", ours=True, status="wrong", message=f"{HOSTILE} is off"),
        _row(case=HOSTILE, provider="cpu", ours=True, **TIMED, speedup_best_stock=0.5),
    ]
    html = _bench_report.render(_document(rows))
    assert "<img" not in html and html.count("&lt;img src=x onerror=alert(1)&gt;") >= 4
    assert "wrong: &lt;img" in html and "50% of peak" in html and "0.50×" in html


def test_roofline_places_points_where_they_belong() -> None:
    """Equal steps a decade: twice as far right for a hundred times the intensity, on the roof at the peak."""
    rows = [
        _row(**{**TIMED, "gflop_per_s": rate, "gbytes_per_s": rate / at}, ours=True) for at, rate in ((1, 10.0), (100, 100.0))
    ]
    svg = str(_roofline.roofline(rows, 10.0, {"fp32": 100.0}, ["eager"]))
    centres = [(float(x), float(y)) for x, y in re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', svg)]
    roof = re.search(r'class="roof" d="M[\d.]+ [\d.]+L([\d.]+) ([\d.]+)H', svg)
    ridge_x, ridge_y = map(float, roof.groups())  # at intensity 10, rate 100
    (x1, y1), (x2, y2) = centres
    assert ridge_x == pytest.approx((x1 + x2) / 2, abs=0.2) and y2 == pytest.approx(ridge_y, abs=0.1) and y1 > y2
    assert _roofline.roofline([_row()], 10.0, {"fp32": 100.0}, ["eager"]) is None


def test_no_arithmetic_no_roofline_but_a_report() -> None:
    html = _bench_report.render(_document([_row(**{**TIMED, "gflop_per_s": None})]))
    assert "Roofline" not in html and "50% of the copy" in html


def test_csv_cells_are_no_formulas() -> None:
    row = benchmark.Row("model", "=cmd|' /C calc'!A0", "N1", "fp32", "nchw", "fwd", "cpu", "eager", False, "ok")
    assert "'=cmd|" in _bench_view.to_csv([row])
