"""Content encoders: text, pictures and attributes become unit vectors."""
