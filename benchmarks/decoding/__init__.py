"""JPEG decoders beside each other, by the public protocol of imread_benchmark."""
