"""What a request to adapt must be before it becomes a job: fine-tune, prompts and the room for them, checked."""

import gzip
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, Literal

import psutil

from eda.adapters.errors import InvalidInputError, StorageFullError, TooLargeError
from eda.adapters.jobs.spec import (
    DEFAULT_MARGIN,
    DRAFT_ROOM,
    Activation,
    DataSpec,
    TargetKind,
    TrainingOptions,
)
from eda.adapters.jobs.workspaces import PROMPTS_FILE
from eda.adapters.serving.traffic import TrafficRecorder
from eda.adapters.store.files import MIB, require_free_space, sync_tree
from eda.adapters.store.names import AllowedRoots, check_hub_id
from eda.errors import DataError, EdaError
from eda.files import sha256_of_file
from eda.formats.checkpoint_files import ADAPTER_CONFIG_FILE, require_directory, resolve_directory
from eda.formats.preflight import check_fine_tune
from eda.training.data.prompts import read_prompts
from eda.training.data.samples import SAMPLES_FILE
from eda.training.data.scores import SCORES

MIN_PROMPTS = 2
"""One to learn from and one to measure with."""
MAX_SELF_PROMPTS = 100_000
_BYTES_PER_TOKEN = 12
"""Of a token id in a sample file, generously."""
_DEFAULT_MAX_TOKENS = 512
_GZIP_MAGIC = b"\x1f\x8b"
_CHUNK_BYTES = MIB
_TRAINING_BYTES = 64 * MIB
"""Room for checkpoints and the module itself."""
_FIELDS = {
    "prompts": "prompts",
    "path": "path",
    "upload": "file",
    "self_prompts": "self",
    "min_traffic": "traffic",
}
"""What requests call the fields of ``DataSource``."""


@dataclass(frozen=True, slots=True)
class TargetSource:
    """Where the fine-tune lies: a path below the allowed roots, or an id of the Hugging Face hub."""

    path: str | None = None
    hub_id: str | None = None
    kind: Literal["auto", "lora", "full"] = "auto"


@dataclass(frozen=True, slots=True)
class DataSource:
    """Where prompts come from; exactly one of the fields is set.

    Attributes:
        prompts: texts, or conversations as lists of ``{"role", "content"}``.
        path: of a JSON-lines file below the allowed roots, plain or gzip.
        upload: the contents of such a file.
        self_prompts: how many prompts the fine-tune is to write for itself.
        min_traffic: use the recorded traffic, which must have this many requests at least.
    """

    prompts: Sequence[Any] | None = None
    path: str | None = None
    upload: bytes | None = None
    self_prompts: int | None = None
    min_traffic: int | None = None

    def __post_init__(self) -> None:
        given = [field for name, field in _FIELDS.items() if getattr(self, name) is not None]
        if len(given) != 1:
            raise InvalidInputError(
                f"data gives {len(given)} sources ({', '.join(given) or 'none'}); "
                f"give exactly one of {', '.join(_FIELDS.values())}",
                param="data",
            )
        if self.self_prompts is not None and not MIN_PROMPTS <= self.self_prompts <= MAX_SELF_PROMPTS:
            raise InvalidInputError(
                f"data.self is {self.self_prompts}; it must be from {MIN_PROMPTS} to {MAX_SELF_PROMPTS}",
                param="data.self",
            )


@dataclass(frozen=True, slots=True)
class AdaptationOptions:
    """What an adaptation may be told beside its data; see ``AdaptationSpec``."""

    training: TrainingOptions = field(default_factory=TrainingOptions)
    triage: bool = True
    activate: Activation = "if_better"
    margin: float = DEFAULT_MARGIN

    def __post_init__(self) -> None:
        if not 0.0 <= self.margin <= 10.0:
            raise InvalidInputError(f"margin is {self.margin}; it must be from 0 to 10", param="margin")
        if self.training.score is not None and self.training.score not in SCORES:
            raise InvalidInputError(
                f"training.score is {self.training.score[:64]!r}; it must be one of {', '.join(SCORES)}",
                param="training.score",
            )


@dataclass(frozen=True, slots=True)
class DataLimits:
    """
    Attributes:
        max_bytes: of a prompt file.
        reserve_bytes: of the disk that stay free whatever is asked for.
        max_model_len: tokens that a prompt and its answer may have together; 0 when it is not known.
    """

    max_bytes: int = 256 * MIB
    reserve_bytes: int = 256 * MIB
    max_model_len: int = 0


