"""Measures what pairs of cache types do to a model's predictions, through transformers: ``python -m kvtide.eval``.

The metrics, the columns and the plot of ``kvtide eval``, for every model that transformers runs. Windows of a text go through
one cache for each pair in lockstep, chunk by chunk; every prediction is compared with that of f16/f16.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import hashlib
import io
import json
import math
import os
import pathlib
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any, Dict, List, Optional, Sequence, Tuple

from . import profiles
from ._files import check_model, check_writable

YARDSTICK = "f16/f16"
_BINS_PER_DECADE = 100
_SMALLEST = 1e-9  # nats; below it divergences are rounding
COLUMNS = ("model,text,tokens,context,pair_k,pair_v,window_policy,ppl_change_percent,kld_mean,kld_p99,top1_agreement,"
           "bits_per_value,version,date,key_profile").split(",")


@dataclass
class Score:
    """Sums over predictions; windows merge by addition."""

    predictions: int = 0
    loss: float = 0.0
    divergence: float = 0.0
    same_top: int = 0
    stored_bytes: int = 0
    stored_values: int = 0
    divergences: Counter = field(default_factory=Counter)

    def add(self, losses: Any, divergences: Any, same: Any) -> None:
        """Per-prediction tensors: nats of the text, nats from the yardstick, equal most likely token."""
        self.predictions += losses.numel()
        self.loss += losses.sum().item()
        self.divergence += divergences.sum().item()
        self.same_top += int(same.sum().item())
        bins = (divergences.clamp_min(_SMALLEST).log10() * _BINS_PER_DECADE).floor().int()
        self.divergences.update(bins.tolist())

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss / self.predictions)

    def merge(self, other: "Score") -> None:
        for one in ("predictions", "loss", "divergence", "same_top", "stored_bytes", "stored_values"):
            setattr(self, one, getattr(self, one) + getattr(other, one))
        self.divergences.update(other.divergences)

    def to_json(self) -> Dict[str, Any]:
        return {**asdict(self), "divergences": sorted(self.divergences.items())}

    @classmethod
    def of_json(cls, raw: Dict[str, Any]) -> "Score":
        return cls(**{**raw, "divergences": Counter({int(one): int(count) for one, count in raw["divergences"]})})

    def quantile(self, share: float) -> float:
        """The divergence below which this share of predictions lies."""
        total, below = sum(self.divergences.values()), 0
        for one in sorted(self.divergences):
            below += self.divergences[one]
            if below >= share * total:
                value = 10 ** ((one + 0.5) / _BINS_PER_DECADE)
                return 0.0 if value <= 1.02 * _SMALLEST else value
        return 0.0


@dataclass
class Row:
    """One pair, as in ``kvtide eval``: change of perplexity in percent, divergences in nats for each prediction, bits of whole
    sequences with codes, scales, padding, exact window and tail."""

    pair: str
    perplexity: float
    change_percent: float
    kld_mean: float
    kld_p99: float
    top1_agreement: float
    bits_per_value: float
    pareto: bool = False
    needles: List["Needle"] = field(default_factory=list)


@dataclass
class Needle:
    """A planted line that was asked for: its depth in the text, whether greedy decoding gives the answer, and the log-likelihood
    of the answer in nats for each of its tokens."""

    depth: float
    found: bool
    log_likelihood: float


class State:
    """Scores of finished windows in a file, so that a run can be stopped and extended. Pairs and windows may be added; another
    model, text or setting is refused."""

    def __init__(self, path: Optional[str], run: str) -> None:
        self.path, self.run = path, run
        self.scores: Dict[Tuple[str, int], Score] = {}
        if path is None or not os.path.exists(path):
            return
        try:
            raw = json.loads(pathlib.Path(path).read_text())
            before = raw["run"]
            if before == run:
                self.scores = {(one["pair"], one["window"]): Score.of_json(one["score"]) for one in raw["scores"]}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is not a state of kvtide.eval: {error}") from error
        if before != run:
            raise ValueError(f"{path} belongs to another run ({before}); this one is {run}. Remove it or name another file.")

    def save(self) -> None:
        if self.path is None:
            return
        scores = [{"pair": pair, "window": window, "score": score.to_json()} for (pair, window), score in self.scores.items()]
        part = self.path + ".part"
        pathlib.Path(part).write_text(json.dumps({"run": self.run, "scores": scores}))
        os.replace(part, self.path)


@dataclass
class Report:
    """What was measured, and on what."""

    model: str
    text: str
    tokens: int
    windows: int
    context: int
    chunk: int
    window_policy: str
    version: str
    date: str
    seconds: float
    rows: List[Row]
    key_profile: str = ""  # the text of the profile around whose means keys are coded
    after_rope: bool = False  # tide types code keys after rotary embedding

    def csv(self) -> str:
        """Rows for planner/plan/quality.csv; without f16/f16, which is the yardstick."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(COLUMNS)
        for row in self.rows:
            if row.pair == YARDSTICK:
                continue
            k, v = row.pair.split("/")
            writer.writerow([self.model, self.text, self.tokens, self.context, k, v, self.window_policy,
                             f"{row.change_percent:.4f}", f"{row.kld_mean:.4g}", f"{row.kld_p99:.3g}",
                             f"{row.top1_agreement:.5f}", f"{row.bits_per_value:.4f}", self.version, self.date,
                             "" if k in ("f16", "bf16") else
                             self.key_profile + "@after-rope" * (self.after_rope and k.startswith("tide"))])
        return out.getvalue()

    def json(self) -> str:
        """Everything, as ``kvtide eval --output json`` names it."""
        raw = asdict(self)
        raw["results"] = raw.pop("rows")
        return json.dumps(raw, indent=1) + "\n"

    def table(self) -> str:
        """For people."""
        lines = [f"{self.model} on {self.text}: {self.windows} windows of {self.context} tokens, exact window {self.window_policy}",
                 f"{'pair':<18}{'bits/value':>11}{'vs f16':>8}{'perplexity':>12}{'change':>11}{'mean KLD':>11}{'p99 KLD':>10}{'same top-1':>12}"]
        for row in self.rows:
            measured = "" if row.pair == YARDSTICK else (
                f"{row.change_percent:>+9.3f} %{row.kld_mean:>11.2e}{row.kld_p99:>10.2e}{100 * row.top1_agreement:>10.2f} %"
                + ("  * Pareto" if row.pareto else ""))
            lines.append(f"{row.pair:<18}{row.bits_per_value:>11.3f}{16 / row.bits_per_value:>7.2f}x{row.perplexity:>12.4f}{measured}")
        for row in self.rows:
            if row.needles:
                mean = sum(one.log_likelihood for one in row.needles) / len(row.needles)
                lines.append(f"{row.pair:<18} needles {sum(one.found for one in row.needles)} of {len(row.needles)}, "
                             f"{mean:.3f} nats per token of the answer")
        return "\n".join(lines) + "\n"

    def svg(self) -> str:
        """Harm against bits, as ``kvtide eval --plot`` draws it."""
        from . import _core

        return _core.harm_plot(
            f"{self.model}: harm against size",
            f"{self.text}, {self.windows} windows of {self.context} tokens, exact window {self.window_policy}",
            "mean divergence from f16, nats per token",
            [(row.pair, f"{row.change_percent:+.3f} % perplexity", row.bits_per_value, row.kld_mean, row.pareto)
             for row in self.rows if row.pair != YARDSTICK])


