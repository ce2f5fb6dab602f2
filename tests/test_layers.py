"""The house's law of imports and its few limits of size, checked by reading the source.

In: the syntax trees of src/cosyvoice. Out: one message per line that breaks a rule, with its place.
Rooms are the names directly under the package; they may import rooms of a lower rank, and of their
own rank those that stand to the left. Lines inside functions count too; one test imports for real.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src"
PACKAGE = "cosyvoice"

RANKS = (
    ("errors", "pcm", "version"),
    ("config", "hyperyaml"),
    ("text", "playback", "features", "audio", "models"),
    ("voice", "voicebook", "spk2info", "prompt"),
    ("engine",),
    ("frontend", "api"),
    (
        "parity",
        "init_model",
        "simulate",
        "serve",
        "train",
        "client",
        "bench",
        "export",
        "download",
        "doctor",
    ),
    ("utils", "cli", "__main__"),
)
TORCH_FREE_ENGINE = ("draws", "silence", "script", "stream", "request", "scheduler", "engine")
ENGINE = (*TORCH_FREE_ENGINE, "prefixes", "runner", "loading")

FORBIDDEN = {"transformers", "torchaudio", "hyperpyyaml"}
BARE_MACHINE = {"torch", "numpy", "safetensors", "yaml"}  # ruling 26
AT_HOME_IN = {
    "onnxruntime": {"voice", "export", "doctor"},
    "onnx": {"init_model", "export"},
    "soundfile": {"audio", "pcm"},
    "wetext": {"text"},
    "typer": {"cli"},
    "rich": {"cli"},
    "fastapi": {"serve"},
    "uvicorn": {"serve"},
    "grpc": {"serve", "client"},
    "gradio": {"serve"},
    "ray": {"serve"},
    "prometheus_client": {"serve"},
    "sounddevice": {"playback"},
}
HEAVY = {"torch", "onnxruntime", "onnx", "soundfile", "tokenizers", "wetext", "inflect", "fastapi"}
SCRIPTS_DOOR = f"{PACKAGE}.cli.cosyvoice"  # re-exports the API under the reference's name

MAX_FILE_LINES = 420
MAX_FUNCTION_LINES = 60
BANNED = ("Manager", "Handler", "Helper", "Service", "Util", "Base", "Impl", "Wrapper")


@dataclass(frozen=True)
class Import:
    """One name one line imports: absolute, and down to the module where the name is one."""

    module: str
    place: str
    is_deferred: bool = False  # inside a function
    is_for_types: bool = False  # under `if TYPE_CHECKING`

    @property
    def runs_on_import(self) -> bool:
        return not (self.is_deferred or self.is_for_types)

    @property
    def library(self) -> str:
        return self.module.split(".")[0]

    @property
    def is_ours(self) -> bool:
        return self.library == PACKAGE

    @property
    def is_foreign(self) -> bool:
        return not self.is_ours and self.library not in sys.stdlib_module_names


@cache
def modules() -> dict[str, Path]:
    """Dotted name -> file, for every file of the package."""
    files = sorted((SOURCE / PACKAGE).rglob("*.py"))
    return {_dotted(file): file for file in files}


def _dotted(file: Path) -> str:
    parts = file.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def tree_of(module: str) -> ast.Module:
    return ast.parse(modules()[module].read_text(encoding="utf-8"))


def room_of(module: str) -> str:
    """The name directly under the package; "" for the package itself."""
    return (module.split(".") + [""])[1]


def rank_of(module: str) -> tuple[int, int]:
    """Rank, and place within the rank from the left."""
    room = room_of(module)
    for rank, rooms in enumerate(RANKS):
        if room in rooms:
            return rank, rooms.index(room)
    raise AssertionError(f"{module}: its room {room!r} has no rank; give it one in RANKS")


@cache
def imports_of(module: str) -> tuple[Import, ...]:
    return tuple(_imports(tree_of(module), module, is_deferred=False, is_for_types=False))


def _imports(
    node: ast.AST, module: str, *, is_deferred: bool, is_for_types: bool
) -> Iterator[Import]:
    if isinstance(node, ast.Import | ast.ImportFrom):
        place = f"{modules()[module].relative_to(SOURCE)}:{node.lineno}"
        for name in _named(node, module):
            yield Import(name, place, is_deferred, is_for_types)
    is_deferred |= isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
    is_for_types |= isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
    for child in ast.iter_child_nodes(node):
        yield from _imports(child, module, is_deferred=is_deferred, is_for_types=is_for_types)


def _named(node: ast.Import | ast.ImportFrom, module: str) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    origin = node.module or ""
    if node.level:
        is_package = modules()[module].name == "__init__.py"
        n_up = node.level - is_package
        package = module.split(".")[: -n_up or None]
        origin = ".".join([*package, *([origin] if origin else [])])
    inner = [f"{origin}.{alias.name}" for alias in node.names]
    return [name if name in modules() else origin for name in inner]


def all_imports() -> Iterator[tuple[str, Import]]:
    for module in modules():
        for found in imports_of(module):
            yield module, found


def reached_on_import(module: str) -> dict[str, str]:
    """Every library that importing `module` imports -> the line that does."""
    libraries: dict[str, str] = {}
    seen: set[str] = set()
    waiting = [module]
    while waiting:
        # importing a.b.c runs a and a.b first
        parts = waiting.pop().split(".")
        names = {".".join(parts[: n + 1]) for n in range(len(parts))}
        new = (names & modules().keys()) - seen
        seen |= new
        running = [found for name in new for found in imports_of(name) if found.runs_on_import]
        waiting += [found.module for found in running if found.is_ours]
        libraries = {
            found.library: found.place for found in running if found.is_foreign
        } | libraries
    return libraries


def test_every_room_has_a_rank() -> None:
    assert len(modules()) > len(RANKS)
    for module in modules():
        if module != PACKAGE:
            rank_of(module)


def test_imports_point_down_the_ranks() -> None:
    wrong = [
        f"{found.place}: {room_of(module)} imports {found.module}"
        for module, found in all_imports()
        if found.is_ours and module != PACKAGE and not _points_down(module, found.module)
    ]
    assert not wrong, "\n".join(wrong)


def _points_down(module: str, imported: str) -> bool:
    if imported == PACKAGE:  # the lazy names there reach every rank
        return False
    return room_of(module) == room_of(imported) or rank_of(imported) < rank_of(module)


def test_the_package_itself_imports_only_its_version() -> None:
    running = [found.module for found in imports_of(PACKAGE) if found.runs_on_import]
    assert [name for name in running if name.startswith(PACKAGE)] == [f"{PACKAGE}.version"]


def test_engine_files_import_from_left_to_right() -> None:
    place = {f"{PACKAGE}.engine.{name}": n for n, name in enumerate(ENGINE)}
    present = {name for name in modules() if name.startswith(f"{PACKAGE}.engine.")}
    assert present <= place.keys(), f"give these a place in ENGINE: {present - place.keys()}"
    wrong = [
        f"{found.place}: imports {found.module}, which stands to its right"
        for module in present
        for found in imports_of(module)
        if found.module in place and place[found.module] >= place[module]
    ]
    assert not wrong, "\n".join(wrong)


def test_no_circle_of_imports() -> None:
    finished: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path, module))
        if module in finished or module not in modules():
            return
        for found in imports_of(module):
            if found.runs_on_import:
                visit(found.module, (*path, module))
        finished.add(module)

    for module in modules():
        visit(module, ())


@pytest.mark.parametrize("room", ["models", "engine"])
def test_networks_and_engine_run_on_a_bare_machine(room: str) -> None:
    wrong = [
        f"{found.place}: {room} imports {found.module}"
        for module, found in all_imports()
        if room_of(module) == room and found.is_foreign and found.library not in BARE_MACHINE
    ]
    assert not wrong, "\n".join(wrong)


def test_libraries_stay_where_they_are_at_home() -> None:
    wrong = [
        f"{found.place}: {room_of(module)} imports {found.module}"
        for module, found in all_imports()
        if found.library in FORBIDDEN
        or room_of(module) not in AT_HOME_IN.get(found.library, {room_of(module)})
    ]
    assert not wrong, "\n".join(wrong)


def torch_free_modules() -> list[str]:
    engine = {f"{PACKAGE}.engine.{name}" for name in TORCH_FREE_ENGINE}
    rooms = {*RANKS[0], *RANKS[1], "text", "playback", "client", "cli"}
    free = [name for name in modules() if name in engine or room_of(name) in rooms]
    return [name for name in free if name != SCRIPTS_DOOR]


@pytest.mark.parametrize("module", [PACKAGE, *torch_free_modules()])
def test_no_torch_is_imported_on_the_way(module: str) -> None:
    libraries = reached_on_import(module)
    assert "torch" not in libraries, f"{module} reaches torch through {libraries['torch']}"


def test_the_command_tree_imports_nothing_heavy() -> None:
    wrong = {
        f"importing {module} imports {library}: {place}"
        for module in modules()
        if room_of(module) == "cli" and module != SCRIPTS_DOOR
        for library, place in reached_on_import(module).items()
        if library in HEAVY
    }
    assert not wrong, "\n".join(sorted(wrong))


@pytest.mark.parametrize("module", [PACKAGE, f"{PACKAGE}.cli"])
def test_importing_loads_nothing_heavy(module: str) -> None:
    code = f"import sys, {module}; print(*sorted({HEAVY!r} & sys.modules.keys()))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert loaded.returncode == 0, loaded.stderr
    assert loaded.stdout.split() == []


def test_files_and_functions_stay_short() -> None:
    wrong = [
        f"{_dotted(file)}: {n_lines} lines"
        for file in modules().values()
        if (n_lines := file.read_text(encoding="utf-8").count("\n")) > MAX_FILE_LINES
    ]
    for module in modules():
        for node in ast.walk(tree_of(module)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                n_lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if n_lines > MAX_FUNCTION_LINES:
                    wrong.append(f"{module}:{node.lineno} {node.name}: {n_lines} lines")
    assert not wrong, "\n".join(wrong)


def test_classes_are_named_for_what_they_are() -> None:
    wrong = [
        f"{module}:{node.lineno} {node.name}"
        for module in modules()
        for node in ast.walk(tree_of(module))
        if isinstance(node, ast.ClassDef) and node.name.removesuffix("s").endswith(BANNED)
    ]
    assert not wrong, "\n".join(wrong)
