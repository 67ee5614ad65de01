"""The planner as a library gives the numbers of `kvtide plan`."""
import json

import pytest

import kvtide
from ways import ROOT
from kvtide import errors, planner


def test_plan_of_a_known_model():
    plan = kvtide.plan("llama-3.1-8b", "RTX 3060", weights="q4_0", context=[8192, 131072])
    assert plan.verdict in ("fits", "fits_with_tiers") and plan.engine == "kvtide"
    short, long = plan[8192], plan[131072]
    assert short.chosen == "f16/f16" and short["f16/f16"].kv_bytes == 8192 * 32 * 2 * 8 * 128 * 2
    assert long["f16/f16"].fits is False and long.chosen != "f16/f16" and long[long.chosen].fits
    assert long[long.chosen].harm_percent is not None
    assert sum(item.bytes for item in short["f16/f16"].items) == short["f16/f16"].total_bytes
    assert planner.from_json(json.dumps(plan.json)) == plan


def test_plan_of_a_folder():
    plan = kvtide.plan(str(ROOT / "clients" / "engine" / "models" / "tidelm-7m"), "vram=8GiB,bandwidth=400GB/s", context="4K", pairs=["f16"])
    assert [pair.pair for pair in plan[4096].pairs] == ["f16/f16"]


def test_names_and_mistakes():
    assert "Llama3.1-8B" in planner.models() and "RTX 3060" in planner.devices()
    with pytest.raises(errors.KvtideError, match="--model"):
        kvtide.plan("llama-3.1-9b", "RTX 3060")
    with pytest.raises(errors.KvtideError, match="--device"):
        kvtide.plan("llama-3.1-8b", "RTX 9999")
    with pytest.raises(errors.KvtideError, match="pair"):
        kvtide.plan("llama-3.1-8b", "RTX 3060", pairs=["f17"])
