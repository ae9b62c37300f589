"""The data room: preparing shards, reading rows, memory, and the start of a run.

    python -m benchmarks.data                        all parts, in a temporary directory of this disk
    python -m benchmarks.data --only loader,memory   some parts; the others keep their results
    python -m benchmarks.data --directory DIR        where the files go

Parts:

- `prepare`: task=prepare against `encode_batch` of the tokenizers library (prepare_throughput.py).
- `packing`: the layout of rows by best-fit packing, and what both packings cut and pad (packing.py).
- `loader`: tokens per CPU second from token shards to batches, by the ways of packing. Rows of 4,096 tokens
  come from all over 1.2 GB of documents of about 1,000 tokens, which lie in the page cache.
- `memory`: anonymous memory of a process that opens 0.1, 1 and 10 GB of shards and takes batches from all
  over them. The tokens are sparse files, whose zeros take no disk; their offsets are real.
- `start`: a run of one step on 2 ranks over a text of 300 MB that lies in the cache, against the imports.

Other work disturbs wall-clock time, so rates are per CPU second of one process on one thread.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.pages import fill
from dsv3.tokens.shard_index import Shard, ShardIndex, dtype_for

ROOT = Path(__file__).resolve().parent.parent
RESULT = Path(__file__).resolve().parent / "results" / "data.json"

VOCABULARY = 60_000
SEQUENCE = 4096
DOCUMENT = 1000
"""Mean length of a document, in tokens; lengths are those of an exponential distribution."""
SHARD_TOKENS = 1 << 26

LOADER_TOKENS = 600_000_000
MEMORY_GIGABYTES = (0.1, 1, 10)
CORPUS_BYTES = 300_000_000


def write_shards(folder: Path, tokens: int, sparse: bool = False) -> None:
    """Write token shards of random ids, or of zeros that take no disk."""
    folder.mkdir(parents=True)
    shards = []
    for number, first in enumerate(range(0, tokens, SHARD_TOKENS)):
        count, generator = min(SHARD_TOKENS, tokens - first), np.random.default_rng(number)
        lengths = 1 + generator.exponential(DOCUMENT, 2 * count // DOCUMENT).astype(np.int64)
        ends = np.cumsum(lengths)
        offsets = np.concatenate([[0], ends[ends < count], [count]])
        name = f"train-{number:05}"
        names = f"{name}.tokens.npy", f"{name}.offsets.npy"
        np.save(folder / names[1], offsets)
        if sparse:
            with (folder / names[0]).open("wb") as file:
                header = {"descr": "<u2", "fortran_order": False, "shape": (count,)}
                np.lib.format.write_array_header_1_0(file, header)
                file.truncate(file.tell() + 2 * count)
        else:
            np.save(folder / names[0], generator.integers(0, VOCABULARY, count, dtype=np.uint16))
        shards.append(Shard(names[0], names[1], count, len(offsets) - 1))
    ShardIndex(dtype_for(VOCABULARY), {"train": shards}, VOCABULARY).write(folder)


def open_shards(folder: Path, **options: Any) -> Any:
    """Return the data of data=shards, opened and checked as a run does."""
    from dsv3.data.token_shards import ShardsData

    common = {"document_mask": False, "held_out": 0.001, "shuffle": True, "cache_dir": str(folder / "cache")}
    packing = {"packing": "concat", "fim_rate": 0.0}
    source = ShardsData(path=str(folder), **{**common, **packing, **options})
    data = source.prepare(None, SEQUENCE, seed=0)
    data.check_vocabulary(VOCABULARY)
    return data


def batches(data: Any, sequences: int = 8) -> Iterator[Any]:
    """Yield the batches of one rank without end."""
    from dsv3.data.loader import DataLoader
    from dsv3.planning.batch_schedule import BatchSchedule

    loader, sample = DataLoader(data.train, BatchSchedule(sequences), 1), 0
    while True:
        yield loader.microbatches(sample)
        sample += sequences


def measure_prepare(directory: Path) -> dict[str, Any]:
    """Return the throughput of task=prepare beside the library's."""
    from benchmarks.prepare_throughput import measure

    return measure()


def measure_packing(directory: Path) -> dict[str, Any]:
    """Return what the layout of rows costs, and what both packings cut and pad."""
    from benchmarks.packing import measure

    return measure()


