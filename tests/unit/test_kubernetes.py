"""Manifests held to Kubernetes' schemas, to the Dask operator's own code and definitions, and to our command line."""

from __future__ import annotations

import re
from importlib import resources

import dask
import jsonschema
import kubernetes_validate
import pytest
import yaml
from dask_kubernetes.operator import validation
from dask_kubernetes.operator._objects import DaskCluster
from dask_kubernetes.operator.controller import controller
from distributed.cli import dask_scheduler, dask_worker

from slidecube.cluster.clusters import DASK_SETTINGS
from slidecube.cluster.kubernetes import STAGES, cluster_spec, manifests
from slidecube.cluster.resources import load_profile
from slidecube.pipeline import cli

VERSIONS = ("1.31", kubernetes_validate.latest_version())  # the oldest that the page names, and the newest

PLAIN = 'image = "registry.example.org/slidecube:0.1.0"\n'
FULL = (
    PLAIN
    + """\
name = "hokkaido"
secret = "bucket-keys"
egress_ports = [443, 9000]
shards = 5
drain_s = 120
node_selector = { "example.org/pool" = "batch" }
"""
)
LONGEST = PLAIN + f'name = "n{"a" * 39}"\n'
TOP = {"plain": "", "full": "gpus = 2\nworkers = 3\ndeadline_min = 20\n", "longest": "workers = 2000\n"}
CASES = {"plain": PLAIN, "full": FULL, "longest": LONGEST}

PLAN = "run-1a2b3c4d"


@pytest.fixture
def profile(tmp_path):
    """Make a profile as a user writes it."""

    def make(case="full"):
        path = tmp_path / f"{case}.toml"
        path.write_text(f'extends = "kubernetes"\n{TOP[case]}[kubernetes]\n{CASES[case]}')
        return load_profile(str(path))

    return make


def documents(profile):
    return {
        name: list(yaml.safe_load_all(text))
        for name, text in manifests(profile, DASK_SETTINGS, plan=PLAN).items()
    }


def every(profile):
    return [document for found in documents(profile).values() for document in found]


def of_kind(profile, kind):
    return {d["metadata"]["name"]: d for d in every(profile) if d["kind"] == kind}


def pods(profile):
    """All specs of pods, by a name of ours."""
    jobs = {name: job["spec"]["template"]["spec"] for name, job in of_kind(profile, "Job").items()}
    parts = cluster_spec(profile, DASK_SETTINGS)["spec"]
    return jobs | {part: parts[part]["spec"] for part in ("scheduler", "worker")}


def containers(profile):
    return {name: pod["containers"][0] for name, pod in pods(profile).items()}


def closed(schema):
    """A definition's schema in which what is not named is refused: a server would silently drop it."""
    if isinstance(schema, list):
        return [closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: closed(part) for key, part in schema.items()}
    if isinstance(schema.get("properties"), dict) and "x-kubernetes-preserve-unknown-fields" not in schema:
        found.setdefault("additionalProperties", False)
    return found


@pytest.fixture(scope="module")
def definition():
    """What the operator takes for a DaskCluster."""
    path = "operator/deployment/helm/dask-kubernetes-operator/crds/daskcluster.yaml"
    text = (resources.files("dask_kubernetes") / path).read_text()
    schema = closed(yaml.safe_load(text)["spec"]["versions"][0]["schema"]["openAPIV3Schema"])
    schema["properties"] |= {
        "apiVersion": {"type": "string"},
        "kind": {"type": "string"},
        "metadata": {"type": "object"},
    }
    return schema


# --- schemas ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("case", CASES)
def test_every_manifest_is_what_kubernetes_takes(profile, case, version):
    found = [d for d in every(profile(case)) if d["kind"] != "DaskCluster"]
    assert len(found) == 12
    for document in found:
        kubernetes_validate.validate(document, version, strict=True)


@pytest.mark.parametrize("case", CASES)
def test_the_cluster_is_what_the_operator_takes(profile, definition, case):
    [cluster] = of_kind(profile(case), "DaskCluster").values()
    jsonschema.validate(cluster, definition)
    validation.validate_cluster_name(cluster["metadata"]["name"])


