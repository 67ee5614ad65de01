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


def write(path, means, form="kvtide-key-profile-1", dtype="F32"):
    header, data = {"__metadata__": {"format": form, "model": "m", "text": "t", "tokens": "77"}}, b""
    for layer, mean in enumerate(means):
        header[f"layers.{layer}.key_mean"] = {"dtype": dtype, "shape": list(mean.shape),
                                              "data_offsets": [len(data), len(data) + mean.nbytes]}
        data += mean.tobytes()
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def test_a_profile_is_read(tmp_path):
    profile = profiles.load(write(tmp_path / "p", MEANS))
    assert (profile.model, profile.text, profile.tokens) == ("m", "t", 77)
    np.testing.assert_array_equal(profile.means, MEANS)
    assert profile.digest != profiles.load(write(tmp_path / "q", MEANS[::-1])).digest


def test_means_are_read_beside_transforms(tmp_path):
    path = write(tmp_path / "p", MEANS, form="kvtide-key-profile-2")
    data = path.read_bytes()
    (length,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + length])
    end = len(data) - 8 - length
    header["layers.0.key_widths"] = {"dtype": "F32", "shape": [2], "data_offsets": [end, end + 8]}
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :] + bytes(8))
    np.testing.assert_array_equal(profiles.load(path).means, MEANS)


@pytest.mark.parametrize("data", [b"", b"x" * 100, struct.pack("<Q", 2) + b"{}", struct.pack("<Q", 1 << 40)])
def test_what_is_none_is_refused(tmp_path, data):
    (tmp_path / "p").write_bytes(data)
    with pytest.raises(InvalidArgument):
        profiles.load(tmp_path / "p")


def test_other_formats_are_refused_by_name(tmp_path):
    with pytest.raises(InvalidArgument, match="kvtide-key-profile-9"):
        profiles.load(write(tmp_path / "p", MEANS, form="kvtide-key-profile-9"))
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
