"""What the project promises about its own shape: imports one way, names, the `kernels` trap."""

from __future__ import annotations

import ast
import importlib
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import optimer_engine

ROOT = Path(optimer_engine.__file__).resolve().parents[1]
PACKAGE = ROOT / "optimer_engine"

# Each module may import only what stands before it.
ORDER = [
    "redaction", "errors", "durable", "types", "tensor_recipe", "strict_yaml", "recipe",
    "safetensors_format", "model_folder", "checkpoint", "names", "counterparts", "companions",
    "network", "hashed",
    "snapshot", "hub", "remote", "downloads", "report", "journal", "events", "progress",
    "methods", "operands", "resized", "quantized", "adapter", "vectors", "runs",
    "ops", "gpu_tiles", "device", "cuda", "mergekit",
    "by_token", "alignment", "suspicions", "layout", "lowering", "plans", "planner", "explain",
    "sink", "kept", "nonfinite", "shard_file", "work_folder", "folder_sink",
    "execution", "engine", "iteration", "spread", "packing", "verify", "convert", "inspection",
    "lock", "pool", "search", "train", "demo", "cli",
]  # fmt: skip
# A plan runs itself, inside two of its methods.
STEPS_BACK = {("plans", "engine"), ("plans", "iteration")}
# Whatever computes tiles may call kernels.
CALL_KERNELS = {"ops", "nonfinite", "methods", "vectors", "packing", "inspection"}
WITHOUT_TORCH = ORDER[: ORDER.index("explain") + 1]
HEAVY = {"torch", "transformers", "datasets", "smac", "lm_eval", "matplotlib", "huggingface_hub",
         "peft", "accelerate", "numba", "scipy", "pandas", "optuna", "vllm", "distributed",
         "tokenizers"}  # fmt: skip


def modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        relative = path.relative_to(PACKAGE)
        if relative.parts[0] != "kernels" and relative != Path("__init__.py"):
            yield relative.parts[0].removesuffix(".py"), path


def imports(tree, only_top_level):
    """Absolute module names; names under TYPE_CHECKING do not count."""
    nodes = list(tree.body)
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (
                [f"{node.module}.{alias.name}" for alias in node.names]
                if node.module == "optimer_engine"
                else [node.module or ""]
            )
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        elif not (only_top_level and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)):
            nodes.extend(child for child in ast.iter_child_nodes(node))


def test_every_module_has_its_place_in_the_order():
    assert {name for name, _ in modules()} == set(ORDER)


def test_imports_point_one_way():
    wrong = []
    for name, path in modules():
        for imported in imports(ast.parse(path.read_text()), only_top_level=False):
            parts = imported.split(".")
            if parts[0] != "optimer_engine" or len(parts) < 2 or parts[1] == name:
                continue
            if parts[1] == "kernels":
                allowed = name in CALL_KERNELS
            elif parts[1] in ORDER:
                allowed = ORDER.index(parts[1]) < ORDER.index(name)
            else:
                allowed = True  # a public name of the package itself
            if not allowed and (name, parts[1]) not in STEPS_BACK:
                wrong.append(f"{path.relative_to(ROOT)} imports {imported}")
    assert wrong == []


# These subclass a heavy library's classes, so they import it at the top, and nobody imports them
# there.
OWNERS = {
    "search/adviser.py", "search/bowl.py", "search/surrogate.py", "train/trainer.py",
    "train/callbacks.py",
}  # fmt: skip


def test_heavy_libraries_are_imported_inside_functions():
    forbidden = HEAVY | {f"optimer_engine.{owner[:-3].replace('/', '.')}" for owner in OWNERS}
    wrong = []
    for _, path in modules():
        if str(path.relative_to(PACKAGE)) not in OWNERS:
            tree = ast.parse(path.read_text())
            wrong += [
                f"{path.relative_to(ROOT)} imports {imported}"
                for imported in imports(tree, only_top_level=True)
                if imported in forbidden or imported.split(".")[0] in forbidden
            ]
    assert wrong == []


def fresh(code, cwd=ROOT):
    return subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, check=False
    )


def test_planning_never_imports_torch_and_help_imports_nothing_heavy():
    for module in WITHOUT_TORCH:
        importlib.import_module(f"optimer_engine.{module}")
    listed = "; ".join(f"import optimer_engine.{m}" for m in WITHOUT_TORCH)
    done = fresh(f"{listed}; import sys; print('torch' in sys.modules)")
    assert done.stdout.strip() == "False", done.stderr
    done = fresh(
        "import sys; from optimer_engine.cli import optimer;"
        "optimer(['--help'], standalone_mode=False);"
        f"print(sorted(set(sys.modules) & {HEAVY | {'numpy', 'yaml', 'msgspec'}!r}))"
    )
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


def test_a_cpu_merge_never_imports_torch(tmp_path, write_checkpoint):
    import torch

    base = write_checkpoint("base", {"w": torch.ones(4)})
    other = write_checkpoint("other", {"w": torch.zeros(4)})
    done = fresh(
        "import sys, optimer_engine\n"
        f"optimer_engine.merge({{'base': {str(base)!r}, 'sources': [{{'name': 's', 'model':"
        f" {str(other)!r}, 'weight': 0.5}}]}}, {str(tmp_path / 'out')!r})\n"
        "print(sorted({'torch', 'transformers', 'huggingface_hub'} & set(sys.modules)))"
    )
    assert done.stdout.strip() == "[]", done.stderr


def test_public_names_are_sorted_exist_and_share_no_name_with_a_module():
    assert optimer_engine.__all__ == sorted(optimer_engine.__all__) == sorted(optimer_engine._HOME)
    module_names = {name for name, _ in modules()} - {"ops"}
    for name in optimer_engine.__all__:
        assert getattr(optimer_engine, name) is not None
        assert name not in module_names
    with pytest.raises(AttributeError):
        _ = optimer_engine.nothing_of_that_name


def test_plain_kernels_is_never_our_folder():
    # Another distribution owns the name `kernels`; our folder has no __init__.py, so at most a
    # namespace without a file may be found, and never our modules through it by accident.
    assert not (ROOT / "kernels" / "__init__.py").exists()
    done = fresh(
        "import importlib.util as u; s = u.find_spec('kernels');"
        "print(s is None or s.origin is None)"
    )
    assert done.stdout.strip() == "True", done.stderr
    done = fresh("import optimer_engine.kernels.reference as r; print(r.__name__)", cwd="/")
    assert done.stdout.strip() == "optimer_engine.kernels.reference", done.stderr


def test_the_wheel_holds_the_kernels_and_the_demo_files(tmp_path):
    ignored = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "tests")
    source = shutil.copytree(ROOT, tmp_path / "source", symlinks=True, ignore=ignored)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "-o", str(tmp_path)]
    done = subprocess.run([*command, source], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    import zipfile

    names = zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist()
    assert "optimer_engine/kernels/cpu.py" in names
    assert "optimer_engine/kernels/reference.py" in names
    assert "optimer_engine/py.typed" in names
    assert any(name.startswith("optimer_engine/demo/assets/") for name in names)
    assert not [name for name in names if name.startswith(("kernels/", "tests/", "benchmarks/"))]
