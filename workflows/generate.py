"""Writes the Argo WorkflowTemplate, the workflows that run it, and the plain RayJobs, all from rayjob.yaml.in.

`make manifests` runs it; a test holds that what lies here is what it writes. One source, because Argo keeps the RayJob
in a string, in which kustomize changes nothing.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

import yaml

HERE = Path(__file__).parent
RAY_VERSION = "2.60.0"
VERSION = "0.1.0"
#: RayJob names have at most 47 characters, and the longest stage is `progressive`.
LONGEST_RUN_NAME = 35
MADE = "# Made by `make manifests` from workflows/generate.py and workflows/rayjob.yaml.in: change those.\n"
OPTIONAL = ("prepare", "teacher", "convert", "evaluate", "register", "promote")


@dataclass(frozen=True)
class Parameter:
    """A parameter of the workflow: its value when a run says nothing, what it is, and what it may be."""

    name: str
    value: str
    description: str
    enum: tuple[str, ...] = ()

    def lines(self) -> dict[str, object]:
        """Return it as Argo writes it."""
        shown: dict[str, object] = {"name": self.name, "value": self.value, "description": self.description}
        return shown | ({"enum": list(self.enum)} if self.enum else {})


@dataclass(frozen=True)
class Stage:
    """How a stage differs from others as a RayJob."""

    name: str
    after: tuple[str, ...]
    image: str = "training-image"
    with_workers: bool = True  # else the head does the work
    with_gpu: bool = True  # on workers, where there are any, and on the head, where the driver encodes and measures


STAGES = (
    Stage("prepare", (), image="prepare-image", with_gpu=False),
    Stage("teacher", ("prepare",)),
    Stage("encode", ("prepare", "teacher")),
    Stage("convert", ("encode",)),
    Stage("guidance", ("encode", "convert")),
    Stage("progressive", ("guidance",)),
    Stage("evaluate", ("progressive",), with_workers=False),
    Stage("register", ("evaluate",), with_workers=False, with_gpu=False),
    Stage("promote", ("register", "approve"), with_workers=False, with_gpu=False),
)

BOOLEAN = ("true", "false")


def recipes() -> tuple[str, ...]:
    """Return the names of the recipes that ship."""
    return tuple(sorted(file.stem for file in (HERE / "recipes").glob("*.yaml")))


def parameters() -> tuple[Parameter, ...]:
    """Return the workflow's parameters."""
    return (
        Parameter("recipe", "emoji", "What to distill and how: a file of workflows/recipes, without .yaml.", recipes()),
        Parameter("recipes", "fewstep-recipes", "ConfigMap that holds the recipes."),
        Parameter("training-image", f"fewstep-training:{VERSION}", "Image of all stages but prepare."),
        Parameter("prepare-image", f"fewstep-prepare:{VERSION}", "Image of prepare, with img2dataset."),
        Parameter("teacher", "", "Teacher: a hub id, s3://…, or models:/NAME@ALIAS. Empty: the recipe's."),
        Parameter("train-shards", "", "Folder of shards to train on, s3://…. Empty: the recipe's."),
        Parameter("evaluate-shards", "", "Folder of held-out shards. Empty: the recipe's."),
        Parameter("alignment-shards", "", "Folder of shards that fit the scorer of alignment. Empty: the recipe's."),
        Parameter("extra-settings", "", "One more change of the recipe, KEY=VALUE (docs/environment.md). Empty: none."),
        *(
            Parameter(f"run-{stage}", "false", f"Run the stage {stage}: true if the recipe has it.", BOOLEAN)
            for stage in OPTIONAL
        ),
        Parameter("approval", "false", "Wait for a person between register and promote.", BOOLEAN),
        Parameter("workers-min", "1", "Fewest training workers: with fewer, a training waits."),
        Parameter("workers-max", "1", "Most training workers; the global batch is the recipe's with any number."),
        Parameter("use-gpu", "false", "One GPU for each worker.", BOOLEAN),
        Parameter("cpus-per-worker", "2", "CPUs of a training worker."),
        Parameter(
            "pods-min", "1", "Pods of workers at the start, all of which must come; without autoscaling at all times."
        ),
        Parameter("pods-max", "1", "Most pods of workers, with autoscaling: workers-max divided by the GPUs of a pod."),
        Parameter("gpus-per-pod", "0", "GPUs of a pod of workers; all of a node where workers shall use NVLink."),
        Parameter("pod-cpu", "2", "CPUs of a pod of workers."),
        Parameter("pod-memory", "6Gi", "Memory of a pod of workers."),
        Parameter("head-cpu", "1", "CPUs of the head, where the driver runs."),
        Parameter("head-memory", "4Gi", "Memory of the head, which holds teacher and student while it measures."),
        Parameter("head-gpus", "0", "GPUs of the head in stages that encode, measure or draw.", ("0", "1")),
        Parameter(
            "gpu-type",
            "{}",
            "Node selector of worker pods, as JSON: the kind of GPU. The labels here are those of NVIDIA's operator.",
            (
                "{}",
                '{"nvidia.com/gpu.product": "NVIDIA-H200"}',
                '{"nvidia.com/gpu.product": "NVIDIA-H100-80GB-HBM3"}',
                '{"nvidia.com/gpu.product": "NVIDIA-A100-SXM4-80GB"}',
                '{"nvidia.com/gpu.product": "NVIDIA-A100-SXM4-40GB"}',
                '{"nvidia.com/gpu.product": "NVIDIA-L40S"}',
            ),
        ),
        Parameter(
            "head-gpu-type", "{}", "Node selector of the head, as JSON, where it has a GPU; a small kind will do."
        ),
        Parameter("autoscaling", "false", "Let Ray ask for pods as it needs them (components/autoscaling).", BOOLEAN),
        Parameter("head-service-account", "fewstep-ray", "Service account of the head."),
        Parameter("queue", "", "Kueue's LocalQueue (components/kueue). Empty: not queued."),
        Parameter("retries", "2", "Times that a stage is tried again on a new cluster, from its last checkpoint."),
        Parameter(
            "stage-deadline-s", "604800", "Seconds that one try of a stage may take; after it there is no other."
        ),
        Parameter("start-deadline-s", "3600", "Seconds until the cluster of a try must run."),
    )


