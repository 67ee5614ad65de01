"""llama.cpp itself with its states in pools: SmolLM2-135M through llama-cpp-python, and slot files as llama-server writes them.

`tests/run.sh llama` installs what is needed. The numbers that it prints are recorded in tests/python/llama/README.md."""
import ctypes
import os
import pathlib
import time

import numpy as np
import pytest

import kvtide
from kvtide.errors import Unimplemented
from kvtide.llama_cpp import KvtideCache, parse_state
from kvtide.llama_cpp.__main__ import main
from ways import ROOT

llama_cpp = pytest.importorskip("llama_cpp")
MODELS = pathlib.Path(os.environ.get("KVTIDE_MODELS", "models"))
SMOLLM2, GEMMA3 = MODELS / "smollm2-135m-q4_1.gguf", MODELS / "gemma3-270m-q4_k_m.gguf"
TEXT = (ROOT / "tests" / "data" / "wikitext2_slice.txt").read_text(encoding="utf-8")


def load(path, **options):
    return llama_cpp.Llama(str(path), n_ctx=2048, n_threads=1, n_threads_batch=1, verbose=False, seed=1, **options)


@pytest.fixture(scope="module")
def smollm2():
    model = load(SMOLLM2)
    yield model
    model.close()


@pytest.fixture
def pool():
    with kvtide.connect("embedded", device="cpu", device_memory="256MiB", host_memory=0) as made:
        yield made


def prompt(model, tokens):
    return model.tokenize(TEXT.encode("utf-8"), add_bos=False)[:tokens]


def fresh(model, tokens):
    model.reset()
    model._ctx.kv_cache_clear()
    model.eval(tokens)
    return model.save_state()


@pytest.mark.parametrize("options", [{}, {"flash_attn": True}, {"type_k": 0, "type_v": 0}], ids=["f16", "flash", "f32"])
def test_the_state_comes_back_to_the_byte(pool, options):
    model = load(SMOLLM2, **options)
    tokens = prompt(model, 640)
    state = fresh(model, tokens)
    parsed = parse_state(state.llama_state)
    assert parsed.architecture == "llama" and len(parsed.parts) == 1
    assert len(parsed.parts[0].keys) == 30 and parsed.parts[0].keys[0].width == 192
    assert parsed.parts[0].values[0].transposed == (not options.get("flash_attn", False))
    cache = KvtideCache(model, pool=pool, pair="f16/f16")
    cache[tokens] = state
    back = cache[tokens]
    if "type_k" in options:  # the pool's f16 holds no f32
        ours, theirs = parse_state(back.llama_state), parsed
        for one, other in zip(ours.parts[0].keys, theirs.parts[0].keys):
            np.testing.assert_allclose(one.of(back.llama_state), other.of(state.llama_state), rtol=1e-3, atol=1e-6)
    else:
        assert back.llama_state == state.llama_state
    model.load_state(back)
    model.close()


def losses(model, state, tokens, text):
    """Loss of `text` behind a state, nats per token."""
    model.load_state(state)
    total, steps = 0.0, 0
    for at in range(0, len(text) - 1, 64):
        part = text[at : at + 64]
        model.eval(part)
        logits = model.scores[len(tokens) + at : len(tokens) + at + len(part)]
        for i, row in enumerate(logits):
            if at + i + 1 < len(text):
                row = row.astype(np.float64)
                peak = row.max()
                total += peak + np.log(np.exp(row - peak).sum()) - row[text[at + i + 1]]
                steps += 1
    return total / steps


