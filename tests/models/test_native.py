"""Type D, Fuyu and Chameleon, against transformers'."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers as T
from PIL import Image
from transformers.models.chameleon.image_processing_pil_chameleon import ChameleonImageProcessorPil
from transformers.models.fuyu.image_processing_pil_fuyu import FuyuImageProcessorPil

from tests.models import parity
from vlmops.models import from_pretrained
from vlmops.models.assemblies.native import ChameleonVLM, FuyuVLM
from vlmops.models.config import VqConfig
from vlmops.models.formats import chameleon, fuyu
from vlmops.models.shards import CheckpointError

IMAGE, NEWLINE, SIDE = 90, 91, 4
TEXT = dict(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=64, pad_token_id=0, eos_token_id=2)  # fmt: skip
VQ = dict(base_channels=32, channel_multiplier=[1, 1, 2], num_res_blocks=1, embed_dim=8, latent_channels=8, num_embeddings=16,
          resolution=8)  # fmt: skip
FIRST = 30  # the token of code 15; the others follow


def fuyu_model() -> Any:
    torch.manual_seed(0)
    config = T.FuyuConfig(text_config=dict(model_type="persimmon", **TEXT), patch_size=SIDE, image_token_id=IMAGE)
    return parity.randomised(T.FuyuForCausalLM(config), 0.25)


def padded(*rows: torch.Tensor) -> dict:
    """Prompts padded on the left, as transformers wants them for generation."""
    length = max(len(row) for row in rows)
    ids = torch.stack([torch.cat([torch.zeros(length - len(row), dtype=torch.int64), row]) for row in rows])
    lengths = torch.tensor([[len(row)] for row in rows])
    return dict(input_ids=ids, attention_mask=(torch.arange(length)[None] >= length - lengths).long())


def fuyu_prompts() -> dict:
    """An image of 2 x 3 patches, and one of 1 x 2 with less text."""
    rows = []
    for (h, w), text in (((2, 3), 6), ((1, 2), 3)):
        patches = torch.cat([torch.full((h, w), IMAGE), torch.full((h, 1), NEWLINE)], 1).flatten()
        rows.append(torch.cat([patches, torch.tensor([1]), torch.randint(3, 80, (text,))]))
    return {**padded(*rows), "pixel_values": torch.randn(8, SIDE * SIDE * 3)}


def vocabulary() -> dict[str, int]:
    return {"<image>": IMAGE, "hello": 7, **{chameleon.name_of(code): FIRST + 15 - code for code in range(16)}}


def chameleon_model(**more: Any) -> Any:
    torch.manual_seed(0)
    config = T.ChameleonConfig(**TEXT, num_key_value_heads=4, vq_config=VQ, vocabulary_map=vocabulary(), **more)
    return parity.randomised(T.ChameleonForConditionalGeneration(config), 0.25)


def chameleon_prompts() -> dict:
    """Two images of 2 x 2 tokens, and one with less text."""
    image = torch.full((4,), IMAGE)
    text = [torch.randint(50, 80, (n,)) for n in (4, 3, 5)]
    rows = torch.cat([text[0], image, text[1], image, text[2]]), torch.cat([image, text[0]])
    return {**padded(*rows), "pixel_values": torch.randn(3, 3, 8, 8)}


MODELS = {
    "fuyu": (fuyu_model, fuyu_prompts),
    "chameleon": (chameleon_model, chameleon_prompts),
    "chameleon-swin": (lambda: chameleon_model(swin_norm=True), chameleon_prompts),
}


@pytest.fixture(scope="module", params=MODELS)
def trio(request: Any, tmp_path_factory: Any) -> tuple:
    build, prompts = MODELS[request.param]
    theirs = build()
    return theirs, parity.read(theirs, tmp_path_factory.mktemp(request.param)), prompts()


def test_logits(trio: tuple) -> None:
    parity.logits(*trio)


def test_greedy_tokens(trio: tuple) -> None:
    parity.greedy_tokens(*trio)


def test_loss_and_gradients(trio: tuple) -> None:
    ids, mask = trio[2]["input_ids"], trio[2]["attention_mask"]
    parity.gradients(*trio, ids.masked_fill((ids >= IMAGE) | (mask == 0), -100))


def test_saves_what_transformers_reads(trio: tuple, tmp_path: Any) -> None:
    parity.saving(*trio, tmp_path)


@pytest.fixture(scope="module")
def ours(tmp_path_factory: Any) -> dict[str, Any]:
    built = {"fuyu": fuyu_model(), "chameleon": chameleon_model()}
    return {name: parity.read(model, tmp_path_factory.mktemp(name)) for name, model in built.items()}


def test_fuyu_takes_patches_in_any_form(ours: dict) -> None:
    vlm, inputs = ours["fuyu"], fuyu_prompts()
    patches = inputs.pop("pixel_values")
    want = vlm(**inputs, pixel_values=patches).logits
    indices = torch.full_like(inputs["input_ids"], -1)
    for given in (dict(image_patches=patches), dict(image_patches=[patches[:6], patches[6:]], image_patches_indices=indices),
                  dict(pixel_values=patches[None])):  # fmt: skip
        assert torch.equal(vlm(**inputs, **given).logits, want)
    text = torch.randint(3, 80, (1, 5))
    assert torch.equal(vlm(text, image_patches=[]).logits, vlm(text).logits)


def test_fuyu_reads_images_as_its_processor_cuts_them(ours: dict) -> None:
    """Sizes within the box, on a patch, and beyond the box in either way."""
    vlm, box = ours["fuyu"], (24, 40)
    noise = torch.Generator().manual_seed(0)
    photos = [
        Image.fromarray(torch.randint(0, 256, (h, w, 3), dtype=torch.uint8, generator=noise).numpy())
        for h, w in ((9, 13), (8, 12), (24, 40), (50, 30), (20, 90), (1, 1))
    ]
    size = {"height": box[0], "width": box[1]}
    theirs = FuyuImageProcessorPil(patch_size={"height": SIDE, "width": SIDE}, size=size)
    made = theirs([[photo] for photo in photos])
    prepared = vlm.prepare(photos, box=box)
    rows, tokens = [], []
    for padded, high, wide in zip(
        made["images"], made["image_unpadded_heights"], made["image_unpadded_widths"], strict=True
    ):
        h, w = (-(-int(side[0]) // SIDE) for side in (high, wide))
        rows.append(torch.as_tensor(theirs.patchify_image(padded[0][:, : h * SIDE, : w * SIDE])))
        tokens.append(h * (w + 1))
    assert prepared.tokens.tolist() == tokens
    torch.testing.assert_close(vlm.features(prepared), vlm.features(rows), rtol=1e-5, atol=1e-5)


def test_chameleons_images_are_its_processors(ours: dict) -> None:
    photo = Image.effect_noise((30, 20), 90).convert("RGB")
    theirs = ChameleonImageProcessorPil(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    want = torch.as_tensor(theirs([photo])["pixel_values"][0])
    prepared = ours["chameleon"].prepare([photo])
    torch.testing.assert_close(prepared.pixel_values()[0], want, rtol=0, atol=1e-5)
    assert prepared.tokens.tolist() == [4]
    ids = torch.tensor([[5, IMAGE, IMAGE, IMAGE, IMAGE, 6]])
    given = ours["chameleon"](ids, images=prepared).logits
    torch.testing.assert_close(given, ours["chameleon"](ids, pixel_values=want[None]).logits, rtol=1e-5, atol=1e-5)


def test_fuyus_early_files_are_flat(ours: dict) -> None:
    flat = dict(model_type="fuyu", rope_theta=25000.0, patch_size=SIDE, **TEXT)
    config = fuyu.read(flat)
    assert config.image_token == 71011 and config.decoder.rope_theta == 25000.0 and config.decoder.rotary_factor == 0.5
    assert replace(config, image_token=IMAGE).connector == ours["fuyu"].config.connector
    assert fuyu.read(fuyu.write(config)) == config and FuyuVLM(config).patch_size == SIDE


def test_chameleon_maps_codes_to_tokens_as_transformers(ours: dict) -> None:
    theirs, vlm = chameleon_model(), ours["chameleon"]
    pixels = torch.randn(5, 3, 8, 8)
    tokens = vlm.code_tokens(pixels)
    assert torch.equal(tokens, theirs.get_image_tokens(pixels)) and len(tokens.unique()) > 3
    assert vlm.config.codes[0] == FIRST + 15 and vlm.config.codes[15] == FIRST
    ids = torch.cat([torch.tensor([50]), tokens[0], torch.tensor([51]), tokens[1], tokens[2], torch.tensor([2])])
    codes = vlm.image_codes(ids)
    assert codes.shape == (3, 4) and torch.equal(codes, vlm.tower(pixels)[:3])
    assert torch.equal(vlm.image_codes(torch.stack([ids[:5], ids[5:10]])), codes[:2])
    assert vlm.image_codes(torch.tensor([1, 2, 3])).shape == (0, 4)
    for broken in (ids[:4], ids[2:]):
        with pytest.raises(ValueError, match="images of 4 code tokens each, got 3 of them in a row"):
            vlm.image_codes(broken)


def test_an_image_is_the_tokens_it_is_spelled_with(ours: dict) -> None:
    vlm, inputs = ours["chameleon"], chameleon_prompts()
    pixels = inputs.pop("pixel_values")
    want = vlm(**inputs, pixel_values=pixels).logits
    spelled = inputs["input_ids"].masked_scatter(inputs["input_ids"] == IMAGE, vlm.code_tokens(pixels))
    assert torch.equal(vlm(spelled, inputs["attention_mask"]).logits, want)


def test_chameleon_draws_only_when_told_to(ours: dict) -> None:
    vlm, inputs = copy.deepcopy(ours["chameleon"]).requires_grad_(False), chameleon_prompts()
    codes = torch.tensor(vlm.config.codes)
    vlm.decoder.head[codes] *= 3  # so that it wants to
    plain = vlm.generate(**inputs, max_new_tokens=12, eos_token_id=())
    free = vlm.generate(**inputs, max_new_tokens=12, eos_token_id=(), emit_images=True)
    assert vlm.decoder.emit_images is False
    assert not torch.isin(plain[:, -12:], codes).any() and torch.isin(free[:, -12:], codes).any()
    assert (vlm(**inputs).logits[1, -1, codes] == torch.finfo(torch.float32).min).all()
    vlm.decoder.emit_images = True
    scores = vlm(**inputs).logits[:, -1]
    assert torch.equal(scores.argmax(1), free[:, -12]) and (scores > torch.finfo(torch.float32).min).all()
    assert torch.equal(vlm.generate(**inputs, max_new_tokens=12, eos_token_id=()), free)


def test_the_loss_counts_image_tokens_only_when_it_may_say_them(ours: dict) -> None:
    vlm = ours["chameleon"]
    ids = torch.tensor([50, 60, *vlm.config.codes[:4], 61, 62])
    hidden = vlm.decoder(ids).detach()
    scores = hidden @ vlm.decoder.head.detach().t()

    def mean(which: list[int], among: torch.Tensor) -> torch.Tensor:
        logp = scores.masked_fill(~among, float("-inf")).log_softmax(1)
        return -torch.stack([logp[i, ids[i + 1]] for i in which]).mean()

    text = torch.ones(97, dtype=torch.bool).index_fill(0, torch.tensor(vlm.config.codes), False)
    with torch.no_grad():
        torch.testing.assert_close(vlm.decoder.loss(hidden, ids), mean([0, 5, 6], text), rtol=1e-5, atol=1e-5)
        vlm.decoder.emit_images = True
        try:
            everything = torch.ones(97, dtype=torch.bool)
            torch.testing.assert_close(
                vlm.decoder.loss(hidden, ids), mean(list(range(7)), everything), rtol=1e-5, atol=1e-5
            )
        finally:
            vlm.decoder.emit_images = False


def test_images_that_do_not_fit(ours: dict) -> None:
    vlm, inputs = ours["chameleon"], chameleon_prompts()
    with pytest.raises(ValueError, match="pixel_values: have 8 tokens, the prompts 12 image tokens"):
        vlm(**{**inputs, "pixel_values": inputs["pixel_values"][:2]})
    vlm, inputs = ours["fuyu"], fuyu_prompts()
    with pytest.raises(ValueError, match=r"pixel_values: expected \[N, 48\], got"):
        vlm(**{**inputs, "pixel_values": torch.randn(8, 47)})
    with pytest.raises(ValueError, match="images: expected one of"):
        vlm(**inputs, image_patches=inputs["pixel_values"])
    prepared = vlm.prepare([Image.new("RGB", (16, 16))], patch_size=8)
    with pytest.raises(ValueError, match="images: expected patches of 4"):
        vlm.features(prepared)
    with pytest.raises(ValueError):
        vlm(**{**inputs, "pixel_values": inputs["pixel_values"][:7]})


def test_configs_both_ways() -> None:
    config = chameleon.read(chameleon_model().config.to_dict())
    assert config.vq == VqConfig(16, 8, 8, 32, (1, 1, 2), 1, 32, 8) and config.image_token == IMAGE
    assert chameleon.read(chameleon.write(config)) == config
    assert [chameleon.code_of(chameleon.name_of(code)) for code in (0, 7, 10, 8191)] == [0, 7, 10, 8191]
    assert chameleon.name_of(12) == "IMGIMGBCZ" and chameleon.code_of("IMGIMGBC") == -1 == chameleon.code_of("IMGIMGZ")
    with pytest.raises(ValueError, match="codes: expected a token for each of 16 codes, got 15"):
        ChameleonVLM(replace(config, codes=config.codes[:15]))
    with pytest.raises(ValueError, match="codes: expected tokens of a vocabulary of 97"):
        ChameleonVLM(replace(config, codes=(*config.codes[:15], 97)))
    with pytest.raises(ValueError, match="vq: expected an image tokenizer"):
        chameleon.rules(replace(config, vq=None))
    flat = fuyu.read(fuyu_model().config.to_dict())
    assert fuyu.read(fuyu.write(flat)) == flat
    for changes, message in ((dict(bias=False), "connector: expected no tower"), (dict(in_width=47), "in_width")):
        with pytest.raises(ValueError, match=message):
            fuyu.write(replace(flat, connector=replace(flat.connector, **changes)))


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("chameleon", dict(vocabulary_map=None), "vocabulary_map: expected the tokens of image codes"),
        (
            "chameleon",
            dict(vocabulary_map={"<image>": 4, "IMGIMGAZ": 5}),
            "vocabulary_map: expected a token for each of 16",
        ),
        (
            "chameleon",
            dict(vq_config={**VQ, "double_latent": True}),
            "vq_config: expected double_latent False, got True",
        ),
        ("fuyu", dict(num_channels=4), "num_channels: expected 3, got 4"),
        ("fuyu", dict(text_config=dict(model_type="llama")), "text_config: expected persimmon, got 'llama'"),
    ],
)
def test_files_of_other_models(kind: str, changes: dict, message: str, tmp_path: Any) -> None:
    model = chameleon_model() if kind == "chameleon" else fuyu_model()
    (tmp_path / "config.json").write_text(json.dumps({**model.config.to_dict(), **changes}))
    with pytest.raises(CheckpointError, match=message):
        from_pretrained(tmp_path)


def test_the_real_sizes_are_transformers() -> None:
    """Fuyu-8B's page says 9.41B parameters."""
    for config, build, count in (
        (T.FuyuConfig(), T.FuyuForCausalLM, 9_408_238_592),
        (
            T.ChameleonConfig(vocabulary_map={"<image>": 8711, **{chameleon.name_of(i): 4 + i for i in range(8192)}}),
            T.ChameleonForConditionalGeneration,
            7_043_090_432,
        ),
    ):
        with torch.device("meta"):
            theirs = build(config)
            read = (fuyu if config.model_type == "fuyu" else chameleon).read(config.to_dict())
            mine = (FuyuVLM if config.model_type == "fuyu" else ChameleonVLM)(read)
        assert sum(p.numel() for p in mine.parameters()) == sum(p.numel() for p in theirs.parameters()) == count
