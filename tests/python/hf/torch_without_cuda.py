#!/usr/bin/env python3
"""Makes a PyPI (CUDA) torch wheel installed with --no-deps importable without the nvidia-* wheels.

For every shared library that torch/lib/*.so needs and that is neither there nor on the system, writes a stub
with the same SONAME, the needed version nodes and the undefined symbols (all return cudaErrorNoDevice=100).
Usage: torch_without_cuda.py SITE_PACKAGES   (needs gcc, readelf). Install nvidia-cuda-runtime (2 MB) first:
a stubbed libcudart crashes in cudaGetErrorString, the real one answers "no device". Use only on machines without a GPU.
"""
import collections, glob, os, re, subprocess, sys

lib = os.path.join(sys.argv[1], "torch", "lib")
run = lambda *a: subprocess.run(a, capture_output=True, text=True, check=True).stdout
for o in glob.glob(lib + "/*.stub"): os.remove(o[:-5]); os.remove(o)  # of an earlier run
objects = sorted(glob.glob(lib + "/*.so*")) + glob.glob(os.path.join(sys.argv[1], "torch", "_C*.so"))
have = {os.path.basename(o) for o in glob.glob(lib + "/*.so*") + glob.glob(os.path.join(sys.argv[1], "nvidia/*/lib/*.so*"))} | {m[0] for m in re.findall(r"^\s+(\S+) \(.*=> (\S+)", run("/sbin/ldconfig", "-p"), re.M) if "cuda" not in m[1]}
users, needs, missing, nodes, undefined, defined = collections.defaultdict(set), {}, {}, collections.defaultdict(set), collections.defaultdict(set), set()
for o in objects:
    needs[o] = re.findall(r"NEEDED.*\[(.*)\]", run("readelf", "-dW", o))
    for need in needs[o]:
        if need not in have:
            missing.setdefault(need, o)
    file = None
    for line in run("readelf", "-VW", o).splitlines():
        if m := re.search(r"File: (\S+)", line): file = m[1]
        elif (m := re.search(r"Name: (\S+)", line)) and file: nodes[file].add(m[1])
    for line in run("readelf", "--dyn-syms", "-W", o).splitlines():
        f = line.split()
        if len(f) < 8 or not f[0][:-1].isdigit(): continue
        name, _, ver = f[7].partition("@")
        if f[6] == "UND":
            if f[4] != "WEAK": undefined[name].add(ver.lstrip("@").split(" ")[0]); users[name].add(o)
        else: defined.add(name)
sysdefined = set()
for s in ("libc.so.6", "libm.so.6", "libstdc++.so.6", "libgcc_s.so.1", "libdl.so.2", "libpthread.so.0", "librt.so.1", "ld-linux-x86-64.so.2"):
    for d in ("/lib/x86_64-linux-gnu/", "/usr/lib/x86_64-linux-gnu/", "/lib64/"):
        if os.path.exists(d + s):
            for line in run("readelf", "--dyn-syms", "-W", d + s).splitlines():
                f = line.split()
                if len(f) >= 8 and f[6] != "UND": sysdefined.add(f[7].partition("@")[0])
            break
loose = [n for n, v in undefined.items() if v == {""} and n not in defined and n not in sysdefined and not n.startswith(("Py", "_Py"))]
ver_owner = {v: so for so in missing for v in nodes.get(so, ())}
for i, so in enumerate(sorted(missing)):
    groups = collections.defaultdict(list)
    for n, vs in undefined.items():
        for v in vs:
            if ver_owner.get(v) == so: groups[v].append(n)
    groups[""] += [n for n in loose if any(so in needs[o] for o in users[n])]  # several stubs may define it: the first wins
    c, script, seen = [], [], set()
    for v in sorted(set(groups) | set(nodes.get(so, ()))):
        names = [n for n in groups[v] if n not in seen]; seen.update(names)
        c += [f"int {n}() {{ return 100; }}" for n in names]
        if v: script.append(f"{v} {{ {'global: ' + '; '.join(names) + ';' if names else ''} }};")
    src, vs = f"/tmp/stub_{so}.c", f"/tmp/stub_{so}.map"
    open(src, "w").write("\n".join(c) + "\n"); open(vs, "w").write("\n".join(script) + "\n")
    cmd = ["gcc", "-w", "-fno-builtin", "-shared", "-fPIC", "-O0", f"-Wl,-soname,{so}", "-o", os.path.join(lib, so), src]
    if script: cmd.insert(4, f"-Wl,--version-script={vs}")
    subprocess.run(cmd, check=True)
    open(os.path.join(lib, so + ".stub"), "w").close()
    print(so, "symbols", len(seen), "nodes", len(script))
print("loose symbols", len(loose))
