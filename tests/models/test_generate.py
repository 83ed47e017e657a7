"""Generation: token by token what transformers generates, the distributions that sampling promises, text that never tears."""

import pytest
import torch
import transformers as T
from tokenizers import Tokenizer, decoders, models
from torch import nn

from tests.models.decoders import VQ
from vlmops.models.config import DecoderConfig
from vlmops.models.generate import Generated, Sampling, generate, stream
from vlmops.models.keymap import load_into
from vlmops.models.language.decoder import Decoder
from vlmops.models.language.families import from_json, keys
from vlmops.models.language.sampling import choose, filtered
from vlmops.models.language.text import TextStream

TEXT = dict(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=64, head_dim=16, pad_token_id=0, eos_token_id=None)  # fmt: skip
CONFIGS = {
    "llama": lambda: T.LlamaConfig(**TEXT),
    "mistral": lambda: T.MistralConfig(**TEXT, sliding_window=5),
    "qwen2": lambda: T.Qwen2Config(**{**TEXT, "num_attention_heads": 2}),
    "gemma2": lambda: T.Gemma2Config(**TEXT, sliding_window=4),  # shorter than some prompts, longer than others
    "gemma2-wide": lambda: T.Gemma2Config(**TEXT, sliding_window=32),
    "opt": lambda: T.OPTConfig(
        **without("intermediate_size", "num_key_value_heads", "head_dim"), ffn_dim=48, tie_word_embeddings=False
    ),
    "persimmon": lambda: T.PersimmonConfig(**without("num_key_value_heads", "head_dim")),
    "chameleon": lambda: T.ChameleonConfig(**without("head_dim"), vq_config=VQ, vocabulary_map={"<image>": 4}),
}
PROMPTS = [[5, 3, 9, 11, 2, 8, 41], [7], [13, 12, 90]]


def without(*names):
    return {name: value for name, value in TEXT.items() if name not in names}


def pair(name):
    config = CONFIGS[name]()
    config._attn_implementation = "eager"
    build = T.AutoModelForCausalLM.from_config
    build = T.ChameleonForConditionalGeneration._from_config if config.model_type == "chameleon" else build
    reference = build(config).eval()
    for name, p in reference.named_parameters():  # with larger embeddings Gemma's tied output repeats its input
        nn.init.normal_(p, std=0.1 if "embed" in name else 0.4)
        if config.model_type == "opt" and p.dim() == 1:  # with large biases it always says the same
            nn.init.normal_(p, mean=float("norm.weight" in name), std=0.1)
    decoder = Decoder(from_json(config.to_dict()))
    state = {name: t for name, t in reference.state_dict().items() if "vqmodel" not in name}
    load_into(decoder, state, keys(decoder.config, config.model_type))
    return reference, decoder.eval()


def tiny(**options):
    decoder = Decoder(DecoderConfig(**{**dict(vocab=300, width=16, layers=1, heads=2, mlp_width=16), **options}))
    for p in decoder.parameters():
        nn.init.normal_(p, std=0.5)
    return decoder


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_tokens_are_transformers(name):
    reference, decoder = pair(name)
    want = []
    for prompt in PROMPTS:
        ids = reference.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)
        want.append(ids[0, len(prompt) :].tolist())
    assert [a.ids for a in generate(decoder, PROMPTS, max_new_tokens=12)] == want
    assert [a.ids for a in generate(decoder, PROMPTS, max_new_tokens=12, use_cache=False)] == want
    assert len({tuple(ids) for ids in want}) == 3 and max(len(set(ids)) for ids in want) >= 3  # not all one token


def test_repetition_penalty_is_transformers():
    reference, decoder = pair("llama")
    for prompt in PROMPTS:
        want = reference.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False, repetition_penalty=1.7)
        (answer,) = generate(decoder, [prompt], max_new_tokens=12, sampling=Sampling(repetition_penalty=1.7))
        assert answer.ids == want[0, len(prompt) :].tolist()
    logits, ids = torch.randn(2, 9), torch.tensor([[1, 2, 3], [4, 4, 8]])
    seen = torch.zeros(2, 9, dtype=torch.bool).scatter_(1, ids, True)
    want = T.RepetitionPenaltyLogitsProcessor(1.3)(ids, logits.clone())
    assert torch.equal(filtered(logits, Sampling(repetition_penalty=1.3), seen), want)
    assert (logits[seen] < 0).any() and (logits[seen] > 0).any()
    plain = generate(decoder, PROMPTS, max_new_tokens=12)
    assert [a.ids for a in plain] != [
        a.ids for a in generate(decoder, PROMPTS, max_new_tokens=12, sampling=Sampling(repetition_penalty=1.7))
    ]


