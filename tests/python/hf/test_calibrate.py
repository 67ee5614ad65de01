"""`python -m kvtide.calibrate`: profiles of keys through transformers."""
import gc
import json
import os
import pathlib
import subprocess
import time
import weakref

import numpy as np
import pytest
import torch
import transformers as hf

from kvtide import calibrate as calibration, connect, errors, eval as evaluation, profiles
from kvtide.transformers import KvtideCache
from kvtide.transformers.rotary import ropes
from models import COMMON, CONFIGS, make
from ways import Daemon, ROOT

MODEL = str(ROOT / "clients" / "engine" / "models" / "tidelm-7m")
TEXT = ROOT / "tests" / "data" / "manuals.txt"
PROGRAMS = pathlib.Path(os.environ.get("KVTIDE_TEST_PROGRAMS", ROOT / "build" / "dev" / "daemon"))
KVTIDE = PROGRAMS.parent / "clients" / "cli" / "kvtide"

PARTIAL = {k: v for k, v in COMMON.items() if k != "head_dim"}
MORE = {
    "phi3, half of the channels turn": lambda: hf.Phi3Config(**PARTIAL, partial_rotary_factor=0.5),
    "cohere, neighbours": lambda: hf.CohereConfig(**PARTIAL),
    "glm, neighbours of half of the channels": lambda: hf.GlmConfig(**COMMON, partial_rotary_factor=0.5),
    "yarn": lambda: hf.LlamaConfig(**COMMON, rope_parameters={"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0,
                                                              "original_max_position_embeddings": 256}),
}


def model_of(name):
    if name in CONFIGS:
        return make(name)
    torch.manual_seed(3)
    return hf.AutoModelForCausalLM.from_config(MORE[name]()).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("name", [*(one for one in CONFIGS if "shared" not in one), *MORE])
def test_keys_are_turned_back(name, dtype):
    """In the first layer all keys of one token are the same before rotary embedding, at whatever position."""
    model = model_of(name).to(dtype)
    calibration._register()
    model.set_attn_implementation(calibration.NAME)
    keys = {}

    def listen(layer, q, k):
        keys[layer] = k[0].float().numpy()

    calibration._listeners.append(listen)
    try:
        with torch.no_grad():
            model(torch.full((1, 50), 7), use_cache=False)
    finally:
        calibration._listeners.remove(listen)
    rotary = ropes(model, range(model.config.num_hidden_layers))
    assert rotary[0].neighbours == ("neighbours" in name)
    frequencies = np.array(rotary[0].frequencies)
    n = len(frequencies)
    assert n == keys[0].shape[-1] // (4 if "half" in name else 2)
    first = slice(0, 2 * n, 2) if rotary[0].neighbours else slice(0, n)
    second = slice(1, 2 * n, 2) if rotary[0].neighbours else slice(n, 2 * n)
    angles = np.arange(50)[:, None] * frequencies
    c, s = np.cos(angles), np.sin(angles)
    back = keys[0].copy()
    back[..., first], back[..., second] = c * keys[0][..., first] + s * keys[0][..., second], c * keys[0][..., second] - s * keys[0][..., first]
    size = np.abs(keys[0]).max()
    assert np.abs(back - back[:, :1]).max() < (1e-4 if dtype == torch.float32 else 2e-2) * size
    assert np.abs(keys[0] - keys[0][:, :1]).max() > 0.1 * size  # the test would notice


def test_layers_that_turn_keys_differently_have_frequencies_of_their_own():
    model = make("gemma3")
    made = calibration.calibrate(model, [int(t) for t in torch.arange(300) % 97 + 2], name="m", text="t")
    assert made.tokens == 300 - 300 // 8 - calibration.FIRST
    [local, full] = ropes(model, [0, 3])
    assert local.frequencies != full.frequencies and local.frequencies[0] == full.frequencies[0] == 1


NONE = {
    "smollm3": lambda: hf.SmolLM3Config(**PARTIAL, no_rope_layers=[1, 0, 1, 0]),
    "cohere2": lambda: hf.Cohere2Config(**COMMON, sliding_window=24, layer_types=["sliding_attention", "full_attention"] * 2),
}


