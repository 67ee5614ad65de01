"""Makes a profile of a model's keys through transformers: ``python -m kvtide.calibrate``.

What ``kvtide calibrate`` does with the models of its own engine, for every model that transformers runs, on CPU or GPU. Keys
are then coded as their difference from a mean, and ``tide4``, ``tide3``, ``tide2`` and ``tide1`` have the transforms that they need:

>>> from kvtide import calibrate
>>> made = calibrate.calibrate(model, tokens, name="my-model", text="manual.txt")
>>> print(made.save("model.profile"))
>>> cache = kvtide.transformers.KvtideCache(model, "tide3/turbo3", profile="model.profile")

Keys and queries are taken where attention meets them, after rotary embedding. Transforms are of keys that are turned back by
their positions, or, with ``after_rope``, of keys as they are: attention over those is faster, and their statistics depend on
positions, so that windows should be as long as sequences will be.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import sys
from dataclasses import dataclass, field
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

from . import _core
from ._files import check_model, check_writable
from ._types import Rope

NAME = "kvtide_calibrate"  # of the attention, in transformers
FIRST = 64  # tokens of each window that do not count: the first block stays exact, and attention sinks lie in it
MOST_HELD_BACK = 1024


@dataclass(frozen=True)
class KeyTypeError:
    """Error of logits on the tokens that were held back, of their variance: of a calibrated type, and of the type of the same
    bits around the calibrated mean."""

    type: str
    error: float
    beside: str
    beside_error: float


@dataclass
class Calibration:
    """What was gathered; :meth:`save` makes the profile of it."""

    model: str
    text: str
    layers: int
    kv_heads: int
    head_dim: int
    means_only: bool
    core: Any = field(repr=False)
    context: int = 0  # tokens of a window

    @property
    def tokens(self) -> int:
        """Those that count."""
        return self.core.tokens

    def save(self, path: "str | os.PathLike[str]") -> List[KeyTypeError]:
        """Writes the profile (safetensors, for `kvtide.profiles.load`, `kvtide eval --profile` and `kvtide plan --profile`).

        Raises:
            InvalidArgument: if the text is too short for transforms, or if a type is not better than turbo of the same bits on
                the tokens that were held back.
        """
        errors = self.core.write(os.fspath(path), self.model, self.text, self.context, not self.means_only)
        return [KeyTypeError(*one) for one in errors]


def calibrate(
    model: Any,
    tokens: Sequence[int],
    *,
    name: str,
    text: str,
    context: int = 0,
    after_rope: bool = False,
    means_only: bool = False,
    threads: int = 0,
    progress: Optional[Callable[[int], None]] = None,
) -> Calibration:
    """Runs windows of a text through a model and gathers sums over its keys and queries.

    Args:
        model: a causal model of transformers; its attention is changed meanwhile, and set back.
        tokens: the text. A few thousand are enough for means, transforms want 8 thousand and more. Of the last ones an eighth, at
            most 1,024, is held back to measure the transforms.
        name, text: what the profile says it is of, for people.
        context: tokens of a window; 0 = 2048, or what the model can handle.
        after_rope: transforms of keys as they are stored, good for positions up to ``context``; else with rotary embedding taken
            back, good for any.
        means_only: means of keys and no transforms.
        threads: of the sums; 0 = one for each processor.
        progress: called with the tokens that are done, after each window.

    Raises:
        ValueError: for models whose layers differ in shape or keep something else than keys and values, whose rotary embedding
            cannot be told, and for texts that are too short.
    """
    import torch

    from .transformers.geometry import layer_kinds, text_config

    config = text_config(model)
    kinds = layer_kinds(config)
    odd = [f"{index} is {kind.kind}" for index, kind in enumerate(kinds) if kind.kind not in ("full", "sliding")]
    if odd:
        raise ValueError(f"layer {odd[0]}: profiles are for models whose layers all keep keys and values of their own")
    most = getattr(config, "max_position_embeddings", None) or 2048
    context = context or min(2048, most)
    if context > most:
        raise ValueError(f"a window of {context} tokens is more than the model's {most}")
    if len(tokens) <= FIRST or context <= FIRST:
        raise ValueError(f"the first {FIRST} tokens of each window do not count: use a longer text than {len(tokens)} tokens, "
                         f"and a longer window than {context}")
    held_back = len(tokens) if means_only else len(tokens) - min(len(tokens) // 8, MOST_HELD_BACK)

    def run(ids: Sequence[int]) -> None:
        model(torch.tensor([list(ids)], device=model.device), use_cache=False)

    before = model.config._attn_implementation
    _register()
    try:
        model.set_attn_implementation(NAME)
        with torch.no_grad():
            with _Watch() as watch:
                run(tokens[:FIRST])
            shape = watch.shape(len(kinds))
            rotary = [Rope(())] * len(kinds) if means_only else _ropes(model, len(kinds))
            kv_heads, query_heads, head_dim = shape
            core = _core.KeyCalibration(len(kinds), kv_heads, query_heads, head_dim, [list(one.frequencies) for one in rotary],
                                        rotary[0].neighbours, after_rope, threads)
            for at in range(0, len(tokens), context):
                window = tokens[at : at + context]
                with _Recorder(core, held_back - at):
                    run(window)
                if progress is not None:
                    progress(at + len(window))
    finally:
        model.set_attn_implementation(before)
    return Calibration(name, text, len(kinds), kv_heads, head_dim, means_only, core, context)


def _ropes(model: Any, layers: int) -> List[Rope]:
    from .transformers.rotary import ropes

    try:
        return ropes(model, range(layers))
    except ValueError as error:
        raise ValueError(f"{error}; means_only works without") from error


# What the attention function tells of each layer, while a model is watched.
_listeners: List[Callable[[int, Any, Any], None]] = []


def _register() -> None:
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    from .transformers import attention

    def listen(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **options: Any) -> Any:
        for listener in _listeners:
            listener(module.layer_idx, query, key)
        return attention.attention(module, query, key, value, attention_mask, **options)

    AttentionInterface.register(NAME, listen)
    AttentionMaskInterface.register(NAME, attention.mask)


class _Recorder:
    """Gives keys and queries of one window to the sums: tokens from `held_back` on are held back."""

    def __init__(self, core: Any, held_back: int) -> None:
        self.core, self.held_back = core, held_back

    def __enter__(self) -> "_Recorder":
        _listeners.append(self.listen)
        return self

    def __exit__(self, *_: Any) -> None:
        _listeners.remove(self.listen)

    def listen(self, layer: int, q: Any, k: Any) -> None:
        n = k.shape[2]
        held = min(max(self.held_back, FIRST), n)
        for begin, end, back in ((FIRST, held, False), (held, n, True)):
            if begin < end:
                rows = [one[0, :, begin:end].transpose(0, 1).float().contiguous().cpu().numpy() for one in (q, k)]
                self.core.add(layer, begin, *rows, back)


class _Watch:
    """Sees the shapes of a model's layers during one forward."""

    def __init__(self) -> None:
        self.shapes: Dict[int, Tuple[int, int, int]] = {}

    def __enter__(self) -> "_Watch":
        _listeners.append(self.listen)
        return self

    def __exit__(self, *_: Any) -> None:
        _listeners.remove(self.listen)

    def listen(self, layer: int, q: Any, k: Any) -> None:
        self.shapes[layer] = (k.shape[1], q.shape[1], k.shape[3])

    def shape(self, layers: int) -> Tuple[int, int, int]:
        if sorted(self.shapes) != list(range(layers)):
            raise ValueError(f"{len(self.shapes)} of {layers} layers use attention that transformers' AttentionInterface chooses; "
                             "this model cannot be calibrated")
        if len(set(self.shapes.values())) != 1:
            raise ValueError("the layers of this model have keys of different shapes; profiles are for models whose layers agree")
        return self.shapes[0]


