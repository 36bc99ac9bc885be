"""`python -m launch.cluster`: what it renders means what was asked for, and bad input stops it.

One file in sections (slices, flags, TPU, GKE, Slurm, Docker), because they share how a run is asked
for and how a rendered script is tried in a shell.
"""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from launch import cluster
from launch.docker import commands as docker
from launch.gke import jobset
from launch.job import STOPPED, make_job, parse_env
from launch.slurm import sbatch
from launch.tpu import commands, slices
from launch.tpu.controller import CommandError, Controller, Done

ROOT = Path(__file__).resolve().parents[2]
TRAINING = ("--model=tiny", "--steps=7", "--set=train.lr=1e-3", "--workdir=/workdir/my run")
POD = ("--name=llama", "--project=my-project", "--zone=us-east5-b")
DNS_LABEL = r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?"


def run(capsys, *argv):
    """(exit code, standard output, standard error) of the command."""
    code = cluster.main(argv)
    out = capsys.readouterr()
    return code, out.out, out.err


# -- slices ----------------------------------------------------------------------------------------


# Rows of Google's tables: topology, accelerator type, chips, virtual machines.
DOCUMENTED = [
    "v5e:1x1 v5litepod-1 1 1", "v5e:2x2 v5litepod-4 4 1", "v5e:2x4 v5litepod-8 8 1",
    "v5e:4x4 v5litepod-16 16 4", "v5e:4x8 v5litepod-32 32 8", "v5e:8x8 v5litepod-64 64 16",
    "v5e:8x16 v5litepod-128 128 32", "v5e:16x16 v5litepod-256 256 64",
    "v6e:1x1 v6e-1 1 1", "v6e:2x2 v6e-4 4 1", "v6e:2x4 v6e-8 8 1", "v6e:4x4 v6e-16 16 4",
    "v6e:8x16 v6e-128 128 32", "v6e:16x16 v6e-256 256 64",
    "v5p:2x2x1 v5p-8 4 1", "v5p:2x2x2 v5p-16 8 2", "v5p:2x2x4 v5p-32 16 4",
    "v5p:2x4x4 v5p-64 32 8", "v5p:4x4x4 v5p-128 64 16", "v5p:4x4x8 v5p-256 128 32",
    "v5p:4x8x8 v5p-512 256 64", "v5p:8x8x8 v5p-1024 512 128", "v5p:8x8x16 v5p-2048 1024 256",
]  # fmt: skip


@pytest.mark.parametrize("row", DOCUMENTED)
def test_slices_are_those_of_the_vendors_tables(row):
    topology, name, chips, hosts = row.split()
    found = slices.parse(topology)
    assert (found.accelerator_type, found.chips, found.hosts) == (name, int(chips), int(hosts))
    assert found.hosts * found.chips_per_host == found.chips


