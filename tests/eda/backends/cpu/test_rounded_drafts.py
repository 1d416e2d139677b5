"""Drafts of 8 bits: what rounding their weights costs."""

import ctypes

import pytest
import torch

from eda.backends.cpu.weights import PackedWeight
from tests.support.drafting import Rounds, draft_config
from tests.support.narrow import mean_error

pytestmark = pytest.mark.usefixtures("_needs_kernels")


def test_what_weights_take() -> None:
    weight = torch.randn(128, 64)
    sizes = [PackedWeight(weight, format=name).num_bytes for name in ("bfloat16", "int8", "int4")]
    groups = 128 * 2 * 2  # of float16
    assert sizes == [128 * 64 * 2, 128 * 64 + groups, 128 * 32 + 2 * groups]
    packed = PackedWeight(weight, format="int8")
    assert ctypes.string_at(packed.struct.data, 4) == bytes(packed.data.flatten()[:4].tolist())


def test_a_quantised_draft_stays_close_to_the_exact_one() -> None:
    rounds = Rounds(draft_config(hidden_size=96, intermediate_size=128), weights="int8")
    part = rounds.part(rounds.extents(1)[0], 13)
    with torch.inference_mode():
        found = rounds.extend([part])[0]
        exact = rounds.extend_on_torch([part], rounds.wide)
        narrow = rounds.extend_on_torch([part], rounds.narrow)
    error = mean_error([found], [exact])
    assert mean_error([narrow], [exact]) < error < 0.05  # it is rounded at all, and not by much
