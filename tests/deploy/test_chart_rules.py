"""What Kubernetes would refuse, the chart refuses first."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
from chart import CHART, DIGEST, EVERYTHING, Values, merged, nested, refusal, render, the
from helm_python.errors import HelmRenderError, HelmValuesError
from jsonschema import Draft7Validator
from kubernetes_types import check_types

SCALERS = ("ScaledObject", "HorizontalPodAutoscaler")
SCHEMA: Values = json.loads((CHART / "values.schema.json").read_text())
#: What an unquoted scalar does not mean as text, in YAML as Kubernetes reads it.
WORDS = [
    *("true", "off", "y", "null", "~", "123", "0o17", "0x1f", "1e3", "1.5", "1_000", "2026-01-01"),
    *("#", "'", '"', "a: b"),
]
POD = {"matchLabels": {"a": "b"}}
SPREAD = {"maxSkew": 1, "topologyKey": "zone", "whenUnsatisfiable": "DoNotSchedule"}
#: Values that are right, by their place.
RIGHT: dict[str, list[Any]] = {
    "nameOverride": ["7b"],
    "image.repository": ["localhost:5000/team/rkv-vllm", "registry.example.com/a_b/c__d"],
    "strategy.rollingUpdate": [{"maxSurge": "25%"}, {"maxSurge": 0, "maxUnavailable": "10%"}, None],
    "gpu.count": [0, 8],
    "engine.extraArgs": [["--kv-cache-dtype=fp8_e4m3", "--kv-cache-memory-bytes=1G", "-dp=2"], None],
    "modelCache.size": ["0.5Ti"],
    "resources.requests": [{"memory": "64Gi", "cpu": 0.5}, {"memory": "68719M"}, {"x.io/nic": 1}, None],
    "resources.limits": [{"memory": "0.1Ti", "x.io/nic": "1"}],
    "autoscaling.scaleDownSeconds": [0, 1, 1800, 3600],
    "podDisruptionBudget.maxUnavailable": [0, "100%"],
    "probes.readiness.successThreshold": [3],
    "probes.startup.failureThreshold": [2147483647],
    "networkPolicy.from": [
        [{"ipBlock": {"cidr": "10.0.0.0/8", "except": ["10.1.0.0/16"]}}, {"podSelector": POD}]
    ],
    "extraEnv": [
        [{"name": "RKV_API_KEYS", "valueFrom": {"secretKeyRef": {"name": "keys", "key": "a.txt"}}}],
        [{"name": "POD", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}}, {"name": "a.b-c"}],
    ],
    "extraVolumes": [
        [{"name": "a", "csi": {"driver": "x.io"}}, {"name": "b", "secret": {"secretName": "s"}}]
    ],
    "extraVolumeMounts": [[{"name": "cache", "mountPath": "/models", "subPath": "models"}]],
    "tolerations": [[{"operator": "Exists"}, {"key": "a", "effect": "NoExecute", "tolerationSeconds": 9}]],
    "topologySpreadConstraints": [[SPREAD | {"labelSelector": POD, "minDomains": 2}]],
    "affinity.nodeAffinity.requiredDuringSchedulingIgnoredDuringExecution.nodeSelectorTerms": [
        [{"matchExpressions": [{"key": "gpu", "operator": "In", "values": ["h100"]}]}]
    ],
    "affinity.podAntiAffinity.preferredDuringSchedulingIgnoredDuringExecution": [
        [{"weight": 1, "podAffinityTerm": {"topologyKey": "kubernetes.io/hostname", "labelSelector": POD}}]
    ],
    "podSecurityContext": [{"sysctls": [{"name": "net.core.somaxconn", "value": "1024"}]}, None],
    "containerSecurityContext.capabilities.add": [["IPC_LOCK"]],
}
#: Values that are wrong whatever the others are: the schema names the place.
WRONG: dict[str, list[Any]] = {
    "nameOverride": ["Foo_Bar", "-a", "a" * 64],
    "fullnameOverride": ["7b", "a.b", "a-"],
    "image.repository": ["", "a/Foo", "a b", "a:1"],
    "image.tag": ["-a", "a+b", "a" * 129],
    "image.digest": ["latest"],
    "image.pullSecrets": [[{"name": "a"}, {"name": "a"}], [{"name": "A"}], [{}]],
    "model": ["", "--help"],
    "replicaCount": [-1, 1.5, 2**31],
    "strategy.rollingUpdate.maxSurge": [-1, "1", "a%"],
    "strategy.rollingUpdate.maxUnavailable": ["101%", "-1%"],
    "gpu.count": [-1],
    "gpu.resource": ["gpu", "nvidia.com/"],
    "kvCache.budget": [4, 8, "1024", 2**31],
    "kvCache.policy": ["h2o"],
    "kvCache.budgt": [512],
    "kvCache.keyPolicies": [
        {DIGEST: {"budget": None}},
        {DIGEST: {"policies": []}},
        {DIGEST: {"scope": "head"}},
    ],
    "limits.maxTokens": [0],
    "apiKeys.entries": [{"alice": "two words"}, {"alice": "a\u00a0b"}],
    "apiKeys.existingSecret": ["A"],
    "apiKeys.secretKey": ["a/b", "..a"],
    "openRoutes": [["tokenize"], ["/a,b"]],
    "modelCache.size": ["much", "0", "0.0Gi", "1e3"],
    "modelCache.storageClass": ["a_b"],
    "modelCache.accessModes": [["ReadWriteOncePod", "ReadWriteMany"], []],
    "resources.limits": [{"gpu": 1}, {"x.io/nic": "0.5"}, {"memory": "64 Gi"}, {"cpu": -1}],
    "shutdown.drainSeconds": ["60", -1],
    "probes.startup.successThreshold": [2],
    "probes.liveness.successThreshold": [2],
    "probes.liveness.timeoutSeconds": [0, 2**31],
    "probes.liveness.path": ["/"],
    "service.port": [0, 65536],
    "service.annotations": [{"a b": "c"}, {"a": 1}, {"x" * 254 + "/a": "b"}],
    "serviceMonitor.interval": ["0s", "soon"],
    "autoscaling.poolUse": [0, 85],
    "autoscaling.minReplicas": [0],
    "autoscaling.scaleDownSeconds": [-1, 3601],
    "autoscaling.prometheus": ["prometheus:9090", "http://a b"],
    "podDisruptionBudget.maxUnavailable": [-1, "1", "150%"],
    "networkPolicy.from": [
        [],
        [{}],
        [{"ipBlock": {"cidr": "10.0.0.0"}}],
        [{"ipBlock": {"cidr": "10.0.0.0/8"}, "podSelector": {}}],
        [{"podSelector": {"matchExpressions": [{"key": "a", "operator": "In"}]}}],
    ],
    "serviceAccount.name": ["A"],
    "podLabels": [
        {"a": "b c"},
        {"a/b/c": "d"},
        {"a" * 64: "b"},
        {"a": "b" * 64},
        {"app.kubernetes.io/name": "a"},
    ],
    "serviceMonitor.labels": [{"app.kubernetes.io/instance": "a"}],
    "prometheusRule.labels": [{"helm.sh/chart": "a"}],
    "dashboards.labels": [{"app.kubernetes.io/managed-by": "a"}],
    "podAnnotations": [{"checksum/settings": "a"}],
    "extraEnv": [
        [{"value": "a"}],
        [{"name": "7B"}],
        [{"name": "A", "value": 1}],
        [{"name": "A", "value": "b", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}}],
        [{"name": "A", "valueFrom": {}}],
        [{"name": "A", "valueFrom": {"fieldRef": {"fieldPath": "metadata.nme"}}}],
    ],
    "extraVolumes": [
        [{"name": "A"}],
        [{"name": "a", "emptyDir": {}, "hostPath": {"path": "/a"}}],
        [{"name": "a", "hostPath": {"path": "/a/../b"}}],
        [{"name": "a", "hostPth": {}}],
    ],
    "extraVolumeMounts": [[{"name": "cache"}], [{"name": "cache", "mountPath": "/a", "subPath": "../b"}]],
    "nodeSelector": [{"a": "b c"}],
    "tolerations": [
        [{"effect": "NoSchedule"}],
        [{"key": "a", "operator": "Exists", "value": "b"}],
        [{"key": "a", "tolerationSeconds": 9}],
        [{"key": "a", "effect": "Never"}],
    ],
    "topologySpreadConstraints": [
        [{"maxSkew": 1, "topologyKey": "zone"}],
        [SPREAD | {"maxSkew": 0}],
        [SPREAD | {"whenUnsatisfiable": "ScheduleAnyway", "minDomains": 2}],
    ],
    "affinity": [
        {
            "podAffinity": {
                "preferredDuringSchedulingIgnoredDuringExecution": [{"weight": 0, "podAffinityTerm": {}}]
            }
        },
        {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": []}}},
    ],
    "priorityClassName": ["A"],
    "runtimeClassName": ["a b"],
    "podSecurityContext": [
        {"runAsUser": 0},
        {"fsGroup": -1},
        {"seccompProfile": {"type": "Localhost"}},
        {"user": 1},
    ],
    "containerSecurityContext": [{"privileged": True}, {"capabilities": {"add": ["CAP_SYS_ADMIN"]}}],
}
#: Values of which each alone is right, and what names them.
WRONG_TOGETHER: list[tuple[Values, str]] = [
    ({"strategy": {"rollingUpdate": {"maxSurge": 0}}}, "strategy.rollingUpdate"),
    ({"strategy": {"rollingUpdate": {"maxSurge": "0%", "maxUnavailable": "0%"}}}, "strategy.rollingUpdate"),
    ({"autoscaling": {"enabled": True, "minReplicas": 5}}, "autoscaling.minReplicas"),
    ({"apiKeys": {"entries": {"a": "b"}, "existingSecret": "c"}}, "apiKeys"),
    (
        {"apiKeys": {"existingSecret": "c"}, "serviceMonitor": {"enabled": True}},
        "serviceMonitor.apiKeySecret",
    ),
    ({"resources": {"requests": {"memory": "65Gi"}}}, "resources.requests.memory"),
    ({"resources": {"requests": {"cpu": 2}, "limits": {"cpu": "1999m"}}}, "resources.requests.cpu"),
    ({"resources": {"requests": {"x.io/nic": 1}}}, "resources.requests.x.io/nic"),
    ({"resources": {"limits": {"nvidia.com/gpu": 2}}}, "resources.limits.nvidia.com/gpu"),
    ({"extraEnv": [{"name": "A"}, {"name": "A"}]}, "extraEnv: A"),
    (
        {"extraEnv": [{"name": "HF_TOKEN"}], "huggingFaceToken": {"existingSecret": "a"}},
        "extraEnv: HF_TOKEN",
    ),
    ({"extraVolumes": [{"name": "cache", "emptyDir": {}}]}, "extraVolumes: cache"),
    ({"extraVolumeMounts": [{"name": "models", "mountPath": "/models"}]}, "extraVolumeMounts: there is no"),
    ({"extraVolumeMounts": [{"name": "cache", "mountPath": "/tmp"}]}, "extraVolumeMounts: /tmp"),
    ({"topologySpreadConstraints": [SPREAD, SPREAD | {"maxSkew": 2}]}, "topologySpreadConstraints: zone"),
]


def leaves(schema: Values = SCHEMA, path: str = "") -> Iterator[tuple[str, Values]]:
    """Each value that has no others below it, and its schema."""
    for name, below in schema["properties"].items():
        if "properties" in below:
            yield from leaves(below, f"{path}{name}.")
        else:
            yield f"{path}{name}", {**below, "definitions": SCHEMA["definitions"]}


def wherever_it_fits(word: str) -> Values:
    """Everything switched on, and `word` as each value that takes any text, in maps as name and content."""
    values = EVERYTHING | {"extraVolumeMounts": []}
    for path, schema in leaves():
        takes = Draft7Validator(schema).is_valid
        for value in (
            word,
            [word],
            {word: word},
            {"a": word},
            [{"name": word}],
            [{"name": "A", "value": word}],
        ):
            if takes(value):
                values = merged(values, nested(path, value))
                break
    return values


def scalars(found: Any) -> Iterator[Any]:
    """Names in maps, and everything that is no list or map."""
    if isinstance(found, dict):
        yield from found
        found = list(found.values())
    if isinstance(found, list):
        for below in found:
            yield from scalars(below)
    else:
        yield found


@pytest.mark.parametrize("existing", [False, True], ids=["made", "existing"])
@pytest.mark.parametrize("word", WORDS)
def test_text_stays_text(word: str, existing: bool) -> None:
    """Proves that no value which takes text renders as another type, whatever the text looks like, nor does
    the release's name."""
    made = {"apiKeys": {"existingSecret": ""}, "modelCache": {"existingClaim": ""}}
    values = merged(wherever_it_fits(word), {"apiKeys": {"entries": None}} if existing else made)
    name = {"release": word} if re.fullmatch("[a-z0-9.-]*[a-z0-9]", word) else {}
    objects = render(values, **name)
    check_types(objects)
    assert list(scalars(objects)).count(word) > 5
    for found in objects:
        assert all(isinstance(text, str) for text in scalars(found["metadata"]))
    assert all(isinstance(text, str) for text in scalars(the("Deployment", objects)["spec"]["selector"]))


