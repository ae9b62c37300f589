"""The user's mistakes on the command line: exit code 2, at most two lines, and the words that fix it."""

from pathlib import Path

import pytest
from hydra.errors import ConfigCompositionException

from dsv3.cli.error_messages import explain_error
from tests.harness.commands import PlannedCommand
from tests.harness.runs import StoredRun

pytestmark = pytest.mark.slow

MISTAKES: dict[str, list[str]] = {
    # Keys and choices that are not there.
    "modle=debug": ["unknown key 'modle'", "'model'"],
    "model=debgu": ["model=debgu", "'debug'", "kimi_k2"],
    "model=16": ["model=16 ", "'16b'"],
    "model=null": ["model=null", "671b"],
    "trian.steps=3": ["'trian'", "'train'"],
    "model.dimm=64": ["'model.dimm'", "Did you mean 'model.dim'?"],
    "+model.dimm=64": ["'model.dimm'", "Did you mean 'model.dim'?"],
    "train.step=10": ["'train.step'", "Did you mean 'train.steps'?"],
    "++model.moe.topk=2": ["'model.moe.topk'", "Did you mean 'model.moe.top_k'?"],
    "tokenizer=local tokenizer.vocab_size=300": ["'tokenizer.vocab_size' here", "tokenizer=trained has it"],
    "optimizer=sgd optimizer.betas=[0.9,0.95]": ["'optimizer.betas' here", "optimizer=adamw or", "have it"],
    "optimizer=sgd +optimizer.betas=[0.9,0.95]": ["'optimizer.betas' here", "optimizer=adamw or", "have it"],
    "+foo=1": ["unknown key 'foo'", "train"],
    "++foo.bar=1": ["unknown key 'foo'"],
    "+model=16b": ["+model=16b", "without the +"],
    "hydra/launcher=jobib -m": ["hydra/launcher=jobib", "'joblib'"],
    "hydra/sweeper=optun -m": ["hydra/sweeper=optun", "'optuna'"],
    "hydra.foo=1": ["hydra.foo", "sweep"],
    "experiments=nope": ["experiments=nope", "learning_rate"],
    "parallel.fsdp.foo=1": ["parallel.fsdp.foo=1", "parallel.fsdp is null here", "parallel=fsdp or"],
    "precision.fp8.gather=true": ["precision.fp8.gather=true", "precision.fp8 is null", "precision=fp8 has"],
    "precision.fp8={gather:true}": ["precision.fp8={gather:true}", "null here; precision=fp8 has it"],
    "precision.fp8={}": ["precision.fp8={}", "sets nothing", "precision.fp8.KEY=VALUE"],
    "parallel=fsdp launch.nproc=2 parallel.fsdp.foo=1": ["unknown key 'parallel.fsdp.foo'"],
    "~foo": ["~foo", "'foo' to remove"],
    "model@train=debug": ["model@train=debug", "without the @train"],
    # Flags of Hydra's, of which some would do nothing or replace the root.
    "--foo": ["--foo", "--help"],
    "--cfg": ["--cfg", "expected one argument"],
    "--cfg foo": ["'foo'", "'job'"],
    "--info=foo": ["--info", "'foo'", "'searchpath'"],
    "--config-dir": ["--config-dir", "expected one argument"],
    "--config-dir=/nope": ["--config-dir=/nope", "no directory"],
    "--config-name=foo": ["--config-name", "experiments=NAME"],
    "--config-name=convert": ["--config-name", "experiments=NAME"],
    "--config-path=/x": ["--config-path", "--config-dir=DIR"],
    "--experimental-rerun=/x": ["--experimental-rerun", "resume=RUN_DIR"],
    "--package train": ["--package", "--cfg job --package train"],
    "--resolve": ["--resolve", "--cfg job --resolve"],
    "-m --cfg job": ["-m and --cfg", "give one"],
    "-m --info": ["-m and --info", "give one"],
    "-mr": ["-m or --multirun"],
    "--multi train.steps=1,2": ["--multi"],
    "-sc": ["-sc", "install=SHELL", "bash, fish, zsh"],
    "-sc query=bash": ["-sc", "install=SHELL"],
    "-m train.steps=interval(1,3)": ["interval(...)", "hydra/sweeper=optuna"],
    # Values of the wrong type.
    "train.steps=abc": ["train.steps=abc", "whole number"],
    "train.steps=1.5": ["train.steps=1.5", "whole number"],
    "train.steps=1.5e0": ["train.steps=1.5e0", "whole number"],
    "train.steps=1e99": ["train.steps=1e99", "whole number"],
    "train.steps=[1,2]": ["train.steps=[1,2]", "whole number"],
    "train.steps=null": ["train.steps=null", "must have a value"],
    "model.norm_eps=small": ["model.norm_eps=small", "must be a number"],
    "train=3": ["train=3", "train.KEY=VALUE"],
    "train=[1]": ["train=[1] is not possible", "train={NAME:VALUE}"],
    "data=mixture data.sources=[a,b]": ["data.sources=[a,b] is not", "data.sources={NAME:VALUE}"],
    "data=mixture data.sources={1:{path:x,weight:1}}": ["data.sources.1: ", "begin each with a letter"],
    "data.shuffle=[1]": ["data.shuffle=[1]", "must be true or false"],
    "data.packing=[1]": ["data.packing=[1]", "must be one value"],
    "optimizer.betas={a:1}": ["optimizer.betas={a:1}", "must be a list"],
    "task=prepare task.input=": ["task.input= is", "task.input=A, or a list, task.input=[A,B]"],
    "optimizer.betas=0.9": ["optimizer.betas=0.9", "list"],
    "model.rope.scaling=yran": ["model.rope.scaling=yran", "[none, yarn]", "Did you mean 'yarn'"],
    "precision.compute=bf61": ["precision.compute=bf61", "'bf16'"],
    # What Hydra cannot read.
    "train.steps=[1,2": ["'train.steps=[1,2'", "Quote"],
    f"train.steps={'[' * 3000}": ["train.steps=", " ... ", "Quote"],
    "train.steps='3": ["train.steps='3", "quote"],
    "=3": ["=3", "key"],
    "foo": ["'foo'", "KEY=VALUE"],
    "train.steps=1,2": ["train.steps=1,2", "-m sweeps"],
    "model.dim=${foo}": ["model.dim=${foo}", "'foo' not found"],
    "model.dim=${train.sed}": ["'train.sed' not found", "whole path", "Did you mean 'train.seed'?"],
    "parallel=[none]": ["parallel=[none]", "one choice and no list: parallel=none"],
    "optimizer.lr_scale=2": ["optimizer.lr_scale=2", "a value per name"],
    "experiments=learning_rate.yaml": ["experiments=learning_rate.yaml", "without its suffix"],
    "optimizer._target_=torch.optim.Nadam": ["Did you mean 'torch.optim.NAdam'?"],
    "-m hydra/launcher=submitit_slurm train.steps=1,2": ["hydra/launcher=submitit_slurm", "srun"],
    "-m hydra/launcher=joblib hydra.launcher.n_jobs=0 train.steps=1,2": ["hydra/launcher=joblib", "n_jobs"],
    "~model": ["model", "cannot be removed"],
    "~train": ["train", "cannot be removed"],
    "~model.dim": ["~model.dim", "model.dim=..."],
    # Values that cannot be right.
    "model.moe.top_k=100": ["model.moe.top_k=100", "num_experts=16"],
    "model.moe.num_groups=3": ["model.moe.num_groups=3", "1, 2, 4, 8, 16"],
    "model.moe.top_k_groups=9": ["model.moe.top_k_groups=9", "num_groups=4"],
    "model.attention.qk_rope_head_dim=3": ["model.attention.qk_rope_head_dim=3", "even"],
    "model.num_dense_layers=9": ["model.num_dense_layers=9", "num_layers=4"],
    "model.vocab_size=0": ["model.vocab_size=0", "above 0"],
    "optimizer.lr=-1": ["optimizer.lr=-1", "0 or more"],
    "optimizer.lr=inf": ["optimizer.lr=inf", "finite"],
    "model.norm_eps=nan": ["model.norm_eps=nan", "finite"],
    "optimizer.betas=[nan,0.9]": ["optimizer.betas=[nan, 0.9]", "finite"],
    "train.seed=9223372036854775808": ["train.seed=9223372036854775808", "at most"],
    "launch.timeout=99999999": ["launch.timeout=99999999", "a week"],
    "optimizer.betas=[0.9,2]": ["optimizer.betas=[0.9, 2.0]", "[0.9,0.95]"],
    "precision.moments=bf16 optimizer.betas=[0.9,0.999]": ["optimizer.betas=[0.9, 0.999]", "0.99609375"],
    "precision.moments=bf16 optimizer._target_=torch.optim.Adam": ["precision.moments=bf16", "only AdamW"],
    "schedule=steps schedule.at=[0.9,0.8]": ["schedule.at=[0.9, 0.8]", "ascending"],
    "schedule.final=2": ["schedule.final=2.0", "between 0 and 1"],
    "train.steps=0": ["train.steps=0", "above 0"],
    "train.checkpoint_every=-1": ["train.checkpoint_every=-1", "0 (never)"],
    "train.mtp_loss.weight=-1": ["train.mtp_loss.weight=-1", "0 or more"],
    "train.balance.bias_until=2": ["train.balance.bias_until=2", "between 0 and 1"],
    "checkpoint.keep_last=0": ["checkpoint.keep_last=0", "at least 1"],
    "data.held_out=0.5": ["data.held_out=0.5", "below 0.5"],
    "tokenizer.vocab_size=100": ["tokenizer.vocab_size=100", "at least 264"],
    "task=generate task.top_p=0": ["task.top_p=0", "at most 1"],
    "logger=wandb logger.project=a/b": ["logger.project=a/b", "without any of"],
    "profile=on profile.steps=0": ["profile.steps=0", "above 0"],
    # Files that are missing or in the way.
    "data=text": ["data.path=null", "data.path=FILE_OR_FOLDER"],
    "data=tokens data.path=/nope.npy": ["data.path=/nope.npy", "does not exist"],
    "task=plan data=tokens data.path=/nope.npy": ["data.path=/nope.npy", "does not exist"],
    "tokenizer=local": ["tokenizer.path=null", "tokenizer.path=PATH"],
    "checkpoint.load=/nope": ["checkpoint.load=/nope", "does not exist"],
    "checkpoint.load=hf:/some/model": ["checkpoint.load=hf:/some/model", "does not exist"],
    "checkpoint.load=.": ["checkpoint.load=.", "neither a run nor a checkpoint"],
    "data=text data.path=${oc.env:DSV3_NOWHERE}/x": ["data.path=", "variable DSV3_NOWHERE is not set"],
    "run.dir=/etc/passwd": ["run.dir=/etc/passwd", "is a file"],
    "run.dir=/etc/passwd/x": ["run.dir=/etc/passwd/x", "/etc/passwd is no directory"],
    "-m run.dir=/etc/passwd/x train.steps=1,2": ["run.dir=/etc/passwd/x cannot be made"],
    "task=compare": ["task.runs=null", "task.runs=multirun/ID"],
    "task=compare task.runs=x task.output=a.pdf": ["task.output=a.pdf", ".png"],
    "resume=/nope": ["resume=/nope does not exist", "directory of a run"],
    "resume=/etc/passwd": ["resume=/etc/passwd is a file"],
    "resume=/etc": ["resume=/etc holds no run", "config.yaml"],
    "resume=. -m": ["resume=", "without -m"],
    "resume=. resume=..": ["resume=", "once"],
    "resume=/x/y run.dir=/b": ["resume=/x/y", "leave run.dir=/b out"],
    "resume=/x/y +run.dir=/b": ["resume=/x/y", "leave run.dir=/b out"],
    "resume=/x/y task=evaluate": ["task=evaluate checkpoint.load=/x/y"],
    "resume=/x/y task=generate": ["task=generate checkpoint.load=/x/y"],
    "-m run.dir=/a,/b": ["run.dir='/a','/b'", "one directory"],
    "run.resume=true": ["run.resume", "resume=RUN_DIR"],
    # Launching.
    "launch.nnodes=2 launch.nproc=1 parallel=fsdp": ["launch.nnodes=2", "launch.rendezvous=HOST:PORT"],
    "launch.node_rank=1": ["launch.node_rank=1", "0 to 0"],
    "launch.rendezvous=node0": ["launch.rendezvous=node0", "HOST:PORT"],
    "launch=slrum": ["launch=slrum", "'slurm'"],
    # Layouts.
    "launch.nproc=2 launch.world_size=3": ["launch.world_size=3", "make 2"],
    "launch.world_size=2": ["launch.world_size=2", "launch.nproc"],
    "launch.nproc=2": ["world has 2", "dp_shard=2 works"],
    "parallel=fsdp launch.nproc=2 parallel.degrees.tp=3": ["tp=3", "world of 2", "no world near it works"],
    "parallel=fsdp launch.nproc=8 parallel.degrees.tp=8": ["tp=8", "heads=4", "nearest that work: 4"],
    "parallel=fsdp launch.nproc=2 parallel.degrees.ep=3": ["ep=3", "nearest that work: 2"],
    "parallel=fsdp launch.nproc=8 parallel.degrees.pp=8": ["pp=8", "num_layers=4"],
    "parallel.degrees.tp=2": ["tp=2 needs parallel.tensor", "take parallel=fsdp"],
    "parallel=pp parallel.pipeline=null": [
        "pp=2 needs parallel.pipeline",
        "leave parallel.pipeline=null out",
    ],
    "parallel=tp_ep parallel.degrees.tp=two": ["parallel.degrees.tp=two", "auto"],
    "parallel=pp parallel.pipeline.split=[4]": ["parallel.pipeline.split=[4]", "1 to 3"],
    "parallel=pp parallel.pipeline.stages_per_rank=2": ["stages_per_rank=2", "1F1B"],
    "parallel=pp train.global_batch_size=1": ["1 microbatches", "global_batch_size=2"],
    "parallel=pp parallel.schedule=DualPipeV parallel.reshard_after_forward=true": ["DualPipeV", "1F1B"],
    "parallel=cp train.sequence_length=254": ["train.sequence_length=254", "252, 256"],
    "layouts=debug-fsdp": ["layouts", "parallel.degrees"],
    "parallel.degrees.dp_shard=2": ["2 data-parallel ranks", "parallel=fsdp"],
    "parallel.degrees.dp_shard=0": ["parallel.degrees.dp_shard=0", "above 0"],
    "hardware=h100 model=671b": ["do not fit", "GiB"],
    "task=generate hardware=h100 model=671b": ["682,636,472,320 parameters", "2,543.02 GiB", "74.51"],
    "task=evaluate hardware=h100 model=236b": ["weights alone", "parallel=fsdp"],
}


