"""The workflow as Argo reads it: graph, parameters, names, when a step ends, what the stages are told."""

import json
import re

import pytest
import yaml

from fewstep.recipe import load_recipe
from k8s import argo
from k8s.all_objects import monthly, named_objects
from k8s.rendered import OVERLAYS, REPO, Manifest, find, rayjob_files, read, rendered, run_files

_SHELL = re.compile(r"[;&|`$<>()\\\"'*?~#\n]")


def _template(overlay: str) -> Manifest:
    return find(rendered(overlay), "WorkflowTemplate", "fewstep-distill")


def _jobs() -> list[tuple[str, Manifest]]:
    return [(source, each) for source, each in named_objects() if each["kind"] == "RayJob"]


def _runs() -> list[tuple[str, Manifest, list[argo.Step]]]:
    template = _template("gpu")
    runs = [(path, read(path), list(argo.walk(read(path), template))) for path in run_files()]
    return [*runs, ("workflows/monthly.yaml", monthly(), list(argo.walk(monthly(), template)))]


@pytest.mark.parametrize(
    ("job", "deployment", "succeeded"),
    [
        ("SUCCEEDED", "Running", None),  # the submitter has not ended
        ("SUCCEEDED", "Complete", True),
        ("FAILED", "Retrying", None),
        ("FAILED", "Failed", False),
        ("", "Failed", False),  # deadline, or it could not be submitted
        ("", "ValidationFailed", False),
        ("STOPPED", "Complete", False),
        ("", "Suspended", None),  # in Kueue's queue
        ("", "Initializing", None),
        ("RUNNING", "Running", None),
        ("PENDING", "Waiting", None),
    ],
)
def test_a_step_ends_when_its_rayjob_has_ended_and_not_before(job: str, deployment: str, succeeded: bool | None):
    (stage,) = [each for each in _template("kind")["spec"]["templates"] if each["name"] == "ray-stage"]
    status = {"jobStatus": job, "jobDeploymentStatus": deployment}
    assert argo.outcome(stage["resource"], status) is succeeded


def test_the_graph_runs_the_stages_in_their_order():
    steps = [step.name for step in argo.walk(read("workflows/sd15-laion.yaml"), _template("gpu"))]
    stages = ["prepare", "teacher", "encode", "convert", "guidance", "progressive", "evaluate", "register", "promote"]
    assert [name for name in steps if name != "approve"] == stages
    assert steps.index("register") < steps.index("approve") < steps.index("promote")


def test_each_run_has_the_stages_of_its_recipe():
    for path, workflow, steps in _runs():
        given = {each["name"]: each["value"] for each in workflow["spec"]["arguments"]["parameters"]}
        recipe = yaml.safe_load((REPO / "workflows" / "recipes" / f"{given['recipe']}.yaml").read_text())
        assert [step.name for step in steps if step.runs] == recipe["stages"], path


def test_a_gate_for_a_person_can_be_switched_on():
    workflow = read("workflows/emoji.yaml")
    workflow["spec"]["arguments"]["parameters"].append({"name": "approval", "value": "true"})
    steps = {step.name: step for step in argo.walk(workflow, _template("kind"))}
    assert steps["approve"].runs
    assert steps["approve"].template["suspend"] == {}
    assert "approve" in steps["promote"].after


def test_a_parameter_that_is_not_there_and_a_value_that_cannot_be_are_refused():
    template = _template("kind")
    workflow = read("workflows/emoji.yaml")
    with pytest.raises(argo.UnresolvedError, match="worker"):
        argo.parameters({"spec": {"arguments": {"parameters": [{"name": "worker", "value": "1"}]}}}, template)
    workflow["spec"]["arguments"]["parameters"][0]["value"] = "emojis"
    with pytest.raises(argo.UnresolvedError, match="emojis"):
        argo.parameters(workflow, template)


def test_every_parameter_is_used_described_and_has_a_value_that_it_may_have():
    template = _template("gpu")
    text = yaml.safe_dump(template["spec"]["templates"]) + yaml.safe_dump(template["spec"]["synchronization"])
    for each in template["spec"]["arguments"]["parameters"]:
        name = each["name"]
        assert each["description"]
        assert isinstance(each["value"], str), name
        assert f"{{{{workflow.parameters.{name}}}}}" in text or f"{{{{inputs.parameters.{name}}}}}" in text, name
        assert "enum" not in each or each["value"] in each["enum"], name
    known = {each["name"] for each in template["spec"]["arguments"]["parameters"]}
    assert set(re.findall(r"\{\{workflow\.parameters\.([\w-]+)\}\}", text)) <= known


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_a_step_that_is_done_again_finds_its_rayjob(overlay: str):
    (stage,) = [each for each in _template(overlay)["spec"]["templates"] if each["name"] == "ray-stage"]
    assert stage["resource"]["action"] == "apply"
    assert stage["resource"]["setOwnerReference"] is True
    assert stage["retryStrategy"]["retryPolicy"] == "OnError"
    assert int(stage["retryStrategy"]["limit"]) > 0
    for step in argo.walk(read("workflows/emoji.yaml"), _template(overlay)):
        if "resource" in step.template:
            assert set(step.manifest["metadata"]) == {"name", "labels"}
            # In the workflow's namespace, or the owner reference removes it at once.
            assert step.manifest["metadata"]["name"] == f"emoji-1-{step.name}"