@pytest.mark.parametrize(
    ("path", "value"), [(path, value) for path, values in RIGHT.items() for value in values]
)
def test_values_that_are_right_make_objects_that_are(path: str, value: Any) -> None:
    """Proves that no rule refuses more than it has to, at the edge of what Kubernetes takes."""
    values = nested(path, value)
    if path.startswith("resources") and "x.io/nic" in (value or {}):
        values = merged({"resources": {"limits": {"x.io/nic": 1}, "requests": {"x.io/nic": 1}}}, values)
    if path.startswith("autoscaling"):
        values["autoscaling"]["enabled"] = True
    check_types(render(values))


@pytest.mark.parametrize(
    ("path", "value"), [(path, value) for path, values in WRONG.items() for value in values]
)
def test_a_wrong_value_is_refused_by_name(path: str, value: Any) -> None:
    """Proves that the schema refuses it before anything is rendered, and says where it stands."""
    with pytest.raises(HelmValuesError) as refusal:
        render(nested(path, value))
    place, _, name = path.rpartition(".")
    unknown = rf"at '/{place.replace('.', '/')}': additional properties '{name}' not allowed"
    assert re.search(rf"at '/{path.replace('.', '/')}\b|{unknown}", str(refusal.value)), refusal.value


@pytest.mark.parametrize(("values", "named"), WRONG_TOGETHER)
def test_values_that_do_not_fit_together_are_refused(values: Values, named: str) -> None:
    """Proves that the chart says what no schema can: each value alone would be right."""
    with pytest.raises(HelmRenderError) as refusal:
        render(values)
    assert f": {named}" in str(refusal.value)


