"""Make the checkpoints that benchmarks/clients.py gives to other programs.

One is trained here on short documents and exported with the tokenizer that was trained with it. The other is
trained with a released tokenizer, stored in fp8 in the form of a release, and re-exported in bf16.
"""

import json
import os
import shutil
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

from dsv3.checkpoint.directory import MANIFEST_FILE
from dsv3.checkpoint.training_record import TRAINING_FILE
from dsv3.tokens.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[1]
MODEL = [
    "model.dim=64",
    "model.num_layers=3",
    "model.dense_hidden_dim=128",
    "model.attention.q_lora_rank=48",
    "model.attention.kv_lora_rank=32",
    "model.moe.hidden_dim=64",
]
"""Every mechanism of the debug model; ids and text are learnt within a minute."""
YARN = [
    "model.rope.scaling=yarn",
    "model.rope.factor=4",
    "model.rope.original_sequence_length=64",
    "model.rope.mscale=1.0",
    "model.rope.mscale_all_dim=1.0",
]
BATCH = ["train.global_batch_size=2", "train.sequence_length=48"]
"""Of a model with a large vocabulary, whose logits take most of the time."""
TRAINING = [
    "train.checkpoint_every=0",
    "train.generate_every=0",
    "train.evaluate_every=0",
    "optimizer.weight_decay=0",
    "data.held_out=0.1",
    "logger=none",
    "data=text",
]


def documents() -> list[str]:
    """Return short documents, whose end a model learns soon."""
    who = ["Mira the fox", "Tom the na\u00efve owl", "Zo\u00eb the bear", "Ian the mole"]
    what = ["plums & pears", "caf\u00e9 & cake", "figs; no dates", "'hot' soup, cold tea"]
    where = ["in a den", "by the sea", "at No. 12", "under 3 trees"]
    return [f"{a} likes {b} {c}.\n" for a, b, c in product(who, what, where)]


def command(program: str, *arguments: str, cwd: Path) -> str:
    """Return the stdout of train.py or convert.py, which must succeed."""
    variables = os.environ | {"OMP_NUM_THREADS": "1", "DSV3_CACHE": str(cwd / "cache")}
    line = [sys.executable, str(ROOT / program), *arguments]
    done = subprocess.run(line, cwd=cwd, env=variables, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(line)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return done.stdout


def train(directory: Path, name: str, *overrides: str, steps: int, lr: float = 5e-3) -> Path:
    """Train on the documents, or find that it is done; return the export of the last step."""
    folder, run_dir = directory / "documents", directory / name
    if not folder.exists():
        folder.mkdir(parents=True)
        for number, text in enumerate(documents()):
            (folder / f"{number:03d}.txt").write_text(text)
    export = run_dir / "hf" / f"step-{steps}"
    if not export.exists():
        lengths = [f"train.steps={steps}", f"train.export_hf_every={steps}", f"optimizer.lr={lr}"]
        places = [f"data.path={folder}", f"run.dir={run_dir}"]
        command("train.py", *TRAINING, *lengths, *places, *overrides, cwd=directory)
    return export


def trained(directory: Path) -> Path:
    """Return an export of a model that is trained here, with the tokenizer that is trained here."""
    sizes = ["model.vocab_size=400", "tokenizer.vocab_size=400", "train.global_batch_size=8"]
    return train(directory, "trained", *MODEL, *sizes, "train.sequence_length=64", steps=300)


def released(directory: Path, tokenizer: Path, add_bos: bool) -> Path:
    """Return a checkpoint in fp8 in the form of a release, with the released files of a tokenizer.

    Its tokenizer_config.json has `add_bos_token` as `add_bos` says.
    """
    release = directory / f"release_{add_bos}"
    if release.exists():
        return release
    sizes = ["model.vocab_size=129280", *BATCH, "tokenizer=local", f"tokenizer.path={tokenizer}"]
    export = train(directory, "before_release", *MODEL, *sizes, *YARN, steps=160)
    convert(export, release, "fp8")
    for name in (MANIFEST_FILE, TRAINING_FILE):
        (release / name).unlink(missing_ok=True)  # no release has them
    for path in tokenizer.glob("*.json"):
        shutil.copyfile(path, release / path.name)
    tokens = Tokenizer.from_file(release)
    ids = {"bos_token_id": tokens.bos, "eos_token_id": tokens.eos}
    sampling = {"do_sample": True, "temperature": 0.6, "top_p": 0.95}
    (release / "generation_config.json").write_text(json.dumps(ids | sampling))
    set_values(release / "config.json", **ids)
    set_values(release / "tokenizer_config.json", add_bos_token=add_bos)
    return release


def converted(directory: Path, tokenizer: Path) -> Path:
    """Return the release, read and written again in bf16."""
    release, export = released(directory, tokenizer, add_bos=False), directory / "converted"
    if not export.exists():
        convert(release, export, "bf16")
    return export


def trained_further(directory: Path, tokenizer: Path) -> Path:
    """Return the export of a run that began from the release."""
    release = released(directory, tokenizer, add_bos=True)
    return train(directory, "further", f"checkpoint.load=hf:{release}", *BATCH, steps=2, lr=1e-5)


def set_values(file: Path, **values: Any) -> None:
    """Set values of a JSON file."""
    file.write_text(json.dumps(json.loads(file.read_text()) | values, indent=2, ensure_ascii=False))


def convert(source: Path, target: Path, dtype: str) -> None:
    """Convert one HF checkpoint to another."""
    places = [f"input={source}", f"output={target}", f"dtype={dtype}"]
    command("convert.py", "direction=hf_to_hf", *places, cwd=target.parent)
