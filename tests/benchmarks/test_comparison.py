"""The comparison's pure parts: who runs when, what the figures mean, and that nobody is left out silently."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from benchmarks.comparison_report import (
    LLAMA_CPP,
    MIXED,
    TRANSFORMERS,
    means_over_domains,
    missing_lines,
    missing_reasons,
    rows_of,
    table,
    write_plot,
)
from benchmarks.comparison_turns import RUN_FAILED, Record, num_turns, run_in_turns, turns
from benchmarks.faithfulness import Faithfulness, FaithfulnessCheck, share_equal
from benchmarks.own_engine import own_name, speculation_at
from benchmarks.peers.interface import (
    Complete,
    Completion,
    Contestant,
    MissingPeerError,
    Peer,
    PeerModel,
    Prompt,
    build_peers,
    require,
)
from eda.server.engine.speculation import SpeculationLevel, SpeculationTable
from tests.support.tiny import tiny_target

PROMPTS = [Prompt("math", [index, 7]) for index in range(8)]
MODEL = PeerModel(Path("plain"), Path("work"), torch.float32, threads=1, max_length=64)


def record(name: str, seconds: Sequence[float], concurrency: int = 1, tokens: int = 10) -> Record:
    made = Record(name, concurrency)
    for duration in seconds:
        completions = [Completion([0] * tokens, 5, 10)] * concurrency
        made.add(duration, [Prompt("math", [1])] * concurrency, completions)
    return made


def test_alone_every_prompt_is_run_by_everybody_in_changing_order() -> None:
    order = list(turns([1, 1, 1], 4))
    assert Counter(order) == Counter((place, prompt) for place in range(3) for prompt in range(4))
    assert [place for place, _ in order[:6]] == [0, 1, 2, 1, 2, 0]


@pytest.mark.parametrize(
    ("concurrency", "prompts", "expected"), [(1, 8, 8), (4, 8, 3), (4, 36, 9), (16, 2, 2)]
)
def test_batches_take_fewer_turns(concurrency: int, prompts: int, expected: int) -> None:
    assert num_turns(concurrency, prompts) == expected
    assert len(list(turns([concurrency], prompts))) == expected


def test_batches_are_spread_over_the_run() -> None:
    assert [prompt for place, prompt in turns([1, 16], 12) if place == 1] == [3, 7, 11]


def test_speed_is_tokens_over_seconds_and_not_a_mean_of_speeds() -> None:
    made = record("x", [1.0, 3.0, 1.0])
    assert made.tokens_per_second == pytest.approx(30 / 5)
    assert made.median_tokens_per_second == pytest.approx(10.0)
    assert made.tokens_per_round == pytest.approx(2.0)


def test_an_engine_that_counts_no_passes_has_no_tokens_per_round() -> None:
    made = Record("x", 1)
    made.add(1.0, PROMPTS[:1], [Completion([1, 2])])
    assert made.tokens_per_round is None


def test_ratios_are_ratios_of_sums_at_the_same_concurrency() -> None:
    rows = rows_of(
        "math",
        [
            record(own_name("none", 1), [1.0, 1.0]),
            record(own_name("private", 1), [0.5, 0.3]),
            record(own_name("none", 16), [4.0, 4.0], 16),
            record(own_name("private", 16), [2.0, 3.0], 16),
            record(TRANSFORMERS, [4.0, 4.0]),
            record(LLAMA_CPP, [0.5, 1.5]),
        ],
        {TRANSFORMERS: Faithfulness(1.0, 1.0, 0.0)},
    )
    by_name = {row.name: row for row in rows}
    alone, batch = by_name[own_name("private", 1)], by_name[own_name("private", 16)]
    assert alone.ratio_to_our_plain == pytest.approx(2.5)
    assert alone.ratio_to_transformers == pytest.approx(10.0)
    assert alone.ratio_to_llama_cpp == pytest.approx(2.5)
    assert batch.ratio_to_our_plain == pytest.approx(8 / 5)
    assert batch.ratio_to_transformers is None
    assert batch.ratio_to_llama_cpp is None
    assert by_name[TRANSFORMERS].share_equal == 1.0
    assert "10.00x" in table("math", rows)


def test_without_references_there_are_no_ratios() -> None:
    [row] = rows_of("math", [record("some peer", [1.0])])
    assert (row.ratio_to_our_plain, row.ratio_to_transformers, row.ratio_to_llama_cpp) == (None, None, None)
    assert " -" in table("math", [row])


def test_means_are_over_the_domains_that_everybody_had() -> None:
    rows = [
        *rows_of(
            "math",
            [record(TRANSFORMERS, [1.0]), record("fast", [0.5])],
            {"fast": Faithfulness(0.9, 1.0, 0.0)},
        ),
        *rows_of("code", [record(TRANSFORMERS, [2.0]), record("fast", [0.5]), record("rare", [1.0])]),
        *rows_of(MIXED, [record(own_name("none", 16), [1.0], 16)]),
    ]
    means = {row.name: row for row in means_over_domains(rows)}
    assert set(means) == {TRANSFORMERS, "fast"}
    assert means["fast"].ratio_to_transformers == pytest.approx((2.0 + 4.0) / 2)
    assert means["fast"].share_equal is None, "code was not checked"


def test_missing_peers_are_named_with_their_reasons() -> None:
    def absent(_: PeerModel) -> Complete:
        return require("no_such_module_anywhere", "no-such-package")  # type: ignore[return-value]

    def refusing(_: PeerModel) -> Complete:
        raise MissingPeerError("this model has biases")

    def broken(_: PeerModel) -> Complete:
        raise OSError("libthing.so\nlong story")

    def present(_: PeerModel) -> Complete:
        return lambda prompts, count: [Completion([0] * count) for _ in prompts]

    peers = [Peer("a", absent), Peer("b", refusing), Peer("c", broken), Peer("d", present)]
    contestants, missing = build_peers(peers, MODEL)
    assert [contestant.name for contestant in contestants] == ["d"]
    assert missing == {
        "a": "no-such-package is not installed",
        "b": "this model has biases",
        "c": "could not be set up: OSError: libthing.so",
    }
    lines = missing_lines(missing_reasons([("math", missing), ("code", missing)]))
    assert lines[0] == "missing from this comparison: a (no-such-package is not installed)"
    assert len(lines) == 3


def test_reasons_say_where_when_it_is_not_everywhere() -> None:
    reasons = missing_reasons([("math", {"a": "broken"}), ("code", {}), (MIXED, {"a": "no module"})])
    assert reasons == {"a": "math: broken", "a, mixed": "no module"}


def test_a_contestant_that_fails_or_stops_early_is_out_and_the_others_go_on() -> None:
    def good(prompts: Sequence[Prompt], count: int) -> list[Completion]:
        return [Completion([1] * count, count - 1, count - 1) for _ in prompts]

    def failing(prompts: Sequence[Prompt], count: int) -> list[Completion]:
        if count > 16:
            raise RuntimeError("out of slots")
        return good(prompts, count)

    def short(prompts: Sequence[Prompt], count: int) -> list[Completion]:
        return good(prompts, count - 1)

    contestants = [Contestant("good", good, 4), Contestant("failing", failing), Contestant("short", short)]
    records, failed = run_in_turns(contestants, PROMPTS, 20)
    assert [made.name for made in records] == ["good"]
    assert records[0].num_tokens == [80, 80, 80]
    assert failed["failing"] == f"{RUN_FAILED}: RuntimeError: out of slots"
    assert "gave [15] tokens where 16 were asked for" in failed["short"]


def test_drafts_follow_the_table_by_concurrency() -> None:
    levels = SpeculationTable((SpeculationLevel(1, "tree", 5), SpeculationLevel(4, "chain", 3)))
    assert speculation_at(levels, 1).mode == "tree"
    assert speculation_at(levels, 4).num_nodes == 3
    assert speculation_at(levels, 64).num_nodes == 3


def test_share_equal_counts_places() -> None:
    assert share_equal([[1, 2, 3, 4]], [[1, 2, 9, 4]]) == pytest.approx(0.75)
    assert share_equal([], []) == 1.0


def test_faithfulness_forgives_what_follows_a_near_tie_and_sees_wrong_tokens(tmp_path: Path) -> None:
    path = tiny_target(tmp_path / "target")
    check = FaithfulnessCheck(path)
    prompt, text = [5, 6, 7], list[int]()
    for _ in range(6):
        with torch.inference_mode():
            text.append(int(check._model(torch.tensor([[*prompt, *text]])).logits[0, -1].argmax()))
    right = check.check([prompt], [text], [text])
    assert (right.share_equal, right.share_first_choice, right.worst_gap) == (1.0, 1.0, 0.0)
    wrong = check.check([prompt], [[*text[:-1], (text[-1] + 1) % 300]], [text])
    assert wrong.share_first_choice == pytest.approx(5 / 6)
    assert wrong.worst_gap > 0


def test_the_plot_is_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    records = [record(own_name(kind, size), [1.0], size) for kind in ("none", "private") for size in (1, 4)]
    rows = [
        *rows_of("math", [*records, record(TRANSFORMERS, [4.0])]),
        *rows_of(MIXED, [record(own_name("none", 16), [1.0], 16)]),
    ]
    write_plot(rows, tmp_path / "plot.png", "title")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
