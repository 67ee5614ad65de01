#!/usr/bin/env python3
"""A real Prometheus scrapes a real kvtided with a disk and a redis-server under load; every panel and every alert has to have an answer.

usage: prometheus_test.py REPOSITORY KVTIDED KVTIDE APPENDER PROMETHEUS [--pictures FOLDER]

With --pictures each dashboard is drawn from the answers to its queries, FOLDER/NAME.svg: those of deploy/grafana/pictures are such.

Each expression of the dashboard is asked for over the time of the load, and has to give finite numbers; a planted expression has to
fail. Each alert's expression has to be one that Prometheus evaluates, none of them may fire on a healthy daemon, and the one that
should (data loss aside, none does) is checked by rules_test.yml.
"""
import json
import math
import os
import pathlib
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request

import draw_dashboard

PATIENCE = 120
VARIABLES = {"$__rate_interval": "8s", "$__range": "1m", "$job": ".+", "$instance": ".+"}
# Nothing happens there on a healthy daemon: no number is the right answer (0 / 0).
MAY_BE_EMPTY = {"Waits for the lock"}


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def ask(port, path, **parameters):
    query = urllib.parse.urlencode(parameters)
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/v1/{path}?{query}", timeout=30) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        text = error.read().decode()
        return json.loads(text) if text.startswith("{") else {"status": "error", "error": text}


def wait_for(what, check):
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        try:
            value = check()
            if value:
                return value
        except OSError:
            pass
        time.sleep(0.1)
    sys.exit(f"no {what} within {PATIENCE} s")


def finite_numbers(answer):
    """Of all series of an answer; None when it failed."""
    if answer.get("status") != "success":
        return None
    values = [float(v) for series in answer["data"]["result"] for _, v in series.get("values", [])]
    return [v for v in values if math.isfinite(v)]


