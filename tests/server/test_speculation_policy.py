"""Drafts follow the load without flapping, and an adapter's own acceptance."""

from dataclasses import replace
from pathlib import Path

import pytest

from eda.backends.cpu.costs import CPU_COSTS, cpu_costs
from eda.backends.cpu.weights import WEIGHT_FORMATS
from eda.server.engine.draft_mode import DraftMode
from eda.server.engine.sequence import SequenceLabels, StepStats
from eda.server.engine.speculation import (
    SpeculationLevel,
    SpeculationPolicy,
    SpeculationTable,
    SpeculationTableError,
    best_chain_length,
)
from eda.speculation.costs import DraftCosts
from eda.speculation.kinds import Chain, Lookup, Off, Speculation, Tree

LABELS = SequenceLabels("math", "private", "math", 1)
OTHER = SequenceLabels("code", "private", "code", 1)
TABLE = SpeculationTable(
    (SpeculationLevel(1, "tree", 5), SpeculationLevel(8, "chain", 4), SpeculationLevel(16, "chain", 0)),
    DraftCosts(0.1, 0.0, 0.1),
)
START = Chain(5)


def at_batch(size: int, **options: int) -> SpeculationPolicy:
    policy = SpeculationPolicy(TABLE, patience=1, **options)
    policy.observe_batch(size)
    return policy


def stats(accepted: int, drafted: int = 4, mode: str = "chain", labels: SequenceLabels = LABELS) -> StepStats:
    return StepStats(labels, mode, drafted, accepted, accepted + 1)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("size", "mode", "length"),
    [(1, "tree", 5), (2, "chain", 4), (8, "chain", 4), (9, "chain", 0), (99, "chain", 0)],
)
def test_levels_follow_the_batch(size: int, mode: str, length: int) -> None:
    chosen = at_batch(size).choose(LABELS, START, sampled=False)
    assert (chosen.mode, chosen.fitting(99, 99)) == (mode, length)


def test_a_batch_that_swings_around_a_border_does_not_flap() -> None:
    policy = SpeculationPolicy(TABLE, patience=4)
    for _ in range(4):
        policy.observe_batch(8)
    seen = set()
    for size in (9, 8, 9, 9, 8, 9, 9, 9, 8):
        policy.observe_batch(size)
        seen.add(policy.level.max_batch_size)
    assert seen == {8}
    for _ in range(4):
        policy.observe_batch(9)
    assert policy.level.max_batch_size == 16


def test_an_idle_step_changes_nothing() -> None:
    policy = at_batch(9)
    policy.observe_batch(0)
    assert policy.level.max_batch_size == 16


def test_a_sequence_without_drafting_stays_so() -> None:
    plain = Off()
    assert at_batch(1).choose(LABELS, plain, sampled=False) == plain


def test_chains_shorten_for_the_adapter_that_is_rejected_and_for_no_other() -> None:
    policy = at_batch(4, warm_up=10)
    for _ in range(50):
        policy.observe_step(stats(accepted=0 if _ % 2 else 1))
        policy.observe_step(stats(accepted=4, labels=OTHER))
    assert policy.choose(LABELS, START, sampled=False).length < 4
    assert policy.choose(OTHER, START, sampled=False).length == 4


def test_a_useless_draft_is_left_out_but_probed() -> None:
    policy = at_batch(4, warm_up=10, probe_every=5)
    for _ in range(20):
        policy.observe_step(stats(accepted=0))
    chosen = [policy.choose(LABELS, START, sampled=False).length for _ in range(10)]
    assert chosen == [0, 0, 0, 0, 4, 0, 0, 0, 0, 4]


def test_acceptance_is_that_of_a_token_whatever_the_lengths_of_chains() -> None:
    """Every second token is accepted, so that chains of two have 0, 1 or 2 right with shares of 1/2, 1/4 and 1/4.

    Their mean share is 3/8, at which no draft would pay.
    """
    costs = DraftCosts(0.05, 0.0, 0.55)
    assert (best_chain_length(0.5, costs, 2), best_chain_length(3 / 8, costs, 2)) == (2, 0)
    policy = SpeculationPolicy(SpeculationTable((SpeculationLevel(1, "chain", 2),), costs), warm_up=10)
    for _ in range(100):
        for accepted in (0, 1, 0, 2):
            policy.observe_step(stats(accepted, drafted=2))
    assert policy.choose(LABELS, START, sampled=False).length == 2


def test_greedy_and_sampled_sequences_of_an_adapter_are_measured_apart() -> None:
    policy = at_batch(4, warm_up=10)
    for _ in range(50):
        policy.observe_step(stats(accepted=4))
        policy.observe_step(replace(stats(accepted=0), sampled=True))
    assert policy.choose(LABELS, START, sampled=False).length == 4
    assert policy.choose(LABELS, START, sampled=True).length == 0