def main(arguments: Optional[Sequence[str]] = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m kvtide.calibrate", description=__doc__.split("\n")[0],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="""examples:
  python -m kvtide.calibrate --model FOLDER --text manual.txt --out model.profile
  python -m kvtide.calibrate --model FOLDER --text manual.txt --out model.profile --device cuda --dtype bfloat16
  python -m kvtide.eval --model FOLDER --text book.txt --profile model.profile --pairs turbo3/turbo3,tide3/turbo3
Take a text of the kind that the model will see. A profile with which a tide type changes logits more than turbo of the same
bits, on tokens that were held back, is refused.""")
    parser.add_argument("--model", required=True, help="Hugging Face folder or name")
    parser.add_argument("--text", required=True, help="UTF-8 text")
    parser.add_argument("--out", required=True, help="the profile to write (safetensors)")
    parser.add_argument("--tokens", type=int, default=16384, help="tokens from the start of the text, at most (default 16384)")
    parser.add_argument("--context", type=int, default=0, help="tokens of a window; default 2048, or what the model can handle")
    parser.add_argument("--keys", default="before-rope", choices=["before-rope", "after-rope"],
                        help="transforms of keys with rotary embedding taken back (least harm) or as they are stored (fast attention, for "
                             "positions up to --context)")
    parser.add_argument("--means-only", action="store_true", help="means of keys and no transforms: for short texts")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"], help="of the model")
    parser.add_argument("--device", default="cpu", help="of the model: cpu, cuda")
    parser.add_argument("--threads", type=int, default=0, help="of the sums; default one for each processor")
    parser.add_argument("--no-progress", action="store_true", help="no progress line")
    flags = parser.parse_args(arguments)

    import kvtide

    try:
        if flags.tokens < 1 or flags.context < 0 or flags.threads < 0:
            raise ValueError("--tokens, --context and --threads are positive numbers")
        check_model("--model", flags.model)
        check_writable("--out", flags.out)
        written = pathlib.Path(flags.text).read_text()

        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(flags.model)
        model = AutoModelForCausalLM.from_pretrained(flags.model, dtype=getattr(torch, flags.dtype)).to(flags.device).eval()
        tokens = tokenizer(written, verbose=False)["input_ids"][: flags.tokens]
        progress = None
        if sys.stderr.isatty() and not flags.no_progress:
            progress = lambda done: print(f"\r{done} of {len(tokens)} tokens", end="", file=sys.stderr)  # noqa: E731
        made = calibrate(model, tokens, name=os.path.basename(os.path.normpath(flags.model)), text=os.path.basename(flags.text),
                         context=flags.context, after_rope=flags.keys == "after-rope", means_only=flags.means_only, threads=flags.threads, progress=progress)
        if progress is not None:
            print(file=sys.stderr)
        errors = made.save(flags.out)
    except (ValueError, OSError, kvtide.KvtideError) as error:
        print(f"python -m kvtide.calibrate: {error}", file=sys.stderr)
        return 2
    what = "" if flags.means_only else " and transforms" + (" after RoPE" if flags.keys == "after-rope" else "")
    print(f"{flags.out}: means{what} of keys over {made.tokens} tokens, {made.layers} layers of "
          f"{made.kv_heads} KV heads of {made.head_dim}")
    if errors:
        print("error of logits on tokens held back, of their variance:")
    for one in errors:
        print(f"  {one.type} {one.error:.5f}   {one.beside} around the mean {one.beside_error:.5f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
