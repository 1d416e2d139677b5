"""The runs of the adaptation benchmark: what is compared with what, and the data that each run learns from."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from eda.decoder import SpeculativeDecoder
from eda.models.draft import DraftModel
from eda.models.fine_tune import FineTune
from eda.training.data.dataset import Dataset
from eda.training.data.prompts import ChatFormat, Prompt, split_held_out
from eda.training.data.regenerate import RegenerationConfig, regenerate
from eda.training.data.samples import Sample
from eda.training.data.scores import SCORES, Score
from eda.training.data.selection import score_samples, select
from eda.training.data.self_prompts import SelfPromptConfig, write_own_prompts
from eda.training.data.target_states import StateCache
from eda.training.files import hash_of_json, read_json_if_present, write_json

METHODS = ("shared", "retrain", "lora", "private")
GRIDS = ("main", "width", "ranks", "unroll", "loss", "init", "self", "cost")


@dataclass(frozen=True)
class RunSpec:
    """One training and its measurement.

    Attributes:
        method: one of ``METHODS``; "shared" trains nothing.
        data: "public", "regenerated", "self", or "half-<score>" for half of the regenerated tokens.
        width: of the private network, as a share of the shared one's.
        fc_rank, attention_rank: of the private module's low-rank corrections, as a share of the draft's width.
        steps_share: optimiser steps, as a share of the benchmark's.
    """

    domain: str
    seed: int
    method: str
    data: str = "regenerated"
    width: float = 0.25
    fc_rank: float = 0.125
    attention_rank: float = 0.125
    lora_rank: int = 64
    unroll_steps: int = 4
    loss: str = "lk"
    initialisation: str = "zero"
    steps_share: float = 1.0

    @property
    def label(self) -> str:
        """What the run is, without domain and seed: runs with equal labels are averaged."""
        parts = [self.method]
        if self.method == "shared":
            return "shared, unadapted"
        if self.method == "private":
            parts.append(f"width {self.width:g}")
            if self.fc_rank:
                parts.append(f"fc rank {self.fc_rank:g}")
            if self.attention_rank:
                parts.append(f"attention rank {self.attention_rank:g}")
            if self.initialisation != "zero":
                parts.append(f"{self.initialisation} start")
        if self.method == "lora":
            parts.append(f"rank {self.lora_rank}")
        parts.append(self.data)
        defaults = RunSpec("", 0, "")
        if self.unroll_steps != defaults.unroll_steps:
            parts.append(f"{self.unroll_steps} unrolled")
        if self.loss != defaults.loss:
            parts.append(self.loss)
        if self.steps_share != 1.0:
            parts.append(f"{self.steps_share:g} of the steps")
        return ", ".join(parts)

    def file_name(self, settings: Mapping[str, Any]) -> str:
        """Differs for runs that differ in anything, the benchmark's own ``settings`` (a JSON object) included."""
        digest = hash_of_json([asdict(self), settings])[:10]
        return f"{self.domain}-{self.method}-{self.data}-s{self.seed}-{digest}.json"


def runs_of(
    grids: Iterable[str],
    domains: Sequence[str],
    seeds: Sequence[int],
    methods: Sequence[str],
    scores: Sequence[Score],
) -> list[RunSpec]:
    """All runs of the named grids, without repetition, in an order that completes the main table first."""
    found: dict[RunSpec, None] = {}
    for grid in grids:
        for seed in seeds:
            for domain in domains:
                for run in _grid(grid, domain, seed, scores):
                    if run.method in methods:
                        found.setdefault(run)
    return list(found)


def _grid(grid: str, domain: str, seed: int, scores: Sequence[Score]) -> list[RunSpec]:
    private = RunSpec(domain, seed, "private")
    halves = [f"half-{score}" for score in scores]
    if grid == "main":
        data = ["public", "regenerated", *halves]
        trained = [replace(private, method=m, data=d) for m in ("private", "retrain", "lora") for d in data]
        return [RunSpec(domain, seed, "shared"), *trained]
    if grid == "width":
        return [replace(private, width=width) for width in (0.0, 0.125, 0.25, 0.5, 1.0)]
    if grid == "ranks":
        ranks = [(0.0, 0.0), (0.125, 0.0), (0.0, 0.125), (0.125, 0.0625), (0.125, 0.125), (0.125, 0.25)]
        return [replace(private, fc_rank=fc, attention_rank=attention) for fc, attention in ranks]
    if grid == "unroll":
        return [replace(private, unroll_steps=steps) for steps in (1, 4, 7)]
    if grid == "loss":
        return [replace(private, loss=loss) for loss in ("lk", "kl")]
    if grid == "init":
        return [replace(private, initialisation=start) for start in ("zero", "random")]
    if grid == "self":
        return [private, replace(private, data="self")]
    if grid == "cost":
        half = next((data for data in halves if data != "half-random"), "half-random")
        return [replace(private, data=half, steps_share=share) for share in (0.25, 0.5)]
    raise ValueError(f"grid is {grid!r}; it must be one of {', '.join(GRIDS)}")


