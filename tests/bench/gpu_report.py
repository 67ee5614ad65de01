#!/usr/bin/env python3
"""Tables and plot of recorded GPU results.

usage: gpu_report.py [--results DIR] [--svg FILE] [--readme FILE] [--check-svg FILE] [--check-readme FILE]
       gpu_report.py [--results DIR] --vllm FILE | --check-vllm FILE

Reads gpu_*.json and gpu_ncu.csv of DIR (default: results/ beside this script) and prints the attention table in Markdown. --svg
writes the plot, --readme puts the tables of attention, prefill, seals, decode steps and counters into FILE, in place of those with
the same first columns; --vllm does so for the tables of gpu_vllm*.json. The checks exit with 1 if FILE is not up to date
with the results.
"""
import argparse
import csv
import json
import pathlib
import sys

COLOURS = {"f16 (PyTorch)": "#8a8f98", "f16": "#5b6470", "q8_0": "#b9a25a", "q8_0/turbo4": "#7fa85c", "turbo4": "#2f7dbd",
           "wht4": "#3f9ccf", "turbo3": "#1f5f99", "turbo2": "#12406b"}


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


def prefill_table(folder):
    lines = ["| pair | queries, tokens | prefill | TFLOP/s | kernels for few rows | torch flash | torch cuDNN | of the best torch |",
             "|---|---|---|---|---|---|---|---|"]
    for s in json.loads((folder / "gpu_prefill.json").read_text())["shapes"]:
        torch = s.get("torch_us", {})
        if "cudnn_all" not in torch:
            continue
        other = "" if s["head_dim"] == 128 else f", d {s['head_dim']}, {s['heads']}/{s['kv_heads']} heads"
        few = f"{s['few_rows_us']:.0f}" if s["few_rows_us"] else "-"
        flash = min((us for name, us in torch.items() if name.startswith("flash")), default=None)
        lines.append(f"| {s['pair']}{other} | {s['queries']}, {s['tokens']} | {s['prefill_us']:.0f} | {s['tflops']:.0f} | {few} | "
                     f"{f'{flash:.0f}' if flash else '-'} | {torch['cudnn_all']:.0f} | {s['speed_of_torch']:.2f} |")
    return "\n".join(lines)


def seal_table(folder):
    rates = {r["what"]: r for r in json.loads((folder / "gpu_seal.json").read_text())["rates"]}
    kinds = ["seal {} keys", "seal {} keys, centred", "seal {} values", "decode {} keys", "decode {} values"]
    cell = lambda r: f"{r['gigabytes_per_second']:.0f} ({100 * r['of_copy']:.0f} %)" if r else "-"
    lines = ["| type | seal keys | seal keys, centred | seal values | decode keys | decode values |", "|---|---|---|---|---|---|"]
    types = [what.split()[1] for what in rates if what.startswith("seal ") and what.endswith(" keys, d 128")]
    for name in types:
        lines.append(f"| {name} | " + " | ".join(cell(rates.get(kind.format(name) + ", d 128")) for kind in kinds) + " |")
    return "\n".join(lines)


