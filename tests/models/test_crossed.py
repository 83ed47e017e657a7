"""Flamingo's decoder against transformers' Idefics and against a dense float64 formula; media masks, caches, gates."""

from dataclasses import replace

import pytest
import torch
import transformers as T
from torch import nn

from vlmops.models.config import CrossConfig, DecoderConfig
from vlmops.models.generate import generate
from vlmops.models.keymap import Rule, load_into, save
from vlmops.models.language.cache import KVCache
from vlmops.models.language.crossed import CrossedDecoder, MediaCache, media_index
from vlmops.models.language.decoder import Decoder
from vlmops.models.language.families import from_json, keys

WIDTH, CONTEXT, IMAGE, END = 32, 20, 90, 2
CONFIG = DecoderConfig(vocab=97, width=WIDTH, layers=4, heads=4, mlp_width=48, kv_heads=2, norm_eps=1e-5)
CROSS = CrossConfig(WIDTH, CONTEXT, 2, 16, 40, every=2)


def cu(lengths):
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)


def decoder(cross=CROSS, config=CONFIG):
    model = CrossedDecoder(config, cross)
    for name, p in model.named_parameters():
        nn.init.normal_(
            p, mean=float("norm" in name and "weight" in name), std=0.8 if "gate" in name and p.numel() == 1 else 0.3
        )
    return model.eval()


def prompts():
    """Two texts of 3 and 0 images, one of 1; the images' features."""
    rows = [torch.randint(3, 80, (n,)) for n in (9, 4, 6)]
    rows[0][[2, 5, 6]], rows[2][0] = IMAGE, IMAGE
    lengths = [3, 1, 4, 2]
    return rows, torch.randn(sum(lengths), CONTEXT), cu(lengths)


def arguments(rows, media, cu_media):
    ids, starts = torch.cat(rows), cu([len(row) for row in rows])
    return (ids, starts), dict(media=media, cu_media=cu_media, media_index=media_index(ids, starts, IMAGE))


def test_media_index():
    ids = torch.tensor([5, IMAGE, 5, IMAGE, IMAGE, 5, 5, IMAGE, 5, END, 5, 5, IMAGE])
    index = media_index(ids, cu([6, 1, 0, 6]), IMAGE)
    assert index.tolist() == [-1, 0, 0, 1, 2, 2, -1, 3, 3, 3, 3, 3, 4] and index.dtype == torch.int32
    ended = media_index(ids, cu([6, 1, 0, 6]), IMAGE, END)
    assert ended.tolist() == [-1, 0, 0, 1, 2, 2, -1, 3, 3, 3, -1, -1, 4]
    for lengths in ([], [0, 0]):
        assert media_index(ids[:0], cu(lengths), IMAGE, END).tolist() == []


