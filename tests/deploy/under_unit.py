#!/usr/bin/env python3
"""Runs a program as systemd would run it for a unit: as an unprivileged user, with the unit's restrictions.

usage: under_unit.py UNIT FOLDER COMMAND...

For machines without a systemd to ask. FOLDER, which has to be there, plays RuntimeDirectory and StateDirectory (FOLDER/run, FOLDER/state,
made here) and is the working folder; COMMAND runs with TMPDIR=FOLDER/run, and FOLDER/state in KVTIDE_STATE. Needs root. Every directive
of the unit's [Service] section is imitated, is none that restricts (UNKNOWN_TO_PROGRAMS), or is named on stderr as not imitated; one
that is not known here is an error, so that a new directive is not left out in silence.

How: namespaces and mounts for the file system, the kernel's own switches for privileges, and one seccomp filter (classic BPF) for
system calls and address families, as systemd makes it of the same sets (systemd-analyze syscall-filter).
"""
import ctypes
import os
import pathlib
import re
import resource
import struct
import subprocess
import sys

USER = 64321  # of nobody on this machine
SYSTEM_CALL_HEADER = "/usr/include/x86_64-linux-gnu/asm/unistd_64.h"
FAMILIES = {"AF_UNIX": 1, "AF_INET": 2, "AF_INET6": 10, "AF_NETLINK": 16}
# About the life of the service, or limits that only a control group sets.
UNKNOWN_TO_PROGRAMS = {"Type", "WatchdogSec", "ExecReload", "ExecStart", "Restart", "RestartSec", "RestartPreventExitStatus", "TimeoutStopSec",
                       "RuntimeDirectory", "RuntimeDirectoryMode", "StateDirectory", "StateDirectoryMode"}
NOT_IMITATED = {
    "MemoryMax": "a control group",
    "ProtectClock": "of it the device and the system calls, which the filter and DevicePolicy leave out",
    "ProtectKernelLogs": "of it the device and the system call, likewise",
    "ProtectKernelModules": "of it the system calls, likewise",
    "ProtectHostname": "of it sethostname, which the filter leaves out",
    "RestrictRealtime": "its filter of scheduling policies; without capabilities and rtprio limit the kernel refuses them",
    "RestrictSUIDSGID": "its filter of modes; every mount is nosuid",
    "LockPersonality": "personality() is left out of the filter altogether",
    "OOMScoreAdjust": "below 0 needs a privilege that is dropped; 0 here",
}

libc = ctypes.CDLL(None, use_errno=True)


def must(result, what):
    if result < 0:
        sys.exit(f"under_unit: {what}: {os.strerror(ctypes.get_errno())}")


def directives(unit):
    """[(name, value), ...] of [Service]; a name may come several times."""
    section, found = "", []
    for line in pathlib.Path(unit).read_text().splitlines():
        line = line.strip()
        if line.startswith("["):
            section = line
        elif section == "[Service]" and line and not line.startswith("#"):
            name, value = line.split("=", 1)
            found.append((name, value))
    return found


def mount(source, target, *options):
    subprocess.run(["mount", *options, source, target], check=True, stdout=subprocess.DEVNULL)


def numbers():
    return {name: int(value) for name, value in re.findall(r"#define __NR_(\w+) (\d+)", pathlib.Path(SYSTEM_CALL_HEADER).read_text())}


def expand(names):
    """Sets like @system-service become the calls in them."""
    calls = set()
    for name in names:
        if not name.startswith("@"):
            calls.add(name)
            continue
        listed = subprocess.run(["systemd-analyze", "syscall-filter", name], check=True, capture_output=True, text=True).stdout
        calls |= expand({line.strip() for line in listed.splitlines()[1:] if line.startswith("    ") and not line.strip().startswith("#")})
    return calls


def filter_of(calls, families, namespaces, error):
    """BPF over struct seccomp_data: nr at 0, arch at 4, the first argument at 16. What is not in `calls` fails with `error`."""
    LOAD, EQUAL, ANY_BIT, RETURN = 0x20, 0x15, 0x45, 0x06
    ALLOW, FAIL, KILL = 0x7FFF0000, 0x00050000, 0x80000000
    known = numbers()
    code = [(LOAD, 0, 0, 4), (EQUAL, 1, 0, 0xC000003E), (RETURN, 0, 0, KILL), (LOAD, 0, 0, 0)]  # x86-64 only: SystemCallArchitectures=native
    if families is not None:
        check = [(LOAD, 0, 0, 16)]
        for family in sorted(families):
            check += [(EQUAL, 0, 1, FAMILIES[family]), (RETURN, 0, 0, ALLOW)]
        check.append((RETURN, 0, 0, FAIL | 97))  # EAFNOSUPPORT
        code += [(EQUAL, 0, len(check), known["socket"]), *check]
    if not namespaces:  # clone3 has its flags in memory, where no filter can look: libraries take clone then
        flags = [(LOAD, 0, 0, 16), (ANY_BIT, 0, 1, 0x7E020080), (RETURN, 0, 0, FAIL | error), (RETURN, 0, 0, ALLOW)]
        code += [(EQUAL, 0, 1, known["clone3"]), (RETURN, 0, 0, FAIL | 38), (EQUAL, 0, len(flags), known["clone"]), *flags]
        calls = calls - {"unshare", "setns"}
    for call in sorted(calls):
        if call in known and call != "personality":
            code += [(EQUAL, 0, 1, known[call]), (RETURN, 0, 0, ALLOW)]
    code.append((RETURN, 0, 0, FAIL | error))
    return b"".join(struct.pack("HBBI", *instruction) for instruction in code), len(code)


