"""DINOv2-small, an MLP and SmolLM2-135M as one model: type A, whose connector alone is trained."""

import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional
from transformers import Dinov2Config, Dinov2Model

from vlmops.models.assemblies.projected import ProjectedVLM
from vlmops.models.config import ConnectorConfig, VLMConfig
from vlmops.models.connectors import connect
from vlmops.models.generate import generate

pytestmark = pytest.mark.real_weights

NEW = 12  # tokens of an answer
IMAGE, END = 7, 2  # a token of source-code files, <gh_stars>, which no chat has; <|im_end|>
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIDE = 56  # pixels
QUESTION = "What is in the picture?"
ANSWERS = ["A red circle.", "Two blue bars, side by side."]


def pictures():
    """A red circle; two blue bars."""
    found = [Image.new("RGB", (SIDE, SIDE), "white") for _ in ANSWERS]
    ImageDraw.Draw(found[0]).ellipse((8, 8, 48, 48), fill="red")
    for x in (8, 36):
        ImageDraw.Draw(found[1]).rectangle((x, 4, x + 12, 52), fill="blue")
    return found


@pytest.fixture
def vlm(smollm2, dinov2):
    """Real tower and decoder, both frozen, around a new connector."""
    config = VLMConfig(
        "llava", smollm2.ours.config, vision=dinov2.ours.config, vision_family="dinov2",
        connector=ConnectorConfig("mlp", dinov2.ours.config.width, smollm2.ours.config.width),
        image_token=IMAGE, end_tokens=(END,), pad_token=END, images=dict(size=SIDE, mean=MEAN, std=STD),
    )  # fmt: skip
    with torch.device("meta"):
        made = ProjectedVLM(config)
    made.tower, made.decoder, made.connector = dinov2.ours, smollm2.ours, connect(config.connector)
    for p in made.connector.parameters():
        nn.init.normal_(p, std=0.05)
    return made.train_only("connector")


