"""Stops are found token by token, across token borders, and cut text exactly where they begin."""

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eda.server.engine.detokenizer import IncrementalDetokenizer
from eda.server.engine.stopping import (
    CheckedToken,
    FinishReason,
    StopChecker,
    StopConditions,
    held_back_length,
)

SPECIAL = "<x>"
PIECES = ["a", "b", "ab", "ba", "aab", "", "abc", "c"]


def decode(ids: Sequence[int]) -> str:
    return "".join(PIECES[token_id] for token_id in ids)


def run(ids: Sequence[int], conditions: StopConditions) -> tuple[str, int, CheckedToken]:
    """The text that was let out, the tokens taken, and the last one's outcome."""
    checker = StopChecker(conditions, IncrementalDetokenizer(decode), frozenset({7}))
    text = ""
    checked = CheckedToken("")
    for count, token_id in enumerate(ids, start=1):
        checked = checker.push(token_id)
        text += checked.text
        if checked.finish_reason is not None:
            return text, count, checked
    return text + checker.flush(), len(ids), checked


def reference(ids: Sequence[int], conditions: StopConditions) -> tuple[str, int, FinishReason | None]:
    """The same by looking at the whole text again after every token."""
    shown_until = 0
    for count in range(1, len(ids) + 1):
        text, token_id = decode(ids[:count]), ids[count - 1]
        may_stop = count >= max(1, conditions.min_tokens)
        if may_stop and token_id in conditions.stop_token_ids:
            return decode(ids[: count - 1]), count, FinishReason.STOP
        if may_stop:
            places = [
                (text.find(stop, shown_until), -len(stop), stop)
                for stop in conditions.stop_strings
                if text.find(stop, shown_until) >= 0
            ]
            if places:
                start, _, stop = min(places)
                end = start + len(stop) if conditions.include_stop_string else start
                return text[:end], count, FinishReason.STOP
        if count >= conditions.max_tokens:
            return text, count, FinishReason.LENGTH
        shown_until = len(text) - held_back_length(text[shown_until:], conditions.stop_strings)
    return decode(ids), len(ids), None


@settings(max_examples=500, deadline=None)
@given(
    ids=st.lists(st.integers(0, len(PIECES) - 1), min_size=1, max_size=20),
    stops=st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
    max_tokens=st.integers(1, 20),
    min_tokens=st.integers(0, 6),
    include=st.booleans(),
    stop_ids=st.frozensets(st.integers(6, 7), max_size=2),
)
def test_equals_a_search_over_the_whole_text(
    ids: list[int],
    stops: list[str],
    max_tokens: int,
    min_tokens: int,
    include: bool,
    stop_ids: frozenset[int],
) -> None:
    # A stop id that is not an end-of-text id keeps its text when the stop is to be shown; the reference has no such
    # rule, so ids are tried without it.
    ids_hidden = frozenset() if include else stop_ids
    conditions = StopConditions(max_tokens, min_tokens, ids_hidden, tuple(stops), include)
    text, count, checked = run(ids, conditions)
    assert (text, count, checked.finish_reason) == reference(ids, conditions)


def test_a_stop_string_across_token_borders() -> None:
    text, count, checked = run([3, 0, 1, 7, 0], StopConditions(10, stop_strings=("abc",)))
    # "ba" "a" "b" "c": the stop begins in the second token and ends in the fourth.
    assert (text, count, checked.stop_reason) == ("ba", 4, "abc")


def test_text_that_may_become_a_stop_is_held_back_and_released() -> None:
    checker = StopChecker(StopConditions(10, stop_strings=("abc",)), IncrementalDetokenizer(decode))
    assert [checker.push(token_id).text for token_id in (2, 0, 1, 1)] == ["", "ab", "", "abb"]


def test_the_stop_string_can_be_included() -> None:
    conditions = StopConditions(10, stop_strings=("ab",), include_stop_string=True)
    assert run([7, 6, 0], conditions)[0] == "cab"


