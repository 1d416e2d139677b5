"""The draft's C++ passes against ``DraftModel`` in float32, beside torch's own bfloat16 on the same weights."""

import pytest
import torch
from torch import Tensor

from eda.backends.cpu.draft import DraftHead
from eda.backends.cpu.weights import WeightFormat
from eda.models.private import PrivateModule
from tests.support.drafting import Part, Rounds, draft_config
from tests.support.narrow import mean_error, narrow_module

pytestmark = pytest.mark.usefixtures("_needs_kernels")

# Widths of private networks and ranks of corrections, 0 for none; blocks are of 32 and 16.
MODULES = {
    "none": None,
    "all": (20, 3, 5),
    "network": (50, 0, 0),
    "wider than the draft's": (90, 17, 17),
    "fc": (0, 5, 0),
    "attention": (0, 0, 16),
}
SIZES = {
    "head 32": {"hidden_size": 48, "head_dim": 32},
    "head 64, three share a key head": {"hidden_size": 80, "head_dim": 64, "num_heads": 6},
    "head 128": {"hidden_size": 64, "head_dim": 128, "num_heads": 2, "intermediate_size": 96},
}


def modules_for(rounds: Rounds) -> list[PrivateModule | None]:
    return [
        None if sizes is None else narrow_module(rounds.config.private_config(*sizes), seed)
        for seed, sizes in enumerate(MODULES.values())
    ]


def check_two_rounds(rounds: Rounds, modules: list[PrivateModule | None]) -> list[Tensor]:
    """A prompt each and some accepted tokens later, all rows in one pass; returns what the C++ passes gave."""
    extents = rounds.extents(len(modules))
    found: dict[str, list[Tensor]] = {"kernel": [], "torch": [], "exact": []}
    for counts in ((7, 1, 13, 4, 5, 2), (1, 3, 2, 5, 1, 4)):
        parts = [
            rounds.part(extent, count, module)
            for extent, count, module in zip(extents, counts, modules, strict=False)
        ]
        with torch.inference_mode():
            found["kernel"].append(rounds.extend(parts)[0])
            found["torch"].append(rounds.extend_on_torch(parts, rounds.narrow))
            found["exact"].append(rounds.extend_on_torch(parts, rounds.wide))
        for part in parts:
            part.extent.length += part.count
    error = mean_error(found["kernel"], found["exact"])
    assert error <= mean_error(found["torch"], found["exact"]) < 0.1
    return found["kernel"]


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("kind", MODULES)
def test_rows_of_one_private_module(sizes: str, kind: str) -> None:
    rounds = Rounds(draft_config(**SIZES[sizes]))
    module = dict(zip(MODULES, modules_for(rounds), strict=True))[kind]
    check_two_rounds(rounds, [module] * 3)


@pytest.mark.parametrize("sizes", SIZES)
def test_different_private_modules_in_one_pass(sizes: str) -> None:
    rounds = Rounds(draft_config(**SIZES[sizes]))
    check_two_rounds(rounds, modules_for(rounds))


@pytest.mark.parametrize("weights", ["bfloat16", "int8", "int4"])
def test_a_row_alone_and_among_others_is_the_same_to_the_bit(weights: WeightFormat) -> None:
    rounds = Rounds(draft_config(), weights=weights)
    parts = [
        rounds.part(extent, count, module)
        for extent, count, module in zip(
            rounds.extents(6), (7, 1, 13, 4, 5, 2), modules_for(rounds), strict=True
        )
    ]
    together = rounds.extend(parts)[0]
    for place, part in enumerate(parts):
        assert torch.equal(rounds.extend([part])[0][0], together[place])


@pytest.mark.parametrize("weights", ["bfloat16", "int8", "int4"])
def test_an_extension_in_pieces_is_the_same_to_the_bit(weights: WeightFormat) -> None:
    rounds = Rounds(draft_config(), weights=weights)
    module = modules_for(rounds)[1]
    [extent] = rounds.extents(1)
    whole = rounds.part(extent, 12, module)
    expected = rounds.extend([whole])[0]
    for start, end in ((0, 1), (1, 8), (8, 12)):
        part = Part(extent, whole.features[start:end], whole.token_ids[start:end], module)
        found = rounds.extend([part])[0]
        extent.length += part.count
    assert torch.equal(found, expected)


def test_a_target_in_float32_beside_a_draft_in_bfloat16() -> None:
    rounds = Rounds(draft_config())
    part = rounds.part(rounds.extents(1)[0], 6)
    part.num_steps = 5
    hidden, chains = rounds.extend([part])
    logits = rounds.step_logits(part, hidden[0], chains[0])
    rounds.head = DraftHead(rounds.head_rows.float(), rounds.embedding.float(), weights="bfloat16")
    rounds.embedding, part.features = rounds.embedding.float(), part.features.float()
    found, found_chains = rounds.extend([part])
    assert torch.equal(found, hidden)
    assert found_chains == chains
    assert torch.equal(rounds.step_logits(part, hidden[0], chains[0]), logits)


@pytest.mark.usefixtures("_own_thread_number")
@pytest.mark.parametrize("sizes", SIZES)
def test_the_number_of_threads_changes_no_bit(sizes: str) -> None:
    rounds = Rounds(draft_config(**SIZES[sizes]))
    parts = [rounds.part(e, 6, m) for e, m in zip(rounds.extents(6), modules_for(rounds), strict=True)]
    expected = rounds.extend(parts)[0]
    for count in (2, 3):
        torch.set_num_threads(count)
        assert torch.equal(rounds.extend(parts)[0], expected)


@pytest.mark.parametrize(
    "name", ["gate_up_proj", "down_proj", "fc_down", "fc_up", "qkv_down", "qkv_up", "o_down", "o_up"]
)
def test_a_private_module_that_changes_is_laid_out_anew(name: str) -> None:
    rounds = Rounds(draft_config())
    module = narrow_module(rounds.config.private_config(20, 3, 3), 1)
    part = rounds.part(rounds.extents(1)[0], 6, module)
    before = rounds.extend([part])[0]
    packed = rounds.kernel.private(module)
    assert rounds.kernel.private(module) is packed
    with torch.no_grad():
        getattr(module, name).mul_(-1.0)
    after = rounds.extend([part])[0]
    assert not torch.equal(after, before)
    exact = rounds.extend_on_torch([part], rounds.wide)
    assert mean_error([after], [exact]) < mean_error([before], [exact]) / 2
    setattr(module, name, torch.nn.Parameter(-getattr(module, name), requires_grad=False))
    assert torch.equal(rounds.extend([part])[0], before)
