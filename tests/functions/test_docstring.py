"""What is read out of docstrings of the three styles, whole and broken."""

import dataclasses
import functools
import inspect
from collections import namedtuple
from typing import Annotated, Any, NamedTuple

import pytest
from hypothesis import given, settings, strategies as st
from pydantic import BaseModel, Field
from pydantic.dataclasses import dataclass as pydantic_dataclass

from fractal import Tool
from fractal._functions.docstring import read_docstring
from fractal.toolkit import ToolOptions


def google(x, y, *rest, **more):  # type: ignore[no-untyped-def]
    """Do a thing.

    It takes a while.

    Args:
        x (int, optional): The x,
            over two lines.
        y: The y: with a colon, and a link http://example.org.
        *rest: What is left.
        **more (str): What is named.

    Returns:
        int: Not for the model's parameters.

    Raises:
        ValueError: Nor this.
    """


def numpy(x, y, z, a, b):  # type: ignore[no-untyped-def]
    """Do a thing.

    It takes a while.

    Parameters
    ----------
    x : int, optional
        The x,
        over two lines.
    y : {'one', 'two'}
        The y.
    z
        The z.
    a, b : float
        Both.

    Returns
    -------
    int
        Not this.
    """


def sphinx(x, y, z):  # type: ignore[no-untyped-def]
    """Do a thing.

    It takes a while.

    :param int x: The x,
        over two lines.
    :param y: The y.
    :type y: str
    :param z: The z.
    :returns: Not this.
    :raises ValueError: Nor this.
    """


SUMMARY = "Do a thing.\n\nIt takes a while."
RETURNS = "\n\nReturns:\n    int: Not for the model's parameters.\n\nRaises:\n    ValueError: Nor this."


def read(function: Any) -> tuple[str, dict[str, tuple[str | None, str | None]]]:
    found = read_docstring(function if isinstance(function, str) else inspect.getdoc(function))
    return found.summary, {name: (text.description, text.type) for name, text in found.parameters.items()}


def test_google_style() -> None:
    assert read(google) == (
        SUMMARY + RETURNS,
        {
            "x": ("The x, over two lines.", "int"),
            "y": ("The y: with a colon, and a link http://example.org.", None),
            "rest": ("What is left.", None),
            "more": ("What is named.", "str"),
        },
    )


def test_numpy_style() -> None:
    summary, parameters = read(numpy)
    _, words_for_y = parameters.pop("y")

    assert summary == SUMMARY + "\n\nReturns\n-------\nint\n    Not this."
    assert "'one'" in (words_for_y or "")
    assert parameters == {
        "x": ("The x, over two lines.", "int"),
        "z": ("The z.", None),
        "a": ("Both.", "float"),
        "b": ("Both.", "float"),
    }


def test_sphinx_style() -> None:
    assert read(sphinx) == (
        SUMMARY + "\n\n:returns: Not this.\n:raises ValueError: Nor this.",
        {"x": ("The x, over two lines.", "int"), "y": ("The y.", "str"), "z": ("The z.", None)},
    )


@pytest.mark.parametrize("docstring", [None, "", "   ", "\n\n"])
def test_no_docstring_says_nothing(docstring: str | None) -> None:
    found = read_docstring(docstring)
    assert (found.summary, found.parameters) == ("", {})


@pytest.mark.parametrize(
    "docstring",
    ["One line.", "Two\nlines.", "A thing: with a colon.", "See http://x.y: it helps.", "Ünï 😀 \x00", "a -- b"],
)
def test_plain_text_is_the_summary_as_it_is(docstring: str) -> None:
    assert read(docstring) == (docstring, {})


def test_indentation_is_taken_away() -> None:
    assert read("One.\n\n        Indented\n          more.\n    ")[0] == "One.\n\nIndented\n  more."


@pytest.mark.parametrize("heading", ["Args", "Arguments", "Params", "Parameters", "Keyword Args", "Other Parameters"])
def test_google_sections_have_several_names(heading: str) -> None:
    assert read(f"Sum.\n\n{heading}:\n    x (bool): The x.\n") == ("Sum.", {"x": ("The x.", "bool")})