def test_the_longer_of_two_stops_at_one_place_wins() -> None:
    _, _, checked = run([6], StopConditions(10, stop_strings=("ab", "abc")))
    assert checked.stop_reason == "abc"


@pytest.mark.parametrize(("min_tokens", "expected"), [(0, 1), (1, 1), (2, 3), (3, 3)])
def test_min_tokens_holds_stop_ids_back(min_tokens: int, expected: int) -> None:
    conditions = StopConditions(10, min_tokens, stop_token_ids=frozenset({7}))
    assert run([7, 0, 7, 0], conditions)[1] == expected


def test_end_of_text_ids_are_no_stop_reason_and_others_are() -> None:
    assert run([0, 7], StopConditions(5, stop_token_ids=frozenset({7})))[2].stop_reason is None
    assert run([0, 6], StopConditions(5, stop_token_ids=frozenset({6})))[2].stop_reason == 6


def test_a_shown_stop_id_keeps_its_text() -> None:
    conditions = StopConditions(5, stop_token_ids=frozenset({6}), include_stop_string=True)
    assert run([0, 6, 1], conditions)[0] == "aabc"


def test_a_stop_before_the_length_limit_wins_in_the_same_token() -> None:
    _, _, checked = run([0, 6], StopConditions(2, stop_strings=("abc",)))
    assert checked.finish_reason is FinishReason.STOP


def run_with_specials(tokens: str, conditions: StopConditions) -> tuple[str, CheckedToken]:
    """As ``run``, where ``0`` in ``tokens`` is the token ``a``, and so on, and ``9`` a special one."""
    detokenizer = IncrementalDetokenizer(decode, {9: SPECIAL})
    checker = StopChecker(conditions, detokenizer)
    text = ""
    for token in tokens:
        checked = checker.push(int(token))
        text += checked.text
        if checked.finish_reason is not None:
            return text, checked
    return text + checker.flush(), checked


@pytest.mark.parametrize(
    ("tokens", "stop", "text"),
    [
        ("0190", "<x>", "ab"),
        ("0190", "b<x>", "a"),
        ("01901", "<x>ab", "ab"),
        ("01991", "<x><x>", "ab"),
        ("0191", "bb", "a"),  # what a client sees never has a stop string, whatever was left out of it
        ("019001", "<x>aa", "ab"),
    ],
)
def test_a_special_token_is_part_of_a_stop_string(tokens: str, stop: str, text: str) -> None:
    found, checked = run_with_specials(tokens, StopConditions(10, stop_strings=(stop,)))
    assert (found, checked.finish_reason, checked.stop_reason) == (text, FinishReason.STOP, stop)
    found, _ = run_with_specials(tokens, StopConditions(10, stop_strings=(stop,), include_stop_string=True))
    assert found == text + stop


@settings(max_examples=500, deadline=None)
@given(
    ids=st.lists(st.sampled_from([0, 1, 2, 6, 9]), min_size=1, max_size=12),
    stops=st.lists(st.text("ab<x>", min_size=1, max_size=5), max_size=3),
)
def test_special_tokens_in_any_place(ids: list[int], stops: list[str]) -> None:
    """The end comes at the first token with which either text has a stop string, and nothing of that is shown."""
    conditions = StopConditions(100, stop_strings=tuple(stops))
    text, checked = run_with_specials("".join(map(str, ids)), conditions)
    for count in range(1, len(ids) + 1):
        shown = decode([token for token in ids[:count] if token != 9])
        full = "".join(SPECIAL if token == 9 else PIECES[token] for token in ids[:count])
        if any(stop in shown or stop in full for stop in stops):
            assert checked.finish_reason is FinishReason.STOP
            assert shown.startswith(text)
            assert not any(stop in text for stop in stops)
            return
    assert (text, checked.finish_reason) == (decode([token for token in ids if token != 9]), None)
