"""Folders and checkpoints into each other: nothing is lost, everything wrong is named."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from emulated import make_mesh
from folders import FAMILIES, LLAMA, V3, shapes, tensors, write
from safetensors.numpy import load_file, save_file

from moe_jax.config import CheckpointConfig, UserError
from moe_jax.interop import huggingface, orbax_files
from moe_jax.interop.conversion import convert
from moe_jax.interop.lazy import Lazy, bounds, flatten, piece_shape, pieces, whole
from moe_jax.interop.tensors import INDEX, Tensors
from moe_jax.interop.weights import load_weights, read_weights
from moe_jax.training.checkpoint import Checkpoints


def _refusal(function: Any, *arguments: Any) -> str:
    with pytest.raises(UserError) as error:
        function(*arguments)
    return str(error.value)


def _same(one: Path, two: Path) -> None:
    first, second = load_file(one / "model.safetensors"), load_file(two / "model.safetensors")
    assert set(first) == set(second)
    for name, value in first.items():
        assert value.dtype == second[name].dtype, name
        chex.assert_trees_all_equal(value.view(np.uint8), second[name].view(np.uint8))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_there_and_back_is_the_same_to_the_bit(family: str, dtype: str, tmp_path: Path) -> None:
    raw = FAMILIES[family]
    source = write(tmp_path / "source", raw, tensors(raw, np.dtype(jnp.dtype(dtype))))
    (source / "tokenizer.json").write_text("{}")
    convert(source, tmp_path / "ours", "float32")
    assert (tmp_path / "ours" / "tokenizer" / "tokenizer.json").is_file()
    convert(tmp_path / "ours", tmp_path / "back", dtype)
    _same(source, tmp_path / "back")
    assert (tmp_path / "back" / "tokenizer.json").read_text() == "{}"
    # Our checkpoint is an ordinary one, and so is its config.
    config, _, _ = read_weights(source)
    assert read_weights(tmp_path / "ours")[0] == config == read_weights(tmp_path / "back")[0]


def test_several_files_with_an_index(tmp_path: Path) -> None:
    source = write(tmp_path / "source", V3)
    config, weights, _ = huggingface.read_folder(source)
    huggingface.write_folder(tmp_path / "split", config, weights, "float32", shard_bytes=8000)
    files = sorted(p.name for p in (tmp_path / "split").glob("*.safetensors"))
    assert len(files) > 3 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    index = json.loads((tmp_path / "split" / INDEX).read_text())
    assert set(index["weight_map"].values()) == set(files)
    assert set(index["weight_map"]) == set(shapes(V3))
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in tensors(V3).values())
    convert(tmp_path / "split", tmp_path / "ours", "float32")
    convert(tmp_path / "ours", tmp_path / "back", "float32")
    _same(source, tmp_path / "back")
    (tmp_path / "split" / files[1]).write_bytes(b"")
    assert files[1] in _refusal(read_weights, tmp_path / "split")


def test_fp8_is_written_as_it_is_read(tmp_path: Path) -> None:
    source = write(tmp_path / "source", V3)
    convert(source, tmp_path / "ours", "float32")
    convert(tmp_path / "ours", tmp_path / "fp8", "float8")
    stored, expected = load_header(tmp_path / "fp8"), Tensors(source)
    config = json.loads((tmp_path / "fp8" / "config.json").read_text())
    assert config["quantization_config"]["weight_block_size"] == [128, 128]
    for name, dtype in stored.items():
        linear = name.endswith("proj.weight") or name.endswith("proj_with_mqa.weight")
        if name.endswith("_scale_inv") or name.endswith("bias"):
            assert dtype == "F32", name
        else:
            assert dtype == ("F8_E4M3" if linear and "eh_proj" not in name else "BF16"), name
    found = Tensors(tmp_path / "fp8")
    assert found.shapes == expected.shapes
    for name, shape in expected.shapes.items():
        value, original = found.read(name, *whole(shape)), expected.read(name, *whole(shape))
        assert np.max(np.abs(value - original)) <= 2.0**-4 * np.max(np.abs(original)), name
    # E4M3 with these scales is exact in float32, so nothing changes any more.
    convert(tmp_path / "fp8", tmp_path / "again", "float32")
    convert(tmp_path / "again", tmp_path / "twice", "float8")
    assert load_bytes(tmp_path / "fp8") == load_bytes(tmp_path / "twice")


def load_bytes(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def load_header(folder: Path) -> dict[str, str]:
    data = load_bytes(folder)
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return {name: entry["dtype"] for name, entry in header.items() if name != "__metadata__"}


def test_all_that_does_not_fit_is_listed(tmp_path: Path) -> None:
    values = tensors(V3)
    norm, expert = "model.norm.weight", "model.layers.2.mlp.experts.3.up_proj.weight"
    del values["lm_head.weight"], values[expert]
    values[norm] = values[norm][:-1].copy()
    values["model.layers.0.extra"] = values["model.layers.9.extra"] = np.ones(1, np.float32)
    folder = write(tmp_path / "source", V3, values)
    assert _refusal(read_weights, folder) == (
        f"{folder} does not fit its config.json: missing: {expert}, lm_head.weight; "
        "left over: model.layers.0.extra, model.layers.9.extra; "
        f"{norm} has shape [15], not [16]"
    )


def test_repeated_weights_may_be_left_out_and_must_be_the_same(tmp_path: Path) -> None:
    values = tensors(V3)
    embedding, head = (f"model.layers.3.{n}.weight" for n in ("embed_tokens", "shared_head.head"))
    values[head] = values[head] + 1
    folder = write(tmp_path / "source", V3, values)
    assert _refusal(read_weights, folder) == (
        f"{folder}: {head} differs from lm_head.weight, and both are the same weights"
    )
    del values[head], values[embedding]
    assert read_weights(write(tmp_path / "source", V3, values))[0].num_nextn_predict_layers == 1
    tied = tensors(LLAMA)
    tied["lm_head.weight"] = tied["model.embed_tokens.weight"]
    _, weights, _ = read_weights(write(tmp_path / "tied", LLAMA, tied))
    assert "head" not in weights["parameters"]


def test_a_depth_without_weights_is_told(tmp_path: Path) -> None:
    values = {n: x for n, x in tensors(V3).items() if not n.startswith("model.layers.3.")}
    config, weights, notes = read_weights(write(tmp_path / "source", V3, values))
    assert config.num_nextn_predict_layers == 0 and "mtp" not in weights["parameters"]
    assert notes == [
        "config.json has multi-token prediction of depth 1, the files have no weights of it"
    ]


def test_values_that_are_not_finite_stop_the_conversion(tmp_path: Path) -> None:
    values = tensors(V3)
    values["model.norm.weight"][3] = np.inf
    folder = write(tmp_path / "source", V3, values)
    message = f"model.norm.weight of {folder} holds values that are not finite numbers"
    assert _refusal(convert, folder, tmp_path / "ours", "float32") == message
    assert not (tmp_path / "ours").exists()
    assert _refusal(huggingface.load, folder) == message


def test_targets_and_dtypes_that_cannot_be_written(tmp_path: Path) -> None:
    source = write(tmp_path / "source", LLAMA)
    assert _refusal(convert, source, source, "float32") == (
        f"--target={source} exists; give another or remove it"
    )
    assert _refusal(convert, source, tmp_path / "ours", "int8") == (
        "--dtype=int8 must be one of float32, bfloat16, float8"
    )
    assert _refusal(convert, source, tmp_path / "ours", "float8") == (
        "--dtype=float8 is a form of Hugging Face's; a checkpoint has none"
    )
    nowhere = tmp_path / "nowhere"
    assert _refusal(convert, nowhere, tmp_path / "ours", "float32") == (
        f"there is no checkpoint at {nowhere}"
    )
    nowhere.mkdir()
    assert _refusal(convert, nowhere, tmp_path / "ours", "float32") == (
        f"{nowhere} holds no checkpoint: a Hugging Face folder has a config.json, and a work "
        "directory has checkpoints"
    )


def test_pieces_cover_an_array_and_are_bounded() -> None:
    for shape, limit in (((3, 4, 5), 30), ((3, 4, 5), 4), ((7,), 12), ((2, 3), 1000), ((), 8)):
        seen = np.zeros(shape, np.int32)
        for index in pieces(shape, 4, limit):
            assert seen[index].size * 4 <= max(limit, 4)
            seen[index] += 1
        chex.assert_trees_all_equal(seen, np.ones(shape, np.int32))
    # An expert of DeepSeek-V3 at a time, of 871 GB.
    assert piece_shape((58, 256, 7168, 2048), 4) == [1, 1, 7168, 2048]


def test_an_array_is_never_whole_in_memory(tmp_path: Path, monkeypatch: Any) -> None:
    """A checkpoint is written in chunks of a piece's size, each made when it is due."""
    for module in ("lazy", "orbax_files"):
        path = f"moe_jax.interop.{module}.pieces"
        monkeypatch.setattr(path, lambda shape, size: pieces(shape, size, 400))
    monkeypatch.setattr(
        "moe_jax.interop.orbax_files.piece_shape", lambda shape, size: piece_shape(shape, size, 400)
    )
    values = np.random.default_rng(0).normal(size=(3, 8, 10)).astype(np.float32)
    read = []

    def part(index: Any) -> np.ndarray:
        read.append(values[index].nbytes)
        return values[index]

    tree = {"parameters": {"x": Lazy(values.shape, values.dtype, part)}, "router_bias": {}}
    written = []
    orbax_files.write_checkpoint(tmp_path / "ours", {"model": {}}, tree, written.append)
    assert max(read) <= 400 and sum(read) == sum(written) == values.nbytes
    _, found = orbax_files.read_checkpoint(tmp_path / "ours")
    chex.assert_trees_all_equal(found["parameters"]["x"].read(whole(values.shape)), values)


