"""The harness itself: real megatron-core takes back what it wrote, and every layout has the same logical state."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.megatron_real import environments, logical
from tests.megatron_real.case import Case
from tests.megatron_real.environments import Unavailable, environment
from tests.megatron_real.logical import Cut
from tests.megatron_real.oracle import expected_state, generate, load_back, logical_truth, stored_truth
from tests.support import assert_same

torch = pytest.importorskip("torch", reason="torch is not installed: make venv")

Checkpoint = Callable[[Case], Path]

MOE = Case(experts=4, ep=2, dp=2)
LATENT = Case(mla=True, qk_layernorm=True, experts=4, dense_first=1, shared_ffn=8, mtp=1)
NEW = {
    "plain": Case(),
    "buckets": Case(tp=2, pp=2, dp=2, bucket_size=900, bias=True, norm="LayerNorm"),
    "vpp": Case(pp=2, vpp=2, dp=2, layers=8, kv_groups=2, qk_layernorm=True),
    "tied": Case(tp=2, pp=2, tied=True),
    "uneven": Case(pp=3, layers=5, first_stage_layers=1, last_stage_layers=2),
    "dp3": Case(dp=3, tp=2, learned_softmax=True, qkv_bias=True, bucket_size=700),
    "cp": Case(cp=2, dp=2),
    "groups_below_tp": Case(tp=4, kv_groups=2),
    "moe": MOE,
    "moe_etp1": replace(MOE, tp=2, etp=1, dp=4),
    "moe_grouped": replace(MOE, tp=2, grouped=True, shared_ffn=8),
    "latent": replace(LATENT, tp=2, pp=2, ep=2, dp=2),
    "te": replace(LATENT, tree="te", tp=2, pp=2, ep=2, dp=2, grouped=True),
    "te_dense": Case(tree="te", tp=2, pp=2, bias=True, norm="LayerNorm"),
    "legacy": Case(tree="legacy", tp=2, pp=2, vpp=2, dp=2, tied=True, bias=True),
}
OLD_VERSIONS = ("0.6.0", "0.7.0", "0.9.0", "0.13.0")
OLD = {
    "buckets": NEW["buckets"],
    "vpp": NEW["vpp"],
    "tied": Case(pp=2, dp=2, tied=True, hidden=32, ffn=16),  # 0.7 to 0.9: a tied bucket begins at a multiple of 128
    "legacy": Case(tree="legacy", tp=2, pp=2, dp=2, bucket_size=640),
    "te": Case(tree="te", tp=2, pp=4, vpp=2, layers=8),
    "moe": replace(MOE, dp=4, tp=2),
    "moe_grouped": replace(MOE, tp=2, pp=2, grouped=True),
    "dp3": Case(dp=3, bucket_size=700),
}
PAIRS = {
    "dense": (Case(layers=8), Case(layers=8, tp=2, pp=2, vpp=2, dp=2)),
    "tied": (Case(tied=True), NEW["tied"]),
    "moe": (replace(MOE, ep=1, dp=1), NEW["moe_etp1"]),
    "grouped": (replace(NEW["moe_grouped"], ep=1, tp=1, dp=1), NEW["moe_grouped"]),
    "latent": (LATENT, NEW["latent"]),
}


def available(version: str) -> None:
    try:
        environment(version)
    except Unavailable as reason:
        pytest.skip(str(reason))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Generates each case once."""
    made: dict[Case, Path] = {}

    def make(case: Case) -> Path:
        available(case.version)
        if case not in made:
            made[case] = generate(case, tmp_path_factory.mktemp("megatron"))
        return made[case]

    return make


def check(case: Case, directory: Path) -> None:
    assert_same(logical_truth(directory), expected_state(directory))
    assert load_back(case, directory) == {}


@pytest.mark.megatron
@pytest.mark.parametrize("name", NEW)
def test_takes_back_what_it_wrote(name: str, checkpoint: Checkpoint) -> None:
    check(NEW[name], checkpoint(NEW[name]))


