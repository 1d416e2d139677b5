"""What the stages of one job share: its models, its prompts, and how reports and stops are passed on."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Self, TypeVar

import torch

from eda.adapters.errors import JobInterruptedError
from eda.adapters.jobs.pipeline import StageContext
from eda.adapters.jobs.spec import DRAFT_ROOM, AdaptationSpec
from eda.adapters.jobs.workspaces import PROMPTS_FILE
from eda.adapters.store.store import AdapterStore
from eda.adapters.templates.renderer import TemplateRenderer
from eda.adapters.worker.recorded_prompts import recorded_prompts, usable_records
from eda.backends.loading import load_fine_tune, load_target
from eda.decoder import SpeculativeDecoder
from eda.errors import DataError, MismatchError
from eda.formats.weight_settings import WeightSetting
from eda.models.draft import DraftModel
from eda.models.fine_tune import FineTune
from eda.models.target import TargetModel
from eda.training.data.prompts import ChatFormat, Prompt, read_prompts, split_held_out
from eda.training.data.regenerate import RegenerationConfig
from eda.training.data.samples import SAMPLES_FILE, Sample, read_samples
from eda.training.data.self_prompts import SelfPromptConfig, write_own_prompts
from eda.training.evaluate import EvaluationConfig
from eda.training.progress import OnProgress, ProgressEvent, ShouldStop, StageStoppedError

_OWN_PROMPTS_SHARE = 0.3
"""Of the stage in which the fine-tune writes its prompts; what it does with them comes after."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class AdaptationDefaults:
    """What is done where a request leaves the choice open.

    Attributes:
        max_prompts: prompts that are answered for training.
        held_out: prompts to measure with, at most a fifth of all.
        num_triage: held-out prompts that triage looks at.
        keep: share of the answers that is learned from.
        cache_bytes: memory for keys and values while answering; it bounds the batch.
    """

    max_prompts: int = 2000
    held_out: int = 32
    num_triage: int = 16
    keep: float = 0.5
    max_prompt_tokens: int = 512
    evaluation_tokens: int = 128
    batch_size: int = 32
    cache_bytes: int = 1 << 30


@dataclass(frozen=True, slots=True, eq=False)
class StageModels:
    """The models of one job. ``draft`` decodes in the target's type; ``training_draft`` is float32."""

    base: TargetModel
    fine_tune: FineTune
    draft: DraftModel
    training_draft: DraftModel
    chat: ChatFormat

    @classmethod
    def load(
        cls,
        spec: AdaptationSpec,
        target: Path,
        draft: Path,
        *,
        device: str = "auto",
        weights: WeightSetting = "auto",
    ) -> Self:
        """With the server's ``weights``, since features and answers must be those that it serves.

        Raises ``CheckpointError``, or ``MismatchError`` when the fine-tune is not the one that was posted."""
        place = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        base = load_target(target, weights=weights, device=place)
        path = Path(spec.fine_tune_path)
        is_base = spec.kind == "target"
        fine_tune = FineTune(spec.adapter, base) if is_base else load_fine_tune(path, base, spec.adapter)
        if fine_tune.fingerprint != spec.fine_tune_fingerprint:
            raise MismatchError(
                f"{path} holds other weights now than when the job was posted; delete the adapter and post it again"
            )
        return cls(
            base,
            fine_tune,
            DraftModel.load(draft, dtype=base.dtype, device=place),
            DraftModel.load(draft, dtype=torch.float32, device=place),
            ChatFormat.of_fine_tune(fine_tune, target, render=TemplateRenderer().render),
        )


@dataclass(frozen=True, slots=True)
class JobPrompts:
    """The prompts of a job.

    Attributes:
        training, held_out: to learn from and to measure with.
        answers: by prompt, where the data brought them along; ``None`` when the fine-tune is to answer.
    """

    training: list[Prompt]
    held_out: list[Prompt]
    answers: Mapping[str, Sample] | None


