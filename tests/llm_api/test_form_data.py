"""The model of a multipart form is found where Go finds it, and replaced without touching another byte."""

from __future__ import annotations

import pytest

from router.llm_api.form_data import find_field, is_form, replaced

_PATH = "/v1/audio/transcriptions"
_TYPE = "multipart/form-data; boundary=xyz"
_FILE = (
    b'--xyz\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\nContent-Type: audio/wav\r\n\r\n'
    b"RIFF\r\n--xy\x00\r\n"
)
_MODEL = b'--xyz\r\nContent-Disposition: form-data; name="model"\r\n\r\nwhisper:tiny\r\n'
_END = b"--xyz--\r\n"


def value(body: bytes, content_type: str = _TYPE, name: str = "model") -> bytes | None:
    found = find_field(body, content_type, name)
    return None if found is None else body[found.start : found.end]


def test_only_a_form_is_a_form() -> None:
    assert is_form(_PATH, _TYPE)
    assert is_form(_PATH, "Multipart/Form-Data; boundary=x")
    assert not is_form(_PATH, "application/json")
    assert not is_form(_PATH, None)
    assert not is_form("/api/chat", _TYPE)
    assert not is_form("/v1/images/edits", _TYPE)


@pytest.mark.parametrize("body", [_FILE + _MODEL + _END, _MODEL + _FILE + _END, b"skipped\r\n" + _MODEL + _END])
def test_the_model_is_found_wherever_it_stands(body: bytes) -> None:
    assert value(body) == b"whisper:tiny"


def test_a_quoted_boundary_and_odd_case_are_read() -> None:
    body = _MODEL.replace(b"Content-Disposition: form-data; name", b"content-disposition:form-data;NAME") + _END
    assert value(body, 'multipart/form-data; Boundary="xyz"') == b"whisper:tiny"


def test_the_first_of_several_counts_and_a_file_of_that_name_does_not() -> None:
    file = _FILE.replace(b'name="file"', b'name="model"')
    assert value(file + _MODEL + _MODEL.replace(b"tiny", b"big") + _END) == b"whisper:tiny"


@pytest.mark.parametrize(
    ("body", "content_type"),
    [
        (_FILE + _END, _TYPE),
        (_MODEL + _END, "multipart/form-data"),
        (_MODEL + _END, "multipart/form-data; boundary=other"),
        (_MODEL[:-2], _TYPE),
        (b"", _TYPE),
        (b"--xyz", _TYPE),
    ],
)
def test_where_there_is_no_such_field_there_is_none(body: bytes, content_type: str) -> None:
    assert value(body, content_type) is None


def test_only_the_value_is_replaced() -> None:
    body = _FILE + _MODEL + _END
    found = find_field(body, _TYPE, "model")
    assert found is not None
    assert replaced(body, found, "other") == body.replace(b"whisper:tiny", b"other")
