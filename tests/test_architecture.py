"""The house rules of the one file, read from the file with ``ast``.

The file system keeps no room borders in a single module, so this test does. The rules
and where their numbers come from are in the module's docstring and in h11's measured
function sizes (median 7, p90 39, max 64 lines).
"""

from __future__ import annotations

import ast
import inspect
import io
import re
import subprocess
import sys
import tokenize
import tomllib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

import embellama_server as es
from tests import kit

ROOM_LINES = 450  # trio's longest room has 762 and is already a scroll
BODY_LINES = 60
NESTING = 4
PARAMETERS = 8

# Name -> why it may be over a ceiling. Empty on purpose: add a reason with the name.
LICENSED: dict[str, str] = {}

Function = ast.FunctionDef | ast.AsyncFunctionDef
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
SCOPES = (*FUNCTIONS, *COMPREHENSIONS, ast.ClassDef, ast.Lambda)
BLOCKS = (
    *(ast.If, ast.For, ast.AsyncFor, ast.While, ast.With, ast.AsyncWith),
    *(ast.Try, ast.TryStar, ast.Match),
)


TEXT = Path(es.__file__).read_text(encoding="utf-8")


# --- the file as rooms ---


@dataclass(frozen=True)
class Room:
    """A banner and the statements under it. Number 0 is the front page."""

    number: int
    title: str
    lines: int
    statements: tuple[ast.stmt, ...]

    @property
    def name(self) -> str:
        """``COMMAND LINE``"""
        return self.title.partition(" - ")[0]


@cache
def rooms(text: str = TEXT) -> list[Room]:
    """A module cut at its banners, ``# 3. ERRORS - what a caller can be told``."""
    lines = text.splitlines()
    banners = [
        (int(match[1]), match[2], at)
        for at, line in enumerate(lines, 1)
        if (match := re.fullmatch(r"# ([0-9]+)\. ([A-Z ]+ - .+)", line))
    ]
    cuts = [(0, "FRONT PAGE - ", 1), *banners]
    ends = [at for _, _, at in banners] + [len(lines) + 1]
    body = ast.parse(text).body
    return [
        Room(n, title, end - at, tuple(s for s in body if at <= s.lineno < end))
        for (n, title, at), end in zip(cuts, ends, strict=True)
    ]


def loads(node: ast.AST, hidden: frozenset[str]) -> Iterator[tuple[str, int]]:
    """Global names that are read, with their lines; locals of that name are not.

    Annotations count: that Python never evaluates them does not make a reader of room
    3 know room 9.
    """
    if isinstance(node, ast.Name):
        if isinstance(node.ctx, ast.Load) and node.id not in hidden:
            yield node.id, node.lineno
        return
    scope: list[ast.AST] = []
    bound: list[ast.AST] = []
    if isinstance(node, (*FUNCTIONS, ast.ClassDef)):
        scope = bound = [*node.body]
    elif isinstance(node, ast.Lambda):
        scope = [node.body]
    elif isinstance(node, COMPREHENSIONS):
        scope = [*ast.iter_child_nodes(node)]
        bound = [generator.target for generator in node.generators]
    if isinstance(node, (*FUNCTIONS, ast.Lambda)):
        bound = [*bound, node.args]
    inside = hidden | frozenset(local_names(bound))
    for child in ast.iter_child_nodes(node):
        # A class's names are seen by its own statements, not inside its methods;
        # decorators, defaults and annotations stand outside of what they belong to.
        is_method = isinstance(node, ast.ClassDef) and isinstance(child, FUNCTIONS)
        yield from loads(child, inside if child in scope and not is_method else hidden)


