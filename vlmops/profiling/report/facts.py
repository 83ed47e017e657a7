"""What stands below a report: machine, versions, date, commit, command."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
import sys
from pathlib import Path

import torch

import vlmops
from vlmops.backends.machine import cpu_model

__all__ = ["commit", "facts"]


def commit() -> str:
    """The checkout's commit, with "-dirty" where files differ from it; "" for an installed package."""
    folder = Path(vlmops.__file__).parent
    if not (folder.parent / ".git").exists():
        return ""
    asked = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        ran = subprocess.run(asked, cwd=folder, capture_output=True, text=True, check=False, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return ran.stdout.strip() if ran.returncode == 0 else ""


def facts(device: torch.device, command: str = "") -> dict[str, str]:
    """Name -> value, in the order in which a report shows them."""
    found = {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "processor": f"{cpu_model()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads used",
    }
    if device.type == "cuda":
        found["GPU"] = torch.cuda.get_device_name(device)
    found["software"] = f"torch {torch.__version__}, Python {platform.python_version()}, {sys.platform}"
    found["vlmops"] = f"{vlmops.__version__} {commit()}".strip()
    if command:
        found["command"] = command
    return found
