"""Find a piece of a function by its shape and replace it.

A pattern is Python with holes. `$name` stands for any expression, or for any name where only a name can be
(an attribute, a keyword); the same `$name` stands for the same code everywhere. `...` stands for any further
arguments of a call, or for any statements. A pattern with holes for local names fits whatever they are
called, and comments and line breaks never count.

    edit("y = torch.mm(a, b, out=c)", "", "torch.mm($left, $right, ...)", "torch.mm($right, $left, ...)")
"""

import ast
import copy
import re
from collections.abc import Iterator
from typing import Any

HOLE = "hole_in_pattern_"
REST = "..."
Found = dict[str, Any]
"""The code that each `$name` stands for, and under REST the runs that each `...` stands for."""


def edit(source: str, function: str, old: str, new: str) -> str:
    """Return `source` with the one place in `function` that `old` describes replaced by `new`.

    `function` is a qualified name such as `Router.forward`, a class, or empty for the whole module. An empty
    `new` removes the statement. Raise LookupError unless exactly one place fits.
    """
    tree = ast.parse(source)
    pattern, replacement = _parsed(old), _parsed(new) or [ast.Pass()]
    scopes: list[ast.AST] = [tree]
    for name in filter(None, function.split(".")):
        kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
        scopes = [
            n for s in scopes for n in ast.walk(s) if isinstance(n, kinds) and n.name == name and n != s
        ]
    if not scopes:
        raise LookupError(f"there is no {function}")
    expression = all(len(side) == 1 and isinstance(side[0], ast.Expr) for side in (pattern, replacement))
    search = _expressions if expression else _statements
    places = [place for scope in scopes for place in search(scope, pattern)]
    if len(places) != 1:
        raise LookupError(f"{function or 'the module'} holds {old!r} {len(places)} times, not once")
    owner, field, start, length, found = places[0]
    filled = _filled(replacement, found)
    value = getattr(owner, field)
    if expression:
        filled = [filled[0].value]
    if isinstance(value, list):
        value[start : start + length] = filled
    else:
        setattr(owner, field, filled[0])
    return ast.unparse(ast.fix_missing_locations(tree)) + "\n"


def _parsed(pattern: str) -> list[Any]:
    """Return a pattern's statements, each `$name` an ordinary name that begins with HOLE."""
    return ast.parse(re.sub(r"\$(?=\w)", HOLE, pattern)).body


Place = tuple[ast.AST, str, int, int, Found]
"""A node, its field, the first and the number of elements where the field is a list, and what was found."""


def _expressions(scope: ast.AST, pattern: list[Any]) -> Iterator[Place]:
    """Yield each expression in `scope` that the one expression of `pattern` describes."""
    for node in ast.walk(scope):
        for field, value in ast.iter_fields(node):
            for start, child in enumerate(value if isinstance(value, list) else [value]):
                found: Found = {REST: []}
                if isinstance(child, ast.expr) and _fits(pattern[0].value, child, found):
                    yield node, field, start, 1, found


def _statements(scope: ast.AST, pattern: list[Any]) -> Iterator[Place]:
    """Yield each run of statements in `scope` that `pattern` describes."""
    for node in ast.walk(scope):
        for field, value in ast.iter_fields(node):
            if not (isinstance(value, list) and value and isinstance(value[0], ast.stmt)):
                continue
            for start in range(len(value) - len(pattern) + 1):
                found: Found = {REST: []}
                if all(_fits(p, v, found) for p, v in zip(pattern, value[start:], strict=False)):
                    yield node, field, start, len(pattern), found


