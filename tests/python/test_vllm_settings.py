"""What the backend's settings take and refuse; needs no engine."""

import re
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from kvtide.errors import InvalidArgument
from kvtide.profiles import KeyProfile
from kvtide.vllm.choose import choose, harm_of
from kvtide.vllm.settings import Settings, check_transforms, heads_of_rank, key_means, refusals
from ways import ROOT

MODEL = str(ROOT / "clients" / "engine" / "models" / "tidelm-7m")


def test_where_settings_come_from():
    assert Settings.read({}) == Settings("auto", 1, 2, None)
    read = Settings.read({"KVTIDE_PAIR": "q8_0/turbo4", "KVTIDE_EXACT_WINDOW": "0+4", "KVTIDE_SIDE_MEMORY": "1.5GiB"})
    assert read == Settings("q8_0/turbo4", 0, 4, 3 << 29)
    assert Settings.read({"KVTIDE_PAIR": "turbo3"}, {"kvtide": {"pair": "f16"}}).pair == "f16/f16"
    assert Settings.read({"KVTIDE_PROFILE": "a"}).profile == "a" and Settings.read({}, {"kvtide": {"profile": "b"}}).profile == "b"
    assert read.window_for(0) == (0, 4) and Settings().window_for(128) == (0, 2)


@pytest.mark.parametrize("environment,words", [
    ({"KVTIDE_PAIR": "turbo9"}, "turbo4"), ({"KVTIDE_PAIR": "f16/f16/f16"}, "the type of keys and of values"),
    ({"KVTIDE_PAIR": "tide3/turbo3"}, "KVTIDE_PROFILE .*--keys after-rope"), ({"KVTIDE_PAIR": "tide3"}, "tide3 codes keys only"),
    ({"KVTIDE_EXACT_WINDOW": "2"}, "such as 1[+]2"), ({"KVTIDE_EXACT_WINDOW": "1+65"}, "at most 64"),
    ({"KVTIDE_SIDE_MEMORY": "much"}, "such as 2GiB")])
def test_mistakes_say_what_to_write(environment, words):
    with pytest.raises(InvalidArgument, match=words):
        Settings.read(environment)


def test_unknown_keys():
    with pytest.raises(InvalidArgument, match="pair, exact_window, side_memory, profile"):
        Settings.read({}, {"kvtide": {"pairs": "f16"}})


def config(**changes):
    options = dict(cache_dtype="auto", block_size=64, kv_transfer_config=None, use_mla=False, is_encoder_decoder=False,
                   decode_context_parallel_size=1, enable_dbo=False)
    options.update(changes)
    one = SimpleNamespace(**options)
    return SimpleNamespace(cache_config=one, parallel_config=one, model_config=one, kv_transfer_config=one.kv_transfer_config)


def test_what_runs_is_not_refused():
    assert refusals(config()) == [] and refusals(config(block_size=128)) == []
    assert refusals(config(block_size=16, user_specified_block_size=False)) == []  # vLLM asks the backend later
    assert refusals(config(kv_transfer_config=SimpleNamespace(kv_connector="KvtideConnector"))) == []


@pytest.mark.parametrize("change,words", [
    ({"cache_dtype": "fp8"}, "--kv-cache-dtype fp8"), ({"block_size": 16}, "--block-size 64"), ({"use_mla": True}, "latent"),
    ({"is_encoder_decoder": True}, "encoder-decoder"), ({"decode_context_parallel_size": 2}, "--tensor-parallel-size"),
    ({"enable_dbo": True}, "--enable-dbo"),
    ({"kv_transfer_config": SimpleNamespace(kv_connector="OffloadingConnector")}, "the KV connector OffloadingConnector")])
def test_refusals_say_what_to_change(change, words):
    (reason,) = refusals(config(**change))
    assert words in reason


