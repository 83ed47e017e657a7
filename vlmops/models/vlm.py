"""A vision-language model: tower, connector, decoder, and the one sequence that they make of a prompt.

    vlm = vlmops.models.from_pretrained("llava-1.5-7b-hf")
    out = vlm(**inputs)                                  # transformers' own names
    ids = vlm.generate(**inputs, max_new_tokens=50)

What differs from one architecture to another is a single method, ``read``: token ids and images in, what the decoder's first
block reads out. The four types of the field are its implementations in ``assemblies/``. Prompts are padded outside of the model
only; inside, their tokens lie behind each other.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vlmops import images as pictures
from vlmops.models.config import VLMConfig
from vlmops.models.connectors import connect
from vlmops.models.generate import Sampling, generate, stream
from vlmops.models.language.decoder import Decoder
from vlmops.models.vision.vit import VisionTransformer
from vlmops.ops._shared import checks

__all__ = ["VLM", "Packed", "VLMOutput", "pack"]

PARTS = ("tower", "connector", "decoder")
PER_TOKEN = ("token_type_ids",)  # inputs of the prompts' shape that are packed with them
UNUSED = ("mm_token_type_ids", "use_cache", "return_dict")  # transformers' inputs that say what is known here


@dataclass(frozen=True)
class VLMOutput:
    """What a forward gives.

    Args:
        logits: [B, L, vocab] as the prompts are padded (zeros at padding), or [B, k, vocab]; None where a loss was asked for.
        loss: mean cross-entropy of the next tokens; None without labels.
        hidden: [T, width] behind the decoder's last norm, packed.
    """

    logits: Tensor | None
    loss: Tensor | None
    hidden: Tensor


@dataclass(frozen=True)
class Packed:
    """Prompts behind each other.

    Args:
        ids: integers [T].
        cu_seqlens: int32 [B + 1].
        places: int64 [T], where each stood in the padded [B * L]; None: there was no padding.
        longest: no prompt has more tokens (host).
    """

    ids: Tensor
    cu_seqlens: Tensor
    places: Tensor | None
    longest: int

    def take(self, x: Tensor) -> Tensor:
        """[..., B, L] -> [..., T]."""
        flat = x.flatten(-2)
        return flat if self.places is None else flat[..., self.places]


def pack(input_ids: Tensor, attention_mask: Tensor | None = None) -> Packed:
    """Padded prompts without their padding, whichever side it is on.

    Args:
        input_ids: integers [B, L].
        attention_mask: [B, L], nonzero at tokens; None: all are. Whether there is padding is read on the host.

    Raises:
        ValueError: other shapes, a prompt without tokens.
    """
    checks.check_tensor("input_ids", input_ids, dim=2, layout="[B, L]")
    batch, length = input_ids.shape
    if attention_mask is not None:
        checks.check_shape("attention_mask", attention_mask, (batch, length), f"[{batch}, {length}] as input_ids")
        mask = attention_mask.bool()
        lengths = mask.sum(1)
        shortest, longest = (int(lengths.min()), int(lengths.max())) if batch else (length, length)
        if not shortest:
            raise ValueError("attention_mask: expected at least one token in each prompt")
        if shortest < length:
            places = mask.flatten().nonzero()[:, 0]
            cu = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).int()
            return Packed(input_ids.flatten()[places], cu, places, longest)
    if not length:
        raise ValueError(f"input_ids: expected at least one token in each prompt, got {list(input_ids.shape)}")
    cu = torch.arange(batch + 1, dtype=torch.int32, device=input_ids.device) * length
    return Packed(input_ids.flatten(), cu, None, length)


class VLM(nn.Module):
    """The base of all types: everything but ``read``.

    Args:
        config: of the model.
        decoder: the language model; None: a plain ``Decoder``.

    Source of the parts: ``vision.vit``, ``connectors``, ``language.decoder``.
    """

    def __init__(self, config: VLMConfig, decoder: Decoder | None = None) -> None:
        super().__init__()
        self.config = config
        self.tower = None if config.vision is None else VisionTransformer(config.vision)
        self.connector = None if config.connector is None else connect(config.connector)
        self.decoder = decoder if decoder is not None else Decoder(config.decoder)

    def read(self, ids: Tensor, cu_seqlens: Tensor, *args: Any, **images: Any) -> dict[str, Any]:
        """What the decoder is given for these prompts.

        Args:
            ids: integers [T], the tokens of all prompts.
            cu_seqlens: int32 [B + 1].
            args, images: the inputs of this type by transformers' names, or ``images=`` what ``prepare`` made.

        Returns:
            Keyword arguments of the decoder's forward: ``inputs_embeds`` [T, width], and ``positions``, ``prefix_lens`` or what
            the decoder of this type has besides.
        """
        raise NotImplementedError

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int = 0,
        **images: Any,
    ) -> VLMOutput:
        """Scores of the next tokens, or their loss.

        Args:
            input_ids: integers [B, L], padded on either side.
            attention_mask: [B, L]; None: no padding.
            position_ids: integers [B, L], or [3, B, L] with M-RoPE; None: as the model counts.
            labels: int64 [B, L], -100 where nothing is learnt: the loss alone is computed, without the logits of all tokens.
            logits_to_keep: logits of so many last tokens of each row; 0: of all.
            images: transformers' names of the model's inputs (``pixel_values``, ``image_grid_thw``, ``image_sizes``, ...), or
                ``images``: what ``prepare`` made.

        Raises:
            TypeError, ValueError: inputs that do not fit together, or that this model does not have.
        """
        packed = pack(input_ids, attention_mask)
        inputs = self.read(packed.ids, packed.cu_seqlens, **self._images(packed, images))
        if position_ids is not None:
            inputs["positions"] = packed.take(position_ids.expand(*position_ids.shape[:-2], *input_ids.shape))
        hidden = self.decoder(None, packed.cu_seqlens, longest=packed.longest, **inputs)
        if labels is not None:
            checks.check_shape("labels", labels, input_ids.shape, f"{list(input_ids.shape)} as input_ids")
            return VLMOutput(None, self.decoder.loss(hidden, packed.take(labels), packed.cu_seqlens), hidden)
        return VLMOutput(self._logits(hidden, packed, input_ids.shape, logits_to_keep), None, hidden)

    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        max_new_tokens: int,
        sampling: Sampling | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        pad_token_id: int | None = None,
        stop: Sequence[str] = (),
        tokenizer: Any = None,
        **images: Any,
    ) -> Tensor:
        """The prompts and their answers.

        Args:
            input_ids, attention_mask, images: as for ``forward``.
            max_new_tokens: at most so many for each prompt.
            sampling: greedy if None.
            eos_token_id: tokens that end an answer; None: the model's own.
            pad_token_id: fills up shorter answers; None: the model's own.
            stop: strings that end an answer; they need a tokenizer.
            tokenizer: anything with ``decode(ids) -> str``.

        Returns:
            int64 [B, L + n]: ``input_ids`` as given, and the new tokens of each.
        """
        packed = pack(input_ids, attention_mask)
        answers = generate(
            self.decoder, self._prompts(packed), max_new_tokens=max_new_tokens, sampling=sampling,
            stop_ids=self._ends(eos_token_id), stop=stop, tokenizer=tokenizer, embed=self._embed(packed, images),
        )  # fmt: skip
        pad = self.config.pad_token if pad_token_id is None else pad_token_id
        longest = max((len(a.ids) for a in answers), default=0)
        new = torch.tensor([a.ids + [pad] * (longest - len(a.ids)) for a in answers], dtype=torch.int64)
        return torch.cat([input_ids.long(), new.view(input_ids.shape[0], longest).to(input_ids.device)], 1)

    def stream(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        tokenizer: Any,
        max_new_tokens: int,
        sampling: Sampling | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        stop: Sequence[str] = (),
        **images: Any,
    ) -> Iterator[str]:
        """The answer of one prompt in pieces of text, as it comes; joined, they are the whole. Arguments as for ``generate``.

        Raises:
            ValueError: more than one prompt (``vlmops.models.generate.stream`` says which prompt a piece belongs to).
        """
        if input_ids.shape[0] != 1:
            raise ValueError(f"input_ids: expected one prompt to stream, got {input_ids.shape[0]}")
        packed = pack(input_ids, attention_mask)
        pieces = stream(
            self.decoder, self._prompts(packed), tokenizer, max_new_tokens=max_new_tokens, sampling=sampling,
            stop_ids=self._ends(eos_token_id), stop=stop, embed=self._embed(packed, images),
        )  # fmt: skip
        return (text for _, text in pieces)

    def prepare(self, images: Any, **options: Any) -> pictures.Prepared:
        """Images of any kind as the model wants them: ``vlmops.images.prepare`` with its options; ``options`` overrides."""
        return pictures.prepare(images, **{**self.config.images, **options}).to(self.device)

    def save_pretrained(self, folder: str | os.PathLike[str], **options: Any) -> None:
        """``vlmops.models.checkpoint.save_pretrained``."""
        from vlmops.models.checkpoint import save_pretrained  # which needs the assemblies, which need this file

        save_pretrained(self, folder, **options)

    def train_only(self, *parts: str) -> VLM:
        """Freezes all but these parts ("tower", "connector", "decoder"), and what belongs to none of them.

        Type A is ``train_only("connector")`` (stage 1) and ``train_only("connector", "decoder")`` (stage 2); type B all three.

        Raises:
            ValueError: a part the model does not have.
        """
        for name in parts:
            if name not in PARTS or getattr(self, name) is None:
                raise ValueError(f"parts: expected some of {', '.join(p for p in PARTS if getattr(self, p) is not None)}, "
                                 f"got {name!r}")  # fmt: skip
        for name, parameter in self.named_parameters():
            part = name.partition(".")[0]
            parameter.requires_grad_((part if part in PARTS else "connector") in parts)
        return self

    @property
    def device(self) -> torch.device:
        """Where the decoder's parameters are."""
        return self.decoder.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the decoder's parameters."""
        return self.decoder.embedding.dtype

    def _images(self, packed: Packed, images: Mapping[str, Any]) -> dict[str, Any]:
        given = {name: x for name, x in images.items() if x is not None and name not in UNUSED}
        return {name: packed.take(x) if name in PER_TOKEN else x for name, x in given.items()}

    def _embed(self, packed: Packed, images: Mapping[str, Any]) -> Any:
        given = self._images(packed, images)
        return lambda ids, cu_seqlens: self.read(ids, cu_seqlens, **given)

    @staticmethod
    def _prompts(packed: Packed) -> list[list[int]]:
        return [x.tolist() for x in packed.ids.cpu().split(packed.cu_seqlens.diff().tolist())]

    def _ends(self, given: int | Sequence[int] | None) -> tuple[int, ...]:
        if given is None:
            return self.config.end_tokens
        return (given,) if isinstance(given, int) else tuple(given)

    def _logits(self, hidden: Tensor, packed: Packed, shape: torch.Size, keep: int) -> Tensor:
        batch, length = shape
        if packed.places is None:
            kept = hidden.view(batch, length, -1)[:, -keep:] if keep else hidden.view(batch, length, -1)
            return self.decoder.logits(kept.flatten(0, 1)).view(batch, kept.shape[1], -1)
        rows = hidden.new_zeros(batch * length, hidden.shape[1]).index_copy(0, packed.places, hidden)
        real = hidden.new_zeros(batch * length, 1).index_fill(0, packed.places, 1)
        first = length - keep if keep else 0
        kept, real = (x.view(batch, length, -1)[:, first:] for x in (rows, real))
        return self.decoder.logits(kept.flatten(0, 1)).view(batch, kept.shape[1], -1) * real
