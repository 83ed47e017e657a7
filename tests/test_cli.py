"""The `vlmops` command: version, help, info."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

import vlmops
from vlmops.backends import BACKENDS, native, probe
from vlmops.cli import app


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run the command in a wide terminal with an empty cache folder."""
    monkeypatch.setenv("VLMOPS_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("NO_COLOR", "1")

    def invoke(*args):
        result = CliRunner().invoke(app, list(args))
        # help keeps its bold and dim codes where CI is detected
        return result.exit_code, re.sub(r"\x1b\[[0-9;]*m", "", result.output)

    return invoke


def test_version(run):
    assert run("--version") == (0, f"vlmops {vlmops.__version__}\n")


@pytest.mark.parametrize("args", [(), ("--help",)])
def test_help_lists_every_command(run, args):
    _, text = run(*args)
    for command in ("info", "demo", "bench", "gpu-check", "tune", "models", "profile"):
        assert re.search(rf"\b{command}\b +\S", text), f"{command} has no help text"


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("info", ("--json", "--build")),
        ("models", ("--json",)),
        ("profile", ("--from", "--out", "--json", "--nsys", "--ncu")),
        ("demo", ("--model", "--image", "--json")),
        ("bench", ("--op", "--json")),
        ("gpu-check", ("--quick", "--out", "--op", "--device", "--json")),
        ("tune", ("--image-size", "--dtype", "--device", "--dry-run", "--json")),
    ],
)
def test_help_of_a_command(run, command, options):
    code, text = run(command, "--help")
    assert code == 0
    assert all(option in text for option in options)


def test_info_is_a_table_and_builds_nothing(run, tmp_path):
    code, text = run("info")
    assert code == 0
    assert torch.__version__ in text and str(tmp_path) in text
    assert all(name in text for name in BACKENDS)
    assert not any(tmp_path.rglob("*.so"))


def test_info_json_is_nothing_but_json(run):
    code, text = run("info", "--json")
    assert code == 0
    data = json.loads(text)
    assert data["vlmops"] == vlmops.__version__
    assert data["torch"] == torch.__version__
    assert [row["name"] for row in data["backends"]] == list(BACKENDS)


def test_info_build_builds(run, monkeypatch):
    loads = []
    monkeypatch.setattr(native, "load", lambda: loads.append(1) or False)
    monkeypatch.setattr(native, "reason", lambda: "no compiler today")
    monkeypatch.setattr(probe, "_native_path", lambda: None)
    code, text = run("info", "--build")
    assert code == 0, "a failed build is not fatal"
    assert loads and "no compiler today" in text


def test_an_unknown_command_is_an_error(run):
    code, text = run("fly")
    assert code == 2
    assert "No such command" in text


def test_the_stack_is_imported_when_it_is_asked_for():
    """No command pays for it, and `vlmops.models` and `vlmops.images` are there without an import of their own."""
    lines = [
        "import sys, vlmops, vlmops.cli",
        "assert 'vlmops.models' not in sys.modules and 'vlmops.images' not in sys.modules",
        "vlmops.models.build, vlmops.images.prepare",
        "assert not hasattr(vlmops, 'nothing')",
    ]
    subprocess.run([sys.executable, "-c", "\n".join(lines)], check=True)
