"""A complete, readable stack of vision-language models on vlmops' own ops.

    vlm = vlmops.models.from_pretrained("llava-1.5-7b-hf")   # a transformers folder
    out = vlm(**inputs)                                      # transformers' own input names
    vlm = vlmops.models.build("pixtral-12b", seed=0)         # random weights

One file an idea: ``vision`` towers, ``connectors``, the ``language`` decoder, how they are put together (``vlm.py`` and
``assemblies``), what checkpoints look like (``formats``).
"""

from vlmops.models.chat import chat, prompt
from vlmops.models.checkpoint import from_pretrained, save_pretrained
from vlmops.models.config import ConnectorConfig, CrossConfig, DecoderConfig, RopeScaling, VisionConfig, VLMConfig
from vlmops.models.generate import Sampling
from vlmops.models.presets import PRESETS, build
from vlmops.models.vlm import VLM, VLMOutput

__all__ = [
    "PRESETS",
    "VLM",
    "ConnectorConfig",
    "CrossConfig",
    "DecoderConfig",
    "RopeScaling",
    "Sampling",
    "VLMConfig",
    "VLMOutput",
    "VisionConfig",
    "build",
    "chat",
    "from_pretrained",
    "prompt",
    "save_pretrained",
]
