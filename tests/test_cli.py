"""The command line: what it prints and writes, and what it does with bad input."""

from __future__ import annotations

import csv
import os
import pickle
import re
import shutil
from html.parser import HTMLParser

import pytest
import torch
import torchvision
from _cli import invoke, strict_json
from PIL import Image
from safetensors.torch import save_file

from dl4ds_kernels.cli import _console, _experiment, _model, _photo, _plots

HOSTILE = "<img src=x onerror=alert(1)>&\"' $x_1$ [bold].png"


# -------------------------------------------------------------------------------------------------------------------- demo


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """One run of the main job on a picture with a hostile name: (document, HTML text)."""
    folder = tmp_path_factory.mktemp("demo")
    picture, html = folder / HOSTILE.replace("/", ""), folder / "reports" / "out.html"
    shutil.copy(_photo.default_photo(), picture)
    code, out, err = invoke(
        "demo", "--model", "resnet18", "--image", picture, "--repeats", 3, "--no-compile", "--exact", "--json", "--html", html
    )
    assert code == 0, err
    return strict_json(out), html.read_text()


def test_demo_replaces_everything_and_keeps_the_state_dict(demo):
    document, _ = demo
    assert document["state_dict"] == {"keys": 122, "unchanged": True, "same_type": True}
    rows = document["report"]["rows"]
    assert len(rows) == 20 and {row["status"] for row in rows} == {"replaced"}


def test_demo_parity_is_within_twice_stocks_error(demo):
    parity = demo[0]["parity"]
    assert parity["ok"] and parity["exact"] and parity["views"] == 6
    assert parity["limit"] == max(2 * parity["stock_error"], _experiment._FLOOR)
    assert 0 < parity["errors"]["ours"] == parity["ours_error"] <= parity["limit"] < 1e-4


def test_demo_predictions_agree(demo):
    top5 = demo[0]["top5"]
    assert top5["agreement"] == top5["of"] == 5 and top5["same_order"] and top5["same_as_fp64"]
    probabilities = [row["probability"] for row in top5["stock"]]
    assert probabilities == sorted(probabilities, reverse=True) and probabilities[0] > 0.02  # random weights, but not flat
    assert all(re.fullmatch(r"class \d+ \(.+\)", row["label"]) for row in top5["stock"])


def test_demo_speed_has_every_model_and_sane_quantiles(demo):
    speed = demo[0]["speed"]
    assert [row["name"] for row in speed] == ["eager", "eager channels_last", "ours"]
    for row in speed:
        assert 0 < row["best_ms"] <= row["p20_ms"] <= row["median_ms"] <= row["p80_ms"] and len(row["samples_ms"]) == 3
    assert speed[0]["ours_speedup"] == pytest.approx(speed[0]["median_ms"] / speed[2]["median_ms"], rel=0.01)


def test_demo_says_that_weights_are_random(demo):
    document, html = demo
    assert document["weights"]["file"] is None and "Random weights (seed 2015)" in document["weights"]["note"]
    assert "Random weights (seed 2015)" in html


class _Page(HTMLParser):
    """Collects tags, what they would load, and the text."""

    def __init__(self):
        super().__init__()
        self.tags, self.loads, self.handlers, self.text = [], [], [], ""

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.loads += [value for name, value in attributes if name in ("src", "href", "srcset", "data", "action", "poster")]
        self.handlers += [name for name, _ in attributes if name.startswith("on")]

    def handle_data(self, data):
        self.text += data


def test_report_is_self_contained(demo):
    page = _Page()
    page.feed(demo[1])
    assert page.tags.count("img") == 5 and all(value.startswith("data:image/") for value in page.loads)
    assert not {"script", "link", "iframe", "object", "embed", "base"} & set(page.tags) and not page.handlers
    assert "url(" not in demo[1] and "@import" not in demo[1]
    assert "default-src 'none'" in demo[1]


def test_report_escapes_a_hostile_file_name(demo):
    document, html = demo
    assert document["image"]["file"] == HOSTILE.replace("/", "")
    assert "<img src=x" not in html and "&lt;img src=x onerror=alert(1)&gt;&amp;&#34;&#39; $x_1$ [bold].png" in html


def test_report_shows_the_numbers(demo):
    document, html = demo
    page = _Page()
    page.feed(html)
    for text in ("layer4.1.conv2", "conv_bn_add_act", "5 of 5", "20 of 20 conv-bn-act replaced", "all 122 state_dict entries"):
        assert text in page.text
    assert f"{document['speed'][1]['ours_speedup']:.2f}×" in page.text


