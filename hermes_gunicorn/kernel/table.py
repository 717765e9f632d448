"""The program, and the maps that all bind addresses share."""

from __future__ import annotations

from hermes_gunicorn.core.errors import Unsupported
from hermes_gunicorn.core.layout import ALLOWED, BIND, CONTROL, GROUP, MAX_GROUPS, WORKER
from hermes_gunicorn.core.table import Table
from hermes_gunicorn.kernel import bpf, loader, refusals

__all__ = ["KernelTable"]


class KernelTable:
    """The program and the maps that all bind addresses share.

    Args:
        choice: which loader, one of ``loader.LOADERS``.
        slots: rows of the table, slot 0 included.

    Attributes:
        table: the worker status table, as the kernel program reads it.
        loader: the name of the loader in use.

    Raises:
        Unsupported: kernel dispatch is not to be had; says why and what helps.
    """

    def __init__(self, choice: str, slots: int) -> None:
        self.slots = slots
        self._maps: dict[str, bpf.Map] = {}
        try:
            for name, size, entries in (
                (CONTROL.name, CONTROL.size, 1),
                ("hermes_groups", GROUP.size, MAX_GROUPS),
                ("hermes_workers", WORKER.size, slots),
            ):
                self._maps[name] = bpf.Map(name, bpf.MAP_TYPE_ARRAY, size, entries, bpf.F_MMAPABLE)
            self.program, self.loader = loader.load(choice)
            self.table = Table(*(map.mmap().memory for map in self._maps.values()))
        except (OSError, Unsupported) as error:
            self.close()
            raise refusals.explain(error) from error

    def fds(self) -> list[int]:
        """Return the descriptors of the table's parts, for another process to map."""
        return [map.fd for map in self._maps.values()]

    def maps(self) -> dict[str, bpf.Map]:
        """Return the shared maps by name."""
        return dict(self._maps)

    def bind_maps(self) -> dict[str, bpf.Map]:
        """Make the maps of one bind address, by name."""
        array, mapped = bpf.MAP_TYPE_ARRAY, bpf.F_MMAPABLE
        sockets = bpf.MAP_TYPE_REUSEPORT_SOCKARRAY
        maps: dict[str, bpf.Map] = {}
        try:
            for name, type, size, entries, flags in (
                (BIND.name, array, BIND.size, 1, mapped),
                (ALLOWED.name, array, ALLOWED.size, MAX_GROUPS, mapped),
                ("hermes_listeners", sockets, 8, self.slots, 0),
            ):
                maps[name] = bpf.Map(name, type, size, entries, flags)
        except OSError:
            for map in maps.values():
                map.close()
            raise
        return maps

    def close(self) -> None:
        """Give up the fds. The maps live on while a program or a mapping uses them."""
        for map in self._maps.values():
            map.close()
