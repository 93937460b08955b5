"""The commands: each parses, calls and prints; torch is imported only once there is work."""
