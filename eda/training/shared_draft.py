"""Stage 1: the shared draft of a target, trained on the target's own answers and, optionally, on texts."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from eda.decoder import SpeculativeDecoder
from eda.errors import TrainingError
from eda.formats.checkpoint_files import CONFIG_FILE, WEIGHTS_FILE
from eda.models.draft import DraftConfig, DraftModel
from eda.models.fine_tune import FineTune
from eda.models.target import TargetModel, default_tap_layers
from eda.training.data.dataset import Dataset
from eda.training.data.prompts import ChatFormat, Prompt, split_held_out
from eda.training.data.regenerate import RegenerationConfig, regenerate
from eda.training.data.samples import Sample
from eda.training.data.target_states import DEFAULT_MEMORY_BYTES, StateCache
from eda.training.data.vocabulary import choose_draft_vocabulary
from eda.training.files import hash_of_json, provenance
from eda.training.learning.trainees import shared_trainee
from eda.training.learning.trainer import TrainingConfig, TrainingReport, train
from eda.training.progress import OnProgress, ShouldStop, ignore_progress, never_stop

CHECKPOINT_FILE = "checkpoint.safetensors"


@dataclass(frozen=True, slots=True)
class SharedDraftConfig:
    """How the shared draft is made.

    Attributes:
        draft_vocab_size: tokens that the draft can propose; ``None`` takes half of the target's, at most 32,000.
        intermediate_size: width of the shared feed-forward network; ``None`` takes the target's.
        num_prompts: prompts used, at most; ``held_out`` further ones measure the draft.
        text_tokens: length that texts are cut to.
        memory_bytes: for cached target states.
    """

    draft_vocab_size: int | None = None
    intermediate_size: int | None = None
    num_prompts: int = 1500
    held_out: int = 64
    text_tokens: int = 256
    memory_bytes: int = DEFAULT_MEMORY_BYTES
    regeneration: RegenerationConfig = field(default_factory=RegenerationConfig)
    training: TrainingConfig = field(default_factory=lambda: TrainingConfig(epochs=4.0))
    seed: int = 0


def draft_config_for(
    target: TargetModel, draft_vocab_size: int | None = None, intermediate_size: int | None = None
) -> DraftConfig:
    """Sizes of a draft for ``target``: its widths and heads, one layer, half of its vocabulary."""
    sizes = target.config
    return DraftConfig(
        hidden_size=sizes.hidden_size,
        intermediate_size=intermediate_size or sizes.intermediate_size,
        num_heads=sizes.num_heads,
        num_kv_heads=sizes.num_kv_heads,
        head_dim=sizes.head_dim,
        tap_layers=default_tap_layers(sizes.num_layers),
        vocab_size=sizes.vocab_size,
        draft_vocab_size=draft_vocab_size or min(32_000, (sizes.vocab_size + 1) // 2),
        max_position_embeddings=sizes.max_position_embeddings,
        rope_theta=sizes.rope.theta,
        rms_norm_eps=sizes.rms_norm_eps,
        target_fingerprint=target.fingerprint,
    )


def train_shared_draft(
    target: TargetModel,
    chat: ChatFormat,
    prompts: Sequence[Prompt],
    directory: Path,
    config: SharedDraftConfig,
    *,
    texts: Sequence[str] = (),
    vocabulary_texts: Sequence[str] = (),
    on_progress: OnProgress = ignore_progress,
    should_stop: ShouldStop = never_stop,
) -> tuple[DraftModel, TrainingReport]:
    """Trains a draft for ``target`` and writes it to ``directory``; an interrupted call goes on from its files there.

    Args:
        texts: to learn from as they are, with the target's soft labels.
        vocabulary_texts: texts whose tokens count when the draft vocabulary is chosen, and that are not learned from.

    Raises:
        DataError: too few prompts. TrainingError: see ``train``. StageStoppedError: ``should_stop`` said so.
    """
    base = FineTune("base", target)
    decoder = SpeculativeDecoder.for_models(target, num_slots=config.regeneration.num_slots)
    training_prompts, held_out_prompts = split_held_out(
        prompts, config.held_out, seed=config.seed, limit=config.num_prompts
    )
    work = directory / "training"
    greedy = replace(config.regeneration, sampled_share=0.0)
    held_out, _ = regenerate(
        decoder,
        base,
        held_out_prompts,
        chat,
        work / "held-out",
        greedy,
        on_progress=on_progress,
        should_stop=should_stop,
    )
    samples, regeneration = regenerate(
        decoder,
        base,
        training_prompts,
        chat,
        work / "samples",
        config.regeneration,
        on_progress=on_progress,
        should_stop=should_stop,
    )
    samples += text_samples(chat, texts, config.text_tokens)
    sizes = draft_config_for(target, config.draft_vocab_size, config.intermediate_size)
    vocabulary = choose_draft_vocabulary(
        samples,
        sizes.vocab_size,
        sizes.draft_vocab_size,
        always=chat.eos_ids,
        extra_texts=[chat.text_ids(text) for text in vocabulary_texts],
    )
    draft = DraftModel.initialised(sizes, vocabulary.token_ids, seed=config.seed).to(target.device)
    report = train(
        shared_trainee(draft),
        Dataset(StateCache(base, samples, draft.config.tap_layers, memory_bytes=config.memory_bytes)),
        Dataset(StateCache(base, held_out, draft.config.tap_layers, memory_bytes=config.memory_bytes)),
        config.training,
        checkpoint=work / CHECKPOINT_FILE,
        on_progress=on_progress,
        should_stop=should_stop,
    )
    draft.requires_grad_(False)
    _save(
        draft,
        directory,
        {
            **provenance(),
            "config": asdict(config),
            "data_hash": hash_of_json([[s.id, s.prompt_ids, s.response_ids] for s in samples]),
            "target_fingerprint": target.fingerprint,
            "num_samples": len(samples),
            "regeneration": asdict(regeneration),
            "vocabulary_coverage": vocabulary.coverage,
            "training": {**asdict(report), "history": list(report.history)},
        },
    )
    return draft, report


def _save(draft: DraftModel, directory: Path, metadata: dict[str, Any]) -> None:
    """Writes into a directory beside the files first: a draft is complete when its ``config.json`` is there."""
    temporary = directory / ".unfinished"
    try:
        draft.save(temporary, metadata)
        for name in (WEIGHTS_FILE, CONFIG_FILE):
            (temporary / name).replace(directory / name)
        temporary.rmdir()
    except (OSError, SafetensorError) as error:
        raise TrainingError(f"the draft cannot be written to {directory}: {error}") from error


def text_samples(chat: ChatFormat, texts: Sequence[str], max_tokens: int) -> list[Sample]:
    """Texts as samples whose "prompt" is their first token: the draft learns to continue from there on."""
    samples = []
    for number, text in enumerate(texts):
        ids = chat.text_ids(text)[:max_tokens]
        if len(ids) > 2:
            samples.append(Sample(f"text-{number}", tuple(ids[:1]), tuple(ids[1:]), 0.0, "length"))
    return samples
