"""Reads a Dockerfile, as far as kvtide's needs it: stages with their instructions, arguments filled in, and the files that COPY takes.

An instruction that is not known here is an error: nothing of a file is passed over.
"""
import dataclasses
import fnmatch
import json
import pathlib
import re
import shlex

INSTRUCTIONS = {"ARG", "CMD", "COPY", "ENTRYPOINT", "ENV", "EXPOSE", "FROM", "HEALTHCHECK", "RUN", "USER", "WORKDIR"}


@dataclasses.dataclass
class Instruction:
    line: int
    name: str
    text: str  # what stands behind the name, lines joined

    def __str__(self):
        return f"{self.name} {self.text}"


@dataclasses.dataclass
class Stage:
    base: str  # an image or an earlier stage
    name: str  # empty: it has none
    instructions: list


def instructions(text):
    """Comments and empty lines left out, continued lines joined."""
    found, line, begin = [], "", 0
    for number, raw in enumerate(text.splitlines(), 1):
        if re.match(r"\s*(#|$)", raw):
            continue
        begin = begin or number
        continued = raw.rstrip().endswith("\\")
        line += raw.rstrip()[:-1] if continued else raw.strip()
        if continued:
            continue
        name, _, rest = line.strip().partition(" ")
        if name.upper() not in INSTRUCTIONS:
            raise ValueError(f"line {begin}: {name} is not known")
        found.append(Instruction(begin, name.upper(), rest.strip()))
        line, begin = "", 0
    if line:
        raise ValueError(f"line {begin}: it goes on after the end of the file")
    return found


def filled(text, values):
    """$NAME and ${NAME}; a name without a value is an error, which Docker would take as nothing."""

    def value(match):
        name = match.group(1) or match.group(2)
        if name not in values:
            raise ValueError(f"${name} has no value in: {text}")
        return values[name]

    return re.sub(r"\$(?:(\w+)|\{(\w+)\})", value, text)


def stages(text, arguments=None):
    """The stages of a Dockerfile; `arguments` as --build-arg gives them."""
    values, found = {}, []
    for instruction in instructions(text):
        if instruction.name == "ARG" and not found:
            name, _, default = instruction.text.partition("=")
            values[name] = (arguments or {}).get(name, default)
        elif instruction.name == "FROM":
            match = re.fullmatch(r"(\S+)(?:\s+AS\s+(\S+))?", filled(instruction.text, values), re.I)
            if not match:
                raise ValueError(f"line {instruction.line}: {instruction} is not understood")
            found.append(Stage(match.group(1), match.group(2) or "", []))
        elif not found:
            raise ValueError(f"line {instruction.line}: {instruction.name} before the first FROM")
        else:
            found[-1].instructions.append(instruction)
    return found


def words(text):
    """The words of CMD, ENTRYPOINT: a JSON array, or a line of the shell."""
    return json.loads(text) if text.startswith("[") else ["/bin/sh", "-c", text]


def options(text):
    """--name=value words in front, and the rest."""
    found = {}
    while match := re.match(r"--([\w-]+)=(\S+)\s+", text):
        found[match.group(1)] = match.group(2)
        text = text[match.end():]
    return found, text


def seconds(text):
    match = re.fullmatch(r"(\d+)(s|m)", text)
    if not match:
        raise ValueError(f"{text} is no time")
    return int(match.group(1)) * {"s": 1, "m": 60}[match.group(2)]


def copied(text):
    """Of COPY: the stage it copies from (empty: the context), sources, target."""
    flags, rest = options(text)
    if set(flags) - {"from"}:
        raise ValueError(f"COPY {text}: option not known")
    *sources, target = shlex.split(rest)
    return flags.get("from", ""), sources, target


def context(folder, ignore_file):
    """Paths of the build context, relative: every file that the ignore file leaves in. Its patterns are folders, files and wildcards
    of names from the root on; later ones win, ! takes back."""
    patterns = [line.strip() for line in ignore_file.read_text().splitlines()] if ignore_file.exists() else []
    patterns = [p for p in patterns if p and not p.startswith("#")]
    if any("**" in p for p in patterns):
        raise ValueError("** of an ignore file is not known")

    def left_out(path):
        out = False
        for pattern in patterns:
            name = pattern.lstrip("!").strip("/")
            parts = path.parts[: len(pathlib.PurePath(name).parts)]
            if fnmatch.fnmatchcase("/".join(parts), name):
                out = not pattern.startswith("!")
        return out

    def walk(at):
        for entry in sorted((folder / at).iterdir()):
            path = at / entry.name
            if left_out(path):
                continue
            if entry.is_dir() and not entry.is_symlink():
                yield from walk(path)
            else:
                yield path

    return list(walk(pathlib.PurePath("")))
