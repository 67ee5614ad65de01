#!/usr/bin/env python3
"""The outputs shown in READMEs are those of the program.

In a Markdown file, a fence with the info string `console` is run and compared:

    ```console
    $ kvtide plan --model llama-3.1-8b --device 'RTX 3060'
    the output, to the letter; a line of ... stands for any lines
    ```

Several commands may stand in one fence. A fence with `file=NAME` is a file that later commands find. Trailing blanks do
not count. Exit codes are not compared.

usage: readme_commands.py KVTIDE FILE.md ...      compares, exit code 1 when a block differs
       readme_commands.py --update KVTIDE FILE.md ...   writes the outputs into the files
       readme_commands.py --self-test
"""
import os
import pathlib
import re
import shlex
import subprocess
import sys
import tempfile

FENCE = re.compile(r"^```(console|[a-z]* ?file=\S+)\n(.*?)^```$", re.M | re.S)


def split_commands(body):
    """[(command, [expected lines])] of a console block."""
    commands = []
    for line in body.splitlines():
        if line.startswith("$ "):
            commands.append((line[2:], []))
        elif commands:
            commands[-1][1].append(line.rstrip())
    return commands


def matches(expected, actual):
    """Whether the actual lines are the expected ones; '...' stands for any number of lines."""
    if not expected:
        return not actual
    if expected[0] == "...":
        return any(matches(expected[1:], actual[i:]) for i in range(len(actual) + 1))
    return bool(actual) and expected[0] == actual[0] and matches(expected[1:], actual[1:])


def run(program, command, folder):
    words = shlex.split(command)
    assert words[0] == "kvtide", f"only kvtide is run, not {words[0]!r}"
    done = subprocess.run([program] + words[1:], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                          stdin=subprocess.DEVNULL, timeout=60, env={**os.environ, "NO_COLOR": "1"})
    lines = [line.rstrip() for line in done.stdout.splitlines()]
    while lines and not lines[-1]:
        lines.pop()
    return lines


def check(program, path, update):
    """Number of commands run and of those that differ."""
    ran = failed = 0

    def replace(fence):
        nonlocal ran, failed
        info, body = fence.group(1), fence.group(2)
        if "file=" in info:
            (pathlib.Path(folder) / info.split("file=")[1]).write_text(body)
            return fence.group(0)
        text = ""
        for command, expected in split_commands(body):
            while expected and not expected[-1]:
                expected.pop()
            actual = run(program, command, folder)
            ran += 1
            same = matches(expected, actual)
            if not same and not update:
                failed += 1
                print(f"{path}: $ {command}\n--- shown\n" + "\n".join(expected) + "\n--- printed\n" + "\n".join(actual) + "\n")
            text += f"$ {command}\n" + "".join(line + "\n" for line in (expected if same else actual))
        return f"```{info}\n{text}```"

    with tempfile.TemporaryDirectory() as folder:
        before = path.read_text()
        after = FENCE.sub(replace, before)
    if update and after != before:
        path.write_text(after)
    return ran, failed


def self_test():
    assert matches(["a", "...", "d"], ["a", "b", "c", "d"]) and matches(["..."], []) and not matches(["a"], ["b"])
    assert not matches(["a"], ["a", "b"]) and split_commands("$ kvtide x\n1\n$ kvtide y\n") == [("kvtide x", ["1"]), ("kvtide y", [])]
    with tempfile.TemporaryDirectory() as folder:
        fake = pathlib.Path(folder) / "fake"
        fake.write_text("#!/bin/sh\necho two\n")
        fake.chmod(0o755)
        page = pathlib.Path(folder) / "page.md"
        page.write_text("```console\n$ kvtide one\none\n```\n")
        devnull, sys.stdout = sys.stdout, open(os.devnull, "w")
        assert check(str(fake), page, False) == (1, 1)
        sys.stdout = devnull
        check(str(fake), page, True)
        assert check(str(fake), page, False) == (1, 0)


def main():
    arguments = sys.argv[1:]
    if arguments == ["--self-test"]:
        self_test()
        return 0
    update = arguments[:1] == ["--update"]
    program, *pages = arguments[1:] if update else arguments
    self_test()
    ran = failed = 0
    for page in pages:
        counts = check(os.path.abspath(program), pathlib.Path(page), update)
        if counts[0] == 0:
            print(f"{page}: no console block")
            failed += 1
        ran, failed = ran + counts[0], failed + counts[1]
    print(f"{ran} commands, {failed} differ")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
