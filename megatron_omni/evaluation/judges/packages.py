"""Files of installed packages, by their hash. The packages' uploaders are third parties: files are taken, code is not run."""

import hashlib
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class PackageFile:
    """One file inside a package of PyPI."""

    package: str
    version: str
    path: str
    sha256: str
    install: str
    """What pip is told."""

    def find(self) -> Path:
        """Where it lies. ValueError where the package is not installed, or the file is another one."""
        try:
            installed = distribution(self.package)
        except PackageNotFoundError as error:
            raise ValueError(
                f"{self.package} is not installed, whose file {self.path} is needed: {self.install}"
            ) from error
        path = Path(str(installed.locate_file(self.path)))
        if not path.is_file():
            raise ValueError(f"{path}: no such file in {self.package} {installed.version}: {self.install}")
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != self.sha256:
            raise ValueError(
                f"{path}: its SHA-256 is {found[:12]}..., not {self.sha256[:12]}... of {self.package} {self.version}: "
                f"{self.install}"
            )
        return path
