"""Writing safetensors files tensor by tensor: no second copy in memory, hashed on the way, on disk when it returns."""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

_DTYPES = {
    torch.float32: "F32",
    torch.float64: "F64",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> tuple[int, str]:
    """Write a safetensors file and flush it to disk.

    `safetensors.torch.save_file` first copies every tensor into bytes, which doubles the memory of a checkpoint.

    Returns:
        (size in bytes, SHA-256 of the file).
    """
    header: dict[str, dict[str, object]] = {}
    offset = 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        place = [offset, offset + size]
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": place}
        offset += size
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for piece in (len(head).to_bytes(8, "little"), head):
            digest.update(piece)
            file.write(piece)
        for tensor in tensors.values():
            raw = _raw(tensor)
            digest.update(raw)
            file.write(raw)
        file.flush()
        os.fsync(file.fileno())
    return 8 + len(head) + offset, digest.hexdigest()


def _raw(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def checksum(tensor: Tensor) -> int:
    """Return the CRC-32 of a tensor's bytes."""
    return zlib.crc32(_raw(tensor)) if tensor.numel() else 0


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_directory(directory: Path) -> None:
    """Flush a directory's entries to disk, so that a rename in it survives a power cut."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
