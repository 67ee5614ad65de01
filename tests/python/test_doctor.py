"""python -m kvtide.doctor: findings for each engine, and a block that goes to a daemon and back."""

import json

import pytest
from block_store_double import Daemon
from kvtide import doctor, store_link
from kvtide.errors import Unavailable, Unimplemented


@pytest.mark.parametrize("engine", list(doctor.ENGINES))
def test_every_engine_has_findings_with_advice_where_they_fail(engine, capsys):
    code = doctor.main([engine])
    findings = json.loads(capsys.readouterr().out)
    assert findings[0]["subject"] == "kvtide" and len(findings) >= 2
    assert all(one["verdict"] in ("ok", "warn", "fail") for one in findings)
    assert all(one["advice"] for one in findings if one["verdict"] == "fail")
    assert code == any(one["verdict"] == "fail" for one in findings)


def test_an_engine_that_is_missing_or_too_old(monkeypatch):
    monkeypatch.setattr(doctor, "installed", lambda *names: None)
    one, = [one for one in doctor.sglang()]
    assert one.verdict == "fail" and "pip install" in one.advice
    monkeypatch.setattr(doctor, "installed", lambda *names: (names[0], "4.57.1"))
    assert [one.verdict for one in doctor.transformers()] == ["ok", "fail"]
    assert doctor.older("0.5.9.post1", "0.5.23") and not doctor.older("0.5.23", "0.5.23") and not doctor.older("5.0.0rc1", "5.0")


def test_a_block_goes_there_and_back(monkeypatch):
    daemon = Daemon()
    monkeypatch.setattr(store_link, "connect", lambda address, **options: daemon.open_pool())
    assert doctor.block_store("unix:/x").verdict == "ok"
    assert not daemon.blocks, "nothing of it stays"
    daemon.lose.add(b"block")
    assert doctor.block_store("unix:/x").verdict == "fail"
    assert [one.subject for one in doctor.examine("sglang", "unix:/x")][-1] == "block store"


@pytest.mark.parametrize("error,advice", [(Unavailable("no kvtided"), "start kvtided"), (Unimplemented("older"), "same version")])
def test_a_daemon_that_is_away_or_too_old(monkeypatch, error, advice):
    def refuse(address, **options):
        raise error

    monkeypatch.setattr(store_link, "connect", refuse)
    one = doctor.block_store("")
    assert one.verdict == "fail" and advice in one.advice
