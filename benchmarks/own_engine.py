"""This engine as contestants of a comparison: no draft, the shared draft, private modules; alone and in batches."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.peers.interface import Completion, Contestant, Prompt
from eda.backends.cpu.weights import WEIGHT_FORMATS
from eda.backends.loading import load_target
from eda.decoder import SpeculativeDecoder
from eda.generation import Generation, GenerationRequest, generate
from eda.models.draft import DraftModel
from eda.models.fine_tune import FineTune
from eda.models.private import PrivateModule
from eda.models.target import TargetModel
from eda.sampling.params import SamplingParams
from eda.server.engine.speculation import SpeculationTable
from eda.speculation.kinds import Lookup, Off, Speculation

DRAFTS_WITHOUT_MODEL: Mapping[str, Callable[[], Speculation]] = {"none": Off, "lookup": Lookup}
"""What a target alone can draft with, by the name in the tables."""
OWN_VALUES = "own"
"""The weight format of a file that is quantised already, with its values as they are."""
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


def load_as(path: Path, weights: str) -> TargetModel:
    """The target at ``path`` with its weights in a format of ``WEIGHT_FORMATS``, or in its ``OWN_VALUES``.

    Raises ``ValueError`` for another format; see ``load_target`` for what it raises.
    """
    if weights != OWN_VALUES and weights not in WEIGHT_FORMATS:
        raise ValueError(
            f"weights is {weights!r}; it must be {OWN_VALUES} or one of {', '.join(WEIGHT_FORMATS)}"
        )
    return load_target(path, weights="auto" if weights == OWN_VALUES else weights)


def own_target_name(weights: str, kind: str, concurrency: int) -> str:
    """The table's name of a row of this engine on one target."""
    drafting = "" if kind == "none" else f", {kind}"
    return f"ours {weights}{drafting}" + ("" if concurrency == 1 else f" x{concurrency}")


def target_contestant(
    model: TargetModel, weights: str, kind: str, concurrency: int, max_length: int
) -> Contestant:
    """A target without a draft model, with ``kind`` of ``DRAFTS_WITHOUT_MODEL``."""
    decoder = SpeculativeDecoder.for_models(model, num_slots=max_length * concurrency)
    fine_tune = FineTune("target", model)

    def complete(prompts: Sequence[Prompt], max_tokens: int) -> list[Completion]:
        requests = [
            GenerationRequest(
                prompt.token_ids, max_tokens, sampling=GREEDY, speculation=DRAFTS_WITHOUT_MODEL[kind]()
            )
            for prompt in prompts
        ]
        return _completions(generate(decoder, fine_tune, requests, max_batch=concurrency))

    return Contestant(own_target_name(weights, kind, concurrency), complete, concurrency)


def _completions(generations: Iterable[Generation]) -> list[Completion]:
    return [
        Completion(
            generation.token_ids,
            len(generation.steps),
            sum(accepted + 1 for _, accepted in generation.steps),
        )
        for generation in generations
    ]


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
        return _completions(generate(self._decoder, base, requests, max_batch=self._concurrency))

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
