from __future__ import annotations

import copy
import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from transform_ckpt import rank_table
from transform_ckpt.errors import InputError, UsageError

Tool = Callable[..., subprocess.CompletedProcess[str]]

# the layout of the Ascend documents, written out by hand
ONE_SERVER = {
    "version": "1.0",
    "server_count": "1",
    "server_list": [
        {
            "server_id": "10.0.0.1",
            "device": [
                {"device_id": "0", "device_ip": "192.1.1.6", "rank_id": "0"},
                {"device_id": "1", "device_ip": "192.2.1.6", "rank_id": "1"},
            ],
            "host_nic_ip": "reserve",
        }
    ],
    "status": "completed",
}


def tables(server_ids: st.SearchStrategy[str]) -> st.SearchStrategy[rank_table.RankTable]:
    texts = st.text(min_size=1, max_size=6)
    devices = st.lists(st.tuples(texts, texts), min_size=1, max_size=5, unique_by=lambda pair: pair[0])
    servers = st.lists(st.tuples(server_ids, devices), min_size=1, max_size=4, unique_by=lambda pair: pair[0])

    def build(listed: list[tuple[str, list[tuple[str, str]]]]) -> rank_table.RankTable:
        ranks = iter(range(100))
        return rank_table.RankTable(
            tuple(
                rank_table.Server(name, tuple(rank_table.Device(i, ip, next(ranks)) for i, ip in held))
                for name, held in listed
            )
        )

    return servers.map(build)


@given(tables(st.text(min_size=1, max_size=6)))
def test_what_is_written_is_read_again(table: rank_table.RankTable) -> None:
    document = json.loads(table.dumps())
    assert rank_table.parse(document, "x") == table
    leaves = [document["version"], document["server_count"], document["status"]]
    leaves += [v for s in document["server_list"] for d in s["device"] for v in d.values()]
    assert all(isinstance(leaf, str) for leaf in leaves)


@given(tables(st.sampled_from(["a", "b", "c"])), tables(st.sampled_from(["x", "y", "z"])))
def test_merging_keeps_order_and_counts_ranks(one: rank_table.RankTable, other: rank_table.RankTable) -> None:
    merged, _ = rank_table.merge({"one": one, "other": other})
    wanted = [(s.server_id, d.device_id, d.device_ip) for t in (one, other) for s in t.servers for d in s.devices]
    assert [(s.server_id, d.device_id, d.device_ip) for s in merged.servers for d in s.devices] == wanted
    assert [d.rank for s in merged.servers for d in s.devices] == list(range(one.world + other.world))
    assert rank_table.parse(json.loads(merged.dumps()), "merged") == merged


@pytest.mark.parametrize("text", ["[0,8)", "[0,8]", "0,8", " [0, 8) "])
def test_ranges_as_the_documents_write_them(text: str) -> None:
    assert rank_table.parse_range(text) == range(8)


@pytest.mark.parametrize("text", ["", "8", "(0,8)", "[8,8)", "[8,4)", "[a,b)", "[0,8,2)", "[-1,2)", "[٠,8)"])
def test_other_ranges_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"for example \[0,8\)"):
        rank_table.parse_range(text)


def changed(path: str, value: Any) -> dict[str, Any]:
    """ONE_SERVER with one value replaced, or removed (None); `path` is dotted."""
    document: Any = copy.deepcopy(ONE_SERVER)
    *way, last = [int(word) if word.isdigit() else word for word in path.split(".")]
    holder = document
    for word in way:
        holder = holder[word]
    if value is None:
        del holder[last]
    else:
        holder[last] = value
    return document


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("version", "1.2", "version is '1.2'"),
        ("version", 1.0, "version is 1.0"),
        ("status", "initializing", "status is 'initializing'"),
        ("server_count", "2", "server_count is '2', but 1 servers"),
        ("server_list", None, "server_list is missing"),
        ("server_list", [], "server_list is missing or empty"),
        ("server_list.0.device", [1], r"server_list\[0\]: device is missing"),
        ("server_list.0.server_id", None, "server_id is None"),
        ("server_list.0.device.1.device_ip", "", "device_ip is ''"),
        ("server_list.0.device.1.rank_id", 1, r"device\[1\]: rank_id is 1, expected a string"),
        ("server_list.0.device.1.rank_id", "one", "rank_id is 'one'"),
        ("server_list.0.device.1.rank_id", "0", "ranks are 0, expected each of 0-1 once"),
        ("server_list.0.device.1.rank_id", "2", "ranks are 0, 2, expected"),
        ("server_list.0.device.1.device_id", "0", "device_id 0 is listed twice"),
    ],
)
def test_faults_are_named(path: str, value: Any, said: str) -> None:
    with pytest.raises(InputError, match=rf"t\.json: .*{said}|t\.json: {said}"):
        rank_table.parse(changed(path, value), "t.json")


