"""The one way a process comes into being: `child` waits at a gate, `gate` is the parent's side of it.

The daemon starts worker hosts and services through it, and a worker host its engine. Nothing runs a program before
its parent has put it where it belongs and said *go*; a parent that dies before that leaves nothing behind.
"""
