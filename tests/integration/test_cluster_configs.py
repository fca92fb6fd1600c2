"""The files of cluster-configs, by the rules of the engines that read them."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from conftest import unavailable
from djdist._settings import Settings

FOLDER = Path(__file__).parents[2] / "cluster-configs"
GUIDES = sorted((FOLDER.parent / "docs" / "how-to").glob("*.md"))
FILES = [
    file
    for engine in ("dask", "ray", "service")
    for file in sorted((FOLDER / engine).iterdir())
    if file.is_file()
]
CLOUDS = ["aws", "gcp"]
KUBERNETES = [
    "ray/kuberay-cluster.yaml",
    "ray/kuberay-job.yaml",
    "dask/kubernetes.yaml",
    "service/kubernetes.yaml",
]
KUBERAY = Path(__file__).with_name("kuberay-rayjob.json")
CREDENTIALS = {"DJ_USER", "DJ_PASS"}


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((FOLDER / name).read_text()))


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}/{file.name}")
def test_three_commands_are_at_its_top(file: Path) -> None:
    top = file.read_text().split("\n# Before")[0].splitlines()[:8]
    assert len([line for line in top if re.match(r"#   \w+ \S", line)]) == 3


def test_djdist_comes_from_pypi_or_a_wheel_beside_the_pipeline() -> None:
    texts = [file.read_text() for file in [*FILES, FOLDER / "Dockerfile"]]
    asked = [text.count('"djdist[') for text in texts]
    assert asked == [len(re.findall("--find-links [~.]/my_pipeline", text)) for text in texts]
    assert sum(asked) == 10


def test_all_files_name_the_same_versions() -> None:
    text = "\n".join(file.read_text() for file in [*FILES, FOLDER / "Dockerfile", *GUIDES])
    named = set(re.findall(r"(ray|dask)[^\d\n]{0,12}(\d+\.\d+\.\d+)", text.lower()))
    assert sorted(engine for engine, _ in named) == ["dask", "ray"]


class TestRayUp:
    @pytest.fixture(params=[*CLOUDS, "on-premises"])
    def given(self, request: pytest.FixtureRequest) -> dict[str, Any]:
        (config,) = documents(f"ray/{request.param}.yaml")
        return dict(config)

    def test_ray_takes_it(self, given: dict[str, Any]) -> None:
        from ray.autoscaler._private.util import prepare_config, validate_config

        prepared = prepare_config(given)
        validate_config(prepared)
        assert prepared["max_workers"] > 0
        assert prepared["idle_timeout_minutes"] > 0

    def test_every_node_gets_the_pipeline_and_djdist(self, given: dict[str, Any]) -> None:
        setup = "\n".join(given["setup_commands"])
        assert '"djdist[ray,postgres]"' in setup
        assert "~/my_pipeline" in setup
        assert {"~/my_pipeline", "~/populate.py", "~/.ray/auth_token"} <= given["file_mounts"].keys()
        assert (FOLDER / "ray" / given["file_mounts"]["~/populate.py"]).is_file()

    @pytest.mark.parametrize("node", ["head", "worker"])
    def test_every_node_gets_the_credentials_from_elsewhere(self, given: dict[str, Any], node: str) -> None:
        start = given[f"{node}_start_ray_commands"][-1]
        subprocess.run(["bash", "-n", "-c", start], check=True)
        assert 'DJ_PASS="$(' in start or ". ~/.datajoint.env" in start

    def test_no_node_of_aws_has_ray_s_own_old_image(self) -> None:
        (config,) = documents("ray/aws.yaml")
        images = {kind["node_config"]["ImageId"] for kind in config["available_node_types"].values()}
        assert [image.partition("/latest/")[0][-12:] for image in images] == ["ubuntu-24.04"]

    @pytest.mark.parametrize("cloud", CLOUDS)
    def test_keys_are_made_on_workers_of_each_kind(self, cloud: str) -> None:
        (config,) = documents(f"ray/{cloud}.yaml")
        types = config["available_node_types"]
        assert config["head_node_type"] == "head"
        assert types["head"]["resources"] == {"CPU": 0}
        assert types["gpu-spot"]["resources"]["GPU"] == 1
        spot = {name for name in types if re.search("spot|preemptible", str(types[name]["node_config"]))}
        assert spot == {"cpu-spot", "gpu-spot"}

    @pytest.mark.parametrize("cloud", CLOUDS)
    def test_only_the_head_has_the_rights_of_the_autoscaler(self, cloud: str) -> None:
        (config,) = documents(f"ray/{cloud}.yaml")
        for name, kind in config["available_node_types"].items():
            profiles = set(re.findall("djdist-[a-z]+", str(kind["node_config"])))
            assert profiles == {"djdist-head" if name == config["head_node_type"] else "djdist-worker"}


class TestKubernetes:
    @pytest.fixture(params=KUBERNETES)
    def pods(self, request: pytest.FixtureRequest) -> list[dict[str, Any]]:
        """The specifications of all pods that a file asks for."""
        return list(_pods(documents(request.param)))

    def test_kubernetes_takes_its_pods(self, pods: list[dict[str, Any]]) -> None:
        import kubernetes_validate

        assert pods
        for spec in pods:
            pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, "spec": spec}
            kubernetes_validate.validate(pod, kubernetes_validate.latest_version(), strict=True)

    @pytest.mark.parametrize("name", KUBERNETES[:2])
    def test_kuberay_takes_it(self, name: str) -> None:
        (given,) = documents(name)
        validate(given, kuberay_schema(given["kind"]))

    def test_dask_s_operator_takes_it(self) -> None:
        files = importlib.metadata.files("dask-kubernetes") or []
        for given in documents(KUBERNETES[2])[:2]:
            (file,) = (file for file in files if file.match(f"crds/{given['kind'].lower()}.yaml"))
            definition = yaml.safe_load(file.read_text())
            (version,) = definition["spec"]["versions"]
            validate(given, version["schema"]["openAPIV3Schema"])

    def test_kubernetes_takes_what_is_beside_the_dask_cluster(self) -> None:
        import kubernetes_validate

        beside = documents(KUBERNETES[2])[2:]
        for given in beside:
            kubernetes_validate.validate(given, kubernetes_validate.latest_version(), strict=True)
        assert [given["kind"] for given in beside] == ["ConfigMap", "NetworkPolicy"]

    def test_kubernetes_takes_the_service(self) -> None:
        import kubernetes_validate

        (given,) = documents(KUBERNETES[3])
        kubernetes_validate.validate(given, kubernetes_validate.latest_version(), strict=True)
        assert given["spec"]["selector"]["matchLabels"] == given["spec"]["template"]["metadata"]["labels"]

    def test_a_misspelt_field_is_found(self) -> None:
        (given,) = documents(KUBERNETES[0])
        given["spec"]["workerGroupSpecs"][0]["maxReplica"] = 8
        with pytest.raises(jsonschema.ValidationError, match="maxReplica"):
            validate(given, kuberay_schema("RayCluster"))

    def test_every_pod_has_limits_and_the_credentials_of_a_secret(self, pods: list[dict[str, Any]]) -> None:
        for (container,) in (spec["containers"] for spec in pods):
            assert container["resources"].keys() == {"requests", "limits"}
            secret = {env["name"] for env in container["env"] if "secretKeyRef" in env.get("valueFrom", {})}
            assert secret >= CREDENTIALS

    @pytest.mark.parametrize("name", KUBERNETES)
    def test_the_secret_has_no_newline(self, name: str, tmp_path: Path) -> None:
        text = (FOLDER / name).read_text()
        write, create = re.findall(r"#   (.*datajoint\.env.*)", text)
        subprocess.run(["bash", "-c", write], check=True, cwd=tmp_path)
        assert "--from-env-file=" in create  # --from-file= takes the file's last newline into the password
        written = (tmp_path / "datajoint.env").read_text().splitlines()
        asked = re.findall(r"secretKeyRef: {name: lab-datajoint, key: (\w+)", text)
        assert [line.partition("=")[0] for line in written] == asked
        assert asked[:2] == ["user", "password"]

    def test_the_job_starts_the_same_cluster(self) -> None:
        (cluster,), (job,) = documents(KUBERNETES[0]), documents(KUBERNETES[1])
        assert job["spec"]["rayClusterSpec"] == cluster["spec"]

    def test_images_have_the_cluster_s_version_of_ray(self) -> None:
        (cluster,) = documents(KUBERNETES[0])
        tags = {spec["containers"][0]["image"].rpartition("-ray")[2] for spec in _pods([cluster])}
        assert tags == {cluster["spec"]["rayVersion"]}

    def test_a_call_in_the_scheduler_s_pod_finds_the_dask_cluster(self) -> None:
        cluster = documents(KUBERNETES[2])[0]
        (container,) = cluster["spec"]["scheduler"]["spec"]["containers"]
        (port,) = [port["containerPort"] for port in container["ports"] if port["name"] == "tcp-comm"]
        given = {env["name"]: env.get("value") for env in container["env"]}
        assert given["DASK_SCHEDULER_ADDRESS"] == f"tls://localhost:{port}"

    def test_the_autoscaler_is_the_dask_cluster_s(self) -> None:
        cluster, autoscaler, _, network = documents(KUBERNETES[2])
        assert autoscaler["spec"]["cluster"] == cluster["metadata"]["name"]
        assert cluster["spec"]["scheduler"]["service"]["selector"]["dask.org/cluster-name"] == "djdist"
        assert network["spec"]["podSelector"]["matchLabels"] == {"dask.org/cluster-name": "djdist"}


def kuberay_schema(kind: str) -> dict[str, Any]:
    """Give KubeRay's own schema; that of a job holds that of a cluster."""
    job: dict[str, Any] = json.loads(KUBERAY.read_text())
    cluster = {"properties": {"spec": job["properties"]["spec"]["properties"]["rayClusterSpec"]}}
    return {"RayCluster": cluster, "RayJob": job}[kind]