def test_a_list_is_no_rank_table() -> None:
    with pytest.raises(InputError, match="version is None"):
        rank_table.parse([ONE_SERVER], "t.json")


def test_a_server_listed_twice_is_refused() -> None:
    twice = changed("server_list", ONE_SERVER["server_list"] * 2)
    with pytest.raises(InputError, match=r"server 10\.0\.0\.1 is listed twice"):
        rank_table.parse({**twice, "server_count": "2"}, "t.json")


def test_keys_of_other_programs_are_kept() -> None:
    document = changed("server_list.0.device.0.super_device_id", "9")
    document["server_list"][0]["server_name"] = "node"
    assert json.loads(rank_table.parse(document, "x").dumps()) == document


# ------------------------------------------------------------------------------------------------ a job's range


def servers(*counts: int) -> rank_table.RankTable:
    parts = {
        f"{n}": rank_table.single_server(f"10.0.0.{n}", {str(i): f"192.0.{n}.{i}" for i in range(count)})
        for n, count in enumerate(counts)
    }
    return rank_table.merge(parts)[0]


@pytest.mark.parametrize("rank_size", [None, 4])
def test_one_node(rank_size: int | None) -> None:
    job, notes = rank_table.job(servers(4), "t", range(4), rank_size)
    assert (job.world, job.several, job.host, notes) == (4, False, "10.0.0.0", [])


def test_devices_that_are_not_listed_get_a_note() -> None:
    _, notes = rank_table.job(servers(4), "t", range(4, 8), None)
    assert len(notes) == 1
    assert "lists devices 0, 1, 2, 3, this job uses 4-7" in notes[0]


def test_several_nodes() -> None:
    table = servers(4, 2)
    for numbers in (range(4), range(4, 6)):
        job, _ = rank_table.job(table, "t", numbers, 6)
        assert (job.world, job.several, job.host) == (6, True, "10.0.0.0")


@pytest.mark.parametrize(
    ("counts", "numbers", "rank_size", "said"),
    [
        ((8,), range(4), None, "holds 8 ranks of 1 servers, but the job is the 4 devices"),
        ((4, 4), range(4), None, "give RANK_SIZE"),
        ((4, 4), range(4), 16, "holds 8 ranks of 2 servers, but the job is RANK_SIZE 16"),
        ((4, 4), range(8), 8, "means a single node"),
        ((4, 4), range(2), 8, "ranks 0-1 are not those of one server"),
        ((4, 4), range(2, 6), 8, "ranks 2-5 are not those of one server"),
    ],
)
def test_a_table_of_another_job_is_refused(
    counts: tuple[int, ...], numbers: range, rank_size: int | None, said: str
) -> None:
    with pytest.raises(InputError, match=said):
        rank_table.job(servers(*counts), "t", numbers, rank_size)


# ------------------------------------------------------------------------------------------------ command lines


@pytest.fixture
def tool(repo_root: Path, tmp_path: Path) -> Tool:
    """Run a script of tools/ in an empty directory, without NPUs unless a test says otherwise."""

    def call(name: str, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
        env = {**os.environ, "TRANSFORM_CKPT_NPU": "0", **environ}
        command = [sys.executable, str(repo_root / "tools" / name), *arguments]
        return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)

    return call


