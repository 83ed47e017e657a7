"""The cache of a decoder: any way of cutting sequences into steps gives the hidden states of one whole forward."""

import pytest
import torch
from torch import nn

from vlmops.models.config import DecoderConfig, RopeScaling
from vlmops.models.language.cache import ROUND, KVCache
from vlmops.models.language.decoder import Decoder
from vlmops.models.language.rope import rotary_tables

PLAIN = dict(vocab=50, width=16, layers=2, heads=4, kv_heads=2, mlp_width=24, head_dim=8)
VARIANTS = {
    "plain": {},
    "window": dict(window=3, window_layers="even"),
    "gemma": dict(norm_offset=1.0, sandwich=True, attention_softcap=2.0, window=4, window_layers="all", tied=True),
    "mrope": dict(mrope=(1, 2, 1)),
    "linear": dict(rope_scaling=RopeScaling("linear", 4.0)),
    "opt": dict(
        learned_positions=16, position_offset=2, norm="layer_norm", gated=False, activation="relu", kv_heads=None
    ),
    "persimmon": dict(rotary_factor=0.5, qk_norm="shared", gated=False, activation="relu2", o_bias=True, mlp_bias=True),
    "chameleon": dict(qk_norm="heads", norm_after=True),
}
CHUNKS = [[5, 1, 0], [1, 1, 4], [0, 3, 1], [1, 1, 1], [4, 0, 0]]  # tokens of three sequences in each step


def decoder(**options):
    model = Decoder(DecoderConfig(**{**PLAIN, **options}))
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    return model.eval().requires_grad_(False)


def cu(lengths):
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)


def sequences():
    return [torch.randint(0, 50, (sum(step[i] for step in CHUNKS),)) for i in range(3)]


def in_steps(model, rows, cache, positions=None):
    """The hidden states of each sequence, step by step."""
    done, found = [0] * len(rows), [[] for _ in rows]
    for step in CHUNKS:
        cuts = [slice(d, d + n) for d, n in zip(done, step, strict=True)]
        ids = torch.cat([row[c] for row, c in zip(rows, cuts, strict=True)])
        at = None if positions is None else torch.cat([p[:, c] for p, c in zip(positions, cuts, strict=True)], 1)
        hidden = model(ids, cu(step), at, cache=cache)
        for i, part in enumerate(hidden.split(step)):
            found[i].append(part)
        done = [d + n for d, n in zip(done, step, strict=True)]
    return torch.cat([part for parts in found for part in parts])


@pytest.mark.parametrize("variant", VARIANTS)
def test_steps_are_the_whole(variant):
    model, rows = decoder(**VARIANTS[variant]), sequences()
    positions = [torch.randint(0, 20, (3, len(row))) for row in rows] if variant == "mrope" else None
    whole = model(
        torch.cat(rows), cu([len(row) for row in rows]), None if positions is None else torch.cat(positions, 1)
    )
    cache = model.new_cache(3, capacity=4)
    torch.testing.assert_close(in_steps(model, rows, cache, positions), whole, rtol=1e-5, atol=1e-5)
    assert cache.lengths.tolist() == [len(row) for row in rows] and cache.bound >= max(cache.lengths.tolist())


def test_it_grows_and_keeps_what_it_has():
    model = decoder()
    rows = [torch.randint(0, 50, (n,)) for n in (ROUND - 2, 3)]
    cache = model.new_cache(2, capacity=1)
    assert cache.capacity == ROUND and cache.nbytes == 2 * 2 * 2 * ROUND * 2 * 8 * 4
    model(torch.cat(rows), cu([ROUND - 2, 3]), cache=cache)
    more = torch.randint(0, 50, (6,))
    hidden = model(more, cu([5, 1]), cache=cache)
    assert cache.capacity == 2 * ROUND
    for i, (row, new, got) in enumerate(zip(rows, more.split([5, 1]), hidden.split([5, 1]), strict=True)):
        torch.testing.assert_close(got, model(torch.cat([row, new]))[len(row) :], rtol=1e-5, atol=1e-5, msg=str(i))


def test_prefix_lens_with_a_cache():
    model, ids = decoder(), torch.randint(0, 50, (9,))
    prefix = torch.tensor([3, 2], dtype=torch.int32)
    want = model(ids, cu([5, 4]), prefix_lens=prefix)
    got = model(ids, cu([5, 4]), prefix_lens=prefix, cache=model.new_cache(2))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(want, model(ids, cu([5, 4])), atol=1e-3)


def test_dynamic_scaling_counts_cached_tokens():
    """A step's angles are those of the sequence's length then; keys keep the angles they were stored with."""
    scaling = RopeScaling("dynamic", 4.0, original_length=8)
    model, ids = decoder(rope_scaling=scaling), torch.randint(0, 50, (30,))
    short = model.new_cache(1)
    got = torch.cat([model(part, cache=short) for part in ids[:8].split([5, 3])])
    torch.testing.assert_close(got, model(ids[:8]), rtol=1e-5, atol=1e-5)
    long, whole = model.new_cache(1), model(ids)
    torch.testing.assert_close(model(ids, cache=long), whole, rtol=1e-5, atol=1e-5)
    step = model.pack(model.embed(ids[:1]), cache=long)
    for table, want in zip(step.rope, rotary_tables(model.config, torch.tensor([30]), torch.tensor([31])), strict=True):
        assert torch.equal(table, want)
    assert not torch.allclose(step.rope[0], rotary_tables(model.config, torch.tensor([30]))[0], atol=1e-3)


def test_a_failed_step_changes_nothing():
    model = decoder()
    cache = model.new_cache(2)
    model(torch.tensor([1, 2, 3]), cu([2, 1]), cache=cache)
    with pytest.raises(ValueError, match=r"positions: expected \[T\]"):
        model(torch.tensor([1, 2]), cu([1, 1]), torch.zeros(3, 2), cache=cache)
    assert cache.lengths.tolist() == [2, 1] and cache.bound == 2
    with pytest.raises(ValueError, match=r"cu_seqlens: expected shape \[3\] as in the cache"):
        model(torch.tensor([1]), cache=cache)


def test_a_cache_is_not_for_training():
    model = decoder().requires_grad_(True)
    with pytest.raises(ValueError, match="cache: is for generation"):
        model(torch.tensor([1]), cache=model.new_cache(1))


@pytest.mark.parametrize("arguments", [(0, 4), (2, 0)])
def test_bad_sizes(arguments):
    with pytest.raises(ValueError, match="cache: expected at least 1"):
        KVCache(decoder().config, arguments[0], capacity=arguments[1], device=torch.device("cpu"), dtype=torch.float32)


def test_more_tokens_than_cu_seqlens_count():
    with pytest.raises(ValueError, match="int32"):
        KVCache(decoder().config, 2**20, capacity=2**11, device=torch.device("meta"), dtype=torch.float32)
