"""What Kubernetes and the operators take, as far as types tell."""

from __future__ import annotations

from typing import Any

import kubernetes_validate
from cloudcoil.models.keda.v1alpha1 import ScaledObject
from cloudcoil.models.prometheus_operator.v1 import PrometheusRule, ServiceMonitor
from roundtrip import lost

#: The oldest Kubernetes that the chart takes, and the newest there are schemas for.
VERSIONS = ("1.27", kubernetes_validate.latest_version())
_CUSTOM = {model.__name__: model for model in (PrometheusRule, ScaledObject, ServiceMonitor)}


def check_types(objects: list[dict[str, Any]], version: str = VERSIONS[-1]) -> None:
    """Checks objects strictly against Kubernetes' schemas, and those of operators against the types made of
    their definitions, to which no field may be unknown.

    Raises: an error of the library that checks, or AssertionError.
    """
    for found in objects:
        if found["kind"] in _CUSTOM:
            model = _CUSTOM[found["kind"]].model_validate(found)
            assert lost(found, model.model_dump(by_alias=True, exclude_none=True, mode="json")) == []
        else:
            kubernetes_validate.validate(found, version, strict=True)
