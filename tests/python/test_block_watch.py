"""What an engine has told of a daemon's blocks follows the daemon, over a double of it."""

import random
import threading

import numpy as np
import pytest
from block_store_double import Daemon
from kvtide.block_store import Found, Namespace, OpaqueBlocks
from kvtide.block_watch import BlockWatch, Change, further, runs, tiers_of
from kvtide.store_link import StoreLink

SPACES = [Namespace(f"m tp{rank}/2", 64, OpaqueBlocks(4)) for rank in range(2)]
KEYS = [bytes([i]) * 8 for i in range(40)]


class World:
    def __init__(self, piece=8):
        self.now, self.daemon = 0.0, Daemon()
        self.link = StoreLink(self.daemon.open_pool, "here", pauses=(0.001, 0.001))
        self.link.start(SPACES, wait=20)
        self.watch = BlockWatch(self.link, seconds=5, piece=piece, clock=lambda: self.now)
        self.told = {}
        self.poll()

    def store(self, keys, ranks=(0, 1)):
        for rank in ranks:
            self.link.stores()[rank].store(keys, np.zeros((len(keys), 4), np.uint8))

    def drop(self, keys, rank=0):
        for key in keys:
            del self.daemon.blocks[SPACES[rank]][key]

    def settle(self):
        for _ in range(1 + len(KEYS)):  # a piece puts the next one behind itself
            done = threading.Event()
            self.link.later(done.set)
            assert done.wait(20)

    def poll(self):
        """What a reader of the changes believes, which never hears of a block twice or of the end of one that it does not know."""
        self.watch.poll()
        self.settle()
        changes = self.watch.take()
        for one in changes:
            if one.removed:
                assert self.told.pop(one.key) == one.tier
            else:
                assert one.key not in self.told
                self.told[one.key] = one.tier
        return changes

    def back(self):
        self.daemon.away = False
        with self.link._lock:
            assert self.link._lock.wait_for(lambda: self.link._stores is not None, timeout=20)


@pytest.fixture
def world():
    one = World()
    yield one
    one.link.close()


def test_blocks_are_told_once_with_what_was_said_first(world):
    world.store(KEYS[:2])
    for what in ("first", "second"):
        for key in KEYS[:2]:
            world.watch.there(key, "host", what)
    assert world.poll() == [Change(key, "host", False, "first") for key in KEYS[:2]]
    assert world.poll() == [] and len(world.watch) == 2 and world.watch.knows(KEYS[0]) and not world.watch.knows(KEYS[2])


def test_what_the_daemon_dropped_is_found_by_the_next_round(world):
    world.store(KEYS)
    for key in KEYS:
        world.watch.there(key, "host", "what")
    world.poll()
    world.drop([KEYS[3], KEYS[4], KEYS[20], KEYS[39]])
    assert world.poll() == [], "a round begins every five seconds"
    world.now += 5
    assert world.poll() == [Change(KEYS[i], "host", True, "what") for i in (3, 4, 20, 39)]
    world.store(KEYS[3:4])
    world.watch.there(KEYS[3], "host", "again")
    assert world.poll() == [Change(KEYS[3], "host", False, "again")]


def test_a_block_is_there_if_all_ranks_have_it(world):
    world.store(KEYS[:4])
    for key in KEYS[:4]:
        world.watch.there(key, "host")
    world.poll()
    world.drop(KEYS[2:3], rank=1)
    world.now += 5
    world.poll()
    assert sorted(world.told) == [KEYS[0], KEYS[1], KEYS[3]]


def test_a_block_that_was_seen_during_the_question_stays(world):
    """The round asked before it was stored again, and answers after."""
    world.watch.there(KEYS[0], "host")
    world.poll()
    reached, go = threading.Event(), threading.Event()

    def before(verb):
        if verb == "peek":
            reached.set()
            assert go.wait(20)

    world.daemon.before = before
    world.now += 5
    world.watch.poll()
    assert reached.wait(20)
    world.watch.there(KEYS[0], "host")
    go.set()
    world.settle()
    assert world.watch.take() == []
    world.daemon.before = lambda verb: None
    world.now += 5
    assert world.poll() == [Change(KEYS[0], "host", True)], "and the next one finds that it is not there"


def test_lookups_and_loads_that_miss_are_told_at_once(world):
    world.store(KEYS[:2])
    for key in KEYS[:2]:
        world.watch.there(key, "host")
    world.watch.gone([KEYS[1], KEYS[7]])
    world.poll()
    assert list(world.told) == [KEYS[0]]
    world.drop(KEYS[:1])
    world.watch.hurry()
    world.poll()
    assert not world.told, "without waiting for the time of the round"


