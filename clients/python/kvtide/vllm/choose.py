"""The pair that `auto` stands for: the planner's answer for this model, card and context."""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import dataclass
from typing import Any, Optional

from .. import planner
from ..errors import InvalidArgument, KvtideError

MOST_HARM = 1.0
"""Percent of perplexity that `auto` accepts at most, as measured on the most alike model that was measured."""
LITTLE_HARM = 0.25
"""Of the pair that is named as the one with more tokens."""


@dataclass(frozen=True)
class Choice:
    pair: str
    reason: str


def choose(model: str, device: str, context: int, sequences: int, hf_config: Any = None, gpus: int = 1, profile: str = "") -> Choice:
    """The least harmful measured coded pair with which ``sequences`` of ``context`` tokens fit, or, where none lets them, the smallest
    that harms less than MOST_HARM percent. Never f16, which vLLM has itself: who installs this wants more tokens.

    Args:
        model: what the planner takes: a catalogue name, a folder, a config.json, a GGUF file.
        device: a card of the planner, or ``auto``.
        hf_config: vLLM's configuration of the model, for models that are no folder on this machine.
        gpus: cards that share the model (tensor parallel).
        profile: of the model's keys, or "": then pairs count with what was measured so, where it was.
    """
    with tempfile.TemporaryDirectory() as folder:
        if not os.path.exists(model) and hf_config is not None:
            model = os.path.join(folder, "config.json")
            with open(model, "w") as file:
                json.dump(hf_config.to_dict(), file, default=str)
        try:
            plan = planner.plan(model, device, context=[context], concurrency=sequences, max_perplexity_increase=MOST_HARM,
                                gpus=gpus if gpus > 1 else 0, ignore_unknown_fields=True, profile=profile or None)
        except KvtideError as error:
            raise InvalidArgument(f"KVTIDE_PAIR=auto: the planner says: {error}. Choose a pair yourself, such as "
                                  "KVTIDE_PAIR=turbo4/turbo4") from error
    what = f"{sequences} x {context} tokens"
    measured = [one for one in plan[context].pairs
                if one.harm_percent is not None and one.harm_percent <= MOST_HARM and one.ratio_to_f16 > 1.1
                and not one.pair.startswith("tide")]  # which need transforms of keys after RoPE: for who names them
    if not measured:
        raise InvalidArgument("KVTIDE_PAIR=auto: no pair was measured on a model like this one; choose a pair yourself, such as "
                              "KVTIDE_PAIR=turbo4/turbo4")
    smallest = min(measured, key=lambda one: (one.kv_bytes, one.harm_percent))
    fitting = [one for one in measured if one.fits]
    if not fitting:
        return Choice(smallest.pair, f"smallest pair below {MOST_HARM:g} % harm ({what} fit with none), {harm(smallest)}")
    best = min(fitting, key=lambda one: (one.harm_percent, one.kv_bytes))
    reason = f"least measured harm of the coded pairs with which {what} fit, {harm(best)}: {best.ratio_to_f16:.1f}x the tokens of f16"
    good = min((one for one in measured if one.harm_percent <= LITTLE_HARM), key=lambda one: one.kv_bytes, default=smallest)
    if good.kv_bytes < best.kv_bytes:
        reason += f"; KVTIDE_PAIR={good.pair} holds {good.ratio_to_f16:.1f}x, {harm(good)}"
    return Choice(best.pair, reason)


def harm(pair: Any) -> str:
    """What is known of a pair's harm, in words."""
    if pair is None or pair.harm_percent is None:
        return "harm not measured: kvtide eval measures it"
    if not pair.harm_model:
        return "no harm"
    return f"{pair.harm_percent:+.2f} % perplexity on {pair.harm_model}" + (", another model" if pair.proxy else "")


def harm_of(pair: str, model: str, device: str, context: int, profile: str = "") -> Optional[str]:
    """The same for a pair that the user chose; None if the planner does not know the model."""
    try:
        return harm(planner.plan(model, device, context=[context], pairs=[pair], ignore_unknown_fields=True,
                                 profile=profile or None)[context][pair])
    except (KvtideError, KeyError):
        return None
