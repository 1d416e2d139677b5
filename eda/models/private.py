"""The private module: the small part of a draft that is trained for one fine-tune.

It is an argument of the draft's forward pass, never installed state, so that one pass can serve rows with
different private modules: shared weights run once for all tokens, private weights per segment.
Source of the split into a shared and a private feed-forward network: EDA (arXiv 2603.09527).
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from eda.errors import CheckpointError, MismatchError
from eda.formats.checkpoint import require_finite
from eda.formats.checkpoint_files import FLOAT_TYPES, listed, read_header


@dataclass(frozen=True, slots=True)
class PrivateConfig:
    """Sizes of a private module.

    Attributes:
        hidden_size: width of the draft.
        num_features: width of the fused target features (three times the target's width).
        intermediate_size: width of the private feed-forward network; 0 leaves it out.
        fc_rank: rank of the correction of the draft's ``fc``; 0 leaves it out.
        attention_rank: rank of the corrections of the draft's attention projections; 0 leaves them out.
        query_size, kv_size: widths of the draft's queries and of its keys; needed with ``attention_rank`` only.
    """

    hidden_size: int
    num_features: int
    intermediate_size: int
    fc_rank: int = 0
    attention_rank: int = 0
    query_size: int = 0
    kv_size: int = 0

    def __post_init__(self) -> None:
        attention = ("query_size", "kv_size") if self.attention_rank else ()
        for name in ("hidden_size", "num_features", *attention):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        parts = ("intermediate_size", "fc_rank", "attention_rank")
        for name in parts:
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 0 or more")
        if not any(getattr(self, name) for name in parts):
            raise ValueError(f"{', '.join(parts)} are all 0; a private module needs one of them")

    def tensor_shapes(self) -> dict[str, tuple[int, int]]:
        """Names and shapes of the tensors that a file of this module holds."""
        shapes: dict[str, tuple[int, int]] = {}
        if self.intermediate_size:
            shapes["gate_up_proj"] = (2 * self.intermediate_size, self.hidden_size)
            shapes["down_proj"] = (self.hidden_size, self.intermediate_size)
        if self.fc_rank:
            shapes["fc_down"] = (self.fc_rank, self.num_features)
            shapes["fc_up"] = (self.hidden_size, self.fc_rank)
        if self.attention_rank:
            # Attention reads the embedding and the hidden state side by side.
            shapes["qkv_down"] = (self.attention_rank, 2 * self.hidden_size)
            shapes["qkv_up"] = (self.query_size + 2 * self.kv_size, self.attention_rank)
            shapes["o_down"] = (self.attention_rank, self.query_size)
            shapes["o_up"] = (self.hidden_size, self.attention_rank)
        return shapes


class PrivateModule(nn.Module):
    """A SwiGLU network beside the shared one and low-rank corrections of ``fc`` and of attention, each optional.

    Weights: ``gate_up_proj [2I, H]``, ``down_proj [H, I]``; ``fc_down [r, 3H_target]``, ``fc_up [H, r]``;
    ``qkv_down [r, 2H]``, ``qkv_up [Q + 2KV, r]`` (queries, keys and values share one ``down``), ``o_down [r, Q]``,
    ``o_up [H, r]``.
    """

    gate_up_proj: nn.Parameter
    down_proj: nn.Parameter
    fc_down: nn.Parameter
    fc_up: nn.Parameter
    qkv_down: nn.Parameter
    qkv_up: nn.Parameter
    o_down: nn.Parameter
    o_up: nn.Parameter

    def __init__(
        self, config: PrivateConfig, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> None:
        super().__init__()
        self.config = config
        for name, shape in config.tensor_shapes().items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape, dtype=dtype, device=device)))

    @classmethod
    def initialised(cls, config: PrivateConfig, *, seed: int = 0, scale: float = 0.02) -> "PrivateModule":
        """A module to start training from: inputs small and random, outputs zero.

        Because ``down_proj`` and all ``_up`` are zero, the draft with this module *is* the shared draft, bit for bit.
        """
        generator = torch.Generator().manual_seed(seed)
        module = cls(config)
        with torch.no_grad():
            for name in ("gate_up_proj", "fc_down", "qkv_down", "o_down"):
                weight = getattr(module, name, None)
                if weight is not None:
                    weight.normal_(0.0, scale, generator=generator)
        return module

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    def feed_forward(self, hidden: Tensor) -> Tensor:
        """Private part of the feed-forward sum: ``[T, H]`` to ``[T, H]``."""
        gate, up = functional.linear(hidden, self.gate_up_proj).chunk(2, dim=-1)
        return functional.linear(functional.silu(gate) * up, self.down_proj)

    def correct_fusion(self, features: Tensor) -> Tensor:
        """Low-rank addition to ``fc``: ``[T, 3H_target]`` to ``[T, H]``."""
        return functional.linear(functional.linear(features, self.fc_down), self.fc_up)

    def correct_qkv(self, inputs: Tensor) -> Tensor:
        """Low-rank addition to queries, keys and values: ``[T, 2H]`` to ``[T, Q + 2KV]``."""
        return functional.linear(functional.linear(inputs, self.qkv_down), self.qkv_up)

    def correct_output(self, attended: Tensor) -> Tensor:
        """Low-rank addition to the projection behind attention: ``[T, Q]`` to ``[T, H]``."""
        return functional.linear(functional.linear(attended, self.o_down), self.o_up)

    def fingerprint(self) -> str:
        """Hash of sizes and weights, to tell two modules apart."""
        digest = hashlib.sha256(json.dumps(dataclasses.asdict(self.config), sort_keys=True).encode())
        for name, weight in sorted(self.state_dict().items()):
            digest.update(name.encode())
            digest.update(weight.detach().float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def save(self, path: Path, metadata: dict[str, str] | None = None) -> None:
        """Writes the weights as safetensors (bfloat16 halves the file; training precision is kept as it is)."""
        weights = {name: weight.detach().cpu().contiguous() for name, weight in self.state_dict().items()}
        save_file(weights, path, metadata={"format": "pt", **(metadata or {})})
        path.chmod(0o644)  # safetensors leaves it readable to its owner only

    @classmethod
    def load(
        cls,
        path: Path,
        config: PrivateConfig,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> "PrivateModule":
        """Reads a module of exactly the sizes in ``config``.

        Raises:
            CheckpointError: the file is missing, unreadable, not safetensors, or holds non-finite values.
            MismatchError: names or shapes differ from ``config``.
        """
        found = _shapes(path)
        expected = config.tensor_shapes()
        if found != expected:
            raise MismatchError(
                f"{path} holds tensors {found}; the adapter's configuration asks for {expected}"
            )
        module = cls(config, dtype=dtype, device=device)
        for name, tensor in _read_tensors(path).items():
            require_finite(tensor, name, path)
            getattr(module, name).data.copy_(tensor)
        return module.requires_grad_(False).eval()


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    if path.suffix != ".safetensors":
        raise CheckpointError(f"{path} is not a .safetensors file; other formats are refused")
    entries, _ = read_header(path)
    odd = sorted({entry.dtype for entry in entries.values()} - set(FLOAT_TYPES))
    if odd:
        raise CheckpointError(f"{path} has tensors of type {listed(odd)}; {', '.join(FLOAT_TYPES)} are read")
    return {name: entry.shape for name, entry in entries.items()}


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(str(path), framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as safetensors: {error}") from error


@dataclass(frozen=True, slots=True)
class PrivateSegment:
    """Tokens ``start`` to ``end`` of a pack use ``module``; tokens in no segment use the shared draft alone."""

    module: PrivateModule
    start: int
    end: int


def add_private_feed_forward(output: Tensor, hidden: Tensor, segments: Sequence[PrivateSegment]) -> Tensor:
    """Adds each segment's private network of ``hidden`` to ``output``; both ``[T, H]``."""
    return _add_by_segment(output, hidden, segments, "intermediate_size", PrivateModule.feed_forward)


def add_private_fusion(output: Tensor, features: Tensor, segments: Sequence[PrivateSegment]) -> Tensor:
    """Adds each segment's correction of ``features [T, 3H_target]`` to ``output [T, H]``."""
    return _add_by_segment(output, features, segments, "fc_rank", PrivateModule.correct_fusion)


def add_private_qkv(output: Tensor, inputs: Tensor, segments: Sequence[PrivateSegment]) -> Tensor:
    """Adds each segment's correction of ``inputs [T, 2H]`` to the projected ``output [T, Q + 2KV]``."""
    return _add_by_segment(output, inputs, segments, "attention_rank", PrivateModule.correct_qkv)


def add_private_output(output: Tensor, attended: Tensor, segments: Sequence[PrivateSegment]) -> Tensor:
    """Adds each segment's correction of ``attended [T, Q]`` to ``output [T, H]``."""
    return _add_by_segment(output, attended, segments, "attention_rank", PrivateModule.correct_output)


def _add_by_segment(
    output: Tensor,
    inputs: Tensor,
    segments: Sequence[PrivateSegment],
    size_name: str,
    part: Callable[[PrivateModule, Tensor], Tensor],
) -> Tensor:
    active = [segment for segment in segments if getattr(segment.module.config, size_name)]
    if not active:
        return output
    if len(active) == 1 and active[0].start == 0 and active[0].end == output.shape[0]:
        return output + part(active[0].module, inputs)
    output = output.clone()  # in place on a copy: the caller's tensor may be needed for a backward pass
    for segment in active:
        span = slice(segment.start, segment.end)
        output[span] += part(segment.module, inputs[span])
    return output
