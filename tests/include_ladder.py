#!/usr/bin/env python3
"""The layers of kvtide as a test: reads every include and fails on one that is not in the ladder.

    base <- format <- kernels <- cpu | cuda          format <- planner
    kernels <- daemon/cache <- daemon/calibrate | daemon/metrics | daemon/disk | daemon/remote | daemon/trace <- daemon main
    daemon/calibrate <- daemon/service <- daemon main
    format <- daemon/ring <- daemon/service, clients/cpp
    planner <- daemon/service, daemon main, clients/engine, clients/cli       proto <- daemon/service, clients
    daemon main (its settings) <- clients/cli

It also keeps third-party words where they belong: CUDA in kernels/cuda, gRPC and protobuf out of the cache, Prometheus in
daemon/metrics, no clock but the injected one in the cache, copies that nobody waits for out of everything. Inside a layer its
rooms (folders) have a ladder of their own; files beside the rooms may include all of them, and rooms none of those.

usage: include_ladder.py REPOSITORY
       include_ladder.py --self-test     proves that a forbidden include is found
"""
import pathlib
import re
import sys

# layer -> the other layers that it may include. A layer is the longest matching folder.
LADDER = {
    "kernels/base": set(),
    "kernels/format": {"kernels/base"},
    "kernels": {"kernels/base", "kernels/format"},
    "kernels/cpu": {"kernels/base", "kernels/format", "kernels"},
    "kernels/cuda": {"kernels/base", "kernels/format", "kernels"},
    "planner": {"kernels/base", "kernels/format"},
    "proto": {"kernels/base"},
    "daemon/cache": {"kernels/base", "kernels/format", "kernels"},
    "daemon/calibrate": {"kernels/base", "kernels/format", "daemon/cache"},
    "daemon/disk": {"kernels/base", "daemon/cache"},
    "daemon/remote": {"kernels/base", "daemon/cache"},
    "daemon/trace": {"kernels/base", "kernels/format", "kernels", "daemon/cache"},
    "daemon/metrics": {"kernels/base", "kernels/format", "kernels", "daemon/cache"},
    # What both ends of the shared-memory way need.
    "daemon/ring": {"kernels/base", "kernels/format"},
    "daemon/service": {"kernels/base", "kernels/format", "kernels", "daemon/cache", "daemon/calibrate", "daemon/ring", "planner", "proto"},
    "daemon": {"kernels/base", "kernels/format", "kernels", "kernels/cpu", "kernels/cuda", "daemon/cache", "daemon/calibrate", "daemon/disk", "daemon/remote",
               "daemon/trace", "daemon/metrics", "daemon/ring", "daemon/service", "planner", "proto"},
    # The daemon: for the embedded way alone.
    "clients/cpp": {"kernels/base", "kernels/format", "kernels", "daemon", "daemon/cache", "daemon/ring", "daemon/service", "planner",
                    "proto"},
    "clients/engine": {"kernels/base", "kernels/format", "planner", "clients/cpp"},
    "clients/python": {"kernels/base", "kernels/format", "kernels", "kernels/cpu", "daemon", "daemon/cache", "daemon/service", "planner", "proto",
                       "clients/cpp", "clients/engine", "clients/cli"},
    # The daemon: its settings, for `kvtide config`, manual pages and completions; replays of recordings.
    "clients/cli": {"kernels/base", "kernels/format", "planner", "proto", "daemon", "daemon/trace", "clients/cpp", "clients/engine"},
}
# layer -> its rooms, and the other rooms that each may include.
ROOMS = {
    "kernels/cuda": {
        "device": set(),
        "copy": {"device"},
        "codec": {"device"},
        "pages": {"device", "codec"},
        "attend": {"device", "codec"},
        "prefill": {"device", "codec", "attend"},
        "step": {"device", "codec", "attend", "prefill"},
    },
    "kernels/cpu": {"page": set()},
    "daemon/cache": {
        "tier": set(),
        "call": {"tier"},
        "block": {"tier", "call"},
        "sequence": {"tier", "call", "block"},
        "move": {"tier", "call", "block", "sequence"},
        "write": {"tier", "call", "block", "sequence", "move"},
        "read": {"tier", "call", "block", "sequence", "move", "write"},
        "persist": {"tier", "call", "block", "sequence", "move"},
        "reuse": {"tier", "call", "block", "sequence", "move", "persist"},
    },
    # What lies beside the rooms of the planner (numbers, names, CSV, items) is the lowest: it includes no room.
    "planner": {
        "model": {""},
        "engines": {"", "model"},
        "plan": {"", "model", "engines"},
        "fleet": {"", "model", "engines", "plan"},
        "render": {"", "model", "engines", "plan"},
    },
}
# Third-party headers: pattern -> layers that may include it.
EXTERNAL = [
    (re.compile(r"^(cuda|cuda_runtime|cuda_fp16|cuda_bf16|cooperative_groups|cub/|cuda/)"), {"kernels/cuda"}),
    (re.compile(r"^(grpc|grpcpp)/"), {"daemon/service", "daemon", "clients/cpp", "clients/cli"}),
    (re.compile(r"^google/protobuf/"), {"daemon/service", "daemon", "clients/cpp", "clients/cli"}),
    (re.compile(r"^prometheus/"), {"daemon/metrics", "daemon"}),
    (re.compile(r"^hiredis/"), {"daemon/remote"}),
    (re.compile(r"^(CLI/|spdlog/)"), {"daemon/service", "daemon", "clients/cli"}),
]
# The format layer includes the standard library (no slash, no .h of others), base and one hash.
FORMAT_EXTERNAL = re.compile(r"^(absl/.*|xxhash\.h|[a-z_0-9]+)$")
COPY_TO_DEVICE = "kernels/cuda/device/copy_to_device.h"
INCLUDE = re.compile(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]', re.M)


