"""The demo's measurements: answers before and after, logits, stages, and what was patched. Plain data, no printing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import vlmops
from vlmops.demo.loading import DemoError, Subject
from vlmops.profiling.stages import compare_stages, find_parts
from vlmops.profiling.timing import error, num_threads
from vlmops.profiling.towers import shared_copy

__all__ = ["PATCHED", "STOCK", "ask", "patch_rows"]

STOCK, PATCHED = "stock", "patched"
Progress = Callable[[str], None]


def _generate(subject: Subject, model: nn.Module, prompt: str, tokens: int) -> tuple[str, torch.Tensor]:
    inputs = subject.inputs(prompt)
    with torch.inference_mode():
        out = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)  # type: ignore[operator]
    return subject.answer(out, inputs), out


def ask(
    subject: Subject, *, rounds: int, max_new_tokens: int, threads: int | None, progress: Progress
) -> dict[str, Any]:
    """Ask the stock model and a patched copy on the same weights, compare, then time both, interleaved.

    Args:
        subject: model, picture and question.
        rounds: timed answers of each model.
        max_new_tokens: of each answer.
        threads: torch threads; None: as it is.
        progress: gets a line before each long part.

    Returns:
        "questions" (each with both answers and whether the tokens are the same), "logits", "stages", "patch".

    Raises:
        DemoError: the model has no vision tower, or cannot answer about this picture.
    """
    stock = subject.model
    try:
        find_parts(stock)
    except ValueError as err:
        raise DemoError(f"--model: {err}") from err
    questions = [(subject.prompt, subject.expected), *subject.more]
    with num_threads(threads):
        progress("asking the stock model")
        try:
            before = [_generate(subject, stock, question, max_new_tokens) for question, _ in questions]
        except (ValueError, TypeError, IndexError) as err:
            raise DemoError(f"{subject.name} cannot answer about {subject.source}: {err}") from err
        progress("patching a copy that shares its weights, and asking it the same")
        patched = vlmops.patch_model(shared_copy(stock))
        after = [_generate(subject, patched, question, max_new_tokens) for question, _ in questions]
        logits = _logits(subject, stock, patched)
    asked = [
        {"question": question, "expected": expected, STOCK: a, PATCHED: b, "same": torch.equal(ta, tb)}
        for (question, expected), (a, ta), (b, tb) in zip(questions, before, after, strict=True)
    ]
    progress("timing answers of both, interleaved")
    stages, _ = compare_stages(
        {STOCK: stock, PATCHED: patched}, subject.inputs, rounds=rounds, threads=threads, seconds=4.0,
        max_new_tokens=max_new_tokens, do_sample=False,
    )  # fmt: skip
    rows = []
    for stage, found in stages.items():
        ratio = found.speedup(PATCHED, STOCK)
        rows.append({
            "stage": stage, "stock_ms": found[STOCK].median * 1e3, "patched_ms": found[PATCHED].median * 1e3,
            "ratio": ratio.value, "low": ratio.low, "high": ratio.high, "spread": found[PATCHED].spread,
        })  # fmt: skip
    return {
        "model": subject.name,
        "dtype": str(next(stock.parameters()).dtype)[6:],
        "picture": {"source": subject.source, "size": list(subject.image.size), "shows": subject.shown},
        "questions": asked,
        "same_answers": all(row["same"] for row in asked),
        "logits": logits,
        "stages": rows,
        "rounds": len(next(iter(stages.values()))[STOCK].seconds),
        "patch": patch_rows(patched),
    }


def _logits(subject: Subject, stock: nn.Module, patched: nn.Module) -> dict[str, float]:
    """Largest difference between the two models' prompt logits, and the largest logit for scale."""
    inputs = subject.inputs()
    with torch.inference_mode():
        want, got = stock(**inputs).logits, patched(**inputs).logits
    return {"max_difference": error(got, want), "max_logit": float(want.float().abs().max())}


def patch_rows(model: nn.Module) -> dict[str, Any]:
    """``patch_report`` with equal modules counted, and the memory of packed weights."""
    report = vlmops.patch_report(model)
    groups: dict[tuple[str, str, str, str, str], int] = {}
    for row in report.rows:
        key = (row.cls, row.operation, row.backend, row.status, row.why)
        groups[key] = groups.get(key, 0) + 1
    names = ("class", "operation", "kernel", "status", "why")
    rows = [{"modules": count, **dict(zip(names, key, strict=True))} for key, count in groups.items()]
    return {"rows": rows, "notes": list(report.notes), "packed_mib": vlmops.packed_bytes(model) / 2**20}
