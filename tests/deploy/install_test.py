#!/usr/bin/env python3
"""What `cmake --install` and cpack put in place works together, and the manifests keep what they promise.

usage: install_test.py REPOSITORY BUILD [WORDS ...]

WORDS start a program of a build for another architecture, such as qemu-aarch64 -L FOLDER.
Installs the build into a folder of its own and makes the Debian package of it; checks that the unit names programs and files that
are there, that the user it runs as is declared, that a configuration which exists is left alone and is accepted by kvtided; that
no manifest or image listens on TCP without being asked, that the sidecar's socket can be opened by its engine, and that what
kustomize renders is complete. Tools that are missing (kubectl, systemd-analyze, dpkg-deb) leave their part out, and the output says so.
"""
import gzip
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

complaints = []
emulator = []


def check(condition, text):
    if not condition:
        complaints.append(text)


def run(*command, **options):
    return subprocess.run([str(c) for c in command], check=True, capture_output=True, text=True, **options)


def start(program, *words):
    """The output of an installed program, whatever architecture it is for."""
    return run(*emulator, program, *words).stdout


def missing(program, what):
    if shutil.which(program):
        return False
    print(f"{program} is not there: {what} not checked")
    return True


def check_unit(text, root):
    """`root` holds the installed tree as it would lie in /."""
    start = re.search(r"^ExecStart=(\S+) --config (\S+) --listen (\S+)$", text, re.M)
    check(start, "the unit's ExecStart is not understood")
    check((root / start.group(1).lstrip("/")).is_file(), f"the unit starts {start.group(1)}, which is not installed")
    config = root / start.group(2).lstrip("/")
    check(config.is_file(), f"the unit reads {start.group(2)}, which is not installed")
    for key in ("User", "Group"):
        user = re.search(rf"^{key}=(\S+)$", text, re.M).group(1)
        declared = "".join(p.read_text() for p in root.rglob("sysusers.d/*.conf"))
        check(re.search(rf"^u {user} ", declared, re.M), f"the unit's {key} {user} is created by nothing")
    for directive in ("WatchdogSec=", "ExecReload="):
        check(directive in text, f"the unit has no {directive}")
    check("MemoryMax=" in text or "OOMScoreAdjust=-" not in text, "the unit hides from the OOM killer without a bound of its own")
    return root / start.group(1).lstrip("/"), config


def check_exposure(unit):
    """The unit's restrictions stay: systemd scores what a service could still do, 0 to 10; this one has 1.9."""
    if missing("systemd-analyze", "the unit's exposure"):
        return
    analysis = subprocess.run(["systemd-analyze", "security", "--offline=true", "--no-pager", "--threshold=20", str(unit)], capture_output=True, text=True)
    check(analysis.returncode == 0, f"the unit is exposed more than 2.0: {(analysis.stdout + analysis.stderr).strip().splitlines()[-1:]}")


def check_manual(root):
    for path, words in (("man1/kvtide.1.gz", (".SS config check", ".SS seq list")), ("man8/kvtided.8.gz", ("host\\-memory", "KVTIDE_QUOTA"))):
        pages = list(root.rglob(path))
        check(len(pages) == 1, f"{path} is not installed")
        for word in words if pages else ():
            check(word in gzip.decompress(pages[0].read_bytes()).decode(), f"{path} does not mention {word}")


def check_install(build, work):
    root = work / "root"
    run("cmake", "--install", build, "--prefix", "/usr", "--component", "Unspecified", env={"DESTDIR": str(root), "PATH": "/usr/bin:/bin:/usr/local/bin"})
    units = list(root.rglob("kvtided.service"))
    check(len(units) == 1, f"{len(units)} units are installed")
    for program, word in (("kvtide", "plan"), ("kvtided", "host-memory")):
        for path in (f"bash-completion/completions/{program}", f"zsh/vendor-completions/_{program}", f"fish/vendor_completions.d/{program}.fish"):
            scripts = list(root.rglob(path))
            check(len(scripts) == 1 and word in scripts[0].read_text(), f"{path} is not installed")
    check_manual(root)
    for path in ("prometheus/rules.yml", "grafana/dashboards/kvtide.json", "kustomize/base/sidecar.yaml", "compose/compose.yaml"):
        check(list(root.rglob(f"kvtide/deploy/{path}")), f"{path} is not installed")
    return units[0], root


