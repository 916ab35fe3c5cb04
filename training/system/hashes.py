"""What files and settings are known by: sha256, in hex."""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path


def digest(*parts: object) -> str:
    """Return the hash of bytes, or of what is fit for JSON, whatever the order of its keys."""
    hasher = hashlib.sha256()
    for part in parts:
        hasher.update(part if isinstance(part, bytes) else json.dumps(part, sort_keys=True).encode())
    return hasher.hexdigest()


def hash_file(path: Path) -> str:
    """Return the hash of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_files(paths: list[Path]) -> list[str]:
    """Return the hash of each file's content; several are read at once."""
    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(hash_file, paths))
