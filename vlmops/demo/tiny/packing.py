"""Several questions about one picture in one training sequence, none of which sees another.

Every row is ``<s> USER: <image> x 64`` followed by sibling branches, one per question. A block mask hides the branches
from each other and position ids restart, so each question is trained exactly as it is asked alone, and the image
tokens are paid for once.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from vlmops.demo.tiny import scenes
from vlmops.demo.tiny.architecture import IMAGE_TOKENS

PREFIX = IMAGE_TOKENS + 2  # <s> USER: <image>...


@dataclass
class Conversations:
    """Questions packed per picture, ``[N, T]`` each.

    ``branch`` numbers the question a token belongs to, -1 pads. ``excluded`` is the token that would make a held-out
    pair of a label and its mate (-1: none), which the loss leaves out of the softmax.
    """

    input_ids: Tensor
    labels: Tensor
    positions: Tensor
    branch: Tensor
    excluded: Tensor


def excluded_answers(tokens: list[int], answer_at: int, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """For each token, the token no training picture can have in its place because the pair is held out, or -1.

    A shape's mate is the colour before it; a colour's mate is the shape after it or the one the question names.
    """
    name = tokenizer.convert_tokens_to_ids
    partner: dict[int, int] = {}
    for shape, color in scenes.HELD_OUT_PAIRS:
        partner |= {name("▁" + shape): name("▁" + color), name("▁" + color): name("▁" + shape)}
    shapes, colors = {name("▁" + shape) for shape in scenes.SHAPES}, {name("▁" + color) for color in scenes.COLORS}
    asked = next((token for token in tokens[:answer_at] if token in shapes), -1)
    excluded = [-1] * len(tokens)
    for at in range(answer_at, len(tokens)):
        if tokens[at] in shapes:
            excluded[at] = partner.get(tokens[at - 1], -1)
        elif tokens[at] in colors:
            excluded[at] = partner.get(tokens[at + 1] if tokens[at + 1] in shapes else asked, -1)
    return excluded


def pack_conversations(pictures: list[scenes.Picture], tokenizer: PreTrainedTokenizerFast) -> Conversations:
    """Tokenize up to four questions of each picture as sibling branches after the shared image prefix."""
    rng = random.Random(2)
    assistant = tokenizer.convert_tokens_to_ids("ASSISTANT:")
    rows = []
    for picture in pictures:
        questions = scenes.questions_for(picture, rng, "train")
        ids: list[int] = []
        labels: list[int] = []
        positions: list[int] = []
        branch: list[int] = []
        excluded: list[int] = []
        for number, item in enumerate(rng.sample(questions, min(4, len(questions)))):
            text = f"\n{item.question} ASSISTANT: {item.answer}</s>"
            tokens = tokenizer.encode(text, add_special_tokens=False)
            answer_at = tokens.index(assistant) + 1
            ids += tokens
            labels += [-100] * answer_at + tokens[answer_at:]
            positions += range(PREFIX, PREFIX + len(tokens))
            branch += [number] * len(tokens)
            excluded += excluded_answers(tokens, answer_at, tokenizer)
        rows.append((ids, labels, positions, branch, excluded))
    width = max(len(row[0]) for row in rows)
    fill = (tokenizer.pad_token_id, -100, 0, -1, -1)
    return Conversations(
        *(torch.tensor([row[i] + [fill[i]] * (width - len(row[i])) for row in rows]) for i in range(5))
    )


def block_mask(branch: Tensor) -> Tensor:
    """Boolean attention mask ``[B, 1, PREFIX + T, PREFIX + T]``: causal, and no branch sees another branch."""
    group = F.pad(branch, (PREFIX, 0), value=-2)  # [B, S]; the image prefix is group -2
    same = (group[:, :, None] == group[:, None, :]) | (group[:, None, :] == -2)
    causal = torch.ones(group.shape[1], group.shape[1], dtype=torch.bool).tril()
    return (same & causal)[:, None]
