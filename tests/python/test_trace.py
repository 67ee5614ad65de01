"""Calls are called in the daemon's log what Python says, by every way."""
import asyncio
import re
import time

import pytest
from ways import Daemon

import kvtide
from kvtide import aio, errors

TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = f"00-{TRACE}-b7ad6b7169203331-01"


# One for each test: the log leaves lines away where a caller fails many times a second.
@pytest.fixture
def logged(tmp_path_factory):
    folder = tmp_path_factory.mktemp("traced")
    with open(folder / "log", "w") as log:
        one = Daemon(folder, log=log)
        one.log = folder / "log"
        yield one
        one.stop()


def lines(daemon, what):
    """Those that have it, as soon as there are some: an answer may be here before its line."""
    for _ in range(100):
        found = [line for line in daemon.log.read_text().splitlines() if what in line]
        if found:
            break
        time.sleep(0.05)
    return found


@pytest.mark.parametrize("way", ["shm", "unix", "unix without session", "tcp"])
def test_errors_and_the_log_have_the_same_name(logged, way):
    address = logged.tcp if way == "tcp" else "shm:" + logged.address if way == "shm" else logged.address
    name = "chat-" + way.replace(" ", "_")
    with kvtide.connect(address, session="without" not in way) as pool:
        with kvtide.trace(request_id=name, traceparent=PARENT):
            with pytest.raises(errors.NotFound) as failed:
                pool.create("nothing of that name")
        assert failed.value.request_id == name
        (line,) = lines(logged, f"request={name} ")
        assert f"trace={TRACE}" in line and "method=CreateSequence" in line
        # Outside, and with texts that are not sent, the daemon makes a name.
        for names in ({}, {"request_id": "two\nlines", "traceparent": "00-nonsense"}):
            with kvtide.trace(**names), pytest.raises(errors.NotFound) as failed:
                pool.create("nothing of that name")
            (line,) = lines(logged, f"request={failed.value.request_id} ")
            assert re.fullmatch(r"[-0-9a-z/]+", failed.value.request_id) and "trace=" not in line


def test_the_last_one_counts_and_tasks_have_their_own(logged):
    async def fail(pool, name):
        with kvtide.trace(name):
            await asyncio.sleep(0)
            with pytest.raises(errors.NotFound) as failed:
                await pool.create("nothing of that name")
        return failed.value.request_id

    async def main():
        async with await aio.connect(logged.address) as pool:
            with kvtide.trace("outer"):
                assert await asyncio.gather(*(fail(pool, f"task-{i}") for i in range(4))) == [f"task-{i}" for i in range(4)]
                with pytest.raises(errors.NotFound) as failed:
                    await pool.create("nothing of that name")
                assert failed.value.request_id == "outer"

    asyncio.run(main())


def test_an_embedded_pool_has_no_log(embedded):
    with kvtide.trace("chat-1"), pytest.raises(errors.NotFound) as failed:
        embedded.create("nothing of that name")
    assert failed.value.request_id == ""
