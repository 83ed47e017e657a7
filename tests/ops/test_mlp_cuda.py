"""The CUDA mlp on the SIMT machine: parity of every option, tile and width of access; gathers in place."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vlmops
from tests.ops.test_mlp import EXTRAS, extras, make, norm_of, plain
from tests.support.cuda_machine import DTYPES, check_on_machine, counted, simt
from tests.support.ops import check_op, opcheck
from vlmops.backends import cuda_runtime
from vlmops.ops import mlp
from vlmops.ops._shared.activations import ACTIVATIONS
from vlmops.ops.mlp import cuda as backend
from vlmops.ops.mlp.layout import gather_rows

__all__ = ["simt"]

BF16 = torch.bfloat16
GATHERS = {
    "merge2x2": ((24,), "merge2x2"),
    "pixel_shuffle": ((2, 24), ("pixel_shuffle", 4, 6)),
    "a tall picture": ((1, 48), ("pixel_shuffle", 12, 4)),
    "few rows": ((1, 12), ("pixel_shuffle", 2, 6)),
    "no pictures": ((0, 24), ("pixel_shuffle", 4, 6)),
    "no rows": ((0,), "merge2x2"),
}


def gathered(x, *args, gather=None, norm=None, **kwargs):
    """mlp with a gather as a model's own code computes it."""
    kind, height, width = (gather, 0, 0) if isinstance(gather, str) else gather or ("", 0, 0)
    return plain(gather_rows(norm_of(x, norm), kind, height, width), *args, **kwargs)


def check(args, kwargs, dtype=BF16):
    check_op(mlp, args, {"activation": "silu", **kwargs}, backend="cuda", dtype=dtype, lowprec=gathered)


def everything(rows, k, h, n, gated=True):
    """All that stands around the products but norms: biases are ``make``'s."""
    kwargs = dict(layer_scale=torch.randn(n), residual=torch.randn(*rows, n))
    return {**kwargs, **(extras("gated", c=k, h=h) if gated else {})}


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation, gated, dtype):
    check(make((7,)), dict(activation=activation, **extras("gated" if gated else "plain")), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [3, 9])
@pytest.mark.parametrize("name", EXTRAS)
def test_surroundings(name, rows, dtype):
    check(make((rows,), biases=name != "gated, no bias"), extras(name, rows=(rows,)), dtype)


@pytest.mark.parametrize("rows", [3, 7])
def test_a_norm_between_that_rounds_once(rows):
    """The row is not rounded before it meets a weight of any size."""
    scale = torch.randn(64) * 100
    check(make((rows,)), dict(mid_norm=("rms_norm", scale, None, 1e-6)))


#: rows, k, h, n: whole tiles and ragged ones of every kind, a ring of stages that turns round, groups of tiles.
TILES = {
    "flat, ragged": (11, 200, 104, 40),
    "flat, whole": (16, 256, 64, 32),
    "square, whole": (64, 160, 64, 64),
    "square, ragged": (70, 104, 72, 24),
    "groups of tiles": (590, 16, 72, 8),
    "large, ragged": (290, 72, 200, 8),
    "large, odd": (257, 37, 197, 3),
    "one of each": (5, 1, 1, 1),
}


@pytest.mark.parametrize("case", TILES)
def test_every_gated_tile(case):
    rows, k, h, n = TILES[case]
    check(make((rows,), k, h, n), everything((rows,), k, h, n))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(9, 200, 40, 24), (70, 136, 72, 8), (66, 21, 67, 9), (2, 300, 44, 16)])
