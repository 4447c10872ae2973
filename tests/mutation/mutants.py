"""Mutants: one small change each to the syntax tree of one module.

What is changed: checks are removed, conditions held open or shut, comparisons moved by one,
`and` swapped with `or`, operands, named arguments, assignments to members and calls dropped,
numbers and texts changed, what is returned or raised replaced, cases and handlers taken out.
Module-level constants, lists and patterns are changed too.

What is not: annotations, docstrings, sentences for people, `slots` and the sizes of caches.
None of them decides anything.

A mutant is applied to the tree in place and never undone: that happens in a forked child only.
"""

import ast
import copy
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import CodeType
from typing import Final, NamedTuple

_FUNCTIONS: Final = (ast.FunctionDef, ast.AsyncFunctionDef)
#: `# 4 to 6`: the numbers of the steps that the statements below this comment take.
_STEP: Final = re.compile(r"\s*# (?P<first>\d+)(?P<part>[a-z])?(?: (?:to|and) (?P<last>\d+))?\b")
#: A module-level name of this form is a type.
_TYPE_NAME: Final = re.compile(r"[A-Z][a-z]\w*")
_NOT_VISITED: Final = frozenset(("annotation", "returns", "ctx", "op", "ops", "type_comment"))
#: Keyword arguments that decide nothing.
_INDIFFERENT: Final = frozenset(("slots", "maxsize", "name", "daemon"))

