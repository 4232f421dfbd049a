"""Documentation strings of installed Python packages, read with `ast` and never imported.

`read_docstrings(roots)` walks package folders, parses every module and returns one `Doc` per documented
module, class, function and method: its public name, signature, summary and body. The result depends on the
installed sources alone, not on where they lie, on the order of folders or on compiled files.

Half of the files are parsed by a second interpreter (`python -m conan_jax.data.docstring_reader`, JSON lines
both ways), because parsing is the only slow part and `ast` holds the interpreter lock.
"""

from __future__ import annotations

import ast
import gc
import json
import os
import subprocess
import sys
import sysconfig
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from conan_jax.data.docstring_text import plain_text, split_docstring
from conan_jax.errors import DataError

SKIPPED_FOLDERS = frozenset({
    "__pycache__", "test", "tests", "testing", "_testing", "idle_test", "idlelib", "lib2to3", "turtledemo", "ensurepip",
    "site-packages", "dist-packages", "_vendor", "vendor", "vendored", "_vendored", "externals", "third_party", "node_modules",
})
UNREAD_MODULES = ("__editable__", "test_", "conftest", "_testing", "_mocking")
OWN_PACKAGE = "conan_jax"
MAX_FILE_BYTES = 2_000_000  # larger modules are generated tables


@dataclass(frozen=True)
class Doc:
    """One documented object. `name` is the shortest public path to it, `module` where it is written."""

    name: str
    module: str
    qualname: str  # inside the module; "" for the module itself
    kind: str  # module, class, function, method
    signature: str  # "average(a, axis=None)"; "" for modules
    summary: str  # first sentence or paragraph, one line; may be ""
    body: str  # the rest as plain text with its line breaks; may be ""

    @property
    def package(self) -> str:
        return self.module.partition(".")[0]

    @property
    def parent(self) -> str:
        """The enclosing class as `module:Class`, or the module for what stands at its top level."""
        owner = self.qualname.rpartition(".")[0]
        return f"{self.module}:{owner}" if owner else self.module

    @property
    def is_public(self) -> bool:
        return not any(part.startswith("_") for part in self.name.split("."))


def default_roots() -> list[Path]:
    """The standard library and the packages of the running environment."""
    paths = sysconfig.get_paths()
    roots = dict.fromkeys(Path(paths[key]) for key in ("stdlib", "purelib", "platlib"))
    return [root for root in roots if root.is_dir()]


def find_modules(roots: Iterable[Path]) -> list[tuple[str, Path]]:
    """(module name, file) of every module worth reading, sorted by name; the first root wins when two hold a name."""
    found: dict[str, Path] = {}
    for root in roots:
        root = Path(root)
        if not root.is_dir():
            raise DataError(f"{root} is not a folder of Python packages; pass folders such as a site-packages folder")
        here: dict[str, Path] = {}
        for folder, subfolders, files in os.walk(root):
            subfolders[:] = [s for s in subfolders if s.isidentifier() and s not in SKIPPED_FOLDERS]
            for file in files:
                stem, extension = os.path.splitext(file)
                path = Path(folder, file)
                if extension != ".py" or not stem.isidentifier() or stem.startswith(UNREAD_MODULES) or stem.endswith("_test"):
                    continue
                parts = [*path.relative_to(root).parts[:-1], *([] if stem == "__init__" else [stem])]
                if parts and parts[0] != OWN_PACKAGE and path.stat().st_size <= MAX_FILE_BYTES:
                    here.setdefault(".".join(parts), path) if stem != "__init__" else here.__setitem__(".".join(parts), path)
        for module, path in here.items():
            found.setdefault(module, path)
    return sorted(found.items())


