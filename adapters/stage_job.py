"""What the stages of one job share: its models, its prompts, a decoder, and how reports and stops are passed on."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Self, TypeVar

import torch

from adapters.errors import JobInterruptedError
from adapters.pipeline import StageContext
from adapters.recorded import RecordedPrompts
from adapters.spec import DRAFT_ROOM, AdaptationSpec
from adapters.template_renderer import TemplateRenderer
from adapters.workspaces import PROMPTS_FILE
from eda.draft import DraftModel
from eda.errors import DataError, MismatchError
from eda.speculative import SpeculativeDecoder
from eda.target import FineTune, TargetModel, load_fine_tune
from eda.training.evaluate import EvaluationConfig
from eda.training.progress import OnProgress, ProgressEvent, StageStoppedError
from eda.training.prompts import ChatFormat, Prompt, read_prompts, split_held_out
from eda.training.regenerate import RegenerationConfig
from eda.training.samples import SAMPLES_FILE, read_samples
from eda.training.self_prompts import SelfPromptConfig, write_own_prompts

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
        cls, spec: AdaptationSpec, target: Path, draft: Path, *, device: str = "auto", dtype: str = "auto"
    ) -> Self:
        """Raises ``CheckpointError``, or ``MismatchError`` when the fine-tune is not the one that was posted."""
        place = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        wanted = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]
        base = TargetModel.load(target, dtype=wanted, device=place)
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


class StageJob:
    """What the stages of one job share; made anew for each stage, since a stage may be the first after a crash."""

    def __init__(self, context: StageContext, models: StageModels, defaults: AdaptationDefaults) -> None:
        self.context = context
        self._models = models
        self._defaults = defaults
        self._begun = 0.0
        options, model = context.spec.training, models.fine_tune.model
        config = RegenerationConfig(seed=options.seed)
        positions = model.config.max_position_embeddings
        # Half of a short model's positions are left to prompts; a request that says otherwise was checked when it came.
        max_tokens = options.max_tokens or min(config.max_tokens, max(1, (positions - DRAFT_ROOM) // 2))
        room = positions - max_tokens - DRAFT_ROOM
        if room < 1:
            raise DataError(
                f"training.max_tokens is {max_tokens}; the model's {positions} positions "
                "leave no room for prompts"
            )
        prompt_tokens = min(defaults.max_prompt_tokens, room)
        per_slot = SpeculativeDecoder.bytes_per_slot(models.base, models.draft)
        fitting = defaults.cache_bytes // (per_slot * (max_tokens + prompt_tokens + DRAFT_ROOM))
        self.regeneration = replace(
            config,
            max_tokens=max_tokens,
            max_prompt_tokens=prompt_tokens,
            batch_size=max(1, min(defaults.batch_size, fitting)),
        )

    def run(
        self,
        compute: Callable[[OnProgress, Callable[[], bool]], T],
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
        context, begun, reported = self.context, self._begun, False

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
            self._begun = end
        return result

    @cached_property
    def decoder(self) -> SpeculativeDecoder:
        """One for the base and the fine-tune: caches depend on sizes, which they share."""
        slots = max(self.regeneration.num_slots, EvaluationConfig().num_slots) + 64
        return SpeculativeDecoder(self._models.base, self._models.draft, num_slots=slots, seed=0)

    @cached_property
    def chat(self) -> ChatFormat:
        if self.context.spec.data.kind != "traffic":
            return self._models.chat
        return RecordedPrompts.of(self._models.chat, read_samples(self.context.workspace / SAMPLES_FILE))

    @cached_property
    def prompts(self) -> tuple[list[Prompt], list[Prompt]]:
        """Prompts to train on and to measure with; the same in every stage."""
        spec, defaults = self.context.spec, self._defaults
        options = spec.training
        everything = self._all_prompts()
        held_out = options.held_out or min(defaults.held_out, max(1, len(everything) // 5))
        return split_held_out(
            everything, held_out, seed=options.seed, limit=options.max_prompts or defaults.max_prompts
        )

    def _all_prompts(self) -> list[Prompt]:
        spec, workspace = self.context.spec, self.context.workspace
        if isinstance(self.chat, RecordedPrompts):
            return self.chat.prompts
        if spec.data.kind == "prompts":
            return read_prompts(workspace / PROMPTS_FILE)
        config = SelfPromptConfig(batch_size=self.regeneration.batch_size, seed=spec.training.seed)
        return self.run(
            lambda progress, stop: write_own_prompts(
                self.decoder,
                self._models.fine_tune,
                self.chat,
                spec.data.count,
                workspace / "self",
                config,
                on_progress=progress,
                should_stop=stop,
            ),
            end=_OWN_PROMPTS_SHARE,
        )
