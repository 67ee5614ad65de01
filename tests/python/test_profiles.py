"""Profiles of keys: read, registered, and better than none where keys have a mean."""
import json
import struct

import numpy as np
import pytest

import kvtide
from kvtide import profiles
from kvtide.errors import FailedPrecondition, InvalidArgument

LAYERS = [kvtide.Layer(kv_heads=2, head_dim=32, query_heads=4)] * 2
MEANS = [np.random.default_rng(layer).standard_normal((2, 32)).astype(np.float32) * 4 for layer in range(2)]


def write(path, means, transforms=(), widths=(), centres=(), frequencies=(), form=None, dtype="F32"):
    """A profile as `kvtide calibrate` writes it."""
    form = form or ("kvtide-key-profile-3" if transforms else "kvtide-key-profile-1")
    header, data = {"__metadata__": {"format": form, "model": "m", "text": "t", "tokens": "77", "rope_pairs": "halves"}}, b""
    for name, layers in (("key_mean", means), ("key_transform", transforms), ("key_widths", widths), ("key_centre", centres),
                         ("key_frequencies", frequencies)):
        for layer, values in enumerate(layers):
            header[f"layers.{layer}.{name}"] = {"dtype": dtype, "shape": list(values.shape),
                                                "data_offsets": [len(data), len(data) + values.nbytes]}
            data += values.tobytes()
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def write_transforms(path, form=None):
    """A profile with rotations as transforms, and the bits of tide4, tide3 and tide2 spread evenly, as before there was tide1."""
    random = np.random.default_rng(5)
    rotations = [np.stack([np.linalg.qr(random.standard_normal((32, 32)))[0] for _ in range(2)]).astype(np.float32) for _ in range(2)]
    bits = [np.broadcast_to(np.float32([4, 3, 2])[None, :, None], (2, 3, 4)).copy() for _ in range(2)]
    frequencies = [np.full(16, 1e-6, np.float32)] * 2
    return write(path, MEANS, rotations, bits, MEANS, frequencies, form), rotations


def test_a_profile_is_read(tmp_path):
    profile = profiles.load(write(tmp_path / "p", MEANS))
    assert (profile.model, profile.text, profile.tokens) == ("m", "t", 77)
    np.testing.assert_array_equal(profile.means, MEANS)
    assert profile.digest != profiles.load(write(tmp_path / "q", MEANS[::-1])).digest


def test_transforms_are_read(tmp_path):
    path, rotations = write_transforms(tmp_path / "p")
    profile = profiles.load(path)
    np.testing.assert_array_equal(profile.means, MEANS)
    np.testing.assert_array_equal(profile.transforms, rotations)
    assert [one.shape for one in profile.widths] == [(2, 3, 4)] * 2 and profile.widths[0][1, 1].tolist() == [3] * 4
    assert profile.centres[1].shape == (2, 32) and profile.frequencies[0].shape == (16,) and not profile.neighbours
    assert profile.digest != profiles.load(write(tmp_path / "q", MEANS)).digest
    np.testing.assert_array_equal(profile.of_layers([1]).transforms, rotations[1:])


def test_a_file_that_is_missing():
    with pytest.raises(FileNotFoundError):
        profiles.load("/no/such.profile")


@pytest.mark.parametrize("data", [b"", b"x" * 100, struct.pack("<Q", 2) + b"{}", struct.pack("<Q", 1 << 40)])
def test_what_is_none_is_refused(tmp_path, data):
    (tmp_path / "p").write_bytes(data)
    with pytest.raises(InvalidArgument):
        profiles.load(tmp_path / "p")


def test_other_formats_are_refused_by_name(tmp_path):
    with pytest.raises(InvalidArgument, match="kvtide-key-profile-9"):
        profiles.load(write(tmp_path / "p", MEANS, form="kvtide-key-profile-9"))
    with pytest.raises(InvalidArgument, match="of an earlier layout, which is no longer read"):
        profiles.load(write(tmp_path / "p", MEANS, form="kvtide-key-profile-2"))
    with pytest.raises(InvalidArgument, match="not f32"):
        profiles.load(write(tmp_path / "p", [mean.astype(np.float16) for mean in MEANS], dtype="F16"))