def main():
    # Programs start in a folder of their own.
    words = sys.argv[1:]
    pictures = None
    if "--pictures" in words:
        at = words.index("--pictures")
        pictures = pathlib.Path(words[at + 1]).resolve()
        del words[at : at + 2]
    repository, kvtided, kvtide, appender, prometheus = (pathlib.Path(word).resolve() for word in words)
    rules = repository / "deploy/prometheus/rules.yml"
    complaints = []
    with tempfile.TemporaryDirectory(prefix="kvtide-prometheus-") as name:
        folder = pathlib.Path(name)
        (folder / "run").mkdir()
        address = f"unix:{folder}/run/kvtided.sock"
        metrics, web, redis = free_port(), free_port(), free_port()
        config = (repository / "deploy/prometheus/prometheus.yml").read_text()
        assert "kvtided:9464" in config, "prometheus.yml scrapes another target"
        config = config.replace("kvtided:9464", f"127.0.0.1:{metrics}").replace("/etc/prometheus/rules.yml", str(rules))
        config = "\n".join("  scrape_interval: 1s" if line.strip().startswith("scrape_interval:") else line for line in config.splitlines())
        (folder / "prometheus.yml").write_text(config)
        (folder / "rules.yml").write_text(rules.read_text())
        log = open(folder / "log", "w")
        processes = []

        # Two GPUs for its metrics, whatever this machine has.
        (folder / "lib").mkdir()
        (folder / "lib/libnvidia-ml.so.1").symlink_to(kvtided.parents[1] / "tests/daemon/metrics/libkvtide_nvml_standin.so")
        environment = {**os.environ, "LD_LIBRARY_PATH": f"{folder}/lib"}

        def start(*command):
            processes.append(subprocess.Popen([str(c) for c in command], stdout=log, stderr=log, cwd=folder, env=environment))
            return processes[-1]

        def run(*words):
            patience = [] if words[0] == "eval" else ["--timeout", "60"]
            return subprocess.run([kvtide, *words, "--address", address, *patience], stdout=log, stderr=log, cwd=folder).returncode

        try:
            start("redis-server", "--port", redis, "--bind", "127.0.0.1", "--save", "", "--appendonly", "no")
            start(kvtided, "--listen", address, "--device", "cpu", "--device-memory", "24MiB", "--host-memory", "64MiB",
                  "--disk", f"{folder}/tier:16MiB", "--remote", f"127.0.0.1:{redis}", "--metrics-address", f"127.0.0.1:{metrics}")
            start(prometheus, f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/tsdb",
                  f"--web.listen-address=127.0.0.1:{web}", "--log.level=warn")
            wait_for("daemon", lambda: run("health") == 0)
            wait_for("scrape", lambda: finite_numbers(ask(web, "query_range", query="kvtide_build_info", start=time.time() - 30, end=time.time(), step=1)))
            begun = time.time()
            # Text through the bundled model: appends, seals, attention; and an engine that appends all the time.
            start(appender, address, "register")
            assert run("eval", "--pairs", "q8_0/turbo4", "--windows", "1", "--context", "512", "--no-layer-errors", "--no-progress") == 0, (folder / "log").read_text()
            listed = subprocess.run([kvtide, "seq", "list", "--output", "json", "--address", address, "--timeout", "60"], capture_output=True, text=True, cwd=folder)
            assert listed.returncode == 0, listed.stderr
            ids = json.loads(listed.stdout)
            assert ids, "the engine has no sequence"
            one = ids[0]["id"]
            forked = subprocess.run([kvtide, "seq", "fork", one, "--address", address, "--timeout", "60"], capture_output=True, text=True, cwd=folder)
            assert forked.returncode == 0, forked.stderr
            for verb in ("evict", "prefetch"):
                assert run("seq", verb, one, forked.stdout.strip()) == 0
                time.sleep(3)  # scrapes find them there
            run("seq", "close", "12345")  # NOT_FOUND: a failed call
            time.sleep(5)
            end = time.time()
            dashboards = sorted((repository / "deploy/grafana/dashboards").glob("*.json"))
            asked = 0
            for path in dashboards:
                dashboard, answers = json.loads(path.read_text()), {}
                for panel in dashboard["panels"]:
                    for target in panel.get("targets", []):
                        expression = target["expr"]
                        for variable, value in VARIABLES.items():
                            expression = expression.replace(variable, value)
                        answer = ask(web, "query_range", query=expression, start=begun, end=end, step=1)
                        numbers = finite_numbers(answer)
                        asked += 1
                        answers.setdefault(panel["id"], []).append(answer if numbers is not None else {"data": {"result": []}})
                        if numbers is None:
                            complaints.append(f"{panel['title']}: {answer.get('error')}: {expression}")
                        elif not numbers and panel["title"] not in MAY_BE_EMPTY:
                            complaints.append(f"{panel['title']}: no number: {expression}")
                if pictures is not None:
                    pictures.mkdir(parents=True, exist_ok=True)
                    (pictures / f"{path.stem}.svg").write_text(draw_dashboard.draw(dashboard, answers, begun, end))
            # The check finds what is planted.
            assert finite_numbers(ask(web, "query_range", query="sum(", start=begun, end=end, step=1)) is None
            assert finite_numbers(ask(web, "query_range", query="kvtide_no_such_thing", start=begun, end=end, step=1)) == []
            groups = ask(web, "rules")["data"]["groups"]
            alerts = [rule for group in groups for rule in group["rules"] if rule["type"] == "alerting"]
            if len(alerts) < 10:
                complaints.append(f"Prometheus has {len(alerts)} alerts")
            for alert in alerts:
                if alert["health"] not in ("ok", "unknown") or alert.get("lastError"):
                    complaints.append(f"{alert['name']}: {alert.get('lastError')}")
                # Evaluated now, whenever its group's turn is.
                if finite_numbers(ask(web, "query_range", query=alert["query"], start=begun, end=end, step=1)) is None:
                    complaints.append(f"{alert['name']}: {alert['query']} is not evaluated")
                if alert["state"] == "firing":
                    complaints.append(f"{alert['name']} fires on a healthy daemon")
        finally:
            for process in reversed(processes):
                process.send_signal(signal.SIGTERM)
            for process in processes:
                try:
                    process.wait(30)
                except subprocess.TimeoutExpired:
                    process.kill()
            log.close()
            if complaints or sys.exc_info()[0] is not None:
                print((folder / "log").read_text()[-3000:])
    for complaint in complaints:
        print(complaint)
    print(f"{asked} expressions, {len(alerts)} alerts, {len(complaints)} complaints")
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
