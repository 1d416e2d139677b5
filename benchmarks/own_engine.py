"""This engine as contestants of a comparison: no draft, the shared draft, private modules; alone and in batches."""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.peers.interface import Completion, Contestant, Prompt
from eda.draft import DraftModel
from eda.generation import PREFILL_TOKENS_PER_STEP
from eda.private import PrivateModule
from eda.sampling import SamplingParams
from eda.speculative import ScheduledRow, SequenceState, Speculation, SpeculativeDecoder
from eda.target import FineTune, TargetModel
from server.engine.speculation import SpeculationTable

KINDS = ("none", "shared", "private")
GREEDY = SamplingParams(temperature=0.0)


@dataclass(frozen=True, slots=True)
class Family:
    """A target with everything that drafts for it. ``privates`` holds the domains that have a private module."""

    target: TargetModel
    draft: DraftModel | None
    fine_tunes: Mapping[str, FineTune]
    privates: Mapping[str, PrivateModule]


def own_name(kind: str, concurrency: int) -> str:
    """The table's name of a row of this engine."""
    return f"ours, {kind}, x{concurrency}"


def speculation_at(table: SpeculationTable, concurrency: int) -> Speculation:
    """What ``table`` drafts for that many sequences at a time."""
    for level in table.levels:
        if concurrency <= level.max_batch_size:
            return level.speculation()
    return table.levels[-1].speculation()


class OwnEngine:
    """Completes prompts in one batch, those of different fine-tunes too."""

    def __init__(
        self,
        decoder: SpeculativeDecoder,
        family: Family,
        kind: str,
        speculation: Speculation,
        concurrency: int,
    ) -> None:
        self._decoder, self._family, self._kind = decoder, family, kind
        self._speculation, self._concurrency = speculation, concurrency

    def __call__(self, prompts: Sequence[Prompt], max_tokens: int) -> list[Completion]:
        states = [self._state(prompt, max_tokens) for prompt in prompts]
        rounds: dict[int, list[int]] = {id(state): [] for state in states}
        waiting, running = deque(states), list[SequenceState]()
        try:
            while waiting or running:
                while waiting and len(running) < self._concurrency:
                    self._decoder.admit(waiting[0])
                    running.append(waiting.popleft())
                scheduled = _schedule(running)
                decoding = [not row.state.is_prefilling for row in scheduled]
                for row, decoded, result in zip(
                    scheduled, decoding, self._decoder.step(scheduled), strict=True
                ):
                    if decoded:
                        rounds[id(row.state)].append(result.num_accepted + 1)
                    if len(row.state.token_ids) >= row.state.max_length:
                        self._decoder.release(row.state)
                        running.remove(row.state)
        finally:
            for state in running:
                self._decoder.release(state)
        return [
            Completion(
                state.token_ids[state.num_prompt_tokens : state.max_length],
                len(rounds[id(state)]),
                sum(rounds[id(state)]),
            )
            for state in states
        ]

    def _state(self, prompt: Prompt, max_tokens: int) -> SequenceState:
        return SequenceState(
            token_ids=list(prompt.token_ids),
            max_length=len(prompt.token_ids) + max_tokens,
            fine_tune=self._family.fine_tunes[prompt.domain],
            sampling=GREEDY,
            private=self._family.privates[prompt.domain] if self._kind == "private" else None,
            speculation=self._speculation,
        )


def _schedule(running: Sequence[SequenceState]) -> list[ScheduledRow]:
    """Decoding rows first, then as much of the prompts as one pass may hold."""
    rows = [ScheduledRow(state) for state in running if not state.is_prefilling]
    budget = PREFILL_TOKENS_PER_STEP
    for state in running:
        if state.is_prefilling and budget > 0:
            count = min(state.num_uncomputed, budget)
            budget -= count
            rows.append(ScheduledRow(state, count))
    return rows


def missing_kinds(family: Family, domains: Sequence[str]) -> dict[str, str]:
    """Kinds of drafting that ``domains`` cannot be measured with, and why."""
    if family.draft is None:
        return {"shared": "the family has no draft", "private": "the family has no draft"}
    without = [domain for domain in domains if domain not in family.privates]
    where = f" for {', '.join(without)}" if len(domains) > 1 else ""
    return {"private": f"the family has no private module{where}"} if without else {}


def own_contestants(
    decoder: SpeculativeDecoder,
    family: Family,
    domains: Sequence[str],
    concurrencies: Sequence[int],
    table: SpeculationTable,
    kinds: Sequence[str] = KINDS,
) -> list[Contestant]:
    """One contestant for each of ``kinds`` that ``domains`` allow, at each concurrency."""
    missing = missing_kinds(family, domains)
    contestants = []
    for concurrency in concurrencies:
        for kind in kinds:
            if kind in missing:
                continue
            speculation = Speculation("none") if kind == "none" else speculation_at(table, concurrency)
            engine = OwnEngine(decoder, family, kind, speculation, concurrency)
            contestants.append(Contestant(own_name(kind, concurrency), engine, concurrency))
    return contestants
