def main() -> None:
    """Filled in below."""
