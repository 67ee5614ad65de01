#!/usr/bin/env python3
"""Dashboards, alerts and deployment files against what kvtided really exposes.

usage: deploy_test.py REPOSITORY EXPOSITION [--promtool PROGRAM]

Every metric (and every value of the labels code, method, location, reason and what) that a dashboard or a rule names has to be in the
exposition; dashboards keep the rules that make them work anywhere; every alert has a severity, a summary and a runbook.
With promtool the syntax of every expression, the rules and their tests are checked too.
"""
import argparse
import json
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

NAME = re.compile(r"\b((?:kvtide|process)_[a-z0-9_]+)\b")
MATCHER = re.compile(r'\b(code|method|location|reason|what)\s*(=~|!~|!=|=)\s*"([^"]*)"')
GRAFANA_VARIABLES = {"$__rate_interval": "5m", "$__range": "1h", "$job": ".+", "$instance": ".+"}
PANEL_TYPES = {"timeseries", "stat", "bargauge", "heatmap"}

complaints = []


def complain(text):
    complaints.append(text)


def read_exposition(path):
    """All sample names, and the values of each label."""
    names, labels = set(), {}
    for line in path.read_text().splitlines():
        if line and not line.startswith("#"):
            names.add(re.match(r"[a-zA-Z_:][a-zA-Z0-9_:]*", line).group())
            for label, value in re.findall(r'([a-z_]+)="([^"]*)"', line):
                labels.setdefault(label, set()).add(value)
    return names, labels


def check_expression(where, expression, names, labels):
    for name in set(NAME.findall(expression)) - names:
        complain(f"{where}: kvtided has no metric {name}")
    for label, operator, value in MATCHER.findall(expression):
        for one in value.split("|") if "~" in operator else [value]:
            if one not in labels[label]:
                complain(f"{where}: no series has {label}={one}")


def check_counters(where, expression):
    """A counter alone only shows for how long the daemon has been running."""
    for match in re.finditer(r"(kvtide_[a-z_]+(?:_total|_bucket))\{[^}]*\}(\[)?", expression):
        if match.group(2) is None:
            complain(f"{where}: {match.group(1)} without rate or increase")


def expressions_of(dashboard):
    for panel in dashboard["panels"]:
        for target in panel.get("targets", []):
            yield panel["title"], target["expr"]


def check_dashboard(path, names, labels):
    dashboard = json.loads(path.read_text())
    variables = {v["name"]: v for v in dashboard["templating"]["list"]}
    if dashboard.get("editable") is not False:
        complain(f"{path.name}: has to be \"editable\": false, provisioned dashboards are not saved")
    if sorted(variables) != ["datasource", "instance", "job"]:
        complain(f"{path.name}: variables are {sorted(variables)}")
    for name in ("job", "instance"):
        variable = variables[name]
        if (variable["multi"], variable["allValue"], variable["refresh"]) != (True, ".+", 2):
            complain(f"{path.name}: variable {name} has to be multi, with .+ for all, refreshed with the time range")
        check_expression(f"{path.name}: variable {name}", variable["query"]["query"], names, labels)
    ids = [panel["id"] for panel in dashboard["panels"]]
    if len(ids) != len(set(ids)):
        complain(f"{path.name}: ids of panels occur twice")
    panels = [p for p in dashboard["panels"] if p["type"] != "row"]
    for panel in panels:
        where = f"{path.name}: {panel.get('title', panel['id'])}"
        if panel["type"] not in PANEL_TYPES:
            complain(f"{where}: type {panel['type']}")
        if not panel.get("title") or not panel.get("description"):
            complain(f"{where}: needs a title and a description")
        if not panel["fieldConfig"]["defaults"].get("unit"):
            complain(f"{where}: needs a unit")
        if panel["gridPos"]["x"] + panel["gridPos"]["w"] > 24:
            complain(f"{where}: beyond the right edge")
        for thing in [panel] + panel["targets"]:
            if thing["datasource"]["uid"] != "${datasource}":
                complain(f"{where}: has to use the variable datasource")
    overlap(path.name, dashboard["panels"])
    for title, expression in expressions_of(dashboard):
        where = f"{path.name}: {title}"
        check_expression(where, expression, names, labels)
        check_counters(where, expression)
        for selector in re.findall(r"(?:kvtide|process)_[a-z0-9_]+(\{[^}]*\})?", expression):
            if 'job=~"$job", instance=~"$instance"' not in selector:
                complain(f"{where}: a selector does not match job and instance")
        for interval in re.findall(r"\[([^\]]*)\]", expression):
            if interval not in ("$__rate_interval", "$__range"):
                complain(f"{where}: interval {interval}")
    return dashboard