def settings(values: dict[str, str], *, named: bool) -> list[str]:
    """Return the lines of FEWSTEP_SET; those with nothing behind = change nothing."""
    lines = [f"name={values['run']}"] if named else []
    return [
        *lines,
        f"teacher={values['teacher']}",
        f"data.train={values['train-shards']}",
        f"data.evaluate={values['evaluate-shards']}",
        f"data.alignment={values['alignment-shards']}",
        f"cluster.num_workers.min={values['workers-min']}",
        f"cluster.num_workers.max={values['workers-max']}",
        f"cluster.use_gpu={values['use-gpu']}",
        f"cluster.cpus_per_worker={values['cpus-per-worker']}",
        values["extra-settings"],
    ]


def rayjob(values: dict[str, str], *, command: str, named: bool = True) -> str:
    """Return the manifest of a RayJob, filled with values or with Argo's words for them."""
    text = (HERE / "rayjob.yaml.in").read_text()
    indent = " " * 20
    filled = {
        "name": values["name"],
        "stage": values["stage"],
        "run": values["run"],
        "queue": values["queue"],
        "command": command,
        "retries": values["retries"],
        "deadline_s": values["stage-deadline-s"],
        "start_deadline_s": values["start-deadline-s"],
        "image": values["image"],
        "ray_version": RAY_VERSION,
        "autoscaling": values["autoscaling"],
        "head_service_account": values["head-service-account"],
        "settings": "\n".join(indent + line for line in settings(values, named=named) if line),
        "head_cpu": values["head-cpu"],
        "head_memory": values["head-memory"],
        "head_gpus": values["head-gpus"],
        "head_node_selector": values["head-gpu-type"],
        "recipes": values["recipes"],
        "pods_min": values["pods-min"],
        "pods_max": values["pods-max"],
        "node_selector": values["gpu-type"],
        "pod_cpu": values["pod-cpu"],
        "pod_memory": values["pod-memory"],
        "gpus": values["gpus"],
    }
    return re.sub(r"@(\w+)@", lambda match: filled[match.group(1)], text)


