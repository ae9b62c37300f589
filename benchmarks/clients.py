"""Exports in the programs that people use them with: transformers, lm-eval and llama.cpp, each run for real.

    python -m benchmarks.clients --python-old-transformers OLD/bin/python --python-lm-eval EVAL/bin/python \\
        --python-llama GGUF/bin/python --llama-cpp LLAMA_CPP --released-tokenizer FOLDER

docs/clients.md says how to make the environments. The exports are of a model that is trained here on short
documents with a tokenizer of its own, and of a checkpoint in fp8 in the form of a release, with the files of
--released-tokenizer: converted, and trained further. dsv3 evaluates each export, continues prompts greedily
and encodes texts, and so does each client in a process of its own (benchmarks/client_process.py).
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from benchmarks.client_exports import converted, trained, trained_further
from benchmarks.client_questions import MAX_TOKENS, TEXTS, Asked, ask
from benchmarks.pages import fill

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "clients.json"


def run_client(python: str, kind: str, asked: Asked, directory: Path, *options: str) -> dict[str, Any]:
    """Return the answers of a client in its own environment."""
    request, target = directory / "request.json", directory / "answer.json"
    request.write_text(json.dumps(asked.request))
    target.unlink(missing_ok=True)
    script = str(ROOT / "benchmarks" / "client_process.py")
    line = [python, script, kind, str(asked.export), str(request), str(target), *options]
    done = subprocess.run(line, cwd=directory, env=offline(), capture_output=True, text=True)
    if not target.is_file():
        return {"load": {"error": f"ended with {done.returncode}: {done.stderr.strip()[-300:]}"}}
    found: dict[str, Any] = json.loads(target.read_text())
    return found


def offline() -> dict[str, str]:
    """Return the variables of a client: one thread, no hub."""
    one = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    return (
        dict(os.environ)
        | one
        | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    )


LOSS_TOLERANCE = 1e-5
"""Relative; sums in another order differ by about 1e-7 in fp32."""


def compare(asked: Asked, found: dict[str, Any]) -> dict[str, Any]:
    """Return by question how many answers of a client are those of dsv3, or the error that came instead."""
    for part in ("convert", "load"):
        if "error" in found.get(part, {}):
            return {part: found[part]}

    def loss(rows: list[float]) -> dict[str, Any]:
        value = sum(rows) / len(rows)
        own = asked.loss_in_double if found.get("in_double") else asked.loss
        return {"value": value, "difference": abs(value - own) / own}

    checks: dict[str, Callable[[Any], dict[str, Any]]] = {
        "losses": loss,
        "token_ids": lambda rows: count(rows, asked.token_ids),
        "decoded": lambda rows: count(rows, TEXTS),
        "prompt_ids": lambda rows: count(rows, asked.prompt_ids),
        "greedy": lambda rows: continuation(rows, asked.greedy),
        "batch": lambda rows: continuation(rows, asked.greedy),
        "chat": lambda text: count([text], [asked.chat]),
    }
    results: dict[str, Any] = {"convert": found["convert"]} if "convert" in found else {}
    for name, check in checks.items():
        value = found.get(name)
        if name in found and not (name == "chat" and asked.chat is None):
            results[name] = value if isinstance(value, dict) else check(value)
    return results


def count(rows: Sequence[Any], expected: Sequence[Any]) -> dict[str, Any]:
    """Return how many rows are equal, of how many, and those that are not beside what was expected."""
    wrong = [pair for pair in zip(rows, expected, strict=True) if pair[0] != pair[1]]
    return {"equal": len(expected) - len(wrong), "of": len(expected), "different": wrong}


def continuation(rows: list[dict[str, Any]], expected: list[dict[str, Any]]) -> dict[str, Any]:
    """Return how many ids, texts and stops are those of dsv3; an id too few or too many counts as wrong."""
    pairs = [(row["ids"], own["ids"]) for row, own in zip(rows, expected, strict=True)]
    same = (left == right for one, other in pairs for left, right in zip(one, other, strict=False))
    found: dict[str, Any] = {"equal": sum(same), "of": sum(max(len(one), len(other)) for one, other in pairs)}
    for name in ("text", "stopped"):
        found[name] = count([row[name] for row in rows], [row[name] for row in expected])
    return found


def lm_eval(python: str, asked: Asked, directory: Path) -> dict[str, Any]:
    """Return what lm-eval's own command measures on two local tasks: perplexity, and continuation."""
    tasks = directory / "lm_eval_tasks"
    shutil.rmtree(tasks, ignore_errors=True)
    tasks.mkdir()
    pairs = zip(asked.request["prompts"], asked.greedy, strict=True)
    data = {
        "rolling": [{"text": text} for text in asked.documents],
        "continuation": [{"prompt": prompt, "continued": own["text"]} for prompt, own in pairs],
    }
    kinds: dict[str, dict[str, Any]] = {
        "rolling": {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "byte_perplexity"}, {"metric": "bits_per_byte"}],
        },
        "continuation": {
            "output_type": "generate_until",
            "doc_to_text": "{{prompt}}",
            "doc_to_target": "{{continued}}",
            "generation_kwargs": {"until": [], "do_sample": False, "max_gen_toks": MAX_TOKENS},
            "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        },
    }
    for name, rows in data.items():
        file = tasks / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        dataset = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(file)}}}
        task = {"task": f"dsv3_{name}", "test_split": "test", **dataset, **kinds[name]}
        (tasks / f"{name}.yaml").write_text(yaml.safe_dump(task, sort_keys=False))
    # By default lm-eval puts a begin-of-sentence id before the one that a tokenizer adds.
    scored = run_lm_eval(python, asked, directory, "rolling", ",add_bos_token=False")
    default = run_lm_eval(python, asked, directory, "rolling")
    continued = run_lm_eval(python, asked, directory, "continuation")
    found: dict[str, Any] = {"losses": scored, "default": default}
    for name, counts in (("losses", (1,)), ("default", (1, 2))):
        if "error" not in found[name]:
            value = found[name]["byte_perplexity,none"]
            differences = {times: abs(value / asked.perplexities[times] - 1) for times in counts}
            times = min(counts, key=differences.__getitem__)
            found[name] = {"byte_perplexity": value, "bos": times, "difference": differences[times]}
    found["batch"] = continued
    if "error" not in continued:
        texts = count(continued["texts"], [own["text"] for own in asked.greedy])
        found["batch"] = {"text": texts, "exact_match": continued["exact_match,none"]}
    return found


