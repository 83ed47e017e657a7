"""Measure the embedded model the way anyone would use it: processor, ``generate``, decoded text."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from vlmops.demo.tiny import build_prompt, scenes

if TYPE_CHECKING:
    from PIL import Image

EVALUATION_SEED = 1_000_003
Example = tuple[scenes.Picture, scenes.Question]


def evaluation_set(split: scenes.Split, pictures_per_kind: int, seed: int = EVALUATION_SEED) -> list[Example]:
    """Fresh pictures, each with one random question of every task it allows.

    Args:
        split: ``"train"`` draws new pictures of combinations seen in training, ``"held_out"`` of combinations never
            seen; scenes then ask colour and existence of the unseen pair itself.
        pictures_per_kind: Pictures of each of the three kinds.
        seed: Any seed but the training script's own.

    Returns:
        Pairs of picture and question.
    """
    rng = random.Random(seed)
    examples = []
    for kind in scenes.KINDS:
        for _ in range(pictures_per_kind):
            picture = scenes.sample_picture_spec(kind, rng, split)
            by_task: dict[str, list[scenes.Question]] = {}
            for question in scenes.questions_for(picture, rng, split):
                by_task.setdefault(question.task, []).append(question)
            examples += [(picture, rng.choice(questions)) for questions in by_task.values()]
    return examples


@torch.no_grad()
def answer(
    model: Any, processor: Any, images: Sequence[Image.Image], questions: Sequence[str], batch_size: int = 64
) -> list[str]:
    """Greedy answers through ``generate``.

    Args:
        model: A ``LlavaForConditionalGeneration``.
        processor: Its processor.
        images: One picture per question.
        questions: The questions.
        batch_size: Pictures per ``generate`` call (left-padded).

    Returns:
        The decoded answers, without special tokens.
    """
    answers = []
    for start in range(0, len(images), batch_size):
        prompts = [build_prompt(question) for question in questions[start : start + batch_size]]
        inputs = processor(
            images=list(images[start : start + batch_size]), text=prompts, padding=True, return_tensors="pt"
        ).to(model.device)
        output = model.generate(**inputs, max_new_tokens=24, do_sample=False)
        answers += processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in answers]


def score(
    model: Any, processor: Any, examples: Sequence[Example], picture_size: int = 192
) -> dict[str, tuple[int, int]]:
    """Exact-match scores.

    Args:
        model: A ``LlavaForConditionalGeneration``.
        processor: Its processor.
        examples: What :func:`evaluation_set` returned.
        picture_size: Side at which pictures are drawn before the processor resizes them.

    Returns:
        For each task, right answers and questions asked.
    """
    # Questions of one task have similar prompts and answers, so a batch wastes little on padding.
    ordered = sorted(examples, key=lambda example: scenes.TASKS.index(example[1].task))
    images = [scenes.draw(picture, picture_size) for picture, _ in ordered]
    given = answer(model, processor, images, [question.question for _, question in ordered])
    totals: dict[str, tuple[int, int]] = {}
    for (_, question), text in zip(ordered, given, strict=True):
        right, asked = totals.get(question.task, (0, 0))
        totals[question.task] = (right + (text == question.answer), asked + 1)
    return totals
