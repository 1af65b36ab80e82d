"""Each kind of file in `deploy/`, checked without a cluster: what is wrong with it is raised as `Broken`."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import zoneinfo
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import croniter
import kuberay
import kubernetes_validate
import promql_parser
import yaml
from deploy_commands import DEPLOY, TOP, Broken, check_command, check_line
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipeline.ingest.meters import METRICS

KUBERNETES = ("1.31", "1.34", "1.37")  # the oldest and the newest that are asked for, and one between

# Series that are not ours, and labels of theirs that these files may use.
OTHER_METRICS = {  # kube-state-metrics, node_exporter
    "kube_cronjob_status_last_successful_time": {"cronjob", "namespace"},
    "kube_job_status_failed": {"job_name", "namespace", "reason"},
    "kube_job_status_start_time": {"job_name", "namespace"},
    "node_systemd_unit_state": {"instance", "name", "state"},
}
RAY_METRICS = {  # test_deploy_metrics sees each of them exported, with these labels
    "ray_cluster_active_nodes": {"SessionName", "node_type"},
    "ray_node_cpu_utilization": {"SessionName", "ip"},
    "ray_node_disk_free": {"SessionName", "ip"},
    "ray_node_disk_usage": {"SessionName", "ip"},
    "ray_node_mem_total": {"SessionName", "ip"},
    "ray_node_mem_used": {"SessionName", "ip"},
    "ray_running_jobs": {"NodeAddress", "SessionName"},
}
OUR_METRICS = {
    name: {"NodeAddress", "SessionName", *metric.labels} | ({"le"} if name.endswith("_bucket") else set[str]())
    for metric in METRICS
    for name in metric.exported
}
KNOWN_METRICS = OTHER_METRICS | RAY_METRICS | OUR_METRICS


def _expect(holds: object, message: str) -> None:
    if not holds:
        raise Broken(message)


# ---- Kubernetes and KubeRay


def check_kubernetes(text: str) -> None:
    for document in yaml.safe_load_all(text):
        ours = document["apiVersion"].startswith("ray.io/")
        try:
            if ours:
                kuberay.check(document)
            for template in kuberay.pod_templates(document):
                wrapped = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "x"}, "template": template}
                _validate(wrapped)
                _check_pod(template["spec"])
            if not ours:
                _validate(document)
        except (ValidationError, ValueError) as error:
            raise Broken(f"{document['kind']}: {error}") from error
        if document["kind"] in ("CronJob", "RayCronJob"):
            _check_schedule(document["spec"])
        if document["kind"] == "CronJob":
            _check_cron_job(document["spec"])
        if "entrypoint" in (job := document.get("spec", {}).get("jobTemplate", document.get("spec", {}))):
            check_command(shlex.split(job["entrypoint"]))


def _validate(document: dict[str, Any]) -> None:
    for version in KUBERNETES:
        try:
            kubernetes_validate.validate(document, version, strict=True)
        except kubernetes_validate.ValidationError as error:
            raise Broken(f"Kubernetes {version}: {error.message}") from error


def _check_schedule(spec: dict[str, Any]) -> None:
    _expect(len(spec["schedule"].split()) == 5 and croniter.croniter.is_valid(spec["schedule"]), "no cron schedule")
    _expect(spec.get("timeZone") in zoneinfo.available_timezones(), f"no time zone: {spec.get('timeZone')}")


def _check_cron_job(spec: dict[str, Any]) -> None:
    _expect(spec.get("concurrencyPolicy") == "Forbid", "two nights at once: concurrencyPolicy is not Forbid")
    _expect(
        spec.get("startingDeadlineSeconds", 0) > 0, "no startingDeadlineSeconds: 100 missed nights stop it for good"
    )
    for name in ("successfulJobsHistoryLimit", "failedJobsHistoryLimit"):
        _expect(spec.get(name, 0) > 0, f"no {name}")
    job = spec["jobTemplate"]["spec"]
    _expect(
        job.get("activeDeadlineSeconds", 0) > 0 and "backoffLimit" in job, "no activeDeadlineSeconds or backoffLimit"
    )


def _check_pod(spec: dict[str, Any]) -> None:
    """What a namespace under `restricted` demands, and what we do."""
    context = spec.get("securityContext", {})
    _expect(context.get("runAsNonRoot") and context.get("runAsUser"), "a pod that may run as root")
    _expect(context.get("seccompProfile", {}).get("type") == "RuntimeDefault", "no seccompProfile")
    volumes = {volume["name"] for volume in spec.get("volumes", ())}
    for container in spec["containers"]:
        _check_container(container, volumes)


_IMAGE = r"[a-z0-9.-]+(/[a-z0-9.-]+)*:(?!latest$)[\w.-]+(@sha256:[0-9a-f]{64})?"
_QUANTITY = r"\d+(\.\d+)?(m|Ki|Mi|Gi|Ti)?"


def _check_container(container: dict[str, Any], volumes: set[str]) -> None:
    name = container["name"]
    _expect(re.fullmatch(_IMAGE, container["image"]), f"{name}: the image has no fixed tag: {container['image']}")
    context = container.get("securityContext", {})
    _expect(context.get("allowPrivilegeEscalation") is False, f"{name}: allowPrivilegeEscalation")
    _expect(context.get("readOnlyRootFilesystem"), f"{name}: its root file system can be written to")
    _expect(context.get("capabilities", {}).get("drop") == ["ALL"], f"{name}: capabilities are not dropped")
    for side in ("requests", "limits"):
        amounts = container.get("resources", {}).get(side, {})
        _expect({"cpu", "memory"} <= set(amounts), f"{name}: no {side} of cpu and memory")
        _expect(all(re.fullmatch(_QUANTITY, str(value)) for value in amounts.values()), f"{name}: {amounts}")
    for mount in container.get("volumeMounts", ()):
        _expect(mount["name"] in volumes, f"{name}: there is no volume {mount['name']}")
    for variable in container.get("env", ()):
        secret = re.search(r"TOKEN|SECRET|PASSWORD|KEY", variable["name"])
        by_reference = "secretKeyRef" in variable.get("valueFrom", {})
        _expect(not secret or by_reference, f"{name}: {variable['name']} is not by reference")
    if words := [*container.get("command", ()), *container.get("args", ())]:
        check_command(words)
    if stop := container.get("lifecycle", {}).get("preStop"):
        check_command(stop["exec"]["command"])


# ---- Ray's cluster launcher


def check_launcher(text: str) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = yaml.safe_load(text)
    try:
        validate_config(prepare_config(yaml.safe_load(text)))
    except Exception as error:  # jsonschema's, and Ray's own
        raise Broken(f"Ray's launcher: {error}") from error
    workers = len(config["provider"]["worker_ips"])
    _expect(config["min_workers"] == config["max_workers"] == workers, "min_workers, max_workers: one for each machine")
    for key in ("setup_commands", "initialization_commands", "head_start_ray_commands", "worker_start_ray_commands"):
        for line in config[key]:
            check_line(line.replace("$RAY_HEAD_IP", "127.0.0.1"))
            if "ray start" in line:
                _expect("RAY_AUTH_MODE=token " in line, f"{key} start a Ray that asks for no token")


# ---- Dockerfile


def check_dockerfile(text: str) -> None:
    program = Path(sys.executable).with_name("hadolint")
    done = subprocess.run(
        [program, "--failure-threshold", "style", "--no-color", "-"], input=text, capture_output=True, text=True
    )
    _expect(done.returncode == 0, f"hadolint: {done.stdout}{done.stderr}")
    lines = re.sub(r"\\\n\s*", "", re.sub(r"^\s*#.*\n", "", text, flags=re.MULTILINE)).splitlines()
    stages: set[str] = set()
    user = {"": "root"}
    stage = ""
    for line in filter(None, lines):
        word, _, rest = line.partition(" ")
        if word == "FROM":
            base, _, stage = rest.partition(" AS ")
            _expect(base in stages or re.fullmatch(r"[\w./-]+:\d+\.\d+\.\d+[\w.-]*(@sha256:[0-9a-f]{64})?", base), base)
            user[stage] = user.get(base, "root")
            stages.add(stage)
        if word == "USER":
            user[stage] = rest
        _expect(word != "ADD", f"ADD fetches and unpacks: {line}")
        if word in ("ARG", "ENV"):
            _expect(not re.search(r"TOKEN|SECRET|PASSWORD|_KEY\b", line), f"a secret would stay in the image: {line}")
        if word == "COPY" and not rest.startswith("--from="):
            _check_copied(shlex.split(rest)[:-1])
        if word == "CMD":
            check_command(json.loads(rest))
        if word == "RUN" and "pip install" in rest:
            _expect("--require-hashes" in rest or "--no-index" in rest, f"what pip fetches is not checked: {line}")
    for target in ("build", "train"):
        _expect(re.fullmatch(r"[1-9]\d*:[1-9]\d*", user.get(target, "")), f"{target} runs as {user.get(target)}")


def _check_copied(paths: list[str]) -> None:
    allowed = re.findall(r"^!(.*)$", (DEPLOY / "Dockerfile.dockerignore").read_text(), re.MULTILINE)
    for path in paths:
        _expect((TOP / path).exists(), f"COPY of {path}, which is not there")
        _expect(any(Path(path).match(pattern) for pattern in allowed), f"{path} is not sent: Dockerfile.dockerignore")


# ---- Prometheus and Grafana


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Rule(Strict):
    alert: str = Field(pattern=r"^Evenshard[A-Z]\w+$")
    expr: str
    for_: str | None = Field(default=None, alias="for", pattern=r"^\d+[smhd]$")
    labels: dict[str, str]
    annotations: dict[str, str]


class RuleGroup(Strict):
    name: str
    rules: list[Rule] = Field(min_length=1)


class Rules(Strict):
    groups: list[RuleGroup] = Field(min_length=1)


def metrics_in(expression: str) -> set[str]:
    """The names of the series that an expression asks for; Broken if it is no PromQL."""
    return {node.name for node in _nodes(expression) if isinstance(node, promql_parser.VectorSelector)}


def _nodes(expression: str) -> list[Any]:
    found: list[Any] = []
    try:
        promql_parser.walk(promql_parser.parse(expression), lambda node: found.append(node))
    except ValueError as error:
        raise Broken(f"{error}: {expression}") from error
    return found


def _check_expression(expression: str, shown: str) -> None:
    """``shown`` is a text made from the result: a legend, or a summary."""
    names = metrics_in(expression)
    _expect(names and names <= set(KNOWN_METRICS), f"nobody exports {sorted(names - set(KNOWN_METRICS))}: {expression}")
    labels = set.union(*(KNOWN_METRICS[name] for name in names))
    kept: list[set[str]] = []
    for node in _nodes(expression):
        if isinstance(node, promql_parser.VectorSelector):
            asked = {matcher.name for matcher in node.matchers.matchers}
            _expect(asked <= KNOWN_METRICS[node.name], f"{node.name} has no {sorted(asked)}: {expression}")
        if isinstance(node, promql_parser.AggregateExpr):
            kept.append(set(node.modifier.labels) if node.modifier else set())
            _expect(kept[-1] <= labels, f"no label {sorted(kept[-1] - labels)}: {expression}")
    left = kept[0] if kept else labels
    told = set(re.findall(r"\{\{\s*(?:\$labels\.)?(\w+)\s*\}\}", shown))
    _expect(told <= left, f"no label {sorted(told - left)} is left to show: {shown!r} of {expression}")


def check_alerts(text: str) -> None:
    try:
        rules = [rule for group in Rules.model_validate(yaml.safe_load(text)).groups for rule in group.rules]
    except ValidationError as error:
        raise Broken(f"no Prometheus rules: {error}") from error
    _expect(len({rule.alert for rule in rules}) == len(rules), "two alerts of one name")
    anchors = set(anchors_of((DEPLOY / "RUNBOOK.md").read_text()))
    for rule in rules:
        _check_expression(rule.expr, rule.annotations.get("summary", ""))
        _expect(rule.labels.get("severity") in ("page", "ticket"), f"{rule.alert} says not how much it matters")
        _expect(set(rule.annotations) == {"summary", "runbook"}, f"{rule.alert}: {sorted(rule.annotations)}")
        path, _, anchor = rule.annotations["runbook"].partition("#")
        _expect(path == "deploy/RUNBOOK.md" and anchor in anchors, f"{rule.alert} is not in the runbook")
        _expect(anchor == rule.alert.lower(), f"{rule.alert} sends to {anchor}")


def anchors_of(text: str) -> Iterator[str]:
    """The anchors of a Markdown file's headings."""
    for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE):
        yield re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-")


