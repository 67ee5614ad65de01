"""What happens to sequences when Python goes, and to memory over many of them."""
import os
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest

import kvtide

CHILD = textwrap.dedent("""
    import sys, numpy as np, kvtide
    pool = kvtide.connect(sys.argv[1])
    pool.register("life", [kvtide.Layer(2, 64, 4)])
    kept = [pool.create("life", tenant=sys.argv[2]) for _ in range(5)]
    for sequence in kept:
        sequence.append(0, np.ones((100, 2, 64), np.float32), np.ones((100, 2, 64), np.float32))
    print("ready", flush=True)
    sys.stdin.read() if sys.argv[3] == "wait" else None
""")


def mine(pool, tenant):
    return [s for s in pool.sequences() if s.tenant == tenant]


def wait_until(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("how", ["killed", "exits"])
def test_a_process_that_goes_frees_its_sequences(daemon, how):
    tenant = f"child that is {how}"
    child = subprocess.Popen([sys.executable, "-c", CHILD, daemon.address, tenant, "wait" if how == "killed" else "go"],
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with kvtide.connect(daemon.address) as pool:
        assert child.stdout.readline() == "ready\n"
        if how == "killed":
            assert len(mine(pool, tenant)) == 5
            os.kill(child.pid, signal.SIGKILL)
        child.communicate()
        assert child.returncode == (-signal.SIGKILL if how == "killed" else 0)
        wait_until(lambda: not mine(pool, tenant))


def test_without_a_session_sequences_stay(daemon):
    with kvtide.connect(daemon.address, session=False) as pool:
        pool.register("life", [kvtide.Layer(2, 64, 4)])
        sequence = pool.create("life", tenant="stays")
        sequence._finalizer.detach()
    with kvtide.connect(daemon.address) as pool:
        pool.register("life", [kvtide.Layer(2, 64, 4)])
        [info] = mine(pool, "stays")
        pool._core.close_sequence(info.id)
        assert not mine(pool, "stays")


def test_a_daemon_that_goes(tmp_path):
    from ways import Daemon

    daemon = Daemon(tmp_path)
    pool = kvtide.connect(daemon.address)
    pool.register("life", [kvtide.Layer(2, 64, 4)])
    sequence = pool.create("life")
    daemon.stop()
    with pytest.raises(ConnectionError):
        sequence.append(0, np.ones((1, 2, 64), np.float32), np.ones((1, 2, 64), np.float32))
    del sequence  # quietly
    pool.close()


@pytest.mark.skipif(shutil.which("redis-server") is None, reason="there is no redis-server")
def test_a_remote_tier_is_in_the_stats(tmp_path, embedded):
    from ways import Daemon

    assert embedded.stats().remote is None
    socket = tmp_path / "redis.sock"
    server = subprocess.Popen(["redis-server", "--port", "0", "--unixsocket", str(socket), "--save", "", "--dir", str(tmp_path)],
                              stdout=subprocess.DEVNULL)
    daemon = None
    try:
        wait_until(socket.exists)
        daemon = Daemon(tmp_path, "--remote", f"unix:{socket}")
        with kvtide.connect(daemon.address) as pool:
            pool.register("life", [kvtide.Layer(2, 64, 4)])
            pool.create("life", begin_with=list(range(256)))
            remote = pool.stats().remote
            assert remote.server == f"unix:{socket}" and not remote.problem and remote.connects >= 1
            assert remote.miss_blocks > 0 and remote.hit_blocks == 0
    finally:
        if daemon is not None:
            daemon.stop()
        server.kill()
        server.wait()


def test_no_leak(pool):
    """Sequences, outputs and errors by the thousand leave neither sequences nor memory behind."""
    pool.register("life", [kvtide.Layer(2, 64, 4)])
    k = np.ones((70, 2, 64), np.float32)
    q = np.ones((70, 4, 64), np.float32)
    before = {s.id for s in pool.sequences()}

    def round_of(count):
        for _ in range(count):
            sequence = pool.create("life")
            sequence.append_attend(0, q, k, k, lse=True)
            fork = sequence.fork()
            fork.truncate(3)
            with pytest.raises(kvtide.KvtideError):
                fork.append(0, k, k, start=77)

    round_of(200)
    start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    round_of(800)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start
    assert {s.id for s in pool.sequences()} == before
    assert grown < 20_000  # KiB; the arrays of 800 rounds are 100 MB


def test_no_array_is_kept(embedded):
    """The pool borrows arrays for the call only."""
    embedded.register("life", [kvtide.Layer(2, 64, 4)])
    k = np.ones((5, 2, 64), np.float32)
    references = sys.getrefcount(k)
    sequence = embedded.create("life", pair="f16/f16")
    sequence.append(0, k, k)
    assert sys.getrefcount(k) == references
    q = np.ones((1, 4, 64), np.float32)
    want = sequence.attend(0, q)
    k[:] = 7
    np.testing.assert_array_equal(sequence.attend(0, q), want)