def test_devices_are_counted_as_jax_counts_them():
    assert slices.parse("v5p:4x4x4").devices == 64
    assert slices.parse("tpu7x:4x4x4").devices == 128  # two chiplets each


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("v5:4x4", "unknown chip 'v5'; did you mean"),
        ("v5e:1x2", "is no slice: one machine has 1x1, 2x2, 2x4"),
        ("v5p:3x3x3", "is no slice"),
        ("h200:8", "is no TPU slice; the TPUs are v5e, v5p, v6e, tpu7x"),
    ],
)
def test_topologies_that_no_slice_has(text, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        slices.parse(text)


def test_a_shape_that_the_accelerator_type_does_not_mean():
    assert slices.parse("v5p:4x4x16").chips == 256
    with pytest.raises(ValueError, match="v5p-512 means v5p:4x8x8"):
        _ = slices.parse("v5p:4x4x16").accelerator_type
    with pytest.raises(ValueError, match="only offered on GKE"):
        _ = slices.parse("tpu7x:4x4x4").accelerator_type
    with pytest.raises(ValueError, match="v5e:4x12 has no accelerator type of its own, or"):
        _ = slices.parse("v5e:4x12").accelerator_type


def test_names_are_of_the_chips_that_can_be_planned():
    from jaxheads.parallel.topology import CHIPS

    assert {n for n, chip in CHIPS.items() if chip.platform == "tpu"} == set(slices.GENERATIONS)
    for chip in CHIPS.values():
        if chip.platform == "tpu":
            assert all(slices.parse(text).chips for text in chip.examples)


# -- the run's flags -------------------------------------------------------------------------------


BAD_RUNS = {
    "a typo": (["--stepz=3"], "unknown flag 'stepz'; did you mean 'steps'?"),
    "a typo of ours": (["--topologi=3"], "unknown flag 'topologi'; did you mean 'topology'?"),
    "a typo in --set": (["--set=train.lrr=1"], "unknown field of train 'lrr'; did you mean 'lr'?"),
    "a bad value": (["--set=train.lr=fast"], "train.lr='fast' is not a number"),
    "a mesh": (["--mesh=rows:2"], "unknown axis 'rows'"),
    "another mesh": (["--mesh=data:8"], "uses 8 of 16 devices"),
    "too large a mesh": (["--mesh=data:32"], "needs 32 devices but there are 16"),
    "rows": (["--mesh=data:16", "--batch_size=8"], "batch_size=8 is not divisible by 16"),
    "a preset": (["--model=tinny"], "unknown preset 'tinny'; did you mean 'tiny'?"),
    "a word": (["now"], "unexpected argument 'now'"),
    "a relative workdir": (["--workdir=runs/x"], "workdir='runs/x' must be an absolute path"),
    "no resuming": (["--noresume"], "--resume=false would throw away the run at every restart"),
    "simulated": (["--simulated_devices=8"], "--simulated_devices is for one machine"),
    "processes": (["--processes=h:1,0,2"], "--processes is set by the launcher (to auto)"),
}


@pytest.mark.parametrize("name", BAD_RUNS)
@pytest.mark.parametrize("target", ["tpu", "gke", "slurm"])
def test_bad_flags_of_the_run_stop_before_anything_is_made(capsys, target, name):
    bad, message = BAD_RUNS[name]
    where = {
        "tpu": (*POD, "--topology=v5e:4x4", "--dry_run"),
        "gke": ("--name=llama", "--image=a/b:c", "--topology=v5e:4x4", "--claim=runs"),
        "slurm": ("--name=llama", "--nodes=2"),
    }[target]
    mesh = () if name.startswith("a mesh") else ("--mesh=data:16",)
    training = [*(f for f in (*mesh, "--batch_size=16", *TRAINING) if not _same(f, bad)), *bad]
    code, out, err = run(capsys, f"--target={target}", *where, *training)
    assert code == 2 and out == "" and err.startswith("error: ")
    assert message in err


def test_the_mesh_over_slices(capsys):
    where = ("--target=tpu", "--dry_run", *POD, "--topology=v5e:4x4", *TRAINING)
    for flags, message in (
        (("--slices=2", "--mesh=data:32"), "--slices=2 needs an axis over the slices"),
        (("--slices=2", "--mesh=data:16", "--dcn_mesh=data:3"), "does not name 2 slices"),
        (("--mesh=data:16", "--dcn_mesh=data:2"), "does not name 1 slice;"),
        (("--slices=2", "--mesh=data:16", "--dcn_mesh=fsdp:2"), "8 is not divisible by 32"),
    ):
        code, out, err = run(capsys, *where, *flags)
        assert code == 2 and out == "" and message in err, err


def _same(flag, bad):
    names = [text.rpartition("=")[0] for text in (flag, *bad)]  # "--set=train.lr" of --set
    return names[0] in names[1:]


def test_weights_that_are_only_on_the_cluster(capsys):
    code, out, err = run(
        capsys, "--target=slurm", "--name=x", "--model=/scratch/llama", "--workdir=/scratch/run",
        "--set=model.remat=full", "--mesh=data:8", "--batch_size=8",
    )  # fmt: skip
    assert code == 0 and "--model=/scratch/llama" in out and "--set=model.remat=full" in out
    assert "not on this machine" in err
    code, _, err = run(
        capsys, "--target=slurm", "--name=x", "--model=/scratch/llama", "--workdir=/scratch/run",
        "--set=train.lrr=1", "--mesh=data:8",
    )  # fmt: skip
    assert code == 2 and "'lrr'; did you mean 'lr'?" in err


def test_flags_of_the_run_may_stand_among_ours(capsys):
    ours = ["--target=slurm", "--name=x", "--gpus_per_node=1"]
    runs = ["--model=tiny", "--workdir=/r", "--set", "train.lr=1e-3"]
    texts = {
        run(capsys, *argv)[1]
        for argv in ([*ours, "--", *runs], [*ours, *runs], [runs[0], *ours, *runs[1:]])
    }
    assert len(texts) == 1 and "--set train.lr=1e-3" in texts.pop()


def test_no_flag_of_ours_is_one_of_the_runs():
    from absl import flags

    from launch import train

    ours, runs = flags.FlagValues(), flags.FlagValues()
    cluster.define_flags(ours)
    train.define_flags(runs)
    assert not set(ours) & set(runs)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "--target is missing"),
        (["--target=tpux"], "tpux"),
        (["--target=tpu", "--action=fly", *POD], "unknown action of --target=tpu 'fly'"),
        (["--target=tpu", *POD], "--topology is missing"),
        (["--target=tpu", "--name=a;b", "--topology=v5e:4x4"], "--name='a;b' is not a name"),
        (["--target=tpu", "--name=a", "--topology=v5e:4x4"], "--project is missing"),
        (["--target=tpu", *POD[:2], "--zone=$(x)", "--topology=v5e:4x4"], "is not a zone"),
        (["--target=tpu", *POD, "--topology=v5e:2x4", "--slices=2"], "take one larger slice"),
        (["--target=tpu", *POD, "--topology=tpu7x:4x4x4"], "only offered on GKE"),
        (["--target=tpu", *POD, "--topology=v5e:4x4", "--nodes=2"], "has no meaning with"),
        (["--target=gke", "--name=Llama", "--image=a:b", "--topology=v5e:4x4"], "--name='Llama'"),
        (["--target=gke", "--name=a", "--image=a/b", "--topology=v5e:4x4"], "names no tag"),
        (["--target=gke", "--name=" + "a" * 60, "--image=a:b", "--topology=v5e:4x4"], "too long"),
        (["--target=slurm", "--name=a b"], "--name='a b' is not a job name"),
        (["--target=slurm", "--name=a", "--time=soon"], "--time='soon' is not a time"),
        (["--target=slurm", "--name=a", "--nodes=0"], "--nodes=0 must be at least 1"),
        (["--target=docker", "--image=a:b", "--accelerator=gpu"], "is not one of cpu, cuda, tpu"),
    ],
)
def test_bad_flags_of_ours(capsys, argv, message):
    code, out, err = run(capsys, *argv)
    assert code == 2 and out == "" and message in err


