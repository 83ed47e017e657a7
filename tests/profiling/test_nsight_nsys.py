"""Nsight Systems' exports: attribution on known answers, what is missing, and what is refused."""

from __future__ import annotations

import random
import sqlite3
import time

import pytest

from tests.support.nsight_files import START_END, Recording, message, nested, thread_id
from vlmops.profiling.nsight import ProfileFileError, database, nsys
from vlmops.profiling.nsight.attribution import FOREVER, NOWHERE, Place, Point, Span, under

A, B = thread_id(100, 1), thread_id(100, 2)
OP, STAGE, MODULE = (
    message("op", "mlp cuda", "8x16 bf16"),
    message("stage", "prefill"),
    message("module", "visual (Tower)"),
)


def places(made, path, **options):
    trace = nsys.read(made.write(path, **options))
    return [launch.place for launch in trace.launches], trace


@pytest.mark.parametrize("seed", range(4))
def test_random_nests_of_ranges_are_exact(tmp_path, seed):
    made = nested(seed, 300, processes=1 + seed % 3, threads=1 + seed % 4)
    found, trace = places(made, tmp_path / "a.sqlite")
    assert len(found) == 300 and found == made.expected
    assert sum(place.op is not None for place in found) > 50 and trace.notes == ()


def test_ten_thousand_kernels_in_five_seconds(tmp_path):
    made = nested(11, 10_000)
    path = made.write(tmp_path / "a.sqlite")
    begin = time.process_time()
    found = [launch.place for launch in nsys.read(path).launches]
    assert time.process_time() - begin < 5
    assert len(found) == 10_000 and found == made.expected
    assert len(set(found)) > 1000


def brute(spans, point):
    """The innermost open range of every kind, by looking at each range."""
    mine = [
        (s.start, -s.end, i, s) for i, s in enumerate(spans)
        if s.start <= point.time < s.end and (s.thread == point.thread or (s.shared and s.thread >> 24 == point.thread >> 24))
    ]  # fmt: skip
    inner = {s.text.partition(":")[0]: s.text for *_, s in sorted(mine, key=lambda m: m[:3])}
    return {kind: inner[kind].split(": ")[1].split(" ")[0] for kind in ("stage", "module", "op") if kind in inner}


def test_ranges_that_do_not_nest_are_exact_too():
    pick = random.Random(5)
    threads = [thread_id(p, t) for p in (1, 2) for t in (1, 2)]
    spans = []
    for i in range(400):
        start, kind = pick.randrange(1000), pick.choice(("stage", "module", "op"))
        spans.append(
            Span(
                start,
                start + pick.randrange(1, 200),
                pick.choice(threads),
                pick.random() < 0.3,
                f"{kind}: n{i} x",
                "vlmops",
            )
        )
    points = [Point(pick.randrange(1200), pick.choice(threads)) for _ in range(500)]
    found = under(spans, points)
    for point, place in zip(points, found, strict=True):
        want = brute(spans, point)
        assert {k: getattr(place, k) for k in ("stage", "module", "op") if getattr(place, k)} == want


def test_a_range_is_open_from_its_start_to_before_its_end():
    spans = [Span(10, 20, A, False, STAGE, "vlmops"), Span(20, FOREVER, A, False, message("stage", "decode"), "vlmops")]
    found = under(spans, [Point(t, A) for t in (9, 10, 19, 20, 10**12)])
    assert [place.stage for place in found] == [None, "prefill", "prefill", "decode", "decode"]
    assert under(spans, [Point(15, B)]) == [NOWHERE]


def test_start_end_ranges_count_on_every_thread_of_their_process(tmp_path):
    made = Recording()
    made.domain(100), made.domain(200)
    made.range(5, 100, A, STAGE, kind=START_END)
    made.range(20, 40, B, OP)
    made.kernel("k", made.call(30, B), 100, Place("prefill", op="mlp", backend="cuda", range=OP))
    made.kernel("k", made.call(50, B), 100, Place("prefill", range=STAGE))
    made.kernel("k", made.call(30, thread_id(200, 2)), 200, NOWHERE)
    assert places(made, tmp_path / "a.sqlite")[0] == made.expected


def test_the_same_correlation_id_in_two_processes(tmp_path):
    made = Recording()
    for process, stage in ((1, "vision"), (2, "decode")):
        made.domain(process)
        made.correlation = 40
        made.range(1, 90, thread_id(process, 9), message("stage", stage))
        made.kernel("k", made.call(50, thread_id(process, 9)), process, Place(stage, range=message("stage", stage)))
    assert places(made, tmp_path / "a.sqlite")[0] == made.expected


