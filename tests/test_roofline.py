"""bench/roofline.py: the model's arithmetic, and its limits on the committed figures and on a kernel simulated now."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results" / "roofline.json"
# Within 1.1x of the floor and half of the issue slots at one kind of site alone, which is more than the limits ask for:
# (kernel, way): dtypes. What is not here is named in docs/roofline.md.
FAST = (
    {
        (f"{op}_kernel_{layout}", way): ("float16", "bfloat16", "float32")
        for op in ("bn_act_fwd", "bn_act_bwd", "bn_act_bwd_reduce")
        for layout in ("nhwc", "nchw")
        for way in ("plain", "linear", "residual")
    }
    | {
        (f"bn_act_pair_{way}_kernel_{layout}", "linear"): ("float16", "bfloat16", "float32")
        for way in ("fwd", "reduce", "bwd")
        for layout in ("nhwc", "nchw")
    }
    | {
        ("add_act_fwd_kernel", "residual"): ("float16", "bfloat16", "float32"),
        ("add_act_bwd_kernel", "residual"): ("float16", "bfloat16", "float32"),
    }
    | {
        (f"bn_act_stats_kernel_{layout}", way): ("float16", "bfloat16", "float32")
        for layout in ("nhwc", "nchw")
        for way in ("residual", "linear")
    }
)


@pytest.fixture(scope="module")
def roofline() -> ModuleType:
    """The script, without keeping bench/ on the path."""
    pytest.importorskip("torchvision", reason="names the sites")
    pytest.importorskip("matplotlib", reason="draws the picture")
    sys.path.insert(0, str(ROOT / "bench"))
    try:
        yield importlib.import_module("roofline")
    finally:
        sys.path.remove(str(ROOT / "bench"))


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    return json.loads(RESULTS.read_text())


def test_occupancy_and_slots(roofline: ModuleType) -> None:
    """Known figures: 64 registers leave 4 blocks of 256 threads, 66,560 bytes 2 blocks; 153 and 142 slots for 512 bytes."""
    a100, h100 = roofline.CHIPS
    model = sys.modules["roof.model"]
    assert model.resident_blocks(a100, 256, 64, 0) == 4 and model.resident_blocks(a100, 256, 65, 0) == 3
    assert model.resident_blocks(a100, 256, 32, 0) == 8 and model.resident_blocks(a100, 1024, 16, 0) == 2
    assert model.resident_blocks(a100, 128, 242, 66560) == 2 and model.resident_blocks(h100, 128, 242, 66560) == 2
    assert model.resident_blocks(a100, 32, 16, 0) == 32 and model.resident_blocks(a100, 256, 16, 100_000) == 1
    assert [round(chip.slots_per_512) for chip in roofline.CHIPS] == [153, 142]


def test_waves(roofline: ModuleType) -> None:
    """Whole saturated waves cost nothing; a last wave of a quarter of the blocks, each with half of what is wanted, does."""
    a100 = roofline.CHIPS[0]
    spread = sys.modules["roof.model"].spread
    assert spread(a100, 2 * 4 * 108, 4, 10.0, 40.0) == 1.0
    assert spread(a100, 4 * 108, 4, 5.0, 40.0) == 2.0
    # 4 full blocks a multiprocessor at full speed, then 1 of them at a quarter: (4 + 1 * 4) / 5
    assert spread(a100, 5 * 108, 4, 10.0, 40.0) == pytest.approx(8 / 5)


def test_prediction_of_a_hand_made_kernel(roofline: ModuleType) -> None:
    """1 GiB read and written in fp16 by a kernel that loads enough: the bytes, the launch and the ramp."""
    chip = roofline.CHIPS[0]
    per = {"ptx": 60, "sass80": 50, "wide": 2, "wide80": 2, "moved": 1024}
    row = {
        "kernel": "add_act_fwd_kernel", "dtype": "float16", "stream_bytes_per_vector": 1024, "stream_read_share": 0.5,
        "facts": {"80": {"registers": 64, "shared": 0}}, "flight": {"80": 4},
        "counts": {name: {"per_warp": 10.0, "per_vector": float(value)} for name, value in per.items()},
    }  # fmt: skip
    found = roofline.streaming(row, chip, 1 << 29, 4 * 108, 0.0)
    assert found["floor_us"] == pytest.approx((1 << 31) / 2.04e6) and found["resident"] == 4
    assert found["predicted_us"] == pytest.approx(found["floor_us"] + chip.launch_us + chip.ramp_us)
    assert found["issue_us"] == pytest.approx((50 * (1 << 21) + 10 * 8 * 432) / (4 * 108 * 1410))
    assert roofline.issue_share(row, chip) == pytest.approx(25 / chip.slots_per_512)
    row["counts"]["wide80"]["per_vector"] = 1.4  # the count is not to be trusted: the larger one
    assert roofline.issue_share(row, chip) == pytest.approx(30 / chip.slots_per_512)
    row["flight"]["80"] = 1  # 16 KiB under way, 20 wanted
    assert roofline.streaming(row, chip, 1 << 29, 4 * 108, 0.0)["slow"] == pytest.approx(20 / 16)


def test_committed_figures_are_the_models(roofline: ModuleType, document: dict[str, Any]) -> None:
    """The file and the page are what the model makes of the counts in the file."""
    fresh = json.loads(
        json.dumps(roofline.rounded({**roofline.model(document["counts"], document["lrn"]), "lrn": document["lrn"]}))
    )
    for part in ("kernels", "limits", "operations", "convolutions", "gradients", "tails", "windows", "nms", "missed"):
        assert len(fresh[part]) == len(document[part]) and (document[part] or part == "missed"), part
        for now, then in zip(fresh[part], document[part], strict=True):
            numbers = [name for name, value in then.items() if isinstance(value, float)]
            assert [now[name] for name in numbers] == pytest.approx([then[name] for name in numbers], rel=1e-3), part
            assert {n: v for n, v in now.items() if n not in numbers} == {n: v for n, v in then.items() if n not in numbers}
    assert (ROOT / "docs" / "roofline.md").read_text() == roofline.page.render(document)


def test_limits_are_for_all_launches_of_a_call(roofline: ModuleType) -> None:
    """The sum over a training step counts, no mean of ratios; inference apart; the worst kind's issue and loads in flight."""
    sites = (  # call, way, floor, predicted, share of issue slots, KiB in flight
        ("train", "plain", 100.0, 120.0, 0.3, 64.0),
        ("train", "residual", 300.0, 310.0, 0.6, 48.0),
        ("eval", "plain", 100.0, 120.0, 0.3, 64.0),
    )
    same = {"chip": "C", "dtype": "float16", "layout": "nhwc", "kernel": "k", "wanted_kb": 64.0, "launches": 2}
    table = [
        {
            **same, "call": call, "way": way, "floor_us": floor, "predicted_us": predicted, "issue_share": issue,
            "flight_kb": flight, "best_ratio": predicted / floor - 0.1, "worst_ratio": predicted / floor + 0.1,
        }
        for call, way, floor, predicted, issue, flight in sites
    ]  # fmt: skip
    train, inference = roofline.judged(table)
    assert train["ratio"] == pytest.approx(430 / 400) and inference["ratio"] == pytest.approx(1.2)
    assert (train["issue_share"], train["flight_kb"], train["launches"]) == (0.6, 48.0, 4)
    assert [train["worst_ratio"], train["best_ratio"]] == pytest.approx([1.3, 310 / 300 - 0.1])
    assert roofline.causes(train) == ["issue"] and roofline.causes(inference) == ["small"]
    assert roofline.causes({**inference, "flight_kb": 48.0}) == ["loads"]