@pytest.mark.parametrize("name", ["HF_TOKEN", "MY_API_KEY", "WANDB_APIKEY", "DbPassword"])
def test_secrets_are_refused(name):
    with pytest.raises(ValueError, match="looks like a secret"):
        parse_env([f"{name}=hunter2"])


# -- TPU -------------------------------------------------------------------------------------------


def dry(capsys, *argv):
    """The commands of a dry run, as lists of words."""
    code, out, err = run(capsys, "--target=tpu", "--dry_run", *POD, *argv)
    assert code == 0, err
    return [shlex.split(line) for line in out.splitlines()]


def verbs(commands_):
    return [words[4] if words[0] == "gcloud" else words[0] for words in commands_]


def remote(words):
    """The shell command that runs on the machines."""
    (command,) = [w.removeprefix("--command=") for w in words if w.startswith("--command=")]
    return command


def test_a_dry_run_shows_the_whole_life_of_a_run(capsys):
    flags = ("--topology=v5e:4x4", "--spot", "--mesh=data:16", "--batch_size=16", *TRAINING)
    shown = dry(capsys, "--action=all", *flags)
    assert verbs(shown) == [
        "describe", "create", "describe", "git", "scp", "ssh", "ssh", "ssh", "ssh", "describe",
        "delete",
    ]  # fmt: skip
    assert all("--project=my-project" in w and "--zone=us-east5-b" in w
               for w in shown if w[0] == "gcloud")  # fmt: skip
    create = shown[1]
    assert {"--accelerator-type=v5litepod-16", "--runtime-version=v2-alpha-tpuv5-lite", "--spot",
            "--node-id=llama"} < set(create)  # fmt: skip
    assert all("--worker=all" in w for w, v in zip(shown, verbs(shown)) if v in ("ssh", "scp"))
    # The words that reach launch.train on the machines are the ones that were given.
    inner = re.search(r"bash -c (.*) < /dev/null", remote(shown[7]))[1]
    words = shlex.split(shlex.split(inner)[0].partition(">>")[0])
    assert words[1:3] == ["-m", "launch.train"]
    assert words[3:] == [*flags[2:], "--processes=auto", f"--stop_exit_code={STOPPED}"]


