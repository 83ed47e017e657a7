"""CogVLM's visual expert against a dense float64 formula; its positions, caches, gradients."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import nn

from vlmops.models.config import DecoderConfig
from vlmops.models.generate import generate
from vlmops.models.language.decoder import Decoder
from vlmops.models.language.expert import ExpertDecoder, Rows, vision_layout

CONFIG = DecoderConfig(vocab=97, width=32, layers=3, heads=4, mlp_width=48, kv_heads=2, norm_eps=1e-5, rope_theta=5e5)
#: Runs of tokens of each sequence: "t" text, "v" an image's (with its begin and end).
SEQUENCES = ["tvvvvvtt", "tttt", "vvvtv", "tvvttvvvv"]


def cu(lengths):
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)


def vision(sequences=SEQUENCES):
    """bool [T] and cu_seqlens."""
    return torch.tensor([c == "v" for s in sequences for c in s], dtype=torch.bool), cu([len(s) for s in sequences])


def layout(sequences=SEQUENCES):
    """Expert mask and positions; each run of "v" is an image."""
    return vision_layout(*vision(sequences), [len(run) for s in sequences for run in s.split("t") if run])


def decoder(**options):
    model = ExpertDecoder(CONFIG, **options)
    for name, p in model.named_parameters():
        nn.init.normal_(p, mean=float("norm" in name), std=0.3)
    return model.eval()


def inputs(sequences=SEQUENCES):
    _, starts = vision(sequences)
    is_image, positions = layout(sequences)
    x = torch.randn(len(is_image), CONFIG.width)
    return (None, starts, positions), dict(inputs_embeds=x, is_image=is_image, image_tokens=int(is_image.sum()))


def plainly(sequence):
    """Expert mask and positions of one sequence as CogVLM2's definition reads, token by token."""
    n, expert, positions, at = len(sequence), [], [], 0

    def token(i):
        return sequence[i] if 0 <= i < n else "t"

    def inner(i):
        return token(i - 1) == token(i) == token(i + 1) == "v"

    for i in range(n):
        expert.append(token(i) == "v" and token(i + 1) == "v")
        at += i > 0 and not (inner(i) and inner(i - 1))
        positions.append(at)
    return expert, positions


def test_layout():
    expert, positions = layout()
    want = [plainly(s) for s in SEQUENCES]
    assert expert.tolist() == [e for es, _ in want for e in es]
    assert positions.tolist() == [p for _, ps in want for p in ps]
    # text, begin, three that share a place, end, text
    assert positions[:8].tolist() == [0, 1, 2, 2, 2, 3, 4, 5]
    assert expert[:8].tolist() == [False, True, True, True, True, False, False, False]
    for lengths in ([], [0, 0]):
        nothing = vision_layout(torch.zeros(0, dtype=torch.bool), cu(lengths), [])
        assert [t.tolist() for t in nothing] == [[], []]
    expert, positions = layout(["", "vvv", "", "tv", ""])
    assert positions.tolist() == [0, 1, 2, 0, 1] and expert.tolist() == [True, True, False, False, False]
    assert layout(["ttt"])[1].tolist() == [0, 1, 2]
    # two images behind each other are two
    expert, positions = vision_layout(*vision(["tvvvvvvvvv"]), [4, 5])
    assert positions.tolist() == [0, 1, 2, 2, 3, 4, 5, 5, 5, 6]
    assert expert.tolist() == [False, True, True, True, False, True, True, True, True, False]
    with pytest.raises(ValueError, match="lengths: expected at least one token"):
        vision_layout(*vision(["tv"]), [0])


