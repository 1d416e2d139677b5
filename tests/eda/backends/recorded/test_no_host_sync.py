"""Recorded functions may not wait for the device, and a step may do so twice: for the drafted and the accepted tokens.

A CUDA graph cannot hold an operation that reads a value on the host, gives tensors whose size depends on values, or
copies from the host. Without a GPU two things show that there are none: the functions run on the meta device, which has
no values to read, and every operation is looked at on its way.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from eda.backends.recorded.draft_functions import (
    ChainBuffers,
    DraftOwners,
    StaticDraft,
    TreeBuffers,
    chain_function,
    extension_function,
    tree_function,
)
from eda.backends.recorded.shapes import Inputs
from eda.backends.recorded.target import target_function
from eda.decoder import ScheduledRow, SpeculativeDecoder
from eda.formats.config import ModelConfig, RopeConfig
from eda.models.draft import DraftConfig, DraftModel
from eda.models.fine_tune import FineTune
from eda.models.lora import LoraAdapter, LoraLayer, LowRank, LowRankBlock
from eda.models.target import TargetModel
from eda.sampling.params import SamplingParams
from eda.speculation.kinds import Speculation
from tests.support.backends import eager_proposer_of
from tests.support.graph_decoding import (
    CHAIN,
    PLAIN,
    TREE,
    Case,
    random_cases,
    random_private,
    recording,
    state_of,
)
from tests.support.reference_family import Family

_aten = torch.ops.aten
READS_VALUES = {
    _aten._local_scalar_dense.default,
    _aten.item.default,
    _aten.is_nonzero.default,
    _aten.equal.default,
    _aten.nonzero.default,
    _aten.masked_select.default,
    _aten.unique_dim.default,
    _aten._unique2.default,
    _aten.bincount.default,
    _aten.repeat_interleave.Tensor,
}


class NoWaiting(TorchDispatchMode):
    """Raises for operations that a CUDA graph cannot hold. ``device``: where everything has to be."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.count += 1
        if func in READS_VALUES:
            raise AssertionError(f"{func} reads values on the host")
        flat = [*args, *(kwargs or {}).values()]
        tensors = [each for each in flat if isinstance(each, Tensor)]
        tensors += [
            each
            for part in flat
            if isinstance(part, (list, tuple))
            for each in part
            if isinstance(each, Tensor)
        ]
        if func in (_aten.index.Tensor, _aten.index_put_.default, _aten.index_put.default):
            indices = [each for each in args[1] if each is not None]
            if any(each.dtype == torch.bool for each in indices):
                raise AssertionError(f"{func} with a mask has as many results as the mask says")
        result = func(*args, **(kwargs or {}))
        tensors += [
            each
            for each in (result if isinstance(result, (list, tuple)) else [result])
            if isinstance(each, Tensor)
        ]
        # Plain numbers are arguments of a kernel.
        elsewhere = [each for each in tensors if each.device.type != self.device and each.dim() > 0]
        if elsewhere:
            raise AssertionError(f"{func} has a tensor on {elsewhere[0].device}")
        return result


def on_meta() -> tuple[TargetModel, DraftModel]:
    """A target with windows, norms of heads and grouped heads, and a draft, without any values."""
    config = ModelConfig(
        architecture="Qwen3ForCausalLM",
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_layers=4,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        rms_norm_eps=1e-5,
        rope=RopeConfig.default(theta=1e4, max_position_embeddings=512),
        layer_windows=(None, 7, None, 7),
        qkv_bias=True,
        output_bias=False,
        mlp_bias=False,
        qk_norm=True,
        tie_word_embeddings=False,
        max_position_embeddings=512,
        eos_token_ids=(),
        dtype=torch.float32,
    )
    draft_config = DraftConfig(32, 48, 4, 2, 8, (0, 1, 3), 96, 60, 512)
    draft = DraftModel(draft_config, torch.arange(60)).to("meta").requires_grad_(False)
    with torch.device("meta"):
        target = TargetModel(config)
    return target, draft


