"""What the demonstration of an adaptation says about its own length."""

import io
import json

import pytest

from benchmarks.adaptation_requests import estimated_seconds, main


@pytest.mark.parametrize(
    ("training", "num_prompts", "num_tokens"),
    [
        ({}, 100, 100 * 160),
        ({}, 10_000, (2000 + 32) * 160),
        ({"max_prompts": 120, "max_tokens": 48, "held_out": 8}, 1500, 128 * 48),
    ],
)
def test_an_estimate_counts_the_answers_of_the_job(
    training: dict[str, int], num_prompts: int, num_tokens: int
) -> None:
    # Half of the server's 200 tokens a second; answering is 0.40 of 0.95, the whole without triage.
    assert estimated_seconds(training, num_prompts, 200.0) == pytest.approx(num_tokens / 100 * 0.95 / 0.40)


def test_progress_is_shown_with_what_is_left(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    events = [
        ("progress", {"progress": 0.25, "eta_seconds": None, "message": "regenerate"}),
        ("progress", {"progress": 0.5, "eta_seconds": 61.0, "message": "train"}),
        ("succeeded", {}),
    ]
    text = "".join(f"event: {kind}\ndata: {json.dumps(data)}\n\n" for kind, data in events)
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    monkeypatch.setattr("sys.argv", ["adaptation_requests", "watch"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "    25% regenerate, 0 s gone",
        "    50% train, 0 s gone, about 61 s left",
        "-- succeeded: ",
    ]
