"""`deploy/kubernetes`: what kustomize renders, and the Kubernetes jobs that Dagster makes from the instance in it."""

import inspect
import re
import shutil
import subprocess
import uuid
from typing import Any

import dagster as dg
import pytest
import yaml
from dagster._core.launcher import RunLauncher
from dagster._serdes import ConfigurableClassData

from dmr_pipeline import pipeline
from dmr_pipeline.artifacts.stage import Stage
from dmr_pipeline.defs.assets import build_assets
from dmr_pipeline.defs.automation import ingest
from dmr_pipeline.defs.executors import executor
from tests.helpers.fake_project import REPOSITORY

pytest.importorskip("dagster_k8s", reason="the extra kubernetes is not installed")
kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")

import kubernetes  # noqa: E402
from dagster_k8s import K8sRunLauncher, k8s_job_executor  # noqa: E402
from dagster_k8s.client import DagsterKubernetesClient  # noqa: E402
from dagster_k8s.container_context import K8sContainerContext  # noqa: E402
from dagster_k8s.job import construct_dagster_k8s_job, get_user_defined_k8s_config  # noqa: E402

FOLDER = REPOSITORY / "deploy" / "kubernetes"
KUBERNETES = ("1.30", "1.37")
"""Versions whose schemas everything must fit."""
IMAGE = "registry.example/dmr-worker:1"
Resource = dict[str, Any]


@pytest.fixture(scope="module")
def resources() -> dict[tuple[str, str], Resource]:
    """By kind and name."""
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not installed")
    done = subprocess.run(
        ["kubectl", "kustomize", str(FOLDER)],
        capture_output=True,
        text=True,
        check=True,
    )
    return {(found["kind"], found["metadata"]["name"]): found for found in yaml.safe_load_all(done.stdout)}


@pytest.fixture
def instance_config(resources: dict[tuple[str, str], Resource]) -> Resource:
    loaded: Resource = yaml.safe_load(resources["ConfigMap", "dagster-instance"]["data"]["dagster.yaml"])
    return loaded


@pytest.fixture
def launcher(instance_config: Resource, monkeypatch: pytest.MonkeyPatch) -> K8sRunLauncher:
    """The instance's run launcher, its configuration checked by Dagster."""
    monkeypatch.setattr(kubernetes.config, "load_incluster_config", lambda: None)
    data = instance_config["run_launcher"]
    loaded = ConfigurableClassData(data["module"], data["class"], yaml.safe_dump(data["config"])).rehydrate(RunLauncher)
    assert isinstance(loaded, K8sRunLauncher)
    return loaded


def job_of(launcher: K8sRunLauncher, tags: dict[str, str]) -> Resource:
    """The job that Dagster makes of a step with these tags, or of a run, by the functions that `K8sStepHandler` calls."""
    run = dg.DagsterRun(job_name="whole_pipeline", run_id=str(uuid.uuid4()))
    context = K8sContainerContext.create_for_run(run, launcher, include_run_tags=False).merge(
        K8sContainerContext(run_k8s_config=get_user_defined_k8s_config(tags))
    )
    job = construct_dagster_k8s_job(
        context.get_k8s_job_config(IMAGE, launcher),
        args=["dagster", "api", "execute_step"],
        job_name="dagster-step-1",
        user_defined_k8s_config=context.run_k8s_config,
    )
    serialized: Resource = kubernetes.client.ApiClient().sanitize_for_serialization(job)
    return serialized


def step_job(launcher: K8sRunLauncher, stage: Stage) -> Resource:
    [asset] = [
        built
        for built in build_assets(pipeline.STAGES)
        if isinstance(built, dg.AssetsDefinition) and built.key == dg.AssetKey(stage.name)
    ]
    return job_of(launcher, dict(asset.op.tags))