def lora_on_meta(target: TargetModel) -> LoraAdapter:
    """A LoRA on every matrix, embeddings and output layer included."""
    config = target.config

    def update(out: int, size: int) -> LowRank:
        b = torch.empty(out, 3, device="meta")
        return LowRank(torch.empty(3, size, device="meta"), (LowRankBlock(0, 3, 0, out, b),))

    hidden, inner = config.hidden_size, config.intermediate_size
    heads = config.num_heads * config.head_dim
    layer = LoraLayer(
        update(heads + 2 * config.num_kv_heads * config.head_dim, hidden),
        update(hidden, heads),
        update(2 * inner, hidden),
        update(hidden, inner),
    )
    embedding = LowRank(
        torch.empty(3, config.vocab_size, device="meta"),
        (LowRankBlock(0, 3, 0, hidden, torch.empty(hidden, 3, device="meta")),),
    )
    return LoraAdapter("", (layer,) * config.num_layers, embedding, head=update(config.vocab_size, hidden))


META = torch.device("meta")


def meta_inputs(shapes: dict[str, tuple[int, ...]]) -> Inputs:
    return Inputs(shapes, META)


def meta_functions() -> dict[str, Callable[[], None]]:
    """Everything that is ever recorded, by a name."""
    target, draft = on_meta()
    functions: dict[str, Callable[[], None]] = {}
    kept: list[Any] = [target, draft]
    lora = lora_on_meta(target)
    private = random_private(draft, 0).to("meta")
    kept += [lora, private]
    cache, draft_cache = target.new_cache(64), draft.new_cache(64)
    empty = torch.empty
    for name, adapter in (("target", None), ("target with a LoRA", lora)):
        grid = (2, 3)
        shapes = {
            "tokens": (6,),
            **dict.fromkeys(("positions", "slots", "rope_lengths"), grid),
            "tail": (2, 3, 3),
        }
        shapes |= dict.fromkeys(("starts", "contexts", "lengths"), (2,))
        logits, features = empty(6, 96, device=META), empty(6, 96, device=META)
        functions[name] = target_function(
            target, adapter, cache, meta_inputs(shapes), logits, features, 256, (0, 1, 3)
        )
    for name, adapter, module in (("", None, None), (" with a LoRA and a private module", lora, private)):
        fine_tune = FineTune("x", target, adapter)
        owners = DraftOwners.of(fine_tune, module)
        static = StaticDraft(draft, draft_cache, owners, lambda each: each.head_rows(draft.draft_token_ids))
        kept.append(fine_tune)
        hidden = empty(2, 32, device=META)
        shapes = {"tokens": (16,), "positions": (2, 8), "slots": (2, 8)}
        shapes |= dict.fromkeys(("starts", "contexts", "lengths", "last"), (2,))
        functions["extension" + name] = extension_function(
            static, meta_inputs(shapes), empty(16, 96, device=META), hidden, 256
        )
        row_shapes = dict.fromkeys(("starts", "lengths", "steps", "scratch"), (2,))
        chain = ChainBuffers(
            meta_inputs(row_shapes),
            hidden,
            empty(2, 4, dtype=torch.int64, device=META),
            empty(2, 4, device=META),
            empty(2, device=META),
            empty(2, dtype=torch.bool, device=META),
            empty(2, 4, dtype=torch.float64, device=META),
            empty(4, 2, 60, device=META),
        )
        functions["greedy chain" + name] = chain_function(static, chain, 256, draws=False)
        functions["sampled chain" + name] = chain_function(static, chain, 256, draws=True)
        nodes = (2, 3 + 2 * 9)
        tree = TreeBuffers(
            meta_inputs(row_shapes),
            hidden,
            empty(nodes, dtype=torch.int64, device=META),
            empty(nodes, dtype=torch.int64, device=META),
            empty(2, 8, device=META),
            empty(2, 8, dtype=torch.int64, device=META),
            3,
            3,
        )
        functions["tree" + name] = tree_function(static, tree, 256)
    _ALIVE.extend(kept)
    return functions


_ALIVE: list[Any] = []  # the functions hold weights weakly
FUNCTIONS = meta_functions()


def refuse(*arguments: object, **keywords: object) -> Tensor:
    raise AssertionError("a tensor is made of the host's values")


