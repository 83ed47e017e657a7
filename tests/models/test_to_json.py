"""Configs as transformers' files: read back they are the same, and transformers builds the same model from them."""

from dataclasses import replace

import pytest
import torch
import transformers as T

from tests.models.decoders import VQ, checkpoint, theirs
from tests.models.towers import TOWERS, family, randomise, without_merger, written
from vlmops.models.config import DecoderConfig, RopeScaling
from vlmops.models.keymap import load, load_into
from vlmops.models.language import families
from vlmops.models.language.decoder import Decoder
from vlmops.models.language.sizes import SIZES as DECODERS
from vlmops.models.language.to_json import to_json as decoder_json
from vlmops.models.vision import SIZES as TOWER_SIZES
from vlmops.models.vision import VisionTransformer, from_json, keys
from vlmops.models.vision.families import FAMILIES
from vlmops.models.vision.to_json import to_json as tower_json

CLASSES = {
    "blip_2_vision_model": (T.Blip2VisionConfig, T.Blip2VisionModel),
    "clip_vision_model": (T.CLIPVisionConfig, T.CLIPVisionModel),
    "dinov2": (T.Dinov2Config, T.Dinov2Model),
    "dinov2_with_registers": (T.Dinov2WithRegistersConfig, T.Dinov2WithRegistersModel),
    "pixtral": (T.PixtralVisionConfig, T.PixtralVisionModel),
    "siglip_vision_model": (T.SiglipVisionConfig, T.SiglipVisionModel),
    "vit": (T.ViTConfig, T.ViTModel),
    "qwen2_vl_vision": (
        T.models.qwen2_vl.configuration_qwen2_vl.Qwen2VLVisionConfig,
        T.models.qwen2_vl.modeling_qwen2_vl.Qwen2VisionTransformerPretrainedModel,
    ),
    "qwen2_5_vl_vision": (
        T.models.qwen2_5_vl.configuration_qwen2_5_vl.Qwen2_5_VLVisionConfig,
        T.models.qwen2_5_vl.modeling_qwen2_5_vl.Qwen2_5_VisionTransformerPretrainedModel,
    ),
}
TINY = dict(vocab=97, width=32, layers=3, heads=4, mlp_width=48, kv_heads=2)
LLAMA3 = RopeScaling("llama3", 8.0, 1.0, 4.0, 16)
YARN = RopeScaling("yarn", 4.0, original_length=16, beta_fast=20.0, beta_slow=2.0)
VARIANTS: dict[str, tuple[str, dict]] = {
    "llama": ("llama", dict(norm_eps=1e-5, rope_theta=5e5)),
    "llama-biases": ("llama", dict(qkv_bias=True, o_bias=True, mlp_bias=True, head_dim=16, tied=True)),
    "llama-linear": ("llama", dict(rope_scaling=RopeScaling("linear", 2.0, original_length=16))),
    "llama-dynamic": ("llama", dict(rope_scaling=RopeScaling("dynamic", 2.0, original_length=16))),
    "llama-llama3": ("llama", dict(rope_scaling=LLAMA3)),
    "llama-yarn": ("llama", dict(rope_scaling=YARN)),
    "llama-yarn-factor": ("llama", dict(rope_scaling=replace(YARN, attention_factor=1.3))),
    "mistral": ("mistral", dict(head_dim=16)),
    "mistral-window": ("mistral", dict(window=5, window_layers="all")),
    "mistral-yarn": ("mistral", dict(rope_scaling=YARN)),
    "qwen2": ("qwen2", dict(qkv_bias=True, activation="gelu_tanh")),
    "qwen2-windows": ("qwen2", dict(qkv_bias=True, window=4, window_layers="from:1")),
    "qwen2-no-window": ("qwen2", dict(qkv_bias=True, window=4, window_layers="none")),
    "qwen2-yarn": ("qwen2", dict(qkv_bias=True, rope_scaling=YARN)),
    "qwen2-mrope": ("qwen2", dict(qkv_bias=True, mrope=(1, 2, 1))),
    "qwen2-mrope-window": ("qwen2", dict(qkv_bias=True, mrope=(1, 2, 1), window=4, window_layers="from:2", tied=True)),
    "gemma2-all": ("gemma2", dict(window=5, window_layers="all")),
    "gemma2-none": ("gemma2", dict(window=5, attention_softcap=0.0, logit_softcap=0.0)),
    "gemma2-linear": ("gemma2", dict(window=5, window_layers="even", qkv_bias=True, o_bias=True,
                                     rope_scaling=RopeScaling("linear", 3.0, original_length=64))),
    "opt": ("opt", dict(o_bias=True, mlp_bias=True, qkv_bias=True)),
    "opt-no-biases": ("opt", dict(tied=True, activation="gelu")),
    "persimmon": ("persimmon", dict(rotary_factor=0.5, qk_norm="shared")),
    "persimmon-yarn": ("persimmon", dict(rotary_factor=0.25, norm_eps=1e-6, qk_norm_eps=1e-6, tied=True,
                                         rope_scaling=YARN, head_dim=None, width=64)),
    "chameleon": ("chameleon", dict(norm_eps=1e-5)),
    "chameleon-after": ("chameleon", dict(norm_after=True, qkv_bias=True, o_bias=True)),
}  # fmt: skip
#: What every config of the family has.
FIXED: dict[str, dict] = {
    "gemma2": dict(activation="gelu_tanh", head_dim=16, norm_offset=1.0, sandwich=True, embed_scale=32**0.5, query_scale=20**-0.5,
                   tied=True, attention_softcap=50.0, logit_softcap=30.0),
    "opt": dict(activation="relu", gated=False, norm="layer_norm", norm_eps=1e-5, learned_positions=64, position_offset=2,
                kv_heads=None),
    "persimmon": dict(activation="relu2", gated=False, norm="layer_norm", norm_eps=1e-5, qkv_bias=True, o_bias=True,
                      mlp_bias=True, kv_heads=None),
    "chameleon": dict(qk_norm="heads"),
}  # fmt: skip


