"""Ed25519 signatures of a manifest (RFC 8032): the one module that imports `cryptography`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from letheon.errors import InputError, install_extra
from letheon.regular import LARGEST, read_regular


def sign(key: Path, content: bytes) -> str:
    """Sign bytes with an ed25519 private key in PEM form without a password.

    Returns:
        JSON with the ``signature`` and the ``key`` that verifies it, both in hex.

    Raises:
        InputError: no `cryptography`, or no such key.
    """
    serialization, ed25519 = _library()
    try:
        private = serialization.load_pem_private_key(read_regular(key, LARGEST), None)
    except (OSError, ValueError, TypeError) as error:
        raise InputError(
            f"got {key}, which cannot be read as a key ({error}); expected an ed25519 private key "
            "in PEM form without a password",
            option="sign",
        ) from error
    if not isinstance(private, ed25519.Ed25519PrivateKey):
        raise InputError(f"got {key}, a key of another kind; expected ed25519", option="sign")
    public = private.public_key().public_bytes_raw().hex()
    return json.dumps({"key": public, "signature": private.sign(content).hex()}) + "\n"


def check_key(key: Path | None) -> None:
    """Refuse a key that cannot sign, before a run begins; raises as `sign`."""
    if key is not None:
        sign(key, b"")


def verify_signature(text: str, content: bytes, trusted: str | None = None) -> str:
    """Verify what `sign` returned and return the key in hex.

    Args:
        text: of the signature's file.
        content: the bytes that were signed.
        trusted: the public key in hex that it must be, if any.

    Raises:
        InputError: no `cryptography`, not this content, or another key.
    """
    _, ed25519 = _library()
    from cryptography.exceptions import InvalidSignature

    try:
        stored = json.loads(text)
        key = str(stored["key"])
        public = ed25519.Ed25519PublicKey.from_public_bytes(bytes.fromhex(key))
        public.verify(bytes.fromhex(stored["signature"]), content)
    except (InvalidSignature, ValueError, KeyError, TypeError) as error:
        reason = str(error) or "it is not of this content"
        raise InputError(f"got a signature that does not hold ({reason})") from error
    if text != json.dumps({"key": key, "signature": stored["signature"]}) + "\n":
        raise InputError("got a signature's file that was changed")
    if trusted is not None and key != trusted:
        raise InputError(f"got a signature by {key[:16]}; expected one by {trusted[:16]}")
    return key


def _library() -> tuple[Any, Any]:
    try:
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError as error:
        raise InputError(
            f"got no package cryptography; expected it, which signs; {install_extra('sign')}",
            option="sign",
        ) from error
    return serialization, ed25519
