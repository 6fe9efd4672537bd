"""What is read out of docstrings of the three styles, whole and broken."""

import inspect
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from fractal import Tool
from fractal._docstring import read_docstring


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


def read(function: Any) -> tuple[str, dict[str, tuple[str | None, str | None]]]:
    found = read_docstring(function if isinstance(function, str) else inspect.getdoc(function))
    return found.summary, {name: (text.description, text.type) for name, text in found.parameters.items()}


def test_google_style() -> None:
    assert read(google) == (
        SUMMARY,
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

    assert summary == SUMMARY
    assert "'one'" in (words_for_y or "")
    assert parameters == {
        "x": ("The x, over two lines.", "int"),
        "z": ("The z.", None),
        "a": ("Both.", "float"),
        "b": ("Both.", "float"),
    }


def test_sphinx_style() -> None:
    assert read(sphinx) == (
        SUMMARY,
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