_COMPARISONS: Final[dict[type[ast.cmpop], type[ast.cmpop]]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
_OPERATORS: Final[dict[type[ast.operator], type[ast.operator]]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Add,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
    ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
}
_FUNCTIONS_SWAPPED: Final = {"min": "max", "max": "min", "all": "any", "any": "all"}
_METHODS_SWAPPED: Final = {"partition": "rpartition", "rpartition": "partition"}
#: Characters of a mutant's line, and around what differs in a longer one.
_LONGEST_LINE: Final = 100
_CONTEXT: Final = 40
#: Methods that return their object, somewhat changed.
_METHODS_DROPPED: Final = frozenset(("lower", "strip", "lstrip", "removeprefix"))


@dataclass(frozen=True, slots=True, eq=False)
class Edit:
    """One node in place of another."""

    parent: ast.AST
    field: str
    index: int | None
    node: ast.AST

    def put(self, node: ast.AST) -> None:
        if self.index is None:
            setattr(self.parent, self.field, node)
        else:
            getattr(self.parent, self.field)[self.index] = node


@dataclass(frozen=True, slots=True, eq=False)
class Mutant:
    """One changed module.

    Attributes:
        function: in which function it is; empty: it happens when the module is imported.
        statement: the innermost statement around it, as `Source.statements` numbers them.
        is_removed_check: whether it takes out a refusal and changes nothing else.
        was, becomes: the place before and after, in one line.  With module and function they are
            the name of the mutant, which stays the same while code around it moves.
        constant: which module-level name it changes; empty: none, or it is not known.
    """

    module: str
    function: str
    line: int
    statement: int
    is_removed_check: bool
    was: str
    becomes: str
    edits: tuple[Edit, ...]
    constant: str = ""

    def apply(self) -> None:
        """Change the tree.  There is no way back."""
        for edit in self.edits:
            edit.put(edit.node)

    @property
    def place(self) -> str:
        module = self.module.removeprefix("coatcheck.").removeprefix("verifier.")
        return f"{module}.{self.function}" if self.function else module

    def __str__(self) -> str:
        return f"{self.place}: {self.was}  →  {self.becomes}"


class Source:
    """One module, parsed."""

    def __init__(self, module: str, path: Path) -> None:
        self.module = module
        self.path = path
        text = path.read_text(encoding="utf-8")
        self.tree = ast.parse(text)
        self.lines = text.splitlines()
        self.statements = {
            id(node): number
            for number, node in enumerate(ast.walk(self.tree))
            if isinstance(node, ast.stmt)
        }

    def code(self) -> CodeType:
        """The module as it is now, changed or not."""
        return compile(ast.fix_missing_locations(self.tree), str(self.path), "exec")

    def mutants(self, left_out: frozenset[str] = frozenset()) -> list[Mutant]:
        """All of them, but for those in the functions, classes and constants named."""
        return list(_Finder(self, left_out).found())

    def steps(self) -> dict[str, Mutant]:
        """Every numbered step removed as a whole, by place and label, as `check.read 1a`."""
        found = {}
        for name, function in _functions(self.tree):
            for label, statements in self._blocks(function):
                edits = tuple(_disarmed(statements, self.tree))
                if edits:
                    mutant = Mutant(
                        self.module,
                        name,
                        statements[0].lineno,
                        self.statements[id(statements[0])],
                        is_removed_check=True,
                        was=f"step {label}",
                        becomes="nothing",
                        edits=edits,
                    )
                    found[f"{mutant.place} {label}"] = mutant
        return found

    def _blocks(
        self, function: ast.FunctionDef | ast.AsyncFunctionDef
    ) -> Iterator[tuple[str, list[ast.stmt]]]:
        """The statements of a function below each comment that holds a number."""
        label, block = "", list[ast.stmt]()
        before = function.lineno
        for statement in function.body:
            for line in self.lines[before : statement.lineno]:
                if numbered := _STEP.match(line):
                    if label and block:
                        yield label, block
                    label, block = numbered[0].strip("# "), []
            before = statement.end_lineno or statement.lineno
            block.append(statement)
        if label and block:
            yield label, block

    def mentions(self, name: str) -> frozenset[int] | None:
        """The statements in functions that mention a name.  None: the import mentions it too."""
        found = set[int]()
        for place in _places(self.tree):
            node = place.node
            is_read = isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)
            if (is_read and isinstance(node, ast.Name) and node.id == name) or (
                isinstance(node, ast.Attribute) and node.attr == name
            ):
                if id(node) not in self._statement_around:
                    return None
                found.add(self._statement_around[id(node)])
        return frozenset(found)

    @cached_property
    def _statement_around(self) -> dict[int, int]:
        """For each node in a function's body the innermost statement around it."""
        around = dict[int, int]()

        def walk(node: ast.AST, number: int | None) -> None:
            for field, value in ast.iter_fields(node):
                is_run = field == "body" and isinstance(node, _FUNCTIONS)
                for child in value if isinstance(value, list) else [value]:
                    if isinstance(child, ast.AST):
                        inner = None
                        if number is not None or is_run:
                            inner = self.statements.get(id(child), number)
                        if inner is not None:
                            around[id(child)] = inner
                        walk(child, inner)

        walk(self.tree, None)
        return around

    def instrument(self) -> None:
        """Let each statement in a function say `__reached__(number)` before it runs."""
        for node in list(ast.walk(self.tree)):
            if isinstance(node, _FUNCTIONS):
                self._instrument(node.body)

    def _instrument(self, body: list[ast.stmt]) -> None:
        for statement in tuple(body):
            number = self.statements.get(id(statement))
            if number is None or isinstance(statement, ast.ClassDef):
                continue
            call = ast.Call(ast.Name("__reached__", ast.Load()), [ast.Constant(number)], [])
            body.insert(body.index(statement), ast.copy_location(ast.Expr(call), statement))
            if isinstance(statement, _FUNCTIONS):
                continue  # It has its own turn.
            for inner in ast.iter_child_nodes(statement):
                if isinstance(inner, ast.ExceptHandler | ast.match_case):
                    self._instrument(inner.body)
            for field in ("body", "orelse", "finalbody"):
                self._instrument(getattr(statement, field, []))


def numbers(label: str) -> set[str]:
    """What a label stands for: `4 to 6` is 4, 5 and 6."""
    found = _STEP.match(f"# {label}")
    assert found is not None
    first, last = int(found["first"]), int(found["last"] or found["first"])
    return {f"{number}{found['part'] or ''}" for number in range(first, last + 1)}


