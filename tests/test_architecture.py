"""The rules of CONTRIBUTING.md that no linter holds: size, vendor calls, import graph, torch-free service, budget."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from statistics import median, quantiles

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("lm", "trainer", "service")
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_FUNCTION_MEDIAN = 10
MAX_FUNCTION_P90 = 30
VENDOR_FOLDERS = ("lm/device/", "lm/ops/")
VENDOR_MODULES = ("torch.cuda", "torch.npu", "torch.get_device_module", "torch.accelerator")
VENDOR_DEVICE = re.compile(r"(cuda|npu)(:\d+)?")
POLICY = ("service.engine.blocks", "service.engine.messages", "service.engine.scheduler")
LINE_BUDGET = {"lm": 6300, "trainer": 9500, "service": 19500, "tests": 42000}
"""Lines of Python. Raise a number in the commit that needs it, with the reason in its message."""

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True, slots=True)
class Module:
    path: Path
    text: str
    tree: ast.Module

    @property
    def relative(self) -> str:
        return self.path.relative_to(ROOT).as_posix()

    @property
    def name(self) -> str:
        return self.relative.removesuffix(".py").removesuffix("/__init__").replace("/", ".")

    @property
    def num_lines(self) -> int:
        return self.text.count("\n")

    def functions(self) -> Iterator[Function]:
        return (node for node in ast.walk(self.tree) if isinstance(node, Function))


@cache
def modules(package: str) -> tuple[Module, ...]:
    paths = sorted((ROOT / package).rglob("*.py"))
    texts = [path.read_text(encoding="utf-8") for path in paths]
    return tuple(Module(path, text, ast.parse(text)) for path, text in zip(paths, texts, strict=True))


def product() -> list[Module]:
    return [module for package in PACKAGES for module in modules(package)]


def everything() -> list[Module]:
    return [*product(), *modules("tests")]


def lines_of(function: Function) -> int:
    assert function.end_lineno is not None
    return function.end_lineno - function.lineno + 1


def where(module: Module, node: ast.expr | ast.stmt | ast.excepthandler) -> str:
    return f"{module.relative}:{node.lineno}"


# ---- size


def test_no_file_is_too_long() -> None:
    assert [f"{m.relative}: {m.num_lines}" for m in everything() if m.num_lines > MAX_FILE_LINES] == []


def test_no_function_is_too_long() -> None:
    found = [(m, f) for m in everything() for f in m.functions() if lines_of(f) > MAX_FUNCTION_LINES]
    assert [f"{where(module, function)} {function.name}: {lines_of(function)}" for module, function in found] == []


@pytest.mark.parametrize("package", PACKAGES)
def test_functions_are_short(package: str) -> None:
    lengths = [lines_of(function) for module in modules(package) for function in module.functions()]
    assert median(lengths) <= MAX_FUNCTION_MEDIAN
    assert quantiles(lengths, n=10)[-1] <= MAX_FUNCTION_P90


@pytest.mark.parametrize("package", LINE_BUDGET)
def test_a_package_stays_within_its_line_budget(package: str, figure: Callable[[str, object], None]) -> None:
    files = modules(package)
    num_lines = sum(module.num_lines for module in files)
    lengths = [lines_of(function) for module in files for function in module.functions()]
    shape = f"functions median {median(lengths):.0f}, p90 {quantiles(lengths, n=10)[-1]:.0f}, longest {max(lengths)}"
    figure(f"lines of {package}", f"{num_lines} of {LINE_BUDGET[package]}, {len(files)} files, {shape}")
    assert num_lines <= LINE_BUDGET[package]


# ---- devices


def vendor_uses(tree: ast.AST) -> Iterator[ast.expr]:
    """Vendor modules, and calls and comparisons that name a vendor's device, which ruff's banned-api does not see."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_vendor_module(node):
            yield node
        if isinstance(node, ast.Call):
            is_method = isinstance(node.func, ast.Attribute) and node.func.attr in ("cuda", "npu")
            if is_method or any(map(names_vendor, [*node.args, *(keyword.value for keyword in node.keywords)])):
                yield node
        if isinstance(node, ast.Compare) and any(map(names_vendor, [node.left, *node.comparators])):
            yield node


def is_vendor_module(node: ast.Attribute) -> bool:
    return isinstance(node.value, ast.Name) and f"{node.value.id}.{node.attr}" in VENDOR_MODULES


def names_vendor(node: ast.expr) -> bool:
    value = node.value if isinstance(node, ast.Constant) else None
    return isinstance(value, str) and VENDOR_DEVICE.fullmatch(value) is not None


def test_only_the_device_layer_and_the_ops_name_a_vendors_device() -> None:
    elsewhere = [module for module in product() if not module.relative.startswith(VENDOR_FOLDERS)]
    assert [f"{where(m, use)} {ast.unparse(use)}" for m in elsewhere for use in vendor_uses(m.tree)] == []


@pytest.mark.parametrize(
    "source",
    ["torch.npu.empty_cache()", "x.cuda()", 'x.to("npu:1")', 'torch.empty(1, device="cuda")', 'device.type == "npu"'],
)
def test_a_vendors_device_is_found(source: str) -> None:
    assert list(vendor_uses(ast.parse(source)))


# ---- errors


def is_idle(statement: ast.stmt) -> bool:
    is_text = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
    return is_text or isinstance(statement, (ast.Pass, ast.Continue))


def swallowed(tree: ast.AST) -> Iterator[ast.ExceptHandler]:
    """Handlers that catch everything and do nothing."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler):
            catches_all = node.type is None or ast.unparse(node.type) in ("Exception", "BaseException")
            if catches_all and all(is_idle(statement) for statement in node.body):
                yield node


def test_no_error_is_swallowed() -> None:
    assert [where(module, handler) for module in everything() for handler in swallowed(module.tree)] == []


def test_a_swallowed_error_is_found() -> None:
    assert list(swallowed(ast.parse("try:\n    f()\nexcept Exception:\n    pass")))
    assert list(swallowed(ast.parse("try:\n    f()\nexcept:\n    ...")))
    assert not list(swallowed(ast.parse("try:\n    f()\nexcept Exception:\n    undo()\n    raise")))


# ---- imports


def imported(module: Module, names: set[str]) -> set[str]:
    """Product modules that `module` imports anywhere, in functions as well."""
    found: set[str] = set()
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node.module:
            members = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (members & names) or {node.module}
    return (found & names) - {module.name}


def test_no_import_cycle_open_or_hidden() -> None:
    names = {module.name for module in product()}
    try:
        TopologicalSorter({module.name: imported(module, names) for module in product()}).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))
    assert [module.relative for module in product() if "TYPE_CHECKING" in module.text] == []


def is_torch_free(module: Module) -> bool:
    """The service outside its engine process, and every module whose docstring promises it."""
    promised = "torch-free" in (ast.get_docstring(module.tree) or "").lower()
    in_service = module.name.startswith("service") and not module.name.startswith("service.engine.")
    return promised or in_service or module.name in POLICY


def test_policy_and_the_service_outside_its_engine_process_import_no_torch() -> None:
    program = (
        "import importlib, sys\n"
        "for name in sys.argv[1:]:\n"
        "    importlib.import_module(name)\n"
        "    assert 'torch' not in sys.modules, name\n"
    )
    names = [module.name for module in product() if is_torch_free(module) and "__main__" not in module.name]
    command = [sys.executable, "-c", program, *names]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
