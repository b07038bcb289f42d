"""The face of container runtimes: the hook they run. It reaches everything else by the API."""
