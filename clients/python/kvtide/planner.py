"""The planner as a library: which pair keeps a model's cache in a card's memory, and what that costs.

The same arithmetic, catalogue and measurements as ``kvtide plan``; it needs neither a daemon nor a GPU.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, fields
from typing import Any, Dict, Iterable, List, Optional, Sequence, Tuple, Union

from . import _core

Size = Union[int, str]


@dataclass(frozen=True)
class Item:
    """One line of a memory bill, and how well it is known: exact, formula, calibrated or guess."""

    item: str
    bytes: int
    provenance: str


@dataclass(frozen=True)
class Speed:
    """Decoding by a roofline, with its error bars."""

    tokens_per_s: float
    low: float
    high: float
    step_ms: float


@dataclass(frozen=True)
class Pair:
    """One pair at one context length; bytes are per device. ``harm_percent`` is the measured change of perplexity, None when
    the pair was not measured; ``proxy`` says that it was measured on another model (``harm_model``). ``calibrated``: keys are coded
    by the profile of the question."""

    pair: str
    fits: bool
    rejection: str
    kv_bytes: int
    total_bytes: int
    free_bytes: int
    bits_per_value: float
    ratio_to_f16: float
    max_context: int
    max_concurrency: int
    harm_percent: Optional[float]
    harm_model: str
    proxy: bool
    speed: Optional[Speed]
    items: List[Item]
    calibrated: bool = False


@dataclass(frozen=True)
class ContextPlan:
    """The answer for one context length. ``verdict``: fits, fits_with_tiers or does_not_fit. ``split`` is the part on each
    tier when the device alone is too small."""

    context: int
    verdict: str
    chosen: str
    reason: str
    pairs: List[Pair]
    split: Optional[Dict[str, Any]]

    def __getitem__(self, pair: str) -> Pair:
        for one in self.pairs:
            if one.pair == pair:
                return one
        raise KeyError(f"{pair}; the plan considered {', '.join(one.pair for one in self.pairs)}")


@dataclass(frozen=True)
class Plan:
    """The planner's answer. ``json`` is all of it, as ``kvtide plan --output json`` prints it."""

    model: str
    engine: str
    verdict: str
    device: Dict[str, Any]
    weights_bytes: int
    contexts: List[ContextPlan]
    notes: List[str]
    assumptions: List[str]
    json: Dict[str, Any]

    def __getitem__(self, context: int) -> ContextPlan:
        for one in self.contexts:
            if one.context == context:
                return one
        raise KeyError(f"{context}; the plan has the contexts {', '.join(str(one.context) for one in self.contexts)}")


def models() -> List[str]:
    """Models that the planner knows by name."""
    return _core.catalogue_models()


def devices() -> List[str]:
    """Cards that the planner knows by name."""
    return _core.catalogue_devices()


def plan(
    model: str,
    device: str = "auto",
    *,
    context: Union[int, str, Iterable[int]] = (8192, 32768, 131072),
    weights: Size = "",
    concurrency: int = 1,
    engine: str = "kvtide",
    pairs: Union[str, Sequence[str]] = "all",
    host_memory: Size = "",
    used: Size = "",
    margin: Size = "",
    gpus: int = 0,
    shared_prefix: int = 0,
    exact_window: Union[str, Tuple[int, int]] = "default",
    profile: Union[str, "os.PathLike[str]", None] = None,
    max_perplexity_increase: Optional[float] = None,
    quality_files: Sequence[str] = (),
    own_quality_only: bool = False,
    ignore_unknown_fields: bool = False,
) -> Plan:
    """Plans the memory of a model's cache on a device.

    Args:
        model: a catalogue name (:func:`models`), a GGUF file, a ``config.json`` or a folder of a Hugging Face model.
        device: a catalogue name (:func:`devices`), ``"auto"`` for the GPU of this machine, or
            ``"vram=16GiB,bandwidth=960GB/s"``.
        context: tokens per sequence: a number, several, or a text such as ``"4K..128K"``.
        weights: bytes, a size such as ``"14.4GB"``, a quantisation such as ``"q4_0"``, or a file.
        concurrency: sequences at once.
        engine: ``kvtide``, ``llama.cpp`` or ``vllm``.
        pairs: pairs to consider, such as ``["f16", "q8_0/turbo4"]``.
        host_memory: host memory for the cache.
        used: device memory that others use already.
        margin: device memory to keep free.
        exact_window: ``default``, ``none`` or blocks kept exact at either end, as ``(1, 2)``.
        profile: of ``kvtide calibrate`` for this model: pairs count with the harm that was measured with profiles, where it was
            (``Pair.calibrated``), and ``tide4`` to ``tide1`` keys are offered if it has transforms.
        max_perplexity_increase: in percent; pairs that harm more are not chosen.
        own_quality_only: count only measurements on this very model.

    Raises:
        InvalidArgument, NotFound: with the argument (as a flag of ``kvtide plan``) and the nearest known names.
    """
    flags = _core.PlanFlags()
    flags.model = model
    flags.device = device
    flags.contexts = context if isinstance(context, str) else ",".join(str(int(n)) for n in _several(context))
    flags.weights = str(weights)
    flags.concurrency = concurrency
    flags.engine = engine
    flags.pairs = pairs if isinstance(pairs, str) else ",".join(pairs)
    flags.host_memory = str(host_memory)
    flags.used = str(used)
    flags.margin = str(margin)
    flags.gpus = gpus
    flags.shared_prefix = shared_prefix
    flags.exact_window = exact_window if isinstance(exact_window, str) else "+".join(map(str, exact_window))
    flags.profile = "" if profile is None else os.fspath(profile)
    flags.max_ppl_increase = "" if max_perplexity_increase is None else str(max_perplexity_increase)
    flags.quality_files = list(quality_files)
    flags.own_quality_only = own_quality_only
    flags.ignore_unknown_fields = ignore_unknown_fields
    return from_json(_core.plan(flags))


def from_json(text: str) -> Plan:
    """A plan from the JSON of ``kvtide plan --output json``."""
    raw = json.loads(text)
    return Plan(
        model=raw["model"],
        engine=raw["engine"],
        verdict=raw["verdict"],
        device=raw["device"],
        weights_bytes=raw["weights"]["bytes_per_device"],
        contexts=[_context(one) for one in raw["contexts"]],
        notes=raw["notes"],
        assumptions=raw["assumptions"],
        json=raw,
    )


def _several(context: Union[int, Iterable[int]]) -> List[int]:
    return [context] if isinstance(context, int) else list(context)


def _context(raw: Dict[str, Any]) -> ContextPlan:
    return ContextPlan(raw["context"], raw["verdict"], raw["chosen"] or "", raw["reason"], [_pair(p) for p in raw["pairs"]],
                       raw["split"])


def _known(kind: Any, raw: Dict[str, Any]) -> Any:
    """The fields that the class has; later planners may say more, which stays in ``Plan.json``."""
    return kind(**{one.name: raw[one.name] for one in fields(kind)})


def _pair(raw: Dict[str, Any]) -> Pair:
    harm = raw["harm"] or {}
    return Pair(
        harm_percent=harm.get("ppl_change_percent"),
        harm_model=harm.get("model", ""),
        proxy=harm.get("proxy", False),
        calibrated=harm.get("calibrated", False),
        speed=_known(Speed, raw["speed"]) if raw.get("speed") else None,
        items=[_known(Item, item) for item in raw["items"]],
        **{name: raw[name] for name in ("pair", "fits", "rejection", "kv_bytes", "total_bytes", "free_bytes", "bits_per_value",
                                        "ratio_to_f16", "max_context", "max_concurrency")},
    )
