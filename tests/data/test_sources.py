"""Files -> rows with their places: every suffix, every broken file, weights."""

from __future__ import annotations

import csv
import gzip
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from alignkit.data.report import DataReport
from alignkit.data.sources import load_source, mix_rows, mix_sources
from alignkit.errors import DataError
from alignkit.recipe.rows import SourceSpec

ROWS: list[dict[str, Any]] = [
    {"prompt": "Zähle bis zwei,\nbitte", "answer": 'eins, "zwei"'},
    {"prompt": "3", "answer": "drei"},
    {"prompt": "4", "answer": "vier 🙂"},
]


@pytest.fixture(autouse=True)
def _in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write_rows(name: str) -> None:
    path = Path(name)
    if name.endswith(".parquet"):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    elif name.endswith(".csv"):
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["prompt", "answer"])
            writer.writeheader()
            writer.writerows(ROWS)
    else:
        if ".jsonl" in name:
            text = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS) + "\n"
        else:
            text = json.dumps(ROWS, indent=1)
        content = text.encode()
        path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)


def failure(name: str, content: str | bytes, **spec: Any) -> str:
    raw = content.encode() if isinstance(content, str) else content
    Path(name).write_bytes(raw)
    with pytest.raises(DataError) as caught:
        _ = load_source(SourceSpec(path=name, **spec)).rows
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "places"),
    [
        ("r.jsonl", ["r.jsonl:1", "r.jsonl:2", "r.jsonl:3"]),
        ("r.jsonl.gz", ["r.jsonl.gz:1", "r.jsonl.gz:2", "r.jsonl.gz:3"]),
        ("R.JSONL", ["R.JSONL:1", "R.JSONL:2", "R.JSONL:3"]),
        ("r.json", ["r.json:2", "r.json:6", "r.json:10"]),  # indent=1: four lines a row
        ("r.json.gz", ["r.json.gz:2", "r.json.gz:6", "r.json.gz:10"]),
        ("r.csv", ["r.csv:2", "r.csv:4", "r.csv:5"]),  # the first row holds a line break
        ("r.parquet", ["r.parquet row 1", "r.parquet row 2", "r.parquet row 3"]),
    ],
)
@pytest.mark.parametrize("take", [None, 2, 9])
def test_every_suffix(name: str, places: list[str], take: int | None) -> None:
    write_rows(name.lower())
    Path(name.lower()).rename(name)
    source = load_source(SourceSpec(path=name, take=take))
    assert [row.values for row in source.rows] == ROWS[:take]
    assert [row.place for row in source.rows] == places[:take]


def test_byte_order_mark_blank_lines_and_windows_line_ends() -> None:
    Path("r.jsonl").write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\r\n   \r\n{"a": 2}\r\n')
    rows = load_source(SourceSpec(path="r.jsonl")).rows
    assert [(row.values, row.place) for row in rows] == [
        ({"a": 1}, "r.jsonl:1"),
        ({"a": 2}, "r.jsonl:4"),
    ]


def test_lines_of_csv_rows_after_blank_lines_and_long_headers() -> None:
    Path("r.csv").write_text('a,"b\nb"\n\n1,2\n\n"x\ny\nz",4\n5,6\n', encoding="utf-8")
    rows = load_source(SourceSpec(path="r.csv")).rows
    assert [row.place for row in rows] == ["r.csv:4", "r.csv:6", "r.csv:9"]


def test_lines_end_only_at_line_breaks() -> None:
    # U+2028 and form feeds are line ends for str.splitlines, not for JSON lines.
    Path("r.jsonl").write_text('{"a": "x\u2028y\x85z"}\n{"a": "w"}\n', encoding="utf-8")
    assert [row.place for row in load_source(SourceSpec(path="r.jsonl")).rows] == [
        "r.jsonl:1",
        "r.jsonl:2",
    ]


def test_take_reads_no_further() -> None:
    Path("r.jsonl").write_text('{"a": 1}\nbroken\n', encoding="utf-8")
    assert len(load_source(SourceSpec(path="r.jsonl", take=1)).rows) == 1


def test_a_json_file_may_hold_json_lines() -> None:
    Path("r.json").write_text('{"a": 1}\n{"a": 2}\n', encoding="utf-8")
    rows = load_source(SourceSpec(path="r.json")).rows
    assert [row.place for row in rows] == ["r.json:1", "r.json:2"]


