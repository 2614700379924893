"""What a docstring's Raises promises, somebody below raises: the function, or one that it calls, and so on down."""

from __future__ import annotations

import ast
import builtins
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import fastcov.errors
import fastmemit.errors

ROOT = Path(__file__).resolve().parents[1]
Function = ast.FunctionDef | ast.ClassDef
SOURCES = {path: ast.parse(path.read_text(encoding="utf-8")) for top in ("fastcov", "python/fastmemit")
           for path in sorted((ROOT / top).rglob("*.py"))}  # fmt: skip
OURS = {name: kind for module in (fastcov.errors, fastmemit.errors) for name, kind in vars(module).items()
        if isinstance(kind, type) and issubclass(kind, Exception)}  # fmt: skip
#: (file, name) of what stands at the top of a file; methods by name, which `x.name` may mean.
TOP = {(path, node.name): node for path, tree in SOURCES.items() for node in tree.body if isinstance(node, Function)}
METHODS: dict[str, list[tuple[Path, Function]]] = {}
#: The class that a method is of, by the method's id.
OWNER: dict[int, tuple[Path, ast.ClassDef]] = {}
#: (file, name) of what a file imports -> the name and the file that it comes from.
IMPORTED: dict[tuple[Path, str], tuple[Path, str]] = {}
for _path, _tree in SOURCES.items():
    for _node in ast.walk(_tree):
        if isinstance(_node, ast.ClassDef):
            for _part in _node.body:
                if isinstance(_part, Function):
                    METHODS.setdefault(_part.name, []).append((_path, _part))
                    OWNER[id(_part)] = (_path, _node)
        elif isinstance(_node, ast.ImportFrom) and _node.module:
            _home = ROOT.joinpath("python" if _node.module.startswith("fastmemit") else "", *_node.module.split("."))
            for _name in _node.names:
                _file = _home / "__init__.py" if _home.is_dir() else _home.with_suffix(".py")
                IMPORTED[_path, _name.asname or _name.name] = (_file, _name.name)
#: Where nothing says of which class an object is: methods of a name that more classes have are not followed.
SHARED = 3
Class = tuple[Path, ast.ClassDef]


def meant(path: Path, name: str) -> list[tuple[Path, Function]]:
    """The function or class that a file means by a name."""
    for _ in range(4):  # through packages that hand a name on
        if (path, name) in TOP:
            return [(path, TOP[path, name])]
        if (path, name) not in IMPORTED:
            return []
        path, name = IMPORTED[path, name]
    return []


@cache
def used(path: Path, node: Function) -> tuple[frozenset[str], tuple[tuple[Path, Function], ...]]:
    """The names in a body (what is raised, or handed on to be raised, among them), and what it may call."""
    words: set[str] = set()
    calls: list[tuple[Path, Function]] = []
    body = node.body
    if isinstance(node, ast.ClassDef):  # to call it, which makes one
        body = [part for part in body if isinstance(part, Function) and part.name in _MAKING]
    for each in _walk(body):
        if isinstance(each, ast.Name):
            words.add(each.id)
            calls += meant(path, each.id)
        elif isinstance(each, ast.Attribute):
            words.add(each.attr)
            home = _home_of(path, each.value.id if isinstance(each.value, ast.Name) else "")
            kind = None if home else class_of(path, each.value, node)
            if kind is not None:
                there = methods_of(kind, each.attr)
            else:
                there = METHODS.get(each.attr, [])
                there = there if len(there) <= SHARED else []
            calls += (home and meant(home, each.attr)) or there
    return frozenset(words), tuple(calls)


def class_of(path: Path, value: ast.expr, inside: Function) -> Class | None:
    """The class of ours that an object is of, by the annotation of an argument or of a field, or by what made it."""
    if isinstance(value, ast.Name):
        return OWNER.get(id(inside)) if value.id == "self" else known(path, inside).get(value.id)
    if isinstance(value, ast.Call) and isinstance(value.func, ast.Name):
        return annotated(path, value.func)
    if isinstance(value, ast.Attribute) and (of := class_of(path, value.value, inside)):
        return field_of(of, value.attr)
    return None


@cache
def known(path: Path, inside: Function) -> dict[str, Class]:
    """The classes of ours that names in a function stand for: of arguments, and of what is made once and not again."""
    parts = list(ast.walk(inside))
    stored = Counter(part.id for part in parts if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store))
    found: dict[str, Class | None] = {}
    for part in parts:
        if isinstance(part, ast.arg) and not stored[part.arg]:
            found[part.arg] = annotated(path, part.annotation)
        elif (
            isinstance(part, ast.Assign) and isinstance(part.targets[0], ast.Name) and isinstance(part.value, ast.Call)
        ):
            name = part.targets[0].id
            found[name] = annotated(path, part.value.func) if stored[name] == 1 else None
    return {name: kind for name, kind in found.items() if kind}


def annotated(path: Path, note: ast.expr | None) -> Class | None:
    """The class of ours that an annotation names, alone or beside None."""
    if isinstance(note, ast.BinOp) and isinstance(note.right, ast.Constant):
        note = note.left
    if not isinstance(note, ast.Name):
        return None
    ((home, found),) = meant(path, note.id) or [(path, None)]
    return (home, found) if isinstance(found, ast.ClassDef) else None


@cache
def field_of(of: Class, name: str) -> Class | None:
    """The class of an attribute: by its annotation, by a property's, or as `__init__` takes it from an argument."""
    path, kind = of
    for part in kind.body:
        if isinstance(part, ast.AnnAssign) and ast.unparse(part.target) == name:
            return annotated(path, part.annotation)
        if isinstance(part, ast.FunctionDef) and part.name == name:
            return annotated(path, part.returns)
        if isinstance(part, ast.FunctionDef) and part.name == "__init__":
            for each in ast.walk(part):
                if isinstance(each, ast.Assign):
                    target, value = each.targets[0], each.value
                    pairs = [(target, value)]
                    if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
                        pairs = list(zip(target.elts, value.elts, strict=True))
                    for one, other in pairs:
                        if ast.unparse(one) == f"self.{name}":
                            return class_of(path, other, part)
    return None


