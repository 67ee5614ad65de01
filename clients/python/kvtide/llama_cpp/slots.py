"""Slot files of llama-server (`POST /slots/{id}?action=save`): what `llama_state_seq_save_file` writes.

    u32 "ggsq", u32 version, u32 tokens, tokens x i32, the state of one sequence
"""

from __future__ import annotations

import io
import json
import struct
import uuid
import zipfile
from dataclasses import dataclass
from typing import Any, Dict, List, Optional

import numpy as np

from .._types import Layer
from ..errors import DataLoss, InvalidArgument
from ..pool import Pool, Sequence
from .geometry import ModelShape
from .rows import load_rows, store_rows
from .state import State, parse_state

_MAGIC, _VERSIONS = 0x67677371, (3, 4)
_HEAD = struct.Struct("<III")
_FORMAT = "kvtide-llama-slot-1"


@dataclass
class SlotFile:
    """A slot file, taken apart: its tokens and its state."""

    version: int
    tokens: np.ndarray
    state: State
    data: memoryview  # of the state

    @classmethod
    def parse(cls, data: Any) -> "SlotFile":
        view = memoryview(data).cast("B")
        if len(view) < _HEAD.size:
            raise InvalidArgument("not a slot file of llama-server: it is shorter than a header")
        magic, version, count = _HEAD.unpack_from(view)
        if magic != _MAGIC:
            raise InvalidArgument("not a slot file of llama-server (`--slot-save-path`, action=save)")
        if version not in _VERSIONS:
            raise InvalidArgument(f"a slot file of version {version}; known are {', '.join(map(str, _VERSIONS))}")
        end = _HEAD.size + 4 * count
        if end > len(view):
            raise InvalidArgument(f"the slot file ends before its {count} tokens")
        return cls(version, np.frombuffer(view, "<i4", count, _HEAD.size), parse_state(view[end:], whole=False), view[end:])


def save_slot(pool: Pool, model: Any, data: Any, *, pair: Optional[str] = None) -> bytes:
    """Stores a slot file in a pool whose sequences outlive this process (``session=False``).

    Args:
        model: the path of the GGUF file that llama-server runs.
        data: bytes of the slot file.
        pair: K and V type; None = the pool's default.

    Returns:
        A ticket, with which :func:`restore_slot` makes the file again. It has everything but the rows.
    """
    slot = SlotFile.parse(data)
    shape = ModelShape.of(model)
    mark = f"{_FORMAT}-{uuid.uuid4().hex}"
    settings: Dict[str, Any] = {"tenant": mark}
    if pair is not None:
        settings["pair"] = pair
    sequences = store_rows(pool, shape, slot.state, slot.data, settings)
    text = {
        "format": _FORMAT,
        "address": pool.address,
        "mark": mark,
        "version": slot.version,
        "tokens": len(slot.tokens),
        "parts": [{"sequence": sequence.id, "model": sequence.model,
                   "layers": [[layer.kv_heads, layer.head_dim, layer.head_dim_v] for layer in shape.layers(part)]}
                  for sequence, part in zip(sequences, slot.state.parts)],
    }
    for sequence in sequences:
        sequence.release()
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr("ticket.json", json.dumps(text))
        archive.writestr("tokens", slot.tokens.tobytes())
        archive.writestr("state", bytes(slot.state.empty()))  # rows of zeros, which take no room here
    return out.getvalue()


@dataclass
class Ticket:
    """What :func:`save_slot` gave."""

    text: Dict[str, Any]
    tokens: bytes
    state: bytes

    @classmethod
    def parse(cls, data: bytes) -> "Ticket":
        try:
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                text = json.loads(archive.read("ticket.json"))
                if text["format"] != _FORMAT:
                    raise InvalidArgument(f"a ticket of the format {text['format']!r}; {_FORMAT!r} is known")
                return cls(text, archive.read("tokens"), archive.read("state"))
        except (zipfile.BadZipFile, KeyError, ValueError) as error:
            if isinstance(error, InvalidArgument):
                raise
            raise InvalidArgument(f"not a ticket of `python -m kvtide.llama_cpp save`: {error}") from error

    @property
    def address(self) -> str:
        """The daemon that has the rows."""
        return str(self.text["address"])

    def sequences(self, pool: Pool) -> List[Sequence]:
        """The sequences that the ticket stands for; ``DataLoss`` if the daemon no longer has them."""
        marks = {info.id: info.tenant for info in pool.sequences()}
        found = []
        for part in self.text["parts"]:
            if marks.get(part["sequence"]) != self.text["mark"]:
                raise DataLoss(f"the daemon at {pool.address} no longer has sequence {part['sequence']} of this ticket: it was "
                               "closed, or the daemon has been restarted; llama-server has to read the prompt again")
            pool.register(part["model"], [Layer(heads, dim, head_dim_v=dim_v) for heads, dim, dim_v in part["layers"]])
            found.append(pool.attach(part["sequence"]))
        return found


def restore_slot(pool: Pool, ticket: Ticket) -> bytes:
    """The slot file again, its rows as the pool has them. The sequences stay."""
    state = parse_state(ticket.state, whole=False)
    head = _HEAD.pack(_MAGIC, ticket.text["version"], len(ticket.tokens) // 4)
    return head + ticket.tokens + bytes(load_rows(state, ticket.sequences(pool)))


def forget_slot(pool: Pool, ticket: Ticket) -> None:
    """Frees what the ticket stands for."""
    for sequence in ticket.sequences(pool):
        pool.close_sequence(sequence.id)
