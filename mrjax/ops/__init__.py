"""The operations that networks are made of, on feature maps; what is tuned for a platform stays in this package."""
