"""Compilation for TPUs that are not there: memory, schedule and an estimate of time before anyone rents them."""
