"""Every line of the log has the form that was asked for, whoever writes it."""

import json
import logging
from collections.abc import Iterator

import pytest

from eda.server.logs import configure_logs, logger
from eda.server.settings import Settings


@pytest.fixture(autouse=True)
def _quiet_afterwards() -> Iterator[None]:
    yield
    configure_logs(Settings(log_level="error"))


def test_every_line_is_json(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logs(Settings(log_format="json"))
    configure_logs(Settings(log_format="json"))  # a second time adds no second line
    logger().info("ready", models=["base"])
    logging.getLogger("eda.backends.cpu.library").warning("no compiler: %s", "slower")
    logging.getLogger("eda.adapters.serving.registry").info("loaded")
    logging.getLogger("eda.adapters.serving.registry").debug("not this one")
    try:
        raise ValueError("broken")
    except ValueError:
        logging.getLogger("asyncio").exception("in the application")
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [(line["event"], line["level"]) for line in lines] == [
        ("ready", "info"),
        ("no compiler: slower", "warning"),
        ("loaded", "info"),
        ("in the application", "error"),
    ]
    assert "ValueError: broken" in lines[-1]["exception"]
    assert all("timestamp" in line for line in lines)


def test_the_console_shows_both_kinds(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logs(Settings(log_level="warning"))
    logger().warning("draining")
    logging.getLogger("eda.adapters.serving.registry").info("not this one")
    logging.getLogger("eda.adapters.serving.registry").warning("skipped")
    first, second = capsys.readouterr().err.splitlines()
    assert "draining" in first
    assert "skipped" in second
