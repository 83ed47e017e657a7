"""The models of the field by name: their published sizes, transformers' own count, random weights, the command."""

import json
import re
from dataclasses import replace

import pytest
import torch
import transformers as T
from PIL import Image
from torch import nn
from typer.testing import CliRunner

from vlmops.cli import app
from vlmops.models import PRESETS, build
from vlmops.models.config import ConnectorConfig, RopeScaling, VLMConfig
from vlmops.models.formats import FORMATS
from vlmops.models.initialise import STD, initialise
from vlmops.models.language.block import HeadNorm
from vlmops.models.language.cross import GatedCrossAttention
from vlmops.models.norm import Norm
from vlmops.models.presets import TYPES
from vlmops.models.vision import SIZES as TOWERS
from vlmops.models.vision import VisionTransformer

LLAVA = ("1.5-7b", "1.5-13b", "next-vicuna-7b", "next-mistral-7b", "next-llama3-8b", "next-72b")
WANTED = [
    *(f"llava-{x}" for x in LLAVA), "flamingo-3b", "flamingo-9b", "blip2", "qwen-vl", *(f"qwen2-vl-{n}b" for n in (2, 7, 72)),
    "cogvlm2-19b", "pixtral-12b", "pixtral-large", *(f"paligemma2-{n}b" for n in (3, 10, 28)), "fuyu-8b", "chameleon-7b",
]  # fmt: skip
#: transformers does not have these.
ELSEWHERE = ("qwen-vl", "cogvlm2-19b", "flamingo-3b")


def count(module):
    return sum(p.numel() for p in module.parameters())


def on_meta(name):
    with torch.device("meta"):
        return build(name)


def test_all_are_there():
    assert set(WANTED) <= set(PRESETS)
    for name, preset in PRESETS.items():
        assert preset.kind in TYPES and preset.source and preset.config.images["mode"], name
        assert preset.exact or preset.published % 10_000_000 == 0, name


@pytest.mark.parametrize("name", PRESETS)
def test_published_parameters(name):
    """Of exact figures within 0.1%, of rounded ones as precisely as they are rounded."""
    preset, vlm = PRESETS[name], on_meta(name)
    assert all(p.is_meta for p in vlm.parameters())
    assert abs(count(vlm) - preset.published) <= preset.tolerance


def test_tolerance():
    of = PRESETS["llava-1.5-7b"]
    assert of.tolerance == pytest.approx(7_063_427.072)
    assert replace(of, exact=False, published=13_400_000_000).tolerance == 50_000_000
    assert replace(of, exact=False, published=124_000_000_000).tolerance == 500_000_000


@pytest.mark.parametrize("name", [name for name in PRESETS if name not in ELSEWHERE])
def test_transformers_counts_the_same(name):
    """Its own model of the file that the preset writes, to the last parameter."""
    config = PRESETS[name].config
    found = FORMATS[config.family].write(config)
    described, kind = T.AutoConfig.for_model(**found), getattr(T, found["architectures"][0])
    with torch.device("meta"):
        assert count(kind(described)) == count(build(config))


@pytest.mark.parametrize("name", PRESETS)
def test_a_file_says_the_same(name):
    """But for what ``generation_config.json`` says: end and padding."""
    config = PRESETS[name].config
    found = FORMATS[config.family].read(json.loads(json.dumps(FORMATS[config.family].write(config))))
    outside = dict(end_tokens=config.end_tokens, pad_token=config.pad_token)
    assert settled(replace(found, **outside)) == settled(config)


def settled(config):
    decoder = replace(config.decoder, kv_heads=config.decoder.groups, head_dim=config.decoder.dim)
    return replace(config, decoder=decoder)