def test_limits(document: dict[str, Any]) -> None:
    """Every kernel is within its limits or listed as not, and what no limit is for stays within them where it was."""
    names = ("chip", "dtype", "layout", "kernel", "call")
    listed = {tuple(r[name] for name in names) for r in document["missed"]}
    for row in document["limits"]:
        within, key = row["ratio"] <= 1.1 and row["issue_share"] <= 0.5, tuple(row[name] for name in names)
        assert within != (key in listed), key
        if row["call"] != "eval":
            assert within, f"{key}: {row['ratio']:.3f}x, {row['issue_share']:.2f}"
    for row in document["kernels"]:
        key = (row["chip"], row["dtype"], row["kernel"], row["call"], row["way"])
        if row["call"] in ("train", "add_act", "pair") and row["dtype"] in FAST.get((row["kernel"], row["way"]), ()):
            assert row["ratio"] <= 1.1 and row["issue_share"] <= 0.5, f"{key}: {row['ratio']:.2f}x, {row['issue_share']:.2f}"
        assert row["best_ratio"] >= 1.0, key
    page = (ROOT / "docs" / "roofline.md").read_text()
    assert ("**Not met:**" in page) == bool(document["missed"])
    over = [row for row in document["kernels"] if row["ratio"] > 1.1 and tuple(row[name] for name in names) not in listed]
    assert all(f"- `{row['kernel']}` {row['way']} (" in page for row in over)


@pytest.mark.slow
def test_a_kernel_simulated_now(roofline: ModuleType, document: dict[str, Any]) -> None:
    """add_act in fp16: the counts of the committed file, and half of the issue slots."""
    from ptxsim import toolchain
    from ptxsim.fixture import require_nvcc, require_simulator

    require_simulator()
    require_nvcc()
    if toolchain.cuda_tool("nvdisasm") is None:
        pytest.skip("no nvdisasm (it comes with triton)")
    from ptxsim import counts

    rows = list(counts.kernels((torch.float16,), ("nhwc",), ("add_act",)))
    assert {row["kernel"] for row in rows} == {"add_act_fwd_kernel", "add_act_bwd_kernel"}
    for row in rows:
        (then,) = [
            r for r in document["counts"]["kernels"]
            if (r["kernel"], r["dtype"], r["way"], r["layout"]) == (row["kernel"], "float16", row["way"], "nhwc")
        ]  # fmt: skip
        for name in ("ptx", "moved", "wide"):  # (machine instructions: another ptxas may give others)
            assert row["counts"][name]["per_vector"] == pytest.approx(then["counts"][name]["per_vector"], rel=0.02), name
        assert row["counts"]["wide80"]["per_vector"] == pytest.approx(row["counts"]["wide"]["per_vector"], rel=0.05)
        for chip in roofline.CHIPS:
            assert roofline.issue_share(row, chip) <= 0.5