def test_lines_of_rows_in_a_json_list() -> None:
    Path("r.json").write_text('\n[ {"a": "x\\ny"}, {"a":\n\n2},\n\n  {"a": 3}]\n', encoding="utf-8")
    rows = load_source(SourceSpec(path="r.json")).rows
    assert [row.place for row in rows] == ["r.json:2", "r.json:2", "r.json:6"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "r.jsonl",
            '{"a": 1}\n' * 6 + '{"a": }\n',
            "r.jsonl:7: is not valid JSON: Expecting value at column 7\n"
            "hint: a .jsonl file holds one whole JSON object on each line",
        ),
        (
            "r.jsonl",
            '{"a": 1}\n["a"]\n',
            "r.jsonl:2: a row must be a JSON object, got list\n"
            'hint: as in {"messages": [...]}; see data_templates/formats for every row format',
        ),
        (
            "r.json",
            '[\n{"a": 1},\n{"a": }\n]',
            "r.json:3: is not valid JSON: Expecting value at column 7\n"
            "hint: the list must close with ] and its rows be separated by commas",
        ),
        (
            "r.json",
            '[\n{"a": 1},\n{"a": 2}\n',
            "r.json:4: is not valid JSON: Expecting ',' delimiter at column 1\n"
            "hint: the list must close with ] and its rows be separated by commas",
        ),
        (
            "r.json",
            '[\n{"a": 1},\n{"a": 2}]\n[{"a": 3}]\n',
            "r.json:4: text follows the end of the list\n"
            "hint: a .json file holds one list; join the lists, or write .jsonl",
        ),
        (
            "r.json",
            '{"a": 1}',
            "r.json:1: a .json file must hold a list of rows, but starts with '{'\n"
            "hint: one object per line belongs in a .jsonl file",
        ),
        (
            "r.json",
            "[1]",
            "r.json:1: a row must be a JSON object, got int\n"
            'hint: as in {"messages": [...]}; see data_templates/formats for every row format',
        ),
        (
            "r.json",
            '[{"a": 1} {"a": 2}]',
            "r.json:1: is not valid JSON: Expecting ',' delimiter at column 11\n"
            "hint: the list must close with ] and its rows be separated by commas",
        ),
        (
            "r.json",
            '[{"a": 1},, {"a": 2}]',
            "r.json:1: is not valid JSON: Expecting value at column 11\n"
            "hint: the list must close with ] and its rows be separated by commas",
        ),
        (
            "r.jsonl",
            '{"a": 1}\n{"b": ' + "[" * 30_000 + "]" * 30_000 + "}",
            "r.jsonl:2: is nested too deeply\nhint: remove what nests, or the row",
        ),
        (
            "r.json",
            '[\n{"b": ' + "7" * 5000 + "}]",
            "r.json:2: holds a number with more digits than can be read\n"
            "hint: write such a number as text, in double quotes",
        ),
        (
            "r.jsonl",
            '{"a": 1}\n{"b": {"c": 1, "a": 2, "c": 3}}\n',
            "r.jsonl:2: has the key 'c' twice\nhint: remove one of them",
        ),
        (
            "r.json",
            '[\n{"a": 1},\n{"a": 2, "a": 2}]',
            "r.json:3: has the key 'a' twice\nhint: remove one of them",
        ),
        (
            "r.jsonl",
            '{"a": [{"b": "smile \\ud83d please"}]}',
            "r.jsonl:1: holds half of a character, as a cut-off emoji leaves it: "
            "'smile \\ud83d please'\nhint: write the whole character, or remove the half",
        ),
        (
            "r.jsonl",
            '{"a": 1}\n'.encode("utf-16"),
            "r.jsonl: is UTF-16 text, and rows are UTF-8\n"
            "hint: convert it: iconv -f utf-16 -t utf-8 old > new",
        ),
        (
            "r.csv",
            "a,a\n1,2\n",
            "r.csv:1: the header has 'a' twice\nhint: rename one of the columns",
        ),
        (
            "r.csv",
            "a,b\n1,2\n3\n",
            "r.csv:3: does not have the header's 2 columns\n"
            'hint: quote a field that holds commas or line breaks: "like, this"',
        ),
        (
            "r.csv",
            "a,b\n1,2,3\n",
            "r.csv:2: does not have the header's 2 columns\n"
            'hint: quote a field that holds commas or line breaks: "like, this"',
        ),
        (
            "r.csv",
            "a,b\n1,2\n" + "x" * 131073 + ",3\n",
            "r.csv:3: is not valid CSV: field larger than field limit (131072)\n"
            "hint: close every quote, or write .jsonl, which has no such limits",
        ),
        ("r.csv", "a,b\n", "r.csv: holds no rows\nhint: check the path and the split"),
        ("r.json", "[]", "r.json: holds no rows\nhint: check the path and the split"),
        (
            "r.jsonl",
            "",
            "r.jsonl: the file is empty\nhint: every source needs at least one row",
        ),
        (
            "r.json",
            "\n \n",
            "r.json: the file is empty\nhint: every source needs at least one row",
        ),
        (
            "r.json",
            b"\xef\xbb\xbf\n",  # nothing but a byte order mark
            "r.json: the file is empty\nhint: every source needs at least one row",
        ),
        (
            "r.json.gz",
            gzip.compress(b"\n", mtime=0),
            "r.json.gz: the file is empty\nhint: every source needs at least one row",
        ),
        (
            "r.jsonl",
            '{"a": 1}\n{"a": "Zürich"}\n'.encode("latin-1"),
            "r.jsonl:2: is not UTF-8 text (byte 0xfc)\n"
            "hint: convert it: alignkit data convert --encoding cp1252, "
            "or iconv -f cp1252 -t utf-8",
        ),
        (
            "r.jsonl",
            gzip.compress(b'{"a": 1}\n', mtime=0),
            "r.jsonl: is a gzip file, not text\n"
            "hint: unpack or convert it; only a file whose name ends in .gz is unpacked",
        ),
        (
            "r.csv",
            b"PK\x03\x04" + bytes(30),
            "r.csv: is a zip file or a spreadsheet, not text\n"
            "hint: unpack or convert it; only a file whose name ends in .gz is unpacked",
        ),
        (
            "r.jsonl.gz",
            b'{"a": 1}\n',
            "r.jsonl.gz: is not an intact gzip file (Not a gzipped file (b'{\"'))\n"
            "hint: download it again",
        ),
        (
            "r.jsonl.gz",
            gzip.compress(b'{"a": 1}\n' * 100, mtime=0)[:-20],
            "r.jsonl.gz: is not an intact gzip file (Compressed file ended before the end-of-"
            "stream marker was reached)\nhint: download it again",
        ),
        (
            "r.jsonl.gz",
            gzip.compress(b'{"a": 1}\n', mtime=0)[:10] + b"\xff" * 30,
            "r.jsonl.gz: is not an intact gzip file (Error -3 while decompressing data: invalid "
            "block type)\nhint: download it again",
        ),
        (
            "r.txt",
            "a",
            "r.txt: a .txt file is not one of .json, .jsonl, .jsonl.gz, .json.gz, .parquet, .csv\n"
            "hint: convert the file; one JSON object per line (.jsonl) is the simplest",
        ),
        (
            "rows",
            "a",
            "rows: a nameless file is not one of "
            ".json, .jsonl, .jsonl.gz, .json.gz, .parquet, .csv\n"
            "hint: convert the file; one JSON object per line (.jsonl) is the simplest",
        ),
    ],
    ids=[
        "broken line",
        "list in a line",
        "broken row",
        "open list",
        "two lists",
        "object",
        "number in a list",
        "no comma",
        "two commas",
        "deep",
        "digits",
        "key twice",
        "key twice in a list",
        "surrogate",
        "utf-16",
        "two columns of one name",
        "short csv row",
        "long csv row",
        "huge csv field",
        "csv header only",
        "empty list",
        "empty",
        "blank",
        "byte order mark only",
        "empty gzip",
        "latin-1",
        "gzip without its suffix",
        "spreadsheet",
        "no gzip",
        "cut gzip",
        "rubbish after a good gzip header",
        "other suffix",
        "no suffix",
    ],
)
def test_broken_files(name: str, content: str | bytes, message: str) -> None:
    assert failure(name, content) == message


