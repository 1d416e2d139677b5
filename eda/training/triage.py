"""Is a private module worth training? Measures how much of its acceptance the shared draft keeps on a fine-tune.

Most public fine-tunes shift little, and the shared draft serves them as well as the base.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from eda.decoder import SpeculativeDecoder
from eda.models.draft import DraftModel
from eda.models.fine_tune import FineTune
from eda.training.data.dataset import Dataset
from eda.training.data.prompts import ChatFormat, Prompt
from eda.training.data.regenerate import RegenerationConfig, regenerate
from eda.training.data.target_states import StateCache
from eda.training.files import provenance, write_json
from eda.training.learning.acceptance import simulate_acceptance
from eda.training.progress import OnProgress, ProgressEvent, ShouldStop, ignore_progress, never_stop


@dataclass(frozen=True, slots=True)
class TriageConfig:
    """How to measure.

    Attributes:
        answers: how both models answer; always greedily.
        threshold: below this share of the base's accepted draft tokens a private module is worth training.
    """

    answers: RegenerationConfig
    threshold: float = 0.95
    num_draft_tokens: int = 5


@dataclass(frozen=True, slots=True)
class TriageReport:
    """Simulated greedy acceptance lengths of the shared draft, each on the model's own answers to the same prompts.

    Attributes:
        retention: accepted draft tokens per target pass on the fine-tune over those on the base; above 1 when the
            fine-tune is easier to draft for than the base.
    """

    base_length: float
    fine_tune_length: float
    base_first_token: float
    fine_tune_first_token: float
    retention: float
    num_prompts: int
    worthwhile: bool
    reason: str


def triage(
    base: FineTune,
    fine_tune: FineTune,
    draft: DraftModel,
    decoder: SpeculativeDecoder,
    prompts: Sequence[Prompt],
    chat: ChatFormat,
    directory: Path,
    config: TriageConfig,
    *,
    on_progress: OnProgress = ignore_progress,
    should_stop: ShouldStop = never_stop,
) -> TriageReport:
    """Both models answer ``prompts`` greedily into ``directory``; the shared draft is measured on both.

    Args:
        decoder: of both models; its caches depend on sizes, which they share.

    Raises like ``regenerate``.
    """
    lengths: dict[str, tuple[float, float]] = {}
    answers = replace(config.answers, sampled_share=0.0)
    for place, (name, model) in enumerate((("base", base), ("fine-tune", fine_tune))):

        def report(event: ProgressEvent, place: int = place) -> None:
            on_progress(ProgressEvent("triage", place * event.total + event.done, 2 * event.total))

        samples, _ = regenerate(
            decoder,
            model,
            prompts,
            chat,
            directory / name,
            answers,
            on_progress=report,
            should_stop=should_stop,
        )
        measured = simulate_acceptance(
            draft,
            None,
            Dataset(StateCache(model, samples, draft.config.tap_layers, memory_bytes=0)),
            num_draft_tokens=config.num_draft_tokens,
            should_stop=should_stop,
        )
        lengths[name] = (measured.mean_length, measured.first_token)
    (base_length, base_first), (own_length, own_first) = lengths["base"], lengths["fine-tune"]
    retention = (own_length - 1.0) / (base_length - 1.0) if base_length > 1.0 else 1.0
    worthwhile = retention < config.threshold
    verdict = "a private module is worth training" if worthwhile else "a private module would gain little"
    outcome = TriageReport(
        base_length,
        own_length,
        base_first,
        own_first,
        retention,
        len(prompts),
        worthwhile,
        f"the shared draft keeps {retention:.0%} of its accepted tokens on this fine-tune (acceptance length "
        f"{own_length:.2f}, {base_length:.2f} on the base; threshold {config.threshold:.0%}): {verdict}",
    )
    write_json(directory / "triage.json", {"report": asdict(outcome), "provenance": provenance()})
    return outcome
