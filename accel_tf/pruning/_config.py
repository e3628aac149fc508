"""What schedules, patterns and methods share: their arguments as a dictionary, and back."""

import dataclasses


class Configured:
    """The base of frozen dataclasses whose arguments are plain values, of which `None` is a default."""

    def get_config(self) -> dict:
        """Returns the arguments as a dictionary of plain values, for `from_config`."""
        config = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in config.items() if value is not None}

    @classmethod
    def from_config(cls, config: dict):
        """Makes it anew from what `get_config` returned."""
        return cls(**config)