def check_dashboard(text: str) -> None:
    try:
        board = json.loads(text)
    except ValueError as error:
        raise Broken(f"no JSON: {error}") from error
    needed = {"title", "uid", "schemaVersion", "panels", "templating", "time"}
    _expect(needed <= set(board), f"missing: {needed - set(board)}")
    variables = {item["name"] for item in board["templating"]["list"]} | {"__range", "__rate_interval"}
    _expect(len({panel["id"] for panel in board["panels"]}) == len(board["panels"]), "two panels of one id")
    taken: set[tuple[int, int]] = set()
    for panel in board["panels"]:
        _check_panel(panel, variables)
        place = panel["gridPos"]
        cells = {(x + place["x"], y + place["y"]) for x in range(place["w"]) for y in range(place["h"])}
        _expect(not cells & taken and place["x"] + place["w"] <= 24, f"{panel['title']} lies on another, or outside")
        taken |= cells


def _check_panel(panel: dict[str, Any], variables: set[str]) -> None:
    _expect(panel["type"] in ("timeseries", "stat") and panel["targets"], f"{panel['title']} shows nothing")
    _expect(panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}, f"{panel['title']}: no data source")
    for target in panel["targets"]:
        used = set(re.findall(r"\$(\w+)", target["expr"]))
        _expect(used <= variables, f"{panel['title']} uses {used - variables}, which is no variable")
        expression = re.sub(r"\[\$\w+\]", "[5m]", target["expr"]).replace("$session", ".*")
        _check_expression(expression, target["legendFormat"])
