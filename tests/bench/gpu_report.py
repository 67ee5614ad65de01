#!/usr/bin/env python3
"""Table and plot of recorded GPU attention results.

usage: gpu_report.py [--results DIR] [--svg FILE] [--check FILE]

Reads gpu_attend.json and gpu_f16_baselines.json of DIR (default: results/ beside this script) and prints the table in
Markdown. --svg writes the plot; --check exits with 1 if FILE is not the plot of these results.
"""
import argparse
import json
import pathlib
import sys

COLOURS = {"f16 (PyTorch)": "#8a8f98", "f16": "#5b6470", "q8_0": "#b9a25a", "q8_0/turbo4": "#7fa85c", "turbo4": "#2f7dbd",
           "turbo3": "#1f5f99", "turbo2": "#12406b"}


def load(folder):
    attend = json.loads((folder / "gpu_attend.json").read_text())
    baselines = json.loads((folder / "gpu_f16_baselines.json").read_text())
    f16 = {tuple(s["shape"]): s["best_us"] for s in baselines["shapes"]}
    rows = []
    for s in attend["shapes"]:
        shape = (s["sequences"], s["kv_heads"], s["tokens"], s["head_dim"], s["group"])
        rows.append((shape, s["pair"], s["in_graph_us"], s.get("with_merge_us"), s.get("read_only_us"), f16.get(shape)))
    return attend, baselines, rows


def words(shape):
    sequences, kv_heads, tokens, dim, group = shape
    return f"{sequences} x {kv_heads} x {tokens}, d {dim}, G {group}"


def table(rows):
    lines = ["| pair | sequences x KV heads x tokens | between events | in a graph | reading only | f16 | ratio |", "|---|---|---|---|---|---|---|"]
    for shape, pair, graph, events, read, f16 in rows:
        cell = lambda x: f"{x:.0f}" if x else "-"
        ratio = f"{f16 / graph:.2f}x" if f16 else "-"
        lines.append(f"| {pair} | {words(shape)} | {cell(events)} | {cell(graph)} | {cell(read)} | {cell(f16)} | {ratio} |")
    return "\n".join(lines)


def svg(attend, baselines, rows):
    shapes = []
    for shape, *_ in rows:
        if shape not in shapes:
            shapes.append(shape)
    bars = []  # (shape, [(name, us, ratio)])
    for shape in shapes:
        f16 = next((r[5] for r in rows if r[0] == shape), None)
        own = sorted([(pair, graph, f16 / graph) for s, pair, graph, _, _, _ in rows if s == shape and pair in COLOURS], key=lambda b: b[2]) if f16 else []
        if any(pair != "f16" for pair, _, _ in own):
            bars.append((shape, [("f16 (PyTorch)", f16, 1.0)] + own))
    left, width, step, gap, top = 290, 470, 15, 20, 58
    height = top + sum(step * len(b) + gap for _, b in bars) + 14
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + width + 150}" height="{height}" font-family="sans-serif" font-size="11">',
           '<rect width="100%" height="100%" fill="white"/>',
           f'<text x="14" y="22" font-size="14">Decode attention, speed against the best f16 of PyTorch {baselines["torch"].split("+")[0]}</text>',
           f'<text x="14" y="40" fill="#666">{attend["device"]}, driver {attend["driver"]}, {attend["date"]}, commit {attend["commit"]}, '
           f'{attend["command"]}; in a CUDA graph, merge included</text>']
    most = max(ratio for _, b in bars for _, _, ratio in b)
    y = top
    for shape, entries in bars:
        out.append(f'<text x="14" y="{y + 11}">{words(shape)}</text>')
        for name, us, ratio in entries:
            length = width * ratio / most
            out.append(f'<text x="{left - 6}" y="{y + 11}" text-anchor="end" fill="#444">{name}</text>')
            out.append(f'<rect x="{left}" y="{y + 2}" width="{length:.1f}" height="{step - 4}" fill="{COLOURS[name]}"/>')
            out.append(f'<text x="{left + length + 5:.1f}" y="{y + 11}" fill="#222">{ratio:.2f}x, {us:.0f} us</text>')
            y += step
        y += gap
    out.append("</svg>")
    return "\n".join(out) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=pathlib.Path, default=pathlib.Path(__file__).resolve().parent / "results")
    parser.add_argument("--svg", type=pathlib.Path)
    parser.add_argument("--check", type=pathlib.Path)
    arguments = parser.parse_args()
    attend, baselines, rows = load(arguments.results)
    plot = svg(attend, baselines, rows)
    if arguments.check:
        if arguments.check.read_text() != plot:
            print(f"{arguments.check} is not the plot of the results beside it; run {sys.argv[0]} --svg {arguments.check}")
            return 1
        return 0
    if arguments.svg:
        arguments.svg.write_text(plot)
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