def overlap(name, panels):
    cells = {}
    for panel in panels:
        grid = panel["gridPos"]
        for y in range(grid["y"], grid["y"] + grid["h"]):
            for x in range(grid["x"], grid["x"] + grid["w"]):
                if cells.setdefault((x, y), panel["id"]) != panel["id"]:
                    complain(f"{name}: panels {cells[x, y]} and {panel['id']} lie over each other")
                    return


def check_rules(path, names, labels, tests):
    tested = tests.read_text()
    alerts = re.split(r"\n      - alert: ", path.read_text())[1:]
    if len(alerts) < 10:
        complain(f"{path.name}: only {len(alerts)} alerts were found")
    for record, expression in re.findall(r"\n      - record: (\S+)\n        expr: (.*)", path.read_text()):
        check_expression(f"{path.name}: {record}", expression, names, labels)
        if f"expr: {record}\n" not in tested:
            complain(f"{path.name}: {record} has no case in {tests.name}")
    for alert in alerts:
        name = alert.split("\n", 1)[0].strip()
        expression = re.search(r"\n        expr: (.*?)\n        (?:for|labels): ", alert, re.S)
        if expression is None:
            complain(f"{path.name}: {name} has no expression")
            continue
        check_expression(f"{path.name}: {name}", expression.group(1), names, labels)
        if not re.search(rf"\b{name}\b", tested):
            complain(f"{path.name}: {name} has no case in {tests.name}")
        if not re.search(r"labels: \{ severity: (page|warning) \}", alert):
            complain(f"{path.name}: {name} needs a severity, page or warning")
        for annotation in ("summary", "runbook"):
            if not re.search(rf'\n          {annotation}: ".{{20,}}"', alert):
                complain(f"{path.name}: {name} needs a {annotation}")


def check_paths(root):
    """compose mounts what is there; provisioning reads from where compose mounts; Kubernetes' configuration is one."""
    deploy = root / "deploy"
    compose = (deploy / "compose/compose.yaml").read_text()
    mounts = dict(re.findall(r"- (\.\./[^:\s]+):([^:\s]+):ro", compose))
    for source in mounts:
        if not (deploy / "compose" / source).resolve().exists():
            complain(f"compose.yaml mounts {source}, which is not there")
    provider = (deploy / "grafana/provisioning/dashboards/kvtide.yaml").read_text()
    folder = re.search(r"path: ([^\s}]+)", provider).group(1)
    if mounts.get("../grafana/dashboards") != folder:
        complain(f"Grafana reads dashboards from {folder}, compose.yaml does not mount them there")
    prometheus = (deploy / "prometheus/prometheus.yml").read_text()
    if 'targets: ["kvtided:9464"]' not in prometheus or "\n  kvtided:" not in compose or "0.0.0.0:9464" not in compose:
        complain("Prometheus scrapes another address than compose.yaml serves")
    if "job_name: kvtide\n" not in prometheus:
        complain("the alerts select job=\"kvtide\"")
    source = (deploy / "grafana/provisioning/datasources/prometheus.yaml").read_text()
    if "url: http://prometheus:9090" not in source or "\n  prometheus:" not in compose:
        complain("Grafana's data source is not compose.yaml's Prometheus")
    fields = set(re.findall(r"^ +(?:repeated |optional )?[\w.]+ (\w+) = \d+;", (root / "proto/kvtide/v1/kvtided_config.proto").read_text(),
                            re.M))
    config = json.loads((deploy / "kustomize/base/kvtided.json").read_text())
    for key in set(config) - fields:
        complain(f"kvtided.json: {key} is no field of KvtidedConfig")
    sidecar = (deploy / "kustomize/base/sidecar.yaml").read_text()
    for address in config["listen"] + [config["metrics_address"]]:
        port = address.rsplit(":", 1)[1]
        known = f"containerPort: {port}" if port.isdigit() else f"unix:{port}"
        if known not in sidecar:
            complain(f"kvtided.json: {address} is not in sidecar.yaml")