def test_the_page_names_the_oldest_version(repo_root):
    assert f"Version {VERSIONS[0]} or newer." in (repo_root / "deploy" / "kubernetes.md").read_text()


def test_a_slip_is_refused(profile, definition):
    [cluster] = of_kind(profile(), "DaskCluster").values()
    cluster["spec"]["worker"]["spec"]["containers"][0]["resorces"] = {}
    with pytest.raises(jsonschema.ValidationError, match="resorces"):
        jsonschema.validate(cluster, definition)
    job = of_kind(profile(), "Job")["hokkaido-cube"]
    job["spec"]["template"]["spec"]["containers"][0]["resorces"] = {}
    with pytest.raises(kubernetes_validate.ValidationError, match="resorces"):
        kubernetes_validate.validate(job, VERSIONS[-1], strict=True)


def made_by_the_operator(profile):
    """Deployments and the service, as the operator's own code makes them of our cluster."""
    spec, labels = cluster_spec(profile, DASK_SETTINGS), {"dask.org/cluster-name": "hokkaido"}
    scheduler = controller.build_scheduler_deployment_spec(
        "hokkaido", spec["spec"]["scheduler"]["spec"], {}, labels
    )
    worker = controller.build_worker_deployment_spec(
        worker_group_name="hokkaido-default",
        namespace="slidecube",
        cluster_name="hokkaido",
        uuid="0123456789",
        pod_spec=spec["spec"]["worker"]["spec"],
        annotations={},
        labels=labels,
    )
    service = controller.build_scheduler_service_spec(
        "hokkaido", spec["spec"]["scheduler"]["service"], {}, labels
    )
    return scheduler, worker, service


def test_what_the_operator_makes_of_it_is_valid_and_fits_together(profile):
    scheduler, worker, service = made_by_the_operator(profile())
    for document in (scheduler, worker, service):
        kubernetes_validate.validate(document, VERSIONS[-1], strict=True)
    chosen = service["spec"]["selector"]
    assert chosen.items() <= scheduler["spec"]["template"]["metadata"]["labels"].items()
    [container] = scheduler["spec"]["template"]["spec"]["containers"]
    listens = {port["name"]: port["containerPort"] for port in container["ports"]}
    ports = {port["name"]: port["port"] for port in service["spec"]["ports"]}
    assert ports == {port["name"]: listens[port["targetPort"]] for port in service["spec"]["ports"]}
    assert set(ports) == {"tcp-comm", "http-dashboard"}  # as dask-kubernetes asks for them
    [container] = worker["spec"]["template"]["spec"]["containers"]
    env = {entry["name"]: entry["value"] for entry in container["env"]}
    assert env["DASK_SCHEDULER_ADDRESS"].endswith(f":{ports['tcp-comm']}")
    names = {name for text in container["args"] for name in re.findall(r"\$\((\w+)\)", text)}
    assert names == {"DASK_WORKER_NAME"} <= set(env)


def test_a_second_driver_finds_the_cluster_of_the_first_one(profile):
    """This is what dask-kubernetes asks of a cluster that is there already; a missing key would be an error."""
    there = DaskCluster(cluster_spec(profile(), DASK_SETTINGS))
    assert "--jupyter" not in there.spec.scheduler.spec.containers[0].args
    assert there.replicas == 3
    assert there.spec.worker.spec.containers[0].image == "registry.example.org/slidecube:0.1.0"


def test_names_fit_into_labels(profile):
    names = [d["metadata"]["name"] for d in every(profile("longest"))]
    assert len({(d["kind"], d["metadata"]["name"]) for d in every(profile("longest"))}) == len(names)
    assert [name for name in names if not re.fullmatch(r"[a-z]([a-z0-9-]{0,61}[a-z0-9])?", name)] == []


# --- what runs --------------------------------------------------------------------------------------------------------


def test_our_command_line_knows_what_the_jobs_say(profile):
    commands = {
        name: container["args"]
        for name, container in containers(profile()).items()
        if "command" not in container  # the image's own is slidecube
    }
    assert sorted(commands) == sorted(f"hokkaido-{verb}" for verb in ("run", *STAGES))
    for verb, *arguments in commands.values():
        given = [text.replace("$(JOB_COMPLETION_INDEX)", "0") for text in arguments]
        cli.cli.commands[verb].make_context(verb, given).close()  # refuses what it does not know