def read_docstrings(
    roots: Sequence[Path] | None = None, *, processes: int = 2, progress: Callable[[int, int], None] = lambda done, total: None
) -> tuple[list[Doc], dict[str, int]]:
    """All documented objects under `roots`, sorted by (module, qualname), and counts of files read and skipped.

    `progress(done, total)` counts files; those of other processes are taken to keep pace with this one's.
    Raises `DataError` when a root is no folder.
    """
    modules = find_modules(default_roots() if roots is None else roots)
    processes = max(1, min(processes, len(modules) // 200))
    shares = [modules[i::processes] for i in range(processes)]
    rows = []
    # A session of their own: Ctrl-C goes to this process alone, and they end with the pipe to it.
    workers = [subprocess.Popen([sys.executable, "-m", __name__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
               for _ in shares[1:]]
    with ThreadPoolExecutor(max_workers=processes) as pool:  # a thread for each worker keeps its pipes moving
        try:
            others = [pool.submit(_parse_elsewhere, worker, share) for worker, share in zip(workers, shares[1:], strict=True)]
            for row in _parse_all(shares[0]):
                rows.append(row)
                progress(min(len(rows) * processes, len(modules)), len(modules))
            for other in others:
                rows.extend(json.loads(line) for line in other.result().splitlines())
        except BaseException:
            for worker in workers:  # the pool waits for its threads, and they for their workers
                worker.kill()
            raise

    rows.sort(key=lambda row: row["module"])  # what is documented twice is taken from the first module, whoever read it
    counts = Counter(row["status"] for row in rows)
    docs: dict[tuple[str, str], Doc] = {}
    for row in rows:
        for fields in row["docs"]:
            docs.setdefault((fields["module"], fields["qualname"]), Doc(**fields))
    names = public_names(docs, [tuple(a) for row in rows for a in row["aliases"]])
    named = [replace(doc, name=names[key]) for key, doc in sorted(docs.items())]
    return named, {"files": len(rows), "unreadable": counts["unreadable"], "docstrings": len(named)}


def public_names(docs: dict[tuple[str, str], Doc], aliases: list[tuple[str, str]]) -> dict[tuple[str, str], str]:
    """The shortest public path to each object, following the re-exports of packages; a name stands for one object.

    `aliases` are (exported path, imported path), with `*` as the last part of both for star imports. An object whose own path is
    public keeps it unless a package re-exports it at a shallower depth.
    """
    tops = {f"{module}.{qualname}" if qualname else module: (module, qualname)
            for module, qualname in docs if "." not in qualname}
    by_module: dict[str, list[str]] = {}
    for path, (module, qualname) in tops.items():
        if qualname:
            by_module.setdefault(module, []).append(path)
    direct = {a: t for a, t in aliases if not a.endswith(".*")}
    stars: dict[str, list[str]] = {}
    exports: dict[str, list[str]] = {}
    for alias, target in aliases:
        if alias.endswith(".*"):
            stars.setdefault(alias[:-2], []).append(target[:-2])
        else:
            exports.setdefault(alias.rpartition(".")[0], []).append(alias)

    def resolve(path: str, depth: int = 0) -> str | None:
        if depth > 8:
            return None
        if direct.get(path, path) != path and (imported := resolve(direct[path], depth + 1)):
            return imported  # before a submodule of the same name: the import comes later
        if path in tops:
            return path
        owner, _, leaf = path.rpartition(".")
        return next((r for star in stars.get(owner, ()) if (r := resolve(f"{star}.{leaf}", depth + 1))), None)

    def names_of(module: str, depth: int = 0) -> Iterator[str]:
        yield from (p.rpartition(".")[2] for p in (*by_module.get(module, ()), *exports.get(module, ())))
        if depth < 8:
            for star in stars.get(module, ()):
                yield from names_of(star, depth + 1)

    candidates = set(direct)
    for module, targets in stars.items():
        candidates.update(f"{module}.{leaf}" for star in targets for leaf in names_of(star))
    best: dict[str, str] = {path: path for path in tops}
    for candidate in sorted(candidates):
        target = resolve(candidate)
        if target and candidate.partition(".")[0] == target.partition(".")[0] and _rank(candidate) < _rank(best[target]):
            best[target] = candidate

    names: dict[tuple[str, str], str] = {}
    taken: set[str] = set()
    for module, qualname in sorted(docs, key=lambda d: (not d[1], d)):
        top, _, rest = qualname.partition(".")
        path = f"{module}.{top}" if top else module
        name = best.get(path, path) + (f".{rest}" if rest else "")
        if name in taken:  # a package often exports a function under the name of the module that holds it
            name = f"{name} (module)" if not qualname else f"{module}.{qualname}"
        taken.add(name)
        names[module, qualname] = name
    return names


def _rank(path: str) -> tuple[bool, int, int, str]:
    parts = path.split(".")
    return any(p.startswith("_") for p in parts), len(parts), len(path), path


def _parse_elsewhere(worker: subprocess.Popen[bytes], share: list[tuple[str, Path]]) -> bytes:
    """The JSON lines of `share`, parsed by `worker`."""
    lines, _ = worker.communicate(json.dumps([[name, str(path)] for name, path in share]).encode())
    if worker.returncode:
        raise DataError(f"a reader of documentation strings ended with code {worker.returncode}")
    return lines


def _parse_all(modules: Iterable[tuple[str, Path]]) -> Iterator[dict]:
    # Syntax trees hold no cycles that matter here; collecting them costs half of the parsing time.
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        for module, path in modules:
            yield _parse_module(module, path)
    finally:
        if was_enabled:
            gc.enable()


def _parse_module(module: str, path: Path) -> dict:
    row: dict = {"module": module, "status": "read", "docs": [], "aliases": []}
    is_package = Path(path).name == "__init__.py"
    try:
        source = Path(path).read_bytes()
        if not (b'"""' in source or b"'''" in source or is_package):
            return row
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's sources
            tree = ast.parse(source)
    except (SyntaxError, ValueError, OSError, RecursionError, MemoryError):
        row["status"] = "unreadable"
        return row
    row["docs"] = [asdict(doc) for doc in _documented(module, tree)]
    row["aliases"] = list(_aliases(module, is_package, tree))
    return row


def _documented(module: str, tree: ast.Module) -> Iterator[Doc]:
    doc = _make(module, "", "module", "", ast.get_docstring(tree))
    if doc:
        yield doc
    pending: list[tuple[str, list[ast.stmt]]] = [("", tree.body)]
    while pending:
        owner, body = pending.pop()
        for node in body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                qualname = f"{owner}.{node.name}" if owner else node.name
                is_class = isinstance(node, ast.ClassDef)
                kind = "class" if is_class else "method" if owner else "function"
                doc = _make(module, qualname, kind, _signature(node), ast.get_docstring(node))
                if doc:
                    yield doc
                if is_class:
                    pending.append((qualname, node.body))
            elif isinstance(node, ast.If | ast.Try):
                pending.append((owner, [*node.body, *node.orelse]))
            elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
                yield from _attached(module, node.value)


def _attached(module: str, call: ast.Call) -> Iterator[Doc]:
    """Docstrings that NumPy and SciPy attach to compiled functions: `add_newdoc([place,] name, doc | (method, doc) | [...])`."""
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    if name != "add_newdoc" or not 2 <= len(call.args) <= 3:
        return
    try:
        *place, obj, text = [ast.literal_eval(arg) for arg in call.args]
    except ValueError:
        return
    where = place[0] if place else module.rpartition(".")[0]
    for method, doc_text in [("", text)] if isinstance(text, str) else [text] if isinstance(text, tuple) else text:
        doc = isinstance(doc_text, str) and _make(where, f"{obj}.{method}" if method else obj, "method" if method else "function",
                                                  f"{method or obj}()", doc_text)
        if doc:
            yield doc


def _make(module: str, qualname: str, kind: str, signature: str, text: str | None) -> Doc | None:
    if not text or not text.strip():
        return None
    stated, summary, body = split_docstring(plain_text(text))
    if not summary and not body:
        return None
    if stated:
        signature = stated
    return Doc(f"{module}.{qualname}" if qualname else module, module, qualname, kind, signature, summary, body)


def _signature(node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    """`name(a, b=1, *rest, **options)` without annotations and without self; a class shows its `__init__`."""
    function = node
    if isinstance(node, ast.ClassDef):
        function = next((n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"), None)
        if function is None:
            return f"{node.name}()"
    a = function.args
    positional = [*a.posonlyargs, *a.args]
    defaults = [None] * (len(positional) - len(a.defaults)) + list(a.defaults)
    parts = [_argument(arg, default) for arg, default in zip(positional, defaults, strict=True)]
    if parts and parts[0] in ("self", "cls"):
        parts = parts[1:]
    if a.vararg:
        parts.append(f"*{a.vararg.arg}")
    elif a.kwonlyargs:
        parts.append("*")
    parts += [_argument(arg, default) for arg, default in zip(a.kwonlyargs, a.kw_defaults, strict=True)]
    if a.kwarg:
        parts.append(f"**{a.kwarg.arg}")
    return f"{node.name}({', '.join(parts)})"


def _argument(arg: ast.arg, default: ast.expr | None) -> str:
    if default is None:
        return arg.arg
    value = default
    if isinstance(value, ast.Constant) and len(shown := repr(value.value)) <= 20:
        return f"{arg.arg}={shown}"
    return f"{arg.arg}={value.id}" if isinstance(value, ast.Name) else f"{arg.arg}=..."


def _aliases(module: str, is_package: bool, tree: ast.Module) -> Iterator[tuple[str, str]]:
    """(exported path, imported path) for what a package's `__init__` imports, and for `import x as x` anywhere."""
    pending = [tree.body]
    while pending:
        for node in pending.pop():
            if isinstance(node, ast.If | ast.Try):
                pending.append([*node.body, *node.orelse])
            elif isinstance(node, ast.ImportFrom):
                base = node.module or ""
                if node.level:
                    owner = module.split(".")
                    owner = owner[: len(owner) - node.level + is_package]
                    base = ".".join([*owner, *([base] if base else [])])
                if base.partition(".")[0] == module.partition(".")[0]:
                    yield from ((f"{module}.{n.asname or n.name}", f"{base}.{n.name}") for n in node.names
                                if is_package or n.asname == n.name)


def _serve() -> None:
    """Read `[[module, file], ...]` from stdin, write one JSON row per module to stdout."""
    for row in _parse_all((module, Path(path)) for module, path in json.load(sys.stdin)):
        sys.stdout.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    _serve()
