"""`python -m kvtide.eval`: the metrics of `kvtide eval` through transformers."""
import csv
import dataclasses
import json

import pytest
import torch

from kvtide import errors, eval as evaluation
from ways import ROOT

MODEL = str(ROOT / "clients" / "engine" / "models" / "tidelm-7m")
TEXT = str(ROOT / "tests" / "data" / "wikitext2_slice.txt")


@pytest.fixture(scope="module")
def loaded():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    tokens = AutoTokenizer.from_pretrained(MODEL)(open(TEXT).read(), verbose=False)["input_ids"]
    return model, tokens


def run(loaded, pairs, **options):
    model, tokens = loaded
    # `kvtide eval` begins windows of this model with its first token.
    report = evaluation.evaluate(model, [model.config.bos_token_id] + tokens, pairs, name="tidelm-7m", text="text", context=1024,
                                 **options)
    return {row.pair: row for row in report.rows}, report


def test_numbers_of_kvtide_eval(loaded):
    """`kvtide eval --windows 1 --context 1024 --pairs q8_0/turbo4,turbo3/turbo3` says so on the same text."""
    rows, report = run(loaded, ["q8_0/turbo4", "turbo3"])
    assert rows["f16/f16"].perplexity == pytest.approx(11.684383, rel=1e-4)
    assert rows["q8_0/turbo4"].change_percent == pytest.approx(0.059, abs=0.02)
    assert rows["turbo3/turbo3"].change_percent == pytest.approx(0.82, abs=0.1)
    assert rows["q8_0/turbo4"].kld_mean == pytest.approx(1.396e-4, rel=0.05)
    assert rows["turbo3/turbo3"].kld_p99 == pytest.approx(0.0343, rel=0.1)
    assert rows["turbo3/turbo3"].top1_agreement == pytest.approx(0.968, abs=0.005)
    assert rows["q8_0/turbo4"].bits_per_value == pytest.approx(8.1289, abs=1e-3)
    lines = list(csv.DictReader(report.csv().splitlines()))
    assert [line["pair_k"] + "/" + line["pair_v"] for line in lines] == ["q8_0/turbo4", "turbo3/turbo3"]
    header = [line for line in (ROOT / "planner" / "plan" / "quality.csv").read_text().splitlines() if line.startswith("model,")][0]
    assert ",".join(lines[0]) == header
    assert json.loads(report.json())["results"][0]["pair"] == "f16/f16"
    assert report.svg().startswith("<svg") and "turbo3/turbo3" in report.svg()
    assert "Pareto" in report.table()


def test_everything_coded(loaded):
    attend, _ = run(loaded, ["turbo3/turbo3"], exact_window="none")
    materialise, _ = run(loaded, ["turbo3/turbo3"], exact_window="none", mode="materialise")
    for rows in (attend, materialise):
        assert 1 < rows["turbo3/turbo3"].change_percent < 10
    assert attend["turbo3/turbo3"].perplexity == pytest.approx(materialise["turbo3/turbo3"].perplexity, rel=2e-3)


def test_materialising_says_the_same(loaded):
    attend, _ = run(loaded, ["q8_0/turbo4"])
    materialise, _ = run(loaded, ["q8_0/turbo4"], mode="materialise")
    for pair in attend:
        assert attend[pair].perplexity == pytest.approx(materialise[pair].perplexity, rel=1e-3)
        assert attend[pair].bits_per_value == materialise[pair].bits_per_value