def step_table(folder):
    steps = json.loads((folder / "gpu_step.json").read_text())["steps"]
    us = {(s["sequences"], s["tokens"], s["pair"]): s["step_us"] for s in steps}
    pairs = [pair for pair in dict.fromkeys(s["pair"] for s in steps) if pair != "f16"]
    lines = ["| sequences x tokens | f16 pages | " + " | ".join(pairs) + " |", "|---" * (len(pairs) + 2) + "|"]
    for shape in dict.fromkeys((s["sequences"], s["tokens"]) for s in steps):
        f16 = us[(*shape, "f16")]
        cells = [f"{us[(*shape, p)] / 1e3:.2f} ({f16 / us[(*shape, p)]:.2f}x)" for p in pairs]
        lines.append(f"| {shape[0]} x {shape[1]} | {f16 / 1e3:.2f} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def cache_step_table(folder):
    key = lambda s: (s["pair"], s["sequences"], s["tokens"])
    before = {key(s): s for s in json.loads((folder / "gpu_cache_step_before.json").read_text())["steps"]}
    lines = ["| pair | sequences x tokens, a layer | kernels | AppendAttend | above the kernels | attend alone | append alone | plan of a step | AppendAttend before |",
             "|---" * 9 + "|"]
    for s in json.loads((folder / "gpu_cache_step.json").read_text())["steps"]:
        old = before.get(key(s))
        cells = [s["kernels_us"], s["append_attend_p50_us"], s["above_kernels_us"], s["backend_attend_p50_us"], s["backend_append_p50_us"],
                 s["backend_plan_us"], old["append_attend_p50_us"] if old else None]
        lines.append(f"| {s['pair']} | {s['sequences']} x {s['tokens']} | " + " | ".join("-" if c is None else f"{c:.0f}" for c in cells) + " |")
    return "\n".join(lines)


def paged_table(folder):
    result = json.loads((folder / "gpu_paged_attention.json").read_text())
    lines = ["| pages | sequences x tokens | bare kernels | step in a graph | above, a layer | above without writing | step by calls | plan | seals of a block of every sequence |",
             "|---" * 9 + "|"]
    for s in result["steps"]:
        cells = [f"{s['bare_us'] / 1e3:.2f}", f"{s['step_us'] / 1e3:.2f}", f"{s['above_a_layer_us']:.1f}", f"{s['above_without_writing_us']:.1f}",
                 f"{s['called_us'] / 1e3:.2f}", f"{s['plan_us']:.0f}", f"{s['seal_of_every_sequence_us']:.0f}" if s["pair"] != "f16" else "-"]
        lines.append(f"| {s['pair']} | {s['sequences']} x {s['tokens']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def counter_table(folder):
    with open(folder / "gpu_ncu.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    column = lambda start: next(name for name in rows[0] if name.startswith(start))
    time, cycles, read = column("gpu__time"), column("sm__cycles"), column("dram__bytes_read")
    percents = [column(start) for start in ("smsp__issue_active", "sm__inst_executed_pipe_alu", "sm__inst_executed_pipe_fma",
                                            "sm__pipe_tensor", "dram__throughput")]
    lines = ["| kernel alone (ncu) | us | GHz | MB read | issue slots | ALU | FMA | tensor | DRAM | registers |", "|---" * 10 + "|"]
    for r in rows:
        us = float(r[time]) / 1e3
        lines.append(f"| {r['shape']} | {us:.0f} | {float(r[cycles]) / us / 1e3:.2f} | {float(r[read]) / 1e6:.0f} | " +
                     " | ".join(f"{float(r[p]):.0f} %" for p in percents) + f" | {r[column('launch__registers')]} |")
    return "\n".join(lines)


def vllm_tables(folder):
    """Decoding in vLLM over each cache: tokens/s, and the ratio to vLLM's own 16-bit cache."""

    def table(name, header, cells):
        result = json.loads((folder / name).read_text())
        engines = [e for e in result["engines"] if "failed" not in e]
        f16 = next(e for e in engines if e["cache"] == "f16")
        columns = header(result, f16)
        return "\n".join([f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"] +
                         [f"| {e['cache']} | {' | '.join(cells(e, f16))} |" for e in engines])

    def shapes(result, f16):
        return [f"cache, {result['layers']} layers{', compiled' if result.get('compile') else ''}", "KV tokens", *(f"{s['sequences']} x {s['tokens']}" for s in f16["shapes"])]

    def speeds(e, f16):
        yield f"{e['kv_tokens']:,} ({e['kv_tokens'] / f16['kv_tokens']:.2f}x)"
        for mine, other in zip(e["shapes"], f16["shapes"]):
            yield f"{mine['tokens_per_s']:,.0f} ({mine['tokens_per_s'] / other['tokens_per_s']:.2f}x)" if mine["fits"] else "does not fit"

    def limit(result, f16):
        return [f"cache of {result['limit_gib']:g} GiB", f"sequences of {f16['shapes'][0]['tokens']} tokens at once", "tokens/s"]

    def most(e, f16):
        for key in ("sequences", "tokens_per_s"):
            mine, other = e["shapes"][0][key], f16["shapes"][0][key]
            yield f"{mine:,.0f} ({mine / other:.2f}x)"

    by_shape = ("gpu_vllm.json", "gpu_vllm_32_layers.json", "gpu_vllm_compiled.json")
    return [*(table(name, shapes, speeds) for name in by_shape), table("gpu_vllm_limit.json", limit, most)]


def with_tables(text, tables):
    """`text` with its Markdown tables replaced by those of `tables` that begin with the same two columns."""
    key = lambda header: [c.strip() for c in header.split("|")[1:3]]
    new = {tuple(key(t)): t for t in tables}
    out, lines, found = [], text.split("\n"), set()
    while lines:
        line = lines.pop(0)
        table = new.get(tuple(key(line))) if line.startswith("| ") and lines and lines[0].startswith("|---") else None
        if table is None:
            out.append(line)
            continue
        found.add(tuple(key(line)))
        while lines and lines[0].startswith("|"):
            lines.pop(0)
        out += table.split("\n")
    missing = [k for k in new if k not in found]
    if missing:
        raise SystemExit(f"gpu_report.py: no table that begins with {' | '.join(missing[0])}")
    return "\n".join(out)


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
    parser.add_argument("--readme", type=pathlib.Path)
    parser.add_argument("--check-svg", type=pathlib.Path)
    parser.add_argument("--check-readme", type=pathlib.Path)
    parser.add_argument("--vllm", type=pathlib.Path)
    parser.add_argument("--check-vllm", type=pathlib.Path)
    arguments = parser.parse_args()
    for path in filter(None, (arguments.vllm, arguments.check_vllm)):
        text = path.read_text()
        made = with_tables(text, vllm_tables(arguments.results))
        if path == arguments.vllm:
            path.write_text(made)
        elif made != text:
            print(f"{path} is not up to date with the results; run {sys.argv[0]} --vllm {path}")
            return 1
    if arguments.vllm or arguments.check_vllm:
        return 0
    attend, baselines, rows = load(arguments.results)
    plot = svg(attend, baselines, rows)
    tables = [table(rows), *(f(arguments.results) for f in (prefill_table, seal_table, step_table, cache_step_table, paged_table, counter_table))]
    checks = [(arguments.check_svg, "svg", lambda _: plot), (arguments.check_readme, "readme", lambda text: with_tables(text, tables))]
    checked = [(path, option, path.read_text(), make) for path, option, make in checks if path]
    for path, option, text, make in checked:
        if make(text) != text:
            print(f"{path} is not up to date with the results; run {sys.argv[0]} --{option} {path}")
            return 1
    if arguments.svg:
        arguments.svg.write_text(plot)
    if arguments.readme:
        arguments.readme.write_text(with_tables(arguments.readme.read_text(), tables))
    if not checked and not arguments.readme:
        print(tables[0])
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except OSError as error:
        sys.exit(f"gpu_report.py: {error.filename}: {error.strerror}; tests/gpu/run.sh writes results, --results names their folder")
    except (ValueError, KeyError) as error:
        sys.exit(f"gpu_report.py: a result file is damaged or of another version: {error}; tests/gpu/run.sh writes them again")
