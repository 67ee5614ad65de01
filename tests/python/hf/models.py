"""Small models of many architectures with random weights, made from configurations."""
import torch
import transformers as hf

COMMON = dict(vocab_size=99, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4,
              num_key_value_heads=2, head_dim=32, max_position_embeddings=1024, pad_token_id=0, bos_token_id=1, eos_token_id=None)


def _gemma4():
    config = getattr(hf, "Gemma4TextConfig", None)
    if config is None:
        return None
    return config(**{**COMMON, "num_hidden_layers": 6}, sliding_window=24, num_kv_shared_layers=2, hidden_size_per_layer_input=16,
                  vocab_size_per_layer_input=99, global_head_dim=32, num_global_key_value_heads=2,
                  layer_types=["sliding_attention", "full_attention"] * 3)


CONFIGS = {
    "llama": lambda: hf.LlamaConfig(**COMMON),
    "llama with rope scaling": lambda: hf.LlamaConfig(
        **COMMON, rope_parameters={"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
                                   "high_freq_factor": 4.0, "original_max_position_embeddings": 64}),
    "qwen2": lambda: hf.Qwen2Config(**{k: v for k, v in COMMON.items() if k != "head_dim"}),
    "qwen3": lambda: hf.Qwen3Config(**COMMON),
    "mistral": lambda: hf.MistralConfig(**COMMON, sliding_window=24),
    "gemma2": lambda: hf.Gemma2Config(**COMMON, sliding_window=24, query_pre_attn_scalar=16, attn_logit_softcapping=20.0),
    "gemma3": lambda: hf.Gemma3TextConfig(**COMMON, sliding_window=24, query_pre_attn_scalar=16,
                                          layer_types=["sliding_attention"] * 3 + ["full_attention"]),
    "phi3": lambda: hf.Phi3Config(**{k: v for k, v in COMMON.items() if k != "head_dim"}, sliding_window=40),
    "gpt-oss": lambda: hf.GptOssConfig(**COMMON, sliding_window=24, num_local_experts=4, num_experts_per_tok=2,
                                       layer_types=["sliding_attention", "full_attention"] * 2),
    "gemma4 with shared layers": _gemma4,
}


def make(name):
    """The model, or None where this transformers has no such architecture."""
    config = CONFIGS[name]()
    if config is None:
        return None
    torch.manual_seed(sum(map(ord, name)))
    model = hf.AutoModelForCausalLM.from_config(config).eval()
    # Random weights of the usual size give nearly equal logits; larger ones make every layer matter.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(3.0)
            elif parameter.ndim == 1 and parameter.abs().sum() == 0:
                parameter.normal_(0, 0.3)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def prompts(rows, tokens, padding=0):
    """Random token ids; row i is padded by i x padding on the left."""
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(2, 99, (rows, tokens), generator=generator)
    seen = torch.ones_like(ids)
    for i in range(rows):
        ids[i, : i * padding] = 0
        seen[i, : i * padding] = 0
    return {"input_ids": ids, "attention_mask": seen}
