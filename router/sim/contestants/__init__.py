"""Those who serve the same requests on the same simulated machine, each by its own rules."""