def test_each_device_reads_its_own_part(tmp_path: Path, monkeypatch: Any) -> None:
    folder = write(tmp_path / "source", V3)
    read: dict[str, int] = {}

    def counting(self, name: str, *parts: slice) -> np.ndarray:
        value = original(self, name, *parts)
        read[name] = read.get(name, 0) + value.nbytes
        return value

    original = Tensors.read
    monkeypatch.setattr(Tensors, "read", counting)
    mesh = make_mesh(fsdp=2, expert=2)
    model = huggingface.load(folder, "float32", mesh)
    whole_file = tensors(V3)
    # Experts lie on two of four devices each, and half of each on a device.
    for name in (n for n in read if ".experts." in n):
        assert read[name] == whole_file[name].nbytes, name
    alone = huggingface.load(folder, "float32")
    chex.assert_trees_all_equal(
        jax.device_get((model.parameters, model.router_bias)),
        jax.device_get((alone.parameters, alone.router_bias)),
    )
    tokens = np.arange(8, dtype=np.int32).reshape(2, 4)
    chex.assert_trees_all_close(
        np.asarray(model(tokens)), np.asarray(alone(tokens)), rtol=2e-4, atol=2e-4
    )


def test_bfloat16_in_memory(tmp_path: Path) -> None:
    model = huggingface.load(write(tmp_path / "source", LLAMA), "bfloat16")
    assert {x.dtype for x in jax.tree.leaves(model.parameters)} == {np.dtype(ml_dtypes.bfloat16)}
    assert model(np.zeros((1, 3), np.int32)).dtype == jnp.float32