def test_a_broken_parquet_file() -> None:
    assert failure("r.parquet", b"PAR1 and nothing else").startswith(
        "r.parquet: is not a readable parquet file: "
    )


def test_a_parquet_text_that_is_not_utf8() -> None:
    column = pyarrow.array([b"a", b"\xff"]).cast(pyarrow.binary()).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), "r.parquet")
    with pytest.raises(DataError, match=r"r\.parquet row 2: is not UTF-8 text"):
        _ = load_source(SourceSpec(path="r.parquet")).rows


def test_a_small_file_that_unpacks_to_more_than_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    class Memory:
        available = 40_000_000

    monkeypatch.setattr("alignkit.data.files.content.psutil.virtual_memory", Memory)
    assert failure("r.jsonl.gz", gzip.compress(b"\n" * 20_000_000)) == (
        "r.jsonl.gz: unpacks to more than 10 MB, whose rows would not fit in memory\n"
        "hint: split the file, and name the parts that are used"
    )


@pytest.mark.parametrize("name", ["-", "/dev/null"])
def test_rows_come_from_files_only(name: str) -> None:
    with pytest.raises(DataError, match="cannot come from standard input or a pipe"):
        load_source(SourceSpec(path=name))


def test_weights_that_would_fill_memory() -> None:
    with pytest.raises(DataError, match=r"the weights make an epoch of .* rows, more than"):
        mix_sources([SourceSpec(path="a.jsonl", weight=1e4)], [10_000], 0, DataReport())


