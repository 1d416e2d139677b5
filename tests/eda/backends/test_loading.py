"""Which passes run a model, by the setting ``weights``."""

import logging
from pathlib import Path

import pytest
import torch
from gguf_files import TYPES, write_gguf

from eda.backends.cpu.body import CpuBody
from eda.backends.cpu.library import kernels
from eda.backends.loading import instructions_of, load_fine_tune, load_target
from eda.errors import UnsupportedModelError
from eda.formats.weight_settings import WeightSetting
from eda.models.target import TorchBody, automatic_dtype
from tests.support.passes import complete, random_tokens
from tests.support.tiny import tiny_target

SIZES = {"hidden_size": 64, "head_dim": 32, "intermediate_size": 96, "num_hidden_layers": 2}
TOKENS = random_tokens(12, seed=0)


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_target(tmp_path_factory.mktemp("stored"), **SIZES)


@pytest.fixture
def _no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eda.backends.cpu.target.kernels", lambda: None)
    monkeypatch.setenv("EDA_CPU_KERNELS", "0")


@pytest.mark.parametrize(
    ("weights", "formats"),
    [
        ("auto", ("bfloat16",)),
        ("float32", ("float32",)),
        ("bfloat16", ("bfloat16",)),
        ("int8", ("int8",)),
        ("int4", ("int4",)),
    ],
)
def test_each_setting(stored: Path, weights: WeightSetting, formats: tuple[str, ...]) -> None:
    if kernels() is None:
        pytest.skip("the C++ passes cannot run here")
    model = load_target(stored, weights=weights)
    assert model.weight_formats == formats
    assert isinstance(model.body, TorchBody if weights == "float32" else CpuBody)
    assert (instructions_of(model) is None) is (weights == "float32")
    full = load_fine_tune(
        tiny_target(stored.parent / f"full-{weights}", seed=1, **SIZES), model, "full"
    ).model
    assert (full.weight_formats, full.dtype) == (formats, model.dtype)


@pytest.mark.usefixtures("_no_kernels")
def test_torch_runs_what_it_is_fast_in(stored: Path) -> None:
    model = load_target(stored)
    assert isinstance(model.body, TorchBody)
    assert model.dtype == automatic_dtype("cpu")
    assert instructions_of(model) is None


@pytest.mark.usefixtures("_no_kernels")
@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_8_and_4_bits_need_the_passes(stored: Path, weights: WeightSetting) -> None:
    with pytest.raises(
        UnsupportedModelError, match=f"weights is '{weights}'.*EDA_CPU_KERNELS=0 forbids them; use auto"
    ):
        load_target(stored, weights=weights)


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        ({"head_dim": 8}, "heads of 8, and they take 32, 64, 128"),
        ({"mlp_bias": True}, "feed-forward layers have biases"),
        ({"hidden_size": 40}, "hidden size is 40, and they take multiples of 16"),
    ],
)
def test_8_bits_of_a_model_that_the_passes_do_not_run(
    tmp_path: Path, overrides: dict[str, int], reason: str
) -> None:
    path = tiny_target(tmp_path, **SIZES | overrides)
    with pytest.raises(UnsupportedModelError, match=reason):
        load_target(path, weights="int8")
    assert isinstance(load_target(path).body, TorchBody)


def test_8_bits_on_another_device(stored: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="the device is cuda:1, and they are for CPUs"):
        load_target(stored, weights="int8", device="cuda:1")


@pytest.mark.parametrize(
    ("compiler", "can_run", "reason"),
    [
        (None, True, "no C\\+\\+ compiler"),
        ("/usr/bin/g++", False, "neither AVX2"),
        ("/usr/bin/g++", True, "log"),
    ],
)
def test_why_there_are_no_passes(
    stored: Path, monkeypatch: pytest.MonkeyPatch, compiler: str | None, can_run: bool, reason: str
) -> None:
    monkeypatch.setattr("eda.backends.cpu.target.kernels", lambda: None)
    monkeypatch.delenv("EDA_CPU_KERNELS", raising=False)
    monkeypatch.setattr("eda.backends.cpu.library.shutil.which", lambda name: compiler)
    monkeypatch.setattr("eda.backends.cpu.library.can_run", lambda instructions: can_run)
    with pytest.raises(UnsupportedModelError, match=reason):
        load_target(stored, weights="int4")


@pytest.mark.usefixtures("_no_kernels")
def test_torch_takes_the_dequantised_values_of_a_file(
    stored: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = write_gguf(stored, tmp_path / "model.gguf", TYPES.Q8_0)
    with caplog.at_level(logging.INFO, "eda"):
        model = load_target(file)
    assert "dequantised for torch's passes: EDA_CPU_KERNELS=0 forbids them" in caplog.text
    assert model.weight_formats == (str(automatic_dtype("cpu")).removeprefix("torch."),)
    assert torch.isfinite(complete(model, TOKENS)).all()
