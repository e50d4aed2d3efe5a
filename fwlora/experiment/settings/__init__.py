"""Settings: the schema, how a configuration becomes settings, and the command line."""
