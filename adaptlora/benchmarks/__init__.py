"""What `adaptlora bench` and bench/ measure with: providers timed side by side, limits of the machine, results and their comparison."""
