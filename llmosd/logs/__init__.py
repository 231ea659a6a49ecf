"""Workers' logs on their way to the disk and the journal: the log writer's process, and what it is made of.

Standard library only: the log writer runs without site-packages, so that it is small and starts at once.
"""