def test_every_schedule(shape, dtype):
    rows, k, h, n = shape
    kwargs = dict(activation="silu", **everything((rows,), k, h, n))
    check_on_machine(mlp, make((rows,), k, h, n), kwargs, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("gated", [False, True])
def test_every_schedule_of_a_gather(gated, dtype):
    kwargs = dict(activation="silu", gather=("pixel_shuffle", 4, 6), norm=("rms_norm", torch.ones(8), None, 1e-6))
    kwargs |= extras("gated" if gated else "plain", c=8, wide=4)
    check_on_machine(mlp, make((3, 24), c=8, wide=4), kwargs, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("rows", [3, 6, 17])
@pytest.mark.parametrize("k", [44, 42, 41])
def test_every_width_of_an_access(k, rows, dtype):
    check(make((rows,), k, k, k), everything((rows,), k, k, k), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize(("k", "h"), [(1, 11), (600, 18), (24, 131)])
def test_few_rows(k, h, rows, dtype):
    """One and two columns a warp; h that leaves a rest."""
    check(make((rows,), k, h), everything((rows,), k, h, 48), dtype)


def test_warps_without_a_column_read_nothing():
    """13 columns are 13 warps of 4 blocks, and so are those of the second product: each reads the row and its weights."""
    x, w1, _, w2, _ = (t.to(BF16) for t in make((1,), 256, 13, 13))
    with counted() as seen:
        mlp(x, w1, None, w2, None, activation="silu", w_gate=w1.clone())
    assert seen["global_load_bytes"] == 2 * 13 * (3 * 256 + 2 * 13)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("case", GATHERS)
def test_gathers(case, gated, dtype):
    rows, gather = GATHERS[case]
    out = (rows[0], rows[1] // 4) if len(rows) == 2 else (rows[0] // 4,)
    kwargs = dict(residual=torch.randn(*out, 24), **extras("gated" if gated else "plain", c=16, h=40, wide=4))
    check(make(rows, c=16, h=40, n=24, wide=4), dict(gather=gather, **kwargs), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("c", [12, 10, 5])
@pytest.mark.parametrize("height", [2, 4])
def test_gathers_of_every_width_of_an_access(height, c, gated, dtype):
    """In place down to 4 bytes, of a copy below, which waits for the norm; with few rows and with tiles."""
    kwargs = dict(gather=("pixel_shuffle", height, 4), norm=("layer_norm", torch.randn(c), None, 1e-6))
    kwargs |= extras("gated" if gated else "plain", c=c, wide=4)
    check(make((2, height * 4), c=c, wide=4), kwargs, dtype)


def _tokens(rows, c, dtype, of):
    """x [..., C] that is a part of a larger tensor, made in the dtype it runs in: a conversion would pack it."""
    x = torch.randn(*rows[:-1], rows[-1] + 1, c + 8, dtype=dtype)
    return {"wide rows": x[..., 1:, 8:], "no first token": x[..., :c].contiguous()[..., 1:, :],
            "every second column": torch.randn(*rows, 2 * c, dtype=dtype)[..., ::2],
            "one row for all": x[..., :1, :c].expand(*rows, c)}[of]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("case", ["merge2x2", "pixel_shuffle"])
@pytest.mark.parametrize("of", ["wide rows", "no first token", "every second column", "one row for all"])
def test_gathers_of_strided_tokens(of, case, dtype):
    rows, gather = GATHERS[case]
    x = _tokens(rows, 16, dtype, of)
    assert x.shape == (*rows, 16)
    check((x, *make(c=16, h=40, n=24, wide=4)[1:]), dict(gather=gather, **extras("gated", c=16, h=40, wide=4)), dtype)


@pytest.mark.parametrize("of", ["wide rows", "no first token"])
@pytest.mark.parametrize("case", ["merge2x2", "pixel_shuffle"])
def test_gathers_read_tokens_where_they_lie(case, of):
    rows, gather = GATHERS[case]
    x = _tokens(rows, 16, BF16, of)
    _, w1, b1, w2, b2 = (t.to(BF16) for t in make(c=16, wide=4))
    with vlmops.use_backend("cuda"), cuda_runtime.record(cuda_runtime.SIMT) as plans:
        mlp(x, w1, b1, w2, b2, activation="gelu", gather=gather)
    assert len(plans) == 2 and plans[0].args[0].data_ptr() == x.data_ptr()


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(
    ("rows", "k", "h", "n"),
    [((), 5, 7, 3), ((6,), 0, 3, 4), ((2,), 0, 3, 4), ((6,), 4, 0, 3), ((6,), 4, 3, 0), ((0,), 4, 3, 2), ((2, 0), 4, 3, 2),
     ((2, 3), 17, 3, 5)],
)  # fmt: skip
def test_odd_and_empty_shapes(rows, k, h, n, gated, dtype):
    check(make(rows, k, h, n), everything(rows, k, h, n, gated), dtype)


@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm"])
def test_norms_of_nothing(norm):
    for rows, h in ((0, 3), (5, 0)):
        kwargs = dict(mid_norm=(norm, torch.randn(h), None, 1e-6), norm=(norm, torch.randn(4), None, 1e-6))
        check(make((rows,), 4, h, 3), kwargs, torch.float32)


LAYOUTS = {
    "every second column": lambda m, k, dtype: torch.randn(m, 2 * k, dtype=dtype)[:, ::2],
    "a slice of wide rows": lambda m, k, dtype: torch.randn(m, k + 5, dtype=dtype)[:, 2 : 2 + k],
    "transposed": lambda m, k, dtype: torch.randn(k, m, dtype=dtype).t(),
    "one row for all": lambda m, k, dtype: torch.randn(1, k, dtype=dtype).expand(m, k),
    "every second row": lambda m, k, dtype: torch.randn(2 * m, k, dtype=dtype)[::2],
}


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("rows", [4, 18])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, rows, dtype):
    """Made in the dtype they run in: a conversion would pack them."""
    x, w1, w2, residual = (LAYOUTS[layout](*shape, dtype) for shape in ((rows, 24), (16, 24), (8, 16), (rows, 8)))
    w_gate = torch.randn(16, 40, dtype=dtype)[:, 8:32]  # not as far apart as the rows of w1
    b1, b_gate, b2, scale = (torch.randn(2 * n, dtype=dtype)[::2] for n in (16, 16, 8, 8))
    kwargs = dict(w_gate=w_gate, b_gate=b_gate, layer_scale=scale, residual=residual)
    check((x, w1, b1, w2, b2), {**kwargs, "norm": ("rms_norm", b1.repeat(2)[:24], None, 1e-6)}, dtype)


@pytest.mark.parametrize("odd", ["x", "w1", "w_gate", "b1", "b_gate"])
def test_a_base_address_between_accesses(odd):
    """One element past an aligned address, in one tensor at a time."""
    shapes = dict(x=(6, 32), w1=(24, 32), w_gate=(24, 32), b1=(24,), b_gate=(24,))
    parts = {}
    for name, shape in shapes.items():
        first = int(name == odd)
        parts[name] = torch.randn(torch.Size(shape).numel() + first, dtype=BF16)[first:].view(shape)
    assert parts[odd].data_ptr() % 16 == 2
    args = (parts.pop("x"), parts.pop("w1"), parts.pop("b1"), torch.randn(16, 24, dtype=BF16), None)
    check(args, parts)


@given(
    rows=st.lists(st.integers(0, 9), max_size=2), k=st.integers(1, 70), h=st.integers(1, 70), n=st.integers(1, 40),
    biases=st.booleans(), gated=st.booleans(), norms=st.sampled_from([None, "norm", "mid_norm"]), dtype=st.sampled_from(DTYPES),
)  # fmt: skip
@settings(max_examples=6, deadline=None)
def test_any_shape(rows, k, h, n, biases, gated, norms, dtype):
    kwargs = extras("gated" if gated else "plain", c=k, h=h)
    if norms is not None:
        kwargs[norms] = ("layer_norm", torch.randn(k if norms == "norm" else h), None, 1e-5)
    check(make(rows, k, h, n, biases), kwargs, dtype)


@given(
    pictures=st.integers(0, 3), height=st.integers(1, 4), width=st.integers(1, 4), c=st.integers(1, 20),
    gated=st.booleans(), dtype=st.sampled_from(DTYPES),
)  # fmt: skip
@settings(max_examples=6, deadline=None)
def test_any_picture(pictures, height, width, c, gated, dtype):
    kwargs = dict(gather=("pixel_shuffle", 2 * height, 2 * width), **extras("gated" if gated else "plain", c=c, wide=4))
    check(make((pictures, 4 * height * width), c=c, wide=4), kwargs, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [4, 6, 18])
def test_nan_stays_in_its_row(rows, dtype):
    x, w1, b1, w2, b2 = (t.to(dtype) for t in make((rows,)))
    x[2, 3] = float("nan")
    gate = torch.randn(64, 32).to(dtype)
    with vlmops.use_backend("cuda"), torch.no_grad():
        for kwargs in (dict(activation="relu"), dict(activation="silu", w_gate=gate)):
            out = mlp(x, w1, b1, w2, b2, **kwargs)
            assert out[2].isnan().all() and out[:2].isfinite().all() and out[3:].isfinite().all()


def test_hidden_rows_are_rounded():
    """Between the products is x's dtype, as in the composition: 1 + 2^-9 becomes 1 there."""
    one, eye = torch.ones(6, 1, dtype=BF16), torch.ones(1, 1, dtype=BF16)
    b1 = torch.tensor([2.0**-9], dtype=BF16)
    with vlmops.use_backend("cuda"):
        out = mlp(one, eye, b1, eye * 256, None, activation="relu", residual=-256 * one)
    assert out.eq(0).all()


@pytest.mark.parametrize("rows", [(3,), (9,)])
def test_layer_scale_of_one_column(rows):
    check(make(rows, n=1), everything(rows, 32, 64, 1))


def test_gradients_are_those_of_torch():
    kwargs = extras("everything", True, rows=(5,))
    check(make((5,), grad=True), dict(activation="gelu", **kwargs))


def test_opcheck():
    x, w1, b1, w2, b2 = make(grad=True)
    none = [None] * 2
    args = (
        x,
        w1,
        b1,
        w2,
        b2,
        torch.randn(64, 32),
        None,
        "gelu",
        None,
        "rms_norm",
        *none,
        1e-6,
        "",
        *none,
        0.0,
        None,
        "",
    )
    opcheck(torch.ops.vlmops.mlp.default, (*args, 0, 0, False, "cuda"))


def arguments(x, w1, w2, norm=""):
    """The raw op's, of a bias-free MLP."""
    none = [None] * 2
    return (x, w1, None, w2, None, *none, "gelu", None, norm, *none, 0.0, norm, *none, 0.0, None, "", 0, 0, True)


def test_what_is_refused():
    x, w1, _, w2, _ = make()
    with vlmops.use_backend("cuda"), pytest.raises(vlmops.backends.BackendError, match="float64"):
        mlp(x.double(), w1.double(), None, w2.double(), None, activation="gelu")
    assert "float64 beside" in backend.supports(*arguments(x, w1, w2.double()))
    one = torch.zeros(1, 1)
    assert "at most" in backend.supports(*arguments(one.expand(2**31, 1), one, one))
    assert backend.supports(*arguments(torch.zeros(1, 20000), torch.zeros(4, 20000), torch.zeros(2, 4))) is None
    wide = torch.zeros(1, 20000), torch.zeros(4, 20000), torch.zeros(2, 4)
    assert "norm over 20000" in backend.supports(*arguments(*wide, "rms_norm"))
    wide = torch.zeros(1, 4), torch.zeros(20000, 4), torch.zeros(2, 20000)
    assert "norm over 20000" in backend.supports(*arguments(*wide, "layer_norm"))
