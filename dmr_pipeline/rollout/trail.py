"""What a KV cache has read of an episode, and who has read it, by the book.

The streams themselves may lag behind, where it was looked up what a precision does.
"""

from hashlib import blake2b


class Trail:
    """The reader of each token, numbers below 256. The last token of the transcript is read by whoever acts: what comes next is
    told by the pass that reads it."""

    def __init__(self) -> None:
        self.readers = bytearray()
        self._before = 0

    def __len__(self) -> int:
        return len(self.readers)

    def begin_step(self) -> None:
        self._before = len(self.readers)

    @property
    def before(self) -> bytes:
        """As it was when the step began."""
        return bytes(self.readers[: self._before])

    def rewind(self) -> None:
        """Forget what has been read in this step."""
        self.cut(self._before)

    def cut(self, length: int) -> None:
        """Keep the first tokens."""
        del self.readers[length:]

    def after(self, reader: int, held: int) -> bytes:
        """Of a transcript of so many tokens, once this reader has read it."""
        known = min(len(self), held - 1)
        return bytes(self.readers[:known]) + bytes([reader]) * (held - known)

    def read(self, reader: int, held: int, kept: int = 0) -> int:
        """A reader reads a transcript of so many tokens, and `kept` more.

        Returns:
            Tokens of the transcript that it had to read, at least one.
        """
        known = min(len(self), held - 1)
        self.readers[known:] = bytes([reader]) * (held - known + kept)
        return held - known


def digest(*trails: bytes) -> bytes:
    hashed = blake2b(digest_size=16)
    for trail in trails:
        hashed.update(len(trail).to_bytes(4, "little") + trail)
    return hashed.digest()
