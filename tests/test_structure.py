"""The map of ARCHITECTURE and csrc/README.md holds: rooms match, includes and imports go one way, files stay short."""

from __future__ import annotations

import ast
import re
import subprocess
import warnings
from pathlib import Path

import pytest

import dl4ds_kernels
from dl4ds_kernels._define import defined_ops

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "dl4ds_kernels"
CSRC = ROOT / "csrc"
STEMS = sorted(set(defined_ops().values()))
# A row that an op lacks on purpose, with the reason.
EXCEPTIONS = {
    ("conv_bn_act", "kernel"): "there is a forward kernel only: conv_bn_act_fwd_kernel.cuh",
    ("pool2d", "cuda"): "inference on the CPU only: CUDA tensors take stock torch",
    ("pool2d", "kernel"): "no CUDA kernel, see the row above",
    ("pool2d", "header"): "the Params of a CUDA kernel, which is not there",
    ("pool2d", "triton"): "CUDA tensors take stock torch",
    ("linear_act", "cuda"): "inference on the CPU only: CUDA tensors take stock torch",
    ("linear_act", "kernel"): "no CUDA kernel, see the row above",
    ("linear_act", "header"): "the Params of a CUDA kernel, which is not there",
    ("linear_act", "triton"): "CUDA tensors take stock torch",
    ("conv_transpose_bn_act", "cuda"): "Triton serves CUDA tensors",
    ("conv_transpose_bn_act", "kernel"): "Triton serves CUDA tensors",
    ("conv_transpose_bn_act", "header"): "the Params of a CUDA kernel; Triton serves CUDA tensors",
    ("local_response_norm", "cuda"): "Triton serves CUDA tensors",
    ("local_response_norm", "kernel"): "Triton serves CUDA tensors",
    ("local_response_norm", "header"): "the Params of a CUDA kernel; Triton serves CUDA tensors",
    ("max_pool_indices", "cuda"): "Triton serves CUDA tensors",
    ("max_pool_indices", "kernel"): "Triton serves CUDA tensors",
    ("max_pool_indices", "header"): "the Params of a CUDA kernel; Triton serves CUDA tensors",
    ("upsample_add", "cuda"): "Triton serves CUDA tensors",
    ("upsample_add", "kernel"): "Triton serves CUDA tensors",
    ("upsample_add", "header"): "the Params of a CUDA kernel; Triton serves CUDA tensors",
    **{
        (stem, row): "schedules the kernels of other ops (define_op's compose), which bench/ops times"
        for stem in ("residual_block", "dense_block", "bn_act_max_pool")
        for row in ("cpu", "cuda", "header", "kernel", "triton", "benchmark")
    },
}
# Higher rooms may import lower ones, never the other way round.
ROOMS = (
    ("_version", "_activation"),
    ("_extension", "_list_autograd"),
    ("_define", "_autotune"),
    ("_cuda_candidates",),
    ("_cuda_autotune",),
    ("_cpu_conv", "_cuda_conv"),
    ("_backend",),
    ("ops", "reference", "_triton", "_packing"),
    ("functional",),
    ("detection", "modules", "segmentation", "pose", "datasets"),
    ("convert",),
    ("models",),
    ("benchmark",),
    ("experiments", "recipes"),
    ("cli", "__main__"),
)
LEVEL = {name: level for level, names in enumerate(ROOMS) for name in names}


