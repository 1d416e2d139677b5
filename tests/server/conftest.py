"""Fixtures of the server tests: one tiny family and one server for the whole run."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from eda.backends.eager.drafter import ChainTreeDrafter
from eda.server.logs import configure_logs
from eda.server.settings import Settings
from tests.server.serving import Parts, make_parts, serve
from tests.support.backends import use_drafter
from tests.support.family import Family, save_family
from tests.support.oracle import Oracle, OracleProposer

NUM_SLOTS = 4096


@pytest.fixture(scope="session", autouse=True)
def quiet_logs() -> None:
    configure_logs(Settings(log_level="error"))


@pytest.fixture(scope="session")
def family_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_family(tmp_path_factory.mktemp("family"))


@pytest.fixture(scope="session")
def family(family_directory: Path) -> Family:
    return Family.load(family_directory)


@pytest.fixture(scope="session")
def oracle(family: Family) -> Oracle:
    return Oracle(family)


@pytest.fixture(scope="session")
def parts(family: Family, oracle: Oracle) -> Parts:
    """What ``url`` serves: its draft is right as often as wrong about prompts that the oracle knows."""
    parts = make_parts(family, num_slots=NUM_SLOTS)
    proposer = OracleProposer(family, oracle, NUM_SLOTS)
    use_drafter(parts.decoder, ChainTreeDrafter(proposer, family.draft.config.tap_layers))
    return parts


@pytest.fixture(scope="session")
def url(parts: Parts) -> Iterator[str]:
    with serve(parts.services) as address:
        yield address
    parts.wait_until_idle()


@pytest.fixture
def client(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=60) as client:
        yield client
