"""What llmosd costs, measured against something else in the same run. `python -m bench`, or `make bench`.

Nothing here is a test: a figure says something of the machine it was measured on, a ratio says a little more.
"""
