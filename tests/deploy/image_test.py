#!/usr/bin/env python3
"""Runs what deploy/Dockerfile says, without a container engine, and then what it has made.

usage: image_test.py REPOSITORY WORK [--platform linux/ARCHITECTURE] [--record] [--keep]
       image_test.py --self-test REPOSITORY     reads the file and its parts alone

Bases (debian:12) are roots that debootstrap makes of that release from the repositories of this machine; steps run in them by chroot
in namespaces of their own, as root, as `docker build` would run them. There is no other list of steps than the file's. The build stage
is lent the compiler's cache of this machine, so that a second run is quick. Programs of another architecture run in QEMU, which the
kernel starts for them (binfmt_misc); where it does not yet, this machine is told to for as long as the test runs.
Exit codes: 0 all is well, 1 a step failed or the image does not do what it says, 77 this machine cannot do it (and why).
"""
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import dockerfile

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"  # of an image that says nothing else
RELEASES = {"debian:12": "bookworm", "debian:13": "trixie"}
ARCHITECTURE = subprocess.run(["dpkg", "--print-architecture"], check=True, capture_output=True, text=True).stdout.strip()
ELF_MACHINES = {"amd64": 62, "arm64": 183}
report = []


def say(text):
    print(text, flush=True)
    report.append(text)


class Unable(Exception):
    """This machine cannot do a step."""


def sources_of_host():
    """Lines of sources.list: the Debian repositories that this machine's apt uses, under the names of their releases."""
    lines = subprocess.run(["apt-get", "indextargets", "--format", "deb $(REPO_URI) $(RELEASE) $(COMPONENT)", "Created-By: Packages", "Origin: Debian"],
                           check=True, capture_output=True, text=True).stdout.split("\n")
    return sorted({line for line in lines if line})


BINFMT = pathlib.Path("/proc/sys/fs/binfmt_misc")


def emulate(architecture):
    """The kernel starts QEMU for programs of `architecture`, in every root. What takes that back."""
    name = {"arm64": "qemu-aarch64"}.get(architecture)
    if name is None:
        raise Unable(f"programs for {architecture} cannot be run on {ARCHITECTURE}")
    if not (BINFMT / "register").exists():
        subprocess.run(["mount", "-t", "binfmt_misc", "binfmt_misc", str(BINFMT)], capture_output=True)
    if not (BINFMT / "register").exists():
        raise Unable(f"programs for {architecture}: the kernel has no binfmt_misc")
    if (BINFMT / name).exists():
        known = (BINFMT / name).read_text()
        if not re.search(r"^flags: \S*F", known, re.M):
            raise Unable(f"{name} is registered without the flag F: in a root its interpreter is not found")
        return lambda: None
    # The distribution's line: magic bytes, a program that needs no libraries, flag F (opened now, so that no root has to hold it).
    (BINFMT / "register").write_text(pathlib.Path(f"/usr/lib/binfmt.d/{name}.conf").read_text().strip())
    return lambda: (BINFMT / name).write_text("-1")


def make_base(image, architecture, folder):
    """A root of the image's release."""
    complete = folder.with_name(folder.name + ".complete")
    if complete.exists():
        return
    release = RELEASES.get(image)
    if release is None:
        raise Unable(f"no root can be made of {image}; known: {', '.join(RELEASES)}")
    sources = [line for line in sources_of_host() if line.split()[2].split("-")[0] == release]
    mirrors = [line.split()[1] for line in sources if line.split()[2] == release]
    if not mirrors:
        raise Unable(f"apt of this machine knows no repository of {release}")
    shutil.rmtree(folder, ignore_errors=True)
    made = subprocess.run(["debootstrap", "--variant=minbase", f"--arch={architecture}", release, str(folder), mirrors[0]], capture_output=True, text=True)
    if made.returncode != 0:
        raise Unable(f"debootstrap of {release}: {(made.stdout + made.stderr).strip().splitlines()[-1]}")
    (folder / "etc/apt/sources.list").write_text("\n".join(sources) + "\n")
    # The way of this machine to its repositories, as a container engine would lend it.
    for path in sorted(pathlib.Path("/etc/apt/apt.conf.d").iterdir()):
        if re.search(r"Acquire::", path.read_text()):
            shutil.copy(path, folder / "etc/apt/apt.conf.d" / path.name)
    complete.touch()