def measure_loader(directory: Path) -> dict[str, Any]:
    """Return tokens per CPU second of one core for each way of packing."""
    import torch

    from dsv3.data.loader import DataLoader
    from dsv3.data.prefetch import Prefetcher
    from dsv3.planning.batch_schedule import BatchSchedule

    torch.set_num_threads(1)
    folder, steps = directory / "shards", 100
    if not folder.exists():
        write_shards(folder, LOADER_TOKENS)
    for file in folder.glob("*.npy"):
        file.read_bytes()  # into the page cache
    found: dict[str, Any] = {"row_tokens": SEQUENCE, "document_tokens": DOCUMENT, "tokens": LOADER_TOKENS}
    for name, options in {"concat": {}, "best_fit": {"packing": "best_fit"}}.items():
        data = open_shards(folder, **options)
        stream = batches(data)
        for _ in range(10):
            next(stream)
        rates = []
        for _ in range(5):
            began = time.process_time()
            for _ in range(steps):
                next(stream)
            rates.append(steps * 8 * SEQUENCE / (time.process_time() - began))
        found[f"{name}_tokens_per_cpu_second"] = round(float(np.median(rates)))
    # The same through the thread: the process's CPU seconds, those of the thread included.
    schedule = BatchSchedule(8)
    prefetcher = Prefetcher(DataLoader(open_shards(folder).train, schedule, 1), 2, torch.device("cpu"))
    began = time.process_time()
    prefetcher.start(0, steps)
    for step in range(steps):
        prefetcher.microbatches(8 * step)
    prefetcher.close()
    rate = steps * 8 * SEQUENCE / (time.process_time() - began)
    found["concat_prefetched_tokens_per_cpu_second"] = round(rate)
    return found


READ = """
import itertools, json, sys
from pathlib import Path
from benchmarks.data import batches, open_shards
def kib(key):
    return int(next(l for l in open("/proc/self/status") if l.startswith(key)).split()[1])
data, before = None, kib("RssAnon")
data = open_shards(Path(sys.argv[1]))
opened = kib("RssAnon")
for _ in itertools.islice(batches(data), 300):
    pass
print(json.dumps({"imported": before, "opened": opened, "read": kib("RssAnon"), "peak": kib("VmHWM")}))
"""


def measure_memory(directory: Path) -> dict[str, Any]:
    """Return the memory of a process by the size of its shards, in MiB."""
    found: dict[str, Any] = {}
    for gigabytes in MEMORY_GIGABYTES:
        folder = directory / f"sparse-{gigabytes}"
        if not folder.exists():
            write_shards(folder, round(gigabytes * 5e8), sparse=True)
        finished = subprocess.run(
            [sys.executable, "-c", READ, str(folder)],
            cwd=ROOT, check=True, capture_output=True, text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        told = json.loads(finished.stdout.splitlines()[-1])
        found[f"{gigabytes:g} GB"] = {name: round(value / 1024, 1) for name, value in told.items()}
    return found


def measure_start(directory: Path) -> dict[str, Any]:
    """Return the seconds of a run of one step on 2 ranks over a small and a large text in the cache."""
    found: dict[str, Any] = {"corpus_bytes": CORPUS_BYTES, "ranks": 2}
    environment = os.environ | {
        "DSV3_CACHE": str(directory / "cache"),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }

    def run(*words: str) -> dict[str, float]:
        """Run a command of this interpreter; return its wall and CPU seconds."""
        before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
        subprocess.run(
            [sys.executable, *words], cwd=ROOT, check=True, env=environment, stdout=subprocess.DEVNULL
        )
        wall, after = time.monotonic() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        return {"seconds": round(wall, 2), "cpu_seconds": round(cpu, 2)}

    def train(text: Path) -> list[str]:
        folder = directory / f"run-{text.name}-{time.monotonic_ns()}"
        return [
            "train.py", "data=text", f"data.path={text}", f"run.dir={folder}", "parallel=fsdp",
            "launch.nproc=2", "train.steps=1", "train.sequence_length=64", "train.global_batch_size=2",
            "train.generate_every=0", "train.evaluate_every=0", "logger=none",
        ]  # fmt: skip

    found["imports"] = run("-c", "import dsv3.tasks.train, dsv3.programs")
    for name, size in (("small", 1_000_000), ("large", CORPUS_BYTES)):
        text = directory / f"{name}-text"
        if not text.exists():
            write_text(text, size)
        found[f"{name}_first"] = run(*train(text))
        again = [run(*train(text)) for _ in range(3)]
        found[f"{name}_warm"] = min(again, key=lambda told: told["cpu_seconds"])
    for unit in ("seconds", "cpu_seconds"):
        more = found["large_warm"][unit] - found["small_warm"][unit]
        found[f"warm_{unit}_for_the_large_text"] = round(more, 2)
        # The ranks import at the same time; the command that starts them imports no torch.
        imports = found["imports"][unit] * (1 if unit == "seconds" else 2)
        found[f"warm_{unit}_beyond_the_imports"] = round(found["large_warm"][unit] - imports, 2)
    return found


def write_text(folder: Path, size: int) -> None:
    """Write about `size` bytes of texts: the standard library's, each copy with words of its own."""
    sources = [
        path.read_text("utf-8", errors="ignore") for path in sorted(Path(os.__file__).parent.glob("*.py"))
    ]
    folder.mkdir(parents=True)
    written = copy = 0
    while written < size:
        for number, text in enumerate(sources):
            content = text.replace("self", f"self{copy}").replace("import", f"import{copy}")
            if written < size:
                written += (folder / f"{copy}-{number}.txt").write_text(content, "utf-8")
        copy += 1


PARTS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "prepare": measure_prepare,
    "packing": measure_packing,
    "loader": measure_loader,
    "memory": measure_memory,
    "start": measure_start,
}


