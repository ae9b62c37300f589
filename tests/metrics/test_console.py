import io
import os
import pty
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dsv3.metrics.console import Console
from dsv3.metrics.row import MetricsRow

ROOT = Path(__file__).parents[2]
MARKUP = "[bold]a[/bold] [/x] [red] :smile: /tmp/[run]"


def _row(step: int, held_out: float | None = None) -> MetricsRow:
    row = MetricsRow(step=step, tokens=step, evaluation_loss=held_out, loss=5.12344, lr=3e-3)
    row.grad_norm, row.tokens_per_second = 1.234, 12345.4
    return row


def _clock(seconds: float) -> Iterator[float]:
    now = 0.0
    while True:
        yield now
        now += seconds


def _plain(
    tmp_path: Path | None = None, log_every: int = 10, quiet: bool = False
) -> tuple[Console, io.StringIO]:
    stream, ticks = io.StringIO(), _clock(2.0)
    log_path = tmp_path and tmp_path / "log.txt"
    return Console(
        file=stream, clock=lambda: next(ticks), log_path=log_path, log_every=log_every, quiet=quiet
    ), stream


def test_without_a_terminal_there_is_a_line_every_log_every_steps() -> None:
    console, stream = _plain(log_every=20)
    console.start(50)
    for step in range(1, 51):
        console.step(_row(step))
    lines = stream.getvalue().splitlines()
    assert [line.split("  ")[0] for line in lines] == ["step 1/50", "step 20/50", "step 40/50", "step 50/50"]
    assert lines[1] == "step 20/50  loss 5.1234  lr 3.0e-03  grad 1.23  12,345 tok/s  eta 1:00"


def test_the_time_left_counts_from_the_step_that_a_resume_starts_at() -> None:
    console, stream = _plain(log_every=1)
    console.start(100, done=90)
    console.step(_row(91))
    assert stream.getvalue().endswith("eta 0:18\n")


def test_rows_that_come_in_bursts_do_not_upset_the_time_left() -> None:
    stream, now = io.StringIO(), 0.0
    console = Console(file=stream, clock=lambda: now, log_every=1000)
    console.start(2000)
    for step in range(1, 1001):
        now = (step + 99) // 100 * 200.0 + step * 1e-4
        console.step(_row(step))
    assert "step 1000/2000" in stream.getvalue()
    assert stream.getvalue().endswith("eta 33:20\n")


def test_where_steps_grow_the_time_left_is_that_of_the_tokens_left() -> None:
    """Two seconds per tick: a step of 100 tokens, then 300; 600 are left of 1,000, in two steps of 300."""
    console, stream = _plain(log_every=1)
    console.start(4, tokens=(0, 1000))
    console.step(MetricsRow(step=1, tokens=100))
    console.step(MetricsRow(step=2, tokens=400))
    assert [line.split()[-1] for line in stream.getvalue().splitlines()] == ["0:18", "0:06"]


@pytest.mark.parametrize(
    ("waited", "told"),
    [(0.0, ""), (0.04, ""), (0.05, "  waited 0.05 s for data"), (2.0, "  waited 2 s for data")],
)
def test_a_wait_for_data_is_shown_where_it_is_a_notable_share_of_its_step(waited: float, told: str) -> None:
    console, stream = _plain(log_every=1)
    console.start(50, tokens=(1000, 9000))
    console.step(MetricsRow(step=1, tokens=1100, tokens_per_second=100.0, data_wait=waited))
    assert stream.getvalue() == f"step 1/50  100 tok/s{told}  eta 2:38\n"


def test_padding_is_shown_where_there_is_any() -> None:
    console, stream = _plain(log_every=1)
    console.start(50)
    for step, padding in ((1, 0.0), (2, 0.125), (3, None)):
        console.step(MetricsRow(step=step, tokens=step, padding=padding))
    assert [line.split("  ")[1:-1] for line in stream.getvalue().splitlines()] == [[], ["12.5% padding"], []]


def test_a_held_out_loss_always_has_its_line_and_unknown_figures_are_left_out() -> None:
    console, stream = _plain(log_every=100)
    console.start(50)
    console.step(_row(1))
    console.step(_row(7, held_out=4.5))
    console.step(MetricsRow(step=50, tokens=1))
    lines = stream.getvalue().splitlines()
    assert "held-out 4.5000" in lines[1]
    assert lines[2] == "step 50/50  eta 0:00"


@pytest.mark.parametrize("way", ["message", "sample", "table", "next"])
def test_markup_is_printed_literally(way: str) -> None:
    console, stream = _plain()
    match way:
        case "message":
            console.message(MARKUP)
        case "sample":
            console.sample("[bold]", MARKUP)
        case "table":
            console.table("[title]", [("written to", MARKUP)])
        case _:
            console.next_command(MARKUP)
    assert MARKUP in stream.getvalue()


def test_a_sample_cannot_steer_the_terminal() -> None:
    console, stream = _plain()
    console.sample("say", "a\x1b[31mred\x07\nsecond\rline \ud800")
    assert stream.getvalue() == "sample for 'say':\n  | a\ufffd[31mred\ufffd\n  | second\ufffdline \ufffd\n"


