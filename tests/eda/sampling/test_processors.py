"""Processed logits equal those of transformers' processors and warpers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from eda.sampling.params import SamplingParams
from eda.sampling.processors import LogitsContext, TokenHistory, process_logits
from tests.support.sampling_reference import reference_logits

VOCAB_SIZE = 700
"""More than the batch that top-p fetches at first, so that it has to fetch again for a flat distribution."""

SETTINGS = [
    SamplingParams(),
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=0.3),
    SamplingParams(top_k=1),
    SamplingParams(top_k=40),
    SamplingParams(top_k=10_000),
    SamplingParams(top_p=0.9),
    SamplingParams(temperature=5.0, top_p=0.98),
    SamplingParams(top_p=1e-9),
    SamplingParams(min_p=0.1),
    SamplingParams(min_p=1.0),
    SamplingParams(temperature=1.7, top_k=200, top_p=0.8, min_p=0.01),
    SamplingParams(temperature=0.0, top_k=5, top_p=0.5, min_p=0.5),
    SamplingParams(temperature=0.0, repetition_penalty=1.5),
    SamplingParams(repetition_penalty=0.7, presence_penalty=0.4, frequency_penalty=0.3),
    SamplingParams(presence_penalty=-1.0),
    SamplingParams(frequency_penalty=1.5, top_k=30),
    SamplingParams(logit_bias={3: 2.5, 699: -4.0, 12: float("-inf")}),
    SamplingParams(min_tokens=9, stop_ids=(3, 5)),
    SamplingParams(min_tokens=3, stop_ids=(3, 5)),
    SamplingParams(
        temperature=0.9,
        top_k=300,
        top_p=0.95,
        min_p=0.001,
        repetition_penalty=1.2,
        presence_penalty=0.2,
        frequency_penalty=0.1,
        logit_bias={1: 1.0, 3: 5.0},
        min_tokens=50,
        stop_ids=(3,),
    ),
]
PROMPT = [3, 3, 17, 650, 1]
OUTPUT = [12, 3, 400]
PATH = (400, 12, 12)


def random_logits(rows: int, vocab_size: int = VOCAB_SIZE, seed: int = 0) -> Tensor:
    return torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * 3


def context(
    params: SamplingParams, *, path: tuple[int, ...] = PATH, vocab_size: int = VOCAB_SIZE
) -> LogitsContext:
    history = TokenHistory(PROMPT, vocab_size, "cpu")
    history.append(OUTPUT[:2])
    history.append(OUTPUT[2:])
    return LogitsContext(params, history, path, len(OUTPUT) + len(path))


def assert_same(actual: Tensor, expected: Tensor) -> None:
    assert torch.equal(actual.isneginf(), expected.isneginf())
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("params", SETTINGS, ids=range(len(SETTINGS)))
def test_one_row_equals_transformers(params: SamplingParams) -> None:
    logits = random_logits(1)
    expected = reference_logits(params, logits[0], PROMPT, [*OUTPUT, *PATH])
    assert_same(process_logits(logits, [context(params)])[0], expected)


def test_rows_of_a_batch_do_not_depend_on_each_other() -> None:
    logits = random_logits(len(SETTINGS), seed=1)
    contexts = [context(params) for params in SETTINGS]
    together = process_logits(logits, contexts)
    for row, params in enumerate(SETTINGS):
        assert torch.equal(together[row], process_logits(logits[row : row + 1], contexts[row : row + 1])[0])
        assert_same(together[row], reference_logits(params, logits[row], PROMPT, [*OUTPUT, *PATH]))


@given(
    temperature=st.sampled_from([0.0, 0.5, 1.0, 2.0]),
    top_k=st.integers(0, 30),
    top_p=st.floats(0.05, 1.0),
    min_p=st.floats(0.0, 0.9),
    repetition=st.floats(0.5, 2.0),
    penalties=st.tuples(st.floats(-2, 2), st.floats(-2, 2)),
    bias=st.dictionaries(st.integers(0, 19), st.floats(-10, 10), max_size=4),
    min_tokens=st.integers(0, 6),
    prompt=st.lists(st.integers(0, 19), min_size=1, max_size=6),
    output=st.lists(st.integers(0, 19), max_size=6),
    num_drafted=st.integers(0, 6),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_any_settings_equal_transformers(
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    repetition: float,
    penalties: tuple[float, float],
    bias: dict[int, float],
    min_tokens: int,
    prompt: list[int],
    output: list[int],
    num_drafted: int,
    seed: int,
) -> None:
    params = SamplingParams(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition,
        presence_penalty=penalties[0],
        frequency_penalty=penalties[1],
        logit_bias=bias,
        min_tokens=min_tokens,
        stop_ids=(4, 7),
    )
    emitted = len(output) - min(num_drafted, len(output))
    history = TokenHistory(prompt, 20, "cpu")
    history.append(output[:emitted])
    row = LogitsContext(params, history, tuple(output[emitted:]), len(output))
    logits = random_logits(1, 20, seed)
    actual = process_logits(logits, [row])[0]
    expected = reference_logits(params, logits[0], prompt, output)
    # A token right at the edge of top-p or min-p may fall on either side by rounding.
    edge = actual.isneginf() != expected.isneginf()
    assert int(edge.sum()) <= 1
    torch.testing.assert_close(actual[~edge], expected[~edge], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("params", SETTINGS, ids=range(len(SETTINGS)))
def test_a_reduced_vocabulary_is_edited_by_target_ids(params: SamplingParams) -> None:
    """Penalties and bias reach the right columns; top-k, top-p and min-p look at the columns that there are."""
    edited_ids = [3, 12, 400, 17]
    others = [token_id for token_id in range(699, 100, -7) if token_id not in edited_ids]
    token_ids = torch.tensor([*others[:40], *edited_ids, *others[40:]])
    logits = random_logits(1, len(token_ids))
    full = torch.zeros(VOCAB_SIZE).index_copy(0, token_ids, logits[0])
    edits = SamplingParams(
        temperature=0.0,
        repetition_penalty=params.repetition_penalty,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        logit_bias=params.logit_bias,
        min_tokens=params.min_tokens,
        stop_ids=params.stop_ids,
    )
    edited = reference_logits(edits, full, PROMPT, [*OUTPUT, *PATH])[token_ids]
    narrow = SamplingParams(params.temperature, params.top_k, params.top_p, params.min_p)
    expected = reference_logits(narrow, edited, PROMPT, [])
    assert_same(process_logits(logits, [context(params)], token_ids)[0], expected)


def test_nothing_to_do_returns_the_logits_themselves() -> None:
    logits = random_logits(3)
    finished = SamplingParams(min_tokens=2, stop_ids=(1,))
    contexts = [LogitsContext(SamplingParams()), LogitsContext(SamplingParams(temperature=0.0, top_k=3))]
    assert process_logits(logits, [*contexts, LogitsContext(finished, num_generated=2)]) is logits


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_types_are_computed_in_float32(dtype: torch.dtype) -> None:
    logits = random_logits(2).to(dtype)
    contexts = [LogitsContext(SamplingParams(temperature=0.7)), LogitsContext(SamplingParams())]
    processed = process_logits(logits, contexts)
    assert processed.dtype == torch.float32
    assert torch.equal(processed[0], logits[0].float() / 0.7)
    assert torch.equal(processed[1], logits[1].float())


def test_logits_are_not_written_to() -> None:
    logits = random_logits(len(SETTINGS))
    before = logits.clone()
    process_logits(logits, [context(params) for params in SETTINGS])
    assert torch.equal(logits, before)


def test_top_p_keeps_all_tokens_as_likely_as_the_last_one_kept() -> None:
    logits = torch.tensor([[2.0, 1.0, 1.0, 1.0, 0.0]])
    processed = process_logits(logits, [LogitsContext(SamplingParams(top_p=0.6))])
    assert processed.isneginf().tolist() == [[False, False, False, False, True]]


@pytest.mark.parametrize("top_k", [0, 3, 40, 300])
@pytest.mark.parametrize("top_p", [0.3, 0.9, 0.999, 1.0])
def test_ties_are_kept_together(top_k: int, top_p: float) -> None:
    """Low-precision logits tie often: also when more tokens are tied than the first batch fetches."""
    logits = (random_logits(6, seed=3) * torch.tensor([0.1, 0.2, 0.4, 0.6, 1.0, 3.0])[:, None]).round()
    contexts = [LogitsContext(SamplingParams(top_k=top_k, top_p=top_p))] * 6
    for row, processed in zip(logits.double(), process_logits(logits, contexts), strict=True):
        survives = row >= (row.topk(top_k).values[-1] if top_k else row.min())
        probabilities = torch.where(survives, row.exp(), 0.0)
        likelier = row[None, :] > row[:, None]
        mass_of_likelier = (likelier * probabilities).sum(-1) / probabilities.sum()
        kept = survives & ((mass_of_likelier < top_p) | (top_p == 1.0))
        assert torch.equal(~processed.isneginf(), kept)


def test_ids_outside_the_vocabulary_have_no_effect() -> None:
    logits = random_logits(1, 10)
    params = SamplingParams(logit_bias={10: 5.0}, min_tokens=5, stop_ids=(11,))
    assert torch.equal(process_logits(logits, [LogitsContext(params)]), logits)


def test_wrong_calls_are_refused() -> None:
    logits = random_logits(2)
    with pytest.raises(ValueError, match="1 contexts for 2 rows"):
        process_logits(logits, [LogitsContext(SamplingParams())])
    with pytest.raises(ValueError, match="history is None"):
        process_logits(logits, [LogitsContext(SamplingParams(presence_penalty=1.0))] * 2)


def test_history_counts_prompt_and_output_apart() -> None:
    history = TokenHistory([1, 1, 4], 6, "cpu")
    history.append([2])
    assert history.output_counts.tolist() == [0, 0, 1, 0, 0, 0]
    history.append([2, 5])
    history.append([])
    assert history.output_counts.tolist() == [0, 0, 2, 0, 0, 1]
    assert history.prompt_seen.tolist() == [False, True, False, False, True, False]


def test_history_takes_no_vocabulary_sized_memory_before_it_is_read() -> None:
    history = TokenHistory([0], 10**15, "cpu")
    history.append([10**15 - 1])


@pytest.mark.parametrize("ids", [[-1], [0, 6]])
def test_history_refuses_ids_outside_the_vocabulary(ids: list[int]) -> None:
    with pytest.raises(ValueError, match="outside the vocabulary of 6 tokens"):
        TokenHistory(ids, 6, "cpu")
    with pytest.raises(ValueError, match="outside the vocabulary of 6 tokens"):
        TokenHistory([], 6, "cpu").append(ids)
