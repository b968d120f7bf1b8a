"""Models on disk: written atomically, found by name, averaged, compressed."""
