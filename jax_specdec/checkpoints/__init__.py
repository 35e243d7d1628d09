"""Files: targets and drafters in safetensors, read and written."""
