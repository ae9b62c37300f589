"""Ask what the clients of benchmarks/clients.py are asked about a checkpoint, and how dsv3 answers it."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from benchmarks.client_exports import command, documents
from dsv3.library import compose, load_model
from dsv3.model.generation import generate
from dsv3.model.transformer import Transformer
from dsv3.tokens.tokenizer import Tokenizer

MAX_TOKENS = 48
WIDTH = 24
"""Ids per row, begin-of-sentence included."""
MESSAGES = [
    {"role": "system", "content": "Answer in one line."},
    {"role": "user", "content": "What does Mira like?"},
    {"role": "assistant", "content": "Plums & pears."},
    {"role": "user", "content": "And Tom?"},
]
TEXTS = [
    "Mira the fox likes plums & pears; she is 12 years old.",
    "  two spaces,\ttabs\t\tand  three   spaces \n\n\n line ends \r\n and a last one\n",
    "1 12 123 1234 12345 3.14159 1,000,000 0x1F 2026-11-30",
    "It's we'll they've I'm you'd he'd IT'S We'Ll 'tis",
    "na\u00efve caf\u00e9 Zo\u00eb \u00c5ngstr\u00f6m \u0440\u0443\u0441\u0441\u043a\u0438\u0439",
    "\u4e2d\u6587\u5b57\u7b26 \u65e5\u672c\u8a9e \u0627\u0644\u0639\u0631\u0628\u064a\u0629",
    "\U0001f680\U0001f468\u200d\U0001f469\u200d\U0001f467 e\u0301 \u00a0\u2003wide",
    "def f(x):\n    return {'a': [1, 2], \"b\": x != 3}  # comment\n\n\tif x:\n\t\tpass\n",
    "Hello , world ! How are you ? 'quoted' , n't do not .",
    "======------......!!!!!!??????''''''``````\"\"\"\"",
    "<html>&amp;</html> $x^2 + y_1 = \\frac{1}{2}$ a@b.org https://example.org/?q=1&r=2",
    " ",
    "\n",
    "a",
]
"""Text of many kinds, without special tokens: in text, dsv3 encodes these as characters."""


@dataclass
class Asked:
    """A checkpoint, what every client is asked about it, and what dsv3 answers."""

    export: Path
    request: dict[str, Any]
    loss: float
    """By task=evaluate, with PyTorch's cross-entropy in fp32."""
    loss_in_double: float
    """From the same logits; over many ids, the fp32 sum on a CPU loses small terms (docs/clients.md)."""
    perplexities: dict[int, float]
    """Per byte, over documents of one length that begin with one begin-of-sentence id, and with two."""
    documents: list[str]
    token_ids: list[list[int]]
    prompt_ids: list[list[int]]
    greedy: list[dict[str, Any]]
    chat: str | None


def ask(export: Path, directory: Path) -> Asked:
    """Return what dsv3's own commands answer; ids of its continuation come from the library."""
    tokenizer = Tokenizer.from_file(export)
    bos = [] if tokenizer.bos is None else [tokenizer.bos]
    load = f"checkpoint.load=hf:{export}"
    texts = documents()
    running = [token for text in texts for token in [*bos, *tokenizer.encode(text), *tokenizer.stop[:1]]]
    rows = [running[start : start + WIDTH] for start in range(0, len(running) // 2, len(running) // 3)]
    # Of several lengths; one or the other is of a document that is held out.
    prompts = [text[: text.index(" likes") + 5 + number] for number, text in enumerate(texts[::13])]
    begin = bos if tokenizer.add_bos else []
    prompt_ids = [[*begin, *tokenizer.encode(prompt)] for prompt in prompts]
    model = load_model(compose([load]))
    continued = generate(model, prompt_ids, MAX_TOKENS, 0.0, 1.0, 0, tokenizer.stop)
    greedy = []
    for prompt, ids in zip(prompts, continued, strict=True):
        asked = ["task=generate", load, "task.temperature=0", f"task.max_tokens={MAX_TOKENS}"]
        told = command("train.py", *asked, f"task.prompt={prompt}", cwd=directory)
        text = told.removeprefix(prompt).removesuffix("\n")
        greedy.append({"ids": ids, "text": text, "stopped": len(ids) < MAX_TOKENS})
    cut = [ids[: WIDTH - 1] for ids in map(tokenizer.encode, running_text(texts))]
    short = [text for ids in cut if tokenizer.encode(text := tokenizer.decode(ids)) == ids]
    size = sum(len(text.encode()) for text in short)
    perplexities = {}
    for times in (1, 2):
        scored = [[*bos * times, *tokenizer.encode(text)] for text in short]
        summed = evaluate(load, scored, directory) * len(scored) * (len(scored[0]) - 1)
        perplexities[times] = math.exp(summed / size)
    request: dict[str, Any] = {"ids": rows, "prompts": prompts, "texts": TEXTS}
    request |= {"messages": MESSAGES, "max_tokens": MAX_TOKENS}
    return Asked(
        export,
        request,
        evaluate(load, rows, directory),
        loss_in_double(model, rows),
        perplexities,
        short,
        [tokenizer.encode(text) for text in TEXTS],
        prompt_ids,
        greedy,
        chat_text(export),
    )


def running_text(texts: Sequence[str]) -> list[str]:
    """Return longer texts, of several documents each."""
    return ["".join(texts[start : start + 3]) for start in range(0, len(texts), 5)]


@torch.inference_mode()
def loss_in_double(model: Transformer, rows: list[list[int]]) -> float:
    """Return the loss of rows of ids, normalized in double precision."""
    ids = torch.tensor(rows)
    logits = model(ids).logits[:, :-1].double()
    return cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).item()


def evaluate(load: str, rows: list[list[int]], directory: Path) -> float:
    """Return the loss of rows of ids by task=evaluate."""
    file = directory / "ids.npy"
    np.save(file, np.array(rows, np.int64))
    told = command("train.py", "task=evaluate", load, "data=tokens", f"data.path={file}", cwd=directory)
    return float(json.loads(told.splitlines()[-1])["loss"])


def chat_text(export: Path) -> str | None:
    """Return the messages by the checkpoint's chat template, rendered by jinja2 alone; None without one."""
    import jinja2

    beside = export / "chat_template.jinja"
    config = json.loads((export / "tokenizer_config.json").read_text())
    template = beside.read_text() if beside.is_file() else config.get("chat_template")
    if template is None:
        return None
    bos = config["bos_token"]
    bos = bos["content"] if isinstance(bos, dict) else bos
    made = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(template)
    return made.render(messages=MESSAGES, bos_token=bos, add_generation_prompt=True)
