"""What the application is made of, before any of it runs."""

import re
import socket

import pytest
from pydantic import ValidationError
from ray.serve._private.common import DeploymentID, ReplicaID
from ray.serve.config import AutoscalingContext

from compressor_service.facts import ModelFacts
from deploy.app import NotConfigured, build, model_note
from deploy.autoscaling import SourcesPolicy
from deploy.local import CannotServe, check_host, free_port, needed_cpus
from deploy.settings import Settings
from store.format import TokenFormat


def context(owned, unowned, *, most=8):
    deployment = DeploymentID(name="ingest", app_name="tokenline")
    replicas = [ReplicaID(unique_id=str(number), deployment_id=deployment) for number in range(len(owned))]
    return AutoscalingContext(
        deployment_id=deployment,
        deployment_name="ingest",
        app_name="tokenline",
        current_num_replicas=len(owned),
        target_num_replicas=len(owned),
        running_replicas=replicas,
        total_num_requests=0.0,
        total_queued_requests=0.0,
        aggregated_metrics={
            "owned": dict(zip(replicas, owned, strict=True)),
            "unowned": dict.fromkeys(replicas, unowned),
        },
        raw_metrics={},
        capacity_adjusted_min_replicas=1,
        capacity_adjusted_max_replicas=most,
        policy_state={},
        last_scale_up_time=None,
        last_scale_down_time=None,
        current_time=0.0,
        config=None,
    )


@pytest.mark.parametrize(
    ("owned", "unowned", "replicas"),
    [([0], 0, 1), ([24], 0, 1), ([24], 1, 2), ([24, 24], 100, 7), ([24, 0, 0], 0, 1), ([32], 1000, 8), ([], 0, 1)],
)
def test_ingest_scales_on_the_sources_there_are(owned, unowned, replicas):
    assert SourcesPolicy(target_sources=24)(context(owned, unowned))[0] == replicas


def test_a_cluster_needs_a_redis_and_a_model_of_its_own():
    with pytest.raises(NotConfigured, match="TOKENLINE_STORE__REDIS_URL"):
        build(Settings())
    with pytest.raises(NotConfigured, match="TOKENLINE_MODEL__CHECKPOINT"):
        build(Settings(store={"redis_url": "redis://127.0.0.1:1"}))


def test_a_target_that_no_replica_can_own_is_refused():
    with pytest.raises(ValidationError, match="target_sources"):
        Settings(ingest={"max_sources": 5}, serve={"ingest": {"target_sources": 6}})


def test_fewer_replicas_at_most_than_at_least_are_refused():
    with pytest.raises(ValidationError, match="max_replicas"):
        Settings(serve={"qa": {"min_replicas": 3, "max_replicas": 2}})


def test_without_a_key_only_loopback_is_listened_to():
    for host in ("127.0.0.1", "::1", "localhost"):
        check_host(Settings(serve={"host": host}))
    for host in ("0.0.0.0", "::", "192.0.2.1", "example.com"):
        with pytest.raises(CannotServe, match="TOKENLINE_API__KEYS"):
            check_host(Settings(serve={"host": host}))


def test_a_taken_port_is_told_before_ray_shares_it():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(CannotServe, match="TOKENLINE_SERVE__PORT"):
            free_port("127.0.0.1", port)


def test_every_deployment_can_reach_its_most_replicas_on_a_small_machine():
    serve = {"ingest": {"cpus": 3, "max_replicas": 10}}
    assert needed_cpus(Settings(serve=serve)) >= 30


def test_one_value_of_a_part_leaves_the_others_as_they_are(monkeypatch):
    monkeypatch.setenv("TOKENLINE_SERVE__COMPRESSOR__MAX_REPLICAS", "4")
    usual, changed = Settings.model_fields["serve"].get_default(call_default_factory=True), Settings().serve
    assert changed.compressor == usual.compressor.model_copy(update={"max_replicas": 4})
    given = Settings(serve={"api": {"max_replicas": 3}}).serve
    assert given.api == usual.api.model_copy(update={"max_replicas": 3})
    assert given.compressor == changed.compressor


@pytest.mark.parametrize(
    ("untrained", "world", "told"),
    [
        (True, None, "untrained"),
        (False, "some-yard", "knows only some-yard.*TOKENLINE_MODEL__CHECKPOINT=ICTNLP/llava-mini-llama-3.1-8b"),
    ],
)
def test_a_model_says_what_must_be_known_before_it_is_believed(untrained, world, told):
    assert re.search(told, model_note(facts(untrained, world)))


def test_a_model_of_the_real_world_needs_no_word_of_warning():
    assert model_note(facts(False, None)) is None


def facts(untrained, world):
    tokens = TokenFormat(fingerprint="0" * 16, dtype="float32", tokens_per_frame=1, width=8, vector_width=4)
    return ModelFacts("small", tokens, 112, "cpu", searches_text=True, untrained=untrained, world=world)
