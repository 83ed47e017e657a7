"""What is raised where a profile cannot be read, or a profiler is not there."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

__all__ = ["ProfileFileError", "ToolFailedError", "ToolMissingError"]

INSTALL = {
    "nsys": "Nsight Systems: https://developer.nvidia.com/nsight-systems/get-started",
    "ncu": "Nsight Compute: https://developer.nvidia.com/nsight-compute, also in the CUDA toolkit",
}


class ProfileFileError(ValueError):
    """A profile that cannot be read. The message names the file, what is wrong with it, and what is supported.

    Args:
        path: the file.
        reason: what is wrong.
    """

    def __init__(self, path: Path | str, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path, self.reason = Path(path), reason


class ToolMissingError(RuntimeError):
    """A profiler that is not on this machine. The message is the command to run where it is.

    Args:
        command: what would have run; its first word is the tool.
        result: the file the command writes.
    """

    def __init__(self, command: Sequence[str], result: Path | str) -> None:
        tool = command[0]
        super().__init__(
            f"{tool} is not on this machine's PATH ({INSTALL.get(tool, tool)}). Run this where it is:\n"
            f"  {shlex.join(command)}\n"
            f"then make the report anywhere:\n"
            f"  {shlex.join(['vlmops', 'profile', '--from', str(result)])}"
        )
        self.tool, self.command, self.result = tool, tuple(command), Path(result)


class ToolFailedError(RuntimeError):
    """A profiler that ended with an error, or wrote no file.

    Args:
        command: what ran.
        reason: its exit code, or the file that is missing.
    """

    def __init__(self, command: Sequence[str], reason: str) -> None:
        super().__init__(f"{command[0]} {reason}: {shlex.join(command)}")
        self.command = tuple(command)
