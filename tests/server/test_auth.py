"""Keys: who gets in, who may administer, and which server may be reached from outside."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from eda.server.app import create_app
from eda.server.auth import KeyRing, Role, is_user_path
from eda.server.services import Services
from eda.server.settings import ConfigurationError, Settings, load_settings
from tests.server.serving import make_parts
from tests.support.family import Family

USER, ADMIN = {"Authorization": "Bearer user-key"}, {"Authorization": "Bearer admin-key"}
COMPLETION = {"model": "base", "prompt": "x", "max_tokens": 2}


def in_process(services: Services, host: str = "127.0.0.1") -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(create_app(services)), base_url=f"http://{host}")


@pytest.fixture
async def locked(family: Family) -> AsyncIterator[httpx.AsyncClient]:
    """A server with keys, its engine running."""
    settings = Settings(api_keys="user-key,other-key", admin_key="admin-key")  # type: ignore[arg-type]
    parts = make_parts(family, settings=settings)
    engine = parts.services.engine
    await engine.start()
    async with in_process(parts.services, "example.org") as client:
        yield client
    await engine.stop(0.0)


async def test_requests_need_a_key(locked: httpx.AsyncClient) -> None:
    wrong = [
        {},
        {"Authorization": "Bearer x"},
        {"Authorization": "user-key"},
        {"Authorization": "Basic user-key"},
    ]
    for headers in wrong:
        response = await locked.post("/v1/completions", json=COMPLETION, headers=headers)
        assert response.status_code == 401
        assert response.json()["error"]["code"] == "invalid_api_key"
        assert response.headers["www-authenticate"] == "Bearer"
    for headers in (USER, ADMIN, {"Authorization": "bearer other-key"}):
        assert (await locked.post("/v1/completions", json=COMPLETION, headers=headers)).status_code == 200
        assert (await locked.get("/v1/models/math", headers=headers)).status_code == 200


async def test_only_the_administrator_may_administer(locked: httpx.AsyncClient) -> None:
    for path in ("/adapters", "/adapters/x/activate", "/jobs", "/v1/load_lora_adapter", "/something-new"):
        response = await locked.post(path, json={}, headers=USER)
        assert response.status_code == 403
        assert response.json()["error"]["type"] == "permission_error"
        assert (await locked.post(path, json={})).status_code == 401
        assert (await locked.post(path, json={}, headers=ADMIN)).status_code not in (401, 403)


async def test_health_needs_no_key_and_metrics_do(locked: httpx.AsyncClient) -> None:
    for path in ("/health", "/ready", "/version", "/docs", "/openapi.json"):
        assert (await locked.get(path)).status_code == 200
    assert (await locked.get("/metrics")).status_code == 401
    assert (await locked.get("/metrics", headers=USER)).status_code == 200


@pytest.mark.parametrize(
    "path", ["/v1/models/../../adapters", "/v1/completions/../../jobs", "//adapters", "/adapters/"]
)
async def test_odd_paths_open_nothing(locked: httpx.AsyncClient, path: str) -> None:
    assert (await locked.get(path, headers=USER)).status_code in (403, 404)


def test_user_paths_are_whole_segments() -> None:
    assert is_user_path("/v1/models/math")
    assert not is_user_path("/v1/modelsx")
    assert not is_user_path("/v1/load_lora_adapter")


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost:8000", 200),
        ("127.0.0.1", 200),
        ("[::1]:8000", 200),
        ("evil.example", 403),
        ("10.0.0.1", 403),
    ],
)
async def test_without_keys_only_local_names_are_answered(family: Family, host: str, status: int) -> None:
    """A page in a browser may send requests to this machine, under a name that it made point here."""
    async with in_process(make_parts(family).services) as client:
        assert (await client.get("/version", headers={"Host": host})).status_code == status


FOREIGN_PAGES = [
    {"Origin": "http://evil.example"},
    {"Origin": "null"},
    {"Origin": "http://127.0.0.1:3000"},
    {"Sec-Fetch-Site": "cross-site"},
    {"Sec-Fetch-Site": "same-site", "Origin": "http://localhost:3000"},
    {"Sec-Fetch-Site": "cross-site", "Origin": "http://127.0.0.1"},
]
OWN_PAGES: list[dict[str, str]] = [
    {},
    {"Origin": "http://127.0.0.1"},
    {"Sec-Fetch-Site": "same-origin", "Origin": "http://127.0.0.1"},
    {"Sec-Fetch-Site": "none"},
]


def is_refused_as_foreign(response: httpx.Response) -> bool:
    return response.status_code == 403 and response.json()["error"]["code"] == "origin_not_allowed"


@pytest.mark.parametrize(("pages", "is_refused"), [(FOREIGN_PAGES, True), (OWN_PAGES, False)])
async def test_pages_of_other_sites_change_nothing(
    family: Family, pages: list[dict[str, str]], is_refused: bool
) -> None:
    """A browser sends forms and bodyless requests to any address for any page."""
    form: dict[str, Any] = {"data": {"request": "{}"}, "files": {"file": b"{}"}}
    async with in_process(make_parts(family).services) as client:
        for headers in pages:
            answers = [
                await client.post("/adapters/upload", headers=headers, **form),
                await client.post("/jobs/x/cancel", headers=headers),
                await client.post("/tokenize", headers=headers, json={"prompt": "x"}),
                await client.delete("/adapters/x", headers=headers),
                await client.patch("/adapters/x", headers=headers, json={}),
                await client.put("/anything", headers=headers),
            ]
            assert [is_refused_as_foreign(answer) for answer in answers] == [is_refused] * len(answers)
            assert (await client.get("/v1/models", headers=headers)).status_code != 403


async def test_a_key_does_not_open_the_door_to_other_sites(locked: httpx.AsyncClient) -> None:
    """Behind a login of a proxy, a browser may well send the key along."""
    for headers in ({"Origin": "http://evil.example"}, {"Sec-Fetch-Site": "cross-site"}):
        assert is_refused_as_foreign(await locked.post("/jobs/x/cancel", headers=headers | ADMIN))


async def test_sites_that_are_allowed_may_use_the_server(family: Family) -> None:
    settings = Settings(allowed_origins="https://chat.example, http://localhost:3000")  # type: ignore[arg-type]
    async with in_process(make_parts(family, settings=settings).services) as client:
        page = {"Origin": "https://chat.example", "Sec-Fetch-Site": "cross-site"}
        answer = await client.post("/tokenize", headers=page, json={"prompt": "x"})
        assert not is_refused_as_foreign(answer)
        assert answer.headers["access-control-allow-origin"] == "https://chat.example"
        asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
        preflight = await client.options("/v1/completions", headers=page | asked)
        assert preflight.status_code == 200
        assert preflight.headers["access-control-allow-headers"] == "authorization"
        for origin in ("https://evil.example", "http://chat.example", "https://chat.example.evil.example"):
            other = await client.post("/tokenize", headers={"Origin": origin}, json={"prompt": "x"})
            assert is_refused_as_foreign(other)
            assert "access-control-allow-origin" not in other.headers


def test_keys_come_from_files_too(tmp_path: Path) -> None:
    users, admin = tmp_path / "users", tmp_path / "admin"
    users.write_text("# team\none\n\n two \n", encoding="utf-8")
    admin.write_text("boss\n", encoding="utf-8")
    ring = KeyRing(Settings(api_keys_file=users, admin_key_file=admin))
    assert [ring.role_of(key) for key in ("one", "two", "boss", "# team", "")] == [
        Role.USER,
        Role.USER,
        Role.ADMIN,
        None,
        None,
    ]


def test_a_missing_key_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="cannot be read"):
        load_settings(None, {"admin_key_file": tmp_path / "none", "host": "0.0.0.0"})


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org"])
def test_binding_elsewhere_needs_an_administration_key(host: str) -> None:
    with pytest.raises(ConfigurationError, match="EDA_ADMIN_KEY"):
        load_settings(None, {"host": host})
    with pytest.raises(ConfigurationError, match="EDA_ADMIN_KEY"):
        load_settings(None, {"host": host, "api_keys": "user"})
    assert load_settings(None, {"host": host, "admin_key": "boss"}).needs_keys


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.1.2.3"])
def test_loopback_needs_no_keys(host: str) -> None:
    assert not load_settings(None, {"host": host}).needs_keys