def test_names_are_as_short_as_the_controllers_want():
    for source, job in _jobs():
        name = job["metadata"]["name"]
        assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name), (source, name)
        assert len(name) <= 47, (source, name)
    for path, workflow, _ in _runs():
        assert len(workflow["metadata"]["name"]) <= 35, path  # with the longest stage behind it 47
    assert len(read("workflows/monthly.yaml")["metadata"]["name"]) <= 24  # Argo adds 11


def test_entrypoints_are_one_plain_command():
    for source, job in _jobs():
        entrypoint = job["spec"]["entrypoint"]
        assert not _SHELL.search(entrypoint), (source, entrypoint)
        assert re.fullmatch(r"fewstep (stage [a-z]+|run) /etc/fewstep/recipes/[a-z0-9-]+\.yaml", entrypoint), source


def test_everything_has_a_deadline_and_its_tries():
    for source, job in _jobs():
        spec = job["spec"]
        assert 0 < spec["preRunningDeadlineSeconds"] < spec["activeDeadlineSeconds"], source
        assert spec["shutdownAfterJobFinishes"] is True, source
        assert spec["backoffLimit"] == 2, source
        assert spec["submitterConfig"]["backoffLimit"] == 2, source
    for overlay in OVERLAYS:
        template = _template(overlay)["spec"]
        (deadline,) = [e["value"] for e in template["arguments"]["parameters"] if e["name"] == "stage-deadline-s"]
        assert template["activeDeadlineSeconds"] > int(deadline)


def test_what_only_kuberay_checks():
    """Rules of KubeRay's own validation.go that no schema holds."""
    for source, job in _jobs():
        cluster = job["spec"]["rayClusterSpec"]
        _cluster_rules(source, cluster, cluster["headGroupSpec"]["template"]["spec"].get("restartPolicy"))
    for overlay in OVERLAYS:
        service = find(rendered(overlay), "RayService", "fewstep")
        cluster = service["spec"]["rayClusterConfig"]
        _cluster_rules(overlay, cluster, cluster["headGroupSpec"]["template"]["spec"].get("restartPolicy"))
        assert len(service["metadata"]["name"]) <= 47


def _cluster_rules(source: str, cluster: Manifest, head_restarts: str | None) -> None:
    import ray

    assert cluster["rayVersion"] == ray.__version__, source
    assert cluster["authOptions"] == {"mode": "token"}, source
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        assert not ("resources" in group and {"num-cpus", "num-gpus", "memory"} & set(group["rayStartParams"])), source
        assert "labels" not in group["rayStartParams"], source
    for group in cluster["workerGroupSpecs"]:
        # More than minReplicas come with autoscaling alone, and KubeRay submits when all that it makes are there.
        assert 0 <= group["minReplicas"] <= group["maxReplicas"], source
        assert group["minReplicas"] <= group.get("replicas", group["minReplicas"]) <= group["maxReplicas"], source
        if cluster["enableInTreeAutoscaling"]:
            assert group["template"]["spec"]["restartPolicy"] == "Never", source
    if cluster["enableInTreeAutoscaling"]:
        assert head_restarts == "Never", source
    assert "securityContext" in cluster["autoscalerOptions"], source


def test_workers_fit_into_the_pods():
    for path, workflow, _ in _runs():
        given = {each["name"]: each["value"] for each in _template("gpu")["spec"]["arguments"]["parameters"]}
        given |= {each["name"]: each["value"] for each in workflow["spec"]["arguments"]["parameters"]}
        gpus = int(given["gpus-per-pod"])
        per_pod = gpus or 1
        assert int(given["workers-max"]) == int(given["pods-max"]) * per_pod, path
        assert 1 <= int(given["workers-min"]) <= int(given["pods-min"]) * per_pod, path
        assert int(given["cpus-per-worker"]) * per_pod <= int(given["pod-cpu"]), path
        assert (given["use-gpu"] == "true") == (gpus > 0), path
        assert given["head-gpus"] == ("1" if gpus else "0"), path  # for what the driver encodes, measures and draws


