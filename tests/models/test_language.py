"""Every family of decoders against transformers on the same random weights: logits, gradients, windows, positions, the map."""

from dataclasses import replace

import pytest
import torch
import transformers as T
from torch import nn
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLTextModel

from tests.models.decoders import CASES, LENGTHS, LLAMA3, TEXT, WIDTHS, batch, checkpoint, cu, ours, theirs
from vlmops.models.config import DecoderConfig, RopeScaling
from vlmops.models.keymap import load_into, save
from vlmops.models.language.decoder import Decoder
from vlmops.models.language.families import from_json, keys
from vlmops.models.language.sizes import SIZES


@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients(case):
    reference = theirs(CASES[case]())
    decoder = ours(reference)
    ids, padded, mask = batch()
    labels = padded.masked_fill(~mask, -100)
    labels[:, :2] = -100  # a prompt is not learnt
    want = reference(padded, attention_mask=mask.long(), labels=labels)
    hidden = decoder(ids, cu(LENGTHS))
    torch.testing.assert_close(decoder.logits(hidden), want.logits[mask], rtol=1e-5, atol=1e-5)
    last = decoder.logits(hidden, cu(LENGTHS))
    torch.testing.assert_close(last, torch.stack([row[n - 1] for row, n in zip(want.logits, LENGTHS, strict=True)]),
                               rtol=1e-5, atol=1e-5)  # fmt: skip
    loss = decoder.loss(hidden, labels[mask], cu(LENGTHS))
    torch.testing.assert_close(loss, want.loss, rtol=1e-5, atol=1e-5)
    loss.backward()
    want.loss.backward()
    gradients = {name: p.grad for name, p in decoder.named_parameters()}
    found = dict(save(gradients, keys(decoder.config, reference.config.model_type)))
    expected = {name: p.grad for name, p in reference.named_parameters() if "vqmodel" not in name}
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-4, atol=1e-5 * float(grad.abs().max()) + 1e-7, msg=name)


@pytest.mark.parametrize("case", ["llama", "qwen2-tied", "gemma2", "opt", "persimmon", "chameleon", "chameleon-swin"])
def test_the_map_goes_both_ways(case):
    reference = theirs(CASES[case]())
    back = dict(
        save(ours(reference).state_dict(), keys(from_json(reference.config.to_dict()), reference.config.model_type))
    )
    expected = checkpoint(reference)
    assert back.keys() == expected.keys()
    assert all(torch.equal(t, expected[name]) for name, t in back.items())


