"""The shared report page: nothing it is given becomes markup, it needs no network, and the same input gives the same bytes."""

import re
from html.parser import HTMLParser

import pytest

from gpr_dist.html import FAINT, INK, SERIES, Alarm, Details, Mark, Section, Table, Tile, draw, render

EVIL = "<script>alert('x')</script> & \"quotes\""


def paint(axes):
    axes.plot([1, 2, 3], [3, 1, 2], label="a < b & c")
    axes.legend()


def page(text=EVIL):
    parts = [text, Table((text, "number"), [(text, 1), (Mark(text), 2)], "l", caption=text), draw(paint, text), draw(paint, "second"),
             Details(text, [text, Table((text,), [(text,)])])]
    return render(text, text, [Alarm(text, text)], [Tile(text, text, text)], [Section(text, parts)])


class Reader(HTMLParser):
    """Which tags there are, whether they nest, and the text between them."""

    VOID = frozenset({"meta", "br", "path", "use"})

    def __init__(self, text):
        super().__init__()
        self.seen, self.open, self.text, self.ids, self.links = [], [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.seen.append(tag)
        self.ids += [value for name, value in attributes if name == "id"]
        self.links += [value for name, value in attributes if name in ("src", "href", "xlink:href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open and self.open.pop() == tag, tag

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.open.pop()

    def handle_data(self, data):
        self.text.append(data)


def test_every_text_is_escaped_wherever_it_stands():
    read = Reader(page())
    assert "script" not in read.seen and read.open == []
    whole = "".join(read.text)
    assert whole.count(EVIL) >= 12, "each place shows the text as it is"


def test_nothing_is_fetched_and_ids_are_unique():
    read = Reader(page())
    assert all(link.startswith("#") for link in read.links), read.links
    assert set(re.findall(r"https?://[^\"]*", page())) <= {"http://www.w3.org/1999/xlink", "http://www.w3.org/2000/svg"}, "names of formats"
    assert "@import" not in page() and not re.search(r"url\((?!#)", page())
    assert len(read.ids) == len(set(read.ids)), "drawings must not use each other's clip paths"


def test_the_same_input_gives_the_same_bytes_and_other_input_others():
    assert page() == page() != page("other")


def test_drawings_have_the_colours_of_the_page():
    svg = draw(paint, "caption").svg
    assert "var(--series-1)" in svg and "var(--ink)" in svg
    assert not any(colour in svg for colour in (*SERIES, INK, FAINT))
    assert "<text" in svg and "a &lt; b &amp; c" in svg


def test_alarms_come_first_and_their_absence_is_said():
    with_alarm = page()
    assert with_alarm.index('role="alert"') < with_alarm.index('class="tiles"')
    clear = render("t", "s", [], [], [], "All is well.")
    assert "All is well." in clear and 'role="alert"' not in clear


def test_a_row_of_another_length_is_our_own_mistake():
    with pytest.raises(AssertionError):
        Table(("a", "b"), [(1,)])