def local_names(nodes: Iterable[ast.AST]) -> Iterator[str]:
    """Names bound in a scope: parameters, assignments, imports, definitions."""
    for node in nodes:
        if isinstance(node, (*FUNCTIONS, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.alias):
            yield (node.asname or node.name).partition(".")[0]
        elif isinstance(node, ast.ExceptHandler | ast.MatchAs) and node.name:
            yield node.name
        if not isinstance(node, SCOPES):
            yield from local_names(ast.iter_child_nodes(node))


def mentions(house: list[Room]) -> Iterator[tuple[Room, str, Room, int]]:
    """Who mentions what: room, name, the name's room, line."""
    defined = {name: room for room in house for name in local_names(room.statements)}
    for room in house:
        for statement in room.statements:
            for name, line in loads(statement, frozenset()):
                if name in defined:
                    yield room, name, defined[name], line


def functions() -> Iterator[tuple[str, Function]]:
    """Every function, method and closure with its dotted name."""

    def inside(node: ast.AST, path: str) -> Iterator[tuple[str, Function]]:
        for child in ast.iter_child_nodes(node):
            name = path
            if isinstance(child, (*FUNCTIONS, ast.ClassDef)):
                name = f"{path}.{child.name}".lstrip(".")
            if isinstance(child, FUNCTIONS):
                yield name, child
            yield from inside(child, name)

    return inside(ast.parse(TEXT), "")


# --- rooms ---


def announced() -> tuple[list[str], dict[str, str]]:
    """The front page's list of rooms: titles in order, and the wing of each."""
    assert es.__doc__ is not None
    listed = es.__doc__.partition("The rooms\n")[2]
    titles, wings, wing = [], {}, "services"
    for line in listed.splitlines():
        if match := re.fullmatch(r"--- (.+) ---", line):
            wing = match[1]
        elif match := re.fullmatch(r" ?([0-9]+\. [A-Z ]+ - .+)", line):
            titles.append(match[1])
            wings[match[1]] = wing
    return titles, wings


def test_the_banners_are_the_front_page_s_list_in_order() -> None:
    found = [f"{room.number}. {room.title}" for room in rooms()[1:]]
    assert found == announced()[0]
    assert [room.number for room in rooms()] == list(range(len(found) + 1))


def test_the_wing_marks_of_the_banners_are_those_of_the_front_page() -> None:
    mark = r"(?m)^# --- (.+) ---\n# ([0-9]+\. .+)$"
    marked = {title: wing for wing, title in re.findall(mark, TEXT)}
    wings = announced()[1]
    firsts = {wing: title for title, wing in reversed(wings.items())}
    del firsts["services"]
    assert marked == {title: wing for wing, title in firsts.items()}


def broken(house: list[Room], is_wrong: Callable[[Room, Room, str], bool]) -> list[str]:
    """The mentions that break a rule about the room, the name's room, the name."""
    return [
        f"line {line}: {room.name} mentions {name} of {other.name}"
        for room, name, other, line in mentions(house)
        if is_wrong(room, other, name)
    ]


def is_later(room: Room, other: Room, name: str) -> bool:
    """What is named stands further down."""
    return other.number > room.number


def is_private_elsewhere(room: Room, other: Room, name: str) -> bool:
    """What is named is another room's own."""
    return other is not room and name.startswith("_") and not name.startswith("__")


def test_no_room_mentions_a_later_room() -> None:
    assert broken(rooms(), is_later) == []


# Rooms whose names are also words of the field.
ALSO_WORDS = {"GGUF", "OPENAI", "OLLAMA", "TEI"}


def test_no_comment_points_to_a_later_room() -> None:
    order = [room.name for room in rooms()]
    here, found = 0, []
    for token in tokenize.generate_tokens(io.StringIO(TEXT).readline):
        if banner := re.match(r"# [0-9]+\. ([A-Z ]+) - ", token.string):
            here = order.index(banner[1])
        is_prose = token.type == tokenize.COMMENT or token.string.startswith('"""')
        if here and is_prose:
            words = set(re.findall(r"\b[A-Z]+(?: [A-Z]+)*\b", token.string))
            later = words & {*order[here + 1 :]} - ALSO_WORDS
            found += [f"line {token.start[0]}: {order[here]}: {n}" for n in later]
    assert found == []


def test_a_private_name_stays_in_its_room() -> None:
    assert broken(rooms(), is_private_elsewhere) == []


def test_the_two_wings_never_mention_each_other() -> None:
    wings = {title.partition(". ")[2]: wing for title, wing in announced()[1].items()}
    assert set(wings.values()) == {"services", "model wing", "network wing", "hall"}

    def is_across(room: Room, other: Room, name: str) -> bool:
        both = {wings.get(room.title), wings.get(other.title)}
        return both == {"model wing", "network wing"}

    assert broken(rooms(), is_across) == []


EARLY_AND_LATE = """
# 1. EARLY - what is first
def early({parameter}):
    {body}
class Box:
    late: int = 0
    def open(self):
        return {method}
# 2. LATE - what is last
def late():
    return _own
_own = 0
"""


@pytest.mark.parametrize(
    ("parts", "names"),
    [
        ({}, []),
        ({"body": "return late()"}, ["late"]),
        ({"body": "return [late for x in ()]"}, ["late"]),
        ({"body": "return [late for late in ()]"}, []),
        ({"body": "return (lambda: late)()"}, ["late"]),
        ({"body": "return lambda late: late"}, []),
        ({"body": "return _own"}, ["_own"]),
        ({"body": "late = 1; return late"}, []),
        ({"body": "import late; return late"}, []),
        ({"body": "return late", "parameter": "late"}, []),
        ({"parameter": "x: late"}, ["late"]),
        ({"parameter": "x=late"}, ["late"]),
        ({"method": "late"}, ["late"]),
        ({"method": "self.late"}, []),
    ],
)
def test_the_checks_above_do_catch(parts: dict[str, str], names: list[str]) -> None:
    # A checker that finds nothing in a clean file may be one that finds nothing.
    filled = {"parameter": "", "body": "pass", "method": "0"} | parts
    sample = rooms(EARLY_AND_LATE.format(**filled))
    assert [line.split()[4] for line in broken(sample, is_later)] == names
    assert bool(broken(sample, is_private_elsewhere)) == ("_own" in names)


def test_a_room_is_short_enough_to_read() -> None:
    sizes = {room.name: room.lines for room in rooms()}
    assert {name: size for name, size in sizes.items() if size > ROOM_LINES} == {}


# --- functions ---


def body_lines(function: Function) -> int:
    """Lines of the body, the docstring aside."""
    body = function.body
    if ast.get_docstring(function) is not None and len(body) > 1:
        body = body[1:]
    return (function.end_lineno or 0) - body[0].lineno + 1


def nesting(node: ast.AST, depth: int = 0) -> int:
    """Blocks inside blocks; elif is one with its if, a closure starts anew."""
    deepest = depth
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (*FUNCTIONS, ast.ClassDef)):
            continue
        is_elif = (
            isinstance(node, ast.If)
            and isinstance(child, ast.If)
            and child.col_offset == node.col_offset
        )
        deeper = isinstance(child, BLOCKS) and not is_elif
        deepest = max(deepest, nesting(child, depth + deeper))
    return deepest


