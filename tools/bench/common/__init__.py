"""What benches share: their options, the models they measure, and the other ways that ours stand beside."""