def test_dask_knows_what_its_containers_say(profile):
    for part, command in {"scheduler": dask_scheduler.main, "worker": dask_worker.main}.items():
        container = containers(profile())[part]
        assert container["command"] == ["dask"]
        assert container["args"][0] == part
        command.make_context(part, container["args"][1:]).close()


@pytest.mark.parametrize("stage", ["cube", "detect"])
@pytest.mark.parametrize(("case", "shards", "at_once"), [("plain", 4, 4), ("full", 5, 3)])
def test_the_pods_of_a_stage_take_each_shard_once(profile, stage, case, shards, at_once):
    name = "slidecube" if case == "plain" else "hokkaido"
    job = of_kind(profile(case), "Job")[f"{name}-{stage}"]["spec"]
    assert (job["completionMode"], job["completions"], job["parallelism"]) == ("Indexed", shards, at_once)
    [container] = job["template"]["spec"]["containers"]
    taken = []
    for index in range(job["completions"]):
        given = [text.replace("$(JOB_COMPLETION_INDEX)", str(index)) for text in container["args"]]
        params = cli.cli.commands[stage].make_context(stage, given[1:]).params
        assert params["plan"] == PLAN
        taken.append(params["shard"])
    assert taken == [(i, shards) for i in range(shards)]


def test_other_stages_are_one_pod(profile):
    jobs = of_kind(profile(), "Job")
    assert [n for n in jobs if "completionMode" in jobs[n]["spec"]] == ["hokkaido-cube", "hokkaido-detect"]


def test_what_ended_early_goes_on_and_has_the_time_for_it(profile):
    for job in of_kind(profile(), "Job").values():
        rules = job["spec"]["podFailurePolicy"]["rules"]
        [codes] = [rule["onExitCodes"] for rule in rules if "onExitCodes" in rule]
        pod = job["spec"]["template"]["spec"]
        [container] = pod["containers"]
        assert (codes["containerName"], codes["values"]) == (container["name"], [cli.DRAINED])
        assert {rule["action"] for rule in rules} == {"Ignore"}
        [told] = container["lifecycle"]["preStop"]["exec"]["command"][2:]
        told, waits = told.split("; sleep ")
        assert told == "kill -USR1 1"
        assert 0 < int(waits) < pod["terminationGracePeriodSeconds"] == 120


def test_a_stage_works_by_a_profile_that_fits_into_its_pod(profile, tmp_path):
    files = of_kind(profile(), "ConfigMap")["hokkaido-stages"]["data"]
    loaded = {}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
        loaded[name] = load_profile(str(tmp_path / name))
    asked = profile().worker
    assert {name: (p.runner, p.workers) for name, p in loaded.items()} == {
        "cpu.toml": ("dask-local", 1),
        "gpu.toml": ("dask-cuda", 2),
    }
    for p in loaded.values():
        assert p.workers * p.worker.cpus == asked.cpus
        assert p.workers * p.worker.mem_gb == asked.mem_gb
        assert p.deadline_min == 20
    for name, container in containers(profile()).items():
        gpus = container["resources"]["limits"].get("nvidia.com/gpu")
        if "/etc/slidecube/gpu.toml" in container.get("args", ()):
            assert (name, gpus) == ("hokkaido-detect", "2")
        else:
            assert gpus == ("2" if name == "worker" else None)


def test_without_gpus_nothing_asks_for_them(profile):
    text = "".join(manifests(profile("plain"), DASK_SETTINGS, plan=PLAN).values())
    assert "gpu" not in text
    assert "cuda" not in text


def test_settings_reach_dask_through_its_environment(profile):
    env = {e["name"]: e["value"] for e in containers(profile())["worker"]["env"]}
    found = dask.config.collect_env(env)
    assert {key: dask.config.get(key, config=found) for key in DASK_SETTINGS} == DASK_SETTINGS


# --- what it may ------------------------------------------------------------------------------------------------------


