"""kvtide's engine computes what transformers computes: every architecture that it runs, from a folder that transformers has written."""
import json
import math
import os
import pathlib
import shutil
import subprocess

import pytest
import torch
import transformers as hf

import models
from ways import ROOT

PROGRAMS = pathlib.Path(os.environ.get("KVTIDE_TEST_PROGRAMS", ROOT / "build" / "dev" / "daemon"))
KVTIDE = PROGRAMS.parent / "clients" / "cli" / "kvtide"
TOKENIZER = ROOT / "clients" / "engine" / "models" / "tidelm-7m"
TEXT = ROOT / "tests" / "data" / "wikitext2_slice.txt"
CONTEXT = 192


@pytest.mark.parametrize("shards", ["4GB", "400KB"])
@pytest.mark.parametrize("name", ["llama", "llama with rope scaling", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "phi3"])
def test_perplexity_is_that_of_transformers(tmp_path, name, shards):
    config = models.CONFIGS[name]()
    config.vocab_size, config.bos_token_id, config.pad_token_id = 4096, 0, None
    torch.manual_seed(7)
    model = hf.AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():  # as in models.make: every layer matters, biases and norms too
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(3.0)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.3)
        model.get_output_embeddings().weight.mul_(5.0)  # a loss that depends on every logit
    model.save_pretrained(tmp_path / "model", max_shard_size=shards)
    assert (tmp_path / "model" / "model.safetensors.index.json").exists() == (shards == "400KB")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / file, tmp_path / "model" / file)
    text = tmp_path / "text.txt"
    text.write_text(TEXT.read_text(encoding="utf-8")[: 8 * CONTEXT], encoding="utf-8")
    report = json.loads(subprocess.run(
        [KVTIDE, "eval", "--kvtided", PROGRAMS / "kvtided", "--model", tmp_path / "model", "--text", text, "--windows", "1", "--context",
         str(CONTEXT), "--pairs", "f16/f16", "--no-layer-errors", "--no-progress", "--threads", "1", "--memory", "64MiB", "--output", "json"],
        check=True, stdout=subprocess.PIPE).stdout)
    tokens = hf.AutoTokenizer.from_pretrained(str(TOKENIZER))(text.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
    ids = torch.tensor([[0, *tokens][:CONTEXT]])
    model.set_attn_implementation("eager")
    with torch.no_grad():
        logits = model(ids).logits[0, :-1].float()
    loss = torch.nn.functional.cross_entropy(logits, ids[0, 1:]).item()
    engine = math.log(report["results"][0]["perplexity"])
    print(f"\n{name}: {engine:.5f} nats per token in the engine, {loss:.5f} in transformers")
    assert engine == pytest.approx(loss, abs=5e-4)
    # The test would notice: without attention the loss is another one.
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
        other = torch.nn.functional.cross_entropy(model(ids).logits[0, :-1].float(), ids[0, 1:]).item()
    assert abs(other - loss) > 5e-3
