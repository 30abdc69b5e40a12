"""The manifests fit the code that they deploy: settings, files and Serve configuration that exist."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from deploy.settings import Settings, render_table

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"
KNOWN = set(re.findall(r"`(TOKENLINE_\w+)`", render_table()))

compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
config_map, ray_service = yaml.safe_load_all((DEPLOY / "rayservice.yaml").read_text())
serve_config = yaml.safe_load((DEPLOY / "serve.yaml").read_text())
dockerfile = (DEPLOY / "Dockerfile").read_text()


def walk(value: Any):
    yield value
    if isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from walk(inner)


@pytest.mark.parametrize("name", ["compose.yaml", "rayservice.yaml", "Dockerfile"])
def test_every_variable_is_a_setting(name):
    named = set(re.findall(r"TOKENLINE_\w+", (DEPLOY / name).read_text()))
    assert named
    assert named - KNOWN == set()


def test_the_values_of_the_config_map_are_valid_settings(monkeypatch):
    for name, value in config_map["data"].items():
        monkeypatch.setenv(name, value)
    settings = Settings()
    assert settings.store.data_dir == Path("/data")
    assert (settings.compressor.device, settings.qa.device) == ("cuda", "cuda")


def test_the_values_of_compose_are_valid_settings(monkeypatch):
    environment = compose["services"]["tokenline"]["environment"]
    monkeypatch.setenv("TOKENLINE_API__KEYS", f'[{{"name": "a", "sha256": "{"0" * 64}", "scopes": ["ask"]}}]')
    for name, value in environment.items():
        if ":?" not in value:
            monkeypatch.setenv(name, re.sub(r"\$\{\w+:-(.*)\}", r"\1", value))
    settings = Settings()
    assert settings.store.redis_url == "redis://redis:6379/0"
    assert settings.api.keys


def test_compose_refuses_to_start_without_an_api_key():
    assert ":?" in compose["services"]["tokenline"]["environment"]["TOKENLINE_API__KEYS"]


def test_compose_keeps_every_token_on_disk():
    command = compose["services"]["redis"]["command"]
    assert command[command.index("--appendonly") + 1] == "yes"
    assert command[command.index("--maxmemory-policy") + 1] == "noeviction"
    mounts = [volume.partition(":")[0] for service in compose["services"].values() for volume in service["volumes"]]
    assert set(mounts) == set(compose["volumes"])


def test_compose_builds_the_image_of_this_repository():
    build = compose["services"]["tokenline"]["build"]
    context = DEPLOY / build["context"]
    assert context.resolve() == ROOT
    assert (context / build["dockerfile"]).is_file()


def test_the_image_gets_every_file_it_is_built_from():
    ignore = (ROOT / ".dockerignore").read_text().splitlines()
    kept = {line.removeprefix("!") for line in ignore if line.startswith("!")}
    assert all((ROOT / name).exists() for name in kept)
    assert {"pyproject.toml", "constraints.txt", "README.md", "LICENSE"} <= kept
    assert {"ingest", "compressor_service", "qa_service", "store", "deploy"} <= kept


def test_the_image_does_not_run_as_root():
    user = re.search(r"^USER (\S+)", dockerfile, re.MULTILINE)
    assert user
    assert user[1] != "root"
    assert f"--uid {ray_service_pods()[0]['securityContext']['runAsUser']} {user[1]}" in dockerfile


def ray_service_pods() -> list[dict[str, Any]]:
    cluster = ray_service["spec"]["rayClusterConfig"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    return [group["template"]["spec"] for group in groups]


def test_the_serve_configuration_is_one_that_ray_accepts():
    [application] = ServeDeploySchema.model_validate(serve_config).applications
    assert application.import_path == "deploy.app:build"


def test_the_ray_service_deploys_the_same_serve_configuration():
    assert yaml.safe_load(ray_service["spec"]["serveConfigV2"]) == serve_config


def test_the_arguments_of_the_serve_configuration_are_settings():
    settings = Settings.model_validate(serve_config["applications"][0]["args"])
    assert settings.serve.ingest.max_replicas == 40


def test_the_ray_service_runs_the_pinned_version_of_ray():
    assert f"ray=={ray_service['spec']['rayClusterConfig']['rayVersion']}" in (ROOT / "constraints.txt").read_text()


def test_every_pod_has_the_same_image_settings_and_data():
    for pod in ray_service_pods():
        [container] = pod["containers"]
        assert container["image"].startswith("tokenline:")
        assert {"configMapRef": {"name": "tokenline"}} in container["envFrom"]
        assert {"secretRef": {"name": "tokenline"}} in container["envFrom"]
        assert container["volumeMounts"] == [
            {"name": "data", "mountPath": config_map["data"]["TOKENLINE_STORE__DATA_DIR"]}
        ]


def test_a_gpu_worker_holds_one_replica_each_of_the_two_model_halves():
    serve = serve_config["applications"][0]["args"]["serve"]
    assert serve["compressor"]["gpus"] + serve["qa"]["gpus"] <= 1


def test_no_manifest_holds_a_secret():
    assert not any(isinstance(value, str) and re.search(r"\bsk-|password=", value) for value in walk(compose))
    secret = {"TOKENLINE_API__KEYS", "TOKENLINE_STORE__SECRET_KEY", "TOKENLINE_STORE__REDIS_URL"}
    assert not secret & set(config_map["data"])
