"""The methods: one file each, written for one adapter, against the contract alone."""
