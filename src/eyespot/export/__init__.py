"""A trained model in the formats of other programs, each compared with our model before it is handed over.

A format is a function in ``eyespot.registry.EXPORTS``::

    export_x(assistant: Assistant, folder: Path) -> Consumer

It fills an empty folder and returns what it wrote, opened the way its users open it (see ``eyespot.export.parity``);
what the format cannot hold it refuses with ``parity.refuse``. The model is float32 on the CPU and stays as it is.
"""