@pytest.mark.megatron_old
@pytest.mark.parametrize("name", OLD)
@pytest.mark.parametrize("version", OLD_VERSIONS)
def test_older_versions_take_back_what_they_wrote(version: str, name: str, checkpoint: Checkpoint) -> None:
    case = replace(OLD[name], version=version)
    check(case, checkpoint(case))


@pytest.mark.megatron
@pytest.mark.parametrize("name", PAIRS)
def test_layouts_hold_the_same_state(name: str, checkpoint: Checkpoint) -> None:
    first, second = (logical_truth(checkpoint(case)) for case in PAIRS[name])
    assert_same(first, second)


@pytest.mark.megatron_old
def test_versions_hold_the_same_state(checkpoint: Checkpoint) -> None:
    case = PAIRS["dense"][1]
    assert_same(logical_truth(checkpoint(case)), logical_truth(checkpoint(replace(case, version="0.6.0"))))


@pytest.mark.megatron_old
def test_what_a_version_lacks_is_said() -> None:
    available("0.6.0")
    with pytest.raises(environments.Failed, match="TransformerConfig has no mtp_num_layers"):
        environment("0.6.0").call({"job": "generate", "case": Case(version="0.6.0", mtp=1).to_json(), "directory": "/"})


def flip_optimizer(rank: Path) -> None:
    saved = torch.load(rank / "distrib_optim.pt")
    (states,) = saved[0].values()
    states["exp_avg"].view(torch.int32)[5] ^= 1
    torch.save(saved, rank / "distrib_optim.pt")


def load_model_file(rank: Path) -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what megatron.core.enums imports
        loaded: dict[str, Any] = torch.load(rank / "model_optim_rng.pt", weights_only=False)
    return loaded


def flip_model(rank: Path) -> None:
    saved = load_model_file(rank)
    saved["model"]["decoder.layers.1.mlp.linear_fc2.weight"].view(torch.int16)[3, 2] ^= 1
    torch.save(saved, rank / "model_optim_rng.pt")


def forget_step(rank: Path) -> None:
    saved = load_model_file(rank)
    for group in saved["optimizer"]["optimizer"]["param_groups"]:
        group["step"] = 1
    torch.save(saved, rank / "model_optim_rng.pt")


def drop_weight(rank: Path) -> None:
    saved = load_model_file(rank)
    del saved["model"]["decoder.layers.1.mlp.linear_fc2.weight"]
    torch.save(saved, rank / "model_optim_rng.pt")


def drop_file(rank: Path) -> None:
    (rank / "distrib_optim.pt").unlink()


@pytest.mark.megatron
@pytest.mark.parametrize(
    ("wreck", "key", "text"),
    [
        (flip_optimizer, "|exp_avg", "1 of"),
        (flip_model, "rank0|chunk0|module.decoder.layers.1.mlp.linear_fc2.weight|model", "the first at 38"),
        (forget_step, "rank0|optimizer0|wd_mult 1.0", "'step': 1"),
        (drop_weight, "error", "Missing key(s) in state_dict"),
        (drop_file, "error", "distrib_optim.pt"),
    ],
)
def test_wrecked_files_are_seen(wreck: Callable[[Path], None], key: str, text: str, tmp_path: Path) -> None:
    case = Case()
    available(case.version)
    wreck(generate(case, tmp_path) / "iter_0000002" / "mp_rank_00")
    found = load_back(case, tmp_path)
    assert any(key in name and text in said for name, said in found.items()), found


@pytest.mark.megatron
def test_truth_that_differs_between_ranks_is_refused(tmp_path: Path) -> None:
    case = Case(tp=2)
    available(case.version)
    path = generate(case, tmp_path) / "truth" / "truth_01.npz"
    arrays = dict(np.load(path))
    arrays["chunk0|module.decoder.final_layernorm.weight|param"][0] += 1
    np.savez(path, **arrays)
    with pytest.raises(ValueError, match=r"truth_01\|chunk0.*final_layernorm.weight: differs"):
        logical_truth(tmp_path)


