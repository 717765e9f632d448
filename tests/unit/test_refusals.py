"""The table of causes, for what this kernel cannot be made to answer."""

from __future__ import annotations

import errno

import pytest

from hermes_gunicorn.core.errors import BpfError, KernelError
from hermes_gunicorn.kernel.refusals import CAUSES, Facts, explain

BPF = frozenset({"CAP_BPF"})
ROOT = frozenset({"CAP_BPF", "CAP_PERFMON", "CAP_SYS_ADMIN", "CAP_NET_BIND_SERVICE"})
# The end of what 6.1.0-37-amd64 of Debian 12 says to CAP_BPF alone.
DEBIAN_12 = """\
; bool found = false;
118: (7b) *(u64 *)(r10 -72) = r2      ; R2_w=map_value(off=0,ks=4,vs=8192,imm=0) R10=fp0
; state->best = slot;
131: (63) *(u32 *)(r10 -72) = r1
attempt to corrupt spilled pointer on stack
processed 1337 insns (limit 1000000) max_states_per_insn 4 total_states 96 peak_states 96
"""
TOO_LONG = "BPF program is too large. Processed 1000001 insn\nprocessed 1000001 insns\n"


@pytest.mark.parametrize(
    ("number", "step", "log", "facts", "reason", "remedy"),
    [
        (errno.EACCES, "program", DEBIAN_12, Facts((6, 1), BPF), "CAP_PERFMON", "CAP_PERFMON"),
        (errno.EACCES, "program", DEBIAN_12, Facts((6, 1), ROOT), "verifier", "report"),
        (errno.E2BIG, "program", TOO_LONG, Facts((5, 10), ROOT), "too long", "Linux 6.1"),
        (errno.EINVAL, "map", "", Facts((5, 4), ROOT), "Linux 5.4 is too old", "Linux 5.5"),
        (errno.ENOSYS, "map", "", Facts((4, 4), ROOT), "Linux 4.4 is too old", "Linux 5.5"),
        (errno.ENOSYS, "map", "", Facts((6, 1), ROOT), "no eBPF", "CONFIG_BPF_SYSCALL"),
        (errno.EINVAL, "map", "", Facts((6, 1), ROOT), "without a part", "CONFIG_INET"),
        (errno.EPERM, "map", "", Facts((5, 10), BPF, locked=1), "locked", "LimitMEMLOCK"),
        (errno.EPERM, "map", "", Facts((5, 10), frozenset(), locked=1), "no permission", "CAP_BPF"),
        (errno.EPERM, "map", "", Facts((5, 7), BPF), "no permission", "run it with CAP_SYS_ADMIN"),
        (errno.EPERM, "map", "", Facts((6, 1), ROOT), "capability is there", "SELinux"),
        (errno.EACCES, "map", "", Facts((6, 1), ROOT), "capability is there", "SELinux"),
        (errno.ENFILE, "map", "", Facts((6, 1), ROOT), "the system has", "fs.file-max"),
        (errno.ENOMEM, "map", "", Facts((6, 1), ROOT), "not enough memory", "MemoryMax="),
        (errno.EADDRINUSE, "bind", "", Facts((6, 1), ROOT), "in use", "ss -tanp"),
        (errno.EPERM, "bind", "", Facts((6, 1), ROOT), "no permission", "SocketBindAllow="),
        (errno.EIO, "", "", Facts((6, 1), ROOT), "Input/output error", "report"),
    ],
)
def test_cause_and_remedy(number, step, log, facts, reason, remedy):
    kind = BpfError if step in ("map", "program") else KernelError
    why = explain(kind(number, f"the {step}", step, log), facts=facts)
    assert reason in why.reason
    assert remedy in why.remedy
    assert "\n" not in str(why)
    assert ("5.5" in why.remedy) == (facts.kernel < (5, 5))


def test_every_row_can_be_reached():
    """The last one fits everything, and no name stands for two."""
    assert len({cause.name for cause in CAUSES}) == len(CAUSES)
    assert CAUSES[-1].steps == CAUSES[-1].errnos == ()


def test_the_verifiers_last_word_is_not_its_statistics():
    error = BpfError(errno.EACCES, "load program", "program", DEBIAN_12)
    assert str(error).endswith("attempt to corrupt spilled pointer on stack")