def tracked(*patterns: str) -> list[Path]:
    """Source files of the repository (those that git tracks or would, so build products are left out)."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *patterns]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if found.returncode:
        pytest.skip(f"needs the git checkout: {found.stderr.strip()}")
    return [path for path in (ROOT / line for line in found.stdout.splitlines()) if path.exists()]


def test_every_op_is_known() -> None:
    assert {"bn_act", "add_act", "conv_bn_act", "nms"} <= set(STEMS)


@pytest.mark.parametrize("stem", STEMS)
def test_rows_match(stem: str) -> None:
    """One stem, the same in every folder."""
    rows = {
        "contract": [PACKAGE / f"ops/{stem}.py"],
        "reference": [PACKAGE / f"reference/{stem}.py"],
        "functional": [PACKAGE / f"functional/{stem}.py"],
        "triton": [PACKAGE / f"_triton/{stem}.py"],
        "cpu": [CSRC / f"ops/{stem}/{stem}_cpu.cpp"],
        "cuda": [CSRC / f"ops/{stem}/{stem}_cuda.cpp"],
        "header": [CSRC / f"ops/{stem}/{stem}.h"],
        "kernel": [CSRC / f"ops/{stem}/{stem}_kernel.cuh", CSRC / f"ops/{stem}/{stem}_fwd.cu"],
        "test": [ROOT / f"tests/ops/test_{stem}.py"],
        "benchmark": [PACKAGE / f"benchmark/ops/{stem}.py", ROOT / f"bench/ops/bench_{stem}.py"],
    }
    for row, paths in rows.items():
        missing = [str(path.relative_to(ROOT)) for path in paths if not path.exists()]
        if (stem, row) in EXCEPTIONS:
            assert missing, f"the exception {stem}, {row} is out of date"
        else:
            assert not missing, f"{stem}: {row}"


def test_no_room_without_a_contract() -> None:
    """Every op folder and file belongs to a defined op."""
    folders = {path.name for path in (CSRC / "ops").iterdir() if path.is_dir()}
    assert folders == {stem for stem in STEMS if (stem, "cpu") not in EXCEPTIONS}
    for room in ("ops", "reference"):
        files = {path.stem for path in (PACKAGE / room).glob("*.py") if not path.stem.startswith("_")}
        assert files == set(STEMS), room


def includes(path: Path) -> list[str]:
    return re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', path.read_text(), re.MULTILINE)


TORCH_HEADER = re.compile(r"^(torch|ATen|c10|caffe2)/")


def test_no_torch_header_where_nvcc_compiles() -> None:
    """.cu, .cuh, the Params headers, and everything they include."""
    start = [*CSRC.rglob("*.cu"), *CSRC.rglob("*.cuh"), *(CSRC / f"ops/{stem}/{stem}.h" for stem in STEMS)]
    queue, seen = [path for path in start if path.exists()], set()
    assert queue
    while queue:
        path = queue.pop()
        if path in seen:
            continue
        seen.add(path)
        for name in includes(path):
            assert not TORCH_HEADER.match(name), f"{path.relative_to(ROOT)} includes {name}"
            queue += [candidate for candidate in (CSRC / name, path.parent / name) if candidate.exists()]


def test_stable_headers_only() -> None:
    """Host code uses the stable ABI: torch/csrc/stable, torch/headeronly and the C shims."""
    allowed = re.compile(r"^torch/(csrc/stable/|headeronly/|csrc/inductor/aoti_torch/(c|generated)/)")
    for path in [*CSRC.rglob("*.cpp"), *CSRC.rglob("*.h")]:
        wrong = [name for name in includes(path) if TORCH_HEADER.match(name) and not allowed.match(name)]
        assert not wrong, f"{path.relative_to(ROOT)} includes {wrong}"


def test_no_object_file_twice() -> None:
    """A .cpp and a .cu of one folder never share a stem."""
    for folder in {path.parent for path in CSRC.rglob("*.cu")}:
        assert not {p.stem for p in folder.glob("*.cu")} & {p.stem for p in folder.glob("*.cpp")}, folder


def imported_modules(path: Path) -> list[str]:
    """Absolute names of the package's modules that a file imports, at module level or later."""
    package = ["dl4ds_kernels", *path.relative_to(PACKAGE).parts[:-1]]
    names: list[str] = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = [*base, *(node.module.split(".") if node.module else [])]
            names += [".".join([*base, alias.name]) for alias in node.names] if len(base) <= 1 else [".".join(base)]
    return [name for name in names if name.startswith("dl4ds_kernels.")]


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_nothing_lower_imports_higher(path: Path) -> None:
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if room == "__init__":
        return
    assert room in LEVEL, f"{room}: give the room a level in ROOMS"
    for name in imported_modules(path):
        other = name.split(".")[1]
        if other in LEVEL:
            assert LEVEL[other] <= LEVEL[room], f"{path.relative_to(ROOT)} imports {name}"


