"""From a Hydra configuration to a finished run: stages, files, tracking."""
