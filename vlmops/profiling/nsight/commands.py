"""Command lines of Nsight Systems and Nsight Compute: lists of arguments, never a shell's text."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from vlmops.profiling.nsight.errors import ToolFailedError, ToolMissingError

__all__ = ["METRICS", "SECTIONS", "ncu_command", "nsys_command", "record"]

SECTIONS = ("SpeedOfLight", "MemoryWorkloadAnalysis", "Occupancy", "WarpStateStats", "LaunchStats")
#: What the sections leave out, or some releases of them do.
METRICS = (
    "gpu__time_duration.sum", "dram__bytes_read.sum", "dram__bytes_write.sum",
    "sm__warps_active.avg.pct_of_peak_sustained_active", "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active",
    "launch__registers_per_thread", "launch__shared_mem_per_block_static", "launch__shared_mem_per_block_dynamic",
)  # fmt: skip


def _program(program: Sequence[str]) -> list[str]:
    if not program or not program[0] or program[0].startswith("-"):
        raise ValueError(f"program: expected a command and its arguments, got {list(program)}")
    for word in program:
        _word("program", word)
    return list(program)


def _word(what: str, text: str) -> str:
    if not text or any(ord(c) < 32 for c in text):
        raise ValueError(f"{what}: empty, or with a control character: {text!r}")
    return text


def _file(out: Path | str, name: str) -> str:
    """A path for an option in which both tools replace %p and the like."""
    if name in ("", ".", "..") or "/" in name or os.sep in name:
        raise ValueError(f"name: expected a file's name, got {name!r}")
    return _word("out", os.fspath(Path(out) / name)).replace("%", "%%")


def nsys_command(
    program: Sequence[str], out: Path | str, *, capture: str | None = None, name: str = "profile"
) -> tuple[list[str], Path]:
    """``nsys profile`` with everything the report reads.

    Args:
        program: command and arguments to record.
        out: existing folder for ``<name>.nsys-rep`` and ``<name>.sqlite``.
        capture: "range@domain" (``names.nsys_capture``): record only inside the first such range; None: all the time.
        name: of the files.

    Returns:
        The arguments, and the SQLite file they make.

    Raises:
        ValueError: no program, or a text that cannot be an argument.

    Source: Nsight Systems User Guide, "CLI Profile Command Switch Options". Kernels inside CUDA graphs are traced one by one
    (``--cuda-graph-trace=node``), which costs the program some time: without, a graph is one event.
    """
    words = ["nsys", "profile", "--trace=cuda,nvtx,osrt", "--sample=none", "--cpuctxsw=none", "--cuda-graph-trace=node"]
    if capture is not None:
        words += ["--capture-range=nvtx", f"--nvtx-capture={_word('capture', capture)}", "--capture-range-end=stop"]
        # else only registered strings can start a capture, which torch.cuda.nvtx does not make
        words += ["--kill=none", "--env-var=NSYS_NVTX_PROFILER_REGISTER_ONLY=0"]
    words += ["--export=sqlite", "--force-overwrite=true", f"--output={_file(out, name)}"]
    return words + _program(program), Path(out) / f"{name}.sqlite"


def ncu_command(
    program: Sequence[str], out: Path | str, *, kernel: str | None = None, include: Sequence[str] = (),
    sections: Sequence[str] = SECTIONS, metrics: Sequence[str] = METRICS, skip: int = 0, count: int | None = None,
    name: str = "profile",
) -> tuple[list[str], Path]:  # fmt: skip
    """``ncu`` with the sections the report reads, as the raw page in CSV.

    Args:
        program: command and arguments to record.
        out: existing folder for ``<name>.csv``.
        kernel: regular expression of the kernels' base names; None: every kernel.
        include: NVTX filters (``names.ncu_include``); a kernel under any of them is recorded.
        sections, metrics: what to measure: more of them replay each kernel more often.
        skip: matching launches to leave out first.
        count: launches to record at most.
        name: of the file.

    Returns:
        The arguments, and the CSV file they make.

    Raises:
        ValueError: no program, or a text that cannot be an argument.

    Source: Nsight Compute CLI, "Command Line Options" and "NVTX Filtering".
    """
    if skip < 0 or (count is not None and count < 1):
        raise ValueError(f"skip, count: expected at least 0 and 1, got {skip} and {count}")
    words = ["ncu", "--csv", "--page", "raw", "--print-units", "base", "--target-processes", "all", "--nvtx"]
    if kernel is not None:
        words += ["--kernel-name-base", "function", "--kernel-name", f"regex:{_word('kernel', kernel)}"]
    for text in include:
        words += ["--nvtx-include", _word("include", text)]
    for section in sections:
        words += ["--section", _word("sections", section)]
    if metrics:
        words += ["--metrics", ",".join(_word("metrics", m) for m in metrics)]
    if skip:
        words += ["--launch-skip", str(skip)]
    if count is not None:
        words += ["--launch-count", str(count)]
    words += ["--log-file", _file(out, f"{name}.csv")]
    return words + _program(program), Path(out) / f"{name}.csv"


def record(command: Sequence[str], result: Path) -> Path:
    """Run a command of this module; its program's output is left alone.

    Args:
        command: arguments.
        result: the file it makes, which is returned. An older one is removed first.

    Raises:
        ToolMissingError: the profiler is not there; the message says what to run elsewhere.
        ToolFailedError: it failed, or made no file.
        OSError: the folder cannot be made.
    """
    if shutil.which(command[0]) is None:
        raise ToolMissingError(command, result)
    result.parent.mkdir(parents=True, exist_ok=True)
    result.unlink(missing_ok=True)
    # numbers with a decimal point, whatever the user's language
    done = subprocess.run(list(command), env={**os.environ, "LC_ALL": "C.UTF-8"})
    if done.returncode:
        raise ToolFailedError(command, f"ended with exit code {done.returncode}")
    if not result.is_file():
        raise ToolFailedError(command, f"made no {result} (did the range or kernel it waits for come?)")
    return result