def run_lm_eval(python: str, asked: Asked, directory: Path, task: str, options: str = "") -> dict[str, Any]:
    """Return the metrics of one task and the texts of its samples, or the error."""
    out = directory / "lm_eval_results"
    shutil.rmtree(out, ignore_errors=True)
    line = [python, "-m", "lm_eval", "--model", "hf", "--tasks", f"dsv3_{task}"]
    line += ["--model_args", f"pretrained={asked.export},dtype=float32{options}"]
    line += ["--include_path", str(directory / "lm_eval_tasks"), "--output_path", str(out)]
    line += ["--device", "cpu", "--batch_size", "4", "--log_samples"]
    variables = offline() | {"HF_HOME": str(directory / "hf_home")}
    done = subprocess.run(line, cwd=directory, env=variables, capture_output=True, text=True)
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or ["no message"])[-1][-300:]}
    metrics: dict[str, Any] = json.loads(next(out.rglob("results_*.json")).read_text())["results"]
    lines = next(out.rglob(f"samples_dsv3_{task}_*.jsonl")).read_text().splitlines()
    samples = sorted(map(json.loads, lines), key=lambda sample: sample["doc_id"])
    return {**metrics[f"dsv3_{task}"], "texts": [sample["resps"][0][0] for sample in samples]}


def row(export: str, client: str, found: dict[str, Any]) -> str:
    """Return one row of the table."""

    def cell(name: str, say: Callable[[dict[str, Any]], str]) -> str:
        value = found.get(name)
        return "" if value is None else f"failed: {value['error']}" if "error" in value else say(value)

    def counted(value: dict[str, Any]) -> str:
        return f"{value['equal']} of {value['of']}"

    def named(value: dict[str, Any]) -> str:
        return f"`{value['pre']}` {'recognised' if value['recognised'] else 'by name'}"

    def continued(value: dict[str, Any]) -> str:
        parts = {"ids": value, "texts": value.get("text"), "stops": value.get("stopped")}
        return ", ".join(f"{counted(part)} {name}" for name, part in parts.items() if part and "of" in part)

    for part in ("convert", "load"):
        if "error" in found.get(part, {}):
            return f"| {export} | {client} | {part} failed: {found[part]['error']} | | | | | |"
    cells = [
        cell("losses", lambda value: f"{value['difference']:.1e}"),
        cell("greedy", continued),
        cell("batch", continued),
        ", ".join(
            filter(None, (cell("token_ids", counted), cell("decoded", counted), cell("convert", named)))
        ),
        cell("prompt_ids", counted),
        cell("chat", counted),
    ]
    return f"| {export} | {client} | {' | '.join(cells)} |"


