"""docs/roofline.md, and the same tables on the terminal."""

from __future__ import annotations

from typing import Any

from _results import markdown

from .model import CHIPS, MOST_ISSUE, MOST_RATIO

HEAD = f"""# Roofline of the GPU kernels

Written by `python bench/roofline.py`. **Nothing here was measured on a GPU**: counts come from the PTX simulator, machine
instructions, registers and loads in flight from ptxas and nvdisasm, numbers of blocks from the launchers at the real sizes,
times from the model below. Sites: ResNet-50 at 256 images, every launch as often as the network makes it.

- **floor**: max(bytes of the tensors, each once / bandwidth, operations / peak). **predicted**: the most of what the
  bytes, the issue slots, the L1 caches or (convolution) the tensor cores and shared memory need, in waves of blocks, plus
  launch and ramp.
- **ratio**: predicted / floor over the sites of a row; in brackets the best and the worst. Limit for bn_act and add_act:
  {MOST_RATIO}, of a kernel over all its launches in a training step, or in inference (rows "all sites"), which is what a step
  pays. Kinds of sites that are over it alone are named below.
- **issue**: machine instructions of the main loop by those that fit into the time in which memory moves its bytes
  ({" and ".join(f"{chip.slots_per_512:.0f} per 512 bytes on {chip.name}" for chip in CHIPS)}). Limit: {100 * MOST_ISSUE:.0f} %.
- **in flight**: KiB of loads under way on a multiprocessor (resident warps by registers and shared memory, times the 16-byte
  loads that the machine code issues before it waits for one) / what saturates the memory, times the share of reads.
"""
# Read in the figures by a person; shown while a kind of site is over the limit.
SEEN = """Why:

- The statistics read each value once and write next to nothing: their floor at ResNet-50's 33 plain sites is 0.62 ms on an
  H100 in 16-bit types, and 33 launches and ramps of 2.2 µs are 12 % of that: 1.116x is the least that any kernel with a launch
  of its own can be predicted at these sites alone, which is over 1.1x (1.071x on an A100). The kernel for NCHW is predicted
  just that. Batch statistics from the convolution's own epilogue (`conv_bn_act_train`) have no such launch.
- NHWC is above it: merging a block costs as many instructions as eighteen rows a thread. A second wave of blocks is made only
  where it leaves a thread ten rows: at 14x14 with 256 channels there is one, an H100's 528 blocks, of which an A100 takes 432
  at once and loads too little with the rest. At 7x7 with 512 channels a thread has six rows: fewer blocks load too little.
"""
MODEL = """## The model

| | {names} | |
|---|{dashes}---|
| bandwidth, TB/s | {bandwidth} | specified, in floor and prediction alike |
| multiprocessors, GHz | {processors} | specified |
| fp16 tensor TFLOP/s | {tflops} | specified |
| share of it by `mma.sync` | {share} | **estimate** (Hopper reaches the rest by wgmma) |
| KiB in flight that saturate a multiprocessor | {flight} | **estimate** |
| L2, TB/s | {l2} | **estimate** |
| launch behind another kernel; first loads and last stores, µs | {launch} | **estimates** |

A count of a launch is `per_warp * warps + per_vector * vectors` (512 bytes of x), fitted to two simulated launches. `nvdisasm
-gp` names the PTX line behind every machine instruction, and the simulator counts executions of every PTX instruction: so
machine instructions are counted too (`tests/ptxsim/sass.py`). Where that count's 16-byte accesses are not the simulator's
within 5 %, the larger of machine and PTX instructions is taken. sm_90 code is assembled from the simulated (compute_80) PTX, as
a GPU would do with a build for 8.0+PTX. Convolution: PTX instructions; the tile that this model likes best, which need not be
the one that the package takes ([CUDA convolution](gpu-conv.md)).

NCHW is counted on planes that are whole vectors. At 7x7, and at 14x14 in 16-bit types, vectors cross planes: their loops have
half to two thirds as many loads under way and more instructions, which the tables do not show.

Not in the model: cache hits between launches (a pass begins where the one before it ended), DRAM's own efficiency, clocks under
load, partition camping. A kernel that waits for loads one after another is charged by its loads in flight alone.
"""


