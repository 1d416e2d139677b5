"""The shared draft: one decoder layer that reads the target's features and guesses the next tokens.

EAGLE-3 family (arXiv 2503.01840) with EDA's split of the feed-forward network (arXiv 2603.09527). At position ``i`` the
draft sees the target's features of token ``i`` (three tapped layers, each normalised, fused by ``fc``) and the
embedding of token ``i + 1``, and predicts token ``i + 2``. For its own guesses it has no target features and reads
its own last output instead.

Embeddings and output head are not the draft's: they are the fine-tune's own (for the head, the rows of the reduced
draft vocabulary), passed in by the caller. A fine-tune so brings its output layer for nothing.
"""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from eda.errors import CheckpointError, MismatchError
from eda.formats.checkpoint import require_finite
from eda.formats.checkpoint_files import CONFIG_FILE, WEIGHTS_FILE
from eda.formats.config import RopeConfig
from eda.formats.draft_files import read_draft_fields, require_draft_tensors
from eda.models.attention import PackedBatch, masks_for
from eda.models.cache import KVCache
from eda.models.layers import Attention, FeedForward, RMSNorm
from eda.models.private import (
    PrivateConfig,
    PrivateSegment,
    add_private_feed_forward,
    add_private_fusion,
    add_private_output,
    add_private_qkv,
)
from eda.models.rotary import RotaryEmbedding
from eda.models.target import TargetModel


@dataclass(frozen=True, slots=True)
class DraftConfig:
    """Sizes of the shared draft and the target that it was made for.

    Attributes:
        hidden_size: width; equal to the target's, since the draft uses the target's output head.
        tap_layers: zero-based target layers whose outputs are the features (low, middle, high).
        vocab_size: the target's vocabulary.
        draft_vocab_size: number of tokens that the draft can propose.
        target_fingerprint: of the base target that the draft was trained on; empty while untrained.
    """

    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    tap_layers: tuple[int, int, int]
    vocab_size: int
    draft_vocab_size: int
    max_position_embeddings: int
    rope_theta: float = 10_000.0
    rms_norm_eps: float = 1e-6
    target_fingerprint: str = ""

    @property
    def num_features(self) -> int:
        """Width of the fused input: three tapped layers side by side."""
        return 3 * self.hidden_size

    @property
    def query_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim

    def private_config(
        self, intermediate_size: int, fc_rank: int = 0, attention_rank: int = 0
    ) -> PrivateConfig:
        """Sizes of a private module for this draft."""
        attention = (attention_rank, self.query_size, self.kv_size) if attention_rank else ()
        return PrivateConfig(self.hidden_size, self.num_features, intermediate_size, fc_rank, *attention)


