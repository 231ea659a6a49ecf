"""The functional core: everything that decides, as pure functions of events and time.

`Kernel.handle(event, now)` returns effects; `Kernel.deadline()` says when it wants to be called again. No I/O, no
clock, no randomness of its own, no asyncio. The daemon turns what happens into events and carries out the effects.
"""
