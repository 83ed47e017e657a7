"""The key map: every way of ``how`` in both directions, and what is wrong with a checkpoint said before anything is written."""

import collections.abc

import pytest
import torch
from torch import nn

from vlmops.models.keymap import KeyMapError, Rule, expand, load, load_into, prefixed, save


class Lazy(collections.abc.Mapping):
    """Counts what is read."""

    def __init__(self, tensors):
        self.tensors, self.read = tensors, []

    def __getitem__(self, name):
        self.read.append(name)
        return self.tensors[name]

    def __contains__(self, name):
        return name in self.tensors

    def __iter__(self):
        return iter(self.tensors)

    def __len__(self):
        return len(self.tensors)


RULES = [
    Rule("norm", "n.weight"),
    Rule("blocks.{i}.qkv", ["l.{i}.q", "l.{i}.k", "l.{i}.v"], "cat:4,2,2", layers=range(2)),
    Rule("both", ["first", "second"], "cat"),
    Rule("gate", "gate_up", "split:0"),
    Rule("up", "gate_up", "split:1"),
    Rule("cls", "cls_token", "squeeze:2"),
    Rule("proj", "proj.T", "transpose"),
    Rule("fused", "query_key_value", "heads:2"),
    Rule("", ["mask_token", "not.there"], "ignore"),
]
OURS = {"norm": (5,), "blocks.0.qkv": (8, 3), "blocks.1.qkv": (8, 3), "both": (6, 2), "gate": (2, 3), "up": (4, 3), "cls": (7,),
        "proj": (3, 5), "fused": (12, 3)}  # fmt: skip


def theirs():
    shapes = {"n.weight": (5,), "first": (3, 2), "second": (3, 2), "gate_up": (6, 3), "cls_token": (1, 1, 7), "proj.T": (5, 3),
              "query_key_value": (12, 3), "mask_token": (1, 7)}  # fmt: skip
    for i in range(2):
        shapes |= {f"l.{i}.q": (4, 3), f"l.{i}.k": (2, 3), f"l.{i}.v": (2, 3)}
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def test_there_and_back():
    checkpoint = theirs()
    ours = dict(load(checkpoint, RULES, OURS))
    assert {name: tuple(t.shape) for name, t in ours.items()} == OURS
    for i in range(2):
        assert torch.equal(ours[f"blocks.{i}.qkv"], torch.cat([checkpoint[f"l.{i}.{x}"] for x in "qkv"]))
    assert torch.equal(ours["both"][3:], checkpoint["second"])
    assert torch.equal(ours["gate"], checkpoint["gate_up"][:2]) and torch.equal(ours["up"], checkpoint["gate_up"][2:])
    assert torch.equal(ours["cls"], checkpoint["cls_token"][0, 0])
    assert torch.equal(ours["proj"], checkpoint["proj.T"].t())
    assert ours["norm"].data_ptr() == checkpoint["n.weight"].data_ptr()  # no copy where none is needed
    back = dict(save(ours, RULES))
    assert back.keys() == checkpoint.keys() - {"mask_token"}
    for name, t in back.items():
        assert torch.equal(t, checkpoint[name]) and t.is_contiguous(), name


def test_heads_puts_all_queries_first():
    row = torch.arange(12)
    (_, ours), = load({"w": row}, [Rule("w", "w", "heads:2")], {"w": (12,)})  # fmt: skip
    assert ours.tolist() == [0, 1, 6, 7, 2, 3, 8, 9, 4, 5, 10, 11]


def test_reads_lazily_and_checks_names_first():
    checkpoint = Lazy(theirs())
    pairs = load(checkpoint, RULES, OURS)
    assert checkpoint.read == []
    assert next(pairs)[0] == "norm" and checkpoint.read == ["n.weight"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("l.1.k"), r"checkpoint: 1 tensor missing: l\.1\.k"),
        (lambda t: t.update(extra=torch.zeros(1)), "checkpoint: 1 tensor unexpected: extra"),
        (lambda t: t.update({"l.1.k": torch.zeros(3, 3)}), r"l\.1\.k.*expected \[4, 2, 2\] rows for blocks\.1\.qkv"),
        (lambda t: t.update({"l.1.v": torch.zeros(2, 4)}), r"l\.1\.v.*\[8, 3\] for blocks\.1\.qkv.*\[2, 4\]"),
        (lambda t: t.update(first=torch.zeros(3, 2).half()), "first.*expected one dtype.*float16"),
        (lambda t: t.update(gate_up=torch.zeros(7, 3)), r"gate_up.*\[2, 3\] for gate, got \[7, 3\]"),
        (lambda t: t.update(cls_token=torch.zeros(1, 2, 7)), r"cls_token.*got \[1, 2, 7\]"),
        (lambda t: t.update(query_key_value=torch.zeros(11, 3)), r"query_key_value.*got \[11, 3\]"),
        (lambda t: t.update({"n.weight": torch.zeros(())}), r"n\.weight.*\[5\] for norm, got \[\]"),
        (lambda t: t.update(first=torch.zeros(())), "first.*both"),
        (lambda t: t.update({"proj.T": torch.zeros(3, 5)}), r"proj\.T.*\[3, 5\] for proj"),
    ],
)
def test_checkpoints_that_do_not_fit(change, message):
    checkpoint = theirs()
    change(checkpoint)
    with pytest.raises(KeyMapError, match=message):
        dict(load(checkpoint, RULES, OURS))


