"""The bus protocol as pure state machines: `frames` (what travels), `client` and `host` (both ends of it).

No socket, no clock, no randomness: the library, the gateway, the worker hosts and the simulation all run this code.
"""
