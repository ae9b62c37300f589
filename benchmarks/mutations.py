"""Break each rule on purpose, in a copy of the project, and record which test notices.

A mutation replaces one piece of one function, which benchmarks/code_patterns.py finds by its shape: it
survives renamed locals and moved lines. benchmarks/rules has the mutations by area. One counts as caught when
a test of the named files fails. The results go into benchmarks/results/mutations.json, a summary into
docs/numerics.md. A rule that no test holds makes the command exit with 1.

    python -m benchmarks.mutations
    python -m benchmarks.mutations --only yarn
    python -m benchmarks.mutations --new
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from benchmarks.pages import fill
from benchmarks.rules import MUTATIONS
from benchmarks.rules.mutation import Mutation

ROOT = Path(__file__).resolve().parent.parent
RESULT = Path(__file__).resolve().parent / "results" / "mutations.json"


def caught_by(mutation: Mutation, copy: Path) -> str | None:
    """Return the first test that fails with the mutation in place; None if all pass."""
    path = copy / mutation.file
    text = path.read_text()
    path.write_text(mutation.apply(text))
    try:
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-x",
            "-q",
            "-p",
            "no:cacheprovider",
            *mutation.tests.split(),
        ]
        done = subprocess.run(command, cwd=copy, capture_output=True, text=True, check=False)
    finally:
        path.write_text(text)
    found = re.search(r"^(?:FAILED|ERROR) (\S+::\S+)", done.stdout, re.MULTILINE)
    if done.returncode and not found:
        raise SystemExit(
            f"{mutation.rule}: the tests did not run\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
        )
    return found[1].split("[")[0] if found else None


def stored(path: Path) -> dict[str, str | None]:
    """Return what earlier runs have found, by rule."""
    if not path.is_file():
        return {}
    return {entry["rule"]: entry["caught_by"] for entry in json.loads(path.read_text())}


def summary(results: dict[str, str | None]) -> list[str]:
    """Return the lines of docs/numerics.md: how many rules a test holds, and the rules that none does."""
    missed = [rule for rule, test in results.items() if not test]
    link = "[mutations.json](../benchmarks/results/mutations.json)"
    return [
        f"Tests catch {len(results) - len(missed)} of the {len(results)} broken rules.",
        f"{link} has each rule, its edit and the test that catches it.",
        *(f"- **no test catches:** {rule}" for rule in missed),
    ]


def main() -> int:
    """Try every mutation, print and store the results, write their summary into docs/numerics.md."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument(
        "--only",
        default="",
        help="rules that hold this (regular expression); the others keep their last result",
    )
    parser.add_argument("--new", action="store_true", help="rules that have no result yet")
    parser.add_argument("--json", type=Path, default=RESULT)
    options = parser.parse_args()
    chosen = [mutation for mutation in MUTATIONS if re.search(options.only, mutation.rule, re.IGNORECASE)]
    known: list[Mutation] = []
    results = stored(options.json)
    if options.new:
        chosen = [mutation for mutation in chosen if not results.get(mutation.rule)]
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / "dsv3"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".venv", ".git", "outputs"), symlinks=True)
        for mutation in chosen:
            results[mutation.rule] = caught_by(mutation, copy)
            print(f"{mutation.rule:<50} {results[mutation.rule] or 'NOT CAUGHT'}", flush=True)
            known = [mutation for mutation in MUTATIONS if mutation.rule in results]
            report = [asdict(mutation) | {"caught_by": results[mutation.rule]} for mutation in known]
            options.json.write_text(json.dumps(report, indent=1) + "\n")
    lines = summary({mutation.rule: results[mutation.rule] for mutation in known})
    print("", *lines, sep="\n")
    if options.json == RESULT:
        fill("numerics.md", "mutations", lines)
    return 0 if all(results[mutation.rule] for mutation in chosen) else 1


if __name__ == "__main__":
    sys.exit(main())
