"""linear_cross_entropy: parity with the full logits, gradients, and proof that the logits are never whole."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import vlmops
from tests.support.ops import check_op, opcheck
from vlmops.ops import linear_cross_entropy
from vlmops.ops.linear_cross_entropy import composition

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
IGNORE = -100


@pytest.fixture
def small_chunks(monkeypatch):
    """Five tokens a piece, so that small cases have several pieces and a short last one."""
    monkeypatch.setattr(composition, "chunk_rows", lambda *_: 5)


def make(tokens=13, channels=8, words=19, bias=False, ignored=3, grad=True):
    hidden = torch.randn(tokens, channels, requires_grad=grad)
    weight = torch.randn(words, channels, requires_grad=grad)
    targets = torch.randint(words, (tokens,))
    targets[torch.randperm(tokens)[:ignored]] = IGNORE
    return (hidden, weight, targets), dict(bias=torch.randn(words, requires_grad=grad)) if bias else {}


CASES = {
    "plain": (dict(), {}),
    "bias": (dict(bias=True), {}),
    "softcap": (dict(bias=True), dict(softcap=2.0)),
    "smoothing": (dict(), dict(label_smoothing=0.1)),
    "z loss": (dict(), dict(z_loss=1e-2)),
    "all options": (dict(bias=True), dict(softcap=2.0, label_smoothing=0.1, z_loss=1e-2)),
    "one token": (dict(tokens=1, ignored=0), {}),
    "one word": (dict(words=1), {}),
    "most ignored": (dict(ignored=12), {}),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("case", CASES)
def test_torch_backend(case, reduction, dtype, small_chunks):
    shapes, options = CASES[case]
    args, named = make(**shapes)
    check_op(linear_cross_entropy, args, {**named, **options, "reduction": reduction}, backend="torch", dtype=dtype)


@given(
    tokens=st.integers(0, 12), channels=st.integers(1, 6), words=st.integers(1, 20), bias=st.booleans(),
    reduction=st.sampled_from(["sum", "none"]), smoothing=st.sampled_from([0.0, 0.3]),
    softcap=st.sampled_from([0.0, 3.0]),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_random_shapes(tokens, channels, words, bias, reduction, smoothing, softcap):
    args, named = make(tokens, channels, words, bias, ignored=tokens // 3)
    options = dict(reduction=reduction, label_smoothing=smoothing, softcap=softcap)
    check_op(linear_cross_entropy, args, {**named, **options}, backend="torch", dtype=torch.float32)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_against_torch(reduction, smoothing, small_chunks):
    (hidden, weight, targets), named = make(bias=True)
    leaves = [hidden, weight, named["bias"]]
    want = F.cross_entropy(
        F.linear(*leaves), targets, ignore_index=IGNORE, reduction=reduction, label_smoothing=smoothing
    )
    out = linear_cross_entropy(hidden, weight, targets, **named, reduction=reduction, label_smoothing=smoothing)
    torch.testing.assert_close(out, want)
    grad = torch.randn_like(want)
    for a, b in zip(torch.autograd.grad(out, leaves, grad), torch.autograd.grad(want, leaves, grad), strict=True):
        torch.testing.assert_close(a, b)


def test_against_the_loss_of_transformers(small_chunks):
    """ForCausalLMLoss: logits upcast, targets shifted, the sum divided by num_items_in_batch."""
    from transformers.loss.loss_utils import ForCausalLMLoss

    hidden, weight = torch.randn(2, 9, 8), torch.randn(19, 8)
    labels = torch.randint(19, (2, 9))
    labels[0, :4] = IGNORE
    want = ForCausalLMLoss(hidden @ weight.t(), labels, vocab_size=19, num_items_in_batch=torch.tensor(7))
    shifted = F.pad(labels, (0, 1), value=IGNORE)[:, 1:].flatten()
    out = linear_cross_entropy(hidden.flatten(0, 1), weight, shifted, reduction="sum") / 7
    torch.testing.assert_close(out, want)


def test_all_ignored_is_torchs_answer():
    (hidden, weight, _), _ = make()
    targets = torch.full((13,), IGNORE)
    loss = linear_cross_entropy(hidden, weight, targets)
    assert loss.isnan() and F.cross_entropy(hidden @ weight.t(), targets).isnan()
    for grad in torch.autograd.grad(linear_cross_entropy(hidden, weight, targets, reduction="sum"), [hidden, weight]):
        assert torch.equal(grad, torch.zeros_like(grad))


def test_no_tokens():
    hidden, weight = torch.randn(0, 8, requires_grad=True), torch.randn(19, 8, requires_grad=True)
    loss = linear_cross_entropy(hidden, weight, torch.zeros(0, dtype=torch.int64), reduction="sum")
    assert loss == 0
    loss.backward()
    assert hidden.grad.shape == (0, 8) and torch.equal(weight.grad, torch.zeros(19, 8))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_only_what_is_wanted(reduction, small_chunks):
    """A frozen head, then frozen hidden states: the other gradient is unchanged."""
    (hidden, weight, targets), _ = make()
    both = torch.autograd.grad(
        linear_cross_entropy(hidden, weight, targets, reduction=reduction).sum(), [hidden, weight]
    )
    (one,) = torch.autograd.grad(
        linear_cross_entropy(hidden, weight.detach(), targets, reduction=reduction).sum(), hidden
    )
    (other,) = torch.autograd.grad(
        linear_cross_entropy(hidden.detach(), weight, targets, reduction=reduction).sum(), weight
    )
    assert torch.equal(one, both[0]) and torch.equal(other, both[1])


def test_a_graph_kept_for_two_backwards(small_chunks):
    (hidden, weight, targets), _ = make()
    loss = linear_cross_entropy(hidden, weight, targets)
    first = torch.autograd.grad(loss * 2, [hidden, weight], retain_graph=True)
    second = torch.autograd.grad(loss, [hidden, weight])
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, 2 * b)


class Largest(TorchDispatchMode):
    """The largest number of elements of any tensor a torch operation makes."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.numel())
        return out


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("options", [{}, dict(softcap=2.0, label_smoothing=0.1, z_loss=1e-3)])
def test_the_logits_are_never_whole(reduction, options):
    tokens, words, channels = 512, 1024, 4
    (hidden, weight, targets), _ = make(tokens, channels, words)
    extra = [options.get(name, 0.0) for name in ("softcap", "label_smoothing", "z_loss")]
    wants = [reduction != "none"] * 2 + [False]
    plain = [hidden.detach(), weight.detach(), None, targets, IGNORE, reduction, *extra, wants]
    with Largest() as seen:  # below the dispatcher op, which a mode sees as one call
        loss, *saved = composition.forward(*plain)
        composition.backward([torch.ones_like(loss)], saved, plain, [True, True, False])
    assert seen.elements <= tokens * words // 2
    with Largest() as dense:
        F.cross_entropy(F.linear(hidden, weight), targets)
    assert dense.elements == tokens * words


