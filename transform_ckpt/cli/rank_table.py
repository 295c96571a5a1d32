"""The command lines of MindFormers' hccl_tools.py and merge_hccl.py, and the check that run_distribute.sh makes.

Flags, file names and the rule of device groups are those of MindFormers up to r1.2 (mindformers/tools/hccl_tools.py and
merge_hccl.py).  Unlike there, a file that exists is replaced with --overwrite only.
"""

from __future__ import annotations

import argparse
import glob
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence

import click

from transform_ckpt.cli import leave, run
from transform_ckpt.cli.dropin import run_tool
from transform_ckpt.errors import InputError, UsageError

HCCN_CONF = "/etc/hccn.conf"
GROUP = 4
WHOLE = (8, 16)
MULTI_NODE_PORT = 8118
"""msrun's default of --master_port (MindSpore 2.9.0, mindspore/parallel/cluster/run.py)."""


def has_npus(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether this machine has Ascend devices; TRANSFORM_CKPT_NPU=0 or 1 decides instead of looking."""
    from transform_ckpt.rank_table import NPUS

    said = environ.get("TRANSFORM_CKPT_NPU", "")
    return said == "1" if said else bool(glob.glob(NPUS))


def hccl_tools() -> int:
    """tools/hccl_tools.py: the rank table of this server."""
    parser = argparse.ArgumentParser(description="Write the rank table of this server into the current directory.")
    parser.add_argument("--device_num", default="[0,8)", help='devices, for example "[0,4)"; "[0,4]" means the same')
    parser.add_argument(
        "--visible_devices", help="physical number of each logical device (containers), comma separated"
    )
    parser.add_argument("--server_ip", help="this server's address; default: what its host name resolves to")
    parser.add_argument("--device_num_per_node", type=int, default=8, help="devices of this server")
    parser.add_argument("--hccn_conf", default=HCCN_CONF, help=f"file of device addresses, default {HCCN_CONF}")
    return run_tool(parser, _hccl_tools)


def _hccl_tools(arguments: argparse.Namespace) -> None:
    from transform_ckpt import rank_table

    numbers = rank_table.parse_range(arguments.device_num, "--device_num")
    _check_group(numbers, arguments.device_num_per_node)
    device_ids = _device_ids(numbers, arguments.visible_devices, arguments.device_num_per_node)
    server = arguments.server_ip or _own_address()
    if os.sep in server:
        raise UsageError(f"--server_ip {server}: expected an address, for example 10.0.0.1")
    table = rank_table.single_server(server, _device_ips(device_ids, arguments.hccn_conf))
    name = f"hccl_{len(numbers)}p_{''.join(map(str, numbers))}_{server}.json"
    _write(name, table.dumps(), 1, table.world, arguments)


def _check_group(numbers: range, per_node: int) -> None:
    if numbers.stop > per_node:
        raise UsageError(
            f"--device_num [{numbers.start},{numbers.stop}): this server has devices 0-{per_node - 1} "
            "(--device_num_per_node)"
        )
    whole = numbers.start == 0 and numbers.stop in WHOLE
    if numbers.start < GROUP < numbers.stop and not whole:
        raise UsageError(
            f"--device_num [{numbers.start},{numbers.stop}): devices 0-3 and 4-7 are two groups; a job uses part of "
            "one, or all devices: [0,8) or [0,16)"
        )


def _device_ids(numbers: range, visible: str | None, per_node: int) -> list[str]:
    """Physical numbers of logical devices."""
    listed = [word.strip() for word in visible.split(",")] if visible else [str(n) for n in range(per_node)]
    if not all(word.isascii() and word.isdigit() for word in listed) or len(set(listed)) < len(listed):
        raise UsageError(f"--visible_devices {visible}: expected different numbers, for example 4,5,6,7")
    if numbers.stop > len(listed):
        raise UsageError(
            f"--device_num [{numbers.start},{numbers.stop}): --visible_devices lists {len(listed)} devices, and "
            "--device_num counts among them from 0"
        )
    return [listed[number] for number in numbers]


def _own_address() -> str:
    """What the host name resolves to; on a machine without NPUs the loopback address will do."""
    name = socket.gethostname()
    try:
        return socket.gethostbyname(name)
    except OSError as error:
        if has_npus():
            raise InputError(f"host name {name} has no address ({error}): give --server_ip") from None
        _note(f"host name {name} has no address: server_id is 127.0.0.1; --server_ip sets another")
        return "127.0.0.1"


def _device_ips(device_ids: Sequence[str], conf: str) -> dict[str, str]:
    """Device id -> address: from hccn.conf, else hccn_tool; without NPUs a loopback address for each."""
    if os.path.exists(conf):
        found = _read_conf(conf)
        source = conf
    elif shutil.which("hccn_tool"):
        found = {name: _ask_hccn_tool(name) for name in device_ids}
        source = "hccn_tool"
    elif has_npus():
        raise InputError(f"{conf} and hccn_tool are both missing, so device addresses are unknown: give --hccn_conf")
    else:
        _note(f"no NPU here, and no {conf}: devices get loopback addresses, good for a run on the CPU only")
        return {name: f"127.0.0.{int(name) % 254 + 1}" for name in device_ids}
    missing = [name for name in device_ids if not found.get(name)]
    if missing:
        raise InputError(
            f"{source}: no address of device {', '.join(missing)}: expected address_N=..., check the devices with "
            "`hccn_tool -i N -ip -g`"
        )
    return {name: found[name] for name in device_ids}


def _read_conf(path: str) -> dict[str, str]:
    """Lines `address_0=192.168.1.6` of hccn.conf; others are of no concern here."""
    with open(path, encoding="utf-8", errors="replace") as stream:
        pairs = [line.strip().partition("=") for line in stream if line.strip().startswith("address_")]
    return {key.strip().removeprefix("address_"): value.strip() for key, _, value in pairs}


def _ask_hccn_tool(device_id: str) -> str:
    """First line of `hccn_tool -i N -ip -g` is `ipaddr:192.168.1.6`."""
    command = ["hccn_tool", "-i", device_id, "-ip", "-g"]  # found on PATH: drivers put it in various places
    answer = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    return answer.partition("\n")[0].partition(":")[2].strip()


def merge_hccl() -> int:
    """tools/merge_hccl.py: one rank table of several servers' tables."""
    parser = argparse.ArgumentParser(description="Merge rank tables: servers in the order given, ranks from 0.")
    parser.add_argument("files", nargs="+", metavar="FILE", help="rank tables of hccl_tools.py")
    return run_tool(parser, _merge_hccl)


def _merge_hccl(arguments: argparse.Namespace) -> None:
    from transform_ckpt import rank_table

    if len(set(arguments.files)) < len(arguments.files):
        raise UsageError("a file is given twice: give the table of each server once")
    merged, notes = rank_table.merge({path: rank_table.read(path) for path in arguments.files})
    for note in notes:
        _note(note)
    servers = len(merged.servers)
    _write(f"hccl_{servers}s_{merged.world}p.json", merged.dumps(), servers, merged.world, arguments)


def _write(name: str, text: str, servers: int, ranks: int, arguments: argparse.Namespace) -> None:
    """The table in the current directory, whole or not at all; the same text may be there already."""
    from transform_ckpt.destination import write_small

    path = os.path.join(os.getcwd(), name)
    data = text.encode()
    if os.path.lexists(path) and not (arguments.overwrite or _holds(path, data)):
        raise UsageError(f"{path}: exists and holds something else: --overwrite replaces it")
    temporary = f"{path}.partial"
    write_small(temporary, data)
    os.replace(temporary, path)
    if arguments.as_json:
        print(json.dumps({"ok": True, "path": path, "servers": servers, "ranks": ranks}))
    else:
        print(f"Completed: {path} ({servers} {'server' if servers == 1 else 'servers'}, {ranks} ranks)")


def _holds(path: str, data: bytes) -> bool:
    with open(path, "rb") as stream:
        return stream.read(len(data) + 1) == data


def _note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr)


def check() -> int:
    """For run_distribute.sh: TABLE RANGE [RANK_SIZE] -> `first end world several host port` on one line."""

    @click.command()
    @click.argument("table")
    @click.argument("numbers", metavar="RANGE")
    @click.argument("rank_size", required=False, type=click.IntRange(min=1))
    def command(table: str, numbers: str, rank_size: int | None) -> None:
        from transform_ckpt import rank_table

        devices = rank_table.parse_range(numbers)
        job, notes = rank_table.job(rank_table.read(table), table, devices, rank_size)
        for note in notes:
            _note(note)
        host, port = (_resolved(job.host), MULTI_NODE_PORT) if job.several else ("127.0.0.1", _free_port())
        print(devices.start, devices.stop, job.world, int(job.several), host, port)

    return run(None, command)


def _resolved(server_id: str) -> str:
    """A server's address; MindSpore's scheduler takes addresses only."""
    try:
        return socket.gethostbyname(server_id)
    except OSError as error:
        _note(
            f"server {server_id} has no address ({error}): without NPUs, set MS_SCHED_HOST to that of the first server"
        )
        return server_id


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port: int = server.getsockname()[1]
    return port


if __name__ == "__main__":
    leave(check())