def test_resuming_shows_what_follows_a_preemption(capsys):
    shown = dry(capsys, "--action=resume", "--topology=v5e:2x2", "--mesh=data:4", *TRAINING)
    assert verbs(shown)[:5] == ["describe", "delete", "describe", "create", "describe"]
    assert "delete" not in verbs(shown)[5:]


def test_several_slices_are_one_queued_resource(capsys):
    flags = ("--topology=v5p:2x2x2", "--slices=3", "--mesh=fsdp:8", "--dcn_mesh=data:3",
             "--batch_size=24", *TRAINING)  # fmt: skip
    shown = dry(capsys, "--action=all", *flags)
    assert {"--node-count=3", "--node-prefix=llama", "--accelerator-type=v5p-16"} < set(shown[1])
    for words, verb in zip(shown, verbs(shown)):
        if verb in ("ssh", "scp"):
            assert words[3] == "queued-resources" and {"--worker=all", "--node=all"} < set(words)


def test_a_tpu_vm_without_the_queue(capsys):
    (_, create, *_) = dry(capsys, "--action=create", "--noqueue", "--topology=v6e:2x4")
    assert create[3:6] == ["tpu-vm", "create", "llama"] and "--version=v2-alpha-tpuv6e" in create


@pytest.mark.parametrize("action", ["status", "logs", "stop", "delete", "sync", "run"])
def test_single_actions(capsys, action):
    shown = dry(capsys, f"--action={action}", "--topology=v5e:2x2", "--mesh=data:4", *TRAINING)
    kinds = {
        "status": "ssh", "logs": "ssh", "stop": "ssh", "delete": "delete", "sync": "ssh",
        "run": "ssh",
    }  # fmt: skip
    assert verbs(shown)[-1] == kinds[action]


class Cloud:
    """Plays Cloud TPU: a state, and what polling the machines prints."""

    def __init__(self, polls, state="ABSENT", hosts=4):
        self.polls, self.state, self.hosts, self.seen = list(polls), state, hosts, []

    def __call__(self, argv, *, capture=False):
        verb = argv[4] if argv[0] == "gcloud" else argv[0]
        self.seen.append(verb)
        if verb == "create":
            assert self.state == "ABSENT"
            self.state = "WAITING_FOR_RESOURCES"
        if verb == "delete":
            self.state = "ABSENT"
        if verb == "describe":
            state = self.state
            if state == "WAITING_FOR_RESOURCES":
                self.state = "ACTIVE"
            return Done(1, "", "ERROR: NOT_FOUND") if state == "ABSENT" else Done(0, state + "\n")
        if "jaxheads-run" in argv[-1]:
            answer = self.polls.pop(0)
            if isinstance(answer, str):  # the machines are taken away
                self.state = answer
                return Done(255, "", "connection closed")
            return Done(0, "\n".join(f"noise\njaxheads-run: {word}" for word in answer))
        return Done(0)


def controlled(polls, **options):
    pod = commands.Pod(
        name="llama", project="my-project", zone="us-east5-b", slice=slices.parse("v5e:4x4")
    )
    cloud = Cloud(polls, **options)
    said = []
    control = Controller(
        pod, make_job(TRAINING), cloud, sleep=lambda s: None, say=said.append, max_restarts=3
    )
    return control, cloud, said


def test_a_run_goes_on_after_a_preemption():
    control, cloud, said = controlled([["running"] * 4, "SUSPENDED", ["running"] * 4, ["0"] * 4])
    assert control.keep_running() == 0
    assert cloud.seen.count("create") == 2 and cloud.seen.count("delete") == 1
    assert "SUSPENDED: deleting it" in " ".join(said)


@pytest.mark.parametrize("codes", [["75"] * 4, ["137", "1", "1", "1"], ["gone", "0", "0", "0"]])
def test_a_stopped_or_crashed_run_starts_again_on_the_same_machines(codes):
    control, cloud, _ = controlled([codes, ["0"] * 4])
    assert control.keep_running() == 0
    assert cloud.seen.count("create") == 1 and "delete" not in cloud.seen


