"""This engine as contestants of a comparison: no draft, the shared draft, private modules; alone and in batches."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.peers.interface import Completion, Contestant, Prompt
from eda.decoder import SpeculativeDecoder
from eda.generation import GenerationRequest, generate
from eda.models.draft import DraftModel
from eda.models.fine_tune import FineTune
from eda.models.private import PrivateModule
from eda.models.target import TargetModel
from eda.sampling.params import SamplingParams
from eda.server.engine.speculation import SpeculationTable
from eda.speculation.kinds import Off, Speculation

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
    return table.level_for(concurrency).speculation()


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
        requests = [self._request(prompt, max_tokens) for prompt in prompts]
        base = FineTune("base", self._family.target)
        return [
            Completion(
                generation.token_ids,
                len(generation.steps),
                sum(accepted + 1 for _, accepted in generation.steps),
            )
            for generation in generate(self._decoder, base, requests, max_batch=self._concurrency)
        ]

    def _request(self, prompt: Prompt, max_tokens: int) -> GenerationRequest:
        return GenerationRequest(
            prompt.token_ids,
            max_tokens,
            sampling=GREEDY,
            speculation=self._speculation,
            private=self._family.privates[prompt.domain] if self._kind == "private" else None,
            fine_tune=self._family.fine_tunes[prompt.domain],
        )


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
            speculation = Off() if kind == "none" else speculation_at(table, concurrency)
            engine = OwnEngine(decoder, family, kind, speculation, concurrency)
            contestants.append(Contestant(own_name(kind, concurrency), engine, concurrency))
    return contestants