def parse_policy(text: str) -> Tuple[Optional[Tuple[int, int]], bool]:
    """"default", "none" or "FIRST+LAST" -> exact window and whether all is coded at once."""
    if text == "default":
        return None, False
    if text == "none":
        return (0, 0), True
    parts = text.split("+")
    if len(parts) != 2 or not all(part.isdigit() for part in parts):
        raise ValueError(f'exact window "{text}" is neither default, none nor FIRST+LAST in blocks, such as 1+2')
    return (int(parts[0]), int(parts[1])), False


def evaluate(
    model: Any,
    tokens: Sequence[int],
    pairs: Sequence[str],
    *,
    name: str,
    text: str,
    windows: int = 1,
    context: int = 4096,
    exact_window: str = "default",
    chunk: int = 0,
    mode: str = "attend",
    key_centring: str = "default",
    profile: Any = None,
    pool: Any = None,
    progress: Any = None,
    state_file: Optional[str] = None,
    needles: int = 0,
    tokenizer: Any = None,
) -> Report:
    """Scores pairs on windows of a text.

    Args:
        model: a causal model of transformers; its attention is set to "kvtide" in attend mode, and set back.
        tokens: the text; the first ``windows * context`` are used.
        pairs: such as ``["q8_0/turbo4"]``; f16/f16 is always scored, as the yardstick.
        exact_window: ``default``, ``none`` (every token is coded before anything attends over it) or ``FIRST+LAST`` blocks.
        chunk: tokens of one forward; 0 = 64, one block, or 512 with ``none``.
        mode: ``attend`` or ``materialise``.
        profile: of ``kvtide calibrate``: keys are centred by it.
        state_file: finished windows are kept there, and taken from there.
        needles: also ask for so many planted lines at as many depths (at most 16); needs ``tokenizer``.
        pool: None = an embedded one of the size that the run needs, at most 4 GiB.
        progress: called with the tokens that all caches have, after each chunk.
    """
    import torch

    from .transformers import KvtideCache

    window, at_once = parse_policy(exact_window)
    chunk = chunk or (512 if at_once else 64)
    if len(tokens) < windows * context:
        raise ValueError(f"{text} has {len(tokens)} tokens: enough for {len(tokens) // context} windows of {context}, not {windows}")
    names = [YARDSTICK] + [one for one in dict.fromkeys(_pair(pair) for pair in pairs) if one != YARDSTICK]
    if isinstance(profile, str):
        profile = profiles.load(profile)
    from . import __version__

    digest = hashlib.sha256(json.dumps(list(tokens)).encode()).hexdigest()[:16]
    weights = next(iter(model.parameters())).dtype
    state = State(state_file, f"{name}, {sum(p.numel() for p in model.parameters())} parameters in {weights}, text {digest}, context "
                              f"{context}, chunk {chunk}, window {exact_window}, {mode}, centring "
                              f"{profile.digest if profile else key_centring}, version {__version__}")

    def make(one: str) -> Any:
        return KvtideCache(model, one, pool=pool, mode=mode, exact_window=window, key_centring=key_centring, profile=profile,
                           seal_at_once=at_once and one != YARDSTICK)

    began = time.monotonic()
    before = model.config._attn_implementation
    model.set_attn_implementation("kvtide" if mode == "attend" else "sdpa")
    own = pool is None
    if own:
        pool = _make_pool(model, context + chunk, len(names))
    try:
        with torch.no_grad():
            for w in range(windows):
                todo = [one for one in names if (one, w) not in state.scores]
                if not todo:
                    continue
                ids = torch.tensor(list(tokens[w * context : (w + 1) * context]), device=model.device)[None]
                caches = {one: make(one) for one in dict.fromkeys([YARDSTICK] + todo)}
                scores = {one: Score() for one in caches}
                for at in range(0, context, chunk):
                    _score_chunk(model, ids, at, min(at + chunk, context), caches, scores)
                    if progress is not None:
                        progress(w * context + min(at + chunk, context))
                for one, cache in caches.items():
                    scores[one].stored_bytes += cache.stored_bytes
                    scores[one].stored_values += cache.stored_values
                    cache.close()
                    state.scores[one, w] = scores[one]
                state.save()
            found = {}
            if needles:
                task = needle_task(tokenizer, tokens, context, needles)
                found = {one: ask_needles(model, make(one), task, chunk) for one in names}
    finally:
        model.set_attn_implementation(before)
        if own:
            pool.close()
    scores = {}
    for one in names:
        scores[one] = Score()
        for w in range(windows):
            scores[one].merge(state.scores[one, w])
    base = scores[YARDSTICK]
    rows = [Row(one, score.perplexity, 100 * (score.perplexity / base.perplexity - 1), score.divergence / score.predictions,
                score.quantile(0.99), score.same_top / score.predictions, 8 * score.stored_bytes / score.stored_values,
                needles=found.get(one, []))
            for one, score in scores.items()]
    _mark(rows)
    return Report(name, text, windows * context, windows, context, chunk, exact_window, __version__,
                  datetime.date.today().isoformat(), time.monotonic() - began, rows, profile.text if profile else "", bool(profile and profile.after_rope))


