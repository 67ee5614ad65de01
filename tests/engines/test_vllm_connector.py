"""vLLM's blocks in a real kvtided: hits in another process, daemons and clients that die, two engines on one daemon, no room. What
has to hold in each: every request is answered, with the tokens that vLLM gives without."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time
import urllib.request

import engine
import kvtide
import pytest
from test_vllm import check_same, greedy
from test_vllm import kvtide as kvtide_program
from test_vllm_server import Server

sys.path.insert(0, str(engine.ROOT / "tests" / "python"))

PROGRAM = pathlib.Path(os.environ.get("KVTIDE_TEST_DAEMON", engine.ROOT / "build" / "dev" / "daemon" / "kvtided"))


class Daemon:
    def __init__(self, folder, *options, host_memory="256MiB"):
        self.folder, self.options, self.host_memory = folder, options, host_memory
        self.address = f"unix:{folder}/kvtided.sock"
        self.start()

    def start(self):
        self.process = subprocess.Popen([str(PROGRAM), "--listen", self.address, "--device", "cpu", "--device-memory", "16MiB",
                                         "--host-memory", self.host_memory, "--metrics-address", "off", *self.options],
                                        stdout=open(self.folder / "kvtided.log", "a"), stderr=subprocess.STDOUT)
        for _ in range(2000):
            try:
                with kvtide.connect(self.address, connect_timeout=0.2):
                    return
            except kvtide.errors.KvtideError:
                assert self.process.poll() is None, (self.folder / "kvtided.log").read_text()
                time.sleep(0.01)

    def kill(self):
        self.process.kill()
        self.process.wait()

    def stop(self):
        self.process.terminate()
        self.process.wait(60)


@pytest.fixture
def daemon(tmp_path):
    one = Daemon(tmp_path)
    yield one
    one.stop()


def transfer(address, module="kvtide.vllm.connector", **extra):
    return {"kv_connector": "KvtideConnector", "kv_connector_module_path": module, "kv_role": "kv_both",
            "kv_connector_extra_config": {"address": address, **extra}}


@pytest.fixture(scope="module")
def stock():
    return engine.run([greedy(24)], dtype="float32")[0]["batches"][0]


def run(daemon, batches, pair="f16/f16", own="", env=None, **llm):
    """`own`: on kvtide's pages of that pair."""
    engine._run.cache_clear()  # the same job is another one when the daemon holds something
    return engine.run(batches, own, env=env, dtype="float32", kv_transfer_config=transfer(daemon.address, pair=pair), **llm)


def hits(batch):
    return sum(one["cached"] for one in batch)


