"""Whole models: padding, streams, what is trained, bad inputs, and what loading costs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.models.parity import close, randomised
from tests.models.test_vlm import llava_next, paligemma
from tests.support.tiny_models import IMAGE, TEXT, build, prompt
from vlmops.models import from_pretrained
from vlmops.models.shards import CheckpointError
from vlmops.models.vlm import VLM, pack


@pytest.fixture(scope="module")
def llava(tmp_path_factory: Any) -> tuple[Any, VLM, Path]:
    torch.manual_seed(0)
    theirs = randomised(build("llava")[0])
    folder = tmp_path_factory.mktemp("llava")
    theirs.save_pretrained(folder)
    return theirs, from_pretrained(folder), folder


def test_pack_drops_padding_on_either_side() -> None:
    ids = torch.tensor([[9, 9, 1, 2], [3, 4, 5, 9]])
    packed = pack(ids, (ids != 9).long())
    assert packed.ids.tolist() == [1, 2, 3, 4, 5]
    assert packed.cu_seqlens.tolist() == [0, 2, 5] and packed.cu_seqlens.dtype == torch.int32
    assert packed.places is not None and packed.places.tolist() == [2, 3, 4, 5, 6] and packed.longest == 3
    assert packed.take(ids * 10).tolist() == [10, 20, 30, 40, 50]
    assert pack(ids, torch.ones_like(ids)).places is None
    with pytest.raises(ValueError, match="at least one token in each"):
        pack(ids, torch.tensor([[0, 0, 0, 0], [1, 1, 1, 1]]))
    with pytest.raises(ValueError, match="attention_mask"):
        pack(ids, torch.ones(2, 3))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batches(llava: Any, side: str) -> None:
    theirs, ours, _ = llava
    alone = [prompt([16]), prompt([16, 16])]
    length = max(x.shape[1] for x in alone)
    ids, mask = torch.zeros(2, length, dtype=torch.int64), torch.zeros(2, length, dtype=torch.int64)
    for i, x in enumerate(alone):
        at = slice(length - x.shape[1], None) if side == "left" else slice(None, x.shape[1])
        ids[i, at], mask[i, at] = x[0], 1
    pixels = torch.randn(3, 3, 56, 56)
    inputs = dict(input_ids=ids, attention_mask=mask, pixel_values=pixels)
    with torch.no_grad():
        have, want = ours(**inputs).logits, theirs(**inputs).logits
        last = ours(**inputs, logits_to_keep=1).logits
    real = mask.bool()
    assert close(have[real], want[real])
    assert not have[~real].any()
    assert last.shape == have[:, -1:].shape and close(last, have[:, -1:])  # fewer rows, another kernel
    labels = ids.masked_fill((ids == IMAGE) | ~real, -100)
    labels[
        torch.arange(2), real.int().argmax(1)
    ] = -100  # theirs would learn a row's first token from the padding in front
    assert close(ours(**inputs, labels=labels).loss, theirs(**inputs, labels=labels).loss)
    if side == "left":
        options = dict(max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0)
        assert torch.equal(
            ours.generate(**inputs, max_new_tokens=5, eos_token_id=()), theirs.generate(**inputs, **options)
        )


def test_padded_m_rope(tmp_path: Any) -> None:
    """Two prompts of different lengths, images at different places: positions start anew in each."""
    theirs, inputs = build("qwen2_vl")
    randomised(theirs).save_pretrained(tmp_path)
    ours, ids = from_pretrained(tmp_path), inputs["input_ids"][0]
    short = ids[2:-1]
    batch = torch.zeros(2, ids.shape[0], dtype=torch.int64)
    batch[0], batch[1, ids.shape[0] - short.shape[0] :] = ids, short
    mask = torch.ones_like(batch)
    mask[1, : ids.shape[0] - short.shape[0]] = 0
    images = dict(
        pixel_values=inputs["pixel_values"].repeat(2, 1), image_grid_thw=inputs["image_grid_thw"].repeat(2, 1)
    )
    more = dict(input_ids=batch, attention_mask=mask, **images)
    with torch.no_grad():
        want = theirs(**more, mm_token_type_ids=(batch == IMAGE).long()).logits
        assert close(ours(**more).logits[mask.bool()], want[mask.bool()])


def test_text_alone(llava: Any) -> None:
    theirs, ours, _ = llava
    ids = torch.randint(3, 200, (2, 7))
    with torch.no_grad():
        assert close(ours(ids).logits, theirs(input_ids=ids).logits)
        positions = torch.arange(7)[None].expand(2, -1) * 2
        want = theirs(input_ids=ids, position_ids=positions).logits
        assert close(ours(ids, position_ids=positions).logits, want)


def test_a_prefix_matters(tmp_path: Any) -> None:
    theirs, inputs = paligemma()
    randomised(theirs).save_pretrained(tmp_path)
    ours = from_pretrained(tmp_path)
    causal = {k: v for k, v in inputs.items() if k != "token_type_ids"}
    with torch.no_grad():
        assert not close(ours(**inputs).logits, ours(**causal).logits)


class Words:
    """Decodes a token as one letter."""

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(97 + i % 26) for i in ids)


def test_streams_what_it_generates(llava: Any) -> None:
    _, ours, _ = llava
    ids, pixels = prompt([16]), torch.randn(1, 3, 56, 56)
    whole = ours.generate(ids, max_new_tokens=9, pixel_values=pixels, eos_token_id=())
    assert whole.shape == (1, ids.shape[1] + 9) and torch.equal(whole[:, : ids.shape[1]], ids)
    text = Words().decode(whole[0, ids.shape[1] :].tolist())
    pieces = list(ours.stream(ids, tokenizer=Words(), max_new_tokens=9, pixel_values=pixels, eos_token_id=()))
    assert "".join(pieces) == text and len(pieces) > 1
    stopped = ours.stream(
        ids, tokenizer=Words(), max_new_tokens=9, pixel_values=pixels, stop=[text[4]], eos_token_id=()
    )
    assert "".join(stopped) == text[: text.index(text[4])]
    ends = ours.generate(ids, max_new_tokens=9, pixel_values=pixels, eos_token_id=int(whole[0, ids.shape[1] + 2]))
    assert ends.shape[1] <= ids.shape[1] + 3
    with pytest.raises(ValueError, match="one prompt"):
        ours.stream(ids.expand(2, -1), tokenizer=Words(), max_new_tokens=1)


def test_types_a_and_b(tmp_path: Any) -> None:
    """A: tower frozen; B: all of it; a step of each changes what it should and nothing else."""
    theirs, inputs = llava_next()
    randomised(theirs).save_pretrained(tmp_path)
    ours = from_pretrained(tmp_path)
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == IMAGE, -100)
    for parts in (("connector",), ("connector", "decoder"), ("tower", "connector", "decoder")):
        ours.train_only(*parts)
        ours.zero_grad()
        ours(**inputs, labels=labels).loss.backward()
        touched = {name.partition(".")[0] for name, p in ours.named_parameters() if p.grad is not None}
        assert touched == {*parts, "newline"}
    with pytest.raises(ValueError, match="parts: expected some of tower, connector, decoder"):
        ours.train_only("vision")


def test_bad_inputs(llava: Any) -> None:
    _, ours, _ = llava
    ids, pixels = prompt([16]), torch.randn(1, 3, 56, 56)
    with pytest.raises(ValueError, match="image"):
        ours(ids, pixel_values=torch.randn(2, 3, 56, 56))  # more features than places
    with pytest.raises(TypeError, match="image_patches"):
        ours(ids, pixel_values=pixels, image_patches=pixels)
    with pytest.raises(ValueError, match="no videos"):
        ours(ids, pixel_values_videos=pixels)
    with pytest.raises(ValueError, match="labels"):
        ours(ids, pixel_values=pixels, labels=ids[:, 1:])


# -- checkpoints -------------------------------------------------------------------------------------------------------


def broken(folder: Path, tmp_path: Path, change: Any) -> Path:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    return tmp_path


def test_damaged_checkpoints(llava: Any, tmp_path: Any) -> None:
    _, _, folder = llava
    name = "language_model.model.layers.1.mlp.up_proj.weight"
    cases = {
        "missing": (lambda t: t.pop(name), name),
        "shape": (lambda t: t.update({name: t[name][:5].clone()}), name),
        "more": (lambda t: t.update({"language_model.model.layers.7.x": torch.ones(1)}), "layers.7.x"),
    }
    for what, (change, says) in cases.items():
        there = tmp_path / what
        there.mkdir()
        with pytest.raises(CheckpointError, match=says):
            from_pretrained(broken(folder, there, change))
    cut = tmp_path / "cut"
    cut.mkdir()
    whole = (folder / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    (cut / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(CheckpointError, match="cut short"):
        from_pretrained(cut)


def test_configs_that_are_not_known(llava: Any, tmp_path: Any) -> None:
    _, _, folder = llava
    config = json.loads((folder / "config.json").read_text())
    for change, says in (
        ({"model_type": "something"}, "model_type"),
        ({"text_config": {**config["text_config"], "model_type": "mamba"}}, "mamba"),
        (
            {"text_config": {**config["text_config"], "rope_parameters": {"rope_type": "longrope", "factor": 2}}},
            "rope_type",
        ),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(CheckpointError, match=says):
            from_pretrained(tmp_path)


def test_older_and_newer_names(llava: Any, tmp_path: Any) -> None:
    """transformers has moved LLaVA's tensors twice."""
    _, ours, folder = llava
    older = [("vision_tower.", "vision_tower.vision_model.")]
    newer = [("language_model.lm_head.", "lm_head."), ("language_model.model.", "model.language_model."),
             ("vision_tower.", "model.vision_tower.vision_model."), ("multi_modal", "model.multi_modal")]  # fmt: skip
    for i, names in enumerate((older, newer)):

        def change(tensors: dict, names: Any = names) -> None:
            for name in list(tensors):
                new = next((b + name[len(a) :] for a, b in names if name.startswith(a)), name)
                tensors[new] = tensors.pop(name)

        there = tmp_path / str(i)
        there.mkdir()
        again = from_pretrained(broken(folder, there, change))
        assert all(torch.equal(a, b) for a, b in zip(again.parameters(), ours.parameters(), strict=True))