@pytest.mark.megatron
def test_files_are_those_of_the_layout(checkpoint: Checkpoint) -> None:
    directory = checkpoint(NEW["latent"])
    names = [f"mp_rank_{tp:02d}_{pp:03d}_{ep:03d}" for tp in range(2) for pp in range(2) for ep in range(2)]
    ranks = directory / "iter_0000002"
    assert sorted(path.name for path in ranks.iterdir()) == names
    assert all((ranks / name / "distrib_optim.pt").is_file() for name in names)
    saved = load_model_file(ranks / names[-1])
    args = saved["args"]
    assert (args.tensor_model_parallel_size, args.pipeline_model_parallel_size, args.num_layers) == (2, 2, 4)
    assert "decoder.layers.1.mlp.experts.local_experts.1.linear_fc2.weight" in saved["model"]
    held = {cut.logical for key, cut, _ in stored_truth(directory) if key.startswith("truth_01_001_001|")}
    assert "decoder.layers.3.mlp.experts.local_experts.3.linear_fc2.weight" in held


@pytest.mark.megatron
def test_transformer_engine_names_and_order(checkpoint: Checkpoint) -> None:
    model = list(load_model_file(checkpoint(NEW["te_dense"]) / "iter_0000002" / "mp_rank_00_000")["model"])
    qkv = [name.rpartition(".")[2] for name in model if name.startswith("decoder.layers.0.self_attention.linear_qkv.")]
    assert qkv == ["layer_norm_weight", "layer_norm_bias", "weight", "bias", "_extra_state"]
    assert not any("input_layernorm" in name or "pre_mlp_layernorm" in name for name in model)


def test_expected_state_is_adam() -> None:
    """Against the textbook's formulas in double precision."""
    name, shape = "decoder.layers.0.mlp.linear_fc1.weight", (8, 6)
    param = logical.initial(name, shape).astype(np.float64)
    first, second = np.zeros(shape), np.zeros(shape)
    for step in (1, 2):
        grad = logical.gradient(name, shape, step).astype(np.float64)
        first, second = 0.9 * first + 0.1 * grad, 0.95 * second + 0.05 * grad**2
        change = (first / (1 - 0.9**step)) / (np.sqrt(second / (1 - 0.95**step)) + 1e-8)
        param -= 0.01 * (change + 0.1 * param)
    found = logical.trained(name, shape)
    for state, expected in (("param", param), ("exp_avg", first), ("exp_avg_sq", second)):
        np.testing.assert_allclose(found[state], expected, rtol=1e-5, atol=1e-8)


def test_cut_takes_and_puts() -> None:
    cut = Cut("fc1", (8, 2), (((2, 4), (0, 2)), ((6, 8), (0, 2))))
    whole = np.arange(16).reshape(8, 2)
    assert cut.take(whole).tolist() == [4, 5, 6, 7, 12, 13, 14, 15]
    filled = np.zeros_like(whole)
    cut.put(filled, cut.take(whole))
    assert filled[[2, 3, 6, 7]].tolist() == whole[[2, 3, 6, 7]].tolist()
    assert not filled[[0, 1, 4, 5]].any()
    with pytest.raises(ValueError, match="9 elements stored, the boxes have 8"):
        cut.put(filled, np.zeros(9))


def test_a_wheel_that_cannot_be_had_is_a_reason_to_skip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environments, "WHEELS", tmp_path / "wheels")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    with pytest.raises(Unavailable, match=r"megatron-core 0\.6\.0: pip cannot fetch its wheel"):
        environments.wheel("0.6.0")
    assert list((tmp_path / "wheels").iterdir()) == []