def indented(text: str, spaces: int) -> str:
    """Return the text with every line moved to the right."""
    return "".join(" " * spaces + line if line.strip() else line for line in text.splitlines(keepends=True))


def workflow_template() -> str:
    """Return the WorkflowTemplate `fewstep-distill`."""
    inputs = ("stage", "image", "pods-min", "pods-max", "gpus", "head-gpus", "head-gpu-type")
    data = ("train-shards", "evaluate-shards", "alignment-shards")
    values = {each.name: f"{{{{workflow.parameters.{each.name}}}}}" for each in parameters()}
    values |= {name: f"{{{{inputs.parameters.{name}}}}}" for name in (*inputs, *data)}
    values |= {"name": "{{workflow.name}}-{{inputs.parameters.stage}}", "run": "{{workflow.name}}"}
    manifest = rayjob(
        values,
        command="fewstep stage {{inputs.parameters.stage}} /etc/fewstep/recipes/{{workflow.parameters.recipe}}.yaml",
    )
    # Argo makes it in the workflow's namespace, which is not for this file to say.
    manifest = manifest.replace("  namespace: fewstep\n", "", 1)
    shown = yaml.safe_dump([each.lines() for each in parameters()], sort_keys=False, width=1000, allow_unicode=True)
    return MADE + TEMPLATE.replace("@parameters@\n", indented(shown, 6)).replace(
        "@tasks@\n", indented(tasks(data), 10)
    ).replace("@data@\n", "".join(f"          - name: {name}\n" for name in data)).replace(
        "@inputs@\n", "".join(f"          - name: {name}\n" for name in (*inputs, *data))
    ).replace("@manifest@\n", indented(manifest, 10))


def tasks(data: tuple[str, ...]) -> str:
    """Return the tasks of the graph."""
    text = ""
    for stage in STAGES:
        if stage.name == "promote":
            text += APPROVE
        text += f"- name: {stage.name}\n  template: ray-stage\n"
        if stage.after:
            text += f"  dependencies: [{', '.join(stage.after)}]\n"
        if stage.name in OPTIONAL:
            text += f'  when: "{{{{workflow.parameters.run-{stage.name}}}}} == true"\n'
        text += "  arguments:\n    parameters:\n"
        for name, value in (
            ("stage", stage.name),
            ("image", f'"{{{{workflow.parameters.{stage.image}}}}}"'),
            *((name, _given(name, "0", given=stage.with_workers)) for name in ("pods-min", "pods-max")),
            ("gpus", _given("gpus-per-pod", "0", given=stage.with_gpu)),
            ("head-gpus", _given("head-gpus", "0", given=stage.with_gpu)),
            ("head-gpu-type", _given("head-gpu-type", "{}", given=stage.with_gpu)),
            *((name, f'"{{{{inputs.parameters.{name}}}}}"') for name in data),
        ):
            text += f"      - {{name: {name}, value: {value}}}\n"
    return text


def _given(parameter: str, otherwise: str, *, given: bool) -> str:
    return f'"{{{{workflow.parameters.{parameter}}}}}"' if given else f'"{otherwise}"'


APPROVE = """\
- name: approve
  template: approve
  dependencies: [register]
  when: "{{workflow.parameters.approval}} == true"
"""