@pytest.mark.parametrize("name", NONE)
def test_layers_that_do_not_turn_keys_have_no_frequencies(name):
    model = hf.AutoModelForCausalLM.from_config(NONE[name]()).eval()
    found = ropes(model, range(4))
    assert [set(one.frequencies) == {0.0} for one in found] == [False, True, False, True]
    assert len({(len(one.frequencies), one.neighbours) for one in found}) == 1


def test_layers_that_cannot_be_asked(loaded):
    model, _ = loaded
    with pytest.raises(ValueError, match="layer 6 has no attention"):
        ropes(model, [0, 6])
    latent = hf.AutoModelForCausalLM.from_config(hf.DeepseekV2Config(**{**COMMON, "num_key_value_heads": 4}, kv_lora_rank=32, q_lora_rank=32,
                                                                     qk_rope_head_dim=16, qk_nope_head_dim=16, v_head_dim=32,
                                                                     n_routed_experts=4, first_k_dense_replace=4))
    with pytest.raises(ValueError, match="does not say how it turns keys"):
        ropes(latent, [0])
    # Nothing of a model is kept by what it could not say.
    gone = weakref.ref(latent)
    del latent
    gc.collect()
    assert gone() is None
    # Nothing of the model is changed, and it is asked once.
    assert model.config._attn_implementation == "sdpa" and ropes(model, [1])[0] is ropes(model, [1])[0]


@pytest.fixture(scope="module")
def loaded():
    model = hf.AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    tokens = hf.AutoTokenizer.from_pretrained(MODEL)(TEXT.read_text(), verbose=False)["input_ids"]
    # `kvtide calibrate` begins texts of this model with its first token.
    return model, [model.config.bos_token_id] + tokens


@pytest.mark.parametrize("after_rope", [False, True])
def test_the_profile_of_kvtide_calibrate(loaded, tmp_path, after_rope):
    model, tokens = loaded
    before = model.config._attn_implementation
    seen = []
    made = calibration.calibrate(model, tokens[:3000], name="tidelm-7m", text="manuals.txt", after_rope=after_rope, progress=seen.append)
    assert model.config._attn_implementation == before and seen == [2048, 3000]
    ours = made.save(tmp_path / "ours")
    output = subprocess.run([KVTIDE, "calibrate", "--text", TEXT, "--tokens", "3000", "--out", tmp_path / "theirs", "--no-progress",
                             "--keys", "after-rope" if after_rope else "before-rope"],
                            check=True, capture_output=True, text=True).stdout
    for one, line in zip(ours, output.splitlines()[2:]):
        kind, error, beside, beside_error = line.replace("around the mean", "").split()
        assert (one.type, one.beside) == (kind, beside)
        assert one.error == pytest.approx(float(error), rel=0.03) and one.beside_error == pytest.approx(float(beside_error), rel=0.03)
    a, b = profiles.load(tmp_path / "ours"), profiles.load(tmp_path / "theirs")
    assert (a.model, a.text, a.tokens, a.neighbours) == (b.model, b.text, b.tokens, b.neighbours) == ("tidelm-7m", "manuals.txt", 2497, False)
    assert (a.after_rope, a.context) == (b.after_rope, b.context) == (after_rope, 2048)
    np.testing.assert_allclose(a.means, b.means, atol=2e-2)
    np.testing.assert_allclose(a.centres, b.centres, atol=2e-2)
    np.testing.assert_allclose(a.frequencies, b.frequencies, rtol=1e-6)
    assert np.mean(np.array(a.widths) == np.array(b.widths)) > 0.95


def test_it_makes_keys_better(loaded, tmp_path):
    model, tokens = loaded
    calibration.calibrate(model, tokens[1024:6000], name="tidelm-7m", text="manuals.txt").save(tmp_path / "profile")
    report = evaluation.evaluate(model, tokens, ["turbo2/turbo4", "tide2/turbo4"], name="tidelm-7m", text="manuals.txt", context=768,
                                 profile=str(tmp_path / "profile"))
    divergence = {row.pair: row.kld_mean for row in report.rows}
    assert divergence["tide2/turbo4"] < 0.6 * divergence["turbo2/turbo4"]