def parameters(function: Function) -> int:
    """Parameters, self and cls aside."""
    names = [a.arg for a in ast.walk(function.args) if isinstance(a, ast.arg)]
    return len([name for name in names if name not in ("self", "cls")])


@pytest.mark.parametrize(
    ("measure", "ceiling"),
    [(body_lines, BODY_LINES), (nesting, NESTING), (parameters, PARAMETERS)],
    ids=["lines", "nesting", "parameters"],
)
def test_a_function_is_small_unless_it_has_a_licence(
    measure: Callable[[Function], int], ceiling: int
) -> None:
    sizes = {name: measure(function) for name, function in functions()}
    over = {name: size for name, size in sizes.items() if size > ceiling}
    assert {name: size for name, size in over.items() if name not in LICENSED} == {}


def test_everything_public_has_a_docstring() -> None:
    # An override may leave it to the method it overrides (inspect.getdoc looks there),
    # __init__ and its like to their class; _private names and closures are exempt.
    nodes = [
        n for n in ast.parse(TEXT).body if isinstance(n, (*FUNCTIONS, ast.ClassDef))
    ]
    silent = [node.name for node in nodes if not ast.get_docstring(node)]
    silent += [
        f"{node.name}.{method.name}"
        for node in nodes
        for method in node.body
        if isinstance(node, ast.ClassDef) and isinstance(method, FUNCTIONS)
        if not inspect.getdoc(getattr(getattr(es, node.name), method.name))
    ]
    assert [name for name in silent if not re.search(r"(^|\.)_", name)] == []


# --- what may stand where ---


