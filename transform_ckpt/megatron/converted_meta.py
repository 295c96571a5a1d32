"""What pt_meta/ knows of a converted checkpoint: layout, args, parameter maps; and which file is which rank's."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from strategy.megatron import directory_name
from transform_ckpt.errors import InputError
from transform_ckpt.formats import container_of, mindspore_dir, torch_zip
from transform_ckpt.formats.files import listing
from transform_ckpt.formats.torch_values import Namespace
from transform_ckpt.megatron import directory, map_files
from transform_ckpt.megatron.buckets import BufferMap
from transform_ckpt.megatron.directory import Place
from transform_ckpt.megatron.facts import Facts, facts_of
from transform_ckpt.megatron.map_files import MapKey
from transform_ckpt.megatron.pt_meta import args_name, read_layout

_MEGATRON_RANK = re.compile(r"mp_rank_(\d+)(?:_(\d+))?(?:_(\d+))?")


class ConvertedMeta:
    """`facts`: the layout; `recorded`: layout.json, None of another tool; `maps`: of the buffers, as far as there."""

    def __init__(self, path: str, template: str | None, given: Mapping[str, Any]) -> None:
        """`template`: model_optim_rng.pt or a directory of them; `given`: what the user says of the layout."""
        self.path, self._given, self._template = path, given, template
        if template is not None and not os.path.exists(template):
            raise InputError(f"{template}: not found: --template is a model_optim_rng.pt or a directory of mp_rank_*")
        self._args = {name: os.path.join(path, name) for name in listing(path) if re.fullmatch(r"args_tp.*\.pt", name)}
        sample = self._read_args(next(iter(self._args), None)) or self._from_template(None)
        fields = _fields(sample)
        self.recorded = read_layout(path, fields)
        self.facts = self._merged(fields, sample.path if sample else path)
        self.maps: dict[MapKey, BufferMap] = {key: map_files.read(file) for key, file in self._find_maps().items()}

    def args_of(self, place: Place) -> torch_zip.TorchFile | None:
        """args_*.pt of a rank, or the template."""
        names = (args_name(place, self.facts.sizes.ep), args_name((*place[:2], 0), 1))
        return self._read_args(next((n for n in names if n in self._args), None)) or self._from_template(place)

    def _read_args(self, name: str | None) -> torch_zip.TorchFile | None:
        return None if name is None else torch_zip.read(self._args[name])

    def _from_template(self, place: Place | None) -> torch_zip.TorchFile | None:
        """A model_optim_rng.pt: the one that was given, or the place's own of a directory (any, without a place)."""
        if self._template is None:
            return None
        if os.path.isfile(self._template):
            return torch_zip.read(self._template)
        found = directory.find(self._template)
        if place is None:
            return torch_zip.read(found.sample())
        sizes = self.facts.sizes
        own = os.path.join(found.path, directory_name(*place, pp_size=sizes.pp, ep_size=sizes.ep), directory.MODEL_FILE)
        return torch_zip.read(own if os.path.isfile(own) else found.sample())

    def _merged(self, fields: Mapping[str, Any], where: str) -> Facts:
        """What was recorded, else args; flags must agree with the former and win over the latter."""
        if self.recorded is None:
            return facts_of(fields, where, **self._given)
        facts = self.recorded.facts
        sizes = {key: value for key, value in self._given.items() if hasattr(facts.sizes, key)}
        for key, value in sizes.items():
            known = getattr(facts.sizes, key)
            if value not in (None, known) and key not in ("dp", "cp"):
                raise InputError(f"{self.path}: was written for {key} {known}, and {value} is given: leave it out")
        options = {key: value for key, value in self._given.items() if key not in sizes and value not in (None, ())}
        for key, value in options.items():
            if not _says_the_same(facts, key, value):
                raise InputError(
                    f"{self.path}: was written for {key} {getattr(facts, key)}, and {value} is given: leave it out"
                )
        replicas = {key: self._given[key] for key in ("dp", "cp") if key in self._given}
        return replace(facts, sizes=replace(facts.sizes, **replicas))

    def _find_maps(self) -> dict[MapKey, str]:
        names = listing(self.path)
        folder = os.path.join(self.path, map_files.DIRECTORY)
        names += listing(folder) if os.path.isdir(folder) else []
        return map_files.find(self.path) if any(map(map_files.parse_file_name, names)) else {}


def _says_the_same(facts: Facts, key: str, value: Any) -> bool:
    """Are the layers where they are with this option, too?  An equal split may be listed, as one."""
    if getattr(facts, key) == value:
        return True
    try:
        return key != "num_layers" and replace(facts, **{key: value}).layers() == facts.layers()
    except InputError:
        return False


def places_of(facts: Facts) -> Iterator[Place]:
    """Every (tp, pp, ep) that a rank can have."""
    sizes = facts.sizes
    for pp in range(sizes.pp):
        for tp in range(sizes.tp):
            for ep in range(sizes.ep):
                if ranks_of(facts, (tp, pp, ep)):
                    yield tp, pp, ep


def ranks_of(facts: Facts, place: Place) -> list[int]:
    """Global ranks whose file may stand for a place; the first is what convert_pt2ckpt writes."""
    needed = facts.sizes.ep if facts.extend_ep else -(-facts.sizes.ep * facts.etp // facts.sizes.tp)
    enough = max(facts.sizes.dp, -(-needed // facts.sizes.cp))
    return replace(facts, sizes=replace(facts.sizes, dp=enough)).global_ranks(place)


def files_of(path: str, facts: Facts, step: int | None) -> dict[Place, str]:
    """One file a place: of rank_{R}, or of mp_rank_TT_PPP as MindSpeed's later converters name them."""
    if mindspore_dir.rank_dirs(path):
        ranks = mindspore_dir.find(path, step).ranks
        by_place = {place: [r for r in ranks_of(facts, place) if r in ranks] for place in places_of(facts)}
        return {place: ranks[mine[0]][0] for place, mine in by_place.items() if mine}
    found: dict[Place, str] = {}
    for name in listing(path):
        match = _MEGATRON_RANK.fullmatch(name)
        folder = os.path.join(path, name)
        files = [n for n in listing(folder) if container_of(n)] if match and os.path.isdir(folder) else []
        if match and len(files) == 1:
            place = (int(match[1]), int(match[2] or 0), int(match[3] or 0))
            found[place] = os.path.join(folder, files[0])
    if not found:
        raise InputError(f"{path}: has neither rank_i nor mp_rank_TT_PPP directories with a checkpoint")
    return found


def _fields(sample: torch_zip.TorchFile | None) -> Mapping[str, Any]:
    args = sample.tree.get("args") if sample is not None and isinstance(sample.tree, dict) else None
    return args.fields if isinstance(args, Namespace) else {}