def check_references(pod: Resource, resources: dict[tuple[str, str], Resource]) -> None:
    """What a pod names is rendered too. Its one secret is made by hand, as deploy/README.md says."""
    assert ("ServiceAccount", pod["serviceAccountName"]) in resources
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    for volume in volumes.values():
        if "configMap" in volume:
            assert ("ConfigMap", volume["configMap"]["name"]) in resources
        elif "emptyDir" not in volume:
            assert (
                "PersistentVolumeClaim",
                volume["persistentVolumeClaim"]["claimName"],
            ) in resources
    for container in pod["containers"]:
        assert {mount["name"] for mount in container["volumeMounts"]} <= volumes.keys()
        for mount in container["volumeMounts"]:
            if "configMap" in volumes[mount["name"]]:
                name = volumes[mount["name"]]["configMap"]["name"]
                assert mount["subPath"] in resources["ConfigMap", name]["data"]
        for source in container["envFrom"]:
            assert ("ConfigMap", source["configMapRef"]["name"]) in resources
        [password] = [variable for variable in container["env"] if variable["name"] == "DAGSTER_PG_PASSWORD"]
        key = password["valueFrom"]["secretKeyRef"]
        command = f"create secret generic {key['name']} --from-literal={key['key']}="
        assert command in (REPOSITORY / "deploy" / "README.md").read_text(encoding="utf-8")


def test_the_instance_differs_from_the_project_s_where_it_must(
    instance_config: Resource,
) -> None:
    project = yaml.safe_load((REPOSITORY / "dagster_home" / "dagster.yaml").read_text(encoding="utf-8"))
    postgres = yaml.safe_load((REPOSITORY / "deploy" / "postgres" / "dagster.yaml").read_text(encoding="utf-8"))
    own = {name: instance_config.pop(name) for name in ("run_launcher", "compute_logs", "storage")}
    assert own["storage"] == postgres["storage"]
    assert instance_config["run_monitoring"].pop("start_timeout_seconds") == 1800
    assert instance_config == project


def test_the_instance_s_variables_are_set(
    instance_config: Resource, resources: dict[tuple[str, str], Resource]
) -> None:
    database = instance_config["storage"]["postgres"]["postgres_db"]
    wanted = {value["env"] for value in database.values() if isinstance(value, dict)}
    given = resources["ConfigMap", "dmr-environment"]["data"]
    assert wanted == {name for name in given if name.startswith("DAGSTER_PG_")} | {"DAGSTER_PG_PASSWORD"}
    assert ("Service", given["DAGSTER_PG_HOST"]) in resources


def test_dagster_can_build_the_rest_of_the_instance(instance_config: Resource) -> None:
    data = instance_config["compute_logs"]
    assert type(ConfigurableClassData(data["module"], data["class"], "{}").rehydrate(object)).__name__ == data["class"]


@pytest.mark.parametrize("version", KUBERNETES)
def test_resources_fit_the_schemas(resources: dict[tuple[str, str], Resource], version: str) -> None:
    for resource in resources.values():
        kubernetes_validate.validate(resource, version, strict=True)


def test_all_lie_in_the_launcher_s_namespace(
    resources: dict[tuple[str, str], Resource], launcher: K8sRunLauncher
) -> None:
    assert ("Namespace", launcher.job_namespace) in resources
    namespaces = {found["metadata"].get("namespace") for (kind, _), found in resources.items() if kind != "Namespace"}
    assert namespaces == {launcher.job_namespace}


def test_deployments_name_what_is_there(
    resources: dict[tuple[str, str], Resource],
) -> None:
    deployments = {name: found for (kind, name), found in resources.items() if kind == "Deployment"}
    assert deployments.keys() == {"code-server", "webserver", "daemon"}
    for deployment in deployments.values():
        check_references(deployment["spec"]["template"]["spec"], resources)
    [server] = yaml.safe_load(resources["ConfigMap", "dagster-instance"]["data"]["workspace.yaml"])["load_from"]
    service = resources["Service", server["grpc_server"]["host"]]
    assert service["spec"]["ports"][0]["port"] == server["grpc_server"]["port"]
    labels = deployments["code-server"]["spec"]["template"]["metadata"]["labels"]
    assert service["spec"]["selector"].items() <= labels.items()


def test_runs_get_the_code_server_s_image(
    resources: dict[tuple[str, str], Resource],
) -> None:
    [container] = resources["Deployment", "code-server"]["spec"]["template"]["spec"]["containers"]
    variables = {variable["name"]: variable.get("value") for variable in container["env"]}
    assert variables["DAGSTER_CURRENT_IMAGE"] == container["image"]


