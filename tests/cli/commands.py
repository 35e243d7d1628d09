"""Runs commands: those that must succeed and those that must fail."""

import json

from jax_specdec.cli import main

PROMPT = "Once upon a time"
SHORT = ["--max-new-tokens", "12"]


def lines(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def ok(capsys, *argv):
    """Runs a command that must succeed; returns its standard output."""
    status = main([str(a) for a in argv])
    out, err = capsys.readouterr()
    assert status == 0, err
    return out


def records(capsys, *argv):
    """The JSON objects that a command prints."""
    return [json.loads(line) for line in ok(capsys, *argv, "--json").splitlines()]


def fails(capsys, *argv, status=2):
    """Runs a command that must fail; returns its sentence."""
    got = main([str(a) for a in argv])
    out, err = capsys.readouterr()
    messages = [line for line in err.splitlines() if line.startswith("error: ")]
    assert got == status, err
    assert out == "" and len(messages) == 1 and "Traceback" not in err, err
    assert err.splitlines()[-1] == messages[0]
    return messages[0]
