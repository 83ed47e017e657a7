"""What a model is made of, as plain dataclasses: one vision encoder, one decoder, their variants as options.

A preset (``presets.py``) is a value of ``VLMConfig``; a checkpoint's ``config.json`` becomes one (``checkpoint.py``).
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["ConnectorConfig", "CrossConfig", "DecoderConfig", "RopeScaling", "VisionConfig"]


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
            "resampler" (Qwen-VL), "perceiver" (Flamingo), "qformer" (BLIP-2).
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
    """A decoder-only language model: Llama and Vicuna, Mistral, Qwen, Gemma 2.

    Args:
        vocab: tokens.
        width: channels of a token.
        layers: blocks.
        heads: query heads.
        kv_heads: key and value heads; None: ``heads``.
        head_dim: channels of a head; None: width // heads.
        mlp_width: hidden channels of the gated MLP.
        activation: "silu", or "gelu_tanh" (Gemma).
        norm_eps: of every RMSNorm.
        norm_offset: added to a norm's weight (Gemma: 1).
        sandwich: norms behind attention and MLP too (Gemma 2).
        rope_theta, rope_scaling: rotary angles.
        mrope: how many of a head's angle pairs take time, height and width (Qwen2-VL's M-RoPE); () : one position.
        qkv_bias: whether query, key and value projections have a bias (Qwen).
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

    @property
    def dim(self) -> int:
        """Channels of a head."""
        return self.head_dim or self.width // self.heads

    @property
    def groups(self) -> int:
        """Key and value heads."""
        return self.kv_heads or self.heads

    def windowed(self, layer: int) -> bool:
        """Whether a layer sees a window only."""
        kind, _, first = self.window_layers.partition(":")
        chosen = kind == "all" or (kind == "even" and layer % 2 == 0) or (kind == "from" and layer >= int(first))
        return self.window is not None and chosen
