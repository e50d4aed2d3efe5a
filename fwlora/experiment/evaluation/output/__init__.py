"""Tables and JSON documents."""
