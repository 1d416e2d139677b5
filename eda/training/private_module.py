"""Stage 2: the private module of one fine-tune. The shared draft stays as it is, bit for bit."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from safetensors import SafetensorError

from eda.errors import TrainingError
from eda.files import PRIVATE_WEIGHTS_FILE
from eda.models.draft import DraftModel
from eda.models.fine_tune import FineTune
from eda.models.private import PrivateModule
from eda.training.data.dataset import Dataset
from eda.training.data.samples import Sample
from eda.training.data.target_states import DEFAULT_MEMORY_BYTES, StateCache
from eda.training.files import hash_of_json, provenance, write_json
from eda.training.learning.trainees import private_trainee
from eda.training.learning.trainer import TrainingConfig, TrainingReport, train
from eda.training.progress import OnProgress, ShouldStop, ignore_progress, never_stop

REPORT_FILE = "train.json"
CHECKPOINT_FILE = "checkpoint.safetensors"


@dataclass(frozen=True, slots=True)
class PrivateTrainingConfig:
    """How a private module is made.

    Attributes:
        intermediate_size: width; ``None`` takes a quarter of the shared network's.
        fc_rank, attention_rank: ranks of the corrections of ``fc`` and of attention; ``None`` takes an eighth of the
            draft's width, 0 leaves them out.
        memory_bytes: for cached target states.
    """

    intermediate_size: int | None = None
    fc_rank: int | None = None
    attention_rank: int | None = None
    memory_bytes: int = DEFAULT_MEMORY_BYTES
    training: TrainingConfig = field(default_factory=TrainingConfig)


def train_private_module(
    fine_tune: FineTune,
    draft: DraftModel,
    samples: Sequence[Sample],
    held_out: Sequence[Sample],
    directory: Path,
    config: PrivateTrainingConfig,
    *,
    on_progress: OnProgress = ignore_progress,
    should_stop: ShouldStop = never_stop,
) -> tuple[PrivateModule, TrainingReport]:
    """Trains on ``samples`` and writes ``private.safetensors`` and ``train.json`` into ``directory``.

    Args:
        held_out: greedy answers of ``fine_tune`` to other prompts; they choose the best state.

    Raises like ``train``. An interrupted call goes on from its checkpoint.
    """
    rank = draft.config.hidden_size // 8
    sizes = draft.config.private_config(
        draft.config.intermediate_size // 4 if config.intermediate_size is None else config.intermediate_size,
        rank if config.fc_rank is None else config.fc_rank,
        rank if config.attention_rank is None else config.attention_rank,
    )
    private = PrivateModule.initialised(sizes, seed=config.training.seed).to(draft.fc.weight.device)
    trainee = private_trainee(draft, private)
    report = train(
        trainee,
        Dataset(StateCache(fine_tune, samples, draft.config.tap_layers, memory_bytes=config.memory_bytes)),
        Dataset(StateCache(fine_tune, held_out, draft.config.tap_layers, memory_bytes=config.memory_bytes)),
        config.training,
        checkpoint=directory / CHECKPOINT_FILE,
        on_progress=on_progress,
        should_stop=should_stop,
    )
    private.requires_grad_(False)
    temporary = directory / f".{PRIVATE_WEIGHTS_FILE}"
    try:
        private.save(temporary)
        temporary.replace(directory / PRIVATE_WEIGHTS_FILE)
    except (OSError, SafetensorError) as error:
        raise TrainingError(f"{directory / PRIVATE_WEIGHTS_FILE} cannot be written: {error}") from error
    document = {
        **provenance(),
        "config": asdict(config),
        "sizes": asdict(sizes),
        "data_hash": hash_of_json([[s.id, s.prompt_ids, s.response_ids] for s in samples]),
        "draft": draft.fingerprint(),
        "fine_tune": fine_tune.fingerprint,
        "num_samples": len(samples),
        "num_tokens": sum(sample.num_roots for sample in samples),
        "share_of_draft": trainee.share_of_draft,
        "report": {**asdict(report), "history": list(report.history)},
    }
    write_json(directory / REPORT_FILE, document)
    return private, report
