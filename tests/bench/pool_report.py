#!/usr/bin/env python3
"""The table of ways in clients/cpp/README.md, from a recorded run of kvtide_bench_pool.

Writes the table into the README, or with --check says whether it is current.
"""
import argparse
import json
import pathlib
import sys

BEGIN, END = "<!-- ways: tests/bench/pool_report.py -->\n", "<!-- end of ways -->\n"


def table(run):
    calls, ways, cells = [], [], {}
    for row in run["results"]:
        if row["call"] not in calls:
            calls.append(row["call"])
        if row["way"] not in ways:
            ways.append(row["way"])
        text = f"{row['best_p50_us']:.1f} / {row['best_p99_us']:.0f} us"
        if "gigabytes_per_second" in row:
            text = f"{row['gigabytes_per_second']:.2f} GB/s"
        cells[row["way"], row["call"]] = text
    lines = ["| way | " + " | ".join(calls) + " |", "|---" * (len(calls) + 1) + "|"]
    lines += ["| " + " | ".join([way] + [cells.get((way, call), "") for call in calls]) + " |" for way in ways]
    before, after = run["load_average"]
    lines.append("")
    lines.append(f"p50 / p99 of the best of the rounds, ways in turns; {run['hardware']}, {run['processors']} processors, "
                 f"{run['date'][:10]}, load average {before:.0f} to {after:.0f}: what a busy machine does to the tails is in them.")
    lines.append(f"`{run['command']}`")
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("results", type=pathlib.Path)
    parser.add_argument("readme", type=pathlib.Path)
    arguments = parser.parse_args()
    results, readme = arguments.results, arguments.readme
    text = readme.read_text()
    begin, end = text.index(BEGIN) + len(BEGIN), text.index(END)
    new = text[:begin] + table(json.loads(results.read_text())) + text[end:]
    if arguments.check:
        if new != text:
            print(f"{readme}: the table of ways is not that of {results}; run tests/bench/pool_report.py")
            return 1
        return 0
    readme.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
