"""task=prepare against the `tokenizers` library's own encode_batch: characters per CPU second of one core.

    python -m benchmarks.prepare_throughput [--megabytes 8] [--repeats 5] [--tokenizer PATH]

Both tokenise the same documents in one process and one thread. Ours also reads them from JSON lines, chooses
sides, writes shards and their digests; the library only encodes what is in memory. CPU time counts, of each
the best of several turns: other work on the machine, which takes caches away, only ever adds to it.

The documents are paragraphs and whole files of the Python standard library: short ones cost most besides the
encoding, files are of the size of web pages.
"""

import argparse
import json
import os
import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dsv3.documents.document_files import ReadOptions
from dsv3.documents.input_files import find_files
from dsv3.documents.input_units import plan_units
from dsv3.tokens.prepare_shards import HashedSides, prepare_shards
from dsv3.tokens.tokenizer import Tokenizer, TrainedTokenizer

OPTIONS = ReadOptions()

AT_ONCE = 1000
"""Documents that the library gets at once."""


def corpus(megabytes: float) -> dict[str, list[str]]:
    """Return documents of two sizes, about so many MB of each."""
    files, size = [], 0
    for path in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
        text = path.read_text("utf-8", errors="ignore")
        if text and len(text) < 200_000:
            files.append(text)
            size += len(text)
        if size > megabytes * 1e6:
            break
    paragraphs = [part for text in files for part in text.split("\n\n") if part.strip()]
    return {"files": files, "paragraphs": paragraphs}


def compare(name: str, documents: list[str], tokenizer: Tokenizer, repeats: int) -> dict[str, Any]:
    """Return characters per CPU second of the library and of task=prepare, the best of its turns."""
    backend = tokenizer._backend
    characters = sum(map(len, documents))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "documents.jsonl"
        with file.open("w") as lines:
            for text in documents:
                lines.write(json.dumps({"text": text}) + "\n")

        def library(encode: Callable[..., Any]) -> None:
            for start in range(0, len(documents), AT_ONCE):
                encode(documents[start : start + AT_ONCE], add_special_tokens=False)

        def ours(number: int) -> None:
            units = plan_units(find_files([str(file)]).files, OPTIONS)
            output = Path(folder) / str(number)
            prepare_shards(output, units, HashedSides(OPTIONS, 0.03), tokenizer, {}, workers=1)

        times: dict[str, list[float]] = {"encode_batch": [], "encode_batch_fast": [], "task=prepare": []}
        for number in range(repeats):
            for what in times:
                begin = time.process_time()
                if what == "task=prepare":
                    ours(number)
                else:
                    library(getattr(backend, what))
                times[what].append(time.process_time() - begin)
    found: dict[str, Any] = {
        "documents": len(documents),
        "characters": characters,
        "characters_per_cpu_second": {what: round(characters / min(taken)) for what, taken in times.items()},
    }
    speed = found["characters_per_cpu_second"]
    found["of_encode_batch"] = round(speed["task=prepare"] / speed["encode_batch"], 3)
    found["of_encode_batch_fast"] = round(speed["task=prepare"] / speed["encode_batch_fast"], 3)
    return found


def measure(megabytes: float = 8, repeats: int = 5, path: str | None = None) -> dict[str, Any]:
    """Return the comparison for each size of documents."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        texts = corpus(megabytes)
        tokenizer = (
            Tokenizer.from_file(path) if path else TrainedTokenizer(8192).prepare(texts["files"][:100])
        )
        return {name: compare(name, found, tokenizer, repeats) for name, found in texts.items()}
    finally:
        os.environ.pop("TOKENIZERS_PARALLELISM", None)
        if before is not None:
            os.environ["TOKENIZERS_PARALLELISM"] = before


def main() -> None:
    """Print the comparison as JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--megabytes", type=float, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tokenizer", help="a tokenizer.json, or a folder with one; else one is trained")
    given = parser.parse_args()
    print(json.dumps(measure(given.megabytes, given.repeats, given.tokenizer), indent=1))


if __name__ == "__main__":
    main()
