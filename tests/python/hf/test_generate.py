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
    """Neither sequences nor bytes in any tier of the pool, nor memory of the process."""
    import resource

    model.set_attn_implementation("kvtide")
    inputs = inputs_of(tokenizer, "The river")
    used = lambda: [tier.used_bytes for tier in pool.stats().tiers]  # noqa: E731
    nothing = used()

    def calls(count):
        for _ in range(count):
            cache = KvtideCache(model, pool=pool)
            model.generate(**inputs, max_new_tokens=2, do_sample=False, pad_token_id=tokenizer.pad_token_id, past_key_values=cache)
            assert used() != nothing
            del cache
            assert pool.stats().sequences == 0 and used() == nothing

    calls(100)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    calls(900)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 40_000  # KiB


def long_prompt(tokenizer, tokens, text="wikitext2_slice.txt"):
    return tokenizer((ROOT / "tests" / "data" / text).read_text()[: 8 * tokens], return_tensors="pt")["input_ids"][:, :tokens]


def test_a_prompt_that_begins_as_an_earlier_one_did(model, tokenizer, pool, mode):
    """What an earlier cache has left of it is not computed again, and the tokens are the same; the earlier answer is found too."""
    from transformers import DynamicCache

    prompt = long_prompt(tokenizer, 300)
    options = {"max_new_tokens": 30, "do_sample": False, "pad_token_id": tokenizer.pad_token_id}
    model.set_attn_implementation("sdpa")
    first = model.generate(prompt, **options)
    turn = torch.cat([first, prompt[:, 7:40]], dim=1)  # the answer, and a second question
    other = torch.cat([prompt[:, :150], prompt[:, 3:60]], dim=1)
    want = {name: model.generate(ids, past_key_values=DynamicCache(config=model.config), **options)
            for name, ids in (("turn", turn), ("other", other))}
    model.set_attn_implementation(mode.attention("sdpa"))
    forwards = []
    hook = model.register_forward_pre_hook(lambda _, args, kwargs: forwards.append(kwargs["input_ids"].shape[1]), with_kwargs=True)
    try:
        for name, ids, reused in (("first", prompt, 0), ("first", prompt, 256), ("turn", turn, 320), ("other", other, 128)):
            with KvtideCache(model, "f16/f16", pool=pool, prompt_ids=ids, **mode.options) as cache:
                assert cache.reused_tokens == cache.get_seq_length() == reused, name
                forwards.clear()
                assert torch.equal(model.generate(ids, past_key_values=cache, **options), first if name == "first" else want[name])
                assert forwards[0] == ids.shape[1] - reused
                mode.check(cache)
                # All tokens but the last one that was generated have been through the model.
                assert [one.info().known_tokens for one in cache.sequences] == [ids.shape[1] + 29]
    finally:
        hook.remove()
    assert pool.stats().prefix_reused_tokens >= 256 + 320 + 128
    assert not model._forward_pre_hooks


def test_rows_begin_with_what_all_of_them_have(model, tokenizer, pool, mode):
    long, short = long_prompt(tokenizer, 260), long_prompt(tokenizer, 260).clone()
    short[:, 140:] = long[:, 20:140]
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": tokenizer.pad_token_id}
    model.set_attn_implementation("sdpa")
    both = torch.cat([long, short])
    want = model.generate(both, attention_mask=torch.ones_like(both), **options)
    model.set_attn_implementation(mode.attention("sdpa"))
    cache = KvtideCache(model, "f16/f16", pool=pool, prompt_ids=long, **mode.options)
    model.generate(long, past_key_values=cache, **options)
    cache.reset()
    assert cache.reused_tokens == 0 and cache.begin_with(both) == 128
    assert torch.equal(model.generate(both, attention_mask=torch.ones_like(both), past_key_values=cache, **options), want)
    cache.close()


def test_other_weights_pairs_and_adapters_share_nothing(model, tokenizer, pool):
    prompt = long_prompt(tokenizer, 200)
    model.set_attn_implementation("kvtide")

    def reused(of, pair="q8_0/turbo4"):
        with KvtideCache(of, pair, pool=pool, exact_window=(1, 0), prompt_ids=prompt) as cache:
            of.generate(prompt, past_key_values=cache, max_new_tokens=2, do_sample=False, pad_token_id=tokenizer.pad_token_id)
            return cache.reused_tokens

    assert [reused(model), reused(model)] == [0, 192]
    other = load()
    other.set_attn_implementation("kvtide")
    assert reused(other) == 192, "the same weights"
    assert reused(model, "f16/f16") == 0
    with torch.no_grad():
        other.get_parameter("model.layers.0.self_attn.k_proj.weight").mul_(1.01)
    assert reused(other) == 0


def test_what_begins_with_no_prefix_says_why(model, pool):
    prompt = torch.ones((1, 100), dtype=torch.long)
    with pytest.raises(ValueError, match="make the cache with the model"):
        KvtideCache(None, pool=pool, prompt_ids=prompt)
    for wrong in (torch.ones((1, 2, 3), dtype=torch.long), torch.ones((1, 4)), []):
        with pytest.raises(ValueError, match="token ids of generate"):
            KvtideCache(model, pool=pool, prompt_ids=wrong)
    with KvtideCache(model, pool=pool, prompt_ids=prompt) as cache:
        with pytest.raises(ValueError, match="the cache holds tokens"):
            cache.begin_with(prompt)
