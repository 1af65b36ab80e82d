"""The repository keeps its own rules: names, sizes, the lock, the rule on skipped tests."""

from __future__ import annotations

import ast
import importlib
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import pipeline

TOP = Path(__file__).parents[1]
MODULES = sorted(path for room in ("pipeline", "jobs") for path in (TOP / room).rglob("*.py"))
VAGUE_NAMES = {"util", "utils", "common", "core", "helper", "helpers", "base", "misc", "legacy"}


# ---- The front door


def test_public_names_are_sorted_and_resolve() -> None:
    assert pipeline.__all__ == sorted(pipeline.__all__)
    assert [name for name in pipeline.__all__ if getattr(pipeline, name, None) is None] == []


def test_every_deliberate_error_is_a_public_name() -> None:
    errors = importlib.import_module("pipeline.errors")
    defined = {name for name, value in vars(errors).items() if isinstance(value, type)}
    assert defined <= set(pipeline.__all__)


def test_an_unknown_name_is_an_attribute_error_that_lists_the_known_ones() -> None:
    with pytest.raises(AttributeError, match=r"no attribute 'bild'; it has .*build"):
        _ = pipeline.bild


@pytest.mark.parametrize("statement", ["import pipeline", "import pipeline; pipeline.open_snapshot, pipeline.Policy"])
def test_the_base_names_need_neither_torch_nor_ray(statement: str) -> None:
    run_python(f"import sys; sys.modules.update(torch=None, ray=None); {statement}")


def test_importing_pipeline_is_light() -> None:
    heavy = "{'torch', 'ray', 'pyarrow', 'pandas', 'PIL', 'fsspec'}"
    assert run_python(f"import sys, pipeline; print({heavy} & set(sys.modules))") == "set()\n"


def test_a_missing_extra_is_named_with_its_install_command() -> None:
    program = (
        "import sys; sys.modules.update(torch=None, torchvision=None)\n"
        "import pipeline\n"
        "try: pipeline.Loader\n"
        "except pipeline.MissingExtraError as error: print(error)"
    )
    assert "pip install 'evenshard[train]'" in run_python(program)


def run_python(program: str) -> str:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=TOP)
    assert done.returncode == 0, done.stderr
    return done.stdout


# ---- Modules and dependencies


@pytest.mark.parametrize("module", MODULES, ids=lambda path: path.relative_to(TOP).as_posix())
def test_module_is_of_one_job_and_has_a_telling_name(module: Path) -> None:
    assert module.stem not in VAGUE_NAMES
    assert len(module.read_text(encoding="utf-8").splitlines()) <= 500


UNPICKLERS = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
EXECUTORS = {"eval", "exec", "__import__"}
UNSAFE_READERS = {"read_pickle", "unsafe_load", "full_load"}


@pytest.mark.parametrize("module", MODULES, ids=lambda path: path.relative_to(TOP).as_posix())
def test_no_module_can_execute_what_it_reads(module: Path) -> None:
    assert dangers(module.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "program",
    [
        "import pickle",
        "from marshal import loads",
        "eval(text)",
        "pandas.read_pickle(path)",
        "numpy.load(path, allow_pickle=True)",
        "torch.load(path, weights_only=False)",
        "yaml.load(text, Loader=yaml.UnsafeLoader)",
    ],
)
def test_executing_what_is_read_would_be_found(program: str) -> None:
    assert dangers(program) == ["line 1"]


def dangers(program: str) -> list[str]:
    """Lines that import an unpickler, call something that executes its argument, or switch a safe loader to unsafe."""
    return [f"line {node.lineno}" for node in ast.walk(ast.parse(program)) if is_dangerous(node)]


def is_dangerous(node: ast.AST) -> bool:
    match node:
        case ast.Import(names):
            return any(alias.name.partition(".")[0] in UNPICKLERS for alias in names)
        case ast.ImportFrom(module):
            return (module or "").partition(".")[0] in UNPICKLERS
        case ast.Call(ast.Name(name)):
            return name in EXECUTORS
        case ast.Call(ast.Attribute(attr=name)):
            return name in UNSAFE_READERS
        case ast.keyword("allow_pickle", ast.Constant(True)) | ast.keyword("weights_only", ast.Constant(False)):
            return True
        case ast.keyword("Loader", ast.Attribute(attr=loader)):
            return "Unsafe" in loader or "Full" in loader
    return False


def test_the_lock_hashes_every_requirement_and_names_no_host() -> None:
    lock = (TOP / "requirements.lock").read_text(encoding="utf-8")
    entries = re.split(r"^(?=[a-z])", lock, flags=re.MULTILINE)[1:]
    assert len(entries) > 50
    assert [entry for entry in entries if "==" not in entry or "--hash=sha256:" not in entry] == []
    assert re.search(r"https?:|--(extra-)?index|--find", lock) is None


def test_the_lock_holds_every_direct_dependency() -> None:
    metadata = tomllib.loads((TOP / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [
        *metadata["dependencies"],
        *(line for extra in metadata["optional-dependencies"].values() for line in extra),
    ]
    names = {re.split(r"[\[<>=]", line)[0] for line in wanted} - {"evenshard"}
    locked = re.findall(r"^([a-z0-9-]+)==", (TOP / "requirements.lock").read_text(encoding="utf-8"), re.MULTILINE)
    assert names - set(locked) == set()


# ---- The rule on skipped tests, shown on a test file of its own

SKIPPING = """
import pytest

@pytest.mark.skip(reason="needs a GPU")
def test_skips():
    assert False
"""


@pytest.mark.parametrize(
    ("environment", "listed", "returncode"),
    [
        ({}, "", 0),
        ({"CI": "1"}, "", 1),
        ({"EVENSHARD_STRICT_SKIPS": "1"}, "", 1),
        ({"CI": "1"}, "test_it.py::test_skips | needs a GPU", 0),
        ({"CI": "1"}, "test_it.py::test_skips | needs a network", 1),
    ],
)
def test_an_unlisted_skip_fails_a_strict_run(
    tmp_path: Path, environment: dict[str, str], listed: str, returncode: int
) -> None:
    done = run_pytest(tmp_path, SKIPPING, listed, environment)
    assert done.returncode == returncode, done.stdout + done.stderr
    assert ("test_it.py::test_skips | needs a GPU" in done.stdout) == bool(returncode)
    assert re.search(r"1 passed, 1 skipped in [\d.]+s", done.stdout.splitlines()[-1])


def test_a_module_that_skips_itself_fails_a_strict_run(tmp_path: Path) -> None:
    program = "import pytest\npytest.importorskip('no_such_module')\n"
    done = run_pytest(tmp_path, program, "", {"CI": "1"})
    assert done.returncode == 1
    assert "test_it.py | could not import 'no_such_module'" in done.stdout


def run_pytest(
    folder: Path, program: str, listed: str, environment: dict[str, str]
) -> subprocess.CompletedProcess[str]:
    shutil.copy(TOP / "tests" / "conftest.py", folder)
    (folder / "expected_skips.txt").write_text(listed)
    (folder / "test_it.py").write_text(program)
    (folder / "test_other.py").write_text("def test_runs(): pass\n")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "--rootdir",
        str(folder),
        "-c",
        "/dev/null",
        ".",
    ]
    clean = {"PATH": "/usr/bin:/bin", **environment}
    return subprocess.run(command, cwd=folder, env=clean, capture_output=True, text=True, check=False)
