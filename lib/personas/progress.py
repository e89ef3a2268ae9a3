"""Progress that people can read: one moving line in a terminal, one line a tenth in a log."""

from tqdm import tqdm


class Bar(tqdm):
    """tqdm's bar. Where its stream is no terminal, it prints a line for each tenth of the work, with the time
    left, and no other."""

    def __init__(self, *args, **kwargs):
        self.tenth = 0
        super().__init__(*args, **{"mininterval": 5} | kwargs)

    @property
    def moving(self) -> bool:
        """Whether the stream is a terminal."""
        return bool(getattr(self.fp, "isatty", lambda: False)())

    def display(self, msg=None, pos=None):
        if self.moving:
            return super().display(msg, pos)
        tenth = int(10 * self.n / self.total) if self.total else 0
        if tenth > self.tenth:
            self.tenth = tenth
            self.fp.write(f"{self}\n")
            self.fp.flush()

    def update(self, n=1):
        found = super().update(n)
        if not self.disable and not self.moving:
            self.display()
        return found

    def close(self):
        if self.disable or self.moving:
            return super().close()
        self.display()
        self.disable = True
        self._decr_instances(self)