FULL = sum((len(prompt) - 1) // 64 * 64 for prompt in engine.prompts(200)[:24])


@pytest.mark.smoke
def test_a_second_process_gets_the_blocks_of_the_first(daemon, stock):
    first, log = run(daemon, [greedy(24)])
    check_same(first["batches"][0], stock, "nothing there yet")
    assert "kvtide: blocks of 64 tokens rest in f16/f16 in kvtided at unix:" in log
    second, _ = run(daemon, [greedy(24)])
    check_same(second["batches"][0], stock, "blocks of another process")
    print(f"{hits(second['batches'][0])} tokens came from kvtided, of {FULL} in full blocks")
    assert hits(second["batches"][0]) >= 0.95 * FULL


@pytest.mark.parametrize("own", ["", "f16/f16"])
def test_blocks_are_copied_from_where_they_lie(tmp_path, stock, own):
    """In the host memory of a `kvtided --host-sharing` of the engine's own user: all of them, and the tokens are the same."""
    daemon = Daemon(tmp_path, "--host-sharing")
    what = "kvtide's pages" if own else "stock pages"
    try:
        run(daemon, [greedy(24)], own=own)
        second, log = run(daemon, [greedy(24)], own=own)
    finally:
        daemon.stop()
    check_same(second["batches"][0], stock, f"{what}, loads in place")
    assert "loads copy blocks from where they lie in 256 MiB of kvtided's host memory" in log
    counts = second["kvtide"]
    print(f"{what}: {counts['in_place_blocks']:.0f} of {counts['loaded_blocks']:.0f} loaded blocks were copied from where they lie")
    assert counts["in_place_blocks"] == counts["loaded_blocks"] > 0
    assert hits(second["batches"][0]) >= 0.95 * FULL


def test_coded_blocks(daemon, stock):
    """The same in 4.1 bits. Most tokens are those of f16."""
    run(daemon, [greedy(24)], pair="turbo4/turbo4")
    second, log = run(daemon, [greedy(24)], pair="turbo4/turbo4")
    assert "101376 bytes instead of 786432" in log  # 3.88x smaller than f16, of which the engine's float32 rows take twice
    assert hits(second["batches"][0]) >= 0.95 * FULL
    same = sum(a["tokens"][0] == b["tokens"][0] for a, b in zip(second["batches"][0], stock))
    print(f"turbo4/turbo4: {same} of 24 prompts give equal tokens, all from coded blocks")
    assert same >= 8


def test_own_pages(daemon, stock):
    """Of kvtide's attention backend: they travel as they are."""
    first, log = run(daemon, [greedy(24)], own="f16/f16")
    check_same(first["batches"][0], stock, "nothing there yet, kvtide's pages")
    assert "rest as kvtide's pages of f16/f16 in kvtided at" in log
    second, _ = run(daemon, [greedy(24)], own="f16/f16")
    check_same(second["batches"][0], stock, "kvtide's pages of another process")
    assert hits(second["batches"][0]) >= 0.95 * FULL


@pytest.mark.parametrize("writer,reader", [("", "turbo4/turbo4"), ("turbo4/turbo4", ""), ("turbo4/turbo4", "turbo4/turbo4")])
def test_coded_pages_and_stock_ones_share_blocks(daemon, stock, writer, reader):
    """What the daemon codes and what the backend codes is the same."""
    run(daemon, [greedy(24)], pair="turbo4/turbo4", own=writer)
    second, _ = run(daemon, [greedy(24)], pair="turbo4/turbo4", own=reader)
    assert hits(second["batches"][0]) >= 0.95 * FULL
    same = sum(a["tokens"][0] == b["tokens"][0] for a, b in zip(second["batches"][0], stock))
    print(f"turbo4/turbo4, {writer or 'stock'} pages to {reader or 'stock'} ones: {same} of 24 prompts give equal tokens")
    assert same >= 8


def test_pages_around_the_means_of_a_profile_are_found_with_that_profile_alone(daemon, tmp_path):
    """Their bytes mean something else with other means, or with none."""
    pair, files = "turbo4/turbo4", {}
    for name, text in (("one", "manuals.txt"), ("other", "wikitext2_slice.txt")):
        files[name] = {"KVTIDE_PROFILE": str(tmp_path / f"{name}.profile")}
        kvtide_program("calibrate", "--model", engine.MODEL, "--text", str(engine.ROOT / "tests" / "data" / text), "--tokens", "2048",
                       "--means-only", "--out", files[name]["KVTIDE_PROFILE"], "--no-progress")
    own, log = run(daemon, [greedy(24), greedy(24)], own=pair, env=files["one"])
    assert f"pages of {pair} by profile" in log
    for name, hit in (("other", False), ("one", True), ("", False)):
        got, _ = run(daemon, [greedy(24)], own=pair, env=files.get(name))
        print(f"{hits(got['batches'][0])} of {FULL} tokens found with {name or 'no'} profile")
        assert (hits(got["batches"][0]) >= 0.95 * FULL) if hit else hits(got["batches"][0]) == 0
        if hit:  # the engine's own prefix hits attend more blocks exactly; pages of other means give other texts altogether
            same = sum(a["tokens"][0] == b["tokens"][0] for a, b in zip(got["batches"][0], own["batches"][1]))
            print(f"around means, from another process: {same} of 24 prompts give equal tokens")
            assert same >= 12


def test_own_pages_with_preemption_drafts_and_a_small_cache(daemon, stock):
    """Pages that decoding fills, that are freed before they are sealed, and that get other content from the daemon."""
    small = dict(max_num_seqs=8, max_model_len=1024, kv_cache_memory_bytes=22 * 6 * 65536,
                 speculative_config={"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 3})
    run(daemon, [greedy(24)], own="f16/f16", **small)
    ours, _ = run(daemon, [greedy(24), greedy(24)], own="f16/f16", **small)
    for batch in ours["batches"]:
        check_same(batch, stock, "small cache of kvtide's pages, blocks from kvtided")
        assert hits(batch) > 0
    assert ours["preemptions"] > 0


def test_preemption_drafts_and_a_small_cache(daemon, stock):
    """21 blocks for prompts of up to 10: blocks come and go while they are saved and loaded."""
    small = dict(max_num_seqs=8, max_model_len=1024, kv_cache_memory_bytes=22 * 6 * 65536 * 2,
                 speculative_config={"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 3})
    run(daemon, [greedy(24)], **small)
    ours, _ = run(daemon, [greedy(24), greedy(24)], **small)
    for batch in ours["batches"]:
        check_same(batch, stock, "small cache, blocks from kvtided")
        assert hits(batch) > 0
    assert ours["preemptions"] > 0


def test_no_room(tmp_path, stock):
    """A daemon with room for 8 blocks."""
    daemon = Daemon(tmp_path, host_memory="7MiB")
    try:
        for what in ("first", "second"):
            ours, _ = run(daemon, [greedy(24)])
            check_same(ours["batches"][0], stock, f"no room, {what} time")
    finally:
        daemon.stop()


def test_no_daemon(tmp_path, stock):
    class Nobody:
        address = f"unix:{tmp_path}/nobody.sock"

    ours, log = run(Nobody, [greedy(24)])
    check_same(ours["batches"][0], stock, "no daemon")
    said = [line for line in log.splitlines() if "no kvtided at" in line]
    assert said and "the engine goes on without it" in said[0]


@pytest.mark.parametrize("fault", ["lost", "loads"])
def test_faults_in_the_middle_of_loads(tmp_path, stock, fault):
    """Blocks that cannot be read, and a daemon that goes away in every load: over a double of the store."""
    folder = {"KVTIDE_DOUBLE": str(tmp_path), "PYTHONPATH": str(engine.HERE)}
    config = transfer("", module="connector_double", pair="f16/f16")
    engine.run([greedy(24)], env=folder, dtype="float32", kv_transfer_config=config)
    ours, log = engine.run([greedy(24)], env={**folder, "KVTIDE_FAULT": fault}, dtype="float32", kv_transfer_config=config)
    check_same(ours["batches"][0], stock, fault)
    assert "Recovered from KV load failure" in log


def test_two_engines_on_one_daemon(daemon, stock):
    """Both at once, the same prompts."""
    job = json.dumps({"llm": engine.llm_arguments("", dtype="float32", kv_transfer_config=transfer(daemon.address, pair="f16/f16")),
                      "batches": [greedy(24), greedy(24)]})
    processes, outs = [], []
    for i in range(2):
        outs.append(daemon.folder / f"result{i}.json")
        one = subprocess.Popen([sys.executable, str(engine.HERE / "vllm_job.py"), str(outs[i])], stdin=subprocess.PIPE, text=True,
                               stdout=open(daemon.folder / f"log{i}.txt", "w"), stderr=subprocess.STDOUT, cwd=daemon.folder,
                               env=engine.environment())
        one.stdin.write(job)
        one.stdin.close()
        processes.append(one)
    for i, one in enumerate(processes):
        assert one.wait(1800) == 0, (daemon.folder / f"log{i}.txt").read_text()[-6000:]
        for batch in json.loads(outs[i].read_text())["batches"]:
            check_same(batch, stock, f"engine {i}")


class ServerWithCache(Server):
    ENVIRONMENT = {"VLLM_SERVER_DEV_MODE": 1}  # /reset_prefix_cache

    def __init__(self, folder, address):
        self.address = address
        super().__init__(folder, "")

    def arguments(self):
        # In bfloat16 the tokens of a batch of 8 part from those of one prompt alone where two are near.
        return ["--dtype", "float32", "--kv-transfer-config", json.dumps(transfer(self.address, pair="f16/f16"))]

    def metric(self, name):
        with urllib.request.urlopen(self.url("/metrics"), timeout=30) as answer:
            values = [line.rsplit(" ", 1)[1] for line in answer.read().decode().splitlines() if line.startswith(name)]
        return sum(map(float, values))

    def tokens(self, prompt):
        choice = json.load(self.post("/v1/completions", model="tide", prompt=prompt, max_tokens=16, temperature=0, logprobs=0,
                                     return_token_ids=True))["choices"][0]
        return choice["text"]


def texts(count):
    text = engine.TEXT.read_text()
    return [text[i * 1700:i * 1700 + 1500] for i in range(count)]


def test_daemon_and_client_die_under_load(tmp_path):
    """The daemon is killed and started again while requests run; then the engine is killed while it works, and the next one finds
    a daemon without leases of the dead and what was stored."""
    import concurrent.futures

    daemon = Daemon(tmp_path)
    server = None
    try:
        server = ServerWithCache(tmp_path, daemon.address)
        want = [server.tokens(text) for text in texts(8)]
        assert all(want)
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            answers = []
            for round in range(4):
                urllib.request.urlopen(urllib.request.Request(server.url("/reset_prefix_cache"), method="POST"), timeout=60)
                answers += [(i, pool.submit(server.tokens, text)) for i, text in enumerate(texts(8))]
                if round == 1:
                    daemon.kill()
                if round == 2:
                    daemon.start()
            for i, answer in answers:
                assert answer.result(900) == want[i], i
        # It is there again: what is computed now is saved, and found after the engine has forgotten it.
        deadline = time.monotonic() + 300
        while server.metric("vllm:kvtide_loaded_blocks_total") == 0:
            urllib.request.urlopen(urllib.request.Request(server.url("/reset_prefix_cache"), method="POST"), timeout=60)
            assert [server.tokens(text) for text in texts(2)] == want[:2]
            assert time.monotonic() < deadline
        print(f"{server.metric('vllm:kvtide_saved_blocks_total'):.0f} blocks saved, {server.metric('vllm:kvtide_loaded_blocks_total'):.0f} "
              f"loaded, {server.metric('vllm:kvtide_failed_loads_total'):.0f} loads failed; every answer the same")
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            for text in texts(4):
                pool.submit(server.tokens, text)
            time.sleep(0.5)
            for child in children(server.process.pid) + [server.process.pid]:
                os.kill(child, signal.SIGKILL)
        server.process.wait()
        server = ServerWithCache(tmp_path, daemon.address)
        assert [server.tokens(text) for text in texts(2)] == want[:2]
        assert server.metric("vllm:kvtide_loaded_blocks_total") > 0
    finally:
        if server is not None:
            server.close()
        daemon.stop()


def children(pid):
    found = []
    for task in pathlib.Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            found += [int(child), *children(int(child))]
    return found
