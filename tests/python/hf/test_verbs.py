"""The verbs of a cache, one by one, against DynamicCache; and what is refused."""
import gc

import pytest
import torch
from transformers import DynamicCache

import kvtide
import models
from kvtide.transformers import IsoQuantCache, KvtideCache, TurboQuantCache

MODES = ["attend", "materialise"]


class Pair:
    """A model with two caches that get the same calls."""

    def __init__(self, name, pool, mode, pair="f16/f16"):
        self.model = models.make(name)
        self.mode = mode
        self.set("eager")
        self.stock = DynamicCache(config=self.model.config)
        self.set("kvtide" if mode == "attend" else "eager")
        self.ours = KvtideCache(self.model, pair, pool=pool)

    def set(self, implementation):
        self.model.set_attn_implementation(implementation)

    def forward(self, ids, mask=None):
        with torch.no_grad():
            self.set("eager")
            want = self.model(ids, attention_mask=mask, past_key_values=self.stock, use_cache=True).logits
            self.set("kvtide" if self.mode == "attend" else "eager")
            got = self.model(ids, attention_mask=mask, past_key_values=self.ours, use_cache=True).logits
        if mask is not None:
            seen = mask[:, -ids.shape[1]:].bool()
            got, want = got[seen], want[seen]
        assert (got - want).abs().max() < 0.02 * want.abs().max()
        assert self.ours.get_seq_length() == self.stock.get_seq_length()

    def call(self, verb, *arguments):
        getattr(self.stock, verb)(*arguments)
        getattr(self.ours, verb)(*arguments)


def ids(rows, tokens, seed=0):
    return torch.randint(2, 99, (rows, tokens), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_batch_verbs(pool, mode, name):
    pair = Pair(name, pool, mode)
    pair.forward(ids(2, 70))
    pair.call("batch_repeat_interleave", 3)
    pair.forward(ids(6, 3, 1))
    pair.call("reorder_cache", torch.tensor([0, 0, 5, 2, 2, 2]))
    pair.forward(ids(6, 3, 2))
    pair.call("batch_select_indices", torch.tensor([5, 1]))
    pair.forward(ids(2, 1, 3))
    assert pool.stats().sequences == 2


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_forks_grow_apart(pool, mode, name):
    pair = Pair(name, pool, mode)
    pair.forward(ids(1, 100))
    before = pool.stats().stored_bytes
    with pair.ours.fork() as fork:
        with torch.no_grad():
            pair.model(ids(1, 5, 1), past_key_values=fork, use_cache=True)
        assert fork.get_seq_length() == 105 and pair.ours.get_seq_length() == 100
        assert pool.stats().stored_bytes < 2 * before
        pair.forward(ids(1, 7, 2))  # as if nothing had happened
    pair.forward(ids(1, 1, 3))


def test_a_profile_of_keys(pool):
    """Keys are coded around the means of the profile: with those of the model itself, nearer to what they are."""
    import numpy as np

    from kvtide.profiles import KeyProfile

    model = models.make("llama")
    model.set_attn_implementation("eager")
    stock = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids(1, 400), past_key_values=stock, use_cache=True)
    means = [layer.keys[0].mean(dim=1).numpy() for layer in stock.layers]
    errors = {}
    for name, profile in (("none", None), ("profile", KeyProfile("m", "t", 400, means))):
        with KvtideCache(model, "turbo2/f16", pool=pool, exact_window=(0, 0), profile=profile) as cache:
            with torch.no_grad():
                model(ids(1, 400), past_key_values=cache, use_cache=True)
            k = [cache.sequences[0].read(layer)[0] for layer in range(len(stock.layers))]
        errors[name] = np.mean([np.abs(one - layer.keys[0].transpose(0, 1).numpy()).mean()
                                for one, layer in zip(k, stock.layers)])
    assert errors["profile"] < errors["none"]
    with pytest.raises(ValueError, match="give profile=, a file of `kvtide calibrate`$"):
        KvtideCache(model, "tide3/turbo3", pool=pool)
    with pytest.raises(ValueError, match="means alone"):
        KvtideCache(model, "tide3/turbo3", pool=pool, profile=KeyProfile("m", "t", 400, means))
    with pytest.raises(ValueError, match="with 1 layers"):
        with KvtideCache(model, pool=pool, profile=KeyProfile("m", "t", 400, means[:1])) as cache, torch.no_grad():
            model(ids(1, 4), past_key_values=cache, use_cache=True)


def test_the_planner_chooses_among_calibrated_pairs(pool):
    """`pair="auto"` with a profile: keys are coded by it where the chosen pair was measured so."""
    import numpy as np

    from kvtide.profiles import KeyProfile

    model = models.make("llama")
    model.set_attn_implementation("sdpa")
    text = model.config
    dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    profile = KeyProfile("m", "t", 400, [np.ones((text.num_key_value_heads, dim), np.float32)] * text.num_hidden_layers)
    chosen = set()
    for context in (1 << n for n in range(10, 22)):
        cache = KvtideCache(model, pool=pool, profile=profile, context=context)
        try:
            with cache, torch.no_grad():
                model(ids(1, 70), past_key_values=cache, use_cache=True)
                plan = pool.plan(cache._store.model, [context], key_centring="calibrated").contexts[0]
                assert cache.pair in (plan.chosen_pair, plan.split_pair)
                calibrated = next(one.calibrated for one in plan.candidates if one.pair == cache.pair)
                assert cache._store.settings["key_centring"] == ("calibrated" if calibrated else "default")
                chosen.add((cache.pair, calibrated))
        except ValueError as error:
            assert "do not fit" in str(error)
            break
    assert {calibrated for _, calibrated in chosen} == {False, True}, chosen


