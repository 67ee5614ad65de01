"""The examples of clients/python/README.md run as they stand, one after the other in one namespace."""
import re

import pytest

from ways import ROOT

BLOCKS = re.findall(r"^```python ?(.*?)\n(.*?)^```", (ROOT / "clients" / "python" / "README.md").read_text(), re.M | re.S)


def run(label, capsys):
    names = {}
    for kind, code in BLOCKS:
        if kind == label:
            exec(compile(code, "README.md", "exec"), names)
    return capsys.readouterr().out, names


def test_examples(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    out, names = run("", capsys)
    names["pool"].close()
    assert "(1000, 8, 64) 1000 " in out and "fits" in out
    assert "nobody" in out
    assert "[('device', 576)]" in out and len(names["rest"]) == 124


def test_the_example_of_transformers(capsys, monkeypatch):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    monkeypatch.chdir(ROOT)
    out, _ = run("transformers", capsys)
    assert "The river rose in the night and the" in out
