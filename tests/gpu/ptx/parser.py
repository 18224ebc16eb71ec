"""PTX text to a flat list of instructions.

Scopes (``{ … }``) are resolved to unique names, calls are inlined (each call site parses the callee's body again, its
parameters bound to the caller's), and labels become indices into the list. Recursion and indirect calls are refused.

Source: PTX ISA 9.0, chapters 4 (syntax), 5 (state spaces and types) and 7 (functions).
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass, field

TYPE_SIZE = {
    "pred": 1, "b8": 1, "u8": 1, "s8": 1, "e4m3": 1, "e5m2": 1, "b16": 2, "u16": 2, "s16": 2, "f16": 2, "bf16": 2,
    "b32": 4, "u32": 4, "s32": 4, "f32": 4, "f16x2": 4, "bf16x2": 4, "tf32": 4, "b64": 8, "u64": 8, "s64": 8, "f64": 8,
    "f32x2": 8, "b128": 16, "e4m3x2": 2, "e5m2x2": 2,
}  # fmt: skip

_TOKEN = re.compile(
    r"""(?P<space>[ \t\r]+)|(?P<newline>\n)|(?P<string>"[^"]*")"""
    r"""|(?P<number>0[fF][0-9a-fA-F]{8}|0[dD][0-9a-fA-F]{16}|0[xX][0-9a-fA-F]+U?|0[bB][01]+U?|\d+\.\d+(?:[eE][+-]?\d+)?|\d+U?)"""
    r"""|(?P<name>[.%$_A-Za-z](?:[\w$.]|::)*)|(?P<mark>[@!{}\[\]()<>,;:|+\-=*])"""
)
_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.S)
_DEBUG_LINE = re.compile(r"^[ \t]*\.(loc|file)\b[^\n]*", re.M)
_DEBUG_SECTION = re.compile(r"^[ \t]*\.section\b[^{]*\{[^}]*\}", re.M)


class PtxError(Exception):
    """PTX that this bench does not read; the message names the line."""


@dataclass(frozen=True)
class Reg:
    name: str
    type: str


@dataclass(frozen=True)
class Imm:
    """An integer, or a float whose bits were written out (``0f3F800000``)."""

    value: int | float


@dataclass(frozen=True)
class Special:
    name: str


@dataclass(frozen=True)
class Sym:
    variable: Variable
    offset: int = 0


@dataclass(frozen=True)
class Vec:
    items: tuple


@dataclass(frozen=True)
class Addr:
    base: object  # Reg, Imm or Sym
    offset: int = 0
    extra: tuple = ()  # the coordinates of a tensor copy


@dataclass(frozen=True)
class Not:
    item: Reg


@dataclass(frozen=True)
class Pair:
    first: object
    second: object


@dataclass(frozen=True)
class Label:
    name: str


@dataclass(frozen=True)
class Sink:
    """``_``: a result that nobody reads."""


@dataclass(eq=False)
class Variable:
    name: str
    space: str  # global, const, shared, local, param
    type: str
    align: int
    size: int  # bytes; 0 for an array without a length, which the launch sizes
    initial: bytes = b""


@dataclass(eq=False)
class Instruction:
    opcode: str
    operands: list
    line: int
    text: str
    guard: Reg | None = None
    guard_negated: bool = False
    index: int = -1

    def __post_init__(self):
        self.parts = self.opcode.split(".")
        self.name = self.parts[0]
        self.flags = frozenset(self.parts[1:])

    def has(self, *flags: str) -> bool:
        return any(flag in self.flags for flag in flags)

    @property
    def types(self) -> list[str]:
        return [part for part in self.parts[1:] if part in TYPE_SIZE]


@dataclass(eq=False)
class Kernel:
    name: str
    target: str
    parameters: list[Variable]
    instructions: list[Instruction]
    labels: dict[str, int]
    registers: dict[str, str]  # unique name to type
    variables: list[Variable]  # shared, local, global and const that the kernel can reach
    lines: list[str]
    max_threads: int | None = None
    branch_tables: dict[str, list[str]] = field(default_factory=dict)


def tokenize(text: str) -> list[tuple[str, str, int]]:
    keep_lines = lambda match: "\n" * match.group().count("\n")  # noqa: E731
    text = _COMMENT.sub(keep_lines, text)
    text = _DEBUG_SECTION.sub(keep_lines, text)
    text = _DEBUG_LINE.sub("", text)
    tokens, position, line = [], 0, 1
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None:
            raise PtxError(f"line {line}: cannot read {text[position : position + 20]!r}")
        position = match.end()
        if match.lastgroup == "newline":
            line += 1
        elif match.lastgroup != "space":
            tokens.append((match.lastgroup, match.group(), line))
    tokens.append(("end", "", line))
    return tokens


