"""Rank tables of HCCL, version 1.0: read strictly, make, merge, and check against a job.

The layout (all values are strings) is that of the Ascend documentation's rank table v1.0 and of MindFormers' former
hccl_tools.py: servers in a list, each with its devices, each device with its rank.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from transform_ckpt.errors import InputError, Problems, UsageError, first_twice, rank_ranges
from transform_ckpt.formats.files import open_binary

NPUS = "/dev/davinci[0-9]*"
"""Pattern of the device files of Ascend."""

VERSION, COMPLETED = "1.0", "completed"
MAX_NBYTES = 64 << 20
_RANGE = re.compile(r"\[?(\d+),(\d+)[\])]?", re.ASCII)


@dataclass(frozen=True, slots=True)
class Device:
    """One device; `more` holds keys that only other programs know."""

    device_id: str
    device_ip: str
    rank: int
    more: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Server:
    """One server with its devices as listed; `more` holds host_nic_ip and keys that only other programs know."""

    server_id: str
    devices: tuple[Device, ...]
    more: Mapping[str, Any] = field(default_factory=lambda: {"host_nic_ip": "reserve"})

    @property
    def ranks(self) -> list[int]:
        """Ranks of this server, sorted."""
        return sorted(device.rank for device in self.devices)


@dataclass(frozen=True, slots=True)
class RankTable:
    """Servers in the order of the file."""

    servers: tuple[Server, ...]

    @property
    def world(self) -> int:
        """Ranks of all servers."""
        return sum(len(server.devices) for server in self.servers)

    def dumps(self) -> str:
        """The file's text."""
        servers = [
            {
                "server_id": server.server_id,
                "device": [
                    {"device_id": d.device_id, "device_ip": d.device_ip, "rank_id": str(d.rank), **d.more}
                    for d in server.devices
                ],
                **server.more,
            }
            for server in self.servers
        ]
        table = {"version": VERSION, "server_count": str(len(servers)), "server_list": servers, "status": COMPLETED}
        return json.dumps(table, indent=4) + "\n"


def parse_range(text: str, what: str = "device range") -> range:
    """`[0,8)`; `[0,8]` and `0,8` mean the same 8 devices, as in MindFormers' documents up to r1.2."""
    match = _RANGE.fullmatch("".join(text.split()))
    if match is None:
        raise UsageError(f"{what} {text!r}: expected [first,end), for example [0,8) for 8 devices")
    found = range(int(match[1]), int(match[2]))
    if not found:
        raise UsageError(f"{what} {text!r} holds no device: expected first < end, for example [0,8) for 8 devices")
    return found


def single_server(server_id: str, device_ips: Mapping[str, str]) -> RankTable:
    """The table of one server: device id -> device ip, ranks in this order."""
    devices = tuple(Device(name, ip, rank) for rank, (name, ip) in enumerate(device_ips.items()))
    return RankTable((Server(server_id, devices),))


def read(path: str) -> RankTable:
    """A rank table from its file; InputError names every fault."""
    with open_binary(path, "reading the rank table") as (fd, nbytes):
        data = os.pread(fd, min(nbytes, MAX_NBYTES), 0)
    try:
        document = json.loads(data)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise InputError(
            f"{path}: is not JSON ({error}): expected a rank table, as tools/hccl_tools.py makes"
        ) from None
    return parse(document, path)


def parse(document: Any, where: str) -> RankTable:
    """A rank table from JSON values; `where` names it in messages."""
    problems = Problems()
    for key, wanted in (("version", VERSION), ("status", COMPLETED)):
        found = document.get(key) if isinstance(document, dict) else None
        if found != wanted:
            problems.add(f"{where}: {key} is {found!r}, expected {wanted!r}: only rank tables of version 1.0 are read")
    problems.raise_if_any(InputError)
    servers = tuple(_servers(document, where, problems))
    problems.raise_if_any(InputError)
    table = RankTable(servers)
    if document.get("server_count") != str(len(servers)):
        problems.add(
            f"{where}: server_count is {document.get('server_count')!r}, but {len(servers)} servers are listed"
        )
    if twice := first_twice(server.server_id for server in servers):
        problems.add(f"{where}: server {twice} is listed twice")
    ranks = sorted(device.rank for server in servers for device in server.devices)
    if ranks != list(range(table.world)):
        problems.add(f"{where}: ranks are {rank_ranges(ranks)}, expected each of 0-{table.world - 1} once")
    problems.raise_if_any(InputError)
    return table


def _servers(document: Mapping[str, Any], where: str, problems: Problems) -> Iterator[Server]:
    for number, entry in enumerate(_objects(document, "server_list", where, problems)):
        name = f"{where}: server_list[{number}]"
        server_id = _text(entry, "server_id", name, problems)
        devices = []
        for position, item in enumerate(_objects(entry, "device", name, problems)):
            place = f"{name}.device[{position}]"
            device_id, ip = (_text(item, key, place, problems) for key in ("device_id", "device_ip"))
            rank = _text(item, "rank_id", place, problems)
            if rank and not (rank.isascii() and rank.isdigit()):
                problems.add(f"{place}: rank_id is {rank!r}, expected a number")
                continue
            devices.append(Device(device_id, ip, int(rank or 0), _rest(item, "device_id", "device_ip", "rank_id")))
        if twice := first_twice(device.device_id for device in devices):
            problems.add(f"{where}: server {server_id}: device_id {twice} is listed twice")
        yield Server(server_id, tuple(devices), _rest(entry, "server_id", "device"))