def _functions(
    node: ast.AST, around: str = ""
) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """The functions and methods of a module, by name."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, _FUNCTIONS):
            yield around + child.name, child
        elif isinstance(child, ast.ClassDef):
            yield from _functions(child, f"{around}{child.name}.")


def _disarmed(statements: Sequence[ast.stmt], tree: ast.Module) -> list[Edit]:
    """Everything in these statements that refuses, made to do nothing.

    Where they only hand over to functions of the same module, it is the bodies of those.
    """
    refusals = [place for place in _places(tree) if _is_refusal(place.node)]

    def within(body: Sequence[ast.stmt]) -> list[Edit]:
        lines = {
            line for one in body for line in range(one.lineno, (one.end_lineno or one.lineno) + 1)
        }
        return [
            Edit(place.parent, place.field, place.index, ast.Pass())
            for place in refusals
            if getattr(place.node, "lineno", 0) in lines
        ]

    if edits := within(statements):
        return edits
    called = {
        node.func.id
        for statement in statements
        for node in ast.walk(statement)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    handed_over = (function.body for name, function in _functions(tree) if name in called)
    return [edit for body in handed_over for edit in within(body)]


def _is_refusal(node: ast.AST) -> bool:
    return isinstance(node, ast.Raise) or (
        isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
    )


def _places(tree: ast.AST) -> Iterator[Edit]:
    """Every node below this one, where it is."""
    for parent in ast.walk(tree):
        for field, value in ast.iter_fields(parent):
            if isinstance(value, ast.AST):
                yield Edit(parent, field, None, value)
            elif isinstance(value, list):
                for index, node in enumerate(value):
                    if isinstance(node, ast.AST):
                        yield Edit(parent, field, index, node)


@dataclass(frozen=True, slots=True)
class _Around:
    """Where the finder is."""

    ancestors: tuple[ast.AST, ...]
    function: str = ""
    statement: int = 0
    is_raised: bool = False

    @property
    def parent(self) -> ast.AST:
        return self.ancestors[-1]


class _Named(NamedTuple):
    """A node in place of another, where one of the two lines would be too long."""

    node: ast.AST
    was: str
    becomes: str


_Alternatives = Iterator[ast.AST | _Named]


class _Finder:
    """Walks through a module and makes the mutants of each node."""

    def __init__(self, source: Source, left_out: frozenset[str]) -> None:
        self._source = source
        self._left_out = left_out
        self._names = Counter[tuple[str, str, str]]()
        self._alternatives: dict[type[ast.AST], Callable[[ast.AST, _Around], _Alternatives]] = {
            kind: method
            for kinds, method in (
                ((ast.If,), self._of_if),
                ((ast.Raise,), self._of_raise),
                ((ast.Expr,), self._of_call_statement),
                ((ast.Assign, ast.AnnAssign, ast.AugAssign), self._of_assignment),
                ((ast.Delete, ast.Break, ast.Continue), self._dropped),
                ((ast.Return,), self._of_return),
                ((ast.For, ast.AsyncFor), self._of_loop),
                ((ast.ExceptHandler,), self._of_handler),
                ((ast.match_case,), self._of_case),
                ((ast.comprehension,), self._of_comprehension),
                ((ast.Compare,), self._of_comparison),
                ((ast.BoolOp,), self._of_bool_op),
                ((ast.UnaryOp,), self._of_unary),
                ((ast.BinOp,), self._of_binary),
                ((ast.IfExp,), self._of_if_expression),
                ((ast.Tuple,), self._of_list),
                ((ast.Constant,), self._of_constant),
                ((ast.Call,), self._of_call),
                ((ast.Attribute,), self._of_attribute),
            )
            for kind in kinds
        }

    def found(self) -> Iterator[Mutant]:
        yield from self._visit_all(self._source.tree, _Around((self._source.tree,)))

    def _visit_all(self, node: ast.AST, around: _Around) -> Iterator[Mutant]:
        for field, value in ast.iter_fields(node):
            if field in _NOT_VISITED:
                continue
            for index, child in enumerate(value if isinstance(value, list) else [value]):
                if isinstance(child, ast.AST):
                    at = index if isinstance(value, list) else None
                    yield from self._visit(Edit(node, field, at, child), around)

    def _visit(self, place: Edit, around: _Around) -> Iterator[Mutant]:
        node = place.node
        if self._is_left_out(node, around):
            return
        inner = _Around(
            (*around.ancestors, node),
            around.function,
            self._source.statements.get(id(node), around.statement),
            around.is_raised or isinstance(node, ast.Raise),
        )
        alternatives = self._alternatives.get(type(node))
        if alternatives is not None:
            for changed in alternatives(node, around):
                yield self._mutant(place, changed, inner)
        if isinstance(node, _FUNCTIONS) and not around.function:
            # Decorators and defaults belong to the import, the body to the call.
            yield from self._visit_all(node.args, inner)
            name = ".".join((*_definitions(around), node.name))
            body = _Around(inner.ancestors, name, inner.statement)
            for index, statement in enumerate(node.body):
                yield from self._visit(Edit(node, "body", index, statement), body)
        else:
            yield from self._visit_all(node, inner)

    def _is_left_out(self, node: ast.AST, around: _Around) -> bool:
        match node:
            case ast.Import() | ast.ImportFrom() | ast.Expr(value=ast.Constant()):
                return True  # The last one is a docstring, or `...`.
            case ast.JoinedStr():
                return around.is_raised
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                name = ".".join((*_definitions(around), node.name))
                is_protocol = isinstance(node, ast.ClassDef) and any(
                    isinstance(base, ast.Name) and base.id == "Protocol" for base in node.bases
                )
                return is_protocol or name in self._left_out
            case ast.Assign(targets=[ast.Name(id=name)]) | ast.AnnAssign(target=ast.Name(id=name)):
                is_type = _TYPE_NAME.fullmatch(name) is not None and not around.function
                return is_type or name == "__all__" or name in self._left_out
            case ast.Expr(value=ast.Call()) | ast.If() if not around.function:
                return True  # Registrations at import.
            case ast.keyword(arg=argument):
                return argument in _INDIFFERENT
        return False

    def _mutant(self, place: Edit, alternative: ast.AST | _Named, around: _Around) -> Mutant:
        before = place.node
        changed = alternative.node if isinstance(alternative, _Named) else alternative
        edit = Edit(place.parent, place.field, place.index, changed)
        if isinstance(alternative, _Named):
            was, becomes = alternative.was, alternative.becomes
        else:
            shown = _shown(before, around)
            was = _line(shown)
            edit.put(changed)
            becomes = _line(changed if shown is before else shown)
            edit.put(before)
        was, becomes = _shortened(was, becomes)
        name = (around.function, was, becomes)
        self._names[name] += 1
        if self._names[name] > 1:
            becomes += f"  (no. {self._names[name]})"
        return Mutant(
            self._source.module,
            around.function,
            getattr(before, "lineno", 0),
            around.statement,
            _is_removed_check(before, changed),
            was,
            becomes,
            (edit,),
            constant=_constant(around),
        )

    # Statements.

    def _of_if(self, node: ast.AST, around: _Around) -> _Alternatives:
        assert isinstance(node, ast.If)
        for value in (False, True):
            yield ast.If(ast.Constant(value), node.body, node.orelse)

    def _of_raise(self, node: ast.AST, around: _Around) -> _Alternatives:
        assert isinstance(node, ast.Raise)
        parent = around.parent
        if not (isinstance(parent, ast.If) and parent.body == [node] and not parent.orelse):
            yield ast.Pass()
        if isinstance(node.exc, ast.Call):
            other = _other_error(node.exc.func)
            if other is not None:
                call = ast.Call(other, node.exc.args, node.exc.keywords)
                yield ast.Raise(call, node.cause)
        elif (other := _other_error(node.exc)) is not None:
            yield ast.Raise(other, node.cause)

    def _of_call_statement(self, node: ast.AST, around: _Around) -> _Alternatives:
        assert isinstance(node, ast.Expr)
        is_super = any(
            isinstance(inner, ast.Name) and inner.id == "super" for inner in ast.walk(node)
        )
        if is_super:
            # `super` makes the function hold its class, which a function cannot lose afterwards.
            yield ast.Expr(ast.Name("__class__", ast.Load()))
        elif isinstance(node.value, ast.Call | ast.Await):
            yield ast.Pass()

    def _of_assignment(self, node: ast.AST, around: _Around) -> _Alternatives:
        assert isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign)
        if not around.function:
            return
        target = node.targets[0] if isinstance(node, ast.Assign) else node.target
        is_member = isinstance(target, ast.Attribute | ast.Subscript)
        if isinstance(node, ast.AugAssign):
            yield ast.Pass()
            yield ast.AugAssign(node.target, _OPERATORS[type(node.op)](), node.value)
        elif is_member and node.value is not None:
            yield ast.Pass()

    def _dropped(self, node: ast.AST, around: _Around) -> _Alternatives:
        yield ast.Pass()

    def _of_return(self, node: ast.AST, around: _Around) -> _Alternatives:
        assert isinstance(node, ast.Return)
        if node.value is None:
            return
        if not (isinstance(node.value, ast.Constant) and node.value.value is None):
            yield ast.Return(ast.Constant(None))
        function = next(one for one in reversed(around.ancestors) if isinstance(one, _FUNCTIONS))
        is_bool = isinstance(function.returns, ast.Name) and function.returns.id == "bool"
        if is_bool and not isinstance(node.value, ast.Constant):
            yield ast.Return(ast.Constant(value=True))

    def _of_loop(self, node: ast.AST, around: _Around) -> _Alternatives:
        assert isinstance(node, ast.For | ast.AsyncFor)
        changed = copy.copy(node)
        changed.iter = ast.Tuple([], ast.Load())
        yield changed

    def _of_handler(self, node: ast.AST, around: _Around) -> _Alternatives:
        assert isinstance(node, ast.ExceptHandler)
        kinds = node.type.elts if isinstance(node.type, ast.Tuple) else [ast.Constant(None)]
        for kind in kinds:
            left = [other for other in kinds if other is not kind]
            yield ast.ExceptHandler(ast.Tuple(left, ast.Load()), node.name, node.body)

    def _of_case(self, node: ast.AST, around: _Around) -> _Alternatives:
        assert isinstance(node, ast.match_case)
        yield ast.match_case(node.pattern, ast.Constant(value=False), node.body)

    # Expressions.

    def _of_comprehension(self, node: ast.AST, around: _Around) -> _Alternatives:
        assert isinstance(node, ast.comprehension)
        for value in (True, False) if node.ifs else ():
            yield ast.comprehension(
                node.target, node.iter, [ast.Constant(value)], is_async=node.is_async
            )

    def _of_comparison(self, node: ast.AST, around: _Around) -> _Alternatives:
        assert isinstance(node, ast.Compare)
        for index, operator in enumerate(node.ops):
            operators = [*node.ops]
            operators[index] = _COMPARISONS[type(operator)]()
            yield ast.Compare(node.left, operators, node.comparators)

    def _of_bool_op(self, node: ast.AST, around: _Around) -> _Alternatives:
        assert isinstance(node, ast.BoolOp)
        yield ast.BoolOp(ast.Or() if isinstance(node.op, ast.And) else ast.And(), node.values)
        for index, operand in enumerate(node.values):
            left = node.values[:index] + node.values[index + 1 :]
            changed = left[0] if len(left) == 1 else ast.BoolOp(node.op, left)
            word = "and" if isinstance(node.op, ast.And) else "or"
            yield _Named(changed, f"{word} {ast.unparse(operand)}", "nothing")

    def _of_unary(self, node: ast.AST, around: _Around) -> _Alternatives:
        assert isinstance(node, ast.UnaryOp)
        yield node.operand

    def _of_binary(self, node: ast.AST, around: _Around) -> _Alternatives:
        assert isinstance(node, ast.BinOp)
        yield ast.BinOp(node.left, _OPERATORS[type(node.op)](), node.right)

    def _of_if_expression(self, node: ast.AST, around: _Around) -> _Alternatives:
        assert isinstance(node, ast.IfExp)
        yield node.body
        yield node.orelse

    def _of_list(self, node: ast.AST, around: _Around) -> _Alternatives:
        assert isinstance(node, ast.Tuple)
        is_registry = not around.function and isinstance(around.parent, ast.AnnAssign)
        for index, element in enumerate(node.elts if is_registry else ()):
            if not isinstance(element, ast.Constant):
                yield ast.Tuple(node.elts[:index] + node.elts[index + 1 :], ast.Load())

    def _of_constant(self, node: ast.AST, around: _Around) -> _Alternatives:
        assert isinstance(node, ast.Constant)
        value = node.value
        if isinstance(value, bool):
            yield ast.Constant(not value)
        elif isinstance(value, int):
            yield from map(ast.Constant, (value + 1, value - 1))
        elif isinstance(value, float):
            yield from map(ast.Constant, (value * 2, value / 2))
        elif isinstance(value, bytes):
            yield ast.Constant(value + b"X")
        elif isinstance(value, str) and _is_of_a_pattern(around):
            yield from map(ast.Constant, _other_patterns(value))
        elif isinstance(value, str) and not (around.is_raised and " " in value):
            yield ast.Constant(value + "X")

    def _of_call(self, node: ast.AST, around: _Around) -> _Alternatives:
        assert isinstance(node, ast.Call)
        function = node.func
        if isinstance(function, ast.Name) and function.id in _FUNCTIONS_SWAPPED:
            other = ast.Name(_FUNCTIONS_SWAPPED[function.id], ast.Load())
            yield ast.Call(other, node.args, node.keywords)
        if isinstance(function, ast.Attribute):
            if function.attr in _METHODS_DROPPED:
                yield function.value
            if function.attr in _METHODS_SWAPPED:
                method = ast.Attribute(function.value, _METHODS_SWAPPED[function.attr], ast.Load())
                yield ast.Call(method, node.args, node.keywords)
        if not around.function or around.is_raised:
            return
        for index, keyword in enumerate(node.keywords):
            if keyword.arg is not None and keyword.arg not in _INDIFFERENT:
                left = node.keywords[:index] + node.keywords[index + 1 :]
                yield ast.Call(function, node.args, left)

    def _of_attribute(self, node: ast.AST, around: _Around) -> _Alternatives:
        assert isinstance(node, ast.Attribute)
        if isinstance(node.value, ast.Name) and node.value.id == "Reason":
            other = "API_KEY_UNKNOWN" if node.attr == "ORG_SUSPENDED" else "ORG_SUSPENDED"
            yield ast.Attribute(node.value, other, ast.Load())


def _shown(node: ast.AST, around: _Around) -> ast.AST:
    """The smallest node around this one that tells a reader where they are."""
    if not isinstance(node, ast.Constant | ast.Name | ast.Attribute | ast.comprehension):
        return node
    for ancestor in reversed(around.ancestors[:-1]):
        if isinstance(ancestor, ast.expr | ast.stmt | ast.ExceptHandler | ast.match_case):
            return ancestor
    return node


def _line(node: ast.AST) -> str:
    """The first line of a node's text."""
    if isinstance(node, ast.ExceptHandler):
        return f"except {'' if node.type is None else ast.unparse(node.type)}:"
    if isinstance(node, ast.match_case):
        guard = "" if node.guard is None else f" if {ast.unparse(node.guard)}"
        return f"case {ast.unparse(node.pattern)}{guard}:"
    return ast.unparse(node).splitlines()[0]


