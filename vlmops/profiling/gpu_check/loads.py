"""What is timed: every op at shapes the field's models have, and who it is timed against."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmops import ops
from vlmops.profiling.gpu_check import peers
from vlmops.profiling.gpu_check.cases.case import Arguments, Values, borders
from vlmops.profiling.gpu_check.cases.pixels import MEAN, STD, tokens
from vlmops.profiling.gpu_check.peers import Peer

__all__ = ["LOADS", "Load", "find"]

#: FLOPs of a backward over those of its forward: attention makes 5 products for 2 (it computes the scores again, as
#: FlashAttention counts), a linear layer 2 for 1.
ATTENTION, PRODUCT = 2.5, 2.0


@dataclass(frozen=True)
class Load:
    """One shape of an op.

    Args:
        op: name in the registry.
        label: model and shape, in words.
        call: the op's public face.
        make: its arguments, float32 on the CPU; tensors with ``requires_grad`` get a gradient in forward + backward.
        peers: from the placed arguments to competitors.
        largest: elements of the largest thing the float64 oracle makes, for the memory check.
        backward: FLOPs of the backward over the forward's; None: limited by memory, no share is stated for it.
        quick: also in a quick run.
        dtypes: precisions it is timed in.
    """

    op: str
    label: str
    call: Callable[..., Any]
    make: Callable[[Values], Arguments]
    peers: Callable[..., Sequence[Peer]] = lambda *args, **kwargs: ()
    largest: int = 0
    backward: float | None = None
    quick: bool = False
    dtypes: tuple[str, ...] = ("bf16",)

    @property
    def name(self) -> str:
        """Unique, e.g. "norms: ..."."""
        return f"{self.op}: {self.label}"

    def arguments(self, tiny: bool) -> Arguments:
        """The arguments; ``tiny``: few rows, for a test of the table itself."""
        return self.make(Values(self.name, tiny))


# -- attention -------------------------------------------------------------------------------------------------------


def _packed(
    v: Values, lengths: tuple[int, ...], dim: int, heads: int = 16, kv_heads: int = 16, rope: bool = False, **options: Any
) -> Arguments:  # fmt: skip
    short = v.size(tuple(max(1, n // 256) for n in lengths), lengths)
    q, k, w, cu, _ = v.packed(short, heads=heads, kv_heads=kv_heads, dim=dim)
    if rope:
        options["rope"] = v.tables(sum(short), dim)
    return (q, k, w, cu), {"max_seqlen_q": max(short), "max_seqlen_k": max(short), **options}


def _expression(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The rotary embedding as transformers writes it."""
    first, second = x.float().chunk(2, -1)
    return (x.float() * cos[:, None] + torch.cat((-second, first), -1) * sin[:, None]).to(x.dtype)


def _turn(q: Tensor, k: Tensor, *, rope: tuple[Tensor, Tensor], **_: Any) -> tuple[Tensor, Tensor]:
    return _expression(q, *rope), _expression(k, *rope)


def _packed_peers(args: Any, kwargs: Any) -> list[Peer]:
    causal, turn = kwargs.get("causal", False), _turn if "rope" in kwargs else None
    found = peers.packed(args[3], causal, turn)
    return found if turn else [*found, peers.flash_attn(args[3], causal)]


def _attention(label: str, lengths: tuple[int, ...], dim: int, quick: bool = False, **options: Any) -> Load:
    scores = options.get("heads", 16) * max(lengths) ** 2
    dtypes = options.pop("dtypes", ("bf16",))
    make = partial(_packed, lengths=lengths, dim=dim, **options)
    return Load("varlen_attention", label, ops.varlen_attention, make, _packed_peers, scores, ATTENTION, quick, dtypes)


