"""Our step in jobs of the real MindFormers on the CPU: what the network holds afterwards, and what is refused."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from strategy import layout as strategy_layout
from strategy.layout import Stage, Strategy
from tests import support
from tests.auto import mindformers_driver as driver
from tests.auto.mindformers_driver import NAMES, build_network, held, read_config, step, two_stages, weights, write_yaml
from tests.support import assert_same
from transform_ckpt.auto.mindformers import install, uninstall
from transform_ckpt.auto.mindformers import step as our_step
from transform_ckpt.auto.mindformers.adapters import adapter_parameters
from transform_ckpt.auto.mindformers.config import Call
from transform_ckpt.auto.mindformers.loading import elsewhere
from transform_ckpt.auto.mindformers.standalone import strategy_of
from transform_ckpt.auto.mindformers.strategies import not_compiled
from transform_ckpt.auto.transform import AutoTransform
from transform_ckpt.errors import InputError
from transform_ckpt.launcher import Launcher

FORMATS = ("ckpt", "safetensors")
STATES = {"epoch_num": 2, "step_num": 40, "global_batch_size": 8, "loss_scale": 1.0}


@pytest.fixture(scope="module")
def mindformers(ms: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """The real MindFormers, imported once."""
    if importlib.util.find_spec("mindformers") is None:
        pytest.skip("mindformers is not installed: make venv")
    return driver.import_mindformers(tmp_path_factory.mktemp("log"))


@pytest.fixture(autouse=True)
def _installed(mindformers: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Ours in MindFormers' place, for one test."""
    monkeypatch.setenv("LOCAL_DEFAULT_PATH", str(tmp_path / "output"))
    install()
    yield
    uninstall()


class Lines(list[str]):
    """What was logged."""

    def has(self, *words: str) -> bool:
        """Does one line have all the words?"""
        return any(all(word in line for word in words) for line in self)


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Lines:
    """Lines that go to MindFormers' logger."""
    from mindformers.tools.logger import logger

    lines = Lines()
    for level in ("info", "warning"):
        monkeypatch.setattr(logger, level, lambda text, *args: lines.append(str(text) % args if args else str(text)))
    return lines


def job(folder: Path, **changes: Any) -> tuple[Any, Any]:
    """Configuration and network of a job."""
    config = read_config(write_yaml(folder, **changes))
    return config, build_network(config)


def predict(folder: Path, path: Path, **changes: Any) -> tuple[Any, Any]:
    """Run the step of a prediction; the configuration and the network afterwards."""
    import mindspore as ms

    config, network = job(folder, load_checkpoint=str(path), **changes)
    step(config, ms.Model(network), network, None, do_predict=True)
    return config, network


def save_ranks(ms: ModuleType, folder: Path, fmt: str, *prefixes: str) -> tuple[Path, dict[str, support.Array]]:
    """The checkpoint of 4 ranks with its strategy beside it."""
    whole = weights(*prefixes)
    stages = two_stages(*prefixes)
    support.write_strategy(ms, stages, folder / "strategy")
    return support.save_ranks(ms, whole, stages, folder / "checkpoint", fmt), whole


# ------------------------------------------------------------------------------------------------------ one rank


def test_the_network_is_the_one_written_down(tmp_path: Path) -> None:
    _, network = job(tmp_path)
    assert {name: array.shape for name, array in held(network).items()} == driver.shapes()


@pytest.mark.parametrize("fmt", FORMATS)
def test_complete_weights_for_one_rank(ms: ModuleType, tmp_path: Path, log: Lines, fmt: str) -> None:
    whole = weights()
    source = support.save_file(ms, whole, tmp_path / "source" / f"llama.{fmt}")
    config, network = predict(tmp_path, source.parent, load_ckpt_format=fmt)
    assert_same(held(network), whole)
    assert config.checkpoint.load_path.endswith("/transformed_checkpoint")
    (result,) = Path(config.checkpoint.load_path).glob("*/rank_0/*")
    assert_same(support.load_file(ms, result), whole)
    assert (tmp_path / "output" / "transformed_checkpoint").resolve() == Path(config.checkpoint.load_path).resolve()
    assert log.has("rank 0: 21 parameters loaded")


