"""Training with several processes: gradients in one buffer, ranks that change on all of them together."""
