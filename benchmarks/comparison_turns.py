"""Running contestants in turns, so that a machine that gets slower in the meantime does so for all of them."""

import math
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from benchmarks.peers.interface import Completion, Contestant, Prompt, first_line

MIN_BATCH_TURNS = 3
"""A batch holds several prompts, so fewer turns cover all of them; a median wants a few nevertheless."""
WARM_UP_TOKENS = 16
RUN_FAILED = "failed while running"


@dataclass(slots=True)
class Record:
    """What a contestant did with one set of prompts."""

    name: str
    concurrency: int
    seconds: list[float] = field(default_factory=list)
    num_tokens: list[int] = field(default_factory=list)
    completions: list[Completion] = field(default_factory=list)
    prompts: list[Prompt] = field(default_factory=list)

    def add(self, seconds: float, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> None:
        self.seconds.append(seconds)
        self.num_tokens.append(sum(len(completion.token_ids) for completion in completions))
        self.prompts += prompts
        self.completions += completions

    @property
    def tokens_per_second(self) -> float:
        """All tokens over all seconds, so that ratios of it are ratios of sums."""
        return sum(self.num_tokens) / sum(self.seconds)

    @property
    def median_tokens_per_second(self) -> float:
        return statistics.median(
            count / seconds for count, seconds in zip(self.num_tokens, self.seconds, strict=True)
        )

    @property
    def tokens_per_round(self) -> float | None:
        """Mean number of tokens per target pass; ``None`` for an engine that does not count its passes."""
        rounds = [completion.num_rounds for completion in self.completions]
        tokens = [completion.num_round_tokens for completion in self.completions]
        if None in rounds or None in tokens or not sum(filter(None, rounds)):
            return None
        return sum(filter(None, tokens)) / sum(filter(None, rounds))


def num_turns(concurrency: int, num_prompts: int) -> int:
    """How often a contestant runs: once for each prompt when alone, less often in batches."""
    if concurrency == 1:
        return num_prompts
    return min(num_prompts, max(MIN_BATCH_TURNS, math.ceil(num_prompts / concurrency)))


def turns(concurrencies: Sequence[int], num_prompts: int) -> Iterator[tuple[int, int]]:
    """Pairs of a contestant's place and the place of its first prompt, in the order of running.

    Whoever begins changes from prompt to prompt, and the turns of batches are spread evenly over the run.
    """
    for prompt in range(num_prompts):
        begin = prompt % len(concurrencies)
        for contestant in [*range(begin, len(concurrencies)), *range(begin)]:
            count = num_turns(concurrencies[contestant], num_prompts)
            if (prompt + 1) * count // num_prompts > prompt * count // num_prompts:
                yield contestant, prompt


def run_in_turns(
    contestants: Sequence[Contestant],
    prompts: Sequence[Prompt],
    max_tokens: int,
    *,
    pause: float = 0.0,
    minutes: float = math.inf,
) -> tuple[list[Record], dict[str, str]]:
    """Runs every contestant on ``prompts``, a batch of them where it takes several at a time.

    Args:
        pause: seconds before each run, in which the worker threads of the engine before it go to sleep.
        minutes: no prompt is begun that long after the warm-up; what was measured until then counts.

    Returns:
        Records of those that came through, in order, and the reasons of those that failed.
    """
    records = [Record(contestant.name, contestant.concurrency) for contestant in contestants]
    failed: dict[str, str] = {}

    def attempt(place: int, chosen: Sequence[Prompt], count: int) -> tuple[float, list[Completion]] | None:
        contestant = contestants[place]
        try:
            start = time.perf_counter()
            completions = contestant.complete(chosen, count)
            seconds = time.perf_counter() - start
        except Exception as error:  # a peer may raise anything, and the others shall still be measured
            failed[contestant.name] = f"{RUN_FAILED}: {first_line(error)}"
            return None
        lengths = {len(completion.token_ids) for completion in completions}
        if lengths != {count}:
            failed[contestant.name] = (
                f"{RUN_FAILED}: gave {sorted(lengths)} tokens where {count} were asked for"
            )
            return None
        return seconds, completions

    for place, contestant in enumerate(contestants):
        together = [prompts[offset % len(prompts)] for offset in range(contestant.concurrency)]
        attempt(place, together, min(WARM_UP_TOKENS, max_tokens))
    deadline, current = time.monotonic() + 60 * minutes, 0
    for place, first in turns([contestant.concurrency for contestant in contestants], len(prompts)):
        if first != current and time.monotonic() > deadline:
            break
        current = first
        contestant = contestants[place]
        if contestant.name in failed:
            continue
        chosen = [prompts[(first + offset) % len(prompts)] for offset in range(contestant.concurrency)]
        time.sleep(pause)
        outcome = attempt(place, chosen, max_tokens)
        if outcome is not None:
            records[place].add(outcome[0], chosen, outcome[1])
    for record in records:
        if not record.seconds:
            failed.setdefault(record.name, f"had no turn within {minutes:g} minutes")
    return [record for record in records if record.name not in failed], failed
