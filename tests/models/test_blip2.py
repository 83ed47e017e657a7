"""BLIP-2 against transformers': a tower, a Q-Former, OPT."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as T

from tests.models import parity
from vlmops.models import from_pretrained
from vlmops.models.formats.blip2 import read, write
from vlmops.models.shards import CheckpointError

IMAGE, QUERIES = 90, 5
VISION = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=28, patch_size=14
)
QFORMER = dict(hidden_size=24, num_hidden_layers=3, num_attention_heads=4, intermediate_size=40)
TEXT = dict(
    model_type="opt", vocab_size=97, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=64, pad_token_id=0, eos_token_id=2,
)  # fmt: skip


def build(**more: Any) -> Any:
    torch.manual_seed(0)
    config = T.Blip2Config(
        vision_config=VISION, qformer_config=QFORMER, text_config=TEXT,
        **{"num_query_tokens": QUERIES, "image_token_index": IMAGE, **more},
    )  # fmt: skip
    return parity.randomised(T.Blip2ForConditionalGeneration(config), 0.2)


def prompts() -> dict:
    """Two, the second one shorter and padded on the left."""
    rows = [torch.cat([torch.full((QUERIES,), IMAGE), torch.randint(3, 80, (n,))]) for n in (7, 3)]
    ids = torch.stack([torch.cat([torch.zeros(12 - len(row), dtype=torch.int64), row]) for row in rows])
    mask = torch.arange(12)[None] >= torch.tensor([[0], [4]])
    return dict(input_ids=ids, attention_mask=mask.long(), pixel_values=torch.randn(2, 3, 28, 28))


@pytest.fixture(scope="module")
def pair(tmp_path_factory: Any) -> tuple:
    theirs = build()
    return theirs, parity.read(theirs, tmp_path_factory.mktemp("blip2"))


def test_logits(pair: tuple) -> None:
    parity.logits(*pair, prompts())


def test_greedy_tokens(pair: tuple) -> None:
    parity.greedy_tokens(*pair, prompts())


def test_loss_and_gradients(pair: tuple) -> None:
    inputs = prompts()
    labels = inputs["input_ids"].masked_fill((inputs["input_ids"] == IMAGE) | (inputs["attention_mask"] == 0), -100)
    parity.gradients(*pair, inputs, labels)


def test_saves_what_transformers_reads(pair: tuple, tmp_path: Any) -> None:
    parity.saving(*pair, prompts(), tmp_path)


def test_a_float16_file_keeps_its_q_former_in_float32(tmp_path: Any) -> None:
    build().save_pretrained(tmp_path / "whole")
    theirs = T.Blip2ForConditionalGeneration.from_pretrained(tmp_path / "whole", dtype=torch.float16).eval()
    ours = parity.read(theirs, tmp_path / "half")
    assert ours.dtype == torch.float16 and ours.connector.latents.dtype == torch.float32
    assert ours.connector.weight.dtype == torch.float16
    inputs = prompts()
    with torch.no_grad():
        want = theirs(**{**inputs, "pixel_values": inputs["pixel_values"].half()}).logits[
            inputs["attention_mask"].bool()
        ]
        have = ours(**inputs).logits[inputs["attention_mask"].bool()]
    assert have.dtype == torch.float16 and parity.close(have.float(), want.float(), 0.01)


def test_configs() -> None:
    config = read(build().config.to_dict())
    assert read(write(config)) == config
    assert config.class_token and config.layer is None and config.decoder.learned_positions == 64
    bare = read(dict(model_type="blip-2", image_token_index=50265))
    assert (bare.connector.queries, bare.connector.layers, bare.connector.width, bare.vision.width) == (
        32,
        12,
        768,
        1408,
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(image_token_index=None), "image_token_index: expected the token"),
        (dict(qformer_config={**QFORMER, "use_qformer_text_input": True}), "use_qformer_text_input"),
        (dict(text_config=dict(model_type="t5")), "model_type: .*'t5'"),
    ],
)
def test_files_of_other_models(changes: dict, message: str, tmp_path: Any) -> None:
    import json

    values = {**build().config.to_dict(), **changes}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=message):
        from_pretrained(tmp_path)
