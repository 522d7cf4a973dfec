"""The tensors of a Hugging Face folder: safetensors files, one or several with an index."""

import json
import math
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np

from moe_jax.config import UserError
from moe_jax.fields import read_json

DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
}
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
BLOCK = 128  # rows and columns that share a scale, in the public FP8 form
SCALE = "_scale_inv"  # behind the name of a weight in FP8


class _Stored(NamedTuple):
    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int


class Tensors:
    """Opens a folder by its headers alone; values are mapped into memory where they are read.

    FP8 weights come multiplied by their block's scale, and scales are no tensors of their own.

    Raises:
      ValueError: pickled, missing, truncated or damaged files, a dtype that is not known, a tensor
        of the index that its file lacks, or a scale that is missing, left over or of a wrong shape.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        stored: dict[str, _Stored] = {}
        for file in self._files():
            for name, tensor in _header(file).items():
                if name in stored:
                    raise UserError(f"{name} is both in {stored[name].file} and in {file}")
                stored[name] = tensor
        self._check_index(stored)
        self._scales = {
            name.removesuffix(SCALE): stored[name] for name in stored if name.endswith(SCALE)
        }
        self._stored = {name: t for name, t in stored.items() if not name.endswith(SCALE)}
        self._check_scales()

    def _files(self) -> list[Path]:
        index = self.folder / INDEX
        if index.is_file():
            names = sorted(set(self._weight_map(index).values()))
            missing = [name for name in names if not (self.folder / name).is_file()]
            if missing:
                raise UserError(f"{index} names files that are not there: {', '.join(missing)}")
            return [self.folder / name for name in names]
        if (self.folder / SINGLE).is_file():
            return [self.folder / SINGLE]
        pickled = sorted(
            p.name for p in self.folder.iterdir() if p.suffix in (".bin", ".pt", ".pth")
        )
        if pickled:
            raise UserError(
                f"{self.folder} has pickled weights ({', '.join(pickled)}), which can run any code "
                "when opened; save them as safetensors"
            )
        raise UserError(f"{self.folder} has neither {SINGLE} nor {INDEX}")

    @staticmethod
    def _weight_map(index: Path) -> dict[str, str]:
        names = read_json(index).get("weight_map")
        if not isinstance(names, dict):
            raise UserError(f"{index} has no weight_map")
        return names

    def _check_index(self, stored: dict[str, _Stored]) -> None:
        index = self.folder / INDEX
        if index.is_file():
            names = self._weight_map(index)
            wrong = [
                f"{name} in {file}"
                for name, file in names.items()
                if name not in stored or stored[name].file.name != file
            ]
            wrong += [f"{name} in no line of it" for name in stored if name not in names]
            if wrong:
                raise UserError(f"{index} and the files differ: {'; '.join(sorted(wrong))}")

    def _check_scales(self) -> None:
        wrong = [
            f"{name}{SCALE} has no weight in FP8"
            for name in self._scales
            if name not in self._stored or self._stored[name].dtype.itemsize != 1
        ]
        for name, tensor in self._stored.items():
            if tensor.dtype.itemsize != 1:
                continue
            blocks = tuple(-(-size // BLOCK) for size in tensor.shape)
            scale = self._scales.get(name)
            if scale is None:
                wrong.append(f"{name} is in FP8 and has no {name}{SCALE}")
            elif scale.shape != blocks or scale.dtype != np.float32:
                wrong.append(
                    f"{name}{SCALE} is {scale.dtype}{list(scale.shape)}, and not "
                    f"float32{list(blocks)} for blocks of {BLOCK} x {BLOCK}"
                )
        if wrong:
            raise UserError(f"{self.folder}: {'; '.join(sorted(wrong))}")

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tensor.shape for name, tensor in self._stored.items()}

    def dtype(self, name: str) -> np.dtype:
        """As `read` gives it."""
        dtype = self._stored[name].dtype
        return np.dtype(np.float32) if dtype.itemsize == 1 else dtype

    def is_fp8(self, name: str) -> bool:
        return name in self._scales

    def read(self, name: str, *parts: slice) -> np.ndarray:
        """The part of a tensor at a slice (start, stop) per dim.

        Raises:
          ValueError: it holds what is not a finite number.
        """
        value = self.read_values(name, *parts)
        if self.is_fp8(name):
            rows, columns = (np.arange(part.start, part.stop) // BLOCK for part in parts)
            scale = self._map(self._scales[name])
            value = self._finite(name, value.astype(np.float32) * scale[np.ix_(rows, columns)])
        return value

    def read_values(self, name: str, *parts: slice) -> np.ndarray:
        """The same as it is stored: of a weight in FP8 without its scales."""
        return self._finite(name, self._map(self._stored[name])[parts])

    def read_scales(self, name: str, *parts: slice) -> np.ndarray:
        """Of a weight in FP8, the part of its blocks' scales."""
        return self._finite(name, self._map(self._scales[name])[parts])

    def _finite(self, name: str, value: np.ndarray) -> np.ndarray:
        if not np.all(np.isfinite(value)):
            raise UserError(f"{name} of {self.folder} holds values that are not finite numbers")
        return value

    def equal(self, name: str, other: str) -> bool:
        """Whether two tensors of a folder hold the same values."""
        one, two = self._map(self._stored[name]), self._map(self._stored[other])
        if one.shape != two.shape:
            return False
        rows = max(1, 2**24 // max(1, math.prod(one.shape[1:])))
        starts = range(0, len(one), rows)
        return all(np.array_equal(one[i : i + rows], two[i : i + rows]) for i in starts)

    def _map(self, tensor: _Stored) -> np.ndarray:
        if 0 in tensor.shape:
            return np.zeros(tensor.shape, tensor.dtype)
        return np.memmap(tensor.file, tensor.dtype, "r", tensor.offset, tensor.shape)


def _header(file: Path) -> dict[str, _Stored]:
    """What a safetensors file holds.

    By hand, since the library cannot read FP8 as numpy.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if not 8 < 8 + length <= size:
            raise UserError(f"{file} is truncated or no safetensors file: its header is not whole")
        try:
            header = json.loads(stream.read(length))
        except ValueError:
            raise UserError(f"{file} is damaged or no safetensors file") from None
    header.pop("__metadata__", None)
    unknown = [f"{name} is {entry['dtype']}" for name, entry in header.items()]
    unknown = [text for text in unknown if text.rpartition(" ")[2] not in DTYPES]
    if unknown:
        raise UserError(
            f"{file}: {'; '.join(sorted(unknown))}; dtypes that are known: {', '.join(DTYPES)}"
        )
    found = {}
    for name, entry in header.items():
        start, stop = entry["data_offsets"]
        tensor = _Stored(file, DTYPES[entry["dtype"]], tuple(entry["shape"]), 8 + length + start)
        if 8 + length + stop > size:
            raise UserError(
                f"{file} is truncated: {name} ends at byte {8 + length + stop} of {size}"
            )
        if stop - start != math.prod(tensor.shape) * tensor.dtype.itemsize:
            raise UserError(f"{file} is damaged: {name} has not the bytes that its shape asks for")
        found[name] = tensor
    return found


def quantized(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A weight in the public FP8 form: E4M3 values, and a float32 scale per block of 128 x 128.

    value = E4M3 * scale. The scale makes the block's largest value the largest of E4M3, 448.

    Args:
      weight: [rows, columns] float32.
    """
    rows, columns = weight.shape
    padded = np.pad(weight, ((0, -rows % BLOCK), (0, -columns % BLOCK)))
    blocks = padded.reshape(padded.shape[0] // BLOCK, BLOCK, padded.shape[1] // BLOCK, BLOCK)
    largest = np.abs(blocks).max(axis=(1, 3))
    limit = float(ml_dtypes.finfo(ml_dtypes.float8_e4m3fn).max)
    scale = np.where(largest > 0, largest / limit, 1.0).astype(np.float32)
    values = np.clip(blocks / scale[:, None, :, None], -limit, limit)
    values = values.reshape(padded.shape)[:rows, :columns]
    return values.astype(ml_dtypes.float8_e4m3fn), scale