PROSE = """Delete a file.

Important:
    Ask the user before you call this.

Path syntax:
    Relative to the home directory; * is not expanded.

Note: it is quick.

Args:
    path: The file.

Warning:
    It cannot be undone.

        Not at all.

.. note:: Nor can this.

Returns:
    Nothing.

Raises:
    OSError: It is not there.

Important::

    Args:
        path: an example of code

```
Args:
    path: another
```

Notes
-----
On Windows: the same.

References
==========
The manual.
"""


def test_prose_reaches_the_model_under_whatever_heading_it_stands() -> None:
    summary, parameters = read(PROSE)
    assert parameters == {"path": ("The file.", None)}
    before, after = PROSE.split("Args:\n    path: The file.\n\n")
    assert summary == (before + after).strip()


@pytest.mark.parametrize(
    "docstring",
    [
        "Sum.\n\nExample:\n    >>> f(1)\n    1\n",
        "Sum.\n\nExamples:\n    Do this:\n\n    >>> f(1)\n\n    And that.\n",
        "Sum.\n\nExamples\n--------\n>>> f(1)\n1\n\nDo this.\n",
        "Sum.\n\n**Example**\n\n    >>> f(1)\n",
    ],
)
def test_examples_are_left_out_and_nothing_after_them(docstring: str) -> None:
    assert read(docstring) == ("Sum.", {})
    more = "Args:\n    x: The x.\n\nLast words:\n    These.\n"
    assert read(docstring + "\n" + more) == ("Sum.\n\nLast words:\n    These.", {"x": ("The x.", None)})


def test_a_word_about_examples_is_no_section_of_them() -> None:
    for docstring in ("Sum.\n\nExample: one.", "Example:\n", "Sum.\n\nAn example:\n    f(1)"):
        assert read(docstring)[0] == docstring.strip()


X_AND_Y = {"x": ("The x, over two lines.", "int"), "y": ("The y.", None)}

