"""The launchers in scripts/, with stand-ins for run_mindformer.py and msrun that record how they were started."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from transform_ckpt import rank_table

BASH = shutil.which("bash") or "bash"

# What a rank does comes from RANKS: {"1": "exit 3"}; the scheduler's name is "scheduler".  Whoever fails waits until
# all that RANKS names have started.
RUN_MINDFORMER = """
import json, os, signal, subprocess, sys, time
ranks = json.loads(os.environ["RANKS"])
name = "scheduler" if os.environ.get("MS_ROLE") == "MS_SCHED" else os.environ["RANK_ID"]
word, _, value = ranks.get(name, "exit 0").partition(" ")
if word == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
pids = [os.getpid()]
if word in ("sleep", "stubborn"):
    pids.append(subprocess.Popen(["sleep", "300"]).pid)
record = {"argv": sys.argv[1:], "env": dict(os.environ), "cwd": os.getcwd(), "pids": pids}
path = os.path.join(os.environ["RECORDS"], name + ".json")
with open(path + ".new", "w") as stream:
    json.dump(record, stream)
os.rename(path + ".new", path)
print("out of", name)
print("err of", name, file=sys.stderr, flush=True)
while value != "0" and not all(os.path.exists(os.path.join(os.environ["RECORDS"], n + ".json")) for n in ranks):
    time.sleep(0.02)
if word == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
if word != "exit":
    time.sleep(300)
if value != "0":
    for line in range(40):
        print("line", line)
sys.exit(int(value))
"""
MSRUN = """#!/usr/bin/env python3
import json, os, shutil, sys
with open(os.environ["RECORDS"] + "/msrun.json", "w") as stream:
    json.dump({"argv": sys.argv[1:], "env": dict(os.environ), "python": shutil.which("python")}, stream)
