"""Caption and metadata of a sample: how they become bytes and text again. Others wrote them, so they are checked."""

import codecs
import json
from typing import Any

from megavtp.data.decode import BadSample
from megavtp.errors import UserError
from megavtp.json_file import parse_json

MAX_TEXT = 1 << 20  # bytes of a sample's caption, and of its metadata


def pack_text(caption: str, meta: dict[str, Any]) -> tuple[bytes, bytes]:
    """Return caption and metadata as stored bytes. ``BadSample`` if ``parse_meta`` or an index would refuse them."""
    try:
        packed = caption.encode(), json.dumps(meta, ensure_ascii=False, sort_keys=True).encode()
    except UnicodeEncodeError:  # half a surrogate pair, as of a text that was cut within an emoji
        raise BadSample("caption, label or file name is not valid Unicode") from None
    check_length(*map(len, packed))
    return packed


def check_length(*sizes: int) -> None:
    """Raise ``BadSample`` if a caption or metadata has too many bytes."""
    if max(sizes) > MAX_TEXT:
        raise BadSample(f"caption or metadata of more than {MAX_TEXT} bytes")


def parse_meta(data: bytes) -> dict[str, Any]:
    """Return the metadata of a sample. ``BadSample`` if the bytes are no JSON object or hold half a surrogate pair."""
    try:
        return parse_json(data.removeprefix(codecs.BOM_UTF8), dict[str, Any], "metadata", "")
    except UserError:
        raise BadSample("metadata is no JSON object") from None


def decode_text(data: bytes) -> str:
    return data.decode("utf-8-sig", errors="replace").strip()


def caption_of(meta: dict[str, Any]) -> str:
    caption = meta.get("caption")
    return caption.strip() if isinstance(caption, str) else ""


def encodable(text: str) -> str:
    """Replace each half of a surrogate pair, which nothing can encode or print, by a question mark."""
    return text.encode(errors="replace").decode()