def table(results: dict[str, Any]) -> list[str]:
    """Return the lines of docs/clients.md."""
    columns = [
        "export",
        "client",
        "loss, relative difference",
        "greedy, prompt by prompt",
        "greedy, in a padded batch",
        "texts encoded, decoded again",
        "prompts with special tokens",
        "chat template",
    ]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for export, clients in results["exports"].items():
        lines += [row(export, client, found) for client, found in clients.items() if client != "dsv3"]
    return lines


def run(chosen: argparse.Namespace, directory: Path) -> None:
    """Make each export that is not there yet, use it with each client, and store what came of it at once."""
    makers: dict[str, Callable[[], Path]] = {"trained here": lambda: trained(directory)}
    if chosen.released_tokenizer:
        files = chosen.released_tokenizer.resolve()
        makers["a release, converted"] = lambda: converted(directory, files)
        makers["a release that adds bos, trained further"] = lambda: trained_further(directory, files)
    results: dict[str, Any] = json.loads(RESULT.read_text()) if RESULT.exists() else {"exports": {}}
    for name, make in makers.items():
        if chosen.export not in name:
            continue
        folder = directory / "answers"
        folder.mkdir(parents=True, exist_ok=True)
        asked = ask(make(), folder)
        ids = [len(own["ids"]) for own in asked.greedy]
        stops = sum(own["stopped"] for own in asked.greedy)
        own = {
            "loss": asked.loss,
            "loss_in_double": asked.loss_in_double,
            "byte_perplexity": asked.perplexities[1],
            "ids_continued": ids,
            "stops": stops,
        }
        stored = results["exports"].setdefault(name, {})
        stored["dsv3"] = own
        print(name, json.dumps(own), flush=True)
        for client, use in clients(chosen, asked, folder):
            if chosen.client in client:
                found = use()
                stored[client] = found
                print(row(name, client, found), flush=True)
                RESULT.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
                fill("clients.md", "clients", table(results))


def clients(
    chosen: argparse.Namespace, asked: Asked, folder: Path
) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Yield name and version of each client whose environment is given, and the function that uses it."""

    def ask_client(python: str, kind: str, *options: str) -> Callable[[], dict[str, Any]]:
        return lambda: compare(asked, run_client(python, kind, asked, folder, *options))

    for python in filter(None, (chosen.python_transformers, chosen.python_old_transformers)):
        yield f"transformers {installed(python, 'transformers')}", ask_client(python, "transformers")
    if python := chosen.python_lm_eval:
        name = f"lm-eval {installed(python, 'lm_eval')}"
        yield (
            f"{name} with transformers {installed(python, 'transformers')}",
            lambda: lm_eval(python, asked, folder),
        )
    if python := chosen.python_llama:
        options = (str(Path(chosen.llama_cpp).resolve()), chosen.pre_tokenizer)
        yield (
            f"llama.cpp, xllamacpp {installed(python, 'xllamacpp')}",
            ask_client(python, "llama_cpp", *options),
        )


def installed(python: str, package: str) -> str:
    """Return the version of a package in another environment."""
    line = [python, "-c", f"from importlib.metadata import version; print(version({package!r}))"]
    return subprocess.run(line, capture_output=True, text=True, check=True).stdout.strip()


def main() -> None:
    """Make the exports, run the clients that are given, store, write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--python-transformers", default=sys.executable, help="with a current transformers")
    parser.add_argument("--python-old-transformers", help="with transformers 4.56")
    parser.add_argument("--python-lm-eval", help="with lm-eval[hf]")
    parser.add_argument("--python-llama", help="with xllamacpp and what llama.cpp's converter imports")
    parser.add_argument("--llama-cpp", help="folder with convert_hf_to_gguf.py, conversion/ and gguf-py/")
    parser.add_argument(
        "--pre-tokenizer", default="gpt-2", help="llama.cpp's name for that of tokenizers trained here"
    )
    parser.add_argument(
        "--released-tokenizer", type=Path, help="folder with a tokenizer as DeepSeek released it"
    )
    parser.add_argument("--directory", type=Path, help="where the exports are made and kept")
    parser.add_argument("--export", default="", help="only exports whose name holds this text")
    parser.add_argument("--client", default="", help="only clients whose name holds this text")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        run(chosen, (chosen.directory or Path(temporary)).resolve())


if __name__ == "__main__":
    main()