def test_the_recipe_that_a_stage_loads_has_the_stage_and_the_settings_of_the_run(monkeypatch: pytest.MonkeyPatch):
    """The very environment of the pod, given to the very code that reads it."""
    monkeypatch.setenv("FEWSTEP_S3_BUCKET", "a-bucket")
    for source, job in _jobs():
        container = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]
        env = {each["name"]: each.get("value", "") for each in container["env"]}
        monkeypatch.setenv("FEWSTEP_SET", env["FEWSTEP_SET"])
        *_, path = job["spec"]["entrypoint"].split()
        recipe = load_recipe(REPO / "workflows" / "recipes" / path.rsplit("/", 1)[1])
        stage = job["metadata"]["labels"]["fewstep.io/stage"]
        assert stage == "run" or stage in recipe.stages, source
        assert recipe.storage.bucket == "a-bucket", source
        assert recipe.storage.kind == "s3", source
        workers = recipe.cluster.num_workers
        assert not isinstance(workers, (int, str)), source
        (group,) = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
        gpus = int(group["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"])
        if stage in ("encode", "convert", "guidance", "progressive", "teacher"):
            assert group["maxReplicas"] * (gpus or 1) == workers.max, source
            assert group["minReplicas"] * (gpus or 1) >= workers.min, source
            (head,) = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"]
            assert (gpus > 0) == (head["resources"]["limits"]["nvidia.com/gpu"] == "1"), source
        if source.startswith("step of"):
            assert recipe.name == job["metadata"]["labels"]["fewstep.io/run"], source


def test_the_monthly_run_reads_the_shards_of_its_month():
    for step in argo.walk(monthly(), _template("aws"), now="2027-02"):
        if step.name == "encode":
            assert "data.train=s3://my-bucket/laion-512/2027-02/train" in yaml.safe_dump(step.manifest)
            break
    else:
        pytest.fail("no encode")


def test_all_recipes_are_in_the_config_map_and_in_the_choice_of_the_parameter():
    shipped = {file.name for file in (REPO / "workflows" / "recipes").glob("*.yaml")}
    for overlay in OVERLAYS:
        found = find(rendered(overlay), "ConfigMap", "fewstep-recipes")["data"]
        assert set(found) == shipped
        assert sum(len(text) for text in found.values()) < 900_000  # of 1 MiB
        (recipe,) = [each for each in _template(overlay)["spec"]["arguments"]["parameters"] if each["name"] == "recipe"]
        assert {f"{name}.yaml" for name in recipe["enum"]} == shipped


def test_the_plain_rayjobs_are_those_of_the_workflow():
    """For clusters without Argo: the same stages, told the same, but for the run's name."""
    template = _template("kind")
    compared = 0
    for path in rayjob_files():
        run, stage = path.removeprefix("workflows/rayjobs/").removesuffix(".yaml").split("/")
        if stage == "run":
            continue
        steps = {step.name: step for step in argo.walk(read(f"workflows/{run}.yaml"), template)}
        text = json.dumps(steps[stage].manifest["spec"]).replace(f"name={run}-1\\n", "").replace(f"{run}-1", run)
        of_argo = json.loads(text)
        assert of_argo == read(path)["spec"], path
        compared += 1
    assert compared == len(rayjob_files()) - 2


def test_every_run_fits_into_the_quotas():
    objects = [each for source, each in named_objects() if source == "everything"]
    (flavor,) = find(objects, "ClusterQueue", "fewstep")["spec"]["resourceGroups"][0]["flavors"]
    quotas = {each["name"]: _amount(each["nominalQuota"]) for each in flavor["resources"]}
    hard = find(objects, "ResourceQuota", "fewstep")["spec"]["hard"]
    for source, job in _jobs():
        cluster = job["spec"]["rayClusterSpec"]
        (group,) = cluster["workerGroupSpecs"]
        wanted = dict.fromkeys(quotas, 0.0)
        for count, template in ((1, cluster["headGroupSpec"]), (group["maxReplicas"], group)):
            for name, amount in template["template"]["spec"]["containers"][0]["resources"]["requests"].items():
                wanted[name] += count * _amount(amount)
        for name, amount in wanted.items():
            assert amount <= quotas[name], (source, name)
            if f"requests.{name}" in hard:
                assert amount <= _amount(hard[f"requests.{name}"]), (source, name)


def _amount(text: str) -> float:
    number, unit = re.fullmatch(r"([0-9.]+)(m|[KMGT]i|)", text).groups()  # type: ignore[union-attr]
    return float(number) * {"": 1, "m": 1e-3, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}[unit]