SHAPES = {
    "below the summary": "Sum.\nArgs:\n    x (int): The x,\n        over two lines.\n    y: The y.",
    "below two lines": "Sum,\nSum.\nArgs:\n    x (int): The x,\n        over two lines.\n    y: The y.",
    "first": "Args:\n    x (int): The x,\n        over two lines.\n    y: The y.",
    "first on its line": "Args:\n        x (int): The x,\n            over two lines.\n        y: The y.\n    ",
    "first below a line": "\n    Args:\n        x (int): The x,\n            over two lines.\n        y: The y.\n    ",
    "not indented": "Sum.\n\nArgs:\nx (int): The x,\n    over two lines.\ny: The y.\n\nMore.",
    "indented": "Sum.\n\n    Args:\n        x (int): The x,\n            over two lines.\n        y: The y.",
    "a line between": "Sum.\n\nArgs:\n\n    x (int): The x,\n        over two lines.\n\n    y: The y.",
    "two spaces": "Sum.\n\nArgs:\n  x (int): The x,\n    over two lines.\n  y: The y.",
    "tabs": "Sum.\n\nArgs:\n\tx (int): The x,\n\t\tover two lines.\n\ty: The y.",
    "line ends": "Sum.\r\n\r\nArgs:\r\n    x (int): The x,\r\n        over two lines.\r\n    y: The y.\r\n",
    "small": "Sum.\n\nargs :\n    x (int): The x,\n        over two lines.\n    y: The y.",
    "bullets": "Sum.\n\nArgs:\n    - x (int): The x,\n      over two lines.\n    - y: The y.",
    "stars": "Sum.\n\nArgs:\n    * x (int): The x,\n      over two lines.\n    * y: The y.",
    "bullets at the margin": "Sum.\n\nParameters:\n- x (int): The x,\n  over two lines.\n- y: The y.",
    "dashes": "Sum.\n\nArgs:\n    x (int) - The x,\n        over two lines.\n    y -- The y.",
    "code": "Sum.\n\nArgs:\n    `x` (int): The x,\n        over two lines.\n    ``y``: The y.",
    "bold": "Sum.\n\n**Args:**\n    **x** (int): The x,\n        over two lines.\n    *y*: The y.",
    "Markdown": "Sum.\n\n### Parameters\n- x (int): The x,\n  over two lines.\n- y: The y.",
    "names apart": "Sum.\n\nArgs:\n    x (int):\n        The x,\n        over two lines.\n    y\n        The y.",
    "optional": "Sum.\n\nArgs:\n    x (int, optional): The x,\n        over two lines.\n    y (optional): The y.",
    "default": "Sum.\n\nArgs:\n    x (int, default 5): The x,\n        over two lines.\n    y: The y.",
    "type and text": "Sum.\n\nArgs:\n    x : int\n        The x,\n        over two lines.\n    y : The y.",
    "two sections": "Sum.\n\nArgs:\n    x (int): The x,\n        over two lines.\n\nKeyword Args:\n    y: The y.",
    "with prose": "Sum.\n\nArgs:\n    x (int): The x,\n        over two lines.\n    y: The y.\nClosing words.",
    "NumPy": "Sum.\n\nParameters\n----------\nx : int\n    The x,\n    over two lines.\ny\n    The y.",
    "NumPy first": "Parameters\n----------\nx : int\n    The x,\n    over two lines.\ny\n    The y.",
    "NumPy below the summary": "Sum.\nParameters\n----------\nx : int\n    The x,\n    over two lines.\ny\n    The y.",
    "NumPy short": "Sum.\n\nParameters\n---\nx: int\n    The x,\n    over two lines.\ny\n    The y.\n",
    "NumPy with a colon": "Sum.\n\nParameters:\n-----------\nx : int\n    The x,\n    over two lines.\ny: The y.",
    "NumPy indented": "Sum.\n\nParameters\n------\n    x : int\n        The x,\n        over two lines.\n    y: The y.",
    "NumPy with more": "Sum.\n\nParameters\n------\nx : int, optional\n    The x,\n\n    over two lines.\ny\n    The y."
    "\n\nSee Also\n--------\nother : Not this.",
    "Sphinx": "Sum.\n\n:param x: The x,\n    over two lines.\n:type x: int\n:param y: The y.",
    "Sphinx below the summary": "Sum.\n:param int x: The x,\n    over two lines.\n:param y: The y.\n:return: Z.",
    "Sphinx first": ":param int x: The x,\n    over two lines.\n:param y: The y.",
    "Sphinx not indented": "Sum.\n\n:param int x: The x,\nover two lines.\n:param y: The y.",
    "Sphinx apart": "Sum.\n\n:param int x: The x,\n\n    over two lines.\n\n:param y: The y.\n\nClosing words.",
    "Sphinx other words": "Sum.\n\n:arg int x: The x,\n    over two lines.\n:keyword y: The y.",
    "Epytext": "Sum.\n\n@param x: The x,\n    over two lines.\n@type x: int\n@param y: The y.\n@return: Z.",
    "mixed": "Sum.\n\nArgs:\n    x (int): The x,\n        over two lines.\n:param y: The y.",
}