def test_a_run_is_stopped_and_extended(loaded, tmp_path):
    file = str(tmp_path / "state.json")

    class Stop(Exception):
        pass

    def stop(done):
        if done > 300:
            raise Stop

    model, tokens = loaded

    def score(windows, pairs, **options):
        report = evaluation.evaluate(model, tokens, pairs, name="tidelm-7m", text="text", windows=windows, context=256,
                                     mode="materialise", **options)
        return {row.pair: row for row in report.rows}

    with pytest.raises(Stop):
        score(3, ["turbo4"], state_file=file, progress=stop)
    done = []
    two = score(2, ["turbo4"], state_file=file, progress=done.append)
    assert min(done) > 256  # the first window is not computed again
    whole = score(2, ["turbo4", "turbo3"])
    more = score(2, ["turbo4", "turbo3"], state_file=file)
    assert dataclasses.replace(two["turbo4/turbo4"], pareto=False) == dataclasses.replace(whole["turbo4/turbo4"], pareto=False)
    assert more == whole  # and whether a pair is on the front depends on which others there are
    with pytest.raises(ValueError, match="belongs to another run"):
        score(1, ["turbo4"], state_file=file, exact_window="none")
    (tmp_path / "state.json").write_text("{")
    with pytest.raises(ValueError, match="not a state"):
        score(1, ["turbo4"], state_file=file)


def test_needles_are_asked_of_forks(loaded):
    """A model of 7M parameters finds none; the likelihood of the answers is that of `kvtide eval --needles 2`."""
    from transformers import AutoTokenizer

    rows, _ = run(loaded, ["turbo3"], needles=2, tokenizer=AutoTokenizer.from_pretrained(MODEL))
    for pair in ("f16/f16", "turbo3/turbo3"):
        assert [needle.depth for needle in rows[pair].needles] == [0.25, 0.75]
        assert all(-20 < needle.log_likelihood < 0 for needle in rows[pair].needles)
    assert rows["f16/f16"].needles != rows["turbo3/turbo3"].needles
    model, tokens = loaded
    task = evaluation.needle_task(AutoTokenizer.from_pretrained(MODEL), tokens, 1024, 2)
    # What the forks say is what a whole forward says.
    depth, question, answer = task.questions[0]
    with torch.no_grad():
        logits = model(torch.tensor([task.haystack + question + answer[:-1]])).logits[0, -len(answer):]
    wanted = torch.log_softmax(logits.float(), -1).gather(1, torch.tensor(answer)[:, None]).mean().item()
    loose = evaluation.ask_needles(model, evaluation_cache(model), task, 64)
    assert loose[0].log_likelihood == pytest.approx(wanted, abs=0.02)
    with pytest.raises(ValueError, match="too short"):
        evaluation.needle_task(AutoTokenizer.from_pretrained(MODEL), tokens, 256, 8)


def evaluation_cache(model):
    from kvtide.transformers import KvtideCache

    return KvtideCache(model, "f16/f16", mode="materialise", device_memory="64MiB", host_memory=0)


def test_command(tmp_path, capsys):
    out, plot = tmp_path / "q.csv", tmp_path / "q.svg"
    assert evaluation.main(["--model", MODEL, "--text", TEXT, "--context", "256", "--pairs", "q8_0", "--output", "csv", "--out",
                            str(out), "--plot", str(plot)]) == 0
    assert out.read_text().startswith("model,text,tokens,context,pair_k,pair_v,window_policy,ppl_change_percent")
    assert plot.read_text().startswith("<svg")
    assert evaluation.main(["--model", MODEL, "--text", TEXT, "--context", "99999"]) == 2
    assert "more than the model's" in capsys.readouterr().err
    assert evaluation.main(["--model", str(tmp_path / "none"), "--text", TEXT]) == 2
    assert "--model: there is no folder" in capsys.readouterr().err
    for flag in ("--out", "--plot", "--resume"):
        assert evaluation.main(["--model", MODEL, "--text", TEXT, flag, str(tmp_path / "none" / "file")]) == 2
        assert f"{flag}: there is no folder" in capsys.readouterr().err
    assert evaluation.main(["--model", MODEL, "--text", TEXT, "--context", "256", "--exact-window", "some"]) == 2


def test_mistakes(loaded):
    with pytest.raises(ValueError, match="enough for"):
        run(loaded, ["q8_0"], windows=10_000)
    with pytest.raises(errors.InvalidArgument, match="q9_0"):
        run(loaded, ["q9_0"])
