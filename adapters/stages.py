"""The stages of an adaptation as ``eda.training`` computes them, over one job's workspace."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Self

import torch

from adapters.claims import Claim
from adapters.errors import AdapterServiceError
from adapters.loading import load_private_module
from adapters.manifest import Manifest
from adapters.pipeline import Result, StageContext
from adapters.recorded import RecordedPrompts
from adapters.stage_job import AdaptationDefaults, StageJob, StageModels
from adapters.store import AdapterStore
from adapters.worker_process import WorkerSettings
from eda.errors import DataError
from eda.files import PRIVATE_WEIGHTS_FILE
from eda.private import PrivateConfig, PrivateModule
from eda.target import FineTune
from eda.training.evaluate import PLAIN, EvaluationConfig, Measurement, Variant, evaluate
from eda.training.files import provenance
from eda.training.private_module import PrivateTrainingConfig, train_private_module
from eda.training.prompts import Prompt
from eda.training.regenerate import RegenerationConfig, regenerate
from eda.training.samples import SAMPLES_FILE, Sample, read_samples, write_samples
from eda.training.selection import DEFAULT_SCORE, Score, score_samples, select
from eda.training.trainees import private_share
from eda.training.trainer import TrainingConfig
from eda.training.triage import triage

SHARED = "shared"
PRIVATE = "private"
INCUMBENT = "incumbent"


class TrainingStages:
    """``AdaptationStages`` over ``eda.training``.

    Args:
        permit: called right before a version becomes visible; raises when it must not.
    """

    def __init__(
        self,
        models: StageModels,
        store: AdapterStore,
        *,
        permit: Callable[[], None] = lambda: None,
        defaults: AdaptationDefaults | None = None,
    ) -> None:
        self._models = models
        self._store = store
        self._permit = permit
        self._defaults = defaults or AdaptationDefaults()

    @classmethod
    def for_claim(cls, settings: WorkerSettings, claim: Claim) -> Self:
        """The stages of a worker's job."""
        threads = settings.num_threads or max(1, (torch.get_num_threads() + 1) // 2)
        torch.set_num_threads(threads)
        models = StageModels.load(
            claim.spec,
            Path(settings.target),
            Path(settings.draft),
            device=settings.device,
            dtype=settings.dtype,
        )
        store = AdapterStore(settings.store_directory, [Path(path) for path in settings.bundled_adapters])
        return cls(models, store, permit=claim.require_permission_to_publish)

    # --- the stages ---

    def triage(self, context: StageContext) -> Result:
        """Measures how much of its acceptance the shared draft keeps on the fine-tune."""
        job = StageJob(context, self._models, self._defaults)
        if self._models.fine_tune.lora is None and self._models.fine_tune.model is self._models.base:
            return {
                "worthwhile": True,
                "reason": "the base itself is adapted to a domain; there is no shift to measure",
            }
        _, held_out = job.prompts
        report = job.run(
            lambda progress, stop: triage(
                FineTune("base", self._models.base),
                self._models.fine_tune,
                self._models.training_draft,
                job.decoder,
                job.decoder,
                held_out[: self._defaults.num_triage],
                job.chat,
                context.workspace / "triage",
                replace(job.regeneration, sampled_share=0.0),
                on_progress=progress,
                should_stop=stop,
            )
        )
        return asdict(report)

    def regenerate(self, context: StageContext) -> Result:
        """The fine-tune answers the prompts; recorded traffic holds its answers already."""
        job = StageJob(context, self._models, self._defaults)
        training, held_out = job.prompts
        answers: Sequence[Sample]
        num_prompts, num_answered = len(training) + len(held_out), len(training)
        if isinstance(job.chat, RecordedPrompts):
            answers = [job.chat.samples[prompt.id] for prompt in training]
            num_prompts, num_answered = len(held_out), 0
            report: Result = {"num_samples": len(answers), "source": "recorded traffic"}
        else:
            answers, made = self._answer(job, training, "regenerate", job.regeneration, total=num_prompts)
            report = asdict(made)
        greedy = replace(job.regeneration, sampled_share=0.0)
        self._answer(job, held_out, "held_out", greedy, before=num_answered, total=num_prompts)
        write_samples(context.workspace / "training.jsonl", answers)
        return report

    def select(self, context: StageContext) -> Result:
        """Keeps the answers that teach most."""
        job, options = StageJob(context, self._models, self._defaults), context.spec.training
        samples = read_samples(context.workspace / "training.jsonl")
        score: Score = options.score or DEFAULT_SCORE  # type: ignore[assignment]  # checked when the job was posted
        keep = self._defaults.keep if options.keep is None else options.keep
        scores = job.run(
            lambda progress, stop: score_samples(
                FineTune("base", self._models.base),
                self._models.fine_tune,
                self._models.training_draft,
                samples,
                (score,),
                seed=options.seed,
                on_progress=progress,
                should_stop=stop,
            )
        )
        selection = select(samples, scores[score], keep)
        write_samples(context.workspace / "selected.jsonl", selection.samples)
        return {
            "score": score,
            "keep": keep,
            "num_kept": len(selection.samples),
            "num_candidates": selection.num_candidates,
            "kept_tokens": selection.kept_tokens,
            "candidate_tokens": selection.candidate_tokens,
        }

    def train(self, context: StageContext) -> Result:
        """Trains the private module and writes it in bfloat16, as it will be served."""
        job, options = StageJob(context, self._models, self._defaults), context.spec.training
        default = TrainingConfig()
        training = replace(
            default,
            num_steps=options.num_steps,
            batch_size=options.batch_size or default.batch_size,
            learning_rate=options.learning_rate or default.learning_rate,
            seed=options.seed,
        )
        config = PrivateTrainingConfig(
            intermediate_size=options.intermediate_size,
            fc_rank=options.fc_rank,
            attention_rank=options.attention_rank,
            training=training,
        )
        directory = context.workspace / "train"
        directory.mkdir(exist_ok=True)
        module, report = job.run(
            lambda progress, stop: train_private_module(
                self._models.fine_tune,
                self._models.training_draft,
                read_samples(context.workspace / "selected.jsonl"),
                read_samples(context.workspace / "held_out" / SAMPLES_FILE),
                directory,
                config,
                on_progress=progress,
                should_stop=stop,
            )
        )
        module.to(torch.bfloat16).save(context.workspace / PRIVATE_WEIGHTS_FILE)
        summary = {name: value for name, value in asdict(report).items() if name != "history"}
        return {
            **summary,
            "sizes": asdict(module.config),
            "share_of_draft": private_share(module, self._models.draft),
        }

    def evaluate(self, context: StageContext) -> Result:
        """Decodes held-out prompts without a draft, with the shared one, with the module and with what is active."""
        job, defaults = StageJob(context, self._models, self._defaults), self._defaults
        _, held_out = job.prompts
        module = self._module(context)
        variants = {
            PLAIN: Variant(job.decoder, speculates=False),
            SHARED: Variant(job.decoder),
            PRIVATE: Variant(job.decoder, module),
        }
        if (incumbent := self._incumbent(context)) is not None:
            variants[INCUMBENT] = Variant(job.decoder, incumbent)
        tokens = min(defaults.evaluation_tokens, job.regeneration.max_tokens)
        config = EvaluationConfig(max_tokens=tokens, max_prompt_tokens=job.regeneration.max_prompt_tokens)
        measured = job.run(
            lambda progress, stop: evaluate(
                self._models.fine_tune,
                variants,
                held_out,
                job.chat,
                config,
                output=context.workspace / "evaluate.json",
                on_progress=progress,
                should_stop=stop,
            )
        )
        if not measured[PRIVATE]:
            raise DataError("no held-out prompt is short enough to measure with")
        incumbent_metrics = _summary(measured[INCUMBENT]) if INCUMBENT in measured else None
        return {
            "plain": _summary(measured[PLAIN]),
            "before": _summary(measured[SHARED]),
            "after": _summary(measured[PRIVATE]),
            "incumbent": incumbent_metrics,
        }

    def publish(self, context: StageContext) -> Result:
        """Adds the version to the store, once and for all."""
        spec, made = context.spec, provenance()
        options = {name: value for name, value in asdict(spec.training).items() if value is not None}
        manifest = Manifest(
            name=spec.adapter,
            version=0,
            created=made["created"],
            target_fingerprint=self._models.base.fingerprint,
            fine_tune_fingerprint=spec.fine_tune_fingerprint,
            draft_fingerprint=self._models.draft.fingerprint(),
            sizes=context.results["train"]["sizes"],
            weights_bytes=0,
            weights_sha256="",
            provenance={
                **made,
                "job_id": spec.job_id,
                "data": asdict(spec.data),
                "options": options,
                **{stage: context.results[stage] for stage in ("triage", "regenerate", "select", "train")},
            },
            metrics=context.results["evaluate"],
        )
        published = self._store.publish(
            context.workspace / PRIVATE_WEIGHTS_FILE, manifest, permit=self._permit
        )
        return {"version": published.version}

    # --- inside ---

    def _answer(
        self,
        job: StageJob,
        prompts: Sequence[Prompt],
        directory: str,
        config: RegenerationConfig,
        *,
        before: int = 0,
        total: int,
    ) -> tuple[list[Sample], Any]:
        return job.run(
            lambda progress, stop: regenerate(
                job.decoder,
                self._models.fine_tune,
                prompts,
                job.chat,
                job.context.workspace / directory,
                config,
                on_progress=progress,
                should_stop=stop,
            ),
            before=before,
            total=total,
        )

    def _module(self, context: StageContext) -> PrivateModule:
        sizes = context.results["train"]["sizes"]
        config = PrivateConfig(**sizes)
        weight = self._models.draft.fc.weight
        path = context.workspace / PRIVATE_WEIGHTS_FILE
        return PrivateModule.load(path, config, dtype=weight.dtype, device=weight.device)

    def _incumbent(self, context: StageContext) -> PrivateModule | None:
        spec = context.spec
        if spec.incumbent_version is None:
            return None
        try:
            manifest = self._store.verify(spec.adapter, spec.incumbent_version)
            directory = self._store.directory(spec.adapter, spec.incumbent_version)
            return load_private_module(directory, manifest, self._models.draft)
        except AdapterServiceError as error:
            context.message(f"the active version cannot be measured: {error}")
            return None


def _summary(measured: dict[str, Measurement]) -> Result:
    """The greedy figures, and those at other temperatures under "by_temperature"."""
    first = next(iter(measured.values()))
    by_temperature = {temperature: asdict(figures) for temperature, figures in measured.items()}
    return {
        "mean_acceptance_length": first.mean_acceptance_length,
        "tokens_per_second": first.tokens_per_second,
        "speed_up": first.speed_up,
        "by_temperature": by_temperature,
    }
