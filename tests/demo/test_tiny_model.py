"""The embedded model: it loads offline, answers, its held-out data is held out, and its training is reproducible."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from transformers import AutoProcessor, LlavaForConditionalGeneration

from tests.support.scripts import load_script
from vlmops.demo import tiny
from vlmops.demo.tiny import scenes
from vlmops.demo.tiny.architecture import IMAGE_TOKENS, build_model, build_processor
from vlmops.demo.tiny.evaluation import answer, evaluation_set, score

SPLITS = ("train", "held_out")


@pytest.fixture(scope="module")
def checkpoint():
    model = LlavaForConditionalGeneration.from_pretrained(tiny.TINY_MODEL_DIR, local_files_only=True)
    return model.eval(), AutoProcessor.from_pretrained(tiny.TINY_MODEL_DIR, local_files_only=True)


@pytest.fixture(scope="module")
def training():
    """The training script as a module; it sets the global seed and thread count, which are put back."""
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    yield load_script("train_tiny_model")
    torch.set_num_threads(threads)
    torch.set_rng_state(state)


# --- the checkpoint ---------------------------------------------------------------------------------------------------


def test_folder_is_complete_and_small():
    names = {path.name for path in tiny.TINY_MODEL_DIR.iterdir()}
    needed = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "README.md"}
    assert needed | {"processor_config.json", "preprocessor_config.json", "chat_template.jinja"} <= names
    assert sum(path.stat().st_size for path in tiny.TINY_MODEL_DIR.iterdir()) <= 8_000_000


def test_checkpoint_is_llava_in_float32(checkpoint):
    model, processor = checkpoint
    assert model.dtype == torch.float32
    assert model.config.vision_config.model_type == "clip_vision_model"
    assert model.config.text_config.model_type == "llama"
    inputs = processor(images=tiny.sample_picture()[0], text=tiny.build_prompt("describe the picture."))
    assert np.count_nonzero(np.array(inputs["input_ids"]) == model.config.image_token_id) == IMAGE_TOKENS


@pytest.mark.parametrize("split", SPLITS)
def test_answers_well(checkpoint, split):
    floors = {"color": 0.8, "count": 0.9, "exist": 0.75, "ocr": 0.85, "chart_compare": 0.9, "chart_value": 0.85}
    totals = score(*checkpoint, evaluation_set(split, 24, seed=99))
    for task, floor in floors.items():
        right, asked = totals[task]
        assert right >= floor * asked, f"{task}: {right} of {asked}"


def test_batch_and_single_agree(checkpoint):
    examples = evaluation_set("train", 2, seed=5)
    images = [scenes.draw(picture) for picture, _ in examples]
    questions = [question.question for _, question in examples]
    assert answer(*checkpoint, images, questions) == answer(*checkpoint, images, questions, batch_size=1)


def test_stored_picture_is_what_the_generator_draws(checkpoint):
    stored, question = tiny.sample_picture()
    drawn, questions = tiny.sample_questions(*tiny.DEFAULT_PICTURE)
    difference = np.abs(np.asarray(stored, dtype=int) - np.asarray(drawn, dtype=int))
    assert (difference > 8).mean() < 0.01  # another Pillow may round an edge differently
    right = {item.question: item.answer for item in questions}
    assert answer(*checkpoint, [stored], [question]) == [right[question]]


def test_chat_template_gives_the_documented_prompt(checkpoint):
    _, processor = checkpoint
    content = [{"type": "text", "text": "which bar is tallest?"}, {"type": "image"}]
    message = {"role": "user", "content": content}
    assert processor.apply_chat_template([message], add_generation_prompt=True) == tiny.build_prompt(
        "which bar is tallest?"
    )


@pytest.mark.parametrize("split", SPLITS)
def test_tokenizer_knows_every_word_and_round_trips(checkpoint, split):
    tokenizer = checkpoint[1].tokenizer
    for _, item in evaluation_set(split, 40):
        for text in (item.question, item.answer):
            ids = tokenizer.encode(text, add_special_tokens=False)
            assert tokenizer.unk_token_id not in ids
            assert tokenizer.decode(ids) == text


# --- the generator ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", scenes.KINDS)
@pytest.mark.parametrize("split", SPLITS)
def test_generator_is_deterministic(kind, split):
    first, second = (tiny.sample_questions(kind, 11, split) for _ in range(2))
    assert first[1] == second[1]
    assert first[0].tobytes() == second[0].tobytes()
    assert first[0].tobytes() != tiny.sample_questions(kind, 12, split)[0].tobytes()


@pytest.mark.parametrize("kind", scenes.KINDS)
def test_held_out_combinations_are_absent_from_training(kind):
    rng = random.Random(0)
    for _ in range(500):
        seen = scenes.sample_picture_spec(kind, rng, "train")
        assert not scenes.is_held_out(seen)
        texts = " ".join(f"{q.question} {q.answer}" for q in scenes.questions_for(seen, rng, "train"))
        assert not any(f"{color} {shape}" in texts for shape, color in scenes.HELD_OUT_PAIRS)
        assert scenes.is_held_out(scenes.sample_picture_spec(kind, rng, "held_out"))


def test_training_pictures_hold_nothing_held_out(training):
    pictures, pixels = training.draw_training_pictures(training.QUICK)
    assert len(pictures) == len(pixels)
    assert not any(scenes.is_held_out(picture) for picture in pictures)


def test_practice_paint_is_far_from_every_named_colour():
    rng = random.Random(0)
    for _ in range(200):
        for item in scenes.sample_practice_scene(rng).items:
            nearest = min(np.linalg.norm(np.subtract(item.paint, named)) for named in scenes.COLORS.values())
            assert nearest > 50


def test_patch_labels_find_the_shape():
    item = scenes.Item("cross", "red", x=16, y=48, radius=8)
    labels = scenes.patch_labels(scenes.Picture("scene", items=(item,)), grid=8).reshape(8, 8, -1)
    rows, columns = np.nonzero(labels[..., 0])
    assert set(labels[rows, columns, 0]) == {1 + list(scenes.COLORS).index("red")}
    assert (rows.mean(), columns.mean()) == (5.5, 1.5)


@pytest.mark.parametrize(("kind", "split"), [("photo", "train"), ("scene", "test")])
def test_generator_rejects_unknown_names(kind, split):
    with pytest.raises(ValueError, match="must be"):
        scenes.sample_picture_spec(kind, random.Random(0), split)


# --- the training -----------------------------------------------------------------------------------------------------


def test_packed_questions_are_trained_as_they_are_asked(training):
    """One packed row gives the logits that each question gets alone through the model's own forward."""
    torch.manual_seed(0)
    processor = build_processor()
    model = build_model(processor.tokenizer).eval()
    picture = scenes.sample_picture_spec("chart", random.Random(3), "train")
    image = scenes.draw(picture)
    packed = training.pack_conversations([picture], processor.tokenizer)
    with torch.no_grad():
        pixel_values = processor.image_processor(image, return_tensors="pt")["pixel_values"]
        features = training.patch_features(model, pixel_values)
        chosen = torch.tensor([0])
        hidden = training.packed_hidden_states(model, processor, features, packed, chosen)
        logits = model.lm_head(hidden)[0, training.PREFIX :]
        for branch in range(int(packed.branch.max()) + 1):
            inside = packed.branch[0] == branch
            text = processor.tokenizer.decode(packed.input_ids[0, inside])
            question, reply = text.removesuffix("</s>").split("ASSISTANT:")
            full = tiny.build_prompt(question.strip()) + f" {reply.strip()}</s>"
            alone = model(**processor(images=image, text=full, return_tensors="pt")).logits[0, training.PREFIX :]
            torch.testing.assert_close(logits[inside], alone, atol=1e-4, rtol=1e-4)


def test_quick_training_is_deterministic(training, tmp_path):
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder in folders:
        training.main(["--quick", "--out", str(folder)])
    files = [{path.name: path.read_bytes() for path in folder.iterdir()} for folder in folders]
    assert files[0] == files[1]


def test_training_does_not_overwrite_other_folders(training, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    processor = build_processor()
    with pytest.raises(SystemExit, match="not overwriting"):
        training.save(build_model(processor.tokenizer), processor, tmp_path)
    assert (tmp_path / "notes.txt").exists()
