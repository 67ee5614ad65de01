"""KV events and counters of a real `vllm serve` over a real kvtided: what a router hears is what a prompt then finds."""

import json
import re
import urllib.request

import engine
import pytest
from kv_events import Subscriber
from test_vllm import check_same, greedy
from test_vllm_connector import Daemon, ServerWithCache, transfer
from test_vllm_tier import offloading

CHUNKS = 10


def publish(folder):
    return {"enable_kv_cache_events": True, "publisher": "zmq", "endpoint": f"ipc://{folder}/events", "topic": "kv"}


class EventServer(ServerWithCache):
    def __init__(self, folder, address):
        self.folder = folder
        super().__init__(folder, address)

    def arguments(self):
        return ["--dtype", "float32", "--kv-transfer-config", json.dumps(transfer(self.address, pair="f16/f16", event_seconds=0.2)),
                "--kv-events-config", json.dumps(publish(self.folder))]

    def ask(self, prompt):
        return json.load(self.post("/v1/completions", model="tide", prompt=prompt, max_tokens=4, temperature=0))["choices"][0]["text"]

    def tick(self):
        """A step."""
        self.ask([1, 2, 3])

    def hit_tokens(self):
        with urllib.request.urlopen(self.url("/metrics"), timeout=30) as answer:
            lines = re.findall(r'^vllm:kvtide_hit_tokens_total{.*tier="(\w+)".*} (\S+)$', answer.read().decode(), re.MULTILINE)
        return {tier: float(value) for tier, value in lines}

    def forget(self):
        urllib.request.urlopen(urllib.request.Request(self.url("/reset_prefix_cache"), method="POST"), timeout=60)


@pytest.mark.smoke
def test_a_router_hears_what_rests_where_and_what_went(tmp_path):
    """Memory for 9 blocks or so and a disk for 20: blocks move down and are dropped; then the daemon is killed and comes back."""
    daemon = Daemon(tmp_path, "--disk", f"{tmp_path}/disk:8MiB", host_memory="4MiB")
    server = None
    try:
        server, router = EventServer(tmp_path, daemon.address), Subscriber(publish(tmp_path)["endpoint"])
        server.tick()
        text = engine.text_tokens()
        prompts = [text[i * 700:i * 700 + CHUNKS * 64 + 10] for i in range(5)]
        answers = [server.ask(prompts[0])]
        # Nothing else is asked for: the engine goes on until workers have said what became of their saves.
        router.until(lambda: len(router.told) >= CHUNKS - 2)
        first = router.hashes(prompts[0])
        assert len(first) == CHUNKS and set(router.told.values()) == {"CPU"} and set(router.told) <= set(first)

        answers += [server.ask(prompt) for prompt in prompts[1:]]
        router.until(lambda: "STORAGE" in router.told.values() and router.removed - set(router.told), server.tick)
        router.quiet(server.tick)
        print(f"{len(router.told)} of {5 * CHUNKS} blocks rest, {list(router.told.values()).count('STORAGE')} of them on the disk, "
              f"{len(router.removed - set(router.told))} went")

        for prompt, answer in reversed(list(zip(prompts, answers))):  # what was used last first: it is there
            chain = router.hashes(prompt)
            expected = next((i for i, one in enumerate(chain) if one not in router.told), len(chain))
            server.forget()
            before = server.metric("vllm:kvtide_loaded_blocks_total")
            assert server.ask(prompt) == answer
            loaded = server.metric("vllm:kvtide_loaded_blocks_total") - before
            print(f"{loaded:.0f} of {len(chain)} blocks loaded")
            assert loaded == expected, "what was told is what is found"
            router.quiet(server.tick)
        assert router.cleared == len(prompts) and router.told, "the engine's own pages are not the daemon's"
        by_tier = server.hit_tokens()
        print(f"tokens by tier: {by_tier}")
        assert by_tier["host"] > 0 and by_tier["disk"] > 0
        assert sum(by_tier.values()) == 64 * server.metric("vllm:kvtide_loaded_blocks_total")

        daemon.kill()
        router.until(lambda: not router.told, server.tick)
        daemon.start()

        def again():
            server.forget()
            assert server.ask(prompts[0]) == answers[0]

        router.until(lambda: set(first[:3]) <= set(router.told), again)
    finally:
        if server is not None:
            server.close()
        daemon.stop()


@pytest.mark.smoke
def test_chunks_below_vllms_own_offloading_are_told(tmp_path):
    """With their tokens, where vLLM knows them (self_describing_kv_events)."""
    daemon = Daemon(tmp_path)
    try:
        stock = engine.run([greedy(24)], dtype="float32")[0]["batches"][0]
        router = Subscriber(publish(tmp_path)["endpoint"])
        config = offloading(daemon.address)
        config["kv_connector_extra_config"]["self_describing_kv_events"] = True
        config["kv_connector_extra_config"]["secondary_tiers"][0]["event_seconds"] = 0.2
        engine._run.cache_clear()
        ours, _ = engine.run([greedy(24), greedy(4)], env={"PYTHONPATH": str(engine.HERE)}, dtype="float32", kv_transfer_config=config,
                             kv_events_config=publish(tmp_path))
        check_same(ours["batches"][0], stock, "with events, over vLLM's own offloading")
        router.until(lambda: len(router.told) > 20)
        print(f"{len(router.told)} chunks told as kvtided's, {router.placeholders} without tokens")
        assert set(router.told.values()) == {"CPU"} and set(router.told) <= set(router.gpu)
    finally:
        daemon.stop()
