"""Greedy text in bfloat16 is the same with any draft, batch and chunk: the passes of C++ keep every bit."""

import random
from collections.abc import Callable, Sequence

import pytest
import torch

from eda.decoder import SpeculativeDecoder
from eda.generation import GenerationRequest, generate
from eda.models.private import PrivateModule
from eda.sampling.params import SamplingParams
from eda.speculation.kinds import Chain, Off, Speculation, Tree
from tests.support.narrow import VOCAB_SIZE, NarrowFamily, make_narrow_family
from tests.support.passes import random_tokens

pytestmark = pytest.mark.usefixtures("_needs_kernels")

MAX_TOKENS = 24
GREEDY = SamplingParams(temperature=0.0)
PLAIN = Off()
CHAIN = Chain(4)
TREE = Tree(4, top_k=4, num_nodes=14)
Choice = tuple[Speculation, PrivateModule | None]


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> NarrowFamily:
    return make_narrow_family(tmp_path_factory.mktemp("family"))


@pytest.fixture(scope="module")
def cases(family: NarrowFamily) -> list[tuple[str, list[int]]]:
    """Prompts for the base and both LoRAs."""
    names = list(family.fine_tunes)
    return [(names[n % 3], random_tokens(1 + 5 * n % 31, n, VOCAB_SIZE)) for n in range(9)]


@pytest.fixture(scope="module")
def texts(family: NarrowFamily, cases: list[tuple[str, list[int]]]) -> list[list[int]]:
    """Plain decoding, one sequence at a time."""
    found, _ = decode(family, cases, lambda _: (PLAIN, None), batch_size=1, chunk=100)
    assert len({tuple(text) for text in found}) == len(found)
    return found


def decode(
    family: NarrowFamily,
    cases: Sequence[tuple[str, list[int]]],
    choose: Callable[[int], Choice],
    *,
    batch_size: int,
    chunk: int,
    max_tokens: int = MAX_TOKENS,
    sampling: SamplingParams = GREEDY,
    seed: int = 0,
) -> tuple[list[list[int]], int]:
    """All cases in one changing batch: their texts, and how many draft tokens were right."""
    decoder = SpeculativeDecoder.for_models(family.base, family.draft, num_slots=2048, seed=seed)
    requests = []
    for place, (name, prompt) in enumerate(cases):
        speculation, module = choose(place)
        fine_tune = family.fine_tunes[name]
        requests.append(
            GenerationRequest(prompt, max_tokens, frozenset(), sampling, speculation, module, fine_tune)
        )
    generations = generate(
        decoder, family.fine_tunes["base"], requests, max_batch=batch_size, prefill_chunk=chunk
    )
    assert decoder.cache.allocator.num_free == 2048
    steps = [step for generation in generations for step in generation.steps]
    return [generation.token_ids for generation in generations], sum(accepted for _, accepted in steps)


@pytest.mark.parametrize("batch_size", [1, 6])
@pytest.mark.parametrize("mode", ["plain", "chain", "tree"])
def test_one_mode_for_all_rows(
    family: NarrowFamily,
    cases: list[tuple[str, list[int]]],
    texts: list[list[int]],
    mode: str,
    batch_size: int,
) -> None:
    speculation = {"plain": PLAIN, "chain": CHAIN, "tree": TREE}[mode]
    found, num_accepted = decode(
        family, cases, lambda n: (speculation, family.modules[n // 3 % 3]), batch_size=batch_size, chunk=7
    )
    assert found == texts
    assert (num_accepted > 5) is (mode != "plain")


@pytest.mark.parametrize("seed", range(3))
def test_mixed_modes_lengths_modules_and_chunks(
    family: NarrowFamily, cases: list[tuple[str, list[int]]], texts: list[list[int]], seed: int
) -> None:
    chance = random.Random(seed)
    modes = [
        PLAIN,
        CHAIN,
        TREE,
        Chain(1),
        Chain(9, min_probability=0.01),
        Tree(2, top_k=5, num_nodes=30),
    ]
    found, _ = decode(
        family,
        cases,
        lambda _: (chance.choice(modes), chance.choice(family.modules)),
        batch_size=chance.randint(2, 8),
        chunk=chance.choice([1, 3, 16]),
    )
    assert found == texts


@pytest.mark.usefixtures("_own_thread_number")
def test_two_threads(
    family: NarrowFamily, cases: list[tuple[str, list[int]]], texts: list[list[int]]
) -> None:
    torch.set_num_threads(2)
    found, _ = decode(
        family,
        cases[:2],
        lambda n: ((CHAIN, TREE)[n], family.modules[n]),
        batch_size=2,
        chunk=20,
        max_tokens=8,  # threads that share their cores with others are slow
    )
    assert found == [text[:8] for text in texts[:2]]
    assert torch.get_num_threads() == 2


def test_a_seeded_text_is_the_same_with_any_draft(
    family: NarrowFamily, cases: list[tuple[str, list[int]]]
) -> None:
    sampling = SamplingParams(temperature=1.0, seed=5)
    found = [
        decode(
            family,
            cases[:5],
            lambda n, s=s: (s, family.modules[n % 3]),
            batch_size=5,
            chunk=6,
            sampling=sampling,
        )[0]
        for s in (PLAIN, CHAIN, TREE)
    ]
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("speculation", [CHAIN, TREE], ids=["chain", "tree"])
def test_unseeded_sampling_of_prompts_in_chunks(
    family: NarrowFamily, cases: list[tuple[str, list[int]]], speculation: Speculation
) -> None:
    """Chunks of a prompt feed the draft without a chain: nothing is to be drawn then."""
    found, num_accepted = decode(
        family,
        cases,
        lambda n: (speculation, family.modules[n % 3]),
        batch_size=4,
        chunk=3,
        sampling=SamplingParams(temperature=1.0),
    )
    assert all(len(text) == MAX_TOKENS for text in found)
    assert num_accepted > 0