class StageJob:
    """What the stages of one job share; made once, whichever stage is the first one that is left to do.

    Args:
        permit: called right before a version becomes visible; raises when it must not.
    """

    def __init__(
        self,
        spec: AdaptationSpec,
        models: StageModels,
        store: AdapterStore,
        *,
        permit: Callable[[], None] = lambda: None,
        defaults: AdaptationDefaults | None = None,
    ) -> None:
        self.spec = spec
        self.models = models
        self.store = store
        self.permit = permit
        self.defaults = defaults or AdaptationDefaults()
        self._prompts: JobPrompts | None = None
        self._begun: dict[str, float] = {}

    @cached_property
    def regeneration(self) -> RegenerationConfig:
        """How prompts are answered. Raises ``DataError`` when the answers leave no room for prompts."""
        options, defaults = self.spec.training, self.defaults
        config = RegenerationConfig(seed=options.seed)
        positions = self.models.fine_tune.model.config.max_position_embeddings
        # Half of a short model's positions are left to prompts; a request that says otherwise was checked when it came.
        max_tokens = options.max_tokens or min(config.max_tokens, max(1, (positions - DRAFT_ROOM) // 2))
        room = positions - max_tokens - DRAFT_ROOM
        if room < 1:
            raise DataError(
                f"training.max_tokens is {max_tokens}; the model's {positions} positions "
                "leave no room for prompts"
            )
        prompt_tokens = min(defaults.max_prompt_tokens, room)
        per_slot = SpeculativeDecoder.bytes_per_slot(self.models.base, self.models.draft)
        fitting = defaults.cache_bytes // (per_slot * (max_tokens + prompt_tokens + DRAFT_ROOM))
        return replace(
            config,
            max_tokens=max_tokens,
            max_prompt_tokens=prompt_tokens,
            batch_size=max(1, min(defaults.batch_size, fitting)),
        )

    def new_decoder(self) -> SpeculativeDecoder:
        """One for the base and the fine-tune: caches depend on sizes, which they share.

        A stage makes its own: it draws the same whether or not the stages before ran in this process, and no cache
        takes memory while the next ones train.
        """
        slots = max(self.regeneration.num_slots, EvaluationConfig().num_slots) + 64
        return SpeculativeDecoder.for_models(self.models.base, self.models.draft, num_slots=slots, seed=0)

    def prompts(self, context: StageContext) -> JobPrompts:
        """The same in every stage. The first one that asks waits while the fine-tune writes them, if it is to.

        Raises ``DataError`` when there are too few.
        """
        if self._prompts is None:
            self._prompts = self._read_prompts(context)
        return self._prompts

    def run(
        self,
        context: StageContext,
        compute: Callable[[OnProgress, ShouldStop], T],
        *,
        before: int = 0,
        total: int | None = None,
        end: float = 1.0,
    ) -> T:
        """Runs a function of ``eda.training`` with its reports and stops translated.

        Args:
            before, total: units that were done before it, and in all, when it does a part of them.
            end: share of the stage that is done after it.
        """
        begun, reported = self._begun.get(context.stage, 0.0), False

        def report(event: ProgressEvent) -> None:
            nonlocal reported
            reported = True
            context.progress(before + event.done, total or event.total, event.message, (begun, end))
            if event.metrics:
                context.metric(**event.metrics)

        try:
            result = compute(report, context.should_stop)
        except StageStoppedError as error:
            raise JobInterruptedError(str(error)) from error
        if reported and end < 1.0:
            self._begun[context.stage] = end
        return result

    def _read_prompts(self, context: StageContext) -> JobPrompts:
        kind, answers = self.spec.data.kind, None
        if kind == "traffic":
            answers = usable_records(read_samples(context.workspace / SAMPLES_FILE))
            prompts = recorded_prompts(answers.values())
        elif kind == "prompts":
            prompts = read_prompts(context.workspace / PROMPTS_FILE)
        else:
            prompts = self._own_prompts(context)
        options, defaults = self.spec.training, self.defaults
        held_out = options.held_out or min(defaults.held_out, max(1, len(prompts) // 5))
        limit = options.max_prompts or defaults.max_prompts
        return JobPrompts(*split_held_out(prompts, held_out, seed=options.seed, limit=limit), answers)

    def _own_prompts(self, context: StageContext) -> list[Prompt]:
        config = SelfPromptConfig(batch_size=self.regeneration.batch_size, seed=self.spec.training.seed)
        return self.run(
            context,
            lambda progress, stop: write_own_prompts(
                self.new_decoder(),
                self.models.fine_tune,
                self.models.chat,
                self.spec.data.count,
                context.workspace / "self",
                config,
                on_progress=progress,
                should_stop=stop,
            ),
            end=_OWN_PROMPTS_SHARE,
        )