def test_pods_get_what_they_ask_for_and_no_more(profile):
    asked = profile().worker
    for name, container in containers(profile()).items():
        amounts = container["resources"]
        assert amounts["requests"] == amounts["limits"]
        assert {"cpu", "memory", "ephemeral-storage"} <= set(amounts["limits"])
        memory = int(amounts["limits"]["memory"].removesuffix("M")) * 1_000_000
        if name != "scheduler":
            assert (amounts["limits"]["cpu"], memory > asked.mem_gb * 1e9) == (str(asked.cpus), True)
    [limit] = [a for a in containers(profile())["worker"]["args"] if a.startswith("--memory-limit=")]
    assert int(limit.partition("=")[2]) == asked.mem_gb * 1e9


def test_pods_are_restricted(profile):
    """Kubernetes' own standard for pods of that name, and a root file system that cannot be written."""
    for pod in pods(profile()).values():
        assert pod["securityContext"]["runAsNonRoot"]
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod)
        [container] = pod["containers"]
        own = container["securityContext"]
        assert (own["allowPrivilegeEscalation"], own["readOnlyRootFilesystem"]) == (False, True)
        assert own["capabilities"] == {"drop": ["ALL"]}
        volumes = {volume.pop("name"): set(volume) for volume in pod["volumes"]}
        assert set(volumes) == {mount["name"] for mount in container["volumeMounts"]}
        assert {kind for kinds in volumes.values() for kind in kinds} <= {"emptyDir", "projected"}
        writable = [m["mountPath"] for m in container["volumeMounts"] if not m.get("readOnly")]
        assert writable == ["/tmp"]
        assert {"name": "HOME", "value": "/tmp"} in container["env"]


def test_only_the_driver_may_ask_the_server(profile):
    asks = {name for name, pod in pods(profile()).items() if pod["automountServiceAccountToken"]}
    assert asks == {"hokkaido-run"}
    [binding] = of_kind(profile(), "RoleBinding").values()
    assert set(of_kind(profile(), "ServiceAccount")) == {s["name"] for s in binding["subjects"]}
    assert {pod["serviceAccountName"] for pod in pods(profile()).values()} == {"slidecube"}
    [role] = of_kind(profile(), "Role").values()
    words = {word for rule in role["rules"] for key in rule for word in rule[key]}
    assert not words & {"*", "secrets", "pods/exec"}


def test_secrets_are_named_and_never_told(profile, monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIATESTTESTTEST")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret-of-the-test")
    text = "".join(manifests(profile(), DASK_SETTINGS, plan=PLAN).values())
    assert "AKIATESTTESTTEST" not in text
    assert "secret-of-the-test" not in text
    for container in containers(profile()).values():
        assert container["envFrom"] == [{"secretRef": {"name": "bucket-keys"}}]
        assert all(
            name.startswith("DASK_") or name == "HOME" for name in (e["name"] for e in container["env"])
        )
    assert all("envFrom" not in container for container in containers(profile("plain")).values())


def test_what_a_pod_mounts_is_made_here_or_by_the_user(profile):
    made = set(of_kind(profile(), "ConfigMap"))
    named = {
        source["configMap"]["name"]
        for pod in pods(profile()).values()
        for volume in pod["volumes"]
        for source in volume.get("projected", {}).get("sources", ())
    }
    assert named - made == {"hokkaido-run"}


def spanned(rules, **peer):
    """Ports of the rules that are for a peer, or for all when none is named."""
    found = set()
    for rule in rules:
        peers = rule.get("from", rule.get("to", []))
        if peers == ([peer] if peer else []):
            for port in rule["ports"]:
                found |= set(range(port["port"], port.get("endPort", port["port"]) + 1))
    return found


def test_the_policy_opens_the_ports_on_which_somebody_listens(profile):
    listens = {
        int(port)
        for part in ("scheduler", "worker")
        for text in containers(profile())[part]["args"]
        for port in re.findall(r"^--(?:\w+-)?(?:port|address)=:?(\d+)$", text)
    }
    named = {
        port["containerPort"]
        for part in ("scheduler", "worker")
        for port in containers(profile())[part]["ports"]
    }
    assert len(listens) == 5
    assert named < listens
    policy = of_kind(profile(), "NetworkPolicy")["hokkaido"]["spec"]
    own = {"podSelector": policy["podSelector"]}
    assert spanned(policy["ingress"], **own) == spanned(policy["egress"], **own) == listens
    assert spanned(policy["egress"]) == {443, 9000}
    assert set(policy["policyTypes"]) == {"Ingress", "Egress"}


