"""The stages of an adaptation as ``eda.training`` computes them, over one job's workspace.

To add a stage, derive from ``TrainingStage`` and give it a place in ``STAGES``.
"""

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch

from eda.adapters.errors import AdapterServiceError
from eda.adapters.jobs.claims import Claim
from eda.adapters.jobs.pipeline import Result, Stage, StageContext
from eda.adapters.serving.model_loader import load_private_module
from eda.adapters.store.manifest import Manifest
from eda.adapters.store.store import AdapterStore
from eda.adapters.worker.settings import WorkerSettings
from eda.adapters.worker.stage_job import StageJob, StageModels
from eda.decoder import SpeculativeDecoder
from eda.errors import DataError
from eda.files import PRIVATE_WEIGHTS_FILE
from eda.models.fine_tune import FineTune
from eda.models.private import PrivateConfig, PrivateModule
from eda.training.data.prompts import Prompt
from eda.training.data.regenerate import RegenerationConfig, RegenerationReport, regenerate
from eda.training.data.samples import SAMPLES_FILE, Sample, read_samples, write_samples
from eda.training.data.scores import DEFAULT_SCORE, Score
from eda.training.data.selection import score_samples, select
from eda.training.evaluate import PLAIN, EvaluationConfig, Variant, VariantMeasurement, evaluate
from eda.training.files import provenance
from eda.training.learning.trainees import private_share
from eda.training.learning.trainer import TrainingConfig
from eda.training.private_module import PrivateTrainingConfig, train_private_module
from eda.training.triage import TriageConfig, triage

TRAINING_FILE = "training.jsonl"
SELECTED_FILE = "selected.jsonl"
HELD_OUT = "held_out"
SHARED = "shared"
PRIVATE = "private"
INCUMBENT = "incumbent"


class TrainingStage(Stage):
    """A stage over what the stages of its job share."""

    def __init__(self, job: StageJob) -> None:
        self.job = job


class Triage(TrainingStage):
    """Measures how much of its acceptance the shared draft keeps on the fine-tune."""

    name = "triage"
    weight = 0.05

    def skip(self, context: StageContext) -> Result | None:
        return None if context.spec.triage else {"worthwhile": True, "reason": "not asked for"}

    def run(self, context: StageContext) -> Result:
        job, models = self.job, self.job.models
        if models.fine_tune.lora is None and models.fine_tune.model is models.base:
            return {
                "worthwhile": True,
                "reason": "the base itself is adapted to a domain; there is no shift to measure",
            }
        held_out = job.prompts(context).held_out
        report = job.run(
            context,
            lambda progress, stop: triage(
                FineTune("base", models.base),
                models.fine_tune,
                models.training_draft,
                job.new_decoder(),
                held_out[: job.defaults.num_triage],
                models.chat,
                context.workspace / "triage",
                TriageConfig(job.regeneration),
                on_progress=progress,
                should_stop=stop,
            ),
        )
        return asdict(report)

    def verdict(self, result: Result) -> str | None:
        return None if result.get("worthwhile", True) else str(result.get("reason", ""))


class Regenerate(TrainingStage):
    """The fine-tune answers the prompts; recorded traffic holds its answers already."""

    name = "regenerate"
    weight = 0.40

    def run(self, context: StageContext) -> Result:
        prompts, config = self.job.prompts(context), self.job.regeneration
        decoder, num_held_out = self.job.new_decoder(), len(prompts.held_out)
        answers: Sequence[Sample]
        if prompts.answers is None:
            num_answered = len(prompts.training)
            total = num_answered + num_held_out
            answers, made = self._answer(context, decoder, prompts.training, self.name, config, total=total)
            report: Result = asdict(made)
        else:
            num_answered, total = 0, num_held_out
            answers = [prompts.answers[prompt.id] for prompt in prompts.training]
            report = {"num_samples": len(answers), "source": "recorded traffic"}
        greedy = replace(config, sampled_share=0.0)
        self._answer(context, decoder, prompts.held_out, HELD_OUT, greedy, before=num_answered, total=total)
        write_samples(context.workspace / TRAINING_FILE, answers)
        return report

    def _answer(
        self,
        context: StageContext,
        decoder: SpeculativeDecoder,
        prompts: Sequence[Prompt],
        directory: str,
        config: RegenerationConfig,
        *,
        before: int = 0,
        total: int,
    ) -> tuple[list[Sample], RegenerationReport]:
        models = self.job.models
        return self.job.run(
            context,
            lambda progress, stop: regenerate(
                decoder,
                models.fine_tune,
                prompts,
                models.chat,
                context.workspace / directory,
                config,
                on_progress=progress,
                should_stop=stop,
            ),
            before=before,
            total=total,
        )


class Select(TrainingStage):
    """Keeps the answers that teach most."""

    name = "select"
    weight = 0.05

    def run(self, context: StageContext) -> Result:
        job, models, options = self.job, self.job.models, context.spec.training
        samples = read_samples(context.workspace / TRAINING_FILE)
        score: Score = options.score or DEFAULT_SCORE  # type: ignore[assignment]  # checked when the job was posted
        keep = job.defaults.keep if options.keep is None else options.keep
        scores = job.run(
            context,
            lambda progress, stop: score_samples(
                FineTune("base", models.base),
                models.fine_tune,
                models.training_draft,
                samples,
                (score,),
                seed=options.seed,
                on_progress=progress,
                should_stop=stop,
            ),
        )
        selection = select(samples, scores[score], keep)
        write_samples(context.workspace / SELECTED_FILE, selection.samples)
        return {
            "score": score,
            "keep": keep,
            "num_kept": len(selection.samples),
            "num_candidates": selection.num_candidates,
            "kept_tokens": selection.kept_tokens,
            "candidate_tokens": selection.candidate_tokens,
        }


