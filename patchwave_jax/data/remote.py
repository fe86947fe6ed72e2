"""Datasets at an address such as `gs://bucket/data`: every host reads a copy on its own disk.

Any file system that fsspec knows will do. The manifest's hash names the copy, under
`default_data_dir()`, so another dataset at the same address is another copy.
"""

import contextlib
import functools
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec

from patchwave_jax.errors import UserError, names_file


def is_address(path: str | os.PathLike[str]) -> bool:
    return "://" in os.fspath(path)


@contextlib.contextmanager
def names_address(address: str, writing: bool = False) -> Iterator[None]:
    """Within it whatever a file system raises becomes a `UserError`: address, cause and remedy."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # each file system has its own kinds
        told = (str(error).strip() or type(error).__name__).splitlines()[0]
        if isinstance(error, FileNotFoundError):
            told = f"nothing is there ({told})"
        can, may, right = ("written", "write", "User") if writing else ("read", "read", "Viewer")
        remedy = f"check the address, and that this account may {may} there"
        if address.startswith(("gs://", "gcs://")):
            remedy += f" (storage.object{right}; gcloud auth application-default login)"
        if isinstance(error, ImportError):
            remedy = "pip install 'patchwave-jax[gcs]' for gs://, or what is named here"
        raise UserError(f"{address} can't be {can}: {told}; {remedy}") from error


@functools.cache
def copy_of(address: str, dataset: str, cache: Path) -> Path:
    """The local copy, in `cache`, of the built dataset whose files are at `address`.

    Raises:
      UserError: if it can't be read, saying why as far as it is known, or the disk is full.
    """
    with names_address(address):
        system, root = fsspec.core.url_to_fs(address)
        try:
            manifest = system.cat_file(f"{root}/manifest.json")
        except FileNotFoundError:
            raise UserError(
                f"{address} holds no dataset; build {dataset} on a disk and copy its folder there: "
                f"gcloud storage cp -r DATA_DIR/{dataset} {address.rsplit('/', 2)[0]}/"
            ) from None
    target = cache / hashlib.sha256(manifest).hexdigest()[:16]
    if not target.exists():
        _fetch(system, root, address, target)
    return target


def _fetch(system: Any, root: str, address: str, target: Path) -> None:
    aside = target.with_name(f"{target.name}.{os.getpid()}")
    print(f"copying {address} to {target}", flush=True)
    try:
        with names_file(aside):
            aside.mkdir(parents=True)
        with names_address(address):
            for name in system.find(root):
                path = aside / os.path.relpath(name, root)
                with names_file(path):
                    path.parent.mkdir(parents=True, exist_ok=True)
                system.get_file(name, str(path))
        if not target.exists():  # another process of this host may have been quicker
            with names_file(target):
                aside.rename(target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
