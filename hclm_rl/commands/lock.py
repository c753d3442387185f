"""One run at a time in a folder."""

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

LOCK_NAME = "run.lock"
CLOCK_IS_SET = 60  # seconds


@dataclass(frozen=True, kw_only=True)
class Owner:
    """A process: its number may be given again, its number and start together are not."""

    host: str
    process: int
    started: float  # seconds since 1970

    @classmethod
    def this(cls) -> "Owner":
        own = psutil.Process()
        return cls(host=socket.gethostname(), process=own.pid, started=own.create_time())

    def is_dead(self) -> bool:
        """Whether it is known to be no other process at work; of one on another host it is not known."""
        if self.host != socket.gethostname():
            return False
        if self.process == os.getpid():  # whose number this process has now, or itself
            return True
        try:
            # a clock that is set moves the start of what runs already
            return abs(psutil.Process(self.process).create_time() - self.started) > CLOCK_IS_SET
        except psutil.NoSuchProcess:
            return True


@dataclass(frozen=True)
class RunLock:
    """A file in the run's folder that names its owner; a dead owner's is taken over."""

    folder: Path
    is_held: bool = True  # by this process, of all that train together

    @property
    def file(self) -> Path:
        return self.folder / LOCK_NAME

    def take(self) -> None:
        """Raises a ValueError where another run is at work in the folder."""
        if not self.is_held:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        own = Owner.this()
        mine = self.folder / f"{LOCK_NAME}.{own.process}"
        mine.write_text(json.dumps(vars(own)))
        try:
            while True:
                try:
                    os.link(mine, self.file)  # unlike renaming, it fails where there is one
                    return
                except FileExistsError:
                    self.clear_of_the_dead(own)
        finally:
            mine.unlink(missing_ok=True)

    def clear_of_the_dead(self, own: Owner) -> None:
        """Removes a dead owner's lock or this process's own; refuses where the owner lives or may live."""
        try:
            text = self.file.read_text()
            owner = Owner(**json.loads(text))
        except FileNotFoundError:
            return
        except (ValueError, TypeError) as error:
            raise ValueError(f"{self.file} cannot be read: remove it if no other run is at work there") from error
        if not owner.is_dead():
            raise ValueError(
                f"another run is at work in {self.folder} (process {owner.process} on {owner.host}): take another "
                f"output_dir, wait for its end, or remove {self.file} if it has ended"
            )
        aside = self.folder / f"{LOCK_NAME}.of-{owner.process}.by-{own.process}"
        try:
            self.file.rename(aside)
        except FileNotFoundError:
            return
        if aside.read_text() != text:  # a third process was quicker, and this is its lock
            aside.rename(self.file)
        aside.unlink(missing_ok=True)

    def release(self) -> None:
        """Also of a folder in which nothing was written."""
        if self.is_held:
            self.file.unlink(missing_ok=True)
            with suppress(OSError):
                self.folder.rmdir()  # only an empty one can be removed

    @contextmanager
    def until_error(self) -> Iterator[None]:
        """Takes it, and lets go of it only where something is raised inside."""
        self.take()
        try:
            yield
        except BaseException:
            self.release()
            raise