def test_piece_sizes():
    rows = composition.chunk_rows
    assert rows(10, 50, 8, True) == 10  # short batches in one piece
    assert rows(4096, 1000, 8, False) == 2048  # half of a long one
    assert rows(8192, 152_064, 2048, False) * 152_064 * 4 <= composition.CHUNK_BYTES
    assert rows(8192, 152_064, 2048, True) == 1024  # half the size of the weight's gradient
    assert rows(3, 10**9, 8, False) == 1


def test_gradcheck_of_the_reference():
    (hidden, weight, targets), named = make(5, 3, 4, bias=True, ignored=1)
    leaves = [x.detach().double().requires_grad_() for x in (hidden, weight, named["bias"])]
    with vlmops.use_backend("reference"):
        assert torch.autograd.gradcheck(
            lambda h, w, b: linear_cross_entropy(h, w, targets, bias=b, softcap=3.0, label_smoothing=0.1, z_loss=0.1),
            leaves,
        )


@pytest.mark.parametrize(
    ("reduction", "wants"), [("mean", [True, True, True]), ("sum", [True, False, False]), ("none", [False] * 3)]
)
def test_opcheck(reduction, wants):
    (hidden, weight, targets), named = make(bias=True)
    weight.requires_grad_(wants[1] or reduction == "none")
    named["bias"].requires_grad_(wants[2] or reduction == "none")
    args = (hidden, weight, named["bias"], targets, IGNORE, reduction, 2.0, 0.1, 0.01, wants, "torch")
    opcheck(torch.ops.vlmops.linear_cross_entropy.default, args)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compile_has_no_graph_break(reduction):
    (hidden, weight, targets), _ = make()
    call = lambda h: linear_cross_entropy(h, weight, targets, reduction=reduction).sum()  # noqa: E731
    (got,) = torch.autograd.grad(torch.compile(call, fullgraph=True, backend="aot_eager")(hidden), hidden)
    (want,) = torch.autograd.grad(call(hidden), hidden)
    torch.testing.assert_close(got, want)