class DraftModel(nn.Module):
    """The shared draft. Private modules are passed to ``fuse`` and ``forward`` as segments of the pack."""

    draft_token_ids: Tensor
    """Int64 ``[draft_vocab_size]``: target id of each draft column, ascending."""

    def __init__(self, config: DraftConfig, draft_token_ids: Tensor) -> None:
        super().__init__()
        if draft_token_ids.shape != (config.draft_vocab_size,):
            raise MismatchError(
                f"draft_token_ids has shape {tuple(draft_token_ids.shape)}; "
                f"draft_vocab_size {config.draft_vocab_size} asks for ({config.draft_vocab_size},)"
            )
        if len(set(draft_token_ids.tolist())) != config.draft_vocab_size or not (
            int(draft_token_ids.min()) >= 0 and int(draft_token_ids.max()) < config.vocab_size
        ):
            raise MismatchError(f"draft_token_ids must be distinct ids from 0 to {config.vocab_size - 1}")
        self.config = config
        size, eps = config.hidden_size, config.rms_norm_eps
        self.tap_norms = nn.ModuleList(RMSNorm(size, eps) for _ in config.tap_layers)
        self.fc = nn.Linear(config.num_features, size, bias=False)
        self.embedding_norm = RMSNorm(size, eps)
        self.hidden_norm = RMSNorm(size, eps)
        self.attention = Attention(
            size, config.num_heads, config.num_kv_heads, config.head_dim, input_size=2 * size
        )
        self.feed_forward_norm = RMSNorm(size, eps)
        self.feed_forward = FeedForward(size, config.intermediate_size)
        self.norm = RMSNorm(size, eps)
        rope = RopeConfig("default", config.rope_theta, config.max_position_embeddings)
        self.rotary = RotaryEmbedding(rope, config.head_dim)
        self.register_buffer("draft_token_ids", draft_token_ids.long(), persistent=True)

    @classmethod
    def initialised(cls, config: DraftConfig, draft_token_ids: Tensor, *, seed: int = 0) -> Self:
        """An untrained draft: matrices normal with standard deviation 0.02, norms at one."""
        generator = torch.Generator().manual_seed(seed)
        draft = cls(config, draft_token_ids)
        with torch.no_grad():
            for parameter in draft.parameters():
                if parameter.dim() == 2:
                    parameter.normal_(0.0, 0.02, generator=generator)
        return draft

    def new_cache(self, num_slots: int) -> KVCache:
        """A cache for this draft; slot ``i`` of an extent holds the pair (feature ``i``, token ``i + 1``)."""
        return KVCache(
            num_layers=1,
            num_kv_heads=self.config.num_kv_heads,
            head_dim=self.config.head_dim,
            num_slots=num_slots,
            dtype=self.fc.weight.dtype,
            device=self.fc.weight.device,
        )

    def fuse(self, features: Tensor, segments: Sequence[PrivateSegment] = ()) -> Tensor:
        """Target features ``[T, 3H]`` to draft inputs ``[T, H]``."""
        taps = features.to(self.fc.weight.dtype).chunk(len(self.tap_norms), dim=-1)
        normalised = torch.cat([norm(tap) for norm, tap in zip(self.tap_norms, taps, strict=True)], dim=-1)
        return add_private_fusion(self.fc(normalised), normalised, segments)

    def attention_inputs(self, hidden: Tensor, embeddings: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised ``hidden`` (the residual stream) and the pair ``[..., 2H]`` that attention projects."""
        residual = self.hidden_norm(hidden)
        return residual, torch.cat([self.embedding_norm(embeddings.to(residual.dtype)), residual], dim=-1)

    def project(self, inputs: Tensor, segments: Sequence[PrivateSegment] = ()) -> Tensor:
        """Queries, keys and values ``[T, Q + 2KV]`` of the pairs ``[T, 2H]`` from ``attention_inputs``."""
        return add_private_qkv(self.attention.qkv_proj(inputs), inputs, segments)

    def project_output(self, attended: Tensor, segments: Sequence[PrivateSegment] = ()) -> Tensor:
        """What attention found, ``[T, Q]``, to ``[T, H]``."""
        return add_private_output(self.attention.o_proj(attended), attended, segments)

    def add_feed_forward(self, hidden: Tensor, segments: Sequence[PrivateSegment] = ()) -> Tensor:
        """``hidden + shared(x) + private(x)`` with ``x`` the normalised ``hidden``; ``[T, H]`` to ``[T, H]``."""
        normalised = self.feed_forward_norm(hidden)
        return hidden + add_private_feed_forward(self.feed_forward(normalised), normalised, segments)

    def forward(
        self,
        hidden: Tensor,
        embeddings: Tensor,
        batch: PackedBatch,
        cache: KVCache,
        segments: Sequence[PrivateSegment] = (),
    ) -> Tensor:
        """One pass over a pack.

        Args:
            hidden: ``[T, H]``, from ``fuse`` or the last pass's output.
            embeddings: ``[T, H]``, the fine-tune's embedding of the token after each position.

        Returns:
            ``[T, H]``: input of ``logits`` and feedback for the next draft step.
        """
        residual, inputs = self.attention_inputs(hidden, embeddings)
        cos, sin = self.rotary(batch.positions, None, residual.dtype)
        masks = masks_for(batch, None)
        qkv = self.project(inputs, segments)
        attended = self.attention.attend(qkv, cos, sin, cache, 0, batch, masks)
        return self.add_feed_forward(residual + self.project_output(attended, segments), segments)

    def logits(self, hidden: Tensor, head_rows: Tensor) -> Tensor:
        """Draft logits ``[N, draft_vocab_size]`` of ``hidden [N, H]`` under the ``head_rows [V_draft, H]``."""
        return functional.linear(self.norm(hidden), head_rows.to(hidden.dtype)).float()

    @property
    def num_parameters(self) -> int:
        """Own parameters; the fine-tune's embeddings and head are not counted."""
        return sum(parameter.numel() for parameter in self.parameters())

    def fingerprint(self) -> str:
        """Hash of sizes and weights: what a private module records as the draft that it was trained with."""
        digest = hashlib.sha256(json.dumps(dataclasses.asdict(self.config), sort_keys=True).encode())
        for name, weight in sorted(self.state_dict().items()):
            digest.update(name.encode())
            # bfloat16 is what a saved draft holds: the hash is the same before saving and after loading in float32.
            stored = weight.detach().cpu().contiguous()
            stored = stored.bfloat16().view(torch.uint16) if stored.is_floating_point() else stored
            digest.update(stored.numpy().tobytes())
        return digest.hexdigest()

    def save(self, directory: Path, metadata: dict[str, Any] | None = None) -> None:
        """Writes ``config.json`` and ``model.safetensors`` (bfloat16). ``metadata`` is kept under "training"."""
        directory.mkdir(parents=True, exist_ok=True)
        weights = {
            name: (weight.bfloat16() if weight.is_floating_point() else weight).detach().cpu().contiguous()
            for name, weight in self.state_dict().items()
        }
        save_file(weights, directory / WEIGHTS_FILE, metadata={"format": "pt"})
        (directory / WEIGHTS_FILE).chmod(0o644)  # safetensors leaves it readable to its owner only
        document = {"model_type": "eda_draft", **dataclasses.asdict(self.config), "training": metadata or {}}
        (directory / CONFIG_FILE).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(
        cls, directory: Path, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> Self:
        """Reads a draft directory.

        Raises:
            CheckpointError: files are missing or unreadable, fields of ``config.json`` are absent or cannot be
                meant, or values are not finite.
            MismatchError: tensors differ from what ``config.json`` asks for.
        """
        fields = read_draft_fields(directory / CONFIG_FILE)
        require_draft_tensors(directory, fields)
        config = DraftConfig(**fields)
        try:
            weights = load_file(directory / WEIGHTS_FILE)
        except Exception as error:
            raise CheckpointError(
                f"{directory / WEIGHTS_FILE} cannot be read as safetensors: {error}"
            ) from error
        draft_token_ids = weights["draft_token_ids"]
        for name, weight in weights.items():
            if weight.is_floating_point():
                require_finite(weight, name, directory)
        draft = cls(config, draft_token_ids)
        try:
            draft.load_state_dict({name: weight.to(_dtype_of(weight)) for name, weight in weights.items()})
        except RuntimeError as error:
            raise MismatchError(f"{directory}: {error}") from error
        return draft.to(device=device, dtype=dtype).requires_grad_(False).eval()


def _dtype_of(weight: Tensor) -> torch.dtype:
    return torch.float32 if weight.is_floating_point() else weight.dtype


def check_draft_fits(draft: DraftModel, target: TargetModel) -> None:
    """Raises ``MismatchError`` when the draft was made for another target, by sizes or by fingerprint."""
    for name in ("hidden_size", "vocab_size"):
        theirs, ours = getattr(target.config, name), getattr(draft.config, name)
        if theirs != ours:
            raise MismatchError(f"the draft was made for {name} {ours}; the target has {theirs}")
    if max(draft.config.tap_layers) >= target.config.num_layers:
        raise MismatchError(
            f"the draft taps layers {draft.config.tap_layers}; the target has {target.config.num_layers} layers"
        )
    recorded = draft.config.target_fingerprint
    if recorded and recorded != target.fingerprint:
        raise MismatchError(
            f"the draft was trained for the target {recorded[:16]}...; this target is {target.fingerprint[:16]}..."
        )


def check_private_fits(private: PrivateConfig, draft: DraftConfig) -> None:
    """Raises ``MismatchError`` when a private module of these sizes was made for another draft."""
    if (private.hidden_size, private.num_features) != (draft.hidden_size, draft.num_features):
        raise MismatchError(
            f"the private module has width {private.hidden_size} and {private.num_features} features; the shared draft "
            f"has {draft.hidden_size} and {draft.num_features}"
        )
    attention = (draft.query_size, draft.kv_size)
    if private.attention_rank and (private.query_size, private.kv_size) != attention:
        raise MismatchError(
            f"the private module's queries are {private.query_size} wide and its keys {private.kv_size}; the shared "
            f"draft's are {attention[0]} and {attention[1]}"
        )