def dense(w, x, positions, is_image, config=CONFIG):
    """One sequence: weights chosen token by token, masks written out; in the dtype of x."""
    t = len(x)
    angles = positions[:, None] * config.rope_theta ** (-torch.arange(0, config.dim, 2) / config.dim).to(x)
    cos, sin = (f(angles).repeat(1, 2)[:, None] for f in (torch.cos, torch.sin))

    def rms(x, weight):
        return x * (x.square().mean(-1, keepdim=True) + config.norm_eps).rsqrt() * weight

    def turn(x):
        a, b = x.chunk(2, -1)
        return x * cos + torch.cat([-b, a], -1) * sin

    def product(x, i, name):
        """Each row by the matrix of its kind."""
        rows = []
        for row, image in zip(x, is_image.tolist(), strict=True):
            prefix = f"blocks.{i}.expert." if image else f"blocks.{i}."
            y = w[prefix + name] @ row
            rows.append(y + w[prefix + "qkv_bias"] if image and name == "qkv" else y)
        return torch.stack(rows)

    for i in range(config.layers):
        qkv = product(rms(x, w[f"blocks.{i}.norm1.weight"]), i, "qkv").view(t, -1, config.dim)
        q, k, v = qkv.split([config.heads, config.groups, config.groups], 1)
        k, v = (x.repeat_interleave(config.heads // config.groups, 1) for x in (k, v))
        scores = torch.einsum("ihd,jhd->hij", turn(q), turn(k)) * config.dim**-0.5
        scores = scores.masked_fill(~torch.ones(t, t, dtype=torch.bool).tril(), float("-inf"))
        x = x + product(torch.einsum("hij,jhd->ihd", scores.softmax(-1), v).flatten(1), i, "o")
        y = rms(x, w[f"blocks.{i}.norm2.weight"])
        x = x + product(nn.functional.silu(product(y, i, "w_gate")) * product(y, i, "w_up"), i, "w_down")
    return rms(x, w["norm.weight"])


def test_it_is_cogvlm2():
    """Every sequence of a batch, and the gradients of all weights."""
    model = decoder()
    places, more = inputs()
    x = more["inputs_embeds"].requires_grad_()
    hidden = model(*places, **more)
    w = {name: p.detach().double().requires_grad_() for name, p in model.named_parameters()}
    x64 = x.detach().double().requires_grad_()
    lengths = places[1].diff().tolist()
    rows = zip(x64.split(lengths), places[2].split(lengths), more["is_image"].split(lengths), strict=True)
    want = torch.cat([dense(w, *row) for row in rows])
    torch.testing.assert_close(hidden, want.float(), rtol=1e-5, atol=1e-5)
    weight = torch.randn_like(hidden)
    (hidden * weight).sum().backward()
    (want * weight).sum().backward()
    for name, p in [("x", x), *model.named_parameters()]:
        grad = x64.grad if name == "x" else w[name].grad
        if name in ("embedding", "head"):
            assert p.grad is None
            continue
        torch.testing.assert_close(p.grad, grad.float(), rtol=1e-4, atol=1e-5 * float(grad.abs().max()), msg=name)


def test_equal_weights_are_the_plain_decoder():
    model, plain = decoder(expert_bias=False), Decoder(CONFIG)
    for block in model.blocks:
        block.expert.load_state_dict({name: block.get_parameter(name) for name in block.expert.state_dict()})
    plain.load_state_dict({name: p for name, p in model.state_dict().items() if ".expert." not in name})
    places, more = inputs()
    want = plain(*places, inputs_embeds=more["inputs_embeds"])
    torch.testing.assert_close(model(*places, **more), want, rtol=1e-5, atol=1e-5)
    assert torch.equal(model(*places, inputs_embeds=more["inputs_embeds"]), want)  # text alone: the same calls
    everything = {**more, "is_image": torch.ones_like(more["is_image"]), "image_tokens": places[1][-1].item()}
    torch.testing.assert_close(model(*places, **everything), want, rtol=1e-5, atol=1e-5)


def test_a_batch_is_its_sequences():
    model = decoder()
    (_, starts, positions), more = inputs()
    whole, n = model(None, starts, positions, **more), starts.tolist()
    for a, b in pairwise(n):
        alone = {k: v[a:b] for k, v in more.items() if k != "image_tokens"}  # counted
        torch.testing.assert_close(model(None, None, positions[a:b], **alone), whole[a:b], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_steps_are_the_whole():
    """Prompts with images, then text; and a chunk with images behind cached tokens."""
    model, tails = decoder(), ["tt", "t", "", "ttt"]
    sequences = [a + b for a, b in zip(SEQUENCES, tails, strict=True)]
    (_, starts, positions), more = inputs(sequences)
    whole = model(None, starts, positions, **more)
    for heads in ([len(s) for s in SEQUENCES], [3, 2, 1, 6]):
        which = [torch.arange(a, a + n) for a, n in zip(starts.tolist(), heads, strict=False)]
        rest = [torch.arange(int(w[-1]) + 1, b) for w, b in zip(which, starts[1:].tolist(), strict=True)]
        cache, found = model.new_cache(4, capacity=4), torch.empty_like(whole)
        for part in (which, rest):
            i = torch.cat(part)
            mask = more["is_image"][i]
            found[i] = model(None, cu([len(p) for p in part]), positions[i], inputs_embeds=more["inputs_embeds"][i],
                             is_image=mask, image_tokens=int(mask.sum()), cache=cache)  # fmt: skip
        torch.testing.assert_close(found, whole, rtol=1e-5, atol=1e-5)
        assert cache.lengths.tolist() == starts.diff().tolist()


def test_generation():
    model = decoder().requires_grad_(False)
    is_vision, starts = vision()
    features = torch.randn(int(is_vision.sum()), CONFIG.width)
    ids = torch.randint(0, 97, is_vision.shape)

    def arguments(ids, cu_seqlens, is_vision, features, lengths):
        x = model.embed(ids)
        x[is_vision] = features
        expert, positions = vision_layout(is_vision, cu_seqlens, lengths)
        return dict(inputs_embeds=x, positions=positions, is_image=expert, image_tokens=int(expert.sum()))

    images = [len(run) for s in SEQUENCES for run in s.split("t") if run]
    prompts = list(ids.split(starts.diff().tolist()))
    answers = generate(
        model, prompts, max_new_tokens=5, embed=lambda ids, cu: arguments(ids, cu, is_vision, features, images)
    )
    parts = features.split([s.count("v") for s in SEQUENCES])
    for prompt, sequence, part, got in zip(prompts, SEQUENCES, parts, answers, strict=True):
        so_far = prompt
        for i, token in enumerate(got.ids):  # without a cache
            mask, one = vision([sequence + "t" * i])
            more = arguments(so_far, one, mask, part, [len(run) for run in sequence.split("t") if run])
            hidden = model(None, one, more.pop("positions"), **more)
            assert int(model.logits(hidden)[-1].argmax()) == token
            so_far = torch.cat([so_far, torch.tensor([token])])


def test_rows_go_both_ways():
    x = torch.randn(9, 4, requires_grad=True)
    mask = torch.tensor([0, 1, 1, 0, 1, 0, 0, 1, 0], dtype=torch.bool)
    rows = Rows.of(mask, 4)
    text, image = rows.split(x)
    assert torch.equal(text, x[~mask]) and torch.equal(image, x[mask]) and torch.equal(rows.join(text, image), x)
    weight = torch.randn(9, 4)
    (rows.join(text * 2, image * 3) * weight).sum().backward()
    torch.testing.assert_close(x.grad, weight * torch.where(mask, 3.0, 2.0)[:, None])


def test_one_graph():
    model = decoder()
    places, more = inputs()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*places, **more), model(*places, **more), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (dict(image_tokens=3), ValueError, "image_tokens: expected 10 as is_image has, got 3"),
        (dict(is_image=torch.ones(3, dtype=torch.bool)), ValueError, r"is_image: expected shape \[26\]"),
        (dict(is_image=torch.ones(26)), TypeError, "is_image: expected bool"),
    ],
)
def test_bad_arguments(changes, error, message):
    places, more = inputs()
    with pytest.raises(error, match=message):
        decoder()(*places, **{**more, **changes})


@pytest.mark.parametrize(
    "changes", [dict(sandwich=True), dict(norm_offset=1.0), dict(gated=False), dict(mlp_bias=True)]
)
def test_bad_configs(changes):
    with pytest.raises(ValueError, match="config: a visual expert needs a block like Llama's"):
        ExpertDecoder(replace(CONFIG, **changes))
