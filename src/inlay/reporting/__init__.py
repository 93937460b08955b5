"""Pages that people look at: a run's report, an adapter's card."""
