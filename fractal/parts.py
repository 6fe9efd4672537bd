"""Content parts: what a user's turn is made of when it is more than text.

Each function makes one part in the form of chat completions, a plain dict. A list of parts, with text among them, is
an input of a run:

```python
await agent.run(["What is on this picture?", parts.image(Path("cat.png"))])
```
"""

from __future__ import annotations

import base64
import os
import re
from pathlib import Path
from typing import Any, Literal, cast, get_args

from fractal.errors import InvalidArguments

__all__ = ["Part", "audio", "file", "image", "text"]

Part = dict[str, Any]
"""One content part, as it goes over the wire: `{"type": "text", "text": "hi"}`."""

Detail = Literal["auto", "low", "high", "original"]

_MEDIA_TYPE = re.compile(r"[a-z]+/[a-z0-9.+-]+")
_FILE_ID = re.compile(r"[A-Za-z0-9_-]+")
_FORMAT = re.compile(r"[a-z0-9]+")


def text(content: str) -> Part:
    """Make a part of text; a plain string in a list of parts is the same.

    Args:
        content: The text.

    Raises:
        InvalidArguments: It is no text.

    Example:
        >>> text("Which of the two is older?")
        {'type': 'text', 'text': 'Which of the two is older?'}
    """
    if not isinstance(content, str):
        raise InvalidArguments(f"text({content!r:.100}): give a str")
    return {"type": "text", "text": content}


def image(
    source: str | bytes | os.PathLike[str], *, detail: Detail | None = None, media_type: str | None = None
) -> Part:
    """Make a part of an image.

    Args:
        source: A URL, which the endpoint fetches; a data URL; the bytes of an image; or a `pathlib.Path`, which is
            read at once. In async code, read a large file with `anyio.Path` and give its bytes.
        detail: How closely the model looks. None: the endpoint's default.
        media_type: What the bytes are, such as `"image/bmp"`. None: PNG, JPEG, GIF or WebP, told by the first bytes.

    Raises:
        InvalidArguments: It is no image, or not known which kind.
        OSError: The file cannot be read.

    Example:
        >>> image("https://example.org/cat.png", detail="low")
        {'type': 'image_url', 'image_url': {'url': 'https://example.org/cat.png', 'detail': 'low'}}
    """
    if detail is not None and detail not in get_args(Detail):
        raise InvalidArguments(f"detail={detail!r}: it is one of {', '.join(map(repr, get_args(Detail)))}, or None")
    if isinstance(source, str):
        if not source.startswith(("https://", "http://", "data:image/")):
            raise InvalidArguments(
                f"image({source!r:.100}): text is a URL, from https:// or data:image/ on; for a file give pathlib.Path"
            )
        if media_type is not None:
            raise InvalidArguments("media_type is for bytes and files: a data URL has its own, and so has the answer")
        url = source
    else:
        data = _bytes_of(source, "image")
        media_type = _checked_media_type(media_type) or _sniffed_image(data)
        if media_type is None:
            raise InvalidArguments("these bytes are no PNG, JPEG, GIF or WebP: give media_type=, such as 'image/bmp'")
        if not media_type.startswith("image/"):
            raise InvalidArguments(f"media_type={media_type!r} is no image: there are audio and file as well")
        url = _data_url(media_type, data)
    return {"type": "image_url", "image_url": {"url": url} | ({"detail": detail} if detail is not None else {})}


def audio(source: bytes | os.PathLike[str], format: str | None = None) -> Part:
    """Make a part of a piece of audio.

    Args:
        source: The bytes of an audio file; or a `pathlib.Path`, which is read at once. Endpoints fetch no URL here.
        format: The endpoint's word for the format, such as `"flac"`; OpenAI's own takes `"wav"` and `"mp3"`. None: WAV
            or MP3, told by the first bytes.

    Raises:
        InvalidArguments: It is no audio, or not known in which format.
        OSError: The file cannot be read.

    Example:
        >>> audio(b"RIFF....WAVEfmt ")["input_audio"]["format"]
        'wav'
    """
    data = _bytes_of(source, "audio")
    if format is None:
        format = _sniffed_audio(data)
        if format is None:
            raise InvalidArguments("these bytes are no WAV and no MP3: give format=, such as 'flac'")
    elif not isinstance(format, str) or not _FORMAT.fullmatch(format):
        raise InvalidArguments(f"format={format!r}: give a word such as 'wav', without a dot and without 'audio/'")
    return {"type": "input_audio", "input_audio": {"data": _base64(data), "format": format}}


