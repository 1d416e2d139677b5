"""Every `curl` of docs/http-api.md works."""

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from server.loading import load_runtime
from server.services import Services
from server.settings import Settings
from tests.server.serving import serve

PAGE = Path(__file__).parents[2] / "docs" / "http-api.md"
ADDRESS = "http://127.0.0.1:8000"


@pytest.fixture
def whole_server(family_directory: Path, tmp_path: Path) -> Iterator[str]:
    """The tiny family, assembled as `eda serve` does it, under the names of the bundled one."""
    models = tmp_path / "models"
    shutil.copytree(family_directory, models)
    (models / "full").rename(models / "medical")
    settings = Settings(
        models_dir=models,
        data_dir=tmp_path / "data",
        dtype="float32",
        worker=False,
        cache_mib=16,
        reserve_disk_mib=0,
    )
    with serve(Services(settings, load=load_runtime)) as url:
        yield url


def commands(page: str) -> list[str]:
    """The lines of all bash blocks, continued ones joined."""
    script = "\n".join(re.findall(r"```bash\n(.*?)```", page, re.DOTALL))
    return [part for part in re.split(r"\n(?=curl|JOB=|for )", script) if part.strip()]


@pytest.mark.skipif(not (shutil.which("curl") and shutil.which("jq")), reason="needs curl and jq")
def test_every_curl_of_the_page(whole_server: str) -> None:
    found = commands(PAGE.read_text(encoding="utf-8"))
    assert len(found) > 25
    lines = ["set -euo pipefail", "curl() { command curl --fail-with-body --noproxy '*' \"$@\"; }"]
    for command in found:
        command = command.replace(ADDRESS, whole_server).rstrip()
        # A job without a worker waits for ever, and so does the stream of its events.
        lines.append(f"{command} || [ $? = 28 ]" if "/events" in command else command)
        lines.append("echo")
    result = subprocess.run(["bash", "-c", "\n".join(lines)], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    assert '"mean_acceptance_length"' in result.stdout