def check_package(build, work):
    if missing("dpkg-deb", "the package") or missing("dpkg-shlibdeps", "the package"):
        return
    out = work / "package"
    # Stripping takes its time; where it needs another strip than this machine's it is looked at.
    run("cpack", "-G", "DEB", "-B", out, "-D", f"CPACK_STRIP_FILES={'ON' if emulator else 'OFF'}", cwd=build)
    packages = list(out.glob("*.deb"))
    check(len(packages) == 1, f"{len(packages)} packages")
    root = work / "unpacked"
    run("dpkg-deb", "-x", packages[0], root)
    fields = run("dpkg-deb", "-f", packages[0], "Package", "Version", "Depends").stdout
    check("libgrpc++" in fields and "libjemalloc" in fields and "libc6" in fields, f"the package depends on too little: {fields}")
    check_architecture(packages[0], root)
    files = run("dpkg-deb", "-c", packages[0]).stdout
    check("/usr/lib/cmake" not in files and ".a\n" not in files, "the package holds the client library's development files")
    check_manual(root)
    unit = root / "usr/lib/systemd/system/kvtided.service"
    check(unit.is_file(), "the package has no unit")
    program, config = check_unit(unit.read_text(), root)
    check_exposure(unit)
    check_installed_and_removed(packages[0], work)
    version = start(program, "--version")
    check(version.startswith("kvtided "), f"the packaged program says {version!r}")
    printed = json.loads(start(program, "--config", config, "--print-config"))
    check(all(l.startswith("unix:") for l in printed["listen"]), f"the first configuration listens on {printed['listen']}")
    work_control = work / "control"
    run("dpkg-deb", "-e", packages[0], work_control)
    check((work_control / "conffiles").read_text().split() == ["/etc/kvtide/kvtided.json"], "the configuration is not a conffile")
    for script in ("postinst", "prerm", "postrm"):
        run("sh", "-n", work_control / script)
    if not missing("systemd-analyze", "the unit's syntax"):
        # The installed paths do not exist here: only what the unit itself says is looked at.
        text = unit.read_text().replace(f"ExecStart=/usr/bin/kvtided", f"ExecStart={program}")
        copy = work / "kvtided.service"
        copy.write_text(text)
        verified = subprocess.run(["systemd-analyze", "verify", "--man=no", str(copy)], capture_output=True, text=True)
        bad = [l for l in verified.stderr.splitlines() if str(copy) in l or "Unknown" in l]
        check(not bad, f"systemd-analyze: {bad}")


def check_architecture(package, root):
    """The package is of the architecture of its programs; those of another one are stripped all the same."""
    architecture = run("dpkg-deb", "-f", package, "Architecture").stdout.strip()
    check(package.name.endswith(f"_{architecture}.deb"), f"{package.name} is of the architecture {architecture}")
    for program in ("kvtide", "kvtided"):
        path = root / "usr/bin" / program
        machine = int.from_bytes(path.read_bytes()[18:20], "little")  # of the ELF header
        check(machine == {"amd64": 62, "arm64": 183}.get(architecture, machine), f"{program} in a package for {architecture} is for machine {machine}")
        if emulator and not missing("readelf", "whether programs are stripped"):
            check(".symtab" not in run("readelf", "--section-headers", "--wide", path).stdout, f"{program} is not stripped")


def check_installed_and_removed(package, work):
    """dpkg itself installs the package into a root of its own, removes it and purges it."""
    if missing("dpkg", "install and removal"):
        return
    if os.geteuid() != 0:
        print("not root: install and removal by dpkg not checked")
        return
    root = work / "machine"
    for folder in ("var/lib/dpkg/info", "var/lib/dpkg/updates", "etc", "var/log"):
        (root / folder).mkdir(parents=True)
    for name in ("var/lib/dpkg/status", "etc/passwd", "etc/group", "etc/shadow", "etc/gshadow"):
        (root / name).touch()
    mine, its = run("dpkg", "--print-architecture").stdout.strip(), run("dpkg-deb", "-f", package, "Architecture").stdout.strip()
    if its != mine:
        (root / "var/lib/dpkg/arch").write_text(f"{mine}\n{its}\n")

    def dpkg(*words):
        # The packages that it depends on are this machine's; scripts run here, with DPKG_ROOT.
        done = subprocess.run(["dpkg", f"--root={root}", "--force-depends", "--force-script-chrootless", "--force-confold", *words],
                              capture_output=True, text=True)
        check(done.returncode == 0, f"dpkg {words[0]}: {(done.stdout + done.stderr).strip().splitlines()[-3:]}")
        return done.stdout + done.stderr

    said = dpkg("--install", str(package))
    check("systemctl enable --now kvtided" in said, f"the first install does not say what to do next: {said}")
    check((root / "usr/bin/kvtided").is_file() and (root / "usr/share/man/man8/kvtided.8.gz").is_file(), "dpkg installs too little")
    users = [l for l in (root / "etc/passwd").read_text().splitlines() if l.startswith("kvtide:")]
    check(len(users) == 1 and users[0].endswith("nologin"), f"the user kvtide: {users}")
    check("kvtide:" in (root / "etc/group").read_text(), "no group kvtide")
    config = root / "etc/kvtide/kvtided.json"
    config.write_text(config.read_text().replace("1GiB", "3GiB"))
    again = dpkg("--install", str(package))
    check("3GiB" in config.read_text(), "an upgrade overwrites the configuration")
    check("enable --now" not in again, "an upgrade says what a first install does")
    start(root / "usr/bin/kvtide", "config", "check", "--config", config)
    dpkg("--remove", "kvtide")
    check(not (root / "usr/bin/kvtided").exists() and not list(root.rglob("kvtided.service")), "a removal leaves the program")
    check(config.is_file(), "a removal takes the configuration")
    dpkg("--purge", "kvtide")
    left = [str(p.relative_to(root)) for p in root.rglob("*kvtide*") if "var/" not in str(p.relative_to(root))]
    check(not left, f"a purge leaves {left}")