def test_wrong_numbers_get_no_speed(monkeypatch, tmp_path):
    """An optimized model that is off by a thousandth: exit 1, no speed in JSON and report."""

    def broken(model, **_):
        from dl4ds_kernels.convert import optimize

        result = optimize(model)
        with torch.no_grad():
            result.fc.bias.add_(1e-3 * result.fc.weight.abs().max() * 100)
        return result

    monkeypatch.setattr(_experiment, "optimize", broken)
    code, out, err = invoke(
        "demo", "--model", "resnet18", "--repeats", 1, "--no-compile", "--json", "--html", tmp_path / "r.html"
    )
    document = strict_json(out)
    assert code == 1 and "no speed is given" in err
    assert not document["parity"]["ok"] and document["speed"] == [] and not document["state_dict"]["unchanged"]
    assert "no speed is given" in (tmp_path / "r.html").read_text()


def test_trained_weights_are_loaded_from_both_formats(tmp_path):
    state = _model.make_model("resnet18").state_dict()
    state["fc.bias"] = torch.arange(1000.0)  # makes class 999 the answer to everything
    save_file(state, tmp_path / "w.safetensors")
    torch.save(state, tmp_path / "w.pth")
    for name in ("w.safetensors", "w.pth"):
        model = _model.make_model("resnet18")
        _model.load_weights(model, tmp_path / name)
        assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), state.values(), strict=True))
    code, out, _ = invoke("demo", "--model", "resnet18", "--weights", tmp_path / "w.pth", "--repeats", 1, "--no-compile")
    assert code == 0 and "Random weights" not in out
    assert "toilet tissue" in out and "class 999" not in out  # a name means something now


@pytest.mark.slow
def test_demo_times_torch_compile():
    code, out, err = invoke("demo", "--model", "squeezenet1_0", "--repeats", 2, "--frozen", "--json")
    assert code == 0, err
    document = strict_json(out)
    assert document["parity"]["unavailable"] == {}
    names = [row["name"] for row in document["speed"]]
    assert names == ["eager", "eager channels_last", "torch.compile", "torch.compile frozen", "ours"]


# ------------------------------------------------------------------------------------------------------- demo: bad input


class _Evil:
    def __reduce__(self):
        return (os.mkdir, ("pwned",))


def _files(folder):
    """Files that a user might give by mistake."""
    (folder / "text.png").write_text("not a picture")
    (folder / "cut.png").write_bytes(_photo.default_photo().read_bytes()[:20000])
    Image.new("RGB", (1, 3000)).save(folder / "thin.png")
    torch.save({"epoch": 3, "state_dict": {}}, folder / "nested.pth")
    torch.save(torchvision.models.resnet34().state_dict(), folder / "resnet34.pth")
    torch.save({**torchvision.models.resnet18().state_dict(), "fc.weight": torch.zeros(10, 512)}, folder / "ten.pth")
    (folder / "evil.pth").write_bytes(pickle.dumps(_Evil(), protocol=2))
    (folder / "bad.safetensors").write_bytes(b"\xff" * 64)
    (folder / "cut.pth").write_bytes((folder / "ten.pth").read_bytes()[:5000])


@pytest.fixture(scope="module")
def bad_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    _files(folder)
    return folder


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--image", "{}/missing.png"), "no such file"),
        (("--image", "{}"), "expected a picture, got a folder"),
        (("--image", "{}/text.png"), "not a picture that Pillow can read"),
        (("--image", "{}/cut.png"), "cannot read"),
        (("--image", "{}/thin.png"), "expected sides within 1:20, got 1 x 3000"),
        (("--model", "resnet19"), "such as resnet18"),
        (("--model", "fasterrcnn_resnet50_fpn"), "expected a torchvision classification model"),
        (("--weights", "{}/missing.pth"), "no such file"),
        (("--weights", "{}/nested.pth"), "expected a state_dict (names to tensors)"),
        (("--weights", "{}/resnet34.pth"), "unexpected (layer1.2.conv1.weight"),
        (("--weights", "{}/ten.pth"), "1 of another shape (fc.weight (10, 512) for (1000, 512))"),
        (("--weights", "{}/evil.pth"), "nothing else is read, for safety"),
        (("--weights", "{}/bad.safetensors"), "cannot read"),
        (("--weights", "{}/cut.pth"), "cannot read"),
        (("--device", "tpu"), "expected cpu or cuda, got 'tpu'"),
        (("--repeats", "0"), "Invalid value for '--repeats'"),
        (("--threads", "none"), "Invalid value for '--threads'"),
        (("--nonsense",), "No such option"),
    ],
    ids=lambda value: "-".join(value).replace("{}", "") if isinstance(value, tuple) else None,
)
def test_demo_refuses_bad_input_in_one_message(bad_files, monkeypatch, arguments, message):
    monkeypatch.chdir(bad_files)
    given = {a: b for a, b in zip(arguments[::2], arguments[1::2], strict=False)}
    defaults = {} if "--model" in given or "--nonsense" in arguments else {"--model": "resnet18"}
    flat = [str(x).format(bad_files) for pair in defaults.items() for x in pair] + [a.format(bad_files) for a in arguments]
    code, out, err = invoke("demo", *flat)
    text = " ".join(re.sub(r"[│╭╮╰╯─]", " ", err).split())
    assert code == 2 and message in text and "Traceback" not in err and out == ""
    assert not (bad_files / "pwned").exists()