def _shortened(was: str, becomes: str) -> tuple[str, str]:
    """Two long lines, cut down to where they differ."""
    if max(len(was), len(becomes)) <= _LONGEST_LINE:
        return was, becomes
    begin = _alike(was, becomes)
    end = _alike(was[begin:][::-1], becomes[begin:][::-1])

    def cut(line: str) -> str:
        left, right = max(begin - _CONTEXT, 0), len(line) - max(end - _CONTEXT, 0)
        part = line[left:right]
        if len(part) > _LONGEST_LINE:
            part = f"{part[:_CONTEXT]}…{part[-_CONTEXT:]}"
        return f"{'…' if left else ''}{part}{'…' if right < len(line) else ''}"

    return cut(was), cut(becomes)


def _alike(one: str, other: str) -> int:
    """How many characters two texts have in common at their beginning."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((index for index, (a, b) in pairs if a != b), min(len(one), len(other)))


def _is_removed_check(before: ast.AST, changed: ast.AST) -> bool:
    match before, changed:
        case ast.Raise(), ast.Pass():
            return True
        case ast.Expr(), ast.Pass():
            return any(word in _line(before) for word in ("check", "require", "verify"))
        case ast.If(orelse=[]), ast.If(test=ast.Constant(value=False)):
            return isinstance(before.body[-1], ast.Raise | ast.Return)
    return False


def _constant(around: _Around) -> str:
    """The module-level name to which a value is given here."""
    match around.ancestors[1:2]:
        case (ast.AnnAssign(target=ast.Name(id=name)),):
            return name
        case (ast.Assign(targets=[ast.Name(id=name)]),):
            return name
    return ""


def _definitions(around: _Around) -> Iterator[str]:
    for ancestor in around.ancestors:
        if isinstance(ancestor, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield ancestor.name


def _other_error(error: ast.expr | None) -> ast.expr | None:
    """Another error, where the kind of error is what a caller is told."""
    match error:
        case ast.Attribute(value=ast.Name(id="errors"), attr=name):
            other = "WrongType" if name == "TokenMalformed" else "TokenMalformed"
            return ast.Attribute(ast.Name("errors", ast.Load()), other, ast.Load())
        case ast.Name(id="UnknownSigningKey"):
            return ast.Name("IssuerUnavailable", ast.Load())
        case ast.Name(id="IssuerUnavailable" | "TokenRevoked" | "StaleFeed"):
            return ast.Name("UnknownSigningKey", ast.Load())
        case ast.Name(id="UnknownFeedKey"):
            return ast.Call(ast.Name("UnfitFeed", ast.Load()), [ast.Constant("other")], [])
        case ast.Name(id="UnfitKeySet" | "MalformedScope"):
            return ast.Name("ValueError", ast.Load())
    return None


def _is_of_a_pattern(around: _Around) -> bool:
    return any(
        isinstance(ancestor, ast.Call)
        and isinstance(ancestor.func, ast.Attribute)
        and ancestor.func.attr == "compile"
        for ancestor in around.ancestors
    )


def _other_patterns(text: str) -> Iterator[str]:
    """A pattern that takes a little more or a little less."""
    for found in re.finditer(r"\\x([0-9a-f]{2})", text):
        for number in (int(found[1], 16) - 1, int(found[1], 16) + 1):
            yield f"{text[: found.start()]}\\x{number:02x}{text[found.end() :]}"
    for found in re.finditer(r"(?<=[\])])\+|\{\d\}", text):
        other = "*" if found[0] == "+" else f"{{{int(found[0][1]) - 1}}}"
        yield text[: found.start()] + other + text[found.end() :]
    for found in re.finditer(r"(?<=[A-Za-z0-9])-([A-Z0-9a-z])(?=[\]A-Za-z0-9])", text):
        yield text[: found.start(1)] + chr(ord(found[1]) - 1) + text[found.end(1) :]
