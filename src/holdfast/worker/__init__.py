"""The worker: one vTPM, opened, served and sealed in a process that can do nothing else."""
