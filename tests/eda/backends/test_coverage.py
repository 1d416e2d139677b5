"""What the fast paths cover is an allow-list: a field that nobody has thought about must fail here, not go unseen."""

from dataclasses import fields

import pytest

from eda.backends.cpu import draft, target
from eda.backends.cpu import drafter as kernel_proposals
from eda.backends.cpu import verifier as verification
from eda.backends.recorded import proposer as draft_passes
from eda.formats.config import ModelConfig
from eda.models.draft import DraftConfig
from eda.sampling.params import DEMAND_OF_FIELD, SamplingDemand, SamplingParams

NOTHING, DRAWS, LOGPROBS = SamplingDemand.NOTHING, SamplingDemand.DRAWS, SamplingDemand.LOGPROBS
CUTS, TEMPERATURE, SEED = SamplingDemand.CUTS, SamplingDemand.TEMPERATURE, SamplingDemand.SEED
ALLOW_LISTS = {
    "verification in C++": verification.COVERS,
    "chains in C++": kernel_proposals.CHAINS_COVER,
    "trees in C++": kernel_proposals.TREES_COVER,
    "recorded chains": draft_passes.CHAINS_COVER,
    "recorded trees": draft_passes.TREES_COVER,
}


def test_every_sampling_field_is_mapped_to_a_demand() -> None:
    assert {field.name for field in fields(SamplingParams) if field.init} == set(DEMAND_OF_FIELD)


def test_the_neutral_values_are_the_defaults() -> None:
    defaults = SamplingParams()
    assert {name: getattr(defaults, name) for name in DEMAND_OF_FIELD} == {
        name: neutral for name, (_, neutral) in DEMAND_OF_FIELD.items()
    }
    assert defaults.demand == DRAWS


@pytest.mark.parametrize(
    ("settings", "demand"),
    [
        ({"temperature": 0.0}, NOTHING),
        ({"temperature": 0.0, "top_k": 4, "top_p": 0.5, "min_p": 0.1, "seed": 3}, NOTHING),
        ({"temperature": 0.0, "num_logprobs": 0}, LOGPROBS),
        ({"temperature": 0.0, "presence_penalty": 0.5}, SamplingDemand.PENALTIES),
        ({"temperature": 0.5}, DRAWS | TEMPERATURE),
        ({"temperature": 0.5, "seed": 1}, SEED | TEMPERATURE),
        ({"top_k": 3}, DRAWS | CUTS),
        ({"top_p": 0.9}, DRAWS | CUTS),
        ({"min_p": 0.1}, DRAWS | CUTS),
        ({"repetition_penalty": 1.1}, DRAWS | SamplingDemand.PENALTIES),
        ({"frequency_penalty": 1.0}, DRAWS | SamplingDemand.PENALTIES),
        ({"logit_bias": {3: 1.0}}, DRAWS | SamplingDemand.BIAS),
        ({"min_tokens": 2, "stop_ids": (1,)}, DRAWS | SamplingDemand.MIN_TOKENS),
        ({"stop_ids": (1,)}, DRAWS),
    ],
)
def test_what_settings_demand(settings: dict[str, object], demand: SamplingDemand) -> None:
    assert SamplingParams(**settings).demand == demand  # type: ignore[arg-type]


@pytest.mark.parametrize("covers", ALLOW_LISTS.values(), ids=list(ALLOW_LISTS))
def test_no_fast_path_takes_a_row_whose_logits_are_edited_or_seeded(covers: SamplingDemand) -> None:
    plain = SamplingParams(temperature=0.0)
    assert plain.demand in covers
    for settings in (
        {"seed": 1},
        {"logit_bias": {3: 1.0}},
        {"min_tokens": 2},
        {"presence_penalty": 0.1},
        {"repetition_penalty": 1.1},
    ):
        assert SamplingParams(**settings).demand not in covers  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("config", "read", "irrelevant"),
    [
        (ModelConfig, target.READ, target.IRRELEVANT),
        (DraftConfig, draft.READ, draft.IRRELEVANT),
    ],
)
def test_every_size_and_switch_is_read_by_the_cpp_passes_or_said_to_be_irrelevant(
    config: type, read: frozenset[str], irrelevant: frozenset[str]
) -> None:
    assert {field.name for field in fields(config)} == read | irrelevant
    assert not read & irrelevant