def locate_fine_tune(
    source: TargetSource, roots: AllowedRoots, *, allow_hub: bool
) -> tuple[Path, TargetKind]:
    """The directory of a fine-tune and what kind it is, after everything that can be told without loading it.

    Raises:
        InvalidInputError: not allowed, not there, of another kind than stated, or with files that must not be read.
        StorageFullError: the memory cannot hold it.
    """
    if (source.path is None) == (source.hub_id is None):
        raise InvalidInputError("target must have exactly one of path and hub_id", param="target")
    if source.path is not None:
        directory, param = roots.resolve(source.path, param="target.path"), "target.path"
        _refuse_escapes(directory, roots)
    else:
        param = "target.hub_id"
        directory = _download(source.hub_id or "", allow_hub=allow_hub)
    try:
        require_directory(directory)
    except EdaError as error:
        raise InvalidInputError(f"{param} must be a directory with a model: {error}", param=param) from error
    is_lora = (directory / ADAPTER_CONFIG_FILE).is_file()
    if source.kind != "auto" and is_lora != (source.kind == "lora"):
        raise InvalidInputError(
            f"target.kind is {source.kind!r}; {directory} is "
            f"{'a LoRA' if is_lora else 'no LoRA'} ({'it has' if is_lora else 'it lacks'} {ADAPTER_CONFIG_FILE})",
            param="target.kind",
        )
    num_bytes = _check_weights(directory, param)
    available = psutil.virtual_memory().available
    if num_bytes > 0.8 * available:
        raise StorageFullError(
            f"{param}: the weights take {num_bytes / MIB:.0f} MiB; the machine has {available / MIB:.0f} MiB of memory "
            "left",
            param=param,
        )
    return directory, "lora" if is_lora else "full"


def prepare_data(
    source: DataSource,
    workspace: Path,
    *,
    model: str,
    options: TrainingOptions,
    roots: AllowedRoots,
    traffic: TrafficRecorder,
    limits: DataLimits,
) -> DataSpec:
    """Writes the job's prompts (or recorded samples) into ``workspace``, durably, and checks every line of them.

    Raises ``InvalidInputError`` (the message names the line), ``TooLargeError`` or ``StorageFullError``.
    """
    _check_answers(options, limits)
    workspace.mkdir(parents=True)
    if source.self_prompts is not None:
        _check_split(source.self_prompts, options, "data.self")
        _require_room(workspace, source.self_prompts, 0, options, limits)
        return DataSpec("self", source.self_prompts)
    if source.min_traffic is not None:
        return _prepare_traffic(source.min_traffic, workspace, model, options, traffic)
    destination = workspace / PROMPTS_FILE
    param = _write_prompts(source, destination, roots, limits)
    try:
        prompts = read_prompts(destination)
    except DataError as error:
        raise InvalidInputError(str(error).replace(str(destination), param), param=param) from error
    count = len(prompts)
    _check_split(count, options, param)
    _require_room(workspace, count, destination.stat().st_size, options, limits)
    sync_tree(workspace)
    return DataSpec("prompts", count, sha256_of_file(destination))


def _check_answers(options: TrainingOptions, limits: DataLimits) -> None:
    """The room that answers leave for prompts; a job would find out only when it has loaded the models."""
    longest = limits.max_model_len - DRAFT_ROOM - 1
    if limits.max_model_len and longest < 1:
        raise InvalidInputError(
            f"the model holds {limits.max_model_len} tokens; adapting needs more than {DRAFT_ROOM + 1}"
        )
    if limits.max_model_len and (options.max_tokens or 0) > longest:
        raise InvalidInputError(
            f"training.max_tokens is {options.max_tokens}; it must be at most {longest}, since the model's "
            f"{limits.max_model_len} positions hold prompts and drafts too",
            param="training.max_tokens",
        )


def _check_split(count: int, options: TrainingOptions, param: str) -> None:
    if count < MIN_PROMPTS:
        raise InvalidInputError(
            f"{param} has {count} prompt; at least {MIN_PROMPTS} are needed, one to learn from and one to measure with",
            param=param,
        )
    held_out = options.held_out
    if held_out is not None and held_out >= count:
        raise InvalidInputError(
            f"training.held_out is {held_out} and {param} gives {count} prompts; some must be left to train on",
            param="training.held_out",
        )


def _prepare_traffic(
    minimum: int, workspace: Path, model: str, options: TrainingOptions, traffic: TrafficRecorder
) -> DataSpec:
    destination, minimum = workspace / SAMPLES_FILE, max(minimum, MIN_PROMPTS)
    count = traffic.copy_to(model, destination)
    if count < minimum:
        raise InvalidInputError(
            f"data.traffic asks for {minimum} recorded requests of {model!r}; there are {count}. "
            f'Recording is turned on by PATCH /adapters/{model} {{"record_traffic": true}}',
            param="data.traffic",
        )
    _check_split(count, options, "data.traffic")
    sync_tree(workspace)
    return DataSpec("traffic", count, sha256_of_file(destination))


