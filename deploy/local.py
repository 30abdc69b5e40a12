"""The whole service on this machine: its own Redis when none is named, its own Ray, every deployment."""

import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING

import compressor_service
from deploy.settings import Settings

if TYPE_CHECKING:  # Ray is imported when it is started, not for every command
    from ray.serve.schema import ApplicationStatusOverview

EMBEDDED_MODEL = Path(compressor_service.__file__).parent / "checkpoints" / "tokenline-yard"
EMBEDDED_MODEL_DTYPE = "float32"  # a small model is quickest so on a CPU, and its tokens need little room anyway
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class CannotServe(RuntimeError):
    """The service cannot start as it is configured; the message says what to change."""


def check_host(settings: Settings) -> None:
    """Raise CannotServe if the service would be open to others without a key."""
    if settings.api.keys or is_loopback(settings.serve.host):
        return
    raise CannotServe(
        f"refusing to listen on {settings.serve.host} without an API key: "
        "configure TOKENLINE_API__KEYS, or listen on 127.0.0.1"
    )


def is_loopback(host: str) -> bool:
    """Tell whether `host` is reached from this machine alone."""
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def free_port(host: str, port: int) -> int:
    """Return `port`, or a free one for 0. Ray shares a taken port silently, so it is tried here first."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        try:
            probe.bind((host, port))
        except OSError as error:
            raise CannotServe(f"cannot listen on {host}:{port}: {error.strerror}; set TOKENLINE_SERVE__PORT") from None
        return int(probe.getsockname()[1])


def check_model(checkpoint: str) -> None:
    """Raise CannotServe if no model can be loaded from `checkpoint`: the replicas would try again and again."""
    from compressor_service.llava_mini.checkpoint import BadCheckpoint, open_checkpoint
    from compressor_service.llava_mini.prompt import Prompt

    try:
        open_checkpoint(checkpoint)
        Prompt.from_pretrained(checkpoint)
    except BadCheckpoint as error:
        raise CannotServe(f"the model of TOKENLINE_MODEL__CHECKPOINT cannot be loaded: {error}") from None


def with_embedded_model(settings: Settings) -> Settings:
    """Name the small embedded model if no other is named."""
    if settings.model.checkpoint is not None:
        return settings
    named = {"checkpoint": str(EMBEDDED_MODEL), "dtype": settings.model.dtype or EMBEDDED_MODEL_DTYPE}
    return settings.model_copy(update={"model": settings.model.model_copy(update=named)})


def with_local_defaults(settings: Settings, redis_url: str) -> Settings:
    """Fill in what is known only on this machine: absolute folders and the address of its own Redis."""
    store = settings.store.model_copy(update={"data_dir": settings.store.data_dir.resolve(), "redis_url": redis_url})
    serve = settings.serve.model_copy(update={"port": free_port(settings.serve.host, settings.serve.port)})
    return settings.model_copy(update={"store": store, "serve": serve})


def needed_cpus(settings: Settings) -> int:
    """Return the logical cores that let every deployment start and scale, however small the machine is."""
    deployments = ("api", "ingest", "compressor", "search", "qa", "janitor")
    asked = sum(part.cpus * part.max_replicas for part in (getattr(settings.serve, name) for name in deployments))
    return max(os.cpu_count() or 1, int(asked) + 1)


@contextmanager
def serving(settings: Settings) -> Iterator[str]:
    """Run the service and yield its base URL; everything it started is stopped on the way out.

    SIGINT and SIGTERM raise KeyboardInterrupt, once: what is being stopped is stopped to the end. Raises CannotServe.
    """
    check_host(settings)
    from store.connection import EmbeddedRedis

    if settings.model.checkpoint is not None:
        check_model(settings.model.checkpoint)
    _interrupt_once()
    with ExitStack() as stack:
        redis_url = settings.store.redis_url
        if redis_url is None:
            settings.store.data_dir.mkdir(parents=True, exist_ok=True)
            redis_url = stack.enter_context(EmbeddedRedis.start(settings.store.data_dir)).url
        settings = with_embedded_model(with_local_defaults(settings, redis_url))
        stack.enter_context(_ray(settings))
        yield f"http://{_shown_host(settings.serve.host)}:{settings.serve.port}"


def _shown_host(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _interrupt_once() -> None:
    def interrupt(*_: object) -> None:
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    for number in _SIGNALS:
        signal.signal(number, interrupt)


@contextmanager
def _signals_held() -> Iterator[None]:
    """Keep a signal until the block has ended: Ray's native code aborts the process when it is interrupted."""
    held: list[int] = []
    for number in _SIGNALS:
        signal.signal(number, lambda number, _: held.append(number))
    try:
        yield
    finally:
        _interrupt_once()  # Ray puts a handler of its own in its place, too
    if held:
        signal.raise_signal(held[0])


@contextmanager
def _ray(settings: Settings) -> Iterator[None]:
    # Ray reads these when it is imported and started: no usage statistics leave the machine, no log line is repeated.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")
    # Ray Serve kills an HTTP proxy that is not ready in 5 s, again and again; on a busy machine that is never.
    os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "60")
    import ray

    root = str(Path(__file__).parent.parent)
    try:
        with _signals_held():
            ray.init(
                num_cpus=needed_cpus(settings),
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                runtime_env={"env_vars": {"PYTHONPATH": root}},
            )
        with _application(settings):
            yield
    finally:
        ray.shutdown()


@contextmanager
def _application(settings: Settings) -> Iterator[None]:
    from ray import serve

    from deploy.app import APPLICATION, build

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    serve.start(
        http_options={
            "host": settings.serve.host,
            "port": settings.serve.port,
            "request_timeout_s": settings.serve.request_timeout_s,
        },
        logging_config={"log_level": "WARNING", "enable_access_log": False},
    )
    try:
        application = build(settings)
        try:
            serve.run(application, name=APPLICATION, route_prefix="/")
        except RuntimeError:  # Serve's own words name the deployment, and not what is wrong with it
            raise CannotServe(why_not_running(serve.status().applications[APPLICATION])) from None
        yield
    finally:
        # Not serve.shutdown(): it kills its controller in the middle of its work, and Ray complains of it.
        serve.delete(APPLICATION)


def why_not_running(application: "ApplicationStatusOverview") -> str:
    """Tell which deployments cannot start, each with the last line of what its replica raised."""
    reasons = [
        f"{name} cannot start: {([line for line in one.message.splitlines() if line.strip()] or ['unknown'])[-1]}"
        for name, one in application.deployments.items()
        if one.status in ("DEPLOY_FAILED", "UNHEALTHY")
    ]
    return "; ".join(reasons) or f"the service cannot start: {application.message}"


def run(settings: Settings) -> None:
    """Keep the service up until interrupted, and print where it is."""
    with serving(settings) as url:
        print(f"API   {url}/v1\ndocs  {url}/docs")
        if not settings.api.keys:
            print("No API key is configured: the service listens to this machine only and lets every caller in.")
        print("Ctrl-C stops it.", flush=True)
        with suppress(KeyboardInterrupt):
            threading.Event().wait()
