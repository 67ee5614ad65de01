#!/usr/bin/env python3
"""kvtided serves the demo under the restrictions of the shipped systemd unit, as a user that owns nothing else.

usage: unit_test.py REPOSITORY BUILD

under_unit.py imitates the unit where there is no systemd, and says what of it it cannot. First the unit's own command with the shipped
configuration and a disk tier in StateDirectory: it answers `kvtide health`, stops, and starts again over that tier; then `kvtide demo`,
whose daemon and engine both live under the unit. Last, what the unit forbids is forbidden: else the rest would prove nothing.
Needs root and systemd-analyze (its lists of system calls); without them the test is left out, exit code 77.
"""
import json
import os
import pathlib
import platform
import shutil
import subprocess
import sys
import tempfile

SKIPPED = 77

SERVE = """
set -eu
trap 'kill $daemon 2> /dev/null || true' EXIT
kvtided="$1" kvtide="$2" config="$3"
socket="unix:$TMPDIR/kvtided.sock"
start() {
  "$kvtided" --config "$config" --listen "$socket" --metrics-address off --device cpu --device-memory 32MiB --host-memory 32MiB \\
    --disk "$KVTIDE_STATE/tier:64MiB" > "$TMPDIR/log" 2>&1 &
  daemon=$!
  until "$kvtide" health --address "$socket" > /dev/null 2>&1; do kill -0 $daemon; sleep 0.1; done
}
start
"$kvtide" status --address "$socket" --output json | grep -q '"name": "disk"'
kill $daemon; wait $daemon
start
kill $daemon; wait $daemon
"""

# Each of these has to fail.
FORBIDDEN = {
    "writing outside of its folders": "touch /usr/kvtide-was-here",
    "reading homes": "ls /root",
    "seeing others' temporary files": "test -n \"$(ls -A /var/tmp)\"",
    "another user's identity": "setpriv --reuid 0 true",
    "a namespace of its own": "unshare --user true",
    "a packet socket": "/usr/bin/python3 -c 'import socket; socket.socket(17, 3)'",
    "mounting": "mount -t tmpfs tmpfs /mnt",
    "disks": "test -e /dev/sda -o -e /dev/vda -o -e /dev/nvme0n1",
}


def main():
    repository, build = (pathlib.Path(word).resolve() for word in sys.argv[1:])
    if os.geteuid() != 0 or platform.machine() != "x86_64" or not shutil.which("systemd-analyze") or not os.path.exists("/usr/bin/python3"):
        print("left out: it wants root, an x86-64 machine, systemd-analyze and /usr/bin/python3")
        return SKIPPED
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode != 0:
        print("left out: no mount namespaces here")
        return SKIPPED
    unit = repository / "deploy/systemd/kvtided.service.in"
    complaints = []
    with tempfile.TemporaryDirectory(prefix="kvtide-unit-") as name:
        os.chmod(name, 0o755)
        # What runs is not read from the tree: that may lie in a home or below /tmp, which the unit hides.
        programs = pathlib.Path(name) / "programs"
        programs.mkdir()
        for file in (build / "clients/cli/kvtide", build / "daemon/kvtided", repository / "deploy/systemd/kvtided.json"):
            shutil.copy(file, programs)
        kvtide, kvtided, config = (programs / file for file in ("kvtide", "kvtided", "kvtided.json"))
        for source, target in (("clients/engine/models", "models"), ("tests/data", "texts")):
            shutil.copytree(repository / source, programs / "data" / target)

        def under(*command):
            # Not the first python in PATH: that may lie in a home, which is not to be seen.
            return subprocess.run(["/usr/bin/python3", repository / "tests/deploy/under_unit.py", unit, name, *command],
                                  capture_output=True, text=True, timeout=600,
                                  env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "KVTIDE_DATA_DIR": str(programs / "data")})

        served = under("sh", "-c", SERVE, "sh", kvtided, kvtide, config)
        print(served.stderr, end="")
        if served.returncode != 0:
            log = pathlib.Path(name) / "run/log"
            complaints.append(f"the unit's command: {served.stdout}{served.stderr}{log.read_text() if log.exists() else ''}")
        demo = under(kvtide, "demo", "--kvtided", kvtided, "--context", "1024", "--generate", "16", "--no-progress", "--output", "json")
        if demo.returncode != 0:
            complaints.append(f"the demo: {demo.stdout[-2000:]}{demo.stderr[-2000:]}")
        else:
            json.loads(demo.stdout)
        for what, command in FORBIDDEN.items():
            if under("sh", "-c", command).returncode == 0:
                complaints.append(f"{what} is not forbidden: {command}")
        if under("sh", "-c", "true").returncode != 0:
            complaints.append("nothing runs under the unit, so that what is forbidden proves nothing")
    for complaint in complaints:
        print(complaint)
    print(f"{len(FORBIDDEN) + 2} checks, {len(complaints)} complaints")
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
