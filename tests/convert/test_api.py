"""Options, errors, the report, restore and idempotence."""

import copy
import json

import pytest
import torch
from convert_models import Block, Net, assert_same, conv_bn, image, seeded, stock_calls
from torch import nn

import dl4ds_kernels as dk
from dl4ds_kernels.convert import REASONS, Report, Row, StrictError

X = image()


class Odd(nn.Module):
    """One chain that is replaced, one whose BatchNorm is a subclass with a forward of its own."""

    class Norm(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x)

    def __init__(self):
        super().__init__()
        self.good = nn.Sequential(*conv_bn(3, 4), nn.ReLU())
        self.bad = nn.Sequential(nn.Conv2d(4, 4, 1), self.Norm(4), nn.ReLU())

    def forward(self, x):
        return self.bad(self.good(x))


def test_rows_and_summary():
    report = dk.optimize(Net()).dl4ds_report
    assert [row.fqn for row in report] == ["stem.0", "blocks.0.conv1", "blocks.0.conv2", "blocks.1.conv1", "blocks.1.conv2"]
    assert report.rows[0].members == ("stem.0", "stem.1", "stem.2")
    assert report.rows[2].members == ("blocks.0.conv2", "blocks.0.bn2", "iadd()", "blocks.0.relu")
    assert [row.pattern for row in report][:3] == ["conv_bn_act", "conv_bn_act", "conv_bn_add_act"]
    assert all(row.status == "replaced" and row.backend for row in report)
    assert report.summary() == "5 of 5 conv-bn-act replaced"
    assert str(report).endswith(report.summary())


def test_report_formats():
    report = dk.analyze(Odd())
    assert report.summary() == "1 of 2 conv-bn-act replaced; 1 kept: 1 SUBCLASS"
    assert json.loads(report.to_json()) == json.loads(json.dumps(report.to_dict()))
    assert report.to_dict()["rows"][1]["reason"] == "SUBCLASS" and len(report) == 2
    markdown = report.to_markdown().splitlines()
    assert markdown[0].startswith("| module") and len(markdown) == 6 and "SUBCLASS" in markdown[3]
    assert "bad.0" in str(report) and "SUBCLASS" in str(report)


def test_summary_of_mixed_reasons():
    kept = [Row("a", "conv_bn_act", ("a",), "kept", reason) for reason in ("HOOKS", "SUBCLASS", "HOOKS")]
    report = Report([Row(str(i), "conv_bn_act", (str(i),), "replaced") for i in range(17)] + kept)
    assert report.summary() == "17 of 20 conv-bn-act replaced; 3 kept: 2 HOOKS, 1 SUBCLASS"
    assert Report().summary().startswith("nothing to replace")
    assert "\\|" in Report([Row("a|b", "bn_act", (), "replaced")]).to_markdown()


def test_every_reason_is_explained():
    assert all(text for text in REASONS.values())


def test_analyze_changes_nothing():
    model = Net()
    before = [dict(vars(module)) for module in model.modules()]
    dk.analyze(model)
    assert [dict(vars(module)) for module in model.modules()] == before


def test_inplace_and_copy():
    model = Net()
    parameters = list(model.parameters())
    fused = dk.optimize(model)
    assert fused is not model and "dl4ds_report" not in vars(model)
    assert not any("forward" in vars(module) for module in model.modules())
    assert not {id(p) for p in fused.parameters()} & {id(p) for p in parameters}
    assert dk.optimize(model, inplace=True) is model
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))


def test_optimize_twice_is_the_same():
    stock = seeded(Net())
    once = dk.optimize(stock)
    twice = dk.optimize(dk.optimize(once), inplace=True)
    assert once.dl4ds_report == twice.dl4ds_report
    with torch.no_grad(), stock_calls() as calls:
        got = twice(X)
    assert not calls
    with torch.no_grad():
        assert_same(got, stock(X))


def test_optimize_again_with_other_options():
    model = dk.optimize(seeded(Net()))
    dk.optimize(model, inplace=True, exclude="blocks")
    assert len(model.dl4ds_report.replaced) == 1
    with torch.no_grad(), stock_calls() as calls:
        model(X)
    assert calls["BatchNorm2d"] == 4


def test_restore():
    stock = seeded(Net())
    model = dk.optimize(copy.deepcopy(stock), inplace=True)
    with torch.no_grad():
        model(X)
    assert dk.restore(model) is model
    for mine, other in zip(model.modules(), stock.modules(), strict=True):
        assert set(vars(mine)) == set(vars(other))
    with torch.no_grad(), stock_calls() as calls:
        got = model(X)
    assert calls["BatchNorm2d"] == 5
    with torch.no_grad():
        assert torch.equal(got, stock(X))
    assert dk.restore(model) is model