def _media(v: Values, text: int, images: int, keys: int, heads: int, kv_heads: int, dim: int, every: bool) -> Arguments:
    rows, each = v.size(text // 64, text), v.size(max(1, keys // 128), keys)
    q, k, w, cu_q, cu_k = v.packed((rows,), (each,) * images, heads=heads, kv_heads=kv_heads, dim=dim)
    if every:
        index = torch.tensor([[0, images]], dtype=torch.int32).expand(rows, 2).contiguous()
    else:
        index = (torch.arange(rows) * images // rows).to(torch.int32)
    return (q, k, w, cu_q, cu_k), {"media_index": index}


def _media_peers(args: Any, kwargs: Any) -> list[Peer]:
    index = kwargs["media_index"]
    return peers.cross() if index.dim() == 2 else peers.masked(index, args[4])


def _resampler(v: Values, items: int, context: int, latents: int, heads: int, kv_heads: int, dim: int) -> Arguments:
    length, count = v.size(9, context), v.size(4, latents)
    q = v.random(items * count, heads, dim)
    k, w = (v.random(items * length, kv_heads, dim) for _ in range(2))
    k_own, v_own = (v.random(items * count, kv_heads, dim) for _ in range(2))
    return (q, k, w, k_own, v_own, borders((length,) * items)), {"num_latents": count}


# -- products --------------------------------------------------------------------------------------------------------


def _linear(v: Values, rows: int, width: int, out: int, grad: bool = True, gated: bool = False) -> Arguments:
    count = v.size(min(rows, 8), rows)
    width, out = v.size(width // 16, width), v.size(out // 16, out)
    options = {"gate": v.random(1), "residual": v.random(count, out)} if gated else {}
    return (v.random(count, width, grad=grad), v.weight(out, width, grad=grad), v.random(out, grad=grad)), options


def _stock_linear(
    x: Tensor, weight: Tensor, bias: Tensor, *, gate: Tensor | None = None, residual: Tensor | None = None
) -> Tensor:
    y = F.linear(x, weight, bias)
    y = y if gate is None else gate.tanh() * y
    return y if residual is None else residual + y


def _mlp(
    v: Values, rows: int, width: int, hidden: int, out: int, gated: bool = False, merger: bool = False, **options: Any
) -> Arguments:  # fmt: skip
    count, width, hidden, out = (v.size(n // 32, n) for n in (rows, width, hidden, out))
    inner = 4 * width if merger else width
    if merger:
        options.update(norm=("layer_norm", v.random(width), v.random(width), 1e-6), gather="merge2x2")
    if gated:
        options.update(w_gate=v.weight(hidden, inner), b_gate=v.random(hidden))
    return (
        v.random(count, width),
        v.weight(hidden, inner),
        v.random(hidden),
        v.weight(out, hidden),
        v.random(out),
    ), options


_STOCK = {"gelu": F.gelu, "silu": F.silu, "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x)}


def _stock_mlp(
    x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, *, activation: str, w_gate: Tensor | None = None,
    b_gate: Tensor | None = None, norm: Any = None, gather: Any = None,
) -> Tensor:  # fmt: skip
    if norm is not None:
        x = F.layer_norm(x, x.shape[-1:], norm[1], norm[2], norm[3])
    x = x if gather is None else x.view(x.shape[0] // 4, -1)
    h = F.linear(x, w1, b1)
    act = _STOCK[activation]
    return F.linear(act(h) if w_gate is None else act(F.linear(x, w_gate, b_gate)) * h, w2, b2)  # type: ignore[operator]


def _mlp_peers(args: Any, kwargs: Any) -> list[Peer]:
    found = [Peer("stock module", _stock_mlp)]
    return [*found, peers.liger_swiglu()] if "w_gate" in kwargs else found


def _loss(v: Values, rows: int, width: int, words: int) -> Arguments:
    rows, width, words = (v.size(n // 128, n) for n in (rows, width, words))
    return (v.random(rows, width), v.weight(words, width), v.integers(words, rows)), {}


def _stock_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight).float(), targets)


def _few_bits(
    v: Values, rows: int, width: int, out: int, kind: str, rounded: bool = False, **options: Any
) -> Arguments:
    width, out = v.size(width // 16, width), v.size(out // 16, out)
    weight = ops.quantize_weight(v.weight(out, width, grad=False), kind, **options)
    rows = v.size(min(rows, 16), rows)
    return (v.random(rows, width, grad=False), weight, None), {"quantize_activations": rounded}


def _few_bits_peers(args: Any, kwargs: Any) -> list[Peer]:
    wide = args[1].dequantize(args[0].dtype)
    return [
        Peer("F.linear, 16-bit weight", lambda x, *_, **__: F.linear(x, wide), "", not kwargs["quantize_activations"])
    ]


def _fp8(v: Values, lengths: tuple[int, ...], dim: int) -> Arguments:
    args, kwargs = _packed(v, lengths, dim)
    return tuple(x.detach() for x in args), kwargs


def _fp8_peers(args: Any, kwargs: Any) -> list[Peer]:
    return [Peer(f"{p.name}, 16 bits", p.call, p.missing, False) for p in _packed_peers(args, kwargs)]


# -- pixels and rows -------------------------------------------------------------------------------------------------


def _pixels(v: Values, images: int, side: int, patch: int, channels: int, frames: int = 1) -> Arguments:
    side, channels = v.size(2 * patch, side), v.size(channels // 64, channels)
    options: dict[str, Any] = {"patch_size": patch, "temporal_patch_size": frames, "mean": MEAN, "std": STD}
    weight = v.weight(channels, 3, frames, patch, patch) if frames > 1 else v.weight(channels, 3, patch, patch)
    if frames == 1:
        return (v.integers(256, images, 3, side, side, dtype=torch.uint8), weight), options
    cells = side // patch
    rows = v.integers(256, cells * cells, 3 * frames * patch * patch, dtype=torch.uint8)
    return (rows, weight), {**options, "grid_thw": torch.tensor([[1, cells, cells]])}


def _stock_patchify(
    images: Tensor, weight: Tensor, *, patch_size: int, temporal_patch_size: int, mean: Any, std: Any, grid_thw: Any = None
) -> Tensor:  # fmt: skip
    """Rescale, normalise, convolve: the image processor's and the embedding's passes, all on the device."""
    shift, factor = (torch.tensor(x, device=images.device).view(1, 3, 1) for x in (mean, std))
    scaled = (images.view(images.shape[0], 3, -1).float() / 255 - shift) / factor
    if images.dim() == 2:
        blocks = scaled.view(-1, 3, temporal_patch_size, patch_size, patch_size).to(weight.dtype)
        return F.conv3d(blocks, weight, stride=weight.shape[2:]).flatten(1)
    out = F.conv2d(scaled.view(images.shape).to(weight.dtype), weight, stride=patch_size)
    return out.flatten(2).transpose(1, 2).flatten(0, 1)


def _norm(v: Values, rows: int, width: int, bias: bool, residual: bool) -> Arguments:
    count, width = v.size(rows // 512, rows), v.size(width // 16, width)
    options: dict[str, Any] = {"eps": 1e-6}
    if residual:
        options["residual"] = v.random(count, width)
    return (v.random(count, width), v.random(width), *((v.random(width),) if bias else ())), options


def _stock_rms(x: Tensor, weight: Tensor, *, eps: float, residual: Tensor | None = None) -> Any:
    total = x if residual is None else x + residual
    out = F.rms_norm(total, total.shape[-1:], weight, eps)
    return out if residual is None else (out, total)


def _stock_layer(x: Tensor, weight: Tensor, bias: Tensor, *, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def _rms_peers(args: Any, kwargs: Any) -> list[Peer]:
    found = [Peer("F.rms_norm", _stock_rms)]
    return found if "residual" in kwargs else [*found, peers.liger_rms_norm()]


def _rotary(v: Values, rows: int, heads: int, kv_heads: int, dim: int) -> Arguments:
    count = v.size(rows // 512, rows)
    half = v.tables(count, dim // 2)
    tables = tuple(torch.cat((x, x), -1) for x in half)
    return (v.random(count, heads, dim), *tables), {"k": v.random(count, kv_heads, dim)}


def _stock_rotary(x: Tensor, cos: Tensor, sin: Tensor, *, k: Tensor) -> tuple[Tensor, Tensor]:
    return _expression(x, cos, sin), _expression(k, cos, sin)


def _merge(v: Values, rows: int, pictured: int, width: int) -> Arguments:
    rows, pictured = v.size(rows // 64, rows), v.size(pictured // 64, pictured)
    ids = torch.zeros(rows, dtype=torch.int64)
    ids[3 : 3 + pictured] = 9
    return (ids, v.random(rows, width), v.random(pictured, width), 9), {}


def _stock_merge(ids: Tensor, embeds: Tensor, features: Tensor, token: int) -> Tensor:
    return embeds.masked_scatter((ids == token)[:, None].expand_as(embeds), features)


def _one(name: str, call: Callable[..., Any], *more: Callable[[], Peer]) -> Callable[..., list[Peer]]:
    return lambda *_: [Peer(name, call), *(make() for make in more)]


_LINEAR, _LOSS = partial(_one, "F.linear"), _one("F.linear, F.cross_entropy", _stock_loss, peers.liger_loss)
_PIXELS = _one("rescale, normalise, convolve", _stock_patchify)

LOADS: tuple[Load, ...] = (
    _attention("CLIP-L-336, 8 images of 577, head 64", (577,) * 8, 64, quick=True, dtypes=("bf16", "fp16", "fp32")),
    _attention("SigLIP-so400m, 4 images of 729, head 72", (729,) * 4, 72, quick=True),
    _attention("Qwen2-VL, 4096 patches, head 80", (4096,), 80, quick=True, dtypes=("bf16", "fp16")),
    _attention("Qwen2-VL, packed 100, 300, 700, 33, 1000, head 80", (100, 300, 700, 33, 1000), 80),
    _attention("Qwen2.5-VL, 64 windows of 64, head 80", (64,) * 64, 80, quick=True),
    _attention("Qwen2-VL, 4096 patches, head 80, rotary inside", (4096,), 80, rope=True),
    _attention("Qwen2-VL-2B prefill, 2048 tokens, causal, head 128", (2048,), 128, heads=12, kv_heads=2, causal=True),
    Load("cross_attention", "Mllama, 512 tokens over 4 tiles of 1601, head 128", ops.cross_attention,
         partial(_media, text=512, images=4, keys=1601, heads=32, kv_heads=8, dim=128, every=True), _media_peers,
         32 * 512 * 6404, ATTENTION, True),
    Load("cross_attention", "Flamingo, 1024 tokens, 8 images of 64, head 64", ops.cross_attention,
         partial(_media, text=1024, images=8, keys=64, heads=8, kv_heads=8, dim=64, every=False), _media_peers,
         8 * 1024 * 512, ATTENTION),
    Load("perceiver_attention", "Flamingo, 8 images of 577, 64 latents, head 64", ops.perceiver_attention,
         partial(_resampler, items=8, context=577, latents=64, heads=8, kv_heads=8, dim=64),
         lambda args, _: peers.resampler(args[5].shape[0] - 1), 8 * 64 * 641, ATTENTION, True),
    Load("perceiver_attention", "Idefics2, 4 images of 4900, 64 latents, head 96", ops.perceiver_attention,
         partial(_resampler, items=4, context=4900, latents=64, heads=16, kv_heads=4, dim=96),
         lambda args, _: peers.resampler(args[5].shape[0] - 1), 4900 * 16 * 96, ATTENTION),
    Load("patchify", "Qwen2-VL, 4096 patches from bytes", tokens(ops.patchify),
         partial(_pixels, images=1, side=896, patch=14, channels=1280, frames=2), _PIXELS, 4096 * 1280, PRODUCT, True),
    Load("patchify", "CLIP-L-336, 8 pictures from bytes", tokens(ops.patchify),
         partial(_pixels, images=8, side=336, patch=14, channels=1024), _PIXELS, 8 * 576 * 1024, PRODUCT),
    Load("mlp", "LLaVA projector, 576 x 1024 -> 4096 -> 4096", ops.mlp,
         partial(_mlp, rows=576, width=1024, hidden=4096, out=4096, activation="gelu"), _mlp_peers, 576 * 4096, PRODUCT, True),
    Load("mlp", "CLIP-L, 4616 x 1024 -> 4096 -> 1024", ops.mlp,
         partial(_mlp, rows=4608, width=1024, hidden=4096, out=1024, activation="quick_gelu"), _mlp_peers, 4608 * 4096, PRODUCT),
    Load("mlp", "Qwen2.5-VL SwiGLU, 4096 x 1280 -> 3420 -> 1280", ops.mlp,
         partial(_mlp, rows=4096, width=1280, hidden=3420, out=1280, activation="silu", gated=True), _mlp_peers,
         4096 * 3420, PRODUCT, True),
    Load("mlp", "Qwen2-VL merger, 4096 x 1280 -> 5120 -> 1536", ops.mlp,
         partial(_mlp, rows=4096, width=1280, hidden=5120, out=1536, activation="gelu", merger=True), _mlp_peers,
         1024 * 5120, PRODUCT),
    Load("linear", "Qwen2-VL qkv, 4096 x 1280 -> 3840", ops.linear,
         partial(_linear, rows=4096, width=1280, out=3840), _LINEAR(_stock_linear), 4096 * 3840, PRODUCT, True,
         ("bf16", "fp32")),
    Load("linear", "Mllama's gated output, 512 x 4096 -> 4096", ops.linear,
         partial(_linear, rows=512, width=4096, out=4096, gated=True), _LINEAR(_stock_linear), 512 * 4096, PRODUCT),
    Load("linear", "decoding, 1 x 1536 -> 8960", ops.linear,
         partial(_linear, rows=1, width=1536, out=8960, grad=False), _LINEAR(_stock_linear), 8960 * 1536, None, True),
    Load("linear", "decoding, 16 x 1536 -> 8960", ops.linear,
         partial(_linear, rows=16, width=1536, out=8960, grad=False), _LINEAR(_stock_linear), 8960 * 1536),
    Load("norms", "layer_norm, Qwen2-VL, 4096 x 1280", ops.layer_norm,
         partial(_norm, rows=4096, width=1280, bias=True, residual=False),
         _one("F.layer_norm", _stock_layer, peers.liger_layer_norm), quick=True),
    Load("norms", "rms_norm, Qwen2.5-VL, 4096 x 1280", ops.rms_norm,
         partial(_norm, rows=4096, width=1280, bias=False, residual=False), _rms_peers),
    Load("norms", "rms_norm after a residual, 2048 x 4096", ops.rms_norm,
         partial(_norm, rows=2048, width=4096, bias=False, residual=True), _rms_peers, quick=True),
    Load("rotary", "Qwen2-VL, q and k, 4096 x 16 x 80", ops.rotary,
         partial(_rotary, rows=4096, heads=16, kv_heads=16, dim=80),
         _one("expression", _stock_rotary, peers.liger_rotary), quick=True),
    Load("merge_tokens", "4096 tokens, 3072 of pictures, 1536 wide", ops.merge_tokens,
         partial(_merge, rows=4096, pictured=3072, width=1536), _one("masked_scatter", _stock_merge), quick=True),
    Load("linear_cross_entropy", "Qwen2-VL-2B, 2048 x 1536 -> 151936", ops.linear_cross_entropy,
         partial(_loss, rows=2048, width=1536, words=151936), _LOSS, 2048 * 151936, PRODUCT, True),
    Load("quantized_linear", "decoding, int4 in groups of 128, 1 x 1536 -> 8960", ops.quantized_linear,
         partial(_few_bits, rows=1, width=1536, out=8960, kind="int4"), _few_bits_peers, 8960 * 1536, None, True),
    Load("quantized_linear", "decoding, int8, 16 x 1536 -> 8960", ops.quantized_linear,
         partial(_few_bits, rows=16, width=1536, out=8960, kind="int8"), _few_bits_peers, 8960 * 1536),
    Load("quantized_linear", "prefill, fp8, rows rounded too, 2048 x 1536 -> 8960", ops.quantized_linear,
         partial(_few_bits, rows=2048, width=1536, out=8960, kind="fp8", rounded=True), _few_bits_peers, 8960 * 2048),
    Load("fp8_attention", "Qwen2-VL, 4096 patches, head 80", ops.fp8_attention, partial(_fp8, lengths=(4096,), dim=80),
         _fp8_peers, 16 * 4096**2, None, True),
)  # fmt: skip


def find(name: str) -> Load:
    """The load of this name; KeyError if there is none."""
    return {load.name: load for load in LOADS}[name]
