"""`vlmops tune`: every choice measured once and kept, sizes, what cannot be had."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from vlmops.backends import choice, native
from vlmops.cli import app
from vlmops.tune import inputs, warm

CPU = torch.device("cpu")


@pytest.fixture
def cache(request):
    native.load()  # from the usual folder, before the tuning cache moves
    return request.getfixturevalue("tuning_cache")


def tune(*options):
    return CliRunner().invoke(app, ["tune", *options])


def test_steps_of_a_tower_and_of_a_whole_model():
    _, steps = inputs.prepare("qwen2-vl-2b-vision", sizes=[56, 112], device=CPU)
    assert [s.name for s in steps] == [
        "1 picture of 56 x 56", "3 pictures of 56 x 56", "1 picture of 112 x 112", "3 pictures of 112 x 112"
    ]  # fmt: skip
    model, steps = inputs.prepare("tiny", sizes=[200], device=CPU)
    assert [s.name for s in steps] == [
        "prefill, 1 picture of 200 x 200", "prefill, 3 pictures of 200 x 200", "decoding, 1 picture of 200 x 200"
    ]  # fmt: skip
    with torch.inference_mode():
        assert steps[1].run(model).logits.shape[0] == 3


@pytest.mark.parametrize("name", sorted(set(inputs.BUILT_IN) - {"clip-l-336"}))  # which has one size, a large one
def test_every_built_in_tower_runs_all_its_steps(name):
    model, steps = inputs.prepare(name, sizes=[64 if name == "pixtral-vision" else 112], device=CPU)
    with torch.inference_mode():
        for step in steps:
            step.run(model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("qwen2-vl-2b-vision", "--image-size", "57"), "multiples of 28"),
        (("clip-l-336", "--image-size", "224"), "336 pixels only"),
        (("./no-such-folder",), "no folder ./no-such-folder"),
        (("tiny", "--dtype", "float8"), "float8"),
        (("tiny", "--device", "tpu:x"), "--device"),
    ],
)
def test_what_cannot_be_had_is_said(cache, options, message):
    result = tune(*options)
    assert result.exit_code == 2 and message in " ".join(result.output.split())


def test_nothing_to_choose_is_said(cache, monkeypatch):
    monkeypatch.setenv("VLMOPS_TUNING", "off")
    assert tune("tiny").exit_code == 2
    monkeypatch.setenv("VLMOPS_TUNING", "on")
    monkeypatch.setenv("VLMOPS_BACKEND", "torch")
    assert tune("tiny").exit_code == 2


def test_a_rehearsal_measures_nothing_and_a_second_run_measures_nothing_again(cache, monkeypatch):
    model, steps = inputs.prepare("tiny", sizes=[64], device=CPU)
    timed = []
    real = choice._measure
    monkeypatch.setattr(choice, "_measure", lambda *args, **kwargs: timed.append(1) or real(*args, **kwargs))
    planned = warm.rehearse(model, steps[:1])
    assert planned and not any(planned.values()) and not timed and not choice.measured()
    first = warm.warm(model, steps[:1], CPU)
    assert len(timed) == len(first) and all(row["new"] and row["choice"] in row["ms"] for row in first)
    # Whether a module is compared with the original depends on what its op measures, which a rehearsal does not know.
    assert {key for key in planned if not key.startswith("module")} <= {row["key"] for row in first}
    choice.forget()  # another process: the file alone remembers
    count = len(timed)
    again = warm.warm(model, steps[:1], CPU)
    assert {row["key"] for row in first if not row["key"].startswith("module")} <= {row["key"] for row in again}
    assert (
        len(timed) - count
        == sum(row["new"] for row in again)
        == sum(row["key"] not in {r["key"] for r in first} for row in again)
    )
    assert all(known for key, known in warm.rehearse(model, steps[:1]).items() if not key.startswith("module"))


def test_an_interrupted_run_keeps_what_it_has(cache):
    model, steps = inputs.prepare("tiny", sizes=[64], device=CPU)

    def stop(model):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        warm.warm(model, [steps[0], inputs.Step("stopped", stop)], CPU)
    choice.forget()
    assert choice.measured()


def test_the_model_stays_stock(cache):
    from vlmops.patch.classes import original_class

    model, steps = inputs.prepare("tiny", sizes=[64], device=CPU)
    warm.rehearse(model, steps[:1])
    assert not any(original_class(module) for module in model.modules())


def test_the_command(cache):
    result = tune("tiny", "--image-size", "64", "--device", "cpu", "--dry-run", "--json")
    assert result.exit_code == 0, result.output
    planned = json.loads(result.stdout)
    assert planned["device"] == "cpu" and str(cache) in planned["cache"] and len(planned["steps"]) == 3
    assert planned["keys"] and not any(row["measured"] for row in planned["keys"])
    result = tune("tiny", "--image-size", "64", "--device", "cpu")
    assert result.exit_code == 0 and "measured now" in result.output and "varlen_attention:cpu" in result.output
    assert "new choices" in result.stderr
