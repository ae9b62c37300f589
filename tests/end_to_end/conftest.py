from tests.end_to_end.fixtures import command_line, prepared

__all__ = ["command_line", "prepared"]