def test_hccl_tools_writes_the_layout_of_the_documents(tool: Tool, tmp_path: Path) -> None:
    conf = tmp_path / "hccn.conf"
    conf.write_text("address_0=192.1.1.6\nnetmask_0=255.255.255.0\naddress_1 = 192.2.1.6\n")
    result = tool("hccl_tools.py", "--device_num", "[0,2)", "--server_ip", "10.0.0.1", "--hccn_conf", str(conf))
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert json.loads((tmp_path / "hccl_2p_01_10.0.0.1.json").read_text()) == ONE_SERVER


@pytest.mark.parametrize("text", ["[0,8)", "[0,8]"])
def test_hccl_tools_without_npus(tool: Tool, tmp_path: Path, text: str) -> None:
    arguments = ("--device_num", text, "--server_ip", "127.0.0.1", "--hccn_conf", str(tmp_path / "absent"))
    result = tool("hccl_tools.py", *arguments, "--json", PATH="/nowhere")
    assert result.returncode == 0, result.stderr
    assert "good for a run on the CPU only" in result.stderr
    path = tmp_path / "hccl_8p_01234567_127.0.0.1.json"
    assert json.loads(result.stdout) == {"ok": True, "path": str(path), "servers": 1, "ranks": 8}
    ips = [device.device_ip for device in rank_table.read(str(path)).servers[0].devices]
    assert len(set(ips)) == 8
    assert all(ip.startswith("127.0.0.") for ip in ips)


def test_hccl_tools_with_npus_needs_addresses(tool: Tool, tmp_path: Path) -> None:
    arguments = ("--server_ip", "10.0.0.1", "--hccn_conf", str(tmp_path / "hccn.conf"))
    result = tool("hccl_tools.py", *arguments, TRANSFORM_CKPT_NPU="1", PATH="/nowhere")
    assert result.returncode == 3
    assert "device addresses are unknown" in result.stderr
    (tmp_path / "hccn.conf").write_text("address_0=192.1.1.6\n")
    result = tool("hccl_tools.py", "--device_num", "[0,2)", *arguments, TRANSFORM_CKPT_NPU="1")
    assert result.returncode == 3
    assert "no address of device 1" in result.stderr
    assert not list(tmp_path.glob("*.json"))


def test_hccl_tools_asks_hccn_tool_when_there_is_no_conf(tool: Tool, tmp_path: Path) -> None:
    fake = tmp_path / "bin" / "hccn_tool"
    fake.parent.mkdir()
    fake.write_text('#!/bin/sh\necho "ipaddr:192.0.0.$2"\necho "netmask:255.255.255.0"\n')
    fake.chmod(fake.stat().st_mode | stat.S_IXUSR)
    arguments = ("--device_num", "[0,2)", "--visible_devices", "6,7", "--server_ip", "10.0.0.1")
    path = f"{fake.parent}:{os.environ['PATH']}"
    result = tool("hccl_tools.py", *arguments, "--hccn_conf", "absent", TRANSFORM_CKPT_NPU="1", PATH=path)
    assert result.returncode == 0, result.stderr
    (server,) = rank_table.read(str(tmp_path / "hccl_2p_01_10.0.0.1.json")).servers
    assert [(d.device_id, d.device_ip, d.rank) for d in server.devices] == [
        ("6", "192.0.0.6", 0),
        ("7", "192.0.0.7", 1),
    ]


def test_hccl_tools_takes_its_address_from_the_host_name(tool: Tool, tmp_path: Path) -> None:
    result = tool("hccl_tools.py", "--device_num", "[0,1)", "--hccn_conf", "absent", PATH="/nowhere")
    assert result.returncode == 0, result.stderr
    (path,) = tmp_path.glob("hccl_1p_0_*.json")
    (server,) = rank_table.read(str(path)).servers
    assert path.name == f"hccl_1p_0_{server.server_id}.json"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--device_num", "[3,6)"], "two groups"),
        (["--device_num", "[0,6)"], "two groups"),
        (["--device_num", "[0,9)"], "has devices 0-7"),
        (["--device_num", "all"], "expected [first,end)"),
        (["--device_num", "[0,4)", "--visible_devices", "4,5"], "lists 2 devices"),
        (["--device_num", "[0,2)", "--visible_devices", "4,4"], "expected different numbers"),
        (["--server_ip", "a/b"], "expected an address"),
        (["--devices", "4"], "wrong flags"),
    ],
)
def test_hccl_tools_refuses(tool: Tool, tmp_path: Path, arguments: list[str], said: str) -> None:
    result = tool("hccl_tools.py", *arguments, "--hccn_conf", "absent")
    assert result.returncode == 2
    assert said in result.stderr
    assert "Traceback" not in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("arguments", [["--device_num", "[0,16)"], ["--device_num", "[8,16)"]])