def test_nothing_is_there_while_the_daemon_is_away_and_what_it_kept_is_when_it_is_back(world):
    world.store(KEYS[:6])
    for key in KEYS[:6]:
        world.watch.there(key, "host", "what")
    world.poll()
    world.daemon.away = True
    world.link.failed(ConnectionError("gone"))
    world.watch.poll()
    assert [(one.key, one.removed) for one in world.watch.take()] == [(key, True) for key in KEYS[:6]]
    world.told.clear()
    world.drop(KEYS[4:6])
    world.back()
    world.poll()
    assert world.told == dict.fromkeys(KEYS[:4], "host"), "the round that begins then asks for all"
    assert len(world.watch) == 4


def test_a_round_that_fails_is_begun_again(world):
    """The daemon refuses a question without going away."""
    world.watch.there(KEYS[0], "host")
    world.poll()

    def before(verb):
        if verb == "peek":
            raise MemoryError("too much at once")

    world.daemon.before = before
    world.now += 5
    assert world.poll() == []
    world.daemon.before = lambda verb: None
    assert world.poll() == []
    world.now += 5
    assert world.poll() == [Change(KEYS[0], "host", True)]


def test_all_are_gone_when_the_namespace_is_emptied(world):
    for key in KEYS[:3]:
        world.watch.there(key, "host")
    world.poll()
    world.watch.clear()
    world.poll()
    assert not world.told and len(world.watch) == 0


def test_moves_between_tiers():
    class Store:
        def __init__(self, tiers):
            self.tiers = tiers

        def lookup(self, keys, lease_seconds, peek):
            assert peek and lease_seconds < 0, "asking is no use"
            hits = next((i for i, key in enumerate(keys) if key not in self.tiers), len(keys))
            found = []
            for key in keys[:hits]:
                if found and found[-1][0] == self.tiers[key]:
                    found[-1] = (found[-1][0], found[-1][1] + 1)
                else:
                    found.append((self.tiers[key], 1))
            return Found(hits, tuple(found))

    shuffled = random.Random(7)
    for _ in range(200):
        ranks = [{key: shuffled.choice(["device", "host", "disk"]) for key in KEYS if shuffled.random() < 0.7} for _ in range(2)]
        want = {key: further(ranks[0][key], ranks[1][key]) for key in KEYS if all(key in rank for rank in ranks)}
        assert tiers_of([Store(rank) for rank in ranks], KEYS) == want
    assert further("disk", "host") == "disk" and further("cuda:0", "host") == "host"

    link = type("Link", (), {"stores": lambda self: (store,), "pool": 1, "later": lambda self, call: call()})()
    store = Store({KEYS[0]: "host"})
    watch = BlockWatch(link, seconds=0)
    watch.there(KEYS[0], "host")
    watch.poll()
    watch.take()
    store.tiers[KEYS[0]] = "disk"
    watch.poll()
    assert watch.take() == [Change(KEYS[0], "host", True), Change(KEYS[0], "disk", False)]


def test_random_histories_end_in_what_the_daemon_has():
    shuffled = random.Random(3)
    for _ in range(10):
        world = World(piece=shuffled.randint(1, 16))
        for _ in range(30):
            what, some = shuffled.random(), shuffled.sample(KEYS, shuffled.randint(1, 6))
            if what < 0.5:
                world.store(some)
                for key in some:
                    world.watch.there(key, "host")
            elif what < 0.8:
                world.drop([key for key in some if key in world.daemon.blocks.get(SPACES[1], {})], rank=1)
            elif what < 0.9:
                world.link.failed(ConnectionError("gone"))
                world.back()
            else:
                world.now += 5
            world.poll()
        world.now += 5
        world.poll()
        both = [world.daemon.blocks.get(space, {}) for space in SPACES]
        assert set(world.told) == {key for key in KEYS if all(key in one for one in both)}
        world.link.close()


def test_runs():
    host, disk = [[Change(key, tier, False, i) for i, key in enumerate(KEYS[:4])] for tier in ("host", "disk")]
    assert runs(host + disk, lambda before, after: True) == [host, disk]
    assert runs(host, lambda before, after: before.what != 1) == [host[:2], host[2:]]
    assert runs([], lambda before, after: True) == []