def lock_files(found, folder):
    values = dict(found)
    must(libc.unshare(0x00020000 | 0x08000000 | 0x04000000), "namespaces")  # mounts, IPC, host name
    mount("none", "/", "--make-rprivate")
    mount(folder, folder, "--bind")
    if values.get("DevicePolicy") == "closed":
        # GPUs of DeviceAllow are not on this machine; the kernel's harmless devices stay.
        keep = [d for d in ("null", "zero", "full", "random", "urandom", "tty") if os.path.exists(f"/dev/{d}")]
        os.makedirs(f"{folder}/dev", exist_ok=True)
        mount("tmpfs", f"{folder}/dev", "-t", "tmpfs", "-o", "mode=755,size=64k")
        for name in keep:
            open(f"{folder}/dev/{name}", "w").close()
            mount(f"/dev/{name}", f"{folder}/dev/{name}", "--bind")
        os.makedirs(f"{folder}/dev/shm")
        mount(f"{folder}/dev", "/dev", "--move")
        mount("tmpfs", "/dev/shm", "-t", "tmpfs", "-o", "mode=1777,nosuid,nodev")
    if values.get("ProtectProc") == "invisible":
        mount("proc", "/proc", "-t", "proc", "-o", "hidepid=2,nosuid,nodev,noexec")
    if values.get("ProtectHome") == "true":
        for path in ("/root", "/home", "/run/user"):
            if os.path.isdir(path):
                mount("tmpfs", path, "-t", "tmpfs", "-o", "mode=000,ro,size=0")
    if values.get("ProtectKernelTunables") == "true":
        mount("/proc/sys", "/proc/sys", "--bind")
        mount("none", "/proc/sys", "-o", "remount,bind,ro")
    # Read-only: everything but the folder, the API file systems and what is made below (ProtectSystem=strict, ProtectControlGroups, /sys).
    if values.get("ProtectSystem") == "strict":
        for line in pathlib.Path("/proc/self/mountinfo").read_text().splitlines():
            target = re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal.group(1), 8)), line.split()[4])
            if target.startswith(("/proc", "/dev", folder)):
                continue
            subprocess.run(["mount", "-o", "remount,bind,ro,nosuid", target], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    if values.get("PrivateTmp") == "true":
        # The folder may lie in /tmp: it is put back where it was.
        kept = os.open(folder, os.O_PATH)
        for path in ("/tmp", "/var/tmp"):
            mount("tmpfs", path, "-t", "tmpfs", "-o", "mode=1777,nosuid,nodev")
        if folder.startswith(("/tmp/", "/var/tmp/")):
            os.makedirs(folder)
            # mount(8) would look the name up, which is the new folder's by now.
            must(libc.mount(f"/proc/self/fd/{kept}".encode(), folder.encode(), None, 4096, None), "the folder")
        os.close(kept)


def drop(found):
    values = dict(found)
    for name, value in (("RLIMIT_NOFILE", int(values["LimitNOFILE"])), ("RLIMIT_MEMLOCK", resource.RLIM_INFINITY)):
        try:
            resource.setrlimit(getattr(resource, name), (value, value))
        except ValueError:  # even root may not raise it in some containers
            print(f"under_unit: {name} stays {resource.getrlimit(getattr(resource, name))}", file=sys.stderr)
    os.umask(int(values["UMask"], 8))
    if values.get("CapabilityBoundingSet") == "":
        for capability in range(64):
            if libc.prctl(24, capability, 0, 0, 0) < 0:  # PR_CAPBSET_DROP
                break
    os.setgroups([])
    os.setresgid(USER, USER, USER)
    os.setresuid(USER, USER, USER)
    if values.get("NoNewPrivileges") == "true":
        must(libc.prctl(38, 1, 0, 0, 0), "no_new_privs")
    calls = expand(set(values["SystemCallFilter"].split()))
    families = set(values["RestrictAddressFamilies"].split())
    code, length = filter_of(calls, families, values.get("RestrictNamespaces") != "true", {"EPERM": 1}[values["SystemCallErrorNumber"]])
    buffer = ctypes.create_string_buffer(code)
    program = struct.pack("HxxxxxxQ", length, ctypes.addressof(buffer))
    must(libc.prctl(22, 2, program, 0, 0), "the filter of system calls")  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER


def main():
    unit, folder, command = sys.argv[1], str(pathlib.Path(sys.argv[2]).resolve()), sys.argv[3:]
    found = directives(unit)
    imitated = {"DevicePolicy", "DeviceAllow", "ProtectProc", "ProtectHome", "ProtectKernelTunables", "ProtectControlGroups", "ProtectSystem", "PrivateTmp",
                "LimitNOFILE", "LimitMEMLOCK", "UMask", "CapabilityBoundingSet", "AmbientCapabilities", "User", "Group", "NoNewPrivileges",
                "SystemCallFilter", "SystemCallErrorNumber", "SystemCallArchitectures", "RestrictAddressFamilies", "RestrictNamespaces"}
    for name in dict(found):
        if name in NOT_IMITATED:
            print(f"under_unit: {name} is not imitated: {NOT_IMITATED[name]}", file=sys.stderr)
        elif name not in imitated and name not in UNKNOWN_TO_PROGRAMS:
            sys.exit(f"under_unit: the directive {name} is not known here")
    for name in ("run", "state"):
        os.makedirs(f"{folder}/{name}", exist_ok=True)
        os.chown(f"{folder}/{name}", USER, USER)
        os.chmod(f"{folder}/{name}", 0o750)
    lock_files(found, folder)
    os.chdir(folder)
    drop(found)
    os.environ.update(TMPDIR=f"{folder}/run", KVTIDE_STATE=f"{folder}/state", HOME="/nonexistent")
    os.execvp(command[0], command)


if __name__ == "__main__":
    main()
