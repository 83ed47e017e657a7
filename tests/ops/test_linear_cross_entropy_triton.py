"""linear_cross_entropy's Triton kernels in the interpreter: parity, gradients, bounded memory, skipped tokens, traffic."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import vlmops
from tests.ops.test_linear_cross_entropy import CASES, IGNORE, make
from tests.support import triton_interpreter
from tests.support.ops import check_op, opcheck
from vlmops.backends import triton_runtime
from vlmops.backends.triton_runtime import Config
from vlmops.ops import linear_cross_entropy
from vlmops.ops.linear_cross_entropy import triton as backend
from vlmops.ops.linear_cross_entropy.cost import cost

pytest.importorskip("triton")
triton_interpreter.install()

LOW = [torch.bfloat16, torch.float16]


@pytest.fixture
def small_tiles(monkeypatch):
    """16 x 16 tiles and two shares of the vocabulary: small cases have several tiles, and more than one in a share."""
    monkeypatch.setattr(backend, "tiles", lambda *_: [Config.of(BM=16, BN=16, BK=16, GROUP=2)])
    monkeypatch.setattr(backend, "SPLITS", 2)
    monkeypatch.setattr(triton_runtime, "processors", lambda _: 1)


def pieces_of(monkeypatch, rows):
    monkeypatch.setattr(backend, "chunk_rows", lambda *_: rows)


def check(args, named, dtype=torch.float32):
    check_op(linear_cross_entropy, args, named, backend="triton", dtype=dtype)


def run(*args, **options):
    with vlmops.use_backend("triton"):
        return linear_cross_entropy(*args, **options)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("case", CASES)
def test_parity(case, reduction):
    shapes, options = CASES[case]
    args, named = make(**shapes)
    check(args, {**named, **options, "reduction": reduction})


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize(("case", "reduction"), [
    ("plain", "mean"), ("bias", "none"), ("softcap", "sum"), ("smoothing", "mean"), ("z loss", "sum"), ("one token", "mean"),
    ("one word", "mean"), ("most ignored", "mean"), ("all options", "mean"), ("all options", "sum"), ("all options", "none"),
])  # fmt: skip
def test_parity_of_low_precision(case, reduction, dtype):
    shapes, options = CASES[case]
    args, named = make(**shapes)
    check(args, {**named, **options, "reduction": reduction}, dtype)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("shape", [(40, 40, 70), (33, 17, 49), (7, 48, 64)])
def test_several_tiles_each_way(shape, reduction, small_tiles):
    tokens, channels, words = shape
    args, named = make(tokens, channels, words, bias=True, ignored=tokens // 2)
    check(args, {**named, "reduction": reduction, "softcap": 8.0, "label_smoothing": 0.2, "z_loss": 1e-3})


@pytest.mark.parametrize("rows", [5, 7, 12])
@pytest.mark.parametrize("dtype", [torch.float32, *LOW])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_several_pieces(rows, dtype, reduction, monkeypatch):
    """Three, two and two: the weight's gradient is summed over pieces, in float32 from the third on."""
    pieces_of(monkeypatch, rows)
    args, named = make(bias=True)
    check(args, {**named, "reduction": reduction, "label_smoothing": 0.1}, dtype)


def test_pieces_in_which_no_token_counts(monkeypatch):
    pieces_of(monkeypatch, 3)
    for ignored in (13, 12, 6):
        args, named = make(bias=True, ignored=ignored)
        check(args, {**named, "reduction": "sum"})


