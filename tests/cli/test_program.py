"""`convert` and `info`, and the command as a program."""

import argparse
import shlex
import subprocess
import sys

from commands import fails, ok, records

from jax_specdec.checkpoints import targets as checkpoints
from jax_specdec.checkpoints.embedded import demo_folder
from jax_specdec.checkpoints.memory import bytes_per_device
from jax_specdec.cli import make_parser


def test_convert(model, capsys, tmp_path):
    out = tmp_path / "out"
    ok(capsys, "convert", model, out, "--dtype", "bfloat16", "--max-shard-mb", 0.1)
    config, stored = checkpoints.inspect_checkpoint(out)
    assert stored == "bfloat16" and config == checkpoints.load_config(model)
    assert len(list(out.glob("model-*.safetensors"))) > 1
    written = {path: path.read_bytes() for path in out.iterdir()}
    assert "holds a checkpoint already" in fails(capsys, "convert", model, out)
    assert written == {path: path.read_bytes() for path in out.iterdir()}
    ok(
        capsys, "convert", out, out, "--dtype", "float32"
    )  # its source is replaced, as the help says
    assert checkpoints.inspect_checkpoint(out)[1] == "float32"


def test_info(model, capsys, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("info must not load parameters")

    monkeypatch.setattr(checkpoints, "_read_params", refuse)
    args = ["info", "--model", model, "--drafter", "lm:3", "--batch-size", 2, "--dtype", "bfloat16"]
    (found,) = records(capsys, *args)
    assert found["num_parameters"] == checkpoints.load_config(model).parameter_count()
    assert (found["stored_dtype"], found["dtype"]) == ("float32", "bfloat16")
    # 2 x 3 layers x 2 rows x 2 heads x (256 + 4) slots x 16 x 2 bytes
    assert found["memory"]["cache"] == 2 * 3 * 2 * 2 * 260 * 16 * 2
    assert found["memory"]["logits"] == 2 * 4 * 300 * 4
    both = found["memory"]["total"] + found["drafter"]["memory"]["total"]
    assert found["total_bytes"] == both and found["fits"] is True
    assert found["longest_prompt"] == 128
    text = ok(capsys, *args)
    assert "3 layers of 64" in text and "drafter lm, up to 3 tokens" in text and "fits" in text
    assert ok(capsys, "info", "--model", model, "--drafter", "bigram")


def test_info_in_int8(model, capsys):
    given = ["info", "--model", model, "--drafter", "lm:3", "--dtype", "bfloat16"]
    (whole,) = records(capsys, *given)
    eight = [*given, "--int8", "weights,cache", "--draft-int8", "weights"]
    (found,) = records(capsys, *eight)
    assert (found["int8"], found["draft_int8"]) == (["weights", "cache"], ["weights"])
    assert 2 * found["memory"]["cache"] == whole["memory"]["cache"]
    decoder = checkpoints.Decoder(checkpoints.load_config(model), "bfloat16", quantized=True)
    assert found["memory"]["parameters"] == bytes_per_device(decoder)
    own, before = (about["drafter"]["memory"] for about in (found, whole))
    assert own["parameters"] < before["parameters"] and own["cache"] == before["cache"]
    assert "bfloat16 (weights and cache in int8), drafter lm (weights in int8)" in ok(
        capsys, *eight
    )
    sentence = "int8 is of the cache of lm, and max-gram has none"
    assert sentence in fails(capsys, *given[:4], "max-gram:3", "--draft-int8", "cache")


def test_info_of_a_cascade(model, capsys):
    """Each drafter in it once, and what they take together."""
    spec = "cascade(lm[max-gram:4]:3, bigram:2, lm:1)"
    (about,) = records(capsys, "info", "--model", model, "--drafter", spec)
    drafter = about["drafter"]
    assert list(drafter["parts"]) == ["lm", "max-gram", "bigram"]
    sizes = [drafter["parts"][name]["memory"]["total"] for name in ("lm", "bigram")]
    assert drafter["memory"]["total"] == sum(sizes)
    assert about["total_bytes"] == about["memory"]["total"] + sum(sizes)
    assert "lm  " in ok(capsys, "info", "--model", model, "--drafter", spec)


# as a program


def run_python(*argv, **kwargs):
    return subprocess.run([sys.executable, *argv], capture_output=True, text=True, **kwargs)


def test_program(model):
    done = run_python("-m", "jax_specdec", "generate", "--model", model, "--json", input="")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: Standard input is empty") and done.stderr.count("\n") == 1
    done = run_python("-m", "jax_specdec", "--version")
    assert done.returncode == 0 and done.stdout.strip()


def test_help_does_not_wait_for_jax():
    code = (
        "import sys\nfrom jax_specdec.cli import main\n"
        "for argv in (['--help'], ['generate', '--help'], ['train', 'lm', '--help'], ['demo', '-h']):\n"
        "    try:\n        main(argv)\n    except SystemExit as end:\n        assert end.code == 0\n"
        "heavy = {'jax', 'numpy', 'transformers', 'rich', 'grain'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = run_python("-c", code)
    assert done.returncode == 0, done.stderr
    assert "--max-new-tokens" in done.stdout


def test_import_leaves_out_nnx():
    code = (
        "import sys, jax_specdec\n"
        "for name in jax_specdec.__all__: getattr(jax_specdec, name)\n"
        "import jax_specdec.training.lm, jax_specdec.demo\n"
        "assert set(jax_specdec.__all__) <= set(dir(jax_specdec))\n"
        "nnx = [name for name in sys.modules if name.startswith('flax.nnx')]\n"
        "assert not nnx, nnx[:3]"
    )
    done = run_python("-c", code)
    assert done.returncode == 0, done.stderr


def test_demo_checkpoint_is_beside_the_package():
    assert demo_folder().parts[-2:] == ("checkpoints", "demo")
    assert (demo_folder().parents[1] / "jax_specdec").is_dir()


# help


def parsers(parser):
    """A parser and those of its commands."""
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                yield from parsers(inner)


def test_help_fits_a_terminal_and_its_examples_parse(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    whole = make_parser()
    for parser in parsers(whole):
        text = parser.format_help()
        assert max(map(len, text.splitlines())) < 80, parser.prog
        assert "examples:" in text, parser.prog
        for example in parser.examples:
            words = shlex.split(example)
            if words[-1] != "--help":
                assert whole.parse_args(words[1:]).run
