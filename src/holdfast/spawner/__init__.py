"""The spawner: forks workers, and holds what a running container's device hangs on."""
