"""The report of a run: one self-contained HTML file with results, loss curves, what the run was made with, and a
gallery."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from vlmo_ds import ledger, metrics
from vlmo_ds.data.storage import write_atomically
from vlmo_ds.evaluation.captioning import Captioned
from vlmo_ds.evaluation.circumstances import Hardware, hardware_table, versions
from vlmo_ds.evaluation.drawing import STYLE, curve
from vlmo_ds.evaluation.retrieval import CONTRAST, RANKS, RERANKED, RetrievalResult, RetrievalSet


def read_metrics(run: Path, name: str = metrics.FILE) -> dict[str, list[dict]]:
    """The records of each stage."""
    stages: dict[str, list[dict]] = {}
    file = run / name
    for record in metrics.records(file) if file.exists() else ():
        stages.setdefault(record["stage"], []).append(record)
    return stages


def curves(run: Path) -> str:
    figures = []
    measured = read_metrics(run, metrics.SCORES)
    for stage, records in read_metrics(run).items():
        names = [k for k in records[0] if k.startswith("loss/")]
        losses = {n.removeprefix("loss/"): points(records, n) for n in names}
        figures.append(curve(f"{stage}: loss by step", losses))
        ratios = [k for k in records[0] if k.endswith(("accuracy", "/score")) and "vl_" not in k]
        if ratios:
            figures.append(curve(f"{stage}: accuracy by step", {n: points(records, n) for n in ratios}))
        figures += score_curves(stage, measured.get(stage, []))
    return f'<div class="curves">{"".join(figures)}</div>'


def score_curves(stage: str, records: list[dict]) -> list[str]:
    """What was measured on held-out shards while a stage trained: a figure for each table of numbers."""
    names = [name for name in (records[-1] if records else {}) if "/" in name and "vl_" not in name]
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(name.rpartition("/")[0], []).append(name)
    return [
        curve(f"{stage}: {group} by step", {n.rpartition("/")[2]: points(records, n) for n in members})
        for group, members in groups.items()
    ]


def points(records: list[dict], name: str) -> list[tuple[int, float]]:
    """A metric by step; steps where it was not finite, or is not there, are left out."""
    return [(r["step"], r[name]) for r in records if isinstance(r.get(name), (int, float))]


def picture(data: bytes, hit: bool = False) -> str:
    kind = "png" if data.startswith(b"\x89PNG") else "jpeg"
    mark = ' class="hit"' if hit else ""
    return f'<img{mark} alt="" src="data:image/{kind};base64,{base64.b64encode(data).decode()}">'


def spread(total: int, count: int) -> list[int]:
    return sorted({round(i * (total - 1) / max(count - 1, 1)) for i in range(min(count, total))})


def gallery(data: RetrievalSet, result: RetrievalResult, count: int) -> str:
    """Held-out queries, spread evenly over the set, with their best results; right ones are marked."""
    owner = data.image_of_text.tolist()
    parts = ["<h2>Text to image</h2><p class='note'>The five best images for a caption; the right one is outlined.</p>"]
    for t in spread(len(data.captions), count):
        order = result.text_to_image[t].argsort(descending=True, stable=True)[:5].tolist()
        found = "".join(picture(data.encoded[i], i == owner[t]) for i in order)
        parts.append(f'<div class="query"><p>{html.escape(data.captions[t])}</p>{found}</div>')
    parts.append(
        "<h2>Image to text</h2><p class='note'>The three best captions for an image; right ones are green.</p>"
    )
    for i in spread(len(data.images), count):
        order = result.image_to_text[i].argsort(descending=True, stable=True)[:3].tolist()
        items = "".join(
            f"<li{' class=hit' if owner[t] == i else ''}>{html.escape(data.captions[t])}</li>" for t in order
        )
        parts.append(f'<div class="query">{picture(data.encoded[i])}<ol>{items}</ol></div>')
    return "".join(parts)


def caption_gallery(captions: Sequence[Captioned]) -> str:
    """Images, what was written for each, and what people wrote."""
    parts = ["<h2>Captions</h2><p class='note'>Written by the model (bold), and the images' own.</p>"]
    for one in captions:
        items = "".join(f"<li>{html.escape(text)}</li>" for text in one.references)
        written = "<br>".join(f"<b>{html.escape(text)}</b>" for text in one.written)
        parts.append(f'<div class="query">{picture(one.encoded)}<div>{written}<ul>{items}</ul></div></div>')
    return "".join(parts)


def retrieval_table(result: RetrievalResult, images: int, captions: int) -> str:
    rows = []
    for direction, methods in result.metrics.items():
        for method, values in methods.items():
            cells = "".join(f"<td>{values[f'R@{k}']:.1f}</td>" for k in RANKS)
            rows.append(f"<tr><td>{direction.replace('_', ' ')}</td><td>{method}</td>{cells}</tr>")
    head = "".join(f"<th>R@{k}</th>" for k in RANKS)
    note = (
        f"{images} held-out images, {captions} captions; percent of queries with a right answer among the first k. "
        f"Chance at R@1 is {100 / images:.2f} for images. {CONTRAST}: contrastive features"
    )
    reranked = any(RERANKED in methods for methods in result.metrics.values())
    note += f"; {RERANKED}: the best candidates re-ranked." if reranked else "."
    return f"<table><tr><th>direction</th><th>method</th>{head}</tr>{''.join(rows)}</table><p class='note'>{note}</p>"


def numbers_table(name: str, metrics: Mapping[str, float]) -> str:
    rows = "".join(f"<tr><td>{html.escape(key)}</td><td>{short(value)}</td></tr>" for key, value in metrics.items())
    return f"<h2>{html.escape(name)}</h2><table>{rows}</table>"


def short(value: float) -> str:
    """With two decimals at most."""
    return f"{value:.2f}".rstrip("0").rstrip(".")


def duration(seconds: float) -> str:
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s"
    hours, minutes = whole // 3600, whole // 60 % 60
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {whole % 60:02d} s"


def stages_table(run: Path, precisions: Mapping[str, str], evaluation_seconds: float) -> str:
    """Of each stage its precision, its parameters, and its time over all starts of the run."""
    noted = ledger.read(run)
    rows = []
    for stage, precision in precisions.items():
        entry = noted.get(stage)
        counts = (f"{entry.parameters:,}", f"{entry.trained:,}", duration(entry.seconds)) if entry else ("",) * 3
        rows.append((stage, precision, *counts))
    seconds = sum(noted[stage].seconds for stage in precisions if stage in noted)
    rows.append(("evaluation", "", "", "", duration(evaluation_seconds)))
    rows.append(("whole run", "", "", "", duration(seconds + evaluation_seconds)))
    cells = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    head = "".join(f"<th>{name}</th>" for name in ("stage", "precision", "parameters", "trained", "time"))
    note = "Times are summed over all starts of the run; of a start that was killed up to its last checkpoint."
    return f"<table><tr>{head}</tr>{cells}</table><p class='note'>{note}</p>"


def facts_table(title: str, facts: Mapping[str, str]) -> str:
    rows = "".join(f"<tr><td>{html.escape(key)}</td><td>{html.escape(value)}</td></tr>" for key, value in facts.items())
    return f"<h3>{html.escape(title)}</h3><table class='facts'>{rows}</table>"


def folded(title: str, text: str) -> str:
    return f"<details><summary>{html.escape(title)}</summary><pre>{html.escape(without_keys(text))}</pre></details>"


def without_keys(text: str) -> str:
    """Without what URLs may hold that lets others in, a password or a signature: pages are passed on."""
    text = re.sub(r"(\w://)[^/@\s\"']+@", r"\1...@", text)
    return re.sub(r"(\w://[^\s\"'?]*\?)[^\s\"']+", r"\1...", text)


def made_with(run: Path, precisions: Mapping[str, str], ranks: Sequence[Hardware], evaluation_seconds: float) -> str:
    """Stages, hardware, versions and settings of a run, from its directory and this process."""
    recipe, config = (text_of(run / name) for name in ("recipe.yaml", "ds_config.json"))
    return "".join(
        (
            "<h2>Stages</h2>" + stages_table(run, precisions, evaluation_seconds),
            "<h2>Made with</h2>",
            facts_table("Hardware", hardware_table(ranks)) if ranks else "",
            facts_table("Versions", versions()),
            "<h3>Settings</h3>",
            folded("Recipe, with every default", recipe) if recipe else "",
            folded("DeepSpeed config of each stage", config) if config else "",
        )
    )


def text_of(file: Path) -> str:
    return file.read_text() if file.is_file() else ""


def write_report(
    run: Path,
    name: str,
    data: RetrievalSet | None,
    result: RetrievalResult | None,
    queries: int,
    tables: Mapping[str, Mapping[str, float]] | None = None,
    captions: Sequence[Captioned] = (),
    ranks: Sequence[Hardware] = (),
    evaluation_seconds: float = 0.0,
    precisions: Mapping[str, str] | None = None,
    codes: bytes = b"",
) -> Path:
    """Writes <run>/report/index.html and returns its path.

    tables: further numbers, by evaluation; captions: images with what was written for them; ranks: what each runs on; precisions: of each
    stage, in the run's order; codes: a picture of a visual tokenizer's codes.
    """
    body = [f"<h1>{html.escape(name)}</h1><p class='note'>A vlmo_ds run: {html.escape(str(run))}</p>"]
    if data is not None and result is not None:
        body.append("<h2>Retrieval</h2>" + retrieval_table(result, len(data.images), len(data.captions)))
    body += [numbers_table(title, values) for title, values in (tables or {}).items()]
    body.append("<h2>Training</h2>" + curves(run))
    if codes:
        note = "In each row the patches that are nearest to one code, from the most to the least used."
        body.append(f"<h2>Codes</h2><p class='note'>{note}</p><div class='codes'>{picture(codes)}</div>")
    if captions:
        body.append(caption_gallery(captions))
    if data is not None and result is not None and queries:
        body.append(gallery(data, result, queries))
    body.append(made_with(run, precisions or {}, ranks, evaluation_seconds))
    page = (
        f"<!doctype html><html lang='en'><meta charset='utf-8'><title>{html.escape(name)}</title><style>{STYLE}</style>"
    )
    path = run / "report" / "index.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (page + "".join(body) + "</html>").encode())
    return path
