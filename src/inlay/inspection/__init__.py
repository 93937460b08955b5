"""What an adapter has learned: measures of its parameters and, with rows, of what its parts do."""
