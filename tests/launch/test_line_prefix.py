import os
import subprocess
import sys

import pytest

from dsv3.launch.line_prefix import prefix_lines

CHUNK = "x" * 40_000


def test_every_line_of_a_process_and_its_children_gets_the_prefix(capfd: pytest.CaptureFixture[str]) -> None:
    with prefix_lines("[3] "):
        os.write(1, b"whole\n\nha")
        os.write(1, b"lf\n")
        subprocess.run(["sh", "-c", "echo child; echo err >&2; printf open"], check=True)
    print("without", flush=True)
    printed = capfd.readouterr()
    assert printed.out == "[3] whole\n[3] \n[3] half\n[3] child\n[3] open\nwithout\n"
    assert printed.err == "[3] err\n"


def test_a_child_that_goes_on_neither_holds_the_job_up_nor_loses_its_prefix(
    capfd: pytest.CaptureFixture[str],
) -> None:
    with prefix_lines("[3] "):
        child = subprocess.Popen(["sh", "-c", "read line; echo later"], stdin=subprocess.PIPE)
    with prefix_lines("[4] "):
        child.communicate(b"\n")
        os.write(2, CHUNK.encode() + b"\n")
    assert child.returncode == 0
    assert capfd.readouterr().err == f"[4] {CHUNK}\n"


def test_output_that_nobody_reads_any_more_does_not_stop_a_job() -> None:
    program = (
        "import os; from dsv3.launch.line_prefix import prefix_lines\n"
        "with prefix_lines('[0] '):\n"
        "    for _ in range(50): os.write(1, b'y' * 9999 + b'\\n')\n"
        "os.write(2, b'done')"
    )
    read, written = os.pipe()
    os.close(read)
    with os.fdopen(written, "wb") as nobody:
        ended = subprocess.run(
            [sys.executable, "-c", program], stdout=nobody, stderr=subprocess.PIPE, timeout=60, check=False
        )
    assert (ended.returncode, ended.stderr) == (0, b"done")
