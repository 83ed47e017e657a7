"""The models of the field by name.

    vlm = vlmops.models.build("llava-1.5-7b", seed=0)   # random weights
    with torch.device("meta"):
        vlm = vlmops.models.build("pixtral-large")      # shapes alone

A preset has the sizes and tokens of the model's ``config.json`` on the Hugging Face hub, and its published number of parameters,
which a test holds it to.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from vlmops.models import preset_configs as configs
from vlmops.models.checkpoint import assemble
from vlmops.models.config import VLMConfig
from vlmops.models.initialise import initialise
from vlmops.models.language.sizes import SIZES as DECODERS
from vlmops.models.vision.sizes import SIZES as TOWERS
from vlmops.models.vlm import VLM

__all__ = ["PRESETS", "TYPES", "Preset", "build"]

TYPES = {
    "A": "tower frozen, connector (and language model) trained",
    "B": "trained as a whole",
    "C": "cross-attention inside or in front of the language model",
    "D": "images and text in one sequence of one model",
}


@dataclass(frozen=True)
class Preset:
    """One model.

    Args:
        kind: of ``TYPES``.
        tower, decoder: names of its parts.
        config: what ``build`` makes.
        published: parameters as published.
        exact: whether that is the exact number of the checkpoint; else it is rounded, to its last digit that is not 0.
        source: where it is published; "checkpoint": all parameters of the model in that hub repository, "hub page": the size that
            its page shows.
        note: what is not known, or is not as in the original.
    """

    kind: str
    tower: str
    decoder: str
    config: VLMConfig
    published: int
    exact: bool
    source: str
    note: str = ""

    @property
    def tolerance(self) -> float:
        """How far from ``published`` a count may be: 0.1%, or half a unit of its last digit."""
        if self.exact:
            return self.published / 1000
        digits = str(self.published)
        return 0.5 * float(10 ** (len(digits) - len(digits.rstrip("0"))))


def build(preset_or_config: str | VLMConfig, *, seed: int | None = None) -> VLM:
    """A model with random weights (``initialise``), on torch's default device and in its default dtype.

    Args:
        preset_or_config: a name of ``PRESETS``, or any config.
        seed: of the weights; torch's own generators then stay as they are. None: drawn from those.

    Raises:
        ValueError: a name or family that does not exist, or options that do not go together.
    """
    if isinstance(preset_or_config, str):
        if preset_or_config not in PRESETS:
            raise ValueError(f"preset_or_config: expected one of {', '.join(PRESETS)}, got {preset_or_config!r}")
        preset_or_config = PRESETS[preset_or_config].config
    device = torch.get_default_device()
    cards = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(cards, enabled=seed is not None):  # convolutions draw when they are made
        vlm = assemble(preset_or_config)
    initialise(vlm, seed=seed)
    return vlm


HUB, PAGE = "checkpoint of ", "hub page of "
QWEN2_VL, QWEN2_5_VL = TOWERS["qwen2-vl"][1], TOWERS["qwen2.5-vl"][1]
PIXTRAL_LARGE = replace(TOWERS["pixtral-12b"][1], width=1408, layers=40, mlp_width=6144)
NEMO = replace(DECODERS["mistral-nemo-12b"], rope_theta=1e9)

PRESETS: dict[str, Preset] = {
    "llava-1.5-7b": Preset(
        "A", "CLIP L/14-336", "Vicuna 7B", configs.llava(DECODERS["vicuna-7b"]),
        7_063_427_072, True, HUB + "llava-hf/llava-1.5-7b-hf",
    ),
    "llava-1.5-13b": Preset(
        "A", "CLIP L/14-336", "Vicuna 13B", configs.llava(DECODERS["vicuna-13b"]),
        13_400_000_000, False, PAGE + "llava-hf/llava-1.5-13b-hf",
    ),
    "llava-next-vicuna-7b": Preset(
        "A", "CLIP L/14-336", "Vicuna 7B", configs.llava_next(DECODERS["vicuna-7b"]),
        7_060_000_000, False, PAGE + "llava-hf/llava-v1.6-vicuna-7b-hf",
    ),
    "llava-next-mistral-7b": Preset(
        "A", "CLIP L/14-336", "Mistral 7B", configs.llava_next(DECODERS["mistral-7b-v0.2"], "mistral"),
        7_570_000_000, False, PAGE + "llava-hf/llava-v1.6-mistral-7b-hf",
    ),
    "llava-next-llama3-8b": Preset(
        "A", "CLIP L/14-336", "Llama 3 8B",
        configs.llava_next(DECODERS["llama3-8b"], vocab=128320, image_token=128256, end_tokens=(128009,), pad_token=128257),
        8_360_000_000, False, PAGE + "llava-hf/llama3-llava-next-8b-hf",
    ),
    "llava-next-72b": Preset(
        "A", "CLIP L/14-336", "Qwen 1.5 72B", configs.llava_next(
            DECODERS["qwen1.5-72b"], "qwen2", vocab=152064, image_token=151646, end_tokens=(151645,), pad_token=151643
        ), 73_000_000_000, False, PAGE + "llava-hf/llava-next-72b-hf",
    ),
    "blip2": Preset(
        "A", "EVA01-g", "OPT 2.7B", configs.blip2(DECODERS["opt-2.7b"]),
        3_744_761_856, True, HUB + "Salesforce/blip2-opt-2.7b",
    ),
    "qwen2-vl-2b": Preset(
        "B", "Qwen2-VL", "Qwen2 1.5B", configs.qwen_vl("qwen2_vl", DECODERS["qwen2-1.5b"], QWEN2_VL),
        2_208_985_600, True, HUB + "Qwen/Qwen2-VL-2B-Instruct",
    ),
    "qwen2-vl-7b": Preset(
        "B", "Qwen2-VL", "Qwen2 7B", configs.qwen_vl("qwen2_vl", DECODERS["qwen2-7b"], QWEN2_VL),
        8_291_375_616, True, HUB + "Qwen/Qwen2-VL-7B-Instruct",
    ),
    "qwen2-vl-72b": Preset(
        "B", "Qwen2-VL", "Qwen2 72B", configs.qwen_vl("qwen2_vl", DECODERS["qwen2-72b"], QWEN2_VL),
        73_405_560_320, True, HUB + "Qwen/Qwen2-VL-72B-Instruct",
    ),
    "qwen2.5-vl-3b": Preset(
        "B", "Qwen2.5-VL", "Qwen2.5 3B",
        configs.qwen_vl("qwen2_5_vl", DECODERS["qwen2.5-3b"], QWEN2_5_VL, tokens_per_second=2),
        3_754_622_976, True, HUB + "Qwen/Qwen2.5-VL-3B-Instruct",
    ),
    "qwen2.5-vl-7b": Preset(
        "B", "Qwen2.5-VL", "Qwen2.5 7B",
        configs.qwen_vl("qwen2_5_vl", DECODERS["qwen2-7b"], QWEN2_5_VL, tokens_per_second=2),
        8_292_166_656, True, HUB + "Qwen/Qwen2.5-VL-7B-Instruct",
    ),
    "qwen2.5-vl-72b": Preset(
        "B", "Qwen2.5-VL", "Qwen2.5 72B",
        configs.qwen_vl("qwen2_5_vl", DECODERS["qwen2-72b"], replace(QWEN2_5_VL, mlp_width=3456), tokens_per_second=2),
        73_400_000_000, False, PAGE + "Qwen/Qwen2.5-VL-72B-Instruct",
    ),
    "pixtral-12b": Preset(
        "B", "Pixtral", "Mistral Nemo", configs.pixtral(NEMO, TOWERS["pixtral-12b"][1], True),
        12_700_000_000, False, PAGE + "mistral-community/pixtral-12b",
    ),
    "pixtral-large": Preset(
        "B", "Pixtral 1B", "Mistral Large 2", configs.pixtral(DECODERS["mistral-large-2"], PIXTRAL_LARGE, False),
        124_000_000_000, False, "Mistral (2024), mistral.ai/news/pixtral-large: a decoder of 123B, an encoder of 1B",
        "Width, layers and MLP of the 1B tower were not found in public: those here are a guess that gives the published sizes.",
    ),
    "paligemma2-3b": Preset(
        "B", "SigLIP so400m", "Gemma 2 2B", configs.paligemma(DECODERS["gemma2-2b"]),
        3_032_242_416, True, HUB + "google/paligemma2-3b-pt-224",
    ),
    "paligemma2-10b": Preset(
        "B", "SigLIP so400m", "Gemma 2 9B", configs.paligemma(DECODERS["gemma2-9b"]),
        9_700_000_000, False, "PaliGemma 2 (Steiner et al. 2024), table 1",
    ),
    "paligemma2-28b": Preset(
        "B", "SigLIP so400m", "Gemma 2 27B", configs.paligemma(DECODERS["gemma2-27b"]),
        27_700_000_000, False, "PaliGemma 2 (Steiner et al. 2024), table 1",
    ),
    "flamingo-3b": Preset(
        "C", "CLIP L/14", "OPT 1.3B", configs.flamingo_3b(), 3_000_000_000, False, "OpenFlamingo (Awadalla et al. 2023)",
        "OpenFlamingo's first release: 2.56B, 3B by name. DeepMind's own (3.2B: NFNet, Chinchilla) is not public.",
    ),
    "flamingo-9b": Preset(
        "C", "OpenCLIP H/14", "Llama 7B", configs.idefics(), 8_930_000_000, False, PAGE + "HuggingFaceM4/idefics-9b",
        "Idefics 9B, which reproduces Flamingo with open parts; DeepMind's own is not public.",
    ),
    "qwen-vl": Preset(
        "C", "OpenCLIP bigG/14", "Qwen 7B", configs.qwen1_vl(DECODERS["qwen-7b"]),
        9_656_935_168, True, HUB + "Qwen/Qwen-VL",
        "Its files also hold the resampler's fixed positions, 256 x 4096 of these parameters.",
    ),
    "cogvlm2-19b": Preset(
        "C", "EVA02-E", "Llama 3 8B", configs.cogvlm2(DECODERS["llama3-8b"]),
        19_500_000_000, False, PAGE + "THUDM/cogvlm2-llama3-chat-19B",
    ),
    "fuyu-8b": Preset(
        "D", "none", "Persimmon 8B", configs.fuyu(DECODERS["persimmon-8b"]), 9_408_238_592, True, HUB + "adept/fuyu-8b",
    ),
    "chameleon-7b": Preset(
        "D", "VQ tokenizer", "Chameleon 7B", configs.chameleon(DECODERS["chameleon-7b"]),
        7_040_000_000, False, PAGE + "facebook/chameleon-7b",
        "Which word is which image code is in a checkpoint's vocabulary_map; here they are in order.",
    ),
}  # fmt: skip
