"""Checkpoint folders: lazily read, checked before the first tensor, refused where they are not what they say."""

import json
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file

from vlmops.models.shards import INDEX, WHOLE, CheckpointError, Shards, save_shards


def tensors(count=6):
    return {f"layer.{i}.weight": torch.randn(4, i + 1) for i in range(count)} | {"half": torch.randn(3).bfloat16()}


@pytest.mark.parametrize("shard_bytes", [1 << 20, 100])
def test_round_trip(tmp_path, shard_bytes):
    want = tensors()
    save_shards(want, tmp_path, shard_bytes=shard_bytes)
    assert (tmp_path / INDEX).exists() == (shard_bytes == 100)
    found = Shards(tmp_path)
    assert dict(found).keys() == want.keys() and len(found) == 7
    for name, value in want.items():
        assert torch.equal(found[name], value) and found.shape(name) == tuple(value.shape)
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith(".")) == []


def test_saving_again_replaces_the_old_files(tmp_path):
    save_shards(tensors(), tmp_path, shard_bytes=64)
    save_shards({"a": torch.zeros(2)}, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [WHOLE] and list(load_file(tmp_path / WHOLE)) == ["a"]


def test_a_transformers_checkpoint(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                                         num_attention_heads=2))  # fmt: skip
    model.save_pretrained(tmp_path, max_shard_size="4KB")
    found = Shards(tmp_path)
    assert (tmp_path / INDEX).exists()
    for name, value in model.state_dict().items():
        assert torch.equal(found[name], value)


@pytest.mark.parametrize(
    "name", ["../other.safetensors", "/etc/passwd", "..", "a/b.safetensors", "weights.bin", "", "x\\y.safetensors"]
)
def test_shards_outside_the_folder_are_refused(tmp_path, name):
    save_file({"a": torch.zeros(2)}, tmp_path / "other.safetensors")
    inside = tmp_path / "inside"
    inside.mkdir()
    (inside / INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(CheckpointError, match="no name of a safetensors file in this folder"):
        Shards(inside)


def test_pickle_is_refused(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(CheckpointError, match=r"only pytorch_model.bin there: pickle can run any code"):
        Shards(tmp_path)
    (tmp_path / WHOLE).write_bytes(pickle.dumps({"a": 1}))  # by another name
    with pytest.raises(CheckpointError, match="damaged"):
        Shards(tmp_path)


@pytest.mark.parametrize("keep", [0, 4, 8, 60, -1])
def test_files_cut_short(tmp_path, keep):
    save_shards(tensors(), tmp_path)
    data = (tmp_path / WHOLE).read_bytes()
    (tmp_path / WHOLE).write_bytes(data[:keep])
    with pytest.raises(CheckpointError, match="damaged or cut short"):
        Shards(tmp_path)


def test_headers_that_lie(tmp_path):
    save_shards(tensors(), tmp_path)
    data = bytearray((tmp_path / WHOLE).read_bytes())
    data[:8] = (1 << 60).to_bytes(8, "little")  # a header of an exabyte
    (tmp_path / WHOLE).write_bytes(data)
    with pytest.raises(CheckpointError, match="damaged"):
        Shards(tmp_path)


@pytest.mark.parametrize(("index", "why"), [
    ("{", "cannot be read as JSON"), ("[]", "expected a JSON object"), ("{}", "expected a weight_map"),
    ('{"weight_map": {"a": 3}}', "expected a weight_map"), ('{"weight_map": {"a": "gone.safetensors"}}', "no such file"),
    ('{"weight_map": {"zzz": "there.safetensors"}}', "has no tensor 'zzz'"),
])  # fmt: skip
def test_bad_indices(tmp_path, index, why):
    save_file({"a": torch.zeros(2)}, tmp_path / "there.safetensors")
    (tmp_path / INDEX).write_text(index)
    with pytest.raises(CheckpointError, match=why):
        Shards(tmp_path)


def test_no_folder_and_an_empty_one(tmp_path):
    with pytest.raises(CheckpointError, match="no such folder"):
        Shards(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor"):
        Shards(tmp_path)


def test_a_save_that_fails_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    save_shards({"a": torch.ones(2)}, tmp_path)

    def fail(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr("vlmops.models.shards.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        save_shards({"b": torch.ones(2)}, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [WHOLE] and list(Shards(tmp_path)) == ["a"]
