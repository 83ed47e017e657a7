"""`vlmops demo`: end to end on tiny models, offline, without torchvision; and what it says when it cannot."""

from __future__ import annotations

import contextlib
import json

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from vlmops.cli import app
from vlmops.demo import loading, tiny
from vlmops.demo import towers as true_size
from vlmops.profiling.stages import STAGES

HAS_MODEL = (tiny.TINY_MODEL_DIR / "config.json").is_file()


def demo(*args):
    return CliRunner().invoke(app, ["demo", *args])


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    path = tmp_path_factory.mktemp("picture") / "red.png"
    image = Image.new("RGB", (120, 90), (250, 250, 250))
    image.paste((220, 30, 40), (20, 20, 70, 70))
    image.save(path)
    return path


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    """A LLaVA checkpoint folder with random weights."""
    from vlmops.demo.tiny.architecture import build_model, build_processor, build_tokenizer

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("llava")
    build_processor().save_pretrained(folder)
    build_model(build_tokenizer()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    """A Qwen2-VL checkpoint folder with random weights, as the hub has them: its processor also names a video half."""
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    from vlmops.demo.tiny.architecture import build_tokenizer

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("qwen")
    tokenizer = build_tokenizer()
    names = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": names})
    tokenizer.chat_template = (
        "{% for m in messages %}{% for p in m['content'] %}{% if p['type'] == 'image' %}<|vision_start|><|image_pad|>"
        "<|vision_end|>{% else %}{{ p['text'] }}{% endif %}{% endfor %}{% endfor %}"
    )
    tokenizer.save_pretrained(folder)
    Qwen2VLImageProcessorPil(min_pixels=56 * 56, max_pixels=112 * 112).save_pretrained(folder)
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "processor_class": "Qwen2VLProcessor"}))
    image, video, start, end = (tokenizer.convert_tokens_to_ids(n) for n in names)
    text = dict(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, rope_parameters={"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4},
        bos_token_id=2, eos_token_id=3, pad_token_id=0,
    )  # fmt: skip
    config = Qwen2VLConfig(
        text_config=text, vision_config=dict(depth=2, embed_dim=64, hidden_size=64, num_heads=4),
        image_token_id=image, video_token_id=video, vision_start_token_id=start, vision_end_token_id=end,
    )  # fmt: skip
    Qwen2VLForConditionalGeneration(config).save_pretrained(folder)
    return folder


def check(data):
    assert data["same_answers"] is True
    assert all(row["same"] and row["stock"] == row["patched"] for row in data["questions"])
    assert 0 <= data["logits"]["max_difference"] < 1e-3 * max(1.0, data["logits"]["max_logit"])
    stages = {row["stage"]: row for row in data["stages"]}
    assert set(stages) == set(STAGES)
    for row in stages.values():
        assert row["stock_ms"] > 0 and row["patched_ms"] > 0
        assert row["low"] <= row["ratio"] <= row["high"]
    assert data["rounds"] >= 7
    patched = [row for row in data["patch"]["rows"] if row["status"] == "patched"]
    assert {"mlp", "varlen_attention", "patchify"} <= {row["operation"] for row in patched}


@pytest.mark.parametrize("family", ["llava", "qwen"])
def test_a_users_model(family, request, picture):
    folder = request.getfixturevalue(family)
    options = ["--image", str(picture), "--prompt", "what color is the square?", "--no-towers", "--max-new-tokens", "4"]
    result = demo("--model", str(folder), *options, "--json")
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    check(data)
    assert data["picture"]["size"] == [120, 90]
    assert data["questions"][0]["question"] == "what color is the square?"


@pytest.mark.skipif(not HAS_MODEL, reason="the embedded model is not trained yet: make tiny-model")
def test_the_embedded_model():
    result = demo("--no-towers", "--json")
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    check(data)
    assert data["picture"]["shows"]
    assert data["questions"][0]["patched"] == data["questions"][0]["expected"]


def test_the_screen_has_every_part(llava, picture):
    result = demo("--model", str(llava), "--image", str(picture), "--no-towers", "--max-new-tokens", "3")
    assert result.exit_code == 0, result.output
    for word in (
        "stock ms",
        "patched ms",
        "ratio",
        "image preprocessing",
        "decode, per token",
        "what was patched",
        "logits",
    ):
        assert word in result.stdout


def test_true_dimensions(monkeypatch):
    lines = []
    monkeypatch.setattr(true_size, "SHOWN", {"clip_l_336": ("CLIP-L/14-336", 64)})
    rows = true_size.measure(full=False, rounds=7, threads=1, progress=lines.append, layers=1)
    assert len(lines) == sum("ratio" in row for row in rows)
    for row in (row for row in rows if "ratio" in row):
        assert row["ratio"] > 0
        assert row["cosine"] > 0.999
        assert row["max_difference"] <= 2 * row["stock_difference"] + 2e-2 * row["max_value"]


def test_wrong_tower_is_reported_not_timed(monkeypatch):
    monkeypatch.setattr(true_size, "SHOWN", {"clip_l_336": ("CLIP-L/14-336", 64)})
    monkeypatch.setattr(true_size, "DTYPES", {"fp32": torch.float32})

    def spoiled(module):
        module.post_layernorm = torch.nn.Identity()
        module.encoder.layers[0].mlp.fc2.weight = torch.nn.Parameter(
            module.encoder.layers[0].mlp.fc2.weight * 3, requires_grad=False
        )
        return module

    monkeypatch.setattr(true_size.vlmops, "patch_model", spoiled)
    (row,) = true_size.measure(full=False, rounds=7, threads=1, progress=lambda line: None, layers=1)
    assert row["wrong"] is True
    assert "ratio" not in row


def text_only(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    from vlmops.demo.tiny.architecture import build_tokenizer

    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    build_tokenizer().save_pretrained(tmp_path)
    return tmp_path


def test_errors_say_what_is_wrong(tmp_path, llava):
    broken = tmp_path / "notes.png"
    broken.write_text("not a picture")
    empty = tmp_path / "empty"
    empty.mkdir()
    words = tmp_path / "words"
    words.mkdir()
    cases = [
        (["--model", str(tmp_path / "missing")], "there is no folder"),
        (["--model", str(empty)], "cannot be loaded"),
        (["--model", "nobody/no-such-model"], "cannot be loaded"),
        (["--model", str(text_only(words))], "cannot be loaded"),
        (["--model", str(llava), "--image", str(tmp_path / "missing.png")], "there is no file"),
        (["--model", str(llava), "--image", str(broken)], "cannot be read as a picture"),
    ]
    for options, message in cases:
        result = demo(*options, "--no-towers")
        assert result.exit_code == 2, (options, result.output)
        assert message in result.output, (options, result.output)
        assert "Traceback" not in result.output
    assert demo("--dtype", "int3").exit_code == 2


@pytest.mark.parametrize("network", [False, True])
def test_the_hub_is_asked_only_where_there_is_a_network(monkeypatch, tmp_path, network):
    """Without one every file of a model would be tried six times: minutes until the error."""
    from huggingface_hub import constants

    def connect(*args, **kwargs):
        if not network:
            raise OSError("no network")
        return contextlib.nullcontext()

    seen = []

    def processor(where):
        seen.append(constants.HF_HUB_OFFLINE)
        raise OSError("Can't load it")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(loading.urllib.request, "getproxies", dict)
    monkeypatch.setattr(loading.socket, "create_connection", connect)
    monkeypatch.setattr(loading, "load_processor", processor)
    for where in ("nobody/no-such-model", str(tmp_path)):  # a folder needs no network
        with pytest.raises(loading.DemoError, match="pass a local folder"):
            loading.load(where, None, None, torch.float32)
    assert seen == [not network, True]
    assert constants.HF_HUB_OFFLINE is False


def test_a_missing_embedded_model_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr(tiny, "TINY_MODEL_DIR", tmp_path)
    with pytest.raises(loading.DemoError, match="make tiny-model"):
        loading.embedded()
