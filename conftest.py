"""`pytest --benchmark` runs benchmarks/, plain `pytest` the tests. What the option needs is imported only with it."""

from __future__ import annotations

from pathlib import Path

import pytest

#: Options that mean something beside --benchmark only: name -> (keywords of add_option).
OPTIONS: dict[str, dict[str, object]] = {
    "--op": dict(action="append", metavar="NAME", help="only this operation; repeatable, or with commas"),
    "--model": dict(action="append", metavar="NAME", help="only this model; repeatable, or with commas"),
    "--dtype": dict(action="append", metavar="NAME", help="bf16, fp16 or fp32; repeatable, or with commas"),
    "--peers": dict(
        action="append", metavar="NAMES", help="torch, compile, openvino, onnxruntime, flash-attn, liger; all if not given"
    ),
    "--backend": dict(metavar="NAME", help="force one of our backends; the measured choice if not given"),
    "--device": dict(metavar="NAME", help="cpu or cuda; cuda if there is one"),
    "--threads": dict(type=int, metavar="N", help="threads of everybody on a CPU; 2 if not given"),
    "--quick": dict(action="store_true", help="every operation and three models, small, against torch and torch.compile"),
    "--nvtx": dict(action="store_true", help="NVTX ranges around candidates, ops, modules and stages"),
    "--report": dict(metavar="DIR", help="write report.md and report.json there"),
}  # fmt: skip


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("benchmark")
    group.addoption("--benchmark", action="store_true", help="run the suites of benchmarks/ instead of the tests")
    for name, keywords in OPTIONS.items():
        empty = {"append": [], "store_true": False}.get(str(keywords.get("action")), 0 if "type" in keywords else "")
        group.addoption(name, default=empty, **keywords)


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("benchmark"):
        from vlmops.profiling import pytest_plugin

        config.pluginmanager.register(pytest_plugin, "vlmops-benchmark")
        return
    given = [name for name in OPTIONS if config.getoption(name)]
    if given:
        raise pytest.UsageError(f"{', '.join(given)}: only with --benchmark")
    folder = config.rootpath / "benchmarks"
    paths = [(config.invocation_params.dir / arg.split("::")[0]).resolve() for arg in config.args]
    if any(path == folder or folder in path.parents for path in paths if isinstance(path, Path)):
        raise pytest.UsageError(
            "benchmarks/ runs with --benchmark: pytest --benchmark --quick, or pytest --benchmark benchmarks/bench_mlp.py"
        )
