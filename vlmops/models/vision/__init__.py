"""Vision towers: one transformer whose options are the families of the field, its positions and windows, contrastive heads.

tower = VisionTransformer(SIZES["clip-l14-336"][1])
out = tower(vlmops.images.prepare(photos, size=336), layer=-2, patches_only=True)   # what LLaVA reads
out.tokens, out.cu_seqlens, out.grid_thw                                            # what a connector takes
"""

from vlmops.models.vision.families import FAMILIES, from_json
from vlmops.models.vision.heads import AttentionPool, ClipHead, SiglipHead, sigmoid_loss, softmax_loss
from vlmops.models.vision.keys import attention_pool_keys, clip_head_keys, keys, siglip_head_keys
from vlmops.models.vision.sizes import SIZES, named
from vlmops.models.vision.vit import Block, VisionOutput, VisionTransformer

__all__ = [
    "FAMILIES",
    "SIZES",
    "AttentionPool",
    "Block",
    "ClipHead",
    "SiglipHead",
    "VisionOutput",
    "VisionTransformer",
    "attention_pool_keys",
    "clip_head_keys",
    "from_json",
    "keys",
    "named",
    "siglip_head_keys",
    "sigmoid_loss",
    "softmax_loss",
]
