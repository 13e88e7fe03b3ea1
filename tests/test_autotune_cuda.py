"""``DL4DS_AUTOTUNE=1`` on CUDA without a GPU: the host functions that ship, over the PTX simulator, with a made-up clock.

Everything but the clock is real: the C++ route asks, the candidates run (once each, in the simulator), the file is written.
Times of a GPU are not tested here; bench/gpu_check.py does that.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from _cuda_conv import require_fused_conv
from _cuda_host import host

import dl4ds_kernels as dk
from dl4ds_kernels import _autotune, _cuda_autotune, _cuda_candidates, _cuda_conv
from dl4ds_kernels._cuda_candidates import DGRAD, LAYER, TAIL
from dl4ds_kernels.functional import BNParams, ConvParams

CODES = {"cuDNN": 0, "128x128": 1, "128x64": 2, "64x64": 3}


class Clock:
    """Stands in for a GPU: runs each candidate once, says the times it was given."""

    def __init__(self) -> None:
        self.times: dict[Any, float] = {}  # by code, or by (kind, code)
        self.ran: list[int] = []
        self.kinds: list[str] = []
        self.known: set[Any] = set()
        self.forbidden: str | None = None
        self.full = False

    def machine(self) -> str:
        return "a made-up GPU, sm_80"

    def forbids(self) -> str | None:
        return self.forbidden

    def tensor(self, shape: Any, dtype: torch.dtype) -> torch.Tensor:
        if self.full:
            raise torch.OutOfMemoryError("made up")
        t = torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)
        return t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t

    def sample(self, call: Any) -> float:
        call()
        noise = 1 + 0.01 * (len(self.ran) % 3)
        ran = (self.kinds[-1], self.ran[-1])
        return self.times.get(ran, self.times.get(ran[1], 1000.0)) * noise

    def op(self, name: str) -> Any:
        real = getattr(torch.ops.dl4ds_sim, name)

        def run(*args: Any) -> Any:
            forced = _cuda_autotune._state.forced
            if (name, forced) not in self.known:
                self.known.add((name, forced))
                self.result = real(*args)
            self.kinds.append(forced[0])  # after the call: it may have timed other candidates
            self.ran.append(forced[1])
            return self.result

        return run


@pytest.fixture(scope="module", autouse=True)
def _toolchain() -> None:
    require_fused_conv()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    path = tmp_path / "cache" / "autotune.json"
    monkeypatch.setenv("DL4DS_AUTOTUNE", "1")
    monkeypatch.setenv("DL4DS_AUTOTUNE_CACHE", str(path))
    monkeypatch.delenv("DL4DS_CUDA_CONV", raising=False)
    _autotune.forget()
    _cuda_autotune._failed.clear()
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(False)  # tests run with them on
    yield path
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
    _autotune.forget()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(_cuda_autotune, "device", found)
    monkeypatch.setattr(_cuda_candidates, "op", found.op)
    return found


def layer(outputs: int = 24) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    x = torch.randn(1, 16, 6, 5).half().contiguous(memory_format=torch.channels_last)
    return x, (torch.randn(outputs, 16, 3, 3) / 12).half().contiguous(memory_format=torch.channels_last)


def run(x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
    ones, zeros = torch.ones(weight.shape[0]), torch.zeros(weight.shape[0])
    args = (x, weight, None, zeros, ones, ones, zeros, residual, [1, 1], [1, 1], [1, 1], 1, 1e-5, False, 1, 0.1)
    return host()("conv_bn_act", *args)


def told(x: torch.Tensor, weight: torch.Tensor, training: bool = False) -> dict[str, Any]:
    ask = lambda *args: host()("conv_bn_act_route", *args)  # noqa: E731
    return _cuda_conv.explain(x, weight, False, [1, 1], [1, 1], [1, 1], 1, 1, training, question=ask)


@pytest.mark.parametrize("winner", CODES)
def test_the_fastest_candidate_runs_and_is_right(clock: Clock, cache: Path, winner: str) -> None:
    x, weight = layer()
    before = told(x, weight)
    assert before["chosen_by"].startswith("table: not measured yet") and not clock.ran and not cache.exists()
    clock.times = {CODES[winner]: 10.0}
    out = run(x, weight)
    truth = torch.relu(torch.conv2d(x.double(), weight.double(), None, 1, 1))
    assert float((out.double() - truth).abs().max()) < 4e-3
    assert set(clock.ran) == {0, 1, 2, 3}
    found = told(x, weight)
    assert found["chosen_by"] == "measured" and found["measured_us"]["cuDNN"] > 0
    if winner == "cuDNN":
        assert found["kernels"].startswith("cuDNN") and found["reason"] == "measured to be no faster fused"
    else:
        assert found["kernels"].startswith("one fused") and found["tile"] == winner and "measured to be" in found["reason"]
    asked = len(clock.ran)
    run(x, weight)
    assert len(clock.ran) == asked, "measured once"
    ((machine, entries),) = json.loads(cache.read_text())["machines"].items()
    assert machine == clock.machine()
    assert list(entries) == ["conv_bn_act sm_80 float16 N1 C16 H6 W5 K24 k3x3 s1x1 p1x1 d1x1 act1"]


def test_a_clear_win_is_needed(clock: Clock) -> None:
    """Within 3 % of cuDNN: cuDNN."""
    x, weight = layer()
    clock.times = {0: 100.0, 3: 98.0}
    run(x, weight)
    assert told(x, weight)["kernels"].startswith("cuDNN")
    _autotune.forget()
    assert _autotune.best_of({0: 100.0, 3: 96.0}, (0, 3), 0) == 3


def test_without_the_variable_nobody_asks(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DL4DS_AUTOTUNE")
    x, weight = layer()
    run(x, weight)
    found = told(x, weight)
    assert not clock.ran and "chosen_by" not in found and "modelled" in found["reason"]


def test_capture_and_deterministic_algorithms_use_the_table(clock: Clock, cache: Path) -> None:
    """Nothing is timed then; a choice that is known still holds while capturing, but not under deterministic algorithms."""
    x, weight = layer()
    clock.times, clock.forbidden = {3: 10.0}, "capture"
    run(x, weight)
    assert not clock.ran and not cache.exists() and told(x, weight)["chosen_by"].startswith("table: a graph is being captured")
    clock.forbidden = "synchronizations are reported"
    run(x, weight)
    assert not clock.ran and "set_sync_debug_mode" in told(x, weight)["chosen_by"]
    clock.forbidden = None
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        run(x, weight)
        assert not clock.ran and told(x, weight)["chosen_by"].startswith("table: deterministic")
    finally:
        torch.use_deterministic_algorithms(False)
    with torch.backends.cudnn.flags(enabled=True, deterministic=True):  # the flag itself may be locked (torch.testing does it)
        run(x, weight)
        assert not clock.ran and told(x, weight)["chosen_by"].startswith("table: deterministic")
    run(x, weight)
    assert clock.ran and told(x, weight)["chosen_by"] == "measured"
    clock.forbidden = "capture"
    run(x, weight)
    assert told(x, weight)["chosen_by"] == "measured"


def test_an_explicit_wish_is_stronger(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = layer()
    for wish, kernels in (("library", "cuDNN"), ("fused", "one fused")):
        monkeypatch.setenv("DL4DS_CUDA_CONV", wish)
        run(x, weight)
        assert told(x, weight)["kernels"].startswith(kernels) and not clock.ran


def test_candidates(clock: Clock) -> None:
    """Only what serves the sizes; slices where the model sees few pixels, never with statistics."""
    base = dict.fromkeys(LAYER.fields, 1) | {"dtype": 2, "stats": 0, "k": 24}
    assert LAYER.candidates(base) == [0, 3, 1, 2]
    assert LAYER.candidates(base | {"k": 21}) == [0, 3]
    assert LAYER.candidates(base | {"dtype": 0, "k": 12}) == [0, 3, 1, 2]
    sliced = LAYER.candidates(base | {"slices": 6})
    assert sliced == [0, 3, 1, 2, 3 + 4 * 5] and LAYER.words(sliced[-1]) == "fused 64x64 in 6 slices"
    assert LAYER.candidates(base | {"slices": 6, "stats": 1}) == [0, 3, 1, 2]
    x = torch.randn(1, 72, 4, 4).half().contiguous(memory_format=torch.channels_last)
    weight = (torch.randn(21, 72, 3, 3) / 25).half().contiguous(memory_format=torch.channels_last)
    run(x, weight)
    assert set(clock.ran) >= {0, 3} and not {1, 2} & set(clock.ran)


def test_training_has_times_of_its_own(clock: Clock, cache: Path) -> None:
    x, weight = layer()
    clock.times = {3: 10.0}
    ones, zeros = torch.ones(24), torch.zeros(24)
    args = (x, weight, None, zeros, ones, ones, zeros, None, [1, 1], [1, 1], [1, 1], 1, 0.1, 1e-5, False, 1, 0.1, False)
    host()("conv_bn_act_train", *args)
    assert told(x, weight, training=True)["kernels"].startswith("a convolution that leaves")
    assert told(x, weight)["chosen_by"].startswith("table: not measured yet")
    ((_, entries),) = json.loads(cache.read_text())["machines"].items()
    assert [key.split()[0] for key in entries] == ["conv_bn_act_train"]


def gradient_route(clock: Clock, added: int, masked: bool, sums: int, asking: bool = False) -> dict[str, Any]:
    x, weight = layer()
    ask = lambda *args: host()("conv_bn_act_dgrad_route", *args)  # noqa: E731
    pairs = [1, 1], [1, 1], [1, 1]
    if not asking:
        ask(x, weight, *pairs, 1, added, masked, sums, 1)
    return _cuda_conv.explain_dgrad(x, weight, *pairs, 1, 1, added, masked, sums, question=ask)


@pytest.mark.parametrize("added, masked, sums, winner", [(1, True, 2, 3), (2, False, 1, 0)])
def test_the_input_gradient_is_timed_with_what_is_around_it(
    clock: Clock, cache: Path, added: int, masked: bool, sums: int, winner: int
) -> None:
    """Both ways compute the same; the faster one is the route, and explain says so."""
    before = gradient_route(clock, added, masked, sums, asking=True)
    assert before["chosen_by"].startswith("table: not measured yet") and not clock.ran
    clock.forbidden, clock.times = "capture", {winner: 10.0}
    assert gradient_route(clock, added, masked, sums)["chosen_by"].startswith("table: a graph") and not clock.ran
    clock.forbidden = None
    found = gradient_route(clock, added, masked, sums)
    assert set(clock.ran) == {0, 3} and set(clock.kinds) == {DGRAD.name} and found["chosen_by"] == "measured"
    assert found["measured_us"].keys() == {"cuDNN and the passes behind it", "fused 64x64"}
    assert found["kernels"].startswith("one fused" if winner else "cuDNN, then what is added and the sums")
    assert found["reason"] == ("measured to be faster fused" if winner else "measured to be no faster fused")
    ((_, entries),) = json.loads(cache.read_text())["machines"].items()
    what = ("added by bits" if masked else "added step2") + (" two" if sums == 2 else "")
    assert list(entries) == [f"conv_bn_act_dgrad sm_80 float16 N1 C16 H6 W5 K24 k3x3 p1x1 d1x1 {what} sums act1"]
    call = dict(zip(DGRAD.fields, (80, 2, added, masked, sums, 1, 1, 16, 6, 5, 24, 3, 3, 1, 1, 1, 1, 2), strict=True))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_cuda_candidates, "op", lambda name: lambda *args: host()(name, *args))
        run = DGRAD.runner(clock, call)
        for ours, theirs in zip(run(3), run(0), strict=True):
            scale = float(theirs.double().abs().max())
            assert float((ours.double() - theirs.double()).abs().max()) <= 5e-3 * scale


def block() -> list[ConvParams]:
    torch.manual_seed(2)
    norms = [BNParams(torch.zeros(64), torch.ones(64)), BNParams(torch.zeros(72), torch.ones(72))]
    weights = torch.randn(64, 16, 3, 3).half() / 12, torch.randn(72, 64, 1, 1).half() / 8
    return [ConvParams(weights[0], norms[0], padding=1), ConvParams(weights[1], norms[1])]


def told_of_block(training: bool = False) -> dict[str, Any]:
    question = lambda name: lambda *args: host()(name, *args)  # noqa: E731
    return _cuda_conv.explain_block(layer()[0], block(), False, 1, training, question)


@pytest.mark.parametrize("winner", ["two layers", "one kernel"])
def test_the_end_of_a_block_is_timed_against_two_layers(clock: Clock, cache: Path, winner: str) -> None:
    """The two layers are those that their own times choose; what runs is right, and explain tells of the block."""
    before = told_of_block()
    assert before["tail"]["chosen_by"].startswith("table: not measured yet") and not clock.ran
    clock.times = {(TAIL.name, 0 if winner == "two layers" else 1): 10.0, (LAYER.name, 3): 20.0}
    (x, _), (first, second) = layer(), block()
    sides = [
        (None, bn.running_mean, bn.running_var, None, None, 1e-5, False, 1) for bn in (first.norm, second.norm)
    ]  # fmt: skip
    out = host()(
        "conv_bn_act_tail", x, first.weight, *sides[0], [1, 1], [1, 1], [1, 1], second.weight, *sides[1], 0.1, None
    )  # fmt: skip
    truth = torch.relu(torch.conv2d(x.double(), first.weight.double(), None, 1, 1))
    truth = torch.relu(torch.conv2d(truth, second.weight.double()))
    assert float((out.double() - truth).abs().max()) < 1e-2
    assert {TAIL.name, LAYER.name} == set(clock.kinds)
    found = told_of_block()
    assert found["tail"]["chosen_by"] == "measured" and found["tail"]["measured_us"].keys() >= {"two layers", "one kernel"}
    assert found["tail"]["kernels"].startswith("one fused" if winner == "one kernel" else "two layers")
    assert len(found["layers"]) == (1 if winner == "one kernel" else 2)
    if winner == "two layers":
        assert all(entry["chosen_by"] == "measured" and entry["tile"] == "64x64" for entry in found["layers"])
    ((_, entries),) = json.loads(cache.read_text())["machines"].items()
    assert sorted(key.split()[0] for key in entries) == ["conv_bn_act", "conv_bn_act", "conv_bn_act_tail"]
    asked = len(clock.ran)
    clock.forbidden = "capture"
    assert told_of_block()["tail"]["chosen_by"] == "measured" and len(clock.ran) == asked
    gradients = [entry["input_gradient"] for entry in told_of_block(training=True)["layers"]]
    assert len(gradients) == 2 and all(g["chosen_by"].startswith("table") and "fused_us" in g for g in gradients)


def test_what_does_not_fit_is_asked_once(clock: Clock, cache: Path) -> None:
    x, weight = layer()
    clock.full = True
    run(x, weight)
    clock.full = False
    run(x, weight)
    assert not clock.ran and not cache.exists() and told(x, weight)["chosen_by"].startswith("table: not measured yet")


def test_another_process_reads_the_file(clock: Clock, cache: Path) -> None:
    x, weight = layer()
    clock.times = {2: 10.0}
    run(x, weight)
    _autotune.forget()  # as a new process begins
    asked = len(clock.ran)
    run(x, weight)
    assert len(clock.ran) == asked and told(x, weight)["tile"] == "128x64"


@pytest.mark.parametrize("content", [b'{"format": "dl4ds_kernels autotune 1", "machines": {"a', b'{"name": "mine"}'])
def test_a_torn_or_foreign_file_is_left_alone_with_one_warning(clock: Clock, cache: Path, content: bytes) -> None:
    cache.parent.mkdir()
    cache.write_bytes(content)
    x, weight = layer()
    clock.times = {3: 10.0}
    with pytest.warns(UserWarning, match=r"autotune\.json is not read") as caught:
        run(x, weight)
        run(*layer(40))
        run(x, weight)
    assert len(caught) == 1 and cache.read_bytes() == content and told(x, weight)["chosen_by"] == "measured"


def test_threads_time_one_after_another(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight threads with two layers: each is timed once, and no thread sees another's forced candidate."""
    inside, most = [], []

    def timed(kind: Any, call: Any, codes: Any) -> dict[int, float]:
        inside.append(call["k"])
        most.append(len(inside))
        time = dict.fromkeys(codes, 100.0) | {3: 10.0}
        inside.pop()
        return time

    monkeypatch.setattr(_cuda_autotune, "time_candidates", timed)
    base = dict.fromkeys(LAYER.fields, 1) | {"dtype": 2, "stats": 0}
    answers: list[int] = []

    def work(k: int) -> None:
        for _ in range(50):
            answers.append(_cuda_autotune.choose(LAYER, list((base | {"k": k}).values())))

    threads = [threading.Thread(target=work, args=(8 * (i % 2 + 1),)) for i in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert answers == [3] * 400 and most == [1, 1]


_CHILD = """
import sys
from dl4ds_kernels import _cuda_autotune as tune
from dl4ds_kernels._cuda_candidates import LAYER
class Clock:
    machine = staticmethod(lambda: "a made-up GPU")
    forbids = staticmethod(lambda: None)
tune.device = Clock()
tune.time_candidates = lambda kind, call, codes: dict.fromkeys(codes, 100.0) | {3: 10.0}
base = dict.fromkeys(LAYER.fields, 1) | {"dtype": 2, "stats": 0}
for i in range(30):
    assert tune.choose(LAYER, list((base | {"k": 8, "n": 100 * int(sys.argv[1]) + i}).values())) == 3
"""


def test_several_processes_lose_nothing(cache: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(Path(dk.__file__).parents[1])}
    children = [subprocess.Popen([sys.executable, "-c", _CHILD, str(i)], env=env) for i in range(3)]
    assert [child.wait() for child in children] == [0, 0, 0]
    ((_, entries),) = json.loads(cache.read_text())["machines"].items()
    assert len(entries) == 90
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _autotune.known("a made-up GPU", next(iter(entries)))


def test_the_real_clock_interleaves_and_drops_the_hopeless(monkeypatch: pytest.MonkeyPatch) -> None:
    """Medians of samples in turn; what takes twice as long in the warm-up is not timed on."""
    order: list[int] = []

    class Device:
        @staticmethod
        def sample(call: Any) -> float:
            call()
            code = order[-1]
            slow = code == 2
            return 300.0 if slow else 100.0 + 5 * code + (1000.0 if len(order) == 20 else 0.0)  # one outlier

    monkeypatch.setattr(_cuda_autotune, "device", Device())
    kind = LAYER._replace(runner=lambda device, call: lambda code: order.append(_cuda_autotune._state.forced[1]))
    times = _cuda_autotune.time_candidates(kind, {}, [0, 1, 2])
    assert times == {0: 100.0, 1: 105.0, 2: 300.0} and order.count(2) == 3
    assert order[9:15] == [1, 0, 0, 1, 1, 0], "in turn, first and last alternating"
