"""Putting our step in MindFormers' place: which versions, functions and modules, and back; the runner of scripts.

MindFormers 1.8 is a tree of stubs with the parameters of its functions (1.8.0), since only one release can be
installed; 1.9 is the real one.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from tests.auto import mindformers_driver as driver
from transform_ckpt.auto.mindformers import install, places, uninstall
from transform_ckpt.auto.mindformers.config import Call
from transform_ckpt.auto.mindformers.launch import find_job_launcher
from transform_ckpt.errors import InputError
from transform_ckpt.launcher import Launcher

ROOT = Path(__file__).resolve().parents[2]

FLAGS = "do_eval=False, do_predict=False"
STUBS = {
    "trainer/utils": (
        f"transform_and_load_checkpoint(config, model, network, dataset, optimizer=None, {FLAGS})",
        "check_checkpoint_config_valid(config)",
        "load_slora_ckpt(checkpoint_dict, config, network)",
    ),
    "utils/file_utils": (
        "clear_auto_trans_output(load_checkpoint=None, src_strategy_path_or_dir=None, load_ckpt_format='ckpt')",
        "set_strategy_save_path(config)",
    ),
    "utils/load_checkpoint_utils": ("_get_origin_network(network)",),
    "utils/safetensors/utils": ("is_hf_safetensors_dir(safetensors_dir, model_cls_or_instance)",),
    "checkpoint/utils": (f"compile_model(model, dataset, mode, sink_mode, epoch=1, sink_size=1, {FLAGS})",),
    "tools/utils": (
        "get_real_rank()",
        "get_real_group_size()",
        "is_main_rank(ignore_check_modelarts=False)",
        "get_output_root_path()",
        "replace_tk_to_mindpet(ckpt_dict)",
    ),
    "parallel_core/inference/utils": ("generate_state_dict(network)",),
}
"""Module of MindFormers 1.8.0 -> its functions, as `def` lines have them."""

USERS = {
    "models/modeling_utils": "from mindformers.utils.file_utils import clear_auto_trans_output\n",
    "trainer/base_trainer": "from mindformers.trainer.utils import transform_and_load_checkpoint\n",
}


def write_stubs(folder: Path, version: str = "1.8.0", **changed: str) -> Path:
    """A package `mindformers`; `changed` gives functions other definitions, empty ones are left out."""
    package = folder / "mindformers"
    for name, functions in STUBS.items():
        path = package / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [changed.get(line.partition("(")[0], line) for line in functions]
        path.write_text("".join(f"def {line}: return {name!r}\n" for line in lines if line))
    for name, text in USERS.items():
        (package / f"{name}.py").parent.mkdir(parents=True, exist_ok=True)
        (package / f"{name}.py").write_text(text)
    for path in {parent for found in package.rglob("*.py") for parent in found.relative_to(folder).parents}:
        if path.name:
            (folder / path / "__init__.py").touch()
    (package / "__init__.py").write_text(f"__version__ = {version!r}\n")
    return folder


def run_python(folder: Path, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter that finds `folder` before anything that is installed."""
    return subprocess.run(
        [sys.executable, "-W", "ignore", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)]), **environ},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


INSTALL = "from transform_ckpt.auto.mindformers import install, uninstall\ninstall()\n"


def refusal(folder: Path) -> str:
    """What `install` says of the stubs."""
    text = f"from transform_ckpt.errors import InputError\ntry:\n    {INSTALL.replace(chr(10), chr(10) + '    ')}\n"
    found = run_python(folder, "-c", text + "except InputError as error: print(error)\n")
    assert found.returncode == 0, found.stderr
    return found.stdout


# ------------------------------------------------------------------------------------------------------ 1.8, stubs


def test_1_8_is_installed_and_taken_back(tmp_path: Path) -> None:
    """A module imported before has it, one imported later has it, and afterwards neither."""
    write_stubs(tmp_path)
    text = (
        "import mindformers.trainer.base_trainer as before\n"
        "theirs = [before.transform_and_load_checkpoint]  # a name of the script would be replaced, too\n"
        f"{INSTALL}"
        "import mindformers.trainer.utils as utils, mindformers.utils.file_utils as files\n"
        "import mindformers.models.modeling_utils as models\n"
        "ours = before.transform_and_load_checkpoint\n"
        "assert ours is utils.transform_and_load_checkpoint and ours is not theirs[0]\n"
        "from mindformers.trainer.utils import transform_and_load_checkpoint as later\n"
        "assert later is ours\n"
        "assert files.clear_auto_trans_output(None, None, 'ckpt') is None\n"
        "install()\n"
        "assert before.transform_and_load_checkpoint is ours\n"
        "uninstall()\n"
        "assert before.transform_and_load_checkpoint is theirs[0] is utils.transform_and_load_checkpoint\n"
        "assert files.clear_auto_trans_output() == 'utils/file_utils' == models.clear_auto_trans_output()\n"
    )
    found = run_python(tmp_path, "-c", text)
    assert found.returncode == 0, found.stderr