@given(
    tokens=st.integers(0, 20), channels=st.integers(1, 40), words=st.integers(1, 40), bias=st.booleans(),
    reduction=st.sampled_from(["sum", "none"]), smoothing=st.sampled_from([0.0, 0.3]),
    softcap=st.sampled_from([0.0, 3.0]),
)  # fmt: skip
@settings(max_examples=12, deadline=None)
def test_random_shapes(tokens, channels, words, bias, reduction, smoothing, softcap):
    args, named = make(tokens, channels, words, bias, ignored=tokens // 3)
    check(args, {**named, "reduction": reduction, "label_smoothing": smoothing, "softcap": softcap})


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_against_torch(reduction):
    (hidden, weight, targets), named = make(bias=True)
    leaves = [hidden, weight, named["bias"]]
    want = F.cross_entropy(F.linear(*leaves), targets, reduction=reduction, label_smoothing=0.2)
    out = run(hidden, weight, targets, **named, reduction=reduction, label_smoothing=0.2)
    torch.testing.assert_close(out, want)
    grad = torch.randn_like(want)
    for a, b in zip(torch.autograd.grad(out, leaves, grad), torch.autograd.grad(want, leaves, grad), strict=True):
        torch.testing.assert_close(a, b)


def test_strided_operands_and_int32_targets():
    (_, _, targets), _ = make(13, 8, 19)
    hidden = torch.randn(13, 24)[:, ::3].requires_grad_()
    weight = torch.randn(8, 19).t().requires_grad_()
    check((hidden, weight, targets.int()), {})
    hidden, weight = torch.randn(26, 11)[::2, 3:].requires_grad_(), torch.randn(19, 9)[:, :8].requires_grad_()
    check((hidden, weight, targets[:13]), {"reduction": "none"})


def test_offsets_beyond_32_bits():
    """Rows 2^31 elements apart (4 GiB of address space, of which two pages are touched)."""
    far = (1 << 31) + 16
    hidden, weight = (torch.empty(far + 8, dtype=torch.float16).as_strided((2, 8), (far, 1)) for _ in range(2))
    hidden.copy_(torch.randn(2, 8)), weight.copy_(torch.randn(2, 8))
    targets = torch.tensor([1, 0])
    out = run(hidden, weight, targets, reduction="sum")
    want = run(hidden.contiguous(), weight.contiguous(), targets, reduction="sum")
    assert torch.equal(out, want)


def test_a_target_out_of_range():
    (hidden, weight, targets), _ = make(ignored=0)
    for bad, clamped in ((19, 18), (-7, 0), (1 << 40, 18)):
        targets[4] = bad
        with pytest.raises(ValueError, match=f"expected 0 <= target < 19 or -100, got {bad}"):
            run(hidden, weight, targets)
        plain = [hidden.detach(), weight.detach(), None, targets, IGNORE, "mean", 0.0, 0.0, 0.0, [True, True, False]]
        with pytest.MonkeyPatch.context() as patch:  # what a GPU does, where nobody may look
            patch.setattr(backend, "_check_targets", lambda *_: None)
            got = backend.forward(*plain)
        targets[4] = clamped
        for a, b in zip(got, backend.forward(*plain), strict=True):
            assert torch.equal(a, b)


def test_all_ignored_is_torchs_answer():
    (hidden, weight, _), _ = make()
    targets = torch.full((13,), IGNORE)
    assert run(hidden, weight, targets).isnan()
    with torch.no_grad():
        assert run(hidden, weight, targets).isnan()
    for reduction in ("mean", "sum", "none"):
        loss = run(hidden, weight, targets, reduction=reduction).sum()
        for grad in torch.autograd.grad(loss, [hidden, weight]):
            assert torch.equal(grad, torch.zeros_like(grad))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_tokens(reduction):
    hidden, weight = torch.randn(0, 8, requires_grad=True), torch.randn(19, 8, requires_grad=True)
    loss = run(hidden, weight, torch.zeros(0, dtype=torch.int64), reduction=reduction)
    want = F.cross_entropy(hidden @ weight.t(), torch.zeros(0, dtype=torch.int64), reduction=reduction)
    torch.testing.assert_close(loss, want, equal_nan=True)
    loss.sum().backward()
    assert hidden.grad.shape == (0, 8) and torch.equal(weight.grad, torch.zeros(19, 8))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_only_what_is_wanted(reduction):
    (hidden, weight, targets), named = make(bias=True)
    bias, loose = named["bias"], (lambda x: x.detach())

    def grads(h, w, b, *leaves):
        return torch.autograd.grad(run(h, w, targets, bias=b, reduction=reduction).sum(), leaves)

    every = grads(hidden, weight, bias, hidden, weight, bias)
    assert torch.equal(grads(hidden, loose(weight), loose(bias), hidden)[0], every[0])
    assert torch.equal(grads(loose(hidden), weight, loose(bias), weight)[0], every[1])
    assert torch.equal(grads(loose(hidden), loose(weight), bias, bias)[0], every[2])


def test_gradients_made_early_and_late_are_the_same():
    (hidden, weight, targets), named = make(bias=True)
    leaves = [hidden, weight, named["bias"]]
    early = torch.autograd.grad(run(hidden, weight, targets, **named, reduction="sum"), leaves)
    late = torch.autograd.grad(run(hidden, weight, targets, **named, reduction="none").sum(), leaves)
    for a, b in zip(early, late, strict=True):
        assert torch.equal(a, b)


def test_a_gradient_that_the_forward_did_not_make():
    """A number for a loss, and nothing prepared: the pieces run in the backward (a graph made by hand)."""
    (hidden, weight, targets), _ = make()
    plain = [hidden.detach(), weight.detach(), None, targets, IGNORE, "mean", 0.0, 0.0, 0.0]
    _, *want = backend.forward(*plain, [True, True, False])
    empty = [hidden.new_empty(0)] * 3
    found = backend.backward([torch.tensor(3.0)], empty, [*plain, [False] * 3], [True, True, False])
    for a, b in zip(found[:2], want, strict=False):
        torch.testing.assert_close(a, 3 * b)


def test_a_graph_kept_for_two_backwards():
    (hidden, weight, targets), _ = make()
    loss = run(hidden, weight, targets)
    first = torch.autograd.grad(loss * 2, [hidden, weight], retain_graph=True)
    second = torch.autograd.grad(loss, [hidden, weight])
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, 2 * b)


