"""What a run would take before there is one: which methods fit, how long they take, what they cost."""
