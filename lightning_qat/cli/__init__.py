"""The command line ``lightning-qat``."""
