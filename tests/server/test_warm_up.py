"""What is recorded before the server says that it is ready."""

from pathlib import Path

import pytest

from eda.backends.recorded.shapes import ROWS
from eda.decoder import SpeculativeDecoder
from eda.server.assembly import _usual_rounds, load_runtime
from eda.server.engine.speculation import SpeculationTable
from eda.server.services import Services
from eda.server.settings import ConfigurationError, Settings, load_settings
from eda.speculation.kinds import Chain, Speculation, Tree


def test_the_usual_rounds_are_those_of_the_table() -> None:
    table = SpeculationTable.default()
    rounds = _usual_rounds(table, ROWS, 64)
    assert [count for count, _ in rounds] == [1, 2, 4, 8, 16]
    assert [speculation for _, speculation in rounds] == [Tree(5), Chain(4), Chain(4), Chain(3), Chain(2)]
    assert [count for count, _ in _usual_rounds(table, ROWS, 3)] == [1, 2]


def test_warming_up_is_a_part_of_loading(
    family_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The decoder gets the setting, and its passes are recorded while nobody is told yet that the server is ready."""
    settings = Settings(
        models_dir=family_directory,
        data_dir=tmp_path,
        weights="float32",
        worker=False,
        cache_mib=16,
        cuda_graphs="off",
    )
    services = Services(settings, load=load_runtime)
    seen: list[tuple[SpeculativeDecoder, list[tuple[int, Speculation]], bool]] = []

    def warm_up(decoder: SpeculativeDecoder, shapes: list[tuple[int, Speculation]]) -> int:
        seen.append((decoder, shapes, services.is_ready))
        return 0

    monkeypatch.setattr(SpeculativeDecoder, "warm_up", warm_up)
    runtime = load_runtime(services)
    runtime.on_close()
    [(decoder, shapes, was_ready)] = seen
    assert decoder.backend.name == "torch"
    assert shapes == []
    assert not was_ready


def test_the_setting_is_auto_or_off(monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_settings().cuda_graphs == "auto"
    monkeypatch.setenv("EDA_CUDA_GRAPHS", "off")
    assert load_settings().cuda_graphs == "off"
    monkeypatch.setenv("EDA_CUDA_GRAPHS", "on")
    with pytest.raises(ConfigurationError, match="cuda_graphs"):
        load_settings()
