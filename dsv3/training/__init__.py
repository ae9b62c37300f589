"""Training: the optimizer step, the loop and its callbacks, losses, schedules, optimizers, evaluation."""