def test_nan_flows_through_except_where_ignored():
    (hidden, weight, targets), _ = make(ignored=0)
    targets[2] = IGNORE
    with torch.no_grad():
        hidden[1, 0] = hidden[2, 0] = float("nan")
    loss = run(hidden, weight, targets, reduction="none")
    assert loss.isnan().nonzero().flatten().tolist() == [1] and loss[2] == 0
    (dh,) = torch.autograd.grad(loss.sum(), hidden)
    assert dh[1].isnan().all() and torch.equal(dh[2], torch.zeros(8)) and dh[3:].isfinite().all()


def test_words_that_a_bias_of_minus_infinity_forbids(small_tiles):
    """Padded vocabularies: whole tiles of -inf, first and last, beside others."""
    (hidden, weight, targets), named = make(words=60, bias=True)
    with torch.no_grad():
        named["bias"][:20] = named["bias"][50:] = float("-inf")
    targets[targets != IGNORE] = targets[targets != IGNORE] % 30 + 20
    leaves = [hidden, weight, named["bias"]]
    want, got = F.cross_entropy(F.linear(*leaves), targets), run(hidden, weight, targets, **named)
    torch.testing.assert_close(got, want)
    for a, b in zip(torch.autograd.grad(got, leaves), torch.autograd.grad(want, leaves), strict=True):
        torch.testing.assert_close(a, b)


def test_large_logits_do_not_overflow(small_tiles):
    (hidden, weight, targets), _ = make(13, 8, 60)
    for dtype in (torch.float32, torch.float16):
        big = (hidden.detach() * 40).requires_grad_()
        check((big, weight, targets), {"reduction": "sum"}, dtype)


def test_a_small_loss_beside_large_logits():
    hidden, weight = torch.tensor([[1000.0]]), torch.tensor([[1.0], [0.99]])
    loss = run(hidden, weight, torch.tensor([0]))
    torch.testing.assert_close(loss, F.cross_entropy(hidden.double() @ weight.double().t(), torch.tensor([0])).float())


def test_a_softcapped_target_far_below_the_others():
    """Its exponential is 0 in float16, yet its gradient is not."""
    hidden = torch.tensor([[1.0, 0.0]], requires_grad=True)
    weight = torch.tensor([[20.0, 0.0], [-5.0, 1.0]], requires_grad=True)
    args = hidden, weight, torch.tensor([1])
    for dtype in LOW:
        check(args, {"softcap": 12.0, "reduction": "sum"}, dtype)


def test_a_small_gradient_does_not_underflow_in_float16():
    (hidden, weight, targets), _ = make()
    half = [x.detach().half().requires_grad_() for x in (hidden, weight)]
    loss = run(*half, targets, reduction="none")
    for a, b in zip(
        torch.autograd.grad(loss.sum() * 1e-4, half, retain_graph=True),
        torch.autograd.grad(loss.sum(), half),
        strict=True,
    ):
        torch.testing.assert_close(a.float() * 1e4, b.float(), rtol=2e-2, atol=2e-2)


