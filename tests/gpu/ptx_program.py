"""Read the PTX of one kernel: parameters, registers, shared memory, instructions, labels."""

import re
from dataclasses import dataclass, field

import numpy as np

UNSIGNED = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
SIGNED = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}

# An address: a register or symbol, and a byte offset.
Address = tuple[str, int]
Operand = str | list[str] | Address


class PtxError(Exception):
    """The program did what a GPU would not allow, or what this interpreter does not know."""


@dataclass(frozen=True)
class Instruction:
    """One statement: ``@!guard op.part.part operands;``."""

    guard: tuple[str, bool] | None  # register, negated
    op: tuple[str, ...]
    operands: tuple[Operand, ...]
    text: str

    @property
    def name(self) -> str:
        """The first part of the opcode."""
        return self.op[0]

    @property
    def type(self) -> str:
        """The last part of the opcode."""
        return self.op[-1]

    def vector(self) -> int:
        """How many elements a load or store moves a thread."""
        return 4 if "v4" in self.op else 2 if "v2" in self.op else 1


@dataclass
class Program:
    """A parsed kernel."""

    parameters: list[tuple[str, int]] = field(default_factory=list)  # name, bytes
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    widths: dict[str, int] = field(default_factory=dict)  # register prefix -> bits, 1 a predicate
    shared: dict[str, int] = field(default_factory=dict)  # symbol -> offset
    static_shared_bytes: int = 0
    n_threads: int = 0

    def width(self, register: str) -> int:
        """Bits of a register; 1 for a predicate."""
        return self.widths[register.rstrip("0123456789")]


_LABEL = re.compile(r"(\$?\w+):(?!:)\s*")


def parse(text: str) -> Program:
    """The only ``.entry`` of a PTX module."""
    text = re.sub(r"/\*.*?\*/", "", text, flags=re.S)
    text = re.sub(r"//[^\n]*", "", text)
    program = Program()
    for symbol in re.finditer(r"\.shared\s+\.align\s+\d+\s+\.b8\s+(\w+)\[(\d*)\]", text):
        program.shared[symbol[1]] = program.static_shared_bytes
        program.static_shared_bytes += -(-int(symbol[2] or 0) // 128) * 128
    entry = text[text.index(".entry") :].partition(".section")[0]
    header, _, body = entry.partition("{")
    listed = header.partition("(")[2].rpartition(")")[0]
    for kind, name in re.findall(r"\.param\s+\.(\w+)[^,]*?(\w+)\s*(?:,|$)", listed):
        program.parameters.append((name, int(kind[1:]) // 8))
    threads = re.search(r"\.(?:reqntid|maxntid)\s+(\d+)", header)
    program.n_threads = int(threads[1]) if threads else 0
    for bits, prefix in re.findall(r"\.reg\s+\.(\w+)\s+(%\w+?)<", body):
        program.widths[prefix] = 1 if bits == "pred" else int(bits[1:])
    _read_body(program, body)
    return program


def _read_body(program: Program, body: str) -> None:
    for directive in ("loc", "file", "pragma"):
        body = re.sub(rf"^\s*\.{directive}\b[^\n]*$", "", body, flags=re.M)
    for statement in body.split(";"):
        rest = statement
        while True:
            rest = rest.lstrip(" \t\n}{") if not _starts_vector(rest) else rest.strip()
            label = _LABEL.match(rest)
            if label is None:
                break
            program.labels[label[1]] = len(program.instructions)
            rest = rest[label.end() :]
        if rest and not rest.startswith("."):
            program.instructions.append(_instruction(" ".join(rest.split())))


def _starts_vector(text: str) -> bool:
    return False if not text.strip() else text.lstrip()[0] not in "{} \t\n"


def _instruction(text: str) -> Instruction:
    guard, rest = None, text
    guarded = re.match(r"@(!?)(%\w+)\s+", text)
    if guarded:
        guard, rest = (guarded[2], guarded[1] == "!"), text[guarded.end() :]
    name, _, listed = rest.partition(" ")
    operands = tuple(_operand(part) for part in _split(listed))
    return Instruction(guard, tuple(name.split(".")), operands, text)


def _split(listed: str) -> list[str]:
    """At the commas outside brackets."""
    parts, depth, current = [], 0, ""
    for character in listed:
        depth += (character in "{[") - (character in "}]")
        if character == "," and depth == 0:
            parts.append(current.strip())
            current = ""
        else:
            current += character
    return [*parts, current.strip()] if current.strip() else parts


def _operand(text: str) -> Operand:
    if text.startswith("{"):
        return [part.strip() for part in text[1:-1].split(",")]
    if text.startswith("["):
        found = re.match(r"\[\s*([%$\w.]+)\s*(?:\+\s*(-?\w+))?\s*\]", text)
        if found is None:
            raise PtxError(f"an address that cannot be read: {text}")
        return found[1], int(found[2] or "0", 0)
    return text
