"""Generated from `proto/llmos/v1`: `make proto`."""