class Train(TrainingStage):
    """Trains the private module and writes it in bfloat16, as it will be served."""

    name = "train"
    weight = 0.38

    def run(self, context: StageContext) -> Result:
        job, models, options = self.job, self.job.models, context.spec.training
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
            context,
            lambda progress, stop: train_private_module(
                models.fine_tune,
                models.training_draft,
                read_samples(context.workspace / SELECTED_FILE),
                read_samples(context.workspace / HELD_OUT / SAMPLES_FILE),
                directory,
                config,
                on_progress=progress,
                should_stop=stop,
            ),
        )
        module.to(torch.bfloat16).save(context.workspace / PRIVATE_WEIGHTS_FILE)
        summary = {name: value for name, value in asdict(report).items() if name != "history"}
        return {
            **summary,
            "sizes": asdict(module.config),
            "share_of_draft": private_share(module, models.draft),
        }


class Evaluate(TrainingStage):
    """Decodes held-out prompts without a draft, with the shared one, with the module and with what is active."""

    name = "evaluate"
    weight = 0.10

    def run(self, context: StageContext) -> Result:
        job, models = self.job, self.job.models
        held_out, decoder = job.prompts(context).held_out, job.new_decoder()
        variants = {
            PLAIN: Variant(decoder, speculates=False),
            SHARED: Variant(decoder),
            PRIVATE: Variant(decoder, self._module(context)),
        }
        if (incumbent := self._incumbent(context)) is not None:
            variants[INCUMBENT] = Variant(decoder, incumbent)
        tokens = min(job.defaults.evaluation_tokens, job.regeneration.max_tokens)
        config = EvaluationConfig(max_tokens=tokens, max_prompt_tokens=job.regeneration.max_prompt_tokens)
        measured = job.run(
            context,
            lambda progress, stop: evaluate(
                models.fine_tune,
                variants,
                held_out,
                models.chat,
                config,
                output=context.workspace / "evaluate.json",
                on_progress=progress,
                should_stop=stop,
            ),
        )
        if not measured[PRIVATE]:
            raise DataError("no held-out prompt is short enough to measure with")
        return {
            "plain": _summary(measured[PLAIN]),
            "before": _summary(measured[SHARED]),
            "after": _summary(measured[PRIVATE]),
            "incumbent": _summary(measured[INCUMBENT]) if INCUMBENT in measured else None,
        }

    def _module(self, context: StageContext) -> PrivateModule:
        config = PrivateConfig(**context.results["train"]["sizes"])
        weight = self.job.models.draft.fc.weight
        path = context.workspace / PRIVATE_WEIGHTS_FILE
        return PrivateModule.load(path, config, dtype=weight.dtype, device=weight.device)

    def _incumbent(self, context: StageContext) -> PrivateModule | None:
        spec, store = context.spec, self.job.store
        if spec.incumbent_version is None:
            return None
        try:
            manifest = store.verify(spec.adapter, spec.incumbent_version)
            directory = store.directory(spec.adapter, spec.incumbent_version)
            return load_private_module(directory, manifest, self.job.models.draft)
        except AdapterServiceError as error:
            context.message(f"the active version cannot be measured: {error}")
            return None


class Publish(TrainingStage):
    """Adds the version to the store, once and for all; it stays also when the job is told to stop right after."""

    name = "publish"
    weight = 0.02
    is_final = True

    def run(self, context: StageContext) -> Result:
        job, spec, made = self.job, context.spec, provenance()
        options = {name: value for name, value in asdict(spec.training).items() if value is not None}
        results = dict(context.results)
        metrics = results.pop("evaluate")
        manifest = Manifest(
            name=spec.adapter,
            version=0,
            created=made["created"],
            target_fingerprint=job.models.base.fingerprint,
            fine_tune_fingerprint=spec.fine_tune_fingerprint,
            draft_fingerprint=job.models.draft.fingerprint(),
            sizes=results["train"]["sizes"],
            weights_bytes=0,
            weights_sha256="",
            provenance={
                **made,
                "job_id": spec.job_id,
                "data": asdict(spec.data),
                "options": options,
                **results,
            },
            metrics=metrics,
        )
        published = job.store.publish(context.workspace / PRIVATE_WEIGHTS_FILE, manifest, permit=job.permit)
        return {"version": published.version}


STAGES: tuple[type[TrainingStage], ...] = (Triage, Regenerate, Select, Train, Evaluate, Publish)


def stages_of(job: StageJob) -> tuple[Stage, ...]:
    """The stages of one job, in their order."""
    return tuple(kind(job) for kind in STAGES)


def stages_for_claim(settings: WorkerSettings, claim: Claim) -> tuple[Stage, ...]:
    """The stages of a worker's job, with its models loaded. Raises like ``StageModels.load``."""
    threads = settings.num_threads or max(1, (torch.get_num_threads() + 1) // 2)
    torch.set_num_threads(threads)
    models = StageModels.load(
        claim.spec,
        Path(settings.target),
        Path(settings.draft),
        device=settings.device,
        weights=settings.weights,
    )
    store = AdapterStore(settings.store_directory, [Path(path) for path in settings.bundled_adapters])
    return stages_of(StageJob(claim.spec, models, store, permit=claim.require_permission_to_publish))


def _summary(measured: dict[str, VariantMeasurement]) -> Result:
    """The greedy figures, and those at other temperatures under "by_temperature"."""
    first = next(iter(measured.values()))
    by_temperature = {temperature: asdict(figures) for temperature, figures in measured.items()}
    return {
        "mean_acceptance_length": first.mean_acceptance_length,
        "tokens_per_second": first.tokens_per_second,
        "speed_up": first.speed_up,
        "by_temperature": by_temperature,
    }
