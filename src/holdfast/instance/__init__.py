"""One vTPM's life: its states, the registry in memory, and the processes that carry it."""
