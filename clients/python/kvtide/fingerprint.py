"""Names for what computes keys and values, so that caches are shared where they are the same and nowhere else."""

from __future__ import annotations

import glob
import hashlib
import os
from typing import Any


def weights_of(model: str, revision: str = "") -> str:
    """What tells the weights of two models apart: of a folder or file, the names, sizes and samples of its files; else the name
    and revision."""
    digest = hashlib.sha256()
    if os.path.isfile(model):
        _sample(model, digest)
        return digest.hexdigest()
    if not os.path.isdir(model):
        return f"{model}@{revision}"
    for pattern in ("config.json", "*.safetensors", "*.bin", "*.pt", "*.gguf"):
        for path in sorted(glob.glob(os.path.join(glob.escape(model), pattern))):
            digest.update(os.path.basename(path).encode())
            _sample(path, digest)
    return digest.hexdigest()


def _sample(path: str, digest: Any, parts: int = 16, part_bytes: int = 1 << 16) -> None:
    size = os.path.getsize(path)
    digest.update(size.to_bytes(8, "little"))
    with open(path, "rb") as file:
        for part in range(parts):
            file.seek(max(0, size - part_bytes) * part // max(1, parts - 1))
            digest.update(file.read(part_bytes))


def name_of(model: str) -> str:
    """The model's own name, short."""
    return os.path.basename(str(model).rstrip("/"))[:96]
