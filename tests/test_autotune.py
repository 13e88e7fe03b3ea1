"""``DL4DS_AUTOTUNE=1``: measured choices, when they are made, what restricts them, and the file that keeps them."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import skip_unless_loaded
from torch import nn

import dl4ds_kernels as dk
from dl4ds_kernels import _autotune, _packing

X = torch.randn(1, 16, 12, 12)
DIRECT, F2, F4 = 1, 2, 4


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Autotuning on, with a file of its own; small layers are packed."""
    skip_unless_loaded("cpu")
    path = tmp_path / "cache/autotune.json"
    monkeypatch.setenv("DL4DS_AUTOTUNE", "1")
    monkeypatch.setenv("DL4DS_AUTOTUNE_CACHE", str(path))
    monkeypatch.delenv("DL4DS_WINOGRAD", raising=False)
    monkeypatch.setattr(_packing, "MIN_MACS", 0)
    monkeypatch.setattr(_packing, "MIN_LIBRARY_MACS", 0)
    _autotune.forget()
    yield path
    _autotune.forget()


def model(kernel: int = 3, groups: int = 1) -> nn.Module:
    net = nn.Sequential(nn.Conv2d(16, 32, kernel, padding=kernel // 2, groups=groups), nn.BatchNorm2d(32), nn.ReLU()).eval()
    return dk.optimize(net)


def fake_times(monkeypatch: pytest.MonkeyPatch, times: dict[int, float]) -> list[set[int]]:
    """Instead of timing: these microseconds (others get 1000). Returns the list of what was asked to be timed."""
    asked: list[set[int]] = []

    def time_calls(calls: Any) -> dict[int, float]:
        for call in calls.values():
            call()
        asked.append(set(calls))
        return {code: times.get(code, 1000.0) for code in calls}

    monkeypatch.setattr(_autotune, "time_calls", time_calls)
    return asked


def run(net: nn.Module, x: torch.Tensor = X) -> str:
    with torch.no_grad():
        net(x)
    (names,) = dk.algorithms(net).values()
    assert len(names) == 1, "only the winner's pack is kept"
    return names[0]


@pytest.mark.parametrize("winner", [0, DIRECT, F2, F4])
def test_the_fastest_candidate_runs_and_is_right(monkeypatch: pytest.MonkeyPatch, winner: int) -> None:
    fake_times(monkeypatch, {winner: 1.0})
    net = model()
    assert run(net) == _packing.ALGORITHMS[winner]
    with torch.no_grad():
        conv, bn = net[0], net[1]
        truth = torch.relu(bn.double()(conv.double()(X.double())))
        got = net.float()(X)
    assert float((got - truth).abs().max() / truth.abs().max()) < 1e-4


def test_nothing_is_timed_without_the_variable(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.delenv("DL4DS_AUTOTUNE")
    asked = fake_times(monkeypatch, {0: 1.0})
    net = model()
    code = _packing.choose(X, net[0].weight, (1, 1), (1, 1), (1, 1), 1, False)
    assert run(net) == _packing.ALGORITHMS[code]
    assert not asked and not cache.parent.exists()


def test_a_clear_win_is_needed_against_the_cost_model(monkeypatch: pytest.MonkeyPatch) -> None:
    net = model()
    default = _packing.choose(X, net[0].weight, (1, 1), (1, 1), (1, 1), 1, False)
    fake_times(monkeypatch, {default: 100.0, 0 if default else DIRECT: 98.0})
    assert run(net) == _packing.ALGORITHMS[default]


def test_exact_and_the_switch_restrict_the_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = model()[0].weight
    geometry = ((1, 1), (1, 1), (1, 1), 1)
    everything = _packing.candidates(X, weight, *geometry, False)
    assert {0, DIRECT, F2, F4} <= set(everything)
    exact = set(_packing.candidates(X, weight, *geometry, True))
    assert exact == set(everything) - _packing.INEXACT and F4 not in exact and F2 in exact
    monkeypatch.setenv("DL4DS_WINOGRAD", "0")
    assert not {F2, F4} & set(_packing.candidates(X, weight, *geometry, False))
    strided = ((2, 2), *geometry[1:])
    monkeypatch.delenv("DL4DS_WINOGRAD")
    assert not {F2, F4} & set(_packing.candidates(X, weight, *strided, False))


def test_exact_takes_no_inexact_winner(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_times(monkeypatch, {F4: 1.0, F2: 2.0})
    assert run(model()) == _packing.ALGORITHMS[F4]
    net = nn.Sequential(nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()).eval()
    assert run(dk.optimize(net, exact=True)) == _packing.ALGORITHMS[F2]  # from the times of the entry that is there


def test_never_under_grad_or_compile(monkeypatch: pytest.MonkeyPatch, cache: Path, fresh_dynamo: object) -> None:
    asked = fake_times(monkeypatch, {0: 1.0})
    net = model()
    net(X)
    geometry = (net[0].stride, net[0].padding, net[0].dilation, net[0].groups)
    default = _packing.choose(X, net[0].weight, *geometry, False)
    assert _packing.packed_weight(net[0], net[0].weight, X, *geometry, False)[0] == default
    with torch.no_grad():
        torch.compile(net, backend="eager")(X)
        assert not asked and not cache.exists()
        _packing.drop(net[0])
        net(X)
    assert asked, "a choice that was not made by timing is made at the next call that may"


def test_the_next_process_reads_the_file(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    asked = fake_times(monkeypatch, {F2: 1.0})
    assert run(model()) == _packing.ALGORITHMS[F2] and len(asked) == 1
    document = json.loads(cache.read_text())
    ((machine, entries),) = document["machines"].items()
    assert machine == _autotune.machine_key() and "2 threads" in machine
    ((key, times),) = entries.items()
    assert key == "N1 C16 H12 W12 C_out32 k3x3 s1x1 p1x1 d1x1 g1" and times["2"] == 1.0 and set(times) >= {"0", "1", "2", "4"}
    _autotune.forget()  # as a new process would begin
    assert run(model()) == _packing.ALGORITHMS[F2] and len(asked) == 1
    torch.set_num_threads(1)  # another number of threads is another question
    run(model())
    assert len(asked) == 2 and len(json.loads(cache.read_text())["machines"]) == 2


def test_an_entry_without_a_candidate_is_timed_again(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    asked = fake_times(monkeypatch, {F2: 1.0})
    run(model())
    document = json.loads(cache.read_text())
    for spoiled in ({"1": 5.0}, {"1": "fast"}, {"1": -1.0, "2": 1.0}, [1, 2], {"x": 1.0}, None):
        for entries in document["machines"].values():
            entries.update(dict.fromkeys(entries, spoiled))
        cache.write_text(json.dumps(document))
        _autotune.forget()
        before = len(asked)
        assert run(model()) == _packing.ALGORITHMS[F2] and len(asked) == before + 1


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\xfe\x00", b"[1, 2]", b'{"name": "my settings"}', b'{"format": "dl4ds_kernels autotune 1"}',
     b'{"format": "dl4ds_kernels autotune 1", "machines": {"a": 3}}', b"[" * 100_000],
)  # fmt: skip
def test_a_file_that_is_not_ours_is_left_alone_with_one_warning(
    monkeypatch: pytest.MonkeyPatch, cache: Path, content: bytes
) -> None:
    cache.parent.mkdir()
    cache.write_bytes(content)
    asked = fake_times(monkeypatch, {F2: 1.0})
    with pytest.warns(UserWarning, match=r"DL4DS_AUTOTUNE: .*autotune\.json is not read .*delete it") as caught:
        assert run(model()) == _packing.ALGORITHMS[F2]
        assert run(model(1)) and run(model()) == _packing.ALGORITHMS[F2]
    assert len(caught) == 1 and cache.read_bytes() == content
    assert len(asked) == 2, "choices are remembered in memory"


@pytest.mark.skipif(os.geteuid() == 0 if hasattr(os, "geteuid") else True, reason="root may write anywhere")
def test_a_folder_without_permission(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    cache.parent.mkdir(mode=0o500)
    fake_times(monkeypatch, {F2: 1.0})
    with pytest.warns(UserWarning, match="cannot be written") as caught:
        run(model()), run(model(1))
    assert len(caught) == 1


def test_a_path_that_cannot_be_a_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("DL4DS_AUTOTUNE_CACHE", str(tmp_path / "file/autotune.json"))
    fake_times(monkeypatch, {F2: 1.0})
    with pytest.warns(UserWarning, match="DL4DS_AUTOTUNE: .*file/autotune.json") as caught:
        assert run(model()) == _packing.ALGORITHMS[F2]
        run(model(1))
    assert len(caught) == 1


def test_where_the_file_lies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("DL4DS_AUTOTUNE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    path = _autotune.cache_file()
    assert path == tmp_path / "xdg/dl4ds_kernels/autotune.json"
    fake_times(monkeypatch, {F2: 1.0})
    run(model())
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700 and stat.S_IMODE(path.stat().st_mode) == 0o600
    assert not list(path.parent.glob(".*")), "no temporary file is left"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert _autotune.cache_file() == tmp_path / "home/.cache/dl4ds_kernels/autotune.json"


def test_timing_itself(cache: Path) -> None:
    """Real times: the slow call is slower, and its hopeless twin is not timed to the end."""
    counts = {0: 0, 1: 0}

    def call(code: int, size: int) -> Any:
        a = torch.randn(size, size)

        def run() -> None:
            counts[code] += 1
            a @ a

        return run

    times = _autotune.time_calls({0: call(0, 16), 1: call(1, 700)})
    assert 0 < times[0] < times[1] and counts[1] == 2 < counts[0]


_CHILD = """
import sys, torch
from dl4ds_kernels import _autotune
torch.set_num_threads(1)
for i in range(40):
    key = f"{sys.argv[1]} {i}"
    assert _autotune.choose(key, 1, {1: lambda: (lambda: None), 2: lambda: (lambda: None)}) in (1, 2)
"""


def test_several_processes_lose_nothing(cache: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(Path(dk.__file__).parents[1])}
    children = [subprocess.Popen([sys.executable, "-c", _CHILD, str(i)], env=env) for i in range(3)]
    assert [child.wait() for child in children] == [0, 0, 0]
    ((_, entries),) = json.loads(cache.read_text())["machines"].items()
    assert set(entries) == {f"{child} {i}" for child in range(3) for i in range(40)}


def test_measured_model_is_still_right(cache: Path) -> None:
    """No fake: a small network by real timing, against stock, with one warning-free file."""
    net = nn.Sequential(
        nn.Conv2d(3, 16, 7, 2, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1, groups=2), nn.BatchNorm2d(32),
        nn.ReLU(), nn.Conv2d(32, 48, 3, padding=1), nn.BatchNorm2d(48), nn.ReLU(), nn.Conv2d(48, 8, 1), nn.BatchNorm2d(8),
    ).eval()  # fmt: skip
    x = torch.randn(2, 3, 40, 40)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        truth, ours = net.double()(x.double()), dk.optimize(net.float())
        assert float((ours(x) - truth).abs().max() / truth.abs().max()) < 1e-5
    ((_, entries),) = json.loads(cache.read_text())["machines"].items()
    assert len(entries) == 4 and all(len(times) >= 2 for times in entries.values())