def variant(name):
    kind, changes = VARIANTS[name]
    return kind, DecoderConfig(**{**TINY, **FIXED.get(kind, {}), **changes})


def decoder_family(name):
    starts = {"vicuna": "llama", "qwen-": "qwen", "qwen": "qwen2", "llama": "llama"}
    return next((kind for start, kind in starts.items() if name.startswith(start)), name.split("-")[0])


def settled(config):
    return replace(config, kv_heads=config.groups, head_dim=config.dim)


def built(json):
    """transformers' model of a file, random, and its tensors by their names there."""
    if json["model_type"] == "qwen2_vl_text":
        text = T.Qwen2VLTextConfig(**json)
        text._attn_implementation = "eager"
        model = T.models.qwen2_vl.modeling_qwen2_vl.Qwen2VLTextModel(text)
        tensors = {f"model.{name}": t for name, t in randomise(model).state_dict().items()}
        return model, tensors if json["tie_word_embeddings"] else {**tensors, "lm_head.weight": torch.zeros(97, 32)}
    more = dict(vq_config=VQ, vocabulary_map={"<image>": 4}) if json["model_type"] == "chameleon" else {}
    pads = dict(pad_token_id=None) if json["model_type"] == "opt" else {}
    model = theirs(T.AutoConfig.for_model(**json, **more, **pads))
    return model, checkpoint(model)


@pytest.mark.parametrize("name", DECODERS)
def test_real_decoders(name):
    kind, config = decoder_family(name), DECODERS[name]
    read = families.from_json(decoder_json(config, kind))
    assert settled(read) == settled(config)
    assert kind == "qwen" or read == config  # Qwen 1's files always say how many channels a head has


@pytest.mark.parametrize("name", VARIANTS)
def test_transformers_builds_the_same_decoder(name):
    kind, config = variant(name)
    json = decoder_json(config, kind)
    assert settled(families.from_json(json)) == settled(config)
    reference, tensors = built(json)
    with torch.device("meta"):
        decoder = Decoder(config)
    load_into(decoder, tensors, families.keys(config, kind))
    ids = torch.randint(0, 97, (40,))  # longer than the contexts that the angles are scaled for
    with torch.no_grad():
        out = reference(ids[None], output_hidden_states=True)
        want = out.logits[0] if "logits" in out else out.last_hidden_state[0]
        hidden = decoder(ids)
    found = decoder.logits(hidden) if "logits" in out else hidden
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))


def test_windows_are_said_twice():
    """By layer, and as files in front of ``layer_types`` have them."""
    config = variant("qwen2-windows")[1]
    json = decoder_json(config, "qwen2")
    assert settled(families.from_json({k: v for k, v in json.items() if k != "layer_types"})) == settled(config)