class Root:
    """The file system of a stage, and what its instructions have set."""

    def __init__(self, folder):
        self.folder = folder
        self.environment = {"PATH": PATH, "HOME": "/root"}
        self.arguments = {}  # of the build alone
        self.workdir = "/"
        self.user = "0:0"
        self.entry, self.command, self.health, self.ports = [], [], None, []

    def inside(self, path):
        return self.folder / os.path.join(self.workdir, path).lstrip("/")

    def shell(self, words, lent):
        """The words in the root: with /proc, /dev and the machine's names of hosts, in its own processes and mounts."""
        mounts = [f"mount -t proc proc {self.folder}/proc", f"mount --rbind /dev {self.folder}/dev", f"mount --bind /etc/resolv.conf {self.folder}/etc/resolv.conf"]
        for there, here in lent.items():
            (self.folder / there.lstrip("/")).mkdir(parents=True, exist_ok=True)
            mounts.append(f"mount --bind {here} {self.folder}{there}")
        (self.folder / "etc/resolv.conf").touch()
        script = " && ".join(mounts) + f' && exec chroot --userspec={self.user} {self.folder} /bin/sh -c \'cd "$0" && exec "$@"\' "$@"'
        return ["unshare", "--mount", "--pid", "--fork", "--kill-child", "/bin/sh", "-ec", script, "sh", self.workdir, *words]

    def run(self, text, lent, environment):
        log = self.folder.with_suffix(".log")
        with log.open("a") as out:
            done = subprocess.run(self.shell(["/bin/sh", "-c", text], lent), stdout=out, stderr=subprocess.STDOUT, env={**self.environment, **environment})
        if done.returncode != 0:
            raise RuntimeError(f"RUN {text[:100]}: exit code {done.returncode}\n" + "\n".join(log.read_text().splitlines()[-30:]))

    def copy(self, origin, sources, target, paths=None):
        """COPY: files to a name or into a folder; of folders, what is in them."""
        to = self.inside(target)
        found = [match for source in sources for match in (sorted(origin.glob(source.lstrip("/"))) if "*" in source else [origin / source.lstrip("/")])]
        if not found:
            raise FileNotFoundError(f"COPY: nothing is called {' '.join(sources)}")
        for at in found:
            source = str(at.relative_to(origin))
            if not at.exists():
                raise FileNotFoundError(f"COPY: there is no {source}")
            if not at.is_dir():
                into = target.endswith("/") or len(found) > 1 or to.is_dir()
                (to if into else to.parent).mkdir(parents=True, exist_ok=True)
                shutil.copy2(at, to / at.name if into else to)
                continue
            files = [p.relative_to(source) for p in paths if p.is_relative_to(source)] if paths is not None else [p.relative_to(at) for p in sorted(at.rglob("*"))]
            for path in files:
                place = to / path
                if (at / path).is_symlink():
                    place.unlink(missing_ok=True)
                    place.parent.mkdir(parents=True, exist_ok=True)
                    place.symlink_to(os.readlink(at / path))
                elif (at / path).is_dir():
                    place.mkdir(parents=True, exist_ok=True)
                else:
                    place.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy2(at / path, place)


def build(repository, work, stage, roots, lent, environment):
    """The root of a stage, its instructions run in order."""
    base = roots.get(stage.base)
    if base is None:
        architecture = stage.platform.removeprefix("linux/")
        folder = work / "base" / f"{re.sub(r'[^a-z0-9]', '_', stage.base)}_{architecture}"
        begin = time.monotonic()
        make_base(stage.base, architecture, folder)
        say(f"FROM {stage.base} for {stage.platform}: a root by debootstrap, {time.monotonic() - begin:.0f} s")
    else:
        folder = base.folder
    root = Root(work / f"stage{len(roots)}")
    shutil.rmtree(root.folder, ignore_errors=True)
    root.folder.with_suffix(".log").unlink(missing_ok=True)
    subprocess.run(["cp", "-a", str(folder), str(root.folder)], check=True)
    files = dockerfile.context(repository, repository / "deploy/Dockerfile.dockerignore")
    for instruction in stage.instructions:
        begin = time.monotonic()
        name, text = instruction.name, instruction.text
        if name == "RUN":
            root.run(text, lent, {**root.arguments, **environment})
        elif name == "ARG":
            key, _, value = text.partition("=")
            root.arguments[key] = value
        elif name == "COPY":
            stage_name, sources, target = dockerfile.copied(text)
            if stage_name:
                root.copy(roots[stage_name].folder, sources, target)
            else:
                root.copy(repository, sources, target, files)
        elif name == "WORKDIR":
            root.workdir = os.path.join(root.workdir, text)
            root.inside("").mkdir(parents=True, exist_ok=True)
        elif name == "ENV":
            key, _, value = text.partition("=")
            root.environment[key] = value
        elif name == "USER":
            root.user = text
        elif name == "EXPOSE":
            root.ports = text.split()
        elif name == "ENTRYPOINT":
            root.entry = dockerfile.words(text)
        elif name == "CMD":
            root.command = dockerfile.words(text)
        elif name == "HEALTHCHECK":
            settings, command = dockerfile.options(text)
            root.health = (settings, dockerfile.words(command.removeprefix("CMD").strip()))
        else:
            raise ValueError(f"line {instruction.line}: {name} is not known inside a stage")
        say(f"{str(instruction)[:100]}: done, {time.monotonic() - begin:.0f} s")
    return root


