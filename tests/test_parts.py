"""Content parts: the wire's own form of text, images, audio and files."""

import base64
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import pytest
from openai.types.chat import ChatCompletionContentPartParam
from pydantic import TypeAdapter, ValidationError

from fractal import BaseAgent, InvalidArguments, parts
from fractal.messages import user_message
from fractal.testing import Endpoint, check_messages

PNG = b"\x89PNG\r\n\x1a\n" + b"\x00" * 8
JPEG = b"\xff\xd8\xff\xe0" + b"\x00" * 8
GIF = b"GIF89a" + b"\x00" * 8
WEBP = b"RIFF\x10\x00\x00\x00WEBPVP8 "
WAV = b"RIFF\x10\x00\x00\x00WAVEfmt "
MP3 = b"ID3\x04" + b"\x00" * 8
MP3_WITHOUT_TAG = b"\xff\xfb\x90\x00" + b"\x00" * 8
AAC = b"\xff\xf1\x50\x80" + b"\x00" * 8
PDF = b"%PDF-1.7\n"

SDK = TypeAdapter[Any](ChatCompletionContentPartParam)


def data_url(media_type: str, data: bytes) -> str:
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"


def on_disk(folder: Path, name: str, data: bytes) -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


def test_text_is_a_text_part() -> None:
    assert parts.text("look") == {"type": "text", "text": "look"}
    assert parts.text("") == {"type": "text", "text": ""}


# ---- images


@pytest.mark.parametrize(
    "url", ["https://example.org/a.png", "http://localhost/a", "data:image/png;base64,AA==", "data:image/svg+xml,x"]
)
def test_an_image_can_be_a_url(url: str) -> None:
    assert parts.image(url) == {"type": "image_url", "image_url": {"url": url}}


@pytest.mark.parametrize("detail", ["auto", "low", "high", "original"])
def test_an_image_can_say_how_closely_to_look(detail: Any) -> None:
    assert parts.image("https://example.org/a", detail=detail)["image_url"]["detail"] == detail


@pytest.mark.parametrize(
    ("data", "media_type"),
    [(PNG, "image/png"), (JPEG, "image/jpeg"), (GIF, "image/gif"), (b"GIF87a..", "image/gif"), (WEBP, "image/webp")],
    ids=str,
)
def test_the_kind_of_an_image_is_told_by_its_first_bytes(data: bytes, media_type: str, tmp_path: Path) -> None:
    expected = {"type": "image_url", "image_url": {"url": data_url(media_type, data)}}
    named_otherwise = on_disk(tmp_path, "picture.txt", data)

    assert parts.image(data) == expected
    assert parts.image(bytearray(data)) == expected  # type: ignore[arg-type]
    assert parts.image(memoryview(data)) == expected  # type: ignore[arg-type]
    assert parts.image(named_otherwise) == expected
    assert parts.image(anyio.Path(named_otherwise)) == expected


def test_the_kind_of_an_image_can_be_said() -> None:
    assert parts.image(b"BM....", media_type="image/bmp")["image_url"]["url"] == data_url("image/bmp", b"BM....")
    assert parts.image(PNG, media_type="image/apng")["image_url"]["url"] == data_url("image/apng", PNG)


# ---- audio


@pytest.mark.parametrize(
    ("data", "format"), [(WAV, "wav"), (MP3, "mp3"), (MP3_WITHOUT_TAG, "mp3"), (b"\xff\xf3\x44\xc4", "mp3")], ids=str
)
def test_the_format_of_audio_is_told_by_its_first_bytes(data: bytes, format: str, tmp_path: Path) -> None:
    expected = {"type": "input_audio", "input_audio": {"data": base64.b64encode(data).decode(), "format": format}}

    assert parts.audio(data) == expected
    assert parts.audio(on_disk(tmp_path, "noise", data)) == expected


def test_the_format_of_audio_can_be_said() -> None:
    assert parts.audio(AAC, "aac")["input_audio"]["format"] == "aac"
    assert parts.audio(WAV, format="pcm16")["input_audio"]["format"] == "pcm16"


# ---- files


def test_text_names_an_uploaded_file() -> None:
    assert parts.file("file-abc_123") == {"type": "file", "file": {"file_id": "file-abc_123"}}


@pytest.mark.parametrize(
    ("data", "name", "media_type"),
    [
        (PDF, "report.pdf", "application/pdf"),
        (PDF, "report", "application/pdf"),
        (PNG, "scan", "image/png"),
        (b"a,b", "table.csv", "text/csv"),
        (b"hello", "letter.TXT", "text/plain"),
    ],
    ids=str,
)
def test_a_file_has_a_name_and_its_bytes_as_a_data_url(data: bytes, name: str, media_type: str, tmp_path: Path) -> None:
    expected = {"type": "file", "file": {"filename": name, "file_data": data_url(media_type, data)}}

    assert parts.file(data, name) == expected
    assert parts.file(on_disk(tmp_path, name, data)) == expected


def test_a_file_can_be_called_otherwise_and_its_kind_can_be_said(tmp_path: Path) -> None:
    path = on_disk(tmp_path, "tmp1234", b"x = 1")

    assert parts.file(path, "main.py")["file"]["filename"] == "main.py"
    assert parts.file(path, media_type="text/plain")["file"] == {
        "filename": "tmp1234",
        "file_data": data_url("text/plain", b"x = 1"),
    }


