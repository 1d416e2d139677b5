"""Settings: one place for what flags, environment and a TOML file can change.

A flag wins over the environment (``EDA_*``), the environment over the TOML file, that over the defaults.
"""

import ipaddress
import os
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from limits import parse as parse_rate
from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from eda.adapters.errors import InvalidInputError
from eda.adapters.store.names import check_name
from eda.adapters.worker.process import Scheduling
from eda.formats.weight_settings import WeightSetting

BUNDLED_MODELS = Path(__file__).resolve().parent.parent / "models"


class ConfigurationError(Exception):
    """Settings that cannot be used; the message names the setting."""


class Settings(BaseSettings):
    """What ``eda serve`` runs with. Paths in a TOML file are relative to that file."""

    model_config = SettingsConfigDict(env_prefix="EDA_", extra="forbid", frozen=True, validate_default=True)

    # Models
    models_dir: Path = Field(
        BUNDLED_MODELS, description="family directory that the other model settings default to [bundled]"
    )
    target: Path | None = Field(None, description="base model: directory or GGUF file [models_dir/base]")
    draft: Path | None = Field(None, description="shared draft directory [models_dir/draft, if there is one]")
    no_draft: bool = Field(False, description="serve without a draft")
    fine_tunes: dict[str, Path] = Field(
        default_factory=dict, description="name -> LoRA or full checkpoint [every other model in models_dir]"
    )
    bundled_adapters: Path | None = Field(
        None, description="read-only adapters that come with the family [models_dir/adapters]"
    )
    model_name: str = Field("base", min_length=1, description="name that the base model is served under")
    data_dir: Path = Field(Path("var"), description="where adapters and jobs are kept")
    weights: WeightSetting = Field(
        "auto", description="auto keeps the checkpoint's precision; int8 and int4 round, on CPUs"
    )
    device: str = Field("auto", description="where models run: auto, cpu, cuda or cuda:1")
    num_threads: int | None = Field(None, ge=1, description="CPU threads of the model [all]")
    cuda_graphs: Literal["auto", "off"] = Field(
        "auto", description="auto replays small passes as CUDA graphs on a GPU; nothing changes elsewhere"
    )

    # Engine
    cache_mib: int | None = Field(
        None,
        ge=1,
        description="memory of the key/value cache, MiB [1024, or what one longest sequence needs; "
        "at most half of what is free]",
    )
    max_model_len: int | None = Field(
        None, ge=2, description="longest sequence in tokens [the model's own, or what the cache holds]"
    )
    chat_max_tokens: int = Field(
        2048,
        ge=1,
        description="most tokens of a chat's answer that gives no limit; never more than a quarter of the cache",
    )
    max_running: int = Field(64, ge=1, description="sequences in one batch")
    max_waiting: int = Field(256, ge=1, description="sequences that may wait before requests get 429")
    max_tokens_per_step: int = Field(512, ge=1, description="tokens in one pass of the target")
    calibration: Path | None = Field(
        None, description="draft lengths by load, written by eda bench calibrate [a built-in table]"
    )
    request_timeout: float = Field(600.0, gt=0, description="seconds until a request is given up")
    drain_seconds: float = Field(30.0, ge=0, description="seconds that running requests get at shutdown")
    stall_seconds: float = Field(
        300.0, gt=0, description="seconds without a finished step until the engine counts as broken"
    )

    # Adapters and jobs
    database_url: SecretStr | None = Field(None, description="jobs and active versions [SQLite in data_dir]")
    adapter_roots: Annotated[tuple[Path, ...], NoDecode] = Field(
        (), description="directories that paths in requests may lead into, besides data_dir and models_dir"
    )
    allow_hub: bool = Field(False, description="let requests name fine-tunes of the Hugging Face hub")
    max_loaded_fine_tunes: int | None = Field(None, ge=1, description="fine-tunes kept in memory [all]")
    max_queued_jobs: int = Field(16, ge=1, description="jobs that may wait before requests get 429")
    max_job_attempts: int = Field(
        3, ge=1, description="attempts in a row that may fail in one stage of a job"
    )
    baseline_share: float = Field(
        0.02, ge=0, le=0.5, description="share of an adapter's requests that measure the shared draft alone"
    )
    traffic_max_mib: int = Field(64, ge=1, description="recorded traffic of one model, MiB")
    max_prompt_file_mib: int = Field(256, ge=1, description="largest file of prompts, MiB")
    reserve_disk_mib: int = Field(256, ge=0, description="room on the disk that jobs leave free, MiB")
    worker: bool = Field(True, description="run a worker process beside the server; else run `eda worker`")
    worker_threads: int | None = Field(
        None, ge=1, description="CPU threads of the worker [half of the machine's]"
    )
    worker_memory_mib: int | None = Field(
        None, ge=64, description="memory at which the worker gives a job up, MiB [no limit]"
    )
    worker_niceness: int = Field(
        10, ge=0, le=19, description="how far the worker stands back behind the server"
    )
    worker_scheduling: Scheduling = Field(
        "batch",
        description='"batch" and "normal" give the worker a share by niceness, "idle" what nothing else wants',
    )

    # HTTP
    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0 takes a free one")
    max_body_bytes: int = Field(4 * 1024 * 1024, ge=1024, description="largest request body, bytes")
    max_body_values: int = Field(
        262_144, ge=1024, description="JSON values in a body; a list or an object counts as eight"
    )
    body_seconds: float = Field(60.0, gt=0, description="seconds that a body may take to arrive")
    head_seconds: float = Field(
        10.0,
        gt=0,
        description="seconds that the head of a request may take to arrive, on a new connection too",
    )
    unread_seconds: float = Field(
        60.0, gt=0, description="seconds after which a client that reads nothing of its answer is given up"
    )
    max_connections: int = Field(1024, ge=1, description="open connections; further ones get 503")
    allowed_origins: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="other sites whose pages may use the server, comma-separated, as https://chat.example"
    )
    rate_limit: str | None = Field(
        None, description='requests of one key (address without keys), as "60/minute" [no limit]'
    )
    max_sequences_per_request: int = Field(
        64, ge=1, description="prompts times n; never more than max_waiting"
    )
    max_stop_strings: int = Field(16, ge=0, description="stop strings of a request")
    max_logprobs: int = Field(20, ge=0, description="log-probabilities per token of a request")

    # Keys
    api_keys: Annotated[tuple[SecretStr, ...], NoDecode] = Field(
        (), description="keys for users, comma-separated"
    )
    api_keys_file: Path | None = Field(None, description="file with one user key a line")
    admin_key: SecretStr | None = Field(None, description="key for administration")
    admin_key_file: Path | None = Field(None, description="file with the administration key")

    # Logs
    log_format: Literal["json", "console"] = Field("console", description="how lines of the log are written")
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="lowest level that is logged"
    )
    log_prompts: bool = Field(False, description="write prompts to the log; off unless you ask")

    @field_validator("rate_limit")
    @classmethod
    def _check_rate(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                parse_rate(value)
            except ValueError:
                raise ValueError(f"{value!r} is no rate; write it as 60/minute or 5/second") from None
        return value

    @field_validator("api_keys", "allowed_origins", mode="before")
    @classmethod
    def _split_at_commas(cls, value: Any) -> Any:
        return (
            [item.strip() for item in value.split(",") if item.strip()] if isinstance(value, str) else value
        )

    @field_validator("adapter_roots", mode="before")
    @classmethod
    def _split_roots(cls, value: Any) -> Any:
        return [root for root in value.split(os.pathsep) if root] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name in (self.model_name, *self.fine_tunes):
            _check_model_name(name)
        if self.model_name in self.fine_tunes:
            raise ValueError(f"{self.model_name!r} names both the base model and a fine-tune")
        if not self.is_loopback and not self.read_admin_key():
            raise ValueError(
                f"host is {self.host!r}, which others can reach; set EDA_ADMIN_KEY or EDA_ADMIN_KEY_FILE first, "
                "or bind to 127.0.0.1"
            )
        return self

    @property
    def is_loopback(self) -> bool:
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    @property
    def sequences_limit(self) -> int:
        """Sequences of one request: more than the queue holds could never be admitted."""
        return min(self.max_sequences_per_request, self.max_waiting)

    @property
    def needs_keys(self) -> bool:
        return bool(self.read_api_keys() or self.read_admin_key())

    def read_api_keys(self) -> tuple[str, ...]:
        """User keys from the setting and the file together."""
        keys = [key.get_secret_value() for key in self.api_keys]
        if self.api_keys_file is not None:
            keys += _read_lines(self.api_keys_file)
        return tuple(keys)

    def read_admin_key(self) -> str | None:
        if self.admin_key is not None and self.admin_key.get_secret_value():
            return self.admin_key.get_secret_value()
        if self.admin_key_file is not None:
            lines = _read_lines(self.admin_key_file)
            return lines[0] if lines else None
        return None

    def printable(self) -> dict[str, Any]:
        """Every effective value, secrets replaced by stars."""
        values: dict[str, Any] = self.model_dump(mode="json")
        values["api_keys"] = ["**********" for _ in self.api_keys]
        return values


def load_settings(config: Path | None = None, overrides: dict[str, Any] | None = None) -> Settings:
    """Reads flags (``overrides``), the environment and the TOML file ``config``.

    Raises ``ConfigurationError`` that names the first setting that is wrong.
    """
    document = _read_toml(config) if config is not None else {}

    class ConfiguredSettings(Settings):
        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            dotenv_settings: PydanticBaseSettingsSource,
            file_secret_settings: PydanticBaseSettingsSource,
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            return init_settings, env_settings, InitSettingsSource(settings_cls, document)

    given = {name: value for name, value in (overrides or {}).items() if value is not None}
    try:
        return ConfiguredSettings(**given)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        name = ".".join(str(part) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        raise ConfigurationError(f"{name}: {message}" if name else message) from None
    except SettingsError as error:
        raise ConfigurationError(str(error)) from error


def _check_model_name(name: str) -> None:
    """Names become directories, labels and parts of URLs, so ``/`` and the like are out."""
    try:
        check_name(name, param="the name of a model")
    except InvalidInputError as error:
        raise ValueError(str(error)) from None


def _read_lines(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ValueError(f"the key file {path} cannot be read: {error.strerror}") from error
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise ConfigurationError(f"{path} cannot be read as TOML: {error}") from error
    folder = path.resolve().parent
    for name, field in Settings.model_fields.items():
        if field.annotation in (Path, Path | None) and isinstance(document.get(name), str):
            document[name] = folder / document[name]
    tunes = document.get("fine_tunes")
    if isinstance(tunes, dict):
        document["fine_tunes"] = {
            name: folder / value if isinstance(value, str) else value for name, value in tunes.items()
        }
    if isinstance(document.get("adapter_roots"), list):
        document["adapter_roots"] = [
            folder / root if isinstance(root, str) else root for root in document["adapter_roots"]
        ]
    return document
