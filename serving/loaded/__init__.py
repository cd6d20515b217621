"""What a server loads late and keeps: torch, the user tower, content encoders."""
