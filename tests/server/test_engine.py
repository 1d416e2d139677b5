"""Scheduling, admission, deadlines, aborts and failures, on a decoder without a model."""

import time
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch

from eda.decoder import ScheduledRow
from eda.errors import NonFiniteLogitsError
from eda.server.engine.detokenizer import IncrementalDetokenizer
from eda.server.engine.engine import (
    MAX_FAILED_STEPS,
    DeadlineError,
    Engine,
    EngineHooks,
    EngineStoppedError,
    ModelStepError,
    Output,
    QueueFullError,
)
from eda.server.engine.scheduler import Scheduler, SchedulerLimits
from eda.server.engine.sequence import Sequence as EngineSequence
from eda.server.engine.sequence import SequenceDelta, StepStats
from eda.server.engine.speculation import SpeculationLevel, SpeculationPolicy, SpeculationTable
from eda.server.engine.stopping import FinishReason, StopChecker, StopConditions
from eda.speculation.kinds import Off
from tests.support.fakes import FakeDecoder, continuation, decode_letters, make_sequence

TABLE = SpeculationTable((SpeculationLevel(2, "chain", 4), SpeculationLevel(4, "chain", 1)))


class Bench:
    """An engine that is stepped by hand, and everything that it said."""

    def __init__(self, decoder: FakeDecoder | None = None, *, max_waiting: int = 100, **limits: int) -> None:
        self.decoder = decoder or FakeDecoder()
        self.policy = SpeculationPolicy(TABLE, patience=1)
        self.outputs: list[Output] = []
        self.stats: list[StepStats] = []
        self.finished: list[EngineSequence] = []
        self.deaths: list[BaseException] = []
        hooks = EngineHooks(self.outputs.extend, self.stats.extend, self.finished.append, self.deaths.append)
        self.scheduler = Scheduler(self.decoder, SchedulerLimits(**limits), self.policy)
        self.engine = Engine(self.decoder, self.scheduler, self.policy, hooks, max_waiting=max_waiting)

    def submit(self, *sequences: EngineSequence) -> None:
        self.engine.submit(list(sequences))

    def step(self, count: int = 1) -> None:
        for _ in range(count):
            self.engine._receive()
            self.engine.step()

    def run(self) -> None:
        """Steps until nothing is left."""
        for _ in range(1000):
            self.step()
            if not self.scheduler.has_work:
                return
        raise AssertionError("the engine does not come to an end")

    def deltas(self, sequence: EngineSequence) -> list[SequenceDelta]:
        return [delta for owner, delta in self.outputs if owner is sequence]

    def text(self, sequence: EngineSequence) -> str:
        return "".join(delta.text for delta in self.deltas(sequence))

    def token_ids(self, sequence: EngineSequence) -> list[int]:
        return [token_id for delta in self.deltas(sequence) for token_id in delta.token_ids]

    def error(self, sequence: EngineSequence) -> Exception | None:
        return self.deltas(sequence)[-1].error


def test_sequences_that_join_and_leave_get_their_own_continuations() -> None:
    bench = Bench(max_running=3, max_tokens_per_step=8)
    sequences = [make_sequence([index + 1] * (1 + 5 * (index % 4)), 3 + 4 * index) for index in range(8)]
    for sequence in sequences:
        bench.submit(sequence)
        bench.step()
    bench.run()
    for sequence in sequences:
        expected = continuation(
            sequence.state.token_ids[: sequence.num_prompt_tokens], sequence.num_output_tokens
        )
        assert bench.token_ids(sequence) == expected
        assert bench.text(sequence) == decode_letters(expected)
        assert sequence.finish_reason is FinishReason.LENGTH
    assert bench.decoder.num_free == bench.decoder.num_slots
    assert bench.finished == sorted(bench.finished, key=lambda s: s.timing.finished or 0)