PEAK = """
import re, sys, torch, vlmops.models as m
def status(name):
    return int(re.search(name + r":\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
from vlmops.models import formats; formats.FORMATS["llava"]
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
vlm = m.from_pretrained(sys.argv[1])
peak = status("VmHWM")
sum(float(p.sum()) for p in vlm.parameters())  # every page is there
print(peak - before, status("VmHWM") - before, sum(p.nbytes for p in vlm.parameters()))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the resident set is read from /proc")
def test_loading_needs_no_second_copy(tmp_path: Any) -> None:
    import transformers as t

    text = {**TEXT, "hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 6, "num_attention_heads": 8}
    vision = dict(
        model_type="clip_vision_model",
        hidden_size=64,
        num_attention_heads=4,
        num_hidden_layers=1,
        image_size=28,
        patch_size=14,
    )
    config = t.LlavaConfig(text_config=dict(text, model_type="llama"), vision_config=vision, image_token_id=IMAGE)
    t.LlavaForConditionalGeneration(config).save_pretrained(tmp_path, max_shard_size="60MB")
    done = subprocess.run([sys.executable, "-c", PEAK, str(tmp_path)], capture_output=True, text=True, check=True)
    loading, reading, weights = map(int, done.stdout.split())
    assert weights > 200 << 20
    assert loading < 1.15 * weights
    assert reading < 1.15 * weights