# ---- what cannot be meant


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: parts.text(b"bytes"), "give a str"),  # type: ignore[arg-type]
        (lambda: parts.text(None), "give a str"),  # type: ignore[arg-type]
        (lambda: parts.image("cat.png"), "pathlib.Path"),
        (lambda: parts.image("data:application/pdf;base64,AA=="), "URL"),
        (lambda: parts.image(""), "URL"),
        (lambda: parts.image("https://x", media_type="image/png"), "media_type is for bytes"),
        (lambda: parts.image("https://x", detail="medium"), "'auto', 'low', 'high', 'original'"),  # type: ignore[arg-type]
        (lambda: parts.image("https://x", detail=["low"]), "detail="),  # type: ignore[arg-type]
        (lambda: parts.image(b"BM...."), "media_type="),
        (lambda: parts.image(WAV), "media_type="),
        (lambda: parts.image(b""), "the image is empty"),
        (lambda: parts.image(PNG, media_type="png"), "such as 'image/png'"),
        (lambda: parts.image(PNG, media_type=5), "such as 'image/png'"),  # type: ignore[arg-type]
        (lambda: parts.image(PDF, media_type="application/pdf"), "is no image"),
        (lambda: parts.image(None), "give bytes"),  # type: ignore[arg-type]
        (lambda: parts.image([PNG]), "give bytes"),  # type: ignore[arg-type]
        (lambda: parts.audio("https://x"), "give bytes"),  # type: ignore[arg-type]
        (lambda: parts.audio(AAC), "format="),
        (lambda: parts.audio(WEBP), "format="),
        (lambda: parts.audio(b"\xff"), "format="),
        (lambda: parts.audio(b""), "the audio is empty"),
        (lambda: parts.audio(WAV, ".wav"), "without a dot"),
        (lambda: parts.audio(WAV, "audio/wav"), "without 'audio/'"),
        (lambda: parts.audio(WAV, 5), "without a dot"),  # type: ignore[arg-type]
        (lambda: parts.file("report.pdf"), "pathlib.Path"),
        (lambda: parts.file("https://x/report"), "fetch what a URL names"),
        (lambda: parts.file(""), "the id of an uploaded file"),
        (lambda: parts.file("file-abc", "report.pdf"), "has its own"),
        (lambda: parts.file("file-abc", media_type="text/plain"), "has its own"),
        (lambda: parts.file(PDF), "name=None"),
        (lambda: parts.file(PDF, ""), "name=''"),
        (lambda: parts.file(PDF, 5), "name=5"),  # type: ignore[arg-type]
        (lambda: parts.file(b"", "a.txt"), "the file is empty"),
        (lambda: parts.file(b"x", "a.unknown"), "media_type="),
        (lambda: parts.file(b"x", "a.csv.gz"), "media_type="),
        (lambda: parts.file(7), "give bytes"),  # type: ignore[arg-type]
    ],
)
def test_what_cannot_be_meant_is_wrong_use_at_once(make: Callable[[], object], words: str) -> None:
    with pytest.raises(InvalidArguments) as caught:
        make()

    assert words in str(caught.value)


@pytest.mark.parametrize("make", [parts.image, parts.audio, parts.file])
def test_a_file_that_is_not_there_is_the_systems_own_error(make: Callable[[Path], object], tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        make(tmp_path / "missing")


# ---- on the wire

EACH = [
    parts.text("look"),
    parts.image("https://example.org/a.png", detail="high"),
    parts.image(PNG),
    parts.audio(MP3),
    parts.file("file-abc"),
    parts.file(PDF, "report.pdf"),
]


@pytest.mark.parametrize("part", EACH, ids=lambda part: part["type"])
def test_a_part_is_what_the_sdk_describes_and_no_more(part: dict[str, Any]) -> None:
    # The SDK's TypedDicts take any further key, so what comes back is compared as well.
    assert SDK.validate_python(part, strict=True) == part
    inner = next(name for name in part if name != "type")
    with pytest.raises(ValidationError):
        SDK.validate_python({key: value for key, value in part.items() if key != inner})


def test_parts_are_an_input_with_text_among_them() -> None:
    message = user_message(["Compare:", *EACH])

    assert message == {"role": "user", "content": [parts.text("Compare:"), *EACH]}
    check_messages([message])


async def test_the_endpoint_gets_the_parts_as_they_are(endpoint: Callable[..., Endpoint]) -> None:
    one = endpoint("two documents")

    async with BaseAgent("A", "You look.") as agent:
        result = await agent.run(["Compare:", *EACH])

    assert result.content == "two documents"
    [request] = one.requests
    assert request.body["messages"][1]["content"] == [parts.text("Compare:"), *EACH]
    assert result.messages[0]["content"] == [parts.text("Compare:"), *EACH]


def test_a_relative_path_is_named_by_its_last_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on_disk(tmp_path, "a.txt", b"x")
    monkeypatch.chdir(tmp_path)

    assert parts.file(Path(os.curdir, "a.txt"))["file"]["filename"] == "a.txt"
