"""A Grafana dashboard as one SVG picture: its panels where they stand, drawn from what Prometheus has answered to their queries.

Plain on purpose: lines, one number, bars, a heatmap; time runs from the first to the last sample that was asked for.
"""
import html
import math

COLUMN, UNIT, GAP = 56, 26, 6  # pixels of a grid column and of a unit of height, and between panels
COLOURS = ["#3274d9", "#e0752d", "#299c46", "#a352cc", "#c4162a", "#0a8aa8", "#8f6b00", "#6d7a86"]
MOST_LINES = 8


def number(value, unit):
    """A value with its unit, as short as a dashboard writes it: "1.2 MiB", "35 ms", "12 %"."""
    if unit in ("percentunit",):
        return f"{100 * value:.3g} %"
    if unit in ("s", "dtdurations", "dtdhms") and value:
        for factor, name in ((1, "s"), (1e-3, "ms"), (1e-6, "us")):
            if abs(value) >= factor:
                return f"{value / factor:.3g} {name}"
        return f"{value * 1e6:.2g} us"
    base, names = (1024, ["B", "KiB", "MiB", "GiB", "TiB"]) if unit in ("bytes", "Bps", "binBps", "decbytes") else (1000, ["", "k", "M", "G", "T"])
    power = 0
    while abs(value) >= base and power < len(names) - 1:
        value /= base
        power += 1
    text = f"{value:.3g} {names[power]}".strip()
    return text + ("/s" if unit in ("Bps", "binBps", "ops", "reqps") else "")


def label(template, metric):
    for name, value in metric.items():
        template = template.replace("{{" + name + "}}", value)
    return template.split("{{")[0].strip() or "value"


def series_of(panel, answers):
    """[(name, [(time, value), ...]), ...] of all queries of a panel, finite values only."""
    lines = []
    for target, answer in zip(panel.get("targets", []), answers):
        for result in answer["data"]["result"]:
            points = [(float(t), float(v)) for t, v in result["values"] if math.isfinite(float(v))]
            if points:
                lines.append((label(target.get("legendFormat") or panel["title"], result["metric"]), points))
    return lines


def text(x, y, words, size=10, colour="#40464d", anchor="start", weight="normal"):
    return f'<text x="{x:.0f}" y="{y:.0f}" font-size="{size}" fill="{colour}" text-anchor="{anchor}" font-weight="{weight}">{html.escape(words)}</text>'


