"""The weights that come with the package: each reaches what is stated on pictures that no training has seen."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest
import torch
from _cli import ROOT, invoke, strict_json
from PIL import Image

from dl4ds_kernels import recipes
from dl4ds_kernels.recipes._trained import FOLDER

pytest.importorskip("safetensors", reason="the weights are safetensors files")
SEED = 77_001  # recipes train on seeds 1 and judge on 2


@pytest.mark.parametrize("name", recipes.TRAINED)
def test_reaches_what_is_stated(name: str) -> None:
    room, info = importlib.import_module(f"dl4ds_kernels.recipes.{name}"), recipes.TRAINED[name]
    net = recipes.trained(name)
    assert not net.training and {t.dtype for t in net.parameters()} == {torch.float32}
    data = room.held_out(SEED)
    with torch.no_grad():
        assert room.score(net, *data)[info.metric] >= info.least
        untrained = room.small().eval()
        assert room.score(untrained, *data)[info.metric] < 0.7 * info.least  # the metric can fail


def test_files_are_small_and_shipped() -> None:
    files = sorted(FOLDER.iterdir())
    assert [f.stem for f in files] == sorted(recipes.TRAINED)
    assert sum(f.stat().st_size for f in files) < 800_000
    assert '"weights/*"' in (ROOT / "pyproject.toml").read_text()


@pytest.mark.parametrize("name", recipes.TRAINED)
def test_the_stated_command_makes_such_a_file(name: str, tmp_path: Path) -> None:
    """Its options are the command's; with --quick it writes a file with the same tensors in half precision."""
    from safetensors.torch import load_file

    words = recipes.TRAINED[name].command.split()
    assert words[:3] == ["train", name, "--small"] and words[-1] == f"{name}.safetensors"
    words = [*words[:-1], tmp_path / "w" / words[-1], "--quick", "--out", tmp_path / "run"]
    words[words.index("--epochs") + 1] = "1"
    code, _, err = invoke(*words)
    assert code == 0, err
    made, shipped = load_file(tmp_path / "w" / f"{name}.safetensors"), load_file(FOLDER / f"{name}.safetensors")
    assert {k: (t.shape, t.dtype) for k, t in made.items()} == {k: (t.shape, t.dtype) for k, t in shipped.items()}
    assert {t.dtype for t in made.values()} <= {torch.float16, torch.int64}


def test_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="trained: name: expected one of yolo, unet, hourglass, got 'cifar'"):
        recipes.trained("cifar")
    with pytest.raises(ValueError, match="recipes: small: expected one of yolo, unet, hourglass, got 'cifar'"):
        recipes.make("cifar", small=True)
    with pytest.raises(ValueError, match="unet: data: expected none for the small net"):
        recipes.make("unet", small=True, data="skimage")
    code, _, err = invoke("train", "unet", "--quick", "--save", tmp_path / "a.pt")
    assert code == 2 and "--save: expected a name that ends in .safetensors, got 'a.pt'" in err


def colours(path: Path) -> int:
    with Image.open(path) as image:
        return len(image.convert("RGB").resize((90, 60)).getcolors(9000))


def test_detect_demo(tmp_path: Path) -> None:
    code, out, err = invoke("detect", "--demo", "--panels", tmp_path / "p.png", "--json")
    assert code == 0, err
    document = strict_json(out)
    assert document["model"] == "small YOLO" and "synthetic squares" in document["weights"]["note"]
    found = document["detections"]
    assert {row["class"] for row in found} <= {"square", "disc", "triangle"} and len({row["class"] for row in found}) >= 2
    assert max(row["score"] for row in found) > 0.5 and colours(tmp_path / "p.png") > 100
    code, _, err = invoke("detect", "--demo", "--cfg", "a.cfg")
    assert code == 2 and "--demo: expected no --cfg" in err


def test_segment(tmp_path: Path) -> None:
    code, out, err = invoke("segment", "--panels", tmp_path / "p.png", "--json")
    assert code == 0, err
    document = strict_json(out)
    assert document["iou"] > 0.85 and document["components"] > 10 and colours(tmp_path / "p.png") > 100
    # A user's picture: three bright discs on a dark ground.
    y, x = torch.meshgrid(torch.arange(120.0), torch.arange(160.0), indexing="ij")
    discs = [((x - a) ** 2 + (y - b) ** 2 < 10**2) for a, b in ((40, 40), (110, 35), (80, 90))]
    gray = (40 + 150 * torch.stack(discs).any(0)).byte()
    Image.fromarray(gray.numpy()).save(tmp_path / "$discs$.png")
    code, out, err = invoke("segment", tmp_path / "$discs$.png", "--width", 160, "--panels", tmp_path / "q.png", "--json")
    assert code == 0, err
    document = strict_json(out)
    assert document["components"] == 3 and document["iou"] is None
    assert document["foreground"] == pytest.approx(float((gray > 100).float().mean()), rel=0.25)
    code, _, err = invoke("segment", tmp_path / "none.png")
    assert code == 2 and re.search(r"no such file: .*none.png", " ".join(err.split()))


def test_pose(tmp_path: Path) -> None:
    code, out, err = invoke("pose", "--count", 3, "--panels", tmp_path / "p.png", "--json")
    assert code == 0, err
    document = strict_json(out)
    assert len(document["figures"]) == 3 and document["pck"] >= 0.75 and colours(tmp_path / "p.png") > 100
    assert [joint["joint"] for joint in document["figures"][0]][:2] == ["head", "neck"]
