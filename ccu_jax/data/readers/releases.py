"""Official releases of data sets: locates them and reports missing files."""

import dataclasses
import os
import pathlib

from ccu_jax.config.schema import Data
from ccu_jax.data.readers import base
from ccu_jax.data.readers.untrusted_files import reject_external_links
from ccu_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Release:
    """The official layout of a data set; paths are relative to its root."""

    title: str
    remedy: str  # the end of error messages: where to get the files
    sample_root: str  # of the sample edition, below the folder of all editions
    lists: tuple[str, ...]  # files that list the rows
    image_folders: tuple[str, ...]
    subfolders: tuple[str, ...]  # where the root may lie below the user's folder
    inner_folders: tuple[str, ...]  # if the user names one, its parent may be the root
    optional_lists: tuple[str, ...] = ()
    image_archives: tuple[str, ...] = ()  # used instead of a missing or empty folder
    watched_depth: int = 0  # levels of folders whose modification times are hashed
    archive: str = ""  # of the whole release; used if no folder is complete
    any_subfolder: bool = False  # whether the root may lie in a folder of any name

    def locate(self, config: Data, workdir: pathlib.Path) -> base.Location:
        """Returns the user's folder, or the sample edition below the working folder.

        Raises UserError if files are missing, or are links out of the user's folder.
        """
        if config.dir is None:
            return base.Location(workdir / "sample" / self.sample_root, "sample")
        user_folder = pathlib.Path(os.path.expanduser(config.dir)).absolute()
        if not user_folder.is_dir():
            raise UserError(f"data.dir: no folder {user_folder}; {self.remedy}")
        lists, images = self.lists + self.optional_lists, self.image_folders
        try:
            root = self._find_root_below(user_folder)
            names = (*lists, *images, *self.image_archives, self.archive)
            folders = {root / name: root for name in names}
            above = user_folder.parent
            folders[root] = above if root == above else user_folder
            reject_external_links(folders)
            is_sample = self._find_marker(root).is_file()
        except OSError as error:
            raise UserError(f"data.dir: cannot read {user_folder}: {error}") from None
        return base.Location(root, "sample" if is_sample else "official")

    def compute_signature(self, config: Data, location: base.Location) -> str:
        """Hashes the list files, and the sizes and times of the image paths."""
        root, marks = location.root, []
        for name in self.lists + self.optional_lists:
            if (root / name).is_file():
                marks += [name, base.digest_file(root / name)]
        if location.edition == "sample" and config.dir is None:
            return base.digest(*marks, self._find_marker(root).read_bytes())
        for path in self.list_watched_paths(root):
            status = path.stat() if path.exists() else path.lstat()
            size = "" if path.is_dir() else status.st_size
            # As ASCII: a name on disk need not be Unicode.
            marks.append(f"{path.name!a} {size} {status.st_mtime_ns}")
        return base.digest(*marks)

    def find_root(self, folder: pathlib.Path) -> pathlib.Path | None:
        """Returns `folder`, a subfolder or the parent, if it has all required files."""
        return self._find_complete_folder(self._list_candidates(folder))

    def find_images(self, root: pathlib.Path) -> pathlib.Path:
        """Returns the image folder or the image archive; the path may not exist.

        An empty folder, left by an interrupted `tar`, is used if there is no archive.
        """
        folder = root / self.image_folders[0]
        if folder.is_dir() and any(folder.iterdir()):
            return folder
        archives = (root / name for name in self.image_archives)
        return next((path for path in archives if path.is_file()), folder)

    def unpack_images(
        self, root: pathlib.Path, counts: base.Counts, unpack: base.Unpack
    ) -> pathlib.Path:
        """Returns the folder of the images; unpacks their archive first if needed."""
        images = self.find_images(root)
        if not images.is_file():
            return images
        counts.add(f"noted: images in {images.name}")
        unpacked = unpack(images)
        inner = unpacked / self.image_folders[0]
        return inner if inner.is_dir() else unpacked

    def has_images(self, root: pathlib.Path) -> bool:
        """Returns whether the folder or archive of the images exists below `root`."""
        return self.find_images(root).exists()

    def list_watched_paths(self, root: pathlib.Path) -> list[pathlib.Path]:
        """Returns paths whose modification times change with the images."""
        images = self.find_images(root)
        patterns = ("/".join("*" * level) for level in range(1, self.watched_depth + 1))
        below = [path for pattern in patterns for path in sorted(images.glob(pattern))]
        return [images, *below]

    def _check_required(self, root: pathlib.Path) -> dict[str, bool]:
        """Returns `{name: whether it exists}` for the required files and folders."""
        files = {name: (root / name).is_file() for name in self.lists}
        images = " or ".join((f"{self.image_folders[0]}/", *self.image_archives))
        return files | {images: self.has_images(root)}

    def _list_candidates(self, folder: pathlib.Path) -> list[pathlib.Path]:
        above = [folder.parent] if folder.name in self.inner_folders else []
        return [folder, *(folder / name for name in self.subfolders), *above]

    def _find_complete_folder(self, folders: list[pathlib.Path]) -> pathlib.Path | None:
        """Returns the first folder with all required files, or None."""
        return next((f for f in folders if all(self._check_required(f).values())), None)

    def _find_root_below(self, user_folder: pathlib.Path) -> pathlib.Path:
        """Finds the root in or near the user's folder, or raises UserError."""
        candidates = self._list_candidates(user_folder)
        root = self._find_complete_folder(candidates)
        is_empty = not any(any(self._check_required(f).values()) for f in candidates)
        if root is None and self.any_subfolder and is_empty:
            # A name that is not printable would garble messages.
            below = sorted(p for p in user_folder.iterdir() if p.name.isprintable())
            deeper = [root for path in below for root in self._list_candidates(path)]
            root = self._find_complete_folder(deeper)
            others = [path for path in deeper if path != root]
            second = self._find_complete_folder(others)
            if root and second:
                raise UserError(
                    f"data.dir: {user_folder} contains several copies of {self.title}; "
                    f"set data.dir to one of them, such as {root} or {second}"
                )
            candidates += deeper
        if root is not None:
            return root
        if self.archive and (user_folder / self.archive).is_file():
            return user_folder
        raise self._make_missing_error(candidates)

    def _make_missing_error(self, folders: list[pathlib.Path]) -> UserError:
        """Returns an error that lists the files missing in the most complete folder."""
        root = max(folders, key=lambda path: sum(self._check_required(path).values()))
        files = self._check_required(root)
        missing = [name for name, exists in files.items() if not exists]
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        names = ", ".join(missing[:3]) + more
        if len(missing) == len(files):
            return UserError(
                f"data.dir: no {self.title} in {folders[0]} or {folders[1]}: missing "
                f"{names}; {self.remedy}"
            )
        return UserError(
            f"data.dir: {root} lacks {names}: unpack all of {self.title} there, or "
            f"{self.remedy}"
        )

    def _find_marker(self, root: pathlib.Path) -> pathlib.Path:
        """Returns the path of the marker of a sample edition, in or above the root."""
        inner = root / base.MARKER
        if root.name in self.subfolders and not inner.is_file():
            return root.parent / base.MARKER
        return inner
