"""The control plane: gRPC services over the kernel's reads and commands. It decides nothing and keeps nothing."""
