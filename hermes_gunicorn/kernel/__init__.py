"""eBPF: the program, its ways into the kernel, and what dispatches by it."""
