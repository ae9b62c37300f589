"""task=evaluate: measure the held-out loss and perplexity of a checkpoint."""

import json
import math

from dsv3.distributed.process_group import join_process_group, make_deterministic
from dsv3.errors import RunFailed
from dsv3.launch.job import Job
from dsv3.metrics.console import Console
from dsv3.tasks.setup import load_model, prepare_data, require_checkpoint, stored_tokenizer
from dsv3.training.evaluation import evaluate


class EvaluateTask:
    """Prints a table to stderr and `{"loss": .., "perplexity": .., "tokens": ..}` as stdout's last line."""

    def run(self, job: Job) -> float:
        """Return the held-out loss in nats, a sweep's objective; write nothing but the data cache.

        RunFailed where the loss is not finite.
        """
        config = job.config
        checkpoint = require_checkpoint(job)
        make_deterministic(config.train.deterministic, config.train.seed)
        with join_process_group(config.launch.timeout) as ranks:
            tokenizer = stored_tokenizer(config, checkpoint, job.overrides)
            data = prepare_data(config, ranks, tokenizer, evaluate=True)
            model, ranks = load_model(job, ranks)
            loss, tokens = evaluate(
                model.forward_backward,
                data.held_out,
                config.train.microbatch,
                ranks,
                config.train.evaluate_batches,
            )
            if not math.isfinite(loss):
                raise RunFailed(f"the held-out loss of {checkpoint} is {loss}")
            if ranks.is_main:
                perplexity = math.exp(min(loss, 700.0))  # exp overflows a float above 709
                console = Console(stderr=True)
                rows = [
                    ("checkpoint", str(checkpoint)),
                    ("loss", f"{loss:,.4f}"),
                    ("perplexity", f"{perplexity:,.4f}"),
                    ("tokens", f"{tokens:,}"),
                ]
                console.table("Held-out", rows)
                console.close()
                print(json.dumps({"loss": loss, "perplexity": perplexity, "tokens": tokens}), flush=True)
            return loss
