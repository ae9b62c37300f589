"""Read and write what a run reads and leaves on the disk, without torch."""

import copy
import functools
import json
import random
import re
from pathlib import Path
from typing import Any

import yaml

from dsv3.checkpoint.directory import CONFIG_FILE
from dsv3.config.strict import strict, to_yaml
from dsv3.launch.job import plan_job
from dsv3.launch.run_dir import OVERRIDES_FILE
from tests.harness.composing import compose

VOLATILE = (
    *("tokens_per_second", "mfu", "memory_gib", "data_wait", "straggler", "straggler_rank"),
    *("planned_tokens_per_second", "planned_memory_gib"),
)


def write_texts(folder: Path, files: int, words: int) -> Path:
    """Write short texts of so many of 60 words, always the same; return the folder."""
    choose = random.Random(0)
    vocabulary = [f"w{number}" for number in range(60)]
    for number in range(files):
        (folder / f"{number:03}.txt").write_text(" ".join(choose.choices(vocabulary, k=words)) + "\n")
    return folder


def contents(directory: Path) -> dict[str, bytes]:
    """Return every file below a directory by its relative path."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def rows(run_dir: Path) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl as they stand there, less what differs between two equal runs."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in VOLATILE} for line in lines]


class StoredRun:
    """A directory that looks like a run to `resume=`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def store(self, *overrides: str, total_steps: int = 300) -> Path:
        """Write the run's files; return its directory."""
        self.directory.mkdir(parents=True, exist_ok=True)
        foreign = re.compile(
            r"[+]*(run|hydra|checkpoint|experiments)|[-~]|\d|.*_target_"
        )  # not for a config of ours
        kept = [override for override in overrides if not foreign.match(str(override))]
        config = copy.deepcopy(_completed(tuple(kept)))
        config["schedule"]["total_steps"] = total_steps
        (self.directory / CONFIG_FILE).write_text(yaml.safe_dump(config))
        (self.directory / OVERRIDES_FILE).write_text(yaml.safe_dump(list(overrides)))
        return self.directory

    def change(self, **values: Any) -> None:
        """Set values of config.yaml, by dotted keys with `__` for a dot; a value of None removes the key."""
        config = yaml.safe_load((self.directory / CONFIG_FILE).read_text())
        for key, value in values.items():
            *nodes, name = key.split("__")
            node = config
            for part in nodes:
                node = node.setdefault(part, {})
            node.pop(name, None)
            if value is not None:
                node[name] = value
        (self.directory / CONFIG_FILE).write_text(yaml.safe_dump(config))


@functools.cache
def _completed(overrides: tuple[str, ...]) -> dict[str, Any]:
    """Return what a run of these overrides stores as its config; composing takes half a second."""
    return to_yaml(plan_job(strict(compose(list(overrides))), list(overrides)).config)
