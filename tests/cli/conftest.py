from tests.launch.conftest import command_line, commands, prepared, stored

__all__ = ["command_line", "commands", "prepared", "stored"]
