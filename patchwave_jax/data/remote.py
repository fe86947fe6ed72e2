"""Datasets in a bucket: every host reads a copy on its own disk.

Any file system that fsspec supports will do. The copy is named by the manifest's hash, so another
dataset at the same URL is another copy.
"""

import functools
import hashlib
import os
from pathlib import Path

import fsspec

from patchwave_jax.errors import UserError, names_file
from patchwave_jax.runtime.storage import names_url, replacing


@functools.cache
def copy_of(url: str, dataset: str, cache: Path) -> Path:
    """The local copy, in `cache`, of the built dataset whose files are at `url`.

    Raises:
      UserError: if it can't be read, with the cause, or the disk is full.
    """
    with names_url(url):
        system, root = fsspec.core.url_to_fs(url)
        try:
            manifest = system.cat_file(f"{root}/manifest.json")
        except FileNotFoundError:
            raise UserError(
                f"{url} holds no dataset; build {dataset} on a disk and copy its folder there: "
                f"gcloud storage cp -r DATA_DIR/{dataset} {url.rsplit('/', 2)[0]}/"
            ) from None
    target = cache / hashlib.sha256(manifest).hexdigest()[:16]
    if target.exists():
        return target
    print(f"copying {url} to {target}", flush=True)
    with names_file(target), replacing(target) as copy:
        copy.mkdir(parents=True)
        with names_url(url):
            for name in system.find(root):
                path = copy / os.path.relpath(name, root)
                with names_file(path):
                    path.parent.mkdir(parents=True, exist_ok=True)
                system.get_file(name, str(path))
    return target
