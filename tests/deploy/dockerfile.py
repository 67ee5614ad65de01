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
    platform: str  # such as linux/arm64
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


def platform_arguments(machine, target):
    """What BuildKit presets: of the machine that builds and of the image, such as linux/amd64."""
    found = {}
    for name, platform in (("BUILD", machine), ("TARGET", target)):
        system, _, architecture = platform.partition("/")
        found |= {f"{name}PLATFORM": platform, f"{name}OS": system, f"{name}ARCH": architecture}
    return found


def stages(text, arguments=None, machine="linux/amd64", target=None):
    """The stages of a Dockerfile; `arguments` as --build-arg gives them, `target` as --platform does, that of the machine without it.
    An ARG inside a stage is NAME=VALUE."""
    preset = platform_arguments(machine, target or machine)
    values, found = dict(preset), []
    for instruction in instructions(text):
        name, given, default = instruction.text.partition("=")
        if instruction.name == "ARG" and not found:
            values[name] = (arguments or {}).get(name, default)
        elif instruction.name == "FROM":
            flags, rest = options(filled(instruction.text, values))
            match = re.fullmatch(r"(\S+)(?:\s+AS\s+(\S+))?", rest, re.I)
            if not match or set(flags) - {"platform"}:
                raise ValueError(f"line {instruction.line}: {instruction} is not understood")
            found.append(Stage(match.group(1), match.group(2) or "", flags.get("platform", preset["TARGETPLATFORM"]), []))
        elif not found:
            raise ValueError(f"line {instruction.line}: {instruction.name} before the first FROM")
        elif instruction.name == "ARG":
            known = {**values, **({name: default} if given else {}), **(arguments or {})}
            found[-1].instructions.append(dataclasses.replace(instruction, text=f"{name}={filled('$' + name, known)}"))
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
