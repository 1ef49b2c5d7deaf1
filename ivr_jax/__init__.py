"""ivr_jax: one unified text-and-image model that reasons in interleaved text and images, in JAX."""

__version__ = "0.1.0"