def rooms_with(holds: Callable[[ast.AST], bool]) -> set[str]:
    """Rooms with a node for which ``holds`` is true."""
    return {
        room.name
        for room in rooms()
        for statement in room.statements
        for node in ast.walk(statement)
        if holds(node)
    }


def test_only_the_engine_imports_llama_cpp() -> None:
    def imports_it(node: ast.AST) -> bool:
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        return any(name.split(".")[0] == "llama_cpp" for name in names)

    def names_it(node: ast.AST) -> bool:
        return isinstance(node, ast.Constant) and node.value == "llama_cpp"

    # It does so by name, to leave out the package around the functions; the other
    # room that says the name is the table of libraries.
    assert rooms_with(imports_it) == set()
    assert rooms_with(names_it) == {"THIS BOX", "ENGINE"}


def test_the_parent_has_every_name_that_it_uses() -> None:
    checks = """
import builtins, dis, types
def globals_of(code):
    for one in code.co_consts:
        if isinstance(one, types.CodeType):
            yield from globals_of(one)
    for step in dis.get_instructions(code):
        if step.opname == "LOAD_GLOBAL":
            yield step.argval
codes = []
compile_, compile = compile, lambda *given: codes.append(compile_(*given)) or codes[-1]
"""
    body, _, _ = es._LAUNCHER.rpartition("sys.exit(")
    told = "print({*[n for c in codes for n in globals_of(c)]} - {*globals()} - {*dir(builtins)})"
    ended = subprocess.run(
        [
            *(sys.executable, "-I", "-S", "-c", checks + body + told),
            *(str(kit.ROOT / "embellama_server.py"), es._PARENT_USES, "{}"),
        ],
        check=True,
        capture_output=True,
        text=True,
        timeout=kit.DEADLINE_S,
    )
    # The child's alone: what it tells is not the parent's business.
    assert ended.stdout == "{'parent_settings'}\n"


def test_only_the_command_line_prints() -> None:
    def prints(node: ast.AST) -> bool:
        return isinstance(node, ast.Call) and ast.unparse(node.func) == "print"

    assert rooms_with(prints) == {"COMMAND LINE"}


def test_a_status_number_stands_in_the_table_of_errors_or_is_a_success() -> None:
    # Elsewhere an error is raised by its class. 200 and 204 are what a handler says,
    # 499 is what MESSAGES calls a client that left (nginx's number).
    known = {row.status for row in es.API_ERRORS} | {200, 204, 499}
    sayable = {("Response", 200), ("Response", 204)}

    def says_status(node: ast.AST) -> bool:
        parts = list(ast.iter_child_nodes(node))
        called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
        numbers = {p.value for p in parts if isinstance(p, ast.Constant)} & known
        return any((called, number) not in sayable for number in numbers)

    assert rooms_with(says_status) == {"ERRORS", "MESSAGES"}


# --- the packaging around it ---


def test_what_others_may_import_is_main_the_embedder_and_the_version() -> None:
    assert sorted(es.__all__) == ["Embedder", "__version__", "main"]


def test_the_three_lists_of_requirements_agree() -> None:
    # The regular expression is PEP 723's own.
    block = re.search(r"(?m)^# /// script$\s(?P<content>(^#(| .*)$\s)+)^# ///$", TEXT)
    assert block is not None
    lines = block["content"].splitlines()
    script = tomllib.loads("\n".join(line[2:] for line in lines))
    project = tomllib.loads((kit.ROOT / "pyproject.toml").read_text())["project"]
    rows = [library.requirement for library in es.LIBRARIES]
    assert script["dependencies"] == project["dependencies"] == rows
    assert script["requires-python"] == project["requires-python"]


def test_help_needs_no_library() -> None:
    code = (
        "import sys, embellama_server\n"
        "try: embellama_server.main(['--help'])\n"
        "except SystemExit as end: assert not end.code\n"
        "used = {'numpy', 'llama_cpp', 'orjson', 'uvloop', 'jinja2'} & set(sys.modules)\n"
        "sys.exit(f'imported: {used}' if used else 0)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=kit.ROOT,
        capture_output=True,
        text=True,
        timeout=kit.DEADLINE_S,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "--model-path" in done.stdout