class Container:
    """The entry point in a root: its own mounts, processes and network, as `docker run` gives it."""

    def __init__(self, root):
        self.root = root
        words = root.shell([*root.entry, *root.command], {})
        # A network of its own, with nothing but itself.
        words[1:1] = ["--net"]
        words[words.index("-ec") + 1] = "ip link set lo up && " + words[words.index("-ec") + 1]
        self.log = root.folder.parent / "container.log"
        self.process = subprocess.Popen(words, stdout=self.log.open("w"), stderr=subprocess.STDOUT, env=root.environment)
        self.pid = None
        for _ in range(100):
            children = pathlib.Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
            if children and pathlib.Path(f"/proc/{children[0]}/comm").read_text().strip() == os.path.basename(root.entry[0])[:15]:
                self.pid = int(children[0])
                break
            time.sleep(0.1)
        if self.pid is None:
            raise RuntimeError(f"the entry point did not start: {self.log.read_text()[-2000:]}")

    def execute(self, words, timeout=120):
        """As `docker exec`: the image's user and environment, the container's namespaces."""
        command = ["nsenter", "--target", str(self.pid), "--mount", "--pid", "--net", "chroot", f"--userspec={self.root.user}", str(self.root.folder), *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=self.root.environment)

    def stop(self):
        """SIGTERM to the entry point; its exit code."""
        os.kill(self.pid, signal.SIGTERM)
        try:
            return self.process.wait(10)  # as long as `docker stop` waits
        except subprocess.TimeoutExpired:
            self.kill()
            return "killed after 10 s"

    def kill(self):
        self.process.kill()
        self.process.wait()


def check_programs(root, architecture):
    """They are of the image's architecture and stripped, and dpkg knows them and finds them as they were packed."""
    for program in ("usr/bin/kvtided", "usr/bin/kvtide"):
        head = (root.folder / program).read_bytes()[:20]
        assert head[:4] == b"\x7fELF" and int.from_bytes(head[18:20], "little") == ELF_MACHINES[architecture], f"{program} is not for {architecture}"
        sections = subprocess.run(["readelf", "--section-headers", "--wide", str(root.folder / program)], check=True, capture_output=True, text=True).stdout
        assert ".text" in sections and ".symtab" not in sections and ".debug" not in sections, f"{program} is not stripped"
    dpkg = ["dpkg-query", f"--admindir={root.folder}/var/lib/dpkg"]
    package = subprocess.run([*dpkg, "--show", "--showformat=${Package} ${Version} ${Architecture}, ${Status}", "kvtide"], capture_output=True, text=True).stdout
    assert package.endswith(f" {architecture}, install ok installed"), f"the package: {package!r}"
    wrong = subprocess.run(["dpkg", f"--root={root.folder}", "--verify", "kvtide"], capture_output=True, text=True)
    assert wrong.returncode == 0 and not wrong.stdout.strip(), f"not as they were packed: {wrong.stdout}{wrong.stderr}"
    say(f"{package}; its programs are for {architecture}, stripped")


