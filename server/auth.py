"""API keys: who may use the server, and who may administer it. And pages of other sites, which may do neither."""

import ipaddress
from dataclasses import dataclass
from enum import StrEnum
from hmac import compare_digest

from starlette.types import Scope

from eda.server.errors import ApiError, AuthenticationError, PermissionDeniedError
from eda.server.settings import Settings

OPEN_PATHS = frozenset({"/health", "/ready", "/version", "/docs", "/docs/oauth2-redirect", "/openapi.json"})
SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
"""Methods that change nothing."""
USER_PATHS = ("/v1/models", "/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize", "/metrics")

ADMINISTRATOR = "administrator"
_HEADERS = frozenset({b"authorization", b"host", b"origin", b"sec-fetch-site"})


class Role(StrEnum):
    USER = "user"
    ADMIN = "admin"


@dataclass(frozen=True, slots=True)
class Client:
    """Who sends a request, as the queue and the limits see it.

    Attributes:
        name: stands for a key or, where no key was given, for an address.
        role: an administrator too where there are no keys.
    """

    name: str
    role: Role


class KeyRing:
    """The keys of one server. Without any key everybody may do everything, from this machine alone.

    With any key configured, every request but those to ``OPEN_PATHS`` needs one. What is not a user's path needs
    the administration key, so that a new route is closed until somebody opens it.
    """

    def __init__(self, settings: Settings) -> None:
        self._user_keys = [key.encode() for key in settings.read_api_keys()]
        admin_key = settings.read_admin_key()
        self._admin_key = admin_key.encode() if admin_key else None
        self._is_loopback = settings.is_loopback
        self._allowed_origins = frozenset(settings.allowed_origins)

    @property
    def is_empty(self) -> bool:
        return not self._user_keys and self._admin_key is None

    def role_of(self, key: str) -> Role | None:
        """The role of a key; ``None`` for one that is not known."""
        client = self._find(key)
        return None if client is None else client.role

    def _find(self, key: str) -> Client | None:
        """Compares with every key in constant time."""
        given = key.encode()
        found = None
        for place, known in enumerate(self._user_keys):
            if compare_digest(given, known):
                found = Client(f"key {place}", Role.USER)
        if self._admin_key is not None and compare_digest(given, self._admin_key):
            found = Client(ADMINISTRATOR, Role.ADMIN)
        return found

    def admit(self, scope: Scope) -> Client | ApiError:
        """Who sends this request, or why it may not go on."""
        path: str = scope["path"]
        headers = {name: value.decode("latin-1") for name, value in scope["headers"] if name in _HEADERS}
        refusal = self._foreign_host(headers.get(b"host", "")) if self.is_empty else None
        if refusal is None and scope["method"] not in SAFE_METHODS:
            refusal = self._foreign_page(headers)
        if refusal is not None:
            return refusal
        address = scope["client"][0] if scope.get("client") else ""
        if self.is_empty:
            return Client(address, Role.ADMIN)
        if path in OPEN_PATHS:
            return Client(address, Role.USER)
        scheme, _, key = headers.get(b"authorization", "").partition(" ")
        client = self._find(key.strip()) if scheme.lower() == "bearer" else None
        if client is None:
            return AuthenticationError("give a valid key as 'Authorization: Bearer <key>'")
        if client.role is Role.USER and not is_user_path(path):
            return PermissionDeniedError("this needs the administration key")
        return client

    def _foreign_page(self, headers: dict[bytes, str]) -> ApiError | None:
        """Browsers say which page a request comes from; other clients send neither of these headers."""
        origin, site = headers.get(b"origin"), headers.get(b"sec-fetch-site")
        if origin in self._allowed_origins or site in ("same-origin", "none"):
            return None
        if site is None and (origin is None or origin.partition("://")[2] == headers.get(b"host")):
            return None
        return PermissionDeniedError(
            f"a page of another site ({origin or site}) may not change anything here; "
            "EDA_ALLOWED_ORIGINS names sites that may",
            code="origin_not_allowed",
        )

    def _foreign_host(self, host: str) -> ApiError | None:
        """A web page can make a browser send requests to this machine under a name of its own; refuse those names."""
        if not self._is_loopback:
            return None
        name = host.rsplit(":", 1)[0] if host.count(":") == 1 or host.startswith("[") else host
        name = name.strip("[]")
        if name in ("", "localhost"):
            return None
        try:
            if ipaddress.ip_address(name).is_loopback:
                return None
        except ValueError:
            pass
        return PermissionDeniedError(
            "a server without keys answers to localhost alone", param=None, code="host_not_allowed"
        )


def check_priority(client: Client, priority: int) -> None:
    """Raises ``PermissionDeniedError`` when a user wants to go before the others."""
    if priority < 0 and client.role is Role.USER:
        raise PermissionDeniedError(
            f"priority is {priority}; a user's key may ask for 0, the default, or more (later), "
            "the administration key for less",
            param="priority",
        )


def is_user_path(path: str) -> bool:
    """Whether a user's key is enough for ``path``."""
    return any(path == prefix or path.startswith(prefix + "/") for prefix in USER_PATHS)
