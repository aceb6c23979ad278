"""Rewrites the tables of README.md and docs/performance.md from the result files they are made of.

    python benchmarks/tables.py [--check]

A table stands between `<!-- KIND FILE -->` and `<!-- end -->`; FILE lies in benchmarks/results. --check: writes nothing, fails where a table is not what its
file says.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path

from common import HELD

ROOT = Path(__file__).resolve().parents[1]
PAGES = (ROOT / "README.md", ROOT / "docs" / "performance.md")
PLACE = re.compile(r"(<!-- (\w+) (\S+\.json) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def table(*rows: Iterable[object]) -> str:
    head, *body = ([str(cell) for cell in row] for row in rows)
    return "".join(f"| {' | '.join(row)} |\n" for row in (head, ["---"] * len(head), *body))


def steps(results: list[dict]) -> str:
    """Of a benchmark that sets a step beside a plain version: one row for each precision and length of captions."""
    ratios = [result for result in results if "time, ours over plain" in result]
    rows = []
    for ratio in ratios:
        place = results.index(ratio)
        plain, ours = results[place - 2], results[place - 1]
        row = [
            f"{ours['dtype']}, captions {'of full length' if ours['captions'] == 'full' else 'of ' + ours['captions']}"
        ]
        row += [f"{plain['seconds']:.1f}", f"{ours['seconds']:.1f}", f"{ratio['time, ours over plain']:.2f}"]
        row += [f"{plain[HELD]:.2f} GB", f"{ours[HELD]:.2f} GB", f"{100 * ours['share_of_matrix_product_rate']:.0f}%"]
        rows.append(row)
    one = results[1]
    head = [f"{one['arch']}, {one['batch']} pairs", "seconds a step, plain", "ours", "ratio"]
    return table([*head, "peak beyond weights and gradients, plain", "ours", "of the matrix rate, ours"], *rows)


def contrast(results: list[dict]) -> str:
    rows = []
    for result in results:
        if "version" in result:
            drawn = ", with hard negatives" if result["negatives"] else ""
            rows.append(
                [
                    f"{result['version']}{drawn}",
                    f"{result['seconds']:.1f}",
                    f"{result['products']:.1f}",
                    f"{result['peak_beyond_features_mb']:.0f} MB",
                ]
            )
    return table(["", "seconds", "in products", "peak beyond the features"], *rows)


def scaling(results: list[dict]) -> str:
    real = [r for r in results if "efficiency" in r]
    rows = [[r["kind"], r["ranks"], r["pairs"], f"{r['seconds']:.3f}", f"{100 * r['efficiency']:.0f}%"] for r in real]
    return table(["", "ranks", "pairs a step", "seconds a step", "efficiency"], *rows)


def predicted(results: list[dict]) -> str:
    rows = [[r["gpus"], f"{r['seconds']:.3f}", f"{r['received_gb']:.2f} GB"] for r in results if "gpus" in r]
    return table(["GPUs", "seconds a step", "received a step"], *rows)


def starts(results: list[dict]) -> str:
    """Of a benchmark that trains the same last stage from two starts: recall in both directions with its 95% interval."""

    def cell(found: dict) -> str:
        low, high = found["interval_95"]
        return f"{found['mean']:.1f} ({low:.1f} to {high:.1f})"

    ways = [(direction, k) for direction in ("text_to_image", "image_to_text") for k in ("R@1", "R@10")]
    head = [f"{direction.replace('_', ' ')}, {k}" for direction, k in ways]
    rows = [[r["start"], *(cell(r[direction][k]) for direction, k in ways)] for r in results if "start" in r]
    queries = next(r["queries"] for r in results if "start" in r)
    return table([f"among {queries:,}", *head], *rows)


KINDS = {"steps": steps, "contrast": contrast, "scaling": scaling, "predicted": predicted, "starts": starts}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing, fail where a table differs")
    args = parser.parse_args()

    def made(place: re.Match) -> str:
        begin, kind, file, _, end = place.groups()
        return begin + KINDS[kind](json.loads((ROOT / "benchmarks/results" / file).read_text())["results"]) + end

    for page in PAGES:
        before = page.read_text()
        after, tables = PLACE.subn(made, before)
        if not tables or tables != before.count(".json -->"):
            sys.exit(f"error: {page} has {before.count('.json -->')} tables that begin, and {tables} that end as well")
        if args.check and after != before:
            sys.exit(f"error: {page} has tables that are not what their files say: python benchmarks/tables.py")
        if not args.check:
            page.write_text(after)


if __name__ == "__main__":
    main()
