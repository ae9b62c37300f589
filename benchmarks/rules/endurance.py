"""Rules for what newcomers and campaigns found: tags, stray steps, outputs in runs, stops, growth."""

from benchmarks.rules.mutation import Mutation

FILES = "tests/untrusted/test_untrusted_files.py"
STEPS = "tests/checkpoint/test_directory.py"
SHARDS = "tests/tokens/test_prepare_shards.py"

RULES = [
    Mutation(
        "files: YAML has the values of JSON alone",
        "dsv3.untrusted_files:_BoundedLoader.compose_node",
        "not is_alias and event.tag not in _TAGS[type(event)]",
        "False",
        f"{FILES} -k beyond_the_limits",
    ),
    Mutation(
        "files: a text that does not suit its tag is refused in a line",
        "dsv3.untrusted_files:_BoundedLoader.construct_object",
        "raise $refused from None",
        "raise",
        f"{FILES} -k a_tag_on_any_value",
    ),
    Mutation(
        "files: a date of YAML is a text",
        "dsv3.untrusted_files:_BoundedLoader",
        "tag != _DATE",
        "True",
        f"{FILES} -k a_date_is_a_text",
    ),
    Mutation(
        "steps: one without files is none",
        "dsv3.checkpoint.directory:complete_steps",
        "_holds_files(path)",
        "True",
        f"{STEPS} -k passed_over",
    ),
    Mutation(
        "steps: one that has lost files is damaged, and not passed over",
        "dsv3.checkpoint.directory:complete_steps",
        "_holds_files(path)",
        "(path / '.metadata').exists()",
        f"{STEPS} -k lost_files",
    ),
    Mutation(
        "runs: none begins in what another command has written",
        "dsv3.launch.run_dir:check_run_dir",
        "require_unused(directory)",
        "None",
        "tests/launch/test_run_dir.py -k another_command",
    ),
    Mutation(
        "prepare: shards are not mixed with the files of a run",
        "dsv3.tokens.prepare_shards:claimed_output",
        "foreign is not None",
        "False",
        f"{SHARDS} -k not_mixed",
    ),
    Mutation(
        "resume: a tokenizer that has changed is named",
        "dsv3.tasks.assembly:own_tokenizer",
        "_check_tokenizer(tokenizer, job.run_dir)",
        "None",
        "tests/tasks/test_assembly.py -k tokenizer_has_changed",
    ),
    Mutation(
        "signals: a stop of the group and its launcher's copy are one",
        "dsv3.distributed.signals:StopRequest.hear",
        "now - self._first >= self.one_stop",
        "True",
        "tests/distributed/test_signals.py -k for_one_stop",
    ),
    Mutation(
        "signals: without a launcher the second stop ends the process",
        "dsv3.distributed.signals:StopRequest.__init__",
        "ONE_STOP if 'RANK' in os.environ else 0.0",
        "ONE_STOP",
        "tests/distributed/test_signals.py -k second_signal",
    ),
    Mutation(
        "restarts: what an attempt leaves in circles is collected",
        "dsv3.launch.restarts:_attempts",
        "gc.collect()",
        "None",
        "tests/launch/test_restarts.py -k restarts_count",
    ),
    Mutation(
        "runs: none keeps a row per step",
        "dsv3.training.plan_check:PlanCheck.__init__",
        "deque(maxlen=RECENT)",
        "deque()",
        "tests/tasks/test_flat_run.py",
    ),
]