def test_prompts_are_computed_in_chunks_beside_decoding() -> None:
    bench = Bench(max_tokens_per_step=16, min_prefill_tokens=4)
    decoding = make_sequence([1], 40)
    bench.submit(decoding)
    bench.step(2)
    long = make_sequence([2] * 50, 4)
    bench.submit(long)
    bench.run()
    chunks = [count for batch in bench.decoder.batches for state, count in batch if state is long.state]
    # 5 tokens of each step go to the decoding sequence: its own and a draft of 4.
    assert chunks[:4] == [11, 11, 11, 11]
    assert bench.token_ids(long) == continuation([2] * 50, 4)


def test_a_full_batch_cannot_starve_a_prompt() -> None:
    bench = Bench(max_tokens_per_step=2, min_prefill_tokens=3)
    bench.submit(*(make_sequence([1], 60) for _ in range(2)))
    bench.step(3)
    late = make_sequence([5] * 9, 2)
    bench.submit(late)
    bench.step(4)
    assert bench.token_ids(late)


def test_admission_is_first_come_first_served_and_does_not_overtake() -> None:
    bench = Bench(FakeDecoder(num_slots=60))
    first, large, small = make_sequence([1], 30), make_sequence([1], 50), make_sequence([1], 5)
    bench.submit(first, large, small)
    bench.run()
    assert bench.decoder.admitted == [first.state, large.state, small.state]
    assert bench.decoder.num_free == 60


def test_smaller_priorities_go_first() -> None:
    bench = Bench(max_running=1)
    later, sooner = make_sequence(name="later", priority=1), make_sequence(name="sooner", priority=-1)
    bench.submit(later, sooner)
    bench.run()
    assert bench.decoder.admitted == [sooner.state, later.state]


def test_drafts_get_shorter_as_the_batch_grows() -> None:
    bench = Bench()
    bench.submit(*(make_sequence([index], 30) for index in range(1, 5)))
    bench.step(3)
    assert {entry.num_draft_tokens for entry in bench.stats} == {1}


def test_a_stop_string_inside_an_accepted_run_cuts_everything_at_one_place() -> None:
    prompt = [3, 1]
    expected = continuation(prompt, 12)
    stop = decode_letters(expected[3:5])
    assert decode_letters(expected).find(stop) == 3
    bench = Bench()
    sequence = make_sequence(prompt, 12, stop_strings=(stop,))
    bench.submit(sequence)
    bench.run()
    assert bench.text(sequence) == decode_letters(expected[:3])
    assert bench.token_ids(sequence) == expected[:5]
    assert sequence.num_output_tokens == 5
    assert len(sequence.state.token_ids) > len(prompt) + 5, "the run did not reach beyond the stop"
    assert bench.deltas(sequence)[-1].stop_reason == stop


def test_statistics_leave_the_prompt_out_and_are_not_cut() -> None:
    bench = Bench()
    sequence = make_sequence([1], 11)
    bench.submit(sequence)
    bench.run()
    assert [entry.num_emitted for entry in bench.stats] == [5, 5]
    assert sequence.counts.num_target_passes == 2
    assert sequence.counts.mean_acceptance_length == 5.0
    assert sequence.counts.draft_acceptance_rate == 1.0


def test_an_aborted_sequence_frees_its_slots_in_the_next_step() -> None:
    bench = Bench(max_running=1)
    running, waiting = make_sequence([1], 100), make_sequence([2], 100)
    bench.submit(running, waiting)
    bench.step(2)
    bench.engine.abort([running, waiting])
    bench.step()
    assert bench.decoder.num_free == bench.decoder.num_slots
    assert (bench.engine.num_running, bench.engine.num_waiting) == (0, 0)
    assert {running.finish_reason, waiting.finish_reason} == {FinishReason.ABORT}


def test_a_deadline_ends_running_and_waiting_sequences() -> None:
    bench = Bench(max_running=1)
    soon = time.monotonic() + 0.05
    sequences = [make_sequence([1], 500, deadline=soon), make_sequence([2], 5, deadline=soon)]
    bench.submit(*sequences)
    bench.step(2)
    time.sleep(0.06)
    bench.step()
    for sequence in sequences:
        assert sequence.finish_reason is FinishReason.DEADLINE
        assert isinstance(bench.error(sequence), DeadlineError)
    assert bench.decoder.num_free == bench.decoder.num_slots


