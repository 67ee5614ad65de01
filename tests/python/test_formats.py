"""kvtide.formats gives the frozen bytes of tests/golden/format."""
import numpy as np
import pytest

from ways import ROOT
from kvtide import errors, formats

GOLDEN = ROOT / "tests" / "golden" / "format"
TYPES = [one.name for one in formats.types()]
DIMS = [64, 80, 96, 112, 128, 192, 256, 512]


class Random:
    """The generator of tests/format/test_rows.h: SplitMix64, bells from sums of uniforms, exact everywhere."""

    def __init__(self, seed):
        self.state = np.uint64(seed)

    def next(self, count):
        with np.errstate(over="ignore"):
            z = self.state + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
            self.state = z[-1]
            z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))

    def bells(self, count):
        sums = (self.next(16 * count) >> np.uint64(44)).astype(np.int64).reshape(count, 16).sum(axis=1)
        return (sums - 16 * (1 << 19)).astype(np.float32) / np.float32(1210791.0)


def golden_rows(dim):
    rows = Random(20240607 + dim).bells(61 * dim).reshape(61, dim)
    rows[3] *= np.float32(9000.0)
    rows[5] *= np.float32(3.0517578e-5)
    rows[8] = 0.75
    rows[13] = 0.0
    rows[13, 17] = -31.0
    rows[21, 2::16] *= np.float32(8.0)
    return rows


def golden_profile(dim):
    random, mean, gain = Random(99), [], []
    for _ in range(dim):
        mean.append(random.bells(1)[0])
        gain.append(np.float32(0.25) + np.float32(int(random.next(1)[0] % np.uint64(64))) / np.float32(32.0))
    return np.array(mean, np.float32), np.array(gain, np.float32)


def digest(data):
    value = 0xCBF29CE484222325
    for byte in data.tobytes():
        value = (value ^ byte) * 0x100000001B3 & 0xFFFFFFFFFFFFFFFF
    return value


@pytest.mark.parametrize("name", TYPES)
def test_golden_pages(name):
    pages = [formats.encode(golden_rows(64), name, side) for side in "kv"]
    assert b"".join(page.tobytes() for page in pages) == (GOLDEN / f"{name}.bin").read_bytes()


@pytest.mark.parametrize("dim", DIMS)
def test_golden_digests(dim):
    wanted = [line.split() for line in (GOLDEN / "digests.txt").read_text().splitlines()]
    rows, (mean, gain) = golden_rows(dim), golden_profile(dim)
    versions = {one.name: one.version for one in formats.types()}
    seen = 0
    for name, version, width, _, k, _, k_profile, _, v in wanted:
        if width != f"d{dim}":
            continue
        seen += 1
        assert version == f"v{versions[name]}"
        assert f"{digest(formats.encode(rows, name, 'k')):016x}" == k
        assert f"{digest(formats.encode(rows, name, 'k', mean=mean, gain=gain)):016x}" == k_profile
        assert f"{digest(formats.encode(rows, name, 'v')):016x}" == v
    assert seen == len(TYPES)


# Relative error of bell-shaped vectors: far below what the next shorter code of the kind does.
ERRORS = {"f16": 1e-3, "bf16": 5e-3, "q8_0": 0.01, "q5_0": 0.06, "q4_0": 0.12, "turbo4": 0.12, "turbo3": 0.21, "turbo2": 0.38, "wht4": 0.13}


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("side", "kv")
def test_round_trip(name, side):
    rows = Random(7).bells(200 * 128).reshape(200, 128)
    mean, gain = golden_profile(128)
    most = ERRORS.get(name, 0.25)
    profiles = [{}, {"mean": mean}, {"gain": np.ones(128)}] if side == "k" else [{}]
    for profile in profiles:
        pages = formats.encode(rows, name, side, **profile)
        assert pages.shape == (4, formats.page_bytes(name, 128))
        back = formats.decode(pages, name, 128, side, tokens=200, **profile)
        scale = rows - profile["mean"] if "mean" in profile else rows
        assert np.linalg.norm(back - rows) / np.linalg.norm(scale) < most
    assert formats.decode(pages, name, 128, side).shape == (256, 128)


def test_sizes():
    assert formats.bits_per_value("q8_0", 128) == 8.5 or formats.bits_per_value("q8_0", 128) < 8.6
    assert formats.bits_per_value("f16", 64) == 16
    one = formats.block_bytes("q8_0/turbo4", layers=1, kv_heads=1, head_dim=128)
    assert one == formats.page_bytes("q8_0", 128) + formats.page_bytes("turbo4", 128)
    assert formats.block_bytes("q8_0/turbo4", layers=3, kv_heads=2, head_dim=128) == 6 * one


def test_errors():
    rows = np.zeros((2, 64), np.float32)
    with pytest.raises(errors.InvalidArgument, match="turbo4"):
        formats.encode(rows, "turbo9")
    with pytest.raises(errors.InvalidArgument, match="side"):
        formats.encode(rows, "turbo4", "q")
    with pytest.raises(errors.InvalidArgument, match="NaN"):
        formats.encode(rows * np.nan, "turbo4")
    with pytest.raises(errors.InvalidArgument):
        formats.encode(np.zeros((2, 63), np.float32), "turbo4")
    with pytest.raises(errors.InvalidArgument, match="head_dim"):
        formats.encode(rows, "turbo4", mean=np.zeros(3))
    with pytest.raises(errors.InvalidArgument, match="side"):
        formats.encode(rows, "turbo4", "v", mean=np.zeros(64))
    with pytest.raises(errors.InvalidArgument, match="gain"):
        formats.encode(rows, "turbo4", gain=np.zeros(64))
    pages = formats.encode(rows, "turbo4")
    with pytest.raises(errors.InvalidArgument, match="shape"):
        formats.decode(pages, "turbo3", 64)
    with pytest.raises(errors.InvalidArgument, match="take"):
        formats.decode(pages, "turbo4", 64, tokens=65)