def test_contexts_and_model_types():
    kind, config = variant("qwen2-mrope")
    json = decoder_json(config, kind, model_type="qwen2_5_vl_text", max_positions=128000)
    assert json["model_type"] == "qwen2_5_vl_text" and json["max_position_embeddings"] == 128000
    assert "max_position_embeddings" not in decoder_json(config, kind)
    assert decoder_json(variant("llama-llama3")[1], "llama")["max_position_embeddings"] == 8 * 16
    assert decoder_json(variant("llama-llama3")[1], "llama", max_positions=99)["max_position_embeddings"] == 99


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("llama", dict(window=4, window_layers="all"), "window: family llama"),
        ("llama", dict(mrope=(1, 2, 1)), "mrope: model type llama has none"),
        ("llama", dict(qkv_bias=True), "qkv_bias: family llama cannot have True"),
        ("llama", dict(query_scale=0.5), "query_scale"),
        ("llama", dict(rope_scaling=RopeScaling("longrope", 2.0)), "rope_type"),
        ("llama", dict(sandwich=True), "sandwich: family llama cannot have True here, its files say False"),
        ("mistral", dict(window=4, window_layers="even"), "window_layers"),
        ("mistral", dict(mlp_bias=True), "mlp_bias"),
        ("qwen2", dict(qkv_bias=False), "qkv_bias: family qwen2 cannot have False"),
        ("qwen2", dict(o_bias=True), "o_bias"),
        ("gemma2-all", dict(query_scale=0.37), "query_scale"),
        ("gemma2-all", dict(embed_scale=1.0), "embed_scale"),
        ("gemma2-all", dict(window_layers="from:2", norm_offset=0.0), "norm_offset"),
        ("opt", dict(o_bias=False), "o_bias"),
        ("opt", dict(norm_eps=1e-6), "norm_eps"),
        ("persimmon", dict(kv_heads=2), "kv_heads"),
        ("persimmon", dict(qk_norm_eps=1e-6), "qk_norm_eps"),
        ("chameleon", dict(qk_norm=""), "qk_norm: family chameleon cannot have ''"),
    ],
)  # fmt: skip
def test_decoders_no_file_can_describe(name, changes, message):
    kind, config = variant(name)
    with pytest.raises(ValueError, match=message):
        decoder_json(replace(config, **changes), kind)


def test_wrong_names():
    config = variant("llama")[1]
    with pytest.raises(ValueError, match=r"family: expected one of llama, .*'gpt2'"):
        decoder_json(config, "gpt2")
    with pytest.raises(ValueError, match="model_type: expected one of llama of family llama, got 'mistral'"):
        decoder_json(config, "llama", model_type="mistral")
    with pytest.raises(ValueError, match="mrope: model type qwen2_vl_text has some"):
        decoder_json(variant("qwen2")[1], "qwen2", model_type="qwen2_vl_text")
    with pytest.raises(ValueError, match="rope_scaling"):
        decoder_json(variant("llama-dynamic")[1], "llama", max_positions=77)
    with pytest.raises(ValueError, match="activation: family qwen"):
        decoder_json(replace(DECODERS["qwen-7b"], activation="gelu"), "qwen")
    with pytest.raises(ValueError, match=r"family: expected one of vit, .*'eva_clip'"):
        tower_json(TOWER_SIZES["eva01-g"][1], "eva_clip")


@pytest.mark.parametrize("name", [name for name, (kind, _) in TOWER_SIZES.items() if kind in FAMILIES])
def test_real_towers(name):
    kind, config = TOWER_SIZES[name]
    json = tower_json(config, kind, out_width=3584)
    assert from_json(json) == config
    assert CLASSES[json["model_type"]][0](**json).to_dict().items() >= json.items()


@pytest.mark.parametrize("name", TOWERS)
def test_transformers_builds_the_same_tower(name):
    original = randomise(TOWERS[name]())
    config = from_json(original.config.to_dict())
    json = tower_json(config, family(name), out_width=24)
    described, kind = CLASSES[json["model_type"]]
    reference = kind(described(**json))
    found = {n: t.shape for n, t in reference.state_dict().items()}
    head = {n for n in original.state_dict() if ".head." in n or n.startswith("head.")}
    assert found == {n: t.shape for n, t in original.state_dict().items() if n not in head}
    assert not head or name == "siglip"
    with torch.device("meta"):
        wanted = {n: t.shape for n, t in VisionTransformer(config).state_dict().items()}
    read = load(without_merger(written(reference)), keys(config, family(name)), wanted)
    assert {n: t.shape for n, t in read} == wanted


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("clip-b32", dict(image_size=None), "image_size"),
        ("clip-b32", dict(pre_norm=False), "pre_norm: family clip cannot have False"),
        ("vit-b16", dict(attention_bias="qkv"), "attention_bias"),
        ("siglip-b16-224", dict(class_token=True), "class_token"),
        ("dinov2-b", dict(mlp_width=1000), "mlp_width: family dinov2 cannot have 1000"),
        ("dinov2-b", dict(registers=4), "registers"),
        ("dinov2-g", dict(activation="gelu"), "activation"),
        ("qwen2-vl", dict(mlp_width=5000), "mlp_width"),
        ("qwen2-vl", dict(window=112), "window: family qwen2_vl cannot have 112"),
        ("qwen2.5-vl", dict(window=None), "window: family qwen2_5_vl cannot have None"),
        ("pixtral-12b", dict(norm_eps=1e-6), "norm_eps"),
        ("pixtral-12b", dict(position="none"), "position"),
    ],
)
def test_towers_no_file_can_describe(name, changes, message):
    kind, config = TOWER_SIZES[name]
    with pytest.raises(ValueError, match=message):
        tower_json(replace(config, **changes), kind)


def test_no_window_is_said_so():
    """A file without the option has transformers' window; Mistral 7B 0.2 has none."""
    assert families.from_json(dict(model_type="mistral", sliding_window=None)).window is None
    assert families.from_json(dict(model_type="mistral")).window == 4096
