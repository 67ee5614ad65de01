"""Slot files of llama-server in a kvtided, compressed.

    curl -X POST 'localhost:8080/slots/0?action=save' -d '{"filename": "chat.bin"}'
    python -m kvtide.llama_cpp save slots/chat.bin --model model.gguf      writes slots/chat.bin.kvtide, a small ticket
    rm slots/chat.bin
    python -m kvtide.llama_cpp restore slots/chat.bin.kvtide               writes slots/chat.bin
    curl -X POST 'localhost:8080/slots/0?action=restore' -d '{"filename": "chat.bin"}'
    python -m kvtide.llama_cpp forget slots/chat.bin.kvtide                frees the memory, removes the ticket
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from typing import List, Optional

from ..errors import KvtideError
from ..pool import Pool, connect
from .slots import Ticket, forget_slot, restore_slot, save_slot


def _open(address: str) -> Pool:
    pool = connect(address, session=False)
    if pool.address == "embedded":
        pool.close()
        raise SystemExit("kvtide.llama_cpp: no kvtided here; start one, or name it with --address")
    return pool


def _write(path: str, data: bytes) -> None:
    """All of the file or none of it."""
    with open(path + ".part", "wb") as out:
        out.write(data)
    os.replace(path + ".part", path)


def _read(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def _save(args: argparse.Namespace) -> str:
    with _open(args.address) as pool:
        data = _read(args.file)
        before = pool.stats().stored_bytes
        ticket = save_slot(pool, args.model, data, pair=args.pair)
        path = args.out or args.file + ".kvtide"
        _write(path, ticket)
        stored = pool.stats().stored_bytes - before
        return (f"{path}: a ticket of {len(ticket)} bytes for {Ticket.parse(ticket).text['tokens']} tokens; {len(data)} bytes of "
                f"{args.file} take {stored} in {pool.address}")


def _restore(args: argparse.Namespace) -> str:
    ticket = Ticket.parse(_read(args.file))
    path = args.out or (args.file[: -len(".kvtide")] if args.file.endswith(".kvtide") else args.file + ".bin")
    with _open(args.address or ticket.address) as pool:
        data = restore_slot(pool, ticket)
    _write(path, data)
    return f"{path}: {len(data)} bytes, {ticket.text['tokens']} tokens"


def _forget(args: argparse.Namespace) -> str:
    ticket = Ticket.parse(_read(args.file))
    with _open(args.address or ticket.address) as pool:
        forget_slot(pool, ticket)
    os.remove(args.file)
    return f"{args.file}: forgotten"


def main(arguments: Optional[List[str]] = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m kvtide.llama_cpp", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(required=True, metavar="save | restore | forget")
    save = verbs.add_parser("save", help="stores a slot file and writes a ticket for it")
    save.add_argument("file", help="a slot file of llama-server; its cache types must be f16 or f32")
    save.add_argument("--model", required=True, help="the GGUF file that llama-server runs")
    save.add_argument("--pair", help="K and V type, such as q8_0/turbo4; default: the daemon's")
    save.add_argument("--address", default="auto", help="unix:/path or host:port of the kvtided; default: as kvtide has it")
    save.set_defaults(verb=_save)
    restore = verbs.add_parser("restore", help="writes the slot file of a ticket")
    restore.set_defaults(verb=_restore)
    forget = verbs.add_parser("forget", help="frees the memory that a ticket stands for, and removes it")
    forget.set_defaults(verb=_forget)
    for verb in (restore, forget):
        verb.add_argument("file", help="the ticket")
        verb.add_argument("--address", help="instead of the daemon that the ticket names")
    for verb in (save, restore):
        verb.add_argument("--out", help="where to write; default: beside the file")
    args = parser.parse_args(arguments)
    started = time.monotonic()
    try:
        print(f"{args.verb(args)} ({time.monotonic() - started:.2f} s)")
    except (KvtideError, OSError) as error:
        print(f"kvtide.llama_cpp: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
