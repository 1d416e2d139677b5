"""What is trained, what stays, what is resumed, and that acceptance rises."""

import itertools
import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from eda.errors import DataError, MismatchError, TrainingError
from eda.models.private import PrivateModule
from eda.training.learning import stopwatch, trainer
from eda.training.learning.acceptance import simulate_acceptance
from eda.training.learning.optimizer import MuonAdamW
from eda.training.learning.trainees import (
    Trainee,
    lora_trainee,
    merged_draft,
    private_trainee,
    retrain_trainee,
    shared_trainee,
)
from eda.training.learning.trainer import (
    TrainingConfig,
    batch_loss,
    default_learning_rate,
    learning_rate,
    train,
)
from eda.training.learning.unroll import unroll
from eda.training.progress import StageStoppedError
from tests.support.toys import (
    cyclic_samples,
    cyclic_target,
    dataset_of,
    new_draft,
    random_samples,
    random_target,
    spread,
    weights_of,
)

CONFIG = TrainingConfig(
    num_steps=12, batch_size=8, unroll_steps=3, learning_rate=5e-3, evaluate_every=4, patience=None
)


def private_for(target_seed: int = 0, *, rank: int = 0) -> Trainee:
    draft = spread(new_draft(random_target(target_seed)))
    sizes = draft.config.private_config(12, rank, rank)
    return private_trainee(draft, PrivateModule.initialised(sizes, seed=5))


@pytest.mark.parametrize("rank", [0, 3])
def test_only_the_private_module_receives_gradients_and_changes(rank: int) -> None:
    target, trainee = random_target(), private_for(rank=rank)
    assert trainee.private is not None
    data = dataset_of(target, random_samples(16))
    draft_before, target_before = (
        weights_of(trainee.draft),
        {n: p.clone() for n, p in target.named_parameters()},
    )
    train(trainee, data, data, CONFIG)
    assert all(parameter.grad is None for parameter in trainee.draft.parameters())
    assert all(parameter.grad is None for parameter in target.parameters())
    for name, tensor in trainee.draft.state_dict().items():
        assert torch.equal(tensor, draft_before[name]), name
    for name, parameter in target.named_parameters():
        assert torch.equal(parameter, target_before[name]), name
    assert set(trainee.parameters) == set(dict(trainee.private.named_parameters()))


def test_a_gradient_in_the_wrong_place_is_an_error() -> None:
    target, trainee = random_target(), private_for()
    data = dataset_of(target, random_samples(8))
    trainee.draft.fc.weight.requires_grad_(True)
    with pytest.raises(TrainingError, match=r"frozen parameters received gradients: fc\.weight"):
        train(trainee, data, data, CONFIG)


@pytest.mark.parametrize("rank", [0, 3])
def test_before_training_the_private_draft_is_the_shared_one_bit_for_bit(rank: int) -> None:
    target, trainee = random_target(), private_for(rank=rank)
    batch = dataset_of(target, random_samples(6)).batch(range(6), 3)
    with torch.no_grad():
        for private in (None, trainee.private):
            outputs = list(unroll(trainee.draft, batch.features, batch.embeddings, 3, private))
            if private is None:
                shared = outputs
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(outputs, shared, strict=True))


def test_the_private_module_alone_recovers_acceptance_on_a_changed_target() -> None:
    base, shifted = cyclic_target(1), cyclic_target(5)
    draft = new_draft(base)
    config = replace(CONFIG, num_steps=150, learning_rate=3e-2, evaluate_every=50)
    report = train(
        shared_trainee(draft),
        dataset_of(base, cyclic_samples(48, 1)),
        dataset_of(base, cyclic_samples(8, 1, seed=9)),
        config,
    )
    assert report.best_score > 4.0
    training = dataset_of(shifted, cyclic_samples(48, 5))
    held_out = dataset_of(shifted, cyclic_samples(8, 5, seed=9))
    before = simulate_acceptance(draft, None, held_out).mean_length
    private = PrivateModule.initialised(draft.config.private_config(32, 4))
    adapted = train(private_trainee(draft, private), training, held_out, config)
    assert adapted.first_score == pytest.approx(before)
    assert adapted.best_score > before + 1.0
    assert simulate_acceptance(draft, private, held_out).mean_length == pytest.approx(adapted.best_score)