REMEDIES: dict[str, tuple[str, str]] = {
    # What the message of a mistake names, and the command that it leads to.
    "modle=debug": ("'model'", "model=debug"),
    "model=debgu": ("'debug'", "model=debug"),
    "model=16": ("'16b'", "task=plan model=16b"),
    "trian.steps=3": ("'train'", "train.steps=3"),
    "++model.moe.topk=2": ("'model.moe.top_k'", "++model.moe.top_k=2"),
    "train.step=10": ("'train.steps'", "train.steps=10"),
    "optimizer=sgd optimizer.betas=[0.9,0.95]": (
        "optimizer=adamw",
        "optimizer=adamw optimizer.betas=[0.8,0.9]",
    ),
    "parallel=[none]": ("parallel=none", "parallel=none"),
    "optimizer.lr_scale=2": ("optimizer.lr_scale={NAME:VALUE}", "optimizer.lr_scale={mtp.*:2}"),
    "experiments=learning_rate.yaml": ("experiments=learning_rate", "task=plan experiments=learning_rate"),
    "optimizer._target_=torch.optim.Nadam": ("'torch.optim.NAdam'", "optimizer._target_=torch.optim.NAdam"),
    "model.dim=${train.sed}": ("${train.seed}", "task=plan train.stop_after=${train.steps}"),
    "+model=16b": ("without the +: model=16b", "task=plan model=16b"),
    "model@train=debug": ("without the @train: model=debug", "model=debug"),
    "experiments=nope": ("learning_rate", "experiments=learning_rate task=plan"),
    "parallel.fsdp.foo=1": ("parallel=fsdp", "parallel=fsdp launch.nproc=2 parallel.fsdp.prefetch=false"),
    "precision.fp8={gather:true}": ("precision=fp8 has it", "precision=fp8 precision.fp8={gather:true}"),
    "precision.fp8={}": ("precision.fp8.KEY=VALUE", "precision=fp8 precision.fp8.gather=true"),
    "--foo": ("--help", "--help"),
    "--cfg foo": ("'job'", "--cfg job"),
    "--info=foo": ("'searchpath'", "--info=searchpath"),
    "--config-name=foo": ("experiments=NAME", "experiments=learning_rate task=plan"),
    "--config-path=/x": ("--config-dir=DIR", "--config-dir=."),
    "--package train": ("--cfg job --package train", "--cfg job --package train"),
    "--resolve": ("--cfg job --resolve", "--cfg job --resolve"),
    "-sc": ("-sc install=bash", "-sc install=bash"),
    "-sc query=bash": ("-sc install=bash", "-sc install=bash"),
    "train=3": ("train.KEY=VALUE", "train.steps=3"),
    "optimizer.betas=0.9": ("[A,B]", "optimizer.betas=[0.9,0.95]"),
    "model.rope.scaling=yran": ("'yarn'", "model.rope.scaling=yarn"),
    "precision.compute=bf61": ("'bf16'", "precision.compute=bf16"),
    "train.steps=1,2": ("-m sweeps", "-m task=plan train.steps=1,2"),
    "~model": ("model=CHOICE", "model=debug"),
    "~model.dim": ("model.dim=...", "model.dim=64"),
    "model.moe.num_groups=3": ("1, 2, 4, 8, 16", "model.moe.num_groups=4"),
    "optimizer.betas=[0.9,2]": ("[0.9,0.95]", "optimizer.betas=[0.9,0.95]"),
    "precision.moments=bf16 optimizer.betas=[0.9,0.999]": (
        "at most 0.99609375",
        "precision.moments=bf16 optimizer.betas=[0.9,0.99609375]",
    ),
    "schedule=steps schedule.at=[0.9,0.8]": ("[0.8,0.9]", "schedule=steps schedule.at=[0.8,0.9]"),
    "data=text": ("data.path=FILE_OR_FOLDER", "data=text data.path=."),
    "task=compare": ("task.runs=multirun/ID", "task=compare task.runs=multirun/ID"),
    "task=compare task.runs=x task.output=a.pdf": (".png", "task=compare task.runs=x task.output=a.png"),
    "-m run.dir=/a,/b": ("\"run.dir='a,b'\"", "-m run.dir='a,b' task=plan train.steps=1,2"),
    "launch.nnodes=2 launch.nproc=1 parallel=fsdp": (
        "launch.rendezvous=HOST:PORT",
        "launch.nnodes=2 launch.nproc=1 parallel=fsdp launch.rendezvous=[::1]:29500 launch.node_rank=1",
    ),
    "launch.rendezvous=node0": ("HOST:PORT", "launch.rendezvous=node0:29500"),
    "launch=slrum": ("'slurm'", "launch=slurm"),
    "launch.world_size=2": ("task=plan", "launch.world_size=2 task=plan parallel=fsdp"),
    "launch.nproc=2": ("dp_shard=2 works", "launch.nproc=2 parallel.degrees.dp_shard=2 parallel=fsdp"),
    "parallel.degrees.dp_shard=2": ("parallel=fsdp", "parallel.degrees.dp_shard=2 parallel=fsdp"),
    "parallel=fsdp launch.nproc=8 parallel.degrees.tp=8": (
        "nearest that work: 4",
        "parallel=fsdp launch.nproc=8 parallel.degrees.tp=4",
    ),
    "parallel=fsdp launch.nproc=2 parallel.degrees.ep=3": (
        "nearest that work: 2",
        "parallel=fsdp launch.nproc=2 parallel.degrees.ep=2",
    ),
    "parallel=fsdp launch.nproc=8 parallel.degrees.pp=8": (
        "at most 4",
        "parallel=fsdp launch.nproc=8 parallel.degrees.pp=4",
    ),
    "parallel.degrees.tp=2": ("parallel=fsdp", "parallel=fsdp parallel.degrees.tp=2"),
    "parallel=pp parallel.pipeline=null": ("leave parallel.pipeline=null out", "parallel=pp"),
    "parallel=tp_ep parallel.degrees.tp=two": ("auto", "parallel=tp_ep parallel.degrees.tp=auto"),
    "parallel=pp parallel.pipeline.split=[4]": ("1 to 3", "parallel=pp parallel.pipeline.split=[3]"),
    "parallel=pp parallel.pipeline.stages_per_rank=2": (
        "Interleaved1F1B takes more",
        "parallel=pp parallel.schedule=Interleaved1F1B parallel.pipeline.stages_per_rank=2",
    ),
    "parallel=pp train.global_batch_size=1": (
        "train.global_batch_size=2",
        "parallel=pp train.global_batch_size=2",
    ),
    "parallel=pp parallel.schedule=DualPipeV parallel.reshard_after_forward=true": (
        "leave it out",
        "parallel=pp parallel.schedule=DualPipeV",
    ),
    "parallel=cp train.sequence_length=254": ("252, 256", "parallel=cp train.sequence_length=252"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_told_in_two_lines_and_the_remedy_that_they_name_works(
    planned: PlannedCommand, mistake: str
) -> None:
    outcome = planned.run("logger=none", *mistake.split(" "))
    assert outcome.code == 2
    assert outcome.err.startswith("error: ")
    assert len(outcome.err.splitlines()) <= 2, outcome.err
    assert "Traceback" not in outcome.err
    assert outcome.out == ""
    for words in MISTAKES[mistake]:
        assert words in outcome.err
    assert not outcome.jobs
    assert not list(Path.cwd().iterdir())
    if mistake in REMEDIES:
        named, command = REMEDIES[mistake]
        assert named in outcome.err
        flag = [] if command.startswith("-sc") else ["logger=none"]
        remedied = planned.run(*flag, *command.split(" "))
        assert remedied.code == 0, remedied.err


def test_every_remedy_is_that_of_a_mistake() -> None:
    assert not set(REMEDIES) - set(MISTAKES)


def test_the_last_choice_of_a_group_counts(planned: PlannedCommand) -> None:
    job = planned.run("task=plan", "model=671b", "model=16b").job
    assert job.config.model.num_layers == 27


def test_a_run_is_not_started_over_another(planned: PlannedCommand, stored: StoredRun) -> None:
    directory = stored.store()
    outcome = planned.run(f"run.dir={directory}")
    assert outcome.code == 2
    assert f"resume={directory}" in outcome.err
    assert planned.run("task=plan", f"run.dir={directory}").code == 0


def test_flags_may_stand_anywhere_among_the_overrides(planned: PlannedCommand) -> None:
    outcome = planned.run("task=plan", "-m", "model.dim=64,96")
    assert [job.config.model.dim for job in outcome.jobs] == [64, 96]
    shown = planned.run("task=plan", "--cfg", "job", "train.steps=7")
    assert shown.code == 0
    assert "steps: 7" in shown.out
    assert not shown.jobs


def test_a_sweep_with_an_unreadable_value_starts_no_job(planned: PlannedCommand) -> None:
    outcome = planned.run("-m", "task=plan", "train.steps=2,abc")
    assert outcome.code == 2
    assert "abc" in outcome.err
    assert not outcome.jobs


def test_a_bad_job_of_a_sweep_does_not_stop_the_others(planned: PlannedCommand) -> None:
    outcome = planned.run("-m", "task=plan", "train.steps=2,0,3")
    assert outcome.code == 1
    assert [job.config.train.steps for job in outcome.jobs] == [2, 3]
    assert "job 1 failed: train.steps=0 is not possible" in outcome.err
    assert "Traceback" not in outcome.err


def test_every_failed_job_of_a_sweep_is_named_at_its_end_and_in_no_words_of_hydras(
    planned: PlannedCommand,
) -> None:
    outcome = planned.run("-m", "task=plan", "train.steps=0,2,-1,3")
    assert outcome.code == 1
    assert [job.config.train.steps for job in outcome.jobs] == [2, 3]
    *told, summary, first, second = outcome.err.splitlines()
    assert [line.partition(":")[0] for line in told if line] == [
        "job 0 (1 of 4)",
        "job 0 failed",
        "job 1 (2 of 4)",
        "job 2 (3 of 4)",
        "job 2 failed",
        "job 3 (4 of 4)",
    ]
    assert summary.startswith("failed: jobs 0, 2 of ")
    assert first.startswith("job 0: train.steps=0 is not possible")
    assert second.startswith("job 2: train.steps=-1 is not possible")


def test_a_sweep_under_torchrun_is_refused(planned: PlannedCommand, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    outcome = planned.run("-m", "train.steps=2,3")
    assert outcome.code == 2
    assert "torchrun" in outcome.err


def test_a_launcher_that_started_another_number_of_processes_is_told(
    planned: PlannedCommand, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    outcome = planned.run("parallel=fsdp", "launch.nproc=2")
    assert outcome.code == 2
    assert "make 2" in outcome.err
    assert "started 4" in outcome.err
    assert planned.run("parallel=fsdp").job.plan.world_size == 4


@pytest.mark.parametrize("typed", ["modle=debug", "trian.steps=3", "modle.dim=3"])
def test_help_on_something_that_is_not_there_says_so(planned: PlannedCommand, typed: str) -> None:
    outcome = planned.run(typed, "--help")
    assert outcome.code == 2
    assert f"there is no '{typed[:5]}'. Did you mean" in outcome.err


def test_help_and_version_are_told_without_composing(planned: PlannedCommand) -> None:
    outcome = planned.run("train.steps=abc", "--help")
    assert outcome.code == 0
    assert "usage: python train.py" in outcome.out
    outcome = planned.run("--version", "train.steps=abc")
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.startswith("dsv3 ")


def test_a_whole_node_is_called_null_only_where_that_was_the_matter() -> None:
    groups = {"precision": ["bf16", "fp8"]}
    arguments = ["precision=bf16", "precision.fp8={gather: true}"]
    null = ConfigCompositionException("'NoneType' object has no attribute 'get'\n    full_key: precision.fp8")
    assert "precision.fp8 is null here; precision=fp8 has it" in explain_error(null, arguments, groups)
    other = explain_error(ConfigCompositionException("something else"), arguments, groups)
    assert "null" not in other
    assert other.endswith("cannot be composed: something else")