class Allocated(TorchDispatchMode):
    """Sizes in bytes of the tensors that are made, whether they live on or not."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and not func.is_view:
            self.sizes.append(out.numel() * out.element_size())
        return out


def allocations(tokens, words, channels, reduction, wants, softcap=0.0, smoothing=0.0):
    """Of a forward (and a backward that has to make its own gradients) on an H100, launches recorded instead of run."""
    hidden, weight = (torch.empty(n, channels, dtype=torch.bfloat16, device="meta") for n in (tokens, words))
    targets = torch.empty(tokens, dtype=torch.int64, device="meta")
    early = [want and reduction != "none" for want in wants]
    plain = [hidden, weight, None, targets, IGNORE, reduction, softcap, smoothing, 0.0, early]
    with triton_runtime.record(triton_runtime.TARGETS["sm_90"]) as launches, Allocated() as seen:
        loss, *saved = backend.forward(*plain)
        if reduction == "none" and any(wants):
            backend.backward([torch.empty_like(loss)], saved, plain, wants)
    assert any(launch.kernel.__name__ == "logits_kernel" for launch in launches)
    return seen.sizes


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("options", [{}, dict(softcap=30.0, smoothing=0.1)])
@pytest.mark.parametrize(
    ("tokens", "words", "channels"), [(8192, 152_064, 2048), (2048, 32_000, 4096), (512, 1024, 64)]
)
def test_the_logits_are_never_whole(tokens, words, channels, reduction, options):
    sizes = allocations(tokens, words, channels, reduction, [True, True, False], **options)
    gradients = {tokens * channels * 2, words * channels * 2, words * channels * 4}
    largest = max(n for n in sizes if n not in gradients)
    assert largest <= tokens * words  # bytes: half of the logits in bfloat16
    assert largest <= max(backend.CHUNK_BYTES, words * channels * 2)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("tokens", [1, 512, 8192])
def test_without_gradients_memory_grows_with_tokens_alone(tokens, reduction):
    few, many = (
        sum(allocations(tokens, words, 2048, reduction, [False] * 3, smoothing=0.1))
        for words in (128 * 1024, 256 * 1024)
    )
    assert few == many <= 4 * (3 * 2 * 132 * 128 + 8 * tokens + 3 * backend.SPLITS * tokens)


def test_piece_sizes():
    rows = backend.chunk_rows
    assert rows(10, 50, 8, 2) == 10 and rows(256, 50, 8, 2) == 256  # short batches in one piece
    assert rows(4096, 1000, 8, 4) == 2048 and rows(4100, 1000, 8, 4) == 2304  # half of a long one
    for words, channels in ((152_064, 2048), (32_000, 4096), (256_000, 2304)):
        bound = max(backend.CHUNK_BYTES, words * channels * 2)
        assert bound * 0.8 <= rows(1 << 20, words, channels, 2) * words * 2 <= bound
    assert rows(1000, 10**9, 8, 4) == 256


def test_tokens_that_do_not_count_cost_nothing(small_tiles):
    (hidden, weight, targets), _ = make(96, 16, 32, ignored=0)
    targets[torch.randperm(96)[:80]] = IGNORE  # 16 of 96 count: one row tile of six
    with triton_interpreter.count() as seen:
        run(hidden, weight, targets)
    assert seen.flops == 3 * 2 * 16 * 32 * 16
    check((hidden, weight, targets), {})


@pytest.mark.parametrize("wants", [[False] * 3, [True, True, False], [True, False, False]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_traffic_and_work_are_the_least(wants, dtype):
    hidden, weight = (torch.randn(n, 128).to(dtype) for n in (128, 256))
    args = (hidden, weight, None, torch.randint(256, (128,)), IGNORE, "mean", 0.0, 0.0, 0.0, wants)
    config = backend.tiles(hidden, 128, 256, 128)[0]
    with triton_interpreter.count() as seen:
        backend.forward(*args)
    least = cost(*args, tile=(config["BM"], config["BN"]))
    assert seen.flops == least.flops == cost(*args).flops
    assert cost(*args).bytes <= least.bytes <= seen.bytes <= 1.15 * least.bytes


def test_work_of_odd_shapes():
    """127 of 128 rows, 255 of 256 channels, 1,000 of 1,024 words."""
    hidden, weight = torch.randn(127, 255).bfloat16(), torch.randn(1000, 255).bfloat16()
    args = (hidden, weight, None, torch.randint(1000, (127,)), IGNORE, "mean", 0.0, 0.0, 0.0, [False] * 3)
    with triton_interpreter.count() as seen:
        backend.forward(*args)
    assert seen.flops <= 1.1 * cost(*args).flops


def test_configurations_fit_every_target():
    for target in triton_runtime.TARGETS.values():
        with triton_runtime.assume(target):
            for dtype in (torch.float32, torch.bfloat16):
                x = torch.empty(1, 2048, dtype=dtype, device="meta")
                for config in backend.tiles(x, 4096, 150_000, 2048):
                    held = config.stages * (config["BM"] + config["BN"]) * config["BK"] * x.element_size()
                    assert held <= target.shared


@pytest.mark.parametrize(
    ("reduction", "wants"), [("mean", [True, True, True]), ("sum", [True, False, False]), ("none", [False] * 3)]
)
def test_opcheck(reduction, wants):
    (hidden, weight, targets), named = make(bias=True)
    weight.requires_grad_(wants[1] or reduction == "none")
    named["bias"].requires_grad_(wants[2] or reduction == "none")
    args = (hidden, weight, named["bias"], targets, IGNORE, reduction, 2.0, 0.1, 0.01, wants, "triton")
    opcheck(torch.ops.vlmops.linear_cross_entropy.default, args)


def test_an_unsupported_dtype_is_refused():
    (hidden, weight, targets), _ = make(grad=False)
    with pytest.raises(vlmops.backends.BackendError, match="float64"):
        run(hidden.double(), weight.double(), targets)