@pytest.mark.parametrize("version", ["1.7.0", "1.10.0", "2.0", "r1.9", ""])
def test_other_versions_are_refused(tmp_path: Path, version: str) -> None:
    text = refusal(write_stubs(tmp_path, version))
    assert text.startswith(f"MindFormers {version}: expected 1.8.x or 1.9.x")


def test_functions_that_differ_are_refused_all_at_once(tmp_path: Path) -> None:
    write_stubs(
        tmp_path,
        clear_auto_trans_output="clear_auto_trans_output(load_checkpoint=None)",
        compile_model="compile_model(model)",
        get_real_rank="",
    )
    text = refusal(tmp_path)
    assert (
        "MindFormers 1.8.0: mindformers.utils.file_utils.clear_auto_trans_output: expected the parameters "
        "(load_checkpoint, src_strategy_path_or_dir, load_ckpt_format), found (load_checkpoint)\n"
    ) in text
    assert "mindformers.checkpoint.utils.compile_model: expected the parameters" in text
    assert "mindformers.tools.utils.get_real_rank: expected a function, found none" in text
    assert "install an unchanged release of 1.8.x or 1.9.x" in text


def test_without_mindformers(tmp_path: Path) -> None:
    (tmp_path / "mindformers.py").write_text("raise ImportError('no such thing')\n")
    assert refusal(tmp_path).startswith("MindFormers cannot be imported (no such thing): install mindformers")


def test_the_path_of_the_checkpoint_is_where_the_version_has_it() -> None:
    class Config(dict[str, Any]):
        """As MindFormers' DictConfig: keys are attributes."""

        __getattr__ = dict.get
        __setattr__ = dict.__setitem__

    older, newer = Config(load_checkpoint="a"), Config(load_checkpoint="a", checkpoint=Config(load_path="b"))
    assert [Call(config, None, None, None).path for config in (older, newer)] == ["a", "b"]
    for config in (older, newer):
        Call(config, None, None, None).set_path("c")
    assert (older["load_checkpoint"], newer["load_checkpoint"], newer["checkpoint"]) == ("c", "a", {"load_path": "c"})


# ------------------------------------------------------------------------------------------------------ scripts

SCRIPT = """\
import os, sys
import mindformers.trainer.utils as utils
print(__name__, sys.argv, os.path.basename(sys.path[0]), utils.transform_and_load_checkpoint.__code__.co_filename)
import beside
sys.exit(int(sys.argv[-1]))
"""


