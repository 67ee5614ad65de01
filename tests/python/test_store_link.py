"""The connection that engines' caches use: a daemon that is away, comes back, refuses."""

import logging
import pathlib
import subprocess
import sys
import threading
import time

import pytest
from block_store_double import Daemon
from kvtide import store_link
from kvtide.block_store import Namespace, OpaqueBlocks
from kvtide.errors import InvalidArgument, NotFound, ResourceExhausted, Unavailable, Unimplemented
from kvtide.store_link import StoreLink, in_pieces

SPACES = [Namespace("m", 64, OpaqueBlocks(16)), Namespace("n", 64, OpaqueBlocks(16))]


def until(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.fixture
def daemon():
    return Daemon()


@pytest.fixture
def link(daemon):
    one = StoreLink(daemon.open_pool, "here", pauses=(0.001, 0.01))
    yield one
    one.close()


def test_namespaces_are_open_in_their_order(link):
    assert link.stores() is None
    assert link.start(SPACES, wait=20)
    assert [store.namespace for store in link.stores()] == SPACES


def test_a_daemon_that_is_away_is_found_when_it_comes(daemon, link, caplog):
    daemon.away = True
    with caplog.at_level(logging.INFO, "kvtide"):
        assert not link.start(SPACES, wait=20)
        until(lambda: link.tries > 3)
        assert link.stores() is None
        daemon.away = False
        until(lambda: link.stores())
    said = [record.message for record in caplog.records]
    assert said == ["kvtide: no kvtided at here: no kvtided here; the engine goes on without it", "kvtide: kvtided at here is there"]


def test_a_call_that_failed_makes_it_connect_anew(daemon, link):
    link.start(SPACES, wait=20)
    first = link.stores()
    link.failed(Unavailable("gone"))
    until(lambda: link.stores() not in (None, first))


class Mapped:
    """A pool that maps its daemon's host memory."""

    host_tier_bytes = 64

    def __init__(self, stores):
        self.stores, self.connected, self.dropped = stores, True, False

    def block_store(self, namespace, persist_all=False):
        return self.stores.block_store(namespace, persist_all=persist_all)

    def drop_host_tier(self):
        self.dropped = True


def test_memory_of_a_daemon_that_ended_is_let_go_though_nobody_calls(daemon, monkeypatch):
    monkeypatch.setattr(store_link, "LOOK_SECONDS", 0.005)
    pools, order = [], []

    def open_pool():
        pools.append(Mapped(daemon.open_pool()))
        return pools[-1]

    link = StoreLink(open_pool, "here", pauses=(0.001, 0.01))
    link.lost.append(lambda: order.append(pools[-1].dropped))
    link.start(SPACES, wait=20)
    time.sleep(0.05)
    assert len(pools) == 1 and not order
    pools[0].connected = False
    until(lambda: len(pools) == 2 and link.stores())
    assert pools[0].dropped and order == [False]  # first who copies from it, then the mapping
    link.close()


@pytest.mark.parametrize("error,lost", [(Unavailable("x"), True), (TimeoutError(), True), (NotFound("namespace"), True),
                                        (ResourceExhausted("full"), False), (InvalidArgument("NaN"), False), (ValueError(), False)])
def test_what_means_that_the_daemon_is_gone(daemon, link, error, lost):
    link.start(SPACES, wait=20)
    daemon.away = True
    link.failed(error)
    assert (link.stores() is None) == lost


def test_a_refusal_is_said_in_one_line_and_not_asked_again_soon(caplog):
    def refuse():
        raise Unimplemented("this kvtided is older\nand more words")

    link = StoreLink(refuse, "here", pauses=(0.001, 0.001))
    link.start(SPACES, wait=20)
    time.sleep(0.05)
    assert link.tries == 1
    assert [record.message for record in caplog.records] == [
        "kvtide: refused by kvtided at here: this kvtided is older; the engine goes on without it"]
    link.close()


def test_what_nobody_waits_for_runs_on_the_links_thread(daemon, link):
    ran, threads = threading.Event(), []
    link.later(lambda: threads.append("never: not connected"))
    link.start(SPACES, wait=20)
    link.later(lambda: (threads.append(threading.current_thread().name), ran.set()))
    assert ran.wait(20)
    assert threads == ["kvtide-link"]


def test_a_failing_late_call_is_a_lost_daemon(daemon, link):
    link.start(SPACES, wait=20)
    first = link.stores()

    def fail():
        raise Unavailable("gone")

    link.later(fail)
    until(lambda: link.stores() not in (None, first))


def test_closing_ends_the_thread_while_the_daemon_is_away(daemon):
    daemon.away = True
    link = StoreLink(daemon.open_pool, "here", pauses=(30, 30))
    link.start(SPACES, wait=20)
    link.close()
    assert not link._thread.is_alive()


def test_memory_for_payloads_needs_a_daemon(daemon, link):
    with pytest.raises(Unavailable):
        link.empty((1, 2), "u1")
    link.start(SPACES, wait=20)
    assert link.empty((1, 2), "u1").shape == (1, 2)


def test_an_address_is_never_a_pool_of_this_process(monkeypatch):
    asked = []

    def open_pool(address, **options):
        asked.append(address)
        raise Unavailable("nobody")

    monkeypatch.setattr("kvtide.pool.connect", open_pool)
    monkeypatch.setenv("KVTIDE_ADDRESS", "unix:/run/other.sock")
    for address, way in (("unix:/x", "auto"), ("host:1", "auto"), ("unix:/x", "grpc"), ("", "auto")):
        with pytest.raises(Unavailable):
            store_link.connect(address, way=way)
    assert asked == ["shm:unix:/x", "unix:/x", "host:1", "unix:/x", "shm:unix:/run/other.sock", "unix:/run/other.sock"]
    with pytest.raises(InvalidArgument):
        store_link.connect("unix:/x", way="embedded")


def test_pieces():
    assert in_pieces(0, 10, 100) == []
    assert in_pieces(5, 10, 20) == [(0, 2), (2, 4), (4, 5)]
    assert in_pieces(2, 1000, 20) == [(0, 1), (1, 2)]



def test_no_thread_is_in_a_call_when_the_interpreter_ends():
    """What comes out of compiled code then would end the process."""
    script = f"""
import sys, threading, time
sys.path.insert(0, {str(pathlib.Path(__file__).parent)!r})
from block_store_double import Daemon
from kvtide.block_store import Namespace, OpaqueBlocks
from kvtide.store_link import StoreLink

link, started = StoreLink(Daemon().open_pool, "here"), threading.Event()
link.start([Namespace("m", 64, OpaqueBlocks(64))], wait=20)
link.later(lambda: (started.set(), time.sleep(0.3), print("call over", flush=True)))
started.wait(20)
print("main over", flush=True)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout.split("\n")[:2] == ["main over", "call over"], done.stderr