def validate(given: Any, schema: dict[str, Any]) -> None:
    """Check a document as the API server does, to which an unknown field is a mistake."""
    everywhere: dict[str, Any] = {"apiVersion": {}, "kind": {}, "metadata": {}}
    properties = {**schema["properties"], **everywhere}
    jsonschema.validate(given, _strict({**schema, "properties": properties}))


def _strict(schema: Any) -> Any:
    """Forbid fields that a schema doesn't name, where it names some."""
    if isinstance(schema, list):
        return [_strict(inner) for inner in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {"additionalProperties": False} if isinstance(schema.get("properties"), dict) else {}
    return {**closed, **{name: _strict(inner) for name, inner in schema.items()}}


def _pods(part: Any) -> Iterator[dict[str, Any]]:
    if isinstance(part, dict) and "containers" in part:
        yield part
    elif isinstance(part, (dict, list)):
        for inner in part.values() if isinstance(part, dict) else part:
            yield from _pods(inner)


class TestBatchSystems:
    @pytest.mark.parametrize(
        ("kind", "asks"),
        [
            ("SLURMCluster", ["#SBATCH --cpus-per-task=8", "#SBATCH --mem=32G", "#SBATCH -t 04:00:00"]),
            ("PBSCluster", ["#PBS -l select=1:ncpus=8:mem=32gb", "#PBS -l walltime=04:00:00"]),
        ],
    )
    def test_dask_writes_its_jobs(self, kind: str, asks: list[str]) -> None:
        import dask
        import dask_jobqueue

        (given,) = documents("dask/jobqueue.yaml")
        with (
            dask.config.set(dask.config.merge(dask.config.config, given)),
            getattr(dask_jobqueue, kind)(scheduler_options={"dashboard_address": ":0"}) as cluster,
        ):
            job = cluster.job_script()
        assert set(asks) <= set(job.splitlines())
        assert "--nthreads 1 " in job
        assert "--nworkers 8 " in job
        assert "--lifetime 225m --lifetime-stagger 10m" in job
        assert job.index("source ~/.datajoint.env") < job.index("distributed.cli.dask_worker")
        subprocess.run(["bash", "-n"], input=job, text=True, check=True)

    def test_slurm_takes_ray_s_job(self) -> None:
        script = FOLDER / "ray" / "slurm.sh"
        subprocess.run(["bash", "-n", script], check=True)
        options = [line for line in script.read_text().splitlines() if line.startswith("#SBATCH")]
        assert "#SBATCH --ntasks-per-node=1" in options

    def test_ray_s_job_shares_no_port_with_another_job_of_its_node(self) -> None:
        from ray.scripts.scripts import cli

        names = {name for option in cli.commands["start"].params for name in option.opts}
        script = (FOLDER / "ray" / "slurm.sh").read_text()
        given = dict(re.findall(r"(--[a-z-]*port)=(\d|\"\$port\"|\$\(\(port \+ \d\)\))", script))
        assert {name for name in names if name.endswith("-port")} <= given.keys()
        assert given.pop("--min-worker-port") == given.pop("--max-worker-port") == "0"  # Linux chooses them
        assert len(set(given.values())) == len(given)


class TestService:
    def test_systemd_takes_it(self, tmp_path: Path) -> None:
        if not shutil.which("systemd-analyze"):
            unavailable("no systemd here")
        unit = tmp_path / "djdist@.service"
        unit.write_text(
            (FOLDER / "service" / unit.name).read_text().replace("/srv/djdist/env/bin/djdist", "/bin/true")
        )
        command = ["systemd-analyze", "verify", str(tmp_path / "djdist@my_pipeline.service")]
        done = subprocess.run(command, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")

    @pytest.mark.parametrize("name", ["djdist@.service", "kubernetes.yaml", "slurm.sh"])
    def test_djdist_takes_its_options(self, name: str) -> None:
        typer = pytest.importorskip("typer", reason="pip install 'djdist[cli]'")
        from djdist.cli.commands import app

        text = (FOLDER / "service" / name).read_text()
        (line,) = re.findall(r"djdist,? (populate.*--processes.*?)(?: &|]|$)", text, re.MULTILINE)
        words = re.sub('[",]', " ", line).split()[1:]
        populate: Any = typer.main.get_command(app).commands["populate"]
        assert populate.make_context("populate", words).params["watch"]

    @pytest.mark.parametrize(
        ("code", "ends"), [(0, True), (1, True), (2, True), (3, False), (70, False), (143, False)]
    )
    def test_slurms_next_job_goes_on_unless_it_could_do_no_better(
        self, tmp_path: Path, code: int, ends: bool
    ) -> None:
        programs = tmp_path / "env" / "bin"
        programs.mkdir(parents=True)
        (programs / "activate").write_text(f"PATH={programs}:$PATH\n")
        (tmp_path / ".datajoint.env").touch()
        said = {"sbatch": "echo 8", "scancel": f"echo $* > {tmp_path}/cancelled", "djdist": f"exit {code}"}
        for name, does in said.items():
            (programs / name).write_text(f"#!/bin/bash\n{does}\n")
            (programs / name).chmod(0o755)
        subprocess.run(
            ["bash", str(FOLDER / "service" / "slurm.sh"), "my_pipeline"],
            env={"HOME": str(tmp_path), "PATH": os.environ["PATH"], "SLURM_JOB_ID": "7"},
            check=False,
        )
        assert (tmp_path / "cancelled").exists() == ends

    def test_slurm_leaves_djdist_its_grace(self) -> None:
        script = FOLDER / "service" / "slurm.sh"
        subprocess.run(["bash", "-n", script], check=True)
        (warning,) = re.findall(r"#SBATCH --signal=B:TERM@(\d+)", script.read_text())
        (grace,) = re.findall(r"DJDIST_GRACE_SECONDS:-(\d+)", script.read_text())
        assert int(grace) < int(warning)

    @pytest.mark.parametrize("name", ["djdist@.service", "kubernetes.yaml"])
    def test_its_end_is_waited_for_longer_than_djdist_s_grace(self, name: str) -> None:
        (seconds,) = re.findall(
            r"(?:TimeoutStopSec=|GracePeriodSeconds: )(\d+)", (FOLDER / "service" / name).read_text()
        )
        assert int(seconds) > Settings.model_fields["grace_seconds"].default


def test_the_board_is_built_as_ray_s_own_are() -> None:
    from ray.dashboard.modules.metrics.dashboards import common

    templates = [value for name, value in vars(common).items() if name.endswith("_TEMPLATE")]
    base = json.loads(Path(common.__file__).with_name("default_grafana_dashboard_base.json").read_text())
    board = json.loads((FOLDER / "grafana" / "djdist.json").read_text())
    assert board.keys() <= base.keys()
    variables = {name for variable in base["templating"]["list"] for name in variable}
    assert {name for variable in board["templating"]["list"] for name in variable} <= variables
    fields = {name for template in templates for name in template} | {"gridPos", "type"}
    for panel in board["panels"]:
        assert panel.keys() <= fields
        assert all(target.keys() <= fields for target in panel["targets"])
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    assert len({(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in board["panels"]}) == 6
