"""A whole tiny model of transformers, and ours read from the folder it was saved in: what has to be equal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from vlmops.models import from_pretrained
from vlmops.models.vlm import VLM

__all__ = [
    "close", "gradients", "greedy_tokens", "logits", "prepared_images", "randomised", "read", "saving", "without_a_cache",
]  # fmt: skip

TOLERANCE = 1e-5


def randomised(model: Any, std: float = 0.1) -> Any:
    """Weights of a size at which every part of the model matters to the logits."""
    generator = torch.Generator().manual_seed(1)
    for name, p in model.named_parameters():
        torch.nn.init.normal_(p, std=std, generator=generator)
        if p.dim() == 1 and "norm" in name.lower() and "weight" in name:
            p.data += 1
    return model.eval()


def read(theirs: Any, folder: Path) -> VLM:
    """Through the files that transformers writes."""
    theirs.save_pretrained(folder)
    return from_pretrained(folder)


def close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float = TOLERANCE) -> bool:
    ours, theirs = ours.detach(), theirs.detach()
    return bool((ours - theirs).abs().max() <= tolerance * max(1.0, float(theirs.abs().max())))


def logits(theirs: Any, ours: VLM, inputs: dict) -> None:
    """All of them, where there is a token, and that the images matter to them."""
    mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
    with torch.no_grad():
        want, have = theirs(**inputs).logits[mask], ours(**inputs).logits
        last = ours(**inputs, logits_to_keep=2).logits
        other = {k: v + 0.5 if v.is_floating_point() else v for k, v in inputs.items()}
        changed = ours(**other).logits[mask]
    finite = want > torch.finfo(want.dtype).min
    assert torch.equal(have[mask] > torch.finfo(want.dtype).min, finite)
    assert close(have[mask][finite], want[finite])
    shown = have[:, -2:] > torch.finfo(have.dtype).min
    assert last.shape == have[:, -2:].shape and close(last[shown], have[:, -2:][shown])  # fewer rows, another kernel
    assert want[finite].std() > 0.05 and not close(changed[finite], want[finite], 1e-3)


def greedy_tokens(theirs: Any, ours: VLM, inputs: dict, new: int = 8, different: int = 3) -> torch.Tensor:
    """Those of the answer, at least so many different ones; padding is on the left, as transformers wants it."""
    want = theirs.generate(**inputs, max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0)
    have = ours.generate(**inputs, max_new_tokens=new, eos_token_id=())
    assert torch.equal(have, want)
    answers = have[:, inputs["input_ids"].shape[1] :]
    assert len(answers.unique()) >= different
    return answers


def gradients(theirs: Any, ours: VLM, inputs: dict, labels: torch.Tensor) -> None:
    """Loss, and every parameter's gradient by way of the files' names."""
    from vlmops.models.formats import FORMATS
    from vlmops.models.keymap import save

    theirs.zero_grad()
    ours.zero_grad()
    want = theirs(**inputs, labels=labels).loss
    want.backward()
    out = ours(**inputs, labels=labels)
    assert out.logits is None and out.loss is not None and close(out.loss, want)
    out.loss.backward()
    zero = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in ours.named_parameters()}
    found = FORMATS[ours.config.family]
    have = dict(save(zero, found.rules(ours.config)))
    missing = set(have)
    for name, p in theirs.named_parameters():
        key = renamed(name, found.renames)
        if key not in have and p.grad is None:
            continue
        missing.discard(key)
        grad = torch.zeros_like(p) if p.grad is None else p.grad
        assert close(have[key], grad), name
    assert not missing


def renamed(name: str, renames: Any) -> str:
    """A parameter's name as the rules have it."""
    from vlmops.models.formats.base import Renamed

    return next(iter(Renamed({name: torch.empty(0)}, renames)))


def saving(theirs: Any, ours: VLM, inputs: dict, folder: Path) -> None:
    """What ours writes is what transformers reads, nothing missing, and ours reads it too."""
    ours.save_pretrained(folder, shard_bytes=60_000)
    again, said = type(theirs).from_pretrained(folder, output_loading_info=True)
    assert not said["missing_keys"] and not said["unexpected_keys"] and not said["mismatched_keys"]
    state, expected = again.state_dict(), theirs.state_dict()
    assert state.keys() == expected.keys() and all(torch.equal(state[name], expected[name]) for name in expected)
    with torch.no_grad():
        assert torch.equal(again.eval()(**inputs).logits, theirs(**inputs).logits)
        assert torch.equal(from_pretrained(folder)(**inputs).logits, ours(**inputs).logits)


def prepared_images(ours: VLM, inputs: dict, prepared: Any) -> None:
    """Bytes are what the same pixels in floats are."""
    floats = {**inputs, "pixel_values": torch.stack(list(prepared.pixel_values()))}
    rest = {name: x for name, x in inputs.items() if name != "pixel_values"}
    with torch.no_grad():
        torch.testing.assert_close(ours(**rest, images=prepared).logits, ours(**floats).logits, rtol=1e-4, atol=1e-4)


def without_a_cache(ours: VLM, prompt: torch.Tensor, answer: torch.Tensor, pixel_values: torch.Tensor) -> None:
    """Each token of the answer is the likeliest one behind the prompt [L] and those before it, all read anew."""
    for token in answer.tolist():
        logits = ours(prompt[None], pixel_values=pixel_values, logits_to_keep=1).logits
        assert int(logits.argmax()) == token
        prompt = torch.cat([prompt, torch.tensor([token])])