@dataclass(frozen=True)
class DataSizes:
    """How much data a domain has. ``prompts`` are answered for training, ``held_out`` for choosing the best state."""

    prompts: int
    held_out: int
    evaluation: int
    regeneration: RegenerationConfig


class DomainData:
    """Everything that the runs of one domain share; made when first asked for and kept on disk."""

    def __init__(
        self,
        name: str,
        base: FineTune,
        fine_tune: FineTune,
        draft: DraftModel,
        chat: ChatFormat,
        train_prompts: Sequence[Prompt],
        evaluation_prompts: Sequence[Prompt],
        directory: Path,
        sizes: DataSizes,
        say: Callable[[str], None],
    ) -> None:
        self.name, self.base, self.fine_tune, self.draft, self.chat = name, base, fine_tune, draft, chat
        self.directory, self.sizes, self.say = directory, sizes, say
        # The split is the same for all seeds of training: they differ in initialisation, order and random halves.
        self.train_prompts, self._held_out_prompts = split_held_out(
            train_prompts, sizes.held_out, seed=0, limit=sizes.prompts
        )
        self.evaluation_prompts = list(evaluation_prompts)[: sizes.evaluation]
        self.decoder = SpeculativeDecoder.for_models(fine_tune.model, num_slots=sizes.regeneration.num_slots)
        self._lists: dict[str, list[Sample]] = {}
        self._caches: dict[str, StateCache] = {}

    def training(self, data: str, seed: int) -> Dataset:
        """Samples of a data variant."""
        if not data.startswith("half-"):
            return Dataset(self._cache(data))
        cache = self._cache("regenerated")
        score = data.removeprefix("half-")
        values = self.scores(seed)[score]
        kept = {sample.id for sample in select(cache.samples, values, 0.5).samples}
        return Dataset(cache, [index for index, sample in enumerate(cache.samples) if sample.id in kept])

    def held_out(self) -> Dataset:
        """Greedy answers to prompts of their own, for choosing the best state."""
        return Dataset(self._cache("held-out"))

    def scores(self, seed: int) -> dict[str, list[float]]:
        """Every score of every regenerated sample."""
        path = self.directory / f"scores-{seed}.json"
        found = read_json_if_present(path)
        if found is None:
            self.say(f"{self.name}: scoring samples")
            cache = self._cache("regenerated")
            found = score_samples(
                self.base, self.fine_tune, self.draft, cache.samples, SCORES, seed=seed, states=cache
            )
            write_json(path, found)
        scores: dict[str, list[float]] = found
        return scores

    def _cache(self, data: str) -> StateCache:
        if data not in self._caches:
            self._caches[data] = StateCache(self.fine_tune, self._samples(data), self.draft.config.tap_layers)
        return self._caches[data]

    def _samples(self, data: str) -> list[Sample]:
        sizes = self.sizes.regeneration
        if data == "public":
            return public_samples(self.chat, self.train_prompts, sizes)
        self.say(f"{self.name}: answers ({data})")
        prompts = self.train_prompts
        if data == "held-out":
            prompts, sizes = self._held_out_prompts, replace(sizes, sampled_share=0.0)
        elif data == "self":
            config = SelfPromptConfig(batch_size=sizes.batch_size)
            prompts = write_own_prompts(
                self.decoder, self.fine_tune, self.chat, len(prompts), self.directory / "own-prompts", config
            )
        elif data != "regenerated":
            raise ValueError(f"data is {data!r}; it must be public, regenerated, self or half-<score>")
        samples, report = regenerate(
            self.decoder, self.fine_tune, prompts, self.chat, self.directory / data, sizes
        )
        self.say(f"{self.name}: {report.num_samples} answers, {report.num_tokens} tokens ({data})")
        return samples


def public_samples(chat: ChatFormat, prompts: Sequence[Prompt], config: RegenerationConfig) -> list[Sample]:
    """The data set's own answers, cut to the length that regenerated ones may have."""
    samples = []
    for prompt in prompts:
        ids = chat.prompt_ids(prompt.messages)
        if prompt.response is None or len(ids) > config.max_prompt_tokens:
            continue
        answer = chat.response_ids(prompt.response)
        reason = "stop" if len(answer) <= config.max_tokens else "length"
        samples.append(Sample(prompt.id, tuple(ids), tuple(answer[: config.max_tokens]), 0.0, reason))
    return samples
