"""API keys: who may use the server, and who may administer it."""

import ipaddress
from enum import StrEnum
from hmac import compare_digest

from starlette.types import Scope

from server.errors import ApiError, AuthenticationError, PermissionDeniedError
from server.settings import Settings

OPEN_PATHS = frozenset({"/health", "/ready", "/version", "/docs", "/docs/oauth2-redirect", "/openapi.json"})
USER_PATHS = ("/v1/models", "/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize", "/metrics")


class Role(StrEnum):
    USER = "user"
    ADMIN = "admin"


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

    @property
    def is_empty(self) -> bool:
        return not self._user_keys and self._admin_key is None

    def role_of(self, key: str) -> Role | None:
        """Compares with every key in constant time."""
        given = key.encode()
        role = None
        for known in self._user_keys:
            if compare_digest(given, known):
                role = Role.USER
        if self._admin_key is not None and compare_digest(given, self._admin_key):
            role = Role.ADMIN
        return role

    def refusal(self, scope: Scope) -> ApiError | None:
        """Why this request may not go on; ``None`` when it may."""
        path: str = scope["path"]
        headers = {name: value for name, value in scope["headers"] if name in (b"authorization", b"host")}
        if self.is_empty:
            return self._foreign_host(headers.get(b"host", b"").decode("latin-1"))
        if path in OPEN_PATHS:
            return None
        scheme, _, key = headers.get(b"authorization", b"").decode("latin-1").partition(" ")
        role = self.role_of(key.strip()) if scheme.lower() == "bearer" else None
        if role is None:
            return AuthenticationError("give a valid key as 'Authorization: Bearer <key>'")
        if role is Role.USER and not is_user_path(path):
            return PermissionDeniedError("this needs the administration key")
        return None

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


def is_user_path(path: str) -> bool:
    """Whether a user's key is enough for ``path``."""
    return any(path == prefix or path.startswith(prefix + "/") for prefix in USER_PATHS)