def test_every_problem_is_told_at_once() -> None:
    """Proves that one render names all values which do not fit together, a line each."""
    found = refusal(merged(*(values for values, _ in WRONG_TOGETHER[1:3]))) or ""
    assert [line.split(": ")[-2] for line in found.splitlines()] == [
        "strategy.rollingUpdate",
        "autoscaling.minReplicas",
    ]


def test_a_default_that_is_taken_away_is_refused_or_not_needed() -> None:
    """Proves that null, by which Helm removes a default, leaves no object with a hole in it."""
    paths = {path for path, _ in leaves()}
    sections = {path.rpartition(".")[0] for path in paths} - {""}
    everything = EVERYTHING | {"extraVolumeMounts": [], "openMetrics": True}
    usual, taken = render(everything), 0
    for path in sorted(paths | sections):
        values = merged(everything, nested(path, None))
        try:
            objects = render(values)
        except HelmValuesError:
            continue
        check_types([found for found in objects if found not in usual])
        taken += 1
    assert 20 < taken < len(paths)


@pytest.mark.parametrize("release", ["123", "7b", "team.a"])
def test_a_release_whose_name_no_service_may_have_needs_another_name(release: str) -> None:
    """Proves that a name which begins with a digit, or has a dot, is refused by the value that mends it."""
    with pytest.raises(HelmRenderError, match=rf"fullnameOverride: .*{release}"):
        render(release=release)
    check_types(render({"fullnameOverride": "reasoner"}, release=release))


