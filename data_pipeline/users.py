"""Who the users of a data set are: raw ids become keyed hashes when logs are read, so that nothing a build leaves names a person.

Owns the salt, `<data>/users.json` (which says what the stored ids are, by the salt's fingerprint only) and the way from a raw id to the
stored one. A build orders, cuts and breaks ties by raw ids: another salt changes the column user_id and nothing else.
"""

import hashlib
import json
import os
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pyarrow as pa

from gpr_dist.config import Config
from gpr_dist.errors import ConfigError, DataError
from gpr_dist.schema import write_atomic

USERS_FILE, SALT_FILE, SALT_VARIABLE = "users.json", "user_salt", "GPR_USER_SALT"
PLAIN = "plain"  # in the place of a salt's fingerprint
_ID_BYTES = 16
_LEAST_SALT_BYTES = 16

Strings = pa.Array | pa.ChunkedArray


class UsersConfig(Config):
    """What is stored of user ids."""

    ids: Literal["hashed", "plain"] = "hashed"
    """hashed = a keyed hash of 128 bits, plain = as in the logs"""
    salt: Path | None = None
    """file with the secret key of the hash, 16 bytes or more; none = environment variable GPR_USER_SALT, else <data>/user_salt, which the
    first build makes. Keep it to erase users and to join further data, and away from whom the data are given to"""


@dataclass(frozen=True)
class UserIds:
    """From raw ids to those a data set stores."""

    key: bytes | None  # none = plain

    def stored(self, ids: Strings) -> pa.Array:
        """Strings [n], null where there is none. A distinct id costs about 1 µs, a repeated one a lookup."""
        if isinstance(ids, pa.ChunkedArray):
            return pa.concat_arrays([self.stored(chunk) for chunk in ids.chunks]) if ids.num_chunks else pa.array([], pa.string())
        if self.key is None:
            return ids.cast(pa.string())
        encoded = ids if pa.types.is_dictionary(ids.type) else ids.dictionary_encode()
        keyed, hashed = hashlib.blake2b(key=self.key, digest_size=_ID_BYTES, person=b"user id"), []
        for raw in encoded.dictionary.cast(pa.large_binary()).to_pylist():
            digest = keyed.copy()
            digest.update(raw or b"")
            hashed.append(None if raw is None else digest.hexdigest())
        return pa.array(hashed, pa.string()).take(encoded.indices)


def choose_users(config: UsersConfig, data: Path) -> str:
    """Decide with which salt a build at `data` hashes, before its processes start; generate one when there is none.

    Returns: the salt's fingerprint, or PLAIN; of a finished data set whose salt lies elsewhere the recorded one.
    Raises: ConfigError when the data set has ids of another salt.
    """
    if config.ids == "plain":
        return PLAIN
    recorded, salt = _recorded(data), _find_salt(data, config.salt)
    if salt is None and recorded not in (None, PLAIN):
        return recorded
    found = _fingerprint(salt or _new_salt(data))
    if recorded not in (None, PLAIN, found):
        raise ConfigError(f"{data} has user ids of the salt {recorded}, this one is {found}: {_sources(data, config.salt)}; give the old "
                          "salt, or build into another folder")
    return found


def record_users(data: Path, fingerprint: str) -> None:
    """Say in `<data>/users.json` what its ids are."""
    write_atomic(data / USERS_FILE, json.dumps({"user_ids": PLAIN if fingerprint == PLAIN else "hashed", "salt": fingerprint}).encode())


def open_users(data: Path, salt: Path | None = None, fingerprint: str | None = None) -> UserIds:
    """How the ids of a data set are made; a data set that says nothing has plain ones.

    Args: salt: file, if it is neither in the environment nor in the data folder. fingerprint: what it must be; none = as recorded there.
    Raises: ConfigError when the salt is missing or another one.
    """
    wanted = fingerprint or _recorded(data) or PLAIN
    if wanted == PLAIN:
        return UserIds(None)
    found = _find_salt(data, salt)
    if found is None:
        raise ConfigError(f"the user ids of {data} are hashed with the salt {wanted}, which is not here: {_sources(data, salt)}; without "
                          "it no raw id can be found in the data, nor can the data be built again with the same ids")
    if _fingerprint(found) != wanted:
        raise ConfigError(f"{data} has user ids of the salt {wanted}, this one is {_fingerprint(found)}: {_sources(data, salt)}; give the "
                          "salt it was built with")
    return UserIds(_key(found))


def _find_salt(data: Path, path: Path | None) -> bytes | None:
    if path is None and SALT_VARIABLE in os.environ:
        where, salt = f"environment variable {SALT_VARIABLE}", os.environ[SALT_VARIABLE].encode()
    else:
        where = path or data / SALT_FILE
        try:
            salt = where.read_bytes().strip()
        except OSError as error:
            if path is None and isinstance(error, FileNotFoundError):
                return None
            raise ConfigError(f"user salt {where} cannot be read: {error.strerror}") from None
    if len(salt) < _LEAST_SALT_BYTES:
        raise ConfigError(f"user salt in {where} has {len(salt)} bytes; at least {_LEAST_SALT_BYTES} random ones are needed, e.g. of "
                          "`openssl rand -hex 32`")
    return salt


def _new_salt(data: Path) -> bytes:
    """Made by whoever comes first; readable by its owner only."""
    data.mkdir(parents=True, exist_ok=True)
    path, salt = data / SALT_FILE, secrets.token_hex(32).encode()
    try:
        with open(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb") as file:
            file.write(salt)
            file.flush()
            os.fsync(file.fileno())
    except FileExistsError:
        return _find_salt(data, path)
    return salt


def _key(salt: bytes) -> bytes:
    return hashlib.blake2b(salt, person=b"user salt").digest()


def _fingerprint(salt: bytes) -> str:
    """Says which salt it is, and nothing about it."""
    return hashlib.blake2b(b"fingerprint", key=_key(salt), digest_size=8).hexdigest()


def _recorded(data: Path) -> str | None:
    try:
        return str(json.loads((data / USERS_FILE).read_bytes())["salt"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{data / USERS_FILE} is damaged ({error!r}); restore it, or build the data into another folder") from None


def _sources(data: Path, path: Path | None) -> str:
    return f"looked in {path or f'the environment variable {SALT_VARIABLE}, then in {data / SALT_FILE}'}"
