"""The kernel in thin named calls. Oddities are explained where they bite; no policy here."""
