"""SmolLM2-135M and Gemma 3 270M three ways: kvtide's engine, transformers with DynamicCache, transformers with KvtideCache.

The models are those of tests/models.sh (KVTIDE_MODELS); `kvtide` is beside the daemon's folder (KVTIDE_TEST_PROGRAMS)."""
import json
import math
import os
import pathlib
import subprocess

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

import kvtide
from kvtide import eval as evaluation
from kvtide.transformers import KvtideCache
from ways import ROOT

MODELS = pathlib.Path(os.environ.get("KVTIDE_MODELS", "models"))
PROGRAMS = pathlib.Path(os.environ.get("KVTIDE_TEST_PROGRAMS", ROOT / "build" / "dev" / "daemon"))
KVTIDE = PROGRAMS.parent / "clients" / "cli" / "kvtide"
TEXT = ROOT / "tests" / "data" / "wikitext2_slice.txt"
FILES = ["smollm2-135m-q4_1.gguf", "gemma3-270m-q4_k_m.gguf"]
PAIRS = ["q8_0/turbo4", "turbo4/turbo4"]
CONTEXT = 512

pytestmark = pytest.mark.skipif(not (MODELS / FILES[0]).exists(), reason="no models: tests/models.sh brings them")


@pytest.fixture(scope="module", params=FILES)
def loaded(request):
    """The model with the weights of the file in f32, its tokens of the text as kvtide counts them, and what kvtide says."""
    path = MODELS / request.param
    report = json.loads(subprocess.run(
        [KVTIDE, "eval", "--kvtided", PROGRAMS / "kvtided", "--model", path, "--text", TEXT, "--windows", "1", "--context",
         str(CONTEXT), "--pairs", ",".join(PAIRS), "--no-layer-errors", "--no-progress", "--output", "json"],
        check=True, stdout=subprocess.PIPE).stdout)
    tokenizer = AutoTokenizer.from_pretrained(str(MODELS), gguf_file=request.param)
    model = AutoModelForCausalLM.from_pretrained(str(MODELS), gguf_file=request.param, dtype=torch.float32).eval()
    text = TEXT.read_text(encoding="utf-8")[: 12 * CONTEXT]
    # WikiText's "<unk>" is text, as kvtide and llama.cpp read it, and not Gemma's special token, which no text holds.
    tokens = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    if "gemma" in request.param:
        tokens = [tokenizer.bos_token_id] + tokens
    yield request.param, model, tokens[:CONTEXT], {row["pair"]: row for row in report["results"]}


def test_perplexities_agree(loaded):
    name, model, tokens, engine = loaded
    with torch.no_grad():
        model.set_attn_implementation("sdpa")
        ids = torch.tensor([tokens])
        cache, loss = DynamicCache(config=model.config), 0.0
        for at in range(0, CONTEXT, 64):
            logits = model(ids[:, at : at + 64], past_key_values=cache, use_cache=True).logits[0]
            wanted = ids[0, at + 1 : at + 65]
            loss += torch.nn.functional.cross_entropy(logits[: len(wanted)].float(), wanted, reduction="sum").item()
    stock = math.exp(loss / (CONTEXT - 1))
    ours = {}
    for mode in ("attend", "materialise"):
        report = evaluation.evaluate(model, tokens, PAIRS, name=name, text="slice", context=CONTEXT, mode=mode)
        ours[mode] = {row.pair: row for row in report.rows}
    print(f"\n{name}: perplexity of {CONTEXT} tokens: kvtide {engine['f16/f16']['perplexity']:.4f}, DynamicCache {stock:.4f}, "
          f"KvtideCache attend {ours['attend']['f16/f16'].perplexity:.4f}, materialise "
          f"{ours['materialise']['f16/f16'].perplexity:.4f}; " + ", ".join(
              f"{pair} {engine[pair]['change_percent']:+.3f} % and {ours['attend'][pair].change_percent:+.3f} %" for pair in PAIRS))
    for other in (engine["f16/f16"]["perplexity"], ours["attend"]["f16/f16"].perplexity,
                  ours["materialise"]["f16/f16"].perplexity):
        assert other == pytest.approx(stock, rel=2e-3)
    for pair in PAIRS:
        assert ours["attend"][pair].change_percent == pytest.approx(engine[pair]["change_percent"], abs=0.1)


def test_greedy_tokens_are_equal(loaded):
    _, model, tokens, _ = loaded
    prompt = torch.tensor([tokens[:300]])
    options = dict(max_new_tokens=40, do_sample=False, pad_token_id=0)
    model.set_attn_implementation("sdpa")
    want = model.generate(prompt, past_key_values=DynamicCache(config=model.config), **options)
    with kvtide.connect("embedded", device_memory="128MiB", host_memory=0) as pool:
        for implementation in ("sdpa", "kvtide"):
            model.set_attn_implementation(implementation)
            with KvtideCache(model, "f16/f16", pool=pool) as cache:
                assert torch.equal(model.generate(prompt, past_key_values=cache, **options), want), implementation
