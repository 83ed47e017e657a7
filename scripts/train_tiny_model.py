"""Train the demo's embedded vision-language model from nothing, on procedurally drawn pictures.

    python scripts/train_tiny_model.py                  # a few minutes on two cores -> vlmops/demo/tiny/model
    python scripts/train_tiny_model.py --quick --out /tmp/tiny   # a smoke run: same files, useless answers

The result is an ordinary LLaVA checkpoint folder (CLIP vision tower, MLP projector, Llama decoder, word-level
tokenizer) that ``AutoProcessor`` and ``LlavaForConditionalGeneration`` load offline. Training has two stages:

1. the vision tower alone learns to say, patch by patch, what the generator drew there. The loss is attached to the
   very features LLaVA hands to the projector (``hidden_states[-2]`` without the class token);
2. the tower is frozen and its features cached; the projector and the decoder learn to answer questions. Several
   questions share one picture in one sequence: a block mask keeps them from seeing each other and position ids restart,
   so each is trained exactly as it is asked alone, and the 64 image tokens are paid for once.

Everything is bounded by steps and seeded: the same machine and thread count give the same bytes.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: spinning threads are ten times slower on busy cores

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from PIL import Image  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from transformers import (  # noqa: E402
    AutoProcessor,
    GenerationConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from vlmops.demo import tiny  # noqa: E402
from vlmops.demo.tiny import scenes  # noqa: E402
from vlmops.demo.tiny.architecture import (  # noqa: E402
    GRID,
    HIDDEN_SIZE,
    IMAGE_SIZE,
    build_model,
    build_processor,
)
from vlmops.demo.tiny.evaluation import evaluation_set, score  # noqa: E402
from vlmops.demo.tiny.packing import PREFIX, Conversations, block_mask, pack_conversations  # noqa: E402

HEAD_WEIGHTS = {"digit": 2.0, "shape": 4.0}  # the slow learners
TASK_NAMES = {
    "color": "colour of a shape",
    "count": "number of shapes",
    "exist": "is there a ...?",
    "ocr": "two-digit number",
    "chart_compare": "tallest / shortest bar",
    "chart_value": "value of a bar",
    "describe": "describe the picture",
}


@dataclass(frozen=True)
class Recipe:
    """How much of everything; ``QUICK`` exercises the same code in seconds."""

    pictures: dict[scenes.Kind, int]
    practice: int  # scenes with nameless colours, stage 1 only
    vision_steps: int
    text_steps: int
    vision_batch: int = 32
    text_batch: int = 32
    vision_lr: tuple[float, float] = (1e-2, 2e-3)  # Muon, AdamW
    text_lr: tuple[float, float] = (1e-2, 2e-3)
    evaluate: int = 400  # pictures of each kind and split


FULL = Recipe({"scene": 11000, "number": 4000, "chart": 4000}, practice=8000, vision_steps=1000, text_steps=850)
QUICK = Recipe(
    {"scene": 16, "number": 16, "chart": 16},
    practice=16,
    vision_steps=2,
    text_steps=2,
    vision_batch=8,
    text_batch=8,
    evaluate=1,
)


# --- data -------------------------------------------------------------------------------------------------------------


def draw_training_pictures(recipe: Recipe) -> tuple[list[scenes.Picture], Tensor]:
    """Training pictures in random order, practice scenes last, and their pixels, uint8 ``[N, 64, 64, 3]``."""
    rng = random.Random(1)
    kinds = [kind for kind, count in recipe.pictures.items() for _ in range(count)]
    rng.shuffle(kinds)
    pictures = [scenes.sample_picture_spec(kind, rng, "train") for kind in kinds]
    pictures += [scenes.sample_practice_scene(rng) for _ in range(recipe.practice)]
    size = (IMAGE_SIZE, IMAGE_SIZE)
    pixels = [
        np.asarray(scenes.draw(picture, rng.choice((128, 192, 256))).resize(size, Image.Resampling.BICUBIC))
        for picture in pictures
    ]
    return pictures, torch.from_numpy(np.stack(pixels))


def normalize(pixels: Tensor, processor: LlavaProcessor) -> Tensor:
    """uint8 ``[B, H, W, 3]`` to the float ``[B, 3, H, W]`` the processor would give (it resizes the same way)."""
    mean = torch.tensor(processor.image_processor.image_mean)
    std = torch.tensor(processor.image_processor.image_std)
    return ((pixels.float() / 255 - mean) / std).permute(0, 3, 1, 2).contiguous()


# --- training ---------------------------------------------------------------------------------------------------------


class Trainer:
    """Muon for the matrices inside blocks, AdamW for the rest; warm-up, cosine decay, clipping; prints the loss.

    Muon matters here: at the same number of steps AdamW leaves the vision tower far from reading digits.
    """

    def __init__(self, name: str, named: list[tuple[str, nn.Parameter]], lr: tuple[float, float], steps: int) -> None:
        """``named`` are the parameters to train with their names; ``lr`` is (Muon, AdamW)."""
        self.name, self.steps = name, steps
        self.parameters = [parameter for _, parameter in named]
        in_block = [p.ndim == 2 and (".layers." in key or "multi_modal_projector" in key) for key, p in named]
        matrices = [p for p, yes in zip(self.parameters, in_block, strict=True) if yes]
        rest = [p for p, yes in zip(self.parameters, in_block, strict=True) if not yes]
        self.optimizers = [
            torch.optim.Muon(matrices, lr=lr[0], weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(rest, lr=lr[1], weight_decay=0.1, betas=(0.9, 0.98)),
        ]
        self.lr, self.step_index, self.losses, self.started = lr, 0, [], time.perf_counter()

    def step(self, loss: Tensor) -> None:
        """One optimiser step on ``loss``."""
        done = self.step_index / self.steps
        factor = min(1.0, (self.step_index + 1) / 50) * (0.02 + 0.98 * (1 + math.cos(math.pi * done)) / 2)
        for optimizer, lr in zip(self.optimizers, self.lr, strict=True):
            optimizer.zero_grad(set_to_none=True)
            for group in optimizer.param_groups:
                group["lr"] = lr * factor
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
        self.losses.append(loss.item())
        self.step_index += 1
        if self.step_index % 100 == 0 or self.step_index == self.steps:
            recent = sum(self.losses[-100:]) / len(self.losses[-100:])
            seconds = time.perf_counter() - self.started
            print(f"  {self.name} step {self.step_index}/{self.steps}  loss {recent:.4f}  {seconds:.0f} s", flush=True)


def patch_features(model: LlavaForConditionalGeneration, pixel_values: Tensor) -> Tensor:
    """The features LLaVA gives to its projector, ``[B, IMAGE_TOKENS, hidden_size]``."""
    tower = model.model.vision_tower
    hidden_states = tower.pre_layrnorm(tower.embeddings(pixel_values))
    for layer in tower.encoder.layers[:-1]:  # hidden_states[-2], without computing the last layer nobody reads
        hidden_states = layer(hidden_states, attention_mask=None)
    return hidden_states[:, 1:]


def held_out_classes() -> Tensor:
    """Boolean ``[shape classes, colour classes]``, true where a pair of patch classes is held out."""
    table = torch.zeros(scenes.PATCH_HEADS["shape"], scenes.PATCH_HEADS["color"], dtype=torch.bool)
    for shape, color in scenes.HELD_OUT_PAIRS:
        table[scenes.SHAPES.index(shape) + 1, list(scenes.COLORS).index(color) + 1] = True
    return table


def train_vision(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    pictures: list[scenes.Picture],
    pixels: Tensor,
    recipe: Recipe,
) -> None:
    """Stage 1: per-patch classification of what the generator drew."""
    labels = torch.from_numpy(np.stack([scenes.patch_labels(picture, GRID) for picture in pictures]))  # [N, P, heads]
    for i, name in enumerate(scenes.PATCH_HEADS):
        if name not in scenes.BACKGROUND_HEADS:
            labels[..., i][labels[..., i] == 0] = scenes.UNLABELLED
    sizes = list(scenes.PATCH_HEADS.values())
    head = nn.Sequential(nn.LayerNorm(HIDDEN_SIZE), nn.Linear(HIDDEN_SIZE, sum(sizes)))
    named = [*model.model.vision_tower.named_parameters(), *head.named_parameters()]
    trainer = Trainer("vision", named, recipe.vision_lr, recipe.vision_steps)
    lots = torch.Generator().manual_seed(3)
    excluded = held_out_classes()
    mates = {"color": ("shape", excluded), "shape": ("color", excluded.T)}
    index = {name: i for i, name in enumerate(scenes.PATCH_HEADS)}
    for _ in range(recipe.vision_steps):
        chosen = torch.randint(len(pixels), (recipe.vision_batch,), generator=lots)
        logits = head(patch_features(model, normalize(pixels[chosen], processor))).split(sizes, dim=-1)
        loss = torch.zeros(())
        for i, (name, part) in enumerate(zip(scenes.PATCH_HEADS, logits, strict=True)):
            target = labels[chosen, :, i].flatten()
            if name in mates:  # that a pair never occurs is no evidence against it
                mate, table = mates[name]
                part = part.masked_fill(table[labels[chosen, :, index[mate]].clamp(min=0)], -1e4)
            if (target >= 0).any():
                loss = loss + F.cross_entropy(part.flatten(0, 1), target) * HEAD_WEIGHTS.get(name, 1.0)
        trainer.step(loss)
    some = torch.arange(0, len(pixels), max(1, len(pixels) // 512))  # training pictures: progress, not a result
    with torch.no_grad():
        logits = head(patch_features(model, normalize(pixels[some], processor))).split(sizes, dim=-1)
    for i, (name, part) in enumerate(zip(scenes.PATCH_HEADS, logits, strict=True)):
        truth = labels[some, :, i]
        right = (part.argmax(-1) == truth)[truth > 0].float().mean().item()
        print(f"  patches labelled right, {name}: {right:.3f}")


def packed_hidden_states(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    features: Tensor,
    packed: Conversations,
    chosen: Tensor,
) -> Tensor:
    """Decoder outputs ``[B, PREFIX + T, hidden]`` for patch features and packed questions of the ``chosen`` rows."""
    tokenizer, inner = processor.tokenizer, model.model
    opening = torch.tensor([tokenizer.bos_token_id, tokenizer.convert_tokens_to_ids("USER:")])
    embed = inner.language_model.embed_tokens
    parts = [embed(opening).expand(len(chosen), -1, -1), inner.multi_modal_projector(features)]
    shared = torch.arange(PREFIX).expand(len(chosen), -1)
    return inner.language_model(
        inputs_embeds=torch.cat([*parts, embed(packed.input_ids[chosen])], dim=1),
        attention_mask=block_mask(packed.branch[chosen]),
        position_ids=torch.cat([shared, packed.positions[chosen]], dim=1),
        use_cache=False,
    ).last_hidden_state


def train_text(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    pictures: list[scenes.Picture],
    pixels: Tensor,
    recipe: Recipe,
) -> None:
    """Stage 2: projector and decoder on cached features of the frozen tower."""
    tokenizer = processor.tokenizer
    pictures = pictures[: len(pictures) - recipe.practice]
    pixels = pixels[: len(pictures)]
    with torch.no_grad():
        features = torch.cat([patch_features(model, normalize(part, processor)) for part in pixels.split(256)])
    packed = pack_conversations(pictures, tokenizer)
    named = [item for item in model.named_parameters() if "vision_tower" not in item[0]]
    trainer = Trainer("text", named, recipe.text_lr, recipe.text_steps)
    lots = torch.Generator().manual_seed(4)
    for _ in range(recipe.text_steps):
        chosen = torch.randint(len(pixels), (recipe.text_batch,), generator=lots)
        hidden = packed_hidden_states(model, processor, features[chosen], packed, chosen)
        target = packed.labels[chosen][:, 1:]  # a token's successor is in the same branch wherever the label is kept
        kept = target >= 0
        logits = model.lm_head(hidden[:, PREFIX:-1][kept])  # [kept answers, vocabulary]
        excluded = packed.excluded[chosen][:, 1:][kept]
        logits = logits.masked_fill(excluded[:, None] == torch.arange(logits.shape[1]), -1e4)
        trainer.step(F.cross_entropy(logits, target[kept]))


# --- checkpoint and card ----------------------------------------------------------------------------------------------


def save(model: LlavaForConditionalGeneration, processor: LlavaProcessor, out: Path) -> None:
    """Write the checkpoint folder, replacing what was there."""
    if out.exists():
        if any(out.iterdir()) and not (out / "config.json").exists():
            raise SystemExit(f"{out} is neither empty nor a checkpoint folder; not overwriting it")
        shutil.rmtree(out)
    tokenizer = processor.tokenizer
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        max_new_tokens=24,
        do_sample=False,
    )
    model.save_pretrained(out)
    processor.save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)  # the library leaves it readable by its owner alone
    processor.image_processor.save_pretrained(out)  # preprocessor_config.json, for loaders that look for it


def write_card(out: Path, recipe: Recipe, scores: dict[str, dict[str, tuple[int, int]]]) -> None:
    """Fill the model card's template with the measured table."""
    rows = []
    for task in scenes.TASKS:
        cells = []
        for split in scores:
            right, asked = scores[split][task]
            cells.append(f"{right / asked:.3f} ({right}/{asked})")
        rows.append(f"| {TASK_NAMES[task]} | " + " | ".join(cells) + " |")
    weights = (out / "model.safetensors").stat().st_size
    card = (ROOT / "scripts" / "tiny_model_card.md").read_text(encoding="utf-8")
    filled = card.format(
        table="\n".join(rows),
        megabytes=f"{weights / 1e6:.1f}",
        pictures=sum(recipe.pictures.values()),
        practice=recipe.practice,
        vision_steps=recipe.vision_steps,
        text_steps=recipe.text_steps,
        pairs=", ".join(f"{color} {shape}" for shape, color in sorted(scenes.HELD_OUT_PAIRS)),
        numbers=", ".join(str(number) for number in sorted(scenes.HELD_OUT_NUMBERS)),
    )
    (out / "README.md").write_text(filled, encoding="utf-8")