def test_not_strict_lets_unexpected_ones_pass():
    checkpoint = {**theirs(), "extra": torch.zeros(1)}
    assert dict(load(checkpoint, RULES, OURS, strict=False)).keys() == OURS.keys()


def test_a_map_that_does_not_fit_the_model():
    with pytest.raises(KeyMapError, match="without a rule: forgotten"):
        load(theirs(), RULES, {**OURS, "forgotten": (1,)})
    with pytest.raises(KeyMapError, match="does not have: norm"):
        load(theirs(), RULES, {name: s for name, s in OURS.items() if name != "norm"})
    with pytest.raises(KeyMapError, match="named twice: norm"):
        load(theirs(), [*RULES, Rule("norm", "first")], OURS)
    with pytest.raises(KeyMapError, match="expected parts 0, 1"):
        dict(load(theirs(), [r for r in RULES if r.ours != "gate"], {n: s for n, s in OURS.items() if n != "gate"}))
    ours = dict(load(theirs(), RULES, OURS))
    with pytest.raises(KeyMapError, match="the model: 1 tensor without a rule: new"):
        save({**ours, "new": torch.zeros(1)}, RULES)
    with pytest.raises(KeyMapError, match="the model: 1 tensor missing: norm"):
        save({n: t for n, t in ours.items() if n != "norm"}, RULES)
    with pytest.raises(KeyMapError, match=r"both: expected \[2, 2\] rows"):
        dict(save({**ours, "both": torch.zeros(5, 2)}, RULES))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("a", "b", "rotate"), "unknown 'rotate'"),
        (("a", "b", "split"), "unknown 'split'"),
        (("a", "b", "split:x"), "unknown 'split:x'"),
        (("a", "b", "transpose:1"), "unknown 'transpose:1'"),
        (("a", ["b", "c"], "cat:1"), "a number for each"),
        (("a", ["b", "c"]), "expected one name"),
        (("a", []), "expected one name"),
        (("", "b"), "ours: expected a name"),
        (("a", "b", "ignore"), "ours: expected a name"),
    ],
)
def test_bad_rules(arguments, message):
    with pytest.raises(ValueError, match=message):
        Rule(*arguments)


def test_prefixed_and_expand():
    rules = expand(prefixed(RULES[1:2] + RULES[-1:], "tower.", "vision."))
    assert [r.ours for r in rules] == ["tower.blocks.0.qkv", "tower.blocks.1.qkv", ""]
    assert rules[1].theirs == ("vision.l.1.q", "vision.l.1.k", "vision.l.1.v") and rules[1].how == "cat:4,2,2"
    assert rules[2].theirs == ("vision.mask_token", "vision.not.there")


def test_load_into_writes_all_or_nothing_and_fills_meta():
    rules = [Rule("weight", ["a", "b"], "cat"), Rule("bias", "c")]
    source = {"a": torch.randn(2, 3), "b": torch.randn(1, 3), "c": torch.randn(3)}
    module = nn.Linear(3, 3).double()
    load_into(module, source, rules)
    assert module.weight.dtype == torch.float64 and torch.equal(module.weight.float()[2:], source["b"])
    before = module.weight.clone()
    with pytest.raises(KeyMapError, match="c: expected"):
        load_into(module, {**source, "a": torch.zeros(2, 3), "c": torch.zeros(4)}, rules)
    assert torch.equal(module.weight, before)
    with torch.device("meta"):
        empty = nn.Linear(3, 3)
    load_into(empty, source, rules)
    assert empty.bias.data_ptr() == source["c"].data_ptr() and torch.equal(empty.weight[:2], source["a"])
    assert isinstance(empty.weight, nn.Parameter) and empty.weight.requires_grad