@pytest.mark.parametrize("kind", ["private", "shared"])
def test_an_interrupted_run_gives_the_same_result(kind: str, tmp_path: Path) -> None:
    target = random_target()
    data, held_out = dataset_of(target, random_samples(20)), dataset_of(target, random_samples(6, 9))

    def fresh() -> Trainee:
        if kind == "private":
            return private_for()
        return shared_trainee(spread(new_draft(target)))

    whole = fresh()
    expected = train(whole, data, held_out, CONFIG)
    calls = 0

    def stop() -> bool:
        nonlocal calls
        calls += 1
        return calls % 5 == 0

    attempts = 0
    while True:
        attempts += 1
        part = fresh()
        try:
            found = train(
                part, data, held_out, CONFIG, checkpoint=tmp_path / "state.safetensors", should_stop=stop
            )
            break
        except StageStoppedError:
            assert attempts < 20
    assert attempts > 2
    for name, tensor in whole.state().items():
        assert torch.equal(tensor, part.state()[name]), name
    assert found.history == expected.history
    assert found.best_step == expected.best_step


PARTS = {
    *("target_states", "draft_forward", "loss", "backward", "optimizer", "evaluation"),
    *("saving", "reporting", "other"),
}


def test_the_report_says_what_each_part_took(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = random_target()
    data, held_out = dataset_of(target, random_samples(20)), dataset_of(target, random_samples(6, 9))
    real_step = MuonAdamW.step

    def slow_step(self: MuonAdamW, rate: float) -> None:
        time.sleep(0.05)
        real_step(self, rate)

    monkeypatch.setattr(MuonAdamW, "step", slow_step)
    start = time.perf_counter()
    report = train(private_for(), data, held_out, CONFIG, checkpoint=tmp_path / "state.safetensors")
    whole = time.perf_counter() - start
    assert set(report.seconds) == PARTS
    assert all(seconds > 0 for seconds in report.seconds.values())
    assert report.seconds["optimizer"] >= 0.05 * report.num_steps
    assert 0.9 * whole <= sum(report.seconds.values()) <= whole


def test_parts_of_interrupted_runs_add_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock that moves on by one at every look, a part takes as many seconds as it was entered."""
    ticks = itertools.count()
    monkeypatch.setattr(stopwatch, "perf_counter", lambda: float(next(ticks)))
    target = random_target()
    data, held_out = dataset_of(target, random_samples(20)), dataset_of(target, random_samples(6, 9))
    expected = train(private_for(), data, held_out, CONFIG).seconds
    asked = 0

    def stop() -> bool:
        nonlocal asked
        asked += 1
        return asked % 5 == 0

    attempts = 0
    while True:
        attempts += 1
        assert attempts < 20
        try:
            found = train(
                private_for(), data, held_out, CONFIG, checkpoint=tmp_path / "state", should_stop=stop
            ).seconds
            break
        except StageStoppedError:
            pass
    assert attempts > 2
    assert expected["optimizer"] == 2 * 12
    for part in ("draft_forward", "loss", "backward", "optimizer"):
        assert found[part] == expected[part], part
    assert found["saving"] >= attempts - 1


def test_a_checkpoint_without_times_is_gone_on_from(tmp_path: Path) -> None:
    target, path = random_target(), tmp_path / "state.safetensors"
    data = dataset_of(target, random_samples(8))
    expected = train(private_for(), data, data, CONFIG, checkpoint=path)
    with safe_open(str(path), framework="pt") as file:
        described = json.loads(file.metadata()["state"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    del described["seconds"]
    save_file(tensors, path, metadata={"state": json.dumps(described)})
    assert train(private_for(), data, data, CONFIG, checkpoint=path).history == expected.history


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    target = random_target()
    data, path = dataset_of(target, random_samples(8)), tmp_path / "state.safetensors"
    train(private_for(), data, data, replace(CONFIG, num_steps=2), checkpoint=path)
    with pytest.raises(MismatchError, match="other data or settings"):
        train(private_for(), data, data, replace(CONFIG, num_steps=3), checkpoint=path)
    path.write_bytes(b"x" * 100)
    with pytest.raises(DataError, match="no readable checkpoint"):
        train(private_for(), data, data, CONFIG, checkpoint=path)


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_state(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    target = random_target()
    data = dataset_of(target, random_samples(16))
    calls = 0
    real = batch_loss

    def spoiled(*arguments: object) -> object:
        nonlocal calls
        calls += 1
        loss, acceptances = real(*arguments)  # type: ignore[arg-type]
        return (loss * float("nan") if calls == 4 else loss), acceptances

    monkeypatch.setattr(trainer, "batch_loss", spoiled)
    trainee, path = private_for(), tmp_path / "state.safetensors"
    with pytest.raises(TrainingError, match=r"step 4: the loss is nan.*weights after step 3 are kept"):
        train(trainee, data, data, CONFIG, checkpoint=path)
    assert all(torch.isfinite(tensor).all() for tensor in trainee.state().values())
    monkeypatch.undo()
    resumed = private_for()
    report = train(resumed, data, data, CONFIG, checkpoint=path)
    assert report.num_steps == CONFIG.num_steps


def test_nothing_to_learn_from_is_an_error() -> None:
    target = random_target()
    data = dataset_of(target, random_samples(4))
    with pytest.raises(TrainingError, match="0 usable samples to train on and 4"):
        train(private_for(), dataset_of(target, []), data, CONFIG)


def test_a_retrained_copy_leaves_the_shared_draft_alone() -> None:
    target = random_target()
    draft, data = spread(new_draft(target)), dataset_of(target, random_samples(16))
    before = weights_of(draft)
    trainee = retrain_trainee(draft)
    train(trainee, data, data, replace(CONFIG, evaluate_every=1))
    assert all(torch.equal(tensor, before[name]) for name, tensor in draft.state_dict().items())
    assert trainee.share_of_draft == 1.0


def test_lora_on_all_linears_merges_into_a_plain_draft() -> None:
    target = random_target()
    draft, data = spread(new_draft(target)), dataset_of(target, random_samples(16))
    trainee = lora_trainee(draft, 4, seed=1)
    batch = data.batch(range(6), 3)
    with torch.no_grad():
        for mine, theirs in zip(
            unroll(trainee.draft, batch.features, batch.embeddings, 3),
            unroll(draft, batch.features, batch.embeddings, 3),
            strict=True,
        ):
            torch.testing.assert_close(mine, theirs)
    assert len(trainee.parameters) == 2 * 5
    with torch.no_grad():
        for parameter in trainee.parameters.values():
            parameter.add_(0.05)
    merged = merged_draft(trainee.draft)
    assert set(merged.state_dict()) == set(draft.state_dict())
    with torch.no_grad():
        for mine, theirs in zip(
            unroll(trainee.draft, batch.features, batch.embeddings, 3),
            unroll(merged, batch.features, batch.embeddings, 3),
            strict=True,
        ):
            torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("patience", "steps"), [(2, [0, 3, 6]), (3, [0, 3, 6, 9]), (None, [0, 3, 6, 9, 12])])
def test_patience_counts_measurements_after_the_best(patience: int | None, steps: list[int]) -> None:
    """Hardly any step is taken, so that the first measurement stays the best."""
    data = dataset_of(random_target(), random_samples(4))
    config = replace(CONFIG, learning_rate=1e-12, evaluate_every=3, patience=patience)
    report = train(private_for(), data, data, config)
    assert [point["step"] for point in report.history] == steps


def test_the_rate_warms_up_and_falls_to_zero() -> None:
    rates = [learning_rate(1.0, 0.1, step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == pytest.approx(1.0)
    assert rates.index(max(rates)) in (9, 10)
    assert rates[-1] < 1e-3
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_wider_drafts_have_smaller_default_rates() -> None:
    trainee = private_for()
    assert default_learning_rate(trainee) == pytest.approx(2.56 / 32)
    assert default_learning_rate(retrain_trainee(trainee.draft)) < default_learning_rate(trainee)
