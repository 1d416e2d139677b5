"""What tests of recorded passes share."""

import sys
from pathlib import Path

import pytest
from reference_family import Family, make_family

sys.path.insert(0, str(Path(__file__).parents[1]))  # passes.py, also when only this folder is collected


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return make_family(tmp_path_factory.mktemp("family"))