def test_bad_input_is_not_tried_again():
    control, cloud, _ = controlled([["2"] * 4])
    assert control.keep_running() == 2
    assert cloud.seen.count("scp") == 1


def test_giving_up_in_the_end():
    control, _, said = controlled([["137"] * 4] * 4)
    assert control.keep_running() == STOPPED
    assert "started again 3 times; giving up" in said[-1]


def test_a_machine_that_does_not_answer_for_a_while():
    few = ["running"] * 3
    control, cloud, _ = controlled([few, few, ["running"] * 4, ["0"] * 4])
    assert control.keep_running() == 0
    assert cloud.seen.count("scp") == 1


def test_create_leaves_a_pod_that_is_there():
    control, cloud, _ = controlled([], state="ACTIVE")
    control.create()
    assert cloud.seen == ["describe"]


def test_an_unknown_state_is_not_taken_for_absence():
    control, cloud, _ = controlled([])
    cloud.__class__ = type("Denied", (Cloud,), {
        "__call__": lambda self, argv, capture=False: Done(1, "", "PERMISSION_DENIED")
    })  # fmt: skip
    with pytest.raises(CommandError, match="PERMISSION_DENIED"):
        control.create()


def sh(text, home, **env):
    return subprocess.run(
        ["bash", "-c", text], env=os.environ | {"HOME": str(home)} | env,
        capture_output=True, text=True, timeout=30,
    )  # fmt: skip


@pytest.mark.skipif(not shutil.which("flock"), reason="needs flock of util-linux")
def test_the_commands_of_the_machines_work_in_a_shell(tmp_path):
    """start, start again, poll while it runs and after, with a stand-in for Python."""
    pod = commands.Pod(
        name="llama", project="my-project", zone="us-east5-b", slice=slices.parse("v5e:2x2")
    )
    job = make_job([*TRAINING, "--data=it's"], env=["NOTE=a b"])
    folder = tmp_path / pod.folder
    python = tmp_path / f"{pod.folder}-env/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(
        '#!/bin/sh\nprintf "%s\\n" "$NOTE" "$@"\nwhile [ ! -e go ]; do sleep 0.05; done\nexit 75\n'
    )
    python.chmod(0o755)

    def poll():
        return commands.read_poll(sh(remote(commands.poll(pod)), tmp_path).stdout)

    assert poll() == ["gone"]
    folder.mkdir()
    assert poll() == ["gone"]
    begin = remote(commands.start(pod, job))
    assert sh(begin, tmp_path).returncode == 0
    assert poll() == ["running"]
    assert "already running" in sh(begin, tmp_path).stdout
    (folder / "go").touch()
    end = time.monotonic() + 20
    while poll() == ["running"]:
        assert time.monotonic() < end
        time.sleep(0.05)
    assert poll() == ["75"]
    assert (folder / "train.log").read_text().splitlines() == ["a b", *job.command()[1:]]


@pytest.mark.parametrize("shell", ["bash -n", "shellcheck"])
def test_the_commands_of_the_machines_are_clean(tmp_path, shell):
    pod = commands.Pod(
        name="llama", project="my-project", zone="us-east5-b", slice=slices.parse("v5e:2x2")
    )
    job = make_job(TRAINING)
    parts = [commands.sync(pod, "/x")[-1], commands.install(pod, "sudo mount /x"),
             commands.start(pod, job), commands.poll(pod), commands.stop(pod), commands.logs(pod),
             commands.tail(pod)]  # fmt: skip
    for i, words in enumerate(parts):
        check_shell(tmp_path / f"{i}.sh", f"#!/usr/bin/env bash\n{remote(words)}\n", shell)


