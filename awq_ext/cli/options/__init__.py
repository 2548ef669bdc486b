"""Options of the commands: their types, the checks of their values, and the settings that they stand for."""
