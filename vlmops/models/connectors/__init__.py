"""From the tower's tokens to the language model's: eight connectors, one interface.

    tokens, cu_seqlens = connector(tokens, cu_seqlens, grid_thw)

tokens: [T, in_width], those of all images behind each other; cu_seqlens: int32 [n + 1] on the device; grid_thw: int64 [n, 3] on
the CPU, patches of each image in time, height and width. What comes out is packed the same way, [T', out_width]. One swaps for
another by ``ConnectorConfig.kind``. Flamingo's gated cross-attention stands inside the decoder instead.
"""

from __future__ import annotations

from torch import nn

from vlmops.models.config import ConnectorConfig
from vlmops.models.connectors.glu import Glu
from vlmops.models.connectors.merging import Merger, PixelShuffle
from vlmops.models.connectors.perceiver import PerceiverResampler
from vlmops.models.connectors.projection import Linear, Mlp
from vlmops.models.connectors.qformer import QFormer
from vlmops.models.connectors.resampler import Resampler

__all__ = [
    "CONNECTORS",
    "Glu",
    "Linear",
    "Merger",
    "Mlp",
    "PerceiverResampler",
    "PixelShuffle",
    "QFormer",
    "Resampler",
    "connect",
]

CONNECTORS: dict[str, type[nn.Module]] = {
    "linear": Linear,
    "mlp": Mlp,
    "pixel_shuffle": PixelShuffle,
    "merger": Merger,
    "resampler": Resampler,
    "perceiver": PerceiverResampler,
    "qformer": QFormer,
    "glu": Glu,
}


def connect(config: ConnectorConfig) -> nn.Module:
    """The connector of a config.

    Raises:
        ValueError: a kind that does not exist.
    """
    if config.kind not in CONNECTORS:
        raise ValueError(f"kind: expected one of {', '.join(CONNECTORS)}, got {config.kind!r}")
    return CONNECTORS[config.kind](config)
