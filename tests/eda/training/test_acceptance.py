"""Simulated acceptance against the decoder itself: the same rounds, counted in two independent ways."""

import pytest
import torch

from eda.decoder import SpeculativeDecoder
from eda.generation import GenerationRequest, generate
from eda.models.fine_tune import FineTune
from eda.models.private import PrivateModule
from eda.sampling.params import SamplingParams
from eda.speculation.kinds import Chain
from eda.training.data.samples import Sample
from eda.training.learning.acceptance import simulate_acceptance, walk_rounds
from eda.training.learning.trainees import shared_trainee
from eda.training.learning.trainer import TrainingConfig, train
from tests.support.toys import VOCABULARY, dataset_of, new_draft, random_target, spread


@pytest.mark.parametrize("with_private", [False, True])
def test_equals_the_decoders_acceptance_length(with_private: bool) -> None:
    target = random_target(3)
    draft = spread(new_draft(target), 1)
    fine_tune = FineTune("toy", target)
    generator = torch.Generator().manual_seed(0)
    prompts = [
        torch.randint(VOCABULARY, (3 + number % 4,), generator=generator).tolist() for number in range(12)
    ]

    def decode(private: PrivateModule | None, length: int) -> list[tuple[list[int], list[tuple[int, int]]]]:
        decoder = SpeculativeDecoder.for_models(target, draft, num_slots=600)
        requests = [
            GenerationRequest(
                prompt,
                40,
                sampling=SamplingParams(temperature=0.0),
                speculation=Chain(length),
                private=private,
            )
            for prompt in prompts
        ]
        return [(made.token_ids, made.steps) for made in generate(decoder, fine_tune, requests)]

    plain = decode(None, 4)
    samples = [
        Sample(f"s{number}", tuple(prompt), tuple(made[0]))
        for number, (prompt, made) in enumerate(zip(prompts, plain, strict=True))
    ]
    data = dataset_of(target, samples)
    # A draft that has learned these very answers gets runs of every length; a random private module spoils some.
    train(
        shared_trainee(draft),
        data,
        data,
        TrainingConfig(num_steps=30, batch_size=6, learning_rate=5e-2, patience=None),
    )
    draft.requires_grad_(False)
    private = None
    if with_private:
        private = PrivateModule(draft.config.private_config(16, 3)).requires_grad_(False)
        for parameter in private.parameters():
            parameter.normal_(0.0, 0.1, generator=generator)
    decoded = decode(private, 4)
    assert [tokens for tokens, _ in decoded] == [tokens for tokens, _ in plain]
    steps = [accepted for _, made in decoded for _, accepted in made]
    measured = simulate_acceptance(draft, private, data, num_draft_tokens=4, batch_size=5)
    assert measured.num_rounds == len(steps)
    assert measured.mean_length == pytest.approx(1 + sum(steps) / len(steps))
    assert len(set(steps)) >= 3, "the test needs rounds of different lengths"
    for value, (_, made) in zip(measured.per_sample, decoded, strict=True):
        assert value == pytest.approx(1 + sum(accepted for _, accepted in made) / len(made))


@pytest.mark.parametrize(
    ("runs", "rounds"),
    [([], []), ([5], [0]), ([0, 0, 0], [0, 0, 0]), ([2, 0, 0, 1, 3], [2, 1]), ([9, 9, 9, 9], [3])],
)
def test_rounds_never_pass_the_end(runs: list[int], rounds: list[int]) -> None:
    assert walk_rounds(runs) == rounds