def test_weights_for_a_run(tmp_path: Path) -> None:
    """What differs and may is told; what may not is listed."""
    folder = write(tmp_path / "source", V3)
    mesh = huggingface.one_device()
    config, _, _ = read_weights(folder)
    rope = dataclasses.replace(config.rope, scaling="yarn", factor=4.0)
    moe = dataclasses.replace(config.moe, sequence_loss_weight=0.5, buffer_factor=3.0)
    other = dataclasses.replace(config, rope=rope, moe=moe, num_nextn_predict_layers=0)
    weights = load_weights(folder, other, mesh)
    assert weights.config == other and "mtp" not in weights.parameters
    assert weights.notes == [
        "config.model.rope.scaling is 'yarn' here, and 'none' there",
        "config.model.rope.factor is 4.0 here, and 1.0 there",
        "its 1 modules that predict ahead are left out",
    ]
    moe = dataclasses.replace(config.moe, num_experts_per_tok=1)
    wrong = dataclasses.replace(config, rms_norm_eps=0.5, moe=moe, num_nextn_predict_layers=2)
    assert _refusal(load_weights, folder, wrong, mesh) == (
        f"{folder} is of another model: config.model.rms_norm_eps=0.5 is 1e-06 there; "
        "config.model.moe.num_experts_per_tok=1 is 2 there; "
        "config.model.num_nextn_predict_layers=2 is 1 there"
    )


def test_checkpoints_of_training_are_found_and_broken_ones_named(tmp_path: Path) -> None:
    model = huggingface.load(write(tmp_path / "source", V3), "float32")
    run = tmp_path / "run"
    state = {"parameters": model.parameters, "router_bias": model.router_bias}
    document = {"config": {"model": dataclasses.asdict(model.config)}}
    checkpoints = Checkpoints(run / "checkpoints", CheckpointConfig(keep=2))
    with jax.set_mesh(model.mesh):
        for step in (9, 10):
            checkpoints.save(step, state | {"step": jnp.asarray(step)}, document)
        checkpoints.wait()
    checkpoints.close()
    newest = run / "checkpoints" / "10"
    for path in (run, run / "checkpoints", newest):
        assert orbax_files.find_checkpoint(path) == newest
    config, weights, _ = read_weights(run)
    assert config == model.config
    for path, lazy in flatten(weights).items():
        leaf = state
        for name in path:
            leaf = leaf[name]
        chex.assert_trees_all_equal(lazy.read(whole(lazy.shape)), np.asarray(leaf))
    shutil.rmtree(newest / "document")
    assert _refusal(read_weights, run) == (
        f"checkpoint {newest} is not whole: {newest / 'document' / 'metadata'} is missing"
    )


def test_bounds_of_open_slices() -> None:
    assert bounds((slice(None), slice(1, None)), (3, 4)) == [(0, 3), (1, 4)]


def test_a_dtype_that_is_no_weight_s(tmp_path: Path) -> None:
    folder = write(tmp_path / "source", LLAMA)
    values = tensors(LLAMA)
    save_file({**values, "steps": np.ones(1, np.int32)}, folder / "model.safetensors")
    assert "steps is I32; dtypes that are known" in _refusal(read_weights, folder)


def test_broken_json_is_named(tmp_path: Path) -> None:
    folder = write(tmp_path / "source", LLAMA)
    (folder / INDEX).write_text("{}")
    assert _refusal(read_weights, folder) == f"{folder / INDEX} has no weight_map"
    (folder / "config.json").write_text("[1]")
    assert _refusal(read_weights, folder) == f"{folder / 'config.json'} is no JSON object"
    (folder / "config.json").write_text("{")
    assert _refusal(read_weights, folder).startswith(f"{folder / 'config.json'} is no JSON: ")
