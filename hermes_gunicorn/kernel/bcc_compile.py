"""Child of ``bcc.py``: compile C to eBPF with BCC and write the instructions to stdout.

Run as a script, in an interpreter of its own; imports nothing of the package.
Standard input is a JSON object: ``text`` (the C source), ``function``, ``flags``.
"""

import json
import os
import sys
import sysconfig
import tempfile
from pathlib import Path

# Where distributions put the module, should this interpreter be another one.
SYSTEM_PACKAGES = (
    "/usr/lib/python3/dist-packages",
    "/usr/lib64/python3/site-packages",
    "/usr/lib/python{version}/site-packages",
)

# BCC wants the kernel's headers, our program only types. This stub tree, named by
# BCC_KERNEL_SOURCE, satisfies the helpers that BCC puts in front of every program.
TYPES = """
#pragma once
typedef signed char __s8, s8;
typedef unsigned char __u8, u8;
typedef short __s16, s16;
typedef unsigned short __u16, u16, __be16, __le16, __sum16;
typedef int __s32, s32;
typedef unsigned int __u32, u32, __be32, __le32, __wsum;
typedef long long __s64, s64;
typedef unsigned long long __u64, u64, __be64, __le64;
typedef unsigned long size_t, uintptr_t;
typedef _Bool bool;
#define __aligned_u64 __u64 __attribute__((aligned(8)))
"""
VERSION = """
#define KERNEL_VERSION(a, b, c) (((a) << 16) + ((b) << 8) + (c))
#define LINUX_VERSION_CODE KERNEL_VERSION(5, 5, 0)
"""
HEADERS = {
    "linux/kconfig.h": "#define CONFIG_BPF_SYSCALL 1\n",
    "linux/types.h": TYPES,
    "linux/version.h": VERSION,
    "linux/bpf_common.h": "",
    "linux/compiler.h": "",
    "linux/log2.h": "",
    "asm/page.h": "",
    "uapi/linux/bpf.h": "",
    "uapi/linux/if_ether.h": "",
    "uapi/linux/if_packet.h": "",
    "uapi/linux/ptrace.h": "",
}


def main() -> None:
    """Read the request, compile, write the code."""
    request = json.load(sys.stdin)
    version = sysconfig.get_python_version()
    sys.path += [path.format(version=version) for path in SYSTEM_PACKAGES]
    # Only the code may go to stdout, whatever BCC and LLVM print.
    stdout = os.dup(1)
    os.dup2(2, 1)
    with tempfile.TemporaryDirectory(prefix="hermes-bcc-") as directory:
        for name, text in HEADERS.items():
            path = Path(directory, "include", name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        os.environ["BCC_KERNEL_SOURCE"] = directory
        from bcc import BPF

        if not hasattr(BPF, "dump_func"):
            raise ImportError("No module named 'bcc' of the BPF Compiler Collection")
        program = BPF(text=request["text"].encode(), cflags=request["flags"])
        code = program.dump_func(request["function"].encode())
    os.write(stdout, code)


if __name__ == "__main__":
    main()
