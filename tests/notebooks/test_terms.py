"""The book's terms: each set in bold where it is explained, which is where the book first uses it."""

import re

import pytest

from website import notebooks

BOOK = [source for source in notebooks.sources() if source.parent.name == "book"]
BOLD = re.compile(r"\*\*(.+?)\*\*", flags=re.S)


def prose(markdown: str) -> str:
    """The sentences of a markdown cell: no headings, code, formulas, addresses or solutions."""
    text = re.sub(r"<details>.*?</details>|```.*?```", " ", markdown, flags=re.S)
    text = re.sub(r"^#+ .*$", " ", text, flags=re.M)  # they say what will be explained
    text = re.sub(r"`[^`]*`|\$[^$]*\$|\]\([^)]*\)|<[^>]+>", " ", text)
    return " ".join(text.split())


def pattern(term: str) -> re.Pattern:
    """A term as a word or words of its own, in any case, in the singular or the plural."""
    *words, last = map(re.escape, term.lower().split())
    last = last if last.endswith("ss") else re.sub(r"ies$", "y", last).removesuffix("s")
    plural = rf"{last[:-1]}(?:y|ies)" if last.endswith("y") else rf"{last}(?:s|es)?"
    return re.compile(rf"(?<![\w-]){' '.join([*words, plural])}(?![\w-])", flags=re.I)


def used_too_early(texts: list[tuple[str, str]]) -> list[str]:
    """Terms that the texts, each with its name, use before they set them in bold, or set in bold twice."""
    found: list[str] = []
    explained: dict[str, str] = {}
    for number, (name, text) in enumerate(texts):
        for bold in BOLD.finditer(text):
            term = bold[1].rstrip(".,:;").lower()
            if term in explained:
                found.append(f"{name}: {term} was explained in {explained[term]} already")
            for place, earlier in [*texts[:number], (name, text[: bold.start()])]:
                # A term whose name has this one in it may come first: a KV cache before caches in general.
                longer = [other for other in explained if other != term and pattern(term).search(other)]
                plain = BOLD.sub("...", earlier)
                for other in longer:
                    plain = pattern(other).sub("...", plain)
                if term not in explained and (use := pattern(term).search(plain)):
                    context = plain[max(0, use.start() - 30) : use.end() + 30]
                    found.append(f"{place}: '{context}' uses {term}, which {name} explains")
                    break
            explained.setdefault(term, name)
    return found


def test_no_term_is_used_before_it_is_explained() -> None:
    texts = [
        (source.stem, prose(cell.source))
        for source in BOOK
        for cell in notebooks.read(source).cells
        if cell.cell_type == "markdown"
    ]
    assert sum(len(BOLD.findall(text)) for _, text in texts) > 30, "no terms were found: this checked nothing"
    assert used_too_early(texts) == []


@pytest.mark.parametrize(
    "texts",
    [
        ["The cache is full.", "A **cache** keeps."],
        ["Two caches. A **cache** keeps."],
        ["Heads. One **head** reads."],
        ["A query reads. Many **queries** read."],
        ["A **cache** keeps.", "A **cache** again."],
        ["The KV cache. The **KV cache** keeps."],
        ["The loss, and losses. The **loss** falls."],
        ["The cache. A **KV cache** and a **cache**."],
    ],
)
def test_a_term_that_comes_too_early_is_found(texts: list[str]) -> None:
    assert len(used_too_early([(str(number), prose(text)) for number, text in enumerate(texts)])) == 1


@pytest.mark.parametrize(
    "texts",
    [
        ["`cache` and a cached thing, an over-head. A **cache** keeps, a **head** reads. The cache, heads."],
        ["## The cache\n\nA **cache** keeps. <details>cache</details>"],
        ["**Grouped-query attention** and **attention**."],
        ["The **KV cache**; the KV cache. A **cache** keeps."],
    ],
)
def test_terms_in_order_pass(texts: list[str]) -> None:
    assert used_too_early([(str(number), prose(text)) for number, text in enumerate(texts)]) == []