def test_of_nested_calls_the_outermost_launched(tmp_path):
    made = Recording()
    made.domain(100)
    made.range(10, 20, A, OP)
    correlation = made.call(30, A)
    made.add("CUPTI_ACTIVITY_KIND_RUNTIME", 15, 40, 0, A, correlation, made.string("cudaLaunchKernel"), 0, None)
    made.kernel("k", correlation, 100, Place(op="mlp", backend="cuda", range=OP))
    assert places(made, tmp_path / "a.sqlite")[0] == made.expected


def test_kernels_of_cuda_graphs(tmp_path):
    """Captured under op and module, replayed in a stage; a node whose making was not recorded has only its launch's ranges."""
    made = Recording()
    made.domain(100)
    made.range(10, 50, A, message("stage", "vision"))
    made.range(15, 40, A, MODULE)
    made.range(20, 30, A, OP)
    name = made.string("cudaGraphAddKernelNode")
    made.add("CUDA_GRAPH_NODE_EVENTS", 25, 26, 0, A, name, 3, None)
    made.add("CUDA_GRAPH_NODE_EVENTS", 35, 36, 0, A, name, 4, None)
    for clone, original in ((13, 3), (14, 4), (23, 13)):
        made.add("CUDA_GRAPH_NODE_EVENTS", 60, 61, 0, A, name, clone, original)
    made.range(100, 200, A, message("stage", "decode"))
    made.range(210, 230, A, OP)  # a graph is instantiated under an op that has nothing to do with its nodes
    made.add("CUDA_GRAPH_NODE_EVENTS", 220, 221, 0, A, name, 55, 54)
    launch = made.call(150, A, "cudaGraphLaunch_v10000")
    made.kernel("k", launch, 100, Place("decode", "visual", "mlp", None, "cuda", OP), node=13)
    made.kernel("k", launch, 100, Place("decode", "visual", range=MODULE), node=14)
    made.kernel("k", launch, 100, Place("decode", "visual", "mlp", None, "cuda", OP), node=23)
    made.kernel("k", launch, 100, Place("decode", range=message("stage", "decode")), node=99)
    made.kernel("k", launch, 100, Place("decode", range=message("stage", "decode")), node=55)
    assert places(made, tmp_path / "a.sqlite")[0] == made.expected


def test_a_cycle_of_graph_nodes_ends(tmp_path):
    made = Recording()
    for node, original in ((1, 2), (2, 1)):
        made.add("CUDA_GRAPH_NODE_EVENTS", 5, 6, 0, A, made.string("x"), node, original)
    made.kernel("k", made.call(9, A), 100, NOWHERE, node=1)
    assert places(made, tmp_path / "a.sqlite")[0] == made.expected


def test_whole_graphs_copies_and_sets(tmp_path):
    made = Recording()
    made.domain(100)
    made.range(1, 100, A, STAGE)
    pid = thread_id(100, 0)
    made.add("CUPTI_ACTIVITY_KIND_GRAPH_TRACE", 10, 30, 0, 1, 7, made.call(5, A), pid, 21, 22)
    made.add("CUPTI_ACTIVITY_KIND_MEMCPY", 40, 140, 0, 1, 7, made.call(35, A), pid, 5000, 1, None)
    made.add("CUPTI_ACTIVITY_KIND_MEMCPY", 40, 140, 0, 1, 7, made.call(36, A), pid, 5000, 8, None)
    made.add("CUPTI_ACTIVITY_KIND_MEMSET", 200, 210, 0, 1, 7, made.call(300, A), pid, 0, 64, None)
    _, trace = places(made, tmp_path / "a.sqlite")
    assert [(x.kind, x.short, x.ns, x.bytes, x.place.stage) for x in trace.launches] == [
        ("graph", "CUDA graph 21", 20, None, "prefill"), ("memcpy", "[memcpy Host-to-Device]", 100, 5000, "prefill"),
        ("memcpy", "[memcpy Device-to-Device]", 100, 5000, "prefill"), ("memset", "[memset]", 10, 64, None),
    ]  # fmt: skip
    assert any("--cuda-graph-trace=node" in note for note in trace.notes)


def simple(**options):
    made = Recording(**options)
    made.domain(100)
    made.range(1, 100, A, OP)
    made.kernel("k", made.call(50, A), 100, Place(op="mlp", backend="cuda", range=OP), registers=40, shared=(16, 1024))
    return made


