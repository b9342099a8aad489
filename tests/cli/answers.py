"""What the command line answers to many argument lists, with stubs or with the real classes, from one process.

python -m tests.cli.answers quick|slow < cases.json > answers.json
"""

import io
import json
import pickle
import sys
from contextlib import redirect_stderr, redirect_stdout

from lightning_modules.cli import quick


def answer_quickly(arguments: list[str]) -> tuple[int, str, str]:
    sys.argv = ["main.py", *arguments]
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        status = quick.parse()
    return status, out.getvalue(), err.getvalue()


def answer_slowly(arguments: list[str]) -> tuple[int, str, str]:
    from lightning_modules.cli.parser import LimelightParser

    sys.argv = ["main.py", *arguments]
    out, err = io.StringIO(), io.StringIO()
    status = quick.NO_ANSWER
    try:
        with redirect_stdout(out), redirect_stderr(err):
            LimelightParser(stop_after_parsing=True)
    except SystemExit as end:
        status = end.code
    except quick.Parsed:
        return quick.NO_ANSWER, "", ""
    return status, out.getvalue(), err.getvalue()


def main() -> None:
    cases = json.load(sys.stdin)
    if sys.argv[1] == "slow":
        from lightning_modules.cli import app, schema

        assert app  # its subclasses of Lightning classes are listed by help too
        assert schema.import_rooms()
        schema.save_schema()
        answers = [answer_slowly(case) for case in cases]
    else:
        (schema_file,) = quick.cache_file().parent.iterdir()
        quick.install_stubs(pickle.loads(schema_file.read_bytes()))
        answers = [answer_quickly(case) for case in cases]
        assert type(sys.modules["torch"]).__name__ == "StubModule"
    json.dump(answers, sys.stdout)


if __name__ == "__main__":
    main()