def test_no_such_file() -> None:
    with pytest.raises(DataError) as caught:
        load_source(SourceSpec(path="gone.jsonl"))
    assert str(caught.value) == "gone.jsonl: no such file\nhint: paths are relative to the recipe"


# columns -------------------------------------------------------------------------------------


def test_columns_rename_and_may_swap() -> None:
    Path("r.jsonl").write_text('{"q": "Q", "a": "A", "n": 1}\n', encoding="utf-8")
    columns = {"prompt": "q", "completion": "a"}
    (row,) = load_source(SourceSpec(path="r.jsonl", columns=columns)).rows
    assert row.values == {"n": 1, "prompt": "Q", "completion": "A"}
    (row,) = load_source(SourceSpec(path="r.jsonl", columns={"q": "a", "a": "q"})).rows
    assert row.values == {"n": 1, "q": "A", "a": "Q"}


def test_a_column_that_a_later_row_lacks() -> None:
    rows = '{"q": 1, "a": 2}\n{"q": 1, "b": 2}\n'
    assert failure("r.jsonl", rows, columns={"completion": "a"}) == (
        "r.jsonl:2: columns names 'a', which the row does not have\nhint: the row's columns: q, b"
    )


# fingerprints --------------------------------------------------------------------------------


def test_the_fingerprint_is_of_the_content() -> None:
    write_rows("a.jsonl")
    write_rows("b.jsonl")
    first = load_source(SourceSpec(path="a.jsonl")).fingerprint
    assert load_source(SourceSpec(path="b.jsonl")).fingerprint == first
    with Path("b.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"prompt": "5", "answer": "x"}\n')
    assert load_source(SourceSpec(path="b.jsonl")).fingerprint != first
    assert re.fullmatch("[0-9a-f]{64}", first)


# weights -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "weight", "often", "drawn"),
    [
        # count · weight = often times every row, and `drawn` rows once more
        (10, 1.0, 1, 0),
        (10, 3.0, 3, 0),
        (10, 2.5, 2, 5),
        (10, 0.3, 0, 3),
        (7, 1.4, 1, 3),  # round(2.8)
    ],
)
def test_weights_give_exact_counts(count: int, weight: float, often: int, drawn: int) -> None:
    order = mix_rows([count], [weight], seed=0)
    assert len(order) == count * often + drawn
    times = [order.tolist().count(row) for row in range(count)]
    assert sorted(times) == [often] * (count - drawn) + [often + 1] * drawn
    assert order.dtype == np.int64


def test_sources_follow_each_other_with_running_indices() -> None:
    assert mix_rows([2, 3], [1.0, 2.0], seed=0).tolist() == [0, 1, 2, 3, 4, 2, 3, 4]


def test_the_draw_depends_on_the_seed_and_nothing_else() -> None:
    def half(seed: int) -> list[int]:
        return mix_rows([50, 50], [0.5, 0.5], seed).tolist()

    assert half(1) == half(1)
    assert half(1) != half(2)
    first, second = half(1)[:25], [row - 50 for row in half(1)[25:]]
    assert first != second  # each source draws for itself
    assert mix_rows([50, 9], [0.5, 3.0], 1).tolist()[:25] == half(1)[:25]