def check_kept(build, work):
    """A second install leaves a changed configuration alone."""
    root = work / "kept"
    config = root / "etc/kvtide/kvtided.json"
    config.parent.mkdir(parents=True)
    config.write_text("mine")
    run("cmake", "--install", build, "--prefix", "/usr", "--component", "Unspecified", env={"DESTDIR": str(root), "PATH": "/usr/bin:/bin:/usr/local/bin"})
    check(config.read_text() == "mine", "an install overwrites the configuration")


def check_manifests(repository):
    deploy = repository / "deploy"
    for path in list(deploy.rglob("*.yaml")) + list(deploy.rglob("kvtided.json")) + [deploy / "Dockerfile"]:
        text = path.read_text()
        check("0.0.0.0:7600" not in text, f"{path.name} opens the API, which has no authentication, to the network")
    image = (deploy / "Dockerfile").read_text()
    check("HEALTHCHECK" in image and re.search(r"^USER (\d+):\1$", image, re.M), "the image has no health check or runs as root")
    user = re.search(r"^USER (\d+)", image, re.M).group(1)
    check(re.search(r"^FROM \$\{RUN_IMAGE\}$", image, re.M), "the image that runs is the one that builds")
    if missing("kubectl", "what kustomize renders"):
        return
    for overlay in ("base", "gpu", "monitoring", "node"):
        rendered = run("kubectl", "kustomize", deploy / "kustomize" / overlay).stdout
        golden = repository / "tests/deploy/golden" / f"{overlay}.yaml"
        check(rendered == golden.read_text(), f"{overlay} renders something else than {golden.name}: kubectl kustomize deploy/kustomize/{overlay}")
        kinds = re.findall(r"^kind: (\w+)$", rendered, re.M)
        check({"DaemonSet" if overlay == "node" else "Deployment", "ConfigMap", "NetworkPolicy"} <= set(kinds), f"{overlay} renders {kinds}")
        check(f"runAsUser: {user}" in rendered, f"{overlay}: kvtided is not uid {user}")
        check(overlay == "node" or f"fsGroup: {user}" in rendered, f"{overlay}: the engine cannot open the socket of uid {user}")
        check(("nvidia" in rendered) == (overlay == "gpu"), f"{overlay}: GPU wiring")
        check(("PodMonitor" in kinds) == (overlay == "monitoring"), f"{overlay}: {kinds}")
        grace = int(re.search(r"terminationGracePeriodSeconds: (\d+)", rendered).group(1))
        drain = int(re.search(r'"shutdown_seconds": (\d+)', rendered).group(1))
        check(grace > drain, f"{overlay}: {grace} s of grace, the daemon drains {drain} s")


def main():
    repository, build = (pathlib.Path(p).resolve() for p in sys.argv[1:3])
    emulator.extend(sys.argv[3:])
    with tempfile.TemporaryDirectory() as folder:
        work = pathlib.Path(folder)
        unit, root = check_install(build, work)
        check_unit(unit.read_text(), root)
        check_kept(build, work)
        check_package(build, work)
    check_manifests(repository)
    for line in complaints:
        print(line)
    print(f"{len(complaints)} complaints")
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