def test_auto_is_the_planners_choice():
    small = choose(MODEL, "vram=64MiB,bandwidth=100GB/s", 4096, 64)
    assert small.pair != "f16/f16" and "%" in small.reason
    large = choose(MODEL, "vram=24GiB,bandwidth=100GB/s", 4096, 1)
    assert large.pair == "q8_0/q8_0" and "4096 tokens fit" in large.reason
    assert re.search(r"1[.]8x the tokens of f16; KVTIDE_PAIR=turbo4/turbo4 holds 3[.]\dx, [+]0[.]0\d % perplexity", large.reason)
    with pytest.raises(InvalidArgument, match="choose a pair yourself|Choose a pair yourself"):
        choose("no-such-model", "vram=24GiB,bandwidth=100GB/s", 4096, 1)
    assert "tidelm-7m" in harm_of("turbo4/turbo4", MODEL, "vram=24GiB,bandwidth=100GB/s", 4096)
    assert harm_of("turbo4/turbo4", "no-such-model", "vram=24GiB,bandwidth=100GB/s", 4096) is None


def test_the_command_line_is_made_without_vllm_or_its_packages():
    result = subprocess.run([sys.executable, "-m", "kvtide.vllm", "Llama3.1-8B", "--max-model-len", "8192", "--device", "RTX 4090",
                             "--pair", "turbo4"], capture_output=True, text=True)
    assert result.returncode == 0 and "KVTIDE_PAIR=turbo4/turbo4 vllm serve" in result.stdout, result.stderr
    result = subprocess.run([sys.executable, "-m", "kvtide.vllm", "Llama3.1-8B", "--device", "RTX 4090", "--pair", "tide3/turbo3"],
                            capture_output=True, text=True)
    assert result.returncode == 2 and "--keys after-rope" in result.stderr, result.stderr
    result = subprocess.run([sys.executable, "-m", "kvtide.vllm", "no-such-model"], capture_output=True, text=True)
    assert result.returncode != 0 and "no-such-model" in result.stderr and "Traceback" not in result.stderr, result.stderr


def test_a_profile_is_of_the_model():
    means = [np.full((2, 128), layer, np.float32) for layer in range(6)]
    profile = KeyProfile("tidelm-7m", "manuals.txt", 1000, means)
    assert key_means(profile, 6, 2, 128) is means
    for shape in ((5, 2, 128), (6, 4, 128), (6, 2, 64)):
        with pytest.raises(InvalidArgument, match="of tidelm-7m with 6 layers of 2 KV heads of 128"):
            key_means(profile, *shape)


def test_calibrated_keys_take_transforms_of_keys_after_rope():
    assert Settings.read({"KVTIDE_PAIR": "tide3/turbo3", "KVTIDE_PROFILE": "a"}).pair == "tide3/turbo3"

    def profile(types=4, **more):
        layers = dict(transforms=[np.zeros((2, 128, 128), np.float32)], widths=[np.zeros((2, types, 16), np.uint8)])
        return KeyProfile("tidelm-7m", "manuals.txt", 1000, [np.zeros((2, 128), np.float32)], **layers, **more)

    check_transforms(profile(after_rope=True), "tide1/turbo2")
    check_transforms(profile(3, after_rope=True), "tide2/turbo2")
    for wrong, pair, words in ((KeyProfile("m", "t", 1, [np.zeros((2, 128), np.float32)]), "tide3/turbo3", "means alone"),
                               (profile(), "tide3/turbo3", "before RoPE.*--keys after-rope"),
                               (profile(3, after_rope=True), "tide1/turbo2", "older than tide1")):
        with pytest.raises(InvalidArgument, match=words):
            check_transforms(wrong, pair)


def test_heads_of_ranks():
    assert [heads_of_rank(rank, 4, 8) for rank in range(4)] == [slice(0, 2), slice(2, 4), slice(4, 6), slice(6, 8)]
    assert [heads_of_rank(rank, 4, 2) for rank in range(4)] == [slice(0, 1), slice(0, 1), slice(1, 2), slice(1, 2)]
    assert heads_of_rank(0, 1, 3) == slice(0, 3)
