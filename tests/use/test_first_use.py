"""What is said of compilation: when, how long it will take, and when nothing."""

import json
import random
import time

import jax
import pytest

from jax_specdec import progress
from jax_specdec.progress import Compilation, Compiled, add_record, estimate, read_records


class Lowered:
    """A program that takes so many seconds to compile, or is kept from before."""

    def __init__(self, lines, seconds, kept=False):
        self.lines, self.seconds, self.kept = lines, seconds, kept

    def as_text(self):
        return f"program of {self.lines}" + "\n" * self.lines

    def compile(self):
        time.sleep(self.seconds)
        if self.kept:
            jax.monitoring.record_event("/jax/compilation_cache/cache_hits")
        return f"compiled {self.lines}"


@pytest.fixture
def said(monkeypatch, tmp_path):
    lines = []
    monkeypatch.setattr(progress, "say", lines.append)
    monkeypatch.setattr(progress, "PATIENCE", 0.05)
    monkeypatch.setattr(progress, "records_file", lambda: tmp_path / "cache" / "seconds.json")
    return lines


def compile_all(*programs, shown=True, what="first use of batch 4"):
    compilation = Compilation("cpu", "this machine", what, shown)
    names = [compilation.add(program) for program in programs]
    return [compilation.compile(name) for name in names]


def test_what_is_quick_is_not_talked_of(said):
    assert compile_all(Lowered(10, 0)) == ["compiled 10"] and said == []


def test_the_estimate_is_of_all_programs_and_learned(said):
    """Once for a pair; the second time from what the first took, in proportion to size."""
    compile_all(Lowered(1000, 0.2), Lowered(500, 0.2))
    assert said == [
        f"compiling (first use of batch 4), about {round(1500 * progress.PER_LINE['cpu'])} s"
    ]
    compilation = Compilation("cpu", "this machine", "", True)
    compilation.add(Lowered(1000, 0.2))
    compilation.add(Lowered(4000, 0))
    found = sum(compilation._estimate(lines) for lines, _ in compilation._waiting.values())
    assert found == pytest.approx(1.0, rel=0.3)  # 0.2 s, and four times as much


def test_nothing_is_said_where_nobody_looks(said):
    compile_all(Lowered(1000, 0.2), shown=False)
    assert said == [] and read_records(progress.records_file())


def test_a_kept_program_is_not_talked_of(said, monkeypatch):
    """Neither when it is read slowly, nor does its reading count as compilation."""
    monkeypatch.setattr(progress, "_kept", lambda seconds: True)
    compile_all(Lowered(1000, 0.2))
    assert len(said) == 1
    known = read_records(progress.records_file())
    compile_all(Lowered(1000, 0.2, kept=True))
    assert len(said) == 1 and read_records(progress.records_file()) == known


def test_another_platform_is_not_guessed_at(said):
    assert estimate(1000, [], "abacus") is None
    compilation = Compilation("abacus", "another", "first use of batch 1", True)
    compilation.add(Lowered(1000, 0))
    assert compilation.message() == "compiling (first use of batch 1)"


def test_hits_of_jaxs_cache_are_seen(said):
    """A real program, compiled once and then read from the cache that the tests have."""
    constant = random.SystemRandom().random()
    hits = progress.cache_hits()
    for _ in range(2):
        jax.clear_caches()
        lowered = jax.jit(lambda x: x + constant).lower(1.0)
        compilation = Compilation("cpu", "this machine", "", False)
        compilation.compile(compilation.add(lowered))
    assert progress.cache_hits() == hits + 1
    (record,) = read_records(progress.records_file())["this machine"]
    assert record.kept and record.lines > 1


@pytest.mark.parametrize(
    "content", ["", "[]", "{", '{"a": 3}', '{"a": [[1, 2]]}', '{"a": [["x", 1, 2, 3]]}']
)
def test_a_damaged_record_is_no_record(tmp_path, content):
    file = tmp_path / "seconds.json"
    file.write_text(content)
    assert read_records(file) == {}
    add_record(file, "b", Compiled(10, 1.0, "name", False))
    assert read_records(file) == {"b": [Compiled(10, 1.0, "name", False)]}


def test_records_are_few(tmp_path):
    file = tmp_path / "seconds.json"
    for i in range(progress.MOST_RECORDS + 5):
        add_record(file, "b", Compiled(10 + i, 1.0, str(i), False))
    assert len(json.loads(file.read_text())["b"]) == progress.MOST_RECORDS


def test_a_folder_that_cannot_be_written_is_left_alone(tmp_path):
    (tmp_path / "file").write_text("")
    add_record(tmp_path / "file" / "seconds.json", "b", Compiled(10, 1.0, "name", False))


def test_commands_always_say_what_is_compiled(said):
    """A pipe of a command has no terminal, and whoever reads it waits as long."""
    assert not progress.told()
    with progress.told_always():
        assert progress.told() and not progress.watched() and not progress.told(False)
        compile_all(Lowered(1000, 0.2), shown=None)
    assert len(said) == 1 and not progress.told()


def test_progress_is_for_people(monkeypatch):
    """By default on a terminal, which the tests have not; as told otherwise."""
    assert not progress.watched() and progress.watched(True) and not progress.watched(False)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    assert progress.watched() and not progress.watched(False)
