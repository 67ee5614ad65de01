"""Layer groups of other models in a real vLLM: sliding windows whose old pages it frees, soft-caps, several groups that share memory."""

import engine
import pytest
import tiny_models

PROMPTS = tiny_models.prompts(12, 60)


def run(kind, pair, **llm):
    batch = {"prompts": PROMPTS, "sampling": {**engine.GREEDY, "max_tokens": 24, "logprobs": 2}}
    return engine.run([batch], pair=pair, model=tiny_models.folder(kind), skip_tokenizer_init=True, max_model_len=1024, **{"dtype": "float32", **llm})


@pytest.mark.parametrize("kind", ["gemma3", "gemma2", "mistral", "gemma4"])
def test_f16_pages_give_the_tokens_of_vllms_own_backend(kind):
    stock, _ = run(kind, "")
    ours, log = run(kind, "f16")
    different = engine.differences(ours["batches"][0], stock["batches"][0])
    print(f"{kind}: {len(PROMPTS) - len(different)} of {len(PROMPTS)} prompts give equal tokens")
    # Gemma 4 does not scale q.k down, so that keys in f16 move its logits more.
    assert len(different) <= (4 if kind == "gemma4" else 2) and all(margin < 0.05 for _, _, margin in different), different


def test_coded_groups():
    """Sliding and full groups over one memory of coded pages, few of them."""
    ours, log = run("gemma3", "turbo4/turbo4", max_num_seqs=4, max_num_batched_tokens=128)
    assert all(len(one["tokens"][0]) == 24 for one in ours["batches"][0])
    assert log.count("exact pages") >= 2  # a line for each group