def _objects(holder: Mapping[str, Any], key: str, where: str, problems: Problems) -> list[Mapping[str, Any]]:
    """A list of objects that is not empty."""
    found = holder.get(key)
    if isinstance(found, list) and found and all(isinstance(item, dict) for item in found):
        return found
    problems.add(f"{where}: {key} is missing or empty, expected a list of objects")
    return []


def _text(holder: Mapping[str, Any], key: str, where: str, problems: Problems) -> str:
    found = holder.get(key)
    if isinstance(found, str) and found:
        return found
    problems.add(f"{where}: {key} is {found!r}, expected a string (all values of a rank table are strings)")
    return ""


def _rest(holder: Mapping[str, Any], *known: str) -> dict[str, Any]:
    return {key: value for key, value in holder.items() if key not in known}


def merge(tables: Mapping[str, RankTable]) -> tuple[RankTable, list[str]]:
    """One table of several (name -> table): servers in the order given, ranks renumbered from 0; and notes."""
    problems = Problems()
    owner: dict[str, str] = {}
    for name, table in tables.items():
        listed = [device.rank for server in table.servers for device in server.devices]
        if listed != sorted(listed):
            problems.add(
                f"{name}: ranks are not listed in order, so renumbering would mix them: sort servers and devices"
            )
        for server in table.servers:
            if server.server_id in owner:
                problems.add(
                    f"{name}: server {server.server_id} is already in {owner[server.server_id]}: "
                    "give each server once (hccl_tools.py --server_ip sets its address)"
                )
            owner.setdefault(server.server_id, name)
    problems.raise_if_any(InputError)
    servers: list[Server] = []
    first = 0
    for server in (server for table in tables.values() for server in table.servers):
        devices = tuple(replace(device, rank=first + i) for i, device in enumerate(server.devices))
        servers.append(replace(server, devices=devices))
        first += len(devices)
    counts = {server.server_id: len(server.devices) for server in servers}
    unequal = len(set(counts.values())) > 1
    text = ", ".join(f"{name}: {count}" for name, count in counts.items())
    notes = [f"servers have unequal numbers of devices ({text})"] if unequal else []
    return RankTable(tuple(servers)), notes


@dataclass(frozen=True, slots=True)
class Job:
    """What one call of run_distribute.sh starts on this node."""

    numbers: range
    """The range as given: device numbers on a single node, ranks on several."""
    world: int
    several: bool
    """Several nodes: the range holds ranks, devices count from 0; else it holds devices, ranks count from 0."""
    host: str
    """The server of rank 0."""


def job(table: RankTable, where: str, numbers: range, rank_size: int | None) -> tuple[Job, list[str]]:
    """Check that a table fits a device range and a RANK_SIZE, as MindFormers' run_distribute.sh means them; and notes.

    Up to r1.2 four arguments mean one node: devices of the range, ranks from 0.  With RANK_SIZE the range holds ranks
    and devices count from 0; a RANK_SIZE that is the number of devices is one node.
    """
    several = rank_size not in (None, len(numbers))
    world = len(numbers) if rank_size is None else rank_size
    given = f"RANK_SIZE {world}" if several else f"the {len(numbers)} devices [{numbers.start},{numbers.stop})"
    if table.world != world:
        hint = "make a table of this job's devices, or give RANK_SIZE, the ranks of all nodes, as fifth argument"
        raise InputError(
            f"{where}: holds {table.world} ranks of {len(table.servers)} servers, but the job is {given}: {hint}"
        )
    host = next(server.server_id for server in table.servers if 0 in server.ranks)
    if several:
        _one_server(table, where, numbers)
        return Job(numbers, world, several, host), []
    if len(table.servers) > 1:
        raise InputError(
            f"{where}: its {world} ranks are on {len(table.servers)} servers, but the device range covers them all, "
            "which means a single node: give the ranks of this node, and RANK_SIZE"
        )
    ids = sorted(device.device_id for device in table.servers[0].devices)
    notes = []
    if ids != sorted(map(str, numbers)):
        notes.append(
            f"{where} lists devices {', '.join(ids)}, this job uses {rank_ranges(numbers)}: "
            "right only where device numbers are logical (in a container)"
        )
    return Job(numbers, world, several, host), notes


def _one_server(table: RankTable, where: str, ranks: Sequence[int]) -> None:
    """The range is all ranks of one server."""
    if any(server.ranks == list(ranks) for server in table.servers):
        return
    servers = "; ".join(f"{server.server_id}: ranks {rank_ranges(server.ranks)}" for server in table.servers)
    raise InputError(
        f"{where}: ranks {rank_ranges(ranks)} are not those of one server ({servers}): "
        "with RANK_SIZE the range holds the ranks of this node"
    )