@pytest.mark.parametrize("registered", [False, True])
def test_a_launchs_other_facts(tmp_path, registered):
    found, trace = places(simple(registered=registered), tmp_path / "odd ?#%name.sqlite")
    (launch,) = trace.launches
    assert found == [Place(op="mlp", backend="cuda", range=OP)]
    assert (launch.registers, launch.shared, launch.name, launch.short) == (40, 1040, "void k<float>(float*)", "k")
    assert launch.linked and launch.process == thread_id(100, 0)
    assert (trace.schema, trace.product, trace.gpus, trace.capability) == (
        "3.28.1",
        "2026.4.1.0",
        ("NVIDIA H100",),
        "9.0",
    )


# -- what is missing ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("without", "note"),
    [("NVTX_EVENTS", "no NVTX_EVENTS"), ("CUPTI_ACTIVITY_KIND_RUNTIME", "no CUPTI_ACTIVITY_KIND_RUNTIME")],
)
def test_without_ranges_or_calls_kernels_are_still_read(tmp_path, without, note):
    found, trace = places(simple(), tmp_path / "a.sqlite", without=[without])
    assert found == [NOWHERE] and trace.launches[0].ns == 1000
    assert any(text.startswith(note) for text in trace.notes)


def test_tables_that_name_enumerations_may_be_missing(tmp_path):
    made = simple()
    without = ("ENUM_NSYS_EVENT_TYPE", "ENUM_CUDA_MEMCPY_OPER", "TARGET_INFO_GPU", "CUDA_GRAPH_NODE_EVENTS")
    found, trace = places(made, tmp_path / "a.sqlite", without=without)
    assert found == made.expected and trace.gpus == () and trace.capability is None


def test_a_domain_without_a_name_and_a_kernel_without_a_process(tmp_path):
    made = Recording()
    made.range(1, 100, A, OP)
    made.kernel("k", made.call(50, A), None, Place(op="mlp", backend="cuda", range=OP))
    assert places(made, tmp_path / "a.sqlite")[0] == made.expected


def test_a_prefix_in_the_default_domain_is_not_ours(tmp_path):
    made = Recording()
    made.range(1, 100, A, OP, domain=0)
    made.kernel("k", made.call(50, A), 100, Place(range=OP))
    assert places(made, tmp_path / "a.sqlite")[0] == made.expected


def test_launches_from_before_the_recording_are_counted(tmp_path):
    made = simple()
    made.kernel("k", 4711, 100, NOWHERE)
    found, trace = places(made, tmp_path / "a.sqlite")
    assert found == made.expected and [launch.linked for launch in trace.launches] == [True, False]
    assert any(note.startswith("1 of 2 launches have no call") for note in trace.notes)


def test_a_range_that_never_ended(tmp_path):
    made = Recording()
    made.domain(100)
    made.range(1, None, A, STAGE)
    made.kernel("k", made.call(10**15, A), 100, Place("prefill", range=STAGE))
    assert places(made, tmp_path / "a.sqlite")[0] == made.expected


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["3.0.0", "3.17.2", "3.28.1", "3.99.0"])
def test_supported_versions(tmp_path, version):
    found, trace = places(simple(version=version), tmp_path / "a.sqlite")
    assert found[0].op == "mlp" and trace.schema == version


@pytest.mark.parametrize(
    ("version", "word"),
    [
        ("4.0.0", "is newer"),
        ("17.1.0", "is newer"),
        ("2.7.1", "is older"),
        ("", "no schema version"),
        ("x.1", "'x.1.0' is none"),
    ],
)
def test_other_versions_are_refused(tmp_path, version, word):
    with pytest.raises(ProfileFileError, match=word) as error:
        nsys.read(simple(version=version).write(tmp_path / "a.sqlite"))
    assert "schema 3.x is supported" in str(error.value) and "a.sqlite" in str(error.value)


def edited(path, sql):
    made = simple().write(path)
    with sqlite3.connect(made) as db:
        db.execute(sql)
    db.close()
    return made