def check_shell(path, text, tool):
    if not shutil.which(tool.split()[0]):
        pytest.skip(f"{tool} is not installed")
    path.write_text(text)
    done = subprocess.run([*tool.split(), str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


# -- GKE -------------------------------------------------------------------------------------------


def gke(capsys, *argv):
    code, out, err = run(
        capsys, "--target=gke", "--name=llama", "--image=reg.io/p/jaxheads:1", "--claim=runs", *argv
    )
    assert code == 0, err
    return yaml.safe_load(out)


@pytest.mark.parametrize(
    ("topology", "count", "label", "per_host"),
    [
        ("v5e:4x4", 1, "tpu-v5-lite-podslice", 4),
        ("v5e:2x4", 1, "tpu-v5-lite-podslice", 8),
        ("v5p:4x4x4", 2, "tpu-v5p-slice", 4),
        ("v6e:16x16", 4, "tpu-v6e-slice", 4),
        ("tpu7x:2x2x2", 2, "tpu7x", 4),
    ],
)
def test_a_jobset_asks_for_all_chips(capsys, topology, count, label, per_host):
    one = slices.parse(topology)
    over = () if count == 1 else (f"--dcn_mesh=data:{count}",)
    content = gke(
        capsys, f"--topology={topology}", f"--slices={count}", f"--mesh=data:{one.devices}", *over,
        f"--batch_size={count * one.devices}", *TRAINING,
    )  # fmt: skip
    assert (content["apiVersion"], content["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (jobs,) = content["spec"]["replicatedJobs"]
    spec = jobs["template"]["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    resources = container["resources"]
    assert resources["requests"] == resources["limits"] == {"google.com/tpu": per_host}
    assert spec["parallelism"] == spec["completions"] == one.hosts
    assert spec["completionMode"] == "Indexed" and spec["backoffLimit"] == 0
    assert jobs["replicas"] * spec["parallelism"] * per_host == count * one.chips
    assert jobset.chips(content) == count * one.chips
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": label,
        "cloud.google.com/gke-tpu-topology": one.topology,
    }
    assert pod["restartPolicy"] == "Never"
    assert content["spec"]["failurePolicy"]["maxRestarts"] == 100
    # The longest names that follow from it: pods, which are also host names.
    longest = f"llama-{jobs['name']}-{jobs['replicas'] - 1}-{one.hosts - 1}-abcde"
    for name in ("llama", jobs["name"], container["name"], content["spec"]["network"]["subdomain"],
                 longest, *(v["name"] for v in pod["volumes"])):  # fmt: skip
        assert re.fullmatch(DNS_LABEL, name) and len(name) <= 63
    # Everything mounted exists, and the workdir lies on the claim.
    volumes = {v["name"]: v for v in pod["volumes"]}
    mounts = {m["name"]: m["mountPath"] for m in container["volumeMounts"]}
    assert mounts.keys() == volumes.keys()
    assert volumes["workdir"]["persistentVolumeClaim"] == {"claimName": "runs"}
    assert container["command"][:3] == ["python", "-m", "launch.train"]
    assert list(TRAINING) == [w for w in container["command"] if w in TRAINING]

    env = {e["name"]: e for e in container["env"]}
    if count == 1:
        assert not env
    else:
        assert env["MEGASCALE_NUM_SLICES"]["value"] == str(count)
        path = env["MEGASCALE_SLICE_ID"]["valueFrom"]["fieldRef"]["fieldPath"]
        assert path == "metadata.annotations['jobset.sigs.k8s.io/job-index']"
        # JAX takes the host of the address: it must be the first pod, where process 0 is.
        host = env["MEGASCALE_COORDINATOR_ADDRESS"]["value"].partition(":")[0]
        subdomain = content["spec"]["network"]["subdomain"]
        assert host == f"llama-{jobs['name']}-0-0.{subdomain}"
        assert content["spec"]["network"]["enableDNSHostnames"] is True
        check_processes(env, one.hosts, count)


def check_processes(env, hosts, count):
    """What the pods read from the manifest and from GKE makes them one run."""
    from jaxheads.parallel.multihost import detect

    found = []
    for index in range(count):
        given = {name: entry["value"] for name, entry in env.items() if "value" in entry}
        given["MEGASCALE_SLICE_ID"] = str(index)
        names = ",".join(f"llama-slice-{index}-{i}.llama" for i in range(hosts))
        for host in range(hosts):
            gke = {"TPU_WORKER_ID": str(host), "TPU_WORKER_HOSTNAMES": names}
            found.append(detect(given | gke))
    assert [c.index for c in found] == list(range(hosts * count))
    assert {c.count for c in found} == {hosts * count}
    assert {c.address.partition(":")[0] for c in found} == {"llama-slice-0-0.llama"}


def test_spot_pods_go_to_spot_nodes(capsys):
    content = gke(capsys, "--topology=v5e:2x2", "--spot", "--mesh=data:4", *TRAINING)
    pod = content["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert pod["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
    assert "cloud.google.com/gke-spot" in [t["key"] for t in pod["tolerations"]]


def test_checkpoints_must_outlive_the_pods(capsys):
    base = ("--target=gke", "--name=a", "--image=a:b", "--topology=v5e:4x4", "--mesh=data:16",
            "--batch_size=16")  # fmt: skip
    code, _, err = run(capsys, *base, *TRAINING)
    assert code == 2 and "give a PersistentVolumeClaim" in err
    code, _, err = run(capsys, *base, "--claim=runs", "--mount=/other", *TRAINING)
    assert code == 2 and "is not below /other" in err


def test_environment_and_yaml_that_looks_like_something_else(capsys):
    content = gke(
        capsys, "--topology=v5e:2x2", "--mesh=data:4", "--env=A=yes", "--env=B=1e3", *TRAINING
    )
    container = content["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"][
        "containers"
    ][0]
    assert container["env"] == [{"name": "A", "value": "yes"}, {"name": "B", "value": "1e3"}]


# -- Slurm -----------------------------------------------------------------------------------------


def slurm_script(capsys, *argv):
    code, out, err = run(
        capsys, "--target=slurm", "--name=llama", "--mesh=data:-1", "--batch_size=96", *argv,
        *TRAINING,
    )  # fmt: skip
    assert code == 0, err
    return out


def options_of(text):
    found = re.findall(r"^#SBATCH --([a-z-]+)(?:=(.*))?$", text, re.MULTILINE)
    return dict(found)


def test_a_batch_script_has_one_process_per_gpu(capsys):
    text = slurm_script(capsys, "--nodes=3", "--gpus_per_node=4", "--partition=gpu", "--time=1:00")
    options = options_of(text)
    assert options["nodes"] == "3" and options["partition"] == "gpu" and options["time"] == "1:00"
    assert options["ntasks-per-node"] == options["gpus-per-node"] == "4"
    assert options["signal"] == f"B:TERM@{sbatch.GRACE_SECONDS}"
    assert "requeue" in options and "account" not in options
    assert not {"gpus-per-task", "gpu-bind"} & options.keys()  # JAX picks a GPU by its local number
    srun = next(line for line in text.splitlines() if line.startswith("srun"))
    words = shlex.split(srun.rstrip("& "))
    assert set(TRAINING) | {"--processes=auto"} < set(words)


def test_what_the_processes_of_a_batch_script_find():
    """With the variables that srun sets, each process gets its number and one GPU of its node."""
    from jaxheads.parallel.multihost import detect

    found = [
        detect({
            "SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "gpu[3-4]", "SLURM_NTASKS": "8",
            "SLURM_STEP_NUM_NODES": "2", "SLURM_PROCID": str(i), "SLURM_LOCALID": str(i % 4),
        })
        for i in range(8)
    ]  # fmt: skip
    assert [(c.index, c.count, c.local_devices) for c in found] == [
        (i, 8, (i % 4,)) for i in range(8)
    ]
    assert {c.address.partition(":")[0] for c in found} == {"gpu3"}


@pytest.mark.parametrize("tool", ["bash -n", "shellcheck"])
def test_batch_scripts_are_clean(capsys, tmp_path, tool):
    for extra in ((), ("--repository=/a b/c", "--env=A=it's", "--python=/opt/my env/python")):
        check_shell(tmp_path / "job.sbatch", slurm_script(capsys, *extra), tool)


@pytest.mark.parametrize(
    ("code", "restarts", "signalled", "requeued", "ends"),
    [
        (0, 0, False, False, 0),
        (1, 0, False, False, 1),
        (2, 0, False, False, 2),
        (STOPPED, 0, False, True, 0),
        (STOPPED, 0, True, True, 0),
        (0, 0, True, False, 0),  # finished just when it was told to stop
        (137, 0, False, True, 0),
        (STOPPED, 100, False, False, STOPPED),
    ],
)
def test_what_a_batch_script_does_when_the_run_ends(
    capsys, tmp_path, code, restarts, signalled, requeued, ends
):
    """The script itself, with stand-ins for Slurm's commands."""
    tools = {
        "srun": f'trap "sleep 0.2; touch saved; exit {code}" TERM; touch started\n'
        + ("while true; do sleep 0.02; done" if signalled else f"exit {code}"),
        "scontrol": 'echo "$@" > requeued',
    }
    for name, body in tools.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "job").write_text(slurm_script(capsys))
    process = subprocess.Popen(
        ["bash", str(tmp_path / "job")],
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_SUBMIT_DIR": str(tmp_path),
             "SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": str(restarts)},
    )  # fmt: skip
    if signalled:
        end = time.monotonic() + 20
        while not (tmp_path / "started").exists():
            assert time.monotonic() < end
            time.sleep(0.01)
        time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == ends
    assert (tmp_path / "requeued").exists() == requeued
    if requeued:
        assert (tmp_path / "requeued").read_text() == "requeue 7\n"
    if signalled:
        assert (tmp_path / "saved").exists()  # the script waited for it


def test_rendering_is_deterministic_and_submitting_hands_it_over(capsys, tmp_path):
    assert slurm_script(capsys) == slurm_script(capsys)
    path = tmp_path / "job.sbatch"
    code, out, _ = run(
        capsys, "--target=slurm", "--action=submit", "--dry_run", "--name=llama", "--mesh=data:8",
        f"--output={path}", *TRAINING,
    )  # fmt: skip
    assert code == 0 and out == f"sbatch {path}\n"
    assert options_of(path.read_text())["job-name"] == "llama"


# -- Docker ----------------------------------------------------------------------------------------


def instructions():
    """The Dockerfile as (instruction, arguments), continued lines joined."""
    text = (ROOT / docker.DOCKERFILE).read_text()
    joined = re.sub(r"\\\n\s*", " ", text)
    lines = [line for line in joined.splitlines() if line.strip() and not line.startswith("#")]
    return [tuple(line.split(maxsplit=1)) for line in lines]


def test_the_image_is_pinned_small_and_not_root():
    found = instructions()
    kinds = [kind for kind, _ in found]
    bases = [text for kind, text in found if kind == "FROM"]
    assert bases and all(re.fullmatch(r"\S+:\d+\.\d+\.\d+-slim\S*", base) for base in bases)
    for kind, text in found:
        if kind == "COPY":
            *sources, target = text.split()
            assert target.startswith("/") and all((ROOT / s).exists() for s in sources)
        assert kind != "ADD"
        assert not re.search(r"(?i)token|password|secret|api_?key", text)
    users = [text for kind, text in found if kind == "USER"]
    assert users and users[-1] != "root"
    assert kinds.index("USER") < kinds.index("ENTRYPOINT")
    assert dict(found)["ENTRYPOINT"].startswith("[")  # signals reach Python, not a shell


def test_the_image_has_the_extras_of_the_package():
    import tomllib

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = extras["optional-dependencies"]
    assert {extra for extra, _ in docker.ACCELERATORS.values() if extra} <= names.keys()


@pytest.mark.parametrize(("extras", "needed"), [("", "/src"), ("cuda", "/src[cuda]")])
def test_the_extras_reach_pip(extras, needed):
    (install,) = [text for kind, text in instructions() if kind == "RUN"]
    words = re.search(r'pip install ("[^"]*")', install)[1]
    done = sh(f"printf %s {words}", "/", EXTRAS=extras)
    assert done.stdout == needed


def test_everything_the_package_is_built_from_is_sent():
    sources = {s for kind, text in instructions() if kind == "COPY" for s in text.split()[:-1]}
    ignored = (ROOT / f"{docker.DOCKERFILE}.dockerignore").read_text().split()
    assert ignored[0] == "*"
    assert {line[1:] for line in ignored if line.startswith("!")} == sources


def test_docker_commands(capsys):
    code, out, err = run(
        capsys, "--target=docker", "--image=jaxheads:cuda", "--accelerator=cuda", *TRAINING
    )
    assert code == 0, err
    build, start = (shlex.split(line) for line in out.splitlines())
    assert {"--build-arg=EXTRAS=cuda", "--tag=jaxheads:cuda"} < set(build)
    assert "--gpus=all" in start and "--volume=/workdir/my run:/workdir/my run" in start
    image = start.index("jaxheads:cuda")
    assert start[image + 1 : image + 6] == ["launch.train", *TRAINING]
    assert not any(word.startswith("--processes") for word in start)


# -- as a command ----------------------------------------------------------------------------------


def test_the_command_itself(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "launch.cluster", "--target=slurm", "--name=x", "--stepz=1"],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2 and "did you mean 'steps'" in done.stderr
    assert "Traceback" not in done.stderr
