"""Tiny decoders of transformers, and ours filled from the tensors of their files."""

from __future__ import annotations

import torch
import transformers as T
from torch import nn

from vlmops.models.keymap import load_into
from vlmops.models.language.decoder import Decoder
from vlmops.models.language.families import from_json, keys

TEXT = dict(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=64)  # fmt: skip
LLAMA3 = dict(rope_type="llama3", rope_theta=5e5, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=16)  # fmt: skip
WIDTHS = {name: TEXT[name] for name in TEXT if name != "num_key_value_heads"}
VQ = dict(base_channels=32, channel_multiplier=[1, 1], num_res_blocks=1, embed_dim=8, latent_channels=8, num_embeddings=16,
          resolution=8)  # fmt: skip
CASES = {
    "llama": lambda: T.LlamaConfig(**{**TEXT, "num_key_value_heads": 4}),
    "llama3": lambda: T.LlamaConfig(**TEXT, rope_parameters=LLAMA3, rms_norm_eps=1e-5),
    "mistral": lambda: T.MistralConfig(**TEXT, sliding_window=None),
    "mistral-nemo": lambda: T.MistralConfig(**TEXT, head_dim=16, sliding_window=5),
    "qwen2": lambda: T.Qwen2Config(**TEXT),
    "qwen2-tied": lambda: T.Qwen2Config(
        **TEXT, tie_word_embeddings=True, use_sliding_window=True, sliding_window=4, max_window_layers=1
    ),
    "gemma2": lambda: T.Gemma2Config(**TEXT, head_dim=16, sliding_window=4, query_pre_attn_scalar=20),
    "gemma2-wide": lambda: T.Gemma2Config(**TEXT, head_dim=16, sliding_window=40, attn_logit_softcapping=0.5),
    "llama-bias": lambda: T.LlamaConfig(**TEXT, attention_bias=True, mlp_bias=True),
    "opt": lambda: opt(),
    "opt-no-bias": lambda: opt(enable_bias=False, activation_function="gelu", tie_word_embeddings=False),
    "persimmon": lambda: T.PersimmonConfig(**WIDTHS),
    "persimmon-linear": lambda: T.PersimmonConfig(
        **WIDTHS, qk_layernorm=False, hidden_act="gelu_new",
        rope_parameters=dict(rope_type="linear", factor=3.0, rope_theta=25000.0, partial_rotary_factor=0.75),
    ),
    "chameleon": lambda: chameleon(num_key_value_heads=4),
    "chameleon-swin": lambda: chameleon(swin_norm=True, attention_bias=True),
}  # fmt: skip
LENGTHS = [9, 1, 13, 6]


def opt(**options):
    """A pad token has no gradient in transformers, so there is none."""
    sizes = {name: size for name, size in WIDTHS.items() if name != "intermediate_size"}
    return T.OPTConfig(**sizes, ffn_dim=48, pad_token_id=None, **options)


def chameleon(**options):
    return T.ChameleonConfig(**{**TEXT, **options}, vq_config=VQ, vocabulary_map={"<image>": 4})


def cu(lengths):
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)


def theirs(config, seed=0):
    """A random transformers model, weights wide enough that soft caps and positions matter."""
    torch.manual_seed(seed)
    config._attn_implementation = "eager"
    build = T.AutoModelForCausalLM.from_config
    build = T.ChameleonForConditionalGeneration._from_config if config.model_type == "chameleon" else build
    model = build(config).eval()
    one = 0.0 if config.model_type == "gemma2" else 1.0  # Gemma's norms add it themselves
    for name, p in model.named_parameters():
        norm = (p.dim() == 1 or "q_norm" in name or "k_norm" in name) and "bias" not in name
        nn.init.normal_(p, mean=one * norm, std=0.1 if norm else 0.3)
    return model


def checkpoint(model):
    """Its language model's tensors by their names in a file: a tied model's has no output projection."""
    no = ("lm_head.", "model.vqmodel.") if model.config.tie_word_embeddings else ("model.vqmodel.",)
    return {name: t for name, t in model.state_dict().items() if not name.startswith(no)}


def ours(model):
    json = model.config.to_dict()
    config = from_json(json)
    with torch.device("meta"):
        decoder = Decoder(config)
    load_into(decoder, {n: t.clone() for n, t in checkpoint(model).items()}, keys(config, json["model_type"]))
    return decoder


def batch(lengths=LENGTHS):
    """Packed ids, and the same padded to the right with a mask."""
    rows = [torch.randint(0, 97, (n,)) for n in lengths]
    padded = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = torch.arange(padded.shape[1])[None] < torch.tensor(lengths)[:, None]
    return torch.cat(rows), padded, mask