def test_bench_and_package_never_import_tests() -> None:
    for path in [*PACKAGE.rglob("*.py"), *(ROOT / "bench").rglob("*.py")]:
        text = path.read_text()
        assert not re.search(r"^\s*(from|import) (tests|conftest|_cases|_assert)\b", text, re.MULTILINE), path


def test_file_lengths() -> None:
    """No file over 500 lines; those over 300 are listed as a warning."""
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text().splitlines())
        for path in tracked("*.py", "*.cpp", "*.h", "*.cu", "*.cuh", "Makefile")
    }
    too_long = {name: count for name, count in lengths.items() if count > 500}
    long = sorted(((count, name) for name, count in lengths.items() if count > 300), reverse=True)
    if long:
        warnings.warn("over 300 lines: " + ", ".join(f"{name} ({count})" for count, name in long), stacklevel=1)
    assert not too_long
    assert lengths["setup.py"] <= 150


# Set by others (compiler, torch, triton, Python, the shell, OpenMP), read or set by us.
FOREIGN_VARIABLES = {
    "CUDA_HOME", "CUDA_VISIBLE_DEVICES", "CUTLASS_PATH", "CXX", "HOME", "LD_LIBRARY_PATH", "LD_PRELOAD", "MALLOC_ARENA_MAX",
    "MAX_JOBS", "NO_COLOR", "OMP_NUM_THREADS", "OMP_WAIT_POLICY", "PATH", "PYTHONPATH", "PYTHONWARNINGS", "SOURCE_DATE_EPOCH",
    "TMPDIR", "TORCH_CUDA_ARCH_LIST", "TRITON_CACHE_DIR", "TRITON_INTERPRET", "VENV", "XDG_CACHE_HOME",
}  # fmt: skip


def test_environment_variables_are_in_the_readme() -> None:
    """Every variable that the code reads starts with DL4DS_ and stands in README's table; foreign ones are named here."""
    pattern = re.compile(r"""(?:environ(?:\.get|\.setdefault|\.pop)?[\[(]\s*|getenv\(\s*)["']([A-Za-z0-9_]+)["']""")
    readme = (ROOT / "README.md").read_text()
    used: dict[str, str] = {}
    for path in tracked("dl4ds_kernels/*.py", "csrc/*", "bench/*.py", "setup.py"):
        for name in pattern.findall(path.read_text()):
            used[name] = str(path.relative_to(ROOT))
    own = {name for name in used if name.startswith("DL4DS_")}
    assert not (used.keys() - own - FOREIGN_VARIABLES), {name: used[name] for name in used.keys() - own - FOREIGN_VARIABLES}
    table = set(re.findall(r"^\| `(DL4DS_[A-Z_]+)` \|", readme, re.MULTILINE))
    assert own == table, f"in the code only: {own - table}; in README only: {table - own}"


def test_no_path_of_a_developers_machine() -> None:
    """Files name no absolute home or scratch path."""
    wrong = re.compile(r"(?<![\w.])/(?:work|root|home/\w+)/")
    for path in tracked("*.py", "*.cpp", "*.h", "*.cu", "*.cuh", "*.md", "*.toml", "*.txt", "Makefile"):
        found = wrong.search(path.read_text())
        assert not found, f"{path.relative_to(ROOT)}: {found and found.group()}"


def test_public_names() -> None:
    for name in dl4ds_kernels.__all__:
        assert getattr(dl4ds_kernels, name) is not None
    for name in dl4ds_kernels.functional.__all__:
        assert getattr(dl4ds_kernels.functional, name).__doc__, name