@pytest.mark.parametrize("given", [True, False], ids=["strategy given", "strategy beside"])
@pytest.mark.parametrize("fmt", FORMATS)
def test_rank_directories_for_one_rank(ms: ModuleType, tmp_path: Path, fmt: str, given: bool) -> None:  # noqa: FBT001
    source, whole = save_ranks(ms, tmp_path / "source", fmt)
    more = {"src_strategy_path_or_dir": str(source.parent / "strategy")} if given else {}
    _, network = predict(tmp_path, source, load_ckpt_format=fmt, **more)
    assert_same(held(network), whole)


@pytest.mark.parametrize("fmt", FORMATS)
def test_rank_directories_without_auto_trans_ckpt(ms: ModuleType, tmp_path: Path, fmt: str) -> None:
    """MindFormers refuses them (safetensors) or takes rank 0's slices for the whole (ckpt)."""
    source, whole = save_ranks(ms, tmp_path / "source", fmt)
    config, network = predict(tmp_path, source, load_ckpt_format=fmt, auto_trans_ckpt=False)
    assert_same(held(network), whole)
    assert config.checkpoint.load_path == str(source)
    assert not list((tmp_path / "output").glob("**/rank_*")), "nobody asked for files"


@pytest.mark.parametrize("fmt", FORMATS)
def test_complete_weights_without_auto_trans_ckpt_are_mindformers_own(ms: ModuleType, tmp_path: Path, fmt: str) -> None:
    whole = weights()
    source = support.save_file(ms, whole, tmp_path / "source" / f"llama.{fmt}")
    config, network = predict(tmp_path, source, load_ckpt_format=fmt, auto_trans_ckpt=False)
    assert_same(held(network), whole)
    assert config.checkpoint.load_path == str(source)
    assert not (tmp_path / "output" / "auto_trans").exists()


def test_in_memory_nothing_is_written(ms: ModuleType, tmp_path: Path) -> None:
    source, whole = save_ranks(ms, tmp_path / "source", "safetensors")
    config, network = predict(tmp_path, source, load_ckpt_format="safetensors", transform_in_memory=True)
    assert_same(held(network), whole)
    assert config.checkpoint.load_path == str(source)
    assert not list((tmp_path / "output").glob("**/*.safetensors"))


def test_the_last_result_may_be_the_source(ms: ModuleType, tmp_path: Path) -> None:
    """output/transformed_checkpoint is this run's result afterwards, and was its source before."""
    source, whole = save_ranks(ms, tmp_path / "source", "safetensors")
    predict(tmp_path, source, load_ckpt_format="safetensors")
    from mindformers.trainer import trainer

    trainer.clear_auto_trans_output(None, None, "safetensors")
    (result,) = (tmp_path / "output" / "transformed_checkpoint").iterdir()
    _, network = predict(tmp_path, result, load_ckpt_format="safetensors")
    assert_same(held(network), whole)


