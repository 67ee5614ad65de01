"""The planner as a library gives the numbers of `kvtide plan`."""
import json

import numpy as np
import pytest

import kvtide
from test_profiles import write
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
    plan = kvtide.plan("llama-3.1-8b", "RTX 3060", context=8192, pairs=["f16"])
    with pytest.raises(KeyError, match="4096; the plan has the contexts 8192"):
        plan[4096]
    with pytest.raises(KeyError, match="q8_0/q8_0; the plan considered f16/f16"):
        plan[8192]["q8_0/q8_0"]


def test_a_profile_of_keys(tmp_path):
    folder = str(ROOT / "clients" / "engine" / "models" / "tidelm-7m")
    means = [np.zeros((2, 128), np.float32)] * 6
    path = write(tmp_path / "tidelm.profile", means)
    options = dict(device="CPU EPYC 9654,ram=8GiB", context="4K", pairs=["turbo3/turbo3", "q8_0/q5_0"])
    plain = kvtide.plan(folder, **options)
    plan = kvtide.plan(folder, profile=path, **options)
    assert plan.json["key_profile"] == {"name": "tidelm.profile", "text": "t", "tokens": 77, "means": True, "transforms": False, "after_rope": False,
                                        "context": 0}
    assert plan[4096]["turbo3/turbo3"].calibrated and not plan[4096]["q8_0/q5_0"].calibrated
    assert not plain[4096]["turbo3/turbo3"].calibrated and plain.json["key_profile"] is None
    assert any("tidelm.profile" in one for one in plan.assumptions)
    with pytest.raises(errors.InvalidArgument, match="--profile: .*6 layers of 2 KV heads of 128"):
        kvtide.plan("llama-3.1-8b", "RTX 3060", weights="q4_0", profile=path)
    with pytest.raises(errors.KvtideError, match="/no/such.profile"):
        kvtide.plan(folder, profile="/no/such.profile", **options)
