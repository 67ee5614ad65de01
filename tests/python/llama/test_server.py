"""Slot files of a running llama-server: saved, kept compressed in a daemon, and restored into another server.

The server is that of llama.cpp, in the package xllamacpp."""
import json
import os
import pathlib
import urllib.request

import pytest

from kvtide.llama_cpp.__main__ import main
from ways import ROOT

xllamacpp = pytest.importorskip("xllamacpp")
MODEL = pathlib.Path(os.environ.get("KVTIDE_MODELS", "models")) / "smollm2-135m-q4_1.gguf"
TEXT = (ROOT / "tests" / "data" / "wikitext2_slice.txt").read_text(encoding="utf-8")


class Server:
    def __init__(self, folder, **options):
        parameters = xllamacpp.CommonParams()
        parameters.model.path = str(MODEL)
        parameters.n_ctx, parameters.n_parallel, parameters.port = 2048, 1, 0
        parameters.slot_save_path = f"{folder}/"
        parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = 1
        for name, value in options.items():
            setattr(parameters, name, value)
        self.server = xllamacpp.Server(parameters)

    def post(self, path, body):
        request = urllib.request.Request(self.server.listening_address + path, json.dumps(body).encode(),
                                         {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=300) as answer:
            return json.load(answer)

    def complete(self, prompt):
        return self.post("/completion", {"prompt": prompt, "n_predict": 8, "temperature": 0, "cache_prompt": True, "id_slot": 0})


@pytest.mark.parametrize("pair", ["f16/f16", "q8_0/turbo4"])
def test_a_slot_goes_through_a_daemon(tmp_path, daemon, pair):
    prompt = TEXT[:1500]
    first = Server(tmp_path)
    wanted = first.complete(prompt)
    saved = first.post("/slots/0?action=save", {"filename": "chat.bin"})
    file = tmp_path / "chat.bin"
    data = file.read_bytes()
    del first
    assert main(["save", str(file), "--model", str(MODEL), "--address", daemon.address, "--pair", pair]) == 0
    file.unlink()
    assert main(["restore", f"{file}.kvtide"]) == 0
    assert (file.read_bytes() == data) == (pair == "f16/f16")
    second = Server(tmp_path)
    restored = second.post("/slots/0?action=restore", {"filename": "chat.bin"})
    assert restored["n_restored"] == saved["n_saved"] > 300
    again = second.complete(prompt)
    # The prompt is not read again but for its end.
    assert again["timings"]["prompt_n"] < 64 < wanted["timings"]["prompt_n"]
    assert again["content"]
    assert main(["forget", f"{file}.kvtide"]) == 0
