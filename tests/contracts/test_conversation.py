"""Conversations: every turn reads its own tokens only, and texts are those of no caches kept."""

import chats
import helpers as h
import jax
import numpy as np
import pytest

from jax_specdec import SpeculativeDecoder, UserError, conversation
from jax_specdec.conversation import Conversation

SAYINGS = ("hello there.", "abcd ab cd?", "who are we?", "a fish.", "tell me more of it.", "no?")


@pytest.fixture(scope="module")
def decoders():
    return {}


@pytest.fixture
def decoder(decoders) -> SpeculativeDecoder:
    if "lm" not in decoders:
        decoders["lm"] = chats.decoder_of("lm")
    return decoders["lm"]


def anew(decoder, answer, **options):
    """The answer to the same tokens with nothing kept."""
    (got,) = decoder.generate([answer.prompt], **options)
    return got


def turn(chat: Conversation, number: int, **options) -> None:
    """One turn, checked: what was read, the text, and what became of the drafts."""
    state, had = chat._state, 0
    if state is not None:
        had = int(state.text.length[0])
    answer = chat(f"{SAYINGS[number % len(SAYINGS)]}", **options)
    want = anew(chat._decoder, answer, **{**chat._options, **options})
    near = [m < h.NEAR_TIE for m in want.margins]
    assert answer.token_ids == want.token_ids or any(near)
    assert answer.text == want.text and answer.finish_reason == want.finish_reason
    # Drafts are those of a drafter that has just read the text.
    assert answer.stats.num_spec_steps == want.stats.num_spec_steps
    # All but the last token of the old text, which nobody has read yet.
    assert answer.stats.num_cached_tokens == max(had - 1, 0)
    assert chat.messages[-1] == {"role": "assistant", "content": answer.text}


def alive() -> int:
    return sum(array.nbytes for array in jax.live_arrays())


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_three_turns(temperature, decoder):
    chat = decoder.chat("be kind.", max_new_tokens=10, temperature=temperature, seed=3)
    for number in range(3):
        turn(chat, number)
    assert [m["role"] for m in chat.messages] == ["system", *["user", "assistant"] * 3]
    assert decoder.compilations <= 3  # a first reading, a next one, rounds


OTHERS = ("none", "max-gram", "lm+tree", "glide+cape", "medusa", "lm of its own kind")


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_every_drafter(name):
    """With a buffer that grows once, and both temperatures."""
    decoder = chats.decoder_of(name)
    for temperature in (0.0, 1.0):
        chat = decoder.chat(max_new_tokens=14, temperature=temperature)
        for number in range(8):
            turn(chat, number)
        assert chat._state.text.tokens.shape[1] - decoder.loop.window == 256


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_fifty_turns(temperature, decoders):
    if "cascade" not in decoders:
        decoders["cascade"] = chats.decoder_of("lm[max-gram]", context=2048)
    decoder = decoders["cascade"]
    chat, sizes = decoder.chat(max_new_tokens=20, temperature=temperature), {}
    for number in range(50):
        turn(chat, number)
        sizes.setdefault(chat._state.text.tokens.shape[1], set()).add(alive())
    capacities = sorted(sizes)
    assert [size - decoder.loop.window for size in capacities] == [128, 256, 512, 1024, 2048]
    for size in capacities:  # of one capacity the memory does not change
        assert len(sizes[size]) == 1, sizes
    assert decoder.compilations == 3 * len(capacities)


def test_the_caches_are_what_is_read(decoder):
    """The negative control: with other keys in the cache the text is another one."""
    chat = decoder.chat(max_new_tokens=10)
    chat(SAYINGS[0])
    cache = chat._state.view.cache
    noisy = tuple(jax.random.permutation(jax.random.key(0), k, axis=2) for k in cache.k)
    view = chat._state.view.replace(cache=cache.replace(k=noisy))
    chat._state = chat._state.replace(view=view)
    answer = chat(SAYINGS[1])
    assert answer.token_ids != anew(decoder, answer, max_new_tokens=10).token_ids


def test_streams_and_interruptions(decoder, monkeypatch):
    chat = decoder.chat(max_new_tokens=10)
    chat(SAYINGS[0])
    before = [dict(message) for message in chat.messages]
    with pytest.raises(KeyboardInterrupt):
        for _ in chat.stream(SAYINGS[1], rounds_per_chunk=1):
            raise KeyboardInterrupt
    assert chat.messages == before
    calls, real = [], conversation.to_host

    def interrupted(tree):
        calls.append(tree)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(tree)

    monkeypatch.setattr(conversation, "to_host", interrupted)
    with pytest.raises(KeyboardInterrupt):
        for _ in chat.stream(SAYINGS[1], rounds_per_chunk=1):
            pass
    monkeypatch.undo()
    assert chat.messages == before
    left = chat.stream(SAYINGS[2], rounds_per_chunk=1)
    next(left)  # given up by the next turn
    stream = chat.stream(SAYINGS[1])
    text = "".join(map(str, stream))
    list(left)  # what had come of it
    with pytest.raises(UserError, match="has not ended"):
        _ = left.generation
    answer = stream.generation
    assert text == answer.text == chat.messages[-1]["content"]
    assert answer.token_ids == anew(decoder, answer, max_new_tokens=10).token_ids
    assert answer.stats.num_cached_tokens > 20  # of the first turn and of the interrupted one
    assert chat.messages[:-2] == before


