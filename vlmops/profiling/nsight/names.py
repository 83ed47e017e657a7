"""The names of ranges and kernels: what ``vlmops.backends.ranges`` opens, read back from a profile.

    stage: prefill                      a stage of an answer
    module: visual.blocks.0 (Block)     a module, by its path and class
    op: mlp triton | 8x16 bf16, ...     an op, the backend it runs on, what it works on
    mlp_few_rows_bf16_t128              a CUDA kernel, by its own name

All are in the NVTX domain "vlmops". Whatever changes there changes here: tests/profiling/test_nsight_names.py writes each kind
with one and reads it with the other.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

from vlmops.backends.ranges import DOMAIN, SEPARATOR

__all__ = ["DOMAIN", "KINDS", "STAGES", "Range", "base_name", "clean", "ncu_include", "nsys_capture", "parse"]

STAGES = ("preprocess", "vision", "connector", "prefill", "decode")
#: Kinds with a prefix; "kernel" has none.
KINDS = ("stage", "module", "op")
KERNEL = re.compile(r"[A-Za-z_]\w*")
LONGEST = 1000  # characters of a name that are kept
#: What Nsight Compute's NVTX filter reads as an operator, in plain and in regular expressions.
SPECIAL = re.compile(r"[\\@,\[\]/*+.^$|?(){}]")


@dataclass(frozen=True)
class Range:
    """A range of ours.

    Args:
        kind: "stage", "module", "op" or "kernel".
        name: the stage, the module's path, the op or the kernel.
        extra: the module's class, the op's backend.
        detail: shapes and dtypes.
    """

    kind: str
    name: str
    extra: str = ""
    detail: str = ""


@lru_cache(maxsize=1 << 16)
def parse(text: str, domain: str | None) -> Range | None:
    """The range of a text; None: not one of ours.

    Args:
        text: the range's message.
        domain: its NVTX domain; None where the file does not name it, and only a prefixed text is taken for ours.
    """
    if domain not in (DOMAIN, None):
        return None
    kind, colon, rest = text.partition(": ")
    if colon and kind in KINDS:
        body, _, detail = rest.partition(SEPARATOR)
        name, _, extra = body.strip().partition(" ")
        return Range(kind, name, extra.strip("()"), detail) if name else None
    if domain == DOMAIN and KERNEL.fullmatch(text):
        return Range("kernel", text)
    return None


def nsys_capture(kind: str, name: str) -> str:
    """``nsys --nvtx-capture`` of a stage or module without a detail behind its name: "stage: prefill@vlmops"."""
    if "@" in name:
        raise ValueError(f"name: nsys takes what follows an @ for the domain: {name!r}")
    return f"{kind}: {name}@{DOMAIN}"


def ncu_include(kind: str, name: str) -> str:
    """``ncu --nvtx-include`` of a kind and name, whatever stands behind it in the range: the domain comes first, and the slash
    at the end says push/pop."""
    return f"regex:{DOMAIN}@{kind}: {SPECIAL.sub(lambda c: chr(92) + c[0], name)}( .*)?/"


def clean(text: str) -> str:
    """A name from a file, safe to print: no control characters, at most ``LONGEST`` characters."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text[:LONGEST])


@lru_cache(maxsize=1 << 14)
def base_name(name: str) -> str:
    """A kernel's name without return type, namespaces, template arguments and parameters: Nsight Systems' short name."""
    text = name.replace("(anonymous namespace)", "anonymous").strip()
    head = re.split(r"[<(]", text, maxsplit=1)[0].strip()
    return head.rpartition(" ")[2].rpartition("::")[2] or text