def test_a_tied_file_may_hold_the_embedding_twice_and_early_llamas_their_frequencies():
    reference = theirs(CASES["gemma2"]())
    source = {**reference.state_dict(), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    assert "lm_head.weight" in source
    decoder = Decoder(from_json(reference.config.to_dict()))
    load_into(decoder, source, keys(decoder.config, "gemma2"))
    assert torch.equal(decoder.embedding, source["lm_head.weight"]) and decoder.head is None


@pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn", "llama3"])
@pytest.mark.parametrize("length", [6, 40])  # shorter and longer than the 16 tokens of the training
def test_rotary_scaling(kind, length):
    more = {"llama3": LLAMA3, "yarn": dict(original_max_position_embeddings=16, beta_fast=4.0)}.get(kind, {})
    rope = {**more, "rope_type": kind, "rope_theta": 1e4, "factor": 4.0}
    text = {**TEXT, "max_position_embeddings": 64 if kind == "yarn" else 16}
    reference = theirs(T.LlamaConfig(**text, head_dim=16, rope_parameters=rope))
    decoder = ours(reference)
    ids = torch.randint(0, 97, (length,))
    with torch.no_grad():
        want = reference(ids[None]).logits[0]
    torch.testing.assert_close(decoder.logits(decoder(ids)), want, rtol=1e-5, atol=1e-5)
    plain = Decoder(replace(decoder.config, rope_scaling=None))
    plain.load_state_dict(decoder.state_dict())
    changed = not torch.allclose(plain.logits(plain(ids)), want, rtol=1e-3, atol=1e-3)
    assert changed == (kind != "dynamic" or length > 16)  # each kind does something


@pytest.mark.parametrize("kind", ["dynamic", "yarn", "llama3"])
def test_rotary_scaling_where_half_of_a_head_turns(kind):
    more = {"llama3": LLAMA3, "yarn": dict(original_max_position_embeddings=16, beta_fast=4.0)}.get(kind, {})
    rope = {**more, "rope_type": kind, "rope_theta": 1e4, "factor": 4.0, "partial_rotary_factor": 0.5}
    text = {**WIDTHS, "num_attention_heads": 2, "max_position_embeddings": 64 if kind == "yarn" else 16}
    reference = theirs(T.PersimmonConfig(**text, rope_parameters=rope))
    decoder, ids = ours(reference), torch.randint(0, 97, (40,))
    with torch.no_grad():
        want = reference(ids[None]).logits[0]
    torch.testing.assert_close(decoder.logits(decoder(ids)), want, rtol=1e-5, atol=1e-5)


def test_dynamic_scaling_looks_at_each_sequence_alone():
    config = from_json(
        dict(
            model_type="llama", **{**TEXT, "max_position_embeddings": 16}, rope_scaling=dict(type="dynamic", factor=4.0)
        )
    )
    decoder = randomised(config)
    short, long = torch.randint(0, 97, (5,)), torch.randint(0, 97, (30,))
    both = decoder(torch.cat([short, long]), cu([5, 30]))
    torch.testing.assert_close(both, torch.cat([decoder(short), decoder(long)]), rtol=1e-5, atol=1e-5)


def randomised(config):
    decoder = Decoder(config)
    for p in decoder.parameters():
        nn.init.normal_(p, std=0.3)
    return decoder


def test_mrope_is_qwen2_vl():
    rope = dict(rope_type="default", rope_theta=1e4, mrope_section=[1, 2, 1])
    text = T.Qwen2VLTextConfig(**TEXT, rope_parameters=rope, rms_norm_eps=1e-6)
    text._attn_implementation = "eager"
    reference = Qwen2VLTextModel(text).eval()
    for p in reference.parameters():
        nn.init.normal_(p, std=0.3)
    config = from_json(text.to_dict())
    assert config.mrope == (1, 2, 1) and config.qkv_bias
    decoder = Decoder(config)
    source = {**reference.state_dict(), "lm_head.weight": torch.zeros(97, 32)}
    load_into(decoder, source, keys(config, "qwen2", base=""))
    ids, positions = torch.randint(0, 97, (11,)), torch.randint(0, 30, (3, 11))
    with torch.no_grad():
        want = reference(ids[None], position_ids=positions[:, None]).last_hidden_state[0]
        text_only = reference(ids[None]).last_hidden_state[0]
    torch.testing.assert_close(decoder(ids, positions=positions), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(decoder(ids), text_only, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(want, text_only, atol=1e-3)


def test_qwen_1_is_qwen_2_in_other_names():
    """Its own code is not in transformers: the same arithmetic in the layout of its files."""
    reference = theirs(T.Qwen2Config(**{**TEXT, "num_key_value_heads": 4}))
    state = reference.state_dict()
    source = {"transformer.wte.weight": state["model.embed_tokens.weight"], "transformer.ln_f.weight": state["model.norm.weight"],
              "lm_head.weight": state["lm_head.weight"]}  # fmt: skip
    names = {"ln_1.weight": "input_layernorm.weight", "ln_2.weight": "post_attention_layernorm.weight",
             "attn.c_proj.weight": "self_attn.o_proj.weight", "mlp.w1.weight": "mlp.up_proj.weight",
             "mlp.w2.weight": "mlp.gate_proj.weight", "mlp.c_proj.weight": "mlp.down_proj.weight"}  # fmt: skip
    for i in range(3):
        new, old = f"transformer.h.{i}.", f"model.layers.{i}."
        source |= {new + a: state[old + b] for a, b in names.items()}
        for kind in ("weight", "bias"):
            source[new + f"attn.c_attn.{kind}"] = torch.cat([state[f"{old}self_attn.{x}_proj.{kind}"] for x in "qkv"])
    json = dict(model_type="qwen", vocab_size=97, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, kv_channels=8,
                intermediate_size=96, layer_norm_epsilon=1e-6)  # fmt: skip
    config = from_json(json)
    decoder = Decoder(config)
    load_into(decoder, source, keys(config, "qwen"))
    ids = torch.randint(0, 97, (12,))
    torch.testing.assert_close(decoder.logits(decoder(ids)), reference(ids[None]).logits[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "kind", ["llama", "mistral", "qwen2", "gemma2", "qwen2_vl_text", "opt", "persimmon", "chameleon"]
)
def test_what_a_file_leaves_out_has_transformers_default(kind):
    full = T.AutoConfig.for_model(kind).to_dict()
    full["layer_types"] = None  # written out for the default number of layers
    bare, whole = from_json({"model_type": kind}), from_json(full)
    assert replace(bare, kv_heads=bare.groups, head_dim=bare.dim) == replace(
        whole, kv_heads=whole.groups, head_dim=whole.dim
    )


def test_files_of_transformers_4():
    old = dict(model_type="llama", rope_theta=5e5, rope_scaling={k: v for k, v in LLAMA3.items() if k != "rope_theta"})
    assert from_json(old).rope_scaling == RopeScaling("llama3", 8.0, 1.0, 4.0, 16) and from_json(old).rope_theta == 5e5
    mrope = dict(model_type="qwen2_vl", rope_theta=1e6, rope_scaling=dict(type="mrope", mrope_section=[16, 24, 24]))
    assert from_json(mrope).mrope == (16, 24, 24) and from_json(mrope).rope_scaling is None
    yarn = dict(model_type="qwen2", rope_scaling=dict(type="yarn", factor=4.0, mscale=1.0, mscale_all_dim=1.0))
    late = dict(model_type="qwen2", num_hidden_layers=6, use_sliding_window=True, sliding_window=9, max_window_layers=2)
    assert [from_json(late).windowed(i) for i in range(6)] == [False, False, True, True, True, True]
    assert from_json({**late, "max_window_layers": 6}).window_layers == "none"
    scaling = from_json(yarn).rope_scaling
    assert scaling.attention_factor == 1.0 and scaling.original_length == 32768


def test_prefix_tokens_see_each_other():
    decoder = randomised(from_json(CASES["gemma2-wide"]().to_dict()))
    ids = torch.randint(0, 97, (14,))
    prefix = torch.tensor([4, 0], dtype=torch.int32)
    before = decoder(ids, cu([8, 6]), prefix_lens=prefix)
    changed = ids.clone()
    changed[3], changed[11] = (ids[3] + 1) % 97, (ids[11] + 1) % 97
    after = decoder(changed, cu([8, 6]), prefix_lens=prefix)
    same = torch.isclose(before, after).all(1)
    assert same.tolist() == [False] * 8 + [True] * 3 + [False] * 3


def test_one_graph():
    decoder = randomised(from_json(CASES["gemma2"]().to_dict()))
    ids = torch.randint(0, 97, (sum(LENGTHS),))
    compiled = torch.compile(decoder, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(ids, cu(LENGTHS)), decoder(ids, cu(LENGTHS)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("lengths", [[], [0], [0, 3, 0, 2]])
def test_empty_sequences(lengths):
    decoder = randomised(from_json(CASES["qwen2"]().to_dict()))
    ids = torch.randint(0, 97, (sum(lengths),))
    hidden = decoder(ids, cu(lengths))
    assert hidden.shape == (sum(lengths), 32)
    loss = decoder.loss(hidden, ids, cu(lengths), reduction="none")
    if sum(lengths):
        assert (loss == 0).tolist() == [False, False, True, False, True]
    loss.sum().backward()


#: Totals that the models' pages on the Hugging Face hub state for their safetensors files; Gemma 2's are also the sums of table 2
#: of its report (Gemma Team 2024: 2,024,517,888, 8,324,201,984 and 26,047,480,320 without 256,000 * width of embeddings).
#: Persimmon is what Fuyu-8B's page has (9.41B) without its projection of 30 x 30 patches. OPT's and Chameleon's pages state no
#: exact total: theirs are transformers' own count of the models (Chameleon's without its image tokenizer).
PUBLISHED = {
    "vicuna-7b": 6_738_415_616, "vicuna-13b": 13_015_864_320, "llama2-70b": 68_976_648_192, "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496, "llama3.1-8b": 8_030_261_248, "llama3.1-70b": 70_553_706_496,
    "mistral-7b-v0.1": 7_241_732_096, "mistral-7b-v0.2": 7_241_732_096, "mistral-7b-v0.3": 7_248_023_552,
    "mistral-nemo-12b": 12_247_782_400, "mistral-large-2": 122_610_069_504, "qwen-7b": 7_721_324_544,
    "qwen1.5-7b": 7_721_324_544, "qwen2-0.5b": 494_032_768, "qwen2-1.5b": 1_543_714_304, "qwen2-7b": 7_615_616_512,
    "qwen2-72b": 72_706_203_648, "gemma2-2b": 2_024_517_888 + 256_000 * 2304, "gemma2-9b": 8_324_201_984 + 256_000 * 3584,
    "gemma2-27b": 26_047_480_320 + 256_000 * 4608,
    "opt-2.7b": 2_651_596_800, "opt-6.7b": 6_658_473_984, "persimmon-8b": 9_408_238_592 - 4096 * (2700 + 1),
    "chameleon-7b": 7_043_090_432 - 29_423_616,
    "qwen1.5-72b": 72_287_920_128, "qwen2.5-3b": 3_085_938_688,
}  # fmt: skip


@pytest.mark.parametrize("name", SIZES)
def test_real_sizes(name):
    with torch.device("meta"):
        decoder = Decoder(SIZES[name])
    assert sum(p.numel() for p in decoder.parameters()) == PUBLISHED[name]


def config(**changes):
    return DecoderConfig(**{**dict(vocab=10, width=16, layers=1, heads=4, mlp_width=8), **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(heads=3), "heads: expected a divisor of width 16"),
        (dict(kv_heads=3), "kv_heads: expected a divisor of 4"),
        (dict(head_dim=5), "head_dim: expected an even"),
        (dict(mrope=(1, 2, 1)), "mrope: expected three with a sum of 2"),
        (dict(window_layers="odd"), "window_layers: .*'odd'"),
        (dict(window_layers="from:"), "window_layers"),
        (dict(window=0), "window: expected at least 1"),
        (dict(logit_softcap=-1.0), "logit_softcap"),
        (dict(activation="tanh"), "activation"),
        (dict(rope_scaling=RopeScaling("longrope")), "rope_scaling: .*'longrope'"),
        (dict(rope_scaling=RopeScaling("linear", 0.0)), "rope_scaling: .*factor"),
        (dict(vocab=0), "vocab: expected at least 1"),
        (dict(activation="relu2"), "gated: .*relu2"),
        (dict(norm="batch_norm"), "norm: .*'batch_norm'"),
        (dict(norm="layer_norm", norm_offset=1.0), "norm_offset: .*layer_norm"),
        (dict(norm_after=True, sandwich=True), "sandwich: .*norm_after"),
        (dict(qk_norm="each"), "qk_norm: .*'each'"),
        (dict(rotary_factor=0.25), "rotary_factor: of head_dim 4: expected an even number .*, got 1"),
        (dict(rotary_factor=1.5), "rotary_factor"),
        (dict(learned_positions=-1), "learned_positions: expected 0 or more"),
        (dict(learned_positions=4, mrope=(1, 1, 0)), "mrope: expected none"),
        (dict(learned_positions=4, rope_scaling=RopeScaling("linear", 2.0)), "rope_scaling: expected none"),
    ],
)
def test_bad_configs(changes, message):
    with pytest.raises(ValueError, match=message):
        Decoder(config(**changes))


@pytest.mark.parametrize(
    ("json", "message"),
    [
        (dict(model_type="gpt2"), "model_type: .*'gpt2'"),
        (dict(model_type="qwen2", attention_bias=True), "attention_bias: family qwen2 has none"),
        (dict(model_type="gemma2", mlp_bias=True), "mlp_bias: family gemma2 has none"),
        (dict(model_type="opt", word_embed_proj_dim=512), "word_embed_proj_dim: expected hidden_size 768"),
        (dict(model_type="opt", do_layer_norm_before=False), "do_layer_norm_before: .*opt-350m"),
        (dict(model_type="opt", _remove_final_layer_norm=True), "do_layer_norm_before"),
        (dict(model_type="opt", layer_norm_elementwise_affine=False), "layer_norm_elementwise_affine"),
        (dict(model_type="gemma2", use_bidirectional_attention=True), "use_bidirectional_attention"),
        (dict(model_type="llama", rope_parameters=dict(rope_type="longrope", factor=2.0)), "rope_type: .*longrope"),
        (dict(model_type="llama", rope_parameters=dict(partial_rotary_factor=0.5)), "partial_rotary_factor"),
        (
            dict(model_type="gemma2", layer_types=["full_attention", "sliding_attention", "full_attention"]),
            "layer_types",
        ),
    ],
)
def test_bad_files(json, message):
    with pytest.raises(ValueError, match=message):
        from_json(json)


def test_bad_families():
    for call in (lambda: from_json({}, "gpt2"), lambda: keys(config(), "gpt2")):
        with pytest.raises(ValueError, match=r"family: .*'gpt2'"):
            call()


IDS = torch.tensor([1, 2, 3])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (dict(), ValueError, "input_ids: expected either"),
        (dict(input_ids=IDS, inputs_embeds=torch.zeros(3, 16)), ValueError, "input_ids: expected either"),
        (dict(input_ids=IDS.float()), TypeError, "input_ids: expected int64"),
        (dict(input_ids=IDS[None]), ValueError, "input_ids: expected 1 dim"),
        (dict(inputs_embeds=torch.zeros(3, 15)), ValueError, r"inputs_embeds: expected shape \[T, 16\]"),
        (dict(input_ids=IDS, cu_seqlens=cu([2])), ValueError, "cu_seqlens: .*number of tokens 3, got 2"),
        (dict(input_ids=IDS, cu_seqlens=torch.tensor([0, 2, 1, 3])), ValueError, "cu_seqlens: .*monotone"),
        (dict(input_ids=IDS, positions=torch.arange(2)), ValueError, "positions: expected .3., one a token"),
        (dict(input_ids=IDS, positions=torch.zeros(3, 3)), ValueError, r"positions: expected \[T\], got"),
        (dict(input_ids=IDS, prefix_lens=torch.zeros(2, dtype=torch.int32)), ValueError, "prefix_lens"),
    ],
)
def test_bad_inputs(arguments, error, message):
    with pytest.raises(error, match=message):
        randomised(config())(**arguments)


def test_learned_positions_end():
    decoder = randomised(config(learned_positions=4, position_offset=2))
    four = torch.tensor([1, 2, 3, 4])
    assert decoder.position_embedding.shape == (6, 16)
    torch.testing.assert_close(decoder(four), decoder(four, positions=torch.arange(4)))
    assert not torch.allclose(decoder(four), decoder(four, positions=torch.tensor([0, 0, 0, 0])), atol=1e-3)
    cache = decoder.new_cache(1)
    with torch.no_grad():
        decoder(four, cache=cache)
        for call in (dict(positions=four), dict(positions=four - 2), dict(cache=cache)):
            with pytest.raises(ValueError, match="positions: this model has 0 to 3, got"):
                decoder(four, **call)
        with pytest.raises(ValueError, match=r"positions: expected \[T\]"):
            decoder(four, positions=torch.zeros(3, 4, dtype=torch.int64))
    assert cache.lengths.tolist() == [4]


def test_bad_labels():
    decoder = randomised(config())
    with pytest.raises(ValueError, match="labels: expected shape"):
        decoder.loss(decoder(IDS), IDS[:2])
