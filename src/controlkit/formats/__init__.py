"""Files of controls: detection, loading, saving, conversion."""
