"""The scheduler's half of the vLLM connector, a test for each rule of the interface. vLLM's objects are stood in for by their
attributes; the daemon is a double."""

import hashlib
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
from block_store_double import Daemon
from kvtide import _trace
from kvtide.block_store import Namespace, OpaqueBlocks
from kvtide.block_watch import BlockWatch, Change
from kvtide.store_link import StoreLink
from kvtide.vllm.connector_plan import ConnectorPlan, Saved

BLOCK, CHUNK = 16, 64
RANKS = ((0, 0), (0, 1))
SPACES = [Namespace(f"m tp{tp}/2", CHUNK, OpaqueBlocks(4)) for _, tp in RANKS]


class Request:
    """Tokens 0..n of a text that is the same for all with the same name."""

    def __init__(self, id, tokens, text="text"):
        self.request_id, self.num_tokens, self.text = id, tokens, text

    @property
    def block_hashes(self):
        return [hashlib.sha256(f"{self.text} {i}".encode()).digest() for i in range(self.num_tokens // BLOCK)]

    def keys(self, chunks):
        return [self.block_hashes[4 * i + 3] for i in range(chunks)]


def output(new=(), cached=(), scheduled=None, preempted=(), resumed=()):
    """new: (id, blocks, computed); cached: (id, new blocks or None, computed)."""
    return SimpleNamespace(
        scheduled_new_reqs=[SimpleNamespace(req_id=i, block_ids=(b,), num_computed_tokens=c) for i, b, c in new],
        scheduled_cached_reqs=SimpleNamespace(req_ids=[i for i, _, _ in cached], new_block_ids=[b and (b,) for _, b, _ in cached],
                                              num_computed_tokens=[c for _, _, c in cached], resumed_req_ids=set(resumed)),
        num_scheduled_tokens=scheduled or {}, preempted_req_ids=set(preempted))


class World:
    def __init__(self, events=False):
        self.now, self.daemon = 0.0, Daemon()
        self.link = StoreLink(self.daemon.open_pool, "here", pauses=(0.001, 0.001))
        watch = BlockWatch(self.link, clock=lambda: self.now) if events else None
        self.plan = ConnectorPlan(self.link, BLOCK, CHUNK, watch=watch, describe=lambda *what: what[1:], clock=lambda: self.now)
        self.plan.ranks = RANKS
        self.link.start(SPACES, wait=20)

    def store(self, keys, ranks=(0, 1)):
        for rank in ranks:
            self.link.stores()[rank].store(keys, np.zeros((len(keys), 4), np.uint8))

    def settle(self):
        """Waits for what the link does later."""
        done = threading.Event()
        self.link.later(done.set)
        assert done.wait(20)


@pytest.fixture
def world():
    one = World()
    yield one
    one.link.close()


def test_hits_from_the_start_in_whole_chunks_and_never_the_last_token(world):
    request = Request("a", 200)  # 3 chunks and 8 tokens
    assert world.plan.matched(request, 0) == (0, False)
    world.store(request.keys(3))
    world.now += 1
    assert world.plan.matched(request, 0) == (192, True)
    world.plan.finished("a")
    assert world.plan.matched(Request("b", 192), 0) == (128, True), "all 192 tokens are there, but one is computed"
    assert world.plan.matched(Request("c", 193), 0) == (192, True)


def test_what_the_engine_has_itself_is_not_counted(world):
    request = Request("a", 300)
    world.store(request.keys(4))
    assert world.plan.matched(request, 64) == (192, True)
    assert world.plan.matched(request, 80) == (176, True), "the rest of the second chunk, and two more"
    assert world.plan.matched(request, 256) == (0, False)
    assert world.plan.matched(request, 288) == (0, False), "more than the daemon could have: never negative"


def test_asking_again_changes_nothing_and_asks_nobody(world):
    request = Request("a", 300)
    world.store(request.keys(4))
    first = world.plan.matched(request, 0)
    calls = list(world.daemon.calls)
    assert [world.plan.matched(request, 0) for _ in range(5)] == [first] * 5
    assert world.daemon.calls == calls
    assert len(world.daemon.leases) == 2, "one for each rank"


def test_a_lookup_is_called_as_its_request_in_the_daemons_log(world):
    seen = []
    world.daemon.before = lambda verb: seen.append((verb, _trace._current.get()))
    world.plan.matched(Request("cmpl-17", 300), 0)
    assert ("lookup", ("cmpl-17", "")) in seen
    assert _trace._current.get() is None


def test_an_answer_is_renewed_before_its_lease_ends(world):
    request = Request("a", 300)
    world.store(request.keys(4))
    world.plan.matched(request, 0)
    old = set(world.daemon.leases)
    world.now += world.plan.lease_seconds * 0.6
    assert world.plan.matched(request, 0) == (256, True)
    world.settle()
    assert len(world.daemon.leases) == 2 and not old & set(world.daemon.leases)


def test_one_verdict_for_all_ranks(world):
    """SGLang #26921, #30760: ranks with different answers deadlock; the least counts for all."""
    request = Request("a", 300)
    world.store(request.keys(4), ranks=[0])
    world.store(request.keys(2), ranks=[1])
    assert world.plan.matched(request, 0) == (128, True)
    world.plan.allocated(request, list(range(8)), 128)
    load, = world.plan.build(output()).loads
    assert set(load.leases) == set(RANKS) and load.chunks == 2


def test_a_rank_without_anything_gives_all_leases_back(world):
    request = Request("a", 300)
    world.store(request.keys(4), ranks=[0])
    assert world.plan.matched(request, 0) == (0, False)
    world.settle()
    assert not world.daemon.leases


def test_nothing_is_known_before_the_workers_have_said_what_they_hold():
    plan = ConnectorPlan(StoreLink(Daemon().open_pool, "here"), BLOCK, CHUNK)
    assert plan.matched(Request("a", 300), 0) == (0, False)


@pytest.mark.parametrize("when", ["before", "during"])
def test_a_daemon_that_is_away_is_a_miss(world, when):
    request = Request("a", 300)
    world.store(request.keys(4))
    world.daemon.away = True
    if when == "before":
        world.link.failed(ConnectionError("gone"))
    assert world.plan.matched(request, 0) == (0, False)
    world.plan.allocated(request, list(range(19)), 0)
    step = world.plan.build(output(new=[("a", list(range(19)), 0)], scheduled={"a": 300}))
    assert not step.loads and len(step.saves) == 1


def test_loads_name_the_blocks_behind_those_that_the_engine_has(world):
    request = Request("a", 300)
    world.store(request.keys(4))
    assert world.plan.matched(request, 80) == (176, True)
    world.plan.allocated(request, list(range(100, 119)), 176)
    load, = world.plan.build(output()).loads
    assert load.blocks == tuple(range(105, 116)) and load.skip == 1 and load.chunks == 3


def test_fewer_tokens_than_were_offered(world):
    request = Request("a", 300)
    world.store(request.keys(4))
    world.plan.matched(request, 0)
    world.plan.allocated(request, list(range(19)), 96)
    load, = world.plan.build(output()).loads
    assert load.blocks == tuple(range(6)) and load.chunks == 2


def test_a_second_allocation_of_an_asynchronous_load_loads_nothing(world):
    """`blocks` is not empty then: what counts is the number of external tokens."""
    request = Request("a", 300)
    world.store(request.keys(4))
    world.plan.matched(request, 0)
    world.plan.allocated(request, list(range(16)), 256)
    assert len(world.plan.build(output()).loads) == 1
    world.plan.received(["a"])
    world.plan.allocated(request, list(range(19)), 0)
    step = world.plan.build(output(new=[("a", list(range(19)), 256)], scheduled={"a": 44}))
    assert not step.loads and not step.saves, "what came from the daemon is not sent back"


def test_leases_go_back_when_the_load_is_over(world):
    request = Request("a", 300)
    world.store(request.keys(4))
    world.plan.matched(request, 0)
    world.plan.allocated(request, list(range(16)), 256)
    world.plan.build(output())
    world.settle()
    assert len(world.daemon.leases) == 2
    world.plan.received(["a"])
    world.settle()
    assert not world.daemon.leases


@pytest.mark.parametrize("end", ["finished", "not wanted", "reset"])
def test_leases_of_requests_that_load_nothing_go_back(world, end):
    """vLLM #35931: lookups whose request was abandoned pinned the pool."""
    request = Request("a", 300)
    world.store(request.keys(4))
    world.plan.matched(request, 0)
    assert world.daemon.leases
    if end == "finished":
        assert world.plan.finished("a") is False
    elif end == "reset":
        assert world.plan.reset()
    else:
        world.plan.allocated(request, list(range(19)), 0)
    while not world.link.stores():  # a reset opens them anew
        time.sleep(0.002)
    world.settle()
    if end != "reset":  # a deleted namespace ends its leases itself
        assert not world.daemon.leases
    else:
        world.now += 1
        assert world.plan.matched(request, 0) == (0, False)


def test_full_chunks_of_known_tokens_are_saved_once(world):
    request = Request("a", 150)
    blocks = list(range(20))
    world.plan.allocated(request, blocks[:10], 0)
    step = world.plan.build(output(new=[("a", blocks[:10], 0)], scheduled={"a": 100}))
    assert step.saves[0].keys == tuple(request.keys(1)) and step.saves[0].blocks == (0, 1, 2, 3)
    step = world.plan.build(output(cached=[("a", None, 100)], scheduled={"a": 50}))
    assert step.saves[0].keys == tuple(request.keys(2)[1:]) and step.saves[0].blocks == (4, 5, 6, 7)
    # Decoding: the chunk is full when its last token has been written, not when it has been sampled.
    request.num_tokens = 192
    assert not world.plan.build(output(cached=[("a", [10, 11], 190)], scheduled={"a": 1})).saves
    step = world.plan.build(output(cached=[("a", None, 191)], scheduled={"a": 1}))
    assert step.saves[0].blocks == (8, 9, 10, 11)
    assert not world.plan.build(output(cached=[("a", None, 192)], scheduled={"a": 1})).saves


def test_drafts_are_not_saved(world):
    """A step writes keys of 4 drafts behind the known tokens; refused ones are written anew."""
    request = Request("a", 126)
    world.plan.allocated(request, list(range(9)), 0)
    step = world.plan.build(output(new=[("a", list(range(9)), 0)], scheduled={"a": 130}))
    assert step.saves[0].keys == tuple(request.keys(1))


def test_blocks_are_kept_until_the_saves_have_read_them(world):
    request = Request("a", 150)
    world.plan.allocated(request, list(range(10)), 0)
    world.plan.build(output(new=[("a", list(range(10)), 0)], scheduled={"a": 150}))
    assert world.plan.finished("a") is True
    assert world.plan.build(output()).held == {"a"}
    short = Request("b", 20)
    world.plan.allocated(short, [1, 2], 0)
    world.plan.build(output(new=[("b", [1, 2], 0)], scheduled={"b": 20}))
    assert world.plan.finished("b") is False, "nothing of it was saved"


def test_a_request_that_ends_while_it_loads_is_freed_by_the_load(world):
    """Else its blocks would be freed twice."""
    request = Request("a", 300)
    world.store(request.keys(4))
    world.plan.matched(request, 0)
    world.plan.allocated(request, list(range(16)), 256)
    world.plan.build(output())
    assert world.plan.finished("a") is False
    world.plan.received(["a"])
    world.settle()
    assert not world.daemon.leases


def test_preemption_fences_the_saves_and_begins_anew(world):
    """vLLM #52360: blocks freed while a save still read them."""
    request = Request("a", 150)
    world.plan.allocated(request, list(range(10)), 0)
    world.plan.build(output(new=[("a", list(range(10)), 0)], scheduled={"a": 100}))
    step = world.plan.build(output(preempted=["a"]))
    assert step.fenced == {"a"}
    assert world.plan.finished("a") is False, "no block of it is left to keep"
    world.plan.allocated(request, list(range(30, 40)), 0)
    step = world.plan.build(output(cached=[("a", list(range(30, 40)), 0)], scheduled={"a": 150}, resumed=["a"]))
    assert step.saves[0].blocks == tuple(range(30, 38)) and not step.fenced


def test_a_request_whose_load_failed_computes(world):
    request = Request("a", 300)
    world.store(request.keys(4))
    world.plan.matched(request, 0)
    world.plan.allocated(request, list(range(16)), 256)
    world.plan.build(output())
    world.plan.load_failed("a")
    world.plan.received(["a"])
    assert world.plan.matched(request, 0) == (0, False), "else it could load and fail for ever"
    world.plan.finished("a")
    assert world.plan.matched(request, 0) == (256, True)


def test_the_tiers_of_a_load_are_known(world):
    request = Request("a", 300)
    world.store(request.keys(4))
    world.plan.matched(request, 0)
    world.plan.allocated(request, list(range(16)), 256)
    assert world.plan.tokens_by_tier("a", 256) == [("host", 256)]
    assert world.plan.tokens_by_tier("a", 250) == [("host", 250)]
    assert world.plan.take_counts() == {"lookups": 1, "asked_blocks": 4, "found_blocks": 4, "hit_tokens.host": 256}
    assert world.plan.take_counts() == {}
    world.plan.loaded_from["b"] = (("host", 2), ("disk", 1))
    assert world.plan.tokens_by_tier("b", 192) == [("host", 128), ("disk", 64)]
    assert world.plan.tokens_by_tier("b", 130) == [("host", 128), ("disk", 2)]
    assert world.plan.tokens_by_tier("b", 64) == [("host", 64)]


def test_requests_that_want_no_cached_prefix_get_none(world):
    request = Request("a", 300)
    world.store(request.keys(4))
    request.skip_reading_prefix_cache = True
    assert world.plan.matched(request, 0) == (0, False)
    assert not world.daemon.leases


def test_roles(world):
    request = Request("a", 300)
    world.store(request.keys(4))
    world.plan.may_load = False
    assert world.plan.matched(request, 0) == (0, False)
    world.plan.may_save = False
    world.plan.allocated(request, list(range(19)), 0)
    assert not world.plan.build(output(new=[("a", list(range(19)), 0)], scheduled={"a": 300})).saves


def test_a_build_begins_a_new_step(world):
    request = Request("a", 150)
    world.plan.allocated(request, list(range(10)), 0)
    assert world.plan.build(output(new=[("a", list(range(10)), 0)], scheduled={"a": 150})).saves
    step = world.plan.build(output())
    assert not (step.saves or step.loads or step.held or step.fenced)


@pytest.fixture
def events():
    one = World(events=True)
    yield one
    one.link.close()


def test_a_chunk_is_told_as_stored_when_all_ranks_have_it(events):
    """A rank that stored fewer decides, and so does the one where it lies furthest."""
    request, plan = Request("a", 200), events.plan
    plan.allocated(request, list(range(13)), 0)
    save, = plan.build(output(new=[("a", list(range(13)), 0)], scheduled={"a": 200})).saves
    assert save.number and plan.announced
    plan.saved({save.number: Saved(1, ("host", "host", "host")), 99: Saved(1, ("host",))})
    assert plan.watch.take() == [] and plan.announced, "one of two ranks"
    plan.saved({save.number: Saved(1, ("disk", "host"))})
    keys = request.keys(3)
    assert plan.watch.take() == [Change(keys[0], "disk", False, (0, 64)), Change(keys[1], "host", False, (64, 128))]
    assert not plan.announced
    assert Saved(1, ("host",) * 3).and_of(Saved(2, ("disk", "host"))) == Saved(3, ("disk", "host"))


def test_a_save_that_no_rank_could_make_is_over_and_not_told(events):
    request, plan = Request("a", 200), events.plan
    plan.allocated(request, list(range(13)), 0)
    save, = plan.build(output(new=[("a", list(range(13)), 0)], scheduled={"a": 200})).saves
    plan.saved({save.number: Saved(2, ())})
    assert plan.watch.take() == [] and not plan.announced


def test_lookups_tell_what_is_there_and_what_is_not_any_more(events):
    request, plan = Request("a", 300), events.plan
    keys = request.keys(4)
    events.store(keys)
    plan.matched(request, 0)
    assert plan.watch.take() == [Change(key, "host", False, (64 * i, 64 * i + 64)) for i, key in enumerate(keys)]
    plan.matched(Request("b", 300), 0)
    assert plan.watch.take() == [], "known"
    del events.daemon.blocks[SPACES[1]][keys[2]]
    assert plan.matched(Request("c", 300), 0) == (128, True)
    assert plan.watch.take() == [Change(keys[2], "host", True, (128, 192))], "what lies behind it was not asked for"
    events.daemon.away = True
    events.now += 1
    assert plan.matched(Request("d", 300), 0) == (0, False)
    assert plan.watch.take() == [], "nobody said that a block is gone"


def test_without_events_nobody_asks_what_became_of_saves(world):
    request = Request("a", 200)
    world.plan.allocated(request, list(range(13)), 0)
    save, = world.plan.build(output(new=[("a", list(range(13)), 0)], scheduled={"a": 200})).saves
    assert save.number == 0 and not world.plan.announced


def test_a_reset_tells_that_all_is_gone(events):
    request, plan = Request("a", 300), events.plan
    events.store(request.keys(4))
    plan.matched(request, 0)
    plan.allocated(request, list(range(19)), 0)
    plan.build(output(new=[("a", list(range(19)), 0)], scheduled={"a": 300}))
    plan.watch.take()
    assert plan.reset() and not plan.announced
    assert [(one.key, one.removed) for one in plan.watch.take()] == [(key, True) for key in request.keys(4)]