def _write_prompts(source: DataSource, destination: Path, roots: AllowedRoots, limits: DataLimits) -> str:
    """Writes the file and returns the name of the field that it came from."""
    if source.path is not None:
        path = roots.resolve(source.path, param="data.path")
        if not path.is_file():
            raise InvalidInputError(
                f"data.path is {source.path!r}; it must be a JSON-lines file", param="data.path"
            )
        _limit(path.stat().st_size, limits, "data.path")
        with path.open("rb") as file:
            _write_unpacked(file, destination, limits, "data.path")
        return "data.path"
    if source.upload is not None:
        _limit(len(source.upload), limits, "file")
        _write_unpacked(BytesIO(source.upload), destination, limits, "file")
        return "file"
    lines = [_prompt_line(prompt, place) for place, prompt in enumerate(source.prompts or ())]
    destination.write_text("".join(lines), encoding="utf-8")
    return "data.prompts"


def _write_unpacked(source: BinaryIO, destination: Path, limits: DataLimits, param: str) -> None:
    """Copies a prompt file, unpacking gzip by what it begins with. A small file may unpack to one of any size, so its
    limit and the disk's room are looked at chunk by chunk."""
    is_gzip = source.read(len(_GZIP_MAGIC)) == _GZIP_MAGIC
    source.seek(0)
    reader: gzip.GzipFile | BinaryIO = gzip.GzipFile(fileobj=source) if is_gzip else source
    num_bytes = 0
    try:
        with destination.open("wb") as file:
            while chunk := reader.read(_CHUNK_BYTES):
                num_bytes += len(chunk)
                if num_bytes > limits.max_bytes:
                    raise TooLargeError(
                        f"{param} unpacks to more than the limit of {limits.max_bytes / MIB:.1f} MiB",
                        param=param,
                    )
                require_free_space(
                    destination.parent, len(chunk), reserve=limits.reserve_bytes, purpose="the prompt file"
                )
                file.write(chunk)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InvalidInputError(f"{param} is no whole gzip file: {error}", param=param) from error


def _prompt_line(prompt: Any, place: int) -> str:
    if isinstance(prompt, str):
        row: Mapping[str, Any] = {"prompt": prompt}
    elif isinstance(prompt, list):
        row = {"messages": prompt}
    else:
        raise InvalidInputError(
            f"data.prompts[{place}] is a JSON {type(prompt).__name__}; each must be a string or a list of messages",
            param="data.prompts",
        )
    return json.dumps(row) + "\n"


def _limit(num_bytes: int, limits: DataLimits, param: str) -> None:
    if num_bytes > limits.max_bytes:
        raise TooLargeError(
            f"{param} has {num_bytes / MIB:.1f} MiB; the limit is {limits.max_bytes / MIB:.1f} MiB",
            param=param,
        )


def _require_room(
    workspace: Path, count: int, num_bytes: int, options: TrainingOptions, limits: DataLimits
) -> None:
    count = min(count, options.max_prompts or count)
    answers = count * (options.max_tokens or _DEFAULT_MAX_TOKENS) * _BYTES_PER_TOKEN
    needed = 2 * num_bytes + answers + _TRAINING_BYTES
    require_free_space(workspace, needed, reserve=limits.reserve_bytes, purpose="the adaptation")


def _download(hub_id: str, *, allow_hub: bool) -> Path:
    check_hub_id(hub_id)
    if not allow_hub:
        raise InvalidInputError(
            "target.hub_id is not allowed on this server; give a target.path, or start it with allow_hub",
            param="target.hub_id",
        )
    if Path(hub_id).exists():
        # It would be taken for that directory, which may lie outside of the allowed ones.
        raise InvalidInputError(
            f"target.hub_id is {hub_id!r}, which is a local path too; give it as target.path, or serve it under "
            "another name",
            param="target.hub_id",
        )
    try:
        return resolve_directory(hub_id)
    except EdaError as error:
        raise InvalidInputError(f"target.hub_id: {error}", param="target.hub_id") from error


def _refuse_escapes(directory: Path, roots: AllowedRoots) -> None:
    """A directory inside the roots may hold links that lead out of them."""
    if not directory.is_dir():
        return
    for entry in directory.iterdir():
        if entry.is_symlink() and not any(entry.resolve().is_relative_to(root) for root in roots.roots):
            raise InvalidInputError(
                f"target.path holds the link {entry.name!r}, which leads out of the allowed directories",
                param="target.path",
            )


def _check_weights(directory: Path, param: str) -> int:
    """Bytes of weights in ``directory``; unsafe formats, lying headers and impossible sizes are refused."""
    try:
        check_fine_tune(directory)
    except EdaError as error:
        raise InvalidInputError(f"{param}: {error}", param=param) from error
    return sum(file.stat().st_size for file in directory.glob("*.safetensors"))
