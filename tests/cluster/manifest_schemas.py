"""What our manifests may say: JSON schemas of the parts that they use, closed to other keys.

From the public definitions: Kubernetes 1.37 (Service v1, Job batch/v1), Kubeflow's trainer 2.2
(TrainJob v1alpha1), and SkyPilot's page of the task file.
"""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]
TEXT: Schema = {"type": "string", "minLength": 1}
COUNT: Schema = {"type": "integer", "minimum": 1}
FLAG: Schema = {"type": "boolean"}
NAME: Schema = {"type": "string", "pattern": "^[a-z]([-a-z0-9]*[a-z0-9])?$", "maxLength": 63}
QUANTITY: Schema = {"type": "string", "pattern": r"^[0-9]+(\.[0-9]+)?(m|k|M|G|T|Ki|Mi|Gi|Ti)?$"}


def every(part: Schema) -> Schema:
    """A list of at least one."""
    return {"type": "array", "items": part, "minItems": 1}


def only(*required: str, **known: Schema) -> Schema:
    """An object of the known keys, some of them required."""
    return {
        "type": "object", "properties": known, "required": [*required],
        "additionalProperties": False,
    }  # fmt: skip


def mapping(part: Schema) -> Schema:
    """An object of any keys."""
    return {"type": "object", "additionalProperties": part, "minProperties": 1}


META = only("name", name=NAME, labels=mapping(TEXT))
ENV = every(only("name", "value", name=TEXT, value={"type": "string"}))
RESOURCES = only(requests=mapping(QUANTITY), limits=mapping(QUANTITY))
MOUNTS = every(only("name", "mountPath", name=NAME, readOnly=FLAG,
                    mountPath={"type": "string", "pattern": "^/"}))  # fmt: skip
VOLUMES = every(
    only(
        "name", name=NAME,
        emptyDir=only(medium={"enum": ["", "Memory"]}, sizeLimit=QUANTITY),
        persistentVolumeClaim=only("claimName", claimName=NAME, readOnly=FLAG),
    )
)  # fmt: skip
CONTAINER = only(
    "name", "image", name=NAME, image=TEXT, command=every(TEXT), args=every(TEXT), env=ENV,
    resources=RESOURCES, volumeMounts=MOUNTS,
)  # fmt: skip
POD = only(
    "containers", "restartPolicy", subdomain=NAME, restartPolicy={"enum": ["Never", "OnFailure"]},
    terminationGracePeriodSeconds=COUNT, containers=every(CONTAINER), volumes=VOLUMES,
)  # fmt: skip
RULE = only(
    "action", action={"enum": ["Ignore", "FailJob", "Count", "FailIndex"]},
    onPodConditions=every(only("type", "status", type=TEXT, status=TEXT)),
    onExitCodes=only("operator", "values", operator={"enum": ["In", "NotIn"]},
                     values=every({"type": "integer"}), containerName=NAME),
)  # fmt: skip
PATCH = only(
    "manager", manager=TEXT,
    trainingRuntimeSpec=only(template=only(spec=only(replicatedJobs=every(only(
        "name", name=NAME,
        template=only(spec=only(template=only(spec=only(
            containers=every(only("name", name=NAME, env=ENV, volumeMounts=MOUNTS)),
            volumes=VOLUMES,
        )))),
    ))))),
)  # fmt: skip
KINDS: dict[tuple[str, str], Schema] = {
    ("v1", "Service"): only(
        "selector", "ports", clusterIP={"enum": ["None"]}, selector=mapping(TEXT),
        ports=every(only("port", name=NAME, port=COUNT, protocol=TEXT)),
    ),
    ("batch/v1", "Job"): only(
        "template", completionMode={"enum": ["Indexed", "NonIndexed"]}, completions=COUNT,
        parallelism=COUNT, backoffLimit=COUNT, podFailurePolicy=only("rules", rules=every(RULE)),
        template=only("spec", metadata=META, spec=POD),
    ),
    ("trainer.kubeflow.org/v1alpha1", "TrainJob"): only(
        "runtimeRef", runtimeRef=only("name", name=NAME, apiGroup=TEXT, kind=TEXT),
        runtimePatches=every(PATCH), suspend=FLAG, activeDeadlineSeconds=COUNT, managedBy=TEXT,
        trainer=only(
            image=TEXT, command=every(TEXT), args=every(TEXT), env=ENV, numNodes=COUNT,
            numProcPerNode=COUNT, resourcesPerNode=RESOURCES,
        ),
    ),
}  # fmt: skip
"""(apiVersion, kind) -> schema of the spec."""
BUCKET = only(
    "source", source={"type": "string", "pattern": "^[a-z0-9]+://"}, name=NAME,
    mode={"enum": ["MOUNT", "COPY", "MOUNT_CACHED"]},
)  # fmt: skip
SKY = only(
    "run", name=NAME, num_nodes=COUNT, workdir=TEXT, setup=TEXT, run=TEXT, envs=mapping(TEXT),
    resources=only(accelerators={"type": "string", "pattern": r"^[A-Z0-9-]+:[0-9]+$"},
                   use_spot=FLAG, cpus=TEXT, memory=TEXT, disk_size=COUNT),
    file_mounts={"type": "object", "additionalProperties": BUCKET,
                 "propertyNames": {"pattern": "^/"}},
)  # fmt: skip


def schema_of(document: dict[str, Any]) -> Schema:
    """The schema of a whole manifest, by what it says of itself."""
    if "apiVersion" not in document:
        return SKY
    version, kind = TEXT, TEXT
    spec = KINDS[document["apiVersion"], document["kind"]]
    return only("apiVersion", "kind", "metadata", "spec", apiVersion=version, kind=kind,
                metadata=META, spec=spec)  # fmt: skip
