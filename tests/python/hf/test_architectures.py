"""Architectures with random weights: KvtideCache in f16 gives what DynamicCache gives."""
import pytest
import torch
import transformers

import models
from kvtide.transformers import KvtideCache


def generate(model, inputs, cache, **options):
    return model.generate(**inputs, max_new_tokens=40, do_sample=False, output_logits=True, return_dict_in_generate=True,
                          past_key_values=cache, **options)


def same(got, want, share):
    """Logits of every step within a share of their size, tokens equal where that decides."""
    for step, (a, b) in enumerate(zip(got.logits, want.logits)):
        most = share * b.abs().max().item()
        assert (a - b).abs().max().item() < most, f"step {step}"
        first, second = b.topk(2).values.unbind(-1)
        decided = first - second > 2 * most
        assert torch.equal(a.argmax(-1)[decided], b.argmax(-1)[decided])
        if not torch.equal(a.argmax(-1), b.argmax(-1)):
            return step
    assert torch.equal(got.sequences, want.sequences)
    return len(want.logits)


@pytest.fixture(scope="module", params=list(models.CONFIGS))
def model(request):
    made = models.make(request.param)
    if made is None:
        pytest.skip("this transformers has no such architecture")
    return made


@pytest.mark.parametrize("rows,tokens,padding", [(1, 9, 0), (1, 70, 0), (3, 60, 5)])
def test_agrees_with_dynamic_cache(model, pool, mode, rows, tokens, padding):
    inputs = models.prompts(rows, tokens, padding)
    model.set_attn_implementation("eager")
    want = generate(model, inputs, None)
    model.set_attn_implementation(mode.attention("eager"))
    cache = KvtideCache(model, "f16/f16", pool=pool, **mode.options)
    assert cache.mode == mode.options["mode"]
    got = generate(model, inputs, cache)
    mode.check(cache, why=["attention sinks", "share the keys"])  # gpt-oss, Gemma 4
    assert same(got, want, 0.02) > 10
    assert cache.get_seq_length() == tokens + 39
    assert len({int(token) for token in want.sequences[0]}) > 9  # the model says more than one thing


def test_shapes_learned_from_the_first_forward(pool, mode):
    model = models.make("qwen3")
    inputs = models.prompts(2, 30, 4)
    model.set_attn_implementation("sdpa")
    want = generate(model, inputs, None)
    model.set_attn_implementation(mode.attention("sdpa"))
    got = generate(model, inputs, KvtideCache(pair="f16/f16", pool=pool, **mode.options))
    assert same(got, want, 0.02) > 10


def test_latent_attention_is_refused(pool):
    config = transformers.DeepseekV3Config(num_hidden_layers=2)
    with pytest.raises(ValueError, match="latent"):
        KvtideCache(config, pool=pool)


def test_linear_attention_stays_with_transformers(pool):
    """Hybrid models: layers of linear attention keep their own state, the others live in the pool."""
    if not hasattr(transformers, "Qwen3NextConfig"):
        pytest.skip("this transformers has no hybrid model of the kind")
    from transformers import cache_utils

    if "linear_attention" not in getattr(cache_utils, "DYNAMIC_LAYER_TYPE_MAPPING", {}):
        pytest.skip("this transformers keeps such states elsewhere")
    config = transformers.Qwen3NextConfig(
        **{**models.COMMON, "num_hidden_layers": 4}, linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=16,
        linear_value_head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32,
        shared_expert_intermediate_size=32, layer_types=["linear_attention", "full_attention"] * 2)
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    inputs = models.prompts(1, 20)
    model.set_attn_implementation("eager")
    want = generate(model, inputs, None)
    got = generate(model, inputs, KvtideCache(model, "f16/f16", pool=pool))
    assert same(got, want, 0.02) > 10


def test_what_steps_do_not_do_goes_through_host_memory(pool):
    """A sliding window with an exact first block, from where coded blocks stand behind it: a warning, and the same tokens."""
    model = transformers.AutoModelForCausalLM.from_config(transformers.MistralConfig(**models.COMMON, sliding_window=500)).eval()
    model.generation_config.eos_token_id = None
    inputs = models.prompts(1, 300)
    model.set_attn_implementation("kvtide")
    want = generate(model, inputs, KvtideCache(model, "q8_0/q8_0", pool=pool, on_device=False))
    cache = KvtideCache(model, "q8_0/q8_0", pool=pool)
    with pytest.warns(RuntimeWarning, match="through host memory.*exact_window.first_blocks 0"):
        got = generate(model, inputs, cache)
    assert same(got, want, 0.05) > 10
    cache.close()
    with pytest.raises(ValueError, match="was to attend on cpu"):
        generate(model, inputs, KvtideCache(model, "q8_0/q8_0", pool=pool, on_device=True))
    with KvtideCache(model, "q8_0/q8_0", pool=pool, on_device=True, exact_window=(0, 2)) as cache:
        generate(model, inputs, cache)
        assert cache._store.forward.steps is not None
