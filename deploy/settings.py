"""Every setting of the service, from flags, the environment and a file, with one definition.

`python -m deploy.settings` writes the table of the README anew.
"""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    SecretStr,
    model_validator,
)
from pydantic_core import PydanticUndefined
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    YamlConfigSettingsSource,
)

from compressor_service.settings import CompressorSettings, ModelSettings
from ingest.settings import IngestSettings
from qa_service.settings import ApiSettings, QASettings
from store.settings import StoreSettings

PREFIX = "TOKENLINE_"
CONFIG_VARIABLE = f"{PREFIX}CONFIG"
TABLE_BEGIN, TABLE_END = "<!-- settings:begin -->", "<!-- settings:end -->"


class Scaling(BaseModel):
    """How many replicas of one deployment run, and what each may use."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    min_replicas: PositiveInt = Field(default=1, description="Replicas that always run.")
    max_replicas: PositiveInt = Field(default=1, description="Replicas under load, at most.")
    cpus: NonNegativeFloat = Field(default=0.5, description="CPU cores that Ray sets aside for a replica.")
    gpus: NonNegativeFloat = Field(default=0, description="GPUs (or a share of one) for a replica.")
    resources: dict[str, float] = Field(
        default_factory=dict, description="Custom Ray resources a replica needs, to place it on certain nodes."
    )
    max_ongoing_requests: PositiveInt = Field(default=64, description="Calls that a replica works on at once.")

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.max_replicas < self.min_replicas:
            raise ValueError(f"max_replicas ({self.max_replicas}) is below min_replicas ({self.min_replicas})")
        return self


class LoadScaling(Scaling):
    """Scaling by the number of requests that are under way."""

    target_ongoing_requests: PositiveFloat = Field(
        default=2, description="Requests under way a replica that the autoscaler aims at."
    )


class IngestScaling(Scaling):
    """Scaling by the number of cameras and files to be read."""

    max_replicas: PositiveInt = Field(default=8, description="Replicas under load, at most.")
    target_sources: PositiveInt = Field(
        default=24, description="Cameras and files a replica that the autoscaler aims at."
    )


class ServeSettings(BaseModel):
    """The Ray Serve application: where it listens and how each deployment scales."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    host: str = Field(default="127.0.0.1", description="Address to listen on. Any but loopback needs an API key.")
    port: Annotated[int, Field(ge=0, le=65535)] = Field(default=8000, description="Port to listen on.")
    request_timeout_s: PositiveFloat = Field(default=600, description="Longest HTTP request, an upload included.")
    max_queued_requests: PositiveInt = Field(
        default=256, description="Calls that wait for a deployment before it answers `queue_full`."
    )
    graceful_shutdown_s: PositiveFloat = Field(
        default=20, description="Time a stopping replica has to finish its work."
    )

    api: LoadScaling = LoadScaling(max_ongoing_requests=512, target_ongoing_requests=32)  # open event streams count
    ingest: IngestScaling = IngestScaling()
    compressor: LoadScaling = LoadScaling(cpus=1, target_ongoing_requests=8)
    search: LoadScaling = LoadScaling(target_ongoing_requests=8)
    qa: LoadScaling = LoadScaling(cpus=1, target_ongoing_requests=2)
    janitor: Scaling = Scaling(cpus=0.1)

    @model_validator(mode="before")
    @classmethod
    def _leave_the_rest(cls, given: Any) -> Any:
        """Let one value of a deployment leave its others at that deployment's defaults."""
        if not isinstance(given, Mapping):
            return given
        usual = {name: field.default for name, field in cls.model_fields.items() if isinstance(field.default, Scaling)}
        merged = {
            name: {**usual[name].model_dump(exclude_unset=True), **value}
            for name, value in given.items()
            if name in usual and isinstance(value, Mapping)
        }
        return {**given, **merged}


class Settings(BaseSettings):
    """All settings. For example TOKENLINE_COMPRESSOR__MAX_BATCH_FRAMES=8.

    Flags come first, then the environment, then the YAML file that TOKENLINE_CONFIG names, then the defaults.
    """

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        env_nested_delimiter="__",
        frozen=True,
        extra="forbid",
    )

    store: StoreSettings = Field(default_factory=StoreSettings)
    model: ModelSettings = Field(default_factory=ModelSettings)
    ingest: IngestSettings = Field(default_factory=IngestSettings)
    compressor: CompressorSettings = Field(default_factory=CompressorSettings)
    qa: QASettings = Field(default_factory=QASettings)
    api: ApiSettings = Field(default_factory=ApiSettings)
    serve: ServeSettings = Field(default_factory=ServeSettings)

    @model_validator(mode="after")
    def _target_can_be_reached(self) -> Self:
        if self.serve.ingest.target_sources > self.ingest.max_sources:
            raise ValueError(
                f"serve.ingest.target_sources ({self.serve.ingest.target_sources}) is above ingest.max_sources "
                f"({self.ingest.max_sources}): sources would wait for an owner and no replica be added"
            )
        return self

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        sources: list[PydanticBaseSettingsSource] = [init_settings, env_settings]
        if named := os.environ.get(CONFIG_VARIABLE):
            if not Path(named).is_file():
                raise FileNotFoundError(f"{CONFIG_VARIABLE} names {named}, which is not a file")
            sources.append(YamlConfigSettingsSource(settings_cls, yaml_file=named))
        return tuple(sources)


def _rows(model: type[BaseModel], instance: BaseModel | None, variable: str) -> Iterator[tuple[str, str, str]]:
    """Yield (environment variable, default, description) of every leaf setting below `model`."""
    for name, field in model.model_fields.items():
        key = f"{variable}{name.upper()}"
        default = field.get_default(call_default_factory=True) if instance is None else getattr(instance, name)
        if isinstance(default, BaseModel):
            yield from _rows(type(default), default, f"{key}__")
        else:
            yield key, _shown(default), (field.description or "").replace("|", "\\|")


def _shown(default: object) -> str:
    if default is None or default is PydanticUndefined:
        return ""
    if isinstance(default, SecretStr):
        return "(secret)"
    if isinstance(default, bool):
        return f"`{str(default).lower()}`"
    return f"`{default}`" if str(default) else ""


def render_table() -> str:
    """Return the settings as a Markdown table."""
    lines = ["| setting | default | meaning |", "|---|---|---|"]
    lines.append(f"| `{CONFIG_VARIABLE}` |  | A YAML file of the settings below, nested as their names are. |")
    for key, default, description in _rows(Settings, None, PREFIX):
        lines.append(f"| `{key}` | {default} | {description} |")
    return "\n".join(lines)


def write_table(readme: Path) -> None:
    """Replace the settings table between the two markers in `readme`."""
    text = readme.read_text()
    head, _, rest = text.partition(TABLE_BEGIN)
    _, _, tail = rest.partition(TABLE_END)
    readme.write_text(f"{head}{TABLE_BEGIN}\n{render_table()}\n{TABLE_END}{tail}")


if __name__ == "__main__":
    write_table(Path(__file__).parent.parent / "README.md")
