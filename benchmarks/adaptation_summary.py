"""Tables and plots of the adaptation benchmark, from the results of its runs.

    python -m benchmarks.adaptation_summary OUT

summarises every run in a benchmark's directory, also of calls that made one domain or grid at a time.
"""

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def load_results(files: Sequence[Path]) -> list[Row]:
    """The results of finished runs."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in files]


def summarise(results: Sequence[Row]) -> list[Row]:
    """One row per domain and label: mean over seeds, and the range from smallest to largest as the spread."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for result in results:
        groups.setdefault((result["run"]["domain"], result["label"]), []).append(result)
    rows = []
    for (domain, label), members in sorted(groups.items()):
        row: Row = {
            "domain": domain,
            "label": label,
            "seeds": len(members),
            "parameters": members[0]["num_parameters"],
            "share_of_draft": members[0]["share_of_draft"],
        }
        for name, read in _NUMBERS.items():
            values = [value for member in members if (value := read(member)) is not None]
            row[name] = statistics.fmean(values) if values else None
            row[f"{name}_spread"] = max(values) - min(values) if values else None
        rows.append(row)
    return rows


def _real(name: str, temperature: str) -> Callable[[Row], float | None]:
    def read(result: Row) -> float | None:
        measured = (result.get("evaluation") or {}).get(temperature)
        value = None if measured is None else measured.get(name)
        return None if value is None else float(value)

    return read


_NUMBERS: dict[str, Callable[[Row], float | None]] = {
    "train_seconds": lambda result: float(result["train_seconds"]),
    "simulated": lambda result: float(result["simulated"]),
    "greedy": _real("mean_acceptance_length", "0.0"),
    "greedy_without_loops": _real("without_loops", "0.0"),
    "sampled": _real("mean_acceptance_length", "1.0"),
    "speed_up_greedy": _real("speed_up", "0.0"),
    "speed_up_sampled": _real("speed_up", "1.0"),
}


def markdown_table(rows: Sequence[Row]) -> str:
    """All rows as one table. Lengths are tokens per target pass; ± is the range over seeds."""
    head = (
        "| domain | draft | seeds | trained | train s | simulated | greedy | greedy, no loops | T=1 "
        "| speed-up greedy | speed-up T=1 |"
    )
    lines = [head, "|" + "---|" * 11]
    for row in rows:
        trained = (
            f"{row['parameters'] / 1e6:.2f}M ({row['share_of_draft']:.0%})" if row["parameters"] else "0"
        )
        cells = [
            row["domain"],
            row["label"],
            str(row["seeds"]),
            trained,
            _cell(row, "train_seconds", 0),
            _cell(row, "simulated"),
            _cell(row, "greedy"),
            _cell(row, "greedy_without_loops"),
            _cell(row, "sampled"),
            _cell(row, "speed_up_greedy"),
            _cell(row, "speed_up_sampled"),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(row: Row, name: str, digits: int = 2) -> str:
    if row[name] is None:
        return "-"
    spread = row[f"{name}_spread"]
    return f"{row[name]:.{digits}f}" + (f" ± {spread:.{digits}f}" if row["seeds"] > 1 else "")


def plot(rows: Sequence[Row], path: Path) -> None:
    """Simulated acceptance length of the drafts that every domain has, one panel per domain."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    domains = sorted({row["domain"] for row in rows})
    found = [{row["label"] for row in rows if row["domain"] == domain} for domain in domains]
    labels = sorted(
        set.intersection(*found),
        key=lambda label: (not label.startswith("shared"), label.split(", ")[-1], label),
    )
    figure, panels = pyplot.subplots(
        1, len(domains), figsize=(5 + 3 * len(domains), 1.5 + 0.3 * len(labels)), sharey=True, squeeze=False
    )
    for panel, domain in zip(panels[0], domains, strict=True):
        values = {row["label"]: row for row in rows if row["domain"] == domain}
        panel.barh(
            range(len(labels)),
            [values[label]["simulated"] for label in labels],
            xerr=[values[label]["simulated_spread"] / 2 for label in labels],
        )
        panel.set_yticks(range(len(labels)), labels)
        panel.invert_yaxis()
        panel.set_title(domain)
        panel.set_xlabel("simulated acceptance length")
        panel.set_xlim(left=1.0)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="directory that the benchmark wrote to")
    arguments = parser.parse_args()
    rows = summarise(load_results(sorted((arguments.out / "runs").glob("*.json"))))
    (arguments.out / "summary.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    table = markdown_table(rows)
    (arguments.out / "summary.md").write_text(table, encoding="utf-8")
    plot(rows, arguments.out / "summary.png")
    print(table)


if __name__ == "__main__":
    main()