def test_bfloat16_keeps_its_bits(ms: ModuleType, tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    whole = {n: support.random_bits(rng, ml_dtypes.bfloat16, shape) for n, shape in driver.shapes().items()}
    source = support.save_file(ms, whole, tmp_path / "source" / "llama.safetensors")
    kinds = {"param_init_type": "bfloat16", "embedding_init_type": "bfloat16", "layernorm_compute_type": "bfloat16"}
    config, network = job(
        tmp_path,
        load_checkpoint=str(source),
        load_ckpt_format="safetensors",
        model={**driver.JOB["model"], "model_config": {**driver.MODEL, **kinds}},
    )
    step(config, ms.Model(network), network, None, do_predict=True)
    found = {name: array.view(ml_dtypes.bfloat16) for name, array in held(network).items() if array.dtype.itemsize == 2}
    assert len(found) > 10
    assert_same(found, {name: whole[name] for name in found})


# ------------------------------------------------------------------------------------------------------ resuming


def training(ms: ModuleType, folder: Path, path: Path, **changes: Any) -> tuple[Any, Any, Any]:
    """A training that resumes: configuration, model and optimizer before the step."""
    from mindformers.core.optim import AdamW

    config, network = job(
        folder, run_mode="train", resume_training=True, load_checkpoint=str(path), callbacks=[], **changes
    )
    optimizer = AdamW(network.trainable_params())
    return config, ms.Model(network, optimizer=optimizer), (network, optimizer)


@pytest.mark.parametrize("fmt", FORMATS)
def test_resume_with_the_optimizer(ms: ModuleType, tmp_path: Path, fmt: str) -> None:
    """The step counts batches: half the global batch size makes it twice the number."""
    source, whole = save_ranks(ms, tmp_path / "source", fmt, *NAMES)
    for rank, path in support.rank_files(source).items():
        content = support.slice_rank(whole, two_stages(*NAMES), rank) | {"global_step": np.array([40], np.int32)}
        support.save_file(ms, content, path, append=STATES)
    config, model, (network, optimizer) = training(ms, tmp_path, source, load_ckpt_format=fmt)
    config.runner_config.step_scale = 2.0
    step(config, model, network, None, optimizer=optimizer)
    found = held(optimizer)
    assert_same({name: found[name] for name in whole}, whole)
    assert found["global_step"].tolist() == [80]


def test_resume_without_optimizer_states_is_refused(ms: ModuleType, tmp_path: Path) -> None:
    source = support.save_file(ms, weights(), tmp_path / "source" / "llama.safetensors")
    config, model, (network, optimizer) = training(ms, tmp_path, source.parent, load_ckpt_format="safetensors")
    with pytest.raises(InputError, match=r"43 network parameters are not in the checkpoint: adam_m\.lm_head\.weight"):
        step(config, model, network, None, optimizer=optimizer)


def test_optimizer_states_are_left_out_without_resuming(ms: ModuleType, tmp_path: Path) -> None:
    source, whole = save_ranks(ms, tmp_path / "source", "safetensors", *NAMES)
    config, network = predict(tmp_path, source, load_ckpt_format="safetensors")
    assert_same(held(network), {name: whole[name] for name in driver.shapes()})
    (result,) = Path(config.checkpoint.load_path).glob("*/rank_0/*")
    assert sorted(support.load_file(ms, result)) == sorted(driver.shapes())


# ------------------------------------------------------------------------------------------------------ strictness


def changed(ms: ModuleType, folder: Path, drop: str = "", **more: support.Array) -> Path:
    """Complete weights with a tensor less or more."""
    whole = {name: array for name, array in weights().items() if name != drop} | more
    return support.save_file(ms, whole, folder / "source" / "llama.safetensors")


FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "missing": ({"drop": "lm_head.weight"}, "1 network parameters are not in the checkpoint: lm_head.weight"),
    "unexpected": ({"head.weight": np.zeros((4, 4), np.float32)}, "1 tensors of the checkpoint are not in the network"),
    "shape": (
        {"lm_head.weight": np.zeros((64, 16), np.float32)},
        r"lm_head.weight: the network has \[32, 16\], the checkpoint \[64, 16\]",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_refused(ms: ModuleType, tmp_path: Path, fault: str) -> None:
    made, text = FAULTS[fault]
    config, network = job(tmp_path, load_checkpoint=str(changed(ms, tmp_path, **made)), load_ckpt_format="safetensors")
    before = held(network)
    with pytest.raises(InputError, match=text):
        step(config, ms.Model(network), network, None, do_predict=True)
    assert_same(held(network), before)


@pytest.mark.parametrize("fault", ["missing", "unexpected"])
def test_not_strict_goes_on_and_says_so(ms: ModuleType, tmp_path: Path, log: Lines, fault: str) -> None:
    made, text = FAULTS[fault]
    _, network = predict(tmp_path, changed(ms, tmp_path, **made), load_ckpt_format="safetensors", load_strict=False)
    found, whole = held(network), weights()
    left = {made.get("drop")}
    assert_same({n: a for n, a in found.items() if n not in left}, {n: a for n, a in whole.items() if n not in left})
    assert log.has(text)


def test_adapters_may_be_missing(ms: ModuleType, tmp_path: Path) -> None:
    """Fine-tuning begins with weights that have no adapters."""
    config, network = job(
        tmp_path, load_checkpoint=str(changed(ms, tmp_path)), load_ckpt_format="safetensors", run_mode="finetune"
    )
    network.adapter = ms.Parameter(ms.Tensor(np.ones((2, 2), np.float32)), name="wq.mindpet_delta_lora_a")
    step(config, ms.Model(network), network, None)
    assert held(network)["wq.mindpet_delta_lora_a"].tolist() == [[1, 1], [1, 1]]


def slora(ms: ModuleType, folder: Path, config: Any, network: Any) -> support.Array:
    """Give a network one S-LoRA adapter of rank 4; the values in the adapter's file."""
    values = np.arange(4 * 16, dtype=np.float32).reshape(4, 16)
    support.save_file(ms, {"wq.lora_a": values}, folder / "one" / "adapter_model.ckpt")
    (folder / "one" / "adapter_config.json").write_text('{"lora_alpha": 4, "r": 4}')
    (folder / "lora_adapter.json").write_text(json.dumps({"one": str(folder / "one")}))
    config.model.model_config.pet_config = type(config)(pet_type="slora", adapter_path=str(folder))
    network.lora_adapter = SimpleNamespace(registered_loras={"wq.lora_a": (2, 4, 16)}, adapter_names=["base", "one"])
    return np.stack([np.zeros_like(values), values])


def test_slora_adapters_come_from_their_own_files(ms: ModuleType, tmp_path: Path) -> None:
    config, network = job(tmp_path, load_checkpoint=str(changed(ms, tmp_path)), load_ckpt_format="safetensors")
    expected = slora(ms, tmp_path / "adapters", config, network)
    network.adapter = ms.Parameter(ms.Tensor(np.ones((2, 4, 16), np.float32)), name="wq.lora_a")
    step(config, ms.Model(network), network, None, do_predict=True)
    assert_same({"": held(network)["wq.lora_a"]}, {"": expected})


def test_slora_adapters_are_cut(ms: ModuleType, tmp_path: Path) -> None:
    config, network = job(tmp_path)
    expected = slora(ms, tmp_path / "adapters", config, network)
    strategy = Strategy((Stage(2, {"wq.lora_a": strategy_layout.Layout((2,), ((), (), (0,)))}),))
    for rank in range(2):
        found = adapter_parameters(Call(config, None, network, None), strategy, rank)
        part = np.ascontiguousarray(expected[:, :, rank * 8 : rank * 8 + 8])
        assert_same({name: value.asnumpy() for name, value in found.items()}, {"wq.lora_a": part})


# ------------------------------------------------------------------------------------------------------ Hugging Face

HF_NAMES = {
    "tok_embeddings.embedding_weight": "embed_tokens.weight",
    ".attention.w": ".self_attn.",
    ".feed_forward.w1": ".mlp.gate_proj",
    ".feed_forward.w2": ".mlp.down_proj",
    ".feed_forward.w3": ".mlp.up_proj",
    ".attention_norm": ".input_layernorm",
    ".ffn_norm": ".post_attention_layernorm",
    "norm_out": "norm",
}


def hugging_face(name: str) -> str:
    """The name of a Llama's weight in transformers."""
    for ours, theirs in HF_NAMES.items():
        name = name.replace(ours, theirs)
    for letter in "qkvo":
        name = name.replace(f"self_attn.{letter}.", f"self_attn.{letter}_proj.")
    return name


def test_hugging_face_weights_are_renamed(ms: ModuleType, tmp_path: Path) -> None:
    whole = weights()
    support.save_file(ms, {hugging_face(n): a for n, a in whole.items()}, tmp_path / "source" / "model.safetensors")
    _, network = predict(tmp_path, tmp_path / "source", load_ckpt_format="safetensors")
    assert_same(held(network), whole)
    assert (tmp_path / "output" / "transformed_checkpoint").is_symlink()


def test_hugging_face_weights_that_are_joined_are_mindformers_own(ms: ModuleType, tmp_path: Path, log: Lines) -> None:
    source = tmp_path / "source" / "model.safetensors"
    support.save_file(ms, {hugging_face(n): a for n, a in weights().items()}, source)
    config, network = job(tmp_path, load_checkpoint=str(source.parent), load_ckpt_format="safetensors")
    config.model.model_config.qkv_concat = True
    with pytest.raises(ValueError, match="qkv concat check failed"):  # MindFormers' own check: it was reached
        step(config, ms.Model(network), network, None, do_predict=True)
    assert log.has("MindFormers' own transform is used: qkv_concat joins tensors")
    assert not (tmp_path / "output" / "transformed_checkpoint").exists()


def test_mindformers_own_transform_gets_a_strategy_directory_of_its_own(
    ms: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It merges all strategy files of the directory, and output/strategy is an earlier run's."""
    source = tmp_path / "source" / "model.safetensors"
    support.save_file(ms, {hugging_face(n): a for n, a in weights().items()}, source)
    config, network = job(tmp_path, load_checkpoint=str(source.parent), load_ckpt_format="safetensors")
    config.use_parallel, config.model.model_config.qkv_concat = True, True
    own = tmp_path / "output" / "auto_trans" / "run" / "strategy"
    monkeypatch.setattr(our_step, "find_job_launcher", lambda: Launcher(0, 2, "test"))
    monkeypatch.setattr(AutoTransform, "strategy_directory", str(own))
    monkeypatch.setattr(ms, "get_auto_parallel_context", {"parallel_mode": "semi_auto_parallel"}.get)
    context: dict[str, str] = {}
    monkeypatch.setattr(ms, "set_auto_parallel_context", context.update)
    called: list[tuple[str, bool]] = []

    def theirs(config: Any, *_: Any, do_predict: bool, **_more: Any) -> None:
        called.append((config.checkpoint.load_path, do_predict))

    our_step.replacement_step(theirs)(config, ms.Model(network), network, None, do_predict=True)
    assert called == [(str(source.parent), True)]
    assert context == {"strategy_ckpt_save_file": str(own / "ckpt_strategy_rank_0.ckpt")}
    assert own.is_dir()


# ------------------------------------------------------------------------------------------------------ strategies


def test_what_the_compiler_did_not_lay_out_is_elsewhere(
    ms: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As mindspore.load_param_into_net has it for compiled networks."""
    _, network = job(tmp_path)
    assert elsewhere([network], None, 0) == frozenset()
    monkeypatch.setattr(ms, "get_auto_parallel_context", {"parallel_mode": "semi_auto_parallel"}.get)
    assert elsewhere([network], None, 0) == frozenset(), "not compiled yet"
    parameters = network.parameters_dict()
    parameters["lm_head.weight"].sliced = True
    parameters["model.norm_out.weight"].param_info.is_pipeline_shared_param = True
    assert elsewhere([network], None, 0) == set(parameters) - {"lm_head.weight"}


@pytest.mark.parametrize(
    ("mode", "context", "target", "text"),
    [
        ("stand_alone", 0, "Ascend", "the compiler lays nothing out in parallel mode stand_alone"),
        ("semi_auto_parallel", 1, "Ascend", "PyNative mode compiles nothing"),
        ("semi_auto_parallel", 0, "CPU", "MindSpore's compiler makes strategies on Ascend only, this is CPU"),
        ("semi_auto_parallel", 0, "Ascend", ""),
        ("auto_parallel", "GRAPH_MODE", "Ascend", ""),
    ],
)
def test_when_the_compiler_is_asked(
    ms: ModuleType, monkeypatch: pytest.MonkeyPatch, mode: str, context: int | str, target: str, text: str
) -> None:
    monkeypatch.setattr(ms, "get_auto_parallel_context", {"parallel_mode": mode}.get)
    monkeypatch.setattr(ms, "get_context", {"device_target": target}.get)
    config = SimpleNamespace(context=SimpleNamespace(mode=context))
    assert not_compiled(Call(config, None, None, None)) == text


STATE_DICT = {
    "a": {"shape": (4, 6), "shard": (1, 2)},
    "b": {"shape": (4, 6), "shard": (4, 1)},
    "c": {"shape": (8,), "shard": (1,)},
    "d": {"shape": (2, 2, 2), "shard": (2, 1, 2)},
    "of another kind": {"shape": (2,)},
}


def test_strategies_made_in_python_are_those_that_mindformers_writes(
    ms: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mindformers.parallel_core.inference import utils

    made = {"stage_rank_size": 4, "stage": 0, "model": dict(STATE_DICT), "optimizer": {}}
    monkeypatch.setattr(utils, "generate_state_dict", lambda _network: made)
    (stage,) = strategy_of(None, 4).stages
    utils.save_strategy_file(made, str(tmp_path / "theirs.ckpt"))
    message = ms.train.node_strategy_pb2.ParallelStrategyMap()
    message.ParseFromString((tmp_path / "theirs.ckpt").read_bytes())
    for item in message.parallel_layout_item:
        written, said = item.parallel_layouts, STATE_DICT[item.param_name]
        theirs = support.Layout(tuple(written.dev_matrix[0].dim), tuple(written.tensor_map[0].dim))
        shape = tuple(n * parts for n, parts in zip(said["shape"], said["shard"], strict=True))
        ours = stage.layouts[item.param_name].boxes(shape)
        windows = [tuple(slice(a, a + n) for a, n in zip(box.start, box.size, strict=True)) for box in ours]
        assert windows == support.device_slices(shape, theirs), item.param_name
    assert sorted(stage.layouts) == sorted(item.param_name for item in message.parallel_layout_item) == list("abcd")


@pytest.mark.parametrize(
    ("world", "shard", "text"),
    [(4, (3, 1), "a: is cut into 3 parts, which do not divide the 4 ranks"), (8, (2, 1), "is for 4 ranks, but 8 are")],
)
def test_strategies_made_in_python_must_fit_the_ranks(
    monkeypatch: pytest.MonkeyPatch, world: int, shard: tuple[int, ...], text: str
) -> None:
    from mindformers.parallel_core.inference import utils

    made = {"stage_rank_size": 4, "stage": 0, "model": {"a": {"shape": (3, 4), "shard": shard}}, "optimizer": {}}
    monkeypatch.setattr(utils, "generate_state_dict", lambda _network: made)
    with pytest.raises(InputError, match=text):
        strategy_of(None, world)


def test_only_save_strategy_writes_every_rank_and_ends(ms: ModuleType, tmp_path: Path) -> None:
    config, network = job(tmp_path, only_save_strategy=True, auto_trans_ckpt=False, use_parallel=True)
    with pytest.raises(SystemExit) as ended:
        step(config, ms.Model(network), network, None, do_predict=True)
    assert ended.value.code == 0
    known = tmp_path / "output" / "strategy"
    assert known.is_symlink()
    assert {path.name for path in known.iterdir()} >= {f"ckpt_strategy_rank_{rank}.ckpt" for rank in range(2)}