def _number(text: str) -> int | float:
    if text[:2] in ("0f", "0F"):
        return struct.unpack("<f", int(text[2:], 16).to_bytes(4, "little"))[0]
    if text[:2] in ("0d", "0D"):
        return struct.unpack("<d", int(text[2:], 16).to_bytes(8, "little"))[0]
    if "." in text:
        return float(text)
    return int(text.rstrip("U"), 0) if not re.fullmatch(r"0\d+U?", text) else int(text.rstrip("U"), 8)


class _Scope:
    def __init__(self, parent: _Scope | None = None):
        self.parent, self.names, self.prefixes, self.labels = parent, {}, {}, {}

    def find(self, name: str):
        scope = self
        while scope is not None:
            if name in scope.names:
                return scope.names[name]
            match = re.fullmatch(r"(.*?)(\d+)", name)
            if match and match.group(1) in scope.prefixes:
                unique, type_ = scope.prefixes[match.group(1)]
                return Reg(unique + match.group(2), type_)
            scope = scope.parent
        return None

    def find_label(self, name: str) -> str | None:
        scope = self
        while scope is not None:
            if name in scope.labels:
                return scope.labels[name]
            scope = scope.parent
        return None


class _Parser:
    def __init__(self, text: str):
        self.tokens = tokenize(text)
        self.lines = text.splitlines()
        self.at = 0
        self.top = _Scope()
        self.target = ""
        self.functions: dict[str, dict] = {}
        self.globals: list[Variable] = []
        self._module()

    # --- tokens -------------------------------------------------------------------------------------------------
    @property
    def here(self) -> str:
        return self.tokens[self.at][1]

    @property
    def line(self) -> int:
        return self.tokens[self.at][2]

    def take(self, expected: str | None = None) -> str:
        text = self.here
        if expected is not None and text != expected:
            raise PtxError(f"line {self.line}: expected {expected!r}, got {text!r}")
        self.at += 1
        return text

    def accept(self, text: str) -> bool:
        if self.here == text:
            self.at += 1
            return True
        return False

    def skip_block(self) -> None:
        depth = 0
        while True:
            token = self.take()
            depth += (token == "{") - (token == "}")
            if depth == 0:
                return

    # --- module -------------------------------------------------------------------------------------------------
    def _module(self) -> None:
        while self.tokens[self.at][0] != "end":
            token = self.here
            if token == ".target":
                self.take()
                self.target = self.take()
                while self.accept(","):
                    self.take()
            elif token in (".version", ".address_size"):
                self.at += 2
            elif token in (".visible", ".weak", ".extern", ".common"):
                self.take()
            elif token in (".entry", ".func"):
                self._function()
            elif token in (".global", ".const", ".shared"):
                variable = self._variable(self.top)
                self.globals.append(variable)
                self.take(";")
            elif token in (".alias", ".pragma"):
                while self.take() != ";":
                    pass
            else:
                raise PtxError(f"line {self.line}: unknown declaration {token!r}")

    def _function(self) -> None:
        kind = self.take()
        while self.here in (".attribute", ".unified"):
            self.take()
        results = self._parameter_list() if self.here == "(" else []
        name = self.take()
        parameters = self._parameter_list() if self.here == "(" else []
        max_threads = None
        while self.here not in ("{", ";"):
            directive = self.take()
            if directive in (".maxntid", ".reqntid"):
                max_threads = int(self.take())
                while self.accept(","):
                    max_threads *= int(self.take())
        body = None
        if self.here == "{":
            body = self.at
            self.skip_block()
        else:
            self.take(";")
        if body is not None or name not in self.functions:
            self.functions[name] = dict(
                kind=kind, results=results, parameters=parameters, body=body, max_threads=max_threads
            )

    def _parameter_list(self) -> list[Variable]:
        self.take("(")
        found = []
        while not self.accept(")"):
            found.append(self._variable(None))
            self.accept(",")
        return found

    def _variable(self, scope: _Scope | None) -> Variable:
        """``.space [.align n] .type name[n][m] [= {…}]``"""
        space = self.take().lstrip(".")
        align, type_ = None, None
        while self.here.startswith("."):
            word = self.take()[1:]
            if word == "align":
                align = int(self.take())
            elif word in TYPE_SIZE:
                type_ = word
            elif word in ("v2", "v4"):
                raise PtxError(f"line {self.line}: vector variables are not read by this bench")
            elif word == "ptr":  # .param .u64 .ptr .global .align 16 name: the alignment is that of the target
                while self.here in (".global", ".shared", ".local", ".const", ".generic"):
                    self.take()
                if self.accept(".align"):
                    self.take()
        name = self.take()
        count, is_open = 1, False
        while self.accept("["):
            if self.accept("]"):
                is_open = True
            else:
                count *= int(_number(self.take()))
                self.take("]")
        size = 0 if is_open else count * TYPE_SIZE[type_]
        initial = b""
        if self.accept("="):
            initial = self._initial(type_)
            size = max(size, len(initial))
        variable = Variable(name, space, type_, align or TYPE_SIZE[type_], size, initial)
        if scope is not None:
            scope.names[name] = variable
        return variable

    def _initial(self, type_: str) -> bytes:
        numbers, depth = [], 0
        while True:
            if self.accept("{"):
                depth += 1
            elif self.accept("}"):
                depth -= 1
            elif self.accept(","):
                continue
            else:
                negative = self.accept("-")
                kind, text, line = self.tokens[self.at]
                if kind != "number":
                    raise PtxError(f"line {line}: initialiser {text!r} is not read by this bench")
                value = _number(self.take())
                numbers.append(-value if negative else value)
            if depth == 0:
                break
        size = TYPE_SIZE[type_]
        out = b""
        for value in numbers:
            if isinstance(value, float):
                out += struct.pack("<f" if size == 4 else "<d", value)
            else:
                out += (int(value) % (1 << 8 * size)).to_bytes(size, "little")
        return out

    # --- bodies -------------------------------------------------------------------------------------------------
    def kernel(self, name: str) -> Kernel:
        entries = [key for key, function in self.functions.items() if function["kind"] == ".entry"]
        if name not in self.functions:
            raise PtxError(f"kernel {name!r} is not in this PTX; it has {entries}")
        function = self.functions[name]
        self.out: list[Instruction] = []
        self.registers: dict[str, str] = {}
        self.variables: list[Variable] = list(self.globals)
        self.label_at: dict[str, int] = {}
        self.tables: dict[str, list] = {}
        self.serial = 0
        self.calls: list[str] = []
        scope = _Scope(self.top)
        for parameter in function["parameters"]:
            scope.names[parameter.name] = parameter
        self._body(function["body"], scope, None)
        self._append("exit", [], 0, "(end of the kernel)")
        for index, instruction in enumerate(self.out):
            instruction.index = index
        return Kernel(
            name, self.target, function["parameters"], self.out, self.label_at, self.registers, self.variables,
            self.lines, function["max_threads"], self.tables,
        )  # fmt: skip

    def _append(self, opcode, operands, line, text, guard=None, negated=False) -> None:
        self.out.append(Instruction(opcode, operands, line, text, guard, negated))

    def _unique(self, name: str) -> str:
        self.serial += 1
        return f"{name}#{self.serial}"

    def _body(self, start: int, scope: _Scope, return_to: str | None) -> None:
        saved = self.at
        self.at = start
        self._block(scope, return_to)
        self.at = saved

    def _block(self, scope: _Scope, return_to: str | None) -> None:
        self.take("{")
        inner = _Scope(scope)
        # labels are visible in the whole block, so they are collected first
        depth, look = 1, self.at
        while depth:
            kind, text, _ = self.tokens[look]
            depth += (text == "{") - (text == "}")
            if depth == 1 and kind == "name" and self.tokens[look + 1][1] == ":":
                inner.labels[text] = self._unique(text)
            look += 1
        while not self.accept("}"):
            token = self.here
            if token == "{":
                self._block(inner, return_to)
            elif token == ".reg":
                self._registers(inner)
            elif token in (".local", ".shared", ".param", ".global", ".const"):
                variable = self._variable(inner)
                if token == ".param":
                    variable.space = "local"  # a call's argument: one copy for each thread
                self.variables.append(variable)
                self.take(";")
            elif token == ".pragma" or token == ".loc":
                while self.take() != ";":
                    pass
            elif self.tokens[self.at + 1][1] == ":":
                label = inner.labels[self.take()]
                self.take(":")
                if self.here == ".branchtargets":
                    self.take()
                    self.tables[label] = []
                    while not self.accept(";"):
                        self.tables[label].append(inner.find_label(self.take()))
                        self.accept(",")
                elif self.here == ".callprototype":
                    raise PtxError(f"line {self.line}: indirect calls are not read by this bench")
                else:
                    self.label_at[label] = len(self.out)
            else:
                self._instruction(inner, return_to)

    def _registers(self, scope: _Scope) -> None:
        self.take(".reg")
        type_ = self.take().lstrip(".")
        while True:
            name = self.take()
            if self.accept("<"):
                count = int(self.take())
                self.take(">")
                unique = self._unique(name) + "."
                scope.prefixes[name] = (unique, type_)
                for index in range(count):
                    self.registers[f"{unique}{index}"] = type_
            else:
                register = Reg(self._unique(name), type_)
                scope.names[name] = register
                self.registers[register.name] = type_
            if not self.accept(","):
                break
        self.take(";")

    def _instruction(self, scope: _Scope, return_to: str | None) -> None:
        start, line = self.at, self.line
        guard, negated = None, False
        if self.accept("@"):
            negated = self.accept("!")
            guard = scope.find(self.take())
        opcode = self.take()
        operands = []
        while not self.accept(";"):
            operands.append(self._operand(scope))
            self.accept(",")
        text = " ".join(token for _, token, _ in self.tokens[start : self.at])
        name = opcode.split(".")[0]
        if name == "call":
            self._call(scope, operands, line, text, guard, negated)
        elif name == "ret" and return_to is not None:
            self._append("bra", [Label(return_to)], line, text, guard, negated)
        else:
            self._append("exit" if name == "ret" else opcode, operands, line, text, guard, negated)

    def _call(self, scope, operands, line, text, guard, negated) -> None:
        results = operands.pop(0) if isinstance(operands[0], tuple) else ()
        target = operands.pop(0)
        name = target.name if isinstance(target, Label) else None
        function = self.functions.get(name)
        if function is None:
            raise PtxError(f"line {line}: indirect calls are not read by this bench: {text}")
        arguments = operands[0] if operands else ()
        if function["body"] is None:
            self._append(f"extern.{name}", list(arguments), line, text, guard, negated)
            return
        if name in self.calls:
            raise PtxError(f"line {line}: recursion is not read by this bench: {text}")
        after = self._unique("$after_" + name)
        if guard is not None:
            self._append("bra", [Label(after)], line, text, guard, not negated)
        inner = _Scope(self.top)
        formals = function["results"] + function["parameters"]
        for formal, actual in zip(formals, tuple(results) + tuple(arguments), strict=True):
            inner.names[formal.name] = actual.variable if isinstance(actual, Sym) else actual
        self.calls.append(name)
        self._body(function["body"], inner, after)
        self.calls.pop()
        self.label_at[after] = len(self.out)

    def _operand(self, scope: _Scope):
        kind, text, line = self.tokens[self.at]
        if self.accept("{"):
            items = []
            while not self.accept("}"):
                items.append(self._operand(scope))
                self.accept(",")
            return Vec(tuple(items))
        if self.accept("("):
            items = []
            while not self.accept(")"):
                items.append(self._operand(scope))
                self.accept(",")
            return tuple(items)
        if self.accept("["):
            base = self._operand(scope)
            offset, extra = 0, []
            while not self.accept("]"):
                if self.accept("+"):
                    sign = -1 if self.accept("-") else 1
                    offset += sign * int(_number(self.take()))
                elif self.accept("-"):
                    offset -= int(_number(self.take()))
                else:
                    self.accept(",")
                    extra.append(self._operand(scope))
            if isinstance(base, Sym):
                base, offset = Sym(base.variable), offset + base.offset
            return Addr(base, offset, tuple(extra))
        if self.accept("!"):
            return Not(scope.find(self.take()))
        if self.accept("-"):
            return Imm(-_number(self.take()))
        if kind == "number":
            return Imm(_number(self.take()))
        if kind != "name":
            raise PtxError(f"line {line}: cannot read the operand {text!r}")
        item = self._name(self.take(), scope)
        if self.accept("|"):
            return Pair(item, self._name(self.take(), scope))
        if isinstance(item, Sym) and self.tokens[self.at + 1][0] == "number":
            if self.accept("+"):
                return Sym(item.variable, int(_number(self.take())))
        return item

    def _name(self, name: str, scope: _Scope):
        if name == "_":
            return Sink()
        found = scope.find(name)
        if isinstance(found, Variable):
            return Sym(found)
        if found is not None:
            return found
        if name.startswith("%"):
            return Special(name[1:])
        if name == "WARP_SZ":
            return Imm(32)
        label = scope.find_label(name)
        return Label(label if label is not None else name)


def parse(text: str, kernel_name: str | None = None) -> Kernel:
    """The kernel of that name, or the only one."""
    parser = _Parser(text)
    if kernel_name is None:
        entries = [name for name, function in parser.functions.items() if function["kind"] == ".entry"]
        if len(entries) != 1:
            raise PtxError(f"kernel_name must be given, the PTX has {entries}")
        kernel_name = entries[0]
    return parser.kernel(kernel_name)
