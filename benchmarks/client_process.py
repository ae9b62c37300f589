"""Use a checkpoint with one client and nothing of dsv3: the process that benchmarks/clients.py starts.

    python benchmarks/client_process.py transformers CHECKPOINT REQUEST.json ANSWER.json
    python benchmarks/client_process.py llama_cpp CHECKPOINT REQUEST.json ANSWER.json LLAMA_CPP PRE_TOKENIZER

It runs in the client's own environment. Each answer stands alone: one that fails is `{"error": ...}`.
Both clients compute in fp32 on one thread of the CPU.
"""

import json
import math
import os
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.error import HTTPError


class Transformers:
    """Model and tokenizer of a checkpoint as transformers loads them.

    Args:
        checkpoint: the directory of the checkpoint.
        request: ids, prompts, texts and messages to use it on.
    """

    answers = ("losses", "token_ids", "decoded", "prompt_ids", "greedy", "batch", "chat")

    def __init__(self, checkpoint: str, request: dict[str, Any]) -> None:
        import torch
        import transformers

        torch.set_num_threads(1)
        torch.set_grad_enabled(False)
        self.torch = torch
        self.request = request
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
        self.model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()

    def losses(self) -> list[float]:
        """Return the model's own loss of each row of ids, in nats per token."""
        rows = [self.torch.tensor([row]) for row in self.request["ids"]]
        return [self.model(ids, labels=ids).loss.item() for ids in rows]

    def token_ids(self) -> list[list[int]]:
        """Return the ids of each text, without special tokens."""
        return [self.tokenizer(text, add_special_tokens=False).input_ids for text in self.request["texts"]]

    def decoded(self) -> list[str]:
        """Return each text encoded and decoded again."""
        return [self.tokenizer.decode(ids, skip_special_tokens=True) for ids in self.token_ids()]

    def prompt_ids(self) -> list[list[int]]:
        """Return the ids of each prompt, with the special tokens that the tokenizer adds."""
        return [self.tokenizer(prompt).input_ids for prompt in self.request["prompts"]]

    def greedy(self) -> list[dict[str, Any]]:
        """Return ids and text that continue each prompt, and whether an end-of-sequence id stopped them."""
        return [self._generate([prompt])[0] for prompt in self.request["prompts"]]

    def batch(self) -> list[dict[str, Any]]:
        """Return the same for all prompts in one batch, padded on the left."""
        return self._generate(self.request["prompts"])

    def chat(self) -> str:
        """Return the messages as the chat template writes them, with the beginning of a reply."""
        messages = self.request["messages"]
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))

    def _generate(self, prompts: list[str]) -> list[dict[str, Any]]:
        """Return ids, text and stop of each row; only the sampling and the length are set here."""
        padded = self.tokenizer(prompts, return_tensors="pt", padding=len(prompts) > 1, padding_side="left")
        length = self.request["max_tokens"]
        out = self.model.generate(**padded, do_sample=False, max_new_tokens=length)
        named = self.model.generation_config.eos_token_id
        stops = named if isinstance(named, list) else [named]
        rows = []
        for row in out[:, padded.input_ids.shape[1] :].tolist():
            end = next((place for place, token in enumerate(row) if token in stops), None)
            text = self.tokenizer.decode(row[:end], skip_special_tokens=True)
            rows.append({"ids": row[:end], "text": text, "stopped": end is not None})
        return rows


NAMED = """
import runpy, sys
folder, name, *sys.argv[1:] = sys.argv[1:]
sys.path[:0] = [folder, folder + "/gguf-py"]
from conversion.base import TextModel
TextModel.get_vocab_base_pre = lambda self, tokenizer: name
runpy.run_path(folder + "/convert_hf_to_gguf.py", run_name="__main__")
"""
"""Convert with a pre-tokenizer named; docs/clients.md shows it."""


def convert_to_gguf(checkpoint: str, file: Path, llama_cpp: str, name: str) -> dict[str, Any]:
    """Write a GGUF file in fp32 with llama.cpp's converter; return what it says of the tokenizer.

    The converter recognises pre-tokenizers by a hash over the ids that known releases give a text. Where that
    fails, it runs again with the name given.
    """
    options = [checkpoint, "--outfile", str(file), "--outtype", "f32"]
    done = _run([f"{llama_cpp}/convert_hf_to_gguf.py", *options])
    recognised = "pre-tokenizer was not recognized" not in done.stderr
    if not recognised:
        done = _run(["-c", NAMED, llama_cpp, name, *options])
    if done.returncode:
        raise RuntimeError(next(iter(reversed(done.stderr.strip().splitlines())), "no message"))
    sys.path.insert(0, f"{llama_cpp}/gguf-py")
    from gguf import GGUFReader

    fields = GGUFReader(file).fields
    kept = {
        key.rpartition(".")[2]: field.contents()
        for key, field in fields.items()
        if key.startswith("tokenizer.") and key.endswith(("_id", ".pre", "_token"))
    }
    return {"recognised": recognised, "chat_template": "tokenizer.chat_template" in fields, **kept}


