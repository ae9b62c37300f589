"""task=generate: text that continues a prompt."""

from pathlib import Path

from dsv3.checkpoint.directory import find_checkpoint
from dsv3.config.task import SamplingConfig
from dsv3.data.tokenizer import Tokenizer
from dsv3.distributed.process_group import join_process_group
from dsv3.errors import RunFailed, UserError
from dsv3.launch.job import Job
from dsv3.parallel.parallel_model import ParallelModel
from dsv3.tasks.setup import load_model, stored_tokenizer


class Generate:
    """Prints the prompt and what the model makes of it; stdout holds that text and nothing else."""

    def __init__(self, prompt: str, max_tokens: int, temperature: float, top_p: float) -> None:
        self.prompt = prompt
        self.sampling = SamplingConfig(max_tokens, temperature, top_p)

    def run(self, job: Job) -> None:
        """Load, sample with train.seed, print."""
        with join_process_group(job.config.launch.timeout) as ranks:
            directory = find_checkpoint(require_checkpoint(job))
            tokenizer = _tokenizer(job, directory)
            model, ranks = load_model(job, ranks)
            text = sample_text(model, tokenizer, self.sampling, self.prompt, job.config.train.seed)
            if ranks.is_main:
                print(self.prompt + text)


def sample_text(
    model: ParallelModel, tokenizer: Tokenizer, sampling: SamplingConfig, prompt: str, seed: int
) -> str:
    """Text that continues `prompt`, as a document's beginning; all ranks call it together."""
    begin = [] if tokenizer.bos is None else [tokenizer.bos]
    ids = begin + tokenizer.encode(prompt)
    if not ids:
        raise UserError(
            "task.prompt is empty and the tokenizer has no begin-of-sentence token: give a prompt"
        )
    how = (sampling.max_tokens, sampling.temperature, sampling.top_p)
    try:
        return tokenizer.decode(model.generate([ids], *how, seed, tokenizer.eos)[0])
    except FloatingPointError as error:
        raise RunFailed(f"no text can be sampled: {error}") from None


def require_checkpoint(job: Job) -> str:
    """checkpoint.load, which this task cannot do without."""
    if job.config.checkpoint.load is None:
        raise UserError(
            "checkpoint.load is missing: give a run or checkpoint directory, checkpoint.load=PATH"
        )
    return job.config.checkpoint.load


def _tokenizer(job: Job, directory: Path) -> Tokenizer:
    tokenizer = stored_tokenizer(job.config, directory, job.overrides)
    if tokenizer is None:
        path = getattr(job.config.tokenizer, "path", None)
        if path is None:
            raise UserError(
                f"{directory} carries no tokenizer: give one, tokenizer=local tokenizer.path=PATH"
            )
        tokenizer = Tokenizer.from_file(path)
    if tokenizer.size > job.config.model.vocab_size:
        vocabulary = job.config.model.vocab_size
        raise UserError(f"the tokenizer has {tokenizer.size} ids, the model's vocabulary only {vocabulary}")
    return tokenizer
