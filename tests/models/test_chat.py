"""Prompts with images against transformers' processors: the same ids, the same logits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import transformers as T
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from tests.models.parity import close, randomised
from tests.models.test_vlm import llava_next
from tests.support.tiny_models import IMAGE, build
from vlmops import images
from vlmops.models import from_pretrained
from vlmops.models.chat import chat, places, prompt
from vlmops.models.presets import PRESETS

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} {% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for p in m['content'] %}{% if p['type'] == 'image' %}MARK{% else %}{{ p['text'] }}{% endif %}"
    "{% endfor %}{% endif %} </s>{% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)
SPECIAL = {
    "<unk>": 0,
    "<s>": 1,
    "</s>": 2,
    "[IMG_BREAK]": 304,
    "[IMG_END]": 305,
    "<|vision_start|>": 302,
    "<|vision_end|>": 303,
}

NO_LAYOUT = ("mean", "std", "fill", "resample")  # options of pixels


def photo(height: int, width: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def tokenizer(mark: str, around: tuple[str, str] = ("", "")) -> Any:
    words = ["user", "assistant", "compare", "and", "what", "is", "this", "?", "|", "NEWLINE"]
    vocab = {**SPECIAL, mark: IMAGE, **{w: 10 + i for i, w in enumerate(words)}}
    base = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    base.pre_tokenizer = pre_tokenizers.Whitespace()
    found = T.PreTrainedTokenizerFast(
        tokenizer_object=base, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    found.add_special_tokens({"additional_special_tokens": [mark, *list(SPECIAL)[3:]]})
    found.chat_template = TEMPLATE.replace("MARK", around[0] + mark + around[1])
    return found


def read(theirs: Any, tmp_path: Any) -> Any:
    randomised(theirs).save_pretrained(tmp_path)
    return from_pretrained(tmp_path)


def messages(*photos: Image.Image) -> list[dict]:
    parts: list[dict] = [{"type": "text", "text": "compare "}]
    for image in photos:
        parts += [{"type": "image", "image": image}, {"type": "text", "text": " and "}]
    return [
        {"role": "user", "content": parts},
        {"role": "assistant", "content": "this"},
        {"role": "user", "content": "what ?"},
    ]


def test_llava_next_as_its_processor(tmp_path: Any) -> None:
    theirs, _ = llava_next()
    ours, words = read(theirs, tmp_path), tokenizer("<image>")
    photos = [photo(50, 100), photo(90, 40, 1)]
    inputs = chat(ours, messages(*photos), words)
    processor = T.LlavaNextProcessor(
        LlavaNextImageProcessorPil(
            size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56},
            image_grid_pinpoints=theirs.config.image_grid_pinpoints,
        ),
        words, patch_size=14, vision_feature_select_strategy="default", image_token="<image>", num_additional_image_tokens=1,
    )  # fmt: skip
    text = f"user compare {'<image> and ' * 2} </s>assistant this </s>user what ? </s>assistant "
    want = processor(images=photos, text=text, return_tensors="pt", add_special_tokens=False)
    assert inputs["input_ids"].tolist() == want["input_ids"].tolist()
    with torch.no_grad():
        assert close(ours(**inputs).logits, theirs(**want).logits)


def test_qwen2_vl_as_its_processor(tmp_path: Any) -> None:
    theirs, _ = build("qwen2_vl")
    ours, words = read(theirs, tmp_path), tokenizer("<|image_pad|>", ("<|vision_start|>", "<|vision_end|>"))
    photos = [photo(60, 120), photo(200, 90, 1), photo(70, 70, 2)]
    inputs = chat(ours, messages(*photos), words)
    pixels = Qwen2VLImageProcessorPil(min_pixels=56 * 56, max_pixels=28 * 28 * 1280)(photos, return_tensors="pt")
    assert inputs["images"].grid_thw.tolist() == pixels["image_grid_thw"].tolist()
    ids = inputs["input_ids"]
    runs = (pixels["image_grid_thw"].prod(1) // 4).tolist()
    assert [len(run) for run in "".join("i" if x == IMAGE else " " for x in ids[0].tolist()).split()] == runs
    with torch.no_grad():
        want = theirs(input_ids=ids, mm_token_type_ids=(ids == IMAGE).long(), **pixels).logits
        assert close(ours(**inputs).logits, want)


def test_pixtral_breaks_rows(tmp_path: Any) -> None:
    """Ids by hand (its processor needs torchvision), pixels by its image processor."""
    theirs, _ = build("pixtral")
    ours, words = read(theirs, tmp_path), tokenizer("[IMG]")
    photos = [photo(40, 60), photo(90, 30, 1)]
    inputs = prompt(ours, "what [IMG] and [IMG] this", photos, words, add_special_tokens=False)
    want = PixtralImageProcessorPil(patch_size=16, size={"longest_edge": 64})(photos, return_tensors="pt")
    assert want["image_sizes"].tolist() == [[48, 64], [64, 32]]
    first = ([IMAGE] * 4 + [304]) * 2 + [IMAGE] * 4 + [305]
    second = ([IMAGE] * 2 + [304]) * 3 + [IMAGE] * 2 + [305]
    assert inputs["input_ids"].tolist() == [[14, *first, 13, *second, 16]]
    with torch.no_grad():
        assert close(ours(**inputs).logits, theirs(input_ids=inputs["input_ids"], **want).logits)


def test_paligemma_puts_images_in_front(tmp_path: Any) -> None:
    theirs, _ = build("paligemma")
    ours, words = read(theirs, tmp_path), tokenizer("<image>")
    inputs = prompt(ours, "what is this", [photo(30, 50)], words)
    assert inputs["input_ids"][0, :17].tolist() == [IMAGE] * 16 + [1]
    assert inputs["token_type_ids"].shape == inputs["input_ids"].shape
    with torch.no_grad():
        values = inputs["images"].pixel_values()
        types = torch.zeros_like(inputs["input_ids"])
        want = theirs(input_ids=inputs["input_ids"], pixel_values=values, token_type_ids=types).logits
        assert close(ours(**inputs).logits, want)


def test_places_of_every_preset() -> None:
    """What an image of 1024 x 768 takes in a prompt."""
    found = {}
    for name, preset in PRESETS.items():
        options = {k: v for k, v in preset.config.images.items() if k not in NO_LAYOUT}
        found[name] = places(preset.config, images.layout(768, 1024, **options))
    known = {
        "llava-1.5-7b": 576, "llava-next-mistral-7b": 2340, "blip2": 32, "qwen2-vl-2b": 999, "pixtral-12b": 3120,
        "paligemma2-3b": 256, "flamingo-3b": 1, "flamingo-9b": 1, "qwen-vl": 256, "cogvlm2-19b": 2306, "fuyu-8b": 936,
        "chameleon-7b": 1024,
    }  # fmt: skip
    assert {name: found[name] for name in known} == known


@pytest.mark.parametrize("count", [20, 100])
def test_many_small_images_in_one_prompt(count: int, tmp_path: Any) -> None:
    ours, words = read(build("qwen2_vl")[0], tmp_path), tokenizer("<|image_pad|>")
    photos = [photo(28 + 14 * (i % 3), 40 + i % 7, i) for i in range(count)]
    inputs = prompt(ours, "<|image_pad|> and " * count, photos, words, min_pixels=28 * 28)
    with torch.no_grad():
        logits = ours(**inputs, logits_to_keep=1).logits
    assert bool(logits.isfinite().all()) and len(inputs["images"]) == count


def test_says_what_is_wrong(tmp_path: Any) -> None:
    ours, words = read(build("llava")[0], tmp_path), tokenizer("<image>")
    with pytest.raises(ValueError, match="one for each '<image>'"):
        prompt(ours, "what <image> and <image>", [photo(20, 20)], words)
    with pytest.raises(ValueError, match="image with one of"):
        chat(ours, [{"role": "user", "content": [{"type": "image", "url": "https://example.com/a.png"}]}], words)
    words.chat_template = None
    with pytest.raises(ValueError, match="chat template"):
        chat(ours, messages(), words)
