"""The ways of generate() on a real model: the same tokens as with transformers' own cache, and nothing left behind."""
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import kvtide
from ways import ROOT
from kvtide.transformers import KvtideCache

MODEL = str(ROOT / "clients" / "engine" / "models" / "tidelm-7m")


def load():
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def model():
    return load()


@pytest.fixture(scope="module")
def tokenizer():
    made = AutoTokenizer.from_pretrained(MODEL)
    made.pad_token = made.pad_token or made.eos_token
    made.padding_side = "left"
    return made


def inputs_of(tokenizer, *texts):
    inputs = tokenizer(list(texts), return_tensors="pt", padding=True)
    inputs.pop("token_type_ids", None)
    return inputs


CASES = {
    "greedy": (1, {}),
    "batch with left padding": (2, {}),
    "several sequences": (1, {"do_sample": True, "num_return_sequences": 3, "top_k": 1}),
    "beams": (1, {"num_beams": 4}),
    "beams of a padded batch": (2, {"num_beams": 3, "num_return_sequences": 2}),
    "prompt lookup": (1, {"prompt_lookup_num_tokens": 4}),
    "assistant": (1, {"assistant_model": load}),
    "prefill in chunks": (1, {"prefill_chunk_size": 4}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("config", [True, False])
def test_same_tokens(model, tokenizer, pool, case, mode, config):
    rows, options = CASES[case]
    inputs = inputs_of(tokenizer, *["The river rose in the night and the", "In 1912 the city"][:rows])
    options = {"do_sample": False, "max_new_tokens": 24, "pad_token_id": tokenizer.pad_token_id, **options}

    def run(**more):
        made = {name: value() if callable(value) else value for name, value in options.items()}
        return model.generate(**inputs, **made, **more)

    model.set_attn_implementation("sdpa")
    try:
        want = run()
    except ValueError as error:  # 5.0 cannot prefill in chunks without a cache of the caller
        want = run(past_key_values=__import__("transformers").DynamicCache(config=model.config))
        assert "without a cache" in str(error)
    model.set_attn_implementation(mode.attention("sdpa"))
    cache = KvtideCache(model if config else None, "f16/f16", pool=pool, **mode.options)
    assert torch.equal(run(past_key_values=cache), want)
    mode.check(cache)
    assert len(cache.sequences) == cache.batch_size == want.shape[0] // options.get("num_return_sequences", 1) * max(
        options.get("num_beams", 1), 1 if "num_beams" in options else options.get("num_return_sequences", 1))


def test_a_conversation_goes_on(model, tokenizer, pool, mode):
    """A second turn with the same cache: only new tokens are computed."""
    model.set_attn_implementation("sdpa")
    first = inputs_of(tokenizer, "The river rose in the night and the")
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": tokenizer.pad_token_id}
    middle = model.generate(**first, **options)
    more = tokenizer(" In the morning", return_tensors="pt", add_special_tokens=False)["input_ids"]
    second = torch.cat([middle, more], dim=1)
    want = model.generate(second, **options)
    model.set_attn_implementation(mode.attention("sdpa"))
    with KvtideCache(model, "f16/f16", pool=pool, **mode.options) as cache:
        assert torch.equal(model.generate(**first, past_key_values=cache, **options), middle)
        assert torch.equal(model.generate(second, past_key_values=cache, **options), want)


@pytest.mark.parametrize("pair,most", [("q8_0/q8_0", 0.01), ("q8_0/turbo4", 0.02), ("turbo3/turbo3", 0.2)])
def test_coded_pairs_stay_near_and_are_small(model, tokenizer, pool, mode, pair, most):
    text = (ROOT / "tests" / "data" / "wikitext2_slice.txt").read_text()[:6000]
    ids = tokenizer(text, return_tensors="pt")["input_ids"][:, :1024]
    model.set_attn_implementation("sdpa")

    def loss(cache):
        total = 0.0
        with torch.no_grad():
            for begin in range(0, 1024, 128):
                piece = ids[:, begin:begin + 128]
                logits = model(piece, past_key_values=cache, use_cache=True).logits
                scored = ids[:, begin + 1:begin + 129]
                total += torch.nn.functional.cross_entropy(logits[0, : scored.shape[1]], scored[0], reduction="sum").item()
        return total / 1023

    from transformers import DynamicCache

    want = loss(DynamicCache(config=model.config))
    model.set_attn_implementation(mode.attention("sdpa"))
    sizes = {}
    for one in (pair, "f16/f16"):
        with KvtideCache(model, one, pool=pool, exact_window=(1, 2), **mode.options) as cache:
            assert abs(loss(cache) - want) < (most if one == pair else 5e-3)
            sizes[one] = cache.stored_bytes
    assert sizes[pair] < 0.75 * sizes["f16/f16"]


def test_over_a_daemon(model, tokenizer, daemon):
    inputs = inputs_of(tokenizer, "The river rose in the night and the", "In 1912 the city")
    options = {"max_new_tokens": 8, "num_beams": 2, "do_sample": False, "pad_token_id": tokenizer.pad_token_id}
    model.set_attn_implementation("sdpa")
    want = model.generate(**inputs, **options)
    model.set_attn_implementation("kvtide")
    with kvtide.connect(daemon.address) as pool:
        cache = KvtideCache(model, "f16/f16", pool=pool)
        assert torch.equal(model.generate(**inputs, past_key_values=cache, **options), want)
        assert pool.stats().sequences == 4
        del cache
        assert pool.stats().sequences == 0


def test_a_thousand_calls_leave_nothing(model, tokenizer, pool):
    import resource

    model.set_attn_implementation("kvtide")
    inputs = inputs_of(tokenizer, "The river")

    def calls(count):
        for _ in range(count):
            model.generate(**inputs, max_new_tokens=2, do_sample=False, pad_token_id=tokenizer.pad_token_id,
                           past_key_values=KvtideCache(model, pool=pool))
            assert pool.stats().sequences == 0

    calls(100)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    calls(900)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 40_000  # KiB
