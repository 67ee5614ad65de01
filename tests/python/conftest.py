"""Fixtures: the same tests run over every way to a pool.

KVTIDE_TEST_PROGRAMS is the folder of kvtided (default build/dev/daemon)."""
import pytest

import kvtide
from ways import Daemon


@pytest.fixture(scope="session")
def daemon(tmp_path_factory):
    one = Daemon(tmp_path_factory.mktemp("kvtided"))
    yield one
    one.stop()


WAYS = ["embedded", "shm", "unix", "tcp", "unix without session"]


@pytest.fixture(params=WAYS)
def pool(request):
    """An open pool, by every way."""
    if request.param == "embedded":
        made = kvtide.connect("embedded", device="cpu", device_memory="64MiB", host_memory="64MiB", threads=2)
    else:
        daemon = request.getfixturevalue("daemon")
        address = daemon.tcp if request.param == "tcp" else daemon.address
        if request.param == "shm":
            address = "shm:" + address
        made = kvtide.connect(address, session="without" not in request.param)
    with made:
        yield made


@pytest.fixture
def embedded():
    with kvtide.connect("embedded", device="cpu", device_memory="64MiB", host_memory="64MiB", threads=2) as made:
        yield made
