"""Procedural pictures with questions and answers: what the tiny model is trained, tested and shown on.

Three kinds of picture are described symbolically (:class:`Picture`), then drawn at any size with Pillow alone:

* ``scene``: one to three coloured shapes, each in its own quadrant;
* ``number``: a two-digit number in Pillow's default font;
* ``chart``: three coloured bars of different heights, values 1 to 8.

Some combinations never occur in the ``train`` split: four (shape, colour) pairs, fifteen numbers and about a tenth
of the ordered bar-value triples. The ``held_out`` split always contains one, so that it measures composition and not
recall. Everything is a function of the ``random.Random`` passed in.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw, ImageFont

Kind = Literal["scene", "number", "chart"]
Split = Literal["train", "held_out"]

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (220, 38, 38),
    "green": (34, 160, 70),
    "blue": (45, 80, 220),
    "yellow": (240, 200, 30),
    "purple": (145, 50, 175),
    "black": (25, 25, 25),
    "orange": (245, 130, 30),
    "cyan": (50, 195, 215),
}
SHAPES = ("circle", "square", "triangle", "cross")
KINDS: tuple[Kind, ...] = ("scene", "number", "chart")
TASKS = ("color", "count", "exist", "ocr", "chart_compare", "chart_value", "describe")

HELD_OUT_PAIRS = frozenset({("circle", "purple"), ("square", "yellow"), ("triangle", "green"), ("cross", "blue")})
HELD_OUT_NUMBERS = frozenset({13, 19, 27, 31, 43, 46, 52, 58, 64, 67, 70, 72, 85, 86, 90})

MAX_VALUE = 8
_CANVAS = 64.0  # layout unit: every coordinate below is out of 64, whatever size is drawn
_QUADRANTS = ((16, 16), (48, 16), (16, 48), (48, 48))
_PAPER = (250, 250, 250)
_BASELINE = 61.0
_UNIT = 7.0  # height of one unit of bar value
_BAR_WIDTH = 13.0


@dataclass(frozen=True)
class Item:
    """One shape: centre ``(x, y)`` and radius, in 64ths of the picture; ``paint`` is an RGB without a name."""

    shape: str
    color: str
    x: float
    y: float
    radius: float
    paint: tuple[int, int, int] | None = None


@dataclass(frozen=True)
class Bar:
    """One bar: left edge in 64ths of the picture and its value, 1 to 8."""

    color: str
    value: int
    left: float


@dataclass(frozen=True)
class Picture:
    """A symbolic picture; exactly one of ``items``, ``number`` and ``bars`` is set, as ``kind`` says."""

    kind: Kind
    items: tuple[Item, ...] = ()
    number: int | None = None
    number_at: tuple[float, float, float] = (0.0, 0.0, 0.0)  # centre x, centre y, font size
    bars: tuple[Bar, ...] = ()


@dataclass(frozen=True)
class Question:
    """A question about a picture, its only accepted answer, and the task it belongs to (one of ``TASKS``)."""

    task: str
    question: str
    answer: str


def triple_is_held_out(values: tuple[int, int, int]) -> bool:
    """Whether this ordered triple of bar values is kept out of training (36 of the 336 are)."""
    return (values[0] + 2 * values[1] + 3 * values[2]) % 8 == 0


def is_held_out(picture: Picture) -> bool:
    """Whether the picture contains a combination that training never sees."""
    if picture.kind == "scene":
        return any((item.shape, item.color) in HELD_OUT_PAIRS for item in picture.items)
    if picture.kind == "number":
        return picture.number in HELD_OUT_NUMBERS
    a, b, c = (bar.value for bar in picture.bars)
    return triple_is_held_out((a, b, c))


# --- drawing lots -----------------------------------------------------------------------------------------------------


def _sample_scene(rng: random.Random, split: Split) -> Picture:
    pairs = [(shape, color) for shape in SHAPES for color in COLORS]
    seen = [pair for pair in pairs if pair not in HELD_OUT_PAIRS]
    count = rng.randint(1, 3)
    if split == "train":
        chosen = rng.sample(seen, count)
    else:
        chosen = [rng.choice(sorted(HELD_OUT_PAIRS)), *rng.sample(seen, count - 1)]
        rng.shuffle(chosen)
    cells = sorted(rng.sample(_QUADRANTS, count), key=lambda at: (at[1], at[0]))  # reading order
    items = tuple(
        Item(shape, color, x + rng.uniform(-4, 4), y + rng.uniform(-4, 4), rng.uniform(8, 12))
        for (shape, color), (x, y) in zip(chosen, cells, strict=True)
    )
    return Picture("scene", items=items)


def sample_practice_scene(rng: random.Random) -> Picture:
    """A training scene whose shapes wear colours that have no name, for the vision tower's pre-training only.

    Among the named colours a training shape's colour says something about its shape (a purple thing is never a
    circle), and a tower taught on nothing else reads shape off colour. Nameless paint breaks that habit without
    showing a held-out pair: every paint is far from all named colours.
    """
    picture = _sample_scene(rng, "train")
    items = []
    for item in picture.items:
        paint = None
        while paint is None:
            mixed = (rng.randint(0, 255), rng.randint(0, 255), rng.randint(0, 255))
            near = [
                sum((a - b) ** 2 for a, b in zip(mixed, named, strict=True)) for named in (*COLORS.values(), _PAPER)
            ]
            paint = mixed if min(near) > 55**2 else None
        items.append(replace(item, paint=paint))
    return replace(picture, items=tuple(items))


def _sample_number(rng: random.Random, split: Split) -> Picture:
    pool = [n for n in range(10, 100) if (n in HELD_OUT_NUMBERS) == (split == "held_out")]
    size = rng.uniform(34, 40)
    at = (rng.uniform(28, 36), rng.uniform(22, 42), size)
    return Picture("number", number=rng.choice(pool), number_at=at)


def _sample_chart(rng: random.Random, split: Split) -> Picture:
    while True:
        a, b, c = rng.sample(range(1, MAX_VALUE + 1), 3)
        if triple_is_held_out((a, b, c)) == (split == "held_out"):
            break
    shift = rng.uniform(-2, 2)
    colors = rng.sample(list(COLORS), 3)
    bars = tuple(Bar(colors[i], value, 6 + 20 * i + shift) for i, value in enumerate((a, b, c)))
    return Picture("chart", bars=bars)


def sample_picture_spec(kind: Kind, rng: random.Random, split: Split = "train") -> Picture:
    """Draw lots for one picture.

    Args:
        kind: ``"scene"``, ``"number"`` or ``"chart"``.
        rng: Source of every choice; the same state gives the same picture.
        split: ``"train"`` never contains a held-out combination, ``"held_out"`` always does.

    Returns:
        The symbolic picture.

    Raises:
        ValueError: If ``kind`` or ``split`` is not one of the above.
    """
    if split not in ("train", "held_out"):
        raise ValueError(f"split must be 'train' or 'held_out', got {split!r}")
    samplers = {"scene": _sample_scene, "number": _sample_number, "chart": _sample_chart}
    if kind not in samplers:
        raise ValueError(f"kind must be one of {KINDS}, got {kind!r}")
    return samplers[kind](rng, split)


# --- drawing ----------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=512)
def _font(size: float) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=size)


def _number_layout(picture: Picture, scale: float) -> tuple[str, tuple[float, float], float, float]:
    """Text, top-left pen position, x where the second digit starts and text width, in pixels."""
    text = str(picture.number)
    x, y, size = picture.number_at
    font = _font(round(size * scale, 1))
    left, top, right, bottom = font.getbbox(text)
    pen = (x * scale - (left + right) / 2, y * scale - (top + bottom) / 2)
    return text, pen, pen[0] + font.getlength(text[0]), right - left


def draw(picture: Picture, size: int = 192) -> Image.Image:
    """Draw a symbolic picture.

    Args:
        picture: What to draw.
        size: Side of the square picture, in pixels. The model's processor resizes to its own input size.

    Returns:
        An RGB image, ``size`` by ``size``.
    """
    scale = size / _CANVAS
    image = Image.new("RGB", (size, size), _PAPER)
    canvas = ImageDraw.Draw(image)
    for item in picture.items:
        box = [(item.x - item.radius) * scale, (item.y - item.radius) * scale]
        box += [(item.x + item.radius) * scale, (item.y + item.radius) * scale]
        fill = item.paint or COLORS[item.color]
        if item.shape == "circle":
            canvas.ellipse(box, fill=fill)
        elif item.shape == "square":
            canvas.rectangle(box, fill=fill)
        elif item.shape == "triangle":
            canvas.polygon([(item.x * scale, box[1]), (box[0], box[3]), (box[2], box[3])], fill=fill)
        else:
            arm = item.radius * scale * 0.3
            canvas.rectangle([box[0], item.y * scale - arm, box[2], item.y * scale + arm], fill=fill)
            canvas.rectangle([item.x * scale - arm, box[1], item.x * scale + arm, box[3]], fill=fill)
    if picture.number is not None:
        text, pen, _, _ = _number_layout(picture, scale)
        canvas.text(pen, text, fill=(20, 20, 20), font=_font(round(picture.number_at[2] * scale, 1)))
    for bar in picture.bars:
        top = _BASELINE - _UNIT * bar.value
        box = [bar.left * scale, top * scale, (bar.left + _BAR_WIDTH) * scale, _BASELINE * scale]
        canvas.rectangle(box, fill=COLORS[bar.color])
    if picture.bars:
        canvas.rectangle([2 * scale, _BASELINE * scale, 62 * scale, (_BASELINE + 1) * scale], fill=(120, 120, 120))
    return image


# --- questions --------------------------------------------------------------------------------------------------------


def _scene_questions(picture: Picture, rng: random.Random, split: Split) -> list[Question]:
    items = picture.items
    present = [(item.shape, item.color) for item in items]
    absent = [(shape, color) for shape in SHAPES for color in COLORS if (shape, color) not in present]
    if split == "train":
        asked, missing = present, [pair for pair in absent if pair not in HELD_OUT_PAIRS]
    else:
        asked = [pair for pair in present if pair in HELD_OUT_PAIRS]
        missing = [pair for pair in absent if pair in HELD_OUT_PAIRS]
    # Half of the absent pairs share a shape or a colour with the picture: "yes" must need both to match at once.
    close = [pair for pair in missing if any(pair[0] == s or pair[1] == c for s, c in present)]
    missing = close if close and rng.random() < 0.5 else missing
    questions = []
    for (shape, color), answer in ((rng.choice(asked), "yes"), (rng.choice(missing), "no")):
        questions.append(Question("exist", f"is there a {color} {shape}?", answer))
    questions.append(Question("count", "how many shapes are there?", str(len(items))))
    shapes = [shape for shape, _ in present]
    for shape, color in asked:
        if shapes.count(shape) == 1:
            questions.append(Question("color", f"what color is the {shape}?", color))
    description = ", ".join(f"{color} {shape}" for shape, color in present) + "."
    questions.append(Question("describe", "describe the picture.", description))
    return questions


def _chart_questions(picture: Picture) -> list[Question]:
    by_value = sorted(picture.bars, key=lambda bar: bar.value)
    questions = [
        Question("chart_compare", "which bar is tallest?", by_value[-1].color),
        Question("chart_compare", "which bar is shortest?", by_value[0].color),
    ]
    for bar in picture.bars:
        questions.append(Question("chart_value", f"what is the value of the {bar.color} bar?", str(bar.value)))
    description = ", ".join(f"{bar.color} {bar.value}" for bar in picture.bars) + "."
    questions.append(Question("describe", "describe the picture.", description))
    return questions


def questions_for(picture: Picture, rng: random.Random, split: Split = "train") -> list[Question]:
    """Every question that can be asked of a picture (for scenes, one "yes" and one "no" existence question).

    Args:
        picture: The symbolic picture.
        rng: Chooses which pair the existence questions name.
        split: In ``"train"`` no question names a held-out (shape, colour) pair; in ``"held_out"`` existence and colour
            are asked of held-out pairs only.

    Returns:
        The questions, each with its task and answer.
    """
    if picture.kind == "scene":
        return _scene_questions(picture, rng, split)
    if picture.kind == "chart":
        return _chart_questions(picture)
    number = str(picture.number)
    return [
        Question("ocr", "what number is written?", number),
        Question("describe", "describe the picture.", f"the number {number}."),
    ]


# --- dense labels -----------------------------------------------------------------------------------------------------

PATCH_HEADS = {
    "color": len(COLORS) + 1,
    "shape": len(SHAPES) + 1,
    "digit": 11,
    "place": 3,
    "value": 9,
    "rank": 4,
    "count": 4,
}
"""Per-patch label heads and their number of classes; class 0 always means "none here"."""

UNLABELLED = -100
"""Label of a patch whose truth has no name (nameless paint); the value cross-entropy ignores."""

BACKGROUND_HEADS = frozenset({"color", "shape", "place"})
"""Heads that must also say "none here"; the others are only asked where there is something to say."""


def patch_labels(picture: Picture, grid: int) -> np.ndarray:
    """What each patch of the picture shows: the teacher of the vision tower's pre-training.

    Args:
        picture: The symbolic picture.
        grid: Patches per side.

    Returns:
        ``[grid * grid, len(PATCH_HEADS)]`` int64 class indices, in the order of ``PATCH_HEADS``. A patch belongs to
        the object whose box holds the patch's centre (for bars: the whole column).
    """
    centers = (np.arange(grid) + 0.5) * (_CANVAS / grid)
    x, y = np.meshgrid(centers, centers)  # [grid, grid], row-major like the vision tower's patches
    labels = np.zeros((grid, grid, len(PATCH_HEADS)), dtype=np.int64)
    color_index = {name: i + 1 for i, name in enumerate(COLORS)}
    half = _CANVAS / grid / 2
    for item in picture.items:
        inside = (abs(x - item.x) < item.radius + half / 2) & (abs(y - item.y) < item.radius + half / 2)
        labels[inside, 0] = color_index[item.color] if item.paint is None else UNLABELLED
        labels[inside, 1] = SHAPES.index(item.shape) + 1
        labels[..., 6] = len(picture.items)
    if picture.number is not None:
        text, pen, middle, width = _number_layout(picture, 1.0)
        rows = abs(y - picture.number_at[1]) < picture.number_at[2] * 0.45
        for place, (low, high) in enumerate(((pen[0] - 1, middle), (middle, pen[0] + width + 3))):
            inside = rows & (x >= low) & (x < high)
            labels[inside, 2] = int(text[place]) + 1
            labels[inside, 3] = place + 1
    order = sorted(bar.value for bar in picture.bars)
    for bar in picture.bars:
        column = (x >= bar.left - half / 2) & (x < bar.left + _BAR_WIDTH + half / 2)
        labels[column, 0] = color_index[bar.color]
        labels[column, 4] = bar.value
        labels[column, 5] = order.index(bar.value) + 1
    return labels.reshape(grid * grid, len(PATCH_HEADS))