def _fits(pattern: Any, node: Any, found: Found) -> bool:
    """Return whether `node` has the shape of `pattern`; note in `found` what its holes stand for."""
    if isinstance(pattern, ast.Name) and pattern.id.startswith(HOLE) and isinstance(node, ast.expr):
        return _same(found.setdefault(pattern.id, node), node)
    if isinstance(pattern, str) and pattern.startswith(HOLE) and isinstance(node, str):
        return bool(found.setdefault(pattern, node) == node)
    if isinstance(pattern, list) and isinstance(node, list):
        return _all_fit(pattern, node, found)
    if type(pattern) is not type(node):
        return False
    if isinstance(pattern, ast.Call) and any(map(_is_rest, pattern.args)):
        return _call_fits(pattern, node, found)
    if isinstance(pattern, ast.AST):
        return all(_fits(getattr(pattern, f), getattr(node, f), found) for f in _fields(pattern))
    return bool(pattern == node)


def _all_fit(pattern: list[Any], nodes: list[Any], found: Found) -> bool:
    """Compare lists of nodes one by one; `...` among statements takes all that the others leave."""
    (rest,) = [n for n, p in enumerate(pattern) if isinstance(p, ast.Expr) and _is_rest(p.value)] or (None,)
    if rest is None:
        return len(pattern) == len(nodes) and all(
            _fits(p, n, found) for p, n in zip(pattern, nodes, strict=True)
        )
    after = len(nodes) - (len(pattern) - rest - 1)
    found[REST].append(nodes[rest:after])
    return after >= rest and all(
        _fits(p, n, found)
        for p, n in zip(pattern[:rest] + pattern[rest + 1 :], nodes[:rest] + nodes[after:], strict=True)
    )


def _call_fits(pattern: ast.Call, node: ast.Call, found: Found) -> bool:
    """Compare a call whose pattern has `...` as its last argument: further arguments may be anything."""
    *first, _ = pattern.args
    wanted = {keyword.arg: keyword for keyword in pattern.keywords}
    chosen = [keyword for keyword in node.keywords if keyword.arg in wanted]
    rest = node.args[len(first) :], [keyword for keyword in node.keywords if keyword.arg not in wanted]
    found[REST].append(rest)
    return (
        _fits(pattern.func, node.func, found)
        and len(node.args) >= len(first)
        and len(chosen) == len(wanted)
        and all(_fits(p, n, found) for p, n in zip(first, node.args, strict=False))
        and all(_fits(wanted[keyword.arg], keyword, found) for keyword in chosen)
    )


def _filled(replacement: list[Any], found: Found) -> list[Any]:
    """Return the statements of `replacement` with what was found in place of its holes."""
    rests = list(found[REST])

    class Fill(ast.NodeTransformer):
        def visit_Name(self, node: ast.Name) -> Any:
            return copy.deepcopy(found[node.id]) if node.id.startswith(HOLE) else node

        def visit_Call(self, node: ast.Call) -> Any:
            self.generic_visit(node)
            if any(map(_is_rest, node.args)):
                args, keywords = rests.pop(0)
                node.args, node.keywords = [*node.args[:-1], *args], [*node.keywords, *keywords]
            return node

        def visit_Expr(self, node: ast.Expr) -> Any:
            self.generic_visit(node)
            return rests.pop(0) if _is_rest(node.value) else node

        def generic_visit(self, node: ast.AST) -> ast.AST:
            for field, value in ast.iter_fields(node):
                if isinstance(value, str) and value.startswith(HOLE) and not isinstance(node, ast.Name):
                    setattr(node, field, found[value])
            return super().generic_visit(node)

    # A statement may become several, and a lone expression of a pattern is a statement too.
    return Fill().visit(ast.Module(copy.deepcopy(replacement), [])).body  # type: ignore[no-any-return]


def _is_rest(node: Any) -> bool:
    return isinstance(node, ast.Constant) and node.value is ...


def _fields(node: ast.AST) -> list[str]:
    """Return the fields that belong to a node's shape: not whether a name is read or written."""
    return [field for field in node._fields if field not in ("ctx", "kind", "type_comment")]


def _same(one: Any, other: Any) -> bool:
    """Return whether two pieces of code are the same."""
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, ast.AST):
        return type(one) is type(other) and all(
            _same(getattr(one, f), getattr(other, f)) for f in _fields(one)
        )
    return bool(one == other)
