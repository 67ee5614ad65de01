"""A pool with block stores in this process's memory, in which tests make faults happen. What it answers is what
``proto/kvtide/v1/blocks.proto`` says; pairs are not coded. With a folder it is there again in the next process."""

import contextlib
import ctypes
import os
import pathlib
import pickle
import threading

import numpy as np

from kvtide import formats
from kvtide.block_store import Found, StoreResult
from kvtide.errors import InvalidArgument, NotFound, ResourceExhausted, Unavailable


def as_bytes(array):
    return np.ascontiguousarray(array if isinstance(array, np.ndarray) else array.contiguous().view(_uint8()).numpy()).view(np.uint8)


def _uint8():
    import torch

    return torch.uint8


class Daemon:
    """What pools of one address have in common.

    Attributes:
        away: calls raise Unavailable.
        room: blocks that fit.
        lose: keys that cannot be read, though lookups count them.
        before: called with the verb's name before each call.
        shares: pools that ask for it read its blocks where they lie.
        elsewhere: keys of blocks that lie in another tier.
    """

    def __init__(self, folder=None, room=10**9):
        self.blocks, self.leases, self.room, self.away, self.lose = {}, {}, room, False, set()
        self.shares, self.elsewhere = False, set()
        self.calls, self.lock, self.before, self.next_lease = [], threading.Lock(), lambda verb: None, 1
        self.file = folder and pathlib.Path(folder) / "blocks.pickle"
        if self.file and self.file.exists():
            self.blocks = pickle.loads(self.file.read_bytes())

    def keep(self):
        if self.file:
            temporary = self.file.with_suffix(f".{os.getpid()}")
            temporary.write_bytes(pickle.dumps(self.blocks))
            temporary.replace(self.file)

    def call(self, verb):
        self.before(verb)
        with self.lock:
            self.calls.append(verb)
            if self.away:
                raise Unavailable("no kvtided here")

    def open_pool(self, host_tier=False):
        self.call("open")
        return Pool(self, host_tier and self.shares)


class Pool:
    def __init__(self, daemon, maps=False):
        self.daemon, self.host_tier_bytes, self.connected = daemon, 1 << 20 if maps else 0, True

    def drop_host_tier(self):
        self.host_tier_bytes = 0

    def block_store(self, namespace, *, persist_all=False, priority="normal"):
        self.daemon.call("block_store")
        return Store(self.daemon, namespace)

    def empty(self, shape, dtype=np.float32):
        return np.empty(shape, dtype)


class Store:
    def __init__(self, daemon, namespace):
        self.daemon, self.namespace, self.namespace_id = daemon, namespace, 1
        self.pair = getattr(namespace.content, "pair", "")
        version = {one.name: one.version for one in formats.types()}
        self.codec_versions = tuple(version[one] for one in self.pair.split("/")) if self.pair else (0, 0)
        self.block_bytes = getattr(namespace.content, "block_bytes", 0)

    def _blocks(self):
        return self.daemon.blocks.setdefault(self.namespace, {})

    def store(self, keys, payload, *, coded=False, layout=None, priority=None):
        self.daemon.call("store")
        if len(payload) != len(keys):
            raise InvalidArgument(f"{len(keys)} keys, {len(payload)} blocks")
        stored = present = left_out = 0
        with self.daemon.lock:
            for key, one in zip(keys, payload):
                if key in self._blocks():
                    present += 1
                elif sum(map(len, self.daemon.blocks.values())) >= self.daemon.room:
                    left_out += 1
                else:
                    self._blocks()[key] = as_bytes(one).tobytes()
                    stored += 1
            self.daemon.keep()
        if not stored and not present:
            raise ResourceExhausted("host tier full")
        return StoreResult(stored, present, left_out, "host tier full" if left_out else "")

    def lookup(self, keys, *, lease_seconds=30.0, peek=False):
        self.daemon.call("peek" if lease_seconds < 0 else "lookup")
        with self.daemon.lock:
            hits = next((i for i, key in enumerate(keys) if key not in self._blocks()), len(keys))
            if lease_seconds < 0 or not hits:
                return Found(hits, (("host", hits),) if hits else ())
            lease, self.daemon.next_lease = self.daemon.next_lease, self.daemon.next_lease + 1
            self.daemon.leases[lease] = list(keys[:hits])
            return Found(hits, (("host", hits),), lease, lease_seconds)

    def load(self, lease_id, out, *, first_block=0, blocks=None, coded=False, layout=None):
        self.daemon.call("load")
        with self.daemon.lock:
            if lease_id not in self.daemon.leases:
                raise NotFound(f"no lease {lease_id}")
            lost = []
            for at, one in enumerate(out, first_block):
                key = self.daemon.leases[lease_id][at]
                if key in self.daemon.lose or key not in self._blocks():
                    lost.append(at)
                else:
                    as_bytes_view = one if isinstance(one, np.ndarray) else one.view(_uint8()).numpy()
                    as_bytes_view.view(np.uint8)[...] = np.frombuffer(self._blocks()[key], np.uint8).reshape(
                        as_bytes_view.view(np.uint8).shape)
            return lost

    @contextlib.contextmanager
    def in_place(self, lease_id, first_block, blocks):
        self.daemon.call("in_place")
        keys = self.daemon.leases[lease_id][first_block:first_block + blocks]
        lost = [first_block + i for i, key in enumerate(keys) if key in self.daemon.lose]
        held = [None if key in self.daemon.lose | self.daemon.elsewhere else ctypes.create_string_buffer(self._blocks()[key])
                for key in keys]
        yield [ctypes.addressof(one) if one else 0 for one in held], lost
        for one in held:
            ctypes.memset(one, 0x5A, len(one)) if one else None  # it may be others' now
        self.daemon.call("give_back")

    def release(self, lease_id):
        self.daemon.call("release")
        return self.daemon.leases.pop(lease_id, None) is not None

    def delete(self):
        self.daemon.call("delete")
        with self.daemon.lock:
            return len(self.daemon.blocks.pop(self.namespace, {}))
