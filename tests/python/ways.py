"""Where things are, and a daemon to talk to."""
import os
import pathlib
import subprocess

ROOT = pathlib.Path(__file__).resolve().parents[2]


class Daemon:
    """A kvtided of the test on a Unix socket and a loopback port."""

    def __init__(self, folder, *flags, log=None):
        self.address = f"unix:{folder}/kvtided.sock"
        programs = pathlib.Path(os.environ.get("KVTIDE_TEST_PROGRAMS", ROOT / "build" / "dev" / "daemon"))
        self.process = subprocess.Popen(
            [str(programs / "kvtided"), "--listen", self.address, "--listen", "127.0.0.1:0", "--device", "cpu",
             "--device-memory", "64MiB", "--host-memory", "64MiB", "--metrics-address", "off", *flags],
            stdout=subprocess.PIPE, stderr=log, text=True)
        line = self.process.stdout.readline()
        assert " ready: " in line, line
        self.tcp = next(word.strip(",") for word in line.split() if word.startswith("127.0.0.1:"))

    def stop(self):
        self.process.terminate()
        assert self.process.wait(timeout=30) == 0
        self.process.stdout.close()