def lines_of(panel, lines, box, begun, end):
    x, y, w, h = box
    unit = panel["fieldConfig"]["defaults"].get("unit", "short")
    lines = sorted(lines, key=lambda line: -max(v for _, v in line[1]))[:MOST_LINES]
    top = max(v for _, points in lines for _, v in points)
    low = min(0, min(v for _, points in lines for _, v in points))
    top = top if top > low else low + 1
    rows = (len(lines) + 1) // 2
    left, bottom = x + 58, y + h - 12 * rows - 6
    plot_w, plot_h = x + w - 6 - left, bottom - y - 4
    out = []
    for share in (0, 0.5, 1):
        at = bottom - share * plot_h
        out.append(f'<path d="M{left} {at:.0f}h{plot_w}" stroke="#e3e6ea" fill="none"/>')
        out.append(text(left - 4, at + 3, number(low + share * (top - low), unit), 9, "#7b8794", "end"))
    for i, (name, points) in enumerate(lines):
        colour = COLOURS[i % len(COLOURS)]
        path, before = "", None
        for t, v in points:
            px, py = left + (t - begun) / (end - begun) * plot_w, bottom - (v - low) / (top - low) * plot_h
            path += f"{'L' if before is not None and t - before < 5 else 'M'}{px:.0f} {py:.0f}"
            before = t
        out.append(f'<path d="{path}" stroke="{colour}" stroke-width="1.5" fill="none"/>')
        lx, ly = x + 6 + (i % 2) * (w - 8) / 2, bottom + 12 + (i // 2) * 12
        out.append(f'<path d="M{lx:.0f} {ly - 3:.0f}h8" stroke="{colour}" stroke-width="2.5"/>')
        most = int((w / 2 - 18) / 5)
        out.append(text(lx + 11, ly, name if len(name) <= most else name[: most - 1] + "…", 9))
    return out


def stat_of(panel, lines, box):
    x, y, w, h = box
    unit = panel["fieldConfig"]["defaults"].get("unit", "short")
    shown = " / ".join(number(points[-1][1], unit) for _, points in lines[:2])
    if panel.get("options", {}).get("textMode") == "name":
        shown = lines[0][0]
    return [text(x + w / 2, y + h / 2 + 4, shown, min(22, int(1.7 * w / max(4, len(shown)))), "#299c46", "middle", "bold")]


def bars_of(panel, lines, box):
    x, y, w, h = box
    unit = panel["fieldConfig"]["defaults"].get("unit", "short")
    most = max(1.0 if unit == "percentunit" else 0, max(points[-1][1] for _, points in lines)) or 1
    step, out = min(30, h / len(lines)), []
    for i, (name, points) in enumerate(lines):
        at, value = y + i * step, points[-1][1]
        out.append(f'<rect x="{x + 6}" y="{at + 12:.0f}" width="{w - 12}" height="8" fill="#e9ecef"/>')
        out.append(f'<rect x="{x + 6}" y="{at + 12:.0f}" width="{(w - 12) * min(1, value / most):.0f}" height="8" fill="{COLOURS[0]}"/>')
        out.append(text(x + 6, at + 9, name, 9))
        out.append(text(x + w - 6, at + 9, number(value, unit), 9, anchor="end"))
    return out


def heatmap_of(panel, lines, box, begun, end):
    """Cumulative buckets by their upper bound."""
    x, y, w, h = box
    bounds = sorted(((float(name) if name != "+Inf" else math.inf), dict(points)) for name, points in lines)
    times = sorted({t for _, values in bounds for t in values})
    left, plot_w, step = x + 46, w - 52, (h - 8) / max(1, len(bounds))
    cells, most = [], 0
    for i, (_, values) in enumerate(bounds):
        below = bounds[i - 1][1] if i else {}
        for t in times:
            count = values.get(t, 0) - below.get(t, 0)
            if count > 0:
                cells.append((t, i, count))
                most = max(most, count)
    cell_w = max(2, plot_w / max(1, end - begun))
    plot_w -= cell_w
    out = [
        f'<rect x="{left + (t - begun) / (end - begun) * plot_w:.0f}" y="{y + h - 8 - (i + 1) * step:.0f}" width="{cell_w:.0f}" height="{step:.0f}" fill="{COLOURS[0]}" '
        f'opacity="{0.15 + 0.85 * count / most:.2f}"/>'
        for t, i, count in cells
    ]
    for i, (bound, _) in enumerate(bounds):
        if i % 4 == 0:
            out.append(text(left - 4, y + h - 8 - i * step, number(bound, "s") if math.isfinite(bound) else "more", 9, "#7b8794", "end"))
    return out


def draw(dashboard, answers, begun, end):
    """`answers`: by the id of a panel, what Prometheus has said to each of its queries."""
    panels = dashboard["panels"]
    width = 24 * COLUMN + GAP
    height = max(p["gridPos"]["y"] + p["gridPos"]["h"] for p in panels) * UNIT + GAP
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif">',
        f'<rect width="{width}" height="{height}" fill="#f4f5f7"/>',
    ]
    for panel in panels:
        at = panel["gridPos"]
        x, y, w, h = at["x"] * COLUMN + GAP, at["y"] * UNIT + GAP, at["w"] * COLUMN - GAP, at["h"] * UNIT - GAP
        if panel["type"] == "row":
            out.append(text(x, y + 15, panel["title"], 13, "#1f2d3d", weight="bold"))
            continue
        out.append(f'<rect x="{x}" y="{y}" width="{w}" height="{h}" rx="3" fill="#fff" stroke="#dde1e6"/>')
        out.append(text(x + 6, y + 14, panel["title"], 11, "#1f2d3d", weight="bold"))
        lines, box = series_of(panel, answers.get(panel["id"], [])), (x, y + 20, w, h - 22)
        if not lines:
            out.append(text(x + w / 2, y + h / 2, "no data", anchor="middle"))
        elif panel["type"] == "stat":
            out += stat_of(panel, lines, box)
        elif panel["type"] == "bargauge":
            out += bars_of(panel, lines, box)
        elif panel["type"] == "heatmap":
            out += heatmap_of(panel, lines, box, begun, end)
        else:
            out += lines_of(panel, lines, box, begun, end)
    return "\n".join(out + ["</svg>", ""])
