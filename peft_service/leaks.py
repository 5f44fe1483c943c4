"""What in a row should not be learned, because a model says it again: keys, card numbers, addresses.

Patterns miss things, and now and then take something harmless for a secret: what they find is a warning.
Bytes that a pattern cannot do without are looked for first, at a hundredth of the cost.
"""

import re

_AWS = re.compile(rb"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b")
_PRIVATE_KEY = re.compile(rb"-----BEGIN (?:[A-Z]{1,20} ){0,2}PRIVATE KEY-----")
_GITHUB = re.compile(rb"\b(?:gh[ops]_[A-Za-z0-9]{36}|github_pat_[A-Za-z0-9_]{22,255})")
_KEYS: tuple[tuple[bytes, re.Pattern[bytes], str], ...] = (
    (b"AKIA", _AWS, "an AWS access key"),
    (b"ASIA", _AWS, "an AWS access key"),
    (b"PRIVATE KEY-----", _PRIVATE_KEY, "a private key"),
    (b"gho_", _GITHUB, "a GitHub token"),
    (b"ghp_", _GITHUB, "a GitHub token"),
    (b"ghs_", _GITHUB, "a GitHub token"),
    (b"github_pat_", _GITHUB, "a GitHub token"),
    (b"xox", re.compile(rb"\bxox[abprs]-[0-9A-Za-z-]{10,255}"), "a Slack token"),
    (b"AIza", re.compile(rb"\bAIza[0-9A-Za-z_-]{35}"), "a Google API key"),
    (b"hf_", re.compile(rb"\bhf_[A-Za-z0-9]{34}\b"), "a Hugging Face token"),
    (b"sk-", re.compile(rb"\bsk-(?:proj-|ant-)?[A-Za-z0-9_-]{32,255}"), "an API key"),
)
"""(bytes that must be there, what they must be part of, what that is)"""
_ADDRESS = re.compile(rb"[A-Za-z0-9]@[A-Za-z0-9](?:[A-Za-z0-9-]{0,62}\.){1,5}[A-Za-z]{2,24}\b")
_CARD = re.compile(rb"(?<![0-9.])[2-6][0-9]{3}(?:[ -]?[0-9]{4,6}){2}[ -]?[0-9]{3,5}(?![0-9])")
_ISSUERS = re.compile(rb"4|5[1-5]|2(?:22[1-9]|2[3-9]|[3-6]|7[01]|720)|3[47]|6(?:011|5)")


def found_secrets(raw: bytes) -> list[tuple[str, str]]:
    """(code, what it is) of everything found in the bytes of a row; each once."""
    found = [("secret", what) for needle, pattern, what in _KEYS if needle in raw and pattern.search(raw)]
    if len(found) > 1:
        found = list(dict.fromkeys(found))
    if b"@" in raw and _ADDRESS.search(raw):
        found.append(("personal_data", "an e-mail address"))
    if any(_is_card(match.group()) for match in _CARD.finditer(raw)):
        found.append(("personal_data", "the number of a payment card"))
    return found


def _is_card(text: bytes) -> bool:
    """Whether an issuer has such numbers and the check digit is right (Luhn, ISO/IEC 7812-1)."""
    digits = [byte - 48 for byte in text if 48 <= byte <= 57]
    length = 15 if digits[0] == 3 else 16
    if len(digits) != length or not _ISSUERS.match(bytes(digit + 48 for digit in digits)):
        return False
    doubled = [digit * 2 - 9 * (digit > 4) for digit in digits[-2::-2]]
    return (sum(digits[-1::-2]) + sum(doubled)) % 10 == 0