def write_page(results: dict[str, Any]) -> None:
    """Write the table of docs/data.md."""
    lines = ["| measured | result |", "|---|---|"]
    if prepare := results.get("prepare"):
        for way, what in (("files", "files of some 11,000"), ("paragraphs", "paragraphs of some 275")):
            found = prepare[way]
            rate = found["characters_per_cpu_second"]["task=prepare"] / 1e6
            told = f"{rate:.1f} M characters per CPU second, {found['of_encode_batch']:.2f} of `encode_batch`"
            told += f", {found['of_encode_batch_fast']:.2f} of `encode_batch_fast`"
            lines.append(f"| task=prepare of {what} characters | {told} |")
    if loader := results.get("loader"):
        for way in ("concat", "best_fit"):
            rate = loader[f"{way}_tokens_per_cpu_second"] / 1e6
            lines.append(f"| rows of 4,096 tokens to batches, `{way}` | {rate:.1f} M tokens per CPU second |")
    if packing := results.get("packing"):
        row = packing["4096"]
        seconds, more = row["best_fit_cpu_seconds"], row["best_fit_peak_mib"]
        told = f"{seconds:.1f} CPU seconds, {more} MiB"
        lines.append(f"| layout of `best_fit` for a million documents like the web's | {told} |")
        cut = f"{row['concat_cut']:.1%} by `concat`, {row['best_fit_cut']:.1%} by `best_fit`"
        told = f"{cut}, with {row['best_fit_padding']:.3%} of padding"
        lines.append(f"| of them cut by rows of 4,096 tokens | {told} |")
    if memory := results.get("memory"):
        sizes = {name: found["read"] for name, found in memory.items() if isinstance(found, dict)}
        told = ", ".join(f"{size:.0f} MiB at {name}" for name, size in sizes.items())
        lines.append(f"| anonymous memory of a process that reads shards | {told} |")
    if start := results.get("start"):
        beyond = start["warm_seconds_beyond_the_imports"]
        told = f"{beyond:.1f} s beyond the imports, starting workers, the step and its save included"
        lines.append(f"| a step on 2 ranks over 300 MB of text in the cache | {told} |")
    fill("data.md", "data benchmark", lines)


def main() -> None:
    """Measure the chosen parts, and write results and page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default=",".join(PARTS), help="parts, separated by commas")
    parser.add_argument("--directory", type=Path, help="a folder for the files, which stay there")
    parser.add_argument("--json", type=Path, default=RESULT, help="where the results go")
    options = parser.parse_args()
    results: dict[str, Any] = json.loads(options.json.read_text()) if options.json.exists() else {}
    with tempfile.TemporaryDirectory() as temporary:
        for part in options.only.split(","):
            found = PARTS[part](options.directory or Path(temporary))
            results[part] = {"date": time.strftime("%Y-%m-%d"), "cpus": os.cpu_count(), **found}
            print(json.dumps({part: results[part]}, indent=1), flush=True)
            options.json.write_text(json.dumps(results, indent=1) + "\n")
    if options.json == RESULT:
        write_page(results)


if __name__ == "__main__":
    main()
