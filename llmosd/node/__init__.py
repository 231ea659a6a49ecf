"""All that touches this machine: spawning, watching, ending and confining processes, and measuring devices.

It decides nothing: it carries out the kernel's effects and tells what happened as the kernel's events.
"""