def check_image(root, architecture):
    """What the final stage promises; raises AssertionError with what it does not."""
    health, asked = root.health
    user, group = (int(n) for n in root.user.split(":"))
    assert user != 0 and group != 0, "the image runs as root"
    for program in ("cc", "g++", "cmake", "git"):
        found = [p for p in ("usr/bin", "bin", "usr/local/bin") if (root.folder / p / program).exists()]
        assert not found, f"the image has {program}: it ships its build stage"
    check_programs(root, architecture)
    container = Container(root)
    try:
        begin = time.monotonic()
        while (answer := container.execute(asked, dockerfile.seconds(health["timeout"]))).returncode != 0:
            assert container.process.poll() is None, f"the entry point ended: {container.log.read_text()[-2000:]}"
            assert time.monotonic() - begin < dockerfile.seconds(health["start-period"]), f"not healthy in its start period: {answer.stderr}"
            time.sleep(0.2)
        say(f"HEALTHCHECK {' '.join(asked)}: healthy {time.monotonic() - begin:.1f} s after the start")
        status = pathlib.Path(f"/proc/{container.pid}/status").read_text()
        owner = re.search(r"^Uid:\t(\d+)\t(\d+)", status, re.M).groups()
        assert owner == (str(user), str(user)), f"the entry point runs as {owner}"
        address = asked[asked.index("--address") + 1]
        bench = container.execute(["kvtide", "bench", "--address", address, "--seconds", "2", "--no-progress", "--output", "json"])
        assert bench.returncode == 0, f"kvtide bench: {bench.stderr}"
        rows = [r for r in json.loads(bench.stdout)["results"] if r["part"] != "roofline" and r["samples"] > 0]
        ways = sorted({r["subject"] for r in rows if r["part"] == "way"})
        tiers = sorted({r["subject"] for r in rows if r["part"] == "tier"})
        assert ways and tiers, f"nothing was served: {bench.stdout}"
        say(f"served {sum(r['samples'] for r in rows)} requests of kvtide bench as user {user}: by {', '.join(ways)}; tiers {', '.join(tiers)}")
        for port in root.ports:
            scrape = container.execute(["/bin/bash", "-c", f"exec 3<>/dev/tcp/127.0.0.1/{port} && printf 'GET /metrics HTTP/1.0\\r\\n\\r\\n' >&3 && cat <&3"])
            assert "kvtide_build_info" in scrape.stdout, f"no metrics at port {port}: {scrape.stdout[:200]} {scrape.stderr}"
            say(f"EXPOSE {port}: {scrape.stdout.count('kvtide_')} lines of metrics")
        status = container.execute(["kvtide", "status", "--address", address, "--output", "json"])
        assert status.returncode == 0 and json.loads(status.stdout), f"kvtide status: {status.stdout[-500:]}{status.stderr}"
        demo = container.execute(["kvtide", "demo", "--context", "1024", "--generate", "16", "--no-progress", "--output", "json"], 900)
        assert demo.returncode == 0 and json.loads(demo.stdout), f"kvtide demo: {demo.stdout[-2000:]}{demo.stderr[-2000:]}"
        say("kvtide demo: the bundled model, its keys and values in a daemon of its own: done")
        code = container.stop()
        assert code == 0, f"SIGTERM: {code}, {container.log.read_text()[-2000:]}"
        say("stopped by SIGTERM: exit code 0")
        assert not (root.folder / address.removeprefix("unix:").lstrip("/")).exists(), "the socket was left behind"
    finally:
        container.kill()


def self_test(repository):
    text = (repository / "deploy/Dockerfile").read_text()
    found = dockerfile.stages(text)
    assert [s.base for s in found] == ["debian:12", "debian:12"] and found[0].name == "build", found
    assert [s.base for s in dockerfile.stages(text, {"RUN_IMAGE": "ubuntu:24.04"})] == ["debian:12", "ubuntu:24.04"]
    crossed = dockerfile.stages(text, target="linux/arm64")
    assert [s.platform for s in crossed] == ["linux/amd64", "linux/arm64"], "the image for arm64 is not built by this machine's own compiler"
    assert any(i.name == "ARG" and i.text == "TARGETARCH=arm64" for i in crossed[0].instructions), crossed[0]
    inside = dockerfile.stages("ARG A=1\nFROM a\nARG A\nARG B=2\nRUN $A$B", {"B": "3"})[0].instructions
    assert [i.text for i in inside] == ["A=1", "B=3", "$A$B"], inside
    names = [i.name for s in found for i in s.instructions]
    assert {"RUN", "COPY", "WORKDIR", "USER", "ENV", "HEALTHCHECK", "ENTRYPOINT", "CMD"} <= set(names), names
    run = next(i for i in found[1].instructions if "groupadd" in i.text)
    assert "&& apt-get install" in run.text and "\\" not in run.text, run
    files = {str(p) for p in dockerfile.context(repository, repository / "deploy/Dockerfile.dockerignore")}
    assert "CMakeLists.txt" in files and not any(f.startswith(("build/", ".git/")) for f in files)
    for instruction in (i for s in found for i in s.instructions if i.name == "COPY"):
        origin, sources, _ = dockerfile.copied(instruction.text)
        for source in sources if not origin else ():
            assert (repository / source).exists(), f"COPY of {source}, which is not there"
    for wrong in ("RUN x", "FROM a\nVOLUME /x", "FROM a\nRUN x \\", "FROM ${NOTHING}", "FROM --what=x a", "FROM a\nARG NOTHING"):
        try:
            dockerfile.stages(wrong)
        except ValueError:
            continue
        raise AssertionError(f"taken: {wrong!r}")
    print("deploy/Dockerfile is understood: " + ", ".join(f"{len(s.instructions)} steps on {s.base}" for s in found))


