"""What a comparison says: ratios, the table, means over domains, and the plot."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.comparison_turns import Record
from benchmarks.faithfulness import Faithfulness
from benchmarks.own_engine import own_name

TRANSFORMERS = "transformers generate"
LLAMA_CPP = "llama.cpp bf16"
MIXED = "mixed"
"""The domain of rows whose batches hold prompts of all domains."""


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table. Ratios are ``None`` where there is nothing to compare with.

    Peers are measured one prompt at a time, so only rows of concurrency 1 have a ratio to them.
    """

    domain: str
    name: str
    concurrency: int
    tokens_per_second: float
    median_tokens_per_second: float
    tokens_per_round: float | None
    ratio_to_our_plain: float | None
    ratio_to_transformers: float | None
    ratio_to_llama_cpp: float | None
    share_equal: float | None = None
    share_first_choice: float | None = None
    worst_gap: float | None = None

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def rows_of(
    domain: str, records: Sequence[Record], faithfulness: Mapping[str, Faithfulness] | None = None
) -> list[Row]:
    """Table rows of one domain's records."""
    by_name = {record.name: record for record in records}
    checks = faithfulness or {}

    def ratio(record: Record, reference: str) -> float | None:
        other = by_name.get(reference)
        if other is None or other.concurrency != record.concurrency:
            return None
        return record.tokens_per_second / other.tokens_per_second

    rows = []
    for record in records:
        check = checks.get(record.name)
        rows.append(
            Row(
                domain,
                record.name,
                record.concurrency,
                record.tokens_per_second,
                record.median_tokens_per_second,
                record.tokens_per_round,
                ratio(record, own_name("none", record.concurrency)),
                ratio(record, TRANSFORMERS),
                ratio(record, LLAMA_CPP),
                check.share_equal if check else None,
                check.share_first_choice if check else None,
                check.worst_gap if check else None,
            )
        )
    return rows


def means_over_domains(rows: Sequence[Row]) -> list[Row]:
    """One row for each contestant that came through in every domain: means of speeds and of ratios.

    The share and the gap are the worst of all domains. Mixed batches are no domain.
    """
    domains = {row.domain for row in rows if row.domain != MIXED}
    by_name: dict[str, list[Row]] = {}
    for row in rows:
        if row.domain != MIXED:
            by_name.setdefault(row.name, []).append(row)

    def over(values: Sequence[float | None], function: Any = statistics.fmean) -> float | None:
        known = [value for value in values if value is not None]
        return function(known) if len(known) == len(values) else None

    means = []
    for name, group in by_name.items():
        if {row.domain for row in group} != domains:
            continue
        means.append(
            Row(
                "mean over domains",
                name,
                group[0].concurrency,
                statistics.fmean(row.tokens_per_second for row in group),
                statistics.fmean(row.median_tokens_per_second for row in group),
                over([row.tokens_per_round for row in group]),
                over([row.ratio_to_our_plain for row in group]),
                over([row.ratio_to_transformers for row in group]),
                over([row.ratio_to_llama_cpp for row in group]),
                over([row.share_equal for row in group], min),
                over([row.share_first_choice for row in group], min),
                over([row.worst_gap for row in group], max),
            )
        )
    return means


def _cell(value: float | None, width: int, form: str, unit: str = "") -> str:
    return f"{'-' if value is None else format(value, form) + unit:>{width}}"


def table(title: str, rows: Sequence[Row]) -> str:
    """The rows as text."""
    lines = [
        "",
        title,
        f"{'':38}{'tokens/s':>10}{'median':>9}{'tok/round':>10}{'/ours none':>11}{'/transf.':>10}"
        f"{'/llama.cpp':>11}{'= transf.':>11}{'1st choice':>11}{'gap':>7}",
    ]
    for row in rows:
        lines.append(
            f"{row.name:38}{row.tokens_per_second:10.1f}{row.median_tokens_per_second:9.1f}"
            f"{_cell(row.tokens_per_round, 10, '.2f')}{_cell(row.ratio_to_our_plain, 11, '.2f', 'x')}"
            f"{_cell(row.ratio_to_transformers, 10, '.2f', 'x')}{_cell(row.ratio_to_llama_cpp, 11, '.2f', 'x')}"
            f"{_cell(row.share_equal, 11, '.1%')}{_cell(row.share_first_choice, 11, '.1%')}"
            f"{_cell(row.worst_gap, 7, '.2f')}"
        )
    return "\n".join(lines)