@pytest.mark.parametrize("mode", MODES)
def test_crop(pool, mode):
    pair = Pair("llama", pool, mode)
    pair.forward(ids(2, 150))
    pair.call("crop", -20)
    pair.forward(ids(2, 5, 1))
    pair.call("crop", torch.tensor(-71))
    pair.forward(ids(2, 1, 2))
    pair.call("crop", 0) if pair.stock.get_seq_length() == 65 and hasattr(pair.stock, "activate_past_recording") else None
    pair.forward(ids(2, 90, 3))
    pair.ours.crop(1000)  # longer than it is: nothing
    assert pair.ours.get_seq_length() == 155
    pair.ours.crop(100)
    assert pair.ours.get_seq_length() == 100


@pytest.mark.parametrize("mode", MODES)
def test_crop_beyond_a_window(pool, mode):
    """Sliding layers can go back when they were told to remember, as assisted decoding does, and say so when they cannot."""
    model = models.make("mistral")
    model.set_attn_implementation("kvtide" if mode == "attend" else "eager")
    tokens = ids(1, 200)
    with torch.no_grad():
        recording = KvtideCache(model, "f16/f16", pool=pool)
        recording.activate_past_recording()
        want = model(tokens, past_key_values=recording, use_cache=True).logits[:, 50:]
        recording.crop(-150)
        got = model(tokens[:, 50:], past_key_values=recording, use_cache=True).logits
        assert (got - want).abs().max() < 0.02 * want.abs().max()
        cache = KvtideCache(model, "f16/f16", pool=pool)
        model(tokens, past_key_values=cache, use_cache=True)
        model(tokens[:, :1], past_key_values=cache, use_cache=True)  # steps let go of what one has left when the next one begins
        with pytest.raises(kvtide.errors.OutOfRange, match="window"):
            cache.crop(-151)
        assert cache.get_seq_length() == 201


@pytest.mark.parametrize("mode", MODES)
def test_assisted_decoding_beyond_a_window(pool, mode):
    """Candidates are taken back in sliding layers too, long after the window is full."""
    model = models.make("gemma3")
    inputs = models.prompts(1, 60)
    inputs["input_ids"][:, 30:] = inputs["input_ids"][:, :30]
    model.set_attn_implementation("eager")
    want = model.generate(**inputs, max_new_tokens=30, do_sample=False)
    model.set_attn_implementation("kvtide" if mode == "attend" else "eager")
    cache = KvtideCache(model, "f16/f16", pool=pool)
    if not hasattr(DynamicCache, "activate_past_recording"):  # older versions do not tell the cache
        cache.activate_past_recording()
    # transformers 5.0 wants an end to look for.
    unused = next(token for token in range(model.config.get_text_config().vocab_size) if token not in want)
    got = model.generate(**inputs, max_new_tokens=30, do_sample=False, prompt_lookup_num_tokens=6, past_key_values=cache,
                         eos_token_id=unused)
    assert torch.equal(got, want)


@pytest.mark.parametrize("mode", MODES)
def test_reset(pool, mode):
    pair = Pair("gemma3", pool, mode)
    pair.forward(ids(2, 20))
    pair.ours.reset()
    assert pair.ours.get_seq_length() == 0 and pool.stats().sequences == 0
    pair.stock = DynamicCache(config=pair.model.config)
    pair.forward(ids(3, 20))


@pytest.mark.parametrize("mode", MODES)
def test_padding_in_a_later_turn(pool, mode):
    """Full attention takes padding in the middle too: a padded second turn."""
    pair = Pair("llama", pool, mode)
    first = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    pair.forward(ids(2, 5), first)
    second = torch.cat([first, torch.tensor([[1, 1, 1], [0, 0, 1]])], dim=1)
    pair.forward(ids(2, 3, 1), second)
    pair.call("crop", -2)
    pair.forward(ids(2, 1, 2), torch.cat([second[:, :6], torch.ones(2, 1, dtype=torch.long)], dim=1))


def test_dropping_the_cache_frees_its_sequences_at_once(pool):
    model = models.make("gemma3")
    gc.disable()
    try:
        for implementation in ("eager", "kvtide"):
            model.set_attn_implementation(implementation)
            cache = KvtideCache(model, pool=pool)
            model.generate(**models.prompts(2, 9), max_new_tokens=2, past_key_values=cache)
            assert pool.stats().sequences == 2
            del cache
            assert pool.stats().sequences == 0
    finally:
        gc.enable()


