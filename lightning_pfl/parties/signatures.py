"""Keys and signatures (Ed25519): the only file that imports ``cryptography``, which the extra ``parties`` brings.

A party keeps its private key in a file that only its user can read (PEM, as OpenSSL writes it too) and hands out its
public key as one line, ``ed25519:`` and 64 hexadecimal digits.
"""

from __future__ import annotations

import base64
import binascii
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_pfl.errors import FederationError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

__all__ = ["PUBLIC_KEY", "Signer", "WrongSignatureError", "make_key", "verify"]

PUBLIC_KEY = r"^ed25519:[0-9a-f]{64}\Z"
"""What a public key looks like."""

_CONTEXT = b"lightning-pfl signed manifest 1\n"  # what is signed for this purpose is signed for no other


class WrongSignatureError(FederationError):
    """A file that must be signed by somebody is not, or was changed afterwards."""


class Signer:
    """Signs with a private key.

    Args:
        path: the key's file, from `make_key` or ``openssl genpkey -algorithm ed25519``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds no Ed25519 private key, or one that asks for a password.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     public = make_key(Path(folder) / "ward-3.key")
        ...     signature = Signer(Path(folder) / "ward-3.key").sign(b"text")
        >>> verify(b"text", signature, public, "text.json", "ward-3")
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._key = _read_key(Path(path))

    @property
    def public_key(self) -> str:
        """What others verify with."""
        return _written(self._key)

    def sign(self, text: bytes) -> bytes:
        """A signature, as a line of text."""
        return base64.b64encode(self._key.sign(_CONTEXT + text)) + b"\n"


def make_key(path: str | os.PathLike[str]) -> str:
    """Make a private key in a new file that only its owner can read, and return the public key.

    Raises:
        FileExistsError: there is a file already; a key that is lost cannot be had back.
    """
    _require_cryptography()
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    key = Ed25519PrivateKey.generate()
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    try:
        place = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError as error:
        raise FileExistsError(
            error.errno, "there is a key already, and it is not overwritten. Choose another name", os.fspath(path)
        ) from None
    with os.fdopen(place, "wb") as file:
        file.write(pem)
    return _written(key)


def verify(text: bytes, signature: bytes, public_key: str, where: str, who: str) -> None:
    """Check that somebody signed a text.

    Args:
        text: what was signed.
        signature: from `Signer.sign`.
        public_key: of who must have signed it.
        where: the file's name, for the message.
        who: the signer's name, for the message.

    Raises:
        WrongSignatureError: it is not signed with that key.
        ValueError: the public key is none.
    """
    _require_cryptography()
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    if not re.fullmatch(PUBLIC_KEY, public_key):
        raise ValueError(f"A public key reads `ed25519:` and 64 hexadecimal digits, but `{who}`'s is {public_key!r}.")
    key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(public_key.removeprefix("ed25519:")))
    try:
        key.verify(base64.b64decode(signature.removesuffix(b"\n"), validate=True), _CONTEXT + text)
    except (InvalidSignature, binascii.Error):
        raise WrongSignatureError(
            f"`{where}` must be signed by `{who}` with the key in the roster, but is not: it was changed, signed with "
            "another key, or comes from somebody else. Fetch it again, and ask them."
        ) from None


def _read_key(path: Path) -> Ed25519PrivateKey:
    _require_cryptography()
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    try:
        key = serialization.load_pem_private_key(path.read_bytes(), password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ValueError(
            f"`{path}` must hold an Ed25519 private key in PEM without a password, but cannot be read as one: {error}. "
            "`lightning-pfl round keys` makes one."
        ) from None
    if not isinstance(key, Ed25519PrivateKey):
        raise ValueError(
            f"`{path}` must hold an Ed25519 private key, but holds a {type(key).__name__}. `lightning-pfl round keys` "
            "makes one."
        )
    return key


def _written(key: Ed25519PrivateKey) -> str:
    return f"ed25519:{key.public_key().public_bytes_raw().hex()}"


def _require_cryptography() -> None:
    try:
        import cryptography  # noqa: F401
    except ImportError:
        raise ImportError(
            "Signed files need the package `cryptography`: pip install 'lightning-pfl[parties]'"
        ) from None
