"""task=generate: sample text that continues a prompt; model/generation.py has the sampling itself."""

import sys
from pathlib import Path

from dsv3.config.task import SamplingConfig
from dsv3.errors import RunFailed, UserError
from dsv3.launch.job import Job
from dsv3.model.generation import TimeLimit
from dsv3.parallel.parallel_model import ParallelModel
from dsv3.planning.checks import require_room
from dsv3.tasks.setup import join_ranks, load_model, load_own_tokenizer, read_tokenizer, require_checkpoint
from dsv3.tokens.tokenizer import Tokenizer


class GenerateTask:
    """Prints the prompt and the text that the model continues it with; stdout holds nothing else."""

    def __init__(self, prompt: str, max_tokens: int, temperature: float, top_p: float) -> None:
        self.prompt = prompt
        self.sampling = SamplingConfig(max_tokens, temperature, top_p)

    def run(self, job: Job) -> None:
        """Load the checkpoint, sample with train.seed and print."""
        with join_ranks(job) as ranks:
            tokenizer = _load_tokenizer(job, require_checkpoint(job))
            prompt = len(_prompt_ids(tokenizer, self.prompt))
            require_room(job.plan, prompt + self.sampling.max_tokens, job.host_ranks)
            model, ranks = load_model(job, ranks)
            text = sample_text(model, tokenizer, self.sampling, self.prompt, job.config.train.seed)
            if ranks.is_main:
                for note in tokenizer.notes():
                    print(note, file=sys.stderr)
                print(self.prompt + text)


def sample_text(
    model: ParallelModel,
    tokenizer: Tokenizer,
    sampling: SamplingConfig,
    prompt: str,
    seed: int,
    limit: TimeLimit | None = None,
) -> str:
    """Return sampled text that continues `prompt`, which begins a document; all ranks call it together.

    UserError for an empty prompt that the tokenizer cannot begin; RunFailed where logits are nonfinite.
    """
    ids = _prompt_ids(tokenizer, prompt)
    try:
        sampled = model.generate(
            [ids], sampling.max_tokens, sampling.temperature, sampling.top_p, seed, tokenizer.stop, limit
        )
    except FloatingPointError as error:
        raise RunFailed(f"no text can be sampled: {error}") from None
    return tokenizer.decode(sampled[0])


def _prompt_ids(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Return the ids that a sample begins with; UserError where there are none."""
    ids = tokenizer.encode(prompt)
    if tokenizer.bos is not None and (tokenizer.add_bos or not ids):
        ids = [tokenizer.bos, *ids]
    if not ids:
        raise UserError(
            "task.prompt is empty and the tokenizer has no begin-of-sentence token: give a prompt"
        )
    return ids


def _load_tokenizer(job: Job, checkpoint: Path) -> Tokenizer:
    """Return the checkpoint's tokenizer, or the one of tokenizer.path.

    UserError where there is none, or it has more ids than the model's vocabulary.
    """
    tokenizer = load_own_tokenizer(job.config, checkpoint)
    if tokenizer is None:
        path = getattr(job.config.tokenizer, "path", None)
        if path is None:
            raise UserError(
                f"{checkpoint} carries no tokenizer: give one, tokenizer=local tokenizer.path=PATH"
            )
        tokenizer = read_tokenizer(path, checkpoint)
    if tokenizer.size > job.config.model.vocab_size:
        vocabulary = job.config.model.vocab_size
        raise UserError(f"the tokenizer has {tokenizer.size} ids, the model's vocabulary only {vocabulary}")
    return tokenizer