def shrunk(config: VLMConfig) -> VLMConfig:
    """The same model with channels and layers for a test."""
    d, v, c = config.decoder, config.vision, config.connector
    few = d.groups != d.heads
    d = replace(d, vocab=600, width=32, layers=2, heads=4, kv_heads=2 if few else 4, head_dim=8, mlp_width=48,
                mrope=d.mrope and (2, 1, 1), embed_scale=1.0)  # fmt: skip
    if v is not None:
        v = replace(v, width=32, layers=3, heads=2, mlp_width=48, full_layers=v.full_layers and (1,))
    if c is not None:
        c = replace(c, in_width=c.in_width if v is None else 32, out_width=32, hidden=0, width=c.width and 32, heads=2,
                    layers=min(c.layers, 2), head_dim=c.head_dim and 8)  # fmt: skip
        c = replace(c, queries=4)
    cross = config.cross and replace(
        config.cross, width=32, context_width=32, heads=2, head_dim=8, mlp_width=48, every=2
    )
    vq = config.vq and replace(config.vq, codes=8, code_width=4, latent=4, base=32, multipliers=(1, 1), blocks=1,
                               image_size=32)  # fmt: skip
    images = {**config.images, **({"size": 32, "patch_size": 2} if vq else {})}
    if v is not None and images["mode"] == "fixed":
        images["size"] = 4 * v.patch_size
        v = replace(v, image_size=images["size"])
    video = None if config.video_token is None else 501
    return replace(config, decoder=d, vision=v, connector=c, cross=cross, vq=vq, images=images, image_token=500,
                   video_token=video, codes=tuple(range(4, 12)) if vq else ())  # fmt: skip


def places(config, layout):
    """Image tokens of a picture in the prompt."""
    kind = config.connector.kind if config.connector else ""
    if config.cross:
        return 1
    if kind in ("qformer", "resampler"):
        return config.connector.queries
    if config.images.get("style") in ("pixtral", "fuyu"):
        return layout.facts["rows"] * layout.facts["columns"]
    return layout.tokens // 4 + 2 if kind == "glu" else layout.tokens


@pytest.mark.parametrize("name", ["llava-1.5-7b", "llava-next-mistral-7b", "blip2", "qwen2-vl-2b", "qwen2.5-vl-3b",
                                  "pixtral-12b", "paligemma2-3b", "flamingo-3b", "flamingo-9b", "qwen-vl", "cogvlm2-19b",
                                  "fuyu-8b", "chameleon-7b"])  # fmt: skip
def test_a_small_one_sees(name):
    """A preset's options fit together, its images' among them: the picture's tokens fill its places, and change the answer."""
    vlm = build(shrunk(PRESETS[name].config), seed=1)
    for p in vlm.parameters():  # of a size at which the picture matters
        if p.numel() == 1:
            p.data.fill_(1.0)
        elif p.std() > 0:
            p.data *= 10
    pictures = [Image.new("RGB", (200, 120), colour) for colour in ("navy", "orange")]
    logits = []
    for picture in pictures:
        prepared = vlm.prepare(picture)
        ids = torch.tensor([[3, 4, *[500] * places(vlm.config, prepared.layouts[0]), 5, 6]])
        with torch.no_grad():
            logits.append(vlm(ids, images=prepared, logits_to_keep=1).logits)
    assert logits[0].shape == (1, 1, 600) and logits[0].isfinite().all()
    assert not torch.allclose(*logits, atol=1e-3)


@pytest.fixture
def tiny():
    return shrunk(PRESETS["flamingo-9b"].config)


def test_a_seed_says_it_all(tiny):
    state = torch.random.get_rng_state()
    first, second, other = build(tiny, seed=3), build(tiny, seed=3), build(tiny, seed=4)
    assert torch.equal(torch.random.get_rng_state(), state)
    same = [torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True)]
    assert all(same)
    assert not torch.equal(first.decoder.embedding, other.decoder.embedding)
    # convolutions draw when they are made
    build(shrunk(PRESETS["chameleon-7b"].config), seed=3)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_without_a_seed_torchs_generator_counts(tiny):
    torch.manual_seed(5)
    first = build(tiny)
    torch.manual_seed(5)
    assert torch.equal(first.decoder.embedding, build(tiny).decoder.embedding)
    assert not torch.equal(first.decoder.embedding, build(tiny).decoder.embedding)


def test_dtype_and_meta(tiny):
    torch.set_default_dtype(torch.bfloat16)
    try:
        vlm = build(tiny, seed=0)
    finally:
        torch.set_default_dtype(torch.float32)
    assert {p.dtype for p in vlm.parameters()} == {torch.bfloat16} and vlm.decoder.embedding.std() > 0.01