def test_stop_ids_end_each_sequence_alone():
    decoder = pair("llama")[1]
    free = [a.ids for a in generate(decoder, PROMPTS, max_new_tokens=12)]
    stop = free[0][2]
    answers = generate(decoder, PROMPTS, max_new_tokens=12, stop_ids=[stop])
    for answer, whole in zip(answers, free, strict=True):
        cut = whole.index(stop) + 1 if stop in whole else 12
        assert answer == Generated(whole[:cut], None, "stop_id" if stop in whole else "length")
    assert len({len(a.ids) for a in answers}) > 1  # they end at different steps


@pytest.mark.parametrize(
    "options", [dict(top_k=5), dict(top_p=0.7), dict(min_p=0.1), dict(top_k=20, top_p=0.9, min_p=0.02)]
)
def test_filters_are_transformers(options):
    logits = torch.randn(4, 60) * 3
    sampling = Sampling(temperature=0.8, **options)
    want = T.TemperatureLogitsWarper(0.8)(None, logits)
    for name, warper in (("top_k", T.TopKLogitsWarper), ("top_p", T.TopPLogitsWarper), ("min_p", T.MinPLogitsWarper)):
        want = warper(options[name])(None, want) if name in options else want
    got = filtered(logits, sampling)
    assert torch.equal(got, want) and torch.isinf(got).any()


def test_tokens_come_as_often_as_they_should():
    logits = torch.tensor([[0.5, float("-inf"), 2.0, 1.0, -1.0]])
    n = 40_000
    uniform = (torch.arange(n) + 0.5) / n
    for sampling in (Sampling(temperature=1.0), Sampling(temperature=0.5, top_k=3)):
        tokens = choose(logits.expand(n, 5), sampling, uniform)
        share = tokens.bincount(minlength=5) / n
        torch.testing.assert_close(share, filtered(logits, sampling)[0].softmax(0), atol=1e-3, rtol=0)
    edges = torch.tensor([0.0, 1 - 2**-24])
    assert choose(logits.expand(2, 5), Sampling(temperature=1.0), edges).tolist() == [0, 4]
    hidden_ends = torch.tensor([[float("-inf"), 1.0, float("-inf")]]).expand(2, 3)
    assert choose(hidden_ends, Sampling(temperature=1.0), edges).tolist() == [1, 1]


def test_seeds():
    decoder = pair("qwen2")[1]

    def run(prompts, seed):
        answers = generate(decoder, prompts, max_new_tokens=10, sampling=Sampling(temperature=1.5, seed=seed))
        return [a.ids for a in answers]

    assert run(PROMPTS, 3) == run(PROMPTS, 3) != run(PROMPTS, 4)
    assert run(PROMPTS, 3)[0] == run(PROMPTS[:1], 3)[0]  # whatever the batch
    assert not torch.equal(Sampling(seed=3).uniforms(2, 4)[1], Sampling(seed=4).uniforms(1, 4)[0])
    free = run(PROMPTS, 3)
    sampling = Sampling(temperature=1.5, seed=3)
    for answer, whole in zip(
        generate(decoder, PROMPTS, max_new_tokens=10, sampling=sampling, stop_ids=[free[0][1]]), free, strict=True
    ):  # who ends early takes nobody's random numbers along
        assert answer.ids == whole[: len(answer.ids)] and (answer.finish == "stop_id" or len(answer.ids) == 10)
    same = run([[7], [7]], 3)
    assert same[0] != same[1]
    torch.manual_seed(1)
    first = run(PROMPTS, None)
    assert first != run(PROMPTS, None)
    torch.manual_seed(1)
    assert first == run(PROMPTS, None)


