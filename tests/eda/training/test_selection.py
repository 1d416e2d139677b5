"""Scores that point the right way, and halves that are equally long."""

import pytest
import torch

from eda.errors import EdaError
from eda.models.fine_tune import FineTune
from eda.training.data.samples import Sample
from eda.training.data.scores import SCORES
from eda.training.data.selection import score_samples, select
from eda.training.learning.trainees import shared_trainee
from eda.training.learning.trainer import TrainingConfig, train
from eda.training.progress import StageStoppedError
from tests.support.toys import (
    cyclic_samples,
    cyclic_target,
    dataset_of,
    new_draft,
    random_samples,
    random_target,
    whole_logits,
)


def test_a_fine_tune_that_is_the_base_has_not_shifted() -> None:
    target = random_target()
    base = FineTune("base", target)
    found = score_samples(base, base, new_draft(target), random_samples(6), ("cosine", "divergence"))
    assert found["cosine"] == pytest.approx([0.0] * 6, abs=1e-4)
    assert found["divergence"] == pytest.approx([0.0] * 6, abs=1e-5)


def test_divergence_and_flatness_equal_their_formulas() -> None:
    base, other = random_target(0), random_target(1)
    samples = random_samples(5)
    found = score_samples(
        FineTune("base", base), FineTune("other", other), new_draft(base), samples, ("divergence", "flatness")
    )
    for index, sample in enumerate(samples):
        tokens, start = [*sample.prompt_ids, *sample.response_ids], len(sample.prompt_ids)
        judged = slice(start, start + sample.num_roots)
        p = whole_logits(other, tokens)[judged].softmax(-1)
        q = whole_logits(base, tokens)[judged].softmax(-1)
        divergence = (p * (p / q).log()).sum(-1).mean()
        uniform = torch.full_like(p, 1 / p.shape[1])
        flatness = torch.cosine_similarity(p, uniform).mean()
        assert found["divergence"][index] == pytest.approx(float(divergence), rel=1e-3)
        assert found["flatness"][index] == pytest.approx(float(flatness), rel=1e-3)


def test_samples_that_the_draft_knows_have_a_small_deficit_and_little_headroom() -> None:
    known, changed = cyclic_target(1), cyclic_target(5)
    draft = new_draft(known)
    data = dataset_of(known, cyclic_samples(32, 1))
    train(
        shared_trainee(draft),
        data,
        data,
        TrainingConfig(num_steps=60, batch_size=8, unroll_steps=2, learning_rate=1e-2, patience=None),
    )
    base, fine_tune = FineTune("base", known), FineTune("changed", changed)
    easy = score_samples(base, base, draft, cyclic_samples(4, 1, seed=3), ("deficit", "headroom"))
    hard = score_samples(base, fine_tune, draft, cyclic_samples(4, 5, seed=3), ("deficit", "headroom"))
    assert max(easy["deficit"]) < 0.5 < min(hard["deficit"])
    assert max(easy["headroom"]) < 0.5 < min(hard["headroom"])


def test_an_undecided_fine_tune_leaves_a_deficit_but_no_headroom() -> None:
    known, undecided = cyclic_target(1), cyclic_target(5)
    undecided.head.mul_(1e-3)
    base, fine_tune = FineTune("base", known), FineTune("undecided", undecided)
    draft = new_draft(known)
    draft.norm.weight.data.mul_(1e5)  # sure of itself all the same
    found = score_samples(base, fine_tune, draft, cyclic_samples(4, 5, seed=3), ("deficit", "headroom"))
    assert max(found["headroom"]) < 0.05 < 0.5 < min(found["deficit"])


def test_features_of_another_model_lie_far_from_the_base() -> None:
    base, fine_tune = FineTune("base", random_target(0)), FineTune("other", random_target(1))
    draft, samples = new_draft(base.model), random_samples(30)
    near = score_samples(base, base, draft, samples, ("mahalanobis", "cosine"))
    far = score_samples(base, fine_tune, draft, samples, ("mahalanobis", "cosine"))
    for score in ("mahalanobis", "cosine"):
        assert sum(far[score]) > 1.5 * sum(near[score])


def test_random_scores_follow_the_seed_only() -> None:
    base = FineTune("base", random_target())
    draft, samples = new_draft(base.model), random_samples(8)

    def scores(seed: int) -> list[float]:
        return score_samples(base, base, draft, samples, ("random",), seed=seed)["random"]

    computed = base.model.register_forward_hook(lambda *_: pytest.fail("a pass of the model"))
    assert scores(1) == scores(1) != scores(2)
    computed.remove()


def test_every_score_is_finite_and_stoppable() -> None:
    base, fine_tune = FineTune("base", random_target(0)), FineTune("other", random_target(1))
    draft, samples = new_draft(base.model), random_samples(10)
    found = score_samples(base, fine_tune, draft, samples, SCORES)
    for values in found.values():
        assert len(values) == 10
        assert len(set(values)) > 1
        assert torch.isfinite(torch.tensor(values)).all()
    with pytest.raises(StageStoppedError) as caught:
        score_samples(base, fine_tune, draft, samples, ("deficit",), should_stop=lambda: True)
    assert isinstance(caught.value, EdaError)


def test_half_is_half_of_the_tokens_and_keeps_the_highest() -> None:
    samples = random_samples(40, longest=12)
    scores = [float(number % 7) for number in range(40)]
    chosen = select(samples, scores, 0.5)
    assert abs(chosen.kept_tokens / chosen.candidate_tokens - 0.5) < 0.06
    kept = {sample.id for sample in chosen.samples}
    lowest_kept = min(score for sample, score in zip(samples, scores, strict=True) if sample.id in kept)
    left_out = [
        score
        for sample, score in zip(samples, scores, strict=True)
        if sample.id not in kept and sample.num_roots
    ]
    assert lowest_kept >= max(left_out)
    assert [sample.id for sample in chosen.samples] == [s.id for s in samples if s.id in kept]
    assert len(select(samples, scores, 1.0).samples) == sum(sample.num_roots > 0 for sample in samples)
    assert len(select(samples, scores, 0.001).samples) == 1
    with pytest.raises(ValueError, match="keep is 0"):
        select(samples, scores, 0)


def test_each_temperature_keeps_its_share() -> None:
    samples = [
        Sample(f"s{index}", (1,), tuple(range(5)), temperature=float(index % 4 == 0)) for index in range(16)
    ]
    # By score alone, all drawn answers would come before every greedy one.
    scores = [100.0 + index if sample.temperature else float(index) for index, sample in enumerate(samples)]
    kept = select(samples, scores, 0.5).samples
    assert [sample.id for sample in kept if sample.temperature] == ["s8", "s12"]
    assert [sample.id for sample in kept if not sample.temperature] == [
        "s9",
        "s10",
        "s11",
        "s13",
        "s14",
        "s15",
    ]