@pytest.mark.parametrize("cleaned", [False, True], ids=["raw", "cleaned"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_section_of_parameters_is_read_wherever_and_however_people_write_it(shape: str, cleaned: bool) -> None:
    text = SHAPES[shape]
    summary, parameters = read(inspect.cleandoc(text) if cleaned else text)
    assert parameters == X_AND_Y
    assert "The x" not in summary
    assert "The y" not in summary
    assert "Sum" in summary or "Sum" not in text
    for words in ("Closing words.", "More.", "Not this.", "Z."):
        assert (words in summary) is (words in text)


def test_what_is_no_parameter_in_a_section_of_them_is_prose() -> None:
    summary, parameters = read("Sum.\n\nArgs:\n    See the manual, too.\n    x: The x.\n\n    More on all.\n")
    assert (summary, parameters) == ("Sum.\n\nSee the manual, too.\nMore on all.", {"x": ("The x.", None)})


def test_several_names_share_a_description() -> None:
    assert read("Sum.\n\nArgs:\n    x, *y (int): Both.")[1] == {"x": ("Both.", "int"), "y": ("Both.", "int")}


# ---- whose docstring it is


@dataclasses.dataclass
class Search:
    index: str
    key: str = "sk-secret"

    def __call__(self, query: str) -> str:
        return query


@dataclasses.dataclass
class Told:
    """Find it."""

    key: str = "sk-secret"

    def __call__(self, query: str) -> str:
        return query


class Below(Told):
    def __call__(self, query: str) -> str:
        return query


@dataclasses.dataclass
class Place:
    city: str = "sk-secret"


class Spot(NamedTuple):
    x: int = 5


class Order(BaseModel):
    item: str = Field(description="What is ordered.")
    many: Annotated[int, Field(description="How many.", alias="count")] = 1


class Described(Order):
    """Order something."""


class Inherits(Described):
    pass


@pydantic_dataclass
class Checked:
    item: str = Field(description="What is ordered.")


class Fetch:
    def __init__(self, url: str) -> None:
        """Fetch a page.

        Args:
            url: Where it is.
        """


def documented(x: int) -> int:
    """Do it."""
    return x


def renamed() -> Any:
    part = functools.partial(documented, 1)
    part.__doc__ = "Do it once."
    return part


DESCRIPTIONS: list[tuple[Any, str]] = [
    (Search("a"), ""),
    (Place, ""),
    (Spot, ""),
    (namedtuple("Old", ["x"]), ""),  # type: ignore[arg-type]
    (Order, ""),
    (Checked, ""),
    (Inherits, ""),
    (Below(), ""),
    (functools.partial(Search("a")), ""),
    (functools.partial(lambda x: x, 1), ""),
    (Told(), "Find it."),
    (Described, "Order something."),
    (Fetch, "Fetch a page."),
    (documented, "Do it."),
    (functools.partial(documented, 1), "Do it."),
    (functools.partial(functools.partial(documented), 1), "Do it."),
    (functools.lru_cache(documented), "Do it."),
    (functools.wraps(documented)(lambda x: documented(x)), "Do it."),
    (renamed(), "Do it once."),
]


@pytest.mark.parametrize(("made", "description"), DESCRIPTIONS, ids=[str(n) for n in range(len(DESCRIPTIONS))])
def test_only_what_the_author_wrote_on_this_very_thing_is_its_description(made: Any, description: str) -> None:
    found = Tool.from_function(made, ToolOptions(name="it"))
    assert found.description == description
    assert "sk-secret" not in found.description


def test_what_pydantic_fields_say_of_themselves_describes_the_parameters() -> None:
    shown = Tool.from_function(Inherits).parameters.json_schema["properties"]
    assert {name: facts["description"] for name, facts in shown.items()} == {
        "item": "What is ordered.",
        "count": "How many.",
    }
    assert Tool.from_function(Checked).parameters.json_schema["properties"]["item"]["description"] == "What is ordered."
    assert Tool.from_function(Fetch).parameters.json_schema["properties"]["url"]["description"] == "Where it is."


def test_parameters_that_a_signature_does_not_have_do_no_harm() -> None:
    def f(x: int) -> None:
        """Sum.

        Args:
            self: Not here.
            x: The x.
            y (int): Nor here.
        """

    schema = Tool.from_function(f).parameters.json_schema
    assert schema["properties"] == {"x": {"type": "integer", "description": "The x."}}


@pytest.mark.parametrize(
    ("docstring", "summary"),
    [
        ("Sum.\n\nArgs:\n    x (int the x\n    y why\n", "Sum."),
        ("Sum.\n\nArgs:\n", "Sum."),
        ("Sum.\n\nArgs:\nx: not indented\n", "Sum."),
        ("Sum.\n\nParameters\n----------\n", "Sum."),
        ("Sum.\n\nParameters\n---\nx int\n", "Sum."),
        ("Sum.\n\n:param\n", "Sum."),
        ("Sum.\n\n:param x:\n", "Sum."),
        ("Sum.\n\n:type x: [[[\n", "Sum."),
        ("Sum.\n\n:param x y z w: what\n", "Sum."),
        ("Sum.\n\nArgs:\n    : nameless\n    x: fine\n", "Sum."),
        ("Sum.\n\nArgs:\n    x (]]): odd\n", "Sum."),
        ("Sum.\n\nArgs:\n    \ud800: odd\n", "Sum."),
        ("Args:", "Args:"),
        (":param", ":param"),
    ],
)
def test_half_a_docstring_is_read_as_far_as_it_goes(
    docstring: str, summary: str, recwarn: pytest.WarningsRecorder, caplog: pytest.LogCaptureFixture
) -> None:
    assert read(docstring)[0].startswith(summary)
    assert not recwarn.list
    assert not caplog.records


words = [
    "Sum.",
    "Args:",
    "Returns:",
    "Yields:",
    "Example:",
    "Note:",
    "Attributes:",
    ":return:",
    "----",
    ">>>",
    ":",
    "(",
]
lines = ["x: text", "x (int): text", "*a: b", "x : int\n", ".. note::", ":param x: text", ":param int x:", ":type x: "]
spaces = ["\n", "\n\n", "    ", "  ", "\t", "Parameters\n----------\n", "Functions\n---------\n"]
pieces = st.sampled_from([*words, *lines, *spaces])


@settings(max_examples=200, deadline=None)
@given(st.lists(pieces | st.text(max_size=4), max_size=14).map("".join))
def test_no_docstring_is_an_error(docstring: str) -> None:
    found = read_docstring(docstring)

    assert isinstance(found.summary, str)
    for name, text in found.parameters.items():
        assert isinstance(name, str)
        assert text.description is None or text.description.strip()


# ---- types that are only in the docstring


def schema_for(kind: str) -> dict[str, Any]:
    def f(x):  # type: ignore[no-untyped-def]
        pass

    f.__doc__ = f"Sum.\n\nArgs:\n    x ({kind}): The x.\n"
    shown: dict[str, Any] = Tool.from_function(f).parameters.json_schema["properties"]["x"]
    assert shown.pop("description") == "The x."
    return shown


OPTIONAL_INT = {"anyOf": [{"type": "integer"}, {"type": "null"}]}


@pytest.mark.parametrize(
    ("kind", "schema"),
    [
        ("str", {"type": "string"}),
        ("string", {"type": "string"}),
        ("int", {"type": "integer"}),
        ("integer", {"type": "integer"}),
        ("float", {"type": "number"}),
        ("number", {"type": "number"}),
        ("bool", {"type": "boolean"}),
        ("boolean", {"type": "boolean"}),
        ("list", {"type": "array", "items": {}}),
        ("array", {"type": "array", "items": {}}),
        ("dict", {"type": "object", "additionalProperties": True}),
        ("object", {"type": "object", "additionalProperties": True}),
        ("list[int]", {"type": "array", "items": {"type": "integer"}}),
        ("List[str]", {"type": "array", "items": {"type": "string"}}),
        ("dict[str, int]", {"type": "object", "additionalProperties": {"type": "integer"}}),
        ("Optional[int]", OPTIONAL_INT),
        ("int | None", OPTIONAL_INT),
        ("Union[int, None]", OPTIONAL_INT),
        ("Literal['a', 'b']", {"type": "string", "enum": ["a", "b"]}),
        ("int, optional", {"type": "integer"}),
    ],
)
def test_a_type_that_only_the_docstring_names_is_in_the_schema(kind: str, schema: dict[str, Any]) -> None:
    assert schema_for(kind) == schema


@pytest.mark.parametrize(
    "kind",
    [
        "list of str",
        "Widget",
        "callable",
        "int, str",
        "not None",
        "5",
        "int and str",
        "str.upper",
        "[" * 300,
        "''",
        "a-b",
    ],
)
def test_a_type_that_nobody_can_read_means_anything_goes(kind: str) -> None:
    assert schema_for(kind) == {}


@pytest.mark.parametrize(
    ("kind", "accepted"), [("int or None", [5, None]), ("str or int", [5, "five"]), ("None or str", ["a", None])]
)
def test_alternatives_in_words_are_not_narrowed_to_one_of_them(kind: str, accepted: list[object]) -> None:
    def f(x):  # type: ignore[no-untyped-def]
        pass

    f.__doc__ = f"Sum.\n\nArgs:\n    x ({kind}): The x.\n"
    parameters = Tool.from_function(f).parameters
    assert [parameters.check({"x": value})["x"] for value in accepted] == accepted


def test_an_annotation_goes_before_the_type_in_the_docstring() -> None:
    def f(x: str) -> None:
        """Sum.

        Args:
            x (int): The x.
        """

    assert Tool.from_function(f).parameters.json_schema["properties"]["x"] == {
        "type": "string",
        "description": "The x.",
    }


def test_a_docstring_runs_no_code(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[int] = []
    monkeypatch.setattr("builtins.print", lambda *_: ran.append(1))
    for kind in ("print()", "__import__('os')", "[print() for _ in (1,)]", "str.__class__", "().__class__"):
        assert schema_for(kind) == {}
    assert ran == []