def _pairs(rows: list[dict[str, Any]], *names: str) -> list[list[dict[str, Any]]]:
    """Rows that agree in these columns: one for each GPU."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(repr([row[name] for name in names]), []).append(row)
    return list(found.values())


def _named(row: dict[str, Any], kind: str) -> str:
    return f"`{row['kernel']}` {kind}" + (" (inference)" if row["call"] == "eval" else "")


def _by_kind(whole: list[dict[str, Any]], kinds: list[dict[str, Any]]) -> list[tuple[str, bool, list[dict[str, Any]]]]:
    """(kind of site, whether the limit is for it, a row for each GPU) of a kernel: all sites, each kind if there are more."""
    mine = [r for r in kinds if all(r[name] == whole[0][name] for name in ("kernel", "call"))]
    apart = _pairs(mine, "way")
    if len(apart) == 1:
        return [(mine[0]["way"], True, whole)]
    return [("all sites", True, whole), *((rows[0]["way"], False, rows) for rows in apart)]


def _products(title: str, found: list[dict[str, Any]], flag: str) -> tuple[str, list[str], list[list[str]]]:
    """Layers of a kernel that convolves; ``flag``: a column that the name tells."""
    rows = []
    for chips in _pairs(found, "layer", flag):
        cells = [
            cell for r in chips
            for cell in (r["tile"][1:], f"{r['floor_us']:.0f}", f"{r['predicted_us']:.0f}", f"{r['tflops']:.0f}", r["bound"])
        ]  # fmt: skip
        rows.append([chips[0]["layer"] + (f" + {flag}" if chips[0][flag] else ""), str(chips[0]["times"]), *cells])
    columns = ("tile", "floor µs", "predicted µs", "TFLOP/s", "bound by")
    return title, ["layer", "times"] + [f"{c.name.split()[0]} {n}" for c in CHIPS for n in columns], rows


def _ends(found: list[dict[str, Any]]) -> tuple[str, list[str], list[list[str]]]:
    """Ends of bottleneck blocks."""
    rows = []
    for chips in _pairs(found, "images"):
        cells = []
        for r in chips:
            cells += [str(r["parts"]), *(f"{r[f'{name}_us']:.1f}" for name in ("floor", "predicted", "apart")), r["bound"]]
        rows.append([str(chips[0]["images"]), *cells])
    columns = ("parts", "floor µs", "predicted µs", "two layers µs", "bound by")
    header = ["images"] + [f"{c.name.split()[0]} {n}" for c in CHIPS for n in columns]
    return "The end of a bottleneck block in one kernel, fp16: 3x3 to 64 channels, 1x1 to 256, at 56x56", header, rows


def _tables(document: dict[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    """(title, header, rows) of every table."""
    tables = []
    for dtype in dict.fromkeys(r["dtype"] for r in document["kernels"]):
        for layout in dict.fromkeys(r["layout"] for r in document["kernels"] if r["dtype"] == dtype):
            rows = []
            whole, kinds = (
                [r for r in document[name] if (r["dtype"], r["layout"]) == (dtype, layout)] for name in ("limits", "kernels")
            )
            for kind, limited, chips in [found for call in _pairs(whole, "kernel", "call") for found in _by_kind(call, kinds)]:
                name = _named(chips[0], kind)
                cells = []
                for r in chips:
                    over = r["ratio"] > MOST_RATIO or r["issue_share"] > MOST_ISSUE
                    met = " **x**" if limited and over else ""
                    cells += [
                        f"{r['floor_us'] / 1e3:.2f}", f"{r['ratio']:.2f} ({r['best_ratio']:.2f}-{r['worst_ratio']:.2f}){met}",
                        f"{100 * r['issue_share']:.0f} %", f"{r['flight_kb']:.0f} / {r['wanted_kb']:.0f}",
                    ]  # fmt: skip
                rows.append([name, *cells])
            header = ["kernel, site"]
            for chip in CHIPS:
                header += [f"{chip.name.split()[0]} floor ms", "ratio", "issue", "in flight"]
            tables.append((f"{dtype}, {layout.upper()}", header, rows))
    rows = [
        [f"{ops[0]['op']}, {ops[0]['dtype']}, {ops[0]['layout'].upper()}"]
        + [cell for r in ops for cell in (f"{r['floor_us'] / 1e3:.2f}", f"{r['predicted_us'] / 1e3:.2f}", f"{r['ratio']:.2f}")]
        for ops in _pairs(document["operations"], "op", "dtype", "layout")
    ]
    header = ["op, all sites of a training step"] + [
        f"{c.name.split()[0]} {n}" for c in CHIPS for n in ("floor ms", "predicted ms", "ratio")
    ]
    tables.append(("Whole ops (with the launches that merge partial results)", header, rows))
    tables += [
        _products("The fused convolution, fp16", document["convolutions"], "residual"),
        _products(
            "The input's gradient, fp16 (sums of the BatchNorm in front; turning the filter included)", document["gradients"],
            "added",
        ),
        _ends(document["tails"]),
    ]  # fmt: skip
    rows = [
        [f"`{chips[0]['kernel']}` {chips[0]['dtype']} {chips[0]['layout'].upper()} {'x'.join(map(str, chips[0]['shape']))}"]
        + [cell for r in chips for cell in (f"{r['floor_us']:.0f}", f"{r['predicted_us']:.0f}", r["bound"])]
        for chips in _pairs(document["windows"], "kernel", "dtype", "layout", "shape")
    ]
    header = ["Triton kernel, AlexNet's sites"] + [
        f"{c.name.split()[0]} {n}" for c in CHIPS for n in ("floor µs", "predicted µs", "bound by")
    ]
    tables.append(("local_response_norm", header, rows))
    rows = [
        [f"{chips[0]['call'].removeprefix('even-')} `{chips[0]['kernel']}`", str(chips[0]["launches"])]
        + [cell for r in chips for cell in (f"{r['floor_us']:.2f}", f"{r['issue_us']:.1f}", f"{r['predicted_us']:.1f}")]
        for chips in _pairs(document["nms"], "call", "kernel")
    ]
    header = ["call (images x boxes), kernel", "launches"] + [
        f"{c.name.split()[0]} {n}" for c in CHIPS for n in ("floor µs", "issue µs", "with launches µs")
    ]
    tables.append(("Non-maximum suppression, fp32 (bound by launches and waits: a lower bound, no ratio)", header, rows))
    return tables


CAUSES = {
    "loads": "too few loads in flight: predicted over {ratio}x of the floor (if the estimate of what saturates memory holds)",
    "issue": "more than {issue:.0f} % of the issue slots (memory still decides: the prediction's ratio is what it costs)",
    "small": "launches, ramps and last waves of the small sites bring the sum over {ratio}x",
}


def _alone(document: dict[str, Any]) -> str:
    """Kinds of sites that are over the ratio for themselves, of kernels that are within it."""
    names = ("chip", "dtype", "layout", "kernel", "call")
    missed = [[row[name] for name in names] for row in document["missed"]]
    over = [r for r in document["kernels"] if r["ratio"] > MOST_RATIO and [r[name] for name in names] not in missed]
    lines = []
    for same in _pairs(over, "kernel", "call", "way"):
        lines.append(f"    - {_named(same[0], same[0]['way'])} {_worst(same, 'small')}")
    return "\n".join([f"- Over {MOST_RATIO}x at one kind of site alone, which no limit is for:\n", *lines, ""]) if lines else ""


def _worst(rows: list[dict[str, Any]], cause: str) -> str:
    """Types, and by GPU what rows of one kernel have of a cause."""
    worst: dict[str, list[float]] = {}
    for row in rows:
        worst.setdefault(row["chip"].split()[0], []).append(row["issue_share"] if cause == "issue" else row["ratio"])
    spans = (f"{chip} {_span(values, cause)}" for chip, values in worst.items())
    return f"({', '.join(dict.fromkeys(r['dtype'] for r in rows))}): {'; '.join(spans)}"


def _missed(document: dict[str, Any]) -> str:
    if not document["missed"]:
        return "- All limits are met.\n"
    out = []
    for cause, text in CAUSES.items():
        rows = [row for row in document["missed"] if cause in row["causes"]]
        if not rows:
            continue
        lines = [f"    - `{same[0]['kernel']}` {_worst(same, cause)}" for same in _pairs(rows, "kernel")]
        out += [f"- **Not met:** {text.format(ratio=MOST_RATIO, issue=100 * MOST_ISSUE)}:\n", *lines, ""]
    met = sorted({row["kernel"] for row in document["kernels"]} - {row["kernel"] for row in document["missed"]})
    names = ", ".join(f"`{name}`" for name in met) or "no kernel"
    out.append(f"- Met everywhere: {names}. The tables mark rows that miss with **x**.\n")
    return "\n".join(out)


def _span(values: list[float], cause: str) -> str:
    low, high = (f"{100 * v:.0f} %" if cause == "issue" else f"{v:.2f}x" for v in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


def render(document: dict[str, Any]) -> str:
    """The page."""
    each = lambda text: " | ".join(text(chip) for chip in CHIPS)  # noqa: E731
    model = MODEL.format(
        names=each(lambda c: c.name), dashes="---:|" * len(CHIPS), bandwidth=each(lambda c: f"{c.bandwidth_tbs}"),
        processors=each(lambda c: f"{c.processors}, {c.clock_ghz}"), tflops=each(lambda c: f"{c.tflops}"),
        share=each(lambda c: f"{c.share}"), flight=each(lambda c: f"{c.flight_kb}"), l2=each(lambda c: f"{c.l2_tbs}"),
        launch=each(lambda c: f"{c.launch_us}; {c.ramp_us}"),
    )  # fmt: skip
    out = [HEAD, "![Roofline of the kernels](roofline.png)\n", "## Limits\n", _missed(document)]
    if alone := _alone(document):
        out += [alone, SEEN]
    for title, header, rows in _tables(document):
        out += [f"## {title}\n", markdown(header, rows)]
    return "\n".join([*out, model])


def show(document: dict[str, Any]) -> None:
    """The tables of the kernels on the terminal."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for title, header, rows in _tables(document):
        table = Table(title=title)
        for i, name in enumerate(header):
            table.add_column(name, justify="right" if i else "left")
        for row in rows:
            table.add_row(*(cell.replace("`", "").replace("**x**", "[red]x[/red]") for cell in row))
        console.print(table)
    console.print(_missed(document).replace("**", "").replace("`", ""))