def test_the_queue_is_bounded_and_takes_groups_whole() -> None:
    bench = Bench(max_waiting=3, max_running=1)
    bench.submit(make_sequence(), make_sequence())
    with pytest.raises(QueueFullError, match="limit is 3"):
        bench.submit(make_sequence(), make_sequence())
    assert bench.engine.num_waiting == 2
    bench.step()
    bench.submit(make_sequence(), make_sequence())
    bench.run()
    assert len(bench.finished) == 4
    assert bench.engine.num_waiting == 0


def failing_on(*bad: EngineSequence) -> Callable[[Sequence[ScheduledRow]], BaseException | None]:
    states = [sequence.state for sequence in bad]
    return lambda rows: RuntimeError("bad numbers") if any(row.state in states for row in rows) else None


def test_a_model_error_fails_its_own_request_alone() -> None:
    bench = Bench()
    good, bad, also_good = make_sequence([1], 20), make_sequence([2], 20), make_sequence([3], 20)
    bench.decoder.fail = failing_on(bad)
    bench.submit(good, bad, also_good)
    bench.run()
    assert isinstance(bench.error(bad), ModelStepError)
    for sequence in (good, also_good):
        assert bench.token_ids(sequence) == continuation(sequence.state.token_ids[:1], 20)
    assert bench.decoder.num_free == bench.decoder.num_slots


def test_a_tokenizer_error_fails_its_own_request_alone() -> None:
    bench = Bench()
    good, bad = make_sequence([1], 20), make_sequence([2], 20)
    bad.checker = StopChecker(
        StopConditions(20), IncrementalDetokenizer(lambda ids: bytes([0]).decode("bad name"))
    )
    bench.submit(good, bad)
    bench.run()
    assert isinstance(bench.error(bad), ModelStepError)
    assert good.finish_reason is FinishReason.LENGTH