def test_embeddings_and_mrope_positions():
    decoder = tiny(vocab=97, head_dim=16, mrope=(2, 3, 3), layers=2)
    prompts = [[5, 9, 9, 9, 9, 8], [4, 7]]
    image = torch.randn(4, 16)
    positions = torch.tensor([[0, 1, 1, 1, 1, 3, 0, 1], [0, 1, 1, 2, 2, 3, 0, 1], [0, 1, 2, 1, 9, 3, 0, 1]])

    def embed(ids, cu_seqlens):
        assert cu_seqlens.tolist() == [0, 6, 8]
        x = decoder.embed(ids)
        x[ids == 9] = image
        return dict(inputs_embeds=x, positions=positions)

    answers = generate(decoder, prompts, max_new_tokens=6, embed=embed)
    for i, (first, last) in enumerate([(0, 6), (6, 8)]):  # by hand, without a cache
        x, at, ids = decoder.embed(torch.tensor(prompts[i])), positions[:, first:last], []
        if i == 0:
            x[1:5] = image
        for _ in range(6):
            ids.append(int(decoder.logits(decoder(inputs_embeds=x, positions=at))[-1].argmax()))
            x = torch.cat([x, decoder.embed(torch.tensor(ids[-1:]))])
            at = torch.cat([at, at.max().expand(3, 1) + 1], 1)
        assert answers[i].ids == ids
    assert answers[0].ids != generate(decoder, prompts[:1], max_new_tokens=6)[0].ids


# -- text --------------------------------------------------------------------------------------------------------------


def byte_tokenizer():
    """A token for each byte, as every byte-level tokenizer has for rare characters."""
    alphabet = {c: i for i, c in enumerate(sorted(_byte_characters().values(), key=ord))}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.decoder = decoders.ByteLevel()
    to_id = {b: alphabet[c] for b, c in _byte_characters().items()}
    return tokenizer, lambda text: [to_id[b] for b in text.encode()]


def _byte_characters():
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(rest)}