def test_a_level_may_draft_otherwise_for_sampled_sequences() -> None:
    level = SpeculationLevel(4, "tree", 5, min_probability=0.1, sampled_chain=2, sampled_min_probability=0.3)
    policy = SpeculationPolicy(SpeculationTable((level,)))
    assert policy.choose(LABELS, START, sampled=True) == Chain(2, min_probability=0.3)
    assert policy.choose(LABELS, START, sampled=False) == Tree(5)
    long = SpeculationLevel(4, "chain", 2, sampled_chain=7)
    assert SpeculationPolicy(SpeculationTable((long,))).largest == Chain(7)


def test_a_tree_pays_for_its_nodes_too() -> None:
    costs = DraftCosts(0.05, 0.1, 0.2)  # five passes and sixteen nodes: 2.0
    policy = SpeculationPolicy(SpeculationTable((SpeculationLevel(1, "tree", 5),), costs), warm_up=4)
    for accepted, expected in ((3, "tree"), (1, "chain")):
        for _ in range(200):
            policy.observe_step(stats(accepted, drafted=16, mode="tree"))
        assert policy.choose(LABELS, START, sampled=False).mode == expected


def test_a_tree_that_does_not_pay_becomes_a_chain() -> None:
    policy = at_batch(1, warm_up=10)
    assert policy.choose(LABELS, START, sampled=False).mode == "tree"
    for _ in range(20):
        policy.observe_step(stats(accepted=0, drafted=16, mode="tree"))
    assert policy.choose(LABELS, START, sampled=False).mode == "chain"


def test_an_adapter_that_got_better_is_noticed() -> None:
    policy = at_batch(4, warm_up=10)
    for _ in range(20):
        policy.observe_step(stats(accepted=0))
    for _ in range(200):
        policy.observe_step(stats(accepted=4))
    assert policy.choose(LABELS, START, sampled=False).length == 4


LOOKED_UP = SequenceLabels("math", "lookup")


def looking_up(batch_size: int, accepted: int) -> SpeculationPolicy:
    """A policy that has measured drafts of 8 tokens."""
    table = SpeculationTable((SpeculationLevel(64, "chain", 0),), DraftCosts(0.05, 0.07, 0.3))
    policy = SpeculationPolicy(table, warm_up=10, probe_every=5)
    policy.observe_batch(batch_size)
    for _ in range(20):
        policy.observe_step(stats(accepted, drafted=8, mode="lookup", labels=LOOKED_UP))
    return policy


@pytest.mark.parametrize(
    ("batch_size", "accepted", "expected"),
    [(1, 8, 8), (1, 1, 3), (1, 0, 0), (16, 8, 8), (16, 1, 0)],
)
def test_look_ups_are_as_long_as_pays_at_this_load(batch_size: int, accepted: int, expected: int) -> None:
    """Whatever the draft model's level: making these drafts costs nothing."""
    policy = looking_up(batch_size, accepted)
    assert policy.choose(LOOKED_UP, Lookup(), sampled=False) == Lookup(expected)


def test_look_ups_that_do_not_pay_are_paused_and_tried_again() -> None:
    policy = looking_up(1, 0)
    chosen = [policy.choose(LOOKED_UP, Lookup(0), sampled=False) for _ in range(10)]
    assert chosen == [Lookup(0)] * 4 + [Lookup()] + [Lookup(0)] * 4 + [Lookup()]
    other = SequenceLabels("code", "lookup")
    assert policy.choose(other, Lookup(), sampled=False) == Lookup()
    assert policy.choose(LOOKED_UP, Lookup(), sampled=True) == Lookup()


def test_what_a_sequence_is_admitted_with() -> None:
    policy = at_batch(1)
    kinds: dict[DraftMode, Speculation] = {
        "none": Off(),
        "lookup": Lookup(),
        "shared": Tree(5),
        "private": Tree(5),
    }
    assert {mode: policy.largest_for(mode) for mode in kinds} == kinds


def test_a_token_of_each_sequence_makes_a_pass_longer_the_more_sequences_there_are() -> None:
    costs = DraftCosts(0.5, 0.1, 0.5)
    found = [costs.of_lookup(size).of(3, 3) for size in (1, 11)]
    assert found == pytest.approx([0.3, 3 * 1.1 / 2.0])
    assert DraftCosts(0.5, 0.0, 0.5).of_lookup(9).of(3, 3) == 0.0


@pytest.mark.parametrize(
    ("acceptance", "cost", "expected"),
    [(0.0, 0.1, 0), (0.05, 0.1, 0), (0.5, 0.1, 2), (1.0, 0.1, 6), (0.9, 2.0, 0)],
)
def test_best_chain_length(acceptance: float, cost: float, expected: int) -> None:
    assert best_chain_length(acceptance, DraftCosts(cost, 0.0, cost), 6) == expected


