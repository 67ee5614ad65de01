"""Fixtures: the same tests run over every way to a pool.

KVTIDE_TEST_PROGRAMS is the folder of kvtided (default build/dev/daemon)."""
import os
import pathlib
import subprocess

import pytest

import kvtide

ROOT = pathlib.Path(__file__).resolve().parents[2]


class Daemon:
    """A kvtided of the test on a Unix socket and a loopback port."""

    def __init__(self, folder, *flags):
        self.address = f"unix:{folder}/kvtided.sock"
        programs = pathlib.Path(os.environ.get("KVTIDE_TEST_PROGRAMS", ROOT / "build" / "dev" / "daemon"))
        self.process = subprocess.Popen(
            [str(programs / "kvtided"), "--listen", self.address, "--listen", "127.0.0.1:0", "--device", "cpu",
             "--device-memory", "64MiB", "--host-memory", "64MiB", "--metrics-address", "off", *flags],
            stdout=subprocess.PIPE, text=True)
        line = self.process.stdout.readline()
        assert " ready: " in line, line
        self.tcp = next(word.strip(",") for word in line.split() if word.startswith("127.0.0.1:"))

    def stop(self):
        self.process.terminate()
        assert self.process.wait(timeout=30) == 0
        self.process.stdout.close()


@pytest.fixture(scope="session")
def daemon(tmp_path_factory):
    one = Daemon(tmp_path_factory.mktemp("kvtided"))
    yield one
    one.stop()


WAYS = ["embedded", "unix", "tcp", "unix without session"]


@pytest.fixture(params=WAYS)
def pool(request):
    """An open pool, by every way."""
    if request.param == "embedded":
        made = kvtide.connect("embedded", device="cpu", device_memory="64MiB", host_memory="64MiB", threads=2)
    else:
        daemon = request.getfixturevalue("daemon")
        address = daemon.tcp if request.param == "tcp" else daemon.address
        made = kvtide.connect(address, session="without" not in request.param)
    with made:
        yield made


@pytest.fixture
def embedded():
    with kvtide.connect("embedded", device="cpu", device_memory="64MiB", host_memory="64MiB", threads=2) as made:
        yield made