def _run(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True)


class LlamaCpp:
    """A GGUF file in llama.cpp's own server, which xllamacpp runs in this process; asked over HTTP.

    Args:
        file: the GGUF file.
        request: ids, prompts, texts and messages to use it on.
    """

    answers = ("losses", "token_ids", "decoded", "prompt_ids", "greedy", "chat")

    def __init__(self, file: str, request: dict[str, Any]) -> None:
        import xllamacpp

        self.request = request
        params = xllamacpp.CommonParams()
        params.model.path = file
        params.n_ctx, params.n_parallel, params.cpuparams.n_threads = 512, 1, 1
        params.warmup, params.use_jinja = False, True
        # The default cache is fp16, which alone moves a loss by 1e-3.
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.server = xllamacpp.Server(params)
        self.vocabulary = self._ask("/v1/models")["data"][0]["meta"]["n_vocab"]

    def losses(self) -> list[float]:
        """Return the next-token loss of each row of ids, in nats per token, from each id's probability."""
        return [
            sum(self._loss(row[:place], row[place]) for place in range(1, len(row))) / (len(row) - 1)
            for row in self.request["ids"]
        ]

    def _loss(self, ids: list[int], target: int) -> float:
        found = self._ask("/completion", prompt=ids, n_predict=1, n_probs=self.vocabulary, temperature=-1)
        chances = {
            each["id"]: each["logprob"] for each in found["completion_probabilities"][0]["top_logprobs"]
        }
        # The server adds up the denominator in fp32, which loses small terms of a large vocabulary.
        return math.log(math.fsum(map(math.exp, chances.values()))) - float(chances[target])

    def token_ids(self) -> list[list[int]]:
        """Return the ids of each text, without special tokens."""
        return [
            self._ask("/tokenize", content=text, add_special=False, parse_special=False)["tokens"]
            for text in self.request["texts"]
        ]

    def decoded(self) -> list[str]:
        """Return each text encoded and decoded again."""
        return [self._ask("/detokenize", tokens=ids)["content"] for ids in self.token_ids()]

    def prompt_ids(self) -> list[list[int]]:
        """Return the ids of each prompt, with the special tokens that the tokenizer adds."""
        return [
            self._ask("/tokenize", content=prompt, add_special=True)["tokens"]
            for prompt in self.request["prompts"]
        ]

    def greedy(self) -> list[dict[str, Any]]:
        """Return ids and text that continue each prompt, and whether an end-of-sequence id stopped them."""
        return [self._generate(prompt) for prompt in self.request["prompts"]]

    def chat(self) -> str:
        """Return the messages as the chat template writes them, with the beginning of a reply."""
        return str(self._ask("/apply-template", messages=self.request["messages"])["prompt"])

    def _generate(self, prompt: str) -> dict[str, Any]:
        length = self.request["max_tokens"]
        found = self._ask("/completion", prompt=prompt, n_predict=length, temperature=0, return_tokens=True)
        stopped = found["stop_type"] == "eos"
        ids = found["tokens"][:-1] if stopped else found["tokens"]  # the last one is the stop itself
        return {"ids": ids, "text": found["content"], "stopped": stopped}

    def _ask(self, path: str, **values: Any) -> Any:
        body = json.dumps(values | {"cache_prompt": False}).encode() if values else None
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.server.listening_address + path, body, headers)
        with urllib.request.urlopen(request, timeout=120) as reply:
            return json.load(reply)


def answer(ask: Callable[[], Any]) -> Any:
    """Return the answer, or the error that came instead of it."""
    try:
        return ask()
    except HTTPError as error:
        return {"error": f"HTTP {error.code}: {error.read().decode()[:300]}"}
    except Exception as error:  # whatever the client's code raises is the finding
        return {"error": f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"}


@contextmanager
def _gguf(target: Path) -> Iterator[Path]:
    """Yield a path for a GGUF file beside `target`, which is removed at the end."""
    path = target.with_suffix(".gguf")
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


def _use(client: Callable[[], Any]) -> dict[str, Any]:
    made = answer(client)
    if isinstance(made, dict):
        return {"load": made}
    return {name: answer(getattr(made, name)) for name in made.answers}


def main() -> None:
    """Load, ask, write; end at once, because the server's threads would be waited for."""
    kind, checkpoint, request_file, target, *options = sys.argv[1:]
    request = json.loads(Path(request_file).read_text())
    if kind == "transformers":
        found = _use(lambda: Transformers(checkpoint, request))
        found["version"] = version("transformers")
    else:
        with _gguf(Path(target)) as file:
            written = answer(lambda: convert_to_gguf(checkpoint, file, *options))
            found = {"convert": written, "in_double": True}
            if "error" not in written:
                found |= _use(lambda: LlamaCpp(str(file), request))
        found["version"] = version("xllamacpp")
    Path(target).write_text(json.dumps(found))
    os._exit(0)


if __name__ == "__main__":
    main()
