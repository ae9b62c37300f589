"""Rules for accidents: skipped steps, rewinds, slow ranks, damaged files, what restarts hold."""

from benchmarks.rules.mutation import Mutation

RESTARTS = "tests/launch/test_restarts.py"
RUNS = "tests/training/test_accident_runs.py"
GUARD = "tests/training/test_step_guard.py"
SKIPPED = "tests/parallel/test_accidents.py"
REPLAY = "tests/tasks/test_replay.py"
STRAGGLERS = "tests/training/test_stragglers.py"
WATCH = "tests/training/test_accidents.py"
REWIND = "tests/training/test_rewind.py"
MANIFEST = "tests/checkpoint/test_manifest.py"
CACHE = "tests/data/test_cache_damage.py"

RULES = [
    Mutation(
        "accidents: a shorter window keeps the newest norms",
        "dsv3.training.step_guard:StepGuard.load",
        "statistics.norms[-self.window:]",
        "statistics.norms[:self.window]",
        GUARD,
    ),
    Mutation(
        "accidents: without train.accidents.skip nothing is skipped",
        "dsv3.training.step_guard:StepGuard.judge",
        "~good & self.config.skip",
        "~good",
        GUARD,
    ),
    Mutation(
        "accidents: the host asks where the optimizer cannot skip",
        "dsv3.training.step_guard:StepGuard.__init__",
        "device.type == 'cpu' or elsewhere or not takes_found_inf(optimizer)",
        "device.type == 'cpu' or elsewhere",
        GUARD,
    ),
    Mutation(
        "accidents: the loss of a skipped step counts",
        "dsv3.training.accidents:AccidentWatch.__call__",
        "row.loss is not None and math.isfinite(row.loss)",
        "row.loss is not None and math.isfinite(row.loss) and kind == GOOD",
        WATCH,
    ),
    Mutation(
        "accidents: a held-out loss that is not finite is an alarm",
        "dsv3.training.accidents:AccidentWatch._watch_evaluation",
        "self.statistics.held_out_lost = lost",
        "pass",
        WATCH,
    ),
    Mutation(
        "accidents: weights that are not finite end the run",
        "dsv3.training.accidents:AccidentWatch._note_skipped",
        "self._nonfinite_weights() if kind == NONFINITE else []",
        "[]",
        WATCH,
    ),
    Mutation(
        "accidents: a loss above that of guessing is above its past",
        "dsv3.training.accidents:AccidentWatch._watch_loss",
        "self._guessing if statistics.lowest is None else statistics.lowest",
        "math.inf if statistics.lowest is None else statistics.lowest",
        WATCH,
    ),
    Mutation(
        "accidents: an alarm takes so many steps in a row",
        "dsv3.training.accidents:AccidentWatch._watch_loss",
        "step - statistics.above_since + 1 >= config.alarm_steps",
        "True",
        WATCH,
    ),
    Mutation(
        "accidents: a run that learnt nothing says so",
        "dsv3.training.accidents:AccidentWatch.finish",
        "steps >= _LEARNT * window and math.fsum(losses) / window > self._guessing - _BETTER",
        "False",
        WATCH,
    ),
    Mutation(
        "accidents: a run whose steps were all skipped has failed",
        "dsv3.training.accidents:AccidentWatch.finish",
        "0 < steps <= self.statistics.skipped",
        "False",
        f"{RUNS} -k all_skipped",
    ),
    Mutation(
        "accidents: without skip the held-out loss is looked at too",
        "dsv3.training.accidents:AccidentWatch._require_finite",
        "(row.loss, row.grad_norm, row.evaluation_loss)",
        "(row.loss, row.grad_norm)",
        WATCH,
    ),
    Mutation(
        "accidents: a run that has used its rewinds ends",
        "dsv3.training.accidents:AccidentWatch._goes_back",
        "self.statistics.rewinds >= self.config.max_rewinds",
        "False",
        f"{RUNS} -k used_its_rewinds",
    ),
    Mutation(
        "rewind: it goes to before the rise",
        "dsv3.training.rewind:Rewinder.rewind",
        "self.watch.statistics.above_since or run.step",
        "run.step",
        REWIND,
    ),
    Mutation(
        "rewind: callbacks are told",
        "dsv3.training.rewind:Rewinder.rewind",
        "callback.on_rewind(run)",
        "None",
        REWIND,
    ),
    Mutation(
        "rewind: the statistics are those of the checkpoint",
        "dsv3.training.rewind:Rewinder.rewind",
        "self.watch.go_back(progress)",
        "None",
        REWIND,
    ),
    Mutation(
        "rewind: the norms are those of the checkpoint",
        "dsv3.training.accidents:AccidentWatch.go_back",
        "self.guard.load(self.statistics)",
        "None",
        REWIND,
    ),
    Mutation(
        "accidents: experts are named by their number in the model",
        "dsv3.training.gradient_places:GradientPlaces.__init__",
        "local_shape_and_offset(whole)[1][0] if isinstance(whole, DTensor) else 0",
        "0",
        f"{SKIPPED} -k hsdp",
    ),
    Mutation(
        "accidents: the largest gradient is named first",
        "dsv3.training.gradient_places:ranked",
        "-place.norm",
        "place.norm",
        f"{REPLAY} -k spike_repeats",
    ),
    Mutation(
        "accidents: of bad gradients the one nearest to the loss is named first",
        "dsv3.training.gradient_places:ranked",
        "sorted(known.values(), key=$key, reverse=True)",
        "sorted(known.values(), key=$key)",
        "tests/training/test_gradient_places.py",
    ),
    Mutation(
        "stragglers: a rank is compared with its own stage",
        "dsv3.training.stragglers:find_straggler",
        "times[first:first + per_stage] if per_stage > 1 else times",
        "times",
        STRAGGLERS,
    ),
    Mutation(
        "stragglers: a slow device is found by its probe",
        "dsv3.training.stragglers:find_straggler",
        "own.probe > 0",
        "False",
        STRAGGLERS,
    ),
    Mutation(
        "stragglers: the data is the cause where it is most of the wait",
        "dsv3.training.stragglers:find_straggler",
        "for_data > late / 2 and late > 0",
        "for_data > 0",
        STRAGGLERS,
    ),
    Mutation(
        "stragglers: they are told ever more rarely",
        "dsv3.training.stragglers:StragglerWatch._judge",
        "self._windows < WINDOWS or self._windows & (self._windows - 1)",
        "self._windows < WINDOWS",
        STRAGGLERS,
    ),
    Mutation(
        "stragglers: reductions between steps do not count",
        "dsv3.distributed.step_waits:StepWaits._mark",
        "self._on_gpu and self._thread is not None",
        "self._on_gpu",
        STRAGGLERS,
    ),
    Mutation(
        "digests: a list knows its own",
        "dsv3.tokens.file_digests:decode_entries",
        "content['digest'] != _digest_of(files)",
        "False",
        MANIFEST,
    ),
    Mutation(
        "digests: a list points to nothing outside",
        "dsv3.tokens.file_digests:_name",
        "not path.parts or path.is_absolute() or '..' in path.parts",
        "False",
        MANIFEST,
    ),
    Mutation(
        "digests: the kind is the one that is compared",
        "dsv3.tokens.file_digests:decode_entries",
        "content['algorithm'] != _ALGORITHM",
        "False",
        MANIFEST,
    ),
    Mutation(
        "cache: an entry is compared at start",
        "dsv3.tokens.cache_seal:check_seal",
        "if wrong: ...",
        "if False: ...",
        f"{CACHE} -k any_file_of_any_entry",
    ),
    Mutation(
        "cache: the rest of an entry is compared while the run goes on",
        "dsv3.tokens.cache_seal:check_seal",
        "BACKGROUND.add(left)",
        "None",
        f"{CACHE} -k too_large",
    ),
    Mutation(
        "cache: a marked entry is made anew",
        "dsv3.tokens.cache_seal:_read_seal",
        "(directory / DAMAGE_FILE).exists()",
        "False",
        f"{CACHE} -k too_large",
    ),
    Mutation(
        "cache: what is compared at start is bounded",
        "dsv3.tokens.background_check:check_at_start",
        "read > nbytes",
        "False",
        f"{CACHE} -k too_large",
    ),
    Mutation(
        "cache: damage that the thread finds marks the entry",
        "dsv3.tokens.background_check:BackgroundCheck._run",
        "file.on_damage is not None",
        "False",
        f"{CACHE} -k too_large",
    ),
    Mutation(
        "restarts: nothing that an attempt held is held in the next",
        "dsv3.launch.restarts:_attempts",
        "error.__traceback__ = error.__context__ = None",
        "pass",
        f"{RESTARTS} -k restarts_count",
    ),
]