def test_steps_are_jobs(resources: dict[tuple[str, str], Resource], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(
        "DMR_EXECUTOR",
        resources["ConfigMap", "dmr-environment"]["data"]["DMR_EXECUTOR"],
    )
    assert executor() is k8s_job_executor


@pytest.mark.parametrize("stage", pipeline.STAGES, ids=lambda stage: stage.name)
def test_a_step_gets_what_its_stage_needs(
    stage: Stage, launcher: K8sRunLauncher, resources: dict[tuple[str, str], Resource]
) -> None:
    job = step_job(launcher, stage)
    for version in KUBERNETES:
        kubernetes_validate.validate(job, version, strict=True)
    pod = job["spec"]["template"]["spec"]
    check_references(pod, resources)
    [container] = pod["containers"]
    assert container["image"] == IMAGE
    limits = container["resources"]["limits"]
    assert limits["memory"] == f"{stage.resources.memory_gb}Gi"
    assert int(limits.get("nvidia.com/gpu", 0)) == stage.resources.gpus
    assert [toleration["key"] for toleration in pod["tolerations"]] == ["nvidia.com/gpu"]


def test_a_run_takes_no_gpu(launcher: K8sRunLauncher, resources: dict[tuple[str, str], Resource]) -> None:
    pod = job_of(launcher, {})["spec"]["template"]["spec"]
    check_references(pod, resources)
    assert "nvidia.com/gpu" not in pod["containers"][0]["resources"]["limits"]


def test_pods_see_the_same_folders(launcher: K8sRunLauncher, resources: dict[tuple[str, str], Resource]) -> None:
    def shared(pod: Resource) -> dict[str, str]:
        [container] = pod["containers"]
        return {
            mount["mountPath"]: mount["subPath"] for mount in container["volumeMounts"] if mount["name"] == "artefacts"
        }

    step = shared(step_job(launcher, pipeline.STAGES[0])["spec"]["template"]["spec"])
    assert "/opt/dmr/data" in step
    for name in ("code-server", "webserver", "daemon"):
        assert shared(resources["Deployment", name]["spec"]["template"]["spec"]) == step


def test_the_run_that_ingests_has_memory_for_it(launcher: K8sRunLauncher) -> None:
    """Its step runs in the run's own pod; other runs only launch theirs."""
    [container] = job_of(launcher, dict(ingest.tags or {}))["spec"]["template"]["spec"]["containers"]
    [other] = job_of(launcher, {})["spec"]["template"]["spec"]["containers"]
    assert (container["resources"]["limits"]["memory"], other["resources"]["limits"]["memory"]) == ("4Gi", "1Gi")


def test_dagster_may_do_what_it_does(
    resources: dict[tuple[str, str], Resource],
) -> None:
    """Against the calls in the source of dagster_k8s' client; it deletes pods for Dagster Pipes alone."""
    calls = re.findall(
        r"\.(create|delete|list|read)_namespaced_(job|pod|event)(_status|_log)?\b",
        inspect.getsource(DagsterKubernetesClient),
    )
    verbs = {"read": "get"}
    needed = {(verbs.get(verb, verb), f"{kind}s{part.replace('_', '/')}") for verb, kind, part in calls}
    assert ("create", "jobs") in needed
    rules = resources["Role", "dagster"]["rules"]
    allowed = {(verb, name) for rule in rules for verb in rule["verbs"] for name in rule["resources"]}
    assert needed - {("delete", "pods")} <= allowed


def pods(resources: dict[tuple[str, str], Resource], launcher: K8sRunLauncher) -> dict[str, Resource]:
    """Every kind of pod that there is, with its labels: templates of what is rendered, a run and the steps."""
    rendered = {
        name: found["spec"]["template"]
        for (kind, name), found in resources.items()
        if kind in ("Deployment", "StatefulSet")
    }
    jobs = {"run": job_of(launcher, {})} | {stage.name: step_job(launcher, stage) for stage in pipeline.STAGES}
    return rendered | {name: job["spec"]["template"] for name, job in jobs.items()}


def test_no_pod_has_more_rights_than_it_needs(
    resources: dict[tuple[str, str], Resource], launcher: K8sRunLauncher
) -> None:
    found = pods(resources, launcher)
    assert {"postgres", "webserver", "run", "agent"} <= found.keys()
    jobs = {"run", *(stage.name for stage in pipeline.STAGES)}
    for name, template in found.items():
        pod = template["spec"]
        context = pod["securityContext"]
        assert context["runAsNonRoot"] is True, name
        assert context["runAsUser"] == context["fsGroup"] > 0, name
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}, name
        for container in pod["containers"]:
            own = container["securityContext"]
            assert own["allowPrivilegeEscalation"] is False, name
            assert own["capabilities"] == {"drop": ["ALL"]}, name
            assert own.get("readOnlyRootFilesystem", False) is (name not in jobs), name


