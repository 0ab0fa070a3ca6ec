"""llamayard: one endpoint over one Ollama server per GPU."""

__version__ = "0.2.0"