def run_promtool(program, *arguments, stdin=None, cwd=None):
    result = subprocess.run([program, *arguments], input=stdin, capture_output=True, text=True, cwd=cwd)
    if result.returncode != 0:
        complain(f"promtool {' '.join(arguments)}: {result.stdout}{result.stderr}")


def check_with_promtool(program, root, exposition, dashboards):
    run_promtool(program, "check", "metrics", stdin=exposition.read_text())
    prometheus = root / "deploy/prometheus"
    run_promtool(program, "check", "config", str(prometheus / "prometheus.yml"))
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(prometheus / "rules.yml", folder)
        shutil.copy(root / "tests/daemon/metrics/rules_test.yml", folder)
        run_promtool(program, "test", "rules", "rules_test.yml", cwd=folder)
        # Every expression of the dashboards as a recording rule: promtool reads it as Prometheus would.
        rules = []
        for dashboard in dashboards:
            for title, expression in expressions_of(dashboard):
                for variable, value in GRAFANA_VARIABLES.items():
                    expression = expression.replace(variable, value)
                rules.append({"record": f"panel:{len(rules)}", "expr": expression})
        path = pathlib.Path(folder) / "panels.json"
        path.write_text(json.dumps({"groups": [{"name": "panels", "rules": rules}]}))
        run_promtool(program, "check", "rules", str(path))


def self_test(names, labels):
    """The checks find what is planted."""
    def found(check, *arguments):
        before = len(complaints)
        check("planted", *arguments)
        count = len(complaints) - before
        del complaints[before:]
        return count
    assert found(check_expression, "rate(kvtide_no_such_total[5m])", names, labels) == 1
    assert found(check_expression, 'kvtide_rpc_requests_total{code="NO_SUCH_CODE"}', names, labels) == 1
    assert found(check_expression, 'kvtide_rpc_requests_total{method=~"Attend|NoSuchMethod"}', names, labels) == 1
    assert found(check_expression, 'kvtide_rpc_requests_total{method=~"Attend|Append"}', names, labels) == 0
    assert found(check_expression, 'kvtide_refused_calls_total{reason=~"quota|no_such_reason"}', names, labels) == 1
    assert found(check_counters, 'sum(kvtide_moves_total{job="x"})') == 1
    assert found(check_counters, 'sum(rate(kvtide_moves_total{job="x"}[5m]))') == 0
    grid = {"h": 2, "w": 12, "x": 0, "y": 0}
    assert found(overlap, [{"id": 1, "gridPos": grid}, {"id": 2, "gridPos": {**grid, "x": 11}}]) == 1


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("repository", type=pathlib.Path)
    parser.add_argument("exposition", type=pathlib.Path)
    parser.add_argument("--promtool")
    arguments = parser.parse_args()
    root = arguments.repository
    names, labels = read_exposition(arguments.exposition)
    # Left out of the exposition where jemalloc is not linked, and where there is no GPU.
    names |= {"kvtide_allocator_resident_bytes", "kvtide_allocator_allocated_bytes"}
    names |= {"kvtide_gpu_memory_bytes", "kvtide_gpu_memory_used_bytes", "kvtide_gpu_utilization_ratio"}
    self_test(names, labels)
    files = sorted((root / "deploy/grafana/dashboards").glob("*.json"))
    dashboards = [check_dashboard(path, names, labels) for path in files]
    if not dashboards:
        complain("there is no dashboard")
    check_rules(root / "deploy/prometheus/rules.yml", names, labels, root / "tests/daemon/metrics/rules_test.yml")
    check_paths(root)
    if arguments.promtool:
        check_with_promtool(arguments.promtool, root, arguments.exposition, dashboards)
    for text in complaints:
        print(text)
    print(f"{len(dashboards)} dashboards, {len(complaints)} complaints, promtool: {arguments.promtool or 'not installed'}")
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
