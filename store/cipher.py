"""Encryption of camera passwords at rest."""

import os
import tempfile
from pathlib import Path
from typing import Self

from cryptography.fernet import Fernet, InvalidToken
from pydantic import SecretStr

KEY_FILE = "secret.key"


class WrongKey(RuntimeError):
    """A secret was encrypted with another key than the one that is configured."""


class Cipher:
    """Encrypts and decrypts short secrets with one Fernet key."""

    def __init__(self, key: SecretStr) -> None:
        try:
            self._fernet = Fernet(key.get_secret_value())
        except ValueError:
            raise ValueError(
                "TOKENLINE_STORE__SECRET_KEY is no Fernet key: 32 random bytes as url-safe base64, as "
                "`python -c 'from cryptography.fernet import Fernet; print(Fernet.generate_key().decode())'` prints"
            ) from None

    @classmethod
    def open(cls, key: SecretStr | None, data_dir: Path) -> Self:
        """Use the given key, else the one in the data folder, which is made at the first use."""
        return cls(key if key is not None else SecretStr(_kept_key(data_dir)))

    def encrypt(self, secret: str) -> str:
        """Return the secret as text that only this key opens."""
        return self._fernet.encrypt(secret.encode()).decode()

    def decrypt(self, encrypted: str) -> str:
        """Return the secret; WrongKey if another key encrypted it."""
        try:
            return self._fernet.decrypt(encrypted.encode()).decode()
        except InvalidToken:
            raise WrongKey(
                "a stored camera password cannot be decrypted: set TOKENLINE_STORE__SECRET_KEY to the key that was in "
                "use when it was stored, or register the password again"
            ) from None


def _kept_key(data_dir: Path) -> str:
    path = data_dir / KEY_FILE
    if not path.exists():
        data_dir.mkdir(parents=True, exist_ok=True)
        handle, draft = tempfile.mkstemp(dir=data_dir, prefix=".secret-")  # mode 0600
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(Fernet.generate_key())
                file.flush()
                os.fsync(file.fileno())
            Path(path).hardlink_to(draft)  # unlike a rename it fails when another process was first
        except FileExistsError:
            pass
        finally:
            Path(draft).unlink()
    return path.read_text().strip()
