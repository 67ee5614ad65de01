"""A subscriber of vLLM's KV events, as a router is one: what it believes that rests where."""

import time

import zmq


class Subscriber:
    """Attributes:
        gpu: what was told of blocks in the engine's own pages, by hash: (parent, tokens).
        told: where blocks of `owner` are: medium by hash.
        removed: hashes of `owner` that went, ever.
        cleared: how often the engine forgot its own pages.
    """

    def __init__(self, endpoint, owner="kvtide"):
        import msgspec
        from vllm.distributed.kv_events import KVEventBatch

        self.socket = zmq.Context.instance().socket(zmq.SUB)
        self.socket.connect(endpoint)
        self.socket.setsockopt(zmq.SUBSCRIBE, b"kv")
        self.decode, self.owner = msgspec.msgpack.Decoder(KVEventBatch).decode, owner
        self.gpu, self.told, self.removed, self.cleared, self.next = {}, {}, set(), 0, 0
        self.placeholders = 0

    def read(self):
        """What has come meanwhile; True if there was something of `owner`."""
        news = False
        while self.socket.poll(0):
            topic, number, payload = self.socket.recv_multipart()
            assert topic == b"kv" and int.from_bytes(number, "big") == self.next, "a batch was lost"
            self.next += 1
            for event in self.decode(payload).events:
                news |= self.take(event)
        return news

    def take(self, event):
        kind = type(event).__name__
        if kind == "AllBlocksCleared":
            self.cleared += 1
            return False
        mine = event.ownership == self.owner
        if kind == "BlockRemoved":
            if mine:
                for one in event.block_hashes:
                    assert self.told.pop(one) == event.medium
                    self.removed.add(one)
            return mine
        if not event.token_ids:
            self.placeholders += 1
        size, parent = event.block_size, event.parent_block_hash
        for i, one in enumerate(event.block_hashes):
            said = (parent, list(event.token_ids[i * size:(i + 1) * size]))
            if mine:
                assert event.group_idx == 0 and event.locality in (None, "LOCAL")
                assert self.gpu.get(one, said) == said, "another parent or other tokens than the engine told of its own page"
                assert one not in self.told
                self.told[one] = event.medium
            if said[1]:
                self.gpu.setdefault(one, said)
            parent = one
        return mine

    def until(self, good, each=lambda: None, seconds=300):
        deadline = time.monotonic() + seconds
        while True:
            self.read()
            if good():
                return
            assert time.monotonic() < deadline, (len(self.told), len(self.removed), self.next)
            each()
            time.sleep(0.05)

    def quiet(self, each, times=3):
        """Until nothing has changed for some rounds."""
        silent = 0
        while silent < times:
            each()
            time.sleep(0.5)
            silent = 0 if self.read() else silent + 1

    def hashes(self, tokens, size=64):
        """Of the full blocks of a prompt, as far as they were told."""
        out, parent = [], None
        for at in range(0, len(tokens) - size + 1, size):
            parent = next((one for one, said in self.gpu.items() if said == (parent, tokens[at:at + size])), None)
            if parent is None:
                break
            out.append(parent)
        return out