def main(arguments: list[str] | None = None) -> None:
    """Train, save, evaluate what was saved and write its card."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=tiny.TINY_MODEL_DIR, help="checkpoint folder to write")
    parser.add_argument("--quick", action="store_true", help="a smoke run of seconds; the answers will be nonsense")
    options = parser.parse_args(arguments)
    recipe = QUICK if options.quick else FULL

    torch.set_num_threads(2)  # part of the recipe: another thread count sums in another order
    torch.manual_seed(0)
    started = time.perf_counter()
    processor = build_processor()
    model = build_model(processor.tokenizer)
    print(f"parameters: {sum(parameter.numel() for parameter in model.parameters()):,}")
    pictures, pixels = draw_training_pictures(recipe)
    print(f"pictures: {len(pictures):,}, drawn in {time.perf_counter() - started:.0f} s")
    train_vision(model, processor, pictures, pixels, recipe)
    train_text(model, processor, pictures, pixels, recipe)
    save(model.eval(), processor, options.out)
    print(f"trained and saved in {time.perf_counter() - started:.0f} s: {options.out}")

    saved_model = LlavaForConditionalGeneration.from_pretrained(options.out)
    saved_processor = AutoProcessor.from_pretrained(options.out)
    scores = {}
    for split in ("train", "held_out"):
        scores[split] = score(saved_model, saved_processor, evaluation_set(split, recipe.evaluate))
        print(split, {task: f"{right / asked:.3f}" for task, (right, asked) in scores[split].items()}, flush=True)
    write_card(options.out, recipe, scores)
    if options.out.resolve() == tiny.TINY_MODEL_DIR.resolve():
        tiny.sample_questions(*tiny.DEFAULT_PICTURE)[0].save(tiny.PICTURE_PATH, optimize=True)


if __name__ == "__main__":
    main()
