"""The files of `deploy/`: each is valid without a cluster at hand, and a broken copy of each is refused."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deploy_checks as checks
import kuberay
import pytest
import yaml
from deploy_commands import (
    DEPLOY,
    TOP,
    Broken,
    check_command,
    check_line,
    commands_in_comments,
)
from packaging.requirements import Requirement

import pipeline
from pipeline.config import BuildConfig, load_config, make_config

CHECKS: dict[str, Callable[[str], None]] = {
    "Dockerfile": checks.check_dockerfile,
    "alerts.yaml": checks.check_alerts,
    "cluster.yaml": checks.check_launcher,
    "cronjob.yaml": checks.check_kubernetes,
    "grafana.json": checks.check_dashboard,
    "namespace.yaml": checks.check_kubernetes,
    "raycluster.yaml": checks.check_kubernetes,
    "raycronjob.yaml": checks.check_kubernetes,
    "rayjob.yaml": checks.check_kubernetes,
}
OTHERS = {  # with tests of their own
    "Dockerfile.dockerignore", "RUNBOOK.md", "build.yaml",
    "requirements-build.lock", "requirements-train.lock", "requirements-wheel.lock",
    "systemd/evenshard-nightly.service", "systemd/evenshard-nightly.timer",
}  # fmt: skip


def text_of(name: str) -> str:
    return (DEPLOY / name).read_text()


def test_every_file_is_checked() -> None:
    there = {str(path.relative_to(DEPLOY)) for path in DEPLOY.rglob("*") if path.is_file()}
    assert there == OTHERS | set(CHECKS)


@pytest.mark.parametrize("name", CHECKS)
def test_a_file_is_valid(name: str) -> None:
    CHECKS[name](text_of(name))


@pytest.mark.parametrize("name", CHECKS)
def test_commands_in_comments_are_real_ones(name: str) -> None:
    for line in commands_in_comments(text_of(name)):
        check_line(line)


BROKEN = {
    "cronjob.yaml": [
        ("concurrencyPolicy", "concurencyPolicy", "Kubernetes 1.31.*concurencyPolicy"),
        ("Policy: Forbid", "Policy: Allow", "two nights at once"),
        ('"17 2 * * *"', '"99 2 * * *"', "no cron schedule"),
        ("timeZone: Etc/UTC", "timeZone: Etc/Nowhere", "no time zone"),
        ("startingDeadlineSeconds: 7200", "startingDeadlineSeconds: 0", "startingDeadlineSeconds"),
        ("backoffLimit: 2", "backoffLimit: two", "backoffLimit|two"),
        ("jobs.nightly", "jobs.nighty", "there is no jobs.nighty"),
        ("--keep\n", "--keeep\n", "No such option"),
        ("--submission-id", "--submision-id", "No such option"),
        ("--kill-after=300", "--killafter=300", "timeout has no"),
        ("secretKeyRef: # made", "configMapKeyRef: # made", "RAY_AUTH_TOKEN is not by reference"),
        ("mountPath: /tmp", "mountPaht: /tmp", "mountPath"),
        ("name: tmp\n                  mount", "name: tmpp\n                  mount", "there is no volume tmpp"),
        ("evenshard-build:0.1.0", "evenshard-build:latest", "no fixed tag"),
        ("drop: [ALL]", "drop: [NET_RAW]", "capabilities"),
        ("readOnlyRootFilesystem: true", "readOnlyRootFilesystem: false", "root file system"),
        ("runAsNonRoot: true", "runAsNonRoot: false", "may run as root"),
        ("limits: {cpu", "limits: {cpus", "no limits of cpu and memory"),
        ("memory: 1Gi", "memory: 1 GB", "1 GB"),
    ],
    "namespace.yaml": [
        ("podSelector", "podSelectors", "podSelectors"),
        ("maxUnavailable", "maxUnavailble", "maxUnavailble"),
        ("port: 8265", "port: [8265]", "8265"),
    ],
    "raycluster.yaml": [
        ("mode: token", "mode: disabled", "authOptions.mode"),
        ("authOptions", "authOption", "authOption"),
        ("rayVersion: 2.60.0", "rayVersion: 2.50.0", "tokens need Ray 2.52"),
        ("version: v2", "version: v3", "version"),
        ("minReplicas: 0", "minReplicas: 3", "minReplicas <= replicas"),
        ("maxReplicas: 20", "maxReplicas: '20'", "maxReplicas"),
        ("serviceType: ClusterIP", "serviceType: LoadBalancer", "serviceType"),
        ("restartPolicy: Never", "restartPolicy: Always", "restartPolicy is Never"),
        ("image: ", "imagee: ", "imagee"),
        ("command: [ray, stop]", "command: [ray, stopp]", "No such command"),
    ],
    "rayjob.yaml": [
        ("submissionMode: K8sJobMode", "submissionMode: K8sJob", "submissionMode"),
        ("submissionMode: K8sJobMode", "submissionMode: SidecarMode", "SidecarMode has no submitter"),
        ("shutdownAfterJobFinishes: true", "shutdownAfterJobFinishes: false", "needs shutdownAfterJobFinishes"),
        ("activeDeadlineSeconds: 21600", "activeDeadlineSeconds: 0", "activeDeadlineSeconds"),
        ("generateName: evenshard-night-", "name: Evenshard", "name"),
        ("--sample 0.05", "--sample 5%", "Invalid value for '--sample'"),
    ],
    "raycronjob.yaml": [
        ("suspend: false", "concurrencyPolicy: Forbid", "concurrencyPolicy"),
        ('"17 2 * * *"', '"TZ=UTC 17 2 * * *"', "no cron schedule"),
        ("jobTemplate", "template", "jobTemplate"),
    ],
    "cluster.yaml": [
        ("head_ip", "head_pi", "Ray's launcher"),
        ("idle_timeout_minutes", "idle_timeout_minuets", "Ray's launcher"),
        ("min_workers: 2", "min_workers: 1", "one for each machine"),
        ("RAY_AUTH_MODE=token ", "", "asks for no token"),
        ("--dashboard-host=127", "--dashbord-host=127", "No such option"),
    ],
    "Dockerfile": [
        ("FROM python:3.11.14-slim-bookworm", "FROM python:latest", "DL3007"),
        ("FROM python:3.11.14-slim-bookworm", "FROM python:3-slim", "python:3-slim"),
        ("USER 10001:10001\nCMD", "USER root\nCMD", "DL3002|runs as root"),
        ("USER 10001:10001\n", "", "runs as root"),
        ("COPY pipeline pipeline", "ADD pipeline pipeline", "DL3020"),
        ("COPY jobs jobs", "COPY job jobs", "COPY of job, which is not there"),
        ("COPY jobs jobs", "COPY docs docs", "docs is not sent"),
        ("ENV PATH", "ENV AWS_SECRET_ACCESS_KEY=x PATH", "DL3064|a secret would stay"),
        ("--require-hashes --no-deps", "--no-deps", "what pip fetches is not checked"),
        ('CMD ["evenshard", "--help"]', 'CMD ["evenshards", "--help"]', "no program"),
        ("RUN pip wheel", "RUN cd /src && pip wheel", "DL3003"),
    ],
    "alerts.yaml": [
        ("expr: absent(", "expr: absent((", "unclosed"),
        ("ray_evenshard_rejects_total", "ray_evenshard_reject_total", "nobody exports .*ray_evenshard_reject_total"),
        ("for: 15m", "for: 15 minutes", "no Prometheus rules"),
        ("by (ip)", "by (NodeAddress)", "no label .*NodeAddress"),
        ('cronjob="evenshard-nightly"', 'cron="evenshard-nightly"', "last_successful_time has no .*cron"),
        ("$labels.stage", "$labels.state", "no label .*state.* is left to show"),
        ("severity: page", "severity: panic", "how much it matters"),
        ("#evenshardmemory", "#evenshardmemories", "is not in the runbook"),
        ("alert: EvenshardMemory", "alert: EvenshardStuck", "two alerts of one name"),
        ("annotations:", "annotation:", "no Prometheus rules"),
    ],
    "grafana.json": [
        ("ray_evenshard_images_total", "ray_evenshard_image_total", "nobody exports"),
        ("histogram_quantile(0.5, ", "histogram_quantil(0.5, ", "histogram_quantil"),
        ("{{ip}}", "{{node}}", "no label .*node"),
        ("sum by (reason)", "sum by (reasons)", "no label .*reasons"),
        ("{SessionName=~", "{Session=~", "has no .*Session"),
        ("$session", "$sesion", "is no variable"),
        ('"id": 2', '"id": 1', "two panels of one id"),
        ('"x": 6', '"x": 5', "lies on another"),
        ('"panels": [', '"panels": [,', "no JSON"),
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "old", "new", "message"), [(name, *change) for name, changes in BROKEN.items() for change in changes]
)
def test_a_broken_copy_is_refused(name: str, old: str, new: str, message: str) -> None:
    text = text_of(name)
    assert old in text
    with pytest.raises(Broken, match=re.compile(message, re.DOTALL)):
        CHECKS[name](text.replace(old, new))


def test_every_kind_of_file_has_broken_copies() -> None:
    assert set(BROKEN) == set(CHECKS)


# ---- What must agree


def documents(name: str) -> list[Any]:
    return list(yaml.safe_load_all(text_of(name)))


def test_there_is_one_ray_and_one_job_in_three_files() -> None:
    (cluster,), (job,), (cron,) = map(documents, ("raycluster.yaml", "rayjob.yaml", "raycronjob.yaml"))
    assert job["spec"]["rayClusterSpec"] == cluster["spec"]
    assert cron["spec"]["jobTemplate"] == job["spec"]


def test_the_cron_job_runs_what_the_ray_job_runs() -> None:
    (cron,), (job,) = map(documents, ("cronjob.yaml", "rayjob.yaml"))
    container = cron["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"][0]
    assert " ".join(container["args"]) == job["spec"]["entrypoint"]


def test_versions_are_those_of_the_locks_and_of_the_project() -> None:
    (cluster,) = documents("raycluster.yaml")
    assert f"ray=={cluster['spec']['rayVersion']} \\\n" in text_of("requirements-build.lock")
    version = re.search(r'^version = "(.*)"', (TOP / "pyproject.toml").read_text(), re.MULTILINE)
    assert version
    images = re.findall(r"evenshard-(?:build|train):([\w.]+)", "".join(map(text_of, [*CHECKS, "RUNBOOK.md"])))
    assert set(images) == {version[1]}


def test_the_token_is_that_which_the_operator_makes_for_this_cluster() -> None:
    (cluster,), (cron,) = map(documents, ("raycluster.yaml", "cronjob.yaml"))
    container = cron["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"][0]
    token = next(item for item in container["env"] if item["name"] == "RAY_AUTH_TOKEN")
    assert token["valueFrom"]["secretKeyRef"] == {"name": cluster["metadata"]["name"], "key": "auth_token"}
    assert f"--address=http://{cluster['metadata']['name']}-head-svc:8265" in container["command"]


def test_the_network_policy_lets_the_submitters_in() -> None:
    policy = next(item for item in documents("namespace.yaml") if item["kind"] == "NetworkPolicy")
    wanted = policy["spec"]["ingress"][1]["from"][0]["podSelector"]["matchLabels"]
    (cron,), (job,) = map(documents, ("cronjob.yaml", "rayjob.yaml"))
    submitters = (cron["spec"]["jobTemplate"]["spec"]["template"], job["spec"]["submitterPodTemplate"])
    assert all(wanted.items() <= template["metadata"]["labels"].items() for template in submitters)


@pytest.mark.parametrize("name", ["raycluster.yaml", "rayjob.yaml", "cronjob.yaml"])
def test_pods_are_found_to_be_checked(name: str) -> None:
    found = sum(1 for document in documents(name) for _ in kuberay.pod_templates(document))
    assert found == {"raycluster.yaml": 2, "rayjob.yaml": 3, "cronjob.yaml": 1}[name]


# ---- Locks


@pytest.mark.parametrize(
    ("name", "absent", "present"),
    [("build", ("torch", "nvidia", "triton"), ("ray", "s3fs")), ("train", ("ray",), ("torch", "s3fs"))],
)
def test_a_lock_holds_what_its_image_needs_by_hash_and_no_more(
    name: str, absent: tuple[str, ...], present: tuple[str, ...]
) -> None:
    pins = pins_of(text_of(f"requirements-{name}.lock"))
    assert not [pin for pin in pins if pin.split("-")[0] in absent]
    assert set(present) <= set(pins)
    whole = pins_of((TOP / "requirements.lock").read_text())
    assert {pin: whole.get(pin) for pin in pins} == pins  # the images run what the tests ran


@pytest.mark.parametrize(("name", "extras"), [("build", ("build", "s3")), ("train", ("train", "s3"))])
def test_a_lock_is_not_older_than_the_dependencies(name: str, extras: tuple[str, ...]) -> None:
    project = tomllib.loads((TOP / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *(line for extra in extras for line in project["optional-dependencies"][extra])]
    pins = pins_of(text_of(f"requirements-{name}.lock"))
    requirements = map(Requirement, wanted)
    assert [str(each) for each in requirements if pins.get(each.name, "") not in each.specifier] == []


def pins_of(lock: str) -> dict[str, str]:
    """Versions by name; each is followed by at least one hash, and nothing names where it comes from."""
    assert "://" not in lock
    found = re.findall(r"^([\w.-]+)==([\w.+]+)[^\n]*\\\n    --hash=sha256:[0-9a-f]{64}", lock, re.MULTILINE)
    assert len(found) == len(re.findall(r"^\w", lock, re.MULTILINE))
    return dict(found)


# ---- The build file

SETTING = re.compile(r"^# (\w+): (.*?) +# \S.*$", re.MULTILINE)


def test_the_build_file_loads_and_asks_for_nothing_but_defaults(tmp_path: Path) -> None:
    config = make_config(load_config(DEPLOY / "build.yaml"))
    assert config == BuildConfig(source=config.source, root=config.root)
    everything = tmp_path / "build.yaml"
    everything.write_text(SETTING.sub(r"\1: \2", text_of("build.yaml")))
    assert make_config(load_config(everything)) == config  # each default that it tells is the real one


def test_the_build_file_tells_every_setting_once_with_a_reason() -> None:
    told = [name for name, _ in SETTING.findall(text_of("build.yaml"))]
    assert sorted([*told, "root", "source"]) == sorted(BuildConfig.model_fields)


@pytest.mark.parametrize("change", [("# max_shrink: 10%", "# max_shrink: 20%"), ("# seed: 0", "# sed: 0")])
def test_a_build_file_that_tells_a_wrong_default_is_seen(tmp_path: Path, change: tuple[str, str]) -> None:
    broken = tmp_path / "build.yaml"
    broken.write_text(SETTING.sub(r"\1: \2", text_of("build.yaml").replace(*change)))
    if "sed" in change[1]:
        with pytest.raises(pipeline.ConfigError, match="sed"):
            load_config(broken)
    else:
        assert make_config(load_config(broken)) != make_config(load_config(DEPLOY / "build.yaml"))


# ---- Commands

WRONG = (
    "evenshard bild A B", "evenshard build A B --shard-sample 3", "evenshard pin", "python -m jobs.nothing A B",
    "python nightly.py", "timeout python -m jobs.build A B", "timeout 5x python -m jobs.build A B",
    "ray job submit --adress http://x -- python -m jobs.build A B", "ray job submit -- python -m jobs.biuld A B",
    "kubectl apply -f deploy/nothing.yaml", "kubectl -n default get pods", "kubectl explode",
    "kubectl -n evenshard describe cronjob nightly", "kubectl create job --from=cronjob/other x",
    "kubectl -n evenshard exec svc/evenshard-head-svc -- ray jobs",
    "docker build -f deploy/Dockerfile --target x -t y .",
    "systemctl start evenshard.service", "systemctl explode evenshard-nightly.timer",
    "journalctl --unit other.service --since yesterday", "/opt/evenshard/bin/pip install torch", "curl example.com",
    "ray exec deploy/cluster.yaml 'ray statuss'", "RAY_AUTH_MODE=token",
)  # fmt: skip


@pytest.mark.parametrize("line", WRONG)
def test_a_wrong_command_is_refused(line: str) -> None:
    with pytest.raises(Broken):
        check_line(line)


def test_a_right_command_is_not() -> None:
    check_command(["timeout", "--signal=INT", "5h", "python", "-m", "jobs.build", "A", "B", "--check", "header"])
    check_line("RAY_AUTH_MODE=token ray status && evenshard --version; evenshard gc R --keep 7")


def test_hadolint_is_there() -> None:
    done = subprocess.run([Path(sys.executable).with_name("hadolint"), "--version"], capture_output=True, text=True)
    assert "Haskell Dockerfile Linter" in done.stdout


def test_the_dashboard_and_the_alerts_use_every_metric_that_is_exported() -> None:
    board = json.loads(text_of("grafana.json"))
    asked = {
        name
        for panel in board["panels"]
        for target in panel["targets"]
        for name in checks.metrics_in(re.sub(r"\[\$\w+\]", "[5m]", target["expr"]).replace("$session", ".*"))
    }
    exported = {name for metric in checks.METRICS for name in metric.exported if not name.endswith("_sum")}
    assert exported <= asked  # sums of histograms are made from the middles of buckets: nothing to show