def test_a_daemon_calibrates_from_the_traffic_of_a_model(loaded, tmp_path):
    """It knows how the model turns its keys, as the cache has said so, and gathers what `kvtide.calibrate` gathers."""
    model, tokens = loaded
    windows = [tokens[at : at + 512] for at in range(0, 2048, 512)]
    running = Daemon(tmp_path)
    command = [KVTIDE, "calibrate", "--from-daemon", running.address, "--no-progress"]
    try:
        with connect(running.address) as pool:
            model.set_attn_implementation("kvtide")

            def prompt(ids):
                with torch.no_grad(), KvtideCache(model, "q8_0/turbo4", pool=pool) as cache:
                    model(torch.tensor([ids]), past_key_values=cache)

            prompt(tokens[:70])
            [name] = pool.info().models
            summed = sum(len(window) - calibration.FIRST for window in windows)
            subprocess.run([*command, "--model", name, "--start", "--share", "1", "--held-back", "256", "--tokens", str(summed)], check=True)
            for window in windows:
                prompt(window)
                while json.loads(subprocess.run([*command, "--output", "json"], check=True, capture_output=True).stdout)["calibrations"][0][
                        "waiting_tokens"]:
                    time.sleep(0.02)
            out = tmp_path / "traffic.profile"
            done = subprocess.run([*command, "--model", name, "--wait", "--out", out, "--install"], check=True, capture_output=True, text=True)
            assert "before RoPE" in done.stdout and "ready, installed" in done.stdout
            status = subprocess.run([KVTIDE, "status", "--address", running.address], check=True, capture_output=True, text=True).stdout
            assert f"{name}: profile 1 is installed, before RoPE; 0 open sequences have it" in status
    finally:
        model.set_attn_implementation("sdpa")
        running.stop()
    traffic = profiles.load(out)
    assert traffic.tokens == summed - 256 and not traffic.after_rope
    np.testing.assert_allclose(traffic.frequencies, [one.frequencies for one in ropes(model, range(6))], rtol=1e-6)
    text = calibration.calibrate(model, tokens[:2048], name="m", text="t", context=512)
    text.save(tmp_path / "text.profile")
    expected = profiles.load(tmp_path / "text.profile")
    np.testing.assert_allclose(traffic.means, expected.means, atol=5e-2)
    np.testing.assert_allclose(traffic.centres, expected.centres, atol=5e-2)
    assert np.mean(np.array(traffic.widths) == np.array(expected.widths)) > 0.9


def test_means_alone(loaded, tmp_path):
    model, tokens = loaded
    made = calibration.calibrate(model, tokens[:500], name="m", text="t", means_only=True)
    assert made.save(tmp_path / "profile") == [] and made.tokens == 436
    profile = profiles.load(tmp_path / "profile")
    assert len(profile.means) == 6 and not profile.transforms


def test_what_cannot_be_calibrated(loaded, tmp_path):
    model, tokens = loaded
    with pytest.raises(ValueError, match="longer text"):
        calibration.calibrate(model, tokens[:64], name="m", text="t")
    with pytest.raises(ValueError, match="more than the model's"):
        calibration.calibrate(model, tokens[:200], name="m", text="t", context=1 << 20)
    short = calibration.calibrate(model, tokens[:400], name="m", text="t")
    with pytest.raises(errors.InvalidArgument, match="too few"):
        short.save(tmp_path / "profile")
    assert not os.path.exists(tmp_path / "profile")
    shared = make("gemma4 with shared layers")
    if shared is not None:
        with pytest.raises(ValueError, match="keep keys and values of their own"):
            calibration.calibrate(shared, [7] * 200, name="m", text="t")


def test_the_command(capsys, tmp_path):
    out = tmp_path / "profile"
    assert calibration.main(["--model", MODEL, "--text", str(TEXT), "--tokens", "2400", "--out", str(out), "--threads", "1"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"{out}: means and transforms of keys over 1984 tokens, 6 layers of 2 KV heads of 128\n")
    assert "tide2 0.0" in printed
    for arguments, words in ((["--out", str(tmp_path / "none" / "profile")], "--out: there is no folder"), (["--out", str(tmp_path)], "is a folder"), (["--out", str(out), "--tokens", "0"], "positive"),
                             (["--out", str(out), "--model", str(tmp_path / "none")], "--model: there is no folder"),
                             (["--out", str(out), "--text", str(tmp_path / "none.txt")], "none.txt")):
        assert calibration.main(["--model", MODEL, "--text", str(TEXT), *arguments]) == 2
        assert words in capsys.readouterr().err
