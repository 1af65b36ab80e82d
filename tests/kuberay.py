"""What KubeRay 1.7 accepts, as far as files of `deploy/` use it: fields, and rules of its operator.

The real CRDs are a megabyte each; these models hold the fields that we use and refuse every other. Pod templates are
checked by Kubernetes' own schemas (`deploy_checks`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator

Labels = dict[str, str]
Name = Annotated[str, Field(pattern=r"^[a-z]([-a-z0-9]*[a-z0-9])?$", max_length=47)]  # RayJob's limit, the smallest
Count = Annotated[int, Field(ge=0)]
Seconds = Annotated[int, Field(gt=0)]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Metadata(Strict):
    name: Name | None = None
    generateName: str | None = None
    namespace: str
    labels: Labels = {}
    annotations: Labels = {}

    @model_validator(mode="after")
    def _named(self) -> Metadata:
        if (self.name is None) == (self.generateName is None):
            raise ValueError("metadata has one of name and generateName")
        return self


class AuthOptions(Strict):
    mode: Literal["token"]  # 'disabled' exists, and is what these files must not say


class AutoscalerOptions(Strict):
    version: Literal["v1", "v2"]
    idleTimeoutSeconds: Seconds
    upscalingMode: Literal["Default", "Aggressive", "Conservative"]
    resources: dict[str, Any]
    securityContext: dict[str, Any]
    volumeMounts: list[dict[str, Any]] = []


class Group(Strict):
    rayStartParams: Labels
    template: dict[str, Any]


class HeadGroup(Group):
    serviceType: Literal["ClusterIP"]  # others exist; they would put Ray where anybody is


class WorkerGroup(Group):
    groupName: Name
    replicas: Count
    minReplicas: Count
    maxReplicas: Count

    @model_validator(mode="after")
    def _in_order(self) -> WorkerGroup:
        if not self.minReplicas <= self.replicas <= self.maxReplicas:
            raise ValueError("minReplicas <= replicas <= maxReplicas")
        return self


class ClusterSpec(Strict):
    rayVersion: Annotated[str, Field(pattern=r"^\d+\.\d+\.\d+$")]
    authOptions: AuthOptions
    enableInTreeAutoscaling: bool
    autoscalerOptions: AutoscalerOptions
    headGroupSpec: HeadGroup
    workerGroupSpecs: Annotated[list[WorkerGroup], Field(min_length=1)]

    @model_validator(mode="after")
    def _as_the_operator_wants_it(self) -> ClusterSpec:
        if tuple(map(int, self.rayVersion.split("."))) < (2, 52, 0):
            raise ValueError("tokens need Ray 2.52 or newer")
        for group in (self.headGroupSpec, *self.workerGroupSpecs):
            spec = group.template["spec"]
            if self.autoscalerOptions.version == "v2" and spec.get("restartPolicy", "Never") != "Never":
                raise ValueError("with autoscaler v2 restartPolicy is Never")
            if "labels" in group.rayStartParams:
                raise ValueError("rayStartParams cannot have labels")
        return self


class SubmitterConfig(Strict):
    backoffLimit: Count


class JobSpec(Strict):
    entrypoint: str
    submissionMode: Literal["K8sJobMode", "HTTPMode", "SidecarMode", "InteractiveMode"]
    activeDeadlineSeconds: Seconds
    backoffLimit: Count = 0
    shutdownAfterJobFinishes: bool = False
    ttlSecondsAfterFinished: Count = 0
    submitterConfig: SubmitterConfig | None = None
    submitterPodTemplate: dict[str, Any] | None = None
    runtimeEnvYAML: str = ""
    clusterSelector: Labels | None = None
    rayClusterSpec: ClusterSpec | None = None

    @model_validator(mode="after")
    def _as_the_operator_wants_it(self) -> JobSpec:
        if (self.rayClusterSpec is None) == (self.clusterSelector is None):
            raise ValueError("one of rayClusterSpec and clusterSelector")
        if self.ttlSecondsAfterFinished and not self.shutdownAfterJobFinishes:
            raise ValueError("ttlSecondsAfterFinished needs shutdownAfterJobFinishes")
        if self.backoffLimit and (self.clusterSelector or self.submissionMode == "InteractiveMode"):
            raise ValueError("backoffLimit goes with a cluster of its own, and not with InteractiveMode")
        if self.submissionMode == "SidecarMode" and (
            self.submitterPodTemplate or self.submitterConfig or self.clusterSelector
        ):
            raise ValueError("SidecarMode has no submitter and no clusterSelector")
        if not isinstance(yaml.safe_load(self.runtimeEnvYAML) or {}, dict):
            raise ValueError("runtimeEnvYAML is a YAML mapping")
        return self


class CronSpec(Strict):  # no concurrencyPolicy: that is CronJob's
    schedule: str
    timeZone: str | None = None
    suspend: bool = False
    jobTemplate: JobSpec


class Resource(Strict):
    apiVersion: Literal["ray.io/v1"]
    metadata: Metadata


class RayCluster(Resource):
    kind: Literal["RayCluster"]
    spec: ClusterSpec


class RayJob(Resource):
    kind: Literal["RayJob"]
    spec: JobSpec


class RayCronJob(Resource):
    kind: Literal["RayCronJob"]
    spec: CronSpec


KINDS = {"RayCluster": RayCluster, "RayJob": RayJob, "RayCronJob": RayCronJob}


def check(document: dict[str, Any]) -> None:
    """ValueError if the operator would refuse ``document``, or not understand it."""
    if document["kind"] not in KINDS:
        raise ValueError(f"no kind of KubeRay's: {document['kind']}")
    KINDS[document["kind"]].model_validate(document)


def pod_templates(document: Any) -> Iterator[dict[str, Any]]:
    """Every pod template of a document, of KubeRay's or of Kubernetes'."""
    if isinstance(document, list):
        for item in document:
            yield from pod_templates(item)
    if isinstance(document, dict):
        for key, value in document.items():
            if re.fullmatch(r"template|submitterPodTemplate", key) and "containers" in value.get("spec", {}):
                yield value
            else:
                yield from pod_templates(value)


def cluster_specs(document: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Every cluster that a document of KubeRay's describes."""
    spec = document["spec"]
    job = spec.get("jobTemplate", spec)
    yield job.get("rayClusterSpec", job) if document["kind"] != "RayCluster" else spec