def test_the_policy_is_for_all_pods_and_the_servers_for_the_driver(profile):
    policies = of_kind(profile(), "NetworkPolicy")
    chosen = policies["hokkaido"]["spec"]["podSelector"]["matchLabels"]
    labels = {
        name: job["spec"]["template"]["metadata"]["labels"] for name, job in of_kind(profile(), "Job").items()
    }
    scheduler, worker, _ = made_by_the_operator(profile())
    of_dask = [d["spec"]["template"]["metadata"]["labels"] for d in (scheduler, worker)]
    assert all(chosen.items() <= found.items() for found in (*labels.values(), *of_dask))
    driver = policies["hokkaido-driver"]["spec"]
    chosen = driver["podSelector"]["matchLabels"].items()
    assert [name for name in labels if chosen <= labels[name].items()] == ["hokkaido-run"]
    assert spanned(driver["egress"]) == {443, 6443}


# --- as a user meets it -----------------------------------------------------------------------------------------------


def written(tmp_path, text):
    path = tmp_path / "mine.toml"
    path.write_text(text)
    return path


def test_show_tells_every_setting(command, tmp_path):
    found = command("cluster", "show", written(tmp_path, f'extends = "kubernetes"\n[kubernetes]\n{FULL}'))
    assert found.code == 0
    rows = dict(re.split(r" {2,}", line, maxsplit=1) for line in found.out.splitlines())
    assert rows["egress_ports"] == "443, 9000"
    assert rows["node_selector"] == "example.org/pool = batch"
    assert (rows["service_account"], rows["scratch_gb"]) == ("slidecube", "20")


def test_manifests_are_printed_or_written(command, tmp_path):
    mine = written(tmp_path, f'extends = "kubernetes"\n[kubernetes]\n{FULL}')
    printed = command("cluster", "manifests", mine, "--plan", PLAN)
    assert (printed.code, printed.err) == (0, "")
    out = tmp_path / "a" / "b"
    told = command("cluster", "manifests", mine, "--plan", PLAN, "--out", out)
    files = ["setup.yaml", "cluster.yaml", "run.yaml"]
    files += [f"stages/{n}-{stage}.yaml" for n, stage in enumerate(STAGES, start=1)]
    assert told.out == f"wrote 8 files to {out}: {', '.join(files)}\n"
    found = [document for file in files for document in yaml.safe_load_all((out / file).read_text())]
    assert list(yaml.safe_load_all(printed.out)) == found


def test_no_stage_is_written_that_would_search(command, tmp_path):
    """Until the plan has a name, which its Job prints."""
    mine = written(tmp_path, f'extends = "kubernetes"\n[kubernetes]\n{FULL}')
    told = command("cluster", "manifests", mine, "--out", tmp_path / "out")
    assert told.code == 0
    assert [path.name for path in (tmp_path / "out" / "stages").iterdir()] == ["1-plan.yaml"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("kubernetes", "Profile 'kubernetes' names no image; build deploy/Dockerfile"),
        (
            "threads",
            "Profile 'threads' is of runner 'threads'; manifests are made of a profile whose runner is",
        ),
        ("nowhere", "No cluster profile 'nowhere'; profiles: "),
    ],
)
def test_a_profile_that_makes_no_manifests_is_refused(command, tmp_path, name, expected):
    found = command("cluster", "manifests", name, "--out", tmp_path / "out")
    assert found.code == 1
    assert found.refusal.startswith(expected)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["Upper", "a.b", "-a", "a" * 41])
def test_a_name_that_kubernetes_would_refuse_is_refused(command, tmp_path, name):
    found = command(
        "cluster", "show", written(tmp_path, f'extends = "kubernetes"\n[kubernetes]\nname = "{name}"')
    )
    assert found.code == 1
    assert "kubernetes.name: String should match pattern" in found.refusal


def test_a_file_is_no_folder(command, tmp_path):
    mine = written(tmp_path, f'extends = "kubernetes"\n[kubernetes]\n{PLAIN}')
    found = command("cluster", "manifests", mine, "--out", mine)
    assert found.code == 1
    assert "is a file" in found.refusal
