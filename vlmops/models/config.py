"""What a model is made of, as plain dataclasses: one vision encoder, one decoder, their variants as options.

A preset (``presets.py``) is a value of ``VLMConfig``; a checkpoint's ``config.json`` becomes one (``checkpoint.py``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

__all__ = [
    "ConnectorConfig",
    "CrossConfig",
    "DecoderConfig",
    "RopeScaling",
    "VLMConfig",
    "VisionConfig",
    "VqConfig",
    "check_same",
]


@dataclass(frozen=True)
class VisionConfig:
    """A vision transformer: ViT, CLIP, SigLIP, EVA-CLIP, DINOv2, and the towers of Qwen2-VL, Qwen2.5-VL and Pixtral.

    Args:
        width: channels of a token.
        layers: blocks.
        heads: attention heads.
        head_dim: channels of a head; None: width // heads.
        mlp_width: hidden channels of the MLP.
        patch_size: pixels on a side.
        image_size: pixels on a side the learned positions are for; None: native resolution, any size.
        temporal_patch_size: frames of a patch (Qwen2-VL: 2).
        activation: of the MLP.
        gated: SwiGLU-like MLP: act(gate) * up (EVA-02, DINOv2-g, Qwen2.5-VL, Pixtral).
        norm: "layer_norm" or "rms_norm".
        norm_eps: of every norm.
        patch_bias: whether the patch embedding has a bias (CLIP: no).
        attention_bias: "qkvo", "qvo" (EVA: keys have none), "qkv", "o" or "": which projections have one.
        mlp_bias: whether the MLP's have one.
        class_token: a learned token in front.
        registers: learned tokens behind the class token (DINOv2 with registers).
        position: "learned" (added, resized for other sizes), "rope" (2-D rotary), "learned+rope" (EVA-02), "none".
        rope: which angles turn with what: "axial" (Qwen2-VL: first half of a head's with the row, second with the column),
            "alternating" (Pixtral: even ones with the row, odd ones with the column), "interleaved" (EVA-02: as axial, but pairs
            are neighbouring channels).
        rope_theta: base of the rotary angles.
        rope_side: patches on a side that rotary positions are stretched to, whatever the image's size (EVA-02: 16); None: not.
        antialias: learned positions are resized with antialiasing (DINOv2 with registers).
        pre_norm: a norm in front of the first block (CLIP, Pixtral).
        post_norm: a norm behind the last block.
        sub_norm: norms inside attention and MLP, in front of their last projection (EVA-02).
        norm_after: a block's two norms stand behind attention and MLP, in front of the residual add (EVA02-E, CogVLM).
        layer_scale: a learned factor for each channel at each residual (DINOv2).
        window: pixels on a side of an attention window; None: none (Qwen2.5-VL: 112).
        full_layers: blocks that attend to the whole image where there are windows.
        merge_size: patches on a side whose tokens stand next to each other (Qwen2-VL's order); 1: raster.
    """

    width: int
    layers: int
    heads: int
    mlp_width: int
    patch_size: int
    image_size: int | None = None
    head_dim: int | None = None
    temporal_patch_size: int = 1
    activation: str = "gelu"
    gated: bool = False
    norm: str = "layer_norm"
    norm_eps: float = 1e-6
    patch_bias: bool = True
    attention_bias: str = "qkvo"
    mlp_bias: bool = True
    class_token: bool = False
    registers: int = 0
    position: str = "learned"
    rope: str = "axial"
    rope_theta: float = 10000.0
    rope_side: int | None = None
    antialias: bool = False
    pre_norm: bool = False
    post_norm: bool = True
    sub_norm: bool = False
    norm_after: bool = False
    layer_scale: bool = False
    window: int | None = None
    full_layers: tuple[int, ...] = ()
    merge_size: int = 1

    @property
    def dim(self) -> int:
        """Channels of a head."""
        return self.head_dim or self.width // self.heads


@dataclass(frozen=True)
class ConnectorConfig:
    """What stands between tower and language model.

    Args:
        kind: "linear" (LLaVA 1.0), "mlp" (LLaVA 1.5 and later), "pixel_shuffle" (InternVL, Idefics3), "merger" (Qwen2-VL),
            "resampler" (Qwen-VL), "perceiver" (Flamingo), "qformer" (BLIP-2), "glu" (CogVLM2).
        in_width: channels of the tower's tokens.
        out_width: channels of the language model's.
        hidden: hidden channels of "mlp", "pixel_shuffle" and "merger", and of the feed-forward layers of the others; 0: as the
            family has it (``out_width``, 4 ``in_width``, 4 times the width); "pixel_shuffle": -1 for a single linear layer.
        activation: between linear layers.
        bias: whether linear layers have one.
        norm: "" or a norm in front ("layer_norm", "rms_norm").
        norm_eps: of every norm.
        queries: learned queries or latents of "resampler", "perceiver", "qformer".
        layers: their depth.
        heads, head_dim: their attention; head_dim 0: width // heads.
        width: channels inside "qformer"; 0: ``in_width``.
        cross_every: "qformer": each so many layers one has cross-attention.
        image_positions: "resampler": patches on a side its positions are made for; others are interpolated.
        qk_norm: "perceiver": a LayerNorm of each query and key head (Idefics).
    """

    kind: str
    in_width: int
    out_width: int
    hidden: int = 0
    activation: str = "gelu"
    bias: bool = True
    norm: str = ""
    norm_eps: float = 1e-6
    queries: int = 64
    layers: int = 1
    heads: int = 8
    head_dim: int = 0
    width: int = 0
    cross_every: int = 2
    image_positions: int = 16
    qk_norm: bool = False


@dataclass(frozen=True)
class CrossConfig:
    """Gated cross-attention between a decoder's blocks: Flamingo, Idefics.

    Args:
        width: channels of the decoder's tokens.
        context_width: channels of what is looked at.
        heads, head_dim: of the attention.
        mlp_width: hidden channels of the feed-forward layer.
        every: one stands in front of each so many blocks of the decoder.
        activation: of the feed-forward layer.
        gated: whether that is a gated MLP (Idefics).
        norm: "layer_norm" (Flamingo) or "rms_norm" (Idefics).
        norm_eps: of both norms.
        first: the first block that has one in front: 0 (Idefics), or ``every`` - 1 (OpenFlamingo).
        qk_norm: an RMSNorm of each query and key head (Idefics).
    """

    width: int
    context_width: int
    heads: int
    head_dim: int
    mlp_width: int
    every: int = 1
    activation: str = "gelu"
    gated: bool = False
    norm: str = "layer_norm"
    norm_eps: float = 1e-5
    first: int = 0
    qk_norm: bool = False

    def stands(self, layer: int) -> bool:
        """Whether one stands in front of a decoder's block."""
        return layer >= self.first and (layer - self.first) % self.every == 0


@dataclass(frozen=True)
class RopeScaling:
    """How rotary angles are stretched for contexts longer than those of the training.

    Args:
        kind: "linear", "llama3", "yarn" or "dynamic".
        factor: how much longer.
        low_freq_factor, high_freq_factor: of "llama3".
        original_length: tokens of the training's contexts.
        beta_fast, beta_slow: of "yarn": turns within such a context above which an angle stays, below which it is stretched.
        attention_factor: of "yarn": multiplies both tables; None: 0.1 ln(factor) + 1.
    """

    kind: str
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_length: int = 8192
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None


@dataclass(frozen=True)
class DecoderConfig:
    """A decoder-only language model: Llama and Vicuna, Mistral, Qwen, Gemma 2, OPT, Persimmon, Chameleon's.

    Args:
        vocab: tokens.
        width: channels of a token.
        layers: blocks.
        heads: query heads.
        kv_heads: key and value heads; None: ``heads``.
        head_dim: channels of a head; None: width // heads.
        mlp_width: hidden channels of the MLP.
        activation: of the MLP: "silu", "gelu_tanh" (Gemma), "relu" (OPT), "relu2": relu(x)^2 (Persimmon), ...
        gated: act(gate) * up; else act(up) (OPT, Persimmon).
        norm: "rms_norm", or "layer_norm" (OPT, Persimmon).
        norm_eps: of every norm but ``qk_norm``.
        norm_offset: added to an RMSNorm's weight (Gemma: 1).
        sandwich: norms behind attention and MLP too (Gemma 2).
        norm_after: a block's two norms stand behind attention and MLP instead, in front of the residual add (Chameleon 30B).
        qk_norm: a LayerNorm of each query and key head in front of the rotation: "shared" has one weight [head_dim] for all heads
            (Persimmon), "heads" has one for each, [heads, head_dim] (Chameleon); "": none.
        qk_norm_eps: of it.
        rope_theta, rope_scaling: rotary angles.
        rotary_factor: share of a head's channels that turn, the first of them (Persimmon: 0.5).
        learned_positions: above 0: nothing turns; so many positions have a vector that is added to the embeddings (OPT).
        position_offset: rows of their table in front of that of position 0 (OPT: 2).
        mrope: how many of a head's angle pairs take time, height and width (Qwen2-VL's M-RoPE); () : one position.
        qkv_bias: whether query, key and value projections have a bias (Qwen, OPT, Persimmon).
        o_bias: whether the attention's output projection has one (OPT, Persimmon).
        mlp_bias: whether the MLP's have one (OPT, Persimmon).
        tied: whether the output projection is the embedding.
        embed_scale: multiplies embeddings (Gemma: sqrt(width)).
        query_scale: factor on q k^T; None: head_dim ** -0.5.
        attention_softcap, logit_softcap: s > 0: x becomes s tanh(x / s) (Gemma 2: 50 and 30).
        window: keys a token sees in windowed layers, itself included; None: all.
        window_layers: "all", "even" (Gemma 2: layers 0, 2, ... are windowed), "from:k" (Qwen 2: layers k, k + 1, ...), "none".
    """

    vocab: int
    width: int
    layers: int
    heads: int
    mlp_width: int
    kv_heads: int | None = None
    head_dim: int | None = None
    activation: str = "silu"
    norm_eps: float = 1e-6
    norm_offset: float = 0.0
    sandwich: bool = False
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    mrope: tuple[int, ...] = ()
    qkv_bias: bool = False
    tied: bool = False
    embed_scale: float = 1.0
    query_scale: float | None = None
    attention_softcap: float = 0.0
    logit_softcap: float = 0.0
    window: int | None = None
    window_layers: str = "none"
    gated: bool = True
    norm: str = "rms_norm"
    norm_after: bool = False
    qk_norm: str = ""
    qk_norm_eps: float = 1e-5
    rotary_factor: float = 1.0
    learned_positions: int = 0
    position_offset: int = 0
    o_bias: bool = False
    mlp_bias: bool = False

    @property
    def dim(self) -> int:
        """Channels of a head."""
        return self.head_dim or self.width // self.heads

    @property
    def rotary_dim(self) -> int:
        """Channels of a head that turn with the position."""
        return 0 if self.learned_positions else int(self.dim * self.rotary_factor)

    @property
    def groups(self) -> int:
        """Key and value heads."""
        return self.kv_heads or self.heads

    def windowed(self, layer: int) -> bool:
        """Whether a layer sees a window only."""
        kind, _, first = self.window_layers.partition(":")
        chosen = kind == "all" or (kind == "even" and layer % 2 == 0) or (kind == "from" and layer >= int(first))
        return self.window is not None and chosen


@dataclass(frozen=True)
class VqConfig:
    """An image tokenizer; as its values are: Chameleon's.

    Args:
        codes: entries of the codebook.
        code_width: channels of an entry.
        latent: channels the encoder ends in.
        base: channels of its first level.
        multipliers: channels of each level over ``base``; the image is halved between levels.
        blocks: residual blocks of a level.
        groups: of every GroupNorm.
        image_size: pixels on a side of the language model's images.
    """

    codes: int = 8192
    code_width: int = 256
    latent: int = 256
    base: int = 128
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    blocks: int = 2
    groups: int = 32
    image_size: int = 512

    @property
    def reduction(self) -> int:
        """Pixels on a side of a token."""
        return int(2 ** (len(self.multipliers) - 1))

    @property
    def tokens(self) -> int:
        """Of such an image."""
        return (self.image_size // self.reduction) ** 2


@dataclass(frozen=True)
class VLMConfig:
    """A whole model: which parts, and how images come into the decoder's sequence.

    Args:
        family: of ``vlmops.models.formats``: what its checkpoint looks like and how it is assembled.
        decoder: the language model.
        decoder_family: its names in a checkpoint: of ``language.families``.
        vision: the tower; None: there is none (Fuyu's patches, Chameleon's codes).
        vision_family: its names in a checkpoint: of ``vision.keys``.
        connector: between the two.
        image_token: the token whose places image features take; it may lie beyond the vocabulary.
        video_token: the same of videos (Qwen2-VL).
        layer: which hidden state of the tower is read, counted as transformers does (-2: that of the last block but one);
            several: side by side; None: the last one through the tower's last norm.
        class_token: whether the tower's class token is among what the connector reads.
        newline: a learned token ends each row of an AnyRes image (LLaVA-NeXT).
        pinpoints: AnyRes canvases, (height, width).
        tokens_per_second: of a video's positions (Qwen2.5-VL); 0: frames are counted.
        cross: gated cross-attention between the decoder's blocks (Flamingo).
        codes: the token of each entry of the image codebook (Chameleon).
        added_tokens: how many of the last tokens of the vocabulary a checkpoint keeps in tensors of their own (Idefics).
        vq: the image tokenizer in place of a tower (Chameleon).
        end_tokens: tokens that end an answer.
        pad_token: fills up behind it.
        images: options of ``vlmops.images.prepare`` that suit the model.
    """

    family: str
    decoder: DecoderConfig
    decoder_family: str = "llama"
    vision: VisionConfig | None = None
    vision_family: str = "clip"
    connector: ConnectorConfig | None = None
    image_token: int = -1
    video_token: int | None = None
    layer: int | tuple[int, ...] | None = None
    class_token: bool = False
    newline: bool = False
    pinpoints: tuple[tuple[int, int], ...] = ()
    tokens_per_second: int = 0
    cross: CrossConfig | None = None
    codes: tuple[int, ...] = ()
    added_tokens: int = 0
    vq: VqConfig | None = None
    end_tokens: tuple[int, ...] = ()
    pad_token: int = 0
    images: Mapping[str, Any] = field(default_factory=dict)


def check_same(wanted: Any, read: Any, family: str) -> None:
    """ValueError with the first option of a config that is another one when the family's file is read again."""
    for name in (f.name for f in fields(wanted)):
        value, found = getattr(wanted, name), getattr(read, name)
        if value != found:
            raise ValueError(f"{name}: family {family} cannot have {value!r} here, its files say {found!r}")
