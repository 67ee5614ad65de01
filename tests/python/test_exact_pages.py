"""The tables of the vLLM backend against a naive model: random schedules of an engine that reuses its pages."""

import random

import numpy as np
import pytest

from kvtide import _core
from kvtide.errors import FailedPrecondition, InvalidArgument

BLOCK = 64


class Request:
    def __init__(self, number, prompt, length):
        self.number, self.tokens, self.length = number, prompt, length  # `tokens` grows; drafts that fail are replaced
        self.computed, self.pages = 0, []


class Engine:
    """What vLLM does with pages: first come first served, prefix cache of full blocks, freed pages kept until they are needed,
    preemption by recomputation, chunked prefill, drafts that may be refused, rows in any order."""

    def __init__(self, rng, *, pages, sequences, budget, drafts=0, sliding=0, idle=0.0, external=0.0):
        self.external, self.elsewhere, self.loads = external, set(), []  # blocks that a connector keeps, and gives back
        self.rng, self.sequences, self.budget, self.drafts, self.sliding, self.idle = rng, sequences, budget, drafts, sliding, idle
        self.free = list(range(1, pages))
        self.users = {page: 0 for page in range(1, pages)}
        self.cached, self.key_of = {}, {}
        self.running, self.waiting, self.number = [], [], 0
        self.preempted = 0
        self.bases = [[(0, i) for i in range(rng.randrange(1, 6) * BLOCK)], [(1, i) for i in range(rng.randrange(20, 300))]]

    def new_request(self):
        self.number += 1
        prompt = list(self.rng.choice(self.bases)[:self.rng.randrange(1, 400)]) if self.rng.random() < 0.6 else []
        prompt += [(self.number + 10, i) for i in range(self.rng.randrange(1, 200))]
        self.waiting.append(Request(self.number, prompt, len(prompt) + self.rng.randrange(1, 60)))

    def take_page(self):
        if not self.free:
            return None
        page = self.free.pop(0)
        key = self.key_of.pop(page, None)
        if key is not None and self.cached.get(key) == page:
            del self.cached[key]
        self.users[page] = 1
        return page

    def drop_page(self, page):
        if page == 0:
            return
        self.users[page] -= 1
        if self.users[page] == 0:
            (self.free.append if page in self.key_of else lambda p: self.free.insert(0, p))(page)

    def give_up(self, request):
        for page in reversed(request.pages):
            self.drop_page(page)
        request.pages, request.computed = [], 0

    def grow(self, request, upto):
        need = -(-upto // BLOCK) - len(request.pages)
        if need > len(self.free):
            return False
        request.pages += [self.take_page() for _ in range(need)]
        return True

    def hit(self, request):
        if self.sliding:
            return
        for b in range((len(request.tokens) - 1) // BLOCK):
            key = tuple(request.tokens[:(b + 1) * BLOCK])
            page = self.cached.get(key)
            if page is None:
                if key not in self.elsewhere or not self.free:
                    break
                page = self.take_page()
                self.users[page] = 0
                self.free.append(page)
                self.loads.append((page, key))
                self.cached[key], self.key_of[page] = page, key
            if self.users[page] == 0:
                self.free.remove(page)
            self.users[page] += 1
            request.pages.append(page)
            request.computed += BLOCK

    def remember(self, request, upto):
        for b in range(min(upto, len(request.tokens)) // BLOCK):
            key, page = tuple(request.tokens[:(b + 1) * BLOCK]), request.pages[b]
            if self.external and self.rng.random() < self.external:
                self.elsewhere.add(key)
            if page and page not in self.key_of and key not in self.cached:
                self.cached[key], self.key_of[page] = page, key

    def schedule(self):
        """Rows (request, new tokens with drafts) of a step."""
        budget, rows = self.budget, []
        for request in list(self.running):
            if request not in self.running or self.rng.random() < self.idle:
                continue
            new = len(request.tokens) - request.computed
            drafts = [(-self.rng.randrange(1, 1 << 30), 0) for _ in range(self.rng.randrange(self.drafts + 1))] if new == 1 else []
            new = min(new + len(drafts), budget)
            if new == 0:
                continue
            while not self.grow(request, request.computed + new):
                victim = self.running.pop()
                self.preempted += 1
                self.give_up(victim)
                self.waiting.insert(0, victim)
                rows = [row for row in rows if row[0] is not victim]
                if victim is request:
                    break
            if request not in self.running:
                break
            rows.append((request, new, drafts))
            budget -= new
        while self.waiting and len(self.running) < self.sequences and budget > 0:
            request = self.waiting[0]
            self.hit(request)
            new = min(len(request.tokens) - request.computed, budget)
            if not self.grow(request, request.computed + new):
                self.give_up(request)
                break
            self.running.append(self.waiting.pop(0))
            rows.append((request, new, []))
            budget -= new
            self.remember(request, request.computed + new)  # a request behind it hits blocks that this step computes
        self.rng.shuffle(rows)
        return rows

    def finish(self, rows):
        for request, new, drafts in rows:
            if request not in self.running:
                continue
            request.computed += new - len(drafts)
            if request.computed < len(request.tokens):
                continue
            accepted = self.rng.randrange(len(drafts) + 1)
            request.tokens += drafts[:accepted]
            request.computed += accepted
            request.tokens.append((request.number + 10, len(request.tokens)))
            self.remember(request, request.computed)
            if self.sliding:
                for b in range(max(0, request.computed - self.sliding + 1) // BLOCK):
                    self.drop_page(request.pages[b])
                    request.pages[b] = 0
            if len(request.tokens) >= request.length:
                self.running.remove(request)
                self.give_up(request)


def names(tokens, known={}):
    """A number for each token that says the token and all before it."""
    name, out = 0, np.empty(len(tokens), np.int64)
    for i, token in enumerate(tokens):
        name = known.setdefault((name, token), len(known) + 1)
        out[i] = name
    return out


def run(seed, *, steps, pages=40, sequences=4, budget=256, first=1, last=2, drafts=0, sliding=0, idle=0.0, slots=0, stay=False,
        external=0.0):
    rng = random.Random(seed)
    engine = Engine(rng, pages=pages, sequences=sequences, budget=budget, drafts=drafts, sliding=sliding, idle=idle,
                    external=external)
    exact = _core.ExactPages(pages=pages, slots=slots, first_blocks=first, last_blocks=last, sliding=sliding,
                             max_sequences=sequences, max_tokens=budget, rewritten=drafts, blocks_stay=stay)
    # The token that each row of each page holds.
    in_exact = np.zeros((exact.slots + exact.scratch, BLOCK), np.int64)
    in_coded = np.zeros((pages, BLOCK), np.int64)
    tables = exact.tables()
    loaded = 0
    for step in range(steps):
        while len(engine.waiting) < 3:
            engine.new_request()
        rows = engine.schedule()
        for page, key in engine.loads:
            exact.forget(np.array([page], np.int32))
            in_coded[page] = names(key)[-BLOCK:]
        loaded, engine.loads = loaded + len(engine.loads), []
        query_start = np.cumsum([0] + [new for _, new, _ in rows]).astype(np.int32)
        lengths = np.array([request.computed + new for request, new, _ in rows], np.int32)
        table = np.zeros((len(rows), pages), np.int32)
        tokens = []
        for s, (request, new, drafts_now) in enumerate(rows):
            table[s, :len(request.pages)] = request.pages
            tokens.append(names((request.tokens + drafts_now)[:request.computed + new]))
        exact.step(query_start, lengths, table)
        written = tables["write_slots"][:query_start[-1]]
        assert len(set(written.tolist())) == len(written) and (len(written) == 0 or written.min() >= BLOCK)  # slot 0 is nobody's
        for s, row in enumerate(tokens):
            new = written[query_start[s]:query_start[s + 1]]
            in_exact[new // BLOCK, new % BLOCK] = row[len(row) - len(new):]
        # Every visible token is the right one, exact or coded.
        for s, row in enumerate(tokens):
            coded_first, coded_count = int(tables["coded_first"][s]), int(tables["coded_count"][s])
            assert not sliding or coded_first == 0 or coded_count == 0
            before = int(lengths[s] - (query_start[s + 1] - query_start[s]))
            seen_from = max(0, before - sliding + 1) if sliding else 0
            for b in range(seen_from // BLOCK, -(-len(row) // BLOCK)):
                if coded_first <= b < coded_first + coded_count:
                    held = in_coded[table[s, b]]
                else:
                    held = in_exact[tables["exact_table"][s][b if b < coded_first else b - coded_count]]
                right = row[b * BLOCK:(b + 1) * BLOCK]
                wrong = np.flatnonzero(held[:len(right)] != right)
                assert all(b * BLOCK + i < seen_from for i in wrong), (seed, step, s, b, wrong)
        # Layers that attend another one's pages come after the seals, and after other layers have used the scratch pages.
        assert not stay or (exact.scratch == 0 and (len(written) == 0 or written.max() < exact.slots * BLOCK))
        for place, page in tables["seal_pages"][:tables["seal_count"][0]]:
            assert page > 0
            in_coded[page] = in_exact[place]
        in_exact[exact.slots:] = 0  # scratch pages are shared by layers: nothing of them outlives the step
        engine.finish(rows)
    assert bool(loaded) == bool(external)
    return engine, exact


@pytest.mark.parametrize("seed", range(6))
def test_every_row_attended_is_the_right_one(seed):
    engine, exact = run(seed, steps=250)
    assert exact.counts()["coded_blocks"] > 50 and exact.counts()["seals"] > 20


@pytest.mark.parametrize("seed", range(6))
def test_preemption(seed):
    engine, _ = run(100 + seed, steps=250, pages=16, sequences=5)
    assert engine.preempted > 0


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("drafts", [1, 5])
def test_speculation(seed, drafts):
    run(200 + seed, steps=150, drafts=drafts)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("drafts", [0, 3])
def test_blocks_that_a_connector_loads(seed, drafts):
    """Into pages that had exact copies of what was there before."""
    run(900 + seed, steps=300, pages=14, sequences=4, external=0.9, drafts=drafts)


@pytest.mark.parametrize("seed", range(4))
def test_few_slots_lose_copies_not_tokens(seed):
    sizes = _core.exact_pages_sizes(1, 2, 6, 200, 0)
    _, exact = run(300 + seed, steps=200, sequences=6, budget=200, pages=60, slots=sizes["least_slots"])
    assert exact.slots < exact.all_slots


@pytest.mark.parametrize("seed", range(4))
def test_few_slots_with_speculation(seed):
    sizes = _core.exact_pages_sizes(1, 2, 6, 200, 4)
    run(400 + seed, steps=200, sequences=6, budget=200, pages=60, drafts=4, slots=sizes["least_slots"])


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("drafts", [0, 3])
def test_blocks_that_stay_for_other_layers_with_few_slots(seed, drafts):
    least = _core.exact_pages_sizes(1, 2, 6, 300, drafts, True)["least_slots"]
    assert least > _core.exact_pages_sizes(1, 2, 6, 300, drafts)["least_slots"]
    engine, _ = run(800 + seed, steps=200, sequences=6, budget=300, pages=40, drafts=drafts, slots=least, stay=True)
    run(850 + seed, steps=100, sliding=100, first=0, drafts=drafts, stay=True)


@pytest.mark.parametrize("seed", range(4))
def test_sequences_that_wait_keep_their_unfinished_block(seed):
    run(500 + seed, steps=200, idle=0.4)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("window", [40, 100])
def test_sliding_window(seed, window):
    run(600 + seed, steps=150, sliding=window, first=0)


@pytest.mark.parametrize("window", [(0, 0), (0, 1), (3, 0), (2, 5)])
def test_windows(window):
    for seed in range(3):
        run(700 + seed, steps=100, first=window[0], last=window[1])


def one_row(exact, before, after, pages):
    exact.step(np.array([0, after - before], np.int32), np.array([after], np.int32), np.array([pages], np.int32))
    tables = exact.tables()
    return tables["coded_first"][0], tables["coded_count"][0]


def small(**changes):
    options = dict(pages=20, slots=0, first_blocks=1, last_blocks=2, sliding=0, max_sequences=2, max_tokens=512, rewritten=0)
    options.update(changes)
    return _core.ExactPages(**options)


def test_the_window_of_a_long_prompt():
    exact = small()
    assert one_row(exact, 0, 500, range(1, 9)) == (1, 0)  # a chunk attends itself exactly
    assert one_row(exact, 500, 501, range(1, 9)) == (1, 4)  # then the first, the last two full ones and the tail
    assert one_row(exact, 501, 513, range(1, 10)) == (1, 4)


def test_a_prefix_hit_is_coded():
    exact = small()
    one_row(exact, 0, 512, range(1, 9))
    exact = small()  # another process would not have the copies
    assert one_row(exact, 256, 300, range(1, 6)) == (0, 4)


def test_a_page_that_is_given_to_somebody_else_is_forgotten():
    exact = small()
    one_row(exact, 0, 100, [1, 2])
    one_row(exact, 0, 70, [2, 1])
    tables = exact.tables()
    assert tables["coded_count"][0] == 0
    assert tables["write_slots"][0] // BLOCK == tables["exact_table"][0][0]


def test_a_page_that_is_written_from_elsewhere_is_attended_coded():
    exact = small()
    one_row(exact, 0, 128, [1, 2])
    assert one_row(exact, 128, 140, [1, 2, 3]) == (1, 0)
    exact.forget(np.array([2], np.int32))
    assert one_row(exact, 140, 141, [1, 2, 3]) == (1, 1)
    for page in (0, 20, -1):
        with pytest.raises(InvalidArgument, match=f"page {page} of 20"):
            exact.forget(np.array([1, page], np.int32))
    assert one_row(exact, 141, 142, [1, 2, 3]) == (1, 1)  # 1 was not forgotten


def test_what_cannot_be_is_refused_and_changes_nothing():
    exact = small()
    one_row(exact, 0, 100, [1, 2])
    with pytest.raises(FailedPrecondition, match="whose exact copy is lost"):
        one_row(exact, 100, 101, [1, 3])
    with pytest.raises(InvalidArgument, match="page 20 of 20"):
        one_row(exact, 0, 1, [20])
    with pytest.raises(InvalidArgument, match="3 rows"):
        exact.step(np.array([0, 1, 2, 3], np.int32), np.ones(3, np.int32), np.ones((3, 1), np.int32))
    with pytest.raises(InvalidArgument, match="600 new tokens"):
        one_row(exact, 0, 600, range(1, 11))
    with pytest.raises(InvalidArgument, match="100 tokens in 1 pages"):
        one_row(exact, 0, 100, [1])
    with pytest.raises(InvalidArgument, match="at least"):
        small(slots=3)
    with pytest.raises(InvalidArgument, match="first_blocks is 1"):
        small(sliding=100)
    assert one_row(exact, 100, 101, [1, 2]) == (1, 0)


def test_page_0_is_padding():
    exact = small()
    one_row(exact, 0, 65, [0, 0])
    assert exact.tables()["write_slots"][:65].max() == -1 and exact.tables()["seal_count"][0] == 0


def test_rows_of_length_0_are_padding():
    """vLLM's dummy batches have new tokens in rows of nobody, or of a request whose pages they must leave alone."""
    exact = small()
    one_row(exact, 0, 70, [1, 2])
    exact.step(np.array([0, 5, 6], np.int32), np.array([0, 71], np.int32), np.array([[1, 2], [1, 2]], np.int32))
    tables = exact.tables()
    assert tables["write_slots"][:5].max() == -1 and tables["write_slots"][5] >= BLOCK
    exact.step(np.array([0, 5], np.int32), np.zeros(1, np.int32), np.array([[1, 2]], np.int32))
    assert one_row(exact, 71, 72, [1, 2]) == (1, 0)