sys.exit(int(os.environ.get("CODE", "0")))
"""


@dataclass
class Project:
    """A copy of what the scripts need, a directory where the user stands, and records of what was started."""

    root: Path
    work: Path
    records: Path

    def environ(self, ranks: dict[str, str] | None = None, **more: str) -> dict[str, str]:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("MS_", "RANK", "LOCAL_", "DEVICE_", "PYTHON"))}
        fixed = {"PYTHON": sys.executable, "TRANSFORM_CKPT_NPU": "0", "RECORDS": str(self.records)}
        return {**kept, **fixed, "RANKS": json.dumps(ranks or {}), **more}

    def run(
        self, script: str, *arguments: str, ranks: dict[str, str] | None = None, cwd: Path | None = None, **more: str
    ) -> subprocess.CompletedProcess[str]:
        command = [BASH, str(self.root / "scripts" / script), *arguments]
        return subprocess.run(
            command,
            cwd=cwd or self.work,
            env=self.environ(ranks, **more),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def record(self, name: str | int) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.records / f"{name}.json").read_text())
        return found

    def started(self) -> list[str]:
        return sorted(path.stem for path in self.records.glob("*.json"))

    def assert_nothing_runs(self) -> None:
        pids = [pid for name in self.started() for pid in self.record(name)["pids"]]
        deadline = time.monotonic() + 3
        while any(alive(pid) for pid in pids) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert [pid for pid in pids if alive(pid)] == []


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


def table(path: Path, *counts: int) -> None:
    parts = {
        str(n): rank_table.single_server(f"127.0.0.{n + 1}", {str(i): f"192.0.{n}.{i}" for i in range(count)})
        for n, count in enumerate(counts)
    }
    path.write_text(rank_table.merge(parts)[0].dumps())


@pytest.fixture
def project(repo_root: Path, tmp_path: Path) -> Project:
    root = tmp_path / "a project"
    shutil.copytree(repo_root / "scripts", root / "scripts")
    (root / "transform_ckpt").symlink_to(repo_root / "transform_ckpt")
    (root / "run_mindformer.py").write_text(RUN_MINDFORMER)
    work, records = tmp_path / "work", tmp_path / "records"
    work.mkdir()
    records.mkdir()
    (work / "job.yaml").touch()
    table(work / "one.json", 2)
    table(work / "two.json", 2, 2)
    return Project(root, work, records)


@pytest.mark.parametrize("script", ["run_distribute.sh", "msrun_launcher.sh"])
def test_syntax(repo_root: Path, script: str) -> None:
    path = repo_root / "scripts" / script
    subprocess.run([BASH, "-n", str(path)], check=True)
    assert os.access(path, os.X_OK)


# ------------------------------------------------------------------------------------------------ run_distribute.sh


@pytest.mark.parametrize("devices", ["[0,2)", "[0,2]", "0,2"])
def test_one_node_without_npus_is_joined_as_msrun_does(project: Project, devices: str) -> None:
    result = project.run("run_distribute.sh", "one.json", "job.yaml", devices, "train")
    assert result.returncode == 0, result.stderr
    assert project.started() == ["0", "1", "scheduler"]
    output = project.work / "output"
    for rank in range(2):
        record = project.record(rank)
        config = str(project.work / "job.yaml")
        assert record["argv"] == ["--config", config, "--use_parallel", "True", "--run_mode", "train"]
        assert record["cwd"] == str(project.work)
        wanted = {
            "RANK_TABLE_FILE": str(project.work / "one.json"),
            "RANK_SIZE": "2",
            "RANK_ID": str(rank),
            "DEVICE_ID": str(rank),
            "LOCAL_DEFAULT_PATH": str(output),
            "MS_ROLE": "MS_WORKER",
            "MS_WORKER_NUM": "2",
            "MS_NODE_ID": str(rank),
            "MS_SCHED_HOST": "127.0.0.1",
            "LOCAL_RANK": str(rank),
            "LOCAL_RANK_SIZE": "2",
        }
        assert {key: record["env"].get(key) for key in wanted} == wanted
        log = (output / "log" / f"rank_{rank}" / "mindformer.log").read_text()
        assert log == f"out of {rank}\nerr of {rank}\n"
        assert f"rank {rank} of 2: device {rank}" in result.stdout
    scheduler = project.record("scheduler")
    assert scheduler["argv"] == project.record(0)["argv"]
    assert "MS_NODE_ID" not in scheduler["env"]
    ports = {project.record(name)["env"]["MS_SCHED_PORT"] for name in project.started()}
    assert len(ports) == 1
    assert 1024 <= int(ports.pop()) < 65536
    assert (output / "log" / "scheduler.log").read_text().startswith("out of scheduler")
    assert f"logs are in {output}/log" in result.stdout


def test_devices_of_one_node_need_not_begin_at_0(project: Project) -> None:
    result = project.run(
        "run_distribute.sh", "one.json", "job.yaml", "[4,6)", "finetune", "2", "--load_checkpoint", "a b"
    )
    assert result.returncode == 0, result.stderr
    assert "lists devices 0, 1, this job uses 4-5" in result.stderr
    for rank in range(2):
        record = project.record(rank)
        assert (record["env"]["RANK_ID"], record["env"]["DEVICE_ID"]) == (str(rank), str(4 + rank))
        assert record["argv"][-4:] == ["--run_mode", "finetune", "--load_checkpoint", "a b"]


def test_with_npus_the_rank_table_joins_the_ranks(project: Project) -> None:
    around = {"MS_ROLE": "MS_WORKER", "MS_WORKER_NUM": "9", "MS_NODE_ID": "7"}
    result = project.run("run_distribute.sh", "one.json", "job.yaml", "[0,2)", "eval", TRANSFORM_CKPT_NPU="1", **around)
    assert result.returncode == 0, result.stderr
    assert project.started() == ["0", "1"]
    assert not [key for key in project.record(1)["env"] if key.startswith("MS_")]
    assert project.record(1)["env"]["RANK_TABLE_FILE"] == str(project.work / "two.json").replace("two", "one")


def test_several_nodes(project: Project) -> None:
    """The range holds ranks, devices count from 0; the scheduler is on the node of rank 0."""
    for devices, ranks in (("[2,4)", [2, 3]), ("[0,2)", [0, 1])):
        result = project.run("run_distribute.sh", "two.json", "job.yaml", devices, "train", "4")
        assert result.returncode == 0, result.stderr
        for device, rank in enumerate(ranks):
            environ = project.record(rank)["env"]
            found = [environ[key] for key in ("RANK_ID", "DEVICE_ID", "RANK_SIZE", "MS_NODE_ID", "MS_WORKER_NUM")]
            assert found == [str(rank), str(device), "4", str(rank), "4"]
            assert (environ["MS_SCHED_HOST"], environ["MS_SCHED_PORT"]) == ("127.0.0.1", "8118")
        assert ("scheduler" in project.started()) == (ranks[0] == 0)


def test_the_place_of_the_scheduler_can_be_chosen(project: Project) -> None:
    more = {"MS_SCHED_HOST": "127.0.0.9", "MS_SCHED_PORT": "9999"}
    result = project.run("run_distribute.sh", "two.json", "job.yaml", "[2,4)", "train", "4", **more)
    assert result.returncode == 0, result.stderr
    environ = project.record(2)["env"]
    assert {key: environ[key] for key in more} == more


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["one.json", "[0,2)", "predict", "hello you"], ["--predict_data", "hello you"]),
        (["one.json", "[0,2)", "predict", "2", "hello you"], ["--predict_data", "hello you"]),
        (["two.json", "[0,2)", "predict", "4", "hi", "--seed", "1"], ["--predict_data", "hi", "--seed", "1"]),
        (["one.json", "[0,2)", "predict", "--seed", "1"], ["--run_mode", "predict", "--seed", "1"]),
    ],
)
def test_predict_data(project: Project, arguments: list[str], said: list[str]) -> None:
    result = project.run("run_distribute.sh", arguments[0], "job.yaml", *arguments[1:])
    assert result.returncode == 0, result.stderr
    argv = project.record(0)["argv"]
    assert argv[-len(said) :] == said


def test_standing_in_scripts_means_the_project(project: Project) -> None:
    shutil.copy(project.work / "one.json", project.root)
    (project.root / "configs").mkdir()
    (project.root / "configs" / "job.yaml").touch()
    cwd = project.root / "scripts"
    result = project.run("run_distribute.sh", "../one.json", "configs/job.yaml", "[0,2)", "train", cwd=cwd)
    assert result.returncode == 0, result.stderr
    assert project.record(0)["argv"][1] == str(project.root / "configs" / "job.yaml")
    assert (project.root / "output" / "log" / "rank_1" / "mindformer.log").exists()


def test_outputs_go_where_local_default_path_says(project: Project) -> None:
    result = project.run("run_distribute.sh", "one.json", "job.yaml", "[0,2)", "train", LOCAL_DEFAULT_PATH="here")
    assert result.returncode == 0, result.stderr
    assert project.record(0)["env"]["LOCAL_DEFAULT_PATH"] == str(project.work / "here")
    assert (project.work / "here" / "log" / "rank_0" / "mindformer.log").exists()
    assert not (project.work / "output").exists()


@pytest.mark.parametrize(
    ("ranks", "code", "said"),
    [
        ({"0": "sleep", "1": "exit 3", "scheduler": "sleep"}, 3, "rank 1 ended with exit code 3"),
        ({"0": "exit 255", "1": "sleep", "scheduler": "sleep"}, 255, "rank 0 ended with exit code 255"),
        ({"0": "kill", "1": "sleep", "scheduler": "sleep"}, 137, "rank 0 was killed by SIGKILL"),
        ({"0": "sleep", "1": "sleep", "scheduler": "exit 1"}, 1, "the scheduler ended with exit code 1"),
    ],
)
def test_the_first_failure_ends_all(project: Project, ranks: dict[str, str], code: int, said: str) -> None:
    begin = time.monotonic()
    result = project.run("run_distribute.sh", "one.json", "job.yaml", "[0,2)", "train", ranks=ranks)
    assert result.returncode == code
    assert time.monotonic() - begin < 15
    assert said in result.stderr
    assert project.started() == ["0", "1", "scheduler"]
    project.assert_nothing_runs()
    if code != 137:
        shown = [line for line in result.stderr.splitlines() if line.startswith("  | ")]
        assert shown == [f"  | line {n}" for n in range(10, 40)], "the last 30 lines of the log"
    assert "done:" not in result.stdout


@pytest.mark.slow
def test_a_rank_that_ignores_sigterm_is_killed(project: Project) -> None:
    ranks = {"0": "stubborn", "1": "exit 3"}
    begin = time.monotonic()
    result = project.run("run_distribute.sh", "one.json", "job.yaml", "[0,2)", "train", ranks=ranks)
    assert result.returncode == 3
    assert 9 < time.monotonic() - begin < 30
    project.assert_nothing_runs()


def test_a_scheduler_that_stays_is_ended(project: Project) -> None:
    result = project.run("run_distribute.sh", "one.json", "job.yaml", "[0,2)", "train", ranks={"scheduler": "sleep"})
    assert result.returncode == 0, result.stderr
    assert "done:" in result.stdout
    project.assert_nothing_runs()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_signals_end_all_ranks(project: Project, number: int, code: int) -> None:
    ranks = dict.fromkeys(("0", "1", "scheduler"), "sleep")
    script = str(project.root / "scripts" / "run_distribute.sh")
    # whatever ignores signals around this test, the script shall not
    command = ["/usr/bin/env", "--default-signal", BASH, script, "one.json", "job.yaml", "[0,2)", "train"]
    with subprocess.Popen(
        command, cwd=project.work, env=project.environ(ranks), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        deadline = time.monotonic() + 30
        while len(project.started()) < 3 and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(number)
        process.communicate(timeout=30)
    assert process.returncode == code
    assert len(project.started()) == 3
    project.assert_nothing_runs()


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ([], 2, "usage:"),
        (["one.json", "job.yaml", "[0,2)"], 2, "usage:"),
        (["one.json", "job.yaml", "[0,2)", "fly"], 2, "STATUS is 'fly'"),
        (["one.json", "job.yaml", "[0,2)", "train", "data"], 2, "unexpected argument 'data'"),
        (["one.json", "job.yaml", "[2,2)", "train"], 2, "holds no device"),
        (["one.json", "job.yaml", "all", "train"], 2, "expected [first,end)"),
        (["none.json", "job.yaml", "[0,2)", "train"], 3, "none.json: not found"),
        (["job.yaml", "job.yaml", "[0,2)", "train"], 3, "is not JSON"),
        (["one.json", "none.yaml", "[0,2)", "train"], 3, "none.yaml: not found"),
        (["one.json", "job.yaml", "[0,4)", "train"], 3, "holds 2 ranks of 1 servers, but the job is the 4 devices"),
        (["two.json", "job.yaml", "[0,2)", "train"], 3, "give RANK_SIZE"),
        (["two.json", "job.yaml", "[1,3)", "train", "4"], 3, "are not those of one server"),
    ],
)
def test_run_distribute_refuses(project: Project, arguments: list[str], code: int, said: str) -> None:
    result = project.run("run_distribute.sh", *arguments)
    assert (result.returncode, said in result.stderr) == (code, True), result.stderr
    assert "Traceback" not in result.stderr
    assert project.started() == []
    assert not (project.work / "output").exists()


# ------------------------------------------------------------------------------------------------ msrun_launcher.sh

DEFAULTS = ["--worker_num=8", "--local_worker_num=8", "--master_port=8118"]
TAIL = ["--log_dir=output/msrun_log", "--join=False", "--cluster_time_out=7200"]


@pytest.fixture
def msrun(project: Project) -> Project:
    """The project with a .venv whose msrun records its arguments."""
    folder = project.root / ".venv" / "bin"
    folder.mkdir(parents=True)
    (folder / "msrun").write_text(MSRUN)
    (folder / "msrun").chmod(0o755)
    for name in ("python", "python3"):
        (folder / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
        (folder / name).chmod(0o755)
    return project


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        ([], [*DEFAULTS, *TAIL]),
        (["4"], ["--worker_num=4", "--local_worker_num=4", "--master_port=8118", *TAIL]),
        (
            ["4", "9000", "logs", "True", "300"],
            "--worker_num=4 --local_worker_num=4 --master_port=9000 --log_dir=logs --join=True "
            "--cluster_time_out=300".split(),
        ),
        (
            ["8", "4", "10.0.0.1", "9000", "1", "my_logs", "false", "-1"],
            "--worker_num=8 --local_worker_num=4 --master_port=9000 --log_dir=my_logs --join=False "
            "--cluster_time_out=-1 --master_addr=10.0.0.1 --node_rank=1".split(),
        ),
        (["8", "8", "10.0.0.1", "8118", "1", "output/msrun_log", "False", "7200"], [*DEFAULTS, *TAIL]),
    ],
)
def test_positional_arguments_become_msruns_options(msrun: Project, arguments: list[str], options: list[str]) -> None:
    result = msrun.run("msrun_launcher.sh", "run_mindformer.py --config 'a b' --run_mode train", *arguments, PYTHON="")
    assert result.returncode == 0, result.stderr
    record = msrun.record("msrun")
    script = str(msrun.root / "run_mindformer.py")
    assert record["argv"] == [*options, script, "--config", "a b", "--run_mode", "train"]
    assert record["python"] == str(msrun.root / ".venv" / "bin" / "python")
    assert record["env"]["PYTHONPATH"].split(":")[0] == str(msrun.root)


def test_cores_are_bound_where_npus_are(msrun: Project) -> None:
    msrun.run("msrun_launcher.sh", "run_mindformer.py", "2", PYTHON="", TRANSFORM_CKPT_NPU="1", MF_LOG_SUFFIX="x")
    argv = msrun.record("msrun")["argv"]
    assert "--bind_core=True" in argv
    assert "--log_dir=output/msrun_log_x" in argv


def test_a_script_beside_the_user_comes_first(msrun: Project) -> None:
    (msrun.work / "run_mindformer.py").touch()
    for order in ("run_mindformer.py", "python run_mindformer.py --text '$HOME * \"q\"'"):
        result = msrun.run("msrun_launcher.sh", order, "2", PYTHON="")
        assert result.returncode == 0, result.stderr
        assert "run_mindformer.py" in msrun.record("msrun")["argv"]
    assert msrun.record("msrun")["argv"][-1] == '$HOME * "q"'


def test_msruns_exit_code_is_ours(msrun: Project) -> None:
    order = "run_mindformer.py"
    assert msrun.run("msrun_launcher.sh", order, "2", "8118", "logs", "True", "9", PYTHON="", CODE="7").returncode == 7


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ([], 2, "0 arguments, expected 1, 2, 6 or 9"),
        (["run_mindformer.py", "2", "8118"], 2, "3 arguments"),
        (["run_mindformer.py", "x"], 2, "WORKER_NUM is 'x' and not a number"),
        (["run_mindformer.py", "2", "8118", "logs", "maybe", "9"], 2, "JOIN is 'maybe'"),
        (["run_mindformer.py", "2", "8118", "logs", "True", "soon"], 2, "CLUSTER_TIME_OUT is 'soon'"),
        (["run_mindformer.py", "2", "4", "h", "8118", "0", "logs", "True", "9"], 2, "LOCAL_WORKER 4 is more than"),
        (["run_mindformer.py --text 'open", "2"], 2, "a quote that is not closed"),
        (["", "2"], 2, "EXECUTE_ORDER is empty"),
        (["other.py", "2"], 3, "other.py: not found"),
    ],
)
def test_msrun_launcher_refuses(msrun: Project, arguments: list[str], code: int, said: str) -> None:
    result = msrun.run("msrun_launcher.sh", *arguments, PYTHON="")
    assert (result.returncode, said in result.stderr) == (code, True), result.stderr
    assert ("usage:" in result.stderr) == (code == 2)
    assert msrun.started() == []
