"""What cannot be seen is named, what is too long is cut and said, and nothing else is touched."""

import pytest

from gradvar.report.text import one_line, shown


def plain(text, most=1000):
    return "".join(f"[{piece.text}]" if piece.hidden else piece.text for piece in shown(text, most).pieces)


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("plain\ttext\nÄ 漢字 עברית <b>&amp;", "plain\ttext\nÄ 漢字 עברית <b>&amp;"),
        ("a\x00b\x1b[31m\r\x7f\x85", "a[U+0000]b[U+001B][31m[U+000D][U+007F][U+0085]"),
        ("\u202eabc\u202c\u200f\u2066x\u2069", "[U+202E]abc[U+202C][U+200F][U+2066]x[U+2069]"),
        ("zero\u200bwidth\ufeff\u00ad", "zero[U+200B]width[U+FEFF][U+00AD]"),
        ("\ud800\uffff\U000e0041", "[U+D800][U+FFFF][U+E0041]"),
        ("", ""),
    ],
)
def test_unseen_characters_are_named(text, seen):
    assert plain(text) == seen


def test_long_text_keeps_both_ends_and_says_what_is_gone():
    text = "a" * 500 + "b" * 99_000 + "the answer is 42"
    cut = shown(text, 300)
    assert cut.length == len(text)
    assert cut.left_out == len(text) - 300
    words = plain(text, 300)
    assert words.startswith("a" * 200)
    assert words.endswith("the answer is 42")
    assert f"{len(text) - 300} of {len(text)} characters left out" in words


def test_text_of_just_the_limit_is_whole():
    assert shown("x" * 300, 300).left_out == 0


def test_names_stand_on_one_line():
    assert one_line("a\nb\u202e") == "a b⟨U+202E⟩"
