"""A checkpoint as a mapping that loads a tensor when it is asked for."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

INDEX = "model.safetensors.index.json"
#: safetensors' names of the dtypes that PyTorch has
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "U16": torch.uint16, "U32": torch.uint32,
    "U64": torch.uint64,
}  # fmt: skip


class CheckpointError(ValueError):
    """A checkpoint cannot be read; the message says which file and why."""


class Checkpoint(Mapping[str, Tensor]):
    """Tensors of one safetensors file, or of a folder as transformers saves it, whole or in shards.

    Nothing but headers is read until a tensor is asked for, and nothing is kept after that: a checkpoint may be larger
    than memory. Weights that a model ties are in the file once, as transformers saves them.

    Args:
        path: the file, or the folder.

    Attributes:
        shards: file name -> names of its tensors in the file's order.
        metadata: of the first file.

    Raises:
        CheckpointError: no such file, not a safetensors file, cut short, or the index names what is not there.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.folder = self.path if self.path.is_dir() else self.path.parent
        self.shards: dict[str, list[str]] = {}
        self._handles, self._file_of = {}, {}
        for name in self._file_names():
            try:
                handle = safe_open(self.folder / name, framework="pt")
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{self.folder / name}: not a whole safetensors file: {error}") from None
            self._handles[name] = handle
            self.shards[name] = list(handle.offset_keys())
            for key in self.shards[name]:
                if self._file_of.setdefault(key, name) != name:
                    raise CheckpointError(f"{self.path}: {key} is in {self._file_of[key]} and in {name}")
        self._check_index()
        first = next(iter(self._handles.values()))
        self.metadata: dict[str, str] = dict(first.metadata() or {})

    def _file_names(self) -> list[str]:
        if self.path.is_file():
            return [self.path.name]
        if not self.path.is_dir():
            raise CheckpointError(f"{self.path}: no such file or folder")
        if (self.path / INDEX).exists():
            return sorted(set(self._weight_map().values()))
        found = sorted(file.name for file in self.path.glob("*.safetensors"))
        if not found:
            raise CheckpointError(f"{self.path}: holds no safetensors file; convert the checkpoint first")
        if len(found) > 1 and "model.safetensors" in found:
            return ["model.safetensors"]
        return found

    def _weight_map(self) -> dict[str, str]:
        try:
            return json.loads((self.path / INDEX).read_text())["weight_map"]
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{self.path / INDEX}: not an index of shards: {error}") from None

    def _check_index(self) -> None:
        if not self.path.is_dir() or not (self.path / INDEX).exists():
            return
        lost = sorted(key for key, name in self._weight_map().items() if self._file_of.get(key) != name)
        if lost:
            raise CheckpointError(f"{self.path / INDEX}: names tensors that are not there: {', '.join(lost[:8])}")

    def __getitem__(self, key: str) -> Tensor:
        return self._handles[self._file_of[key]].get_tensor(key)

    def __contains__(self, key: object) -> bool:
        return key in self._file_of

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)

    def shape(self, key: str) -> torch.Size:
        """Without reading the tensor."""
        return torch.Size(self._handles[self._file_of[key]].get_slice(key).get_shape())

    def dtype(self, key: str) -> torch.dtype:
        """Without reading the tensor."""
        name = self._handles[self._file_of[key]].get_slice(key).get_dtype()
        if name not in DTYPES:
            raise CheckpointError(f"{self.path}: {key} is of dtype {name}, which PyTorch does not have")
        return DTYPES[name]

    def nbytes(self, key: str) -> int:
        return self.shape(key).numel() * self.dtype(key).itemsize
