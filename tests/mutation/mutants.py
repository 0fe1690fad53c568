"""Mutants of a file: what mutmut's operators change in it, one change at a time.

The whole file is rewritten, where mutmut itself would put a switch around every function: so
`torch.compile`, pickling and workers run plain code, and properties and class bodies have mutants too.
"""

import contextlib
import difflib
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import libcst as cst
from libcst import matchers as m
from libcst.metadata import CodeRange, MetadataWrapper, ParentNodeProvider, PositionProvider
from mutmut.mutation.mutators import mutation_operators

STRICT = m.Arg(keyword=m.Name("strict"))
NOT_BEHAVIOUR = (
    m.Annotation() | m.Decorator() | m.Import() | m.ImportFrom()
    | m.Assert() | STRICT  # both hold whatever the input
    | m.Call(func=m.Name("isinstance")) | m.Call(func=m.Name("len"))  # whose mutants fail at once
    | m.Assign(targets=[m.AssignTarget(m.Name("__all__"))])
)  # fmt: skip
TYPE_ALIAS = m.SimpleStatementLine([m.Assign(value=m.Subscript(value=m.Name()))])
STATEMENT = m.SimpleStatementLine() | m.If() | m.For() | m.While() | m.With() | m.Try() | m.FunctionDef()


@dataclass(frozen=True)
class Mutant:
    """A file with one change.

    Args:
        path: of the file, relative to the root.
        original: text of the file.
        text: the same with the change.
        lines: of the statement that changed, from 1; for a default value, those of the function's body.
    """

    path: str
    original: str
    text: str
    lines: range

    @property
    def key(self) -> str:
        return hashlib.sha256("\0".join((self.path, self.original, self.text)).encode()).hexdigest()[:16]

    @property
    def diff(self) -> str:
        lines = difflib.unified_diff(
            self.original.splitlines(), self.text.splitlines(), self.path, self.path, n=2, lineterm=""
        )
        return "\n".join(lines)


def mutants_of(path: str, text: str) -> list[Mutant]:
    """All mutants that compile, in the order of the file."""
    wrapper = MetadataWrapper(cst.parse_module(text))
    module, found = wrapper.module, {}
    spans = wrapper.resolve(PositionProvider)
    parents = wrapper.resolve(ParentNodeProvider)
    for node in _mutable(module):
        for kind, operator in mutation_operators:
            for changed in operator(node) if isinstance(node, kind) else ():
                if any(m.matches(argument, STRICT) for argument in _lost_arguments(node, changed)):
                    continue
                mutated = module.deep_replace(node, changed)
                assert isinstance(mutated, cst.Module)
                with contextlib.suppress(SyntaxError):
                    compile(mutated.code, path, "exec")
                    found[mutated.code] = _lines(node, spans, parents)
    return [Mutant(path, text, mutated, lines) for mutated, lines in found.items() if mutated != text]


def _mutable(node: cst.CSTNode, is_raised: bool = False) -> Iterator[cst.CSTNode]:
    """Nodes whose change is a change of behaviour; the words of an error are none, what it quotes is."""
    if m.matches(node, NOT_BEHAVIOUR) or (is_raised and isinstance(node, cst.SimpleString)):
        return
    yield node
    for child in node.children:
        if not (isinstance(node, cst.Module) and m.matches(child, TYPE_ALIAS)):
            yield from _mutable(child, is_raised or isinstance(node, cst.Raise))


def _lost_arguments(node: cst.CSTNode, changed: cst.CSTNode) -> list[cst.Arg]:
    if not (isinstance(node, cst.Call) and isinstance(changed, cst.Call)):
        return []
    return [argument for argument in node.args if argument not in changed.args]


def _lines(
    node: cst.CSTNode, spans: Mapping[cst.CSTNode, CodeRange], parents: Mapping[cst.CSTNode, cst.CSTNode]
) -> range:
    """The innermost statement around a node: of an `if` or a loop its head, of a function its body."""
    while not m.matches(node, STATEMENT):
        node = parents[node]
    start, end = spans[node].start.line, spans[node].end.line
    body = getattr(node, "body", None)
    if isinstance(body, cst.IndentedBlock):
        inside = spans[body.body[0]].start.line
        start, end = (inside, end) if isinstance(node, cst.FunctionDef) else (start, max(start, inside - 1))
    return range(start, end + 1)