@pytest.fixture
def prompt(smollm2):
    """Ids of a question about a picture, without the system's turn."""
    show = "<gh_stars>" * (SIDE // 14) ** 2
    return smollm2.tokenizer.encode(f"<|im_start|>user\n{show}\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n")


@pytest.fixture
def batch(vlm, smollm2, prompt):
    """Both pictures' prompts, answered and padded: arguments of ``forward``, and the labels."""
    said = [[*smollm2.tokenizer.encode(text), END] for text in ANSWERS]
    shape = (2, len(prompt) + max(map(len, said)))
    ids, mask, labels = torch.full(shape, END), torch.zeros(shape, dtype=torch.int64), torch.full(shape, -100)
    for row, answer in enumerate(said):
        n = len(prompt) + len(answer)
        ids[row, :n], mask[row, :n] = torch.tensor(prompt + answer), 1
        labels[row, len(prompt) : n] = torch.tensor(answer)
    return dict(input_ids=ids, attention_mask=mask, images=vlm.prepare(pictures())), labels


def loss(vlm, batch):
    inputs, labels = batch
    return vlm(**inputs, labels=labels).loss


def test_loss_and_answers_are_those_of_transformers_parts(vlm, smollm2, dinov2, prompt, batch, tmp_path):
    """Their tower, the formula of the connector, and their language model on embeddings put together by hand."""
    tower = Dinov2Config(hidden_size=384, num_hidden_layers=12, num_attention_heads=6, image_size=518, patch_size=14)
    tower.save_pretrained(tmp_path)
    save_file({**dinov2.tensors, "embeddings.mask_token": torch.zeros(1, 384)}, tmp_path / "model.safetensors")
    theirs = Dinov2Model.from_pretrained(tmp_path).eval()
    inputs, labels = batch
    connector, words = vlm.connector, smollm2.theirs.get_input_embeddings()
    with torch.no_grad():
        seen = theirs(inputs["images"].pixel_values(), interpolate_pos_encoding=True).last_hidden_state[:, 1:]
        hidden = functional.gelu(functional.linear(seen, connector.w1, connector.b1))
        tokens = functional.linear(hidden, connector.w2, connector.b2)
        x = words(inputs["input_ids"])
        x[inputs["input_ids"] == IMAGE] = tokens.flatten(0, 1)
        expected = smollm2.theirs(inputs_embeds=x, attention_mask=inputs["attention_mask"], labels=labels).loss
        torch.testing.assert_close(loss(vlm, batch), expected, atol=1e-5, rtol=1e-5)
        n = len(prompt)
        ours = vlm.generate(inputs["input_ids"][:, :n], images=inputs["images"], max_new_tokens=NEW)
        for row in range(2):
            answer = smollm2.theirs.generate(
                inputs_embeds=x[row : row + 1, :n], attention_mask=torch.ones(1, n, dtype=torch.int64), max_new_tokens=NEW,
                do_sample=False, eos_token_id=END,
            )[0].tolist()  # fmt: skip
            assert ours[row, n : n + len(answer)].tolist() == answer


def test_one_step_on_the_connector_lowers_the_loss_as_its_gradient_says(vlm, batch):
    frozen = [p for part in (vlm.tower, vlm.decoder) for p in part.parameters()]
    before = loss(vlm, batch)
    before.backward()
    assert not any(p.requires_grad or p.grad is not None for p in frozen)
    gradients = {p: p.grad for p in vlm.connector.parameters()}
    assert all(g.abs().max() > 0 for g in gradients.values())
    slope = sum(g.square().sum() for g in gradients.values())
    step = 0.02 / slope  # down by 0.02 of a nat, were the loss a plane
    with torch.no_grad():
        values = {p: p.clone() for p in gradients}
        ends = []
        for sign in (-1, 1):
            for p, g in gradients.items():
                p.copy_(values[p] + sign * step * g)
            ends.append(loss(vlm, batch))
    assert ends[0] < before < ends[1]
    torch.testing.assert_close((ends[1] - ends[0]) / (2 * step), slope, rtol=0.03, atol=0)


def test_a_connector_learns_to_tell_two_pictures(vlm, smollm2, prompt, batch):
    """A frozen tower and a frozen language model name what they are shown, whichever row it stands in."""
    optimizer = torch.optim.Adam(vlm.connector.parameters(), lr=3e-3)
    first = None
    for _ in range(13):
        optimizer.zero_grad()
        value = loss(vlm, batch)
        value.backward()
        optimizer.step()
        first = first or value.item()
    assert value.item() < 0.1 * first
    ids = torch.tensor([prompt, prompt])
    for order in (1, -1):
        images = vlm.prepare(pictures()[::order])
        out = vlm.generate(ids, images=images, max_new_tokens=NEW)[:, len(prompt) :]
        said = smollm2.tokenizer.batch_decode(out, skip_special_tokens=True)
        assert said == ANSWERS[::order]


def test_a_prompt_without_images_is_the_language_models_alone(vlm, smollm2, prompt):
    """To the bit where there are none, and in one batch with a prompt that has one."""
    ids = smollm2.chat("Name a colour and a fruit.")
    with torch.no_grad():
        logits = smollm2.ours.logits(smollm2.ours(torch.tensor(ids)))
        assert torch.equal(vlm(torch.tensor([ids])).logits[0], logits)
    (alone,) = generate(smollm2.ours, [ids], max_new_tokens=NEW, stop_ids=[END])
    longest = max(len(ids), len(prompt))
    rows = torch.tensor([[END] * (longest - len(row)) + row for row in (ids, prompt)])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in (ids, prompt)])
    out = vlm.generate(rows, mask, images=vlm.prepare(pictures()[0]), max_new_tokens=NEW)
    assert out[0, longest : longest + len(alone.ids)].tolist() == alone.ids
    assert vlm.generate(torch.tensor([ids]), max_new_tokens=NEW)[0, len(ids) :].tolist() == alone.ids
