"""Every test that bugs_elsewhere.md names is there: bugs_elsewhere.py FOLDER, the tree's own."""
import re
import sys
from pathlib import Path


def main(root):
    tests = Path(root) / "tests"
    python, native = {}, set()
    for path in tests.rglob("*.py"):
        python[path.name] = set(re.findall(r"^def (test_\w+)", path.read_text(), re.M))
    for path in [*tests.rglob("*.cc"), *tests.rglob("*.cu")]:
        native |= {".".join(names) for names in
                   re.findall(r"^(?:TYPED_)?TEST(?:_F|_P)?\((\w+),\s*(\w+)\)", path.read_text(), re.M)}
    suites = {name.split(".")[0] for name in native}
    missing, rows = [], 0
    for line in (tests / "bugs_elsewhere.md").read_text().splitlines():
        if not line.startswith("| ") or line.startswith("| where"):
            continue
        rows += 1
        cell = line.rstrip(" |").rsplit(" | ", 1)[1]
        names = re.findall(r"`([^`]+)`", cell)
        if not names:
            missing.append(f"no test: {line}")
        for name in names:
            file, _, test = name.partition("::")
            if test:
                there = test in python.get(file, ())
            elif name.endswith(".*"):
                there = name[:-2] in suites
            else:
                there = name in native
            if not there:
                missing.append(name)
    for name in missing:
        print("not there:", name)
    print(f"{rows} bugs, {len(missing)} tests missing")
    return 1 if missing or rows == 0 else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
