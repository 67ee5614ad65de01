"""`vllm serve` on kvtide's pages: the OpenAI endpoint, streamed answers, the size of the cache in its log."""

import json
import re
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request

import engine
import pytest


class Server:
    ENVIRONMENT = {}

    def __init__(self, folder, pair, **options):
        with socket.socket() as one:
            one.bind(("127.0.0.1", 0))
            self.port = one.getsockname()[1]
        self.log = folder / "log.txt"
        arguments = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", engine.MODEL, "--port", str(self.port),
                     "--host", "127.0.0.1", "--served-model-name", "tide", "--dtype", "bfloat16", "--max-model-len", "2048",
                     "--enforce-eager", "--max-num-seqs", "8", "--block-size", "64", "--kv-cache-memory-bytes", str(256 << 20), *self.arguments()]
        self.process = subprocess.Popen(arguments, stdout=open(self.log, "w"), stderr=subprocess.STDOUT, cwd=folder,
                                        env=engine.environment(pair, VLLM_ENABLE_V1_MULTIPROCESSING=1, **self.ENVIRONMENT))
        deadline = time.monotonic() + 900
        while True:
            try:
                with urllib.request.urlopen(self.url("/health"), timeout=5):
                    return
            except OSError:
                assert self.process.poll() is None and time.monotonic() < deadline, self.log.read_text()[-6000:]
                time.sleep(1)

    def arguments(self):
        return []

    def url(self, path):
        return f"http://127.0.0.1:{self.port}{path}"

    def post(self, path, **body):
        request = urllib.request.Request(self.url(path), json.dumps(body).encode(), {"Content-Type": "application/json"})
        return urllib.request.urlopen(request, timeout=900)

    def close(self):
        self.process.terminate()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    one = Server(tmp_path_factory.mktemp("vllm"), "turbo4/turbo4")
    yield one
    one.close()


PROMPT = engine.TEXT.read_text()[:2500]
REQUEST = dict(model="tide", prompt=PROMPT, max_tokens=48, temperature=0)


@pytest.mark.smoke
def test_streamed_answers_are_the_whole_ones(server):
    json.load(server.post("/v1/completions", **REQUEST))  # from now on the prompt's full blocks are hits, attended coded
    whole = json.load(server.post("/v1/completions", **REQUEST))
    text = whole["choices"][0]["text"]
    assert len(text) > 20 and whole["usage"]["completion_tokens"] == 48
    pieces = []
    with server.post("/v1/completions", stream=True, **REQUEST) as answer:
        for line in answer:
            if line.startswith(b"data: ") and line.strip() != b"data: [DONE]":
                pieces.append(json.loads(line[6:])["choices"][0]["text"])
    assert len(pieces) > 10
    assert "".join(pieces) == text


@pytest.mark.smoke
def test_the_log_says_how_many_tokens_fit(server):
    log = server.log.read_text()
    tokens = int(re.search(r"KV cache size: ([\d,]+) tokens", log).group(1).replace(",", ""))
    f16 = (256 << 20) // (6 * 65536) * 64  # 6 layers, 2 KV heads of 128
    print(f"{tokens} tokens, {tokens / f16:.2f}x the tokens of f16")
    assert tokens == pytest.approx(3.87 * f16, rel=0.01)
    assert "KV cache in turbo4/turbo4 (+0.08 % perplexity on tidelm-7m)" in log


def test_a_request_that_goes_away_leaves_the_server_well(server):
    answer = server.post("/v1/completions", stream=True, **{**REQUEST, "max_tokens": 1000})
    answer.readline()
    answer.close()
    again = json.load(server.post("/v1/completions", **REQUEST))
    assert again["usage"]["completion_tokens"] == 48
