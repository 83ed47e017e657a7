"""Chats with images anywhere in them, as token ids: what transformers' processors do, for every family and any number of images.

    inputs = chat(vlm, [{"role": "user", "content": [{"type": "text", "text": "Compare "}, {"type": "image", "image": "a.jpg"},
                         {"type": "text", "text": " and "}, {"type": "image", "image": photo}]}], tokenizer)
    ids = vlm.generate(**inputs, max_new_tokens=100)

The tokenizer is any with transformers' interface; its chat template says where an image's mark stands, and the mark becomes as
many tokens as the image has.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from vlmops.images import Layout
from vlmops.models.config import VLMConfig
from vlmops.models.vlm import VLM

__all__ = ["chat", "places", "prompt"]

SOURCES = ("image", "path")  # where a part of a message keeps its image


def chat(
    vlm: VLM, messages: Sequence[Mapping[str, Any]], tokenizer: Any, *, answer: bool = True, **options: Any
) -> dict[str, Any]:
    """A conversation as the inputs of ``forward`` and ``generate``.

    Args:
        vlm: the model.
        messages: {"role", "content"} each; content is a text, or parts {"type": "text", "text"} and {"type": "image", "image"},
            where an image is what ``vlmops.images.prepare`` takes.
        tokenizer: with a chat template (transformers: ``AutoTokenizer``).
        answer: ends with the beginning of the assistant's turn.
        options: of ``vlmops.images.prepare``, in place of the model's own.

    Returns:
        ``input_ids`` [1, L], and ``images`` where there are some.

    Raises:
        TypeError, ValueError: a part that is neither text nor image, an address in place of an image (nothing is downloaded), a
            tokenizer without a template.
    """
    images: list[Any] = []
    plain = [{**message, "content": _content(message.get("content"), images)} for message in messages]
    if getattr(tokenizer, "chat_template", None) is None:
        raise ValueError("tokenizer: expected one with a chat template; without one, write the text yourself: prompt()")
    text = tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=answer)
    return prompt(vlm, text, images, tokenizer, add_special_tokens=False, **options)


def prompt(
    vlm: VLM, text: str, images: Sequence[Any], tokenizer: Any, *, add_special_tokens: bool = True, **options: Any
) -> dict[str, Any]:
    """A text with image marks as the inputs of ``forward`` and ``generate``.

    Args:
        vlm: the model.
        text: the mark of an image is the model's image token, e.g. "<image>" (LLaVA), "<|image_pad|>" (Qwen2-VL), "[IMG]"
            (Pixtral). PaliGemma's images stand in front of the text and need none.
        images: one for each mark.
        tokenizer: transformers' interface: called with a text, ``convert_ids_to_tokens``.
        add_special_tokens: whether the tokenizer adds its own (a template has them already).
        options: of ``vlmops.images.prepare``, in place of the model's own.

    Returns:
        ``input_ids`` [1, L] on the model's device, ``images`` where there are some, and what the family has besides.

    Raises:
        ValueError: another number of marks than of images.
    """
    mark = tokenizer.convert_ids_to_tokens(vlm.config.image_token)
    prepared = vlm.prepare(list(images), **options) if len(images) else None
    layouts = prepared.layouts if prepared is not None else ()
    found: dict[str, Any] = {} if prepared is None else {"images": prepared}
    if vlm.config.family == "paligemma":
        front = "".join(mark * places(vlm.config, x) for x in layouts)
        whole = f"{front}{tokenizer.bos_token}{text.replace(mark, '')}\n"
        ids = tokenizer(whole, add_special_tokens=False)["input_ids"]
        found["token_type_ids"] = torch.zeros(1, len(ids), dtype=torch.int64, device=vlm.device)
    else:
        parts = text.split(mark)
        if len(parts) - 1 != len(layouts):
            raise ValueError(
                f"images: expected one for each {mark!r} of the text, got {len(layouts)} for {len(parts) - 1}"
            )
        spelled = [_spelled(vlm.config, x, mark) for x in layouts]
        whole = parts[0] + "".join(a + b for a, b in zip(spelled, parts[1:], strict=True))
        ids = tokenizer(whole, add_special_tokens=add_special_tokens)["input_ids"]
    return {"input_ids": torch.tensor([ids], dtype=torch.int64, device=vlm.device), **found}


def _content(content: Any, images: list[Any]) -> Any:
    """A message's content with bare image parts, whose images are added to ``images``."""
    if content is None or isinstance(content, str):
        return content
    found = []
    for part in content:
        kind = part.get("type")
        if kind == "text":
            found.append({"type": "text", "text": part["text"]})
        elif kind == "image" and any(name in part for name in SOURCES):
            images.append(next(part[name] for name in SOURCES if name in part))
            found.append({"type": "image"})
        else:
            raise ValueError(
                f"content: expected parts of type text, or image with one of {', '.join(SOURCES)}, got {part!r:.200}"
            )
    return found


def places(config: VLMConfig, layout: Layout) -> int:
    """Tokens of a prompt that an image of this layout takes, breaks between its rows included, marks around it not.

    Args:
        config: of the model.
        layout: of the image, as ``vlmops.images.layout`` or ``Prepared.layouts`` have it.
    """
    kind = "" if config.connector is None else config.connector.kind
    if config.cross is not None:  # the decoder looks at it from outside
        return 1
    if config.connector is not None and kind in ("qformer", "resampler", "perceiver"):
        return config.connector.queries
    if kind == "glu":  # four patches become one, between a begin and an end
        return layout.tokens // 4 + 2
    return layout.tokens // 4 if kind == "pixel_shuffle" else layout.tokens


def _spelled(config: VLMConfig, layout: Layout, mark: str) -> str:
    """An image as its family's processor writes it."""
    style = config.images.get("style")
    if style in ("pixtral", "fuyu"):
        rows, columns = layout.facts["rows"], layout.facts["columns"]
        assert isinstance(rows, int) and isinstance(columns, int)
        row = mark * columns
        return row + f"[IMG_BREAK]{row}" * (rows - 1) + "[IMG_END]" if style == "pixtral" else f"{row}|NEWLINE|" * rows
    before, behind = AROUND.get(config.family, ("", ""))
    return before + mark * places(config, layout) + behind


#: What stands around an image where no chat template writes it.
AROUND = {"qwen_vl": ("<img>", "</img>"), "chameleon": ("<racm3:break>", "<eoss>")}