TEMPLATE = """\
# The stages of a recipe as a graph; each is a RayJob, and what it leaves lies in the store where the next one looks.
# A run of it: the files beside the folder, such as workflows/emoji.yaml.
apiVersion: argoproj.io/v1alpha1
kind: WorkflowTemplate
metadata:
  name: fewstep-distill
  namespace: fewstep
  labels:
    app.kubernetes.io/name: fewstep
    app.kubernetes.io/part-of: fewstep
    app.kubernetes.io/component: workflow
spec:
  entrypoint: distill
  serviceAccountName: fewstep-workflow
  # Two runs of one recipe would wait for each other's trainings with their GPUs idle.
  synchronization:
    mutexes:
      - name: "fewstep-{{workflow.parameters.recipe}}"
  activeDeadlineSeconds: 1209600
  ttlStrategy:
    secondsAfterCompletion: 1209600
  podGC:
    strategy: OnPodSuccess
    deleteDelayDuration: 600s
  securityContext:
    runAsNonRoot: true
    seccompProfile: {type: RuntimeDefault}
  podMetadata:
    labels:
      app.kubernetes.io/part-of: fewstep
      app.kubernetes.io/component: workflow
  arguments:
    parameters:
@parameters@
  templates:
    - name: distill
      inputs:
        parameters:
@data@
      dag:
        tasks:
@tasks@

    # Go on with `argo -n fewstep resume NAME`, or in Argo's own page.
    - name: approve
      suspend: {}

    - name: ray-stage
      inputs:
        parameters:
@inputs@
      # Of this step alone, whose pod may be evicted; the stage itself is tried again by the RayJob's backoffLimit.
      retryStrategy:
        limit: "3"
        retryPolicy: OnError
        backoff: {duration: 30s, factor: "2", maxDuration: 10m}
      resource:
        # With a fixed name: a step that is done again finds the RayJob that it made, and makes no second one.
        action: apply
        setOwnerReference: true
        # A stage that failed may still be tried again: only Failed, ValidationFailed and STOPPED are the end.
        successCondition: status.jobStatus == SUCCEEDED, status.jobDeploymentStatus == Complete
        failureCondition: status.jobDeploymentStatus in (Failed, ValidationFailed), status.jobStatus == STOPPED
        manifest: |
@manifest@
      outputs:
        parameters:
          - name: job-id
            valueFrom: {jsonPath: "{.status.jobId}"}
"""


@dataclass(frozen=True)
class Run:
    """A workflow that ships: which recipe on how much."""

    file: str
    recipe: str
    what: str
    values: dict[str, str] = field(default_factory=dict)

    def arguments(self) -> dict[str, str]:
        """Return all that it says, with the stages of its recipe."""
        stages = yaml.safe_load((HERE / "recipes" / f"{self.recipe}.yaml").read_text())["stages"]
        of_stages = {f"run-{stage}": str(stage in stages).lower() for stage in OPTIONAL}
        return {"recipe": self.recipe} | of_stages | self.values


def gpus(workers: int, *, fewest: int, memory: str = "96Gi", head: str = "32Gi") -> dict[str, str]:
    """Return the values of a run with one GPU for each pod: all at the start, and no fewer than `fewest` later."""
    return {
        "use-gpu": "true",
        "workers-min": str(fewest),
        "workers-max": str(workers),
        "pods-min": str(workers),
        "pods-max": str(workers),
        "gpus-per-pod": "1",
        "cpus-per-worker": "8",
        "pod-cpu": "8",
        "pod-memory": memory,
        "head-cpu": "4",
        "head-memory": head,
        "head-gpus": "1",
    }


def shards(folder: str, *names: str) -> dict[str, str]:
    """Return where a run's shards are."""
    return {f"{name}-shards": f"s3://my-bucket/{folder}/{name}" for name in names}


_ALL = ("train", "evaluate", "alignment")
RUNS = (
    Run("emoji", "emoji", "The emoji students, on CPUs: an hour and a half on two cores."),
    Run(
        "sd15-laion",
        "sd15-laion-512",
        "Stable Diffusion 1.5, or a fine-tune of it, at 512 px: about 130 GPU-hours of H100.",
        shards("laion-512", *_ALL) | gpus(8, fewest=4),
    ),
    Run(
        "sd21-laion",
        "sd21-laion-512",
        "Stable Diffusion 2.1 at 512 px: about 131 GPU-hours of H100.",
        shards("laion-512", *_ALL) | gpus(8, fewest=4),
    ),
    Run(
        "sdxl-laion",
        "sdxl-laion-1024",
        "Stable Diffusion XL at 1024 px: about 1,180 GPU-hours of H100.",
        shards("laion-1024", *_ALL) | gpus(32, fewest=16, memory="160Gi", head="64Gi"),
    ),
    Run(
        "sd15-inpainting-laion",
        "sd15-inpainting-laion-512",
        "Stable Diffusion 1.5's inpainting model: about 334 GPU-hours of H100.",
        shards("laion-512", *_ALL) | gpus(8, fewest=4),
    ),
    Run(
        "imagenet64",
        "imagenet64",
        "The paper's class-conditional model in pixels: about 1,740 GPU-hours of H100.",
        {"teacher": "s3://my-bucket/teachers/imagenet64"}
        | shards("imagenet64", "train", "evaluate")
        | gpus(32, fewest=16),
    ),
)