def test_what_has_a_read_only_root_can_write_where_it_must(resources: dict[tuple[str, str], Resource]) -> None:
    writable = {"postgres": {"/tmp", "/var/run/postgresql", "/var/lib/postgresql/data"}}
    dagster = {"/tmp", "/home/dmr", "/opt/dmr/dagster_home", "/opt/dmr/data"}
    for (kind, name), found in resources.items():
        if kind in ("Deployment", "StatefulSet"):
            pod = found["spec"]["template"]["spec"]
            [container] = pod["containers"]
            volumes = {volume["name"] for volume in pod["volumes"] if "configMap" not in volume}
            volumes |= {claim["metadata"]["name"] for claim in found["spec"].get("volumeClaimTemplates", [])}
            mounted = {mount["mountPath"] for mount in container["volumeMounts"] if mount["name"] in volumes}
            assert writable.get(name, dagster) <= mounted, name


def matches(selector: Resource, labels: dict[str, str]) -> bool:
    """A pod selector, of the two forms that are used here."""
    assert selector.keys() <= {"matchLabels", "matchExpressions"}
    expressions = selector.get("matchExpressions", [])
    assert all(expression["operator"] == "In" for expression in expressions)
    return selector.get("matchLabels", {}).items() <= labels.items() and all(
        labels.get(expression["key"]) in expression["values"] for expression in expressions
    )


def test_only_what_needs_a_server_reaches_it(
    resources: dict[tuple[str, str], Resource], launcher: K8sRunLauncher
) -> None:
    policies = [found["spec"] for (kind, _), found in resources.items() if kind == "NetworkPolicy"]
    labels = {name: template["metadata"]["labels"] for name, template in pods(resources, launcher).items()}
    steps = {"run", *(stage.name for stage in pipeline.STAGES)}

    def reaching(name: str) -> set[tuple[str, int]]:
        """(pod, port): the union of all policies that select the pod, as Kubernetes takes them; else anybody."""
        chosen = [policy for policy in policies if matches(policy["podSelector"], labels[name])]
        assert all("Ingress" in policy["policyTypes"] for policy in chosen)
        assert chosen, f"{name} takes connections from anywhere"
        return {
            (other, port["port"])
            for policy in chosen
            for rule in policy.get("ingress", [])
            for source in rule["from"]
            for other in labels
            if source.keys() == {"podSelector"} and matches(source["podSelector"], labels[other])
            for port in rule["ports"]
        }

    assert reaching("postgres") == {(name, 5432) for name in {"code-server", "webserver", "daemon"} | steps}
    assert reaching("code-server") == {(name, 4000) for name in {"webserver", "daemon"} | steps}
    for name in {"webserver", "daemon"} | steps:
        assert reaching(name) == set()
    ports = {name: found["spec"]["ports"][0]["port"] for (kind, name), found in resources.items() if kind == "Service"}
    assert ports == {"postgres": 5432, "code-server": 4000, "webserver": 3000}


def test_the_web_server_is_the_guarded_one_and_its_probe_gets_in(resources: dict[tuple[str, str], Resource]) -> None:
    [container] = resources["Deployment", "webserver"]["spec"]["template"]["spec"]["containers"]
    assert container["command"][:3] == ["python", "-m", "dmr_pipeline.webserver"]
    headers = container["readinessProbe"]["httpGet"]["httpHeaders"]
    assert {"name": "Host", "value": "localhost"} in headers
