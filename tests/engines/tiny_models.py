"""Small models with random weights, for what the bundled model does not have: sliding windows, soft-caps, layer groups."""

import functools
import tempfile

import torch


@functools.lru_cache(maxsize=None)
def folder(kind):
    """A Hugging Face folder, made once a process; it has no tokenizer."""
    from transformers import Gemma2Config, Gemma2ForCausalLM, Gemma3ForCausalLM, Gemma3TextConfig, MistralConfig, MistralForCausalLM

    small = dict(vocab_size=512, hidden_size=128, intermediate_size=256, num_attention_heads=4, num_key_value_heads=2, head_dim=64,
                 max_position_embeddings=2048, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    torch.manual_seed(7)
    if kind == "gemma3":  # five sliding layers, one full
        model = Gemma3ForCausalLM(Gemma3TextConfig(num_hidden_layers=6, sliding_window=128, query_pre_attn_scalar=64, **small))
    elif kind == "gemma2":  # every other layer slides; soft-capped logits
        model = Gemma2ForCausalLM(Gemma2Config(num_hidden_layers=4, sliding_window=128, query_pre_attn_scalar=64,
                                               attn_logit_softcapping=5.0, final_logit_softcapping=30.0, **small))
    elif kind == "gemma4":  # two layers attend the pages of two others
        from transformers import Gemma4ForCausalLM, Gemma4TextConfig

        model = Gemma4ForCausalLM(Gemma4TextConfig(num_hidden_layers=6, sliding_window=128, num_kv_shared_layers=2,
                                                   hidden_size_per_layer_input=16, vocab_size_per_layer_input=512, global_head_dim=64,
                                                   num_global_key_value_heads=2, layer_types=["sliding_attention", "full_attention"] * 3,
                                                   **small))
    else:  # all layers slide
        model = MistralForCausalLM(MistralConfig(num_hidden_layers=3, sliding_window=96, **small))
    with torch.no_grad():
        for name, weights in model.named_parameters():
            if weights.dim() == 2:  # logits and attention weights that are not flat
                weights.mul_(4 if "embed" in name else 6)
    out = tempfile.mkdtemp(prefix=f"kvtide-{kind}-")
    model.to(torch.bfloat16).save_pretrained(out)
    return out


def prompts(count, length):
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, 512, (length + 37 * i,), generator=generator).tolist() for i in range(count)]
