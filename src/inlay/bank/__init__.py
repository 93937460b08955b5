"""Many adapters beside one frozen base."""
