"""The first ten minutes with the library, outside of its checkout; `stranger.py` runs it on a terminal.

Every step prints its name and its seconds. What else is on the screen, the library put there.
"""

import contextlib
import time

import jax

import jax_specdec as sd

PROMPT = "Once upon a time, there was a"
TEXTS = [
    "Once upon a time, there was a little fox who lived near a quiet pond.",
    "Tom had a red ball. He liked to play with it in the park every day.",
    "One day, Lily saw a big dog. The dog was happy and ran to the tree.",
    "Question: Tom has 3 apples and buys 4 more. How many has he?\nAnswer: 7",
] * 8


@contextlib.contextmanager
def step(name):
    print(f"== {name}", flush=True)
    began = time.perf_counter()
    yield
    print(f"-- {time.perf_counter() - began:.1f} s", flush=True)


with step("load the demo"):
    decoder = sd.load()
    print(decoder)

with step("an answer"):
    answer = decoder(PROMPT, max_new_tokens=48)
    print(answer.text)
    assert len(answer.token_ids) == 48 or answer.finish_reason != "length"

with step("a second answer"):
    assert decoder(PROMPT, max_new_tokens=48).text == answer.text

with step("a stream"):
    pieces = []
    for piece in decoder.stream(PROMPT, max_new_tokens=48):
        print(piece.text, end="", flush=True)
        pieces.append(piece.text)
    print()
    assert "".join(pieces) == answer.text and len(pieces) > 3

with step("a chat of two turns"):
    chat = decoder.chat(max_new_tokens=24)
    first, second = chat("Once upon a time"), chat("And then?")
    print(first.text, second.text, sep="\n")
    assert first.text and second.text

with step("a plot"):
    sd.plots.acceptance(answer).figure.savefig("acceptance.png")

with step("a small model of one's own"):
    tokenizer = decoder.target.tokenizer
    config = sd.ModelConfig(
        vocab_size=decoder.target.config.vocab_size,
        hidden_size=64,
        mlp_size=128,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        head_dim=32,
        context=256,
        bos_id=tokenizer.bos_token_id,
        eos_ids=(tokenizer.eos_token_id,),
    )
    params = sd.Decoder(config, "float32").init(jax.random.key(0))
    sd.save_pretrained("mine", config, params, dtype="float32", tokenizer=tokenizer)
    mine = sd.load("mine")
    print(mine)
    own = mine(PROMPT, max_new_tokens=24)

with step("a drafter for it, 30 steps"):
    options = {"sequence_length": 32, "batch_size": 8, "warmup_steps": 5, "heldout": TEXTS[:4]}
    drafter = sd.train_glide("mine", TEXTS, steps=30, out="glide-run", **options)
    print(drafter)

with step("the drafter used"):
    faster = sd.load("mine", "glide:3", draft={"glide": "glide-run/checkpoint"})
    drafted = faster(PROMPT, max_new_tokens=24)
    print(drafted.stats.mean_acceptance_length)
    assert drafted.token_ids == own.token_ids