def run_script(folder: Path, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """SCRIPT through the runner, from another directory than its own."""
    (folder / "scripts").mkdir(exist_ok=True)
    (folder / "scripts" / "job.py").write_text(SCRIPT)
    (folder / "scripts" / "beside.py").write_text("")
    return run_python(folder, "-m", "transform_ckpt.auto.mindformers", *arguments, **environ)


def test_a_script_runs_as_if_alone(tmp_path: Path) -> None:
    found = run_script(write_stubs(tmp_path), "scripts/job.py", "--config", "a.yaml", "5")
    assert found.returncode == 5, found.stderr
    assert found.stdout.startswith("__main__ ['scripts/job.py', '--config', 'a.yaml', '5'] scripts ")
    assert found.stdout.rstrip().endswith(os.path.join("auto", "mindformers", "step.py"))


def test_the_scheduler_of_msrun_is_left_alone(tmp_path: Path) -> None:
    found = run_script(write_stubs(tmp_path, "0.0"), "scripts/job.py", "0", MS_ROLE="MS_SCHED")
    assert found.returncode == 0, found.stderr
    assert found.stdout.rstrip().endswith(os.path.join("mindformers", "trainer", "utils.py"))


@pytest.mark.parametrize(
    ("arguments", "version", "code", "text"),
    [
        ((), "1.8.0", 2, "error: usage: python -m transform_ckpt.auto.mindformers SCRIPT [ARGS...]: a script is"),
        (("scripts/none.py",), "1.8.0", 2, "scripts/none.py is not a file"),
        (("scripts/job.py", "0"), "0.9.0", 3, "error: MindFormers 0.9.0: expected 1.8.x or 1.9.x"),
    ],
)
def test_what_cannot_be_run(tmp_path: Path, arguments: tuple[str, ...], version: str, code: int, text: str) -> None:
    found = run_script(write_stubs(tmp_path, version), *arguments)
    assert (found.returncode, found.stdout) == (code, "")
    assert text in found.stderr
    assert "Traceback" not in found.stderr


# ------------------------------------------------------------------------------------------------------ 1.9, real


@pytest.fixture(scope="module")
def mindformers(ms: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """The real MindFormers, imported once."""
    if importlib.util.find_spec("mindformers") is None:
        pytest.skip("mindformers is not installed: make venv")
    return driver.import_mindformers(tmp_path_factory.mktemp("log"))


def test_the_real_one_is_replaced_wherever_it_is_used(mindformers: ModuleType) -> None:
    names = [
        "trainer.utils",
        "trainer.base_trainer",
        "trainer.causal_language_modeling.causal_language_modeling",
        "model_runner",
    ]
    modules = [importlib.import_module(f"mindformers.{name}") for name in names]
    theirs = modules[0].transform_and_load_checkpoint
    clearing = [importlib.import_module(f"mindformers.{name}") for name in ("trainer.trainer", "utils")]
    delete = clearing[0].clear_auto_trans_output
    pretrained = importlib.import_module(places.PRETRAINED)
    install()
    try:
        ours = {module.transform_and_load_checkpoint for module in modules}
        assert len(ours) == 1
        assert theirs not in ours
        assert len({delete, pretrained.clear_auto_trans_output, *(m.clear_auto_trans_output for m in clearing)}) == 3
    finally:
        uninstall()
    assert {module.transform_and_load_checkpoint for module in modules} == {theirs}
    assert {m.clear_auto_trans_output for m in (*clearing, pretrained)} == {delete}


def links(output: Path) -> list[Path]:
    """Results of an earlier run with the well-known names pointing at them."""
    made = []
    for name in ("strategy", "transformed_checkpoint"):
        run = output / "auto_trans" / "20260101_000000_abcdef" / name
        run.mkdir(parents=True)
        (run / "kept").touch()
        (output / name).symlink_to(run)
        made.append(output / name)
    return made


def test_the_last_result_stays(mindformers: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Trainer clears before its job; from_pretrained clears, and keeps MindFormers' transform."""
    monkeypatch.setenv("LOCAL_DEFAULT_PATH", str(tmp_path))
    made = links(tmp_path)
    trainer, pretrained = (
        importlib.import_module(f"mindformers.{n}") for n in ("trainer.trainer", "models.modeling_utils")
    )
    install()
    try:
        trainer.clear_auto_trans_output(None, None, "ckpt")
        assert all((link / "kept").exists() for link in made)
        with pytest.raises(InputError, match="load_ckpt_format: expected ckpt or safetensors, found 'npz'"):
            trainer.clear_auto_trans_output(None, None, "npz")
        pretrained.clear_auto_trans_output()
    finally:
        uninstall()
    assert [link.is_symlink() for link in made] == [False, False]
    assert [list(link.iterdir()) for link in made] == [[], []]
    assert len(list(tmp_path.glob("auto_trans/*/*/kept"))) == 2


def test_strategies_can_be_saved_after_a_run_was_deleted_by_hand(
    mindformers: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_DEFAULT_PATH", str(tmp_path))
    (tmp_path / "strategy").symlink_to(tmp_path / "gone")
    trainer: Any = importlib.import_module("mindformers.trainer.trainer")
    config: dict[str, Any] = {}
    install()
    try:
        trainer.set_strategy_save_path(config)
    finally:
        uninstall()
    assert (tmp_path / "strategy").is_dir()
    assert config["strategy_ckpt_save_file"] == str(tmp_path / "strategy" / "ckpt_strategy_rank_0.ckpt")


# ------------------------------------------------------------------------------------------------------ ranks


def counted(monkeypatch: pytest.MonkeyPatch, rank: int, world: int, *, initialised: bool, **environ: str) -> None:
    """MindSpore counts so, the environment says `environ`."""
    from mindspore import communication

    for name in ("RANK_ID", "RANK_SIZE", "RANK", "WORLD_SIZE", "MS_ROLE", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(communication, "GlobalComm", SimpleNamespace(INITED=initialised))
    utils: Any = importlib.import_module("mindformers.tools.utils")
    monkeypatch.setattr(utils, "get_real_rank", lambda: rank)
    monkeypatch.setattr(utils, "get_real_group_size", lambda: world)


def test_launcher_and_mindspore_agree(mindformers: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    counted(monkeypatch, 1, 4, initialised=True, RANK_ID="1", RANK_SIZE="4")
    assert find_job_launcher() == Launcher(1, 4, "RANK_ID and RANK_SIZE")


@pytest.mark.parametrize("environ", [{}, {"RANK_ID": "0", "RANK_SIZE": "2"}, {"RANK_ID": "1"}])
def test_mindspore_knows_better_once_its_ranks_are_joined(
    mindformers: ModuleType, monkeypatch: pytest.MonkeyPatch, environ: dict[str, str]
) -> None:
    """No variables, others' variables, or half of them."""
    counted(monkeypatch, 3, 4, initialised=True, **environ)
    assert find_job_launcher() == Launcher(3, 4, "MindSpore's communication group")


def test_ranks_that_mindspore_has_not_joined_are_refused(
    mindformers: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted(monkeypatch, 0, 1, initialised=False, RANK="1", WORLD_SIZE="2", MASTER_ADDR="here")
    with pytest.raises(
        InputError, match=r"rank 1 of 2 \(torchrun\) started this process, .* rank 0 of 1: set use_para"
    ):
        find_job_launcher()
