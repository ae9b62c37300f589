"""task=evaluate: the held-out loss of a checkpoint."""

import json
import math

from dsv3.checkpoint.directory import find_checkpoint
from dsv3.distributed.process_group import join_process_group, make_deterministic
from dsv3.errors import RunFailed
from dsv3.launch.job import Job
from dsv3.metrics.console import Console
from dsv3.tasks.generate import require_checkpoint
from dsv3.tasks.setup import load_model, prepare_data, stored_tokenizer
from dsv3.training.evaluation import evaluate


class Evaluate:
    """A table on stderr, and as the last line of stdout `{"loss": .., "perplexity": .., "tokens": ..}`."""

    def run(self, job: Job) -> float:
        """The loss; nothing is written anywhere but into the data cache."""
        config = job.config
        directory = find_checkpoint(require_checkpoint(job))
        make_deterministic(config.train.deterministic, config.train.seed)
        with join_process_group(config.launch.timeout) as ranks:
            tokenizer = stored_tokenizer(config, directory, job.overrides)
            data = prepare_data(config, ranks, tokenizer, evaluate=True)
            model, ranks = load_model(job, ranks)
            size, most = config.train.microbatch, config.train.evaluate_batches
            found = evaluate(model.forward_backward, data.held_out, size, ranks, most)
            if not math.isfinite(found.loss):
                raise RunFailed(f"the held-out loss of {directory} is {found.loss}")
            if ranks.is_main:
                result = {
                    "loss": found.loss,
                    "perplexity": math.exp(min(found.loss, 700.0)),
                    "tokens": found.tokens,
                }
                _show(str(directory), result)
            return found.loss


def _show(checkpoint: str, result: dict[str, float]) -> None:
    console = Console(stderr=True)
    rows = [("checkpoint", checkpoint)]
    rows += [
        (name, f"{value:,.4f}" if isinstance(value, float) else f"{value:,}")
        for name, value in result.items()
    ]
    console.table("Held-out", rows)
    console.close()
    print(json.dumps(result), flush=True)