class Threaded:
    """An engine in its own thread."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        bench.engine.start()

    def wait_for(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 10
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.002)


@pytest.fixture
def threaded() -> Iterator[Threaded]:
    threaded = Threaded(Bench(max_running=2))
    yield threaded
    threaded.bench.engine.stop(0.0)
    assert threaded.bench.engine.join(10)


def test_the_thread_sleeps_while_idle_and_wakes_up(threaded: Threaded) -> None:
    sequence = make_sequence([1], 20)
    time.sleep(0.02)
    threaded.bench.submit(sequence)
    threaded.wait_for(lambda: bool(threaded.bench.finished))
    assert threaded.bench.engine.seconds_without_progress == 0.0


def test_draining_finishes_what_runs_and_takes_nothing_new(threaded: Threaded) -> None:
    sequences = [make_sequence([index], 30) for index in range(1, 6)]
    threaded.bench.submit(*sequences)
    threaded.bench.engine.stop(10.0)
    with pytest.raises(EngineStoppedError):
        threaded.bench.submit(make_sequence())
    assert threaded.bench.engine.join(10)
    assert [sequence.finish_reason for sequence in sequences] == [FinishReason.LENGTH] * 5


def test_stopping_at_once_answers_everybody(threaded: Threaded) -> None:
    threaded.bench.decoder.fail = lambda rows: time.sleep(0.01)
    sequences = [make_sequence([index], 200, speculation=Off()) for index in range(1, 4)]
    threaded.bench.submit(*sequences)
    threaded.wait_for(lambda: bool(threaded.bench.outputs))
    threaded.bench.engine.stop(0.0)
    assert threaded.bench.engine.join(10)
    assert all(isinstance(threaded.bench.error(sequence), EngineStoppedError) for sequence in sequences)
    assert threaded.bench.decoder.num_free == threaded.bench.decoder.num_slots


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt("no step"), torch.AcceleratorError("the device is gone")]
)
def test_an_engine_that_dies_answers_everybody_and_says_so(threaded: Threaded, error: BaseException) -> None:
    threaded.bench.decoder.fail = lambda rows: error
    sequences = [make_sequence([index], 20) for index in range(1, 5)]
    threaded.bench.submit(*sequences)
    threaded.wait_for(lambda: bool(threaded.bench.deaths))
    assert threaded.bench.engine.join(10)
    assert threaded.bench.deaths == [error]
    assert not threaded.bench.engine.is_alive
    assert all(isinstance(threaded.bench.error(sequence), EngineStoppedError) for sequence in sequences)
    with pytest.raises(EngineStoppedError):
        threaded.bench.submit(make_sequence())


def fail_often(threaded: Threaded, count: int) -> None:
    """Sends ``count`` requests that fail, one after another, or fewer when the engine has enough of it."""
    threaded.bench.decoder.fail = lambda rows: RuntimeError("bad numbers")
    for _ in range(count):
        before = len(threaded.bench.finished)
        try:
            threaded.bench.submit(make_sequence())
        except EngineStoppedError:
            return
        threaded.wait_for(lambda before=before: len(threaded.bench.finished) > before)  # type: ignore[misc]


def test_a_model_that_works_no_longer_is_given_up(threaded: Threaded) -> None:
    threaded.bench.submit(make_sequence())
    threaded.wait_for(lambda: bool(threaded.bench.finished))
    fail_often(threaded, MAX_FAILED_STEPS)
    threaded.wait_for(lambda: bool(threaded.bench.deaths))


def test_numbers_that_are_not_finite_are_the_models_fault_and_not_the_engines(threaded: Threaded) -> None:
    """Else a few prompts that drive one model out of range would end the server for everybody."""
    threaded.bench.submit(make_sequence())
    threaded.wait_for(lambda: bool(threaded.bench.finished))
    threaded.bench.decoder.fail = lambda rows: NonFiniteLogitsError("the logits are not finite")
    for count in range(2, 3 * MAX_FAILED_STEPS):
        sequence = make_sequence()
        threaded.bench.submit(sequence)
        threaded.wait_for(lambda count=count: len(threaded.bench.finished) == count)  # type: ignore[misc]
        assert isinstance(sequence.failure, NonFiniteLogitsError)
    threaded.bench.decoder.fail = lambda rows: None
    threaded.bench.submit(make_sequence(name="good"))
    threaded.wait_for(lambda: threaded.bench.finished[-1].request_id == "good")
    assert threaded.bench.finished[-1].finish_reason is FinishReason.LENGTH
    assert not threaded.bench.deaths


def test_a_fine_tune_that_never_worked_does_not_end_the_engine(threaded: Threaded) -> None:
    fail_often(threaded, 3 * MAX_FAILED_STEPS)
    threaded.bench.decoder.fail = lambda rows: None
    threaded.bench.submit(make_sequence(name="good"))
    threaded.wait_for(lambda: threaded.bench.finished[-1].request_id == "good")
    assert threaded.bench.finished[-1].finish_reason is FinishReason.LENGTH
    assert not threaded.bench.deaths


def waiting_lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if "has waited" in record.getMessage()]


def test_the_log_says_once_what_the_queue_waits_for(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="eda.server.engine.engine")
    bench = Bench(FakeDecoder(num_slots=150), max_running=8)
    first = make_sequence(max_tokens=100, name="long")
    second, third = (make_sequence(max_tokens=90, name=name) for name in ("next", "last"))
    bench.submit(first, second, third)
    bench.step()
    assert waiting_lines(caplog) == [], "a short wait is nothing to speak of"
    second.timing.submitted -= 2.0
    bench.step(5)
    [line] = waiting_lines(caplog)
    assert line.startswith("request next has waited 2.")
    assert "for cache for 3 prompt tokens and up to 90 output tokens; running: 1, waiting: 2" in line


def test_the_log_names_a_full_batch(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="eda.server.engine.engine")
    bench = Bench(max_running=1)
    sequences = [make_sequence(max_tokens=50, name=name) for name in ("first", "second")]
    bench.submit(*sequences)
    sequences[1].timing.submitted -= 2.0
    bench.step()
    [line] = waiting_lines(caplog)
    assert "for one of the 1 places in the batch (max_running)" in line