def file(source: str | bytes | os.PathLike[str], name: str | None = None, *, media_type: str | None = None) -> Part:
    """Make a part of a file. OpenAI's own endpoint takes PDF here, others more.

    Args:
        source: The id of an uploaded file; the bytes of a file; or a `pathlib.Path`, which is read at once.
        name: Name the model is told. None: the path's last part; bytes need one.
        media_type: What the bytes are, such as `"text/csv"`. None: PDF by the first bytes, or what the name's ending
            says.

    Raises:
        InvalidArguments: It is no file, has no name, or is of no known kind.
        OSError: The file cannot be read.

    Example:
        >>> file("file-abc123")
        {'type': 'file', 'file': {'file_id': 'file-abc123'}}
        >>> file(b"%PDF-1.7", "report.pdf")["file"]["filename"]
        'report.pdf'
    """
    if isinstance(source, str):
        if not _FILE_ID.fullmatch(source):
            raise InvalidArguments(
                f"file({source!r:.100}): text is the id of an uploaded file; for a file on disk give pathlib.Path,"
                " and fetch what a URL names"
            )
        if name is not None or media_type is not None:
            raise InvalidArguments("name and media_type are for bytes and files: an uploaded file has its own")
        return {"type": "file", "file": {"file_id": source}}
    data = _bytes_of(source, "file")
    if name is None and isinstance(source, os.PathLike):
        name = Path(source).name
    if not isinstance(name, str) or not name:
        raise InvalidArguments(f"name={name!r}: bytes have no name, so give one, such as 'report.pdf'")
    kind = _checked_media_type(media_type) or _sniffed_file(data) or _type_by_name(name)
    if kind is None:
        raise InvalidArguments(f"what kind of file {name!r} is cannot be told: give media_type=, such as 'text/plain'")
    return {"type": "file", "file": {"filename": name, "file_data": _data_url(kind, data)}}


def _bytes_of(source: object, kind: str) -> bytes:
    if isinstance(source, os.PathLike):
        data = Path(cast("os.PathLike[str]", source)).read_bytes()
    elif isinstance(source, (bytes, bytearray, memoryview)):
        data = bytes(source)  # pyright: ignore[reportUnknownArgumentType]
    else:
        raise InvalidArguments(f"{kind}({source!r:.100}): give bytes or a pathlib.Path")
    if not data:
        raise InvalidArguments(f"the {kind} is empty")
    return data


def _checked_media_type(media_type: str | None) -> str | None:
    if media_type is not None and (not isinstance(media_type, str) or not _MEDIA_TYPE.fullmatch(media_type)):
        raise InvalidArguments(f"media_type={media_type!r}: give one such as 'image/png'")
    return media_type


def _sniffed_image(data: bytes) -> str | None:
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "image/png"
    if data.startswith(b"\xff\xd8\xff"):
        return "image/jpeg"
    if data.startswith((b"GIF87a", b"GIF89a")):
        return "image/gif"
    return "image/webp" if data[:4] == b"RIFF" and data[8:12] == b"WEBP" else None


def _sniffed_audio(data: bytes) -> str | None:
    if data[:4] == b"RIFF" and data[8:12] == b"WAVE":
        return "wav"
    # A tag, or the sync word of a frame of layer III; AAC has the same sync word and layer 0.
    is_frame = len(data) > 1 and data[0] == 0xFF and data[1] & 0xE6 == 0xE2
    return "mp3" if data.startswith(b"ID3") or is_frame else None


def _sniffed_file(data: bytes) -> str | None:
    return "application/pdf" if data.startswith(b"%PDF-") else _sniffed_image(data)


def _type_by_name(name: str) -> str | None:
    from mimetypes import MimeTypes  # reads the tables of the machine when loaded

    # A table of our own has Python's types alone, which are the same everywhere.
    media_type, compression = MimeTypes().guess_type(name)
    return media_type if compression is None else None


def _data_url(media_type: str, data: bytes) -> str:
    return f"data:{media_type};base64,{_base64(data)}"


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")