def test_keys_around_their_means_are_coded_better(pool):
    pool.register("calibrated", LAYERS, key_means=MEANS)
    random = np.random.default_rng(0)
    k = random.standard_normal((400, 2, 32)).astype(np.float32)
    v = random.standard_normal((400, 2, 32)).astype(np.float32)
    errors = {}
    for centring in ("none", "calibrated"):
        with pool.create("calibrated", pair="turbo4/turbo4", key_centring=centring) as sequence:
            for layer in range(2):
                sequence.append(layer, k + MEANS[layer], v)
            errors[centring] = [np.abs(sequence.read(layer)[0] - k - MEANS[layer]).mean() for layer in range(2)]
    assert (np.array(errors["calibrated"]) < 0.5 * np.array(errors["none"])).all()


def test_mistakes(pool):
    with pytest.raises(InvalidArgument, match="profile of another model"):
        pool.register("wrong", LAYERS, key_means=MEANS[:1])
    pool.register("without", LAYERS)
    with pytest.raises(InvalidArgument, match="no calibrated means"):
        pool.create("without", key_centring="calibrated")
    with pytest.raises(FailedPrecondition, match="another geometry"):
        pool.register("without", LAYERS, key_means=MEANS)
    with pytest.raises(InvalidArgument, match="key_means: give one"):
        pool.register("both", LAYERS, key_means=MEANS, profile=profiles.KeyProfile("m", "t", 1, MEANS))
    with pytest.raises(InvalidArgument, match="no transforms of keys"):
        pool.create("without", pair="tide3/turbo3")


@pytest.mark.parametrize("after_rope", [False, True])
def test_tide_pairs_need_the_transforms_of_a_profile(pool, tmp_path, after_rope):
    profile = profiles.load(write_transforms(tmp_path / "p", f"kvtide-key-profile-{4 if after_rope else 3}")[0])
    assert profile.after_rope is after_rope and profile.context == 0 and len(profile.frequencies[0]) == 16
    name = pool.register(f"tide, after RoPE: {after_rope}", LAYERS, profile=profile)
    random = np.random.default_rng(0)
    k = random.standard_normal((400, 2, 32)).astype(np.float32)
    errors = {}
    for pair in ("tide4/turbo4", "tide2/turbo2"):
        with pool.create(name, pair=pair) as sequence:
            for layer in range(2):
                sequence.append(layer, k + MEANS[layer], k)
            errors[pair] = np.abs(sequence.read(0)[0] - k - MEANS[0]).mean()
    assert errors["tide4/turbo4"] < 0.12 and errors["tide4/turbo4"] < errors["tide2/turbo2"] / 2 < 0.3
    with pytest.raises(InvalidArgument, match="its profile is older than tide1"):
        pool.create(name, pair="tide1/turbo2")


def test_the_pools_planner_knows_profiles(pool, tmp_path):
    pool.register("plain", LAYERS)
    pool.register("planned", LAYERS, profile=profiles.load(write_transforms(tmp_path / "p")[0]))
    with pytest.raises(InvalidArgument, match="no calibrated means"):
        pool.plan("plain", [4096], key_centring="calibrated")
    plain = {one.pair: one for one in pool.plan("planned", [4096]).contexts[0].candidates}
    assert "tide3/turbo3" not in plain and not any(one.calibrated for one in plain.values())
    plan = pool.plan("planned", [4096], key_centring="calibrated")
    calibrated = {one.pair: one for one in plan.contexts[0].candidates}
    turbo4 = calibrated["turbo4/turbo4"]
    assert turbo4.calibrated and turbo4.measured_tokens > 0 and turbo4.measured_text and turbo4.measured_model
    assert turbo4.perplexity_increase_percent < plain["turbo4/turbo4"].perplexity_increase_percent
    assert calibrated["tide3/turbo3"].kv_bytes == calibrated["turbo3/turbo3"].kv_bytes
    tide = calibrated["tide3/turbo3"]
    assert tide.rejection in (("", "more_harm") if tide.measured else ("unmeasured",))
    assert any("planned" in one for one in plan.assumptions)
