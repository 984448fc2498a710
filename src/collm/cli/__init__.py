"""The command line. Commands are thin, and import what is heavy when they run."""