def test_a_report_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    code, _, err = invoke(
        "demo", "--model", "squeezenet1_0", "--repeats", 1, "--no-compile", "--html", tmp_path / "file" / "x.html"
    )
    assert code == 1 and "cannot write" in err


# ------------------------------------------------------------------------------------------------------------------- parts


def test_preprocessing_is_torchvisions():
    image = _photo.load_photo(_photo.default_photo())
    expected = torchvision.models.ResNet50_Weights.IMAGENET1K_V1.transforms()(image)
    assert torch.equal(_photo.preprocess(image)[0], expected)
    assert [tuple(x.shape) for x in _photo.views(image)] == [(1, 3, 224, 224)] * 6


def test_default_photo_is_inside_the_wheel():
    from importlib.metadata import files

    assert any(str(f).endswith("skimage/data/chelsea.png") for f in files("scikit-image"))
    assert _photo.default_photo().name == "chelsea.png"


def test_random_weights_are_repeatable_and_calibrated():
    image = _photo.load_photo(_photo.default_photo())
    x, logits, scales = _photo.preprocess(image), [], []
    for _ in range(2):
        model = _model.make_model("resnet18")
        _model.randomise(model, image)
        model.layer4[1].register_forward_hook(lambda m, a, out: scales.append(out.std().item()))
        with torch.no_grad():
            logits.append(model(x))
        assert not any(module.training for module in model.modules())
        assert all(m.momentum == 0.1 for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d))
    assert torch.equal(logits[0], logits[1])
    assert 1.0 < logits[0].std() < 10.0 and 0.1 < scales[0] < 10.0


def test_class_names_come_with_torchvision():
    assert _model.class_names("resnet50")[281] == "tabby" and len(_model.class_names("vgg16_bn")) == 1000


def test_plots_survive_odd_numbers():
    """Names with mathematics, classes in one top-5 only, an error of zero and a missing model."""
    rows = [{"class": i, "label": "$\\frac{" * 9, "probability": 0.2} for i in range(5)]
    top5 = {"stock": rows, "ours": [{**row, "class": row["class"] + 3} for row in rows]}
    parity = {"errors": {"eager": 0.0, "torch.compile": None, "ours": 1e-7}, "limit": 1e-6, "ok": True}
    for uri in (_plots.top5_plot(top5), _plots.error_plot(parity)):
        assert uri.startswith("data:image/svg+xml;base64,")


def test_json_has_no_nan(tmp_path):
    assert strict_json(_console.to_json({"a": [float("nan"), 1.5], "b": {"c": float("inf")}})) == {
        "a": [None, 1.5],
        "b": {"c": None},
    }
    path = tmp_path / "deep" / "file.txt"
    _console.write_text(path, "text")
    assert path.read_text() == "text" and [p.name for p in path.parent.iterdir()] == ["file.txt"]


# ------------------------------------------------------------------------------------------------------------------- bench


