"""A weight push: the trainer's tensors, laid out, written to shared memory or sent, and committed."""
