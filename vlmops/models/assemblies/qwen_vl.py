"""Type C, Qwen-VL's way: cross-attention is the connector's, whose 256 tokens stand between ``<img>`` and ``</img>``."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vlmops.models.assemblies.projected import ProjectedVLM

__all__ = ["QwenVL"]


class QwenVL(ProjectedVLM):
    """Qwen-VL (Bai et al. 2023).

    Its tokenizer writes an image's file name between the two marks, filled up with ``<imgpad>``, the config's ``image_token``;
    the marks are the two tokens in front of that. All that stands between them is the image's.
    """

    def read(self, ids: Tensor, cu_seqlens: Tensor, **images: Any) -> dict[str, Any]:
        """What the decoder is given; arguments as for ``ProjectedVLM``.

        Args:
            ids: integers [T]; the prompts of a batch hold as many ``</img>`` as ``<img>``, each behind its own.
            cu_seqlens: int32 [n + 1].
            images: ``images`` or ``pixel_values``.
        """
        pad = self.config.image_token
        begins, ends = ids == pad - 2, ids == pad - 1
        between = (begins.cumsum(0) > ends.cumsum(0)) & ~begins
        return super().read(ids.masked_fill(between, pad), cu_seqlens, **images)
