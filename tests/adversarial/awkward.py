"""Awkward texts, and requests made of them."""

from __future__ import annotations

from hypothesis import strategies as st

from fastmemit.request import EditRequest
from tiny_tokenizers import BOS, EOS, PAD, UNK

SCIENTIST = "👩🏽‍🔬"  # woman, skin tone, joiner, microscope: four code points, 15 bytes
FLAG = "🏴󠁧󠁢󠁳󠁣󠁴󠁿"  # a flag spelled in invisible tags
ZALGO = "Z̸̡͎a̵̛͘l̷͔̕g̶͓̈́o"  # combining marks upon marks
RTL = "ירושלים"
BIDI = "\u202eabc\u202c"  # written backwards by an override
ZERO_WIDTH = "Eif\u200bfel\u200d To\u2060wer\ufeff"
CONTROL = "a\x00b\x1b[31mc\x7f"

SUBJECTS = (
    "Eiffel Tower", SCIENTIST, FLAG, f"Dr. {SCIENTIST} Curie", ZALGO, RTL, f"{RTL} and الجزائر",
    BIDI, ZERO_WIDTH, "\u200b", "\ufeff", "e\u0301", "\u0301", CONTROL, "{}", "a{}b", "{", "{0}",
    "%s", "$HOME", "\\n", "is", " Paris", "Paris ", " the \t city\n", "\n.", "x" * 60, "東京都",
    "ﷺ", "İstanbul", "ß", "\U0010ffff", "½", "the capital of the capital", "Rome", BOS,
    f"the {EOS} end", UNK, "▁", "Ġ", "<0x41>", "\x85x", "a\u2028b", "“”",
)  # fmt: skip
PROMPTS = (
    "{} is located in the city of",
    "{}",
    "The capital of {}",
    "The city of {}, the capital: {{x}} {0} {name}",
    '{"fact": {"subject": "{}", "city":',
    "{{}}",
    "{}{",
    "}{}",
    "  {} \n",
    "\t{}\r\n",
    f"{RTL} {{}} {RTL}",
    f"{SCIENTIST}{{}}{SCIENTIST}",
    "\u200b{}\u200b",
    "Paris Paris {} Paris Rome",
    "e{}\u0301",
    "%d {} %s",
    f"{BOS}{{}} is",
)
TARGETS = (
    "Rome", " Rome", "Rome ", "a b c d e f g", SCIENTIST, RTL, ZALGO, "\u200b", "\u0301", "{}",
    "{0}", CONTROL, "\n.", "Eiffel Tower", "東京", "?", "\ufeffx", EOS, "▁x", "x" * 80,
)  # fmt: skip

characters = st.one_of(
    st.sampled_from("The city of Paris.,  \n\t{}🙂é日א\u200b\u200d\u0301\u202e\x00"),
    st.sampled_from(("{}", SCIENTIST, FLAG, RTL, "is", "Rome", PAD)),
    st.characters(exclude_categories=["Cs"]),
)
texts = st.lists(characters, min_size=0, max_size=12).map("".join)


@st.composite
def requests(draw: st.DrawFn) -> EditRequest:
    """Any request that may be written down: one hole, a subject and a target of some characters."""
    prompt = st.one_of(
        st.sampled_from(PROMPTS),
        st.tuples(texts, texts)
        .map(lambda parts: parts[0] + "{}" + parts[1])
        .filter(lambda text: text.count("{}") == 1),
    )
    filled = texts.filter(str.strip)
    return EditRequest(
        draw(prompt),
        draw(st.one_of(st.sampled_from(SUBJECTS), filled)),
        draw(st.one_of(st.sampled_from(TARGETS), filled)),
    )
