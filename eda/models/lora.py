"""LoRA fine-tunes of a target, kept unmerged so that the tokens of one pass can use different ones."""

import logging
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from eda.errors import CheckpointError, MismatchError, UnsupportedModelError
from eda.formats.checkpoint import Checkpoint, Projection, layer_projections, require_finite
from eda.formats.checkpoint_files import is_gguf, listed
from eda.formats.config import ModelConfig
from eda.formats.fingerprint import fingerprint_directory
from eda.formats.lora_config import LoraConfig

EMBEDDING = "model.embed_tokens"
HEAD = "lm_head"
_PREFIX = "base_model.model."
# What a GGUF file and the checkpoint that it was converted from have in common. It calls a Mistral a Llama.
_SIZES_OF_BASE = (
    *("hidden_size", "intermediate_size", "num_layers"),
    *("num_heads", "num_kv_heads", "head_dim", "vocab_size"),
)
_logger = logging.getLogger(__name__)
# "...lora_A.default.weight", "...lora_embedding_A.default", "...modules_to_save.default.weight".
_IN_MEMORY = re.compile(r"\.(?:lora_(?:embedding_)?[AB]|modules_to_save)\.((?!weight$)[^.]+)(?:\.weight)?$")
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")


@dataclass(frozen=True, slots=True, eq=False)
class LowRankBlock:
    """One projection's share of a ``LowRank``: which ranks feed which outputs of the fused matrix."""

    rank_start: int
    rank_end: int
    out_start: int
    out_end: int
    b: Tensor
    """``[out_end - out_start, rank_end - rank_start]``, the LoRA's scale folded in."""


@dataclass(frozen=True, slots=True, eq=False)
class LowRank:
    """Low-rank update of one fused matrix; the projections fused in it share one product with ``a``."""

    a: Tensor
    """``[total rank, in]``."""
    blocks: tuple[LowRankBlock, ...]