@pytest.mark.parametrize("name", FUNCTIONS)
@torch.inference_mode()
def test_no_recorded_function_waits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    FUNCTIONS[name]()  # tables are made in the first call, before a recording begins
    for uploading in ("tensor", "as_tensor", "from_numpy"):
        monkeypatch.setattr(torch, uploading, refuse)
    with NoWaiting("meta") as watch:
        FUNCTIONS[name]()
    assert watch.count > 50


@pytest.mark.parametrize(
    "bad",
    [
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x.sum().item(),
        lambda x: x + torch.ones(3).to(x.device),
        lambda x: x.copy_(torch.ones(3)),
        lambda x: x.cpu(),
    ],
    ids=["mask", "nonzero", "item", "upload", "copy", "download"],
)
def test_the_watch_sees_what_it_should(bad: Callable[[Tensor], object]) -> None:
    given = torch.empty(3, device="meta")
    with pytest.raises((AssertionError, NotImplementedError, RuntimeError)), NoWaiting("meta"):
        bad(given)


@contextmanager
def count_reads() -> Iterator[list[str]]:
    """Every way in which Python asks a tensor for values."""
    reads: list[str] = []
    saved = {
        name: getattr(Tensor, name) for name in ("tolist", "item", "__bool__", "__int__", "__float__", "cpu")
    }

    def counting(name: str) -> Callable[..., Any]:
        def read(self: Tensor, *args: Any) -> Any:
            reads.append(name)
            return saved[name](self, *args)

        return read

    for name in saved:
        setattr(Tensor, name, counting(name))
    try:
        yield reads
    finally:
        for name, function in saved.items():
            setattr(Tensor, name, function)


def reads_per_step(
    family: Family, cases: Sequence[Case], graphs: Any, *, reads_once: bool
) -> list[list[str]]:
    decoder = SpeculativeDecoder.for_models(family.base, family.draft, num_slots=512, graphs=graphs)
    eager_proposer_of(decoder).reads_once = reads_once
    states = [state_of(family, case, 40) for case in cases]
    for state in states:
        decoder.admit(state)
    decoder.step([ScheduledRow(state, state.num_uncomputed) for state in states])
    per_step = []
    for _ in range(4):
        with count_reads() as reads:
            decoder.step([ScheduledRow(state) for state in states])
        per_step.append(list(reads))
    return per_step


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("speculation", [PLAIN, CHAIN, TREE], ids=["plain", "chain", "tree"])
def test_a_greedy_step_reads_drafted_and_accepted_tokens_once(
    family: Family, count: int, speculation: Speculation
) -> None:
    """On the CPU rotary tables look at positions, which they do nowhere else; that read is taken out here."""
    cases = random_cases(family, ["base"], count, seed=1)
    for case in cases:
        case.speculation = speculation
    with pytest.MonkeyPatch.context() as patch:
        fix_tables(patch, family)
        for reads in reads_per_step(family, cases, recording(), reads_once=True):
            assert reads == ["tolist"] * (1 if speculation is PLAIN else 2)


def test_chains_that_are_not_recorded_are_read_once_too(family: Family) -> None:
    """Seeds and top-p take the loop; on a GPU it runs to its end without a look at any token."""
    cases = random_cases(family, ["base"], 2, seed=2)
    for case in cases:
        case.sampling = SamplingParams(temperature=0.9, seed=5)
    with pytest.MonkeyPatch.context() as patch:
        fix_tables(patch, family)
        for reads in reads_per_step(family, cases, "off", reads_once=True):
            assert reads == ["tolist"] * 2
        assert all(len(reads) > 4 for reads in reads_per_step(family, cases, "off", reads_once=False))


def fix_tables(patch: pytest.MonkeyPatch, family: Family) -> None:
    for rotary in (family.base.rotary, family.draft.rotary):

        def forward(
            positions: Tensor, lengths: Tensor | None, dtype: torch.dtype, rotary: Any = rotary
        ) -> Any:
            rotary.reserve(256, dtype=dtype, device=positions.device)
            rows = rotary._tables[dtype, positions.device].index_select(0, positions)
            return rows[:, : rotary.head_dim], rows[:, rotary.head_dim :]

        patch.setattr(rotary, "forward", forward)
