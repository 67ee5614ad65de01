"""The connector over a double of the block store, for faults that a real daemon does not make on demand: module path of vLLM's
``--kv-transfer-config``. ``KVTIDE_DOUBLE``: a folder that the blocks stay in; ``KVTIDE_FAULT``: what goes wrong."""

import os
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "python"))

import block_store_double
from kvtide import store_link
from kvtide.vllm import connector

_daemon = None


def daemon():
    global _daemon
    if _daemon is None:
        _daemon = block_store_double.Daemon(os.environ.get("KVTIDE_DOUBLE"))
        fault = os.environ.get("KVTIDE_FAULT", "")
        if fault == "lost":
            _daemon.lose.update(key for blocks in _daemon.blocks.values() for key in list(blocks)[2::5])
        if fault == "loads":
            def before(verb):
                if verb == "load":
                    raise ConnectionError("the daemon went away in the middle of a load")
            _daemon.before = before
    return _daemon


class KvtideConnector(connector.KvtideConnector):
    def _link(self, timeout, host_tier=False):
        return store_link.StoreLink(daemon().open_pool, "a double", pauses=(0.1, 0.5), log=connector.logger)
