"""The code blocks of README and of every page run, against small models with random weights."""

import io
import shutil
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from blocks import blocks_of, commands_of

import jax_specdec as sd
from jax_specdec.checkpoints.glide import save_glide, target_fingerprint
from jax_specdec.cli import main, make_parser

ROOT = Path(__file__).parents[2]
PAGES = ["README.md", "checkpoints/demo/README.md", "packages/demo/README.md", "CONTRIBUTING.md"]
PAGES += sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("**/*.md"))

# What pages call a model, and which of the small ones that is; they lie in the folder where blocks run.
FOLDERS = {
    "DIR": "target",
    "SRC": "target",
    "SMALL_DIR": "lm",
    "Qwen/Qwen2.5-0.5B-Instruct": "target",
    "checkpoints/demo/target": "target",
    "checkpoints/demo/lm": "lm",
    "checkpoints/demo/bigram": "bigram",
    "checkpoints/demo/glide": "glide",
    "glide": "glide",  # beside DIR
}
# What is appended to commands, which then take seconds.
TRAINING = "--steps 2 --batch-size 8 --sequence-length 16 --heldout-share 0.5"
SMALLER = {
    "chat": "--max-new-tokens 8",
    "demo": "--max-new-tokens 8",
    "plan": "--arithmetic --batch-size 2 --context 128",
    "train lm": f"{TRAINING} --hidden-size 32 --layers 1 --context 64",
    "train glide": TRAINING,
    "train medusa": TRAINING,
    "train regenerate": "--max-new-tokens 8",
    "tune": "--drafters max-gram --longest 2 --per-file 1 --max-new-tokens 8",
}
TEXTS = (
    '{"id": 1, "text": "Once upon a time, the cat saw a big dog.", "prompt": "Once upon a time"}\n',
    '{"id": 2, "text": "One day, the girl had a red ball. The end.", "prompt": "One day, the"}\n',
)


def names_of(page):
    """What a page's Python takes for granted."""
    if page == "docs/sharding.md":
        return {"FOLDER": "DIR"}
    if page == "docs/kernels.md":  # B = 2, T = 3, N = 4, K = 2, D = 8, S = 16, L = 8
        b, t, n, k, d, s, layers = 2, 3, 4, 2, 8, 16, 8
        ones, new = jnp.ones((layers, b, k, s, d)), jnp.ones((b, t, k, d))
        stacked = jnp.ones((layers, b, t, k, d))
        names = {"q": jnp.ones((b, t, n, d)), "k_new": new, "v_new": new}
        names |= {"k_cache": ones, "v_cache": ones, "k_all": stacked, "v_all": stacked}
        names |= {"length": jnp.array([3, 5], jnp.int32), "count": jnp.array([1, 2], jnp.int32)}
        names |= {"seen": jnp.tril(jnp.ones((b, t, t), bool)), "path": None}
        return names
    return {}


@pytest.fixture(scope="module")
def models(tiny_checkpoints, tmp_path_factory):
    """`tiny_checkpoints` with a GliDe drafter."""
    home = tmp_path_factory.mktemp("models")
    shutil.copytree(tiny_checkpoints, home, dirs_exist_ok=True)
    target = sd.load_target(home / "target", tokenizer=False)
    model = sd.GliDe(sd.GliDeConfig.like(target.config), target.config)
    fingerprint = target_fingerprint(target.path)
    save_glide(home / "glide", model, model.init(jax.random.key(0)), fingerprint)
    return home


@pytest.fixture
def place(models, tmp_path, monkeypatch):
    """The folder where blocks run."""
    monkeypatch.chdir(tmp_path)
    for name, model in FOLDERS.items():
        shutil.copytree(models / model, name)
    for name in ("train.jsonl", "prompts.jsonl"):
        Path(name).write_text("".join(TEXTS * 3), encoding="utf-8")
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello\nAnd then?\n"))
    monkeypatch.setattr("jax_specdec.checkpoints.embedded.CHECKOUT", tmp_path / "checkpoints/demo")
    return tmp_path


@pytest.mark.parametrize("page", PAGES)
def test_commands_parse(page):
    """Every block has a language, every command a parser, and every flag is known."""
    for block in blocks_of(ROOT / page):
        where = f"{page}:{block.line}"
        assert block.language in ("python", "sh", "text"), where
        assert block.mark is None or block.language != "text", where
        if block.language == "python":
            compile(block.text, where, "exec")
        if block.language != "sh":
            continue
        for words in commands_of(block.text):
            if words[0] != "jax-specdec":
                script = words[0] == "python" and (ROOT / words[1]).is_file()
                assert block.mark and (script or block.mark == "not run"), f"{where}: {words}"
            elif block.mark != "not run":
                assert make_parser().parse_args(words[1:]).run, where


def runnable():
    """The pages with a block that runs."""
    return [
        page
        for page in PAGES
        if any(not b.mark and b.language != "text" for b in blocks_of(ROOT / page))
    ]


@pytest.mark.slow
@pytest.mark.usefixtures("place")
@pytest.mark.parametrize("page", runnable())
def test_blocks(page, capsys):
    names, printed = names_of(page), ""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for block in blocks_of(ROOT / page):
            where = f"{page}:{block.line}"
            if block.mark or block.language == "text":
                continue
            if block.language == "python":
                capsys.readouterr()
                exec(compile("\n" * (block.line - 1) + block.text, str(ROOT / page), "exec"), names)
                printed += capsys.readouterr().out
                continue
            for words in commands_of(block.text):
                key = " ".join(words[1 : 3 if words[1] == "train" else 2])
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    status = main(words[1:] + SMALLER.get(key, "").split())
                assert status == 0, f"{where}: {words}\n{capsys.readouterr().err}"
    if page == "docs/sharding.md":
        assert printed.count("\n") == 4