@pytest.mark.parametrize(
    ("op", "shapes"), [("add_act", "8x6x5"), ("bn_act", "8x6x5"), ("conv_bn_act", "8x6x5"), ("nms", "yolo.98")]
)
def test_bench_writes_table_json_and_csv(kernels, tmp_path, op, shapes):
    compare = "eager" if op == "nms" else "eager,eager_cl"
    arguments = [
        "--op",
        op,
        "--shapes",
        shapes,
        "--rounds",
        2,
        "--backends",
        "cpu,reference",
        "--compare",
        compare,
        "--layout",
        "nchw",
    ]
    code, out, err = invoke("bench", *arguments, "--json", tmp_path / "r.json", "--csv", tmp_path / "r.csv")
    assert code == 0, err
    document = strict_json((tmp_path / "r.json").read_text())
    assert document["op"] == op and document["rounds"] == 2 and document["machine"]["torch"] == torch.__version__
    providers = [*compare.split(","), "cpu", "reference"]
    assert [row["provider"] for row in document["rows"]] == providers
    assert all(row["status"] == "ok" and row["median_ms"] > 0 and row["error"] <= row["limit"] for row in document["rows"])
    rows = list(csv.DictReader((tmp_path / "r.csv").read_text().splitlines()))
    assert [row["provider"] for row in rows] == providers and float(rows[0]["speedup"]) == 1.0
    assert "ours: cpu" in out and shapes in out


def test_bench_prints_json_alone_and_runs_both_passes():
    code, out, err = invoke(
        "bench", "--op", "bn_act", "--shapes", "4x3x3", "--rounds", 1, "--backends", "auto", "--compare", "eager",
        "--pass", "fwd,fwd+bwd", "--dtype", "fp32,fp64", "--layout", "nchw,nhwc", "--batch", 3, "--json", "-",
    )  # fmt: skip
    rows = strict_json(out)["rows"]
    assert code == 0, err
    combinations = {(row["dtype"], row["layout"], row["direction"]) for row in rows}
    assert len(combinations) == 8 and {row["shape"] for row in rows} == {"N3-C4-H3-W3"}


def test_bench_quick_takes_two_shapes():
    code, out, _ = invoke(
        "bench",
        "--op",
        "add_act",
        "--shapes",
        "2x3x3,3x3x3,4x3x3",
        "--quick",
        "--backends",
        "auto",
        "--compare",
        "eager",
        "--json",
        "-",
    )
    document = strict_json(out)
    assert code == 0 and document["rounds"] == 5 and {row["case"] for row in document["rows"]} == {"2x3x3", "3x3x3"}


def test_bench_fails_for_wrong_numbers(monkeypatch, tmp_path):
    from dl4ds_kernels import functional as F

    monkeypatch.setattr(F, "add_act", lambda x, residual, **_: torch.relu(x + residual) * 1.001)
    code, out, err = invoke(
        "bench", "--op", "add_act", "--shapes", "8x6x5", "--rounds", 1, "--backends", "auto", "--compare", "eager"
    )
    assert code == 1 and "auto wrong" in err and "no speed is given" in err
    assert re.search(r"ours: auto\s+wrong", out)


def test_bench_fail_below():
    quick = ("bench", "--op", "add_act", "--shapes", "8x6x5", "--rounds", 1, "--backends", "auto", "--compare", "eager")
    assert invoke(*quick, "--fail-below", 0)[0] == 0
    code, _, err = invoke(*quick, "--fail-below", 1e6)
    assert code == 1 and "below 1000000.0x" in err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_backend_asked_for_that_is_not_there_fails():
    code, _, err = invoke(
        "bench", "--op", "add_act", "--shapes", "8x6x5", "--rounds", 1, "--backends", "cuda", "--compare", "eager"
    )
    assert code == 1 and "needs cuda tensors" in err and "cuda unavailable" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--op", "conv"), "--op: expected one or more of add_act, add3_act, add_bn_act"),
        ((), "expected one of --op"),
        (("--op", "add_act", "--shapes", "resnet"), "--shapes: expected all, resnet50"),
        (("--op", "nms", "--shapes", "resnet50"), "--shapes: nms: expected all, yolo"),
        (("--op", "add_act", "--dtype", "int8"), "--dtype: expected one or more of fp32"),
        (("--op", "add_act", "--layout", "chwn"), "--layout: expected"),
        (("--op", "add_act", "--backends", "mps"), "--backends: expected"),
        (("--op", "add_act", "--compare", ","), "--compare: expected"),
        (("--op", "add_act", "--pass", "bwd"), "--pass: expected"),
        (("--op", "add_act", "--device", "gpu"), "--device: expected cpu or cuda"),
        (("--op", "add_act", "--batch", "0"), "Invalid value for '--batch'"),
    ],
    ids=lambda value: "-".join(value[-2:]) if isinstance(value, tuple) else None,
)
def test_bench_refuses_bad_input(arguments, message):
    code, out, err = invoke("bench", *arguments)
    text = " ".join(re.sub(r"[│╭╮╰╯─]", " ", err).split())
    assert code == 2 and message in text and "Traceback" not in err and out == ""
