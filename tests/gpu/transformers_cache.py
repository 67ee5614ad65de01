#!/usr/bin/env python3
"""The Python package on a GPU: steps over torch tensors, and KvtideCache of transformers beside DynamicCache. Checks, then measures.

usage: tests/gpu/transformers_cache.py [--json FILE] [--tokens N]
Needs torch with CUDA, transformers and a kvtide that was built with CUDA.
"""
import argparse
import json
import pathlib
import sys
import time
import warnings

import numpy as np
import torch

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "python"))

import kvtide  # noqa: E402
import reference  # noqa: E402
from kvtide.transformers import KvtideCache  # noqa: E402


def check_steps():
    """Against attention by the book (f16) and against the pool's own calls, which code the same bytes."""
    layers, heads, kv_heads, dim = 2, 8, 2, 128
    generator = torch.Generator(device="cuda").manual_seed(1)
    rows = lambda tokens, count: torch.randn(tokens, count, dim, generator=generator, device="cuda", dtype=torch.bfloat16)  # noqa: E731
    with kvtide.connect("embedded", device="cuda:0", device_memory="256MiB", host_memory="64MiB") as pool:
        pool.register("steps", [kvtide.Layer(kv_heads, dim, heads)] * layers)
        for pair in ("f16/f16", "q8_0/turbo4", "turbo3/turbo3"):
            mine, theirs = pool.create("steps", pair=pair), pool.create("steps", pair=pair)
            steps = pool.device_steps("steps", pair, max_sequences=1, max_new_tokens=1024, max_sequence_tokens=2048)
            keys, values = [[] for _ in range(layers)], [[] for _ in range(layers)]
            for count in (700, 1, 1, 130, 1, 1):
                with steps.step([(mine, count)]) as step:
                    found = []
                    for layer in range(layers):
                        q, k, v = rows(count, heads), rows(count, kv_heads), rows(count, kv_heads)
                        keys[layer].append(k.float().cpu().numpy()), values[layer].append(v.float().cpu().numpy())
                        found.append((step.append_attend(layer, q, k, v), theirs.append_attend(layer, q, k, v), q))
                for layer, (got, called, q) in enumerate(found):
                    assert got.is_cuda and got.dtype == torch.bfloat16
                    torch.testing.assert_close(got.float(), called.float(), atol=8e-2, rtol=0)  # blocks are coded a step later
                    if pair == "f16/f16":
                        want, _ = reference.attend(q.float().cpu().numpy(), np.concatenate(keys[layer]), np.concatenate(values[layer]))
                        np.testing.assert_allclose(got.float().cpu().numpy(), want, atol=2e-2)
            for layer in range(layers):
                for one, other in zip(mine.read(layer), theirs.read(layer)):
                    np.testing.assert_array_equal(one, other)
    print("steps: as by the book, as by calls, the same bytes")


def check_tokens():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    name = str(ROOT / "clients" / "engine" / "models" / "tidelm-7m")
    tokenizer = AutoTokenizer.from_pretrained(name)
    tokenizer.pad_token, tokenizer.padding_side = tokenizer.pad_token or tokenizer.eos_token, "left"
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float16).to("cuda").eval()
    texts = ["The river rose in the night and the", "In 1912 the city", (ROOT / "tests/data/wikitext2_slice.txt").read_text()[:1500]]
    inputs = tokenizer(texts, return_tensors="pt", padding=True).to("cuda")
    inputs.pop("token_type_ids", None)
    for options in ({}, {"num_beams": 3}):
        options = {"max_new_tokens": 150, "do_sample": False, "pad_token_id": tokenizer.pad_token_id, "output_logits": True,
                   "return_dict_in_generate": True, **options}
        model.set_attn_implementation("sdpa")
        want = model.generate(**inputs, **options)
        model.set_attn_implementation("kvtide")
        for pair in ("f16/f16", "q8_0/turbo4"):
            with KvtideCache(model, pair, on_device=True, device_memory="512MiB", host_memory="64MiB") as cache:
                got = model.generate(**inputs, past_key_values=cache, **options)
                assert cache._store.forward.steps is not None
            # Ties and near-ties of f16 decide otherwise now and then; what is said is the same for long.
            length = min(got.sequences.shape[1], want.sequences.shape[1])
            same = (got.sequences[:, :length] == want.sequences[:, :length]).float().mean().item()
            first = (got.logits[0] - want.logits[0]).abs().max().item()
            print(f"tidelm-7m, {pair}, {options.get('num_beams', 1)} beams: {100 * same:.1f} % of tokens as with DynamicCache, "
                  f"first logits differ by {first:.4f}")
            if pair == "f16/f16":
                assert same > 0.9 and first < 0.1, (same, first)


def measure(tokens, json_file):
    """Decoding after a long prompt: a model of 8 layers of Llama 3.1 8B's attention, random weights."""
    import transformers

    config = transformers.LlamaConfig(hidden_size=4096, intermediate_size=4096, num_hidden_layers=8, num_attention_heads=32,
                                      num_key_value_heads=8, head_dim=128, vocab_size=512, max_position_embeddings=1 << 17)
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    ids = torch.randint(0, 512, (4, tokens), device="cuda")
    rows = []

    def run(name, cache, attention):
        model.set_attn_implementation(attention)
        with torch.no_grad():
            torch.cuda.reset_peak_memory_stats()
            begin = time.perf_counter()
            for at in range(0, tokens, 2048):
                out = model(ids[:, at : at + 2048], past_key_values=cache, use_cache=True, logits_to_keep=1)
            torch.cuda.synchronize()
            prompt = time.perf_counter() - begin
            token, times = out.logits[:, -1:].argmax(-1), []
            for _ in range(20 if "host" not in name else 6):
                torch.cuda.synchronize()
                begin = time.perf_counter()
                token = model(token, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
                torch.cuda.synchronize()
                times.append(time.perf_counter() - begin)
        rows.append({"cache": name, "prompt_seconds": round(prompt, 3), "token_ms": round(1e3 * sorted(times)[len(times) // 2], 3)})
        print(rows[-1])

    run("warm-up", transformers.DynamicCache(config=config), "sdpa")
    rows.clear()
    run("DynamicCache, sdpa", transformers.DynamicCache(config=config), "sdpa")
    for pair in ("f16/f16", "turbo4/turbo4"):
        model.set_attn_implementation("kvtide")
        with KvtideCache(model, pair, on_device=True, device_memory="24GiB", host_memory="1GiB") as cache:
            run(f"KvtideCache {pair}, on the device", cache, "kvtide")
            rows[-1]["stored_bytes"] = cache.stored_bytes
    with KvtideCache(model, "turbo4/turbo4", on_device=False, device_memory="24GiB", host_memory="1GiB") as cache:
        run("KvtideCache turbo4/turbo4, through the host", cache, "kvtide")
    if json_file:
        about = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "transformers": transformers.__version__,
                 "model": "8 layers of 32 query and 8 KV heads of 128, random weights, bfloat16", "batch": 4, "tokens": tokens}
        pathlib.Path(json_file).write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="write what was measured there")
    parser.add_argument("--tokens", type=int, default=16384, help="tokens of each of 4 prompts (default 16384)")
    arguments = parser.parse_args()
    warnings.simplefilter("error", RuntimeWarning)
    check_steps()
    check_tokens()
    measure(arguments.tokens, arguments.json)


if __name__ == "__main__":
    main()
