"""What is started on clusters that are not here: that it fits together."""

import re
import subprocess
from pathlib import Path

import pytest
import yaml

import moe_jax
from moe_jax import command_line

ROOT = Path(moe_jax.__path__[0]).parent
LAUNCH = ROOT / "launch"


def test_the_jobset_fits_together() -> None:
    jobset = yaml.safe_load((LAUNCH / "jobset.yaml").read_text())
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    name, (group,) = jobset["metadata"]["name"], jobset["spec"]["replicatedJobs"]
    job = group["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    assert container["command"] == ["python", "-m", "moe_jax.main"]
    flags = dict(text.removeprefix("--").split("=", 1) for text in container["args"])
    assert (ROOT / flags["config"]).is_file()
    # Pods of an indexed job have stable names, if all of a job's are started at once.
    assert job["completionMode"] == "Indexed" and group["replicas"] == 1
    assert job["parallelism"] == job["completions"] == int(flags["num_processes"])
    host, port = flags["coordinator_address"].split(":")
    assert host == f"{name}-{group['name']}-0-0.{name}" and port.isdecimal()
    assert flags["process_id"] == "$(JOB_COMPLETION_INDEX)"
    # A mistake ends the set; the job itself tries nothing again, so that all pods start together.
    (final,) = job["podFailurePolicy"]["rules"]
    assert final["onExitCodes"]["values"] == [command_line.MISTAKE, command_line.GIVEN_UP]
    assert final["onExitCodes"]["containerName"] == container["name"]
    assert job["backoffLimit"] == 0 and pod["restartPolicy"] == "Never"
    assert {x["name"] for x in container["volumeMounts"]} == {x["name"] for x in pod["volumes"]}


@pytest.mark.parametrize("path", sorted(LAUNCH.glob("*.s*")), ids=lambda path: path.name)
def test_scripts_parse_and_name_what_is_there(path: Path) -> None:
    subprocess.run(["bash", "-n", path], check=True)
    text = path.read_text()
    assert "moe_jax.main" in text
    for config in re.findall(r"configs/\w+\.py", text):
        assert (ROOT / config).is_file(), config
