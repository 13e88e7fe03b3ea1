"""The benchmark engine: clocks, shapes, the parity gate, and every op's cases against fp64."""

from __future__ import annotations

import dataclasses
import json
import mmap
import os
import subprocess
import sys
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import torch
import torchvision

from dl4ds_kernels import benchmark
from dl4ds_kernels.benchmark import _case, _engine, _shapes, _timing

BENCH = Path(__file__).resolve().parents[1] / "bench"


# ------------------------------------------------------------------------------------------------------------------ timing


@pytest.mark.parametrize("q", [0.0, 0.2, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("count", [1, 2, 5, 30])
def test_quantile_is_numpys(q, count):
    values = numpy.random.default_rng(count).random(count).tolist()
    assert benchmark.quantile(values, q) == pytest.approx(numpy.quantile(values, q), rel=1e-12)


def test_quantile_of_nothing():
    with pytest.raises(ValueError, match="at least one value"):
        benchmark.quantile([], 0.5)


def _timing_of(*samples):
    return benchmark.Timing(tuple(samples), faults=0.0, calls=1)


def test_speedup_is_the_ratio_of_medians_and_its_range_pairs_rounds():
    base, ours = _timing_of(2.0, 20.0, 4.0), _timing_of(1.0, 10.0, 4.0)
    assert benchmark.speedup(base, ours) == 4.0 / 4.0
    low, high = benchmark.speedup_range(base, ours)  # ratios by round: 2, 2, 1
    assert (low, high) == (pytest.approx(1.4), 2.0)


class _FakeClock:
    """Instead of timing, writes down what was asked for; every call of a candidate takes its given milliseconds."""

    def __init__(self, taken):
        self.taken, self.log = taken, []

    def sample(self, fn, calls):
        name = fn()
        self.log.append((name, calls))
        return self.taken[name], 0.0


def test_rounds_interleave_and_rotate(monkeypatch):
    clock = _FakeClock({"a": 1.0, "b": 0.25, "c": 8.0})
    monkeypatch.setattr(_timing, "_CpuClock", lambda: clock)
    advanced = []
    timings = benchmark.measure(
        {name: (lambda name=name: name) for name in "abc"}, rounds=4, min_sample_ms=2.0, advance=lambda: advanced.append(1)
    )
    order = [name for name, _ in clock.log[6:]]  # after two calibration samples a candidate
    assert order == list("abcbcacababc")
    assert {name: calls for name, calls in clock.log[6:]} == {"a": 2, "b": 8, "c": 1}  # a sample lasts about 2 ms
    assert [len(t.samples_ms) for t in timings.values()] == [4, 4, 4] and len(advanced) == 4
    assert timings["b"].median == timings["b"].p20 == timings["b"].best == 0.25


def test_shuffled_rounds_hold_every_candidate_in_changing_orders(monkeypatch):
    clock = _FakeClock(dict.fromkeys("abcd", 4.0))
    monkeypatch.setattr(_timing, "_CpuClock", lambda: clock)
    benchmark.measure({name: (lambda name=name: name) for name in "abcd"}, rounds=12, shuffle=1)
    order = "".join(name for name, _ in clock.log[8:])
    rounds = [order[i : i + 4] for i in range(0, 48, 4)]
    assert all(sorted(found) == list("abcd") for found in rounds) and len(set(rounds)) > 4
    before = {pair[0] for found in rounds for pair in zip(found, found[1:], strict=False) if pair[1] == "d"}
    assert before == set("abc")


def test_a_slow_case_stops_at_the_budget():
    timings = benchmark.measure({"slow": lambda: torch.randn(1000)}, rounds=50, budget_s=0.0)
    assert len(timings["slow"].samples_ms) == 5


def test_real_clock_orders_work_by_size():
    small, large = torch.randn(64, 64), torch.randn(512, 512)
    timings = benchmark.measure({"large": lambda: large @ large, "small": lambda: small @ small}, rounds=5)
    assert benchmark.speedup(timings["large"], timings["small"]) > 3


def test_page_faults_are_counted():
    def touch():
        with mmap.mmap(-1, 64 * mmap.PAGESIZE) as pages:
            for page in range(64):
                pages[page * mmap.PAGESIZE] = 1

    assert benchmark.measure({"touch": touch}, rounds=3)["touch"].faults >= 60


def test_rounds_must_be_positive():
    with pytest.raises(ValueError, match="rounds: expected at least 1, got 0"):
        benchmark.measure({}, rounds=0)


# ------------------------------------------------------------------------------------------------------------------ shapes


def test_resnet50_layers_are_torchvisions():
    found = {}
    with torch.device("meta"):
        model, x = torchvision.models.resnet50(), torch.empty(1, 3, 224, 224)
    names = {module: name for name, module in model.named_modules()}

    def note(module, args, out):
        found[names[module]] = (*args[0].shape[1:], *out.shape[1:], module.kernel_size[0])

    for module in names:
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(note)
    model(x)
    for layer in _shapes.NETWORKS["resnet50"]():
        stage = layer.name.removeprefix("resnet50.")
        name = "conv1" if stage == "stem" else stage.replace(".conv", ".1.conv")  # the stages' second block: no stride
        assert found[name] == (layer.C, layer.H, layer.W, layer.C_out, layer.H_out, layer.W_out, layer.kernel)


@pytest.mark.parametrize("layer", _shapes.layers("all"), ids=lambda layer: layer.name)
def test_output_size_is_conv2ds(layer):
    x, weight = (
        torch.empty(s, device="meta") for s in ((1, layer.C, layer.H, layer.W), (layer.C_out, layer.C) + (layer.kernel,) * 2)
    )
    out = torch.conv2d(x, weight, None, layer.stride, layer.padding)
    assert tuple(out.shape) == (1, layer.C_out, layer.H_out, layer.W_out)
    assert layer.describe(2) == f"N2-C{layer.C_out}-H{layer.H_out}-W{layer.W_out}"


def test_selection_by_network_prefix_name_and_size():
    assert {layer.name.split(".")[0] for layer in _shapes.layers("yolo,unet")} == {"yolo", "unet"}
    assert [layer.name for layer in _shapes.layers("resnet50.layer1")] == [f"resnet50.layer1.conv{i}" for i in (1, 2, 3)]
    assert [layer.name for layer in _shapes.layers(" unet.up0.conv1 ,unet.up0.conv1")] == ["unet.up0.conv1"]
    custom = _shapes.layers("5x7x3")[0]
    assert (custom.C_out, custom.H_out, custom.W_out) == (5, 7, 3)


@pytest.mark.parametrize("bad", ["resnet", "", ",", "3x3", "unet.down9"])
def test_unknown_shapes_are_refused(bad):
    with pytest.raises(ValueError, match="shapes: expected"):
        _shapes.layers(bad)
    with pytest.raises(ValueError, match="shapes: "):
        benchmark.OPS["nms"].select(bad)


def test_add_act_is_measured_where_skips_are():
    assert [layer.name for layer in benchmark.OPS["add_act"].select("resnet50")] == [
        f"resnet50.layer{i}.conv3" for i in (1, 2, 3, 4)
    ]


# ------------------------------------------------------------------------------------------------------------- parity gate

_CASE = benchmark.Case("fake", _shapes.layers("2x3x3")[0])


def _fake_op(results):
    """An op whose providers return ``results[provider]``: a tensor, a dict of tensors, or an exception to raise."""
    truth = {"out": torch.linspace(1, 2, 9, dtype=torch.float64), "index": torch.arange(4)}
    calls = []

    def setup(case, provider):
        result = results[provider]

        def outputs():
            if isinstance(result, Exception):
                raise result
            return result if isinstance(result, dict) else {"out": result, "index": torch.arange(4)}

        return benchmark.Run(lambda: calls.append(provider), outputs, bytes=8, flops=0)

    problem = lru_cache(maxsize=1)(lambda case: _case.Problem({}, truth))
    return SimpleNamespace(problem=problem, setup=setup, calls=calls)


_RIGHT = torch.linspace(1, 2, 9)


@pytest.mark.parametrize(
    ("result", "status"),
    [
        (_RIGHT, "ok"),
        (_RIGHT * (1 + 1e-7), "ok"),
        (_RIGHT * (1 + 1e-5), "wrong"),
        (torch.where(_RIGHT > 1.9, torch.nan, _RIGHT), "wrong"),
        (torch.where(_RIGHT > 1.9, torch.inf, _RIGHT), "wrong"),
        (_RIGHT[:-1], "wrong"),
        ({"out": _RIGHT, "index": torch.tensor([0, 1, 3, 2])}, "wrong"),
        ({"out": _RIGHT}, "wrong"),
        (RuntimeError("no kernel\nsecond line"), "error"),
        (benchmark.Unavailable("not here"), "unavailable"),
    ],
)
def test_a_wrong_provider_gets_no_speed(result, status):
    op = _fake_op({"eager": _RIGHT, "auto": result})
    eager, ours = benchmark.run_cases([_CASE], ["eager", "auto"], op, rounds=3)
    assert eager.status == "ok" and eager.median_ms is not None and not benchmark.failed(eager)
    assert ours.status == status and ours.ours
    if status == "ok":
        assert ours.median_ms is not None and ours.speedup is not None and not ours.message
    else:
        assert benchmark.failed(ours) and ours.message
        assert ours.median_ms is None and ours.speedup is None and "auto" not in op.calls
        assert "second line" not in ours.message


def test_a_wrong_stock_provider_is_refused_too():
    rows = benchmark.run_cases(
        [_CASE], ["eager", "compile", "auto"], _fake_op({"eager": _RIGHT, "compile": -_RIGHT, "auto": _RIGHT})
    )
    assert [row.status for row in rows] == ["ok", "wrong", "ok"] and benchmark.failed(rows[1])


def test_limit_is_twice_stocks_own_error():
    stock = _RIGHT * (1 + 1e-5)
    allowed = _engine.limits(_CASE, _engine.errors({"out": stock}, {"out": _RIGHT.double()}), {"out": _RIGHT.double()})
    assert allowed["out"] == pytest.approx(2e-5, rel=0.05)
    good, bad = (_fake_op({"eager": stock, "auto": _RIGHT * (1 + e)}) for e in (1.8e-5, 2.5e-5))
    assert benchmark.run_case(_CASE, ["auto"], good, time_it=False)[0].status == "ok"
    assert benchmark.run_case(_CASE, ["auto"], bad, time_it=False)[0].status == "wrong"


def test_the_default_convolution_is_measured_and_the_wider_limit_is_for_it_alone():
    """F(4x4) and F(6x6) err more than stock: CPU inference of ours in fp32 has a limit of its own, nothing else has."""
    from dl4ds_kernels.benchmark.ops import conv_bn_act as module

    (layer,) = module.select("16x14x14")
    case = _case.Case("conv_bn_act", layer)
    (row,) = benchmark.run_case(case, ["cpu"], module, time_it=False)
    assert row.status == "ok", row.message
    assert module.floor(case, "cpu") == 5e-5
    others = [(case, "eager"), (dataclasses.replace(case, backward=True), "cpu")]
    others += [(dataclasses.replace(case, dtype="bf16"), "cpu"), (dataclasses.replace(case, device="cuda"), "cuda")]
    assert [module.floor(*other) for other in others] == [0.0] * 4


def test_stock_that_cannot_run_is_reported_not_raised():
    rows = benchmark.run_cases([_CASE], ["eager", "auto"], _fake_op({"eager": RuntimeError("half conv"), "auto": _RIGHT}))
    assert [row.status for row in rows] == ["unavailable"] * 2 and "half conv" in rows[0].message


def test_ratios_are_to_the_first_and_the_fastest_stock_row(monkeypatch):
    timings = {"eager": _timing_of(8.0), "compile": _timing_of(4.0), "auto": _timing_of(2.0)}
    monkeypatch.setattr(_engine, "measure", lambda candidates, **_: {name: timings[name] for name in candidates})
    rows = benchmark.run_case(_CASE, list(timings), _fake_op(dict.fromkeys(timings, _RIGHT)))
    assert [row.speedup for row in rows] == [1.0, 2.0, 4.0]
    assert [row.speedup_best_stock for row in rows] == [0.5, 1.0, 2.0]
    assert rows[2].gbytes_per_s == round(8 / 2e-3 / 1e9, 2)


# --------------------------------------------------------------------------------------------------------------------- ops


@pytest.mark.parametrize("backward", [False, True], ids=["fwd", "fwd+bwd"])
@pytest.mark.parametrize("layout", benchmark.LAYOUTS)
@pytest.mark.parametrize("dtype", benchmark.DTYPES)
@pytest.mark.parametrize("op", ["add_act", "bn_act", "conv_bn_act"])
def test_truth_and_setups_agree(op, dtype, layout, backward):
    """Stock torch, the reference and our CPU kernels pass the gate on odd sizes, with and without residual."""
    providers = ["eager", "eager_cl", "reference", "auto"]
    providers += ["cpu"] if benchmark.why_not("cpu", "cpu") is None else []
    for layer in (
        _shapes.Layer("odd", 5, 7, 3, 9, 3, 2, "leaky_relu" if op != "add_act" else "relu"),
        _shapes.Layer("skip", 6, 5, 5, 3, 1, 1, residual=True),
    ):
        case = benchmark.Case(op, layer, 2, dtype, layout, backward)
        rows = benchmark.run_cases([case], providers, benchmark.OPS[op], time_it=False)
        assert {row.provider: (row.status, row.message) for row in rows} == dict.fromkeys(providers, ("ok", ""))


@pytest.mark.parametrize("name", ["yolo.98", "heavy.1000", "classes.5000"])
def test_nms_is_torchvisions(name):
    module = benchmark.OPS["nms"]
    rows = benchmark.run_cases(
        [benchmark.Case("nms", module.select(name)[0], layout="nchw")], ["eager", "auto"], module, time_it=False
    )
    assert [(row.status, row.error) for row in rows] == [("ok", 0.0), ("ok", 0.0)]


def test_nms_says_what_it_does_not_have():
    module = benchmark.OPS["nms"]
    boxes = module.select("yolo.98")[0]
    for case, text in (
        (benchmark.Case("nms", boxes, backward=True), "no gradient"),
        (benchmark.Case("nms", boxes, dtype="bf16"), "expected fp32 or fp64, got bf16"),
    ):
        row = benchmark.run_cases([case], ["auto"], module)[0]
        assert row.status == "unavailable" and text in row.message


def test_providers_get_the_layout_they_stand_for():
    case = benchmark.Case("add_act", _shapes.layers("4x5x6")[0], 2, layout="nchw")
    x = torch.randn(2, 4, 5, 6)
    assert _case.place(case, x).is_contiguous()
    assert _case.place(case, x, "eager_cl").is_contiguous(memory_format=torch.channels_last)
    assert _case.place(case, x).data_ptr() != x.data_ptr()


def test_gradient_is_zero_at_kinks_and_nowhere_else():
    z = torch.tensor([0.0, 1e-7, -1e-7, 1.0, -2.0, 6.0], dtype=torch.float64)
    g = torch.Generator().manual_seed(0)
    assert (_case.safe_gradient(_CASE, g, z, "relu") == 0).tolist() == [True, True, True, False, False, False]
    assert (_case.safe_gradient(_CASE, g, z, "relu6") == 0).tolist() == [True, True, True, False, False, True]
    assert not (_case.safe_gradient(_CASE, g, z, "none") == 0).any()


def test_unavailable_backends_say_why():
    assert "needs cuda tensors" in benchmark.why_not("cuda", "cpu")
    assert "needs cpu tensors" in benchmark.why_not("cpu", "cuda")
    assert benchmark.why_not("reference", "cpu") is None and benchmark.why_not("eager", "cpu") is None
    assert benchmark.default_backends("cpu")


def test_an_interpreter_is_checked_but_not_timed(monkeypatch):
    monkeypatch.setattr(_engine, "why_not", lambda provider, device: None)
    row = benchmark.run_cases([_CASE], ["triton"], _fake_op({"eager": _RIGHT, "triton": _RIGHT}))[0]
    assert row.status == "parity" and row.median_ms is None and not benchmark.failed(row)


# ------------------------------------------------------------------------------------------------------------ bench/ scripts


def _script(*arguments):
    environment = {**os.environ, "PYTHONPATH": str(BENCH.parent)}  # the tree under test, installed or not
    return subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, timeout=300, env=environment)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_gpu_check_without_a_gpu_is_one_clear_line(tmp_path):
    done = _script(BENCH / "gpu_check.py", "--report", tmp_path / "x")
    assert done.returncode == 2 and done.stdout.count("\n") == 1 and "no CUDA device" in done.stdout
    assert not (tmp_path / "x.json").exists()


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
def test_peak_memory_sees_a_temporary_tensor():
    """Stock add and relu keep two new tensors at their peak, the in-place form none.

    36.75 MiB each: above 32 MiB glibc maps every block and so gives every page back.
    """
    done = _script(BENCH / "membound.py", "--child", "add_act", "--size", "256x112x112", "--batch", "3", "--rounds", "1")
    assert done.returncode == 0, done.stderr
    peaks = {row["provider"]: row["peak_mib"] for row in json.loads(done.stdout.splitlines()[-1])}
    assert peaks["eager"] - peaks["eager_inplace"] == pytest.approx(73.5, abs=3.0)


@pytest.mark.slow
def test_bench_scripts_run_and_their_tables_are_written(tmp_path):
    for arguments in (
        (BENCH / "overhead.py", "--rounds", "2", "--json", tmp_path / "overhead.json"),
        (BENCH / "membound.py", "--rounds", "2", "--size", "4x5x6", "--batch", "1", "--json", tmp_path / "membound.json"),
    ):
        done = _script(*arguments)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("| ")
    assert len(json.loads((tmp_path / "overhead.json").read_text())["rows"]) == 13
    rows = json.loads((tmp_path / "membound.json").read_text())["rows"]
    assert {row["malloc"] for row in rows} == {"default", "reused pages"} and all(row["status"] == "ok" for row in rows)
    readme = tmp_path / "page.md"
    readme.write_text("before\n<!-- results:begin (note) -->\nold\n<!-- results:end -->\nafter\n")
    done = _script(BENCH / "readme.py", "--results", tmp_path, "--readme", readme)
    assert done.returncode == 0, done.stderr
    text = readme.read_text()
    assert text.startswith("before\n<!-- results:begin (note) -->\n") and text.endswith("<!-- results:end -->\nafter\n")
    assert "old" not in text and "`bn_act` fwd+bwd" in text and "over 13 kinds of call" in text
    assert "## Host overhead" in (tmp_path / "README.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ops", "shapes"), [(("add_act", "bn_act", "conv_bn_act"), "8x6x5"), (("nms",), "yolo.98")], ids=["layers", "nms"]
)
def test_pytest_benchmark_files_run(ops, shapes):
    files = [BENCH / f"ops/bench_{op}.py" for op in ops]
    done = _script("-m", "pytest", *files, "--shapes", shapes, "--benchmark-disable", "-p", "no:cacheprovider")
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout and "failed" not in done.stdout
