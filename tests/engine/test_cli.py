import os

import pytest

from mambavision.engine import cli


def stopped(main, **options) -> int:
    with pytest.raises(SystemExit) as stop:
        cli.run(main, **options)
    return stop.value.code


def interrupted():
    raise KeyboardInterrupt


def test_ctrl_c_says_how_to_go_on(capsys):
    assert stopped(interrupted) == 130 and capsys.readouterr().err == ""
    assert stopped(interrupted, interrupted="stopped: --resume goes on") == 130
    assert capsys.readouterr().err == "\nstopped: --resume goes on\n"


def test_one_line_and_names_that_are_not_utf8(capsys):
    def refuse():
        print(os.fsdecode(b"caf\xe9.jpg"))
        raise ValueError("first\nsecond")

    assert stopped(refuse) == 2
    out, err = capsys.readouterr()
    assert out == "caf\\udce9.jpg\n" and err == "error: first\n"