@pytest.mark.parametrize(
    ("options", "replaced"),
    [
        ({"exclude": "blocks"}, 1),
        ({"exclude": "blocks.0"}, 3),
        ({"exclude": "blocks.?.conv1"}, 3),
        ({"exclude": ["stem", "blocks.1.bn2"]}, 3),
        ({"exclude": Block}, 1),
        ({"exclude": nn.LeakyReLU}, 4),
        ({"include": "stem"}, 1),
        ({"include": [Block]}, 4),
        ({"include": "blocks.*", "exclude": "*.1.*"}, 2),
        ({"include": "nothing"}, 0),
        ({"filter_fn": lambda module, fqn: fqn != "blocks.0"}, 3),
    ],
)
@pytest.mark.filterwarnings("ignore:.*changed nothing")
def test_include_and_exclude(options, replaced):
    stock = seeded(Net())
    model = dk.optimize(stock, strict=True, **options)  # what the user leaves out does not count
    report = model.dl4ds_report
    assert len(report.replaced) == replaced and {row.reason for row in report.kept} <= {"EXCLUDED"}
    for candidate in (model, copy.deepcopy(model)):
        with torch.no_grad(), stock_calls() as calls:
            got = candidate(X)
        assert calls["BatchNorm2d"] == 5 - replaced
        with torch.no_grad():
            assert_same(got, stock(X))


def test_strict():
    model = Odd()
    with pytest.raises(StrictError, match=r"bad\.0 \(conv_bn_act\): SUBCLASS") as caught:
        dk.optimize(model, strict=True, inplace=True)
    assert len(caught.value.report) == 2
    assert not any("forward" in vars(module) for module in model.modules()) and "dl4ds_report" not in vars(model)
    assert dk.optimize(model, strict=True, exclude="bad").dl4ds_report.replaced


def test_strict_with_an_excluded_forward_that_cannot_be_followed():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.bn = Net(), nn.BatchNorm2d(3)

        def forward(self, x):
            return self.inner(self.bn(x)) if x.sum() > 0 else x

    with pytest.raises(StrictError, match=r"bn \(bn\): UNTRACEABLE"):
        dk.optimize(Outer(), strict=True)
    assert len(dk.optimize(Outer(), strict=True, exclude="bn").dl4ds_report.replaced) == 5


def test_nothing_replaced_is_a_warning():
    with pytest.warns(UserWarning, match="changed nothing: nothing to replace"):
        dk.optimize(nn.Sequential(nn.Conv1d(2, 2, 1), nn.ReLU()))


@pytest.mark.parametrize("inputs", [X, (X,), [X], {"x": X}], ids=["tensor", "tuple", "list", "mapping"])
def test_example_inputs_are_compared(inputs):
    model = seeded(Net())
    model.train()
    model.stem.eval()
    statistics = [b.clone() for b in model.buffers()]
    fused = dk.optimize(model, inputs)
    assert [m.training for m in fused.modules()] == [m.training for m in model.modules()]
    assert all(torch.equal(a, b) for a, b in zip(fused.buffers(), statistics, strict=True))
    dk.optimize(fused, inputs)


def test_parity_error_names_the_output_and_undoes_the_change(monkeypatch):
    from dl4ds_kernels.convert import plan

    monkeypatch.setattr(plan, "run_conv_bn_act", lambda x, conv, bn, act, *rest, **kw: bn(conv(x)) * 1.01)

    class Dictionary(Net):
        def forward(self, x):
            return {"scores": [super().forward(x)]}

    model = seeded(Dictionary())
    with pytest.raises(RuntimeError, match=r"parity: output\['scores'\]\[0\]: the optimized model differs"):
        dk.optimize(model, X, inplace=True)
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: dk.optimize(lambda x: x), TypeError, "expected a torch.nn.Module, got function"),
        (lambda: dk.analyze(None), TypeError, "expected a torch.nn.Module, got NoneType"),
        (
            lambda: dk.optimize(Net(), backend="gpu"),
            ValueError,
            "backend: expected one of auto, cpu, cuda, triton, reference, got 'gpu'",
        ),
        (lambda: dk.optimize(Net(), memory_format="nhwc"), ValueError, "memory_format: expected"),
        (lambda: dk.optimize(Net(), exclude=[3]), TypeError, "expected names or module types, got 3"),
    ],
)
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    "options",
    [
        {"backend": "reference"},
        {"memory_format": "preserve"},
        {"memory_format": torch.channels_last},
        {"exact": True},
        {"memory_efficient": True},
    ],
)
def test_options_reach_copies(options):
    stock = seeded(Net())
    model = dk.optimize(stock, **options)
    for candidate in (model, copy.deepcopy(model)):
        with torch.no_grad():
            assert_same(candidate(X), stock(X))
        assert all(getattr(candidate.stem.forward.options, name) == value for name, value in options.items())


def test_memory_format_preserve_keeps_the_layout():
    model = dk.optimize(seeded(nn.Sequential(*conv_bn(3, 8), nn.ReLU())), memory_format="preserve")
    with torch.no_grad():
        assert model(X).is_contiguous()


def test_backend_that_cannot_serve_raises():
    model = dk.optimize(seeded(Net()), backend="cuda")
    assert {row.backend for row in model.dl4ds_report} == {"cuda"}
    with pytest.raises(RuntimeError, match="cuda"), torch.no_grad():
        model(X)
