"""Markdown of what `benchmarks.compare`, `benchmarks.passes` and `benchmarks.quality` wrote with ``--json``.

    python -m benchmarks.measurement_tables build/measurements/*.json > tables.md

Each table stands under the command that made it, the processor and its flags, and the load average before and after.
"""

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]


def number(value: float | None, form: str = ".2f", unit: str = "") -> str:
    """A figure in a cell; empty where there is none."""
    return "" if value is None else format(value, form) + unit


def markdown_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table whose first column is text and whose others are figures."""
    aligned = ["---", *(["---:"] * (len(heads) - 1))]
    return ["| " + " | ".join(cells) + " |" for cells in (heads, aligned, *rows)]


def _passes(document: Mapping[str, Any]) -> list[str]:
    rows = document["settings"]["rows"]
    heads = ["", "MB", "floor, ms", *(f"{count} row{'s' * (count > 1)}, ms" for count in rows)]
    heads += ["floor / 1 row", *(f"{count} / 1" for count in rows[1:])]
    return markdown_table(
        heads,
        [
            [
                row["name"],
                number(row["megabytes"], ".0f"),
                number(row["floor_ms"]),
                *(number(value) for value in row["median_ms"]),
                number(row["share_of_floor"]),
                *(number(value) for value in row["ratio_to_one_row"][1:]),
            ]
            for row in document["rows"]
        ],
    )


def _target(document: Mapping[str, Any]) -> list[str]:
    heads = ["", "tokens/s", "median", "tokens a round", "/ our plain", "/ llama.cpp, same bits"]
    heads += ["turns", "first choice"]
    return markdown_table(
        heads,
        [
            [
                row["name"],
                number(row["tokens_per_second"], ".1f"),
                number(row["median_tokens_per_second"], ".1f"),
                number(row["tokens_per_round"]),
                number(row["ratio_to_our_plain"]),
                number(row["ratio_to_rival"]),
                str(row["num_turns"]),
                number(row["share_first_choice"], ".1%"),
            ]
            for row in document["rows"]
        ],
    )


def _quality(document: Mapping[str, Any]) -> list[str]:
    def relative(row: Row) -> str:
        if row["relative"] is None:
            return ""
        return f"{row['relative'] - 1:+.2%}" + (f" ± {row['error']:.2%}" if row["error"] is not None else "")

    rows = [[row["name"], number(row["perplexity"], ".3f"), relative(row)] for row in document["rows"]]
    return markdown_table(["", "perplexity", "to ours in bfloat16"], rows)


def _family(document: Mapping[str, Any]) -> list[str]:
    heads = [
        "",
        "tokens/s",
        "tokens a round",
        "/ our plain",
        "/ transformers",
        "/ llama.cpp bf16",
        "first choice",
    ]
    return markdown_table(
        heads,
        [
            [
                row["name"],
                number(row["tokens_per_second"], ".1f"),
                number(row["tokens_per_round"]),
                number(row["ratio_to_our_plain"]),
                number(row["ratio_to_transformers"]),
                number(row["ratio_to_llama_cpp"]),
                number(row["share_first_choice"], ".1%"),
            ]
            for row in document["means"]
        ],
    )


TABLES: Mapping[str, Callable[[Mapping[str, Any]], list[str]]] = {
    "passes": _passes,
    "target": _target,
    "quality": _quality,
    "family": _family,
}


def facts(settings: Mapping[str, Any]) -> list[str]:
    """Lines on where a table's figures come from."""
    host = settings["machine"]
    before = settings.get("load_average_before", settings.get("load_average"))
    passes = f", passes for {settings['instruction_set']}" if "instruction_set" in settings else ""
    lines = [
        f"- {host['processor']}, {host['cores']} cores, flags: {' '.join(host['flags'])}; "
        f"{settings['threads']} threads{passes}",
        f"- load average {before} before, {settings['load_average_after']} after",
    ]
    build = settings.get("llama_cpp", {})
    if "system_info" in build:
        unused = ", ".join(build["unused"]) or "none"
        lines.append(
            f"- {build['package']}: `{build['system_info'].strip(' |')}`; features left unused: {unused}"
        )
    for name, kinds in build.get("tensors", {}).items():
        lines.append(f"- {name}: " + ", ".join(f"{count} tensors {kind}" for kind, count in kinds.items()))
    return lines


def section(title: str, document: Mapping[str, Any]) -> str:
    """One table with its command, its facts, and who is missing."""
    settings = document["settings"]
    lines = [f"## {title}", "", "```bash", settings["command"], "```", "", *facts(settings), ""]
    lines += TABLES[document["kind"]](document)
    absent = [f"- {name}: {reason}" for name, reason in document["missing"].items()]
    if absent:
        lines += ["", "Not measured:", "", *absent]
    return "\n".join(lines) + "\n"


def section_of(path: Path) -> str:
    """``section`` of a file that one of the measurements wrote."""
    return section(path.stem, json.loads(path.read_text(encoding="utf-8")))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", type=Path, nargs="+")
    for path in parser.parse_args(arguments).files:
        print(section_of(path))
    return 0


if __name__ == "__main__":
    sys.exit(main())