def test_undo_reset_and_changes(decoder):
    chat = decoder.chat("be kind.", max_new_tokens=10)
    first = chat(SAYINGS[0])
    chat(SAYINGS[1])
    chat.undo()
    assert len(chat.messages) == 3
    again = chat(SAYINGS[2])
    held = len(first.prompt) + len(first.token_ids)
    assert held - 1 <= again.stats.num_cached_tokens < held + 3  # and what both messages begin with
    assert again.token_ids == anew(decoder, again, max_new_tokens=10).token_ids
    chat.messages[2]["content"] = "a fish."  # what the model did not say
    changed = chat(SAYINGS[3])
    assert changed.stats.num_cached_tokens == len(first.prompt)
    assert changed.token_ids == anew(decoder, changed, max_new_tokens=10).token_ids
    chat.system = "be brief."
    assert chat(SAYINGS[4]).stats.num_cached_tokens <= 6
    kept = chat.messages[:]
    chat.reset()
    assert chat.messages == [{"role": "system", "content": "be brief."}] and chat._state is None
    with pytest.raises(UserError, match="no turn to undo"):
        chat.undo()
    other = decoder.chat(messages=kept, max_new_tokens=10)
    assert other("go on.").stats.num_cached_tokens == 0 and len(other.messages) == len(kept) + 2
    assert repr(other).startswith("Conversation(") and len(repr(other)) < 120


def test_template_arguments_and_templates(decoder):
    chat = decoder.chat(template_args={"loud": True}, max_new_tokens=4)
    assert chats.tokenizer().decode(chat("hi.").prompt) == "<u>hi.</s><b>?"
    own = "{% for m in messages %}{{ m.content }}{% endfor %}"
    chat = decoder.chat(template=own, max_new_tokens=4)
    assert chats.tokenizer().decode(chat("hi.").prompt) == "hi."


def test_stops_and_options_of_a_turn(decoder):
    chat = decoder.chat(max_new_tokens=10)
    whole = chat(SAYINGS[0])
    chat.undo()
    short = chat(SAYINGS[0], max_new_tokens=3)
    assert short.token_ids == whole.token_ids[:3]
    assert short.stats.num_cached_tokens == len(short.prompt) - 1
    assert len(chat(SAYINGS[1]).token_ids) > 3 or chat.messages[-1]["content"] == ""


def test_beyond_the_context(decoder):
    """Nothing is lost, and the conversation goes on."""
    chat = decoder.chat(max_new_tokens=4)
    chat("hi.")
    before = [dict(message) for message in chat.messages]
    with pytest.raises(UserError) as error:
        chat("a b c d " * 100)
    assert "and the context of 512 must hold the answer, too: say less" in str(error.value)
    assert chat.messages == before
    assert chat("ab?").stats.num_cached_tokens > 5


WRONG = {
    "message": (lambda c: c.chat()(["hi."]), "A message is text, not a list."),
    "nothing": (lambda c: c.chat()(None), "A message is text, not None."),
    "empty": (lambda c: c.chat()(""), "The message is empty."),
    "system": (lambda c: c.chat(3), "A system message is text, not an int."),
    "option": (lambda c: c.chat(temprature=1), "There is no option 'temprature'"),
    "value": (lambda c: c.chat(temperature=-1), "temperature"),
    "turn": (lambda c: c.chat()("hi.", top_p=0), "top_p"),
    "argument": (
        lambda c: c.chat(template_args={"lod": True}),
        "The chat template has no argument 'lod'; its arguments: loud.",
    ),
    "raises": (
        lambda c: c.chat(template="{{ raise_exception('only at noon') }}"),
        "The chat template fails: only at noon",
    ),
    "syntax": (lambda c: c.chat(template="{% for %}"), "The chat template fails: "),
    "silent": (
        lambda c: c.chat("be kind.", template="{{ messages[-1].content }}"),
        "The chat template leaves out the system message",
    ),
    "deaf": (
        lambda c: c.chat(template="hi."),
        "The chat template leaves out what the user says: use generate, or give another template.",
    ),
    "role": (lambda c: c.chat(messages=[{"role": 3, "content": ""}]), '"role" must be a text'),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_use(name, decoder):
    use, sentence = WRONG[name]
    with pytest.raises(UserError) as error:
        use(decoder)
    assert sentence in str(error.value) and len(str(error.value)) < 400


def test_transcripts():
    """What a model wrote stays, and what its tokens do not spell is spelled anew."""
    names = chats.NAMES.index
    tokenizer = chats.tokenizer()
    chat = conversation.Transcript(tokenizer, conversation_bytes())
    chat = chat.encode("<u>ab</s><b>")
    assert chat.ids == [names(x) for x in ("<u>", "ab", "</s>", "<b>")]
    chat = chat.answered([names("a"), names("b"), names("</s>")])
    longer = chat.encode("<u>ab</s><b>ab</s><u>cd</s><b>")
    assert longer.ids[: len(chat.ids)] == chat.ids
    assert longer.ids[len(chat.ids) :] == [names(x) for x in ("<u>", "cd", "</s>", "<b>")]
    assert chat.begins("<u>ab</s><b>ab") and not chat.begins("<u>ab</s><b> ab</s>")
    other = chat.encode("<u>ab</s><b>cd</s>")  # an answer that was changed
    assert other.ids == [*chat.ids[:4], names("cd"), names("</s>")]
    assert chat.encode("<u>cd").ids == [names("<u>"), names("cd")]
    assert np.array_equal(longer.encode("<u>ab</s><b>ab</s><u>cd").ids[:7], chat.ids)


def conversation_bytes():
    from jax_specdec.text.token_bytes import TokenBytes

    return TokenBytes(chats.tokenizer())
