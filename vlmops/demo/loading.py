"""A model, its processor, a picture and a prompt: the embedded ones, or the user's, with clear errors."""

from __future__ import annotations

import os
import socket
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["DemoError", "Subject", "embedded", "load", "load_processor"]


class DemoError(RuntimeError):
    """Something the user asked for cannot be had; the message says what and why."""


@dataclass
class Subject:
    """What is asked about what.

    Attributes:
        name: of the model.
        model: in eval mode, no gradients.
        processor: makes the inputs.
        image: RGB picture.
        source: where the picture comes from.
        prompt: the question, in plain words.
        shown: what is really in the picture, where that is known.
        expected: the right answer, where it is known.
        more: further (question, right answer) pairs.
    """

    name: str
    model: nn.Module
    processor: Any
    image: Image.Image
    source: str
    prompt: str
    shown: str = ""
    expected: str = ""
    more: tuple[tuple[str, str], ...] = ()

    def inputs(self, prompt: str | None = None) -> Mapping[str, Any]:
        """The processor's output for one picture and one question: all of image preprocessing and tokenizing."""
        made = self.processor(images=self.image, text=self.text(prompt or self.prompt), return_tensors="pt")
        dtype = next(self.model.parameters()).dtype
        return {k: v.to(dtype) if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in made.items()}

    def text(self, prompt: str) -> str:
        """The prompt in the model's own chat form."""
        template = getattr(self.processor, "chat_template", None) or getattr(
            self.processor.tokenizer, "chat_template", None
        )
        if template is None:
            return f"USER: {getattr(self.processor, 'image_token', '<image>')}\n{prompt} ASSISTANT:"
        content = [{"type": "image"}, {"type": "text", "text": prompt}]
        message = [{"role": "user", "content": content}]
        return self.processor.apply_chat_template(
            message, chat_template=template, add_generation_prompt=True, tokenize=False
        )

    def answer(self, tokens: torch.Tensor, inputs: Mapping[str, Any]) -> str:
        """The new tokens of ``generate`` as text."""
        return self.processor.tokenizer.decode(
            tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        ).strip()


@contextmanager
def _quiet() -> Iterator[None]:
    """transformers without its progress bars and advice while the demo loads."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _reachable() -> bool:
    """Whether the hub's host answers within seconds; behind a proxy that is for the proxy to say."""
    from huggingface_hub.constants import ENDPOINT

    if urllib.request.getproxies():
        return True
    url = urllib.parse.urlsplit(ENDPOINT)
    try:
        with socket.create_connection(
            (url.hostname or "", url.port or (80 if url.scheme == "http" else 443)), timeout=5
        ):
            return True
    except OSError:
        return False


@contextmanager
def _hub(wanted: bool) -> Iterator[None]:
    """Without the hub (not wanted, or no network) only folders and its cache: asking it would retry for minutes."""
    from huggingface_hub import constants

    offline = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = offline or not (wanted and _reachable())
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = offline