def idefics_rules(config, every):
    """What Idefics' files call the tensors; its cross layers are counted by themselves."""
    rules = keys(config, "llama")
    names = {"norm1.weight": "input_layernorm.weight", "q": "cross_attn.q_proj.weight", "out": "cross_attn.o_proj.weight",
             "q_norm.weight": "cross_attn.q_layer_norm.weight", "k_norm.weight": "cross_attn.k_layer_norm.weight",
             "norm2.weight": "post_attention_layernorm.weight", "attention_gate": "alpha_cross_attn",
             "w1": "mlp.up_proj.weight", "w_gate": "mlp.gate_proj.weight", "w2": "mlp.down_proj.weight",
             "mlp_gate": "alpha_dense"}  # fmt: skip
    for j in range(config.layers // every):
        ours, theirs = f"blocks.{j * every}.cross.", f"model.gated_cross_attn_layers.{j}."
        rules += [Rule(ours + a, theirs + b) for a, b in names.items()]
        rules.append(Rule(ours + "kv", [f"{theirs}cross_attn.{x}_proj.weight" for x in "kv"], "cat"))
    return rules


def idefics(every):
    config = T.IdeficsConfig(vocab_size=97, hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
                             cross_layer_interval=every, qk_layer_norms=True, freeze_text_layers=False,
                             freeze_vision_layers=False, vision_config=dict(embed_dim=CONTEXT, num_hidden_layers=1,
                             num_attention_heads=2, intermediate_size=8, image_size=8, patch_size=4),
                             attn_implementation="eager")  # fmt: skip
    model = T.IdeficsForVisionText2Text(config).eval()
    for name, p in model.named_parameters():
        nn.init.normal_(p, mean=float("norm" in name and "weight" in name), std=0.8 if "alpha" in name else 0.2)
    return model


@pytest.mark.parametrize("every", [1, 2])
def test_it_is_idefics(every):
    theirs = idefics(every)
    config = from_json(theirs.config.to_dict(), "llama")
    cross = CrossConfig(WIDTH, CONTEXT, 4, 8, 48, every=every, activation="silu", gated=True, norm="rms_norm", norm_eps=1e-6,
                        qk_norm=True)  # fmt: skip
    with torch.device("meta"):
        ours = CrossedDecoder(config, cross)
    rules = idefics_rules(config, every)
    source = {n: t.clone() for n, t in theirs.state_dict().items() if "vision_model" not in n}
    load_into(ours, source, rules)
    # a sequence of 3 images of 5 features, and another padded to the right with 1
    rows, media = prompts()[0], torch.randn(4, 5, CONTEXT)
    rows = [rows[0], rows[2]]
    padded = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = torch.arange(9) < torch.tensor([[9], [6]])
    sees = torch.zeros(2, 9, 3, dtype=torch.bool)
    sees[0, 2:5, 0] = sees[0, 5, 1] = sees[0, 6:, 2] = sees[1, :, 0] = True
    features = torch.stack([media[:3], torch.stack([media[3], *torch.zeros(2, 5, CONTEXT)])]).requires_grad_()
    labels = padded.masked_fill(~mask, -100)
    want = theirs(
        padded, attention_mask=mask.long(), image_encoder_embeddings=features, image_attention_mask=sees, labels=labels
    )
    media = media.flatten(0, 1).requires_grad_()
    places, more = arguments(rows, media, cu([5] * 4))
    hidden = ours(*places, **more)
    torch.testing.assert_close(ours.logits(hidden), want.logits[mask], rtol=1e-5, atol=1e-5)
    loss = ours.loss(hidden, places[0], places[1])
    torch.testing.assert_close(loss, want.loss, rtol=1e-5, atol=1e-5)
    loss.backward()
    want.loss.backward()
    expected = torch.cat([features.grad[0], features.grad[1, :1]]).flatten(0, 1)
    torch.testing.assert_close(media.grad, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
    found = dict(save({name: p.grad for name, p in ours.named_parameters()}, rules))
    wanted = {name: p.grad for name, p in theirs.named_parameters() if "vision_model" not in name}
    assert found.keys() == wanted.keys()
    for name, grad in wanted.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-4, atol=1e-5 * float(grad.abs().max()) + 1e-7, msg=name)


def dense(model, ids, media, cu_media):
    """Flamingo's decoder on one sequence, float64: one formula at a time, masks written out."""
    w = {name: p.detach().double() for name, p in model.state_dict().items()}
    config, cross, t = model.config, model.cross, len(ids)
    x, media = w["embedding"][ids], media.double()
    counted = (ids == IMAGE).cumsum(0)
    number = torch.repeat_interleave(torch.arange(len(cu_media) - 1), cu_media.diff()) + 1
    sees = counted[:, None] == number[None, :]
    angles = torch.arange(t)[:, None] * config.rope_theta ** (-torch.arange(0, config.dim, 2) / config.dim).double()
    cos, sin = (f(angles).repeat(1, 2)[:, None] for f in (torch.cos, torch.sin))

    def rms(x, weight):
        return x * (x.square().mean(-1, keepdim=True) + config.norm_eps).rsqrt() * weight

    def layer(x, p):
        return nn.functional.layer_norm(x, x.shape[-1:], w[p + ".weight"], w[p + ".bias"], cross.norm_eps)

    def turn(x):
        a, b = x.chunk(2, -1)
        return x * cos + torch.cat([-b, a], -1) * sin

    def attend(q, k, v, mask):
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        scores = torch.einsum("ihd,jhd->hij", q, k) * q.shape[-1] ** -0.5
        return torch.einsum(
            "hij,jhd->ihd", scores.masked_fill(~mask, float("-inf")).softmax(-1).nan_to_num(0), v
        ).flatten(1)

    for i in range(config.layers):
        if i >= cross.first and (i - cross.first) % cross.every == 0:
            p = f"blocks.{i}.cross."
            q = (layer(x, p + "norm1") @ w[p + "q"].T).view(t, cross.heads, -1)
            k, v = (media @ w[p + "kv"].T).view(len(media), 2, cross.heads, cross.head_dim).unbind(1)
            x = x + w[p + "attention_gate"].tanh() * (attend(q, k, v, sees) @ w[p + "out"].T)
            hidden = nn.functional.gelu(layer(x, p + "norm2") @ w[p + "w1"].T)
            x = x + w[p + "mlp_gate"].tanh() * (hidden @ w[p + "w2"].T)
        p = f"blocks.{i}."
        qkv = (rms(x, w[p + "norm1.weight"]) @ w[p + "qkv"].T).view(t, -1, config.dim)
        q, k, v = qkv.split([config.heads, config.groups, config.groups], 1)
        x = x + attend(turn(q), turn(k), v, torch.ones(t, t, dtype=torch.bool).tril()) @ w[p + "o"].T
        y = rms(x, w[p + "norm2.weight"])
        x = x + (nn.functional.silu(y @ w[p + "w_gate"].T) * (y @ w[p + "w_up"].T)) @ w[p + "w_down"].T
    return rms(x, w["norm.weight"])


@pytest.mark.parametrize("first", [0, 1])
def test_it_is_flamingo(first):
    model = decoder(replace(CROSS, first=first))
    assert [block.cross is not None for block in model.blocks] == [i % 2 == first for i in range(4)]
    rows, media, cu_media = prompts()
    places, more = arguments(rows, media, cu_media)
    want = [dense(model, rows[0], media[:8], cu_media[:4]), dense(model, rows[1], media[:0], cu_media[:1]),
            dense(model, rows[2], media[8:], cu_media[3:] - 8)]  # fmt: skip
    torch.testing.assert_close(model(*places, **more), torch.cat(want).float(), rtol=1e-5, atol=1e-5)


def test_a_batch_is_its_sequences():
    model = decoder()
    rows, media, cu_media = prompts()
    places, more = arguments(rows, media, cu_media)
    alone = [model(*p, **m) for p, m in (arguments([rows[0]], media[:8], cu_media[:4]),
                                         arguments([rows[2]], media[8:], cu([2])))]  # fmt: skip
    text = model(rows[1])  # no image anywhere
    torch.testing.assert_close(model(*places, **more), torch.cat([alone[0], text, alone[1]]), rtol=1e-5, atol=1e-5)


def test_closed_gates_leave_the_decoder_as_it_was():
    model, plain = decoder(), Decoder(CONFIG)
    plain.load_state_dict({name: p for name, p in model.state_dict().items() if ".cross." not in name})
    places, more = arguments(*prompts())
    assert not torch.allclose(model(*places, **more), plain(*places), atol=1e-2)
    for block in model.blocks:
        if block.cross is not None:
            nn.init.zeros_(block.cross.attention_gate)
            nn.init.zeros_(block.cross.mlp_gate)
    assert torch.equal(model(*places, **more), plain(*places))


def test_a_token_sees_the_last_image_alone():
    model = decoder()
    rows, media, cu_media = prompts()
    places, more = arguments(rows, media, cu_media)
    before = model(*places, **more)
    changed = media.clone()
    changed[3] += 1  # the only feature of the second image, which the token at 5 alone sees
    after = model(*places, **{**more, "media": changed})
    same = torch.isclose(before, after).all(1).tolist()
    assert same[:5] == [True] * 5 and not any(same[5:9]) and all(same[9:])  # later ones see it through token 5
    ranges = torch.stack([more["media_index"].clamp(min=0), more["media_index"] + 1], 1)
    ranged = model(*places, **{**more, "media_index": ranges})
    torch.testing.assert_close(ranged, before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("ranged", [False, True])
@torch.no_grad()
def test_steps_are_the_whole(ranged):
    """The prompts, and then tokens that come one or more at a time, not in every sequence."""
    model = decoder()
    rows, media, cu_media = prompts()
    ids = torch.randint(3, 80, (3, 4))
    (ids_whole, starts), more = arguments([torch.cat(pair) for pair in zip(rows, ids, strict=True)], media, cu_media)
    if ranged:  # all images so far
        first = torch.tensor([0, 3, 3]).repeat_interleave(starts.diff())
        index = more["media_index"].where(more["media_index"] >= 0, first.int() - 1)
        more["media_index"] = torch.stack([first.int(), index + 1], 1)
    whole = model(ids_whole, starts, **more).split([13, 8, 10])
    prompt = torch.cat([torch.arange(a, a + len(r)) for a, r in zip(starts.tolist(), rows, strict=False)])
    cache = model.new_cache(3, capacity=4)
    hidden = model(
        ids_whole[prompt], cu([9, 4, 6]), cache=cache, **{**more, "media_index": more["media_index"][prompt]}
    )
    found = [[part] for part in hidden.split([9, 4, 6])]
    taken = [0, 0, 0]
    for counts in ([1, 0, 1], [0, 3, 1], [2, 0, 0], [1, 1, 2]):
        new = torch.cat([row[t : t + n] for row, t, n in zip(ids, taken, counts, strict=True)])
        for i, part in enumerate(model(new, cu(counts), cache=cache).split(counts)):
            found[i].append(part)
        taken = [t + n for t, n in zip(taken, counts, strict=True)]
    for parts, want in zip(found, whole, strict=True):
        torch.testing.assert_close(torch.cat(parts), want, rtol=1e-5, atol=1e-5)
    assert cache.nbytes == super(MediaCache, cache).nbytes + 2 * 2 * 10 * 32 * 4


def test_chunks_of_a_prompt():
    model = decoder().requires_grad_(False)
    rows, media, cu_media = prompts()
    (ids, starts), more = arguments(rows[:1], media[:8], cu_media[:4])
    want, cache = model(ids, starts, **more), model.new_cache(1)
    index = more.pop("media_index")
    first = model(ids[:4], media_index=index[:4], cache=cache, **more)
    second = model(ids[4:], media_index=index[4:], cache=cache)
    torch.testing.assert_close(torch.cat([first, second]), want, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="media: the cache has its images already"):
        model(ids, media_index=index, cache=cache, **more)
    text = model.new_cache(1)
    model(ids[:1], cache=text)  # text in front of the images
    found = model(ids[1:], media_index=index[1:], cache=text, **more)
    torch.testing.assert_close(found, want[1:], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_chunks_of_some_sequences():
    """A sequence that has no part in a chunk goes on to see what it saw."""
    model, (rows, media, cu_media) = decoder(), prompts()
    (ids, starts), more = arguments(rows, media, cu_media)
    whole, index = model(ids, starts, **more), more.pop("media_index")
    cache, found = model.new_cache(3), torch.empty_like(whole)
    first, second, third = list(range(8)) + [9, 10] + list(range(13, 17)), [11, 12], [8, 17, 18]
    found[first] = model(ids[first], cu([8, 2, 4]), media_index=index[first], cache=cache, **more)
    found[second] = model(ids[second], cu([0, 2, 0]), media_index=index[second], cache=cache)
    found[third] = model(ids[third], cu([1, 0, 2]), cache=cache)
    torch.testing.assert_close(found, whole, rtol=1e-5, atol=1e-5)


def test_generation():
    model = decoder().requires_grad_(False)
    rows, media, cu_media = prompts()
    pieces = [(media[:8], cu_media[:4]), (media[:0], cu_media[:1]), (media[8:], cu([2]))]

    def embed(features, starts):
        return lambda ids, cu: dict(media=features, cu_media=starts, media_index=media_index(ids, cu, IMAGE))

    together = generate(model, rows, max_new_tokens=6, embed=embed(media, cu_media))
    assert len({tuple(answer.ids) for answer in together}) > 1
    for row, piece, got in zip(rows, pieces, together, strict=True):
        alone = generate(model, [row], max_new_tokens=6, embed=embed(*piece))[0]
        so_far = row
        for token in got.ids:  # without a cache
            places, more = arguments([so_far], *piece)
            assert int(model.logits(model(*places, **more))[-1].argmax()) == token
            so_far = torch.cat([so_far, torch.tensor([token])])
        assert alone.ids == got.ids


def test_one_graph():
    model = decoder()
    places, more = arguments(*prompts())
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*places, **more), model(*places, **more), rtol=1e-5, atol=1e-5)


def test_no_tokens():
    model = decoder()
    hidden = model(torch.zeros(0, dtype=torch.int64), cu([0, 0]))
    assert hidden.shape == (0, WIDTH)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (dict(cu_media=None), ValueError, "media: expected together with cu_media"),
        (dict(media_index=None), ValueError, "media_index: needed with media"),
        (dict(media=torch.zeros(10, 3)), ValueError, r"media: expected shape \[Tm, 20\]"),
        (dict(media_index=torch.full((19,), 7, dtype=torch.int32)), ValueError, "media_index"),
        (
            dict(cache=KVCache(CONFIG, 3, device=torch.device("cpu"), dtype=torch.float32)),
            TypeError,
            "cache: .*KVCache",
        ),
    ],
)
def test_bad_arguments(changes, error, message):
    places, more = arguments(*prompts())
    with pytest.raises(error, match=message):
        decoder().requires_grad_(False)(*places, **{**more, **changes})


@pytest.mark.parametrize("changes", [dict(width=16), dict(every=0), dict(first=4), dict(first=-1)])
def test_bad_configs(changes):
    with pytest.raises(ValueError, match="cross: expected"):
        CrossedDecoder(CONFIG, replace(CROSS, **changes))
