"""The manifests fit together, and ask programs for what they have; no cluster has run them."""

from __future__ import annotations

import re
import shlex
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from collm.cli.main import app
from collm.vllm.servers import Servers

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "recipes" / "kubernetes"
PAGE = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
OBJECTS = [
    one for path in sorted(FOLDER.glob("*.yaml")) for one in yaml.safe_load_all(path.read_text(encoding="utf-8"))
]
VLLM_FLAGS = {  # of 'vllm serve --help=all', 0.32
    *("--served-model-name", "--host", "--port", "--generation-config", "--max-model-len", "--max-num-seqs"),
    *("--tensor-parallel-size", "--pipeline-parallel-size", "--distributed-executor-backend"),
    *("--gpu-memory-utilization", "--kv-cache-memory-bytes", "--block-size", "--enforce-eager", "--dtype", "--model"),
    *("--nnodes", "--node-rank", "--master-addr", "--headless", "--logprobs-mode", "--speculative-config"),
    "--additional-config",
}


def named(kind: str, name: str) -> Any:
    (found,) = [one for one in OBJECTS if (one["kind"], one["metadata"]["name"]) == (kind, name)]
    return found


def all_of(kind: str) -> list[Any]:
    return [one for one in OBJECTS if one["kind"] == kind]


def pod(deployment: Any) -> Any:
    return deployment["spec"]["template"]


def container(deployment: Any) -> Any:
    (only,) = pod(deployment)["spec"]["containers"]
    return only


def flags(deployment: Any) -> dict[str, str]:
    return dict(argument.split("=", 1) for argument in container(deployment)["args"])


def secret_keys(deployment: Any) -> dict[str, str]:
    """Of environment variables."""
    refs = {one["name"]: one["valueFrom"]["secretKeyRef"] for one in container(deployment)["env"] if "valueFrom" in one}
    assert {ref["name"] for ref in refs.values()} == {"collm-keys"}
    return {name: ref["key"] for name, ref in refs.items()}


DEPLOYMENTS = pytest.mark.parametrize("deployment", all_of("Deployment"), ids=lambda one: one["metadata"]["name"])
SERVERS = yaml.safe_load(named("ConfigMap", "collm-servers")["data"]["servers.yaml"])


def command_options(words: list[str]) -> set[str]:
    """Options of a command of collm."""
    command: Any = typer.main.get_command(app)
    for word in words:
        command = getattr(command, "commands", {}).get(word, command)
    return {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}


def test_every_file_and_object_is_there_once() -> None:
    assert {path.name for path in FOLDER.iterdir()} == {
        *("models.yaml", "base.yaml", "assistant.yaml", "serve.yaml", "network.yaml", "base.Dockerfile")
    }
    names = [(one["kind"], one["metadata"]["name"]) for one in OBJECTS]
    assert len(names) == len(set(names))
    versions = {"Deployment": "apps/v1", "NetworkPolicy": "networking.k8s.io/v1"}
    assert all(one["apiVersion"] == versions.get(one["kind"], "v1") for one in OBJECTS)


@DEPLOYMENTS
def test_pods_are_found_by_their_deployment_and_one_service(deployment: Any) -> None:
    labels = pod(deployment)["metadata"]["labels"]
    assert deployment["spec"]["selector"]["matchLabels"] == labels
    (service,) = [one for one in all_of("Service") if one["spec"]["selector"].items() <= labels.items()]
    assert service["metadata"]["name"] == deployment["metadata"]["name"]
    (port,) = service["spec"]["ports"]
    listening = {one["name"]: one["containerPort"] for one in container(deployment)["ports"]}
    assert listening[port["targetPort"]] == int(flags(deployment)["--port"])
    assert flags(deployment)["--host"] == "0.0.0.0"


@DEPLOYMENTS
def test_probes_ask_what_the_program_answers(deployment: Any) -> None:
    asked = {kind: container(deployment).get(f"{kind}Probe") for kind in ("startup", "readiness", "liveness")}
    paths = {kind: probe["httpGet"]["path"] for kind, probe in asked.items() if probe}
    if deployment["metadata"]["name"] == "collm-serve":
        assert paths == {"readiness": "/ready", "liveness": "/health"}
    else:
        assert paths == dict.fromkeys(asked, "/health")
    names = {port["name"] for port in container(deployment)["ports"]}
    assert {probe["httpGet"]["port"] for probe in asked.values() if probe} <= names


@DEPLOYMENTS
def test_volumes_are_there(deployment: Any) -> None:
    volumes = {volume["name"]: volume for volume in pod(deployment)["spec"]["volumes"]}
    assert {mount["name"] for mount in container(deployment)["volumeMounts"]} == set(volumes)
    assert named("PersistentVolumeClaim", volumes["models"]["persistentVolumeClaim"]["claimName"])
    for volume in volumes.values():
        if "configMap" in volume:
            assert named("ConfigMap", volume["configMap"]["name"])