def open_image(path: Path) -> Image.Image:
    """An RGB picture from a file.

    Raises:
        DemoError: no such file, or not a picture.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except FileNotFoundError as err:
        raise DemoError(f"--image: there is no file {path}") from err
    except (UnidentifiedImageError, OSError) as err:
        raise DemoError(f"--image: {path} cannot be read as a picture ({err})") from err


def load_processor(where: str) -> Any:
    """AutoProcessor; where only its video half wants torchvision, the same processor without that half.

    Raises:
        OSError, ValueError, ImportError: as transformers raises them.
    """
    from transformers import AutoConfig, AutoImageProcessor, AutoProcessor, AutoTokenizer
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

    try:
        return AutoProcessor.from_pretrained(where)
    except ImportError as err:
        if "torchvision" not in str(err).lower():
            raise
        config = AutoConfig.from_pretrained(where)
        if (
            type(config) not in PROCESSOR_MAPPING
            or "video_processor" not in PROCESSOR_MAPPING[type(config)].get_attributes()
        ):
            raise
    original = PROCESSOR_MAPPING[type(config)]

    def check(self: Any, name: str, argument: Any) -> Any:
        if name == "video_processor" and argument is None:
            return None
        return original.check_argument_for_proper_class(self, name, argument)

    pictures_only = type(
        original.__name__, (original,), {"check_argument_for_proper_class": check, "__init__": original.__init__}
    )
    tokenizer = AutoTokenizer.from_pretrained(where)
    template = original.get_processor_dict(where)[0].get("chat_template") or tokenizer.chat_template
    return pictures_only(
        image_processor=AutoImageProcessor.from_pretrained(where),
        tokenizer=tokenizer,
        video_processor=None,
        chat_template=template,
    )


def load(where: str, image: Path | None, prompt: str | None, dtype: torch.dtype) -> Subject:
    """A model the user names.

    Args:
        where: folder or hub id.
        image: picture; None: the embedded one.
        prompt: question; None: "Describe the picture."
        dtype: of the weights.

    Raises:
        DemoError: it cannot be had.
    """
    from transformers import AutoModelForImageTextToText

    picture = None if image is None else open_image(image)
    if os.sep in where and not Path(where).exists() and (where.startswith((".", os.sep, "~")) or where.count("/") > 1):
        raise DemoError(f"--model: there is no folder {where}")
    with _quiet(), _hub(wanted=not Path(where).exists()):
        try:
            processor = load_processor(where)
            model = AutoModelForImageTextToText.from_pretrained(where, dtype=dtype)
        except (OSError, ValueError, ImportError, KeyError) as err:
            raise DemoError(f"--model: {where} cannot be loaded: {_reason(err)}") from err
    if picture is None:
        from vlmops.demo.tiny import sample_picture

        picture = sample_picture()[0]
    if not hasattr(processor, "image_processor") or not hasattr(processor, "tokenizer"):
        raise DemoError(
            f"--model: {where} has no processor for pictures and text together: not a vision-language model"
        )
    source = str(image) if image is not None else "the embedded picture"
    model.eval().requires_grad_(False)
    return Subject(where, model, processor, picture, source, prompt or "Describe the picture.")


def _reason(err: Exception) -> str:
    text = str(err).strip()
    if "Unrecognized configuration class" in text:
        return "its architecture is none that transformers loads as an image-text-to-text model"
    first = text.split("\n\n")[0].replace("\n", " ")
    if isinstance(err, OSError) and any(word in text for word in ("connect", "offline", "couldn't find", "Can't load")):
        return f"{first} (no such folder, or no network: pass a local folder)"
    return first or type(err).__name__


def embedded(image: Path | None = None, prompt: str | None = None, dtype: torch.dtype = torch.float32) -> Subject:
    """The tiny LLaVA that comes with the package, and its picture.

    Raises:
        DemoError: the checkpoint is not there.
    """
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    from vlmops.demo import tiny

    if not (tiny.TINY_MODEL_DIR / "config.json").is_file() or not tiny.PICTURE_PATH.is_file():
        raise DemoError(
            f"the embedded model is missing from {tiny.TINY_MODEL_DIR}: run `make tiny-model`, or pass --model"
        )
    with _quiet():
        processor = AutoProcessor.from_pretrained(tiny.TINY_MODEL_DIR)
        model = LlavaForConditionalGeneration.from_pretrained(tiny.TINY_MODEL_DIR, dtype=dtype)
    model.eval().requires_grad_(False)
    size = sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20
    name = f"embedded tiny LLaVA ({size:.1f} MiB)"
    if image is not None:
        return Subject(name, model, processor, open_image(image), str(image), prompt or tiny.DEFAULT_QUESTION)
    kind, seed = tiny.DEFAULT_PICTURE
    known = {q.question: q.answer for q in tiny.sample_questions(kind, seed)[1]}
    picture, question = tiny.sample_picture()
    asked = prompt or question
    more = tuple((q, a) for q, a in known.items() if q != asked)[:3] if prompt is None else ()
    return Subject(
        name, model, processor, picture, "the embedded picture (a combination never seen in training)", asked,
        known.get(tiny.DEFAULT_QUESTION, ""), known.get(asked, ""), more,
    )  # fmt: skip
