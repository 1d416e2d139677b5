"""Every `curl` of docs/http-api.md works, and the first one of the README."""

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from eda.server.app import create_app
from eda.server.assembly import load_runtime
from eda.server.services import Services
from eda.server.settings import Settings
from tests.server.serving import make_parts, serve
from tests.support.family import Family

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "http-api.md"
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
        weights="float32",
        worker=False,
        cache_mib=16,
        reserve_disk_mib=0,
    )
    with serve(Services(settings, load=load_runtime)) as url:
        yield url


def commands(page: str) -> list[str]:
    """The lines of all bash blocks, continued ones joined."""
    script = "\n".join(re.findall(r"```bash\n(.*?)```", page, re.DOTALL))
    return [part for part in re.split(r"\n(?=curl|JOB=|for |printf)", script) if part.strip()]


@pytest.mark.skipif(not (shutil.which("curl") and shutil.which("jq")), reason="needs curl and jq")
def test_every_curl_of_the_page(whole_server: str, tmp_path: Path) -> None:
    found = commands(PAGE.read_text(encoding="utf-8"))
    assert len(found) > 25
    found += [command for command in commands((ROOT / "README.md").read_text("utf-8")) if "/v1/" in command]
    lines = ["set -euo pipefail", "curl() { command curl --fail-with-body --noproxy '*' \"$@\"; }"]
    for command in found:
        command = command.replace(ADDRESS, whole_server).rstrip()
        # A job without a worker waits for ever, and so does the stream of its events.
        lines.append(f"{command} || [ $? = 28 ]" if "/events" in command else command)
        lines.append("echo")
    result = subprocess.run(
        ["bash", "-c", "\n".join(lines)], capture_output=True, text=True, timeout=120, cwd=tmp_path
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    # No answer may be empty: a page that shows a model should show it say something.
    assert '"mean_acceptance_length"' in result.stdout
    assert not re.search(r'"(?:text|content)":\s*"","(?:refusal|logprobs)"', result.stdout)


def test_every_endpoint_has_a_curl(family: Family) -> None:
    """Every operation of the OpenAPI description is called on the page, by its method and path."""
    called = []
    for command in commands(PAGE.read_text(encoding="utf-8")):
        for address in re.findall(rf"{ADDRESS}(/[^\s'\"|]*)", command):
            method = re.search(r"-X (\w+)", command)
            has_body = " -d " in command or " -F " in command
            called.append((method[1] if method else "POST" if has_body else "GET", address.partition("?")[0]))
    missing = []
    for path, operations in create_app(make_parts(family).services).openapi()["paths"].items():
        shape = re.compile(re.sub(r"\{\w+\}", "[^/]+", path))
        # A fixed path such as /adapters/upload is no example of /adapters/{name}.
        fixed = {other for _, other in called if other in {"/adapters/upload"}} - {path}
        for method in operations:
            if not any(m == method.upper() and shape.fullmatch(p) and p not in fixed for m, p in called):
                missing.append((method, path))
    assert missing == []