def _score_chunk(model: Any, ids: Any, begin: int, end: int, caches: Dict[str, Any], scores: Dict[str, Score]) -> None:
    import torch

    wanted = ids[0, begin + 1 : end + 1]
    base = None
    for one, cache in caches.items():
        logits = model(ids[:, begin:end], past_key_values=cache, use_cache=True).logits[0, : wanted.numel()]
        logs = torch.log_softmax(logits.float(), dim=-1)
        if base is None:
            base = logs
        losses = -logs.gather(1, wanted[:, None])[:, 0]
        divergences = torch.zeros_like(losses) if logs is base else (base.exp() * (base - logs)).sum(-1)
        scores[one].add(losses.double(), divergences.double(), logs.argmax(-1) == base.argmax(-1))


# The words, the numbers and the depths of `kvtide eval --needles`.
_WORDS = ("harbour copper violet anchor meadow lantern granite willow falcon ribbon cedar marble saffron timber beacon "
          "orchid").split()
_SEED = 20260


@dataclass
class NeedleTask:
    """A text with planted lines, and for each its depth, the question and the answer."""

    haystack: List[int]
    questions: List[Tuple[float, List[int], List[int]]]


def needle_task(tokenizer: Any, tokens: Sequence[int], context: int, needles: int) -> NeedleTask:
    """Plants lines ("The secret code of the harbour is 4711 .") at even depths of the text's first tokens."""
    if not 1 <= needles <= len(_WORDS):
        raise ValueError(f"needles must be 1 to {len(_WORDS)}")
    if tokenizer is None:
        raise ValueError("needles need the tokenizer of the model")

    def encode(text: str) -> List[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    seed, lines, questions = _SEED, [], []
    for i in range(needles):
        seed = (seed * 6364136223846793005 + 1442695040888963407) % (1 << 64)
        question, answer = encode(f"\nThe secret code of the {_WORDS[i]} is"), encode(f" {1000 + (seed >> 33) % 9000}")
        lines.append(question + answer + encode(" .\n"))
        questions.append(((i + 0.5) / needles, question, answer))
    room = 64  # for a question and its answer
    hay = context - sum(map(len, lines)) - room
    if hay < 256 or len(tokens) < context:
        raise ValueError(f"a context of {context} tokens is too short for {needles} needles")
    haystack: List[int] = []
    used = 0
    for (depth, _, _), line in zip(questions, lines):
        until = int(depth * hay)
        haystack += [*tokens[used:until], *line]
        used = until
    return NeedleTask(haystack + list(tokens[used:hay]), questions)


def ask_needles(model: Any, cache: Any, task: NeedleTask, chunk: int) -> List[Needle]:
    """Feeds the text once, and asks each question of a fork of the cache. Closes the cache."""
    import torch

    def run(ids: List[int], into: Any) -> Any:
        return model(torch.tensor([ids], device=model.device), past_key_values=into, use_cache=True).logits[0]

    results = []
    with cache, torch.no_grad():
        for at in range(0, len(task.haystack), chunk):
            run(task.haystack[at : at + chunk], cache)
        for depth, question, answer in task.questions:
            with cache.fork() as fork:
                logits = run(question + answer[:-1], fork)[len(question) - 1 :].float()
            wanted = torch.tensor(answer, device=logits.device)
            likelihood = torch.log_softmax(logits, -1).gather(1, wanted[:, None]).mean().item()
            results.append(Needle(depth, bool((logits.argmax(-1) == wanted).all()), likelihood))
    return results


def _pair(text: str) -> str:
    return text if "/" in text else f"{text}/{text}"


def _mark(rows: List[Row]) -> None:
    """Sorts by bits, most first, and marks the pairs that no other beats in bits and divergence."""
    rows.sort(key=lambda row: -row.bits_per_value)
    best = math.inf
    for row in sorted(rows, key=lambda row: (row.bits_per_value, row.kld_mean)):
        if row.pair == YARDSTICK:
            continue
        row.pareto, best = row.kld_mean < best, min(best, row.kld_mean)


def _make_pool(model: Any, tokens: int, caches: int) -> Any:
    import kvtide
    from .transformers.geometry import layer_kinds, layer_shapes, text_config

    config = text_config(model)
    kinds = layer_kinds(config)
    shapes = layer_shapes(config, kinds) or []
    per_block = sum(kvtide.formats.block_bytes("f16", layers=1, kv_heads=shape.kv_heads, head_dim=shape.head_dim_k,
                                               head_dim_v=shape.head_dim_v) for shape in shapes)
    wanted = caches * per_block * (tokens // 64 + 4) + (16 << 20)
    return kvtide.connect("embedded", device_memory=min(wanted, 4 << 30), host_memory=0)


def main(arguments: Optional[Sequence[str]] = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m kvtide.eval", description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="Hugging Face folder or name")
    parser.add_argument("--text", required=True, help="UTF-8 text")
    parser.add_argument("--pairs", default="q8_0/q8_0,q8_0/turbo4,turbo4/turbo4,turbo3/turbo3", help="K/V pairs, comma-separated")
    parser.add_argument("--windows", type=int, default=1, help="windows of the text, from its start")
    parser.add_argument("--context", type=int, default=0, help="tokens of a window; default 4096, or what the model can handle")
    parser.add_argument("--exact-window", default="default", help="default, none or FIRST+LAST blocks kept in f16")
    parser.add_argument("--chunk", type=int, default=0, help="tokens of one forward; default 64, with --exact-window none 512")
    parser.add_argument("--key-centring", default="default", choices=["default", "none", "first_block"])
    parser.add_argument("--profile", help="centre keys by this profile of `kvtide calibrate`")
    parser.add_argument("--needles", type=int, default=0, help="also ask for so many planted lines at as many depths (at most 16)")
    parser.add_argument("--resume", help="keep finished windows in this file and go on from it")
    parser.add_argument("--mode", default="attend", choices=["attend", "materialise"])
    parser.add_argument("--dtype", default="float32", help="of the model: float32, bfloat16, float16")
    parser.add_argument("--device", default="cpu", help="of the model: cpu, cuda")
    parser.add_argument("--address", help="a running kvtided instead of an embedded pool")
    parser.add_argument("--output", default="table", choices=["table", "json", "csv"])
    parser.add_argument("--out", help="write the output there")
    parser.add_argument("--plot", help="also write an SVG of harm against bits")
    flags = parser.parse_args(arguments)

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import kvtide

    try:
        check_model("--model", flags.model)
        for flag, path in (("--out", flags.out), ("--plot", flags.plot), ("--resume", flags.resume)):
            check_writable(flag, path)
        tokenizer = AutoTokenizer.from_pretrained(flags.model)
        model = AutoModelForCausalLM.from_pretrained(flags.model, dtype=getattr(torch, flags.dtype)).to(flags.device).eval()
        tokens = tokenizer(pathlib.Path(flags.text).read_text(), verbose=False)["input_ids"]
        most = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", 4096)
        context = flags.context or min(4096, most)
        if context > most:
            raise ValueError(f"--context {context} is more than the model's {most}")
        progress = None
        if sys.stderr.isatty():
            progress = lambda done: print(f"\r{done} of {flags.windows * context} tokens", end="", file=sys.stderr)  # noqa: E731
        pool = kvtide.connect(flags.address) if flags.address else None
        report = evaluate(model, tokens, [pair for pair in flags.pairs.split(",") if pair],
                          name=os.path.basename(os.path.normpath(flags.model)), text=os.path.basename(flags.text),
                          windows=flags.windows, context=context, exact_window=flags.exact_window, chunk=flags.chunk,
                          mode=flags.mode, key_centring=flags.key_centring, profile=flags.profile, pool=pool,
                          progress=progress, state_file=flags.resume, needles=flags.needles, tokenizer=tokenizer)
    except (ValueError, OSError, kvtide.KvtideError) as error:
        print(f"python -m kvtide.eval: {error}", file=sys.stderr)
        return 2
    if progress is not None:
        print(file=sys.stderr)
    rendered = getattr(report, flags.output)()
    if flags.out:
        pathlib.Path(flags.out).write_text(rendered)
    else:
        print(rendered, end="")
    if flags.plot:
        pathlib.Path(flags.plot).write_text(report.svg())
    return 0


if __name__ == "__main__":
    sys.exit(main())
