"""The rules of the project that tests must hold, by area, each with an edit that breaks it.

A new rule goes to the end of its area's list: results are stored in this order.
"""

from benchmarks.rules import (
    accidents,
    endurance,
    fp8,
    inputs,
    layouts,
    measured,
    model,
    planning,
    processes,
    runs,
    stored,
    training,
)
from benchmarks.rules.mutation import Mutation

MUTATIONS: list[Mutation] = [
    *inputs.FIRST,
    *model.RULES,
    *training.RULES,
    *fp8.RULES,
    *runs.RULES,
    *inputs.RULES,
    *processes.RULES,
    *stored.RULES,
    *accidents.RULES,
    *planning.RULES,
    *layouts.RULES,
    *measured.RULES,
    *endurance.RULES,
]
