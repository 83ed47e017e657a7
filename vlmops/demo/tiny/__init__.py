"""The embedded model: a true LLaVA checkpoint of about 6 MB, trained from nothing by ``scripts/train_tiny_model.py``.

>>> from transformers import AutoProcessor, LlavaForConditionalGeneration
>>> from vlmops.demo.tiny import TINY_MODEL_DIR, sample_picture
>>> processor = AutoProcessor.from_pretrained(TINY_MODEL_DIR)  # offline; torchvision is not needed
>>> model = LlavaForConditionalGeneration.from_pretrained(TINY_MODEL_DIR)
>>> image, question = sample_picture()
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image

    from vlmops.demo.tiny.scenes import Kind, Question, Split

TINY_MODEL_DIR = Path(__file__).parent / "model"
PICTURE_PATH = Path(__file__).parent / "picture.png"
DEFAULT_QUESTION = "describe the picture."
DEFAULT_PICTURE: tuple[Kind, int] = ("chart", 3)  # (kind, seed) of the held-out picture stored at PICTURE_PATH

__all__ = ["DEFAULT_QUESTION", "PICTURE_PATH", "TINY_MODEL_DIR", "build_prompt", "sample_picture", "sample_questions"]


def build_prompt(question: str) -> str:
    """The prompt for one question about one picture, in LLaVA-1.5 form; ``apply_chat_template`` gives the same."""
    return f"USER: <image>\n{question} ASSISTANT:"


def sample_picture() -> tuple[Image.Image, str]:
    """The stored demo picture (a held-out bar chart, 384 by 384) and the default question about it."""
    from PIL import Image

    with Image.open(PICTURE_PATH) as image:
        return image.convert("RGB"), DEFAULT_QUESTION


def sample_questions(
    kind: Kind, seed: int, split: Split = "held_out", size: int = 384
) -> tuple[Image.Image, list[Question]]:
    """Draw a fresh picture and list the questions the model was trained to answer about it.

    Args:
        kind: ``"scene"``, ``"number"`` or ``"chart"``.
        seed: Same seed, same picture and questions.
        split: ``"held_out"`` pictures contain a combination that training never saw, ``"train"`` pictures never do.
        size: Side of the square picture in pixels.

    Returns:
        The RGB picture and its questions with their right answers.
    """
    from vlmops.demo.tiny import scenes

    rng = random.Random(seed)
    picture = scenes.sample_picture_spec(kind, rng, split)
    return scenes.draw(picture, size), scenes.questions_for(picture, rng, split)