@pytest.mark.parametrize("name", ["collm-base", "collm-assistant"])
def test_model_servers_have_the_gpus_they_use_and_nothing_that_hides_the_plugin(name: str) -> None:
    deployment = named("Deployment", name)
    resources = container(deployment)["resources"]
    gpus = {resources[bound]["nvidia.com/gpu"] for bound in ("requests", "limits")}
    assert gpus == {flags(deployment).get("--tensor-parallel-size", "1")}
    assert deployment["spec"]["replicas"] == 1  # its prefix cache is its own
    assert deployment["spec"]["strategy"]["type"] == "Recreate"
    assert set(flags(deployment)) <= VLLM_FLAGS
    assert not {"--logprobs-mode", "--speculative-config"} & set(flags(deployment))
    assert int(flags(deployment)["--max-num-seqs"]) >= int(flags(named("Deployment", "collm-serve"))["--max-batch"])


def test_collm_finds_its_servers() -> None:
    servers = Servers(**SERVERS)
    expected = [f"http://{name}:{port_of(name)}/v1" for name in ("collm-base", "collm-assistant")]
    assert list(servers.urls) == expected
    deployment = named("Deployment", "collm-serve")
    assert set(flags(deployment)) <= command_options(["serve"])
    mounts = {mount["name"]: mount["mountPath"] for mount in container(deployment)["volumeMounts"]}
    assert flags(deployment)["--servers"] == f"{mounts['servers']}/servers.yaml"
    assert int(flags(deployment)["--drain"]) < pod(deployment)["spec"]["terminationGracePeriodSeconds"]


def port_of(service: str) -> int:
    (port,) = named("Service", service)["spec"]["ports"]
    return int(port["port"])


def test_keys_are_one_secret_which_the_page_makes() -> None:
    (command,) = [line for line in commands() if line[:3] == ["kubectl", "create", "secret"]]
    assert command[3:5] == ["generic", "collm-keys"]
    made = {word.removeprefix("--from-literal=").split("=")[0] for word in command[5:]}
    asked = {one["metadata"]["name"]: secret_keys(one) for one in all_of("Deployment")}
    assert {key for keys in asked.values() for key in keys.values()} == made
    key = asked["collm-serve"][SERVERS["api_key_env"]]
    assert asked["collm-base"]["VLLM_API_KEY"] == asked["collm-assistant"]["VLLM_API_KEY"] == key
    assert asked["collm-serve"]["COLLM_API_KEY"] != key


def test_the_network_policy_lets_collm_through() -> None:
    (policy,) = all_of("NetworkPolicy")
    (expression,) = policy["spec"]["podSelector"]["matchExpressions"]
    assert set(expression["values"]) == {"collm-base", "collm-assistant"}
    (rule,) = policy["spec"]["ingress"]
    allowed = rule["from"][0]["podSelector"]["matchLabels"]
    assert allowed == pod(named("Deployment", "collm-serve"))["metadata"]["labels"]
    for name in expression["values"]:
        assert str(rule["ports"][0]["port"]) == flags(named("Deployment", name))["--port"]


def test_the_base_image_has_the_plugin_and_the_assistants_version() -> None:
    dockerfile = (FOLDER / "base.Dockerfile").read_text(encoding="utf-8")
    (image,) = re.findall(r"^FROM (\S+)$", dockerfile, flags=re.MULTILINE)
    assert image == container(named("Deployment", "collm-assistant"))["image"]
    assert "pip install --no-cache-dir /src/plugins/vllm" in dockerfile
    assert container(named("Deployment", "collm-base"))["image"].endswith(image.rpartition(":")[2])


# The page


def commands() -> list[list[str]]:
    """Commands of the page, in words."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)
    lines = [line for language, block in fenced if not language for line in block.replace("\\\n", " ").splitlines()]
    return [words for words in (shlex.split(line, comments=True) for line in lines) if words]


def without_variables(words: list[str]) -> list[str]:
    return words[1:] and without_variables(words[1:]) if re.match(r"[A-Z_0-9]+=", words[0]) else words


def test_the_page_names_options_that_exist() -> None:
    checked = set()
    for words in map(without_variables, commands()):
        given = {word.split("=")[0] for word in words if word.startswith("--")}
        if words[:2] == ["vllm", "serve"] or "vllm.entrypoints.openai.api_server" in words:
            assert given <= VLLM_FLAGS, words
        elif words[0] == "collm":
            assert given <= command_options(words[1:3]), words
        checked.add(words[0])
    assert {"vllm", "collm", "kubectl"} <= checked


def test_the_page_has_a_file_of_servers_that_is_read() -> None:
    (block,) = re.findall(r"^```yaml\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)
    assert {field.name for field in fields(Servers)} == set(yaml.safe_load(block))
    assert Servers(**yaml.safe_load(block)).on_failure == "base"


def test_the_page_links_to_what_is_there() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", PAGE)
    assert links
    for link in links:
        assert link.startswith("https://") or (ROOT / "docs" / link).exists(), link
