"""The connector with faults of one rank of several: module path of vLLM's ``--kv-transfer-config``. ``KVTIDE_FAULT`` says what the
second tensor-parallel rank does: ``half`` = has no room for keys whose last byte is odd; ``stop:PID`` = stops that process, a
kvtided, when it loads, so that this load and what others ask meanwhile is not answered."""

import os
import signal

from kvtide.block_store import StoreResult
from kvtide.errors import ResourceExhausted
from kvtide.vllm import connector


class Faulty:
    def __init__(self, store, fault):
        self.one, self.fault = store, fault

    def __getattr__(self, name):
        return getattr(self.one, name)

    def store(self, keys, payload, **options):
        if self.fault != "half":
            return self.one.store(keys, payload, **options)
        room = next((i for i, key in enumerate(keys) if key[-1] % 2), len(keys))
        if room == 0:
            raise ResourceExhausted("a fault of the test")
        done = self.one.store(keys[:room], payload[:room], **options)
        return StoreResult(done.stored, done.present, len(keys) - room, "a fault of the test" if room < len(keys) else "")

    def _stop(self):
        if self.fault.startswith("stop:"):
            os.kill(int(self.fault[5:]), signal.SIGSTOP)

    def load(self, *arguments, **options):
        self._stop()
        return self.one.load(*arguments, **options)

    def load_pages(self, *arguments, **options):
        self._stop()
        return self.one.load_pages(*arguments, **options)


class KvtideConnector(connector.KvtideConnector):
    def register_kv_caches(self, kv_caches):
        super().register_kv_caches(kv_caches)
        fault = os.environ.get("KVTIDE_FAULT", "")
        if fault and self.worker is not None and self._rank() == (0, 1):
            for link in (self.worker.save_link, self.worker.load_link):
                link.stores = lambda real=link.stores: tuple(Faulty(one, fault) for one in real() or ()) or None
