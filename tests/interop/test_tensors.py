"""safetensors files: FP8 blocks, and everything that can be wrong with a folder."""

import json
from pathlib import Path

import chex
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from moe_jax.config import UserError
from moe_jax.interop.tensors import INDEX, Tensors, quantized

E4M3 = ml_dtypes.float8_e4m3fn


def _save(folder: Path, **tensors: np.ndarray) -> Path:
    save_file(tensors, folder / "model.safetensors")
    return folder


def _refusal(folder: Path) -> str:
    with pytest.raises(UserError) as error:
        Tensors(folder)
    return str(error.value)


def _fp8() -> dict[str, np.ndarray]:
    """Three by two blocks; the last row and column of them are partial."""
    rng = np.random.default_rng(0)
    values = rng.normal(size=(300, 200)).astype(E4M3)
    return {"w": values, "w_scale_inv": rng.uniform(0.5, 2.0, (3, 2)).astype(np.float32)}


def test_fp8_is_value_times_the_scale_of_its_block(tmp_path: Path) -> None:
    stored = _fp8()
    tensors = Tensors(_save(tmp_path, **stored))
    assert tensors.shapes == {"w": (300, 200)}
    assert tensors.dtype("w") == np.float32
    scale = np.repeat(np.repeat(stored["w_scale_inv"], 128, axis=0), 128, axis=1)
    expected = stored["w"].astype(np.float32) * scale[:300, :200]
    for rows, columns in (
        (slice(0, 300), slice(0, 200)),
        (slice(127, 129), slice(120, 200)),
        (slice(299, 300), slice(0, 1)),
        (slice(50, 50), slice(0, 200)),
    ):
        chex.assert_trees_all_equal(tensors.read("w", rows, columns), expected[rows, columns])


def test_quantized_keeps_the_largest_and_rounds_to_the_nearest() -> None:
    rng = np.random.default_rng(1)
    weight = rng.normal(size=(130, 257)).astype(np.float32)
    weight[:128, :128] = 0.0
    weight[129, 256] = 1e4
    values, scale = quantized(weight)
    chex.assert_shape([values, scale], [(130, 257), (2, 3)])
    assert values.dtype == E4M3 and scale.dtype == np.float32
    back = np.empty_like(weight)
    for i in range(2):
        for j in range(3):
            block = slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128)
            back[block] = values[block].astype(np.float32) * scale[i, j]
            # Half a step: 2^-4 of the value, or of the smallest normal, 2^-6 times the scale.
            allowed = np.maximum(np.abs(weight[block]), 2.0**-6 * scale[i, j]) * 2.0**-4
            assert np.all(np.abs(back[block] - weight[block]) <= allowed * 1.0001)
            chex.assert_trees_all_close(
                np.abs(back[block]).max(), np.abs(weight[block]).max(), rtol=1e-6
            )
    assert np.all(back[:128, :128] == 0)


def test_what_is_no_finite_number_is_named(tmp_path: Path) -> None:
    weight = np.ones((4, 3), np.float32)
    weight[2, 1] = np.nan
    tensors = Tensors(_save(tmp_path, w=weight.astype(ml_dtypes.bfloat16)))
    assert tensors.read("w", slice(0, 2), slice(0, 3)).shape == (2, 3)
    with pytest.raises(UserError) as error:
        tensors.read("w", slice(0, 4), slice(0, 3))
    assert str(error.value) == f"w of {tmp_path} holds values that are not finite numbers"


def test_scales_that_do_not_fit_are_all_listed(tmp_path: Path) -> None:
    stored = _fp8()
    weight, scale = stored["w"], stored["w_scale_inv"]
    _save(
        tmp_path,
        a=weight,
        b=weight,
        b_scale_inv=scale[:2],
        c=weight.astype(np.float32),
        c_scale_inv=scale,
    )
    assert _refusal(tmp_path) == (
        f"{tmp_path}: a is in FP8 and has no a_scale_inv; b_scale_inv is float32[2, 2], and not "
        "float32[3, 2] for blocks of 128 x 128; c_scale_inv has no weight in FP8"
    )


def test_truncated_and_damaged_files_are_named(tmp_path: Path) -> None:
    file = _save(tmp_path, v=np.ones(5, np.float32), w=np.ones((4, 3), np.float32)).joinpath(
        "model.safetensors"
    )
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    assert _refusal(tmp_path) == (
        f"{file} is truncated: w ends at byte {len(whole)} of {len(whole) - 1}"
    )
    for part in (whole[:5], whole[:40]):
        file.write_bytes(part)
        assert _refusal(tmp_path) == (
            f"{file} is truncated or no safetensors file: its header is not whole"
        )
    file.write_bytes(whole[:8] + b"x" + whole[9:])
    assert _refusal(tmp_path) == f"{file} is damaged or no safetensors file"
    file.write_bytes(whole.replace(b'"shape":[4,3]', b'"shape":[4,4]'))
    assert _refusal(tmp_path) == (f"{file} is damaged: w has not the bytes that its shape asks for")


def test_pickled_files_and_other_dtypes_are_refused(tmp_path: Path) -> None:
    assert _refusal(tmp_path) == (
        f"{tmp_path} has neither model.safetensors nor model.safetensors.index.json"
    )
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    assert _refusal(tmp_path) == (
        f"{tmp_path} has pickled weights (pytorch_model.bin), which can run any code when opened; "
        "save them as safetensors"
    )
    _save(tmp_path, b=np.ones(3, np.int64), a=np.ones(3, np.uint8))
    assert _refusal(tmp_path) == (
        f"{tmp_path / 'model.safetensors'}: a is U8; b is I64; dtypes that are known: F32, F16, "
        "BF16, F8_E4M3"
    )


def test_an_index_that_differs_from_the_files(tmp_path: Path) -> None:
    one = np.ones(2, np.float32)
    save_file({"a": one, "b": one}, tmp_path / "1.safetensors")
    save_file({"c": one}, tmp_path / "2.safetensors")

    def refusal(weight_map: dict[str, str]) -> str:
        (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
        return _refusal(tmp_path)

    files = ("1.safetensors", "2.safetensors")
    assert refusal({"a": files[0], "d": files[1], "c": files[1]}) == (
        f"{tmp_path / INDEX} and the files differ: b in no line of it; d in 2.safetensors"
    )
    assert refusal({"a": files[0], "b": "3.safetensors"}) == (
        f"{tmp_path / INDEX} names files that are not there: 3.safetensors"
    )
    save_file({"a": one, "c": one}, tmp_path / files[1])
    assert refusal({"a": files[0], "b": files[0], "c": files[1]}) == (
        f"a is both in {tmp_path / files[0]} and in {tmp_path / files[1]}"
    )