def test_refusals(pool):
    model = models.make("llama")
    model.set_attn_implementation("eager")
    with pytest.raises(kvtide.errors.InvalidArgument, match="set_attn_implementation"):
        KvtideCache(model, pool=pool, mode="attend")
    with pytest.raises(kvtide.errors.InvalidArgument, match="mode"):
        KvtideCache(model, pool=pool, mode="fast")
    with pytest.raises(TypeError, match="model or configuration"):
        KvtideCache("llama", pool=pool)
    with pytest.raises(kvtide.errors.InvalidArgument, match="turbo9"):
        model(ids(1, 3), past_key_values=KvtideCache(model, "turbo9/q8_0", pool=pool), use_cache=True)
    model.set_attn_implementation("kvtide")
    cache = KvtideCache(model, pool=pool)
    model(ids(1, 3), past_key_values=cache, use_cache=True)
    with pytest.raises(kvtide.errors.InvalidArgument, match="2 rows"):
        model(ids(2, 1), past_key_values=cache, use_cache=True)
    cache.reset()
    causal = torch.ones(5, 5, dtype=torch.bool).tril()[None, None]
    with pytest.raises(kvtide.errors.InvalidArgument, match="materialise"):
        model(ids(1, 5), attention_mask=causal, past_key_values=cache, use_cache=True)
    cache.reset()
    model(ids(2, 5), attention_mask=torch.ones(2, 5), past_key_values=cache, use_cache=True)
    changed = torch.ones(2, 6)
    changed[0, 2] = 0
    with pytest.raises(kvtide.errors.InvalidArgument, match="has changed"):
        model(ids(2, 1), attention_mask=changed, past_key_values=cache, use_cache=True)
    windowed = models.make("mistral")
    windowed.set_attn_implementation("kvtide")
    holes = torch.tensor([[1, 0, 1, 1]])
    with pytest.raises(kvtide.errors.InvalidArgument, match="left only"):
        windowed(ids(1, 4), attention_mask=holes, past_key_values=KvtideCache(windowed, pool=pool), use_cache=True)


def test_other_masks_are_refused():
    from kvtide.transformers.attention import mask

    def both_ways(batch, head, q, k):
        return q >= 0

    def prefix(batch, head, q, k):
        return (k <= q) | (k < 3)

    for function in (both_ways, prefix):
        with pytest.raises(kvtide.errors.InvalidArgument, match="another one"):
            mask(1, 8, 8, mask_function=function)


def test_the_attention_without_a_cache(pool):
    """Plain forwards, padded and windowed, through the attention "kvtide" give what eager attention gives."""
    for name in ("gemma2", "gpt-oss", "mistral"):
        model = models.make(name)
        inputs = models.prompts(2, 50, 6)
        results = []
        for implementation in ("eager", "kvtide"):
            model.set_attn_implementation(implementation)
            with torch.no_grad():
                results.append(model(**inputs, use_cache=False).logits[inputs["attention_mask"].bool()])
        assert (results[0] - results[1]).abs().max() < 1e-3 * results[0].abs().max()


def test_pairs_and_aliases(pool):
    model = models.make("llama")
    assert KvtideCache(model, pool=pool).pair == "q8_0/turbo4"
    assert IsoQuantCache(bits=4, pool=pool).pair == "iso4/iso4"
    assert TurboQuantCache(model, bits=3, pool=pool).pair == "turbo3/turbo3"
    with pytest.raises(kvtide.errors.InvalidArgument, match="bits is 5"):
        TurboQuantCache(bits=5, pool=pool)
    model.set_attn_implementation("kvtide")
    planned = KvtideCache(model, pool=pool, context=256)
    model.generate(**models.prompts(1, 9), max_new_tokens=2, past_key_values=planned)
    assert planned.pair == "f16/f16"  # fits
    with pytest.raises(kvtide.errors.InvalidArgument, match="do not fit"):
        model.generate(**models.prompts(1, 9), max_new_tokens=2, past_key_values=KvtideCache(model, pool=pool, context=1 << 22))


def test_a_pool_of_its_own():
    model = models.make("llama")
    model.set_attn_implementation("kvtide")
    with KvtideCache(model, device="cpu", device_memory="8MiB", host_memory=0) as cache:
        model.generate(**models.prompts(1, 9), max_new_tokens=2, past_key_values=cache)
        assert cache.pool.info().tiers[0].capacity_bytes == 8 << 20
    with pytest.raises(kvtide.errors.FailedPrecondition, match="closed"):
        cache.pool.stats()


def test_tiers(pool):
    """Parked rows are attended where they lie."""
    model = models.make("llama")
    model.set_attn_implementation("kvtide")
    inputs = models.prompts(2, 70)
    want = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    cache = KvtideCache(model, "f16/f16", pool=pool)
    middle = model.generate(**inputs, max_new_tokens=4, do_sample=False, past_key_values=cache)
    assert pool.evict(cache.sequences).blocks > 0
    got = model.generate(input_ids=middle, max_new_tokens=4, do_sample=False, past_key_values=cache)
    assert torch.equal(got, want)
