"""SmolLM2-135M (tests/models.sh; KVTIDE_MODELS) through a real vLLM: the perplexity of `kvtide eval` over the same file.

Gemma 3 270M is not here: transformers 5.17 reads the text's "<unk>" as Gemma's special token, kvtide as text."""

import json
import math
import os
import pathlib
import subprocess
import sys

import engine
import pytest
from engine import ROOT, TEXT

MODELS = pathlib.Path(os.environ.get("KVTIDE_MODELS", pathlib.Path.home() / ".cache" / "kvtide" / "models"))
FILES = ["smollm2-135m-q4_1.gguf"]
CONTEXT = 512
PAIR = "turbo4/turbo4"

pytestmark = [pytest.mark.skipif(not (MODELS / FILES[0]).exists(), reason="no models: tests/models.sh brings them")]

UNPACK = """
import json, sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
models, name, out, text, context = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(models, gguf_file=name, dtype=torch.float32)
model.hf_quantizer = None  # its weights are numbers now
del model.config.quantization_config
model.save_pretrained(out)
tokenizer = AutoTokenizer.from_pretrained(models, gguf_file=name)
tokens = tokenizer(open(text, encoding="utf-8").read()[:12 * int(context)], add_special_tokens=False)["input_ids"]
print(json.dumps(tokens[:int(context)]))
"""


@pytest.fixture(params=FILES)
def model(request, tmp_path):
    """The weights of the file in float32, in a folder that vLLM takes, and kvtide's tokens of the text."""
    for package in ("gguf", "accelerate"):
        pytest.importorskip(package, reason="transformers reads GGUF files with it")
    done = subprocess.run([sys.executable, "-c", UNPACK, str(MODELS), request.param, str(tmp_path), str(TEXT), str(CONTEXT)],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return MODELS / request.param, str(tmp_path), json.loads(done.stdout.strip().splitlines()[-1])


def test_perplexity_is_that_of_kvtide_eval(model):
    """In chunks of one block, so that both see the exact window that decoding would see."""
    file, folder, tokens = model
    ours, _ = engine.run([{"prompts": [tokens], "sampling": {"temperature": 0, "max_tokens": 1, "prompt_logprobs": 0}}], pair=PAIR,
                         model=folder, skip_tokenizer_init=True, dtype="float32", max_model_len=CONTEXT + 64, max_num_seqs=2,
                         max_num_batched_tokens=64, enable_prefix_caching=False)
    score = ours["batches"][0][0]
    mine = math.exp(-score["prompt_logprob"] / score["predictions"])
    programs = pathlib.Path(os.environ.get("KVTIDE_TEST_PROGRAMS", ROOT / "build" / "dev" / "clients" / "cli"))
    done = subprocess.run([programs / "kvtide", "eval", "--model", file, "--text", TEXT, "--windows", "1", "--context", str(CONTEXT),
                           "--pairs", PAIR, "--no-layer-errors", "--no-progress", "--output", "json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    wanted = next(row["perplexity"] for row in json.loads(done.stdout)["results"] if row["pair"] == PAIR)
    print(f"{file.name}, {PAIR}: perplexity {mine:.4f} in vLLM, {wanted:.4f} by kvtide eval, {100 * (mine / wanted - 1):+.4f} %")
    assert mine == pytest.approx(wanted, rel=1e-3)
