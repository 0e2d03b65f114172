"""The ways from one schema to the next: a file a step, in `versions/`, oldest name first."""
