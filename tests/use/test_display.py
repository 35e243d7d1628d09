"""What people see of answers, decoders and models."""

from html.parser import HTMLParser

import pytest

from jax_specdec import display
from jax_specdec.generation import Generation, Stats

TEXTS = ["The <b>", " cat", "", " & dog"]
SOURCES = ["lm", "lm", None, "max-gram"]


@pytest.fixture
def answer():
    stats = Stats(
        4, 2, 6, 3, 0.5, 2.0, [1, 1], {"lm": {}, "max-gram": {}}, 0.5, 0.1, 0.0, 8.0, None
    )
    return Generation(
        0,
        "Hi",
        "".join(TEXTS),
        [3, 4, 5, 6],
        "stop",
        stats,
        [-0.5, -1, -2, -0.25],
        None,
        SOURCES,
        TEXTS,
    )


def test_repr_is_short(answer):
    assert repr(answer) == "Generation('The <b> cat & dog', 4 tokens, stop, tau 2.00, 8 tokens/s)"
    assert str(answer) == "The <b> cat & dog"
    assert answer.tokens.tolist() == [3, 4, 5, 6] and answer.tokens.dtype == "int32"


def test_table(answer):
    table = answer.table()
    assert len(table) == 4 and table.columns == (
        "position",
        "token_id",
        "text",
        "source",
        "logprob",
    )
    assert table[1] == {"position": 1, "token_id": 4, "text": " cat", "source": "lm", "logprob": -1}
    assert [row["source"] for row in table] == ["lm", "lm", "target", "max-gram"]
    lines = repr(table[:2]).splitlines()
    assert len(lines) == 4 and "' cat'" in lines[3] and "The <b>" in lines[2]
    assert "<td>The &lt;b&gt;</td>" in table._repr_html_()


def test_a_long_table_is_cut():
    table = display.Table([{"position": i} for i in range(100)])
    assert repr(table).splitlines()[-1].strip() == f"... {100 - display.MOST_ROWS} more"
    assert len(table) == 100


def test_a_table_is_a_data_frame(answer):
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(answer.table())
    assert list(frame.columns) == list(answer.table().columns) and frame["logprob"].sum() == -3.75


class Checker(HTMLParser):
    """Counts tags that are open, and collects the text."""

    def __init__(self):
        super().__init__()
        self.open, self.text = [], ""

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_html_is_the_text_in_colours(answer):
    html = answer._repr_html_()
    checker = Checker()
    checker.feed(html)
    assert not checker.open and "Hi" + answer.text in checker.text and "<b>" not in html
    first, second = display.COLOURS[:2]
    assert f'<span style="background:rgba({first},.3)" title="lm">The &lt;b&gt; cat</span>' in html
    assert f'<span style="background:rgba({second},.3)" title="max-gram"> &amp; dog</span>' in html
    for figure in ("tokens a pass (tau)", "2.00", "50%", "stop"):
        assert f">{figure}<" in html
    # Text in the page's own colour on colours that let the page through: light or dark.
    assert "color:#" not in html and "color:black" not in html


def test_html_without_a_tokenizer_or_a_drafter():
    stats = Stats(1, 1, 0, 0, 0.0, 1.0, [], {}, 0.5, 0.1, 0.0, 2.0, None)
    answer = Generation(0, [5], "", [3], "length", stats, None, None, [None])
    assert "proposed by" not in answer._repr_html_()
    assert answer.table()[0] == {"position": 0, "token_id": 3, "text": "", "source": "target"}
