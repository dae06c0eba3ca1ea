"""Lists the experiments: `python -m experiments`."""

import ast
import re
import sys
from pathlib import Path

_RUNS = re.compile(r'^if __name__ == "__main__":\n.*common\.run_cli\(', re.MULTILINE)


def listing(folder: Path = Path(__file__).parent) -> dict[str, str]:
    """The first line of each experiment's docstring by its name, read without importing it."""
    found = {}
    for path in sorted(folder.rglob("*.py")):
        source = path.read_text(encoding="utf-8")
        if _RUNS.search(source):
            parts = path.relative_to(folder).with_suffix("").parts
            name = ".".join(part for part in parts if part != "__main__")
            found[name] = (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0]
    return dict(sorted(found.items()))


def main(args: list[str]) -> int:
    """Prints the list; a status of 2 where `args` ask for something else."""
    experiments = listing()
    if args and args[0] not in ("-h", "--help"):
        name = args[0].removeprefix("experiments.")
        command = (
            f"python -m experiments.{name}" if name in experiments else "python -m experiments"
        )
        print(f"error: {args[0]} is not understood here: try {command}", file=sys.stderr)
        return 2
    width = max(map(len, experiments))
    print("python -m experiments.NAME --help shows the settings of\n")
    for name, line in experiments.items():
        print(f"  {name:{width}}  {line}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
