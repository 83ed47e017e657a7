"""Least traffic and FLOPs of the loss: one product for the logits of the tokens that count, one for each gradient."""

from __future__ import annotations

from torch import Tensor

from vlmops.ops._shared.cost import Cost, nbytes


def cost(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, ignore_index: int, reduction: str,
    softcap: float, label_smoothing: float, z_loss: float, eager_grads: list[bool],
    *, tile: tuple[int, int] | None = None,
) -> Cost:  # fmt: skip
    """Of the forward with the gradients it makes, or of a backward that makes ``eager_grads``.

    Counts the tokens on the host: for reports and tests, not for a hot path.

    Args:
        tile: rows and columns of a product's tile: then every operand counts once for each tile pass (what it costs
            a kernel without a cache), and the [tokens, V] exponentials and their gradient are written and read; for
            one piece of tokens. None: everything once, and nothing of that size.
    """
    (tokens, channels), words, size = hidden.shape, weight.shape[0], hidden.element_size()
    counted = int((targets != ignore_index).sum())
    rows, columns = (counted * channels * size, nbytes(weight))
    products = 1 + sum(eager_grads[:2])
    results = [nbytes(x) if want else 0 for x, want in zip((hidden, weight, bias), eager_grads, strict=True)]
    written = sum(results) + (4 * tokens if reduction == "none" else 4)
    flops = 2 * counted * words * channels * products
    if tile is None:
        return Cost(read=rows + columns + nbytes(bias, targets), written=written, flops=flops)

    def passes(n: int, block: int) -> int:
        return -(-n // block)

    down, across, deep = passes(counted, tile[0]), passes(words, tile[1]), passes(channels, tile[1])
    read = rows * across + columns * down + down * nbytes(bias) + nbytes(targets)
    if any(eager_grads):
        logits = counted * words * size
        read += logits  # turned into their gradient in place
        written += 2 * logits
        if eager_grads[0]:
            read += logits * deep + columns * down
        if eager_grads[1]:
            read += logits * deep + rows * passes(words, tile[0])
    return Cost(read=read, written=written, flops=flops)
