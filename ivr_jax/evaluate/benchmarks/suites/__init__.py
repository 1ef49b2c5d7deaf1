"""One benchmark a module; each has a constant `BENCHMARK`."""
