"""Filters of clean that must be named: poor text, lengths, languages, further personal data."""

from __future__ import annotations

import json
import random
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from commandline import CommandLine
from planted import sentence
from running import write_rows

from alignkit.curation import quality
from alignkit.curation.check import CheckOptions, check_files
from alignkit.curation.clean import PRESETS, CleanOptions, clean_files, mask, side_of
from alignkit.curation.languages import known_languages, language_of
from alignkit.curation.recognizers import with_entities
from alignkit.curation.records import Record
from alignkit.errors import DataError

PROSE = "The river of the valley and the bridge have to be measured with care. " * 2
POOR = {
    "symbols": "word # " * 12,
    "bullets": "- a thing\n" * 6,
    "ellipses": "It goes on and on ...\n" * 5,
    "letters": "12 + 13 = 25 and " * 5,
    "word-length": "a b c d " * 13,
    "lines": "One line of it.\n" * 3 + "Another.\nA third.\nAnother.\n",
    "stop-words": "river valley bridge train " * 5,
    "repetition": "round and round it goes " * 8,
}
FINE = {
    "symbols": "word # " + "word " * 20,
    "bullets": "- a thing\n" * 9 + "prose\n" * 2,
    "ellipses": "It goes on ...\n" + "It ends.\n" * 4,
    "letters": "the sum of 12 and 13 is 25 as one can easily see here on the page of it all",
    "word-length": PROSE * 2,
    "lines": "\n".join(f"Line {number}." for number in range(9)),
    "stop-words": PROSE,
    "repetition": " ".join(f"word{number}" for number in range(40)),
}


def kept_of(folder: Path, answers: list[str], **options: Any) -> tuple[list[str], list[str]]:
    """Answers that stay, and why the others go."""
    rows = [{"prompt": f"q{number}", "completion": text} for number, text in enumerate(answers)]
    source = str(write_rows(folder / "rows.jsonl", rows))
    clean_files([source], folder / "out.jsonl", CleanOptions(**options))
    read = [(folder / "out.jsonl"), side_of(folder / "out.jsonl")]
    out, gone = ([json.loads(x) for x in path.read_text("utf-8").splitlines()] for path in read)
    return [one["completion"] for one in out], [one["reason"] for one in gone]


@pytest.mark.parametrize("name", POOR)
def test_a_filter_takes_what_it_is_named_for(name: str, tmp_path: Path) -> None:
    kept, reasons = kept_of(tmp_path, [FINE[name], POOR[name], "Short."], drop=[name])
    assert kept == [FINE[name], "Short."]
    assert reasons == [name]


def test_shares_by_hand() -> None:
    assert quality.symbols("a # b … " * 10) == 0.5  # 20 marks for 40 words, marks among them
    assert quality.bullets("- a\n* b\n• c\nd\n\n- e") == 0.8
    assert quality.ellipses("a…\nb...\nc\nd\ne") == 0.4
    assert quality.lettered("1 2 3 a " * 5) == 0.25
    assert quality.word_length("ab abcd " * 25) == 3.0
    assert quality.repeated_lines("a\na\na\nb\nc") == pytest.approx(0.4)
    assert quality.repetition("a b c d " * 5) == pytest.approx(1 - 4 / 17)
    few = "a # … "
    assert (quality.symbols(few), quality.lettered(few), quality.word_length(few)) == (0, 1, None)


def test_lengths(tmp_path: Path) -> None:
    answers = ["one two", "one two three", "one two three four"]
    kept, reasons = kept_of(tmp_path, answers, least=3, most=3)
    assert kept == answers[1:2]
    assert reasons == ["length", "length"]


def test_the_filters_of_gopher(alignkit: CommandLine, tmp_path: Path) -> None:
    rng = random.Random(0)
    long = " ".join(sentence(rng, 9) + " and so it is to be." for _ in range(6))
    rows = [{"text": long}, {"text": sentence(rng, 9)}, {"text": "river valley bridge " * 30}]
    write_rows(tmp_path / "rows.jsonl", rows)
    command = ["data", "clean", "rows.jsonl", "-o", "out.jsonl", "--preset", "gopher"]
    done = alignkit(*command, cwd=tmp_path)
    assert done.code == 0, done.stderr
    assert f"preset gopher: {PRESETS['gopher'].line()}" in " ".join(done.stderr.split())
    assert "answers of 50 to 100,000 words stay" in PRESETS["gopher"].line()
    assert json.loads((tmp_path / "out.jsonl").read_text(encoding="utf-8")) == rows[0]


def test_languages(tmp_path: Path) -> None:
    german = "Der Zug fährt heute leider nicht, weil die Brücke noch immer gesperrt ist."
    french = "Le train ne part pas ce matin parce que le pont est encore fermé aux voyageurs."
    kept, reasons = kept_of(
        tmp_path, [PROSE, german, french, "Ja."], kept=("en", "fr"), language=language_of
    )
    assert kept == [PROSE, french, "Ja."]  # too short to tell
    assert reasons == ["language"]
    assert known_languages(["de"]) == ["de"]
    with pytest.raises(DataError, match="--language german is not known"):
        known_languages(["german"])


def test_entities_of_presidio() -> None:
    pytest.importorskip("presidio_analyzer")
    recognize = with_entities(["UK_NHS", "US_NPI"])
    text = "NHS 943 476 5919, not 943 476 5918; write to a@b.org"  # a check digit, and a wrong one
    assert mask(text, recognize)[0] == "NHS [UK_NHS], not 943 476 5918; write to [EMAIL]".replace(
        "UK_NHS", "UK NHS"
    )
    with pytest.raises(DataError, match="--entity NOTHING is not known"):
        with_entities(["NOTHING"])
    with pytest.raises(DataError, match="--entity URL is not known"):  # it asks the network
        with_entities(["URL"])


def test_without_presidio(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "presidio_analyzer", None)
    with pytest.raises(DataError, match="needs the package presidio-analyzer") as caught:
        with_entities(["UK_NHS"])
    assert caught.value.hint == "pip install 'alignkit[pii]', or leave out --entity"


def test_one_row_at_a_time_is_in_memory(tmp_path: Path) -> None:
    rows = [{"prompt": f"q{n}", "completion": f"answer {n}"} for n in range(60)]
    path = str(write_rows(tmp_path / "rows.jsonl", rows))
    seen: list[tuple[str, int | None]] = []
    most = 0

    def track(items: Any, what: str, total: int | None) -> Iterator[Any]:
        nonlocal most
        seen.append((what, total))
        known: list[weakref.ref[Record]] = []
        for item in items:
            if isinstance(item, Record):
                known.append(weakref.ref(item))
            yield item
            most = max(most, sum(one() is not None for one in known))

    check_files([path], CheckOptions(near=False, track=track))
    clean_files([path], tmp_path / "out.jsonl", CleanOptions(drop=["equal"], track=track))
    assert [what for what, _ in seen] == ["reading rows", "reading rows", "writing rows"]
    assert seen[-1] == ("writing rows", 60)
    assert 1 <= most <= 3