def test_hccl_tools_of_sixteen_devices(tool: Tool, tmp_path: Path, arguments: list[str]) -> None:
    result = tool(
        "hccl_tools.py", *arguments, "--device_num_per_node", "16", "--server_ip", "h", "--hccn_conf", "absent"
    )
    assert result.returncode == 0, result.stderr


def write_server(folder: Path, number: int, count: int) -> str:
    ips = {str(i): f"192.0.{number}.{i}" for i in range(count)}
    name = f"server{number}.json"
    (folder / name).write_text(rank_table.single_server(f"10.0.0.{number}", ips).dumps())
    return name


def test_merge_hccl(tool: Tool, tmp_path: Path) -> None:
    names = [write_server(tmp_path, number, 2) for number in (2, 1)]
    result = tool("merge_hccl.py", *names, "--json")
    assert result.returncode == 0, result.stderr
    document = json.loads((tmp_path / "hccl_2s_4p.json").read_text())
    assert document["server_count"] == "2"
    assert [server["server_id"] for server in document["server_list"]] == ["10.0.0.2", "10.0.0.1"]
    assert [d["rank_id"] for server in document["server_list"] for d in server["device"]] == ["0", "1", "2", "3"]
    assert json.loads(result.stdout)["servers"] == 2
    assert result.stderr == ""


def test_merge_hccl_notes_unequal_servers(tool: Tool, tmp_path: Path) -> None:
    result = tool("merge_hccl.py", write_server(tmp_path, 1, 2), write_server(tmp_path, 2, 4))
    assert result.returncode == 0
    assert "unequal numbers of devices (10.0.0.1: 2, 10.0.0.2: 4)" in result.stderr


def test_an_existing_table_is_replaced_on_request_only(tool: Tool, tmp_path: Path) -> None:
    names = [write_server(tmp_path, number, 1) for number in (1, 2)]
    out = tmp_path / "hccl_2s_2p.json"
    out.write_text("mine")
    result = tool("merge_hccl.py", *names)
    assert (result.returncode, out.read_text()) == (2, "mine")
    assert "--overwrite" in result.stderr
    assert tool("merge_hccl.py", *names, "--overwrite").returncode == 0
    assert rank_table.read(str(out)).world == 2
    assert tool("merge_hccl.py", *names).returncode == 0, "the same text again is no replacement"


def test_merge_hccl_refuses(tool: Tool, tmp_path: Path) -> None:
    good = write_server(tmp_path, 1, 2)
    (tmp_path / "again.json").write_text((tmp_path / good).read_text())
    (tmp_path / "new.json").write_text(json.dumps(changed("version", "1.2")))
    (tmp_path / "cut.json").write_text((tmp_path / good).read_text()[:-20])
    devices = list(reversed(ONE_SERVER["server_list"][0]["device"]))
    (tmp_path / "mixed.json").write_text(json.dumps(changed("server_list.0.device", devices)))
    (tmp_path / "latin.json").write_bytes(b'{"version": "\xff"}')
    cases = {
        "again.json": (3, "server 10.0.0.1 is already in server1.json"),
        "new.json": (3, "version is '1.2'"),
        "cut.json": (3, "is not JSON"),
        "latin.json": (3, "is not JSON"),
        "mixed.json": (3, "ranks are not listed in order"),
        "absent.json": (3, "not found"),
        good: (2, "a file is given twice"),
    }
    for name, (code, said) in cases.items():
        result = tool("merge_hccl.py", good, name)
        assert (result.returncode, said in result.stderr) == (code, True), (name, result.stderr)
        assert "Traceback" not in result.stderr
    assert not list(tmp_path.glob("hccl_*"))