def test_recreate_has_no_rolling_update() -> None:
    """Proves that the default's numbers go where an upgrade does not replace pods one by one."""
    deployment = the("Deployment", render({"strategy": {"type": "Recreate"}}))
    assert deployment["spec"]["strategy"] == {"type": "Recreate"}


@pytest.mark.parametrize("kind", ["keda", "hpa"])
@pytest.mark.parametrize(("seconds", "period"), [(0, 1), (600, 600), (3600, 1800)])
def test_pods_leave_at_a_pace_that_kubernetes_takes(kind: str, seconds: int, period: int) -> None:
    """Proves that the period lies within 1 to 1800 seconds, the calm before it as given."""
    values = {"autoscaling": {"enabled": True, "type": kind, "scaleDownSeconds": seconds}}
    found = [scaler["spec"] for scaler in render(values) if scaler["kind"] in SCALERS]
    behavior = found[0].get("behavior") or found[0]["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]
    assert behavior["scaleDown"]["stabilizationWindowSeconds"] == seconds
    assert [policy["periodSeconds"] for policy in behavior["scaleDown"]["policies"]] == [period]


def test_a_long_start_stays_within_the_deadlines_range() -> None:
    """Proves that the patience of the startup probe does not overflow the deadline of an upgrade."""
    objects = render({"probes": {"startup": {"periodSeconds": 3600, "failureThreshold": 2**31 - 1}}})
    assert the("Deployment", objects)["spec"]["progressDeadlineSeconds"] == 2**31 - 1
