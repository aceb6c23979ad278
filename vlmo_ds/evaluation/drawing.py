"""What pages about runs are drawn with: their style, and line charts as SVG."""

from __future__ import annotations

import html
from collections.abc import Sequence

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; color: #1c2733; padding: 0 1rem }
h1 { margin-bottom: 0 } h2 { margin-top: 2.2rem } .note { color: #5b6876 }
table { border-collapse: collapse } td, th { padding: .3rem .9rem; text-align: right; border-bottom: 1px solid #dde3ea }
td:first-child, th:first-child, td:nth-child(2), th:nth-child(2) { text-align: left }
.curves { display: flex; flex-wrap: wrap; gap: 1rem } figure { margin: 0 } figcaption { font-weight: 600 }
small { font-weight: 400; margin-left: .4rem }
.query { display: flex; gap: .6rem; align-items: flex-start; margin: 1rem 0; flex-wrap: wrap }
.query > p { width: 17rem; margin: 0 } .query > div { flex: 1; min-width: 20rem } ul { margin: .2rem 0 } .hit { outline: 4px solid #2da44e } img { width: 96px; height: 96px; object-fit: cover } .codes img { width: auto; height: auto }
ol { margin: 0; padding-left: 1.4rem } li.hit { outline: none; color: #1a7f37; font-weight: 600 }
table.facts td { text-align: left } pre { background: #f5f7f9; padding: .8rem; overflow-x: auto; font-size: 12px }
details { margin: .6rem 0 } summary { cursor: pointer }
svg text { font: 11px system-ui, sans-serif; fill: #5b6876 }
"""
COLOURS = ("#0969da", "#cf222e", "#1a7f37", "#9a6700", "#8250df")


def curve(
    title: str,
    series: dict[str, list[tuple[int, float]]],
    width: int = 340,
    height: int = 200,
    band: Sequence[tuple[int, float, float]] = (),
) -> str:
    """An SVG line chart. band: step, least and most of what is drawn behind the lines."""
    left, bottom, top, right = 52, 22, 8, 6
    points = [p for values in series.values() for p in values] + [(step, high) for step, _, high in band]
    if not points:
        return ""
    x0, x1 = min(p[0] for p in points), max(p[0] for p in points)
    y0, y1 = 0.0, max(p[1] for p in points) * 1.05 or 1.0

    def place(x: float, y: float) -> tuple[float, float]:
        px = left + (x - x0) / max(x1 - x0, 1) * (width - left - right)
        return px, height - bottom - (y - y0) / (y1 - y0) * (height - bottom - top)

    parts = [f'<svg width="{width}" height="{height}" role="img" aria-label="{html.escape(title)}">']
    for i in range(5):
        y = y0 + (y1 - y0) * i / 4
        _, py = place(x0, y)
        parts.append(f'<line x1="{left}" x2="{width - right}" y1="{py:.1f}" y2="{py:.1f}" stroke="#e6ebf0"/>')
        parts.append(f'<text x="{left - 6}" y="{py + 4:.1f}" text-anchor="end">{y:.2g}</text>')
    for x in (x0, x1):
        px, _ = place(x, y0)
        parts.append(f'<text x="{px:.1f}" y="{height - 6}" text-anchor="{"start" if x == x0 else "end"}">{x}</text>')
    if band:
        edge = [(step, high) for step, _, high in band] + [(step, max(low, y0)) for step, low, _ in reversed(band)]
        around = " ".join("{:.1f},{:.1f}".format(*place(*p)) for p in edge)
        parts.append(f'<polygon points="{around}" fill="#ddf4ff"/>')
    for values, colour in zip(series.values(), COLOURS, strict=False):
        line = " ".join("{:.1f},{:.1f}".format(*place(*p)) for p in thin(values))
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="1.4"/>')
    parts.append("</svg>")
    legend = "".join(
        f' <span style="color:{colour}">{html.escape(name)}</span>'
        for name, colour in zip(series, COLOURS, strict=False)
        if len(series) > 1
    )
    return f"<figure><figcaption>{html.escape(title)}<small>{legend}</small></figcaption>{''.join(parts)}</figure>"


def thin(values: Sequence[tuple[int, float]], most: int = 200) -> list[tuple[int, float]]:
    """Means over equal stretches, at most `most` points."""
    size = -(-len(values) // most)
    groups = [values[i : i + size] for i in range(0, len(values), size)]
    return [(group[-1][0], sum(v for _, v in group) / len(group)) for group in groups]