def test_autocast_multiplies_in_low_precision():
    (hidden, weight, targets), _ = make()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, targets)
    low = linear_cross_entropy(hidden.bfloat16(), weight.bfloat16(), targets)
    assert loss.dtype == torch.float32 and torch.equal(loss, low)
    loss.backward()
    assert hidden.grad.dtype == weight.grad.dtype == torch.float32


def test_nan_flows_through_except_where_ignored():
    (hidden, weight, targets), _ = make(ignored=0)
    targets[2] = IGNORE
    with torch.no_grad():
        hidden[1, 0] = hidden[2, 0] = float("nan")
    loss = linear_cross_entropy(hidden, weight, targets, reduction="none")
    assert loss.isnan().nonzero().flatten().tolist() == [1] and loss[2] == 0
    (dh,) = torch.autograd.grad(loss.sum(), hidden)
    assert dh[1].isnan().all() and torch.equal(dh[2], torch.zeros(8)) and dh[3:].isfinite().all()


BAD = {
    "rank": (lambda a: dict(hidden=a["hidden"][None]), "hidden: expected 2 dimensions"),
    "integers": (lambda a: dict(hidden=a["hidden"].int()), "hidden: expected a floating-point"),
    "weight width": (lambda a: dict(weight=a["weight"][:, :-1]), "weight: expected shape"),
    "weight dtype": (lambda a: dict(weight=a["weight"].half()), "weight: expected float32"),
    "no words": (lambda a: dict(weight=a["weight"][:0]), "V, K >= 1"),
    "targets length": (lambda a: dict(targets=a["targets"][:-1]), r"targets: expected shape \[13\]"),
    "targets dtype": (lambda a: dict(targets=a["targets"].float()), "targets: expected int64"),
    "target too large": (
        lambda a: dict(targets=torch.full((13,), 19)),
        "targets: expected 0 <= target < 19 or -100, got 19",
    ),
    "target negative": (
        lambda a: dict(targets=torch.full((13,), -1)),
        "targets: expected 0 <= target < 19 or -100, got -1",
    ),
    "bias length": (lambda a: dict(bias=torch.zeros(18)), r"bias: expected shape \[19\]"),
    "reduction": (lambda a: dict(reduction="max"), "reduction: expected one of"),
    "smoothing": (lambda a: dict(label_smoothing=1.5), "label_smoothing: expected within"),
    "device": (lambda a: dict(weight=a["weight"].to("meta")), "weight: expected on cpu"),
    "not a tensor": (lambda a: dict(targets=[1]), "targets: expected a tensor"),
}


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("case", BAD)
def test_bad_input(case, backend):
    (hidden, weight, targets), _ = make(grad=False)
    args = dict(hidden=hidden, weight=weight, targets=targets)
    change, message = BAD[case]
    args.update(change(args))
    with vlmops.use_backend(backend), pytest.raises((ValueError, TypeError), match=message):
        linear_cross_entropy(**args)