def methods_of(kind: Class, name: str) -> list[tuple[Path, Function]]:
    """The methods that a call by this name may mean: the class's own or its bases', and those of its subclasses."""
    found = [node for each in (*bases(kind), *heirs(kind)) for node in each[1].body
             if isinstance(node, Function) and node.name == name]  # fmt: skip
    return [(OWNER[id(node)][0], node) for node in found]


@cache
def bases(kind: Class) -> tuple[Class, ...]:
    """A class and those of ours that it is made from."""
    path, node = kind
    names = [base.id for base in node.bases if isinstance(base, ast.Name)]
    above = [(home, found) for name in names for home, found in meant(path, name) if isinstance(found, ast.ClassDef)]
    return (kind, *(each for one in above for each in bases(one)))


@cache
def heirs(kind: Class) -> tuple[Class, ...]:
    """The classes that are made from a class."""
    every = [(path, node) for (path, _), node in TOP.items() if isinstance(node, ast.ClassDef)]
    return tuple(each for each in every if each != kind and kind in bases(each))


def _home_of(path: Path, name: str) -> Path | None:
    """The file of a module that a file imports by this name."""
    where, of = IMPORTED.get((path, name), (None, ""))
    if name == "fastcov":
        return ROOT / "fastcov" / "__init__.py"
    return None if where is None or not (home := where.parent / f"{of}.py").is_file() else home


_MAKING = ("__init__", "__post_init__", "__enter__", "__exit__", "__call__", "__iter__", "__next__")


def _walk(nodes: Sequence[ast.AST]) -> Iterator[ast.AST]:
    """What `ast.walk` gives but annotations, which call nobody, and what is caught, which is not raised by that."""
    for node in nodes:
        yield node
        for name, value in ast.iter_fields(node):
            if name not in ("annotation", "returns") and not (isinstance(node, ast.ExceptHandler) and name == "type"):
                parts = value if isinstance(value, list) else [value]
                yield from _walk([part for part in parts if isinstance(part, ast.AST)])


def below(path: Path, start: Function) -> set[str]:
    """The names in a function and in all that it may call."""
    seen, found, left = {id(start)}, set(), [(path, start)]
    while left:
        words, calls = used(*left.pop())
        found |= words
        left += [each for each in calls if id(each[1]) not in seen]
        seen |= {id(node) for _, node in calls}
    return found


def promises() -> list[Any]:
    """(file, function, exception) of every entry of a Raises."""
    found = []
    for path, tree in SOURCES.items():
        for node in ast.walk(tree):
            said = ast.get_docstring(node) if isinstance(node, Function) else None
            section = re.search(r"^Raises:\n((?: {4}.*\n?|\n)+)", said or "", re.MULTILINE)
            for entry in re.findall(r"^ {4}(\S[^:\n]*):", section[1] if section else "", re.MULTILINE):
                for name in entry.split(", "):
                    found.append((path, node, name.rpartition(".")[2]))
    return found


#: torch's, and two that no caller meets.
ELSEWHERE = ("OutOfMemoryError", "_Reached", "_NoLocks")
#: By a method whose name too many share: `Processes.check`.
UNSEEN = {("read", "FailedElsewhere")}


def test_each_error_that_is_promised_exists_and_can_come() -> None:
    wrong = []
    for path, function, name in promises():
        place = f"{path.relative_to(ROOT)}:{function.lineno} {function.name}"
        kind = OURS.get(name)
        if kind is None:
            known = isinstance(getattr(builtins, name, None), type) or name in ELSEWHERE
            wrong += [] if known else [f"{place}: there is no {name}"]
        elif (function.name, name) not in UNSEEN and not any(
            name in OURS and issubclass(OURS[name], kind) for name in below(path, function)
        ):
            wrong.append(f"{place}: nobody below raises {name}")
    assert not wrong, "\n".join(wrong)
    assert len(promises()) > 250


def test_an_error_that_cannot_come_is_seen() -> None:
    path = ROOT / "fastcov" / "moments.py"
    found = below(path, TOP[path, "budget"])
    assert "BadInput" in found and "StoreDamaged" not in found


def test_a_method_of_the_same_name_elsewhere_hides_nothing() -> None:
    """`work.statistics.factor` is the store's, and not that of preserved keys, which raises other errors."""
    path = ROOT / "python" / "fastmemit" / "methods" / "solve.py"
    lines = "def f(draft: Draft, text: PreservedText):\n    draft.work.statistics.find(())\n    text.nothing()"
    calling = ast.parse(lines).body[0]
    assert isinstance(calling, ast.FunctionDef)
    base = ROOT / "python" / "fastmemit" / "methods" / "base.py"
    (found,) = used(base, calling)[1][-1:]
    assert found == (path.parents[1] / "statistics.py", next(
        node for node in TOP[path.parents[1] / "statistics.py", "StatisticsStore"].body
        if isinstance(node, ast.FunctionDef) and node.name == "find"))  # fmt: skip


def test_to_catch_an_error_is_not_to_raise_it() -> None:
    path = ROOT / "fastcov" / "moments.py"
    catching = ast.parse("def f():\n    try:\n        g()\n    except StoreDamaged as error:\n        h(error)").body[0]
    assert isinstance(catching, ast.FunctionDef)
    assert below(path, catching) == {"g", "h", "error"}
