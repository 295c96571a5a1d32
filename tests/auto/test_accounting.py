"""Every parameter of a network and every tensor of a checkpoint is accounted for, once."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transform_ckpt.auto.accounting import Account, account
from transform_ckpt.errors import InputError

W, B, N = "layers.0.wq.weight", "layers.0.wq.bias", "norm.weight"
NETWORK = {W: (4, 4), B: (4,), N: (4,)}


def test_all_is_well() -> None:
    found = account(NETWORK, NETWORK)
    assert found == Account((W, B, N), (), (), {}, ())
    found.check(strict=True)
    assert found.lines() == ["3 parameters loaded"]


def test_what_the_checkpoint_lacks() -> None:
    found = account(NETWORK, {W: (4, 4), N: (4,)})
    assert found.missing == (B,)
    assert found.lines() == ["2 parameters loaded", f"1 network parameters are not in the checkpoint: {B}"]
    with pytest.raises(InputError, match="load_strict: False to go on"):
        found.check(strict=True)
    found.check(strict=False)


def test_what_the_network_lacks() -> None:
    found = account(NETWORK, {**NETWORK, "layers.1.wq.weight": (4, 4)})
    assert found.unexpected == ("layers.1.wq.weight",)
    assert found.faults() == ["1 tensors of the checkpoint are not in the network: layers.1.wq.weight"]
    with pytest.raises(InputError, match="are not in the network"):
        found.check(strict=True)
    found.check(strict=False)


@pytest.mark.parametrize("strict", [False, True])
def test_another_shape_is_always_a_fault(*, strict: bool) -> None:
    found = account(NETWORK, {**NETWORK, W: (2, 4)})
    assert found.misshapen == {W: ((4, 4), (2, 4))}
    assert found.loaded == (B, N)
    with pytest.raises(InputError, match=r"layers\.0\.wq\.weight: the network has \[4, 4\], the checkpoint \[2, 4\]"):
        found.check(strict=strict)


def test_lists_are_shapes_too() -> None:
    assert account({W: [4, 4]}, {W: (4, 4)}).loaded == (W,)  # type: ignore[dict-item]


def test_many_faults_are_counted() -> None:
    network = {f"layers.{i}.weight": (4,) for i in range(20)}
    found = account(network, dict.fromkeys(network, (2,)))
    lines = found.faults()
    assert len(lines) == 6
    assert lines[-1] == "... and 15 more parameters of another shape"
    assert "and 15 more" in account(network, {}).faults()[0]


def test_caches_are_never_in_a_checkpoint() -> None:
    caches = {"model.layers.0.attention.infer_attention.paged_attention_mgr.key_cache": (8, 4), "x.value_cache": (8,)}
    found = account({**NETWORK, **caches}, NETWORK)
    assert (found.missing, found.loaded) == ((), (W, B, N))
    assert account({**NETWORK, "x.key_cache.weight": (4,)}, NETWORK).missing == ("x.key_cache.weight",)


def test_parameters_of_other_stages_may_be_missing() -> None:
    assert account(NETWORK, {W: (4, 4), B: (4,)}, elsewhere=[N]).missing == ()
    assert account(NETWORK, NETWORK, elsewhere=[N]).loaded == (W, B, N)  # held here all the same


def test_states_that_nobody_asked_for_are_no_fault() -> None:
    states = {
        "adam_m." + W: (4, 4), "adam_v." + W: (4, 4), "global_step": (1,), "loss_scale": (), "epoch_num": (),
        "layers.0.mlp.router.expert_bias": (8,),
    }  # fmt: skip
    found = account(NETWORK, {**NETWORK, **states})
    assert (set(found.unused), found.unexpected) == (set(states), ())
    assert found.lines() == ["3 parameters loaded, 6 states of the checkpoint not asked for"]
    found.check(strict=True)
    assert account(NETWORK, {**NETWORK, "mine": (7,)}, carried=["mine"]).unused == ("mine",)
    assert account({**NETWORK, **states}, {**NETWORK, **states}).unused == ()


def test_a_weight_of_one_element_is_not_a_state() -> None:
    assert account({}, {"layers.0.scale.weight": (1,)}).unexpected == ("layers.0.scale.weight",)


names = st.sampled_from(
    [W, B, N, "adam_m." + W, "global_step", "x.key_cache", "x.value_cache", "layers.9.w2.weight", "mine", "adam_m."]
)
tensors = st.dictionaries(names, st.lists(st.integers(0, 3), max_size=2).map(tuple))


@settings(deadline=None, max_examples=300)
@given(tensors, tensors, st.sets(names), st.sets(names))
def test_each_name_is_in_one_place(
    network: dict[str, tuple[int, ...]], held: dict[str, tuple[int, ...]], elsewhere: set[str], carried: set[str]
) -> None:
    found = account(network, held, elsewhere=elsewhere, carried=carried)
    kinds = [found.loaded, found.missing, found.unexpected, tuple(found.misshapen), found.unused]
    listed = [name for kind in kinds for name in kind]
    assert len(listed) == len(set(listed))
    assert set(held) == {*found.loaded, *found.misshapen, *found.unexpected, *found.unused}
    excused = {n for n in network if n not in held and (n in elsewhere or n.endswith(("key_cache", "value_cache")))}
    assert set(network) == {*found.loaded, *found.misshapen, *found.missing} | excused
    assert not excused & set(listed)
    assert all(network[name] == held[name] for name in found.loaded)
    assert all(found.misshapen[name] == (network[name], held[name]) for name in found.misshapen)
    assert all(network[name] != held[name] for name in found.misshapen)
    assert bool(found.faults()) == bool(found.missing or found.unexpected or found.misshapen)


def test_a_large_checkpoint_takes_no_time() -> None:
    """Twenty thousand weights with two states each."""
    network = {f"model.layers.{i}.weight": (4, 4) for i in range(20_000)}
    held = {prefix + name: (4, 4) for name in network for prefix in ("", "adam_m.", "adam_v.")}
    began = time.monotonic()
    assert len(account(network, held).unused) == 40_000
    assert time.monotonic() - began < 5