@pytest.mark.parametrize(
    ("costs", "expected"),
    [
        (DraftCosts(0.05, 0.0, 0.05), 3),
        (DraftCosts(0.05, 0.1, 0.05), 2),  # verified tokens count as drafted ones do
        (DraftCosts(0.15, 0.0, 0.15), 2),
        (DraftCosts(0.05, 0.1, 0.25), 2),
        (DraftCosts(0.05, 0.1, 0.5), 0),  # what drafting at all takes is never earned back
    ],
)
def test_best_chain_length_counts_all_costs(costs: DraftCosts, expected: int) -> None:
    assert best_chain_length(0.5, costs, 6) == expected


def test_the_largest_speculation_has_the_most_slots() -> None:
    assert SpeculationPolicy(TABLE).largest == TABLE.levels[0].speculation()


def test_a_table_survives_its_file(tmp_path: Path) -> None:
    TABLE.save(tmp_path / "table.json", [{"batch_size": 1}])
    assert SpeculationTable.load(tmp_path / "table.json") == TABLE


def test_a_file_from_before_the_other_costs_counts_as_it_did(tmp_path: Path) -> None:
    """Its ``draft_cost`` was that of a whole draft token, verification included."""
    path = tmp_path / "table.json"
    path.write_text(
        '{"levels": [{"max_batch_size": 2, "mode": "chain", "num_speculative_tokens": 3}], "draft_cost": 0.3}'
    )
    table = SpeculationTable.load(path)
    assert table.costs == DraftCosts(0.3, 0.0, 0.3)
    assert table.levels[0].speculation(sampled=True) == Chain(3)


def test_built_in_tables_draft_less_at_a_temperature() -> None:
    table = SpeculationTable.default(CPU_COSTS)
    assert table.costs == CPU_COSTS
    for level in table.levels:
        greedy, sampled = level.speculation(), level.speculation(sampled=True)
        assert sampled.length <= greedy.length


@pytest.mark.parametrize(
    ("dearer", "cheaper"),
    [
        (("avx2", "bfloat16"), ("avx512-bf16+vnni", "bfloat16")),
        (("avx2", "int8"), ("avx2+vnni", "int8")),
        (("avx2+vnni", "int4"), ("avx2+vnni", "int8")),
        (("avx512", "int4"), ("avx512", "bfloat16")),
        (("neon", "bfloat16"), ("avx512", "bfloat16")),
    ],
)
def test_built_in_chains_are_shorter_where_verified_tokens_are_dear(
    dearer: tuple[str, str], cheaper: tuple[str, str]
) -> None:
    short, long = (SpeculationTable.default(cpu_costs(*pair)) for pair in (dearer, cheaper))
    assert short.costs.verification_cost > long.costs.verification_cost
    for sampled in (False, True):
        first, second = (table.levels[0].speculation(sampled=sampled) for table in (short, long))
        assert isinstance(first, Chain)
        assert isinstance(second, Chain)
        assert first.length < second.length


@pytest.mark.parametrize(
    "instructions", ["scalar", "avx2", "avx2+vnni", "avx512", "avx512-bf16+vnni", "neon"]
)
@pytest.mark.parametrize("weights", WEIGHT_FORMATS)
def test_built_in_chains_pay_when_all_tokens_are_accepted(instructions: str, weights: str) -> None:
    table = SpeculationTable.default(cpu_costs(instructions, weights))
    chain = table.levels[0].speculation()
    assert isinstance(chain, Chain)
    assert best_chain_length(0.99, table.costs, chain.length) == chain.length


@pytest.mark.parametrize(
    "text", ["", "[]", '{"levels": []}', '{"levels": [{"max_batch_size": 1}], "draft_cost": 1}']
)
def test_other_files_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "table.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(SpeculationTableError, match=r"table\.json"):
        SpeculationTable.load(path)


@pytest.mark.parametrize(
    "levels",
    [
        (),
        (SpeculationLevel(0, "chain", 1),),
        (SpeculationLevel(4, "chain", 1), SpeculationLevel(4, "chain", 0)),
        (SpeculationLevel(4, "chain", -1),),
        (SpeculationLevel(4, "chain", 1, sampled_chain=65),),
        (SpeculationLevel(4, "chain", 1, sampled_min_probability=1.0),),
    ],
)
def test_levels_that_make_no_sense_are_refused(levels: tuple[SpeculationLevel, ...]) -> None:
    with pytest.raises(SpeculationTableError):
        SpeculationTable(levels)


@pytest.mark.parametrize("costs", [(-0.1, 0.0, 0.0), (0.0, 11.0, 0.0), (0.0, 0.0, float("nan"))])
def test_costs_that_make_no_sense_are_refused(costs: tuple[float, float, float]) -> None:
    with pytest.raises(ValueError, match="it must be from 0 to 10"):
        DraftCosts(*costs)
