"""kvtide's attention backend in a real vLLM on the CPU: the tokens of vLLM's own backend, the perplexity of `kvtide eval`, and
everything that vLLM does with pages."""

import json
import math
import os
import pathlib
import re
import subprocess

import engine
import pytest
from engine import GREEDY, ROOT

FEW = {**GREEDY, "max_tokens": 16}


def greedy(count, **sampling):
    return {"prompts": engine.prompts(200)[:count], "sampling": {**FEW, "logprobs": 2, **sampling}}


SAMPLES = greedy(24, temperature=0.8, seed=1, n=3)


@pytest.fixture(scope="module")
def stock():
    """vLLM's own backend in float32, where hardly two tokens are as likely: the first batch of what the tests compare with."""
    return engine.run([greedy(24), SAMPLES], dtype="float32")[0]


def check_same(ours, theirs, what, near_tie=0.01, most=10):
    """Tokens are equal but where the two likeliest were nearly as likely, in one prompt of `most`; those are listed."""
    different = engine.differences(ours, theirs)
    for prompt, place, margin in different:
        print(f"{what}: prompt {prompt} differs from token {place} on; the two likeliest were {margin:.4f} nats apart")
    print(f"{what}: {len(theirs) - len(different)} of {len(theirs)} prompts give equal tokens")
    assert all(margin < near_tie for _, _, margin in different), different
    assert len(different) <= max(1, len(theirs) // most), different


def test_f16_pages_give_the_tokens_of_vllms_own_backend():
    """200 prompts in bfloat16, whose logits here are 0.03 to 0.06 apart, so that ties are common. FlashAttention, with which GPUs compare,
    rounds probabilities to bfloat16: more prompts part there, at up to two steps of a logit."""
    theirs, _ = engine.run([greedy(200)], max_num_seqs=64)
    ours, _ = engine.run([greedy(200)], pair="f16", max_num_seqs=64)
    check_same(ours["batches"][0], theirs["batches"][0], "f16", near_tie=0.13 if engine.GPU else 0.08, most=6 if engine.GPU else 10)
    assert ours["kv_tokens"] == theirs["kv_tokens"]


@pytest.mark.smoke
def test_chunks_and_no_prefix_cache(stock):
    ours, _ = engine.run([greedy(24)], pair="f16", max_num_batched_tokens=64, enable_prefix_caching=False, dtype="float32")
    check_same(ours["batches"][0], stock["batches"][0], "chunks of 64")


@pytest.mark.skipif(not engine.GPU, reason="CUDA graphs are a GPU's (KVTIDE_ENGINES_GPU=1)")
@pytest.mark.parametrize("how,more", [
    ("compiled", {"compilation_config": {"cudagraph_mode": "FULL_AND_PIECEWISE"}}),
    ("piecewise alone", {"compilation_config": {"cudagraph_mode": "PIECEWISE"}}),
    ("with breaks", {"compilation_config": {"mode": 0, "cudagraph_mode": "FULL_AND_PIECEWISE", "cudagraph_capture_sizes": [1, 8, 24, 64, 96]},
                     "env": {"VLLM_USE_BREAKABLE_CUDAGRAPH": 1}})])
def test_piecewise_graphs(stock, how, more):
    """Chunks of 96 tokens, so that batches of prompts and answers fit the graphs, and are padded there: what torch.compile splits at
    the attention, and what vLLM captures with breaks at it."""
    ours, _ = engine.run([greedy(24), greedy(24)], pair="f16", max_num_batched_tokens=96, max_num_seqs=64, dtype="float32", **more)
    print(f"{how}: steps by graphs {ours['graphs']}")
    for batch in ours["batches"]:  # the second time from the prefix cache
        check_same(batch, stock["batches"][0], how)
    assert ours["graphs"]["PIECEWISE"] > 20, ours["graphs"]
    assert how == "piecewise alone" or ours["graphs"]["FULL"] > 5, ours["graphs"]


def test_preemption_and_speculation(stock):
    """A cache of 21 blocks for prompts of up to 10, and drafts from the prompt, of which some are refused."""
    ours, log = engine.run([greedy(24), greedy(24)], pair="f16", max_num_seqs=8, max_model_len=1024, dtype="float32",
                           kv_cache_memory_bytes=22 * 6 * 65536,
                           speculative_config={"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 3})
    for batch in ours["batches"]:
        check_same(batch, stock["batches"][0], "preempted, with drafts")
    assert ours["preemptions"] > 0, ours
    assert ours["drafts_accepted"] > 0, ours


def test_prefix_hits_and_several_samples(stock):
    """The second time a prompt's full blocks are hits; samples of one prompt share its pages and part in their last block."""
    ours, _ = engine.run([greedy(24), greedy(24), SAMPLES], pair="f16", dtype="float32")
    check_same(ours["batches"][0], stock["batches"][0], "first time")
    check_same(ours["batches"][1], stock["batches"][0], "prefix hits")
    assert sum(one["cached"] for one in ours["batches"][1]) > 24 * 100
    same = sum(a == b for one, other in zip(ours["batches"][2], stock["batches"][1]) for a, b in zip(one["tokens"], other["tokens"]))
    print(f"three samples: {same} of 72 equal")
    assert all(len(one["tokens"]) == 3 for one in ours["batches"][2])
    assert same >= 60, same  # a draw near the border of two tokens changes the rest of a sample


@pytest.mark.parametrize("pair,ratio", [("turbo4/turbo4", 3.87), ("q8_0/turbo4", 2.53)])
def test_perplexity_is_that_of_kvtide_eval(pair, ratio):
    """The same text in chunks of one block, so that both see the exact window that decoding would see."""
    context, windows = 1024, 2
    tokens = engine.text_tokens()
    prompts = [tokens[w * context:(w + 1) * context] for w in range(windows)]
    mine, ours, log = perplexity(pair, prompts)
    wanted = of_kvtide_eval(pair, context, windows)
    print(f"{pair}: perplexity {mine:.4f} in vLLM, {wanted:.4f} by kvtide eval, {100 * (mine / wanted - 1):+.4f} %")
    assert mine == pytest.approx(wanted, rel=1e-3)
    assert ours["kv_tokens"] == pytest.approx((256 << 20) // (6 * 65536) * 64 * ratio, rel=0.01)
    assert re.search(r"KV cache in " + pair, log) and "exact pages" in log


def test_keys_around_the_means_of_a_profile(tmp_path):
    """KVTIDE_PROFILE: the perplexity of `kvtide eval --profile`, less than without; a profile of another model is refused."""
    context, pair, profile = 1024, "turbo2/turbo2", tmp_path / "model.profile"
    kvtide("calibrate", "--model", engine.MODEL, "--text", str(ROOT / "tests" / "data" / "manuals.txt"), "--tokens", "2048", "--means-only",
           "--out", str(profile), "--no-progress")
    prompts = [engine.text_tokens()[:context]]
    around, _, log = perplexity(pair, prompts, env={"KVTIDE_PROFILE": str(profile)})
    without, _, _ = perplexity(pair, prompts)
    wanted = of_kvtide_eval(pair, context, 1, "--profile", str(profile))
    print(f"{pair} around means: perplexity {around:.4f} in vLLM, {wanted:.4f} by kvtide eval; {without:.4f} without")
    assert around == pytest.approx(wanted, rel=1e-3) and around < 0.997 * without
    assert "keys around their means over 1984 tokens of manuals.txt" in log
    with pytest.raises(AssertionError, match="KVTIDE_PROFILE: .*none.profile"):
        engine.run([], pair=pair, env={"KVTIDE_PROFILE": str(tmp_path / "none.profile")})


@pytest.mark.parametrize("pair,ratio", [("tide3/turbo3", 5.12), ("tide2/turbo2", 7.53)])
def test_calibrated_keys_after_rope(tmp_path, pair, ratio):
    """The perplexity of `kvtide eval` with the same profile, which is less than that of turbo of the same bits over eight windows (one alone,
    as vLLM reads here, does not order types of two bits)."""
    context, turbo = 1024, pair.replace("tide", "turbo")
    profile = calibrated(tmp_path, "--keys", "after-rope")
    prompts = [engine.text_tokens()[:context]]
    mine, ours, log = perplexity(pair, prompts, env={"KVTIDE_PROFILE": str(profile)})
    wanted = of_kvtide_eval(pair, context, 1, "--profile", str(profile))
    over_more, beside = of_kvtide_eval(pair, context, 8, "--profile", str(profile)), of_kvtide_eval(turbo, context, 8)
    print(f"{pair}: perplexity {mine:.4f} in vLLM, {wanted:.4f} by kvtide eval; over eight windows {over_more:.4f}, {turbo} {beside:.4f}")
    assert mine == pytest.approx(wanted, rel=1e-3) and over_more < beside
    assert ours["kv_tokens"] == pytest.approx((256 << 20) // (6 * 65536) * 64 * ratio, rel=0.01)
    assert "keys by transforms over" in log


def test_profiles_that_calibrated_keys_cannot_use(tmp_path):
    for words, env in ((r"KVTIDE_PROFILE \(make one with .*--keys after-rope", {}),
                       ("transforms are of keys before RoPE", {"KVTIDE_PROFILE": str(calibrated(tmp_path))}),
                       ("means alone", {"KVTIDE_PROFILE": str(calibrated(tmp_path, "--means-only"))})):
        with pytest.raises(AssertionError, match=words):
            engine.run([], pair="tide3/turbo3", env=env)


def calibrated(folder, *more):
    out = folder / ("_".join(more).replace("-", "") + ".profile")
    kvtide("calibrate", "--model", engine.MODEL, "--text", str(ROOT / "tests" / "data" / "manuals.txt"), "--out", str(out), "--no-progress",
           *more)
    return out


def perplexity(pair, prompts, env=None):
    """Of prompts in chunks of one block, with what the engine and its log say."""
    ours, log = engine.run([{"prompts": prompts, "sampling": {"temperature": 0, "max_tokens": 1, "prompt_logprobs": 0}}], pair=pair, env=env,
                           max_num_seqs=4, max_num_batched_tokens=64, enable_prefix_caching=False, dtype="float32")
    scores = ours["batches"][0]
    return math.exp(-sum(one["prompt_logprob"] for one in scores) / sum(one["predictions"] for one in scores)), ours, log


def kvtide(*arguments):
    program = pathlib.Path(os.environ.get("KVTIDE_TEST_PROGRAMS", ROOT / "build" / "dev" / "clients" / "cli")) / "kvtide"
    done = subprocess.run([str(program), *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def of_kvtide_eval(pair, context, windows, *more):
    rows = json.loads(kvtide("eval", "--model", engine.MODEL, "--text", str(engine.TEXT), "--context", str(context), "--windows", str(windows),
                             "--pairs", pair, "--output", "json", *more))["results"]
    return next(row["perplexity"] for row in rows if row["pair"] == pair)


def test_coded_pages_under_pressure(stock):
    """Everything at once over turbo4: hits, preemption, drafts, few exact pages. Most tokens are those of f16."""
    ours, log = engine.run([greedy(24), greedy(24)], pair="turbo4/turbo4", env={"KVTIDE_SIDE_MEMORY": "1MiB"}, max_num_seqs=8,
                           max_model_len=1024, kv_cache_memory_bytes=22 * 6 * 16896, dtype="float32",
                           speculative_config={"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 3})
    assert ours["preemptions"] > 0
    assert "raise KVTIDE_SIDE_MEMORY" in log
    wanted = [one["tokens"][0] for one in stock["batches"][0]]
    for batch in ours["batches"]:
        assert sum(one["tokens"][0][0] == tokens[0] for one, tokens in zip(batch, wanted)) >= 21
        assert sum(one["tokens"][0] == tokens for one, tokens in zip(batch, wanted)) >= 12


def test_options_that_do_not_go_together_are_refused_at_the_start():
    with pytest.raises(AssertionError, match=r"--kv-cache-dtype fp8: kvtide codes the cache itself"):
        engine.run([], pair="turbo4/turbo4", kv_cache_dtype="fp8")