def layer_of(path):
    parts = path.split("/")[:-1]
    while parts:
        name = "/".join(parts)
        if name in LADDER:
            return name
        parts.pop()
    return None


def room_of(path, layer):
    """The room of a file, "" beside the rooms."""
    rest = path[len(layer) + 1 :].split("/")
    return rest[0] if len(rest) > 1 else ""


def check_rooms(path, layer, name):
    room, target = room_of(path, layer), room_of(name, layer)
    rooms = ROOMS[layer]
    if room and room not in rooms:
        yield f"{path}: {layer} has no room '{room}'; give it a place in ROOMS"
    elif room and room != target and target not in rooms[room]:
        yield f"{path}: room {room} of {layer} must not include {target or 'what lies beside the rooms'} ({name})"


def check(path, text):
    """Yields one complaint for each include of the file that the ladder forbids."""
    layer = layer_of(path)
    if layer is None:
        return
    for kind, name in INCLUDE.findall(text):
        target = layer_of(name)
        if kind == '"' and target is None and "/" not in name and not name.endswith(".inc"):
            yield f'{path}: "{name}": write the path from the repository root'
        elif target is None or name.endswith(".pb.h"):
            if name.endswith(".pb.h") and kind == '"' and "proto" not in LADDER[layer]:
                yield f"{path}: {layer} must not include generated protobuf code ({name})"
            for pattern, allowed in EXTERNAL:
                if pattern.match(name) and layer not in allowed:
                    yield f"{path}: <{name}> belongs into {', '.join(sorted(allowed))} only"
            if layer == "kernels/format" and not FORMAT_EXTERNAL.match(name):
                yield f"{path}: the format layer includes the standard library and base only, not <{name}>"
        elif target != layer and target not in LADDER[layer]:
            yield f"{path}: {layer} must not include {target} ({name})"
        elif target == layer and layer in ROOMS:
            yield from check_rooms(path, layer, name)
    if layer == "daemon/cache" and re.search(r"(system_clock|steady_clock)::now|absl::Now\(", text):
        yield f"{path}: the cache has no clock but the injected one"
    if path != COPY_TO_DEVICE and re.search(r"\bcudaMemcpy\(", text):
        yield f"{path}: cudaMemcpy returns before the copy has arrived; use CopyToDevice ({COPY_TO_DEVICE}) or a stream's copy"


def self_test():
    bad = {
        "kernels/format/x.h": '#include "kernels/cpu/cpu_backend.h"\n',
        "daemon/cache/x.cc": "#include <grpcpp/server.h>\n",
        "daemon/cache/block/x.h": '#include "daemon/cache/move/mover.h"\n',
        "daemon/cache/y.cc": "auto t = std::chrono::steady_clock::now();\n",
        "planner/x.cc": '#include "daemon/cache/kv_cache.h"\n',
        "daemon/service/x.cc": "#include <cuda_runtime.h>\n",
        "kernels/cuda/device/x.h": '#include "kernels/cuda/attend/attend_plan.h"\n',
        "kernels/cuda/copy/x.h": '#include "kernels/cuda/cuda_backend.h"\n',
        "kernels/cuda/device/x.cc": "cudaMemcpy(to, from, bytes, cudaMemcpyHostToDevice);\n",
    }
    missed = [path for path, text in bad.items() if not list(check(path, text))]
    assert not missed, f"not found: {missed}"
    good = {
        "kernels/cpu/x.cc": '#include "kernels/backend.h"\n#include <vector>\n',
        "kernels/cuda/x.cc": '#include "kernels/cuda/step/device_decode.h"\n',
        "kernels/cuda/attend/x.h": '#include "kernels/cuda/attend/y.h"\n#include "kernels/cuda/device/z.h"\n',
    }
    wrong = [line for path, text in good.items() for line in check(path, text)]
    assert not wrong, wrong


def main():
    self_test()
    if sys.argv[1:] == ["--self-test"]:
        return 0
    root = pathlib.Path(sys.argv[1])
    complaints, files = [], 0
    for folder in ("kernels", "planner", "daemon", "clients"):
        for path in sorted((root / folder).rglob("*")):
            if path.suffix in (".h", ".cc", ".cu", ".cuh"):
                files += 1
                complaints += check(str(path.relative_to(root)), path.read_text())
    for line in complaints:
        print(line)
    print(f"{files} files, {len(complaints)} forbidden includes")
    return 1 if complaints or not files else 0


if __name__ == "__main__":
    sys.exit(main())