def ccache_folder():
    if shutil.which("ccache") is None:
        return None
    return subprocess.run(["ccache", "--get-config", "cache_dir"], check=True, capture_output=True, text=True).stdout.strip()


def hits(folder):
    """How many compilations the cache has answered, and how many there were."""
    if folder is None:
        return 0, 0
    counts = dict(line.split("\t") for line in subprocess.run(["ccache", "--print-stats"], check=True, capture_output=True, text=True).stdout.splitlines())
    hit = int(counts["direct_cache_hit"]) + int(counts["preprocessed_cache_hit"])
    return hit, hit + int(counts["cache_miss"])


def write_report(file, command, lines):
    """Replaces what the file says of this command; what it says of others stays."""
    others = [part for part in file.read_text().strip().split("\n\n") if not part.startswith(f"{command},")] if file.exists() else []
    file.write_text("\n\n".join(sorted([*others, "\n".join(lines)])) + "\n")


def main():
    if sys.argv[1] == "--self-test":
        return self_test(pathlib.Path(sys.argv[2]).resolve())
    repository, work = (pathlib.Path(a).resolve() for a in sys.argv[1:3])
    record, keep, target = "--record" in sys.argv, "--keep" in sys.argv, f"linux/{ARCHITECTURE}"
    command = "tests/run.sh image"
    if "--platform" in sys.argv:
        target = sys.argv[sys.argv.index("--platform") + 1]
        command += f" --platform {target}"
    architecture = target.removeprefix("linux/")
    if os.geteuid() != 0:
        print("image_test.py: chroot and namespaces need root")
        return 77
    work.mkdir(parents=True, exist_ok=True)
    cache, code, begin = ccache_folder(), 0, time.monotonic()
    # As .ci/run and tests/run.sh have it, so that objects of other folders are found.
    lent = {"/ccache": cache} if cache else {}
    environment = {"CCACHE_DIR": "/ccache", "CCACHE_BASEDIR": "/src", "CCACHE_NOHASHDIR": "1"} if cache else {}
    roots, alone = {}, lambda: None
    try:
        if architecture != ARCHITECTURE:
            alone = emulate(architecture)
        before = hits(cache)
        text = (repository / "deploy/Dockerfile").read_text()
        for number, stage in enumerate(dockerfile.stages(text, machine=f"linux/{ARCHITECTURE}", target=target)):
            last = roots[stage.name or str(number)] = build(repository, work, stage, roots, lent if number == 0 else {}, environment if number == 0 else {})
        hit, calls = (now - then for now, then in zip(hits(cache), before))
        say(f"compiler's cache: {hit} of {calls} compilations" if cache else "no ccache: everything was compiled")
        size = int(subprocess.run(["du", "-sm", "--one-file-system", str(last.folder)], check=True, capture_output=True, text=True).stdout.split()[0])
        say(f"the image's root: {size} MiB")
        check_image(last, architecture)
        say(f"all steps done, {time.monotonic() - begin:.0f} s")
    except Unable as why:
        say(f"not executed on this machine: {why}")
        code = 77
    except (AssertionError, OSError, ValueError, RuntimeError, subprocess.SubprocessError) as error:
        say(f"FAILED: {error}")
        code = 1
    finally:
        alone()
    if record:
        commit = subprocess.run(["git", "-C", str(repository), "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
        head = f"{command}, {time.strftime('%Y-%m-%d', time.gmtime())}, commit {commit}, {os.cpu_count()} cores that others shared"
        write_report(repository / "tests/deploy/last_run.txt", command, [head, *report])
    if not keep:
        for folder in work.glob("stage*"):
            shutil.rmtree(folder, ignore_errors=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