def test_640_tokens_of_turbo4(pool, capsys):
    """What is asked: below 0.3 s each way, and next to no harm."""
    model = load(SMOLLM2, logits_all=True)
    text = prompt(model, 640 + 320)
    tokens, rest = text[:640], text[640:]
    state = fresh(model, tokens)
    plain = losses(model, state, tokens, rest)
    report = []
    for pair in ("f16/f16", "q8_0/turbo4", "turbo4/turbo4"):
        cache = KvtideCache(model, pool=pool, pair=pair)
        started = time.monotonic()
        cache[tokens] = state
        stored = time.monotonic() - started
        started = time.monotonic()
        back = cache[tokens]
        loaded = time.monotonic() - started
        harm = losses(model, back, tokens, rest) - plain
        report.append(f"{pair:14} {len(state.llama_state) / cache.cache_size:5.2f}x smaller, store {stored:.3f} s, "
                      f"load {loaded:.3f} s, {harm:+.4f} nats/token")
        assert abs(harm) < {"f16/f16": 1e-6, "q8_0/turbo4": 0.01, "turbo4/turbo4": 0.08}[pair]
        cache.clear()
    with capsys.disabled():
        print("\nSmolLM2-135M, 640 tokens kept, loss of the 320 behind them:", *report, sep="\n  ")
    model.close()


def test_a_conversation_finds_its_prefix(smollm2, pool):
    """Completions with the cache are those with llama-cpp-python's own, and the second turn does not read the first again.

    Not those without a cache: llama.cpp rounds a token's keys differently in a batch than alone, which can turn a near tie."""
    turns = ["The river rose in the night and the " + TEXT[:1500]]
    answers = {}
    for name in ("theirs", "ours"):
        smollm2.reset()
        smollm2._ctx.kv_cache_clear()
        cache = KvtideCache(smollm2, pool=pool, pair="f16/f16") if name == "ours" else llama_cpp.LlamaRAMCache()
        smollm2.set_cache(cache)
        first = smollm2.create_completion(turns[0], max_tokens=12, temperature=0)["choices"][0]["text"]
        # Another conversation between the two.
        smollm2.create_completion("Something else entirely. " * 20, max_tokens=4, temperature=0)
        second = smollm2.create_completion(turns[0] + first + " And then", max_tokens=12, temperature=0)["choices"][0]["text"]
        answers[name] = (first, second)
        if name == "ours":
            assert cache.entries == 3
            prefix = cache[smollm2.tokenize((turns[0] + first).encode())].n_tokens
            assert prefix >= 300
            cache.close()
    smollm2.set_cache(None)
    assert answers["ours"] == answers["theirs"]


def test_sliding_windows_of_gemma3(pool):
    model = load(GEMMA3)
    tokens = prompt(model, 900)  # more than the window of 512
    state = fresh(model, tokens)
    assert len(parse_state(state.llama_state).parts) == 2
    cache = KvtideCache(model, pool=pool, pair="f16/f16")
    cache[tokens] = state
    assert cache[tokens].llama_state == state.llama_state
    model.close()


def test_a_quantised_cache_is_refused(pool):
    model = load(SMOLLM2, type_k=8, type_v=8, flash_attn=True)
    with pytest.raises(Unimplemented, match="type_k=8"):
        KvtideCache(model, pool=pool)
    state = fresh(model, prompt(model, 64))
    with pytest.raises(Unimplemented, match="q8_0|rotated"):
        parse_state(state.llama_state)
    model.close()


def test_slot_files(smollm2, daemon, tmp_path, capsys):
    """`llama_state_seq_save_file` is what llama-server's slots call."""
    tokens = prompt(smollm2, 500)
    fresh(smollm2, tokens)
    file = tmp_path / "slot.bin"
    ids = (llama_cpp.llama_token * len(tokens))(*tokens)
    assert llama_cpp.llama_state_seq_save_file(smollm2._ctx.ctx, str(file).encode(), 0, ids, len(tokens)) > 0
    data = file.read_bytes()
    assert main(["save", str(file), "--model", str(SMOLLM2), "--address", daemon.address, "--pair", "f16/f16"]) == 0
    file.unlink()
    assert main(["restore", f"{file}.kvtide"]) == 0
    assert file.read_bytes() == data
    smollm2.reset()
    smollm2._ctx.kv_cache_clear()
    out, count = (llama_cpp.llama_token * 2048)(), ctypes.c_size_t()
    assert llama_cpp.llama_state_seq_load_file(smollm2._ctx.ctx, str(file).encode(), 0, out, 2048, ctypes.byref(count)) > 0
    assert list(out[: count.value]) == tokens
    assert main(["forget", f"{file}.kvtide"]) == 0