def llama_tokenizer():
    """Words with a leading space mark, which the decoder drops in front of the first, and byte tokens."""
    words = ["<unk>", *(f"<0x{i:02X}>" for i in range(256)), "▁Hello", "▁world", "!", "▁", "wo"]
    tokenizer = Tokenizer(
        models.BPE(vocab={w: i for i, w in enumerate(words)}, merges=[], unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer, {w: i for i, w in enumerate(words)}


def pieces(tokenizer, ids, stop=()):
    text = TextStream(tokenizer, stop)
    found = []
    for token in ids:
        found.append(text.push(token))
        if text.stopped:
            return found, True
    return [*found, text.flush()], text.stopped


def test_characters_stay_whole():
    tokenizer, encode = byte_tokenizer()
    text = "naïve 日本 🙂👩‍👩‍👧 end"
    found, _ = pieces(tokenizer, encode(text))
    assert "".join(found) == text
    assert all("\ufffd" not in p for p in found) and found.count("") > 10  # continuation bytes wait
    cut, _ = pieces(tokenizer, encode("a日")[:-1])
    assert cut == ["a", "", "", "\ufffd"]  # what can never be completed comes at the end


def test_leading_spaces_of_llama():
    tokenizer, ids = llama_tokenizer()
    sentence = [ids[w] for w in ("▁Hello", "▁world", "!", "▁", "<0xE6>", "<0x97>", "<0xA5>", "▁world")]
    found, _ = pieces(tokenizer, sentence)
    assert "".join(found) == tokenizer.decode(sentence) == "Hello world! 日 world"
    assert found[:3] == ["Hello", " world", "!"]


@pytest.mark.parametrize(
    ("text", "stop", "want", "stopped"),
    [
        ("one STOP two", ["STOP"], "one ", True),
        ("one STO two", ["STOP"], "one STO two", False),
        ("STOP", ["STOP"], "", True),
        ("ab STOSTOP", ["STOP"], "ab STO", True),
        ("x日本", ["本"], "x日", True),
        ("aXbYc", ["Y", "Xb"], "a", True),
        ("aXbYc", ["bYc", "Yc"], "aX", True),
        ("ends with ST", ["STOP"], "ends with ST", False),
        ("\n\nUser: hi", ["\nUser:"], "\n", True),
    ],
)
def test_stop_strings(text, stop, want, stopped):
    tokenizer, encode = byte_tokenizer()
    found, ended = pieces(tokenizer, encode(text), stop)
    assert "".join(found) == want and ended == stopped
    shown = ""
    for piece in found:  # at no time is a part of a stop string out that turns out to be one
        shown += piece
        assert want.startswith(shown)


def test_stop_strings_inside_a_token():
    class Words:
        def decode(self, ids):
            return "".join(["ab", "cSTOPd", "e"][i] for i in ids)

    assert pieces(Words(), [0, 1, 2], ["STOP"]) == (["ab", "c"], True)
    assert pieces(Words(), [0, 1, 2], ["Pd", "STO"]) == (
        ["ab", "c"],
        True,
    )  # the earliest, in whatever order they are given


def scripted(decoder, answers):
    """The decoder with scores that dictate each sequence's tokens, whatever it reads."""

    class Model:
        device, new_cache = decoder.device, decoder.new_cache

        def __init__(self):
            self.at, self.sizes = [0] * len(answers), []

        def __call__(self, input_ids, cu_seqlens, positions, **more):
            self.rows = [i for i, n in enumerate(cu_seqlens.diff().tolist()) if n]
            self.sizes.append(len(self.rows))
            return decoder(input_ids, cu_seqlens, positions, **more)

        def logits(self, hidden, cu_seqlens=None):
            scores = torch.zeros(len(self.rows), 300)
            for row, i in enumerate(self.rows):
                scores[row, answers[i][self.at[i]]] = 1.0
                self.at[i] += 1
            return scores

    return Model()


def test_stream_gives_the_text_of_generate_and_stops_each_alone():
    tokenizer, encode = byte_tokenizer()
    texts = ["日本 is far", "no end at all!\nU", "hi\nUser: more"]
    script = [[*encode(text), *[299] * 20] for text in texts]
    options = dict(max_new_tokens=16, stop_ids=[299], stop=["\nUser:"])
    decoder = tiny().eval()
    answers = generate(scripted(decoder, script), [[1], [1, 2], [3]], tokenizer=tokenizer, **options)
    assert [a.text for a in answers] == ["日本 is far", "no end at all!\nU", "hi"]
    assert [a.finish for a in answers] == ["stop_id", "length", "stop_string"]
    assert answers[0].ids[-1] == 299 and answers[2].ids == encode("hi\nUser:") and len(answers[1].ids) == 16
    model = scripted(decoder, script)
    found = ["", "", ""]
    for i, piece in stream(model, [[1], [1, 2], [3]], tokenizer, **options):
        assert piece and "\ufffd" not in piece
        found[i] += piece
    assert found == [a.text for a in answers]
    assert model.sizes == [3] * 8 + [2] * 6 + [1] * 2  # who ended takes no part any more


def test_a_stream_is_lazy_but_checks_at_once():
    tokenizer, encode = byte_tokenizer()
    model = scripted(tiny(), [[*encode("abcdef")]])
    found = stream(model, [[1]], tokenizer, max_new_tokens=6)
    assert next(found) == (0, "a") and len(model.sizes) == 1
    with pytest.raises(ValueError, match="tokenizer: needed"):
        stream(model, [[1]], None, max_new_tokens=6)
    with pytest.raises(ValueError, match="prompts"):
        stream(model, [[]], tokenizer, max_new_tokens=6)


def test_nothing_to_do():
    decoder = tiny()
    assert generate(decoder, [], max_new_tokens=3) == []
    assert generate(decoder, [[1], [2]], max_new_tokens=0) == [Generated([], None, "length")] * 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(prompts=[[1], []]), "prompts: expected at least one token id .* prompt 1"),
        (dict(prompts=[[-1]]), "prompts"),
        (dict(prompts=[[0.5]]), "prompts"),
        (dict(max_new_tokens=-1), "max_new_tokens"),
        (dict(max_new_tokens=1.5), "max_new_tokens"),
        (dict(stop=["x"]), "stop: strings need a tokenizer"),
        (dict(stop=[""], tokenizer=object()), "stop: .*none empty"),
        (dict(stop="ab", tokenizer=object()), "stop: expected a sequence"),
        (dict(embed=dict, use_cache=False), "use_cache: needed with embed"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        generate(tiny(), **{**dict(prompts=[[1]], max_new_tokens=2), **arguments})


@pytest.mark.parametrize(
    "options",
    [dict(temperature=-1.0), dict(temperature=float("nan")), dict(top_k=-1), dict(top_p=0.0), dict(top_p=1.1), dict(min_p=-0.1),
     dict(repetition_penalty=0.0)],
)  # fmt: skip
def test_bad_sampling(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))}: expected"):
        Sampling(**options)