def test_long_lines_are_not_broken() -> None:
    console, stream = _plain()
    console.table("summary", [("loss", "1"), ("written to", "/long" * 60)])
    assert stream.getvalue() == f"\nsummary\n  loss        1\n  written to  {'/long' * 60}\n"


def test_a_stream_of_a_small_alphabet_gets_question_marks() -> None:
    raw = io.BytesIO()
    console = Console(file=io.TextIOWrapper(raw, encoding="ascii"))
    console.message("naïve 世界")
    assert raw.getvalue() == b"na?ve ??\n"


def test_the_log_has_the_same_text_and_a_second_run_appends(tmp_path: Path) -> None:
    shown = ""
    for _ in range(2):
        console, stream = _plain(tmp_path, log_every=2)
        console.message(MARKUP)
        console.start(4)
        for step in range(1, 5):
            console.step(_row(step))
        console.sample("é", "世界")
        console.close()
        console.close()
        shown += stream.getvalue()
    assert (tmp_path / "log.txt").read_text(encoding="utf-8") == shown


def test_a_log_that_cannot_be_written_does_not_matter(tmp_path: Path) -> None:
    console, stream = _plain(tmp_path / "missing")
    console.message("still here")
    assert stream.getvalue() == "still here\n"


def test_quiet_writes_nowhere(tmp_path: Path) -> None:
    console, stream = _plain(tmp_path, quiet=True)
    console.start(1)
    console.step(_row(1))
    console.close()
    assert stream.getvalue() == ""
    assert list(tmp_path.iterdir()) == []


def test_the_stderr_switch_leaves_stdout_alone(capsys: pytest.CaptureFixture[str]) -> None:
    Console(stderr=True).message("to stderr")
    Console().message("to stdout")
    assert capsys.readouterr() == ("to stdout\n", "to stderr\n")


PROGRAM = """
import sys
from pathlib import Path
from dsv3.metrics.console import Console
from dsv3.metrics.row import MetricsRow
console = Console(log_every=1, log_path=Path(sys.argv[1]))
console.start(2000)
for step in range(1, 2001):
    console.step(MetricsRow(step=step, tokens=step, loss=1.0))
    if step == 1000:
        console.message("halfway [/x]")
        print("print of another library")
console.table("summary", [])
console.close()
"""


def test_a_reader_that_leaves_does_not_stop_the_run(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    read_end, write_end = os.pipe()
    os.close(read_end)
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(log)],
        cwd=ROOT,
        stdout=write_end,
        stderr=subprocess.PIPE,
        check=False,
    )
    os.close(write_end)
    assert (run.returncode, run.stderr) == (0, b"")
    assert log.read_text().splitlines()[-1] == "summary"


def test_a_closed_stdout_does_not_matter(tmp_path: Path) -> None:
    command = f'exec "{sys.executable}" -c "$0" "$1" >&-'
    run = subprocess.run(
        ["bash", "-c", command, PROGRAM.replace("print(", "len("), str(tmp_path / "log.txt")],
        cwd=ROOT, stderr=subprocess.PIPE, check=False,
    )  # fmt: skip
    assert (run.returncode, run.stderr) == (0, b"")


def test_on_a_terminal_there_is_one_bar_with_messages_above(tmp_path: Path) -> None:
    leader, follower = pty.openpty()
    environ = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "100"}
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "log.txt")]
    with subprocess.Popen(command, cwd=ROOT, stdout=follower, stderr=follower, env=environ) as run:
        os.close(follower)
        shown = b"".join(_until_closed(leader)).decode()
    assert run.returncode == 0
    assert "step 2000/2000" in shown
    assert "halfway [/x]" in shown
    assert "print of another library" in shown
    assert "\x1b[?25h" in shown  # the cursor is back
    assert "step 1/2000  loss" not in shown  # the bar stands for the lines
    assert len((tmp_path / "log.txt").read_text().splitlines()) == 2003


def _until_closed(descriptor: int) -> Iterator[bytes]:
    try:
        while data := os.read(descriptor, 65536):
            yield data
    except OSError:  # how Linux says that the other side of a terminal is gone
        pass
    finally:
        os.close(descriptor)


def test_at_an_evaluation_each_source_of_a_mixture_has_a_line(tmp_path: Path) -> None:
    log, stream = tmp_path / "log.txt", io.StringIO()
    console = Console(log_path=log, file=stream)
    console.start(20)
    web: dict[str, float | None] = {"tokens": 12345.0, "epochs": 0.25, "evaluation_loss": 3.5}
    code: dict[str, float | None] = {"tokens": 7.0, "epochs": 2.0}
    console.step(MetricsRow(step=10, tokens=12352, loss=4.0, sources={"web": web, "code": code}))
    assert "epochs" not in stream.getvalue()
    evaluated = MetricsRow(step=20, tokens=12352, evaluation_loss=3.0, sources={"web": web, "code": code})
    console.step(evaluated)
    for text in (stream.getvalue(), log.read_text()):
        assert text.splitlines()[-2:] == [
            "  web   held-out 3.5000  12,345 tokens  0.25 epochs",
            "  code  7 tokens  2 epochs",
        ]
