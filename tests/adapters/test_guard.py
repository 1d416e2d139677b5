"""The guard's arithmetic and verdicts, and the ring buffer of recorded traffic."""

import json
import random
from pathlib import Path

import pytest

from eda.adapters.serving.guard import Guard, GuardSettings, RollingAcceptance
from eda.adapters.serving.traffic import TrafficRecord, TrafficRecorder


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


SETTINGS = GuardSettings(min_passes=200, patience_seconds=10.0)


def feed(guard: Guard, version: int | None, mean: float, *, requests: int = 60, seed: int = 0) -> None:
    """Requests of 10 passes each whose acceptance lengths scatter around ``mean``."""
    rng = random.Random(seed)
    for _ in range(requests):
        guard.observe("m", version, 10, round(10 * mean + rng.uniform(-3, 3)))


def test_a_rolling_ratio_and_its_error() -> None:
    rolling = RollingAcceptance(3)
    assert rolling.measure() is None
    for passes, emitted in ((5, 50), (10, 20), (10, 20), (20, 40)):
        rolling.add(passes, emitted)
    live = rolling.measure()
    assert live is not None
    assert (live.mean_acceptance_length, live.num_passes, live.num_requests) == (2.0, 40, 3)
    assert live.standard_error == 0.0


def test_a_worse_version_is_rolled_back_after_a_while() -> None:
    clock = Clock()
    guard = Guard(SETTINGS, clock=clock)
    feed(guard, 1, 2.0)
    feed(guard, None, 3.0)
    assert guard.verdicts({"m": 1}) == []
    clock.now = 9.0
    assert guard.verdicts({"m": 1}) == []
    clock.now = 11.0
    [verdict] = guard.verdicts({"m": 1})
    assert (verdict.kind, verdict.model, verdict.version) == ("roll_back", "m", 1)
    assert "of the shared draft alone" in verdict.reason


def test_a_break_starts_the_patience_anew() -> None:
    clock = Clock()
    guard = Guard(GuardSettings(min_passes=200, patience_seconds=10.0, window=60), clock=clock)
    feed(guard, None, 3.0)
    feed(guard, 1, 2.0)
    guard.verdicts({"m": 1})
    feed(guard, 1, 4.0)
    clock.now = 9.0
    assert guard.verdicts({"m": 1}) == []
    feed(guard, 1, 2.0)
    clock.now = 15.0
    assert guard.verdicts({"m": 1}) == []


@pytest.mark.parametrize(("adapted", "baseline"), [(3.0, 2.0), (3.0, 3.0), (2.97, 3.0)])
def test_a_version_as_good_as_the_baseline_stays(adapted: float, baseline: float) -> None:
    clock = Clock()
    guard = Guard(SETTINGS, clock=clock)
    feed(guard, 1, adapted, seed=2)
    feed(guard, None, baseline, seed=2)
    for clock.now in (0.0, 100.0, 200.0):
        assert guard.verdicts({"m": 1}) == []


def test_few_measurements_decide_nothing() -> None:
    clock = Clock()
    guard = Guard(SETTINGS, clock=clock)
    feed(guard, 1, 2.0)
    feed(guard, None, 3.0, requests=5)
    for clock.now in (0.0, 100.0):
        assert guard.verdicts({"m": 1}) == []


def test_the_alarm_rings_once_until_it_is_over() -> None:
    guard = Guard(SETTINGS, clock=Clock())
    for _ in range(30):
        guard.observe("m", None, 10, 10)
    [verdict] = guard.verdicts({"m": None})
    assert (verdict.kind, verdict.version) == ("alarm", None)
    assert guard.verdicts({"m": None}) == []
    assert guard.alarmed() == {("m", None)}
    feed(guard, None, 3.0, requests=600)
    assert guard.verdicts({"m": None}) == []
    assert guard.alarmed() == set()
    guard.forget("m")
    assert guard.live("m", None) is None


def test_the_share_is_checked() -> None:
    with pytest.raises(ValueError, match="must be from 0"):
        GuardSettings(baseline_share=0.9)
    assert not any(Guard(GuardSettings(baseline_share=0.0)).takes_baseline("m") for _ in range(100))


def record(number: int, size: int = 20) -> TrafficRecord:
    return TrafficRecord("math", f"r{number}", list(range(size)), [number], 0.0, "stop")


def test_the_ring_keeps_the_latest_within_its_limit(tmp_path: Path) -> None:
    recorder = TrafficRecorder(tmp_path, max_bytes=16_000)
    for number in range(1000):
        recorder.write(record(number))
        if number % 50 == 0:
            assert recorder.usage("math").num_bytes <= 16_000
    count = recorder.copy_to("math", tmp_path / "copy.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "copy.jsonl").read_text().splitlines()]
    assert count == len(rows) > 90
    assert [row["response_ids"][0] for row in rows] == list(range(1000 - count, 1000))
    recorder.limits["math"] = 1_600
    recorder.write(record(1000, size=2))
    for number in range(100):
        recorder.write(record(number, size=2))
    assert recorder.usage("math").num_bytes <= 1_600
    recorder.delete("math")
    assert recorder.usage("math").num_records == 0
    recorder.write(record(1, size=10_000))  # would take more than its share
    assert (recorder.num_dropped, recorder.usage("math").num_records) == (1, 0)


def test_counting_records_reads_only_what_has_grown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = TrafficRecorder(tmp_path, max_bytes=16 * 1024)
    for number in range(30):
        recorder.write(record(number))
    assert len(list((tmp_path / "math").iterdir())) > 2
    usage = recorder.usage("math")
    read: list[str] = []
    read_bytes = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: (read.append(path.name), read_bytes(path))[1])
    assert recorder.usage("math") == usage
    assert read == []
    recorder.write(record(30))
    assert recorder.usage("math").num_records == usage.num_records + 1
    assert len(read) == 1
    recorder.delete("math")
    recorder.write(record(1))
    assert recorder.usage("math").num_records == 1


def test_half_a_line_of_a_killed_server_is_passed_over(tmp_path: Path) -> None:
    recorder = TrafficRecorder(tmp_path)
    recorder.write(record(1))
    with (tmp_path / "math" / "00000001.jsonl").open("ab") as file:
        file.write(b'{"id": "half')
    recorder = TrafficRecorder(tmp_path)
    recorder.write(record(2))
    assert recorder.copy_to("math", tmp_path / "copy.jsonl") == 2
    ids = [json.loads(line)["id"] for line in (tmp_path / "copy.jsonl").read_text().splitlines()]
    assert ids == ["r1", "r2"]


def test_the_recorder_thread_writes_what_is_queued(tmp_path: Path) -> None:
    recorder = TrafficRecorder(tmp_path)
    recorder.start()
    for number in range(50):
        recorder.record(record(number))
    recorder.stop()
    assert recorder.usage("math").num_records == 50


def test_what_was_queued_before_a_deletion_is_not_written(tmp_path: Path) -> None:
    recorder = TrafficRecorder(tmp_path)
    recorder.record(record(1))
    recorder.delete("math")
    recorder.record(record(2))
    recorder.start()
    recorder.stop()
    recorder.copy_to("math", tmp_path / "copy.jsonl")
    assert [json.loads(line)["id"] for line in (tmp_path / "copy.jsonl").read_text().splitlines()] == ["r2"]