@pytest.mark.parametrize(
    ("sql", "word"),
    [
        ("DROP TABLE META_DATA_EXPORT", "no schema version"),
        ("ALTER TABLE CUPTI_ACTIVITY_KIND_KERNEL DROP COLUMN correlationId", "no column correlationId"),
        ("ALTER TABLE NVTX_EVENTS DROP COLUMN eventType", "no column eventType"),
        ("UPDATE CUPTI_ACTIVITY_KIND_KERNEL SET start = 'x'", "expected an integer"),
        ("UPDATE CUPTI_ACTIVITY_KIND_KERNEL SET end = start - 1", "1 ns before"),
        ("UPDATE CUPTI_ACTIVITY_KIND_KERNEL SET shortName = 999", "StringIds has no 999"),
        ("UPDATE NVTX_EVENTS SET globalTid = 'me' WHERE eventType = 59", "expected an integer"),
        ("UPDATE CUPTI_ACTIVITY_KIND_RUNTIME SET start = 0.5", "expected an integer"),
    ],
)
def test_damaged_tables_are_refused(tmp_path, sql, word):
    with pytest.raises(ProfileFileError, match=word):
        nsys.read(edited(tmp_path / "a.sqlite", sql))


def test_a_file_without_gpu_work_is_refused(tmp_path):
    kinds = [f"CUPTI_ACTIVITY_KIND_{kind}" for kind in ("KERNEL", "MEMCPY", "MEMSET", "GRAPH_TRACE")]
    with pytest.raises(ProfileFileError, match="--trace=cuda"):
        nsys.read(Recording().write(tmp_path / "a.sqlite", without=kinds))


@pytest.mark.parametrize("content", [b"", b"SQLite format 3\0", b"PK\3\4" + b"x" * 200, b"ID,Kernel Name\n" * 20])
def test_other_files_are_refused(tmp_path, content):
    path = tmp_path / "a.sqlite"
    path.write_bytes(content)
    with pytest.raises(ProfileFileError, match="nsys export"):
        nsys.read(path)


def test_truncated_files_are_refused(tmp_path):
    data = nested(1, 200).write(tmp_path / "a.sqlite").read_bytes()
    for part in (0.1, 0.5, 0.9, 0.999):
        path = tmp_path / "b.sqlite"
        path.write_bytes(data[: int(len(data) * part)])
        with pytest.raises(ProfileFileError, match=r"truncated: \d+ bytes of \d+$"):
            nsys.read(path)


def test_noise_never_escapes_as_another_error(tmp_path):
    data, pick = nested(2, 60).write(tmp_path / "a.sqlite").read_bytes(), random.Random(3)
    refused = 0
    for _ in range(40):
        noisy = bytearray(data)
        for _ in range(pick.choice((1, 20, 400))):
            noisy[pick.randrange(100, len(noisy))] = pick.randrange(256)
        (tmp_path / "b.sqlite").write_bytes(noisy)
        try:
            nsys.read(tmp_path / "b.sqlite")
        except ProfileFileError:
            refused += 1
    assert refused > 10


def test_views_are_not_run(tmp_path):
    """A view in a table's place could run for ever."""
    path = edited(tmp_path / "a.sqlite", "ALTER TABLE CUPTI_ACTIVITY_KIND_KERNEL RENAME TO hidden")
    with sqlite3.connect(path) as db:
        db.execute(
            "CREATE VIEW CUPTI_ACTIVITY_KIND_KERNEL AS WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n) "
            "SELECT x AS start FROM n"
        )
    db.close()
    assert nsys.read(path).launches == ()


def test_sizes_are_limited(tmp_path, monkeypatch):
    path = nested(1, 50).write(tmp_path / "a.sqlite")
    monkeypatch.setattr(database, "MAX_ROWS", 20)
    with pytest.raises(ProfileFileError, match="more than 20 rows"):
        nsys.read(path)
    monkeypatch.setattr(database, "MAX_BYTES", 1000)
    with pytest.raises(ProfileFileError, match="are read"):
        nsys.read(path)


def test_slow_files_are_given_up(tmp_path, monkeypatch):
    path = nested(1, 3000).write(tmp_path / "a.sqlite")
    monkeypatch.setattr(database, "SECONDS", -1.0)
    monkeypatch.setattr(database, "STEPS", 10)
    with pytest.raises(ProfileFileError, match="interrupted"):
        nsys.read(path)


def test_the_file_is_left_alone(tmp_path, monkeypatch):
    path = simple().write(tmp_path / "a.sqlite")
    connect, asked = sqlite3.connect, []
    monkeypatch.setattr(sqlite3, "connect", lambda name, **options: asked.append(name) or connect(name, **options))
    before = path.read_bytes()
    path.chmod(0o400)
    nsys.read(path)
    with database.opened(path, "") as db, pytest.raises(sqlite3.OperationalError, match="readonly"):
        db._connection.execute("CREATE TABLE x (y)")
    assert len(asked) == 2 and all(name.startswith("file:/") and name.endswith("?mode=ro") for name in asked)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["a.sqlite"]
