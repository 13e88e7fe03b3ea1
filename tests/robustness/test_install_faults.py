"""What may be wrong with an installation, and files that come from outside: F51 to F54.

tests/test_import.py has the plain cases in depth (no compiled part, torn, of another Python, old torch, no triton); here is
the rest. Every broken state: the import works, stock torch serves, and one sentence says what is wrong and what to do.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import torch
from _cli import invoke

import dl4ds_kernels as dk
from dl4ds_kernels import _backend, _extension
from dl4ds_kernels import functional as F

ROOT = Path(__file__).parent.parent.parent
PACKAGE = ROOT / "dl4ds_kernels"
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
STATE = """
import json, torch
import dl4ds_kernels as dk
from dl4ds_kernels import functional as F
x = torch.randn(2, 16, 40, 40)
assert torch.equal(F.add_act(x, x), torch.relu(x + x))
print(json.dumps({name: [part.loaded, part.message()] for name, part in dk._extension.status().items()}))
"""


def run(code: str, path: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(path), **environment}
    return subprocess.run([sys.executable, "-c", code, *arguments], cwd=path, env=env, capture_output=True, text=True)


def state(path: Path, before: str = "", **environment: str) -> dict[str, Any]:
    done = run(before + STATE, path, **environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A copy of the package with its compiled parts, to be damaged."""
    shutil.copytree(PACKAGE, tmp_path / "dl4ds_kernels", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def test_F51_cpu_build_of_torch(package: Path) -> None:
    loaded, why = state(package, "import torch; torch.version.cuda = None\n")["_cuda"]
    assert not loaded and "is not a CUDA build" in why and "install a CUDA build of torch" in why


def test_F51_rocm_build_of_torch(package: Path) -> None:
    loaded, why = state(package, "import torch; torch.version.cuda, torch.version.hip = None, '6.4.4'\n")["_cuda"]
    assert not loaded and "is a ROCm build" in why and "Triton" in why


def test_F51_no_gpu_and_no_triton_in_one_process(package: Path) -> None:
    """Nothing of the machine is needed: no GPU visible, triton blocked, no nvcc on PATH; info still exits with a table."""
    code = (
        "import sys; sys.modules['triton'] = None\nimport torch\nfrom dl4ds_kernels.cli import main\n"
        "sys.exit(main(['info', '--json']))"
    )
    done = run(code, package, CUDA_VISIBLE_DEVICES="", PATH="", TRITON_INTERPRET="0")
    facts = json.loads(done.stdout)
    assert done.returncode == 0 and facts["machine"]["gpus"] == [] and facts["problems"] == []
    assert "triton" not in facts["backends"]["cpu"]


def test_F51_doctor_explains_a_missing_part(package: Path) -> None:
    for part in (package / "dl4ds_kernels").glob("*.so"):
        part.unlink()
    done = run("import sys\nfrom dl4ds_kernels.cli import main\nsys.exit(main(['info']))", package)
    assert done.returncode == 1 and "the C++ part dl4ds_kernels._C is not built" in done.stderr
    assert "pip install" in done.stderr and "not loaded" in done.stdout


@pytest.mark.parametrize("keep", [0, 3, 64, 4096, 0.5, 0.999], ids=str)
def test_F52_torn_cuda_part(keep: float, package: Path) -> None:
    """Cut anywhere: loading such a file would kill the process with SIGBUS, so it is looked at first."""
    part = next((package / "dl4ds_kernels").glob("_cuda*.so"), None)
    if part is None or torch.version.cuda is None:
        pytest.skip("there is no CUDA part in this build")
    content = part.read_bytes()
    part.unlink()
    part.write_bytes(content[: int(keep * len(content)) if isinstance(keep, float) else keep])
    loaded, why = state(package)["_cuda"]
    assert not loaded and "was found but does not load" in why and "rebuild it" in why and "Triton" in why


def test_F52_file_of_another_machine(package: Path) -> None:
    part = next((package / "dl4ds_kernels").glob("_C*.so"))
    content = bytearray(part.read_bytes())
    content[18:20] = (243).to_bytes(2, "little")  # e_machine: RISC-V
    part.unlink()
    part.write_bytes(content)
    loaded, why = state(package)["_C"]
    assert not loaded and "was found but does not load" in why and "rebuild it" in why


def test_F52_garbage_instead_of_a_library(package: Path) -> None:
    for stem in ("_C", "_cuda"):
        path = package / "dl4ds_kernels" / f"{stem}{SUFFIX}"
        path.unlink(missing_ok=True)
        path.write_bytes(os.urandom(5000))
    for name, (loaded, why) in state(package).items():
        assert not loaded and why, name


def test_F52_missing_libcudart(package: Path, tmp_path: Path) -> None:
    """The run-time library that the CUDA part needs is not there: its name is in the message."""
    part = next((package / "dl4ds_kernels").glob("_cuda*.so"), None)
    if part is None or torch.version.cuda is None:
        pytest.skip("there is no CUDA part in this build")
    content = part.read_bytes()
    needed = b"libcudart.so." + torch.version.cuda.split(".")[0].encode()
    assert content.count(needed)
    part.unlink()
    part.write_bytes(content.replace(needed, needed[:-2] + b"99"))
    loaded, why = state(package)["_cuda"]
    assert not loaded and "libcudart.so.99" in why and "rebuild it" in why


def test_F52_cuda_part_of_another_major(package: Path) -> None:
    info = package / "dl4ds_kernels" / "_build_info.json"
    if torch.version.cuda is None or not list((package / "dl4ds_kernels").glob("_cuda*.so")):
        pytest.skip("there is no CUDA part in this build")
    info.write_text(json.dumps({**json.loads(info.read_text()), "cuda_version": "12.4"}))
    loaded, why = state(package)["_cuda"]
    assert not loaded and "was built for CUDA 12.4" in why and torch.version.cuda in why and "rebuild it" in why


def test_F52_two_copies_in_one_process(package: Path) -> None:
    code = f"""
import sys
import dl4ds_kernels as first
for name in [n for n in sys.modules if n.split(".")[0] == "dl4ds_kernels"]:
    del sys.modules[name]
sys.path.insert(0, {str(ROOT)!r})
try:
    import dl4ds_kernels
except ImportError as error:
    print(error)
"""
    done = run(code, package)
    assert done.returncode == 0, done.stderr[-2000:]
    for word in ("registered already in this process", str(package), f"a second one in {PACKAGE}", "sys.path"):
        assert word in done.stdout, done.stdout


def test_F52_reload(package: Path) -> None:
    code = "import importlib, dl4ds_kernels as dk\nimportlib.reload(dk)\nimportlib.reload(dk.functional)\n" + STATE
    done = run(code, package)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize(
    ("archs", "capability", "runs"),
    [
        ("8.0+PTX", (8, 0), True), ("8.0+PTX", (8, 6), True), ("8.0+PTX", (9, 0), True), ("8.0+PTX", (12, 0), True),
        ("8.0+PTX", (7, 5), False), ("8.6", (8, 0), False), ("8.6", (8, 9), True), ("8.6", (9, 0), False),
        ("9.0a", (9, 0), True), ("9.0a", (9, 1), False), ("9.0a", (10, 0), False), ("12.0f+PTX", (12, 1), False),
        ("8.0+PTX;8.6;8.9;9.0;10.0;12.0+PTX", (6, 1), False), ("8.0+PTX;8.6;8.9;9.0;10.0;12.0+PTX", (11, 0), True),
        ("8.0 9.0+PTX", (10, 3), True), ("", (9, 0), False),
    ],
)  # fmt: skip
def test_F53_which_gpus_have_code(archs: str, capability: tuple[int, int], runs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_extension, "gpu_archs", lambda: archs)
    why = _extension.no_code_for(capability)
    assert (why == "") == runs
    if not runs:
        number = f"{capability[0]}.{capability[1]}"
        assert f"this GPU has compute capability {number}" in why and f"TORCH_CUDA_ARCH_LIST={number}" in why


def test_F53_old_gpu_is_served_by_triton_or_stock_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked before a launch, once a device; an explicit choice says why, auto goes elsewhere. A stand-in for the tensor."""
    from types import SimpleNamespace

    from dl4ds_kernels._define import CPP, TRITON

    asked: list[int] = []

    def capability(index: Any = None) -> tuple[int, int]:
        asked.append(index)
        return (7, 5) if index == 1 else (9, 0)

    monkeypatch.setattr(torch.cuda, "get_device_capability", capability)
    monkeypatch.setattr(_extension, "gpu_archs", lambda: "8.0+PTX")
    monkeypatch.setattr(_extension, "_runs_on", {})
    monkeypatch.setattr(_extension, "_cuda", _extension.Part("_cuda", loaded=True))
    monkeypatch.setattr(_backend, "has_kernel", lambda op, namespace, device: True)
    monkeypatch.setattr(_backend, "_triton_found", True)
    old, new = (SimpleNamespace(device=torch.device("cuda", i), dtype=torch.float32, numel=lambda: 10**6) for i in (1, 0))
    assert [_backend.select("add_act", x) for x in (old, new, old, new)] == [TRITON, CPP, TRITON, CPP] and asked == [1, 0]
    monkeypatch.setattr(_backend, "_triton_found", False)
    assert _backend.select("add_act", old) == _backend.STOCK
    with pytest.raises(RuntimeError, match=r"add_act: backend: the CUDA part was compiled for 8.0\+PTX, this GPU has .* 7.5"):
        _backend.select("add_act", old, "cuda")
    assert _backend.select("add_act", new, "cuda") == CPP


HOSTILE = "<script>alert(1)</script>'\"&{{7*7}}{% raw %}"


def test_F54_hostile_shapes_are_text() -> None:
    """Nothing is evaluated, opened or imported: an unknown shape is an error that quotes it; sizes have to be sizes."""
    for text in (HOSTILE, "__import__('os').system('true')", "/etc/passwd", "../../etc", "1x1", "-1x3x3", "9" * 5000, "0x0x0"):
        code, _, err = invoke("bench", "--op", "add_act", "--shapes", text, "--quick", "--compare", "none")
        assert code != 0 and "error:" in err and "Traceback" not in err, text


def test_F54_report_escapes_names(tmp_path: Path) -> None:
    pytest.importorskip("jinja2", reason="the HTML report needs the cli extra")
    from jinja2 import Environment, PackageLoader

    environment = Environment(loader=PackageLoader("dl4ds_kernels.cli"), autoescape=True)
    for name in environment.list_templates():
        source = environment.loader.get_source(environment, name)[0]
        assert "|safe" not in source.replace(" ", "") and "autoescape false" not in source, name
    report = dk.convert.Report([dk.convert.Row(HOSTILE, "conv_bn_act", (HOSTILE,), "kept", "HOOKS")])
    page = environment.from_string("{{ rows }}").render(rows=report.to_json())
    assert "<script>" not in page and json.loads(report.to_json())["rows"][0]["fqn"] == HOSTILE


def test_F54_no_pickle_and_no_evaluation() -> None:
    """No eval, exec, yaml, pickle.load or unsafe torch.load in the package."""
    import ast

    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            name = ast.unparse(node.func)
            # Source made from the user's own traced model, by torch.fx as for GraphModule, and the conditions of that trace.
            if (path.name, name) in (("plan.py", "exec"), ("effects.py", "eval")):
                continue
            assert name not in ("eval", "exec", "yaml.load", "pickle.load", "pickle.loads", "marshal.loads", "os.system"), path
            if name == "torch.load":
                assert any(k.arg == "weights_only" and getattr(k.value, "value", False) is True for k in node.keywords), path


def test_F54_pickled_weights_are_refused(tmp_path: Path) -> None:
    """A weights file that would run code when unpickled: refused in one line, and its code does not run."""
    import pickle

    witness = tmp_path / "ran"

    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(witness),)

    path = tmp_path / "weights.pt"
    path.write_bytes(pickle.dumps({"conv1.weight": Bomb()}))
    torch.save({"conv1.weight": Bomb()}, tmp_path / "zip.pt")
    for file in (path, tmp_path / "zip.pt"):
        code, _, err = invoke("demo", "--model", "resnet18", "--weights", file, "--repeats", 1, "--no-compile")
        assert code != 0 and "error:" in err and "Traceback" not in err
    assert not witness.exists()


CFG = "[net]\nheight={h}\nwidth=8\nchannels=3\n[convolutional]\nfilters={f}\nsize={s}\nstride={t}\npad=1\nactivation=linear\n"
BAD_CFG = {
    "infinite": CFG.format(h=8, f="inf", s=3, t=1), "nan": CFG.format(h=8, f="nan", s=3, t=1),
    "negative": CFG.format(h=8, f=-4, s=3, t=1), "zero": CFG.format(h=8, f=0, s=3, t=1),
    "stride": CFG.format(h=8, f=4, s=3, t=0), "huge": CFG.format(h=8, f=10**15, s=3, t=1),
    "fraction": CFG.format(h=8, f=2.5, s=3, t=1), "size": CFG.format(h=8, f=4, s=-1, t=1),
    "code": CFG.format(h="__import__", f=4, s=3, t=1),
    "height": CFG.format(h=-8, f=4, s=3, t=1), "garbage": "\\0\\1\\2[[[[\n====", "empty": "", "section": "[net]\n[exec]\nx=1\n",
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_CFG)
def test_F54_network_descriptions(name: str) -> None:
    """A darknet .cfg from outside: a CfgError that names the line, never another exception."""
    from dl4ds_kernels.detection.cfg import CfgError
    from dl4ds_kernels.models.darknet import DarknetNet

    with pytest.raises(CfgError):
        DarknetNet.from_text(BAD_CFG[name])


def test_F54_written_files_are_the_users(tmp_path: Path) -> None:
    """Reports are written whole or not at all, through a temporary file beside them; a link is replaced, not followed."""
    from dl4ds_kernels.cli._console import write_text

    target, secret = tmp_path / "report.json", tmp_path / "secret"
    secret.write_text("mine")
    target.symlink_to(secret)
    write_text(target, "{}")
    assert secret.read_text() == "mine" and not target.is_symlink() and target.read_text() == "{}"
    assert not target.stat().st_mode & stat.S_IWOTH
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.json", "secret"]


POOL_CALL = """
import torch
from dl4ds_kernels import functional as F
x = torch.ones(2, 4, 99, 99)
print(F.add_act(x, x, backend="cpu").sum().item())
"""


def test_F54_no_variable_names_a_file_to_load() -> None:
    """No DL4DS_* variable is a path but the autotune cache's: numbers in JSON, checked one by one (tests/test_autotune.py)."""
    import re

    for path in [*PACKAGE.rglob("*.py"), *(ROOT / "csrc").rglob("*.[ch]*")]:
        text = path.read_text()
        for name in re.findall(r"DL4DS_[A-Z_]+", text):
            allowed = name == "DL4DS_AUTOTUNE_CACHE"
            assert allowed or not re.search(r"PATH|DIR|FILE|CACHE|LIB", name), f"{path.name}: {name}"
        for word in ("expanduser", "XDG_CACHE_HOME", "user_cache_dir"):
            assert word not in text or (path.name == "_autotune.py" and "0o700" in text), f"{path.name}: a cache on disk"
    for value in ("nonsense", "99999999999999999999"):
        done = run(POOL_CALL, ROOT, DL4DS_POOL_MB=value)
        assert done.returncode == 0 and float(done.stdout) == 2.0 * 2 * 4 * 99 * 99, done.stderr[-500:]


def test_F54_build_info_is_data(package: Path) -> None:
    """Types that the file should not have: read as facts or ignored, no crash."""
    info = package / "dl4ds_kernels" / "_build_info.json"
    for content in ("[]", '"text"', '{"cuda_version": 13, "cuda_archs": 5, "python": []}', "\\x00\\xff"):
        info.write_text(content)
        assert state(package)["_C"][0]


def test_F54_numbers_in_functionals_are_checked() -> None:
    """Values that a server may pass on from a request."""
    x = torch.randn(2, 8, 6, 6)
    for options in ({"activation": HOSTILE}, {"activation": None}, {"activation": ["relu"]}, {"backend": HOSTILE}):
        with pytest.raises(ValueError):
            F.add_act(x, x, **options)
    for size in (-1, 2**62, 2**31):
        with pytest.raises((RuntimeError, OverflowError, MemoryError)):
            F.nms_padded(
                torch.zeros(2, 3, 4), torch.zeros(2, 3), iou_threshold=0.5, max_output=size if size != 2**31 else -(2**31)
            )