@dataclass(frozen=True, slots=True, eq=False)
class LoraLayer:
    """Updates of one decoder layer; ``None`` where the LoRA has none."""

    qkv: LowRank | None = None
    output: LowRank | None = None
    gate_up: LowRank | None = None
    down: LowRank | None = None


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class LoraAdapter:
    """A loaded PEFT LoRA."""

    fingerprint: str
    layers: tuple[LoraLayer, ...]
    embedding: LowRank | None = None
    """Update of the embedding: ``a`` is ``[rank, vocab_size]``, its only ``b`` is ``[hidden_size, rank]``."""
    embedding_weight: Tensor | None = None
    """``[vocab_size, hidden_size]``: replaces the base's embedding (``modules_to_save``)."""
    head: LowRank | None = None
    """Update of the output layer."""
    head_weight: Tensor | None = None
    """``[vocab_size, hidden_size]``: replaces the base's output layer (``modules_to_save``)."""

    @property
    def changes_head(self) -> bool:
        """Whether the output layer is not the base's."""
        return self.head is not None or self.head_weight is not None

    @classmethod
    def load(
        cls,
        path: Path,
        config: ModelConfig,
        *,
        base_fingerprint: str = "",
        base_path: Path | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> "LoraAdapter":
        """Reads a PEFT directory: ``adapter_config.json`` and ``adapter_model.safetensors``.

        Args:
            config: of the base that it is to run on.
            base_fingerprint: of that base; checked against the base that the adapter records, if it records one:
                as ``base_fingerprint`` in the metadata of its safetensors file, or as a base directory that exists.
            base_path: where that base lies. Adapters are made on safetensors, whose fingerprints say nothing about a
                GGUF file: for one, the recorded base must have the same sizes, and a warning says that its weights
                could not be compared.

        Raises:
            CheckpointError: unreadable, pickle weights, or tensors that do not fit the adapter's own config.
            UnsupportedModelError: another PEFT method than plain LoRA, or modules that cannot be adapted.
            MismatchError: made for another base.
        """
        path = Path(path)
        settings = LoraConfig.from_directory(path)
        checkpoint = Checkpoint.of_adapter(path)
        if base_path is not None and is_gguf(base_path):
            _check_base_of_gguf(settings.base_path, checkpoint, base_fingerprint, base_path, config)
        else:
            _check_base(settings.base_path, checkpoint, base_fingerprint)
        reader = _Reader(checkpoint, settings, config, dtype, torch.device(device))
        return reader.read(fingerprint_directory(path))


@dataclass(frozen=True, slots=True, eq=False)
class LoraSegment:
    """Tokens ``start`` to ``end`` of the pack use ``adapter``. Segments of one pass must not overlap."""

    adapter: LoraAdapter
    start: int
    end: int


def add_low_rank(output: Tensor, given: Tensor, segment: LoraSegment, update: LowRank | None) -> None:
    """Adds the segment's share to ``output`` ``[T, out]`` in place; ``given`` is ``[T, in]``."""
    if update is None:
        return
    rows = slice(segment.start, segment.end)
    inner = given[rows] @ update.a.T
    for block in update.blocks:
        part = output[rows, block.out_start : block.out_end]
        ranks = inner[:, block.rank_start : block.rank_end]
        if part.dtype == ranks.dtype:
            part.addmm_(ranks, block.b.T)
        else:  # logits may be float32 beside bfloat16 weights
            part += ranks @ block.b.T


def _check_base(named: str | None, checkpoint: Checkpoint, base_fingerprint: str) -> None:
    if not base_fingerprint:
        return
    recorded, source = checkpoint.metadata.get("base_fingerprint"), "its metadata"
    if recorded is None and named:
        try:
            if not (Path(named) / "config.json").is_file():
                return
            recorded, source = fingerprint_directory(Path(named)), named
        except (CheckpointError, OSError):
            return  # whatever lies there now says nothing about the adapter
    if recorded is not None and recorded != base_fingerprint:
        raise MismatchError(
            f"{checkpoint.path} was made for the base {recorded[:16]} (from {source}); this base is "
            f"{base_fingerprint[:16]}"
        )


def _check_base_of_gguf(
    named: str | None, checkpoint: Checkpoint, base_fingerprint: str, base_path: Path, config: ModelConfig
) -> None:
    recorded = checkpoint.metadata.get("base_fingerprint")
    if recorded is not None and recorded == base_fingerprint:
        return
    made_for = None
    with suppress(CheckpointError, UnsupportedModelError, OSError):  # it says nothing about the adapter then
        made_for = None if not named else ModelConfig.from_directory(Path(named))
    differing = [
        f"{field} {getattr(made_for, field)} (this base: {getattr(config, field)})"
        for field in _SIZES_OF_BASE
        if made_for is not None and getattr(made_for, field) != getattr(config, field)
    ]
    if differing:
        raise MismatchError(
            f"{checkpoint.path} was made for the base {named}, which is no {base_path}: {', '.join(differing)}"
        )
    _logger.warning(
        "%s was made for %s; whether %s holds the same model cannot be told, only that its sizes fit",
        checkpoint.path,
        named or recorded or "a base that it does not name",
        base_path,
    )


class _Reader:
    """Sorts the tensors of one PEFT file into the places that the target reads them from."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        settings: LoraConfig,
        config: ModelConfig,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.checkpoint = checkpoint
        self.settings = settings
        self.config = config
        self.dtype = dtype
        self.device = device
        self.unread = set(checkpoint.entries)
        self.found: set[str] = set()
        """Modules that have a LoRA, and those that were saved whole."""

    def read(self, fingerprint: str) -> LoraAdapter:
        config = self.config
        if not self.checkpoint.entries:
            raise CheckpointError(f"{self.checkpoint.path} holds no tensors")
        _refuse_other_names(self.checkpoint)
        layers = tuple(self._layer(index) for index in range(config.num_layers))
        head = self._low_rank({HEAD: Projection("head", config.hidden_size, 0, config.vocab_size)})
        embedding = self._embedding()
        embedding_weight, is_base_weight = self._replacement(EMBEDDING)
        head_weight, _ = self._replacement(HEAD)
        if head_weight is None and is_base_weight and config.tie_word_embeddings:
            head_weight = (
                embedding_weight  # the base's own matrix was saved, and the base's head is that matrix
            )
        if self.unread:
            self._refuse_unread()
        self._compare_with_config()
        return LoraAdapter(fingerprint, layers, embedding, embedding_weight, head, head_weight)

    def _layer(self, index: int) -> LoraLayer:
        fused: dict[str, dict[str, Projection]] = {}
        for name, projection in layer_projections(self.config).items():
            fused.setdefault(projection.fused, {})[f"model.layers.{index}.{name}"] = projection
        return LoraLayer(**{name: self._low_rank(modules) for name, modules in fused.items()})

    def _low_rank(self, modules: Mapping[str, Projection]) -> LowRank | None:
        """The update of one fused matrix from the LoRAs of the ``modules`` that are fused in it."""
        parts: list[Tensor] = []
        blocks: list[LowRankBlock] = []
        start = 0
        for module, projection in modules.items():
            pair = self._pair(module, f"{module}.lora_A.weight", f"{module}.lora_B.weight")
            if pair is None:
                continue
            a, b = pair
            self._check_sizes(module, (a.shape[1], b.shape[0]), (projection.in_size, projection.out_size))
            out_end = projection.out_start + projection.out_size
            blocks.append(
                LowRankBlock(start, start + a.shape[0], projection.out_start, out_end, self._placed(b))
            )
            parts.append(a)
            start += a.shape[0]
        return LowRank(self._placed(torch.cat(parts)), tuple(blocks)) if parts else None

    def _embedding(self) -> LowRank | None:
        names = f"{EMBEDDING}.lora_embedding_A", f"{EMBEDDING}.lora_embedding_B"
        pair = self._pair(EMBEDDING, *names)
        if pair is None:
            return None
        a, b = pair
        sizes = self.config.vocab_size, self.config.hidden_size
        self._check_sizes(EMBEDDING, (a.shape[1], b.shape[0]), sizes)
        block = LowRankBlock(0, a.shape[0], 0, self.config.hidden_size, self._placed(b))
        return LowRank(self._placed(a), (block,))

    def _pair(self, module: str, name_a: str, name_b: str) -> tuple[Tensor, Tensor] | None:
        """``A`` ``[r, in]`` and the scaled ``B`` ``[out, r]`` in float32; ``None`` when the module has no LoRA."""
        a, b = self._take(name_a), self._take(name_b)
        if a is None and b is None:
            return None
        if a is None or b is None:
            raise CheckpointError(f"{self.checkpoint.path} has only one half of the LoRA on {module}")
        self.found.add(module)
        rank, scale = self.settings.rank_and_scale(module)
        if a.dim() != 2 or b.dim() != 2 or a.shape[0] != rank or b.shape[1] != rank:
            raise CheckpointError(
                f"{self.checkpoint.path}: the LoRA on {module} is {list(a.shape)} and {list(b.shape)}; "
                f"its config says rank {rank}"
            )
        scaled = b.float() * scale
        require_finite(scaled, f"{module}.lora_B times lora_alpha / r", self.checkpoint.path)
        return a.float(), scaled

    def _replacement(self, module: str) -> tuple[Tensor | None, bool]:
        """A matrix that replaces the base's, and whether it was saved as the base's own and not as a copy."""
        own, base = self._take(f"{module}.weight"), self._take(f"{module}.base_layer.weight")
        weight = own if own is not None else base
        if weight is None:
            return None, False
        sizes = self.config.vocab_size, self.config.hidden_size
        self._check_sizes(module, tuple(weight.shape), sizes)
        saved = [name.removeprefix("model.") for name in self.settings.modules_to_save]
        return self._placed(weight), module.removeprefix("model.") not in saved

    def _check_sizes(self, module: str, found: tuple[int, ...], wanted: tuple[int, ...]) -> None:
        if found != wanted:
            raise MismatchError(
                f"{self.checkpoint.path} was made for another base: its {module} has sizes {list(found)}, "
                f"this base has {list(wanted)}"
            )

    def _compare_with_config(self) -> None:
        """Refuses a file that lacks a part of what its configuration names, or has more than it names."""
        settings = self.settings
        saved = {name.split(".")[-1] for name in settings.modules_to_save}
        weights = {EMBEDDING.split(".")[-1]: EMBEDDING, HEAD: HEAD}
        absent = sorted(
            name
            for name in saved
            if not any(
                f"{_PREFIX}{weights.get(name, name)}.{end}" in self.checkpoint
                for end in ("weight", "base_layer.weight")
            )
        )
        if absent:
            raise CheckpointError(
                f"{self.checkpoint.path} is not whole: its modules_to_save name {listed(absent)}, which it "
                "does not hold"
            )
        if settings.target_modules is None and not settings.is_all_linear:
            return
        names = {
            f"model.layers.{layer}.{name}": layer
            for layer in range(self.config.num_layers)
            for name in layer_projections(self.config)
        }
        named = {module for module, layer in names.items() if settings.adapts(module, layer)}
        named |= {module for module in (EMBEDDING, HEAD) if settings.adapts(module, None)}
        lacking, more = sorted(named - self.found), self.found - named
        if self.config.tie_word_embeddings and EMBEDDING in named:
            more.discard(HEAD)  # ensure_weight_tying: what is done to one matrix is saved for both
        if lacking:
            raise CheckpointError(
                f"{self.checkpoint.path} is not whole: its target_modules name {listed(lacking)}, for which "
                "it holds no LoRA"
            )
        if more:
            raise CheckpointError(
                f"{self.checkpoint.path} does not match its configuration: it holds a LoRA on {listed(sorted(more))}, "
                "which its target_modules do not name"
            )

    def _refuse_unread(self) -> None:
        """Names why tensors found no place: too many layers for this base, or modules that cannot be adapted."""
        paths = sorted({_module_of(name) for name in self.unread})
        for path in paths:
            match = _LAYER.match(path)
            if (
                match
                and int(match[1]) >= self.config.num_layers
                and match[2] in layer_projections(self.config)
            ):
                raise MismatchError(
                    f"{self.checkpoint.path} was made for another base: it has {path}, this base has "
                    f"{self.config.num_layers} layers"
                )
        supported = [name.split(".")[-1] for name in layer_projections(self.config)]
        raise UnsupportedModelError(
            f"{self.checkpoint.path} adapts {listed(paths)}; supported are {', '.join(supported)}, "
            "embed_tokens and lm_head"
        )

    def _take(self, name: str) -> Tensor | None:
        full = _PREFIX + name
        if full not in self.checkpoint:
            return None
        self.unread.discard(full)
        tensor = self.checkpoint.tensor(full)
        require_finite(tensor, full, self.checkpoint.path)
        return tensor

    def _placed(self, tensor: Tensor) -> Tensor:
        return tensor.to(device=self.device, dtype=self.dtype).contiguous()


def _refuse_other_names(checkpoint: Checkpoint) -> None:
    """Names that other tools, or PEFT itself in memory, give to the same tensors."""
    names = sorted(checkpoint.entries)
    in_memory = [name for name in names if _IN_MEMORY.search(name)]
    if in_memory:
        raise CheckpointError(
            f"{checkpoint.path} has tensors like {in_memory[0][:120]}: names as they are in a PEFT model's memory, "
            f"with the adapter's name {_IN_MEMORY.findall(in_memory[0])[0]!r} in them; save it with "
            "save_pretrained, which leaves that out"
        )
    foreign = [name for name in names if not name.startswith(_PREFIX)]
    if foreign:
        raise CheckpointError(
            f"{checkpoint.path} has tensors like {foreign[0][:120]}; names in a PEFT adapter begin with {_PREFIX!r}"
        )


def _module_of(tensor_name: str) -> str:
    return re.sub(r"\.(lora_.*|(base_layer\.)?(weight|bias))$", "", tensor_name.removeprefix(_PREFIX))
