"""The files of a report that the server shows: the site's own kinds, from the site's own folders, nothing else."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

ALONE = {".html", ".png", ".svg", ".json", ".js", ".css", ".ico"}  # files at the report's top
FOLDERS = ("assets", "data")
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".json": "application/json",
    ".png": "image/png",
    ".svg": "image/svg+xml",
    ".ico": "image/x-icon",
    ".woff2": "font/woff2",
}


def file_of(root: Path, path: str) -> Path | None:
    """The file that a path of a URL names, None where there is none that may be shown.

    Links are followed and must end inside the report; names that begin with a dot are nobody's business.
    """
    if not path or len(path) > 500 or any(ord(c) < 32 or c in "\\:" for c in path):
        return None
    parts = path.split("/")
    if any(not part or part.startswith(".") for part in parts):
        return None
    suffix = PurePosixPath(path).suffix.lower()
    if suffix not in TYPES or (len(parts) > 1 and parts[0] not in FOLDERS) or (len(parts) == 1 and suffix not in ALONE):
        return None
    try:
        root = root.resolve()
        found = root.joinpath(*parts).resolve()
        if not found.is_relative_to(root) or not found.is_file():
            return None
    except (OSError, ValueError):
        return None
    # A link inside the report to one of its own files of another kind (survey.npz) is no way round the list above.
    return found if found.suffix.lower() in TYPES else None
