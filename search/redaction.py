"""Texts without passwords."""

import re

# A text that is one URL may have blanks in its password.
_WHOLE_URL_PASSWORD = re.compile(r"^([a-z][\w+.-]*://[^:/@\s]*):(?![\s/]).*@", re.IGNORECASE)
# What was given for a URL need not be well-formed; other text with an @ looks alike.
_GIVEN_PASSWORD = re.compile(r"^([a-z][\w+.-]*:/*[^:/@\s]*|[^:/@\s]+):(?![\s/]).*@", re.IGNORECASE)
_URL_PASSWORD = re.compile(r"([a-z][\w+.-]*://[^:/@\s]*):\S*@", re.IGNORECASE)
# The percent-encoded value of another key in a URL's query may hold a password too.
_DSN_PASSWORD = re.compile(
    r"((?:pass(?:word|wd)?|oauth_client_secret|scram_(?:client|server)_key)\s*(?:=|%3D)\s*)"
    r"('(?:[^'\\]|\\.)*'|[^\s&'\"]+)",
    re.IGNORECASE,
)


def redact(text: str) -> str:
    """The text without passwords of URLs and connection strings."""
    for pattern in (_WHOLE_URL_PASSWORD, _URL_PASSWORD):
        text = pattern.sub(r"\1:***@", text)
    return _DSN_PASSWORD.sub(r"\1***", text)


def redact_url(given: str) -> str:
    """What was given for a URL, well-formed or not, without its password."""
    return redact(_GIVEN_PASSWORD.sub(r"\1:***@", given))