def missing_reasons(absent: Sequence[tuple[str, Mapping[str, str]]]) -> dict[str, str]:
    """For each missing contestant why it is missing, and from which domains when it is not the same everywhere."""
    domains = [domain for domain, _ in absent if domain != MIXED]
    reasons: dict[str, dict[str, list[str]]] = {}
    for domain, names in absent:
        for name, reason in names.items():
            shown = f"{name}, mixed" if domain == MIXED else name
            reasons.setdefault(shown, {}).setdefault(reason, []).append(domain)
    return {
        name: "; ".join(
            reason if places in (domains, [MIXED]) else f"{', '.join(places)}: {reason}"
            for reason, places in each.items()
        )
        for name, each in reasons.items()
    }


def missing_lines(missing: Mapping[str, str]) -> list[str]:
    """Every contestant that is not in the table, with its reason."""
    return [f"missing from this comparison: {name} ({reason})" for name, reason in missing.items()]


def write_plot(rows: Sequence[Row], path: Path, title: str) -> None:
    """Bars of tokens/s: everything for one prompt at a time, and this engine's drafts by concurrency.

    Raises ``ImportError`` where matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    alone = sorted(
        (row for row in means_over_domains(rows) if row.concurrency == 1),
        key=lambda row: row.tokens_per_second,
    )
    figure, (left, right) = pyplot.subplots(
        1, 2, figsize=(14, 1.8 + 0.38 * max(len(alone), 10)), width_ratios=(3, 2), layout="constrained"
    )
    figure.suptitle(title, fontsize=11)
    _draw_alone(left, alone, rows)
    _draw_batches(right, rows)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _draw_alone(axes: Any, means: Sequence[Row], rows: Sequence[Row]) -> None:
    names = [row.name for row in means]
    colors = ["#d1495b" if name.startswith("ours") else "#8d99ae" for name in names]
    bars = axes.barh(names, [row.tokens_per_second for row in means], color=colors, height=0.7)
    axes.bar_label(bars, fmt="%.0f", padding=4, fontsize=8)
    for domain, marker in zip(sorted({row.domain for row in rows} - {MIXED}), "o^s*Dv", strict=False):
        speeds = {row.name: row.tokens_per_second for row in rows if row.domain == domain}
        axes.scatter(
            [speeds[name] for name in names],
            names,
            marker=marker,
            s=16,
            color="#2b2d42",
            zorder=3,
            label=domain,
        )
    axes.set_xlabel("tokens/s, one prompt at a time (bar: mean over domains)")
    axes.margins(x=0.1)
    if names:
        axes.legend(fontsize=8, loc="lower right")
    axes.spines[["top", "right"]].set_visible(False)


def _draw_batches(axes: Any, rows: Sequence[Row]) -> None:
    candidates = [*means_over_domains(rows), *(row for row in rows if row.domain == MIXED)]
    ours = [row for row in candidates if row.name.startswith("ours, ")]
    groups = sorted({(row.domain == MIXED, row.concurrency) for row in ours})
    colors = {"none": "#8d99ae", "shared": "#edae49", "private": "#d1495b"}
    for place, (kind, color) in enumerate(colors.items()):
        speeds = {
            (row.domain == MIXED, row.concurrency): row.tokens_per_second
            for row in ours
            if row.name.split(", ")[1] == kind
        }
        bars = axes.bar(
            [index + (place - 1) * 0.27 for index in range(len(groups))],
            [speeds.get(group, 0.0) for group in groups],
            width=0.25,
            color=color,
            label=kind,
        )
        axes.bar_label(
            bars,
            [f"{speeds[group]:.0f}" if group in speeds else "" for group in groups],
            padding=2,
            fontsize=7,
        )
    axes.set_xticks(range(len(groups)), [f"{size}" + (" mixed" if mixed else "") for mixed, size in groups])
    axes.set_xlabel("sequences at a time, this engine")
    axes.set_ylabel("tokens/s, all sequences together")
    axes.legend(title="draft", fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
