"""Target states, batches and their masks."""

import torch

from eda.models.fine_tune import FineTune
from eda.models.target import default_tap_layers
from eda.training.data.samples import Sample
from eda.training.data.target_states import StateCache, compute_states
from tests.support.toys import dataset_of, random_samples, random_target, whole_logits

TAPS = default_tap_layers(4)


def test_states_are_those_of_the_whole_sequence() -> None:
    target = random_target()
    samples = random_samples(4)
    for sample, state in zip(samples, compute_states(FineTune("toy", target), samples, TAPS), strict=True):
        logits = whole_logits(target, [*sample.prompt_ids, *sample.response_ids])
        start = len(sample.prompt_ids)
        judged = logits[start : start + sample.num_roots]
        torch.testing.assert_close(target.logits(state.hidden), judged, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(state.log_normaliser, judged.logsumexp(-1), rtol=1e-4, atol=1e-4)
        assert state.argmax.tolist() == judged.argmax(-1).tolist()
        assert state.features.shape == (sample.length - 2, 3 * 32)


def test_features_are_tapped_where_the_draft_wants_them() -> None:
    target, samples = random_target(), random_samples(2)
    fine_tune, wanted = FineTune("toy", target), (0, 1, 2)
    expected = [state.features for state in StateCache(fine_tune, samples, wanted).get([0, 1])]
    other = [state.features for state in StateCache(fine_tune, samples, (2, 1, 0)).get([0, 1])]
    found = [state.features for state in StateCache(fine_tune, samples, wanted).get([0, 1])]
    for right, mine, turned in zip(expected, found, other, strict=True):
        assert torch.equal(right, mine)
        assert not torch.equal(right, turned)


def test_what_exceeds_the_memory_budget_is_computed_again_and_equal() -> None:
    target, samples = random_target(), random_samples(12)
    whole = StateCache(FineTune("toy", target), samples, TAPS)
    first = whole.get(range(12))
    budget = whole.used_bytes // 3
    small = StateCache(FineTune("toy", target), samples, TAPS, memory_bytes=budget, pack_tokens=20)
    for _ in range(2):
        for mine, theirs in zip(small.get(range(12)), first, strict=True):
            torch.testing.assert_close(mine.features, theirs.features, rtol=1e-2, atol=1e-2)
            torch.testing.assert_close(mine.hidden, theirs.hidden, rtol=1e-4, atol=1e-4)
    assert 0 < small.used_bytes <= whole.used_bytes // 3


def test_kept_states_lie_together() -> None:
    target, samples = random_target(), random_samples(12)
    cache = StateCache(FineTune("toy", target), samples, TAPS, pack_tokens=20)
    computed = cache.get(range(12))
    kept = cache.get(range(12))
    for mine, theirs in zip(computed, kept, strict=True):
        for name in ("features", "hidden", "log_normaliser", "argmax"):
            assert torch.equal(getattr(mine, name), getattr(theirs, name))
    assert (
        len(
            {
                getattr(states, name).untyped_storage().data_ptr()
                for states in kept
                for name in ("features", "hidden")
            }
        )
        == 1
    )


def test_masks_keep_to_the_answer() -> None:
    target = random_target()
    samples = [Sample("a", (1, 2, 3), (4, 5, 6, 7)), Sample("b", (1,), (2, 3)), Sample("c", (1, 2), (3,))]
    data = dataset_of(target, samples)
    assert data.usable == [0, 1]
    batch = data.batch([0, 1], num_steps=3)
    assert batch.first_roots.tolist() == [2, 0]
    assert batch.num_roots.tolist() == [3, 1]
    assert batch.tokens.tolist() == [[5, 6, 7], [3, 0, 0]]
    assert batch.num_tokens == 4
    assert [batch.valid(step).tolist() for step in range(3)] == [
        [[True, True, True], [True, False, False]],
        [[True, True, False], [False, False, False]],
        [[True, False, False], [False, False, False]],
    ]
    # Rows 0 to 2 are the first answer's states, row 3 is the second's.
    assert batch.positions(0).tolist() == [0, 1, 2, 3]
    assert batch.positions(1).tolist() == [1, 2]
    expected = target.embedding[torch.tensor([2, 3, 4, 5, 6, 7])]
    torch.testing.assert_close(batch.embeddings[0, :6], expected)


def test_an_epoch_has_every_sample_once_in_an_order_of_its_own() -> None:
    data = dataset_of(random_target(), random_samples(50))
    epochs = [data.batches_of_epoch(8, seed=3, epoch=epoch) for epoch in (0, 1)]
    for batches in epochs:
        assert sorted(index for batch in batches for index in batch) == list(range(50))
    assert epochs[0] != epochs[1]
    assert epochs[0] == data.batches_of_epoch(8, seed=3, epoch=0)