@pytest.mark.parametrize("name", {preset.config.family: name for name, preset in PRESETS.items()}.values())
def test_every_parameter_starts_as_its_kind(name):
    vlm = build(shrunk(PRESETS[name].config), seed=0)
    with torch.no_grad():
        for p in vlm.parameters():
            p.fill_(torch.nan)
    initialise(vlm, seed=0)
    for path, owner in vlm.named_modules():
        offset = getattr(owner, "offset", 0.0)
        for leaf, p in owner.named_parameters(recurse=False):
            where, norm = f"{path}.{leaf}", isinstance(owner, (Norm, HeadNorm, nn.GroupNorm))
            assert p.isfinite().all(), where
            if leaf.endswith("bias") or re.fullmatch(r"b(\d|_gate|_up|_down)", leaf):
                assert (p == 0).all(), where
            elif norm:
                assert (p + offset == 1).all(), where
            elif isinstance(owner, GatedCrossAttention) and p.numel() == 1:
                assert (p == 0).all(), where
            else:
                assert p.dim() > 1 or leaf in ("class_token", "newline", "begin", "end"), where
                assert 0.5 * STD < p.std() < 1.5 * STD and abs(p.mean()) < STD, where


def test_layer_scale_starts_at_one():
    config = replace(TOWERS["dinov2-s-reg"][1], width=24, layers=1, heads=2, mlp_width=32)
    tower = VisionTransformer(config)
    initialise(tower, seed=0)
    assert (tower.blocks[0].scale1 == 1).all() and (tower.blocks[0].scale2 == 1).all()


def test_bad_names_and_configs(tiny):
    with pytest.raises(ValueError, match=r"preset_or_config: expected one of llava-1.5-7b, .* got 'gpt-4v'"):
        build("gpt-4v")
    with pytest.raises(ValueError, match=r"family: .*'nothing'"):
        build(replace(tiny, family="nothing"))
    with pytest.raises(ValueError, match="rope_scaling"):
        build(replace(tiny, decoder=replace(tiny.decoder, rope_scaling=RopeScaling("long"))))
    with pytest.raises(ValueError, match="kind"):
        build(replace(tiny, connector=ConnectorConfig("conv", 32, 32)))


@pytest.fixture
def run(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("NO_COLOR", "1")

    def invoke(*arguments):
        result = CliRunner().invoke(app, ["models", *arguments])
        return result.exit_code, re.sub(r"\x1b\[[0-9;]*m", "", result.output)

    return invoke


def test_the_list(run):
    code, text = run()
    assert code == 0
    for name in PRESETS:
        assert re.search(rf"│ {re.escape(name)} +│ [A-D] ", text), name
    code, text = run("--json")
    rows = json.loads(text)
    assert [row["name"] for row in rows] == list(PRESETS)
    assert {row["type"] for row in rows} == set("ABCD")
    llava = rows[0]
    assert llava["parameters"] == 7063427072 and llava["connector"] == "mlp" and llava["images"] == "fixed"
    assert next(row for row in rows if row["name"] == "flamingo-9b")["connector"] == "perceiver, cross-attention"


@pytest.mark.parametrize(
    ("name", "tokens", "parts"),
    [
        ("llava-1.5-7b", 576, {"tower": 303_507_456, "connector": 20_979_712, "decoder": 6_738_939_904}),
        ("llava-next-vicuna-7b", 576 + 36 * (48 + 1), None),
        ("qwen2-vl-2b", 999, None),
        ("blip2", 32, None),
        ("flamingo-9b", 1, None),
        ("qwen-vl", 256, None),
        ("cogvlm2-19b", 48 * 48 + 2, None),
        ("fuyu-8b", 26 * 36, {"connector": 4096 * 2701, "decoder": 9_397_175_296}),
        ("chameleon-7b", 1024, None),
    ],
)
def test_one_model(run, name, tokens, parts):
    code, text = run(name, "--json")
    assert code == 0
    data = json.loads(text)
    assert data["example"] == {"height": 768, "width": 1024, "tokens": tokens}
    counted = data["counted"]
    assert counted["total"] == sum(n for part, n in counted.items() if part != "total")
    assert parts is None or {**parts, "total": counted["total"]} == counted
    assert data["config"]["family"] == PRESETS[name].config.family
    assert data["config"]["decoder"]["layers"] == PRESETS[name].config.decoder.layers


def test_one_model_for_people(run):
    code, text = run("chameleon-7b")
    assert code == 0 and "1024 places in the prompt" in text and "D: images and text in one sequence" in text
    assert '"... 8192 in all"' in text and "vocabulary_map" in text
    code, text = run("pixtral-large")
    assert code == 0 and "guess" in text and "124,000,000,000 (rounded)" in text


def test_an_unknown_model(run):
    code, text = run("llava-1.5-8b")
    assert code == 2 and "llava-1.5-7b" in re.sub(r"\s+", " ", text)