def run_file(run: Run) -> str:
    """Return a Workflow that runs the template once."""
    return (
        MADE
        + f"# {run.what}\n"
        + f"#   kubectl apply -f workflows/{run.file}.yaml\n"
        + "# A new run needs a new name, of at most 35 letters. What a run of this recipe has done before is skipped.\n"
        + "apiVersion: argoproj.io/v1alpha1\n"
        + f"kind: Workflow\nmetadata:\n  name: {run.file}-1\n  namespace: fewstep\n"
        + "spec:\n  workflowTemplateRef:\n    name: fewstep-distill\n  arguments:\n    parameters:\n"
        + indented(_shown(run.arguments()), 6)
    )


def plain(run: Run, stage: Stage | None) -> str:
    """Return a stage of a run, or with None the whole of it, as a RayJob for clusters without Argo."""
    values = {each.name: each.value for each in parameters()} | run.arguments()
    values |= {"run": run.file, "gpus": values["gpus-per-pod"]}
    if stage is None:
        name, command = "run", f"fewstep run /etc/fewstep/recipes/{run.recipe}.yaml"
        values["image"] = values["training-image"]
    else:
        name, command = stage.name, f"fewstep stage {stage.name} /etc/fewstep/recipes/{run.recipe}.yaml"
        values["image"] = values[stage.image]
        if not stage.with_workers:
            values |= {"pods-min": "0", "pods-max": "0"}
        if not stage.with_gpu:
            values |= {"gpus": "0", "head-gpus": "0", "head-gpu-type": "{}"}
    values |= {"name": f"{run.file}-{name}", "stage": name}
    return MADE + rayjob(values, command=command, named=False)


def monthly() -> str:
    """Return a CronWorkflow that distills again every month, from shards that carry the month in their name."""
    month = "{{workflow.creationTimestamp.Y}}-{{workflow.creationTimestamp.m}}"
    folders = {f"{name}-shards": f"s3://my-bucket/laion-512/{month}/{name}" for name in _ALL}
    return MADE + MONTHLY + indented(_shown(RUNS[1].arguments() | folders), 8)


def _shown(arguments: dict[str, str]) -> str:
    return yaml.safe_dump(
        [{"name": name, "value": value} for name, value in arguments.items()],
        sort_keys=False,
        default_flow_style=None,
        width=1000,
    )


MONTHLY = """\
# Distills Stable Diffusion 1.5 again on the first of every month, on the shards of that month. Not part of any overlay:
#   kubectl apply -f workflows/monthly.yaml
apiVersion: argoproj.io/v1alpha1
kind: CronWorkflow
metadata:
  name: sd15-monthly
  namespace: fewstep
spec:
  schedules: ["0 3 1 * *"]
  timezone: Etc/UTC
  concurrencyPolicy: Forbid
  startingDeadlineSeconds: 86400
  successfulJobsHistoryLimit: 3
  failedJobsHistoryLimit: 3
  workflowSpec:
    workflowTemplateRef:
      name: fewstep-distill
    arguments:
      parameters:
"""


def files() -> dict[Path, str]:
    """Return what is to lie where."""
    found = {HERE / "distill" / "workflowtemplate.yaml": workflow_template()}
    for run in RUNS:
        found[HERE / f"{run.file}.yaml"] = run_file(run)
    found[HERE / "monthly.yaml"] = monthly()
    for run in RUNS[:2]:
        arguments = run.arguments()
        for stage in STAGES:
            if arguments.get(f"run-{stage.name}", "true") == "true":
                found[HERE / "rayjobs" / run.file / f"{stage.name}.yaml"] = plain(run, stage)
        found[HERE / "rayjobs" / run.file / "run.yaml"] = plain(run, None)
    return found


if __name__ == "__main__":
    for path, text in files().items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        print(path.relative_to(HERE.parent))
